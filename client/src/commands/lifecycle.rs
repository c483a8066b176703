//! `casemate start`, `stop`, `restart`, `pause`, `unpause`, `destroy`, `purge`.

use std::collections::HashMap;

use zbus::Variant;

use crate::bus::{Failure, connect, environment, manager};
use crate::jobs::follow;
use crate::output::{printable, say};

/// Limits that are not in force are said aloud, whatever else was asked for.
pub fn warn_of_unenforced(result: &HashMap<String, String>) {
    if let Some(unenforced) = result.get("unenforced") {
        eprintln!("casemate: warning: limits are not enforced: {}", printable(unenforced));
    }
}

pub async fn start(selector: &str, unenforced_limits: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let unenforced = Variant::from(unenforced_limits);
    let options = HashMap::from([("unenforced-limits", &unenforced)]);
    let job = environment(&connection, selector).await?.start(options).await?;
    warn_of_unenforced(&follow(&connection, &job).await?);
    Ok(0)
}

/// In milliseconds, as the bus has it.
fn timeout(seconds: Option<u64>) -> Option<Variant<'static>> {
    seconds.map(|seconds| Variant::from(seconds.saturating_mul(1_000)))
}

pub async fn restart(selector: &str, seconds: Option<u64>, unenforced_limits: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let (timeout, unenforced) = (timeout(seconds), Variant::from(unenforced_limits));
    let mut options = HashMap::from([("unenforced-limits", &unenforced)]);
    options.extend(timeout.as_ref().map(|timeout| ("timeout", timeout)));
    let job = environment(&connection, selector).await?.restart(options).await?;
    warn_of_unenforced(&follow(&connection, &job).await?);
    Ok(0)
}

pub async fn pause(selector: &str, on: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let environment = environment(&connection, selector).await?;
    let job = match on {
        true => environment.pause(Default::default()).await?,
        false => environment.unpause(Default::default()).await?,
    };
    follow(&connection, &job).await?;
    Ok(0)
}

pub async fn stop(selector: &str, seconds: Option<u64>) -> Result<u8, Failure> {
    let connection = connect().await?;
    let timeout = timeout(seconds);
    let options = timeout.as_ref().map(|timeout| ("timeout", timeout)).into_iter().collect();
    let job = environment(&connection, selector).await?.stop(options).await?;
    follow(&connection, &job).await?;
    Ok(0)
}

pub async fn destroy(selector: &str, force: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let force = Variant::from(force);
    let job = environment(&connection, selector).await?.destroy(HashMap::from([("force", &force)])).await?;
    follow(&connection, &job).await?;
    say!("{selector} destroyed");
    Ok(0)
}

pub async fn purge(yes: bool) -> Result<u8, Failure> {
    if !yes {
        return Err(Failure::Local(
            "this removes every environment, release and download; say so with --yes".into(),
        ));
    }
    let connection = connect().await?;
    let job = manager(&connection).await?.purge(Default::default()).await?;
    follow(&connection, &job).await?;
    say!("purged");
    Ok(0)
}
