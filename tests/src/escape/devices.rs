//! Devices that were not granted, and terminals.

use std::os::fd::AsRawFd;

use crate::attempt::Control::{Host, Maybe, Throwaway};
use crate::attempt::Guard::{Devices, Filter};
use crate::attempt::{Attempt, Done, attempt, done, open, reaches};
use crate::call;

fn device(path: &str) -> Done {
    done(open(path, libc::O_RDWR))
}

fn readable(path: &str) -> Done {
    done(open(path, libc::O_RDONLY))
}

/// A file system that a program of ours serves.
fn fuse() -> Done {
    let device = open("/dev/fuse", libc::O_RDWR)?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = crate::attempt::c(&options);
    done(call!(libc::SYS_mount, c"none", c"/tmp", c"fuse", 0, options.as_c_str()))
}

/// An interface of one's own: TUNSETIFF with a name and IFF_TUN.
fn tunnel() -> Done {
    let device = open("/dev/net/tun", libc::O_RDWR)?;
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tun9");
    request[16] = 1;
    done(call!(libc::SYS_ioctl, device.as_raw_fd(), 0x4004_54ca, request.as_ptr()))
}

/// An ioctl on a terminal that controls this session, as a shell's does.
fn terminal(request: i64, errno: i32) -> Done {
    let master = open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY)?;
    let zero = 0i32;
    call!(libc::SYS_ioctl, master.as_raw_fd(), libc::TIOCSPTLCK, &raw const zero)?;
    // TIOCGPTPEER
    let slave = crate::attempt::own(call!(
        libc::SYS_ioctl,
        master.as_raw_fd(),
        0x5441,
        libc::O_RDWR | libc::O_NOCTTY
    )?);
    call!(libc::SYS_setsid)?;
    call!(libc::SYS_ioctl, slave.as_raw_fd(), libc::TIOCSCTTY, 0)?;
    // What is typed, or which subcommand: 6 asks for the state of shift.
    let word = 6u8;
    let reached = reaches(call!(libc::SYS_ioctl, slave.as_raw_fd(), request, &raw const word), errno);
    // Closed, it would hang up on us.
    std::mem::forget(master);
    reached
}

const TYPE_IN: i64 = 0x5412;
const CONSOLE: i64 = 0x541c;
const HIGH: i64 = 1 << 32;

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("type-in", "type into the terminal that one was started from", "CVE-2017-5226", &[Filter], Host, |_| terminal(TYPE_IN, 0)),
    attempt("type-in-high-bits", "the same with bits that the kernel drops", "CVE-2019-10063", &[Filter], Host, |_| terminal(TYPE_IN | HIGH, 0)),
    attempt("console", "select and paste on the console", "CVE-2023-28100", &[Filter], Host, |_| terminal(CONSOLE, libc::ENOTTY)),
    attempt("console-high-bits", "the same with bits that the kernel drops", "CVE-2019-10063", &[Filter], Host, |_| terminal(CONSOLE | HIGH, libc::ENOTTY)),
    attempt("host-terminal", "a terminal of the host", "CVE-2025-52565", &[Devices], Host, |targets| device(&targets.victim.terminal)),
    attempt("dev-fuse", "/dev/fuse", "DESIGN.md, devices", &[Devices], Host, |_| device("/dev/fuse")),
    attempt("dev-tun", "/dev/net/tun", "DESIGN.md, devices", &[Devices], Host, |_| device("/dev/net/tun")),
    attempt("mount-fuse", "a file system that a program of ours serves", "CVE-2020-14145", &[Devices, Filter], Throwaway, |_| fuse()),
    attempt("tunnel", "an interface that a program of ours serves", "CVE-2022-2639", &[Devices], Throwaway, |_| tunnel()),
    attempt("dev-autofs", "/dev/autofs", "DESIGN.md, devices", &[Devices], Maybe, |_| readable("/dev/autofs")),
    attempt("dev-log", "/dev/kmsg", "DESIGN.md, devices", &[Devices], Maybe, |_| readable("/dev/kmsg")),
    attempt("dev-vsock", "/dev/vsock", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/vsock")),
    attempt("dev-kvm", "/dev/kvm", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/kvm")),
    attempt("dev-disk", "the disk", "DESIGN.md, devices", &[Devices], Maybe, |_| readable("/dev/vda")),
    attempt("dev-memory", "/dev/mem", "DESIGN.md, devices", &[Devices], Maybe, |_| readable("/dev/mem")),
    attempt("dev-loop", "/dev/loop-control", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/loop-control")),
    attempt("dev-console", "the console", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/tty1")),
    attempt("dev-arbiter", "/dev/vga_arbiter", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/vga_arbiter")),
    attempt("dev-faults", "/dev/userfaultfd", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/userfaultfd")),
    attempt("dev-btrfs", "/dev/btrfs-control", "DESIGN.md, devices", &[Devices], Maybe, |_| device("/dev/btrfs-control")),
];
