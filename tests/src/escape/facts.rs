//! What holds this process, measured.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use casemate_tests::escapes::{Facts, PathState};

use crate::attempt::{c, in_child};
use crate::call;

/// What runc, podman or moby cover or make read-only.
const PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/bus",
    "/proc/fs",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/system/cpu/cpu0/thermal_throttle",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/cgroup",
    "/sys/fs/selinux",
    "/sys/kernel",
];

/// Numbers beyond the newest call.
const CALLS: i64 = 480;

/// These end or double the one that asks, whoever allows them.
#[cfg(target_arch = "x86_64")]
const UNASKED: &[i64] = &[
    libc::SYS_rt_sigreturn,
    libc::SYS_pause,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_exit,
    libc::SYS_exit_group,
];
#[cfg(not(target_arch = "x86_64"))]
const UNASKED: &[i64] = &[libc::SYS_rt_sigreturn, libc::SYS_exit, libc::SYS_exit_group];

/// With arguments that no call takes: who is let through hears of them.
fn refused(number: i64) -> io::Result<bool> {
    let code = in_child(|| {
        // One that waits is one that is let through.
        let _ = call!(libc::SYS_setitimer, 0, [0i64, 0, 1, 0].as_ptr(), 0);
        let denied = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS));
        i32::from(call!(number, -1, -1, -1, -1, -1, -1).is_err_and(|error| denied(&error)))
    })?;
    Ok(code == 1 || code == 128 + libc::SIGSYS)
}

fn state(path: &str) -> PathState {
    let Ok(about) = nix::sys::statfs::statfs(path) else { return PathState::Missing };
    const PROC: i64 = 0x9fa0;
    const SYSFS: i64 = 0x6265_6572;
    const CGROUP: i64 = 0x6367_7270;
    if !matches!(about.filesystem_type().0, PROC | SYSFS | CGROUP) {
        return PathState::Covered;
    }
    match about.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
        true => PathState::ReadOnly,
        false => PathState::Writable,
    }
}

fn status() -> io::Result<BTreeMap<String, String>> {
    let text = fs::read_to_string("/proc/self/status")?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Ok(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

fn number<T: std::str::FromStr + Default>(status: &BTreeMap<String, String>, field: &str) -> T {
    status.get(field).and_then(|value| value.parse().ok()).unwrap_or_default()
}

fn names(path: &str) -> io::Result<Vec<String>> {
    fs::read_dir(path)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

pub fn gather() -> io::Result<Facts> {
    let status = status()?;
    // Among these is the one that lists them, which is closed by now.
    let listed = names("/proc/self/fd")?;
    let descriptors = listed.iter().filter_map(|name| name.parse().ok());
    let descriptors =
        descriptors.filter(|number| call!(libc::SYS_fcntl, *number, libc::F_GETFD).is_ok()).collect();
    let namespaces = names("/proc/self/ns")?
        .into_iter()
        .map(|name| Ok((name.clone(), fs::metadata(format!("/proc/self/ns/{name}"))?.ino())));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    let writes =
        |point: &&str| call!(libc::SYS_faccessat, libc::AT_FDCWD, c(point).as_c_str(), libc::W_OK).is_ok();
    let mut refused_calls = BTreeSet::new();
    for call in (0..CALLS).filter(|number| !UNASKED.contains(number)) {
        if refused(call)? {
            refused_calls.insert(call);
        }
    }
    Ok(Facts {
        capabilities: status
            .iter()
            .filter(|(name, _)| name.starts_with("Cap"))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        no_new_privileges: number::<u8>(&status, "NoNewPrivs") == 1,
        seccomp_mode: number(&status, "Seccomp"),
        seccomp_filters: number(&status, "Seccomp_filters"),
        refused: refused_calls,
        namespaces: namespaces.collect::<io::Result<_>>()?,
        paths: PATHS.iter().map(|path| ((*path).to_owned(), state(path))).collect(),
        descriptors,
        processes: names("/proc")?.iter().filter(|name| name.parse::<u32>().is_ok()).count(),
        writable: points.filter(writes).map(str::to_owned).collect(),
    })
}
