//! A tree becomes a layer.
//!
//! One walk: files go to the [`Pool`], everything else is described on the way, and a queue keeps both in the order of the
//! listing. A file whose object exists is replaced by a link to it, all others are linked into `objects/`, so no content is
//! ever copied. Replacing changes a directory's mtime, which is put back when the directory is through. Then: listing, one
//! `syncfs`, one rename to `layers/<digest>`, one fsync of `layers/`.
//!
//! A tree in `staging/` moves into its layer. One in `uppers/` is a sealed upper that a record refers to and that may be
//! mounted as a lower: it stays, and the layer gets a tree of its own, of hard links to the same inodes.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::BufWriter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use casemate_store::listing::{Entry, ListingError, Node, Writer, escaped};
use casemate_store::{Digest, layer};
use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;

use crate::attributes::{self, User};
use crate::error::{Error, Result};
use crate::file::{Job, Linked, Objects};
use crate::mirror::{self, mirror};
use crate::path::StorePath;
use crate::pool::{PATIENCE, Pool, Task};
use crate::remove::remove_in;
use crate::walk::{self, Directory, Visitor, open_directory};

/// Entries between the walk and the listing: bounds memory and open directories.
const QUEUE: usize = 512;

/// Files that show whether most of a tree is new.
const SAMPLE: u64 = 200;
/// Between looks at a thread that syncs.
const BREATH: std::time::Duration = std::time::Duration::from_millis(1);

/// How far an ingestion or verification is.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

type Submitted = Arc<Task<Job, Linked>>;

enum Slot {
    Entry(Entry),
    File(Submitted),
    /// Another name of an earlier file.
    HardLink {
        job: Job,
        first: Submitted,
    },
    /// All of a directory is in the queue before this.
    End {
        directory: Arc<OwnedFd>,
        path: Vec<u8>,
        stat: Stat,
        touched: Arc<AtomicBool>,
    },
}

struct Ingestion<'a, 'p> {
    pool: &'p Pool<'a, Job, Linked>,
    objects: &'a Objects,
    listing: Writer<BufWriter<File>>,
    queue: VecDeque<Slot>,
    /// For each directory on the way down, whether something in it was replaced.
    touched: Vec<Arc<AtomicBool>>,
    /// Files with several names in this tree, by inode.
    linked: HashMap<u64, Submitted>,
    bytes: u64,
    files: u64,
    /// To be told when it pays to begin writing to the disk.
    begin: Option<Sender<()>>,
    progress: Progress<'a>,
}

/// Ingest the tree at `path`.
pub fn ingest(store: &OwnedFd, path: &StorePath, progress: Progress<'_>) -> Result<TreeResult> {
    let shown = path.as_str().as_bytes();
    let user = User::of(store)?;
    let (parent, name) = path.split();
    let source = open_directory(store, path.as_str()).map_err(Error::system("open", shown))?;
    let (home, building) = if path.in_staging() {
        let home = open_directory(store, parent).map_err(Error::system("open", parent.as_bytes()))?;
        (home, format!("{name}.layer"))
    } else {
        let home = open_directory(store, "staging").map_err(Error::system("open", b"staging"))?;
        (home, format!("{}.layer", path.as_str().replace('/', "-")))
    };
    // What an ingestion left that was killed.
    remove_in(&home, &building, building.as_bytes(), &mut |_| ())?;
    make_directory(&home, &building)?;
    let workshop = open_directory(&home, &*building).map_err(Error::system("open", building.as_bytes()))?;
    make_directory(&workshop, "scratch")?;
    let scratch = open_directory(&workshop, "scratch").map_err(Error::system("open", b"scratch"))?;
    if path.in_staging() {
        rustix::fs::renameat(&home, name, &workshop, "tree").map_err(Error::system("move", shown))?;
    } else {
        make_directory(&workshop, "tree")?;
        let tree = open_directory(&workshop, "tree").map_err(Error::system("open", b"tree"))?;
        mirror(source, tree, mirror::link)?;
    }
    let tree = open_directory(&workshop, "tree").map_err(Error::system("open", b"tree"))?;

    let objects = Objects::open(store, user, scratch)?;
    let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let listing = rustix::fs::openat(&workshop, "listing", create, Mode::from_raw_mode(0o644))
        .map_err(Error::system("make", b"listing"))?;
    let (digest, entries, bytes) = std::thread::scope(|scope| {
        // Where most of it is new, the data goes to the disk while it is hashed. An error is told once only, so this
        // call's counts too.
        let (begin, begun) = std::sync::mpsc::channel();
        let early = std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn_scoped(scope, move || begun.recv().map_or(Ok(()), |()| rustix::fs::syncfs(store)));
        let filled = fill(&objects, tree, listing, begin, &mut *progress)?;
        while let Ok(early) = &early
            && !early.is_finished()
        {
            std::thread::sleep(BREATH);
            progress(filled.2, filled.1);
        }
        match early.map(std::thread::ScopedJoinHandle::join) {
            // Without a thread, the sync below does it all.
            Err(_) | Ok(Ok(Ok(()))) => Ok(filled),
            Ok(Ok(Err(errno))) => Err(Error::system("sync the file system of", shown)(errno)),
            Ok(Err(_)) => Err(Error::system("sync the file system of", shown)(Errno::IO)),
        }
    })?;
    rustix::fs::unlinkat(&workshop, "scratch", AtFlags::REMOVEDIR)
        .map_err(Error::system("remove", b"scratch"))?;
    drop(workshop);

    let target = layer(&digest);
    let there = match rustix::fs::statat(store, &*target, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => true,
        Err(Errno::NOENT) => false,
        Err(errno) => return Err(Error::system("look for", target.as_bytes())(errno)),
    };
    let mut sync = || sync(store, &mut || progress(bytes, entries));
    let known = there || {
        // Everything the layer consists of is on the disk before its name is.
        sync().map_err(Error::system("sync the file system of", shown))?;
        match rustix::fs::renameat_with(&home, &*building, store, &*target, RenameFlags::NOREPLACE) {
            Ok(()) => false,
            // Another one was faster with the same.
            Err(Errno::EXIST) => true,
            Err(errno) => return Err(Error::system("commit", target.as_bytes())(errno)),
        }
    };
    if known {
        if heal(store, &home, &building, &digest)? {
            sync().map_err(Error::system("sync the file system of", shown))?;
        }
        remove_in(&home, &building, building.as_bytes(), &mut |_| ())?;
    }
    // Also where it is known: whoever renamed it may have been killed before this.
    let layers = open_directory(store, "layers").map_err(Error::system("open", b"layers"))?;
    rustix::fs::fsync(&layers).map_err(Error::system("sync", b"layers"))?;
    Ok(TreeResult::Ingested {
        digest: digest.to_string(),
        entries,
        bytes,
        new_objects: objects.new.load(Ordering::Relaxed),
        new_bytes: objects.new_bytes.load(Ordering::Relaxed),
    })
}

/// `syncfs`, with signs of life: a slow disk may take minutes.
pub(crate) fn sync(store: &OwnedFd, idle: &mut dyn FnMut()) -> rustix::io::Result<()> {
    std::thread::scope(|scope| {
        let (done, wait) = std::sync::mpsc::channel();
        let syncing = std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, move || {
            let result = rustix::fs::syncfs(store);
            // Nobody waits only where this thread could not be started.
            let _ = done.send(());
            result
        });
        let Ok(syncing) = syncing else { return rustix::fs::syncfs(store) };
        while wait.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            idle();
        }
        syncing.join().unwrap_or(Err(Errno::IO))
    })
}

pub(crate) fn make_directory(at: &OwnedFd, name: &str) -> Result<()> {
    rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755)).map_err(Error::system("make", name.as_bytes()))
}

/// The layer is there already. If its listing is damaged, the new one takes its place, and the answer is true.
fn heal(store: &OwnedFd, home: &OwnedFd, building: &str, digest: &Digest) -> Result<bool> {
    let path = format!("{}/listing", layer(digest));
    let failed = |errno| Error::system("read", path.as_bytes())(errno);
    let sound = match walk::open_beneath(store, &*path, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)
    {
        Ok(fd) => {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(File::from(fd)).map_err(Error::io("read", path.as_bytes()))?;
            Digest::from(hasher.finalize()) == *digest
        }
        Err(Errno::NOENT) => false,
        Err(errno) => return Err(failed(errno)),
    };
    if !sound {
        eprintln!("{path} was damaged and is written anew");
        let from = format!("{building}/listing");
        rustix::fs::renameat(home, &*from, store, &*path).map_err(failed)?;
    }
    Ok(!sound)
}

fn fill(
    objects: &Objects,
    tree: OwnedFd,
    listing: OwnedFd,
    begin: Sender<()>,
    progress: Progress<'_>,
) -> Result<(Digest, u64, u64)> {
    let work = |job: &Job| objects.ingest(job);
    Pool::run(&work, |pool| {
        let out = BufWriter::with_capacity(256 << 10, File::from(listing));
        let mut ingestion = Ingestion {
            pool,
            objects,
            listing: Writer::new(out).map_err(Error::io("write", b"listing"))?,
            queue: VecDeque::new(),
            touched: Vec::new(),
            linked: HashMap::new(),
            bytes: 0,
            files: 0,
            begin: Some(begin),
            progress,
        };
        walk::walk(tree, &mut ingestion)?;
        while ingestion.take_one()? {}
        let entries = ingestion.listing.entries();
        let (_, digest) = ingestion.listing.finish().map_err(listing_failed)?;
        Ok((digest, entries, ingestion.bytes))
    })
}

pub(crate) fn listing_failed(error: ListingError) -> Error {
    match error {
        ListingError::Io(error) => Error::io("write", b"listing")(error),
        ListingError::Refused { path, reason } => Error::Refused { path, reason },
        ListingError::Malformed { reason, .. } => Error::refused(b"listing", reason),
    }
}

impl Ingestion<'_, '_> {
    fn put(&mut self, slot: Slot) -> Result<()> {
        self.queue.push_back(slot);
        // What is through already makes room without waiting.
        while self.queue.len() > QUEUE {
            self.take_one()?;
        }
        Ok(())
    }

    fn take_one(&mut self) -> Result<bool> {
        let Some(slot) = self.queue.pop_front() else { return Ok(false) };
        match slot {
            Slot::Entry(entry) => self.write(&entry)?,
            Slot::File(task) => {
                let Linked { facts, .. } =
                    self.pool.wait(&task, &mut || (self.progress)(self.bytes, self.listing.entries()))?;
                self.bytes += facts.size;
                self.files += 1;
                if self.files == SAMPLE
                    && let Some(begin) = self.begin.take()
                    && self.objects.new.load(Ordering::Relaxed) > SAMPLE / 2
                {
                    // Where there is no thread for it, nobody listens.
                    let _ = begin.send(());
                }
                let path = task.job.path.clone();
                self.write(&Entry {
                    path,
                    node: Node::File { meta: facts.meta, size: facts.size, content: facts.content },
                })?;
            }
            Slot::HardLink { job, first } => {
                let Linked { object, replaced, .. } =
                    self.pool.wait(&first, &mut || (self.progress)(self.bytes, self.listing.entries()))?;
                if replaced {
                    if !self.objects.place(&object, &job.directory, &job.name, &job.path)? {
                        return Err(Error::Limit {
                            path: escaped(&job.path),
                            reason: "its object has as many hard links as the file system allows",
                        });
                    }
                    job.touched.store(true, Ordering::Relaxed);
                }
                self.write(&Entry {
                    path: job.path,
                    node: Node::HardLink { target: first.job.path.clone() },
                })?;
            }
            Slot::End { directory, path, stat, touched } => {
                if touched.load(Ordering::Relaxed) {
                    rustix::fs::futimens(&directory, &mirror::times(&stat))
                        .map_err(Error::system("set the time of", &path))?;
                }
            }
        }
        Ok(true)
    }

    fn write(&mut self, entry: &Entry) -> Result<()> {
        self.listing.write(entry).map_err(listing_failed)?;
        (self.progress)(self.bytes, self.listing.entries());
        Ok(())
    }
}

impl Visitor for Ingestion<'_, '_> {
    fn enter(&mut self, directory: &Directory) -> Result<()> {
        let user = self.objects.user;
        let attributes = attributes::read(&directory.fd, user, &directory.path)?;
        attributes::drop_marks(&directory.fd, &attributes, &directory.path)?;
        let mut meta = attributes::meta(&directory.stat, user);
        meta.xattrs = attributes.kept;
        self.touched.push(Arc::new(AtomicBool::new(false)));
        let node = Node::Directory { meta, opaque: attributes.opaque };
        self.put(Slot::Entry(Entry { path: directory.path.clone(), node }))
    }

    fn leaf(&mut self, directory: &Directory, name: &[u8], stat: &Stat) -> Result<()> {
        let path = directory.child(name);
        let touched = self.touched.last().cloned().unwrap_or_default();
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let job = Job { directory: directory.fd.clone(), name: name.to_vec(), path, touched };
            if let Some(first) = (stat.st_nlink > 1).then(|| self.linked.get(&stat.st_ino)).flatten() {
                return self.put(Slot::HardLink { job, first: first.clone() });
            }
            let task = self.pool.submit(job);
            if stat.st_nlink > 1 {
                self.linked.insert(stat.st_ino, task.clone());
            }
            return self.put(Slot::File(task));
        }
        let node = special(directory, name, &path, stat, self.objects.user)?;
        self.put(Slot::Entry(Entry { path, node }))
    }

    fn leave(&mut self, directory: &Directory) -> Result<()> {
        let touched = self.touched.pop().unwrap_or_default();
        self.put(Slot::End {
            directory: directory.fd.clone(),
            path: directory.path.clone(),
            stat: directory.stat,
            touched,
        })
    }
}

/// What is neither directory nor regular file. No attribute that a layer keeps can be on a symbolic link, and none but an
/// ACL on a fifo or socket, which no archive carries.
pub(crate) fn special(
    directory: &Directory,
    name: &[u8],
    path: &[u8],
    stat: &Stat,
    user: User,
) -> Result<Node> {
    let meta = attributes::meta(stat, user);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(&*directory.fd, name, Vec::new())
                .map_err(Error::system("read the link", path))?;
            Ok(Node::Symlink { meta, target: target.into_bytes() })
        }
        FileType::Fifo => Ok(Node::Fifo { meta }),
        FileType::Socket => Ok(Node::Socket { meta }),
        FileType::CharacterDevice if stat.st_rdev == 0 => Ok(Node::Whiteout),
        _ => Err(Error::refused(path, "device nodes have no place in a layer")),
    }
}
