//! One file: read whole, hashed, and its inode made one with an object's.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use casemate_store::Digest;
use casemate_store::listing::{Meta, escaped};
use casemate_store::object::ObjectName;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::attributes::{self, User};
use crate::error::{Error, Result};
use crate::walk::open_beneath;

const CHUNK: usize = 256 << 10;

/// A file's content and attributes.
#[derive(Debug, Clone)]
pub struct Facts {
    pub meta: Meta,
    pub size: u64,
    pub content: Digest,
}

thread_local! {
    static BUFFER: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; CHUNK]);
}

/// Open a regular file to read it, without leaving a trace in its access time.
pub fn open(at: impl AsFd, name: &[u8]) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    match open_beneath(&at, name, flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open_beneath(&at, name, flags),
        other => other,
    }
}

/// Read, hash and describe an open regular file; marks of one mount are left out (and, with `clean`, taken off).
pub fn describe(fd: &OwnedFd, stat: &Stat, user: User, clean: bool, path: &[u8]) -> Result<Facts> {
    let found = attributes::read(fd, user, path)?;
    if found.opaque {
        return Err(Error::refused(path, "a file with an overlay attribute of directories"));
    }
    if clean {
        attributes::drop_marks(fd, &found, path)?;
    }
    let (content, size) = hash(fd, path)?;
    if size != stat.st_size as u64 {
        return Err(Error::Changed { path: escaped(path) });
    }
    let meta = Meta { xattrs: found.kept, ..attributes::meta(stat, user) };
    Ok(Facts { meta, size, content })
}

fn hash(fd: &OwnedFd, path: &[u8]) -> Result<(Digest, u64)> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut hasher = blake3::Hasher::new();
        let mut size = 0u64;
        loop {
            match rustix::io::read(fd, &mut buffer[..]) {
                Ok(0) => return Ok((hasher.finalize().into(), size)),
                Ok(length) => {
                    hasher.update(&buffer[..length]);
                    size += length as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::system("read", path)(errno)),
            }
        }
    })
}

/// The `objects/` directory.
#[derive(Debug)]
pub struct Objects {
    directories: Vec<OwnedFd>,
    pub user: User,
    /// A directory of this worker alone, on the way of links into the tree.
    pub scratch: OwnedFd,
    scratch_names: AtomicU64,
    pub new: AtomicU64,
    pub new_bytes: AtomicU64,
    /// Objects found to differ from their names, passed over.
    pub damaged: AtomicU64,
    /// Of objects with several copies, the one to try first: those before it are full or damaged.
    copies: Mutex<HashMap<ObjectName, ObjectName>>,
}

/// A file of the tree that is to be ingested.
#[derive(Debug)]
pub struct Job {
    pub directory: Arc<OwnedFd>,
    pub name: Vec<u8>,
    pub path: Vec<u8>,
    /// Set when the directory's entries were changed.
    pub touched: Arc<AtomicBool>,
}

/// What became of it.
#[derive(Debug, Clone)]
pub struct Linked {
    pub facts: Facts,
    pub object: ObjectName,
    /// Whether the tree's file is now another inode than before.
    pub replaced: bool,
}

impl Objects {
    pub fn open(store: &OwnedFd, user: User, scratch: OwnedFd) -> Result<Self> {
        let objects =
            crate::walk::open_directory(store, "objects").map_err(Error::system("open", b"objects"))?;
        let mut directories = Vec::with_capacity(256);
        for number in 0..256 {
            let name = format!("{number:02x}");
            match rustix::fs::mkdirat(&objects, &*name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(Error::system("make objects/", name.as_bytes())(errno)),
            }
            let fd = open_beneath(&objects, &*name, OFlags::PATH | OFlags::DIRECTORY)
                .map_err(Error::system("open objects/", name.as_bytes()))?;
            directories.push(fd);
        }
        Ok(Self {
            directories,
            user,
            scratch,
            scratch_names: AtomicU64::new(0),
            new: AtomicU64::new(0),
            new_bytes: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            copies: Mutex::default(),
        })
    }

    pub fn directory(&self, name: &ObjectName) -> &OwnedFd {
        &self.directories[usize::from(name.content.as_bytes()[0])]
    }

    fn copies(&self) -> MutexGuard<'_, HashMap<ObjectName, ObjectName>> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hash a file and make it one inode with its object.
    pub fn ingest(&self, job: &Job) -> Result<Linked> {
        let fd = open(&*job.directory, &job.name).map_err(Error::system("open", &job.path))?;
        let stat = rustix::fs::fstat(&fd).map_err(Error::system("look at", &job.path))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Error::Changed { path: escaped(&job.path) });
        }
        let facts = describe(&fd, &stat, self.user, true, &job.path)?;
        let first = ObjectName::new(facts.content, &facts.meta);
        let mut object = self.copies().get(&first).copied().unwrap_or(first);
        loop {
            let directory = self.directory(&object);
            let file_name = object.file_name();
            match rustix::fs::linkat(&*job.directory, &job.name[..], directory, &*file_name, AtFlags::empty())
            {
                Ok(()) => {
                    self.new.fetch_add(1, Ordering::Relaxed);
                    self.new_bytes.fetch_add(facts.size, Ordering::Relaxed);
                    return Ok(Linked { facts, object, replaced: false });
                }
                Err(Errno::EXIST) => match self.take(job, &stat, &facts, &object)? {
                    Taken::Same => return Ok(Linked { facts, object, replaced: false }),
                    Taken::Replaced => return Ok(Linked { facts, object, replaced: true }),
                    Taken::Gone => {}
                    Taken::No => {
                        object = object.next_copy().ok_or_else(|| Error::Limit {
                            path: escaped(&job.path),
                            reason: "there are too many copies of its object",
                        })?;
                        self.copies().insert(first, object);
                    }
                },
                Err(Errno::MLINK) => {
                    return Err(Error::Limit {
                        path: escaped(&job.path),
                        reason: "it has as many hard links as the file system allows",
                    });
                }
                Err(errno) => return Err(Error::system("make an object of", &job.path)(errno)),
            }
        }
    }

    /// Put an existing object in a file's place, if it really is the same and has a link left.
    fn take(&self, job: &Job, stat: &Stat, facts: &Facts, object: &ObjectName) -> Result<Taken> {
        let shown = object.to_string().into_bytes();
        let file_name = object.file_name().into_bytes();
        let fd = match open(self.directory(object), &file_name) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Taken::Gone),
            Err(errno) => return Err(Error::system("open object", &shown)(errno)),
        };
        let there = rustix::fs::fstat(&fd).map_err(Error::system("look at object", &shown))?;
        if (there.st_dev, there.st_ino) == (stat.st_dev, stat.st_ino) {
            return Ok(Taken::Same);
        }
        let same = FileType::from_raw_mode(there.st_mode) == FileType::RegularFile
            && there.st_size as u64 == facts.size
            && describe(&fd, &there, self.user, false, &shown)
                .is_ok_and(|o| o.content == facts.content && o.meta == facts.meta);
        if !same {
            // Damage, or 64 bits made to collide: the good file must not be lost to it.
            self.damaged.fetch_add(1, Ordering::Relaxed);
            eprintln!("object {object} is not what its name says; it is kept aside, run verify");
            return Ok(Taken::No);
        }
        if self.place(object, &job.directory, &job.name, &job.path)? {
            job.touched.store(true, Ordering::Relaxed);
            Ok(Taken::Replaced)
        } else {
            Ok(Taken::No)
        }
    }

    /// Rename a new link to an object over a name in a tree. False: the object has no link left.
    pub fn place(&self, object: &ObjectName, directory: &OwnedFd, name: &[u8], path: &[u8]) -> Result<bool> {
        let scratch = self.scratch_names.fetch_add(1, Ordering::Relaxed).to_string();
        let from = self.directory(object);
        match rustix::fs::linkat(from, &*object.file_name(), &self.scratch, &*scratch, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::MLINK) => return Ok(false),
            Err(errno) => return Err(Error::system("link the object of", path)(errno)),
        }
        rustix::fs::renameat(&self.scratch, &*scratch, directory, name)
            .map_err(Error::system("replace", path))?;
        Ok(true)
    }
}

enum Taken {
    /// It is this very inode.
    Same,
    Replaced,
    /// Removed meanwhile: make it.
    Gone,
    No,
}
