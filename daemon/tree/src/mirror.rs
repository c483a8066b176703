//! A second tree like the first: directories are made, with all their attributes, and everything else is what the caller
//! makes of it: links to the same inodes here, copies in [`crate::copy`].

use std::sync::Arc;

use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Gid, Mode, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::walk::{self, Directory, Visitor, Window, open_directory};

/// What is no directory, and the directory of the second tree that it goes into.
pub struct Leaf<'a> {
    pub directory: &'a Directory,
    pub name: &'a [u8],
    pub stat: &'a Stat,
    pub target: &'a OwnedFd,
}

struct Mirror<F> {
    target: Window,
    leaf: F,
}

/// Make the empty directory `target` a mirror of the tree at `source`.
pub fn mirror(source: OwnedFd, target: OwnedFd, leaf: impl FnMut(Leaf<'_>) -> Result<()>) -> Result<()> {
    let stat = rustix::fs::fstat(&target).map_err(Error::system("look at", b"."))?;
    let mut mirror = Mirror { target: Window::default(), leaf };
    mirror.target.push(Arc::new(target), &stat);
    walk::walk(source, &mut mirror)
}

/// The same inode under the same name.
pub fn link(leaf: Leaf<'_>) -> Result<()> {
    rustix::fs::linkat(&*leaf.directory.fd, leaf.name, leaf.target, leaf.name, AtFlags::empty())
        .map_err(Error::system("link", &leaf.directory.child(leaf.name)))
}

impl<F> Mirror<F> {
    fn here(&self, path: &[u8]) -> Result<Arc<OwnedFd>> {
        self.target.last().cloned().ok_or_else(|| Error::refused(path, "lost its directory"))
    }
}

impl<F: FnMut(Leaf<'_>) -> Result<()>> Visitor for Mirror<F> {
    fn enter(&mut self, directory: &Directory) -> Result<()> {
        let path = &directory.path;
        if path != b"." {
            let here = self.here(path)?;
            let name = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
            rustix::fs::mkdirat(&*here, name, Mode::from_raw_mode(0o700))
                .map_err(Error::system("make", path))?;
            let fd = open_directory(&*here, name).map_err(Error::system("open", path))?;
            let stat = rustix::fs::fstat(&fd).map_err(Error::system("look at", path))?;
            self.target.push(Arc::new(fd), &stat);
        }
        Ok(())
    }

    fn leaf(&mut self, directory: &Directory, name: &[u8], stat: &Stat) -> Result<()> {
        let target = self.here(&directory.path)?;
        (self.leaf)(Leaf { directory, name, stat, target: &target })
    }

    fn leave(&mut self, directory: &Directory) -> Result<()> {
        let (path, stat) = (&directory.path, &directory.stat);
        // Not before: all that is made in a directory with a default ACL inherits it.
        copy_xattrs(&directory.fd, &*self.here(path)?, Marks::Kept, path)?;
        set_meta(&*self.here(path)?, stat, path)?;
        if path == b"." { Ok(()) } else { self.target.pop(path) }
    }
}

/// Times of modification alone.
pub fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
    }
}

pub fn owner(stat: &Stat) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
}

/// Owner, mode and time, in this order: a change of the owner takes set-id bits away.
pub fn set_meta(to: &OwnedFd, stat: &Stat, path: &[u8]) -> Result<()> {
    let failed = |errno| Error::system("set the attributes of", path)(errno);
    let (uid, gid) = owner(stat);
    rustix::fs::fchown(to, uid, gid).map_err(failed)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed)?;
    rustix::fs::futimens(to, &times(stat)).map_err(failed)
}

/// Overlayfs's own marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// What a layer drops is decided where it is listed.
    Kept,
    /// They say how the directory relates to what is below it, which is not what the copy has below.
    Left,
}

/// What a layer keeps of them, and marks as asked.
pub fn copy_xattrs(from: &OwnedFd, to: &OwnedFd, marks: Marks, path: &[u8]) -> Result<()> {
    let failed = |errno| Error::system("copy the attributes of", path)(errno);
    let mut names = vec![0; 65536];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(failed(errno)),
    };
    let mut value = vec![0; 65536];
    for name in names[..length].split(|&b| b == 0) {
        let mark = name.starts_with(b"user.overlay.") && !name.starts_with(b"user.overlay.overlay.");
        let kept = name.starts_with(b"user.")
            || name.starts_with(b"system.posix_acl_")
            || name == b"security.capability";
        if kept && !(mark && marks == Marks::Left) {
            let length = rustix::fs::fgetxattr(from, name, &mut value[..]).map_err(failed)?;
            rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty()).map_err(failed)?;
        }
    }
    Ok(())
}
