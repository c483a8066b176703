//! New namespaces, which are the way to most kernel bugs, and others' namespaces.

use std::io;
use std::os::fd::AsRawFd;

use crate::attempt::Control::{Maybe, Throwaway};
use crate::attempt::Guard::{Capabilities, Filter, ReadOnly};
use crate::attempt::{Attempt, Done, attempt, done, open, own, wait, write};
use crate::call;

const USER: i32 = libc::CLONE_NEWUSER;
const MOUNT: i32 = libc::CLONE_NEWNS;
const PID: i32 = libc::CLONE_NEWPID;
const NET: i32 = libc::CLONE_NEWNET;
const IPC: i32 = libc::CLONE_NEWIPC;
const UTS: i32 = libc::CLONE_NEWUTS;
const CGROUP: i32 = libc::CLONE_NEWCGROUP;
const TIME: i32 = 0x80;

fn unshare(flags: i32) -> Done {
    done(call!(libc::SYS_unshare, flags))
}

/// The parent's side of a child that ends at once.
fn born(pid: io::Result<i64>) -> Done {
    match pid? {
        // SAFETY: a child ends without its parent's exit handlers.
        0 => unsafe { libc::_exit(0) },
        pid => done(wait(pid as i32)),
    }
}

fn clone(flags: i32) -> Done {
    born(call!(libc::SYS_clone, i64::from(flags | libc::SIGCHLD)))
}

fn clone3(flags: i32) -> Done {
    // linux/sched.h, struct clone_args: flags first, the signal fifth.
    let arguments = [u64::from(flags.cast_unsigned()), 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
    born(call!(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)))
}

fn setns(name: &str, flags: i32) -> Done {
    let namespace = open(&format!("/proc/self/ns/{name}"), libc::O_RDONLY)?;
    done(call!(libc::SYS_setns, namespace.as_raw_fd(), flags))
}

fn setns_by_pidfd() -> Done {
    let own = own(call!(libc::SYS_pidfd_open, std::process::id(), 0)?);
    done(call!(libc::SYS_setns, own.as_raw_fd(), UTS))
}

pub const ATTEMPTS: &[Attempt] = &[
    attempt(
        "unshare-user",
        "a user namespace, with all capabilities in it",
        "CVE-2022-0185",
        &[Filter],
        Throwaway,
        |_| unshare(USER),
    ),
    attempt(
        "unshare-mount",
        "a mount namespace",
        "CVE-2022-0185",
        &[Filter, Capabilities],
        Throwaway,
        |_| unshare(MOUNT),
    ),
    attempt("unshare-pid", "a pid namespace", "podman's profile", &[Filter, Capabilities], Throwaway, |_| {
        unshare(PID)
    }),
    attempt(
        "unshare-net",
        "a network namespace",
        "CVE-2023-32233",
        &[Filter, Capabilities],
        Throwaway,
        |_| unshare(NET),
    ),
    attempt(
        "unshare-ipc",
        "an ipc namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| unshare(IPC),
    ),
    attempt("unshare-uts", "a uts namespace", "podman's profile", &[Filter, Capabilities], Throwaway, |_| {
        unshare(UTS)
    }),
    attempt(
        "unshare-cgroup",
        "a cgroup namespace",
        "CVE-2022-0492",
        &[Filter, Capabilities],
        Throwaway,
        |_| unshare(CGROUP),
    ),
    attempt(
        "unshare-time",
        "a time namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| unshare(TIME),
    ),
    attempt("clone-user", "a child in a user namespace", "CVE-2022-0185", &[Filter], Throwaway, |_| {
        clone(USER)
    }),
    attempt("clone-user-and-mount", "both in one call", "CVE-2023-0386", &[Filter], Throwaway, |_| {
        clone(USER | MOUNT)
    }),
    attempt(
        "clone-mount",
        "a child in a mount namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone(MOUNT),
    ),
    attempt(
        "clone-pid",
        "a child in a pid namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone(PID),
    ),
    attempt(
        "clone-net",
        "a child in a network namespace",
        "CVE-2023-32233",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone(NET),
    ),
    attempt(
        "clone-ipc",
        "a child in an ipc namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone(IPC),
    ),
    attempt(
        "clone-uts",
        "a child in a uts namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone(UTS),
    ),
    attempt(
        "clone-cgroup",
        "a child in a cgroup namespace",
        "CVE-2022-0492",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone(CGROUP),
    ),
    attempt(
        "clone3-user",
        "flags in memory, which a filter cannot read",
        "CVE-2021-41133",
        &[Filter],
        Throwaway,
        |_| clone3(USER),
    ),
    attempt(
        "clone3-mount",
        "the same for a mount namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(MOUNT),
    ),
    attempt(
        "clone3-pid",
        "the same for a pid namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(PID),
    ),
    attempt(
        "clone3-net",
        "the same for a network namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(NET),
    ),
    attempt(
        "clone3-ipc",
        "the same for an ipc namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(IPC),
    ),
    attempt(
        "clone3-uts",
        "the same for a uts namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(UTS),
    ),
    attempt(
        "clone3-cgroup",
        "the same for a cgroup namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(CGROUP),
    ),
    attempt(
        "clone3-time",
        "the same for a time namespace",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| clone3(TIME),
    ),
    attempt(
        "setns-mount",
        "join a mount namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns("mnt", MOUNT),
    ),
    attempt(
        "setns-pid",
        "join a pid namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns("pid", PID),
    ),
    attempt(
        "setns-net",
        "join a network namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns("net", NET),
    ),
    attempt(
        "setns-ipc",
        "join an ipc namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns("ipc", IPC),
    ),
    attempt(
        "setns-uts",
        "join a uts namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns("uts", UTS),
    ),
    attempt(
        "setns-cgroup",
        "join a cgroup namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns("cgroup", CGROUP),
    ),
    attempt(
        "setns-time",
        "join a time namespace",
        "podman's profile",
        &[Filter, Capabilities],
        Maybe,
        |_| setns("time", TIME),
    ),
    attempt(
        "setns-pidfd",
        "join the namespaces of a process",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| setns_by_pidfd(),
    ),
    attempt(
        "more-user-namespaces",
        "raise how many user namespaces there may be",
        "CVE-2022-0185",
        &[ReadOnly],
        Throwaway,
        |_| write("/proc/sys/user/max_user_namespaces", "1000"),
    ),
];
