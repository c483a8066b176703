//! Where attempts are shown to succeed: outside, or in a sandbox made by hand that has namespaces and nothing else.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use casemate_tests::escapes::{End, Targets};
use casemate_worker::ids::{self, Extent, IdMode};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;

use crate::attempt::{Attempt, Control, Done, Guard, in_child};
use crate::{call, filter, run};

/// Programs that make whoever executes them more, where the targets have them: `set-id` and `capable`.
pub fn prepare(directory: &str) -> io::Result<()> {
    let (set_id, capable) = (format!("{directory}/set-id"), format!("{directory}/capable"));
    for path in [&set_id, &capable] {
        std::fs::copy("/proc/self/exe", path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    std::fs::set_permissions(set_id, std::fs::Permissions::from_mode(0o4755))?;
    // linux/capability.h, struct vfs_cap_data of version 2: effective, CAP_NET_RAW.
    let data = [0x0200_0001u32, 1 << 13, 0, 0, 0];
    let path = crate::attempt::c(&capable);
    call!(libc::SYS_setxattr, path.as_c_str(), c"security.capability", data.as_ptr(), size_of_val(&data), 0)?;
    Ok(())
}

fn map(program: &std::path::Path, child: i32, map: &[Extent]) -> io::Result<()> {
    let words = map.iter().flat_map(|(inside, outside, count)| [*inside, *outside, *count]);
    let status =
        Command::new(program).arg(child.to_string()).args(words.map(|word| word.to_string())).status()?;
    if status.success() { Ok(()) } else { Err(io::Error::other("the ids cannot be mapped")) }
}

fn file_systems() -> io::Result<()> {
    let none = None::<&str>;
    let safe = MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("proc"), "/proc", Some("proc"), safe, none)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), safe, none)?;
    mount(Some("tmpfs"), "/tmp", Some("tmpfs"), MsFlags::empty(), none)?;
    prepare("/tmp")
}

fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // struct ifreq: a name, then flags.
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    request[16] = (libc::IFF_UP | libc::IFF_RUNNING) as u8;
    call!(libc::SYS_ioctl, socket.as_raw_fd(), libc::SIOCSIFFLAGS, request.as_ptr())?;
    Ok(())
}

/// Capabilities beyond `keep` go, as in a session of root's.
fn bound(keep: u64) -> Done {
    for capability in 0..64 {
        if keep & (1 << capability) == 0 {
            // Those that this kernel does not have are refused.
            let _ = call!(libc::SYS_prctl, libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
        }
    }
    let header = [0x2008_0522u32, 0];
    let (low, high) = (keep as u32, (keep >> 32) as u32);
    call!(libc::SYS_capset, header.as_ptr(), [low, low, 0, high, high, 0].as_ptr())?;
    Ok(())
}

/// Put up one guard, as the product does.
fn guard(alone: Option<Guard>, capabilities: u64) -> Done {
    match alone {
        None => Ok(()),
        Some(Guard::Filter) => {
            let filters = filter::Filters::compile(filter::Circumstances::default())
                .map_err(|error| io::Error::other(error.to_string()))?;
            filters.apply().map_err(|error| io::Error::other(error.to_string()))
        }
        Some(Guard::Capabilities) => bound(capabilities),
        Some(other) => Err(io::Error::other(format!("{other:?} cannot be put up by itself"))),
    }
}

/// Process 1 of the throwaway.
fn first(result: &mut File, work: impl FnOnce() -> io::Result<String>) -> io::Result<()> {
    // Made anew with all capabilities, a process is nobody's.
    prctl::set_dumpable(true)?;
    file_systems()?;
    loopback_up()?;
    result.write_all(work()?.as_bytes())
}

fn inside(result: &mut File, work: impl FnOnce() -> io::Result<String>) -> io::Result<()> {
    casemate_worker::namespaces::become_root(true).map_err(io::Error::other)?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )?;
    match in_child(|| i32::from(first(result, work).is_err()))? {
        0 => Ok(()),
        _ => Err(io::Error::other("its first process failed")),
    }
}

/// Do `work` as root of new namespaces of every kind, with all capabilities in them, and the user mapped as themselves.
fn throwaway(work: impl FnOnce() -> io::Result<String>) -> io::Result<String> {
    let name = std::env::var("USER").unwrap_or_default();
    let mode = IdMode::detect(&name, nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let IdMode::Range { user, group, uid_start, gid_start, newuidmap, newgidmap } = mode else {
        return Err(io::Error::other("this user has no range of ids"));
    };
    let (ready, ready_in) = nix::unistd::pipe()?;
    let (go, go_in) = nix::unistd::pipe()?;
    let (result, result_in) = nix::unistd::pipe()?;
    // SAFETY: this process has a single thread.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            drop(go_in);
            let mut result = File::from(result_in);
            let made = unshare(CloneFlags::CLONE_NEWUSER)
                .and_then(|()| nix::unistd::write(&ready_in, b"\n"))
                .and_then(|_| nix::unistd::read(&go, &mut [0]))
                .map_err(io::Error::from)
                .and_then(|_| inside(&mut result, work));
            if let Err(error) = &made {
                eprintln!("escape: no throwaway: {error}");
            }
            // SAFETY: a child of a fork ends without its parent's exit handlers.
            unsafe { libc::_exit(i32::from(made.is_err())) }
        }
        child => child,
    };
    drop((ready_in, result_in));
    nix::unistd::read(&ready, &mut [0])?;
    map(&newuidmap, child, &ids::outer(user, uid_start))?;
    map(&newgidmap, child, &ids::outer(group, gid_start))?;
    nix::unistd::write(&go_in, b"\n")?;
    let mut text = String::new();
    File::from(result).read_to_string(&mut text)?;
    crate::attempt::wait(child)?;
    Ok(text)
}

/// Make the attempt in one, with at most one guard up.
fn thrown_away(
    attempt: &Attempt,
    targets: &Targets,
    alone: Option<Guard>,
    capabilities: u64,
) -> io::Result<End> {
    let text = throwaway(|| {
        let end = run(attempt, targets, || guard(alone, capabilities));
        serde_json::to_string(&end).map_err(io::Error::other)
    })?;
    serde_json::from_str(&text).map_err(io::Error::other)
}

/// Make the attempt where its guards are switched off.
pub fn bare(attempt: &Attempt, targets: &Targets) -> io::Result<End> {
    match attempt.control {
        Control::Host => Ok(run(attempt, targets, || Ok(()))),
        // In the test machine, where this is root's: of the whole machine.
        Control::Maybe if call!(libc::SYS_geteuid)? == 0 => Ok(run(attempt, targets, || Ok(()))),
        Control::Throwaway | Control::Maybe => thrown_away(attempt, targets, None, 0),
    }
}

/// Make it with one guard up: in a throwaway, or outside where it succeeds there alone.
pub fn alone(attempt: &Attempt, targets: &Targets, alone: Guard, capabilities: u64) -> io::Result<End> {
    match (attempt.control, alone) {
        (Control::Host, Guard::Filter) => Ok(run(attempt, targets, || guard(Some(alone), capabilities))),
        _ => thrown_away(attempt, targets, Some(alone), capabilities),
    }
}

/// The descriptor that a control leaves open, for [`crate::files`] to find.
pub fn leak() -> io::Result<()> {
    let directory = crate::attempt::open("/", libc::O_RDONLY | libc::O_DIRECTORY)?;
    call!(libc::SYS_dup, directory.as_raw_fd())?;
    Ok(())
}
