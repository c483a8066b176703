//! Extraction, beneath one directory, of members that were judged: component by component, no link followed, nothing
//! replaced that was not to be. Directories get their attributes last, when nothing is made in them any more.
//!
//! Files are written by a [`Crew`] of threads, each reading the spool for itself; all else is made by the one that reads the
//! archive. A hard link waits until all files before it are there.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::crew::Crew;
use crate::error::{Error, Result};
use crate::judge::{Item, Source};
use crate::tar::{Kind, Member};

const BUFFER: usize = 256 << 10;

/// Writes into one directory.
#[derive(Debug)]
pub struct Extractor {
    root: Arc<OwnedFd>,
    source: Source,
    /// Whether more ids than one are mapped.
    owners: bool,
    /// The directories of the last path: length of the prefix, descriptor.
    open: Vec<(usize, Arc<OwnedFd>)>,
    path: Vec<u8>,
}

/// A file to be made: where, what, and where in the spool its data is.
#[derive(Debug)]
pub struct FileTask {
    parent: Arc<OwnedFd>,
    path: Vec<u8>,
    member: Member,
    data: u64,
    source: Source,
    owners: bool,
}

thread_local! {
    static COPYING: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; BUFFER]);
}

impl FileTask {
    /// Make it.
    pub fn carry_out(&self, spool: &File) -> Result<()> {
        let Self { parent, path, member, .. } = self;
        let name = split(path).1;
        let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let plain = Mode::from_raw_mode(member.mode & 0o777);
        let fd = replacing(self.source, parent, name, || beneath(parent, name, create, plain))
            .map_err(|errno| Error::extract("make", path)(errno))?;
        COPYING.with_borrow_mut(|buffer| write(&fd, member, spool, self.data, buffer, path))?;
        attributes(&fd, member, self.owners, member.mode & 0o7000 != 0, path)
    }
}

fn beneath(at: impl AsFd, name: &[u8], flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    loop {
        match rustix::fs::openat2(&at, name, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, mode, resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    path.iter().rposition(|&b| b == b'/').map_or((b"", path), |slash| (&path[..slash], &path[slash + 1..]))
}

fn times(mtime: (i64, u32)) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: mtime.0, tv_nsec: mtime.1.into() },
    }
}

impl Extractor {
    pub fn new(root: OwnedFd, source: Source) -> Result<Self> {
        // Modes are given exactly.
        rustix::process::umask(Mode::empty());
        let owners = several_ids()?;
        Ok(Self { root: Arc::new(root), source, owners, open: Vec::new(), path: Vec::new() })
    }

    /// Make the links of a merged `/usr`, and where they point.
    pub fn merge(&mut self, names: impl Iterator<Item = &'static [u8]>) -> Result<()> {
        for name in names {
            self.directory(&[b"usr/", name].concat())?;
            let failed = |errno| Error::extract("make", name)(errno);
            rustix::fs::symlinkat([b"usr/", name].concat(), &self.root, name).map_err(failed)?;
            rustix::fs::utimensat(&self.root, name, &times((0, 0)), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(failed)?;
        }
        Ok(())
    }

    /// The directory of this path, made where it is missing.
    fn directory(&mut self, path: &[u8]) -> Result<&Arc<OwnedFd>> {
        let common = self.path.iter().zip(path).take_while(|(a, b)| a == b).count();
        while let Some(&(length, _)) = self.open.last() {
            // A kept prefix ends where a component does, in both paths.
            if length <= common && (path.len() == length || path[length] == b'/') {
                break;
            }
            self.open.pop();
        }
        let mut done = self.open.last().map_or(0, |(length, _)| *length);
        self.path.clear();
        self.path.extend_from_slice(path);
        while done < path.len() {
            let start = if done == 0 { 0 } else { done + 1 };
            let end = path[start..].iter().position(|&b| b == b'/').map_or(path.len(), |slash| start + slash);
            let name = &path[start..end];
            let at = self.open.last().map_or(&self.root, |(_, fd)| fd);
            let flags = OFlags::RDONLY | OFlags::DIRECTORY;
            let fd = match beneath(at, name, flags, Mode::empty()) {
                Err(Errno::NOENT) => {
                    rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755))
                        .map_err(Error::extract("make directory", &path[..end]))?;
                    beneath(at, name, flags, Mode::empty())
                }
                other => other,
            };
            let fd = fd.map_err(Error::extract("open directory", &path[..end]))?;
            self.open.push((end, Arc::new(fd)));
            done = end;
        }
        Ok(self.open.last().map_or(&self.root, |(_, fd)| fd))
    }

    /// Extract one member, whose data begins at `data` in the spool.
    pub fn extract(&mut self, item: Item, data: u64, crew: &Crew<'_>) -> Result<()> {
        let Item { path, target, member } = item;
        let failed = |action: &'static str| {
            let path = &path;
            move |errno: Errno| Error::extract(action, path)(errno)
        };
        if member.kind == Kind::Directory {
            // Its mode, owner and times come at the end.
            return self.directory(&path).map(drop);
        }
        let (source, owners) = (self.source, self.owners);
        let (parent, name) = split(&path);
        let parent = self.directory(parent)?.clone();
        let mode = Mode::from_raw_mode(member.mode);
        match member.kind {
            Kind::File => crew.submit(FileTask { parent, member, data, source, owners, path })?,
            Kind::HardLink => {
                crew.barrier()?;
                let from = self.existing(split(&target).0)?;
                let target = split(&target).1;
                let stat = rustix::fs::statat(&from, target, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("look at the target of"))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(Error::member(&path, "a hard link to what is no regular file"));
                }
                let link = || rustix::fs::linkat(&from, target, &*parent, name, AtFlags::empty());
                replacing(source, &parent, name, link).map_err(failed("link"))?;
            }
            Kind::Symlink => {
                let make = || rustix::fs::symlinkat(&member.link[..], &*parent, name);
                replacing(source, &parent, name, make).map_err(failed("make the link"))?;
                named_attributes(&parent, name, &member, owners, &path)?;
            }
            Kind::Fifo => {
                let make = || rustix::fs::mknodat(&*parent, name, FileType::Fifo, mode, 0);
                replacing(source, &parent, name, make).map_err(failed("make the fifo"))?;
                named_attributes(&parent, name, &member, owners, &path)?;
                rustix::fs::chmodat(&*parent, name, mode, AtFlags::empty())
                    .map_err(failed("set the mode of"))?;
            }
            // Counted when it was judged.
            Kind::CharacterDevice | Kind::BlockDevice | Kind::Directory => {}
        }
        Ok(())
    }

    /// A directory that is there, without moving the open path.
    fn existing(&self, path: &[u8]) -> Result<Arc<OwnedFd>> {
        let failed = |errno: Errno| Error::extract("open directory", path)(errno);
        let mut at = self.root.clone();
        for component in path.split(|&b| b == b'/').filter(|c| !c.is_empty()) {
            let next = beneath(&*at, component, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
            at = Arc::new(next.map_err(failed)?);
        }
        Ok(at)
    }

    /// Give a directory its attributes: those of its member, or, where others only imply it, the usual ones.
    pub fn finish(&mut self, path: &[u8], member: Option<&Member>) -> Result<()> {
        let owners = self.owners;
        let fd = self.directory(path)?;
        match member {
            Some(member) if !path.is_empty() => attributes(fd, member, owners, true, path),
            _ => {
                let failed = |errno| Error::extract("set the attributes of", path)(errno);
                let mtime = member.map_or((0, 0), |member| member.mtime);
                rustix::fs::fchmod(fd, Mode::from_raw_mode(0o755)).map_err(failed)?;
                rustix::fs::futimens(fd, &times(mtime)).map_err(failed)
            }
        }
    }
}

/// Make something; in the place of an earlier package's file of this name, if there is one.
fn replacing<T>(
    source: Source,
    parent: &OwnedFd,
    name: &[u8],
    make: impl Fn() -> rustix::io::Result<T>,
) -> rustix::io::Result<T> {
    match make() {
        Err(Errno::EXIST) if source == Source::Packages => {
            rustix::fs::unlinkat(parent, name, AtFlags::empty())?;
            make()
        }
        other => other,
    }
}

fn write(
    fd: &OwnedFd,
    member: &Member,
    spool: &File,
    mut data: u64,
    buffer: &mut [u8],
    path: &[u8],
) -> Result<()> {
    let failed = |errno| Error::extract("write", path)(errno);
    let whole = [(0, member.stored)];
    let regions = member.sparse.as_deref().unwrap_or(&whole);
    for &(offset, length) in regions {
        let (mut at, mut left) = (offset, length);
        while left > 0 {
            let step = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let read = match spool.read_at(&mut buffer[..step], data) {
                Ok(0) => return Err(Error::member(path, "the spool ends within it")),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::extract("read from the spool", path)(error)),
            };
            data += read as u64;
            let mut written = 0;
            while written < read {
                match rustix::io::pwrite(fd, &buffer[written..read], at) {
                    Ok(0) => return Err(failed(Errno::IO)),
                    Ok(length) => {
                        written += length;
                        at += length as u64;
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
            left -= read as u64;
        }
    }
    if member.sparse.is_some() {
        rustix::fs::ftruncate(fd, member.size).map_err(failed)?;
    }
    Ok(())
}

/// Owner, mode, xattrs, time, in this order: each may undo what comes after it.
fn attributes(fd: &OwnedFd, member: &Member, owners: bool, mode: bool, path: &[u8]) -> Result<()> {
    let owned = owners && (member.uid, member.gid) != (0, 0);
    if owned {
        rustix::fs::fchown(
            fd,
            Some(Uid::from_raw(member.uid as u32)),
            Some(Gid::from_raw(member.gid as u32)),
        )
        .map_err(Error::extract("change the owner of", path))?;
    }
    if owned || mode {
        rustix::fs::fchmod(fd, Mode::from_raw_mode(member.mode))
            .map_err(Error::extract("change the mode of", path))?;
    }
    for (name, value) in &member.xattrs {
        rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty())
            .map_err(Error::extract("set an extended attribute of", path))?;
    }
    rustix::fs::futimens(fd, &times(member.mtime)).map_err(Error::extract("set the time of", path))
}

/// The same for what can't be opened.
fn named_attributes(parent: &OwnedFd, name: &[u8], member: &Member, owners: bool, path: &[u8]) -> Result<()> {
    if owners && (member.uid, member.gid) != (0, 0) {
        let (uid, gid) = (Uid::from_raw(member.uid as u32), Gid::from_raw(member.gid as u32));
        rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Error::extract("change the owner of", path))?;
    }
    rustix::fs::utimensat(parent, name, &times(member.mtime), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(Error::extract("set the time of", path))
}

/// Whether this namespace maps more ids than root's. Asked of the kernel with a file of our own: an id that is not mapped is
/// an invalid argument to `fchown`, whoever asks.
fn several_ids() -> Result<bool> {
    let probe = rustix::fs::memfd_create("ids", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(Error::io("make a file to ask for the ids with"))?;
    match rustix::fs::fchown(&probe, Some(Uid::from_raw(1)), Some(Gid::from_raw(1))) {
        Ok(()) => Ok(true),
        // EPERM: no privilege over ids at all, as outside of any sandbox.
        Err(Errno::INVAL | Errno::PERM) => Ok(false),
        Err(errno) => Err(Error::io("ask for the ids")(errno)),
    }
}
