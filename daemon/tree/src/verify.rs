//! Walking a layer: listing against its digest, tree against the listing, objects against their names. Whatever does not
//! agree, or can't be read, is a damage that is told; only what keeps the walk itself from going on is an error.

use std::collections::VecDeque;
use std::fs::File;
use std::io::BufReader;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use casemate_store::listing::{self, Entry, Node, Reader, escaped};
use casemate_store::object::ObjectName;
use casemate_store::{Digest, layer};
use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, OFlags, Stat};
use rustix::io::Errno;

use crate::attributes::{self, User};
use crate::error::{Error, Result};
use crate::file::{self, Facts, Job};
use crate::ingest::{Progress, special};
use crate::pool::{Pool, Task};
use crate::walk::{self, Directory, Visitor, open_beneath, open_directory};

/// Damages that are told one by one; the rest is counted.
const TOLD: usize = 500;
/// Most characters of one told damage.
const TOLD_LENGTH: usize = 1000;
const QUEUE: usize = 512;

#[derive(Default)]
struct Damage {
    told: Vec<String>,
    more: u64,
}

impl Damage {
    fn add(&mut self, text: impl FnOnce() -> String) {
        if self.told.len() < TOLD {
            self.told.push(text().chars().take(TOLD_LENGTH).collect());
        } else {
            self.more += 1;
        }
    }

    fn finish(mut self) -> Vec<String> {
        if self.more > 0 {
            self.told.push(format!("and {} more", self.more));
        }
        self.told
    }
}

/// What is known of a file in the tree: its content and attributes, its inode, or why it can't be read.
type Seen = std::result::Result<(Facts, u64), String>;

enum Slot {
    Entry(Entry),
    File(Arc<Task<Job, Seen>>),
    Unreadable { path: Vec<u8>, reason: String },
}

struct Verification<'a, 'p> {
    store: &'a OwnedFd,
    pool: &'p Pool<'a, Job, Seen>,
    user: User,
    tree: OwnedFd,
    listing: Reader<BufReader<File>>,
    /// Whether the listing can be read on; if not, the tree has nothing to be held against.
    readable: bool,
    /// The listing's next entry, which the tree has not reached.
    expected: Option<Entry>,
    queue: VecDeque<Slot>,
    damage: Damage,
    entries: u64,
    bytes: u64,
    progress: Progress<'a>,
}

/// Verify the layer of this name.
pub fn verify(store: &OwnedFd, name: &Digest, progress: Progress<'_>) -> Result<TreeResult> {
    let path = layer(name);
    let user = User::of(store)?;
    let directory = open_directory(store, &*path).map_err(Error::system("open", path.as_bytes()))?;
    let mut damage = Damage::default();
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = open_beneath(&directory, "listing", flags)
        .map_err(|errno| std::io::Error::from(errno).to_string())
        .and_then(|fd| Reader::new(BufReader::new(File::from(fd))).map_err(|error| error.to_string()));
    let tree = open_directory(&directory, "tree").map_err(|errno| std::io::Error::from(errno).to_string());
    let (listing, tree) = match (opened, tree) {
        (Ok(listing), Ok(tree)) => (listing, tree),
        (listing, tree) => {
            let problems = [("listing", listing.err()), ("tree", tree.err())];
            for (part, problem) in problems {
                if let Some(problem) = problem {
                    damage.add(|| format!("{path}/{part}: {problem}"));
                }
            }
            return Ok(TreeResult::Verified { entries: 0, bytes: 0, damage: damage.finish() });
        }
    };
    let root = tree.try_clone().map_err(Error::io("open", path.as_bytes()))?;
    let work = |job: &Job| Ok(see(job, user));
    Pool::run(&work, |pool| {
        let mut verification = Verification {
            store,
            pool,
            user,
            tree,
            listing,
            readable: true,
            expected: None,
            queue: VecDeque::new(),
            damage,
            entries: 0,
            bytes: 0,
            progress,
        };
        verification.next();
        walk::walk(root, &mut verification)?;
        while verification.take_one()? {}
        verification.finish(name, &path)
    })
}

fn see(job: &Job, user: User) -> Seen {
    let look = || {
        let fd = file::open(&*job.directory, &job.name).map_err(Error::system("open", &job.path))?;
        let stat = rustix::fs::fstat(&fd).map_err(Error::system("look at", &job.path))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Changed { path: escaped(&job.path) });
        }
        Ok((file::describe(&fd, &stat, user, false, &job.path)?, stat.st_ino))
    };
    look().map_err(|error: Error| error.to_string())
}

impl Verification<'_, '_> {
    fn next(&mut self) {
        self.expected = None;
        if !self.readable {
            return;
        }
        match self.listing.read() {
            Ok(entry) => self.expected = entry,
            Err(error) => {
                self.readable = false;
                self.damage.add(|| format!("listing: {error}"));
            }
        }
    }

    fn put(&mut self, slot: Slot) -> Result<()> {
        self.queue.push_back(slot);
        while self.queue.len() > QUEUE {
            self.take_one()?;
        }
        Ok(())
    }

    fn take_one(&mut self) -> Result<bool> {
        let Some(slot) = self.queue.pop_front() else { return Ok(false) };
        self.entries += 1;
        match slot {
            Slot::Entry(entry) => {
                if let Some(expected) = self.expect(&entry.path) {
                    self.compare(&expected, &entry);
                }
            }
            Slot::Unreadable { path, reason } => {
                self.expect(&path);
                self.damage.add(|| reason);
            }
            Slot::File(task) => {
                let path = &task.job.path;
                let seen = self.pool.wait(&task, &mut || (self.progress)(self.bytes, self.entries))?;
                match (seen, self.expect(path)) {
                    (Err(reason), _) => self.damage.add(|| reason),
                    (Ok(_), None) => {}
                    (Ok((facts, inode)), Some(expected)) => {
                        self.bytes += facts.size;
                        self.file(&expected, path, &facts, inode);
                    }
                }
            }
        }
        (self.progress)(self.bytes, self.entries);
        Ok(true)
    }

    /// The listing's entry of this path. What comes before it is missing from the tree.
    fn expect(&mut self, path: &[u8]) -> Option<Entry> {
        while let Some(expected) = self.expected.take() {
            match listing::compare(&expected.path, path) {
                std::cmp::Ordering::Less => {
                    self.damage.add(|| format!("{}: missing", escaped(&expected.path)));
                    self.next();
                }
                std::cmp::Ordering::Equal => {
                    self.next();
                    return Some(expected);
                }
                std::cmp::Ordering::Greater => {
                    self.expected = Some(expected);
                    break;
                }
            }
        }
        if self.readable {
            self.damage.add(|| format!("{}: not in the listing", escaped(path)));
        }
        None
    }

    fn compare(&mut self, expected: &Entry, found: &Entry) {
        if expected.node != found.node {
            self.damage.add(|| {
                let different = difference(&expected.node, &found.node);
                format!("{}: {different} differs from the listing", escaped(&found.path))
            });
        }
    }

    fn file(&mut self, expected: &Entry, path: &[u8], facts: &Facts, inode: u64) {
        if let Node::HardLink { target } = &expected.node {
            if self.inode_of(target) != Some(inode) {
                self.damage
                    .add(|| format!("{}: no longer a hard link to {}", escaped(path), escaped(target)));
            }
            return;
        }
        let node = Node::File { meta: facts.meta.clone(), size: facts.size, content: facts.content };
        self.compare(expected, &Entry { path: path.to_vec(), node });
        let Node::File { meta, content, .. } = &expected.node else { return };
        let name = ObjectName::new(*content, meta);
        match self.object_with(name, inode) {
            Ok(true) => {}
            Ok(false) => self.damage.add(|| format!("object {name} is missing (used by {})", escaped(path))),
            Err(errno) => {
                self.damage.add(|| format!("object {name}: {}", std::io::Error::from(errno)));
            }
        }
    }

    /// The inode of a file of the tree, however long its path is.
    fn inode_of(&self, path: &[u8]) -> Option<u64> {
        let mut at: Option<OwnedFd> = None;
        let mut components = path.split(|&b| b == b'/').peekable();
        while let Some(component) = components.next() {
            let here = at.as_ref().unwrap_or(&self.tree);
            if components.peek().is_none() {
                return rustix::fs::statat(here, component, AtFlags::SYMLINK_NOFOLLOW).ok().map(|s| s.st_ino);
            }
            at = Some(open_beneath(here, component, OFlags::PATH | OFlags::DIRECTORY).ok()?);
        }
        None
    }

    /// Whether one of an object's copies is this inode.
    fn object_with(&self, name: ObjectName, inode: u64) -> rustix::io::Result<bool> {
        let mut copy = Some(name);
        while let Some(name) = copy {
            let path = format!("objects/{name}");
            match rustix::fs::statat(self.store, &*path, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if stat.st_ino == inode => return Ok(true),
                Ok(_) => copy = name.next_copy(),
                Err(Errno::NOENT) => return Ok(false),
                Err(errno) => return Err(errno),
            }
        }
        Ok(false)
    }

    fn finish(mut self, name: &Digest, path: &str) -> Result<TreeResult> {
        while let Some(expected) = self.expected.take() {
            self.damage.add(|| format!("{}: missing", escaped(&expected.path)));
            self.next();
        }
        let found = self.listing.digest();
        if self.readable && found != *name {
            self.damage.add(|| format!("{path}/listing has digest {found}"));
        }
        Ok(TreeResult::Verified { entries: self.entries, bytes: self.bytes, damage: self.damage.finish() })
    }
}

impl Visitor for Verification<'_, '_> {
    fn enter(&mut self, directory: &Directory) -> Result<()> {
        let path = directory.path.clone();
        match attributes::read(&directory.fd, self.user, &path) {
            Ok(found) => {
                let mut meta = attributes::meta(&directory.stat, self.user);
                meta.xattrs = found.kept;
                self.put(Slot::Entry(Entry { path, node: Node::Directory { meta, opaque: found.opaque } }))
            }
            Err(error) => self.put(Slot::Unreadable { path, reason: error.to_string() }),
        }
    }

    fn leaf(&mut self, directory: &Directory, name: &[u8], stat: &Stat) -> Result<()> {
        let path = directory.child(name);
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let touched = Arc::new(AtomicBool::new(false));
            let job = Job { directory: directory.fd.clone(), name: name.to_vec(), path, touched };
            let task = self.pool.submit(job);
            return self.put(Slot::File(task));
        }
        match special(directory, name, &path, stat, self.user) {
            Ok(node) => self.put(Slot::Entry(Entry { path, node })),
            Err(error) => self.put(Slot::Unreadable { path, reason: error.to_string() }),
        }
    }

    fn leave(&mut self, _: &Directory) -> Result<()> {
        Ok(())
    }
}

/// What is different, in words.
fn difference(expected: &Node, found: &Node) -> &'static str {
    match (expected, found) {
        (Node::File { content: a, meta: x, .. }, Node::File { content: b, meta: y, .. }) => {
            match (a == b, x == y) {
                (false, true) => "content",
                (false, false) => "content, and an attribute,",
                _ => "an attribute",
            }
        }
        (Node::Symlink { target: a, .. }, Node::Symlink { target: b, .. }) if a != b => "the link's target",
        (a, b) if std::mem::discriminant(a) == std::mem::discriminant(b) => "an attribute",
        _ => "the type",
    }
}
