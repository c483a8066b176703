//! A tree is copied: the upper of an environment that stands still but is mounted, so that it can't be sealed itself. The
//! copy is sealed from its first moment: nobody ever mounts it writable.
//!
//! Files with several names are found again by their inode; the first copy has a name in a directory of its own, from which
//! the others are linked, so that no directory needs to stay open.

use std::collections::HashSet;

use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::file;
use crate::ingest::{Progress, make_directory, sync};
use crate::mirror::{self, Leaf, Marks, mirror};
use crate::path::StorePath;
use crate::remove::remove_in;
use crate::walk::open_directory;

/// Bytes copied between two signs of life.
const CHUNK: usize = 16 << 20;
/// Beside the copy while it is made.
const LINKS: &str = "links";

struct Copying<'a> {
    links: OwnedFd,
    linked: HashSet<u64>,
    entries: u64,
    bytes: u64,
    progress: Progress<'a>,
}

/// Copy the tree at `from` to `to`.
pub fn copy(store: &OwnedFd, from: &StorePath, to: &StorePath, progress: Progress<'_>) -> Result<TreeResult> {
    let source =
        open_directory(store, from.as_str()).map_err(Error::system("open", from.as_str().as_bytes()))?;
    let (home_path, name) = to.split();
    let (parent, home_name) = StorePath::parse(home_path).map(|path| {
        let (parent, name) = path.split();
        (parent.to_owned(), name.to_owned())
    })?;
    let parent = open_directory(store, &*parent).map_err(Error::system("open", parent.as_bytes()))?;
    make_directory(&parent, &home_name)?;
    let home = open_directory(&parent, &*home_name).map_err(Error::system("open", home_path.as_bytes()))?;
    for name in [name, LINKS] {
        make_directory(&home, name)?;
    }
    let target = open_directory(&home, name).map_err(Error::system("open", to.as_str().as_bytes()))?;
    let links = open_directory(&home, LINKS).map_err(Error::system("open", LINKS.as_bytes()))?;
    let mut copying = Copying { links, linked: HashSet::new(), entries: 0, bytes: 0, progress };
    mirror(source, target, |leaf| copying.leaf(&leaf))?;
    let Copying { entries, bytes, progress, .. } = copying;
    remove_in(&home, LINKS, LINKS.as_bytes(), &mut |_| ())?;
    sync(store, &mut || progress(bytes, entries))
        .map_err(Error::system("sync the file system of", to.as_str().as_bytes()))?;
    Ok(TreeResult::Copied { entries, bytes })
}

impl Copying<'_> {
    fn leaf(&mut self, leaf: &Leaf<'_>) -> Result<()> {
        let path = leaf.directory.child(leaf.name);
        match FileType::from_raw_mode(leaf.stat.st_mode) {
            FileType::RegularFile => self.file(leaf, &path)?,
            FileType::Symlink => symlink(leaf, &path)?,
            FileType::CharacterDevice if leaf.stat.st_rdev != 0 => return Err(no_device(&path)),
            kind @ (FileType::Fifo | FileType::Socket | FileType::CharacterDevice) => {
                let mode = Mode::from_raw_mode(leaf.stat.st_mode & 0o7777);
                rustix::fs::mknodat(leaf.target, leaf.name, kind, mode, 0)
                    .map_err(Error::system("make", &path))?;
                set_meta_at(leaf, AtFlags::empty(), &path)?;
            }
            _ => return Err(no_device(&path)),
        }
        self.entries += 1;
        (self.progress)(self.bytes, self.entries);
        Ok(())
    }

    fn file(&mut self, leaf: &Leaf<'_>, path: &[u8]) -> Result<()> {
        let failed = |errno| Error::system("copy", path)(errno);
        let inode = leaf.stat.st_ino.to_string();
        if self.linked.contains(&leaf.stat.st_ino) {
            return rustix::fs::linkat(&self.links, &*inode, leaf.target, leaf.name, AtFlags::empty())
                .map_err(failed);
        }
        let from = file::open(&*leaf.directory.fd, leaf.name).map_err(Error::system("open", path))?;
        let stat = rustix::fs::fstat(&from).map_err(Error::system("look at", path))?;
        if stat.st_ino != leaf.stat.st_ino {
            return Err(Error::Changed { path: casemate_store::listing::escaped(path) });
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let to = rustix::fs::openat(leaf.target, leaf.name, flags, Mode::from_raw_mode(0o600))
            .map_err(Error::system("make", path))?;
        match rustix::fs::ioctl_ficlone(&to, &from) {
            Ok(()) => self.bytes += stat.st_size as u64,
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL | Errno::XDEV | Errno::NOSYS) => {
                self.content(&from, &to, &stat, path)?;
            }
            Err(errno) => return Err(failed(errno)),
        }
        // Capabilities go with a change of the owner, times with all the rest.
        let (uid, gid) = mirror::owner(&stat);
        rustix::fs::fchown(&to, uid, gid).map_err(failed)?;
        mirror::copy_xattrs(&from, &to, Marks::Kept, path)?;
        rustix::fs::fchmod(&to, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed)?;
        rustix::fs::futimens(&to, &mirror::times(&stat)).map_err(failed)?;
        if stat.st_nlink > 1 {
            rustix::fs::linkat(leaf.target, leaf.name, &self.links, &*inode, AtFlags::empty())
                .map_err(failed)?;
            self.linked.insert(stat.st_ino);
        }
        Ok(())
    }

    /// Holes stay holes.
    fn content(&mut self, from: &OwnedFd, to: &OwnedFd, stat: &Stat, path: &[u8]) -> Result<()> {
        let failed = |errno| Error::system("copy", path)(errno);
        let size = stat.st_size as u64;
        let mut at = 0;
        while at < size {
            at = match rustix::fs::seek(from, SeekFrom::Data(at)) {
                Ok(at) => at,
                // None after here.
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(failed(errno)),
            };
            let end = rustix::fs::seek(from, SeekFrom::Hole(at)).map_err(failed)?;
            while at < end {
                let length = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                let (mut off_in, mut off_out) = (at, at);
                match rustix::fs::copy_file_range(from, Some(&mut off_in), to, Some(&mut off_out), length) {
                    Ok(0) => return Err(Error::Changed { path: casemate_store::listing::escaped(path) }),
                    Ok(copied) => {
                        at += copied as u64;
                        self.bytes += copied as u64;
                        (self.progress)(self.bytes, self.entries);
                    }
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(failed(errno)),
                }
            }
        }
        rustix::fs::ftruncate(to, size).map_err(failed)
    }
}

fn no_device(path: &[u8]) -> Error {
    Error::refused(path, "device nodes have no place in a layer")
}

fn symlink(leaf: &Leaf<'_>, path: &[u8]) -> Result<()> {
    let target = rustix::fs::readlinkat(&*leaf.directory.fd, leaf.name, Vec::new())
        .map_err(Error::system("read the link", path))?;
    rustix::fs::symlinkat(&*target, leaf.target, leaf.name).map_err(Error::system("make", path))?;
    set_meta_at(leaf, AtFlags::SYMLINK_NOFOLLOW, path)
}

/// Of what can't be opened. The name is one that was just made in a directory of our own.
fn set_meta_at(leaf: &Leaf<'_>, flags: AtFlags, path: &[u8]) -> Result<()> {
    let failed = |errno| Error::system("set the attributes of", path)(errno);
    let (uid, gid) = mirror::owner(leaf.stat);
    rustix::fs::chownat(leaf.target, leaf.name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
    if flags.is_empty() {
        let mode = Mode::from_raw_mode(leaf.stat.st_mode & 0o7777);
        rustix::fs::chmodat(leaf.target, leaf.name, mode, AtFlags::empty()).map_err(failed)?;
    }
    let times = mirror::times(leaf.stat);
    rustix::fs::utimensat(leaf.target, leaf.name, &times, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
}
