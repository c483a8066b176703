//! Several layers become one tree, of links to the same inodes. A whiteout stays one, since there may be something below the
//! stack to hide; a directory that hides what is below it, by whatever part of the stack, is opaque.

use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};

use crate::attributes::User;
use crate::error::{Error, Result};
use crate::ingest::{Progress, make_directory};
use crate::mirror::{self, Marks};
use crate::path::StorePath;
use crate::view::{Parts, View};
use crate::walk::open_directory;

/// Merged directories below each other; what a single layer has is not merged.
const DEPTH: usize = 200;

struct Flattening<'a> {
    user: User,
    entries: u64,
    progress: Progress<'a>,
}

/// Make one tree at `to` of the layers' trees.
pub fn flatten(
    store: &OwnedFd,
    stack: &[String],
    to: &StorePath,
    progress: Progress<'_>,
) -> Result<TreeResult> {
    let paths = stack.iter().map(|path| StorePath::parse(path)).collect::<Result<Vec<_>>>()?;
    let parts = Parts::open(store, &paths)?;
    let shown = to.as_str().as_bytes();
    if !to.in_staging() || parts.top().is_none() {
        return Err(Error::Request { path: to.as_str().to_owned() });
    }
    let (parent, name) = to.split();
    let home = open_directory(store, parent).map_err(Error::system("open", shown))?;
    make_directory(&home, name)?;
    let target = open_directory(&home, name).map_err(Error::system("open", shown))?;
    let mut flattening = Flattening { user: User::of(store)?, entries: 0, progress };
    flattening.directory(&parts, false, &target, b".", 0)?;
    Ok(TreeResult::Flattened { entries: flattening.entries })
}

impl Flattening<'_> {
    fn directory(
        &mut self,
        parts: &Parts,
        closed: bool,
        target: &OwnedFd,
        path: &[u8],
        depth: usize,
    ) -> Result<()> {
        let Some((top, stat)) = parts.top() else { return Ok(()) };
        if let ([(only, _)], false) = (&parts.0[..], closed) {
            // As it is, marks and all, however deep.
            let source = only.try_clone().map_err(Error::io("open", path))?;
            let root = target.try_clone().map_err(Error::io("open", path))?;
            return mirror::mirror(source, root, |leaf| {
                self.entries += 1;
                (self.progress)(0, self.entries);
                mirror::link(leaf)
            });
        }
        if depth == DEPTH {
            let path = casemate_store::listing::escaped(path);
            return Err(Error::Limit { path, reason: "more than 200 merged directories below each other" });
        }
        for name in parts.names(path)? {
            let child = if path == b"." { name.clone() } else { [path, b"/", &name].concat() };
            self.entries += 1;
            (self.progress)(0, self.entries);
            match parts.look(&name, self.user, &child)? {
                View::Absent => {}
                // In a closed directory there is nothing to hide.
                View::Whiteout if closed => {}
                View::Whiteout => {
                    rustix::fs::mknodat(target, &name[..], FileType::CharacterDevice, Mode::empty(), 0)
                        .map_err(Error::system("make", &child))?;
                }
                View::Leaf { directory, .. } => {
                    rustix::fs::linkat(&*directory, &name[..], target, &name[..], AtFlags::empty())
                        .map_err(Error::system("link", &child))?;
                }
                View::Directory { parts, closed } => {
                    rustix::fs::mkdirat(target, &name[..], Mode::from_raw_mode(0o700))
                        .map_err(Error::system("make", &child))?;
                    let made = open_directory(target, &name[..]).map_err(Error::system("open", &child))?;
                    self.directory(&parts, closed, &made, &child, depth + 1)?;
                }
            }
        }
        mirror::copy_xattrs(top, target, Marks::Left, path)?;
        if closed {
            rustix::fs::fsetxattr(target, "user.overlay.opaque", b"y", XattrFlags::empty())
                .map_err(Error::system("mark", path))?;
        }
        mirror::set_meta(target, stat, path)
    }
}
