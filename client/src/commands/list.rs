//! `casemate list`.

use std::collections::HashMap;

use casemate_interfaces::{NAME, ROOT};
use serde::Serialize;
use zbus::{Connection, OwnedVariant};

use crate::bus::{Failure, connect};
use crate::commands::show::{INTERFACE, Shown};
use crate::output::{json, table};

#[derive(Serialize)]
#[serde(transparent)]
struct Environments(Vec<Shown>);

/// The properties of all environments, in one call.
pub async fn environments(connection: &Connection) -> Result<Vec<HashMap<String, OwnedVariant>>, Failure> {
    let objects =
        zbus::fdo::ObjectManagerProxy::builder(connection).destination(NAME).path(ROOT).build().await?;
    let mut environments = Vec::new();
    for (_, interfaces) in objects.get_managed_objects().await? {
        for (name, properties) in interfaces {
            if name.as_str() == INTERFACE {
                let named = properties.into_iter().map(|(name, value)| (name.to_string(), value));
                environments.push(named.collect());
            }
        }
    }
    Ok(environments)
}

pub async fn run(as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let found = environments(&connection).await?;
    let mut environments: Vec<Shown> = found.iter().map(Shown::from_properties).collect();
    environments.sort_by(|a, b| a.name.cmp(&b.name));
    if as_json {
        json(&Environments(environments))?;
    } else {
        let row = |e: &Shown| {
            vec![
                e.name.clone(),
                e.state.clone(),
                e.release.clone(),
                e.network.clone(),
                e.sessions.to_string(),
                e.id.clone(),
            ]
        };
        table(
            &["NAME", "STATE", "RELEASE", "NETWORK", "SESSIONS", "ID"],
            &environments.iter().map(row).collect::<Vec<_>>(),
        );
    }
    Ok(0)
}
