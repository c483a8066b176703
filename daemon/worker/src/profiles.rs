//! The confinement of each worker, in one place. To change a list: run the worker's tests under `strace -f`, look for the
//! call that ends in SIGSYS, add it with the reason why the worker needs it, or change the worker.

use rustix::thread::CapabilitySet;

use crate::confine::{Profile, RootDirectory};
use crate::namespaces::Ids;
use crate::seccomp::{Allowed, Condition};

const fn allow(number: libc::c_long) -> Allowed {
    Allowed(number, &[])
}

/// A socket of one address family. Types beyond stream and datagram need capabilities that a worker lacks.
const INET: &[Condition] = &[Condition { argument: 0, mask: u32::MAX, value: libc::AF_INET as u32 }];
const INET6: &[Condition] = &[Condition { argument: 0, mask: u32::MAX, value: libc::AF_INET6 as u32 }];

/// Speaks to the network and to nothing else.
pub const FETCH: Profile = Profile {
    name: "casemate-fetch",
    ids: Ids::Own,
    root: RootDirectory::Empty,
    network: true,
    descriptors: 1,
    capabilities: CapabilitySet::empty(),
    memory: 1 << 30,
    file_size: u64::MAX,
    syscalls: &[
        Allowed(libc::SYS_socket, INET),
        Allowed(libc::SYS_socket, INET6),
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
        // tokio's signal driver makes a pair of connected AF_UNIX sockets: they reach nobody.
        allow(libc::SYS_socketpair),
        // FIONBIO.
        allow(libc::SYS_ioctl),
    ],
};

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
    // fchmodat2
    allow(452),
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
    // FICLONE and FS_IOC_*; the descriptors are files and directories of the store.
    allow(libc::SYS_ioctl),
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

/// Works on objects, layers, uppers and staging; records are out of its sight.
pub const TREE: Profile = Profile {
    name: "casemate-tree",
    ids: Ids::Outer,
    root: RootDirectory::Descriptor { hide: &["releases", "environments", "snapshots"] },
    network: false,
    descriptors: 1,
    capabilities: FILE_CAPABILITIES,
    memory: 4 << 30,
    file_size: u64::MAX,
    syscalls: TREE_CALLS,
};
