//! `casemate gc`, `usage`, `verify`: the store as a whole.

use std::collections::HashMap;

use casemate_interfaces::{JobProxy, NAME};
use clap::Args;
use serde::Serialize;
use zbus::{Connection, OwnedObjectPath, Variant};

use crate::bus::{Failure, connect, manager};
use crate::jobs::follow;
use crate::output::{json, printable, say, size, table};

#[derive(Args)]
pub struct Collect {
    /// Remove nothing, tell what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Tell why an object is kept, by its name in the store or the BLAKE3 of its content, and collect nothing
    #[arg(long, value_name = "OBJECT", conflicts_with_all = ["dry_run", "days"])]
    explain: Option<String>,
    /// Remove downloads that are older than so many days and that no lock names
    #[arg(long, default_value_t = 30)]
    days: u64,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
pub struct Usage {
    /// Only this one and its snapshots
    environment: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Explained {
    keepers: Vec<String>,
}

#[derive(Serialize)]
struct Verified {
    damaged: u64,
    layers: u64,
    entries: u64,
    bytes: u64,
    damage: Vec<String>,
}

#[derive(Serialize)]
struct Account {
    kind: String,
    name: String,
    exclusive_bytes: u64,
    shared_bytes: u64,
}

fn number(result: &HashMap<String, String>, key: &str) -> u64 {
    result.get(key).and_then(|value| value.parse().ok()).unwrap_or_default()
}

async fn log(connection: &Connection, job: OwnedObjectPath) -> Result<Vec<String>, Failure> {
    let job = JobProxy::builder(connection).destination(NAME).path(job).build().await?;
    Ok(job.get_log(HashMap::new()).await?)
}

pub async fn collect(collect: Collect) -> Result<u8, Failure> {
    let connection = connect().await?;
    let manager = manager(&connection).await?;
    if let Some(object) = &collect.explain {
        let job = manager.explain_object(object, HashMap::new()).await?;
        follow(&connection, &job).await?;
        let keepers = log(&connection, job).await?;
        match collect.json {
            true => json(&Explained { keepers })?,
            false => keepers.iter().for_each(|line| say!("{}", printable(line))),
        }
        return Ok(0);
    }
    let (dry, days) = (Variant::from(collect.dry_run), Variant::from(collect.days));
    let job = manager.collect_garbage(HashMap::from([("dry-run", &dry), ("days", &days)])).await?;
    let result = follow(&connection, &job).await?;
    if collect.json {
        json(&result)?;
        return Ok(0);
    }
    let verb = if collect.dry_run { "would be freed" } else { "freed" };
    let of = |key: &str| number(&result, key);
    say!(
        "{} {verb}: {} layers and uppers, {} objects, {} downloads; {} before, {} after",
        size(of("freed")),
        of("trees"),
        of("objects"),
        of("downloads"),
        size(of("before")),
        size(of("after"))
    );
    Ok(0)
}

pub async fn usage(usage: Usage) -> Result<u8, Failure> {
    let connection = connect().await?;
    let manager = manager(&connection).await?;
    let name = match &usage.environment {
        Some(selector) => Some(crate::bus::environment(&connection, selector).await?.name().await?),
        None => None,
    };
    let job = manager.measure_usage(HashMap::new()).await?;
    follow(&connection, &job).await?;
    let (_, found) = manager.get_usage(HashMap::new()).await?;
    let mut accounts: Vec<Account> = found
        .into_iter()
        .map(|(kind, name, exclusive_bytes, shared_bytes)| Account {
            kind,
            name,
            exclusive_bytes,
            shared_bytes,
        })
        .collect();
    if let Some(name) = name {
        accounts.retain(|one| match one.kind.as_str() {
            "environment" => one.name == name,
            "snapshot" => one.name.strip_prefix(&name).is_some_and(|rest| rest.starts_with(' ')),
            _ => false,
        });
    }
    if usage.json {
        json(&accounts)?;
        return Ok(0);
    }
    let row = |one: &Account| {
        let shared = if one.name.is_empty() { String::new() } else { size(one.shared_bytes) };
        vec![one.kind.clone(), one.name.clone(), size(one.exclusive_bytes), shared]
    };
    let mut rows: Vec<Vec<String>> = accounts.iter().map(row).collect();
    let total = accounts.iter().map(|one| one.exclusive_bytes).sum();
    rows.push(vec!["together".into(), String::new(), size(total), String::new()]);
    table(&["WHAT", "NAME", "ALONE", "SHARED"], &rows);
    Ok(0)
}

/// 1 where something is damaged.
pub async fn verify(as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let job = manager(&connection).await?.verify(HashMap::new()).await?;
    let result = follow(&connection, &job).await?;
    let damage = log(&connection, job).await?;
    let of = |key: &str| number(&result, key);
    let code = u8::from(of("damaged") > 0);
    if as_json {
        let (damaged, layers, entries, bytes) = (of("damaged"), of("layers"), of("entries"), of("bytes"));
        json(&Verified { damaged, layers, entries, bytes, damage })?;
        return Ok(code);
    }
    damage.iter().for_each(|line| say!("{}", printable(line)));
    let summary = format!("{} layers, {} entries, {}", of("layers"), of("entries"), size(of("bytes")));
    match of("damaged") {
        0 => say!("{summary}: all as it was written"),
        damaged => say!("{summary}: {damaged} damaged"),
    }
    Ok(code)
}
