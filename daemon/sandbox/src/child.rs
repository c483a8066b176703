//! A child that does not outlive its owner's interest in it.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};

/// Most bytes of a program's complaints that are passed on.
const COMPLAINT_MAX: u64 = 2 << 10;

/// The lines that a program has put into a pipe so far.
pub fn said(pipe: impl Read + AsFd) -> Vec<String> {
    let mut text = Vec::new();
    // Whatever can be read of it is better than nothing.
    let _ = rustix::io::ioctl_fionbio(&pipe, true);
    let _ = pipe.take(COMPLAINT_MAX).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Killed and reaped when dropped. Until then its pid is nobody else's.
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Child {
    pub fn new(pid: Pid) -> Result<Self, Errno> {
        Ok(Self { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Readable when it has ended.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Neither fails for a child that is not reaped yet, if only as a zombie.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        while let Err(Errno::INTR) = waitpid(Some(self.pid), WaitOptions::empty()) {}
    }
}
