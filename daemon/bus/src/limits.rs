//! Limits between the bus's `a{sv}` and the engine's words.

use casemate_engine::{Cpus, ResourceLimits};
use casemate_interfaces::Error;
use zbus::{OwnedVariant, Variant, fdo};

use crate::convert::{Options, known, option};

/// Whatever form a number has on the bus, or the string "max" for none.
fn number(limits: &Options, key: &str, before: Option<u64>) -> Result<Option<u64>, Error> {
    if !limits.contains_key(key) || is_lifted(limits, key) {
        return Ok(before.filter(|_| !limits.contains_key(key)));
    }
    option(limits, key)
}

fn is_lifted(limits: &Options, key: &str) -> bool {
    option::<String>(limits, key).is_ok_and(|value| value.as_deref() == Some("max"))
}

/// The limits of before, but for what is named.
pub fn changed(before: ResourceLimits, limits: &Options) -> Result<ResourceLimits, Error> {
    known(limits, &ResourceLimits::KEYS)?;
    let cpus = match (limits.contains_key("cpus"), is_lifted(limits, "cpus")) {
        (false, _) => before.cpus,
        (true, true) => None,
        (true, false) => option(limits, "cpus")?
            .map(|number: f64| {
                let bad = || Error::InvalidArgument(format!("cpus: {number} is no number of processors"));
                Cpus::from_number(number).ok_or_else(bad)
            })
            .transpose()?,
    };
    Ok(ResourceLimits {
        memory_limit_mb: number(limits, "memory_limit_mb", before.memory_limit_mb)?,
        swap_limit_mb: number(limits, "swap_limit_mb", before.swap_limit_mb)?,
        cpu_shares: number(limits, "cpu_shares", before.cpu_shares)?,
        cpus,
        pids: number(limits, "pids", before.pids)?,
        io_weight: number(limits, "io_weight", before.io_weight)?,
    })
}

/// Those that are asked for.
pub fn values(limits: &ResourceLimits) -> fdo::Result<Options> {
    let cpus = limits.cpus.map(|cpus| Variant::from(cpus.number()));
    let numbers = [
        ("memory_limit_mb", limits.memory_limit_mb),
        ("swap_limit_mb", limits.swap_limit_mb),
        ("cpu_shares", limits.cpu_shares),
        ("pids", limits.pids),
        ("io_weight", limits.io_weight),
    ];
    let numbers = numbers.into_iter().filter_map(|(key, value)| Some((key, Variant::from(value?))));
    numbers
        .chain(cpus.map(|cpus| ("cpus", cpus)))
        .map(|(key, value)| {
            let value =
                OwnedVariant::try_from(value).map_err(|error| fdo::Error::Failed(error.to_string()))?;
            Ok((key.to_owned(), value))
        })
        .collect()
}
