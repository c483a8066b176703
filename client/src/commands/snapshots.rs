//! `casemate commit`, `snapshots`, `restore`, `rollback`.

use std::collections::HashMap;

use casemate_interfaces::{NAME, SnapshotProxy};
use clap::Args;
use serde::Serialize;
use zbus::{Connection, ObjectPath, OwnedObjectPath, Variant};

use crate::bus::{Failure, connect, environment};
use crate::jobs::follow;
use crate::output::{date, json, say, table};

#[derive(Args)]
pub struct Commit {
    environment: String,
    /// What it is for
    #[arg(long, short, default_value = "", hide_default_value = true)]
    message: String,
    /// Name of the snapshot [default: the next number]
    #[arg(long)]
    name: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Snapshots {
    environment: String,
    /// Remove a snapshot
    #[arg(long, value_name = "SNAPSHOT", conflicts_with = "json")]
    remove: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Restore {
    environment: String,
    snapshot: String,
    #[command(flatten)]
    how: How,
}

#[derive(Args)]
pub struct Rollback {
    environment: String,
    #[command(flatten)]
    how: How,
}

#[derive(Args)]
struct How {
    /// Do not keep what is there now as a snapshot
    #[arg(long)]
    discard: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown {
    name: String,
    message: String,
    created_at: u64,
    /// A restore made it.
    automatic: bool,
    /// `sealed`, `stored`, `damaged`
    state: String,
}

/// The snapshot of this name.
pub async fn snapshot(
    connection: &Connection,
    selector: &str,
    name: &str,
) -> Result<SnapshotProxy<'static>, Failure> {
    let found = environment(connection, selector).await?.get_snapshot(name, HashMap::new()).await?;
    let path: ObjectPath<'static> = found.into();
    Ok(SnapshotProxy::builder(connection)
        .destination(NAME)
        .path(path)
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?)
}

pub async fn commit(commit: Commit) -> Result<u8, Failure> {
    let connection = connect().await?;
    let name = commit.name.map(Variant::from);
    let options = name.as_ref().map(|name| ("name", name)).into_iter().collect();
    let job = environment(&connection, &commit.environment).await?.commit(&commit.message, options).await?;
    let result = follow(&connection, &job).await?;
    if commit.json {
        json(&result)?;
    } else {
        let name = result.get("snapshot").map_or("", String::as_str);
        say!("{} committed as {name}", commit.environment);
    }
    Ok(0)
}

pub async fn list(snapshots: Snapshots) -> Result<u8, Failure> {
    let connection = connect().await?;
    if let Some(name) = &snapshots.remove {
        let job = snapshot(&connection, &snapshots.environment, name).await?.remove(HashMap::new()).await?;
        follow(&connection, &job).await?;
        say!("snapshot {name} of {} removed", snapshots.environment);
        return Ok(0);
    }
    let found =
        environment(&connection, &snapshots.environment).await?.list_snapshots(HashMap::new()).await?;
    let shown: Vec<Shown> = found
        .into_iter()
        .map(|(_, name, message, created_at, automatic, state)| Shown {
            name,
            message,
            created_at,
            automatic,
            state,
        })
        .collect();
    if snapshots.json {
        json(&shown)?;
        return Ok(0);
    }
    let row = |one: &Shown| {
        let by = if one.automatic { "restore" } else { "commit" };
        let message = one.message.lines().next().unwrap_or_default().to_owned();
        vec![one.name.clone(), date(one.created_at), by.to_owned(), one.state.clone(), message]
    };
    table(&["NAME", "MADE", "BY", "STATE", "MESSAGE"], &shown.iter().map(row).collect::<Vec<_>>());
    Ok(0)
}

async fn finish(
    connection: &Connection,
    selector: &str,
    job: OwnedObjectPath,
    as_json: bool,
) -> Result<u8, Failure> {
    let result = follow(connection, &job).await?;
    if as_json {
        json(&result)?;
        return Ok(0);
    }
    let name = result.get("snapshot").map_or("", String::as_str);
    match result.get("kept") {
        Some(kept) => say!("{selector} is {name} again; what it was is {kept}"),
        None => say!("{selector} is {name} again"),
    }
    Ok(0)
}

pub async fn restore(restore: Restore) -> Result<u8, Failure> {
    let connection = connect().await?;
    let discard = Variant::from(restore.how.discard);
    let proxy = snapshot(&connection, &restore.environment, &restore.snapshot).await?;
    let job = proxy.restore(HashMap::from([("discard", &discard)])).await?;
    finish(&connection, &restore.environment, job, restore.how.json).await
}

pub async fn rollback(rollback: Rollback) -> Result<u8, Failure> {
    let connection = connect().await?;
    let discard = Variant::from(rollback.how.discard);
    let proxy = environment(&connection, &rollback.environment).await?;
    let job = proxy.rollback(HashMap::from([("discard", &discard)])).await?;
    finish(&connection, &rollback.environment, job, rollback.how.json).await
}
