//! Large or old interfaces of the kernel, and the machine's own affairs.

use std::ffi::CStr;
use std::io;

use casemate_tests::escapes::Role;

use crate::attempt::Control::{Host, Maybe, Throwaway};
use crate::attempt::Guard::{Capabilities, Filter};
use crate::attempt::{Attempt, Done, attempt, done, held, in_child, only_if, own, reaches};
use crate::call;

const NOTHING: *const u8 = std::ptr::null();

fn io_uring() -> io::Result<i64> {
    call!(libc::SYS_io_uring_setup, 1, [0u64; 15].as_mut_ptr())
}

/// linux/bpf.h, BPF_OBJ_GET
fn bpf(path: &CStr) -> io::Result<i64> {
    let attributes = [path.as_ptr() as u64, 0];
    call!(libc::SYS_bpf, 7, attributes.as_ptr(), size_of_val(&attributes))
}

/// The user's part of a counter in software; `process` 0 is oneself.
pub fn perf(process: i32) -> Done {
    // linux/perf_event.h, struct perf_event_attr: type and size, config, …, flags.
    let mut attributes = [0u64; 14];
    attributes[0] = 1 | (112 << 32);
    attributes[5] = (1 << 5) | (1 << 6);
    done(call!(libc::SYS_perf_event_open, attributes.as_ptr(), process, -1, -1, 0).map(own))
}

/// A time that there never was.
const NO_TIME: [i64; 2] = [-1, -1];

fn file_handle() -> Done {
    // linux/fcntl.h, struct file_handle, with room for any.
    let mut handle = [0u32; 34];
    handle[0] = 128;
    let mut mount = 0i32;
    done(call!(libc::SYS_name_to_handle_at, libc::AT_FDCWD, c"/", handle.as_mut_ptr(), &raw mut mount, 0))
}

fn open_file_handle() -> Done {
    let mut handle = [0u32; 34];
    handle[0] = 128;
    let mut mount = 0i32;
    call!(libc::SYS_name_to_handle_at, libc::AT_FDCWD, c"/tmp", handle.as_mut_ptr(), &raw mut mount, 0)?;
    let directory = crate::attempt::open("/tmp", libc::O_RDONLY)?;
    let directory = std::os::fd::AsRawFd::as_raw_fd(&directory);
    done(call!(libc::SYS_open_by_handle_at, directory, handle.as_ptr(), 0))
}

#[cfg(target_arch = "x86_64")]
fn interrupt_80(number: i32) -> Done {
    // In a child: the filter's answer is its end.
    let code = in_child(|| {
        let result: i64;
        // SAFETY: a call by i386's numbers with arguments of 0, in a process made for it; rbx, which the compiler keeps for
        // itself, is put back.
        unsafe {
            std::arch::asm!(
                "xchg {zero}, rbx",
                "int 0x80",
                "xchg {zero}, rbx",
                zero = inout(reg) 0u64 => _,
                inlateout("rax") i64::from(number) => result,
                in("rcx") 0, in("rdx") 0, in("rsi") 0, in("rdi") 0,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            );
        }
        i32::from(result as i32 == -libc::ENOSYS || result as i32 == -libc::EPERM)
    })?;
    match code {
        0 => Ok(()),
        1 => Err(io::Error::from_raw_os_error(libc::EPERM)),
        signal => held(&format!("killed by signal {}", signal - 128)),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn interrupt_80(_: i32) -> Done {
    let _ = in_child;
    held("this processor has no such calls")
}

/// As x86-64 numbers the 32-bit calls of x32: bit 30.
fn x32() -> Done {
    done(call!(0x4000_0000 + libc::SYS_getpid))
}

#[cfg(target_arch = "x86_64")]
mod numbers {
    pub const IOPL: i64 = libc::SYS_iopl;
    pub const IOPERM: i64 = libc::SYS_ioperm;
    pub const MODIFY_LDT: i64 = libc::SYS_modify_ldt;
    pub const SYSFS: i64 = libc::SYS_sysfs;
    pub const USTAT: i64 = libc::SYS_ustat;
}

/// No processor but x86 has them.
#[cfg(not(target_arch = "x86_64"))]
mod numbers {
    pub const IOPL: i64 = -1;
    pub const IOPERM: i64 = -1;
    pub const MODIFY_LDT: i64 = -1;
    pub const SYSFS: i64 = -1;
    pub const USTAT: i64 = -1;
}

const PROCESS_KEYRING: i32 = -2;
const USER_KEYRING: i32 = -4;

fn personality(flag: i64) -> Done {
    call!(libc::SYS_personality, flag)?;
    let now = call!(libc::SYS_personality, 0xffff_ffffu32)?;
    only_if(now & flag != 0, "it was not set")
}

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("io-uring-setup", "calls that no filter sees", "CVE-2023-2598", &[Filter], Host, |_| done(io_uring())),
    attempt("io-uring-enter", "the same, entered", "CVE-2023-2598", &[Filter], Host, |_| {
        reaches(call!(libc::SYS_io_uring_enter, -1, 0, 0, 0, NOTHING, 0), libc::EBADF)
    }),
    attempt("io-uring-register", "the same, prepared", "CVE-2023-2598", &[Filter], Host, |_| {
        // IORING_REGISTER_BUFFERS
        reaches(call!(libc::SYS_io_uring_register, 99, 0, NOTHING, 1), libc::EBADF)
    }),
    attempt("bpf", "programs in the kernel: open a pinned one", "CVE-2021-3490", &[Filter], Host, |_| {
        reaches(bpf(c"/no such object"), libc::ENOENT)
    }),
    attempt("userfaultfd", "faults that wait for us", "CVE-2021-22555", &[Filter], Host, |_| done(call!(libc::SYS_userfaultfd, 1))),
    attempt("perf-event", "performance counters", "CVE-2013-2094", &[Filter], Host, |_| perf(0)),
    attempt("keyctl", "keyrings, which have no namespace of their own", "CVE-2016-0728", &[Filter], Host, |_| {
        done(call!(libc::SYS_keyctl, 0, USER_KEYRING, 1))
    }),
    attempt("add-key", "add a key", "CVE-2016-9962", &[Filter], Host, |_| {
        done(call!(libc::SYS_add_key, c"user", c"casemate-escape", c"x", 1, PROCESS_KEYRING))
    }),
    attempt("request-key", "ask for a key, which may start a program of the host", "CVE-2014-9529", &[Filter], Host, |_| {
        reaches(call!(libc::SYS_request_key, c"user", c"casemate-none", 0, 0), libc::ENOKEY)
    }),
    attempt("name-to-handle", "a handle on a file", "CVE-2015-3627, shocker", &[Filter], Host, |_| file_handle()),
    attempt("open-by-handle", "a file by its handle, past any mount", "CVE-2015-3627, shocker", &[Filter, Capabilities], Maybe, |_| open_file_handle()),
    attempt("fanotify", "watch whole file systems", "podman's profile", &[Filter], Host, |_| {
        done(call!(libc::SYS_fanotify_init, 0x200, 0))
    }),
    attempt("quotactl", "quotas: write them out", "podman's profile", &[Filter], Host, |_| {
        // A kernel without quotas has no device for them.
        reaches(call!(libc::SYS_quotactl, 1 << 8, 0, 0, 0), libc::ENODEV)
    }),
    attempt("quotactl-fd", "quotas, by the newer call", "podman's profile", &[Filter], Host, |_| reaches(call!(443, -1, 0, 0, 0), libc::EBADF)),
    attempt("reboot", "restart the machine: the call that does it", "podman's profile", &[Filter, Capabilities], Throwaway, |_| {
        // Disabling Ctrl-Alt-Del; beyond the first check a pid namespace answers that it has none.
        reaches(call!(libc::SYS_reboot, 0xfee1_deadu32, 672_274_793, 0, 0), libc::EINVAL)
    }),
    attempt("clock-settime", "set the clock: to no time, which the kernel says", "podman's profile", &[Filter], Host, |_| {
        reaches(call!(libc::SYS_clock_settime, 0, NO_TIME.as_ptr()), libc::EINVAL)
    }),
    attempt("settimeofday", "the same, by the older call", "podman's profile", &[Filter], Host, |_| {
        reaches(call!(libc::SYS_settimeofday, NO_TIME.as_ptr(), 0), libc::EINVAL)
    }),
    attempt("sethostname", "rename the host", "podman's profile", &[Filter, Capabilities], Throwaway, |_| done(call!(libc::SYS_sethostname, c"other", 5))),
    attempt("setdomainname", "rename its domain", "podman's profile", &[Filter, Capabilities], Throwaway, |_| done(call!(libc::SYS_setdomainname, c"other", 5))),
    attempt("iopl", "ports of the machine", "podman's profile", &[Filter], Maybe, |_| done(call!(numbers::IOPL, 0))),
    attempt("ioperm", "the same, one by one", "podman's profile", &[Filter], Maybe, |_| done(call!(numbers::IOPERM, 0, 1, 0))),
    attempt("modify-ldt", "segments of one's own", "CVE-2015-3290", &[Filter], Host, |_| {
        done(call!(numbers::MODIFY_LDT, 0, [0u8; 16].as_mut_ptr(), 16))
    }),
    attempt("personality-addresses", "addresses that are not random", "podman's profile", &[Filter], Host, |_| personality(0x004_0000)),
    attempt("personality-executable", "all that can be read can be executed", "podman's profile", &[Filter], Host, |_| personality(0x040_0000)),
    attempt("kcmp", "compare what processes have in the kernel", "podman's profile", &[Filter], Host, |_| {
        done(call!(libc::SYS_kcmp, std::process::id(), std::process::id(), 1, 0, 0))
    }),
    attempt("vmsplice", "pages of ours in a pipe", "CVE-2008-0600", &[Filter], Host, |_| reaches(call!(libc::SYS_vmsplice, -1, NOTHING, 0, 0), libc::EBADF)),
    attempt("migrate-pages", "where memory is", "podman's profile", &[Filter], Host, |_| {
        reaches(call!(libc::SYS_migrate_pages, 0, 0, NOTHING, NOTHING), libc::EINVAL)
    }),
    attempt("move-pages", "where a page is", "podman's profile", &[Filter], Host, |_| done(call!(libc::SYS_move_pages, 0, 0, NOTHING, NOTHING, NOTHING, 0))),
    attempt("process-madvise", "advice on others' memory", "podman's profile", &[Filter], Host, |_| {
        reaches(call!(440, -1, NOTHING, 0, 0, 0), libc::EBADF)
    }),
    attempt("sysfs-call", "a call that nobody needs: which file systems there are", "podman's profile", &[Filter], Host, |_| done(call!(numbers::SYSFS, 3))),
    attempt("ustat", "another: statistics of a disk", "podman's profile", &[Filter], Host, |_| {
        reaches(call!(numbers::USTAT, 0, [0u8; 32].as_mut_ptr()), libc::EINVAL)
    }),
    attempt("listmount", "a call that is newer than the list: mounts", "default deny", &[Filter], Maybe, |_| {
        let request = [24u64, u64::MAX, 0];
        done(call!(458, request.as_ptr(), [0u64; 8].as_mut_ptr(), 8, 0))
    }),
    attempt("lsm-list", "another: security modules", "default deny", &[Filter], Maybe, |_| {
        let mut size = 64u32;
        done(call!(461, [0u64; 8].as_mut_ptr(), &raw mut size, 0))
    }),
    attempt("interrupt-80-getpid", "a call by i386's numbers, on which a filter for others is blind", "CVE-2009-0835", &[Filter], Host, |_| interrupt_80(20)),
    attempt("interrupt-80-unshare", "a call that is denied, by i386's number", "CVE-2009-0835", &[Filter], Host, |_| interrupt_80(310)),
    attempt("interrupt-80-keyctl", "another", "CVE-2009-0835", &[Filter], Host, |_| interrupt_80(288)),
    attempt("x32", "a call by x32's numbers", "CVE-2014-0038", &[Filter], Maybe, |_| x32()),
    attempt("swapon", "swap to a file: that there is none is told to the entitled alone", "podman's profile", &[Filter, Capabilities], Maybe, |_| {
        reaches(call!(libc::SYS_swapon, c"/no such file", 0), libc::ENOENT)
    }),
    attempt("acct", "have the kernel write into a file", "podman's profile", &[Filter, Capabilities], Maybe, |_| {
        reaches(call!(libc::SYS_acct, c"/no such file"), libc::ENOENT)
    }),
    attempt("syslog", "the kernel's log", "podman's profile", &[Filter], Maybe, |_| done(call!(libc::SYS_syslog, 10, 0, 0))),
    attempt("kexec", "another kernel", "podman's profile", &[Filter, Capabilities], Maybe, |_| {
        reaches(call!(libc::SYS_kexec_load, 0, 17, NOTHING, 0), libc::EINVAL)
    }),
    attempt("load-module", "a module", "podman's profile", &[Filter, Capabilities], Maybe, |_| {
        reaches(call!(libc::SYS_finit_module, -1, c"", 0), libc::EBADF)
    }),
    attempt("remove-module", "remove one", "podman's profile", &[Filter, Capabilities], Maybe, |_| {
        reaches(call!(libc::SYS_delete_module, c"casemate_none", 0), libc::ENOENT)
    }),
    attempt("vhangup", "hang up the terminal", "podman's profile", &[Filter, Capabilities], Maybe, |_| done(call!(libc::SYS_vhangup))),
    attempt("adjtimex", "set the clock's frequency", "podman's profile", &[Capabilities], Maybe, |_| {
        // struct timex with ADJ_STATUS: nothing is changed but that it was asked for.
        let mut request = [0u64; 26];
        request[0] = 0x10;
        done(call!(libc::SYS_adjtimex, request.as_mut_ptr()))
    }),
    attempt("setpriority", "run before others", "podman's profile", &[Capabilities], Maybe, |_| done(call!(libc::SYS_setpriority, 0, 0, -5))),
    attempt("real-time", "run before all others", "podman's profile", &[Capabilities], Maybe, |_| {
        let priority = 1i32;
        done(call!(libc::SYS_sched_setscheduler, 0, 1, &raw const priority))
    }),
    attempt("chroot-and-out", "leave by a root directory set beneath where one stands", "chroot(2)", &[crate::attempt::Guard::Root], Throwaway, |targets| {
        std::fs::create_dir_all("/tmp/root")?;
        let before = crate::attempt::open("/", libc::O_RDONLY)?;
        call!(libc::SYS_chroot, c"/tmp/root")?;
        call!(libc::SYS_fchdir, std::os::fd::AsRawFd::as_raw_fd(&before))?;
        for _ in 0..64 {
            std::env::set_current_dir("..")?;
        }
        call!(libc::SYS_chroot, c".")?;
        crate::attempt::read(&targets.outside)
    }).by(&[Role::Root]),
];
