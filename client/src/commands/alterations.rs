//! `casemate clone`, `rename`, `freeze`, `thaw`, `archive`, `unarchive`.

use std::collections::HashMap;

use clap::Args;

use crate::bus::{Failure, connect, environment};
use crate::commands::snapshots::snapshot;
use crate::jobs::follow;
use crate::output::{json, say};

#[derive(Args)]
pub struct Clone {
    environment: String,
    /// Name of the new one
    name: String,
    /// As this snapshot says [default: as it is now]
    #[arg(long)]
    snapshot: Option<String>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// States that keep an environment as it is.
#[derive(Debug, PartialEq)]
pub enum To {
    Frozen,
    Thawed,
    Archived,
    Unarchived,
}

pub async fn clone(clone: Clone) -> Result<u8, Failure> {
    let connection = connect().await?;
    let job = match &clone.snapshot {
        Some(name) => {
            let snapshot = snapshot(&connection, &clone.environment, name).await?;
            snapshot.clone_as(&clone.name, HashMap::new()).await?
        }
        None => {
            let environment = environment(&connection, &clone.environment).await?;
            environment.clone_as(&clone.name, HashMap::new()).await?
        }
    };
    let result = follow(&connection, &job).await?;
    if clone.json {
        json(&result)?;
    } else {
        say!("{} cloned as {}", clone.environment, clone.name);
    }
    Ok(0)
}

pub async fn rename(selector: &str, name: &str) -> Result<u8, Failure> {
    let connection = connect().await?;
    let job = environment(&connection, selector).await?.rename(name, HashMap::new()).await?;
    follow(&connection, &job).await?;
    say!("{selector} is {name} now");
    Ok(0)
}

pub async fn enter_state(selector: &str, to: To) -> Result<u8, Failure> {
    let connection = connect().await?;
    let proxy = environment(&connection, selector).await?;
    let (job, word) = match to {
        To::Frozen => (proxy.freeze(HashMap::new()).await?, "frozen"),
        To::Thawed => (proxy.thaw(HashMap::new()).await?, "thawed"),
        To::Archived => (proxy.archive(HashMap::new()).await?, "archived"),
        To::Unarchived => (proxy.unarchive(HashMap::new()).await?, "unarchived"),
    };
    follow(&connection, &job).await?;
    say!("{selector} {word}");
    Ok(0)
}
