//! pasta(1), as a child that went into the background: only then has it set everything up, and locked itself up in
//! namespaces of its own.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate_sandbox::plan::{Port, Private, Protocol};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Pid, PidfdFlags};

use crate::child::{self, Child};

/// It takes some 50 ms. One that cannot open /dev/net/tun has been seen to hang.
const START: Duration = Duration::from_secs(10);

pub enum Start {
    Running(Child),
    /// Init ended meanwhile.
    Over,
}

fn published(port: &Port) -> [String; 2] {
    let option = match port.protocol {
        Protocol::Tcp => "--tcp-ports",
        Protocol::Udp => "--udp-ports",
    };
    [option.to_owned(), format!("{}/{}:{}", port.address, port.host, port.inside)]
}

/// The host's loopback stays out of reach: neither the gateway's address leads to it, nor is a port of it to be found
/// inside; and nothing inside is found outside but what is published.
fn arguments(namespace: &OwnedFd, ports: &[Port]) -> Vec<String> {
    let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd());
    let mut arguments: Vec<String> =
        ["--config-net", "--quiet", "--no-map-gw", "--no-netns-quit", "--tcp-ns", "none", "--udp-ns", "none"]
            .map(str::to_owned)
            .to_vec();
    for (protocol, option) in [(Protocol::Tcp, "--tcp-ports"), (Protocol::Udp, "--udp-ports")] {
        let mut of_it = ports.iter().filter(|port| port.protocol == protocol).peekable();
        if of_it.peek().is_none() {
            // Else it would forward whatever listens.
            arguments.extend([option.to_owned(), "none".to_owned()]);
        }
        arguments.extend(of_it.flat_map(published));
    }
    arguments.extend(["--netns".to_owned(), path]);
    arguments
}

fn said(stderr: Option<std::process::ChildStderr>) -> String {
    let lines = stderr.map(child::said).unwrap_or_default();
    lines.into_iter().filter(|line| !line.contains("syslog")).collect::<Vec<_>>().join("; ")
}

pub fn start(socket: &OwnedFd, namespace: &OwnedFd, private: &Private) -> Result<Start, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("pasta: cannot {what}: {error}");
    // Command gives it the default action of SIGPIPE, without which Debian 12's does not start, and an empty mask.
    let mut command = Command::new(&private.pasta);
    command.args(arguments(namespace, &private.ports)).env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let before = children().map_err(|error| failed("list our children", &error))?;
    let mut child = command.spawn().map_err(|error| failed("start it", &error))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or("pasta has no pid")?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|error| failed("open a pidfd", &error))?;
    let end = Instant::now() + START;
    let over = loop {
        let mut descriptors =
            [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN), PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        let left = end.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::ZERO);
        match poll(&mut descriptors, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(failed("wait for it", &error)),
            Ok(_) => {}
        }
        let has =
            |index: usize| descriptors[index].revents().is_some_and(|events: PollFlags| !events.is_empty());
        if has(0) {
            break false;
        }
        if has(1) || left.is_zero() {
            child.kill().map_err(|error| failed("kill it", &error))?;
            if left.is_zero() {
                child.wait().map_err(|error| failed("wait for it", &error))?;
                return Err(format!(
                    "pasta was not ready within {} s: {}",
                    START.as_secs(),
                    said(child.stderr.take())
                ));
            }
            break true;
        }
    };
    let status = child.wait().map_err(|error| failed("wait for it", &error))?;
    let after = children().map_err(|error| failed("list our children", &error))?;
    let background = after.into_iter().find(|pid| !before.contains(pid));
    match background {
        // What went into the background is our child now, and nobody else reaps it.
        Some(pid) => {
            let child = Child::new(pid).map_err(|error| failed("open a pidfd", &error))?;
            Ok(Start::Running(child))
        }
        None if over => Ok(Start::Over),
        None => {
            let said = said(child.stderr.take());
            Err(format!("pasta failed ({status}): {said}"))
        }
    }
}

fn children() -> std::io::Result<Vec<Pid>> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id()))?;
    Ok(text.split_ascii_whitespace().filter_map(|pid| pid.parse().ok().and_then(Pid::from_raw)).collect())
}
