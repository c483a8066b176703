//! `casemate-tree`: prepares, ingests, verifies and removes the trees of the store, in the outer namespace, where it may
//! reach files of every id. It parses nothing foreign. Its capabilities are the store's directory and a descriptor for what is too long for an answer.

pub mod attributes;
mod copy;
mod diff;
mod error;
pub mod file;
mod find;
mod flatten;
mod ingest;
mod mirror;
mod path;
mod pool;
mod remove;
mod sweep;
mod tally;
mod verify;
mod view;
pub mod walk;

use std::io::Write;

use casemate_store::Digest;
use casemate_worker::protocol::{Failure, NewUpper, TreeRequest, TreeResult};
use rustix::fd::OwnedFd;
use rustix::fs::Mode;

pub use error::{Error, Result};
use path::StorePath;

/// Do what is asked for. `progress` gets bytes and items done, `out` what is too long for an answer.
pub fn work(
    store: &OwnedFd,
    request: &TreeRequest,
    out: &mut dyn Write,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<TreeResult, Failure> {
    // Modes are given exactly.
    rustix::process::umask(Mode::empty());
    let result = match request {
        TreeRequest::Prepare { path, children } => prepare(store, path, children),
        TreeRequest::Uppers { make } => uppers(store, make),
        TreeRequest::Copy { from, to } => {
            StorePath::parse(from).and_then(|from| copy::copy(store, &from, &StorePath::parse(to)?, progress))
        }
        TreeRequest::Ingest { path } => {
            StorePath::parse(path).and_then(|path| ingest::ingest(store, &path, progress))
        }
        TreeRequest::Flatten { stack, to } => {
            StorePath::parse(to).and_then(|to| flatten::flatten(store, stack, &to, progress))
        }
        TreeRequest::Diff { old, new, patch } => diff::diff(store, [old, new], *patch, out, progress),
        TreeRequest::Sweep { trees, dry } => sweep::sweep(store, trees, *dry, progress),
        TreeRequest::Tally => tally::tally(store, out, progress),
        TreeRequest::Find { content } => find::find(store, content, out, progress),
        TreeRequest::Remove { paths } => remove(store, paths, progress),
        TreeRequest::Verify { layer } => layer
            .parse::<Digest>()
            .map_err(|_| Error::Request { path: layer.chars().take(100).collect() })
            .and_then(|digest| verify::verify(store, &digest, progress)),
    };
    result.map_err(Failure::from)
}

fn prepare(store: &OwnedFd, path: &str, children: &[String]) -> Result<TreeResult> {
    let path = StorePath::parse(path)?;
    let mut all = vec![path.clone()];
    for child in children {
        let child = StorePath::parse(&format!("{}/{child}", path.as_str()))?;
        if child.split().0 != path.as_str() {
            return Err(Error::Request { path: child.as_str().to_owned() });
        }
        all.push(child);
    }
    for path in all {
        let (parent, name) = path.split();
        let parent = walk::open_directory(store, parent)
            .map_err(Error::system("open the directory of", path.as_str().as_bytes()))?;
        // Whose it is follows from who makes it: this worker is the environments' root.
        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))
            .map_err(Error::system("make", path.as_str().as_bytes()))?;
    }
    Ok(TreeResult::Prepared)
}

fn uppers(store: &OwnedFd, make: &[NewUpper]) -> Result<TreeResult> {
    let sync = |path: &str| {
        let failed = |errno| Error::system("sync", path.as_bytes())(errno);
        let directory = walk::open_directory(store, path).map_err(failed)?;
        rustix::fs::fsync(&directory).map_err(failed)
    };
    for NewUpper { path, like } in make {
        let like = StorePath::parse(like)?;
        prepare(store, path, &["upper".to_owned(), "work".to_owned()])?;
        let shown = like.as_str().as_bytes();
        let below = walk::open_directory(store, like.as_str()).map_err(Error::system("open", shown))?;
        let upper = format!("{path}/upper");
        let root = walk::open_directory(store, &*upper).map_err(Error::system("open", upper.as_bytes()))?;
        let stat = rustix::fs::fstat(&below).map_err(Error::system("look at", shown))?;
        mirror::copy_xattrs(&below, &root, mirror::Marks::Left, shown)?;
        mirror::set_meta(&root, &stat, upper.as_bytes())?;
        for path in [&upper, &format!("{path}/work"), path] {
            sync(path)?;
        }
    }
    sync("uppers")?;
    Ok(TreeResult::Prepared)
}

fn remove(store: &OwnedFd, paths: &[String], progress: &mut dyn FnMut(u64, u64)) -> Result<TreeResult> {
    let paths = paths.iter().map(|path| StorePath::removable(path)).collect::<Result<Vec<_>>>()?;
    let mut entries = 0;
    for path in paths {
        entries += remove::remove(store, &path, &mut |here| progress(0, entries + here))?;
    }
    Ok(TreeResult::Removed { entries })
}
