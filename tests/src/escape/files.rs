//! The host's files by their paths, what is covered in /proc and /sys, and what a descriptor leads to.

use std::ffi::CStr;
use std::mem::MaybeUninit;

use casemate_tests::escapes::{Role, Targets};

use crate::attempt::Control::{Host, Maybe, Throwaway};
use crate::attempt::Guard::{Covered, Descriptors, Overlay, ReadOnly, Root};
use crate::attempt::{Attempt, Done, attempt, c, done, held, only_if, open, read};
use crate::call;
use crate::sockets::unix;

const PROC: i64 = 0x9fa0;
const SYSFS: i64 = 0x6265_6572;

/// Whether what is at `path` is the kernel's own, and not what covers it.
fn uncovered(path: &CStr) -> Done {
    let mut about = MaybeUninit::<libc::statfs>::zeroed();
    call!(libc::SYS_statfs, path, about.as_mut_ptr())?;
    // SAFETY: zeroes are a valid value, and the kernel has written over them.
    let kind = unsafe { about.assume_init() }.f_type;
    only_if(matches!(kind, PROC | SYSFS), "it is covered")
}

fn list(path: &str) -> Done {
    match std::fs::read_dir(path)?.next() {
        Some(entry) => done(entry),
        None => held("nothing is in it"),
    }
}

fn write(path: &str) -> Done {
    done(open(path, libc::O_WRONLY))
}

/// A descriptor that was there when the checker was started: all its own close on exec.
fn leaked() -> Done {
    let flags = |descriptor: i32| call!(libc::SYS_fcntl, descriptor, libc::F_GETFD);
    let left = (3..1024)
        .find(|descriptor| flags(*descriptor).is_ok_and(|flags| flags & i64::from(libc::FD_CLOEXEC) == 0));
    only_if(left.is_some(), "three descriptors and no more")
}

/// Open what descriptor `number` is for more than it is open for, if it is a regular file or a directory.
fn reopened(number: i32, flags: i32) -> Done {
    let path = format!("/proc/self/fd/{number}");
    let kind = std::fs::metadata(&path)?.file_type();
    if !kind.is_file() && !kind.is_dir() {
        return held("it is no file of the host");
    }
    done(open(&path, flags))
}

/// A character device 0:0, which overlayfs takes for a removed file.
fn whiteout() -> Done {
    let path = c"/var/tmp/escape-whiteout";
    call!(libc::SYS_mknodat, libc::AT_FDCWD, path, libc::S_IFCHR | 0o600, 0)?;
    done(call!(libc::SYS_unlinkat, libc::AT_FDCWD, path, 0))
}

fn group(targets: &Targets) -> Done {
    let path = format!("{}/escape", targets.group);
    std::fs::create_dir(&path)?;
    std::fs::remove_dir(path)
}

fn device(kind: u32, major: u32, minor: u32, path: &str) -> Done {
    let number = libc::makedev(major, minor);
    call!(libc::SYS_mknodat, libc::AT_FDCWD, c(path).as_c_str(), kind | 0o666, number)?;
    let opened = done(open(path, libc::O_RDONLY));
    std::fs::remove_file(path)?;
    match opened {
        // It may be made, and there is no such device.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
        other => other,
    }
}

const CHARACTER: u32 = libc::S_IFCHR;
const BLOCK: u32 = libc::S_IFBLK;

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("secret", "the user's file by the host's path", "podman's namespaces", &[Root], Host, |targets| read(&targets.outside)),
    attempt("secret-by-parents", "the same, past the root", "CVE-2021-30465", &[Root], Host, |targets| read(&format!("/../../..{}", targets.outside))),
    attempt("secret-by-proc", "the same, by /proc/self/root", "CVE-2024-21626", &[Root], Host, |targets| read(&format!("/proc/self/root/..{}", targets.outside))),
    attempt("secret-by-task", "the same, by a thread's", "CVE-2024-21626", &[Root], Host, |targets| {
        read(&format!("/proc/thread-self/root/..{}", targets.outside))
    }),
    attempt("store", "the store", "CVE-2024-27297", &[Root], Host, |targets| list(&targets.store)),
    attempt("layer", "write to a layer, which others share", "CVE-2022-1227", &[Root], Throwaway, |targets| write(&targets.layer)),
    attempt("runtime-directory", "the user's runtime directory", "flatpak's portals", &[Root], Host, |targets| list(&targets.runtime)),
    attempt("control-socket", "init's control socket", "CVE-2019-14271", &[Root], Host, |targets| unix(&targets.control)),
    attempt("session-bus", "the session bus", "CVE-2024-27297", &[Root], Host, |targets| unix(&targets.bus)),
    attempt("host-group", "a control group of the host", "CVE-2022-0492", &[Root], Host, group),
    attempt("leaked-descriptor", "a descriptor left open", "CVE-2024-21626", &[Descriptors], Host, |_| leaked()),
    attempt("standard-input", "write to the file that one is given to read", "DESIGN.md, sandbox", &[Descriptors], Host, |_| reopened(0, libc::O_WRONLY)),
    attempt("standard-output", "read the file that one is given to write to", "DESIGN.md, sandbox", &[Descriptors], Host, |_| reopened(1, libc::O_RDONLY)),
    attempt("standard-error", "the same for errors", "DESIGN.md, sandbox", &[Descriptors], Host, |_| reopened(2, libc::O_RDONLY)),
    attempt("covered-acpi", "/proc/acpi", "CVE-2018-10892", &[Covered], Host, |_| uncovered(c"/proc/acpi")),
    attempt("covered-interrupts", "/proc/interrupts", "moby 2025", &[Covered], Host, |_| uncovered(c"/proc/interrupts")),
    attempt("covered-keys", "/proc/keys", "moby#36368", &[Covered], Host, |_| uncovered(c"/proc/keys")),
    attempt("covered-timers", "/proc/timer_list", "CVE-2017-5967", &[Covered], Host, |_| uncovered(c"/proc/timer_list")),
    attempt("covered-block", "/sys/dev/block", "podman's masked paths", &[Covered], Host, |_| uncovered(c"/sys/dev/block")),
    attempt("covered-firmware", "/sys/firmware", "runc's masked paths", &[Covered], Host, |_| uncovered(c"/sys/firmware")),
    attempt("covered-kcore", "/proc/kcore", "runc's masked paths", &[Covered], Maybe, |_| uncovered(c"/proc/kcore")),
    attempt("covered-asound", "/proc/asound", "runc's masked paths", &[Covered], Maybe, |_| uncovered(c"/proc/asound")),
    attempt("covered-scsi", "/proc/scsi", "CVE-2017-16539", &[Covered], Maybe, |_| uncovered(c"/proc/scsi")),
    attempt("covered-latency", "/proc/latency_stats", "runc's masked paths", &[Covered], Maybe, |_| uncovered(c"/proc/latency_stats")),
    attempt("covered-scheduler", "/proc/sched_debug", "runc's masked paths", &[Covered], Maybe, |_| uncovered(c"/proc/sched_debug")),
    attempt("covered-power", "/sys/devices/virtual/powercap", "CVE-2020-8694", &[Covered], Maybe, |_| uncovered(c"/sys/devices/virtual/powercap")),
    attempt("covered-selinux", "/sys/fs/selinux", "podman's masked paths", &[Covered], Maybe, |_| uncovered(c"/sys/fs/selinux")),
    attempt("covered-heat", "when a processor was too hot", "moby 2025", &[Covered], Maybe, |_| {
        uncovered(c"/sys/devices/system/cpu/cpu0/thermal_throttle")
    }),
    attempt("set-forwarding", "forward packets", "runc's read-only paths", &[ReadOnly], Throwaway, |_| write("/proc/sys/net/ipv4/ip_forward")),
    attempt("set-backlog", "the network's queues", "runc's read-only paths", &[ReadOnly], Throwaway, |_| write("/proc/sys/net/core/somaxconn")),
    attempt("set-messages", "limits of messages", "runc's read-only paths", &[ReadOnly], Throwaway, |_| write("/proc/sys/kernel/msgmax")),
    attempt("set-shared-memory", "limits of shared memory", "runc's read-only paths", &[ReadOnly], Throwaway, |_| write("/proc/sys/kernel/shmmax")),
    attempt("set-queues", "limits of queues", "runc's read-only paths", &[ReadOnly], Throwaway, |_| write("/proc/sys/fs/mqueue/msg_max")),
    attempt("set-namespaces", "how many network namespaces there may be", "runc's read-only paths", &[ReadOnly], Throwaway, |_| {
        write("/proc/sys/user/max_net_namespaces")
    }),
    attempt("set-mtu", "an interface, by /sys", "runc's read-only paths", &[ReadOnly], Throwaway, |_| write("/sys/class/net/lo/mtu")),
    attempt("set-core-pattern", "a program of the host's that the kernel starts for a core dump", "CVE-2025-52881", &[ReadOnly], Maybe, |_| write("/proc/sys/kernel/core_pattern")),
    attempt("set-modprobe", "… for a missing module", "CVE-2025-52881", &[ReadOnly], Maybe, |_| write("/proc/sys/kernel/modprobe")),
    attempt("set-host-name", "the host's name", "runc's read-only paths", &[ReadOnly], Maybe, |_| write("/proc/sys/kernel/hostname")),
    attempt("set-panic", "what a panic does", "runc's read-only paths", &[ReadOnly], Maybe, |_| write("/proc/sys/kernel/panic")),
    attempt("set-sysrq", "which keys the kernel hears", "runc's read-only paths", &[ReadOnly], Maybe, |_| write("/proc/sys/kernel/sysrq")),
    attempt("sysrq-trigger", "crash the machine", "CVE-2025-52881", &[ReadOnly], Maybe, |_| write("/proc/sysrq-trigger")),
    attempt("set-interrupts", "which processor serves an interrupt", "runc's read-only paths", &[ReadOnly], Maybe, |_| write("/proc/irq/default_smp_affinity")),
    attempt("register-binfmt", "an interpreter for all", "CVE-2023-2640", &[ReadOnly, Root], Maybe, |_| write("/proc/sys/fs/binfmt_misc/register")),
    attempt("uevent-helper", "a program of the host's for each device", "CVE-2022-0492", &[ReadOnly], Maybe, |_| write("/sys/kernel/uevent_helper")),
    attempt("suspend", "put the machine to sleep", "runc's read-only paths", &[ReadOnly], Maybe, |_| write("/sys/power/state")),
    attempt("module-parameter", "a module's parameter", "runc's read-only paths", &[ReadOnly], Maybe, |_| write("/sys/module/kernel/parameters/panic")),
    attempt("whiteout", "a mark that says: removed beneath", "GHSA-vgfc-2cjj-9qwc", &[Overlay], Throwaway, |_| whiteout()),
    attempt("device-memory", "make the device of all memory", "podman's capabilities", &[crate::attempt::Guard::Capabilities], Maybe, |targets| {
        device(CHARACTER, 1, 1, &format!("{}/memory", targets.scratch))
    }).by(&[Role::User, Role::Root]),
    attempt("device-disk", "make a disk's", "podman's capabilities", &[crate::attempt::Guard::Capabilities], Maybe, |targets| {
        device(BLOCK, 254, 0, &format!("{}/disk", targets.scratch))
    }),
    attempt("device-terminal", "make the console's", "podman's capabilities", &[crate::attempt::Guard::Capabilities], Maybe, |targets| {
        device(CHARACTER, 5, 1, &format!("{}/console", targets.scratch))
    }),
];
