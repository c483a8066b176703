//! `casemate-init`: PID 1 of an environment. It sets up what its plan says, then starts every session, until it is told to
//! stop or the last session has ended.
//!
//! The process that the daemon starts makes the namespaces, forks the one that becomes PID 1, and ends when that one is
//! ready: so an environment is nobody's child but the host's init's, and no daemon's end touches it. Until then each dies
//! with its parent (PR_SET_PDEATHSIG), so that a daemon killed in the middle leaves nothing.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

mod account;
mod apart;
mod child;
mod desktop;
mod filter;
mod group;
mod handover;
mod inside;
mod keeper;
mod login;
mod mounts;
mod network;
mod server;
mod service;
mod session;
mod sys;
mod syscalls;
mod terminal;
mod utmp;
mod verdicts;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use casemate_sandbox::control::Ready;
use casemate_sandbox::plan::{Ids, Network, Plan};
use casemate_worker::confine::{ConfineError, User, close_from, exit};
use casemate_worker::ids;
use casemate_worker::namespaces::{self, enter_user_namespace};
use casemate_worker::protocol::{Event, FD_EVENTS, FD_FIRST, Failure, FailureKind};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{ForkResult, Gid, Uid, fork};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::group::{Group, fork_into};
use crate::mounts::step;

/// Most bytes of a plan.
const PLAN_MAX: u64 = 4 << 20;
/// The control socket, bound by the daemon.
const FD_CONTROL: i32 = FD_FIRST;
/// What follows it as the plan says: the directory of the control group to be born in, the log of the command.
const MORE: i32 = 2;

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error("cannot {what}: {source}")]
    Step { what: String, source: std::io::Error },
    #[error("{path:?} is not what the daemon judged: it was swapped meanwhile")]
    Swapped { path: String },
    #[error(
        "device {name:?}: {path} can be opened by a group of yours alone, and sessions are in none: give yourself access \
         (`setfacl -m u:$USER:rw {path}`, or a udev rule with TAG+=\"uaccess\"), or set keep_groups in policy.toml, [devices]"
    )]
    Group { name: String, path: String },
    #[error("the image's /etc/{file} is no text file of a sane size")]
    AccountFile { file: String },
    #[error(
        "this kernel's Landlock can't keep sockets and signals apart ({0}); network = \"host\" needs Linux 6.12 or later"
    )]
    Landlock(String),
    #[error("network: {0}")]
    Network(String),
    #[error("{0}")]
    Desktop(String),
    /// What a keeper said.
    #[error("{0}")]
    Keeper(String),
    #[error("descriptors are missing from the request")]
    Descriptors,
    #[error("the descriptor for the exit status is no pipe")]
    Status,
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error("the plan cannot be read: {0}")]
    Plan(String),
}

impl From<filter::FilterError> for std::io::Error {
    fn from(error: filter::FilterError) -> Self {
        Self::other(error.to_string())
    }
}

fn send<T: serde::Serialize>(events: &mut File, event: &Event<T>) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    events.write_all(&line)
}

fn die_with_parent(yes: bool) -> Result<(), InitError> {
    let signal = if yes { Some(Signal::SIGKILL) } else { None };
    step("tie our life to the daemon's", prctl::set_pdeathsig(signal))
}

/// A user namespace within ours, made by a child that ends when it is held. It is begun before the mounts are made, since
/// the child makes it meanwhile.
struct Inner {
    child: nix::unistd::Pid,
    ready: OwnedFd,
    go: OwnedFd,
}

impl Inner {
    fn begin() -> Result<Self, InitError> {
        let (ready, ready_in) = step("make a pipe", nix::unistd::pipe())?;
        let (go_out, go) = step("make a pipe", nix::unistd::pipe())?;
        // SAFETY: init has a single thread; the child makes system calls alone and ends.
        match step("fork", unsafe { fork() })? {
            ForkResult::Parent { child } => Ok(Self { child, ready, go }),
            ForkResult::Child => {
                drop(go);
                // Dumpable for as long as its maps are written: else its files in /proc belong to nobody in here.
                let done = prctl::set_dumpable(true)
                    .and_then(|()| unshare(CloneFlags::CLONE_NEWUSER))
                    .and_then(|()| nix::unistd::write(&ready_in, b"\n").map(drop))
                    .and_then(|()| nix::unistd::read(&go_out, &mut [0]).map(drop));
                // SAFETY: the child of a fork ends without running the parent's exit handlers.
                unsafe { libc::_exit(i32::from(done.is_err())) }
            }
        }
    }

    /// What is left of it is this descriptor.
    fn hold(self, plan: &Plan, proc: &OwnedFd) -> Result<OwnedFd, InitError> {
        let count = step("wait for the inner namespace", nix::unistd::read(&self.ready, &mut [0]))?;
        if count != 1 {
            let died = std::io::Error::other("the child that makes it died");
            return step("make the inner namespace", Err(died));
        }
        let (users, groups) = match plan.ids {
            Ids::Range { user, group } => (ids::to_text(&ids::inner(user)), ids::to_text(&ids::inner(group))),
            Ids::Single { user, group } => (format!("{user} 0 1"), format!("{group} 0 1")),
        };
        let open = |name: &str, flags: OFlags| {
            let path = format!("{}/{name}", self.child.as_raw());
            rustix::fs::openat(proc, path, flags | OFlags::CLOEXEC, Mode::empty())
        };
        let write = |name: &str, text: &str| {
            let file = step(&format!("open {name}"), open(name, OFlags::WRONLY))?;
            step(&format!("write {name}"), File::from(file).write_all(text.as_bytes()))
        };
        if let Ids::Single { .. } = plan.ids {
            write("setgroups", "deny")?;
        }
        write("uid_map", &users)?;
        write("gid_map", &groups)?;
        let namespace = step("hold the inner namespace", open("ns/user", OFlags::RDONLY))?;
        drop(self.go);
        step("wait for a child", nix::sys::wait::waitpid(self.child, None))?;
        Ok(namespace)
    }
}

fn inode(proc: &OwnedFd, path: &str) -> Result<u64, InitError> {
    let stat = rustix::fs::statat(proc, path, rustix::fs::AtFlags::empty());
    Ok(step("look at a namespace", stat)?.st_ino)
}

/// What was begun before init was there.
struct Begun {
    desktop: Option<desktop::Desktop>,
    connection: Option<network::Connection>,
    apart: Option<apart::Child>,
}

/// PID 1, from its birth to its end.
fn init(
    plan: Plan,
    events: &mut File,
    parent: OwnedFd,
    log: Option<OwnedFd>,
    begun: Begun,
) -> Result<(), InitError> {
    let Begun { desktop, connection, apart } = begun;
    die_with_parent(true)?;
    // Here, and not with the others: its root is the group that we are in.
    step("make a control group namespace", unshare(CloneFlags::CLONE_NEWCGROUP))?;
    if plan.network == Network::Host && !plan.deny_unix_sockets {
        session::can_scope()?;
    }
    let inner = Inner::begin()?;
    let (tree, proc) = mounts::build(&plan, apart)?;
    if let Some(desktop) = &desktop {
        desktop.attach(&tree.runtime_directory(&plan)?)?;
    }
    if plan.write_account {
        account::write(tree.descriptor(), &plan.user, plan.ids)?;
    }
    let inner = inner.hold(&plan, &proc)?;
    if !plan.grants.nested_namespaces {
        tree.forbid_user_namespaces()?;
    }
    let inner_inode = step("look at a namespace", rustix::fs::fstat(&inner))?.st_ino;
    let namespaces = [inode(&proc, "self/ns/user")?, inner_inode, inode(&proc, "self/ns/pid")?];
    step("set the host name", nix::unistd::sethostname(&plan.hostname))?;
    let utmp = tree.utmp()?;
    if let (Some(desktop), wayland) = (&desktop, &plan.grants.wayland)
        && desktop.ready()?
        && let Some(wayland) = wayland
    {
        tree.compositor(&plan, &wayland.socket)?;
    }
    mounts::enter(tree)?;
    let inside = match (&plan.sudo, plan.ids) {
        (Some(sudo), Ids::Range { user, group }) if sudo.granted => {
            Some(inside::Inside::listen(Uid::from_raw(user), Gid::from_raw(group))?)
        }
        // With one id root and the user are the same: the socket is already theirs.
        (Some(sudo), Ids::Single { .. }) if sudo.granted => {
            Some(inside::Inside::listen(Uid::from_raw(0), Gid::from_raw(0))?)
        }
        _ => None,
    };
    drop(proc);

    // What sessions are started with, and no more; a session's bounding set is cut further in the session.
    let single = matches!(plan.ids, Ids::Single { .. });
    let keep = CapabilitySet::SETUID | CapabilitySet::SETGID | CapabilitySet::SETPCAP | CapabilitySet::KILL;
    let keep = if single { CapabilitySet::all() } else { keep };
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    if !single {
        step("drop capabilities", rustix::thread::set_capabilities(None, sets))?;
    }
    step("be undumpable", prctl::set_dumpable(false))?;

    let circumstances = filter::Circumstances {
        deny_unix_sockets: plan.deny_unix_sockets,
        single,
        nested: plan.grants.nested_namespaces,
    };
    let filters = step("compile the filters", filter::Filters::compile(circumstances))?;
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGPIPE] {
        mask.add(signal);
    }
    step("block signals", mask.thread_block())?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
    let signals = step("read signals", signals)?;
    // SAFETY: the daemon opened FD_CONTROL for init, and nothing else takes it.
    let listener = unsafe { OwnedFd::from_raw_fd(FD_CONTROL) };
    step(
        "keep the control socket from sessions",
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC),
    )?;
    if let Some(connection) = &connection {
        connection.ready()?;
    }
    // Only now: the kernel notes who listens, and that is whom a daemon takes for the environment.
    step("listen", rustix::net::listen(&listener, 16))?;
    die_with_parent(false)?;
    let [outer_user_namespace, inner_user_namespace, _] = namespaces;
    let ready = Ready { outer_user_namespace, inner_user_namespace };
    step("tell the daemon", send(events, &Event::Done { result: ready }))?;
    // The pipe must not live on: neither in us nor in sessions.
    step(
        "close the events pipe",
        File::open("/dev/null").and_then(|null| sys::install(&null.into(), FD_EVENTS)),
    )?;
    step("close the events pipe", rustix::io::fcntl_setfd(&*events, rustix::io::FdFlags::CLOEXEC))?;
    step("tell our parent", nix::unistd::write(&parent, b"\n"))?;
    drop(parent);
    let supervisor =
        plan.service.clone().zip(log).map(|(service, log)| service::Supervisor::new(service, log));
    let sessions = session::Sessions { plan, inner, filters };
    server::Server { sessions, listener, signals, namespaces, utmp, inside }.serve(supervisor)?;
    let ended = desktop.map_or(Ok(()), desktop::Desktop::end);
    connection.map_or(Ok(()), network::Connection::end).and(ended)
}

fn launch(events: &mut File) -> Result<(), InitError> {
    close_from(FD_CONTROL + MORE + 1)?;
    let user = User::from_arguments(std::env::args().skip(1))?;
    let daemon = nix::unistd::getppid();
    enter_user_namespace(namespaces::Ids::OuterInGroups, user, || send::<()>(events, &Event::Unshared))?;
    die_with_parent(true)?;
    if nix::unistd::getppid() != daemon {
        return Err(ConfineError::Arguments.into());
    }
    let mut text = Vec::new();
    let size = step("read the plan", std::io::stdin().lock().take(PLAN_MAX + 1).read_to_end(&mut text))?;
    if size as u64 > PLAN_MAX {
        return Err(InitError::Plan(format!("longer than {PLAN_MAX} bytes")));
    }
    let plan: Plan = serde_json::from_slice(&text).map_err(|error| InitError::Plan(error.to_string()))?;
    if plan.version != casemate_sandbox::plan::VERSION {
        return Err(InitError::Plan(format!("it has version {}", plan.version)));
    }
    let in_groups = matches!(plan.ids, Ids::Range { .. }) && plan.grants.keep_groups;
    if matches!(plan.ids, Ids::Range { .. }) && !plan.grants.keep_groups {
        step("drop groups", nix::unistd::setgroups(&[]))?;
    }
    // Descriptor 0 is the daemon's pipe no more.
    let null = step("open /dev/null", File::open("/dev/null"))?;
    step("close standard input", sys::install(&null.into(), 0))?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    let mut next = FD_CONTROL + 1;
    let mut take = |is_there: bool| {
        let raw = next;
        next += i32::from(is_there);
        // SAFETY: the daemon opened it for us, as the plan says, and nothing else takes it.
        let taken = is_there.then(|| unsafe { OwnedFd::from_raw_fd(raw) });
        let close = taken.as_ref().map(|one| rustix::io::fcntl_setfd(one, rustix::io::FdFlags::CLOEXEC));
        step("keep a descriptor from sessions", close.unwrap_or(Ok(()))).map(|()| taken)
    };
    let group = take(plan.born_in_group)?.map(|directory| Group { directory, ids: plan.ids });
    let log = take(plan.service.is_some())?;
    close_from(next)?;
    let launcher = keeper::Launcher { group: group.as_ref(), in_groups };
    let desktop = desktop::begin(&plan, &launcher)?;
    let (mut connection, mut apart) = (None, None);
    match &plan.network {
        Network::None => apart = Some(apart::begin()?),
        Network::Private(private) => {
            let begun = network::begin(private, &launcher)?;
            // By itself: what attaching starts would be PID 1 of the new pid namespace, and the last one of it.
            step("make a network namespace", unshare(CloneFlags::CLONE_NEWNET))?;
            begun.attach(private)?;
            connection = Some(begun);
        }
        Network::Host => {}
    }
    step("make namespaces", unshare(spaces))?;
    let (ready, ready_in) = step("make a pipe", nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC))?;
    // SAFETY: this process has a single thread.
    match step("fork", unsafe { fork_into(group.as_ref()) })? {
        ForkResult::Child => {
            drop((ready, group));
            let apart = apart.map(|(_, child)| child);
            let result = init(plan, events, ready_in, log, Begun { desktop, connection, apart });
            if let Err(error) = &result {
                eprintln!("casemate-init: {error}");
                let failure = Failure::new(FailureKind::Io, "sandbox", error.to_string());
                // A daemon that is gone, or was told of readiness, needs no word.
                let _ = send::<()>(events, &Event::Failed { failure });
            }
            // SAFETY: init ends here; exit handlers are the other process's.
            unsafe { libc::_exit(i32::from(result.is_err())) }
        }
        ForkResult::Parent { child } => {
            drop(ready_in);
            if let Some((parent, _)) = apart {
                parent.make()?;
            }
            // Who finds the control socket open is to know that init lives.
            // SAFETY: the daemon opened FD_CONTROL for init, and nothing in this process has taken it.
            drop(unsafe { OwnedFd::from_raw_fd(FD_CONTROL) });
            if nix::unistd::getppid() != daemon {
                return Err(ConfineError::Arguments.into());
            }
            let mut byte = [0];
            match step("wait for init", nix::unistd::read(&ready, &mut byte))? {
                1 => Ok(()),
                _ => {
                    // It said why.
                    step("wait for init", nix::sys::wait::waitpid(child, None))?;
                    std::process::exit(exit::UNCONFINED.into())
                }
            }
        }
    }
}

fn main() -> ExitCode {
    // SAFETY: the daemon opened FD_EVENTS for this process, and nothing else takes it.
    let mut events = unsafe { File::from_raw_fd(FD_EVENTS) };
    match launch(&mut events) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemate-init: {error}");
            let failure = Failure::new(FailureKind::Io, "sandbox", error.to_string());
            // A daemon that is gone needs no word.
            let _ = send::<()>(&mut events, &Event::Failed { failure });
            exit::UNCONFINED.into()
        }
    }
}
