//! Between the engine's words and the bus's.

use std::collections::HashMap;

use casemate_engine::ErrorKind;
use casemate_interfaces::Error;
use zbus::OwnedVariant;

pub type Options = HashMap<String, OwnedVariant>;

/// One to one; a new kind does not compile until it has a name here.
pub fn error(error: casemate_engine::Error) -> Error {
    named(error.kind(), error.to_string())
}

pub fn named(kind: ErrorKind, text: String) -> Error {
    match kind {
        ErrorKind::NotFound => Error::NotFound(text),
        ErrorKind::AlreadyExists => Error::AlreadyExists(text),
        ErrorKind::InvalidName => Error::InvalidName(text),
        ErrorKind::InvalidArgument => Error::InvalidArgument(text),
        ErrorKind::InvalidManifest => Error::InvalidManifest(text),
        ErrorKind::InvalidLock => Error::InvalidLock(text),
        ErrorKind::IllegalTransition => Error::IllegalTransition(text),
        ErrorKind::MountDenied => Error::MountDenied(text),
        ErrorKind::PortDenied => Error::PortDenied(text),
        ErrorKind::DeviceDenied => Error::DeviceDenied(text),
        ErrorKind::SocketDenied => Error::SocketDenied(text),
        ErrorKind::NestingDenied => Error::NestingDenied(text),
        ErrorKind::VariableDenied => Error::VariableDenied(text),
        ErrorKind::ResourceLimitExceeded => Error::ResourceLimitExceeded(text),
        ErrorKind::ResourceLimitUnenforceable => Error::ResourceLimitUnenforceable(text),
        ErrorKind::VerificationFailed => Error::VerificationFailed(text),
        ErrorKind::StaleIndex => Error::StaleIndex(text),
        ErrorKind::ArchiveRefused => Error::ArchiveRefused(text),
        ErrorKind::DownloadFailed => Error::DownloadFailed(text),
        ErrorKind::PackageFailed => Error::PackageFailed(text),
        ErrorKind::StoreLocked => Error::StoreLocked(text),
        ErrorKind::StoreDamaged => Error::StoreDamaged(text),
        ErrorKind::StoreFull => Error::StoreFull(text),
        ErrorKind::Busy => Error::Busy(text),
        ErrorKind::Cancelled => Error::Cancelled(text),
        ErrorKind::TooManyRequests => Error::TooManyRequests(text),
        ErrorKind::Unsupported => Error::Unsupported(text),
        ErrorKind::IdsUnavailable => Error::IdsUnavailable(text),
        ErrorKind::ToolMissing => Error::ToolMissing(text),
        ErrorKind::SandboxFailed => Error::SandboxFailed(text),
        ErrorKind::WorkerFailed => Error::WorkerFailed(text),
        ErrorKind::Io => Error::Io(text),
        ErrorKind::Internal => Error::Internal(text),
    }
}

/// The error's name on the bus, for a job's `Error`.
pub fn error_name(kind: ErrorKind) -> String {
    use zbus::DBusError;
    named(kind, String::new()).name().to_string()
}

/// Take the options that a method knows; one more is refused.
pub fn known(options: &Options, keys: &[&str]) -> Result<(), Error> {
    match options.keys().find(|key| !keys.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) if keys.is_empty() => {
            Err(Error::InvalidArgument(format!("unknown option {key:?}; this method has none")))
        }
        Some(key) => {
            Err(Error::InvalidArgument(format!("unknown option {key:?}; known: {}", keys.join(", "))))
        }
    }
}

pub fn option<T: TryFrom<OwnedVariant>>(options: &Options, key: &str) -> Result<Option<T>, Error> {
    let wrong = || Error::InvalidArgument(format!("option {key:?} has the wrong type"));
    let Some(value) = options.get(key) else { return Ok(None) };
    let copy = value.try_clone().map_err(|_| wrong())?;
    T::try_from(copy).map(Some).map_err(|_| wrong())
}
