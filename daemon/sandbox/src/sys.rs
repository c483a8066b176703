//! The few kernel calls that neither nix nor rustix has.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

pub const ATTR_RDONLY: u64 = 0x1;
pub const ATTR_NOSUID: u64 = 0x2;
pub const ATTR_NODEV: u64 = 0x4;
pub const ATTR_NOEXEC: u64 = 0x8;

#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Set attributes of a mount, of all beneath it too with `recursive`.
pub fn mount_setattr(mount: BorrowedFd<'_>, set: u64, recursive: bool) -> io::Result<()> {
    let attributes = MountAttributes { set, clear: 0, propagation: 0, userns: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, the structure has the size that is passed with it, and both outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    })
}

/// Whether what is open as a path could be opened by who we are for the file system.
pub fn may_read_and_write(path: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the path is an empty C string, which outlives the call.
    check(unsafe {
        libc::syscall(libc::SYS_faccessat2, path.as_raw_fd(), c"".as_ptr(), libc::R_OK | libc::W_OK, flags)
    })
}

/// The number of a terminal, by its master: its name is `/dev/pts/` and that.
pub fn terminal_number(master: BorrowedFd<'_>) -> io::Result<u64> {
    let mut number: libc::c_uint = 0;
    // SAFETY: TIOCGPTN writes an unsigned int, which lives until the call returns.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) }.into())?;
    Ok(number.into())
}

/// Bring up the loopback interface of this network namespace.
pub fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which lives until the call returns.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) }.into())
}

/// Make `terminal` the controlling terminal of this session.
pub fn control_terminal(terminal: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY as _, 0) }.into())
}

/// Give this process a session keyring of its own, so that it can't see its parent's.
pub fn own_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, 0usize) })
}

/// Whether nothing stands at 3 and above after this; all are closed on exec.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: close_range takes no pointers; with CLOEXEC it closes nothing now.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
}

/// Put `from` at the number `to`, which stays open over exec.
pub fn install(from: &OwnedFd, to: i32) -> io::Result<()> {
    // SAFETY: dup2 takes no pointers; the caller passes 0, 1 or 2, which nothing here owns.
    check(unsafe { libc::dup2(from.as_raw_fd(), to) }.into())
}

/// Close every descriptor from 3 on but those of `keep`.
pub fn close_all_but(keep: &[i32]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|descriptor| u32::try_from(*descriptor).ok()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for end in keep.into_iter().map(Some).chain([None]) {
        let last = end.map_or(u32::MAX, |end| end.saturating_sub(1));
        if first <= last {
            // SAFETY: close_range takes no pointers. It runs in a process that was just forked, which uses none of the
            // descriptors that are closed, and ends without dropping their owners.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
        }
        first = end.map_or(u32::MAX, |end| end + 1);
    }
    Ok(())
}
