//! `casemate list`.

use std::collections::HashMap;

use casemate_interfaces::{NAME, ROOT};
use serde::Serialize;
use zbus::{Connection, OwnedVariant};

use crate::bus::{Failure, connect, manager};
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
    if as_json {
        let found = environments(&connection).await?;
        let mut environments: Vec<Shown> = found.iter().map(Shown::from_properties).collect();
        environments.sort_by(|a, b| a.name.cmp(&b.name));
        json(&Environments(environments))?;
        return Ok(0);
    }
    let listed = manager(&connection).await?.list_environments(HashMap::new()).await?;
    let rows: Vec<Vec<String>> = listed
        .into_iter()
        .map(|(_, name, id, state, release, network, sessions)| {
            vec![name, state, release, network, sessions.to_string(), id]
        })
        .collect();
    table(&["NAME", "STATE", "RELEASE", "NETWORK", "SESSIONS", "ID"], &rows);
    Ok(0)
}
