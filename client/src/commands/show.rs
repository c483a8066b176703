//! `casemate show`.

use std::collections::HashMap;

use serde::Serialize;
use zbus::OwnedVariant;

use crate::bus::{Failure, connect, environment, properties};
use crate::output::{date, json, printable};

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
            mounts: get(properties, "Mounts"),
        }
    }
}

pub async fn run(selector: &str, as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let proxy = environment(&connection, selector).await?;
    let path = proxy.inner().path().to_string();
    let shown =
        Shown::from_properties(&properties(&connection, &path, "org.casemate.Casemate1.Environment").await?);
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
        println!("{name:9} {}", printable(&value));
    }
    for port in &shown.ports {
        println!("{:9} {}", "port", printable(port));
    }
    for destination in &shown.allow {
        println!("{:9} {}", "allow", printable(destination));
    }
    for (host, inside, read_only) in &shown.mounts {
        println!(
            "{:9} {} → {}{}",
            "mount",
            printable(host),
            printable(inside),
            if *read_only { " (read-only)" } else { "" }
        );
    }
    Ok(0)
}
