//! A session's own process, from fork to exec: rights go first, then a byte of the environment may run.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use casemate_sandbox::control::Exec;
use casemate_sandbox::plan::{Ids, Network, Plan};
use landlock::{ABI, Access, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use nix::unistd::{Gid, Uid, execve, setgroups, setresgid, setresuid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::InitError;
use crate::filter::Filters;
use crate::login::{self, Program};
use crate::mounts::step;
use crate::sys;

/// What root of the inner namespace keeps: podman's default, enough for package managers.
const ROOT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);

/// Open files that a session may have at first.
const DESCRIPTORS: u64 = 1_024;

/// What all sessions of an environment share.
pub struct Sessions {
    pub plan: Plan,
    /// Of root (range) or of the user (single).
    pub inner: OwnedFd,
    pub filters: Filters,
}

/// What a session reads and writes.
pub enum Streams {
    Given([OwnedFd; 3]),
    /// The slave side.
    Terminal(OwnedFd),
}

impl Streams {
    /// To the session's own standard error, which is not descriptor 2 until the session is set up.
    fn complain(&self, message: &str) {
        let (Self::Given([_, _, error]) | Self::Terminal(error)) = self;
        // It may be closed; the exit status tells as well.
        let _ = rustix::io::write(error, format!("casemate: {message}\n").as_bytes());
    }
}

/// Abstract sockets and signals of the host stay outside, where the network is the host's. A plan without AF_UNIX needs no
/// Landlock for that: no process of the host's is in its pid namespace.
fn scope(plan: &Plan) -> Result<(), InitError> {
    if plan.network != Network::Host || (plan.deny_unix_sockets && can_scope().is_err()) {
        return Ok(());
    }
    let failed = |error: landlock::RulesetError| InitError::Landlock(error.to_string());
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .scope(Scope::from_all(ABI::V6))
        .and_then(|ruleset| ruleset.create())
        .and_then(|ruleset| ruleset.restrict_self())
        .map_err(failed)?;
    match status.ruleset {
        landlock::RulesetStatus::FullyEnforced => Ok(()),
        other => Err(InitError::Landlock(format!("{other:?}"))),
    }
}

/// Whether this kernel can scope sockets and signals at all.
pub fn can_scope() -> Result<(), InitError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .scope(Scope::from_all(ABI::V6))
        .and_then(|ruleset| ruleset.create())
        .map(|_| ())
        .map_err(|error| InitError::Landlock(error.to_string()))
}

/// Take all capabilities but `keep` out of the bounding set.
pub fn bound(keep: CapabilitySet) -> Result<(), InitError> {
    for capability in CapabilitySet::all().iter().filter(|capability| !keep.contains(*capability)) {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return step("drop a capability", Err(error)),
        }
    }
    Ok(())
}

impl Sessions {
    fn become_root(&self) -> Result<(), InitError> {
        if let Ids::Range { .. } = self.plan.ids {
            step("enter the inner namespace", setns(&self.inner, CloneFlags::CLONE_NEWUSER))?;
            step("drop groups", setgroups(&[]))?;
            let root = (Uid::from_raw(0), Gid::from_raw(0));
            step("become root", setresgid(root.1, root.1, root.1))?;
            step("become root", setresuid(root.0, root.0, root.0))?;
            // The crate that sets the filter forbids new privileges along with it, so set-id programs gain nothing here.
            scope(&self.plan)?;
            step("set the filter", self.filters.apply())?;
        } else {
            step("forbid new privileges", nix::sys::prctl::set_no_new_privs())?;
            scope(&self.plan)?;
            step("set the filter", self.filters.apply())?;
        }
        bound(ROOT)?;
        let sets = CapabilitySets { effective: ROOT, permitted: ROOT, inheritable: CapabilitySet::empty() };
        step("drop capabilities", rustix::thread::set_capabilities(None, sets))
    }

    fn become_user(&self) -> Result<(), InitError> {
        let user = &self.plan.user;
        match self.plan.ids {
            Ids::Range { .. } => {
                bound(CapabilitySet::empty())?;
                if !self.plan.grants.keep_groups {
                    step("drop groups", setgroups(&[]))?;
                }
                let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
                step("become the user", setresgid(gid, gid, gid))?;
                step("become the user", setresuid(uid, uid, uid))?;
            }
            Ids::Single { .. } => {
                step("enter the user's namespace", setns(&self.inner, CloneFlags::CLONE_NEWUSER))?;
                bound(CapabilitySet::empty())?;
            }
        }
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        step("drop capabilities", rustix::thread::set_capabilities(None, sets))?;
        step("forbid new privileges", nix::sys::prctl::set_no_new_privs())?;
        scope(&self.plan)?;
        step("set the filter", self.filters.apply())
    }

    /// The user in init's numbering.
    pub fn user(&self) -> Uid {
        match self.plan.ids {
            Ids::Range { user, .. } => Uid::from_raw(user),
            Ids::Single { .. } => Uid::from_raw(0),
        }
    }

    fn streams(streams: &Streams) -> Result<(), InitError> {
        step("begin a session", nix::unistd::setsid())?;
        match streams {
            Streams::Given(given) => {
                for (number, descriptor) in (0..).zip(given) {
                    step("hand over a stream", sys::install(descriptor, number))?;
                }
            }
            Streams::Terminal(slave) => {
                step("take the terminal", sys::control_terminal(slave.as_fd()))?;
                for number in 0..3 {
                    step("hand over the terminal", sys::install(slave, number))?;
                }
            }
        }
        step("close the rest", sys::close_on_exec_from(3))
    }

    fn prepare(&self, request: &Exec, streams: &Streams) -> Result<(), InitError> {
        let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
        for signal in Signal::iterator().filter(|signal| !matches!(signal, Signal::SIGKILL | Signal::SIGSTOP))
        {
            // SAFETY: the default action runs no code of ours.
            step("reset a signal", unsafe { sigaction(signal, &default) })?;
        }
        step("unblock signals", sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None))?;
        Self::streams(streams)?;
        // The daemon's own is high; select() knows 1,024 descriptors, and what needs more raises its limit.
        let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        limit.current = Some(limit.maximum.map_or(DESCRIPTORS, |most| most.min(DESCRIPTORS)));
        step("limit descriptors", rustix::process::setrlimit(rustix::process::Resource::Nofile, limit))?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        match sys::own_keyring() {
            // A kernel without keyrings has none to leak.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
            other => step("make a keyring", other)?,
        }
        if request.root {
            self.become_root()?
        } else {
            self.become_user()?
        }
        // As whom we are now: a directory that only init could enter is none for the session.
        if let Err(error) = nix::unistd::chdir(request.directory.as_str()) {
            if !request.directory_optional {
                return step(&format!("enter {:?}", request.directory), Err(error));
            }
            let home = if request.root { "/root" } else { self.plan.user.home.as_str() };
            step("enter /", nix::unistd::chdir(home).or_else(|_| nix::unistd::chdir("/")))?;
        }
        Ok(())
    }

    /// A session's command line, as ps(1) would show it at first.
    pub fn shown(&self, request: &Exec) -> Vec<String> {
        match request.command.is_empty() {
            true => vec![login::shown(&self.plan.user.shell)],
            false => request.command.clone(),
        }
    }

    /// A session's own variables, and those of the grants.
    fn variables(&self, request: &Exec) -> Vec<String> {
        let name = |variable: &String| variable.split('=').next().unwrap_or_default().to_owned();
        let mut all = request.environment.clone();
        let has: Vec<String> = all.iter().map(name).collect();
        let granted = self.plan.grants.variables.iter().filter(|variable| !has.contains(&name(variable)));
        if !request.root {
            all.extend(granted.cloned());
        }
        all
    }

    /// In the forked child: become the session, or end with 125 (we failed), 126 or 127.
    pub fn run(&self, request: &Exec, streams: Streams) -> ! {
        let code = match self.prepare(request, &streams) {
            Ok(()) => {
                let mut variables = self.variables(request);
                let program = if request.login {
                    let uid = if request.root { 0 } else { self.plan.user.uid };
                    login::program(uid, &self.plan.user.shell, &request.command, &mut variables)
                } else {
                    Program::plain(&request.command)
                };
                execute(&program, &variables, &streams)
            }
            Err(error) => {
                streams.complain(&format!("the session cannot be set up: {error}"));
                125
            }
        };
        // SAFETY: the child of a fork ends without running the parent's exit handlers.
        unsafe { libc::_exit(code) }
    }
}

/// Look the command up and execute it; return only with the exit code of a failure.
fn execute(program: &Program, variables: &[String], streams: &Streams) -> i32 {
    let to_c = |text: &String| CString::new(text.as_bytes());
    let (Ok(arguments), Ok(environment)) = (
        program.arguments.iter().map(to_c).collect::<Result<Vec<_>, _>>(),
        variables.iter().map(to_c).collect::<Result<Vec<_>, _>>(),
    ) else {
        streams.complain("the command line or a variable holds a NUL");
        return 125;
    };
    let name = &program.file;
    let path = variables.iter().find_map(|variable| variable.strip_prefix("PATH="));
    let candidates: Vec<CString> = if name.contains('/') {
        CString::new(name.as_bytes()).into_iter().collect()
    } else {
        let directories =
            path.unwrap_or("/usr/bin:/bin").split(':').filter(|directory| !directory.is_empty());
        directories.filter_map(|directory| CString::new(format!("{directory}/{name}")).ok()).collect()
    };
    let mut denied = None;
    for candidate in &candidates {
        match try_execute(candidate, &arguments, &environment) {
            nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR => {}
            error => denied = denied.or(Some(error)),
        }
    }
    match denied {
        Some(error) => {
            streams.complain(&format!("cannot execute {name:?}: {}", error.desc()));
            126
        }
        None => {
            streams.complain(&format!("{name:?}: command not found"));
            127
        }
    }
}

fn try_execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> nix::errno::Errno {
    match execve(path, arguments, environment) {
        Ok(never) => match never {},
        // A script without `#!`: as shells and execvp do.
        Err(nix::errno::Errno::ENOEXEC) => {
            let mut with_shell = vec![c"/bin/sh".to_owned(), path.to_owned()];
            with_shell.extend(arguments.iter().skip(1).cloned());
            match execve(c"/bin/sh", &with_shell, environment) {
                Ok(never) => match never {},
                Err(error) => error,
            }
        }
        Err(error @ (nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR)) => error,
        // A directory of that name, say, is as little a command as a missing one is.
        Err(error) => {
            let directory = std::fs::metadata(std::ffi::OsStr::from_bytes(path.to_bytes()))
                .is_ok_and(|meta| meta.is_dir());
            if directory { nix::errno::Errno::EACCES } else { error }
        }
    }
}
