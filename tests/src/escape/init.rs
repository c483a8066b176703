//! Process 1, which is Casemate's own: its program, its memory, its way out.

use std::io;

use crate::attempt::Control::Throwaway;
use crate::attempt::Guard::Undumpable;
use crate::attempt::{Attempt, Done, attempt, done, open};
use crate::processes::{copy, take_descriptor, trace};

fn proc(name: &str, flags: i32) -> Done {
    done(open(&format!("/proc/1/{name}"), flags))
}

fn link(name: &str) -> Done {
    done(std::fs::read_link(format!("/proc/1/{name}")))
}

/// Allowed, the kernel says that there is nothing at that address.
fn memory(number: i64) -> Done {
    match copy(number, 1, 8, &mut [0; 16]) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        other => done(other),
    }
}

fn list(name: &str) -> Done {
    std::fs::read_dir(format!("/proc/1/{name}"))?.next().map_or(Err(io::ErrorKind::NotFound.into()), done)
}

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("init-exe", "the program of init, to write to once it has ended", "CVE-2019-5736", &[Undumpable], Throwaway, |_| proc("exe", libc::O_RDONLY)),
    attempt("init-exe-path", "where it is", "CVE-2019-5736", &[Undumpable], Throwaway, |_| link("exe")),
    attempt("init-mem", "its memory, as a file", "CVE-2012-0056", &[Undumpable], Throwaway, |_| proc("mem", libc::O_RDWR)),
    attempt("init-maps", "where things are in it", "CVE-2016-9962", &[Undumpable], Throwaway, |_| proc("maps", libc::O_RDONLY)),
    attempt("init-environ", "its variables", "CVE-2016-9962", &[Undumpable], Throwaway, |_| proc("environ", libc::O_RDONLY)),
    attempt("init-auxv", "what the kernel told it", "CVE-2016-9962", &[Undumpable], Throwaway, |_| proc("auxv", libc::O_RDONLY)),
    attempt("init-root", "its root directory", "CVE-2024-21626", &[Undumpable], Throwaway, |_| proc("root", libc::O_PATH)),
    attempt("init-cwd", "its working directory", "CVE-2024-21626", &[Undumpable], Throwaway, |_| proc("cwd", libc::O_PATH)),
    attempt("init-fd", "its open files", "CVE-2016-9962", &[Undumpable], Throwaway, |_| list("fd")),
    attempt("init-fdinfo", "what they are", "CVE-2016-9962", &[Undumpable], Throwaway, |_| list("fdinfo")),
    attempt("init-map-files", "files in its memory", "CVE-2019-5736", &[Undumpable], Throwaway, |_| list("map_files")),
    attempt("init-user-namespace", "the outer namespace", "CVE-2016-9962", &[Undumpable], Throwaway, |_| proc("ns/user", libc::O_RDONLY)),
    attempt("init-mount-namespace", "its mounts", "CVE-2016-9962", &[Undumpable], Throwaway, |_| proc("ns/mnt", libc::O_RDONLY)),
    attempt("init-syscall", "what it waits for, and where its stack is", "CVE-2016-9962", &[Undumpable], Throwaway, |_| crate::attempt::read("/proc/1/syscall")),
    attempt("init-trace", "trace it", "CVE-2016-9962", &[Undumpable], Throwaway, |_| trace(1)),
    attempt("init-read-memory", "read its memory", "CVE-2016-9962", &[Undumpable], Throwaway, |_| memory(libc::SYS_process_vm_readv)),
    attempt("init-write-memory", "write its memory", "CVE-2016-9962", &[Undumpable], Throwaway, |_| memory(libc::SYS_process_vm_writev)),
    attempt("init-getfd", "take its descriptors", "CVE-2016-9962", &[Undumpable], Throwaway, |_| take_descriptor(1, 0)),
];
