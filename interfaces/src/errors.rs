//! Errors as the bus names them.

/// `org.casemate.Casemate1.Error.*`. Each carries the text for the user.
#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.casemate.Casemate1.Error")]
pub enum Error {
    #[zbus(error)]
    Bus(zbus::Error),
    AccessDenied(String),
    NotFound(String),
    AlreadyExists(String),
    InvalidName(String),
    InvalidArgument(String),
    InvalidManifest(String),
    InvalidLock(String),
    IllegalTransition(String),
    MountDenied(String),
    PortDenied(String),
    DeviceDenied(String),
    SocketDenied(String),
    NestingDenied(String),
    VariableDenied(String),
    ResourceLimitExceeded(String),
    ResourceLimitUnenforceable(String),
    VerificationFailed(String),
    StaleIndex(String),
    ArchiveRefused(String),
    DownloadFailed(String),
    PackageFailed(String),
    StoreLocked(String),
    StoreDamaged(String),
    StoreFull(String),
    Busy(String),
    Cancelled(String),
    TooManyRequests(String),
    Unsupported(String),
    IdsUnavailable(String),
    ToolMissing(String),
    SandboxFailed(String),
    WorkerFailed(String),
    Io(String),
    /// A defect of Casemate's own.
    Internal(String),
}
