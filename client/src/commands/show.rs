//! `casemate show`.

use std::collections::HashMap;

use serde::Serialize;
use zbus::OwnedVariant;

use crate::bus::{Failure, connect, environment, properties};
use crate::output::{date, json, printable, say};

pub const INTERFACE: &str = "org.casemate.Casemate1.Environment";

/// A limit's value: whole, but for `cpus`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Limit {
    Number(u64),
    Fraction(f64),
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Fraction(number) => number.fmt(f),
        }
    }
}

fn limit((key, value): (String, OwnedVariant)) -> Option<(String, Limit)> {
    let copy = value.try_clone().ok()?;
    let number = u64::try_from(copy).map(Limit::Number);
    Some((key, number.or_else(|_| f64::try_from(value).map(Limit::Fraction)).ok()?))
}

#[derive(Serialize)]
pub struct Shown {
    pub id: String,
    pub name: String,
    pub state: String,
    pub release: String,
    pub lock_digest: String,
    pub network: String,
    /// `ADDRESS:HOST:INSIDE/PROTOCOL`
    pub ports: Vec<String>,
    /// Destinations; empty where every one is allowed.
    pub allow: Vec<String>,
    pub id_mode: String,
    pub created_at: u64,
    pub built_at: u64,
    pub sessions: u32,
    pub limits: std::collections::BTreeMap<String, Limit>,
    /// Those that are not in force.
    pub unenforced_limits: Vec<String>,
    /// Processes killed for want of memory since it was started last.
    pub oom_kills: u64,
    /// What it runs itself while it is started.
    pub command: Vec<String>,
    /// `starting`, `healthy`, `unhealthy`; empty where there is no check.
    pub health: String,
    /// -1 where none is known.
    pub last_exit_code: i32,
    /// Devices of the host that are granted.
    pub devices: Vec<String>,
    /// Sockets of the user's session that are granted.
    pub sockets: Vec<String>,
    /// Programs inside may make user namespaces.
    pub nested_namespaces: bool,
    /// Host path, path inside, read-only.
    pub mounts: Vec<(String, String, bool)>,
}

impl Shown {
    pub fn from_properties(
        properties: &HashMap<impl std::borrow::Borrow<str> + std::hash::Hash + Eq, OwnedVariant>,
    ) -> Self {
        fn get<T: TryFrom<OwnedVariant> + Default>(
            properties: &HashMap<impl std::borrow::Borrow<str> + std::hash::Hash + Eq, OwnedVariant>,
            name: &str,
        ) -> T {
            let value = properties.get(name).and_then(|value| value.try_clone().ok());
            value.and_then(|value| T::try_from(value).ok()).unwrap_or_default()
        }
        Self {
            id: get(properties, "Id"),
            name: get(properties, "Name"),
            state: get(properties, "State"),
            release: get(properties, "Release"),
            lock_digest: get(properties, "LockDigest"),
            network: get(properties, "Network"),
            ports: get(properties, "Ports"),
            allow: get(properties, "Allow"),
            id_mode: get(properties, "IdMode"),
            created_at: get(properties, "CreatedAt"),
            built_at: get(properties, "BuiltAt"),
            sessions: get(properties, "Sessions"),
            limits: get::<HashMap<String, OwnedVariant>>(properties, "Limits")
                .into_iter()
                .filter_map(limit)
                .collect(),
            unenforced_limits: get(properties, "UnenforcedLimits"),
            oom_kills: get(properties, "OomKills"),
            command: get(properties, "Command"),
            health: get(properties, "Health"),
            last_exit_code: get(properties, "LastExitCode"),
            devices: get(properties, "Devices"),
            sockets: get(properties, "Sockets"),
            nested_namespaces: get(properties, "NestedNamespaces"),
            mounts: get(properties, "Mounts"),
        }
    }
}

pub async fn run(selector: &str, as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let proxy = environment(&connection, selector).await?;
    let path = proxy.inner().path().to_string();
    let shown = Shown::from_properties(&properties(&connection, &path, INTERFACE).await?);
    if as_json {
        json(&shown)?;
        return Ok(0);
    }
    let single = "single: root inside is you outside (see `casemate doctor`)";
    let ids = if shown.id_mode == "single" { single.to_owned() } else { shown.id_mode };
    for (name, value) in [
        ("name", shown.name),
        ("id", shown.id),
        ("state", shown.state),
        ("release", shown.release),
        ("network", shown.network),
        ("ids", ids),
        ("sessions", shown.sessions.to_string()),
        ("created", date(shown.created_at)),
        ("built", date(shown.built_at)),
        ("lock", shown.lock_digest),
    ] {
        say!("{name:9} {}", printable(&value));
    }
    if !shown.command.is_empty() {
        say!("{:9} {}", "command", printable(&shown.command.join(" ")));
    }
    if !shown.health.is_empty() {
        say!("{:9} {}", "health", printable(&shown.health));
    }
    for port in &shown.ports {
        say!("{:9} {}", "port", printable(port));
    }
    for destination in &shown.allow {
        say!("{:9} {}", "allow", printable(destination));
    }
    for device in &shown.devices {
        say!("{:9} {}", "device", printable(device));
    }
    for socket in &shown.sockets {
        say!("{:9} {}", "socket", printable(socket));
    }
    if shown.nested_namespaces {
        say!("{:9} user namespaces may be made inside", "nested");
    }
    for (key, value) in &shown.limits {
        let unenforced = if shown.unenforced_limits.contains(key) { " (not enforced)" } else { "" };
        say!("{:9} {} = {value}{unenforced}", "limit", printable(key));
    }
    if shown.oom_kills > 0 {
        say!("{:9} {} processes killed for want of memory", "memory", shown.oom_kills);
    }
    for (host, inside, read_only) in &shown.mounts {
        say!(
            "{:9} {} → {}{}",
            "mount",
            printable(host),
            printable(inside),
            if *read_only { " (read-only)" } else { "" }
        );
    }
    Ok(0)
}
