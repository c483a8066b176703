//! A socket of the compositor's own that clients inside connect to, by wp_security_context_v1: the compositor then knows them
//! for sandboxed ones, and keeps from them what is not for such (screen contents, others' windows, virtual keyboards). It
//! listens for as long as `end` is open at its other end, which is init's.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use casemate_sandbox::plan::{Plan, WAYLAND, Wayland};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{ForkResult, fork};
use rustix::process::Pid;
use wayland_client::globals::{BindError, GlobalListContents, registry_queue_init};
use wayland_client::protocol::wl_registry::{self, WlRegistry};
use wayland_client::{Connection, Dispatch, QueueHandle, delegate_noop};
use wayland_protocols::wp::security_context::v1::client::wp_security_context_manager_v1::WpSecurityContextManagerV1;
use wayland_protocols::wp::security_context::v1::client::wp_security_context_v1::WpSecurityContextV1;

use super::become_user;
use crate::InitError;
use crate::child::Child;
use crate::mounts::{open_source, step};

/// A compositor answers at once, or hangs.
const ANSWER: Duration = Duration::from_secs(10);
const ENGINE: &str = "org.casemate";

/// What the child found out, in a byte; words on what failed follow the last.
const LISTENS: u8 = b'+';
const UNKNOWN: u8 = b'0';
const FAILED: u8 = b'-';
const MESSAGE_MAX: u64 = 2 << 10;

struct Client;

impl Dispatch<WlRegistry, GlobalListContents> for Client {
    fn event(
        _: &mut Self,
        _: &WlRegistry,
        _: wl_registry::Event,
        _: &GlobalListContents,
        _: &Connection,
        _: &QueueHandle<Self>,
    ) {
        // What comes and goes later is nothing to us.
    }
}

delegate_noop!(Client: WpSecurityContextManagerV1);
delegate_noop!(Client: WpSecurityContextV1);

fn failed(what: &str, path: &str, error: &dyn std::fmt::Display) -> InitError {
    InitError::Desktop(format!("wayland: cannot {what} the compositor at {path}: {error}"))
}

/// Whether the compositor has security contexts, and so listens now. As the user.
fn negotiate(
    granted: &Wayland,
    socket: &OwnedFd,
    plan: &Plan,
    directory: &OwnedFd,
    end: &OwnedFd,
) -> Result<bool, InitError> {
    let path = &granted.socket.path;
    // By descriptor: it is the socket that was judged.
    let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd()))
        .map_err(|error| failed("connect to", path, &error))?;
    let connection = Connection::from_socket(stream).map_err(|error| failed("speak to", path, &error))?;
    let (globals, mut queue) =
        registry_queue_init::<Client>(&connection).map_err(|error| failed("speak to", path, &error))?;
    let handle = queue.handle();
    let manager = match globals.bind::<WpSecurityContextManagerV1, _, _>(&handle, 1..=1, ()) {
        Ok(manager) => manager,
        Err(BindError::NotPresent | BindError::UnsupportedVersion) => return Ok(false),
    };
    // Relative: no path of the host leads there.
    step("enter the runtime directory", rustix::process::fchdir(directory))?;
    let listener = step(&format!("listen at {WAYLAND}"), UnixListener::bind(WAYLAND))?;
    step("listen without blocking the compositor", listener.set_nonblocking(true))?;
    let context = manager.create_listener(listener.as_fd(), end.as_fd(), &handle, ());
    context.set_sandbox_engine(ENGINE.to_owned());
    context.set_app_id(plan.hostname.clone());
    context.set_instance_id(plan.id.clone());
    context.commit();
    queue.roundtrip(&mut Client).map_err(|error| failed("get a security context from", path, &error))?;
    Ok(true)
}

/// Have the compositor listen in `directory`. `false`: it has no security contexts, and policy gives its own socket instead.
pub fn listen(granted: &Wayland, plan: &Plan, directory: &OwnedFd, end: &OwnedFd) -> Result<bool, InitError> {
    let socket = open_source(&granted.socket)?;
    let (answer, answer_in) = step("make a pipe", std::io::pipe())?;
    // SAFETY: the keeper has a single thread.
    let child = match step("fork", unsafe { fork() })? {
        ForkResult::Child => {
            let outcome = become_user(plan).and_then(|()| negotiate(granted, &socket, plan, directory, end));
            let message = match outcome {
                Ok(true) => vec![LISTENS],
                Ok(false) => vec![UNKNOWN],
                Err(error) => [&[FAILED], error.to_string().as_bytes()].concat(),
            };
            // Without an answer the keeper takes us for dead, which we are then.
            let _ = (&answer_in).write_all(&message);
            // SAFETY: exit handlers are the launcher's.
            unsafe { libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            let pid = Pid::from_raw(child.as_raw()).ok_or(InitError::Descriptors)?;
            step("open a pidfd", Child::new(pid))?
        }
    };
    drop(answer_in);
    let path = &granted.socket.path;
    let over = Instant::now() + ANSWER;
    loop {
        let left = over.saturating_duration_since(Instant::now());
        let mut ended = [PollFd::new(child.as_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::ZERO);
        match poll(&mut ended, timeout) {
            Err(nix::errno::Errno::EINTR) => continue,
            Ok(0) => {
                let silence = format!("it said nothing for {} s", ANSWER.as_secs());
                return Err(failed("speak to", path, &silence));
            }
            other => step("wait for a child", other)?,
        };
        break;
    }
    let mut said = Vec::new();
    step("hear a child", answer.take(MESSAGE_MAX).read_to_end(&mut said))?;
    match said.split_first() {
        Some((&LISTENS, _)) => Ok(true),
        Some((&UNKNOWN, _)) if granted.plain => {
            eprintln!(
                "casemate-init: wayland: no security contexts at {path}; as policy says, its own socket is given"
            );
            Ok(false)
        }
        Some((&UNKNOWN, _)) => Err(InitError::Desktop(format!(
            "wayland: the compositor at {path} has no security contexts (wp_security_context_v1), so it could not tell the \
             environment's programs from yours; use one that has, add \"wayland-plain\" to allowed in policy.toml, [sockets], or \
             remove [gui] wayland"
        ))),
        Some((_, message)) => Err(InitError::Keeper(String::from_utf8_lossy(message).into_owned())),
        None => Err(failed("speak to", path, &"the process that does died")),
    }
}
