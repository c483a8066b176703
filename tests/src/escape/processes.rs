//! A process of the user's on the host, by its number; and what else is told apart by namespaces.

use std::io;
use std::os::fd::AsRawFd;

use casemate_tests::escapes::{SECRET, Targets};

use crate::attempt::Control::Host;
use crate::attempt::Guard::{Filter, Ipc, Names, Processes};
use crate::attempt::{Attempt, Done, attempt, c, done, only_if, open, own};
use crate::call;

const PTRACE_SEIZE: i32 = 0x4206;

/// Begin to trace; it ends with this process.
pub fn trace(pid: i32) -> Done {
    done(call!(libc::SYS_ptrace, PTRACE_SEIZE, pid, 0, 0))
}

/// Copy from `address` of another process, or to it.
pub fn copy(number: i64, pid: i32, address: u64, bytes: &mut [u8]) -> io::Result<i64> {
    let ours = [bytes.as_mut_ptr() as u64, bytes.len() as u64];
    let theirs = [address, bytes.len() as u64];
    call!(number, pid, ours.as_ptr(), 1, theirs.as_ptr(), 1, 0)
}

fn read_memory(targets: &Targets) -> Done {
    let mut bytes = [0; 16];
    copy(libc::SYS_process_vm_readv, targets.victim.pid, targets.victim.address, &mut bytes)?;
    only_if(&bytes == SECRET, "other bytes")
}

fn write_memory(targets: &Targets) -> Done {
    // The same bytes again: nobody is hurt.
    done(copy(libc::SYS_process_vm_writev, targets.victim.pid, targets.victim.address, &mut { *SECRET }))
}

pub fn pidfd(pid: i32) -> io::Result<std::os::fd::OwnedFd> {
    call!(libc::SYS_pidfd_open, pid, 0).map(own)
}

fn signal_by_pidfd(pid: i32) -> Done {
    done(call!(libc::SYS_pidfd_send_signal, pidfd(pid)?.as_raw_fd(), 0, 0, 0))
}

pub fn take_descriptor(pid: i32, descriptor: i32) -> Done {
    done(call!(libc::SYS_pidfd_getfd, pidfd(pid)?.as_raw_fd(), descriptor, 0).map(own))
}

fn proc(targets: &Targets, name: &str) -> Done {
    done(open(&format!("/proc/{}/{name}", targets.victim.pid), libc::O_RDONLY))
}

pub fn limits(pid: i32) -> Done {
    done(call!(libc::SYS_prlimit64, pid, libc::RLIMIT_NOFILE, 0, [0u64; 2].as_mut_ptr()))
}

fn processors(pid: i32) -> Done {
    let mut mask = [0u64; 128];
    let size = call!(libc::SYS_sched_getaffinity, pid, size_of_val(&mask), mask.as_mut_ptr())?;
    done(call!(libc::SYS_sched_setaffinity, pid, size, mask.as_ptr()))
}

fn queued(pid: i32) -> Done {
    // A siginfo of signal 0, as sigqueue(3) makes it: SI_QUEUE.
    let information = [0i32, 0, -1, 0, 0, 0, 0, 0];
    let mut whole = [0i32; 32];
    whole[..8].copy_from_slice(&information);
    done(call!(libc::SYS_rt_sigqueueinfo, pid, 0, whole.as_ptr()))
}

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("kill", "signal a process of the host", "CVE-2016-9962", &[Processes], Host, |targets| done(call!(libc::SYS_kill, targets.victim.pid, 0))),
    attempt("tgkill", "signal one thread of it", "CVE-2016-9962", &[Processes], Host, |targets| {
        done(call!(libc::SYS_tgkill, targets.victim.pid, targets.victim.pid, 0))
    }),
    attempt("sigqueue", "signal it with a word", "CVE-2016-9962", &[Processes], Host, |targets| queued(targets.victim.pid)),
    attempt("pidfd", "hold a process of the host", "CVE-2016-9962", &[Processes], Host, |targets| done(pidfd(targets.victim.pid))),
    attempt("pidfd-signal", "signal what is held", "CVE-2016-9962", &[Processes], Host, |targets| signal_by_pidfd(targets.victim.pid)),
    attempt("pidfd-getfd", "take its descriptors", "CVE-2016-9962", &[Processes], Host, |targets| {
        take_descriptor(targets.victim.pid, targets.victim.descriptor)
    }),
    attempt("ptrace", "trace it", "CVE-2016-9962", &[Processes], Host, |targets| trace(targets.victim.pid)),
    attempt("read-memory", "read its memory", "CVE-2016-9962", &[Processes], Host, read_memory),
    attempt("write-memory", "write its memory", "CVE-2016-9962", &[Processes], Host, write_memory),
    attempt("proc-status", "see it in /proc", "podman's namespaces", &[Processes], Host, |targets| proc(targets, "status")),
    attempt("proc-cmdline", "its command line", "podman's namespaces", &[Processes], Host, |targets| proc(targets, "cmdline")),
    attempt("proc-environ", "its variables", "CVE-2016-9962", &[Processes], Host, |targets| proc(targets, "environ")),
    attempt("proc-mem", "its memory, as a file", "CVE-2012-0056", &[Processes], Host, |targets| proc(targets, "mem")),
    attempt("proc-maps", "where things are in it", "CVE-2016-9962", &[Processes], Host, |targets| proc(targets, "maps")),
    attempt("proc-root", "its root directory", "CVE-2024-21626", &[Processes], Host, |targets| proc(targets, "root")),
    attempt("proc-cwd", "its working directory", "CVE-2024-21626", &[Processes], Host, |targets| proc(targets, "cwd")),
    attempt("proc-exe", "its program", "CVE-2019-5736", &[Processes], Host, |targets| proc(targets, "exe")),
    attempt("proc-fd", "its open files", "CVE-2024-21626", &[Processes], Host, |targets| proc(targets, &format!("fd/{}", targets.victim.descriptor))),
    attempt("proc-namespace", "its namespaces", "CVE-2016-9962", &[Processes], Host, |targets| proc(targets, "ns/net")),
    attempt("prlimit", "its limits", "podman's namespaces", &[Processes], Host, |targets| limits(targets.victim.pid)),
    attempt("affinity", "its processors", "podman's namespaces", &[Processes], Host, |targets| processors(targets.victim.pid)),
    attempt("nice", "its priority", "podman's namespaces", &[Processes], Host, |targets| done(call!(libc::SYS_setpriority, 0, targets.victim.pid, 0))),
    attempt("io-priority", "its priority on disks", "podman's namespaces", &[Processes], Host, |targets| {
        done(call!(libc::SYS_ioprio_set, 1, targets.victim.pid, 2 << 13 | 4))
    }),
    attempt("robust-list", "an address in it", "podman's namespaces", &[Processes], Host, |targets| {
        let (mut head, mut size) = (0u64, 0u64);
        done(call!(libc::SYS_get_robust_list, targets.victim.pid, &raw mut head, &raw mut size))
    }),
    attempt("perf-process", "count what it does", "CVE-2013-2094", &[Processes, Filter], Host, |targets| crate::kernel::perf(targets.victim.pid)),
    attempt("kcmp-process", "compare it with oneself", "podman's profile", &[Processes, Filter], Host, |targets| {
        done(call!(libc::SYS_kcmp, targets.victim.pid, std::process::id(), 1, 0, 0))
    }),
    attempt("move-pages-process", "where its memory is", "CVE-2017-14140", &[Processes, Filter], Host, |targets| {
        done(call!(libc::SYS_move_pages, targets.victim.pid, 0, 0, 0, 0, 0))
    }),
    attempt("shared-memory", "shared memory of the host, System V's", "podman's namespaces", &[Ipc], Host, |targets| {
        done(call!(libc::SYS_shmget, targets.victim.keys[0], 0, 0))
    }),
    attempt("messages", "its message queues", "podman's namespaces", &[Ipc], Host, |targets| done(call!(libc::SYS_msgget, targets.victim.keys[1], 0))),
    attempt("semaphores", "its semaphores", "podman's namespaces", &[Ipc], Host, |targets| {
        done(call!(libc::SYS_semget, targets.victim.keys[2], 0, 0))
    }),
    attempt("posix-queue", "its message queues, POSIX's", "podman's namespaces", &[Ipc], Host, |targets| {
        done(call!(libc::SYS_mq_open, c(&targets.victim.queue).as_c_str(), libc::O_RDWR, 0, 0))
    }),
    attempt("posix-memory", "its shared memory, POSIX's", "podman's namespaces", &[crate::attempt::Guard::Devices], Host, |targets| {
        done(open(&format!("/dev/shm/{}", targets.victim.shared_memory), libc::O_RDONLY))
    }),
    attempt("host-name", "how the host is called", "podman's namespaces", &[Names], Host, |targets| {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
        only_if(name.trim() == targets.host_name, "it is called otherwise")
    }),
];
