//! Being born in a control group. Moving a process into one makes the kernel wait for an RCU grace period (10 to 20 ms on an
//! idle machine), a clone3 with CLONE_INTO_CGROUP does not; see the kernel's commit ef2c41cf38a7.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use casemate_sandbox::plan::Ids;
use nix::sys::prctl;
use nix::unistd::{ForkResult, Pid, Uid, setfsuid};

/// libc's constant is narrower than the field and overflows.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// The directory of a control group that is the user's.
pub struct Group {
    pub directory: OwnedFd,
    pub ids: Ids,
}

/// Fork; the child is in the group, where there is one.
///
/// # Safety
/// As fork(2): this process has a single thread.
pub unsafe fn fork_into(group: Option<&Group>) -> io::Result<ForkResult> {
    let Some(group) = group else {
        // SAFETY: the caller's promise.
        return Ok(unsafe { nix::unistd::fork() }?);
    };
    // The group's files are the user's, and those above it may belong to a host's group that has no number in here, so that no
    // capability reaches them: it takes the user to be allowed. That change costs a process the signal of its parent's death.
    let tied = prctl::get_pdeathsig()?;
    let user = match group.ids {
        Ids::Range { user, .. } => Some(Uid::from_raw(user)),
        Ids::Single { .. } => None,
    };
    let was = user.map(setfsuid);
    // SAFETY: the caller's promise.
    let child = unsafe { clone_into(&group.directory) };
    was.map(setfsuid);
    match child {
        Ok(0) => Ok(ForkResult::Child),
        other => {
            prctl::set_pdeathsig(tied)?;
            Ok(ForkResult::Parent { child: Pid::from_raw(other?) })
        }
    }
}

/// # Safety
/// As fork(2): this process has a single thread.
unsafe fn clone_into(directory: &OwnedFd) -> io::Result<i32> {
    // SAFETY: all zero is a valid clone_args.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = u64::from(directory.as_raw_fd().unsigned_abs());
    // SAFETY: without a stack of its own and without CLONE_VM the child goes on with a copy of ours, as after fork; the
    // structure has the size that is passed with it. The C library's fork handlers, of which there are none in here, do not run.
    let result =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}
