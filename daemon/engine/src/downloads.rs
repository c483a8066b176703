//! Downloads by digest, in `$XDG_CACHE_HOME/casemate/sha256/`. What is taken from here is hashed again each time: by the
//! daemon, which never spoke to the network.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};
use sha2::{Digest as _, Sha256};

use crate::error::Error;

/// Read and written at a time while hashing.
const BLOCK: usize = 256 << 10;

/// What a file must be, and what to call it where it is not.
#[derive(Debug, Clone)]
pub struct Expected {
    pub name: String,
    pub size: u64,
    /// Lower-case hex.
    pub sha256: String,
}

pub struct Downloads {
    root: PathBuf,
    number: AtomicU64,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Downloads {
    pub fn open(cache: &Path) -> Result<Self, Error> {
        let root = cache.join("sha256");
        std::fs::create_dir_all(&root).map_err(Error::io("make", &root))?;
        clear_unfinished(&root)?;
        Ok(Self { root, number: AtomicU64::new(0) })
    }

    fn path(&self, sha256: &str) -> Result<PathBuf, Error> {
        if sha256.len() != 64 || !sha256.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(Error::Nonsense {
                worker: "casemate-index",
                answer: format!("with {sha256:?} as a SHA-256"),
            });
        }
        Ok(self.root.join(sha256))
    }

    /// The file, if it is here and whole. A damaged one is removed, so that it is fetched anew.
    pub fn get(&self, expected: &Expected) -> Result<Option<File>, Error> {
        let path = self.path(&expected.sha256)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let mut file = match rustix::fs::open(&path, flags, Mode::empty()) {
            Ok(descriptor) => File::from(descriptor),
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(Error::sys("open", path)(errno)),
        };
        match copy(&mut file, None, expected, &path) {
            Ok(()) => {
                file.seek(SeekFrom::Start(0)).map_err(Error::io("rewind", &path))?;
                Ok(Some(file))
            }
            Err(Error::Verification { message, .. }) => {
                tracing::warn!(path = %path.display(), message, "a cached download is damaged and removed");
                std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Take `expected.size` bytes of `from` at `offset`, if they are what they should be.
    pub fn put(&self, from: &mut File, offset: u64, expected: &Expected) -> Result<(), Error> {
        let path = self.path(&expected.sha256)?;
        // Several jobs may be at the same file.
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let temporary = self.root.join(format!(".{}.{}.{number}", expected.sha256, std::process::id()));
        let written = (|| {
            from.seek(SeekFrom::Start(offset)).map_err(Error::io("read the download of", &expected.name))?;
            // It is a cache: somebody may have cleared it away.
            std::fs::create_dir_all(&self.root).map_err(Error::io("make", &self.root))?;
            let mut out = File::create_new(&temporary).map_err(Error::io("make", &temporary))?;
            // Root inside, who is not us, is to read it, whatever our umask is.
            let open = std::fs::Permissions::from_mode(0o644);
            out.set_permissions(open).map_err(Error::io("open up", &temporary))?;
            copy(&mut from.take(expected.size), Some(&mut out), expected, &temporary)?;
            std::fs::rename(&temporary, &path).map_err(Error::io("rename", &temporary))
        })();
        if written.is_err() {
            // It may not have been made; the first error is the one to tell.
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }

    /// Names, sizes on the disk and ages of all files that are here, unfinished ones too.
    pub fn list(&self) -> Result<Vec<(String, u64, std::time::Duration)>, Error> {
        let failed = || Error::io("list", &self.root);
        let entries = match std::fs::read_dir(&self.root) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            entries => entries.map_err(failed())?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed())?;
            let meta = match entry.metadata() {
                // A job has just finished or removed it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                meta => meta.map_err(failed())?,
            };
            let modified = meta.modified().map_err(failed())?;
            let bytes = std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
            // One from the future is young.
            let age = modified.elapsed().unwrap_or_default();
            found.push((entry.file_name().to_string_lossy().into_owned(), bytes, age));
        }
        Ok(found)
    }

    /// Remove one that [`Self::list`] told of.
    pub fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.root.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", path)(error))
            }
            _ => Ok(()),
        }
    }

    pub fn remove_all(&self) -> Result<(), Error> {
        match std::fs::remove_dir_all(&self.root) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &self.root)(error));
            }
            _ => {}
        }
        std::fs::create_dir_all(&self.root).map_err(Error::io("make", &self.root))
    }

    /// Make the file appear at `to`: a hard link where the file system allows, else a copy.
    pub fn place(&self, expected: &Expected, to: &Path) -> Result<(), Error> {
        let from = self.path(&expected.sha256)?;
        // As in `put`: a version before this one left it to the umask.
        let open = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(&from, open).map_err(Error::io("open up", &from))?;
        match std::fs::hard_link(&from, to) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("place a package at", to)(error));
            }
            // Another file system, or one without hard links.
            Err(_) => {}
        }
        let copied = (|| {
            let mut out = File::create_new(to)?;
            std::io::copy(&mut File::open(&from)?, &mut out)?;
            out.set_permissions(std::fs::Permissions::from_mode(0o644))
        })();
        copied.map_err(Error::io("copy a package to", to))
    }
}

/// Remove what daemons were writing when they died. Another one, of another store, may be writing at this moment.
fn clear_unfinished(root: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(root).map_err(Error::io("list", root))? {
        let entry = entry.map_err(Error::io("list", root))?;
        // As `put` names them: digest, pid, number.
        let name = entry.file_name();
        let pid =
            name.to_str().and_then(|name| name.strip_prefix('.')?.split('.').nth(1)?.parse::<u32>().ok());
        // Our own number was a daemon's before us.
        if pid.is_some_and(|pid| pid == std::process::id() || !Path::new(&format!("/proc/{pid}")).exists()) {
            let path = entry.path();
            match std::fs::remove_file(&path) {
                // Another one is at this, too.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                removed => removed.map_err(Error::io("remove", &path))?,
            }
        }
    }
    Ok(())
}

fn copy(
    from: &mut impl Read,
    mut to: Option<&mut File>,
    expected: &Expected,
    path: &Path,
) -> Result<(), Error> {
    let mut hasher = Sha256::new();
    let mut block = vec![0; BLOCK];
    let mut size = 0u64;
    loop {
        let count = from.read(&mut block).map_err(Error::io("read", path))?;
        if count == 0 {
            break;
        }
        size += count as u64;
        hasher.update(&block[..count]);
        if let Some(to) = &mut to {
            to.write_all(&block[..count]).map_err(Error::io("write", path))?;
        }
    }
    let found = hex(&hasher.finalize());
    if size != expected.size || found != expected.sha256 {
        return Err(Error::Verification {
            subject: expected.name.clone(),
            message: format!(
                "it has {size} bytes and SHA-256 {found}, the index says {} bytes and {}",
                expected.size, expected.sha256
            ),
        });
    }
    Ok(())
}

/// One file that holds all of `expected`, one after the other, from the cache; and where each lies.
pub fn concatenate(
    downloads: &Downloads,
    expected: &[Expected],
    into: OwnedFd,
) -> Result<(OwnedFd, Vec<u64>), Error> {
    let mut out = File::from(into);
    let mut offsets = Vec::with_capacity(expected.len());
    let mut offset = 0;
    for one in expected {
        let mut file = downloads.get(one)?.ok_or_else(|| Error::Verification {
            subject: one.name.clone(),
            message: "the download vanished from the cache".to_owned(),
        })?;
        offsets.push(offset);
        offset += std::io::copy(&mut file, &mut out).map_err(Error::io("copy", &one.name))?;
    }
    Ok((out.into(), offsets))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(bytes: &[u8]) -> Expected {
        Expected { name: "x".to_owned(), size: bytes.len() as u64, sha256: hex(&Sha256::digest(bytes)) }
    }

    #[test]
    fn a_flipped_bit_in_the_cache_is_never_served() {
        let directory = std::env::temp_dir().join(format!("casemate-downloads-{}", std::process::id()));
        let downloads = Downloads::open(&directory).expect("cache");
        let mut source = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(directory.join("source"))
            .expect("file");
        source.write_all(b"--content--").expect("write");
        let wanted = expected(b"content");
        downloads.put(&mut source, 2, &wanted).expect("put");
        assert!(downloads.get(&wanted).expect("get").is_some());
        std::fs::write(directory.join("sha256").join(&wanted.sha256), b"cOntent").expect("flip");
        assert!(downloads.get(&wanted).expect("get").is_none());
        let wrong = expected(b"another");
        let error = downloads.put(&mut source, 2, &wrong).expect_err("refused");
        assert_eq!(error.kind(), crate::ErrorKind::VerificationFailed);
        assert!(!directory.join("sha256").join(&wrong.sha256).exists());
        std::fs::remove_dir_all(directory).expect("clean up");
    }
}
