//! xdg-dbus-proxy(1): the session bus, of which it lets pass what is granted. It is given the session bus's socket, programs
//! and libraries, and the user's runtime directory inside, and ends when its descriptor `--fd` is closed at the other end.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use casemate_sandbox::plan::{BUS, Bus, Plan};
use nix::mount::{MntFlags, MsFlags};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, execve, fork};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, FdFlags};
use rustix::mount::MountAttrFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::Pid;

use super::become_user;
use crate::InitError;
use crate::child::{Child, said};
use crate::filter::{Circumstances, Filters};
use crate::mounts::{attach, clone_tree, file_system, open_path, open_source, step};
use crate::sys;

/// It takes some 10 ms.
const START: Duration = Duration::from_secs(10);
/// Where systems keep programs and libraries; what a system does not have, or has as a link, is so in there.
const SYSTEM: [&str; 10] = ["bin", "gnu", "lib", "lib32", "lib64", "libx32", "nix", "opt", "sbin", "usr"];

/// Leave the host's file system for one with programs, libraries and the session bus's socket, `/bus`, and all other
/// namespaces of the host, but for the user namespace, which is the environment's outer one already.
pub fn enter_root(bus: &Bus) -> Result<(), InitError> {
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    step("make namespaces", unshare(spaces))?;
    let none = None::<&str>;
    let private = nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none);
    step("make mounts private", private)?;
    let socket = open_source(&bus.socket)?;
    let safe = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let root = file_system("tmpfs", &[("mode", "0755"), ("size", "64k")], safe)?;
    // Any directory will do: it is where the root hangs until it is the root.
    let place = step("open /sys", open_path(CWD, "/sys", OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS))?;
    step("mount the proxy's root", attach(&root, &place))?;
    for name in SYSTEM {
        step(&format!("show /{name} to the proxy"), show(&root, name))?;
    }
    let made = rustix::fs::openat(
        &root,
        "bus",
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    );
    step("make a place for the bus", made.map(drop))?;
    let target = step("open it", open_path(&root, "bus", OFlags::NOFOLLOW, ResolveFlags::BENEATH))?;
    let tree = step("take the bus", clone_tree(socket.as_fd(), false))?;
    step("mount the bus", attach(&tree, &target))?;
    step("seal the proxy's root", sys::mount_setattr(root.as_fd(), sys::ATTR_RDONLY, false))?;
    step("enter the proxy's root", rustix::process::fchdir(&root))?;
    step("change the root", nix::unistd::pivot_root(".", "."))?;
    step("leave the host's root", nix::mount::umount2(".", MntFlags::MNT_DETACH))?;
    step("enter the proxy's root", nix::unistd::chdir("/"))
}

/// One directory of the host's root, read-only with all beneath it, or the link that stands there.
fn show(root: &OwnedFd, name: &str) -> std::io::Result<()> {
    let path = format!("/{name}");
    let found = match rustix::fs::lstat(&path) {
        Err(Errno::NOENT) => return Ok(()),
        found => FileType::from_raw_mode(found?.st_mode),
    };
    match found {
        FileType::Symlink => {
            rustix::fs::symlinkat(std::fs::read_link(&path)?, root, name)?;
        }
        FileType::Directory => {
            let source = open_path(CWD, &path, OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS)?;
            let tree = clone_tree(source.as_fd(), true)?;
            let attributes = sys::ATTR_RDONLY | sys::ATTR_NOSUID | sys::ATTR_NODEV;
            sys::mount_setattr(tree.as_fd(), attributes, true)?;
            rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755))?;
            attach(&tree, &open_path(root, name, OFlags::DIRECTORY, ResolveFlags::BENEATH)?)?;
        }
        _ => {}
    }
    Ok(())
}

/// Only what is named passes; `--filter` comes first, since without it everything would.
fn arguments(bus: &Bus, descriptor: i32) -> Vec<String> {
    let mut arguments = vec![
        bus.proxy.clone(),
        format!("--fd={descriptor}"),
        "unix:path=/bus".to_owned(),
        BUS.to_owned(),
        "--filter".to_owned(),
    ];
    arguments.extend(bus.talk.iter().map(|name| format!("--talk={name}")));
    arguments.extend(bus.own.iter().map(|name| format!("--own={name}")));
    arguments
}

pub struct Proxy {
    child: Child,
    /// The proxy's `--fd`.
    _life: OwnedFd,
}

impl Proxy {
    /// PID 1 of its namespace; [`enter_root`] comes before. Until it listens, in `directory`.
    pub fn start(bus: &Bus, plan: &Plan, directory: &OwnedFd, end: &OwnedFd) -> Result<Self, InitError> {
        let failed = |what: &str| InitError::Desktop(format!("session bus: {} {what}", bus.proxy));
        let to_c =
            |text: &String| CString::new(text.as_bytes()).map_err(|_| failed("has a NUL in its arguments"));
        let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = step("make a socket", pair)?;
        let (errors, errors_in) = step("make a pipe", std::io::pipe())?;
        let errors_in = OwnedFd::from(errors_in);
        let program = to_c(&bus.proxy)?;
        let arguments = arguments(bus, theirs.as_raw_fd()).iter().map(to_c).collect::<Result<Vec<_>, _>>()?;
        let filters = step("compile the filters", Filters::compile(Circumstances::default()))?;
        // SAFETY: the keeper has a single thread.
        let child = match step("fork", unsafe { fork() })? {
            ForkResult::Child => {
                let ready = || -> Result<(), InitError> {
                    step("hand over a stream", sys::install(&errors_in, 1))?;
                    step("hand over a stream", sys::install(&errors_in, 2))?;
                    step("hand over a socket", rustix::io::fcntl_setfd(&theirs, FdFlags::empty()))?;
                    step("enter the runtime directory", rustix::process::fchdir(directory))?;
                    become_user(plan)?;
                    // It is forgotten where ids change.
                    step("die with the keeper", prctl::set_pdeathsig(Signal::SIGKILL))?;
                    // Standard error is a pipe that nobody reads for long: writing to it is to fail, not to kill. Rust's start has
                    // seen to that, and exec keeps what is ignored.
                    step("set the filter", filters.apply())
                };
                match ready() {
                    Err(error) => eprintln!("{error}"),
                    Ok(()) => {
                        let Err(error) = execve::<_, CString>(&program, &arguments, &[]);
                        eprintln!("cannot execute it: {error}");
                    }
                }
                // SAFETY: exit handlers are the launcher's.
                unsafe { libc::_exit(127) }
            }
            ForkResult::Parent { child } => {
                let pid = Pid::from_raw(child.as_raw()).ok_or(InitError::Descriptors)?;
                step("open a pidfd", Child::new(pid))?
            }
        };
        drop((theirs, errors_in));
        let over = Instant::now() + START;
        loop {
            let left = over.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::ZERO);
            let mut descriptors = [
                PollFd::new(ours.as_fd(), PollFlags::POLLIN),
                PollFd::new(child.as_fd(), PollFlags::POLLIN),
                PollFd::new(end.as_fd(), PollFlags::empty()),
            ];
            match poll(&mut descriptors, timeout) {
                Err(nix::errno::Errno::EINTR) => continue,
                Ok(0) => return Err(failed(&format!("was not ready within {} s", START.as_secs()))),
                other => step("wait for the proxy", other)?,
            };
            break;
        }
        match nix::unistd::read(&ours, &mut [0]) {
            Ok(1) => Ok(Self { child, _life: ours }),
            _ => {
                drop(child);
                Err(failed(&format!("ended at once: {}", said(File::from(OwnedFd::from(errors))).join("; "))))
            }
        }
    }

    /// Readable when it has ended.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_sandbox::plan::{Inode, Source};

    #[test]
    fn it_filters() {
        let bus = Bus {
            proxy: "/usr/bin/xdg-dbus-proxy".into(),
            socket: Source { path: "/run/user/1/bus".into(), inode: Inode { device: 1, inode: 2 } },
            talk: vec!["org.a.*".into()],
            own: vec!["org.b.C".into()],
        };
        assert_eq!(
            arguments(&bus, 5)[1..],
            ["--fd=5", "unix:path=/bus", "bus", "--filter", "--talk=org.a.*", "--own=org.b.C"]
        );
    }
}
