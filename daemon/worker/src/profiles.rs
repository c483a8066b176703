//! The confinement of each worker, in one place. To change a list: run the worker's tests under `strace -f`, look for the
//! call that ends in SIGSYS, add it with the reason why the worker needs it, or change the worker.

use rustix::thread::CapabilitySet;

use crate::confine::{Profile, RootDirectory};
use crate::namespaces::Ids;
use crate::seccomp::{Allowed, Condition};

const fn allow(number: libc::c_long) -> Allowed {
    Allowed(number, &[])
}

const fn is(argument: u8, value: libc::c_int) -> Condition {
    Condition { argument, mask: u32::MAX, value: value as u32 }
}

/// TCP or UDP over one address family. Anybody could have MPTCP, SCTP, SMC or DCCP, and the bugs of those.
const fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> [Condition; 3] {
    // Without SOCK_NONBLOCK and SOCK_CLOEXEC.
    [is(0, family), Condition { argument: 1, mask: 0xf, value: kind as u32 }, is(2, protocol)]
}
const TCP: &[Condition] = &socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP);
const TCP_DEFAULT: &[Condition] = &socket(libc::AF_INET, libc::SOCK_STREAM, 0);
const TCP6: &[Condition] = &socket(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP);
const TCP6_DEFAULT: &[Condition] = &socket(libc::AF_INET6, libc::SOCK_STREAM, 0);
const UDP: &[Condition] = &socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP);
const UDP_DEFAULT: &[Condition] = &socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
const UDP6: &[Condition] = &socket(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP);
const UDP6_DEFAULT: &[Condition] = &socket(libc::AF_INET6, libc::SOCK_DGRAM, 0);
const NONBLOCKING: &[Condition] = &[is(1, libc::FIONBIO as libc::c_int)];
const UNIX_STREAM: &[Condition] =
    &[is(0, libc::AF_UNIX), Condition { argument: 1, mask: 0xf, value: libc::SOCK_STREAM as u32 }];

/// Speaks to the network and to nothing else.
pub const FETCH: Profile = Profile {
    name: "casemate-fetch",
    ids: Ids::Own,
    root: RootDirectory::Empty,
    network: true,
    descriptors: 1,
    capabilities: CapabilitySet::empty(),
    memory: 1 << 30,
    // As much as an image may unpack to.
    file_size: 64 << 30,
    syscalls: &[
        Allowed(libc::SYS_socket, TCP),
        Allowed(libc::SYS_socket, TCP_DEFAULT),
        Allowed(libc::SYS_socket, TCP6),
        Allowed(libc::SYS_socket, TCP6_DEFAULT),
        Allowed(libc::SYS_socket, UDP),
        Allowed(libc::SYS_socket, UDP_DEFAULT),
        Allowed(libc::SYS_socket, UDP6),
        Allowed(libc::SYS_socket, UDP6_DEFAULT),
        allow(libc::SYS_connect),
        // UDP sockets of the resolver bind to a port of their own choice.
        allow(libc::SYS_bind),
        allow(libc::SYS_sendto),
        allow(libc::SYS_sendmsg),
        allow(libc::SYS_recvfrom),
        allow(libc::SYS_recvmsg),
        allow(libc::SYS_getsockopt),
        allow(libc::SYS_setsockopt),
        allow(libc::SYS_getsockname),
        allow(libc::SYS_getpeername),
        allow(libc::SYS_shutdown),
        // The event loop.
        allow(libc::SYS_epoll_create1),
        allow(libc::SYS_epoll_ctl),
        allow(libc::SYS_epoll_pwait),
        #[cfg(target_arch = "x86_64")]
        allow(libc::SYS_epoll_wait),
        allow(libc::SYS_eventfd2),
        // tokio's signal driver makes a pair of connected AF_UNIX sockets: streams reach nobody but each other.
        Allowed(libc::SYS_socketpair, UNIX_STREAM),
        Allowed(libc::SYS_ioctl, NONBLOCKING),
    ],
};

/// The relay of names of a private network, beside `casemate-init`: what [`FETCH`] may, and to be asked.
pub const RELAY: &[Allowed] = &[
    Allowed(libc::SYS_socket, TCP),
    Allowed(libc::SYS_socket, TCP_DEFAULT),
    Allowed(libc::SYS_socket, TCP6),
    Allowed(libc::SYS_socket, TCP6_DEFAULT),
    Allowed(libc::SYS_socket, UDP),
    Allowed(libc::SYS_socket, UDP_DEFAULT),
    Allowed(libc::SYS_socket, UDP6),
    Allowed(libc::SYS_socket, UDP6_DEFAULT),
    allow(libc::SYS_bind),
    allow(libc::SYS_connect),
    allow(libc::SYS_accept4),
    allow(libc::SYS_sendto),
    allow(libc::SYS_recvfrom),
    allow(libc::SYS_getsockopt),
    allow(libc::SYS_setsockopt),
    Allowed(libc::SYS_ioctl, NONBLOCKING),
];

/// Bytes in, a catalogue out.
pub const INDEX: Profile = Profile {
    name: "casemate-index",
    ids: Ids::Own,
    root: RootDirectory::Empty,
    network: false,
    descriptors: 2,
    capabilities: CapabilitySet::empty(),
    memory: 1 << 30,
    file_size: 1 << 30,
    syscalls: &[],
};

const TREE_CALLS: &[Allowed] = &[
    allow(libc::SYS_openat),
    allow(libc::SYS_openat2),
    allow(libc::SYS_mkdirat),
    allow(libc::SYS_mknodat),
    allow(libc::SYS_symlinkat),
    allow(libc::SYS_linkat),
    allow(libc::SYS_unlinkat),
    allow(libc::SYS_renameat2),
    allow(libc::SYS_renameat),
    allow(libc::SYS_readlinkat),
    allow(libc::SYS_getdents64),
    allow(libc::SYS_fchdir),
    allow(libc::SYS_faccessat),
    allow(libc::SYS_faccessat2),
    allow(libc::SYS_fchmod),
    allow(libc::SYS_fchmodat),
    allow(libc::SYS_fchmodat2),
    allow(libc::SYS_fchown),
    allow(libc::SYS_fchownat),
    allow(libc::SYS_utimensat),
    allow(libc::SYS_fsetxattr),
    allow(libc::SYS_lsetxattr),
    allow(libc::SYS_fgetxattr),
    allow(libc::SYS_lgetxattr),
    allow(libc::SYS_flistxattr),
    allow(libc::SYS_llistxattr),
    allow(libc::SYS_fremovexattr),
    allow(libc::SYS_lremovexattr),
    allow(libc::SYS_fstatfs),
    allow(libc::SYS_umask),
    // `casemate-unpack` asks with a file of its own whether more ids than one are mapped.
    allow(libc::SYS_memfd_create),
    allow(libc::SYS_syncfs),
    allow(libc::SYS_fsync),
    allow(libc::SYS_fdatasync),
];

const FILE_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::MKNOD);

/// Decompresses and reads tar; its root is the directory that it fills.
pub const UNPACK: Profile = Profile {
    name: "casemate-unpack",
    ids: Ids::Inner,
    root: RootDirectory::Descriptor { hide: &[] },
    network: false,
    descriptors: 3,
    capabilities: FILE_CAPABILITIES,
    // 192 MiB resident is the goal (THREATS.md); address space is more, as thread stacks and arenas are reserved.
    memory: 1 << 30,
    file_size: u64::MAX,
    syscalls: TREE_CALLS,
};

/// `FICLONE`: a file's content is shared, not copied.
const CLONE_CONTENT: &[Condition] = &[is(1, 0x4004_9409)];
const TREE_CALLS_AND_CLONES: [Allowed; TREE_CALLS.len() + 1] = {
    let mut all = [Allowed(libc::SYS_ioctl, CLONE_CONTENT); TREE_CALLS.len() + 1];
    let mut at = 0;
    while at < TREE_CALLS.len() {
        all[at] = TREE_CALLS[at];
        at += 1;
    }
    all
};

/// Works on objects, layers, uppers and staging; records are out of its sight.
pub const TREE: Profile = Profile {
    name: "casemate-tree",
    ids: Ids::Outer,
    root: RootDirectory::Descriptor { hide: &["releases", "environments", "snapshots"] },
    network: false,
    descriptors: 2,
    capabilities: FILE_CAPABILITIES,
    memory: 4 << 30,
    file_size: u64::MAX,
    syscalls: &TREE_CALLS_AND_CLONES,
};
