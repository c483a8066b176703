//! Collection: trees that nobody names any more go, and then the objects that nothing is linked to but their own name.
//!
//! Whoever asks holds back all that stores meanwhile, so no link comes while its count is looked at. It can be cut off
//! anywhere: a tree leaves its place in one rename, each object by itself, and what stays is found the next time.

use std::collections::HashMap;

use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Stat};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::ingest::Progress;
use crate::path::StorePath;
use crate::remove;
use crate::walk::{self, Directory, Visitor, open_directory, sorted_names};

pub fn allocated(stat: &Stat) -> u64 {
    (stat.st_blocks as u64).saturating_mul(512)
}

/// What trees hold: names of each inode in them, with what it takes.
#[derive(Default)]
struct Held {
    /// How many names here, how many everywhere, bytes.
    inodes: HashMap<u64, (u32, u32, u64)>,
    bytes: u64,
    entries: u64,
}

impl Visitor for Held {
    fn enter(&mut self, directory: &Directory) -> Result<()> {
        self.bytes += allocated(&directory.stat);
        self.entries += 1;
        Ok(())
    }

    fn leaf(&mut self, _: &Directory, _: &[u8], stat: &Stat) -> Result<()> {
        let links = u32::try_from(stat.st_nlink).unwrap_or(u32::MAX);
        let held = self.inodes.entry(stat.st_ino).or_insert((0, links, allocated(stat)));
        held.0 += 1;
        self.entries += 1;
        Ok(())
    }

    fn leave(&mut self, _: &Directory) -> Result<()> {
        Ok(())
    }
}

/// Remove these trees and what they leave behind in `objects/`; with `dry`, tell what that would be.
pub fn sweep(store: &OwnedFd, trees: &[String], dry: bool, progress: Progress<'_>) -> Result<TreeResult> {
    let trees = trees.iter().map(|path| StorePath::parse(path)).collect::<Result<Vec<_>>>()?;
    let mut held = Held::default();
    for path in &trees {
        let shown = path.as_str().as_bytes();
        match open_directory(store, path.as_str()) {
            Ok(tree) => walk::walk(tree, &mut held)?,
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(Error::system("open", shown)(errno)),
        }
        progress(held.bytes, held.entries);
    }
    let (mut objects, mut bytes) = (0, held.bytes);
    // All of their names are in here.
    bytes +=
        held.inodes.values().filter(|(here, links, _)| here == links).map(|(_, _, bytes)| bytes).sum::<u64>();
    if !dry {
        for path in &trees {
            remove::remove(store, path, &mut |here| progress(bytes, here))?;
        }
    }
    let failed = |errno| Error::system("look through", b"objects")(errno);
    let all = open_directory(store, "objects").map_err(failed)?;
    for first in sorted_names(&all, b"objects")? {
        let directory = match open_directory(&all, &first[..]) {
            Ok(directory) => directory,
            Err(Errno::NOTDIR) => continue,
            Err(errno) => return Err(failed(errno)),
        };
        for name in sorted_names(&directory, &first)? {
            let stat =
                rustix::fs::statat(&directory, &name[..], AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
            let links = u32::try_from(stat.st_nlink).unwrap_or(u32::MAX);
            let going = if dry { held.inodes.get(&stat.st_ino).map_or(0, |(here, ..)| *here) } else { 0 };
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || links != going + 1 {
                continue;
            }
            if !dry {
                rustix::fs::unlinkat(&directory, &name[..], AtFlags::empty())
                    .map_err(Error::system("remove object", &name))?;
            }
            objects += 1;
            bytes += allocated(&stat);
            progress(bytes, objects);
        }
    }
    Ok(TreeResult::Swept { objects, bytes })
}
