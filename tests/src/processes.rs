//! Processes as the host sees them.

use std::fs;

/// A line of `/proc/PID/status`, of a process that may be gone.
pub fn status(pid: u32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.trim().to_owned()))
}

/// Of a process that lives.
pub fn parent(pid: u32) -> u32 {
    status(pid, "PPid").expect("PPid").parse().expect("a number")
}

/// The processes whose command line has `marker` as an argument, in the host's numbering.
pub fn marked(marker: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &u32| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .is_ok_and(|line| line.split(|byte| *byte == 0).any(|word| word == marker.as_bytes()))
    })
    .collect()
}
