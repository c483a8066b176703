//! What can go wrong, with what is needed to say it to a user: object, cause, way out.

use std::io;
use std::path::PathBuf;

use crate::api::State;

/// The kinds of [`Error`], one for each error name on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    NotFound,
    AlreadyExists,
    InvalidName,
    InvalidArgument,
    InvalidManifest,
    InvalidLock,
    IllegalTransition,
    MountDenied,
    PortDenied,
    DeviceDenied,
    SocketDenied,
    NestingDenied,
    VariableDenied,
    ResourceLimitExceeded,
    ResourceLimitUnenforceable,
    VerificationFailed,
    StaleIndex,
    ArchiveRefused,
    DownloadFailed,
    PackageFailed,
    StoreLocked,
    StoreDamaged,
    StoreFull,
    Busy,
    Cancelled,
    TooManyRequests,
    Unsupported,
    IdsUnavailable,
    ToolMissing,
    SandboxFailed,
    WorkerFailed,
    Io,
    Internal,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no {what} {name:?}; {remedy}")]
    NotFound { what: &'static str, name: String, remedy: &'static str },
    #[error("there is a {what} {name:?} already; {remedy}")]
    AlreadyExists { what: &'static str, name: String, remedy: &'static str },
    #[error(transparent)]
    Name(#[from] casemate_store::names::BadName),
    #[error(
        "{name:?} is a source's name for a release; an archive is imported as `local/NAME`, or `NAME` for short"
    )]
    SourcesName { name: String },
    #[error("the archive is {what}; give a file, or a pipe that an archive comes out of")]
    NoArchive { what: &'static str },
    #[error("the path of {what}, {path}, is not UTF-8; rename it")]
    NotUtf8 { what: &'static str, path: PathBuf },
    #[error(
        "{path} is not what it is for the daemon (another mount namespace, or renamed meanwhile); call again from the host"
    )]
    ElsewherePath { path: PathBuf },
    #[error("the command cannot be handed over: {0}")]
    Command(crate::control::ControlError),
    /// A worker said what no worker of ours says: it is damaged, or somebody's.
    #[error("{worker} answered {answer}, which makes no sense; nothing of it was used. Please report this")]
    Nonsense { worker: &'static str, answer: String },
    #[error("{what} broke off: {panic}; please report this")]
    BrokeOff { what: &'static str, panic: tokio::task::JoinError },
    #[error("{path} makes no sense: {what}")]
    Odd { path: PathBuf, what: String },
    #[error(transparent)]
    Manifest(#[from] casemate_manifest::ManifestError),
    #[error("casemate.lock: {0}")]
    Lock(casemate_manifest::LockError),
    #[error("casemate.lock: not found, but --locked asks for it; build once without --locked")]
    LockMissing,
    #[error("casemate.lock: it was made for another manifest; build once without --locked")]
    LockOfAnother,
    #[error(
        "casemate.lock: it pins another state of {release} than the one that is here; fetch that release, or build without --locked"
    )]
    LockPins { release: String },
    #[error("casemate.lock: no lock fits, and --offline forbids to resolve packages anew")]
    LockOffline,
    #[error("environment {name:?} is {from}, it cannot {action}; {remedy}")]
    Transition { name: String, from: State, action: &'static str, remedy: &'static str },
    #[error(transparent)]
    Refused(#[from] casemate_manifest::Refusal),
    #[error(
        "{keys} cannot be enforced: {reason}; see `casemate doctor`, remove what cannot be had, or say --unenforced-limits to go without"
    )]
    LimitUnenforceable { keys: String, reason: String },
    #[error(transparent)]
    Limit(#[from] casemate_manifest::BadLimit),
    #[error(
        "environment {name:?} has no control group of its own, so it cannot {action}: {reason}; see `casemate doctor`"
    )]
    NoGroup { name: String, action: &'static str, reason: String },
    #[error("the control group of {name:?}: {source}")]
    Group { name: String, source: crate::cgroups::ScopeError },
    #[error("{key} is not supported by this version of Casemate: {reason}; remove it from the manifest")]
    Unsupported { key: String, reason: String },
    #[error(
        "{subject} failed verification: {message}; nothing of it was used. Try again later or with another mirror"
    )]
    Verification { subject: String, message: String },
    #[error("{worker}: {kind}: {subject}: {message}")]
    Worker { worker: String, kind: WorkKind, subject: String, message: String },
    #[error("installing packages failed: {message}; the job's log (`casemate jobs`) has the whole output")]
    Package { message: String },
    #[error(transparent)]
    Store(#[from] casemate_store::Error),
    #[error(
        "the record of {what} {name:?} cannot be read: {reason}. Restore the file from a backup and restart casemated, or give \
         the {what} up with `casemate {}`",
        match *what { "release" => "release remove", "snapshot" => "snapshots --remove", _ => "destroy" }
    )]
    Damaged { what: &'static str, name: String, reason: String },
    #[error("{what} {name:?} is busy with another job; wait for it (`casemate jobs`) or cancel it")]
    Busy { what: &'static str, name: String },
    #[error("{most} jobs {whose} run already; wait for one (`casemate jobs`) or cancel it")]
    TooManyJobs { whose: &'static str, most: usize },
    #[error("casemated is stopping; ask again, and the bus starts it anew")]
    Stopping,
    #[error(
        "nothing is collected while it is not known what {what} names: {reason}; repair or remove that first, see `casemate doctor`"
    )]
    Uncollectable { what: String, reason: String },
    #[error(
        "{most} commits of {name:?} lie on each other and have not become one layer yet; stop it, and see `casemate jobs` for what \
         keeps the job \"store\" from it"
    )]
    Deep { name: String, most: usize },
    #[error("the message is {bytes} bytes long; {most} are the most")]
    Message { bytes: usize, most: usize },
    #[error("cancelled")]
    Cancelled,
    #[error("{tool} is not installed, and {key} needs it: install the package {package}")]
    ToolMissing { tool: &'static str, package: &'static str, key: &'static str },
    #[error(
        "{tool} says {said:?}, and {key} needs {needed} or newer (those before cut off clients that use libsystemd or zbus): install a newer \
         package {package}, as Debian 13 has it"
    )]
    ToolTooOld {
        tool: &'static str,
        said: String,
        key: &'static str,
        needed: &'static str,
        package: &'static str,
    },
    #[error("device {device:?} is granted, but {path} {what}; {remedy}")]
    Device { device: String, path: PathBuf, what: String, remedy: &'static str },
    #[error("socket {socket:?} is granted, but {what}; {remedy}")]
    Socket { socket: &'static str, what: String, remedy: &'static str },
    #[error("{path}: {source}")]
    Cdi { path: PathBuf, source: casemate_manifest::cdi::CdiError },
    #[error("the sandbox of {name:?} could not be set up: {message}")]
    Sandbox { name: String, message: String },
    #[error("{path}: {message}")]
    Configuration { path: PathBuf, message: String },
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

/// How a worker's failure counts on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkKind {
    Verification,
    Stale,
    Refused,
    Download,
    NotFound,
    Full,
    Failed,
}

impl std::fmt::Display for WorkKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Verification => "verification failed",
            Self::Stale => "index too old",
            Self::Refused => "refused",
            Self::Download => "download failed",
            Self::NotFound => "not found",
            Self::Full => "no space left",
            Self::Failed => "failed",
        })
    }
}

impl Error {
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }

    pub(crate) fn sys(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.into();
        move |errno| Self::Io { action, path, source: errno.into() }
    }

    pub fn kind(&self) -> ErrorKind {
        use casemate_manifest::Refusal;
        use casemate_store::Error as Store;
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::Name(_) => ErrorKind::InvalidName,
            Self::SourcesName { .. }
            | Self::NoArchive { .. }
            | Self::NotUtf8 { .. }
            | Self::ElsewherePath { .. }
            | Self::Command(_) => ErrorKind::InvalidArgument,
            Self::Nonsense { .. } => ErrorKind::WorkerFailed,
            Self::BrokeOff { .. } => ErrorKind::Internal,
            Self::Odd { .. } => ErrorKind::Io,
            Self::Manifest(_) => ErrorKind::InvalidManifest,
            Self::Lock(_)
            | Self::LockMissing
            | Self::LockOfAnother
            | Self::LockPins { .. }
            | Self::LockOffline => ErrorKind::InvalidLock,
            Self::Transition { .. } => ErrorKind::IllegalTransition,
            Self::Refused(Refusal::MountDenied { .. }) => ErrorKind::MountDenied,
            Self::Refused(Refusal::VariableDenied { .. }) => ErrorKind::VariableDenied,
            Self::Refused(Refusal::ResourceLimitExceeded { .. }) => ErrorKind::ResourceLimitExceeded,
            Self::Refused(Refusal::PortDenied { .. }) => ErrorKind::PortDenied,
            Self::Refused(Refusal::DeviceDenied { .. }) => ErrorKind::DeviceDenied,
            Self::Refused(Refusal::SocketDenied { .. } | Refusal::NameDenied { .. }) => {
                ErrorKind::SocketDenied
            }
            Self::Refused(Refusal::NestingDenied) => ErrorKind::NestingDenied,
            Self::Limit(_) | Self::Message { .. } => ErrorKind::InvalidArgument,
            Self::Deep { .. } => ErrorKind::Unsupported,
            Self::NoGroup { .. } => ErrorKind::Unsupported,
            Self::Group { .. } => ErrorKind::SandboxFailed,
            Self::LimitUnenforceable { .. } => ErrorKind::ResourceLimitUnenforceable,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::Verification { .. } => ErrorKind::VerificationFailed,
            Self::Worker { kind, .. } => match kind {
                WorkKind::Verification => ErrorKind::VerificationFailed,
                WorkKind::Stale => ErrorKind::StaleIndex,
                WorkKind::Refused => ErrorKind::ArchiveRefused,
                WorkKind::Download => ErrorKind::DownloadFailed,
                WorkKind::NotFound => ErrorKind::NotFound,
                WorkKind::Full => ErrorKind::StoreFull,
                WorkKind::Failed => ErrorKind::WorkerFailed,
            },
            Self::Package { .. } => ErrorKind::PackageFailed,
            Self::Store(Store::Locked { .. }) => ErrorKind::StoreLocked,
            Self::Store(Store::Damaged { .. } | Store::Malformed { .. }) => ErrorKind::StoreDamaged,
            Self::Store(Store::Mode { .. }) => ErrorKind::IdsUnavailable,
            Self::Store(Store::Missing { .. }) => ErrorKind::NotFound,
            Self::Store(Store::Exists { .. }) => ErrorKind::AlreadyExists,
            Self::Store(Store::Name(_)) => ErrorKind::InvalidName,
            Self::Store(Store::Io { source, .. }) | Self::Io { source, .. } => of_io(source),
            Self::Store(_) | Self::Configuration { .. } => ErrorKind::Io,
            Self::Damaged { .. } | Self::Uncollectable { .. } => ErrorKind::StoreDamaged,
            Self::TooManyJobs { .. } => ErrorKind::TooManyRequests,
            Self::Busy { .. } | Self::Stopping => ErrorKind::Busy,
            Self::Cancelled => ErrorKind::Cancelled,
            Self::ToolMissing { .. } | Self::ToolTooOld { .. } => ErrorKind::ToolMissing,
            Self::Sandbox { .. } => ErrorKind::SandboxFailed,
            Self::Socket { .. } => ErrorKind::NotFound,
            Self::Device { .. } => ErrorKind::NotFound,
            Self::Cdi { .. } => ErrorKind::Unsupported,
        }
    }
}

fn of_io(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::StoreFull,
        _ => ErrorKind::Io,
    }
}
