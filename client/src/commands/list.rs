//! `casemate list`.

use casemate_interfaces::{NAME, ROOT};
use serde::Serialize;

use crate::bus::{Failure, connect};
use crate::commands::show::Shown;
use crate::output::{json, table};

#[derive(Serialize)]
#[serde(transparent)]
struct Environments(Vec<Shown>);

pub async fn run(as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let objects =
        zbus::fdo::ObjectManagerProxy::builder(&connection).destination(NAME).path(ROOT).build().await?;
    let mut environments = Vec::new();
    for (_, interfaces) in objects.get_managed_objects().await? {
        for (name, properties) in interfaces {
            if name.as_str() == "org.casemate.Casemate1.Environment" {
                environments.push(Shown::from_properties(&properties));
            }
        }
    }
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
