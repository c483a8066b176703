//! System call filters of workers: a list of what is allowed; everything else kills the process.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};

/// What every worker needs: memory, its descriptors, signals, threads, time, randomness, an end.
const BASE: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_restart_syscall,
    libc::SYS_ppoll,
    libc::SYS_copy_file_range,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fadvise64,
    libc::SYS_membarrier,
    // A panic or an abort of our own; only at ourselves, since there is nobody else in the pid namespace but our parent,
    // and that is out of sight.
    libc::SYS_tgkill,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// Asked for by libc, which has another way where the kernel is too old for them.
const TOO_NEW: &[libc::c_long] = &[libc::SYS_clone3];

/// Libraries look for configuration that an empty root does not have: they hear so, and go on. With a directory as root
/// the profile allows the call, and Landlock and the root bound it.
const ABSENT: &[libc::c_long] = &[
    libc::SYS_openat,
    libc::SYS_faccessat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// Threads, but no processes: fork and vfork lack CLONE_THREAD. No namespaces either, whatever a thread may ask for.
const THREAD: &[Condition] =
    &[Condition { argument: 0, mask: CLONE_THREAD | CLONE_NEW, value: CLONE_THREAD }];
const CLONE_THREAD: u32 = libc::CLONE_THREAD as u32;
const CLONE_NEW: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// A condition on one argument: its low 32 bits, masked, must equal the value.
#[derive(Debug, Clone, Copy)]
pub struct Condition {
    pub argument: u8,
    pub mask: u32,
    pub value: u32,
}

/// A system call that is allowed, under all the conditions given.
#[derive(Debug, Clone, Copy)]
pub struct Allowed(pub libc::c_long, pub &'static [Condition]);

#[derive(Debug, thiserror::Error)]
#[error("the seccomp filter cannot be {step}: {message}")]
pub struct SeccompError {
    step: &'static str,
    message: String,
}

fn failed(step: &'static str) -> impl Fn(&dyn std::fmt::Display) -> SeccompError {
    move |error| SeccompError { step, message: error.to_string() }
}

fn architecture() -> Result<TargetArch, SeccompError> {
    std::env::consts::ARCH.try_into().map_err(|error| failed("compiled")(&error))
}

fn program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    mismatch: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, SeccompError> {
    let filter = SeccompFilter::new(rules, mismatch, matched, architecture()?)
        .map_err(|error| failed("built")(&error))?;
    filter.try_into().map_err(|error: seccompiler::BackendError| failed("compiled")(&error))
}

/// Apply the base list and `more` to this thread and all that it makes. `no_new_privs` must be set.
pub fn apply(more: &[Allowed]) -> Result<(), SeccompError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let absent: Vec<_> =
        ABSENT.iter().filter(|number| !more.iter().any(|allowed| allowed.0 == **number)).collect();
    for number in BASE.iter().chain(TOO_NEW).chain(absent.iter().copied()) {
        rules.insert(*number, vec![]);
    }
    for Allowed(number, conditions) in more.iter().chain(&[Allowed(libc::SYS_clone, THREAD)]) {
        let conditions: Result<Vec<_>, _> = conditions
            .iter()
            .map(|condition| {
                SeccompCondition::new(
                    condition.argument,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::MaskedEq(condition.mask.into()),
                    condition.value.into(),
                )
            })
            .collect();
        let conditions = conditions.map_err(|error| failed("built")(&error))?;
        if conditions.is_empty() {
            rules.insert(*number, vec![]);
        } else {
            let rule = SeccompRule::new(conditions).map_err(|error| failed("built")(&error))?;
            rules.entry(*number).or_default().push(rule);
        }
    }
    let too_new = TOO_NEW.iter().map(|number| (*number, vec![])).collect();
    let enosys = program(too_new, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?;
    let list = program(rules, SeccompAction::KillProcess, SeccompAction::Allow)?;
    let absent = absent.into_iter().map(|number| (*number, vec![])).collect();
    let enoent = program(absent, SeccompAction::Allow, SeccompAction::Errno(libc::ENOENT as u32))?;
    apply_filter(&enoent).map_err(|error| failed("applied")(&error))?;
    apply_filter(&enosys).map_err(|error| failed("applied")(&error))?;
    apply_filter(&list).map_err(|error| failed("applied")(&error))
}
