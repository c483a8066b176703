//! Records: small TOML files, each with the BLAKE3 of its own content in its first line, which is checked on every load.
//!
//! ```text
//! checksum = "<64 hex digits: BLAKE3 of everything after this line>"
//! …TOML…
//! ```
//!
//! A record is committed by writing it to `staging/`, an fsync of it, a rename over the old one, and an fsync of the
//! directory: about two journal commits, whatever the size of what it refers to.

use std::fs::File;
use std::io::{Read, Write};
use std::marker::PhantomData;
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};
use crate::names::{Digest, Id, Name, ReleaseName, SnapshotName};
use crate::store::Store;

/// Most bytes of a record; a longer file is malformed.
pub const RECORD_MAX: u64 = 64 << 20;
const SUFFIX: &str = ".toml";
const PREFIX: &str = "checksum = \"";

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Release,
    Environment,
    Snapshot,
}

impl Kind {
    /// The directory that holds them.
    pub fn directory(self) -> &'static str {
        match self {
            Self::Release => "releases",
            Self::Environment => "environments",
            Self::Snapshot => "snapshots",
        }
    }

    /// For messages.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Environment => "environment",
            Self::Snapshot => "snapshot",
        }
    }
}

/// What names a record: a typed name with a file name of its own, without `/`.
pub trait Key: Sized + Ord {
    fn to_file_name(&self) -> String;
    fn from_file_name(name: &str) -> Option<Self>;
}

macro_rules! plain_key {
    ($type:ty) => {
        impl Key for $type {
            fn to_file_name(&self) -> String {
                self.to_string()
            }

            fn from_file_name(name: &str) -> Option<Self> {
                name.parse().ok()
            }
        }
    };
}

plain_key!(Name);
plain_key!(Id);
plain_key!(SnapshotName);

/// `source@release`: `@` is in no [`Name`].
impl Key for ReleaseName {
    fn to_file_name(&self) -> String {
        format!("{}@{}", self.source, self.release)
    }

    fn from_file_name(name: &str) -> Option<Self> {
        let (source, release) = name.split_once('@')?;
        Some(Self { source: source.parse().ok()?, release: release.parse().ok()? })
    }
}

/// The names in a directory of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordList<K> {
    /// Sorted.
    pub names: Vec<K>,
    /// Files that are no records, to be shown to the user (escaped).
    pub foreign: Vec<String>,
}

/// The records of one kind.
pub struct Records<'a, K, T> {
    store: &'a Store,
    kind: Kind,
    types: PhantomData<fn() -> (K, T)>,
}

impl<'a, K: Key, T: Serialize + DeserializeOwned> Records<'a, K, T> {
    pub(crate) fn new(store: &'a Store, kind: Kind) -> Self {
        Self { store, kind, types: PhantomData }
    }

    fn path(&self, key: &K) -> PathBuf {
        self.store.root().join(self.kind.directory()).join(file_name(key))
    }

    fn missing(&self, key: &K) -> Error {
        Error::Missing { kind: self.kind.noun(), name: key.to_file_name() }
    }

    /// The names of all records.
    pub fn list(&self) -> Result<RecordList<K>> {
        let path = self.store.root().join(self.kind.directory());
        let mut list = RecordList { names: Vec::new(), foreign: Vec::new() };
        for name in crate::store::names_in(self.store.records(self.kind), &path)? {
            let key = std::str::from_utf8(&name)
                .ok()
                .and_then(|text| text.strip_suffix(SUFFIX))
                .and_then(K::from_file_name);
            match key {
                Some(key) => list.names.push(key),
                None => list.foreign.push(name.escape_ascii().to_string()),
            }
        }
        list.names.sort();
        list.foreign.sort();
        Ok(list)
    }

    /// Load and verify one.
    pub fn load(&self, key: &K) -> Result<T> {
        let path = self.path(key);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let directory = self.store.records(self.kind);
        let fd = match rustix::fs::openat(directory, file_name(key), flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Err(self.missing(key)),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        decode(&read(File::from(fd), &path)?, path)
    }

    /// Whether there is one of this name, sound or not.
    pub fn exists(&self, key: &K) -> Result<bool> {
        let directory = self.store.records(self.kind);
        match rustix::fs::statat(directory, file_name(key), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(Error::io("look up", self.path(key))(error)),
        }
    }

    /// Commit a new record; one of the same name is an error.
    pub fn create(&self, key: &K, value: &T) -> Result<()> {
        self.write(key, value, RenameFlags::NOREPLACE)
    }

    /// Commit a record in place of the one of this name, if there is one.
    pub fn commit(&self, key: &K, value: &T) -> Result<()> {
        self.write(key, value, RenameFlags::empty())
    }

    fn write(&self, key: &K, value: &T, flags: RenameFlags) -> Result<()> {
        let path = self.path(key);
        let text = encode(value, &path)?;
        let commit =
            || self.store.write_record(self.store.records(self.kind), &file_name(key), &path, &text, flags);
        match commit() {
            Err(Error::Io { source, .. }) if source.raw_os_error() == Some(Errno::EXIST.raw_os_error()) => {
                Err(Error::Exists { kind: self.kind.noun(), name: key.to_file_name() })
            }
            other => other,
        }
    }

    /// Rename a record; the new name must be free. Durable on return.
    pub fn rename(&self, from: &K, to: &K) -> Result<()> {
        let directory = self.store.records(self.kind);
        let (old, new) = (file_name(from), file_name(to));
        match rustix::fs::renameat_with(directory, old, directory, new, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Err(self.missing(from)),
            Err(Errno::EXIST) => {
                return Err(Error::Exists { kind: self.kind.noun(), name: to.to_file_name() });
            }
            Err(error) => return Err(Error::io("rename", self.path(from))(error)),
        }
        rustix::fs::fsync(directory)
            .map_err(|source| Error::Unconfirmed { path: self.path(to), source: source.into() })
    }

    /// Remove one. Durable on return.
    pub fn remove(&self, key: &K) -> Result<()> {
        let directory = self.store.records(self.kind);
        match rustix::fs::unlinkat(directory, file_name(key), AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT) => return Err(self.missing(key)),
            Err(error) => return Err(Error::io("remove", self.path(key))(error)),
        }
        rustix::fs::fsync(directory)
            .map_err(|source| Error::Unconfirmed { path: self.path(key), source: source.into() })
    }
}

fn file_name<K: Key>(key: &K) -> String {
    key.to_file_name() + SUFFIX
}

pub(crate) fn read(file: File, path: &std::path::Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(RECORD_MAX + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > RECORD_MAX {
        return Err(Error::Malformed {
            path: path.to_owned(),
            reason: format!("longer than {RECORD_MAX} bytes"),
        });
    }
    Ok(bytes)
}

pub(crate) fn encode<T: Serialize>(value: &T, path: &std::path::Path) -> Result<Vec<u8>> {
    let body = toml::to_string(value)
        .map_err(|error| Error::Malformed { path: path.to_owned(), reason: error.to_string() })?;
    let mut text = format!("{PREFIX}{}\"\n", Digest::of(body.as_bytes())).into_bytes();
    let _ = text.write_all(body.as_bytes());
    if text.len() as u64 > RECORD_MAX {
        return Err(Error::Malformed {
            path: path.to_owned(),
            reason: format!("longer than {RECORD_MAX} bytes"),
        });
    }
    Ok(text)
}

pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8], path: PathBuf) -> Result<T> {
    let line = PREFIX.len() + 64 + 2;
    let expected = bytes
        .get(..line)
        .and_then(|head| head.strip_prefix(PREFIX.as_bytes()))
        .and_then(|rest| rest.strip_suffix(b"\"\n"))
        .and_then(|digits| std::str::from_utf8(digits).ok())
        .and_then(|digits| digits.parse::<Digest>().ok());
    let Some(expected) = expected else {
        return Err(Error::Malformed { path, reason: "its first line is no checksum".to_owned() });
    };
    let body = &bytes[line..];
    let found = Digest::of(body);
    if found != expected {
        return Err(Error::Damaged { path, expected, found });
    }
    let text = match std::str::from_utf8(body) {
        Ok(text) => text,
        Err(error) => return Err(Error::Malformed { path, reason: error.to_string() }),
    };
    toml::from_str(text).map_err(|error| Error::Malformed { path, reason: error.to_string() })
}
