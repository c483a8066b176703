//! `casemate release …`.

use std::path::Path;

use casemate_interfaces::{NAME, ROOT, ReleaseProxy};
use serde::Serialize;
use zbus::{Connection, OwnedObjectPath};

use crate::bus::{Failure, connect, manager};
use crate::jobs::follow;
use crate::output::{date, json, say, size, table};

#[derive(Serialize)]
struct Shown {
    reference: String,
    source: String,
    patch_level: u32,
    digest: String,
    architecture: String,
    verification: String,
    index_date: u64,
    added_at: u64,
    bytes: u64,
}

async fn proxy(connection: &Connection, path: OwnedObjectPath) -> Result<ReleaseProxy<'static>, Failure> {
    Ok(ReleaseProxy::builder(connection).destination(NAME).path(path).build().await?)
}

async fn read(connection: &Connection, path: OwnedObjectPath) -> Result<Shown, Failure> {
    let release = proxy(connection, path).await?;
    Ok(Shown {
        reference: release.reference().await?,
        source: release.source().await?,
        patch_level: release.patch_level().await?,
        digest: release.digest().await?,
        architecture: release.architecture().await?,
        verification: release.verification().await?,
        index_date: release.index_date().await?,
        added_at: release.added_at().await?,
        bytes: release.bytes().await?,
    })
}

pub async fn list(as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let objects =
        zbus::fdo::ObjectManagerProxy::builder(&connection).destination(NAME).path(ROOT).build().await?;
    let mut releases = Vec::new();
    for (path, interfaces) in objects.get_managed_objects().await? {
        if interfaces.keys().any(|name| name.as_str() == "org.casemate.Casemate1.Release") {
            releases.push(read(&connection, path).await?);
        }
    }
    releases.sort_by(|a, b| a.reference.cmp(&b.reference));
    if as_json {
        json(&releases)?;
    } else {
        let row = |r: &Shown| {
            vec![
                r.reference.clone(),
                format!("p{}", r.patch_level),
                date(r.index_date),
                size(r.bytes),
                r.verification.clone(),
            ]
        };
        table(
            &["RELEASE", "LEVEL", "INDEX", "SIZE", "VERIFIED BY"],
            &releases.iter().map(row).collect::<Vec<_>>(),
        );
    }
    Ok(0)
}

async fn finish(
    connection: &Connection,
    job: OwnedObjectPath,
    as_json: bool,
    verb: &str,
) -> Result<u8, Failure> {
    let result = follow(connection, &job).await?;
    if as_json {
        json(&result)?;
    } else {
        let release = result.get("release").cloned().unwrap_or_default();
        let unchanged = result.get("changed").is_some_and(|changed| changed == "false");
        say!("{release} {}", if unchanged { "is up to date" } else { verb });
    }
    Ok(0)
}

pub async fn fetch(reference: &str, as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let job = manager(&connection).await?.fetch_release(reference, Default::default()).await?;
    finish(&connection, job, as_json, "fetched and verified").await
}

pub async fn import(name: &str, archive: &Path, as_json: bool) -> Result<u8, Failure> {
    let file = std::fs::File::open(archive)
        .map_err(|error| Failure::Local(format!("cannot open {}: {error}", archive.display())))?;
    let connection = connect().await?;
    let job = manager(&connection)
        .await?
        .import_release(name, std::os::fd::AsFd::as_fd(&file).into(), Default::default())
        .await?;
    finish(&connection, job, as_json, "imported, signed by nobody").await
}

pub async fn show(reference: &str, as_json: bool) -> Result<u8, Failure> {
    let connection = connect().await?;
    let path = manager(&connection).await?.get_release(reference, Default::default()).await?;
    let release = read(&connection, path).await?;
    if as_json {
        json(&release)?;
        return Ok(0);
    }
    for (name, value) in [
        ("release", release.reference),
        ("patch level", format!("p{}", release.patch_level)),
        ("architecture", release.architecture),
        ("verified by", release.verification),
        ("index of", date(release.index_date)),
        ("added", date(release.added_at)),
        ("digest", release.digest),
        ("size", size(release.bytes)),
    ] {
        say!("{name:13} {}", crate::output::printable(&value));
    }
    Ok(0)
}

pub async fn remove(reference: &str) -> Result<u8, Failure> {
    let connection = connect().await?;
    let path = manager(&connection).await?.get_release(reference, Default::default()).await?;
    let job = proxy(&connection, path).await?.remove(Default::default()).await?;
    follow(&connection, &job).await?;
    say!("{reference} removed");
    Ok(0)
}
