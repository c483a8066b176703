//! `casemate limits`: shows them, or changes them on record and where the environment runs.

use std::collections::HashMap;

use clap::Args;
use serde::Serialize;
use zbus::Variant;

use crate::bus::{Failure, connect, environment, properties};
use crate::commands::show::{INTERFACE, Limit, Shown};
use crate::jobs::follow;
use crate::output::{json, say};

#[derive(Args)]
pub struct Limits {
    environment: String,
    /// memory_limit_mb, swap_limit_mb, cpu_shares, cpus, pids or io_weight, with a number, or `max` for none
    #[arg(value_name = "LIMIT=VALUE", value_parser = change)]
    changes: Vec<(String, Change)>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Change {
    Lifted,
    Number(u64),
    Fraction(f64),
}

/// The daemon knows which limits there are and which values make sense; this is about types alone.
fn change(text: &str) -> Result<(String, Change), String> {
    let (key, value) = text.split_once('=').ok_or("write LIMIT=VALUE")?;
    let value = match value {
        "max" => Change::Lifted,
        _ if key == "cpus" => Change::Fraction(value.parse().map_err(|_| "no number")?),
        _ => Change::Number(value.parse().map_err(|_| "no whole number")?),
    };
    Ok((key.to_owned(), value))
}

#[derive(Serialize)]
struct Shape {
    limits: std::collections::BTreeMap<String, Limit>,
    unenforced: Vec<String>,
}

pub async fn run(limits: Limits) -> Result<u8, Failure> {
    let connection = connect().await?;
    let proxy = environment(&connection, &limits.environment).await?;
    if !limits.changes.is_empty() {
        let changes: Vec<(&str, Variant<'_>)> = limits
            .changes
            .iter()
            .map(|(key, value)| {
                let value = match value {
                    Change::Lifted => "max".into(),
                    Change::Number(number) => (*number).into(),
                    Change::Fraction(number) => (*number).into(),
                };
                (key.as_str(), value)
            })
            .collect();
        let changes: HashMap<&str, &Variant<'_>> = changes.iter().map(|(key, value)| (*key, value)).collect();
        let job = proxy.set_limits(changes, Default::default()).await?;
        follow(&connection, &job).await?;
    }
    let path = proxy.inner().path().to_string();
    let shown = Shown::from_properties(&properties(&connection, &path, INTERFACE).await?);
    if limits.json {
        json(&Shape { limits: shown.limits, unenforced: shown.unenforced_limits })?;
        return Ok(0);
    }
    for (key, value) in &shown.limits {
        let unenforced = shown.unenforced_limits.contains(key);
        say!("{key} = {value}{}", if unenforced { " (not enforced)" } else { "" });
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::{Change, change};

    #[test]
    fn changes_are_numbers_or_max() {
        assert_eq!(change("pids=100"), Ok(("pids".into(), Change::Number(100))));
        assert_eq!(change("cpus=1.5"), Ok(("cpus".into(), Change::Fraction(1.5))));
        assert_eq!(change("memory_limit_mb=max"), Ok(("memory_limit_mb".into(), Change::Lifted)));
        for text in ["pids", "pids=", "pids=-1", "pids=1.5", "cpus=x"] {
            assert!(change(text).is_err(), "{text}");
        }
    }
}
