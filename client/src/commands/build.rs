//! `casemate build`: the manifest goes as text with a descriptor of its directory; the lock comes back beside it.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use clap::Args;
use zbus::Variant;

use crate::bus::{Failure, connect, environment, manager};
use crate::commands::lifecycle::warn_of_unenforced;
use crate::jobs::follow;
use crate::output::{json, say};

#[derive(Args)]
pub struct Build {
    /// Name of the environment [default: name of the manifest's directory]
    name: Option<String>,
    #[arg(long, default_value = "casemate.toml")]
    manifest: PathBuf,
    /// Install exactly what casemate.lock says
    #[arg(long)]
    locked: bool,
    /// Touch no network
    #[arg(long)]
    offline: bool,
    /// Build it, and let it run, although this machine cannot enforce its limits
    #[arg(long)]
    unenforced_limits: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

fn failed(action: &str, path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let text = format!("cannot {action} {}", path.display());
    move |error| Failure::Local(format!("{text}: {error}"))
}

/// Written beside, then renamed: a reader sees the old or the new lock.
fn write_lock(path: &Path, text: &str) -> Result<(), Failure> {
    if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let temporary = path.with_extension(format!("lock.{}", std::process::id()));
    std::fs::write(&temporary, text).map_err(failed("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(failed("write", path))
}

pub async fn run(build: Build) -> Result<u8, Failure> {
    let text = std::fs::read_to_string(&build.manifest).map_err(failed("read", &build.manifest))?;
    let parent =
        build.manifest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = std::fs::File::open(parent).map_err(failed("open", parent))?;
    let lock_path = parent.join("casemate.lock");
    let lock = match std::fs::read_to_string(&lock_path) {
        Ok(lock) => Some(lock),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed("read", &lock_path)(error)),
    };
    let name = match &build.name {
        Some(name) => name.clone(),
        None => {
            let full = parent.canonicalize().map_err(failed("resolve", parent))?;
            full.file_name().and_then(|name| name.to_str()).map(str::to_owned).ok_or_else(|| {
                Failure::Local(format!(
                    "{} gives no name for the environment; name it: `casemate build NAME`",
                    full.display()
                ))
            })?
        }
    };
    let connection = connect().await?;
    let (locked, offline, lock_value) =
        (Variant::from(build.locked), Variant::from(build.offline), lock.map(Variant::from));
    let unenforced = Variant::from(build.unenforced_limits);
    let mut options = std::collections::HashMap::from([
        ("locked", &locked),
        ("offline", &offline),
        ("unenforced-limits", &unenforced),
    ]);
    if let Some(lock) = &lock_value {
        options.insert("lock", lock);
    }
    let job = manager(&connection).await?.build(&name, &text, directory.as_fd().into(), options).await?;
    let result = follow(&connection, &job).await?;
    warn_of_unenforced(&result);
    let lock = environment(&connection, &name).await?.get_lock(Default::default()).await?;
    write_lock(&lock_path, &lock)?;
    if build.json {
        json(&result)?;
    } else if result.get("changed").is_some_and(|changed| changed == "false") {
        say!("{name} is up to date");
    } else {
        say!("{name} built");
    }
    Ok(0)
}
