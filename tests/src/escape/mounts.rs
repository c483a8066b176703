//! Mounts: the calls old and new, and what could be mounted.

use std::ffi::CStr;
use std::io;

use crate::attempt::Control::{Maybe, Throwaway};
use crate::attempt::Guard::{Capabilities, Filter};
use crate::attempt::{Attempt, Done, attempt, done};
use crate::call;
use casemate_tests::escapes::Role;

const HERE: i32 = libc::AT_FDCWD;
const PLACE: &CStr = c"/tmp";

fn mount(source: &CStr, kind: &CStr, flags: u64, data: &CStr) -> Done {
    done(call!(libc::SYS_mount, source, PLACE, kind, flags, data))
}

fn new(kind: &CStr) -> Done {
    mount(c"none", kind, 0, c"")
}

fn change(path: &CStr, flags: u64) -> Done {
    done(call!(libc::SYS_mount, c"none", path, c"", flags, 0))
}

fn pivot() -> Done {
    // Where this fails the next call is made all the same.
    let _ = new(c"tmpfs");
    std::env::set_current_dir("/tmp")?;
    done(call!(libc::SYS_pivot_root, c".", c"."))
}

fn tree() -> io::Result<i64> {
    call!(libc::SYS_open_tree, HERE, c"/proc", 1)
}

fn context() -> io::Result<i64> {
    call!(libc::SYS_fsopen, c"tmpfs", 0)
}

/// FSCONFIG_CMD_CREATE
fn create(context: i64) -> io::Result<i64> {
    call!(libc::SYS_fsconfig, context, 6, 0, 0, 0)
}

/// Each call is made whatever became of the ones before it.
fn or_none(descriptor: io::Result<i64>) -> i64 {
    descriptor.unwrap_or(-1)
}

fn move_mount() -> Done {
    done(call!(libc::SYS_move_mount, or_none(tree()), c"", HERE, PLACE, 4))
}

fn fsmount() -> Done {
    let context = or_none(context());
    let _ = create(context);
    done(call!(libc::SYS_fsmount, context, 0, 0))
}

/// Set nothing, clear MOUNT_ATTR_RDONLY.
const WRITABLE: [u64; 4] = [0, 1, 0, 0];

pub const ATTEMPTS: &[Attempt] = &[
    attempt(
        "mount-tmpfs",
        "mount a new file system",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| new(c"tmpfs"),
    ),
    attempt(
        "mount-proc",
        "a /proc without covers",
        "CVE-2025-52881",
        &[Filter, Capabilities],
        Throwaway,
        |_| new(c"proc"),
    ),
    attempt(
        "mount-sysfs",
        "a /sys that is not read-only",
        "CVE-2022-0492",
        &[Filter, Capabilities],
        Throwaway,
        |_| new(c"sysfs"),
    ),
    attempt(
        "mount-devpts",
        "terminals of one's own",
        "CVE-2025-52565",
        &[Filter, Capabilities],
        Throwaway,
        |_| new(c"devpts"),
    ),
    attempt("mount-mqueue", "message queues", "podman's profile", &[Filter, Capabilities], Throwaway, |_| {
        new(c"mqueue")
    }),
    attempt(
        "mount-cgroup2",
        "the control groups",
        "CVE-2022-0492",
        &[Filter, Capabilities],
        Throwaway,
        |_| new(c"cgroup2"),
    ),
    attempt(
        "mount-ramfs",
        "memory that nobody counts",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| new(c"ramfs"),
    ),
    attempt(
        "mount-binfmt",
        "interpreters that the kernel starts",
        "CVE-2023-2640",
        &[Filter, Capabilities],
        Maybe,
        |_| new(c"binfmt_misc"),
    ),
    attempt("mount-bpf", "pinned programs", "podman's profile", &[Filter, Capabilities], Maybe, |_| {
        new(c"bpf")
    }),
    attempt(
        "mount-overlay",
        "an overlay of one's own",
        "CVE-2023-0386",
        &[Filter, Capabilities],
        Throwaway,
        |_| mount(c"none", c"overlay", 0, c"lowerdir=/etc:/usr"),
    ),
    attempt(
        "mount-overlay-injected",
        "options of one's own in an overlay's",
        "CVE-2021-3493",
        &[Filter, Capabilities],
        Throwaway,
        |_| mount(c"none", c"overlay", 0, c"lowerdir=/etc:/usr,redirect_dir=nofollow,userxattr"),
    ),
    attempt(
        "mount-bind",
        "a directory elsewhere",
        "CVE-2024-21626",
        &[Filter, Capabilities],
        Throwaway,
        |_| mount(c"/etc", c"", libc::MS_BIND, c""),
    ),
    attempt(
        "mount-bind-recursive",
        "with all beneath it",
        "CVE-2024-23651",
        &[Filter, Capabilities],
        Throwaway,
        |_| mount(c"/", c"", libc::MS_BIND | libc::MS_REC, c""),
    ),
    attempt(
        "mount-move",
        "move what is mounted",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| mount(c"/proc", c"", libc::MS_MOVE, c""),
    ),
    attempt(
        "mount-remount",
        "what is read-only made writable",
        "CVE-2014-5206",
        &[Filter, Capabilities],
        Throwaway,
        |_| change(c"/proc", libc::MS_REMOUNT | libc::MS_BIND),
    ),
    attempt(
        "mount-shared",
        "have mounts show elsewhere",
        "podman's profile",
        &[Filter, Capabilities],
        Throwaway,
        |_| change(c"/", libc::MS_SHARED | libc::MS_REC),
    ),
    attempt(
        "umount",
        "uncover what is beneath a mount",
        "CVE-2025-31133",
        &[Filter, Capabilities],
        Throwaway,
        |_| done(call!(libc::SYS_umount2, c"/proc", libc::MNT_DETACH)),
    ),
    attempt("pivot-root", "another root", "podman's profile", &[Filter, Capabilities], Throwaway, |_| {
        pivot()
    }),
    attempt(
        "open-tree",
        "a copy of a tree of mounts",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| done(tree()),
    ),
    attempt(
        "move-mount",
        "attach it somewhere",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| move_mount(),
    ),
    attempt(
        "fsopen",
        "the new calls: begin a file system",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| done(context()),
    ),
    attempt("fsconfig", "configure it", "CVE-2022-0185", &[Filter, Capabilities], Throwaway, |_| {
        done(create(or_none(context())))
    }),
    attempt("fsmount", "mount it", "CVE-2021-41133", &[Filter, Capabilities], Throwaway, |_| fsmount()),
    attempt(
        "fspick",
        "reconfigure one that is mounted",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| done(call!(libc::SYS_fspick, HERE, c"/proc", 0)),
    ),
    attempt(
        "mount-setattr",
        "what is read-only made writable, by the new call",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Throwaway,
        |_| {
            done(call!(libc::SYS_mount_setattr, HERE, c"/proc", 0, WRITABLE.as_ptr(), size_of_val(&WRITABLE)))
        },
    ),
    attempt(
        "open-tree-attr",
        "the two in one, by the newest call",
        "CVE-2021-41133",
        &[Filter, Capabilities],
        Maybe,
        |_| done(call!(467, HERE, c"/proc", 1, WRITABLE.as_ptr(), size_of_val(&WRITABLE))),
    ),
    attempt("chroot", "another root directory", "CVE-2019-14271", &[Capabilities], Throwaway, |_| {
        done(call!(libc::SYS_chroot, PLACE))
    })
    .by(&[Role::User]),
];
