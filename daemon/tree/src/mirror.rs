//! A second tree of the same inodes: directories are made, everything else is linked.

use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, Gid, Mode, Stat, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::walk::{self, Directory, Visitor, Window, open_directory};

struct Mirror {
    target: Window,
}

/// Make the empty directory `target` a mirror of the tree at `source`.
pub fn mirror(source: OwnedFd, target: OwnedFd) -> Result<()> {
    let stat = rustix::fs::fstat(&target).map_err(Error::system("look at", b"."))?;
    let mut mirror = Mirror { target: Window::default() };
    mirror.target.push(std::sync::Arc::new(target), &stat);
    walk::walk(source, &mut mirror)
}

impl Mirror {
    fn here(&self, path: &[u8]) -> Result<std::sync::Arc<OwnedFd>> {
        self.target.last().cloned().ok_or_else(|| Error::refused(path, "lost its directory"))
    }
}

impl Visitor for Mirror {
    fn enter(&mut self, directory: &Directory) -> Result<()> {
        let path = &directory.path;
        if path != b"." {
            let here = self.here(path)?;
            let name = path.rsplit(|&b| b == b'/').next().unwrap_or(path);
            rustix::fs::mkdirat(&*here, name, Mode::from_raw_mode(0o700))
                .map_err(Error::system("make", path))?;
            let fd = open_directory(&*here, name).map_err(Error::system("open", path))?;
            let stat = rustix::fs::fstat(&fd).map_err(Error::system("look at", path))?;
            self.target.push(std::sync::Arc::new(fd), &stat);
        }
        copy_attributes(&directory.fd, &*self.here(path)?, path)
    }

    fn leaf(&mut self, directory: &Directory, name: &[u8], _: &Stat) -> Result<()> {
        let path = directory.child(name);
        rustix::fs::linkat(&*directory.fd, name, &*self.here(&path)?, name, AtFlags::empty())
            .map_err(Error::system("link", &path))
    }

    fn leave(&mut self, directory: &Directory) -> Result<()> {
        let (path, stat) = (&directory.path, &directory.stat);
        let failed = |errno| Error::system("set the attributes of", path)(errno);
        let here = self.here(path)?;
        rustix::fs::fchown(&*here, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))
            .map_err(failed)?;
        rustix::fs::fchmod(&*here, Mode::from_raw_mode(stat.st_mode & 0o7777)).map_err(failed)?;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ },
        };
        rustix::fs::futimens(&*here, &times).map_err(failed)?;
        if path == b"." { Ok(()) } else { self.target.pop(path) }
    }
}

/// All of them, overlay marks as well: what a layer drops is decided where it is listed.
fn copy_attributes(from: &OwnedFd, to: &OwnedFd, path: &[u8]) -> Result<()> {
    let failed = |errno| Error::system("copy the attributes of", path)(errno);
    let mut names = vec![0; 65536];
    let length = match rustix::fs::flistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(errno) => return Err(failed(errno)),
    };
    let mut value = vec![0; 65536];
    for name in names[..length].split(|&b| b == 0) {
        if name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_") {
            let length = rustix::fs::fgetxattr(from, name, &mut value[..]).map_err(failed)?;
            rustix::fs::fsetxattr(to, name, &value[..length], XattrFlags::empty()).map_err(failed)?;
        }
    }
    Ok(())
}
