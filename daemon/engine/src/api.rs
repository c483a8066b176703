//! What the engine tells its callers: plain data, no bus types.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

pub use casemate_manifest::{Cpus, ResourceLimits};
use serde::{Deserialize, Serialize};

/// Where everything is. The edges (the daemon's `main`, tests) read the environment; the engine does not.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `$XDG_DATA_HOME/casemate`
    pub store: PathBuf,
    /// `$XDG_CACHE_HOME/casemate`
    pub cache: PathBuf,
    /// `$XDG_RUNTIME_DIR/casemate`
    pub runtime: PathBuf,
    /// `$XDG_STATE_HOME/casemate`: logs.
    pub state: PathBuf,
    /// Configuration, first match wins for files, `sources.d/` is united: the user's, `/etc`'s, `/usr/share`'s.
    pub configuration: Vec<PathBuf>,
    /// Workers and init.
    pub libexec: PathBuf,
    pub https_proxy: String,
    pub http_proxy: String,
    pub no_proxy: String,
    /// `SSL_CERT_FILE` and `SSL_CERT_DIR` of the daemon, handed to the fetcher; empty where unset.
    pub ssl_cert_file: String,
    pub ssl_cert_dir: String,
    /// The host's resolv.conf(5).
    pub resolver: PathBuf,
    /// Where the host's own sockets are.
    pub sockets: HostSockets,
    /// `PATH`, where tools of the host are looked for.
    pub path: String,
    pub user_name: String,
    /// The user's home, for `~/` and for what policy keeps out of mounts.
    pub home: PathBuf,
}

/// What leads to sockets of the user's own session; empty where unset.
#[derive(Debug, Clone, Default)]
pub struct HostSockets {
    /// `SSH_AUTH_SOCK`
    pub ssh_agent: String,
    /// `DISPLAY`
    pub display: String,
    /// `XAUTHORITY`
    pub x_authority: String,
    /// `PULSE_SERVER`
    pub pulse: String,
    /// `DBUS_SESSION_BUS_ADDRESS`
    pub bus: String,
    /// `WAYLAND_DISPLAY`
    pub wayland: String,
    /// `XDG_RUNTIME_DIR`, where sound servers, the compositor and the bus listen.
    pub runtime: PathBuf,
}

/// Who asks: the unique name of the bus connection (for limits for each caller).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Caller(pub String);

impl Caller {
    /// The daemon itself: no connection has an empty name.
    pub(crate) fn daemon() -> Self {
        Self(String::new())
    }

    pub(crate) fn is_daemon(&self) -> bool {
        self.0.is_empty()
    }
}

pub type JobId = u64;
/// Session of an environment: `(environment id, number)`.
pub type ProcessId = (String, u64);

/// Something changed; read the new state with the engine's getters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    ReleaseAdded(String),
    ReleaseRemoved(String),
    EnvironmentAdded(String),
    EnvironmentChanged(String),
    EnvironmentRemoved(String),
    /// The environment's id and the snapshot's name.
    SnapshotAdded(String, String),
    SnapshotChanged(String, String),
    SnapshotRemoved(String, String),
    /// Processes were killed for want of memory: how many so far.
    OutOfMemory(String, u64),
    JobAdded(JobId),
    JobChanged(JobId),
    /// After all changes that the job made.
    JobEnded(JobId),
    JobLog(JobId, String),
    /// No longer kept; it ended [`crate::JOB_KEPT`] ago.
    JobRemoved(JobId),
    ProcessAdded(ProcessId),
    /// `(exited, status or signal)`
    ProcessEnded(ProcessId, bool, i32),
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReleaseInfo {
    /// `debian/bookworm`, or the name it was imported under.
    pub reference: String,
    pub source: String,
    pub patch_level: u32,
    /// Layer digest.
    pub digest: String,
    pub architecture: String,
    /// What vouches for it: `openpgp:FINGERPRINT` or `unsigned`; `damaged` where its record cannot be read.
    pub verification: String,
    /// Seconds since the epoch; 0 where the source has no index date.
    pub index_date: u64,
    pub added_at: u64,
    pub bytes: u64,
    /// `(name, version, architecture)`; empty for an imported archive.
    pub packages: Vec<(String, String, String)>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    #[default]
    Defined,
    Built,
    Running,
    Paused,
    Frozen,
    Archived,
    /// Never written: its record cannot be read.
    Damaged,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EnvironmentInfo {
    /// Random, 16 hex digits, from creation on.
    pub id: String,
    pub name: String,
    pub state: State,
    pub release: String,
    pub lock_digest: String,
    pub network: String,
    /// `ADDRESS:HOST:INSIDE/PROTOCOL`
    pub ports: Vec<String>,
    /// Destinations; empty where every one is allowed.
    pub allow: Vec<String>,
    /// Devices that are granted, as policy names them.
    pub devices: Vec<String>,
    /// Sockets that are granted, as policy names them.
    pub sockets: Vec<String>,
    /// Whether user namespaces may be made inside.
    pub nested_namespaces: bool,
    /// `(host path, inside path, read-only)`
    pub mounts: Vec<(String, String, bool)>,
    /// `range` or `single`.
    pub id_mode: String,
    pub created_at: u64,
    pub built_at: u64,
    pub sessions: u32,
    pub limits: ResourceLimits,
    /// Limits that are asked for and not in force: those of a running one, or those that could not be.
    pub unenforced_limits: Vec<String>,
    /// Processes that were killed for want of memory since it was started last.
    pub oom_kills: u64,
    /// What it runs itself while it is started; empty for nothing.
    pub command: Vec<String>,
    /// `starting`, `healthy`, `unhealthy`; empty where there is no check, or it does not run.
    pub health: String,
    /// Of the session that ended last, 128+n where a signal ended it; -1 where none has since this daemon runs.
    pub last_exit_code: i32,
}

/// An [`EnvironmentInfo`] in short.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    pub id: String,
    pub name: String,
    pub state: State,
    pub release: String,
    pub network: String,
    pub sessions: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// An id.
    pub environment: String,
    pub name: String,
    /// They count up within an environment; 0 where its record cannot be read.
    pub number: u64,
    pub message: String,
    pub created_at: u64,
    /// Made so that a restore loses nothing.
    pub automatic: bool,
    /// `sealed` (it can be used; its files are still to be hashed), `stored`, or `damaged`.
    pub state: String,
    pub release: String,
    pub lock_digest: String,
}

/// What something takes on the disk, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// `environment`, `release`, `snapshot`; or, without a name, `shared` (by several of these, counted once), `reclaimable`
    /// (nothing names it), `store` (records, directories, unfinished work), `downloads`.
    pub kind: String,
    pub name: String,
    /// What would be free without it. Over all accounts, this adds up to all that there is.
    pub exclusive: u64,
    /// What it shares with others.
    pub shared: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usages {
    /// 0: never.
    pub measured_at: u64,
    pub accounts: Vec<Account>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    Running,
    Done,
    Failed,
    Cancelled,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    pub id: JobId,
    /// `fetch`, `import`, `remove`, `build`, `start`, `stop`, `kill`, `restart`, `pause`, `unpause`, `limit`, `destroy`, `purge`,
    /// `commit`, `restore`, `rollback`, `clone`, `rename`, `freeze`, `thaw`, `archive`, `unarchive`, `forget` (a snapshot), `diff`, `measure`, `collect`, `explain`, `verify`;
    /// `store` is the daemon's own: what was sealed becomes a layer
    pub kind: String,
    pub subject: String,
    pub state: JobState,
    /// What it is doing, for people: `downloading packages`.
    pub stage: String,
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub items_done: u64,
    pub items_total: u64,
    pub started_at: u64,
    /// 0 while it runs.
    pub ended_at: u64,
    /// Name and value: `release`, `environment` (an id), `lock-digest`, `changed` (`true`/`false`), `seconds-STAGE`.
    pub result: Vec<(String, String)>,
    pub error: Option<(crate::ErrorKind, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    pub id: ProcessId,
    /// In the environment's pid namespace.
    pub pid: i32,
    pub command: Vec<String>,
    pub root: bool,
    pub terminal: bool,
    pub started_at: u64,
}

pub struct BuildRequest {
    pub name: String,
    /// Text of the manifest.
    pub manifest: String,
    /// The manifest's directory: relative mounts are judged beneath it.
    pub directory: OwnedFd,
    /// Text of an existing lock.
    pub lock: Option<String>,
    /// Install exactly the lock; an absent or unfit one is an error.
    pub locked: bool,
    /// Touch no network.
    pub offline: bool,
    /// Build it, and let it run, although limits cannot be enforced here.
    pub unenforced_limits: bool,
}

pub enum Streams {
    /// Standard input, output and error. Pipes, sockets and character devices that are no terminals.
    Given {
        input: OwnedFd,
        output: OwnedFd,
        error: OwnedFd,
    },
    Terminal {
        rows: u16,
        columns: u16,
    },
}

pub struct ExecRequest {
    pub command: Vec<String>,
    pub streams: Streams,
    /// Write end of a pipe; gets one line, `exit N` or `signal N`.
    pub status: OwnedFd,
    /// Run as the environment's root.
    pub root: bool,
    /// Inside; where `None`, what `host_directory` is inside, else the user's home.
    pub directory: Option<String>,
    /// The caller's working directory.
    pub host_directory: Option<String>,
    /// By the user's login shell; with an empty command that shell itself.
    pub login: bool,
    /// The calling client's `TERM`, `LANG`, … and what it adds by hand; judged by policy.
    pub variables: Vec<(String, String)>,
}

pub struct Started {
    pub process: ProcessId,
    pub pidfd: OwnedFd,
    /// Master side of the session's terminal.
    pub terminal: Option<OwnedFd>,
}

/// One finding of `doctor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    pub check: String,
    /// `ok`, `degraded` (a layer is missing) or `broken`.
    pub severity: String,
    pub detail: String,
    /// What to do; empty where all is well.
    pub remedy: String,
}
