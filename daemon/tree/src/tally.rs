//! What everything takes on the disk: each inode once, with the trees that it is in.
//!
//! Lines on the second descriptor: `tree NUMBER PATH` for `objects`, for `staging`, and for each layer and upper, and then
//! `bytes NUMBER,NUMBER… BYTES` for each set of trees that share something. Directories above the trees are in none:
//! `bytes  BYTES`. Together they are what `du` says.

use std::collections::HashMap;
use std::io::Write;

use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::Stat;
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::ingest::Progress;
use crate::sweep::allocated;
use crate::walk::{self, Directory, Visitor, open_directory, sorted_names};

/// Sets of trees, each once, by number; 0 is the empty one.
struct Sets {
    sets: Vec<Vec<u32>>,
    /// A set and one more tree.
    more: HashMap<(u32, u32), u32>,
    bytes: Vec<u64>,
}

impl Sets {
    /// Trees come in order, so that the last one of a set is the highest.
    fn with(&mut self, set: u32, tree: u32) -> u32 {
        if self.sets[set as usize].last() == Some(&tree) {
            return set;
        }
        let next = self.sets.len() as u32;
        let found = *self.more.entry((set, tree)).or_insert(next);
        if found == next {
            let mut all = self.sets[set as usize].clone();
            all.push(tree);
            self.sets.push(all);
            self.bytes.push(0);
        }
        found
    }
}

struct Tally<'a> {
    sets: Sets,
    /// Inodes with several names: the set that they are in so far, and what they take.
    shared: HashMap<u64, (u32, u64)>,
    tree: u32,
    entries: u64,
    total: u64,
    progress: Progress<'a>,
}

impl Tally<'_> {
    fn add(&mut self, stat: &Stat, is_directory: bool) {
        let bytes = allocated(stat);
        self.entries += 1;
        // Those of `objects` and `staging` are the store's own.
        let is_own = is_directory && self.tree < 2;
        if is_directory || stat.st_nlink == 1 {
            let own = if is_own { 0 } else { self.sets.with(0, self.tree) };
            self.sets.bytes[own as usize] += bytes;
            self.total += bytes;
        } else {
            let known = self.shared.entry(stat.st_ino).or_insert((0, bytes));
            if known.0 == 0 {
                self.total += bytes;
            }
            known.0 = self.sets.with(known.0, self.tree);
        }
        (self.progress)(self.total, self.entries);
    }
}

impl Visitor for Tally<'_> {
    fn enter(&mut self, directory: &Directory) -> Result<()> {
        self.add(&directory.stat, true);
        Ok(())
    }

    fn leaf(&mut self, _: &Directory, _: &[u8], stat: &Stat) -> Result<()> {
        self.add(stat, false);
        Ok(())
    }

    fn leave(&mut self, _: &Directory) -> Result<()> {
        Ok(())
    }
}

/// Write what each set of trees takes.
pub fn tally(store: &OwnedFd, out: &mut dyn Write, progress: Progress<'_>) -> Result<TreeResult> {
    let failed = |errno| Error::system("measure", b"the store")(errno);
    let written = |error| Error::io("write", b"what was measured")(error);
    let mut out = std::io::BufWriter::new(out);
    let sets = Sets { sets: vec![Vec::new()], more: HashMap::new(), bytes: vec![0] };
    let mut tally = Tally { sets, shared: HashMap::new(), tree: 0, entries: 0, total: 0, progress };
    let mut trees = vec!["objects".to_owned(), "staging".to_owned()];
    for above in ["layers", "uppers"] {
        let directory = open_directory(store, above).map_err(failed)?;
        let bytes = allocated(&rustix::fs::fstat(&directory).map_err(failed)?);
        tally.sets.bytes[0] += bytes;
        tally.total += bytes;
        for name in sorted_names(&directory, above.as_bytes())? {
            // Others are told by name at each start.
            if let Ok(name) = String::from_utf8(name) {
                trees.push(format!("{above}/{name}"));
            }
        }
    }
    for (number, path) in trees.iter().enumerate() {
        tally.tree = number as u32;
        let tree = match open_directory(store, &**path) {
            Ok(tree) => tree,
            // Removed meanwhile.
            Err(Errno::NOENT | Errno::NOTDIR) => continue,
            Err(errno) => return Err(failed(errno)),
        };
        writeln!(out, "tree {number} {path}").map_err(written)?;
        walk::walk(tree, &mut tally)?;
    }
    for (set, bytes) in tally.shared.values() {
        tally.sets.bytes[*set as usize] += bytes;
    }
    for (set, bytes) in tally.sets.sets.iter().zip(&tally.sets.bytes).filter(|(_, bytes)| **bytes > 0) {
        let numbers: Vec<String> = set.iter().map(u32::to_string).collect();
        writeln!(out, "bytes {} {bytes}", numbers.join(",")).map_err(written)?;
    }
    out.flush().map_err(written)?;
    Ok(TreeResult::Tallied { bytes: tally.total, entries: tally.entries })
}
