//! A stack of trees as overlayfs shows it: for each directory, those of the stack's that take part in it, topmost first. A
//! whiteout hides what is below it, an opaque directory too, and so does whatever is no directory.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Stat};
use rustix::io::Errno;

use crate::attributes::{self, User};
use crate::error::{Error, Result};
use crate::walk::{open_directory, sorted_names};

/// A directory of the stack: its parts, topmost first, with what `stat` said of each.
#[derive(Debug, Clone, Default)]
pub struct Parts(pub Vec<(Arc<OwnedFd>, Stat)>);

/// What is at a name.
pub enum View {
    Absent,
    /// It is not there, whatever is below the stack.
    Whiteout,
    /// In the topmost part that has it.
    Leaf {
        directory: Arc<OwnedFd>,
        stat: Stat,
    },
    /// `closed`: what is below the stack is no part of it.
    Directory {
        parts: Parts,
        closed: bool,
    },
}

impl Parts {
    /// The roots of a stack, by their paths in the store.
    pub fn open(store: &OwnedFd, stack: &[crate::path::StorePath]) -> Result<Self> {
        let open = |path: &crate::path::StorePath| {
            let failed = |errno| Error::system("open", path.as_str().as_bytes())(errno);
            let fd = open_directory(store, path.as_str()).map_err(failed)?;
            let stat = rustix::fs::fstat(&fd).map_err(failed)?;
            Ok((Arc::new(fd), stat))
        };
        stack.iter().map(open).collect::<Result<_>>().map(Self)
    }

    /// The very same directories: then all that is below them is the same as well.
    pub fn are(&self, others: &Self) -> bool {
        let ids =
            |parts: &Self| parts.0.iter().map(|(_, stat)| (stat.st_dev, stat.st_ino)).collect::<Vec<_>>();
        ids(self) == ids(others)
    }

    /// The topmost: its attributes are those that count.
    pub fn top(&self) -> Option<&(Arc<OwnedFd>, Stat)> {
        self.0.first()
    }

    /// All names in them, hidden ones too.
    pub fn names(&self, path: &[u8]) -> Result<BTreeSet<Vec<u8>>> {
        let mut names = BTreeSet::new();
        for (fd, _) in &self.0 {
            names.extend(sorted_names(fd, path)?);
        }
        Ok(names)
    }

    pub fn look(&self, name: &[u8], user: User, path: &[u8]) -> Result<View> {
        let mut parts = Vec::new();
        let mut closed = false;
        for (fd, _) in &self.0 {
            let stat = match rustix::fs::statat(&**fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(Error::system("look at", path)(errno)),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let opened = match open_directory(&**fd, name) {
                        Ok(opened) => opened,
                        // The environment runs, and has just removed it.
                        Err(Errno::NOENT | Errno::NOTDIR) => continue,
                        Err(errno) => return Err(Error::system("open", path)(errno)),
                    };
                    let is_opaque = attributes::read(&opened, user, path)?.opaque;
                    parts.push((Arc::new(opened), stat));
                    if is_opaque {
                        closed = true;
                        break;
                    }
                }
                FileType::CharacterDevice if stat.st_rdev == 0 && parts.is_empty() => {
                    return Ok(View::Whiteout);
                }
                _ if parts.is_empty() => return Ok(View::Leaf { directory: fd.clone(), stat }),
                _ => {
                    closed = true;
                    break;
                }
            }
        }
        Ok(if parts.is_empty() { View::Absent } else { View::Directory { parts: Self(parts), closed } })
    }
}
