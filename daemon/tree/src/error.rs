use casemate_worker::protocol::{Failure, FailureKind};
use rustix::io::Errno;

pub type Result<T> = std::result::Result<T, Error>;

/// Why a tree could not be prepared, read, turned into a layer or removed. Paths are escaped.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {path}: {}", std::io::Error::from(*errno))]
    System { action: &'static str, path: String, errno: Errno },
    #[error("{path}: {reason}")]
    Refused { path: String, reason: &'static str },
    #[error("{path} changed while it was read")]
    Changed { path: String },
    #[error("{path}: {reason}")]
    Limit { path: String, reason: &'static str },
    #[error("{path:?} is no path of a tree in the store")]
    Request { path: String },
}

impl Error {
    /// The thing that failed.
    pub fn path(&self) -> &str {
        let (Self::System { path, .. }
        | Self::Refused { path, .. }
        | Self::Changed { path }
        | Self::Limit { path, .. }
        | Self::Request { path }) = self;
        path
    }

    pub(crate) fn system(action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> Self {
        let path = casemate_store::listing::escaped(path);
        move |errno| Self::System { action, path, errno }
    }

    pub(crate) fn io(action: &'static str, path: &[u8]) -> impl FnOnce(std::io::Error) -> Self {
        let path = casemate_store::listing::escaped(path);
        move |error| Self::System { action, path, errno: Errno::from_io_error(&error).unwrap_or(Errno::IO) }
    }

    pub(crate) fn refused(path: &[u8], reason: &'static str) -> Self {
        Self::Refused { path: casemate_store::listing::escaped(path), reason }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::System { errno: Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE, .. } => {
                FailureKind::Full
            }
            Error::System { errno: Errno::NOENT, .. } => FailureKind::NotFound,
            Error::System { .. } | Error::Changed { .. } => FailureKind::Io,
            Error::Refused { .. } => FailureKind::Refused,
            Error::Limit { .. } => FailureKind::Limit,
            Error::Request { .. } => FailureKind::Request,
        };
        Self { kind, subject: error.path().to_owned(), message: error.to_string() }
    }
}
