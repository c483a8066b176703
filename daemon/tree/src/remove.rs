//! Removing trees of any depth, mode and owner. What is removed from `layers/` and `uppers/` first moves to `staging/` in
//! one step: a half-removed layer is never where a whole one would be.

use std::ffi::CString;
use std::sync::Arc;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, RenameFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::path::StorePath;
use crate::walk::{self, Window};

/// Names taken from a directory at a time: a bound on memory.
const BATCH: usize = 4096;

struct Level {
    name: CString,
    batch: Vec<CString>,
    /// Whether the batch was the rest of the directory.
    complete: bool,
}

/// Remove a tree or file of the store, if it is there. Returns the number of inodes' names that went.
pub fn remove(store: &OwnedFd, path: &StorePath, progress: &mut dyn FnMut(u64)) -> Result<u64> {
    let shown = path.as_str().as_bytes();
    let (parent, name) = path.split();
    let parent = match walk::open_directory(store, parent) {
        Ok(parent) => parent,
        Err(Errno::NOENT) => return Ok(0),
        Err(errno) => return Err(Error::system("open the directory of", shown)(errno)),
    };
    if path.in_staging() {
        return remove_in(&parent, name, shown, progress);
    }
    let staging = walk::open_directory(store, "staging").map_err(Error::system("open", b"staging"))?;
    for number in 0u32.. {
        let aside = format!("removed-{name}-{number}");
        match rustix::fs::renameat_with(&parent, name, &staging, &*aside, RenameFlags::NOREPLACE) {
            Ok(()) => return remove_in(&staging, &aside, shown, progress),
            Err(Errno::EXIST) => {}
            Err(Errno::NOENT) => break,
            Err(errno) => return Err(Error::system("move aside", shown)(errno)),
        }
    }
    Ok(0)
}

/// Remove `name` from a directory, whatever it is.
pub fn remove_in(parent: impl AsFd, name: &str, shown: &[u8], progress: &mut dyn FnMut(u64)) -> Result<u64> {
    let failed = |errno| Error::system("remove", shown)(errno);
    let c_name = CString::new(name).map_err(|_| Error::refused(shown, "bad name"))?;
    let mut entries = 0;
    let stat = match rustix::fs::statat(&parent, &*c_name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(0),
        Err(errno) => return Err(failed(errno)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        rustix::fs::unlinkat(&parent, &*c_name, AtFlags::empty()).map_err(failed)?;
        return Ok(1);
    }
    let mut window = Window::default();
    let mut levels = vec![enter(&mut window, &parent, c_name, shown)?];
    while let Some(level) = levels.last_mut() {
        let here = window.last().ok_or_else(|| Error::refused(shown, "lost its directory"))?.clone();
        if let Some(name) = level.batch.pop() {
            match rustix::fs::unlinkat(&*here, &*name, AtFlags::empty()) {
                Ok(()) => {
                    entries += 1;
                    progress(entries);
                }
                Err(Errno::ISDIR | Errno::PERM) => {
                    let child = enter(&mut window, &*here, name, shown)?;
                    levels.push(child);
                }
                Err(errno) => return Err(failed(errno)),
            }
            continue;
        }
        if !level.complete {
            (level.batch, level.complete) = batch(&here, shown)?;
            continue;
        }
        let name = std::mem::take(&mut level.name);
        levels.pop();
        window.pop(shown)?;
        drop(here);
        let removed = match window.last() {
            Some(directory) => rustix::fs::unlinkat(&**directory, &*name, AtFlags::REMOVEDIR),
            None => rustix::fs::unlinkat(&parent, &*name, AtFlags::REMOVEDIR),
        };
        removed.map_err(failed)?;
        entries += 1;
        progress(entries);
    }
    Ok(entries)
}

fn enter(window: &mut Window, at: impl AsFd, name: CString, shown: &[u8]) -> Result<Level> {
    let failed = |errno| Error::system("remove", shown)(errno);
    let fd = walk::open_directory(at, &*name).map_err(failed)?;
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    let (batch, complete) = batch(&fd, shown)?;
    window.push(Arc::new(fd), &stat);
    Ok(Level { name, batch, complete })
}

fn batch(fd: &OwnedFd, shown: &[u8]) -> Result<(Vec<CString>, bool)> {
    let mut names = Vec::new();
    for entry in Dir::read_from(fd).map_err(Error::system("list", shown))? {
        let entry = entry.map_err(Error::system("list", shown))?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
            if names.len() == BATCH {
                return Ok((names, false));
            }
        }
    }
    Ok((names, true))
}
