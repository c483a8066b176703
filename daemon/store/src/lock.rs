//! The store's lock: an exclusive `flock`, which the kernel gives back whatever happens to its holder. The text in the
//! file is for people: who holds it.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::error::{Error, Result};

/// Who holds a store, as far as its lock file tells.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holder {
    pub pid: Option<u32>,
    /// In clock ticks since boot, as in `/proc/PID/stat`: tells a reused pid.
    pub start_time: Option<u64>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pid, self.start_time) {
            (Some(pid), Some(start)) if start_of(pid) == Some(start) => write!(f, "process {pid}"),
            (Some(pid), _) => {
                write!(f, "a process that is not to be seen from here (it called itself {pid})")
            }
            (None, _) => f.write_str("another process"),
        }
    }
}

fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold anything, so count from its closing parenthesis; the start time is field 22.
    let end = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(stat.get(end + 2..)?).ok()?;
    rest.split(' ').nth(19)?.parse().ok()
}

/// Take the lock or say who has it. The file is open (and locked) until it is dropped.
pub(crate) fn take(directory: &rustix::fd::OwnedFd, root: &Path) -> Result<File> {
    let path = root.join("lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::openat(directory, "lock", flags, Mode::from_raw_mode(0o600))
        .map_err(Error::io("open", &path))?;
    let mut file = File::from(fd);
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut text = String::new();
            // An unreadable text only makes the message shorter.
            let _ = (&file).take(256).read_to_string(&mut text);
            let mut words = text.split_ascii_whitespace();
            let holder = Holder {
                pid: words.next().and_then(|w| w.parse().ok()),
                start_time: words.next().and_then(|w| w.parse().ok()),
            };
            return Err(Error::Locked { path: root.to_owned(), holder });
        }
        Err(error) => return Err(Error::io("lock", &path)(error)),
    }
    let pid = std::process::id();
    let text = match start_of(pid) {
        Some(start) => format!("{pid} {start}\n"),
        None => format!("{pid}\n"),
    };
    file.set_len(0)
        .and_then(|()| file.seek(SeekFrom::Start(0)))
        .and_then(|_| file.write_all(text.as_bytes()))
        .map_err(Error::io("write", &path))?;
    Ok(file)
}
