use std::borrow::Cow;
use std::io;

use casemate_worker::protocol::{Failure, FailureKind};
use rustix::io::Errno;

pub type Result<T> = std::result::Result<T, Error>;

/// Why an archive was not unpacked. Member names are escaped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One member that must not be: the whole archive is refused for it.
    #[error("refused for its member {member}: {reason}")]
    Member { member: String, reason: Cow<'static, str> },
    /// The archive as such can't be trusted to mean one thing only.
    #[error("refused: {reason}")]
    Archive { reason: Cow<'static, str> },
    #[error("refused: more {what} than allowed ({limit})")]
    Limit { what: &'static str, limit: u64 },
    #[error("cannot {action}: {source}")]
    Io { action: &'static str, source: io::Error },
    #[error("cannot {action} {member}: {source}")]
    Extract { action: &'static str, member: String, source: io::Error },
}

/// A member's name as it may be shown.
pub fn shown(name: &[u8]) -> String {
    const LONGEST: usize = 300;
    let (head, dots) = if name.len() > LONGEST { (&name[..LONGEST], "…") } else { (name, "") };
    format!("'{}'{dots}", head.escape_ascii())
}

impl Error {
    pub fn member(name: &[u8], reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Member { member: shown(name), reason: reason.into() }
    }

    pub fn archive(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Archive { reason: reason.into() }
    }

    pub fn io<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { action, source: source.into() }
    }

    pub fn extract<E: Into<io::Error>>(action: &'static str, member: &[u8]) -> impl FnOnce(E) -> Self {
        let member = shown(member);
        move |source| Self::Extract { action, member, source: source.into() }
    }

    /// As a failure of the archive (or package) of this name.
    pub fn failure(&self, subject: &str) -> Failure {
        let kind = match self {
            Self::Member { .. } | Self::Archive { .. } => FailureKind::Refused,
            Self::Limit { .. } => FailureKind::Limit,
            Self::Io { source, .. } | Self::Extract { source, .. } => match Errno::from_io_error(source) {
                Some(Errno::NOSPC | Errno::DQUOT | Errno::MFILE | Errno::NFILE | Errno::FBIG) => {
                    FailureKind::Full
                }
                _ => FailureKind::Io,
            },
        };
        Failure { kind, subject: subject.to_owned(), message: self.to_string() }
    }
}
