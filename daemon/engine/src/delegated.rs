//! Groups in a part of the cgroup v2 hierarchy that was delegated to us: a directory that is ours, where the daemon runs.
//! The kernel wants processes in leaves only, so the daemon moves into a leaf and environments get one each beside it:
//!
//! ```text
//! DELEGATED/casemated/                     this daemon, its workers
//! DELEGATED/casemate-ID-NUMBER.scope/      an environment
//! ```

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use casemate_manifest::ResourceLimits;
use casemate_store::Id;

use crate::cgroups::{Pending, Scope, ScopeError, Scopes, group_of, wait_for_event, words};

/// The daemon's own leaf.
const OWN: &str = "casemated";
/// What limits are made of.
const WANTED: [&str; 4] = ["cpu", "io", "memory", "pids"];

#[derive(Debug, thiserror::Error)]
pub enum Missing {
    #[error("no cgroup v2 is mounted at /sys/fs/cgroup")]
    Hierarchy,
    #[error(
        "there is neither systemd's user manager on the bus nor a delegated control group ({0} is not ours)"
    )]
    NotOurs(PathBuf),
}

pub struct Delegated {
    directory: PathBuf,
}

fn is_ours(directory: &Path) -> bool {
    let writable = |path: &Path| rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok();
    let owned = directory.metadata().is_ok_and(|found| found.uid() == rustix::process::getuid().as_raw());
    owned && writable(directory) && writable(&directory.join("cgroup.procs")) && {
        // What systemd manages belongs to it alone, but for what it marks as delegated.
        let mut mark = [0; 8];
        let delegated = rustix::fs::getxattr(directory, c"user.delegate", &mut mark)
            .is_ok_and(|length| &mark[..length] == b"1");
        delegated || !Path::new("/run/systemd/system").exists()
    }
}

impl Delegated {
    pub fn find() -> Result<Self, Missing> {
        let mut directory = group_of("self").ok_or(Missing::Hierarchy)?;
        if directory.file_name().is_some_and(|name| name == OWN) {
            directory.pop();
        }
        if !is_ours(&directory) {
            return Err(Missing::NotOurs(directory));
        }
        let there = words(&directory.join("cgroup.controllers"));
        let wanted: Vec<&str> = WANTED.into_iter().filter(|name| there.contains(*name)).collect();
        if !wanted.is_empty() {
            let own = directory.join(OWN);
            let moved = make(&own).and_then(|()| write(&own, "cgroup.procs", "0"));
            if let Err(error) = moved {
                tracing::warn!(%error, "the daemon cannot leave the control group that was delegated to it");
            }
        }
        for name in wanted {
            // One that stays out is missing in `controllers`, and limits that need it are refused.
            if let Err(error) = write(&directory, "cgroup.subtree_control", &format!("+{name}")) {
                tracing::warn!(%error, controller = name, "no limits by this controller");
            }
        }
        Ok(Self { directory })
    }
}

fn set(group: &Path, limits: &ResourceLimits) -> Result<(), ScopeError> {
    let number = |limit: Option<u64>| limit.map_or_else(|| "max".to_owned(), |limit| limit.to_string());
    let weight = |limit: Option<u64>| limit.unwrap_or(100).to_string();
    let (memory, swap) = limits.memory();
    let cpus =
        limits.cpus.map_or_else(|| "max".to_owned(), |cpus| format!("{} 100000", cpus.thousandths() * 100));
    for (file, value) in [
        ("memory.swap.max", number(swap)),
        ("memory.max", number(memory)),
        ("cpu.weight", weight(limits.cpu_weight())),
        ("cpu.max", cpus),
        ("pids.max", number(limits.pids)),
        ("io.weight", weight(limits.io_weight)),
    ] {
        // A file that is not there is a limit that the caller misses when it reads back what is in force.
        if group.join(file).exists() {
            write(group, file, &value)?;
        }
    }
    Ok(())
}

fn make(group: &Path) -> Result<(), ScopeError> {
    match std::fs::create_dir(group) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(ScopeError::file("make", group)(error))
        }
        _ => Ok(()),
    }
}

fn write(group: &Path, file: &str, value: &str) -> Result<(), ScopeError> {
    let path = group.join(file);
    std::fs::write(&path, value).map_err(ScopeError::file("write", &path))
}

impl Scopes for Delegated {
    fn maker(&self) -> &'static str {
        "the control group that was delegated to casemated"
    }

    fn controllers(&self) -> BTreeSet<String> {
        words(&self.directory.join("cgroup.subtree_control"))
    }

    fn remedy(&self) -> &'static str {
        "delegate it, to a group in which casemated is alone"
    }

    fn prepare(&self, scope: &Scope) -> Result<Option<PathBuf>, ScopeError> {
        let group = self.directory.join(&scope.unit);
        make(&group)?;
        if let Err(error) = set(&group, &scope.limits) {
            std::fs::remove_dir(&group).map_err(ScopeError::file("remove", &group))?;
            return Err(error);
        }
        Ok(Some(group))
    }

    fn create<'a>(&'a self, scope: &'a Scope, process: u32) -> Pending<'a> {
        Box::pin(
            async move { write(&self.directory.join(&scope.unit), "cgroup.procs", &process.to_string()) },
        )
    }

    fn limit<'a>(&'a self, group: &'a Path, limits: &'a ResourceLimits) -> Pending<'a> {
        Box::pin(async move { set(group, limits) })
    }

    fn sweep(&self, stale: &dyn Fn(&Id) -> bool) -> Result<(), ScopeError> {
        let failed = || ScopeError::file("list", &self.directory);
        for entry in std::fs::read_dir(&self.directory).map_err(failed())? {
            let path = entry.map_err(failed())?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let id = name.strip_prefix("casemate-").and_then(|rest| rest.split_once('-')?.0.parse().ok());
            if name.ends_with(".scope") && id.is_some_and(|id| stale(&id)) {
                match std::fs::remove_dir(&path) {
                    // EBUSY: something lives in it, which is not ours to end.
                    Err(error) if error.kind() != std::io::ErrorKind::ResourceBusy => {
                        return Err(ScopeError::file("remove", &path)(error));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn remove<'a>(&'a self, group: &'a Path) -> Pending<'a> {
        Box::pin(async move {
            // A process that has ended leaves its group a moment later.
            let emptied = wait_for_event(group, "populated 0", "empty").await;
            match std::fs::remove_dir(group) {
                // Somebody else was as quick.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                Err(error) => emptied.and(Err(ScopeError::file("remove", group)(error))),
                Ok(()) => Ok(()),
            }
        })
    }
}
