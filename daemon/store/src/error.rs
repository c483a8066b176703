use std::io;
use std::path::PathBuf;

use crate::lock::Holder;
use crate::names::{BadName, Digest};

pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// Another process holds the store.
    #[error("the store {path} is held by {holder}; stop that casemated, or use another store")]
    Locked { path: PathBuf, holder: Holder },
    #[error("the store {path} has format {found}, this Casemate reads format {expected}; {}", way_out(*found, *expected))]
    Format { path: PathBuf, found: u32, expected: u32 },
    #[error(
        "the store {path} was made {} subordinate ids, but now Casemate runs {}; restore the former setting in \
         /etc/subuid and /etc/subgid, or remove the store with `casemate purge` and build anew",
        with(*store_has_range), with(!*store_has_range)
    )]
    Mode { path: PathBuf, store_has_range: bool },
    #[error(
        "{path} is no store: it holds {found:?} but no version file; choose an empty directory, or restore `version` from a \
         backup"
    )]
    NotAStore { path: PathBuf, found: String },
    #[error("{path} belongs to user {owner}, not to you; a store must be your own")]
    NotOwned { path: PathBuf, owner: u32 },
    #[error("there is no {kind} {name:?}")]
    Missing { kind: &'static str, name: String },
    #[error("there is a {kind} {name:?} already")]
    Exists { kind: &'static str, name: String },
    /// A record or listing is not what was written.
    #[error(
        "{path} is damaged: its content has digest {found}, but {expected} was written; restore it from a backup"
    )]
    Damaged { path: PathBuf, expected: Digest, found: Digest },
    #[error("{path} is malformed: {reason}")]
    Malformed { path: PathBuf, reason: String },
    /// The rename happened but its durability is not known.
    #[error("{path} was written, but the file system failed to confirm it: {source}; check the disk")]
    Unconfirmed { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Name(#[from] BadName),
}

fn with(range: bool) -> &'static str {
    if range { "with a range of" } else { "without" }
}

fn way_out(found: u32, expected: u32) -> &'static str {
    if found > expected {
        "install the newer Casemate that made it"
    } else {
        "let the Casemate that made it export the environments, and import them here"
    }
}

impl Error {
    pub(crate) fn io<E: Into<io::Error>>(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source: source.into() }
    }
}
