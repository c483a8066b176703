//! Walking trees that somebody else wrote: by descriptors, one component at a time, no symbolic link and no mount point
//! followed, with a bounded number of descriptors however deep it goes. Names come from the directory itself, so none
//! holds a `/`; paths exist only for messages and listings and are never resolved.

use std::sync::Arc;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Directories held open at a time, of the deepest path.
const WINDOW: usize = 32;

/// Open what is beneath a directory, following nothing. `path` may have several components.
pub fn open_beneath(
    at: impl AsFd,
    path: impl rustix::path::Arg,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let path = path.into_c_str()?;
    loop {
        // EAGAIN: something was renamed meanwhile, somewhere on this machine.
        match rustix::fs::openat2(&at, &*path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

/// Open a directory beneath, to list and to change it.
pub fn open_directory(at: impl AsFd, path: impl rustix::path::Arg) -> rustix::io::Result<OwnedFd> {
    open_beneath(at, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)
}

/// A path of directories from a tree's root on, of which only the deepest few are open. The way back up is `..`, and
/// where it leads must be where it came from.
#[derive(Debug, Default)]
pub struct Window {
    levels: Vec<Open>,
}

#[derive(Debug)]
struct Open {
    fd: Option<Arc<OwnedFd>>,
    device: u64,
    inode: u64,
}

impl Window {
    pub fn push(&mut self, fd: Arc<OwnedFd>, stat: &Stat) {
        if let Some(far) = self.levels.len().checked_sub(WINDOW) {
            // The root stays: there is no `..` to it that could be trusted less, but it costs nothing.
            if far > 0 {
                self.levels[far].fd = None;
            }
        }
        self.levels.push(Open { fd: Some(fd), device: stat.st_dev, inode: stat.st_ino });
    }

    /// The deepest directory.
    pub fn last(&self) -> Option<&Arc<OwnedFd>> {
        self.levels.last().and_then(|level| level.fd.as_ref())
    }

    /// Leave the deepest directory.
    pub fn pop(&mut self, path: &[u8]) -> Result<()> {
        let Some(left) = self.levels.pop() else { return Ok(()) };
        if let (Some(Open { fd: fd @ None, device, inode }), Some(child)) = (self.levels.last_mut(), left.fd)
        {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let parent = rustix::fs::openat(&child, "..", flags, Mode::empty())
                .map_err(Error::system("go back up from", path))?;
            let stat = rustix::fs::fstat(&parent).map_err(Error::system("go back up from", path))?;
            if (stat.st_dev, stat.st_ino) != (*device, *inode) {
                return Err(Error::Changed { path: casemate_store::listing::escaped(path) });
            }
            *fd = Some(Arc::new(parent));
        }
        Ok(())
    }
}

/// A directory during a walk.
#[derive(Debug)]
pub struct Directory {
    pub fd: Arc<OwnedFd>,
    /// From the tree's root, which is `.`.
    pub path: Vec<u8>,
    pub stat: Stat,
}

impl Directory {
    /// The path of something in here.
    pub fn child(&self, name: &[u8]) -> Vec<u8> {
        if self.path == b"." { name.to_vec() } else { [&self.path, &b"/"[..], name].concat() }
    }
}

/// What is done on a walk.
pub trait Visitor {
    /// A directory is entered, the root first.
    fn enter(&mut self, directory: &Directory) -> Result<()>;
    /// Something that is no directory. `stat` is that of the name itself.
    fn leaf(&mut self, directory: &Directory, name: &[u8], stat: &Stat) -> Result<()>;
    /// All of a directory has been seen.
    fn leave(&mut self, directory: &Directory) -> Result<()>;
}

/// Names in a directory, sorted as bytes: within one directory, this is the order of listings.
pub fn sorted_names(fd: &OwnedFd, path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd).map_err(Error::system("list", path))? {
        let entry = entry.map_err(Error::system("list", path))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

struct Level {
    stat: Stat,
    path_length: usize,
    names: std::vec::IntoIter<Vec<u8>>,
}

/// Walk a tree in the order of listings.
pub fn walk(root: OwnedFd, visitor: &mut impl Visitor) -> Result<()> {
    let stat = rustix::fs::fstat(&root).map_err(Error::system("look at", b"."))?;
    let mut here = Directory { fd: Arc::new(root), path: b".".to_vec(), stat };
    let mut window = Window::default();
    let mut levels = Vec::new();
    visitor.enter(&here)?;
    let names = sorted_names(&here.fd, &here.path)?.into_iter();
    window.push(here.fd.clone(), &here.stat);
    levels.push(Level { stat: here.stat, path_length: 1, names });
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.next() else {
            visitor.leave(&here)?;
            levels.pop();
            window.pop(&here.path)?;
            if let (Some(level), Some(fd)) = (levels.last(), window.last()) {
                here.fd = fd.clone();
                here.stat = level.stat;
                here.path.truncate(level.path_length);
                if levels.len() == 1 {
                    here.path = b".".to_vec();
                }
            }
            continue;
        };
        let look = |errno| Error::system("look at", &here.child(&name))(errno);
        let stat = rustix::fs::statat(&*here.fd, &name[..], AtFlags::SYMLINK_NOFOLLOW).map_err(look)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            visitor.leaf(&here, &name, &stat)?;
            continue;
        }
        let path = here.child(&name);
        let fd = open_directory(&*here.fd, &name[..]).map_err(Error::system("open", &path))?;
        let stat = rustix::fs::fstat(&fd).map_err(Error::system("look at", &path))?;
        here = Directory { fd: Arc::new(fd), path, stat };
        visitor.enter(&here)?;
        let names = sorted_names(&here.fd, &here.path)?.into_iter();
        window.push(here.fd.clone(), &here.stat);
        levels.push(Level { stat, path_length: here.path.len(), names });
    }
    Ok(())
}
