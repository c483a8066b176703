//! The system call filters of sessions, compiled once. Default: ENOSYS. Allowed: [`crate::syscalls::ALLOWED`]. Denied with
//! EPERM whatever that list says: [`NAMESPACES`] unless they are granted, [`DENIED`], and the argument conditions below. Each
//! session applies them anew, so they are short.

use std::collections::BTreeMap;

use seccompiler::SeccompCmpOp::{Eq, Ne};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::syscalls::ALLOWED;
use crate::verdicts;

/// New namespaces, and what root of one does in it. Nested user namespaces are a way to kernel bugs (CVE-2022-0185); where
/// they are granted, the kernel asks for capabilities, which a session has in such namespaces alone. clone3 stays unknown: libc
/// then uses clone.
const NAMESPACES: &[i64] = &[
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

/// Denied by name, so that a program hears "not permitted", as it does elsewhere, and not "no such call".
const DENIED: &[i64] = &[
    // Keyrings are not namespaced by container (CVE-2016-9962).
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // Large kernel interfaces with a history.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The machine's, not the environment's.
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    // Handles reach files past any mount (the "shocker" attack).
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
];

const TIOCSTI: u64 = 0x5412;
const TIOCLINUX: u64 = 0x541c;

pub struct Filters(Vec<BpfProgram>);

/// What filters depend on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Circumstances {
    pub deny_unix_sockets: bool,
    /// One id is all there is.
    pub single: bool,
    /// User namespaces inside are granted.
    pub nested: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("the seccomp filter cannot be {step}: {message}")]
pub struct FilterError {
    step: &'static str,
    message: String,
}

pub fn failed<E: std::fmt::Display>(step: &'static str) -> impl Fn(E) -> FilterError {
    move |error| FilterError { step, message: error.to_string() }
}

fn architecture() -> Result<TargetArch, FilterError> {
    std::env::consts::ARCH.try_into().map_err(failed("compiled"))
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn program(rules: Rules, mismatch: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, FilterError> {
    SeccompFilter::new(rules, mismatch, matched, architecture()?)
        .map_err(failed("built"))?
        .try_into()
        .map_err(|error: seccompiler::BackendError| failed("compiled")(error))
}

/// The low 32 bits of arguments, as the kernel takes ioctl numbers, families and flags: high bits hide nothing.
fn all(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, FilterError> {
    let condition = |(argument, operator, value): &(u8, SeccompCmpOp, u64)| {
        SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, operator.clone(), *value)
    };
    let conditions: Result<Vec<_>, _> = conditions.iter().map(condition).collect();
    SeccompRule::new(conditions.map_err(failed("built"))?).map_err(failed("built"))
}

fn when(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, FilterError> {
    all(&[(argument, operator, value)])
}

/// What arguments make of a call that is allowed by number.
fn denied_arguments(nested: bool) -> Result<Rules, FilterError> {
    let mut rules = Rules::new();
    let equal = |argument, values: &[u64]| -> Result<Vec<SeccompRule>, FilterError> {
        values.iter().map(|value| when(argument, Eq, *value)).collect()
    };
    rules.insert(libc::SYS_ioctl, equal(1, &[TIOCSTI, TIOCLINUX])?);
    let families = [
        libc::AF_ALG,
        libc::AF_VSOCK,
        libc::AF_KEY,
        libc::AF_PACKET,
        libc::AF_XDP,
        libc::AF_TIPC,
        libc::AF_RDS,
    ];
    let families = families.map(|family| family as u64);
    rules.insert(libc::SYS_socketpair, equal(0, &families)?);
    rules.insert(libc::SYS_socket, equal(0, &families)?);
    // podman's profile: the usual ones and the question, nothing that takes the randomness from addresses.
    let usual = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
    rules.insert(libc::SYS_personality, vec![all(&usual.map(|kind| (0, Ne, kind)))?]);
    if nested {
        return Ok(rules);
    }
    let spaces = [
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWNS,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWCGROUP,
    ];
    let flags: Result<Vec<_>, _> = spaces
        .iter()
        .map(|flag| when(0, SeccompCmpOp::MaskedEq(*flag as u32 as u64), *flag as u32 as u64))
        .collect();
    rules.insert(libc::SYS_clone, flags?);
    Ok(rules)
}

/// Calls that change owners, answered as done where one id is all there is: package managers then go on.
const OWNERSHIP: &[i64] = &[
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_setgroups,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_chown,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lchown,
];

impl Filters {
    pub fn compile(circumstances: Circumstances) -> Result<Self, FilterError> {
        let Circumstances { deny_unix_sockets, single, nested } = circumstances;
        let errno = |errno: i32| SeccompAction::Errno(errno as u32);
        let mut numbers: BTreeMap<i64, SeccompAction> =
            ALLOWED.iter().map(|(number, _)| (*number, SeccompAction::Allow)).collect();
        numbers.extend(DENIED.iter().map(|number| (*number, errno(libc::EPERM))));
        let of_namespaces = if nested { SeccompAction::Allow } else { errno(libc::EPERM) };
        numbers.extend(NAMESPACES.iter().map(|number| (*number, of_namespaces.clone())));
        let mut programs = vec![
            verdicts::compile(&numbers, &errno(libc::ENOSYS), architecture()?)?,
            program(denied_arguments(nested)?, SeccompAction::Allow, errno(libc::EPERM))?,
        ];
        // The audit system's messages are the machine's. As in podman's profile the answer is that of a kernel without one: told
        // that they may not, groupadd(8) and its like give up.
        let audit = all(&[(0, Eq, libc::AF_NETLINK as u64), (2, Eq, libc::NETLINK_AUDIT as u64)])?;
        let rules = [(libc::SYS_socket, vec![audit])].into();
        programs.push(program(rules, SeccompAction::Allow, errno(libc::EINVAL))?);
        if deny_unix_sockets {
            let unix = || when(0, Eq, libc::AF_UNIX as u64);
            let rules = [(libc::SYS_socket, vec![unix()?]), (libc::SYS_socketpair, vec![unix()?])];
            programs.push(program(rules.into(), SeccompAction::Allow, errno(libc::EAFNOSUPPORT))?);
        }
        if single {
            let rules = OWNERSHIP.iter().map(|number| (*number, vec![])).collect();
            programs.push(program(rules, SeccompAction::Allow, errno(0))?);
        }
        // The last one applied is asked first, and applying is a call of its own.
        Ok(Self(programs))
    }

    /// Bind this process to them; it needs `no_new_privs` or CAP_SYS_ADMIN in its user namespace.
    pub fn apply(&self) -> Result<(), FilterError> {
        self.0.iter().try_for_each(|program| seccompiler::apply_filter(program).map_err(failed("applied")))
    }
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
