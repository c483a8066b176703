//! Control groups: one for each environment, made before its init runs and holding all that init ever starts. Its limits
//! bound them, its counters tell what they use, its freezer pauses them.
//!
//! Who makes groups is behind [`Scopes`]: the user's systemd manager (the bus crate's, since it is asked over the bus), or
//! a part of the hierarchy that was delegated to us ([`crate::delegated`]). What is in a group is read and written here as
//! files, the same way for both. Nothing is kept of a group: the kernel tells which one a running init is in.

use std::collections::BTreeSet;
use std::fs::File;
use std::future::Future;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use casemate_manifest::ResourceLimits;
use casemate_store::Id;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::delegated::Delegated;
use crate::error::Error;

/// Freezing and emptying take the time of a system call or two of each process; one that is stuck in the kernel may hold
/// it up.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    #[error("cannot {action} {path}: {source}")]
    File { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("systemd's user manager: {0}")]
    Manager(String),
    #[error("{path}: still not {state} after {} s; a process in it may be stuck in the kernel", PATIENCE.as_secs())]
    Stuck { path: PathBuf, state: &'static str },
}

impl ScopeError {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

pub type Pending<'a> = Pin<Box<dyn Future<Output = Result<(), ScopeError>> + Send + 'a>>;

/// A group to be made.
#[derive(Debug, Clone)]
pub struct Scope {
    /// `casemate-ID-NUMBER.scope`: never used twice, so that nobody waits for the last one to be cleared away.
    pub unit: String,
    pub description: String,
    pub limits: ResourceLimits,
}

/// Who makes groups.
pub trait Scopes: Send + Sync {
    /// For people.
    fn maker(&self) -> &'static str;
    /// The controllers that groups made here have.
    fn controllers(&self) -> BTreeSet<String>;
    /// How to get one that is missing.
    fn remedy(&self) -> &'static str;
    /// Make a group with its limits for init to be born in, where that can be done without a process to put into it.
    /// Moving one is slower: the kernel waits until no processor is in the middle of a fork, some 10 ms (RCU's grace period).
    fn prepare(&self, _scope: &Scope) -> Result<Option<PathBuf>, ScopeError> {
        Ok(None)
    }
    /// Make a group with its limits and move a process into it; not asked where [`Scopes::prepare`] has made one.
    fn create<'a>(&'a self, scope: &'a Scope, process: u32) -> Pending<'a>;
    /// Change the limits of a group that lives; those that are missing are lifted.
    fn limit<'a>(&'a self, group: &'a Path, limits: &'a ResourceLimits) -> Pending<'a>;
    /// Clear away empty groups of environments that `stale` says do not run: a daemon that died left them. Not asked of
    /// systemd, which clears up by itself.
    fn sweep(&self, _stale: &dyn Fn(&Id) -> bool) -> Result<(), ScopeError> {
        Ok(())
    }
    /// Clear away a group whose processes have all ended.
    fn remove<'a>(&'a self, group: &'a Path) -> Pending<'a>;
}

/// The cgroup v2 hierarchy, on pure and on hybrid machines.
pub fn hierarchy() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from).into_iter().find(|path| {
        // CGROUP2_SUPER_MAGIC
        rustix::fs::statfs(path).is_ok_and(|found| found.f_type == 0x6367_7270)
    })
}

/// The directory of the group that a process is in.
pub(crate) fn group_of(process: &str) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(hierarchy()?.join(path))
}

/// Words of a file of a control group; empty where there is no such file.
pub(crate) fn words(path: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

/// A limit that cannot be enforced, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unmet {
    pub keys: Vec<String>,
    pub reason: String,
}

/// Which controller each limit needs, with whether it is asked for.
fn needs(limits: &ResourceLimits) -> [(&'static str, &'static str, bool); 6] {
    [
        ("memory_limit_mb", "memory", limits.memory_limit_mb.is_some()),
        ("swap_limit_mb", "memory", limits.swap_limit_mb.is_some()),
        ("cpu_shares", "cpu", limits.cpu_shares.is_some()),
        ("cpus", "cpu", limits.cpus.is_some()),
        ("pids", "pids", limits.pids.is_some()),
        ("io_weight", "io", limits.io_weight.is_some()),
    ]
}

pub(crate) struct Cgroups {
    scopes: Result<Arc<dyn Scopes>, String>,
}

impl Cgroups {
    /// systemd's where it is there, else a delegated part of the hierarchy, else none.
    pub fn new(systemd: Option<Arc<dyn Scopes>>) -> Self {
        let scopes = match systemd {
            Some(scopes) => Ok(scopes),
            None => Delegated::find()
                .map(|found| Arc::new(found) as Arc<dyn Scopes>)
                .map_err(|missing| missing.to_string()),
        };
        match &scopes {
            Ok(scopes) => {
                let controllers = scopes.controllers().into_iter().collect::<Vec<_>>().join(" ");
                tracing::info!(maker = scopes.maker(), controllers, "control groups");
            }
            Err(reason) => tracing::info!(reason, "no control groups: no limits, no pause"),
        }
        Self { scopes }
    }

    pub fn scopes(&self) -> Result<&Arc<dyn Scopes>, &str> {
        self.scopes.as_ref().map_err(String::as_str)
    }

    /// Which of these limits this machine cannot enforce.
    pub fn unmet(&self, limits: &ResourceLimits) -> Option<Unmet> {
        if limits.is_empty() {
            return None;
        }
        let asked = needs(limits).into_iter().filter(|(.., asked)| *asked);
        let (missing, reason) = match &self.scopes {
            Err(reason) => (asked.map(|(key, ..)| key).collect::<Vec<_>>(), reason.clone()),
            Ok(scopes) => {
                let there = scopes.controllers();
                let (keys, controllers): (Vec<_>, BTreeSet<_>) = asked
                    .filter(|(_, controller, _)| !there.contains(*controller))
                    .map(|(key, controller, _)| (key, controller))
                    .unzip();
                let controllers = controllers.into_iter().collect::<Vec<_>>().join(", ");
                let maker = scopes.maker();
                let remedy = scopes.remedy();
                (keys, format!("{maker} has no control over {controllers} ({remedy})"))
            }
        };
        let keys: Vec<String> = missing.into_iter().map(str::to_owned).collect();
        (!keys.is_empty()).then_some(Unmet { keys, reason })
    }

    /// The group to make for an environment; `None` where there are none.
    pub fn scope(&self, id: &Id, number: u64, name: &str, limits: &ResourceLimits) -> Option<Scope> {
        self.scopes.as_ref().ok()?;
        let unmet = self.unmet(limits).map_or_else(Vec::new, |unmet| unmet.keys);
        let mut limits = *limits;
        for key in &unmet {
            match key.as_str() {
                "memory_limit_mb" => limits.memory_limit_mb = None,
                "swap_limit_mb" => limits.swap_limit_mb = None,
                "cpu_shares" => limits.cpu_shares = None,
                "cpus" => limits.cpus = None,
                "pids" => limits.pids = None,
                _ => limits.io_weight = None,
            }
        }
        Some(Scope {
            unit: format!("{}{number}.scope", prefix(id)),
            description: format!("Casemate environment {name}"),
            limits,
        })
    }

    pub fn prepare(&self, scope: &Scope) -> Result<Option<Group>, ScopeError> {
        match &self.scopes {
            Ok(scopes) => Ok(scopes.prepare(scope)?.map(|path| Group { path })),
            Err(_) => Ok(None),
        }
    }

    pub async fn create(&self, scope: &Scope, process: u32) -> Result<(), ScopeError> {
        match &self.scopes {
            Ok(scopes) => scopes.create(scope, process).await,
            Err(_) => Ok(()),
        }
    }

    pub fn sweep(&self, stale: &dyn Fn(&Id) -> bool) -> Result<(), ScopeError> {
        self.scopes.as_ref().map_or(Ok(()), |scopes| scopes.sweep(stale))
    }

    pub async fn limit(&self, group: &Group, limits: &ResourceLimits) -> Result<(), ScopeError> {
        match &self.scopes {
            Ok(scopes) => scopes.limit(&group.path, limits).await,
            Err(_) => Ok(()),
        }
    }

    /// Clear away a group whose init is gone.
    pub async fn remove(&self, group: &Group) -> Result<(), ScopeError> {
        group.kill()?;
        match &self.scopes {
            Ok(scopes) => scopes.remove(&group.path).await,
            Err(_) => Ok(()),
        }
    }
}

fn prefix(id: &Id) -> String {
    format!("casemate-{id}-")
}

/// What an environment uses now; `None` where the kernel does not count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes, page cache and all.
    pub memory: Option<u64>,
    pub memory_peak: Option<u64>,
    pub swap: Option<u64>,
    /// Microseconds.
    pub cpu: Option<u64>,
    pub pids: Option<u64>,
    pub read_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
}

/// The group of a running environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    path: PathBuf,
}

impl Group {
    /// The group that this environment's init is in, if it was made for it.
    pub fn of(init: i32, id: &Id) -> Option<Self> {
        let path = group_of(&init.to_string())?;
        let name = path.file_name()?.to_str()?;
        (name.starts_with(&prefix(id)) && name.ends_with(".scope")).then_some(Self { path })
    }

    pub fn open(&self) -> Result<OwnedFd, ScopeError> {
        let directory = File::open(&self.path).map_err(ScopeError::file("open", &self.path))?;
        Ok(directory.into())
    }

    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.path.join(file)).ok().map(|text| text.trim().to_owned())
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.parse().ok()
    }

    pub fn usage(&self) -> Usage {
        let cpu = self.read("cpu.stat").and_then(|text| field(&text, "usage_usec"));
        let io = self.read("io.stat");
        let sum = |name: &str| {
            let text = io.as_deref()?;
            Some(
                text.split_whitespace().filter_map(|word| word.strip_prefix(name)?.parse::<u64>().ok()).sum(),
            )
        };
        Usage {
            memory: self.number("memory.current"),
            memory_peak: self.number("memory.peak"),
            swap: self.number("memory.swap.current"),
            cpu,
            pids: self.number("pids.current"),
            read_bytes: sum("rbytes="),
            written_bytes: sum("wbytes="),
        }
    }

    /// Which of these limits are not in force: an answer of the kernel, not of whom we asked to set them.
    pub fn unmet(&self, limits: &ResourceLimits) -> Vec<String> {
        let is = |file: &str, value: u64| self.number(file) == Some(value);
        let (memory, swap) = limits.memory();
        let memory_is = memory.is_none_or(|bytes| is("memory.max", bytes));
        // A kernel that knows no swap has no file for it.
        let without_swap = || !Path::new("/proc/swaps").exists();
        let swap_is = swap.is_none_or(|bytes| is("memory.swap.max", bytes) || without_swap());
        let cpus_is = limits.cpus.is_none_or(|cpus| {
            let text = self.read("cpu.max").unwrap_or_default();
            let both = text
                .split_once(' ')
                .and_then(|(quota, period)| Some((quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?)));
            // The quota is rounded to microseconds.
            both.is_some_and(|(quota, period)| {
                quota.abs_diff(cpus.thousandths().saturating_mul(period) / 1_000) <= 1
            })
        });
        let io = self.read("io.weight").or_else(|| self.read("io.bfq.weight")).unwrap_or_default();
        let io_is = limits.io_weight.is_none_or(|weight| {
            io.lines().any(|line| line.strip_prefix("default ").unwrap_or(line) == weight.to_string())
        });
        [
            ("memory_limit_mb", memory_is),
            ("swap_limit_mb", swap_is),
            ("cpu_shares", limits.cpu_weight().is_none_or(|weight| is("cpu.weight", weight))),
            ("cpus", cpus_is),
            ("pids", limits.pids.is_none_or(|count| is("pids.max", count))),
            ("io_weight", io_is),
        ]
        .into_iter()
        .filter(|(_, met)| !met)
        .map(|(key, _)| key.to_owned())
        .collect()
    }

    /// Freeze or thaw all processes in it, and wait until they are.
    pub async fn freeze(&self, on: bool) -> Result<(), ScopeError> {
        let path = self.path.join("cgroup.freeze");
        std::fs::write(&path, if on { "1" } else { "0" }).map_err(ScopeError::file("write", &path))?;
        let (line, state) = if on { ("frozen 1", "frozen") } else { ("frozen 0", "thawed") };
        wait_for_event(&self.path, line, state).await
    }

    /// End what is left when init is gone: who keeps the network is outside its namespace, and frozen it sees no end.
    pub fn kill(&self) -> Result<(), ScopeError> {
        let (kill, thaw) = (self.path.join("cgroup.kill"), self.path.join("cgroup.freeze"));
        // Before Linux 5.14 there is no such file; thawed, the helpers end by themselves.
        let (path, word) = if kill.exists() { (kill, "1") } else { (thaw, "0") };
        match std::fs::write(&path, word) {
            // The service manager has cleared it away; ENODEV while it was being opened.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(()),
            result => result.map_err(ScopeError::file("write", &path)),
        }
    }

    pub fn is_frozen(&self) -> bool {
        self.read("cgroup.freeze").as_deref() == Some("1")
    }

    /// Changes of the count of processes that were killed for want of memory; `None` where memory is not controlled.
    pub fn out_of_memory(&self) -> Option<Events> {
        Events::open(&self.path.join("memory.events")).ok()
    }
}

/// `name number`, one a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().parse().ok())
}

/// `cgroup.events` of a group says so, or will within our patience.
pub(crate) async fn wait_for_event(
    group: &Path,
    line: &'static str,
    state: &'static str,
) -> Result<(), ScopeError> {
    let path = group.join("cgroup.events");
    let mut events = Events::open(&path).map_err(ScopeError::file("watch", &path))?;
    let until = async {
        loop {
            let text = events.read().map_err(ScopeError::file("read", &path))?;
            if text.lines().any(|found| found == line) {
                return Ok(());
            }
            events.changed().await.map_err(ScopeError::file("watch", &path))?;
        }
    };
    let stuck = || ScopeError::Stuck { path: group.to_owned(), state };
    tokio::time::timeout(PATIENCE, until).await.map_err(|_| stuck())?
}

/// One of the kernel's files of events: it wakes us when it changes. No inotify: of that each user has little, and an
/// environment could use it up.
pub(crate) struct Events {
    file: AsyncFd<File>,
}

impl Events {
    fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: a File gives the same open descriptor for as long as it lives.
        let file = unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }?;
        Ok(Self { file })
    }

    pub fn read(&mut self) -> std::io::Result<String> {
        let file = self.file.get_mut();
        file.rewind()?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    }

    /// Since the last read. Dropped while it waits, it loses nothing.
    pub async fn changed(&mut self) -> std::io::Result<()> {
        self.file.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }

    pub fn oom_kills(&mut self) -> Option<u64> {
        field(&self.read().ok()?, "oom_kill")
    }
}

impl From<Unmet> for Error {
    fn from(unmet: Unmet) -> Self {
        Self::LimitUnenforceable { keys: unmet.keys.join(", "), reason: unmet.reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_the_kernels_files() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 7";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom"), Some(3));
        assert_eq!(field(text, "swap"), None);
    }

    #[test]
    fn without_groups_every_limit_is_unmet() {
        let cgroups = Cgroups { scopes: Err("there are none".to_owned()) };
        assert_eq!(cgroups.unmet(&ResourceLimits::default()), None);
        let limits = ResourceLimits { pids: Some(100), io_weight: Some(10), ..ResourceLimits::default() };
        let error = Error::from(cgroups.unmet(&limits).expect("unmet")).to_string();
        assert!(error.contains("pids, io_weight") && error.contains("there are none"), "{error}");
    }
}
