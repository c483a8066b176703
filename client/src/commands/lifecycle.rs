//! `casemate start`, `stop`, `destroy`, `purge`.

use std::collections::HashMap;

use zbus::Variant;

use crate::bus::{Failure, connect, environment, manager};
use crate::jobs::follow;

pub async fn start(selector: &str) -> Result<u8, Failure> {
    let connection = connect().await?;
    let job = environment(&connection, selector).await?.start(Default::default()).await?;
    follow(&connection, &job).await?;
    Ok(0)
}

pub async fn stop(selector: &str, seconds: u64) -> Result<u8, Failure> {
    let connection = connect().await?;
    let timeout = Variant::from(seconds.saturating_mul(1_000));
    let job = environment(&connection, selector).await?.stop(HashMap::from([("timeout", &timeout)])).await?;
    follow(&connection, &job).await?;
    Ok(0)
}

pub async fn destroy(selector: &str, force: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let force = Variant::from(force);
    let job = environment(&connection, selector).await?.destroy(HashMap::from([("force", &force)])).await?;
    follow(&connection, &job).await?;
    println!("{selector} destroyed");
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
    println!("purged");
    Ok(0)
}
