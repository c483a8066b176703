//! How a worker locks itself up before it reads its request: namespaces, an empty or single-directory root, no
//! capabilities but those listed, `no_new_privs`, limits, Landlock, seccomp. Whatever fails, the worker exits.
//!
//! Two processes: the one that the daemon started makes the namespaces and waits; its child, PID 1 of a pid namespace,
//! does the work. When either dies, so does the other.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::namespaces::{ChildProc, become_root, enter_user_namespace, step};
pub use crate::namespaces::{Ids, User};
use crate::protocol::FD_FIRST;
use crate::seccomp::{self, Allowed, SeccompError};

/// What a worker sees as `/`.
#[derive(Debug, Clone, Copy)]
pub enum RootDirectory {
    /// Nothing at all.
    Empty,
    /// The directory that [`FD_FIRST`] is; its sub-directories `hide` are covered.
    Descriptor { hide: &'static [&'static str] },
}

#[derive(Debug, Clone, Copy)]
pub struct Profile {
    pub name: &'static str,
    pub ids: Ids,
    pub root: RootDirectory,
    /// Keep the host's network.
    pub network: bool,
    /// Descriptors from [`FD_FIRST`] on that are kept.
    pub descriptors: i32,
    /// What root of the namespace keeps.
    pub capabilities: CapabilitySet,
    /// Most bytes of address space.
    pub memory: u64,
    /// Most bytes of a file written.
    pub file_size: u64,
    /// Beside the base list.
    pub syscalls: &'static [Allowed],
}

#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    #[error("cannot {what}: {source}")]
    Step { what: &'static str, source: std::io::Error },
    #[error("started with wrong arguments or answers; workers are started by casemated")]
    Arguments,
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    #[error("cannot set up Landlock: {0}")]
    Landlock(String),
}

/// Exit codes of workers that fail before they can say why in an event.
pub mod exit {
    /// Done, or failed and said so.
    pub const OK: u8 = 0;
    /// Confinement failed; the request was not read.
    pub const UNCONFINED: u8 = 70;
    /// The request could not be read.
    pub const REQUEST: u8 = 71;
    /// The worker panicked: a bug.
    pub const PANIC: u8 = 72;
    /// Plus its number: the signal that killed the child that does the work.
    pub const SIGNAL: u8 = 128;
}

/// Close everything from `first` on.
pub fn close_from(first: i32) -> Result<(), ConfineError> {
    let first = u32::try_from(first).map_err(|_| ConfineError::Arguments)?;
    // SAFETY: close_range takes no pointers. The descriptors it closes are ones that nobody in this process has taken
    // into an OwnedFd: it runs first thing in a process that was just executed.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    step("close inherited descriptors", nix::errno::Errno::result(result).map(drop))
}

fn die_with_parent() -> Result<(), ConfineError> {
    step("ask to die with the parent", nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL))
}

/// A parent that died before we asked to die with it would never be missed. It is out of sight in its own pid namespace:
/// `getppid` is 0 either way.
fn parent_lives(parent: OwnedFd) -> Result<(), ConfineError> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut ended = [PollFd::new(&parent, PollFlags::IN)];
    match step("look at the parent", poll(&mut ended, Some(&Timespec::default())))? {
        0 => Ok(()),
        _ => Err(ConfineError::Arguments),
    }
}

fn borrow(descriptor: i32) -> BorrowedFd<'static> {
    // SAFETY: the daemon opened FD_FIRST and its successors for this process before exec, and nobody closes them.
    unsafe { BorrowedFd::borrow_raw(descriptor) }
}

/// Lock up. Returns in the child, confined, with the names of the layers in force. In the process that was started it
/// does not return: that one waits for the child and exits with its status.
pub fn confine(
    profile: &Profile,
    user: User,
    announce: impl FnOnce() -> std::io::Result<()>,
) -> Result<Vec<String>, ConfineError> {
    let parent = nix::unistd::getppid();
    if let RootDirectory::Descriptor { .. } = profile.root {
        // Now, since the working directory follows into the new mount namespace, which a descriptor does not.
        step("enter the directory", rustix::process::fchdir(borrow(FD_FIRST)))?;
    }
    enter_user_namespace(profile.ids, user, announce)?;
    die_with_parent()?;
    if nix::unistd::getppid() != parent {
        return Err(ConfineError::Arguments);
    }
    let mut spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    let mut layers = vec!["userns", "mountns", "pidns", "ipcns", "utsns", "cgroupns"];
    if !profile.network {
        spaces |= CloneFlags::CLONE_NEWNET;
        layers.push("netns");
    }
    step("make namespaces", unshare(spaces))?;
    let inner = profile.ids == Ids::Inner && user.range;
    let (mut to_parent, mut to_child) = (None, None);
    if inner {
        to_parent = Some(step("make a pipe", nix::unistd::pipe())?);
        to_child = Some(step("make a pipe", nix::unistd::pipe())?);
    }
    let me = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
    let me = step("hold the parent", me)?;
    // SAFETY: this process has a single thread: `run` is called first thing in main, and nothing before it starts one.
    match step("fork", unsafe { fork() })? {
        ForkResult::Parent { child } => {
            let proc = if inner { Some(ChildProc::open(child.as_raw())?) } else { None };
            if let (Some(proc), Some((ready, ready_in)), Some((_, go))) = (proc, to_parent, to_child) {
                drop(ready_in);
                // Its /proc is open: now the child may take the root, and with it our /proc, away.
                step("let the child go on", nix::unistd::write(&go, b"\n"))?;
                let mut byte = [0];
                if step("wait for the inner namespace", nix::unistd::read(&ready, &mut byte))? == 1 {
                    proc.write_inner(user)?;
                    step("answer the child", nix::unistd::write(&go, b"\n"))?;
                }
            }
            wait_and_exit(child)
        }
        ForkResult::Child => {
            die_with_parent()?;
            if let Some((go, _)) = &to_child {
                let mut byte = [0];
                if step("wait for the parent", nix::unistd::read(go, &mut byte))? != 1 {
                    return Err(ConfineError::Arguments);
                }
            }
            layers.push(enter_root(profile.root)?);
            if let (Some((_, ready)), Some((go, go_in))) = (to_parent, to_child) {
                drop(go_in);
                // Our maps are written by our parent: for that moment our files in /proc must be its own.
                step("be dumpable", nix::sys::prctl::set_dumpable(true))?;
                step("make the inner user namespace", unshare(CloneFlags::CLONE_NEWUSER))?;
                step("announce the inner namespace", nix::unistd::write(&ready, b"\n"))?;
                let mut byte = [0];
                if step("wait for the inner id map", nix::unistd::read(&go, &mut byte))? != 1 {
                    return Err(ConfineError::Arguments);
                }
                become_root(true)?;
                die_with_parent()?;
            }
            parent_lives(me)?;
            limits(profile)?;
            drop_capabilities(profile.capabilities)?;
            step("forbid new privileges", nix::sys::prctl::set_no_new_privs())?;
            step("be undumpable", nix::sys::prctl::set_dumpable(false))?;
            layers.push("no_new_privs");
            let mut layers: Vec<String> = layers.into_iter().map(str::to_owned).collect();
            layers.extend(restrict_files(profile.root)?);
            seccomp::apply(profile.syscalls)?;
            layers.push("seccomp".to_owned());
            Ok(layers)
        }
    }
}

fn wait_and_exit(child: nix::unistd::Pid) -> ! {
    // It holds nothing that matters, but let it hold less: the pipe's other end must close with the child.
    let closed = close_from(0);
    let locked = closed
        .and_then(|()| drop_capabilities(CapabilitySet::empty()))
        .and_then(|()| step("forbid new privileges", nix::sys::prctl::set_no_new_privs()))
        .and_then(|()| step("be undumpable", nix::sys::prctl::set_dumpable(false)))
        .and_then(|()| seccomp::apply(&[Allowed(libc::SYS_wait4, &[])]).map_err(ConfineError::from));
    // Where that fails, our end is the child's as well.
    let code = match locked.map(|()| waitpid(child, None)) {
        Ok(Ok(WaitStatus::Exited(_, code))) => code,
        Ok(Ok(WaitStatus::Signaled(_, signal, _))) => i32::from(exit::SIGNAL) + signal as i32,
        _ => exit::UNCONFINED.into(),
    };
    std::process::exit(code)
}

/// Make the root of our own mount namespace what the profile says.
pub fn enter_root(root: RootDirectory) -> Result<&'static str, ConfineError> {
    let none = None::<&str>;
    step("make mounts private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let name = match root {
        RootDirectory::Empty => {
            // Any directory will do as the place: nobody sees it there.
            step(
                "mount an empty root",
                mount(Some("none"), "/proc", Some("tmpfs"), safe, Some("size=4k,nr_inodes=2,mode=0555")),
            )?;
            step("enter the root", nix::unistd::chdir("/proc"))?;
            "empty-root"
        }
        RootDirectory::Descriptor { hide } => {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let tree = step("take the directory", rustix::mount::open_tree(rustix::fs::CWD, ".", flags))?;
            let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            step("mount the directory", rustix::mount::move_mount(&tree, "", rustix::fs::CWD, ".", empty))?;
            step("enter the root", rustix::process::fchdir(&tree))?;
            step(
                "restrict the root",
                mount(none, ".", none, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | safe, none),
            )?;
            for directory in hide {
                let flags = safe | MsFlags::MS_RDONLY;
                step(
                    "hide a directory",
                    mount(
                        Some("none"),
                        *directory,
                        Some("tmpfs"),
                        flags,
                        Some("size=4k,nr_inodes=2,mode=0555"),
                    ),
                )?;
            }
            "directory-root"
        }
    };
    step("change the root", nix::unistd::pivot_root(".", "."))?;
    step("leave the old root", umount2(".", MntFlags::MNT_DETACH))?;
    step("enter the root", nix::unistd::chdir("/"))?;
    match root {
        RootDirectory::Empty => {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | safe;
            step("seal the root", mount(none, "/", none, flags, none))?;
        }
        RootDirectory::Descriptor { .. } => {
            // The inherited descriptor is of the mount outside: links from there to here would cross mounts.
            use rustix::fs::{Mode, OFlags};
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let inside = step("open the root", rustix::fs::open("/", flags, Mode::empty()))?;
            // SAFETY: FD_FIRST is open and owned by nobody in this process; it is replaced, and forgotten again below.
            let mut first = unsafe { OwnedFd::from_raw_fd(FD_FIRST) };
            let replaced = step("replace the directory's descriptor", rustix::io::dup2(&inside, &mut first));
            std::mem::forget(first);
            replaced?;
        }
    }
    Ok(name)
}

fn limits(profile: &Profile) -> Result<(), ConfineError> {
    let all = [
        (Resource::RLIMIT_AS, profile.memory),
        (Resource::RLIMIT_FSIZE, profile.file_size),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, 0),
        (Resource::RLIMIT_NOFILE, 1_024),
    ];
    for (resource, limit) in all {
        let hard = step("read a limit", nix::sys::resource::getrlimit(resource))?.1;
        step("set a limit", setrlimit(resource, limit.min(hard), limit.min(hard)))?;
    }
    Ok(())
}

/// Keep exactly `keep`, now and for ever.
pub fn drop_capabilities(keep: CapabilitySet) -> Result<(), ConfineError> {
    for capability in CapabilitySet::all().iter() {
        if !keep.contains(capability) {
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                // A capability that this kernel does not know.
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                // Without SETPCAP, which an unprivileged process never has: it has no capabilities to bound either.
                Err(rustix::io::Errno::PERM) if keep.is_empty() => {}
                Err(error) => return step("drop a capability", Err(error)),
            }
        }
    }
    let sets = CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() };
    step("drop capabilities", rustix::thread::set_capabilities(None, sets))
}

/// Landlock: nothing, or only what is beneath `/`. Not there on old kernels, which the daemon is told by its absence.
fn restrict_files(root: RootDirectory) -> Result<Option<String>, ConfineError> {
    let failed = |error: landlock::RulesetError| ConfineError::Landlock(error.to_string());
    let abi = ABI::V5;
    let created = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|ruleset| ruleset.create())
        .map_err(failed)?;
    let ruled = match root {
        RootDirectory::Empty => created,
        RootDirectory::Descriptor { .. } => created
            .add_rule(PathBeneath::new(borrow(FD_FIRST).as_fd(), AccessFs::from_all(abi)))
            .map_err(failed)?,
    };
    let status = ruled.restrict_self().map_err(failed)?;
    Ok(match status.ruleset {
        landlock::RulesetStatus::NotEnforced => None,
        _ => Some("landlock".to_owned()),
    })
}
