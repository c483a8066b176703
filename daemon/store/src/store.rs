//! Opening a store, and the way to its parts.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::names::{Digest, Id, Name};
use crate::record::{self, Key, Kind, Records};
use crate::{FORMAT, OLDEST_FORMAT, lock};

const PRIVATE: u32 = 0o700;
const DIRECTORIES: [&str; 7] =
    ["objects", "layers", "releases", "environments", "snapshots", "uppers", "staging"];
/// Staging files of records: the one thing in `staging/` that the daemon writes itself.
const RECORD_PREFIX: &str = "record-";

/// How many ids a store's files have. A store keeps the one it was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreMode {
    /// A subordinate range: files of every id.
    Range,
    /// The user's id alone.
    Single,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Version {
    format: u32,
    ids: StoreMode,
}

/// Only the number, to refuse another format by its name and not by its syntax.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// The store, open and locked. Cheap to share by reference; all methods are synchronous.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    mode: StoreMode,
    directory: OwnedFd,
    staging: OwnedFd,
    releases: OwnedFd,
    environments: OwnedFd,
    snapshots: OwnedFd,
    counter: AtomicU64,
    _lock: File,
}

/// Names found in one of the store's directories.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents<N> {
    /// Sorted.
    pub names: Vec<N>,
    /// What has no business there, escaped.
    pub foreign: Vec<String>,
}

impl Store {
    /// Open the store at `root` (absolute), which is made where it is missing or empty.
    pub fn open(root: &Path, mode: StoreMode) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(PRIVATE)
            .create(root)
            .map_err(Error::io("make", root))?;
        let directory = open_directory(rustix::fs::CWD, root.as_os_str()).map_err(Error::io("open", root))?;
        own(&directory, root)?;
        let lock = lock::take(&directory, root)?;
        let mut store = Self {
            root: root.to_owned(),
            mode,
            staging: directory.try_clone().map_err(Error::io("open", root))?,
            releases: directory.try_clone().map_err(Error::io("open", root))?,
            environments: directory.try_clone().map_err(Error::io("open", root))?,
            snapshots: directory.try_clone().map_err(Error::io("open", root))?,
            directory,
            counter: AtomicU64::new(0),
            _lock: lock,
        };
        store.check_version()?;
        for name in DIRECTORIES {
            store.make(name)?;
        }
        rustix::fs::fsync(&store.directory).map_err(Error::io("sync", root))?;
        store.staging = store.subdirectory("staging")?;
        store.releases = store.subdirectory("releases")?;
        store.environments = store.subdirectory("environments")?;
        store.snapshots = store.subdirectory("snapshots")?;
        store.drop_unfinished_records()?;
        Ok(store)
    }

    fn check_version(&self) -> Result<()> {
        let path = self.root.join("version");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let bytes = match rustix::fs::openat(&self.directory, "version", flags, Mode::empty()) {
            Ok(fd) => record::read(File::from(fd), &path)?,
            Err(Errno::NOENT) => return self.write_version(&path),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let Format { format: found } = record::decode(&bytes, path.clone())?;
        if !(OLDEST_FORMAT..=FORMAT).contains(&found) {
            return Err(Error::Format { path: self.root.clone(), found, expected: FORMAT });
        }
        let Version { ids, .. } = record::decode(&bytes, path)?;
        if ids != self.mode {
            return Err(Error::Mode { path: self.root.clone(), store_has_range: ids == StoreMode::Range });
        }
        if found == FORMAT {
            Ok(())
        } else {
            self.commit_version(&self.root.join("version"), RenameFlags::empty())
        }
    }

    fn write_version(&self, path: &Path) -> Result<()> {
        // `version` is the first thing that is made, so anything beside it and the lock is somebody else's.
        for name in names_in(&self.directory, &self.root)? {
            if name != b"lock" && !name.starts_with(RECORD_PREFIX.as_bytes()) {
                let found = name.escape_ascii().to_string();
                return Err(Error::NotAStore { path: self.root.clone(), found });
            }
        }
        self.commit_version(path, RenameFlags::NOREPLACE)
    }

    fn commit_version(&self, path: &Path, flags: RenameFlags) -> Result<()> {
        let text = record::encode(&Version { format: FORMAT, ids: self.mode }, path)?;
        self.write_record(&self.directory, "version", path, &text, flags)
    }

    fn make(&self, name: &'static str) -> Result<()> {
        let path = self.root.join(name);
        match rustix::fs::mkdirat(&self.directory, name, Mode::from_raw_mode(PRIVATE)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(Error::io("make", path)(error)),
        }
        own(&self.subdirectory(name)?, &path)
    }

    fn subdirectory(&self, name: &str) -> Result<OwnedFd> {
        open_directory(&self.directory, name).map_err(Error::io("open", self.root.join(name)))
    }

    fn drop_unfinished_records(&self) -> Result<()> {
        for (directory, path) in
            [(&self.directory, self.root.clone()), (&self.staging, self.root.join("staging"))]
        {
            for name in names_in(directory, &path)? {
                if name.starts_with(RECORD_PREFIX.as_bytes()) {
                    rustix::fs::unlinkat(directory, &name[..], AtFlags::empty())
                        .map_err(Error::io("remove", path.join(name.escape_ascii().to_string())))?;
                }
            }
        }
        Ok(())
    }

    /// Write a file beside, sync it, rename it into place, sync the directory.
    pub(crate) fn write_record(
        &self,
        directory: &OwnedFd,
        name: &str,
        path: &Path,
        text: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        let temporary = format!("{RECORD_PREFIX}{}", self.counter.fetch_add(1, Ordering::Relaxed));
        let open = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let written = rustix::fs::openat(&self.staging, &temporary, open, Mode::from_raw_mode(0o600))
            .map_err(std::io::Error::from)
            .and_then(|fd| {
                let mut file = File::from(fd);
                file.write_all(text)?;
                file.sync_all()
            })
            .map_err(Error::io("write", path))
            .and_then(|()| {
                rustix::fs::renameat_with(&self.staging, &temporary, directory, name, flags)
                    .map_err(Error::io("commit", path))
            });
        if let Err(error) = written {
            // The first error is the one to tell; a file that stays is removed at the next start.
            let _ = rustix::fs::unlinkat(&self.staging, &temporary, AtFlags::empty());
            return Err(error);
        }
        rustix::fs::fsync(directory)
            .map_err(|source| Error::Unconfirmed { path: path.to_owned(), source: source.into() })
    }

    /// The absolute path that the store was opened at.
    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn mode(&self) -> StoreMode {
        self.mode
    }

    /// The store's directory: the first descriptor of `casemate-tree`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    pub(crate) fn records(&self, kind: Kind) -> &OwnedFd {
        match kind {
            Kind::Release => &self.releases,
            Kind::Environment => &self.environments,
            Kind::Snapshot => &self.snapshots,
        }
    }

    /// The records of releases.
    pub fn releases<K: Key, T: Serialize + serde::de::DeserializeOwned>(&self) -> Records<'_, K, T> {
        Records::new(self, Kind::Release)
    }

    /// The records of environments.
    pub fn environments<K: Key, T: Serialize + serde::de::DeserializeOwned>(&self) -> Records<'_, K, T> {
        Records::new(self, Kind::Environment)
    }

    /// The records of snapshots.
    pub fn snapshots<K: Key, T: Serialize + serde::de::DeserializeOwned>(&self) -> Records<'_, K, T> {
        Records::new(self, Kind::Snapshot)
    }

    /// Make the staging directory of a job; one of the same name is an error.
    pub fn staging(&self, job: &Name) -> Result<Staging> {
        let path = self.root.join("staging").join(job.as_str());
        match rustix::fs::mkdirat(&self.staging, job.as_str(), Mode::from_raw_mode(PRIVATE)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                return Err(Error::Exists { kind: "staging directory", name: job.to_string() });
            }
            Err(error) => return Err(Error::io("make", path)(error)),
        }
        let directory =
            open_directory(&self.staging, job.as_str()).map_err(Error::io("open", path.clone()))?;
        Ok(Staging { relative: format!("staging/{job}"), path, directory })
    }

    /// What unfinished jobs left in `staging/`, as paths for `TreeRequest::Remove`, and what can't be named there.
    pub fn leftovers(&self) -> Result<Contents<String>> {
        let path = self.root.join("staging");
        contents(&self.staging, &path, |name| name.parse::<Name>().ok().map(|name| format!("staging/{name}")))
    }

    /// All layers, committed or not.
    pub fn layers(&self) -> Result<Contents<Digest>> {
        contents(&self.subdirectory("layers")?, &self.root.join("layers"), |name| name.parse().ok())
    }

    /// All uppers, committed or not.
    pub fn uppers(&self) -> Result<Contents<Id>> {
        contents(&self.subdirectory("uppers")?, &self.root.join("uppers"), |name| name.parse().ok())
    }

    /// `layers/<digest>`, absolute. Its tree is `tree` in there.
    pub fn layer_path(&self, digest: &Digest) -> PathBuf {
        self.root.join(layer(digest))
    }

    /// `uppers/<id>`, absolute. In there are `upper` and `work`.
    pub fn upper_path(&self, id: &Id) -> PathBuf {
        self.root.join(upper(id))
    }

    /// What kind of file a layer has at a path; `None` also where the way leads through a link: an image's links are not
    /// followed here.
    pub fn kind_in_layer(&self, digest: &Digest, path: &str) -> Option<FileType> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let tree = format!("{}/tree", layer(digest));
        let tree = rustix::fs::openat2(&self.directory, tree, flags, Mode::empty(), beneath).ok()?;
        let (way, name) = path.rsplit_once('/').unwrap_or((".", path));
        let way = rustix::fs::openat2(&tree, way, flags, Mode::empty(), beneath).ok()?;
        let stat = rustix::fs::statat(&way, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some(FileType::from_raw_mode(stat.st_mode))
    }

    /// Check a layer's listing against the layer's name: due whenever a stack is mounted.
    pub fn check_listing(&self, digest: &Digest) -> Result<()> {
        let path = self.layer_path(digest).join("listing");
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let name = format!("{}/listing", layer(digest));
        let fd = match rustix::fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Err(Error::Missing { kind: "layer", name: digest.to_string() }),
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::from(fd)).map_err(Error::io("read", &path))?;
        let found = Digest::from(hasher.finalize());
        if found != *digest {
            return Err(Error::Damaged { path, expected: *digest, found });
        }
        Ok(())
    }

    /// Write everything of the store's file system to disk (`syncfs`).
    pub fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.directory).map_err(Error::io("sync the file system of", &self.root))
    }

    /// Bytes free to the user on the store's file system.
    pub fn free_bytes(&self) -> Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.directory)
            .map_err(Error::io("ask for the free space of", &self.root))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// `layers/<digest>`, relative to the store.
pub fn layer(digest: &Digest) -> String {
    format!("layers/{digest}")
}

/// `uppers/<id>`, relative to the store: what `TreeRequest` wants.
pub fn upper(id: &Id) -> String {
    format!("uppers/{id}")
}

/// The staging directory of one job. It is not removed on drop: its content may be of ids that only `casemate-tree` can
/// remove, by [`Staging::relative`].
#[derive(Debug)]
pub struct Staging {
    relative: String,
    path: PathBuf,
    directory: OwnedFd,
}

impl Staging {
    /// `staging/<job>`, or a child of it, relative to the store: what `TreeRequest` wants.
    pub fn relative(&self, child: Option<&Name>) -> String {
        child.map_or_else(|| self.relative.clone(), |child| format!("{}/{child}", self.relative))
    }

    /// Absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Open a directory in here, for a worker that shall have it as its root.
    pub fn open_child(&self, child: &Name) -> Result<OwnedFd> {
        open_directory(&self.directory, child.as_str())
            .map_err(Error::io("open", self.path.join(child.as_str())))
    }

    /// A new, empty file without a name, on the store's file system. It is gone with its last descriptor.
    pub fn spool(&self) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        match rustix::fs::openat(&self.directory, ".", flags | OFlags::TMPFILE, mode) {
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
            other => return other.map_err(Error::io("make a spool in", &self.path)),
        }
        let create = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(&self.directory, ".spool", create, mode)
            .map_err(Error::io("make a spool in", &self.path))?;
        rustix::fs::unlinkat(&self.directory, ".spool", AtFlags::empty())
            .map_err(Error::io("unlink the spool in", &self.path))?;
        Ok(fd)
    }
}

fn open_directory<P: rustix::path::Arg>(at: impl AsFd, path: P) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

/// See that a directory is the user's, of their own group and closed to others. The group matters: `casemate-tree` reads
/// off the store's directory who the user is, and a set-gid parent would have given it another.
fn own(directory: &OwnedFd, path: &Path) -> Result<()> {
    let file = File::from(directory.try_clone().map_err(Error::io("open", path))?);
    let meta = file.metadata().map_err(Error::io("look up", path))?;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if meta.uid() != uid.as_raw() {
        return Err(Error::NotOwned { path: path.to_owned(), owner: meta.uid() });
    }
    if meta.gid() != gid.as_raw() {
        rustix::fs::fchown(directory, None, Some(gid)).map_err(Error::io("change the group of", path))?;
    }
    if meta.mode() & 0o7777 != PRIVATE {
        rustix::fs::fchmod(directory, Mode::from_raw_mode(PRIVATE))
            .map_err(Error::io("change the mode of", path))?;
    }
    Ok(())
}

pub(crate) fn names_in(directory: &OwnedFd, path: &Path) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn contents<N: Ord>(
    directory: &OwnedFd,
    path: &Path,
    parse: impl Fn(&str) -> Option<N>,
) -> Result<Contents<N>> {
    let mut contents = Contents { names: Vec::new(), foreign: Vec::new() };
    for name in names_in(directory, path)? {
        match std::str::from_utf8(&name).ok().and_then(&parse) {
            Some(name) => contents.names.push(name),
            None => contents.foreign.push(name.escape_ascii().to_string()),
        }
    }
    contents.names.sort();
    contents.foreign.sort();
    Ok(contents)
}
