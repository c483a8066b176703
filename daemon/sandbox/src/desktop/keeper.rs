//! The keeper of the desktop: has the compositor listen, starts the proxy, and ends it when init is gone. It is the user itself
//! once it has made the proxy's namespaces; nothing that it reads comes from the environment.

use std::os::fd::{AsFd, OwnedFd};

use casemate_sandbox::plan::Plan;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::proxy::{self, Proxy};
use super::{PLAIN, become_user, wayland};
use crate::InitError;
use crate::handover::take_over;
use crate::keeper::tell_ready;
use crate::mounts::step;

/// `end` is closed, at its other end, when the environment ends.
pub fn keep(socket: &OwnedFd, end: &OwnedFd, plan: &Plan) -> Result<(), InitError> {
    let Some(received) = take_over("the runtime directory", socket)? else { return Ok(()) };
    let directory = received.into_iter().next().ok_or(InitError::Descriptors)?;
    let is_plain = match &plan.grants.wayland {
        None => false,
        Some(granted) => !wayland::listen(granted, plan, &directory, end)?,
    };
    let proxy = match &plan.grants.bus {
        None => None,
        Some(bus) => {
            proxy::enter_root(bus)?;
            Some(Proxy::start(bus, plan, &directory, end)?)
        }
    };
    drop(directory);
    become_user(plan)?;
    tell_ready(socket, if is_plain { PLAIN } else { b"" });
    let Some(proxy) = proxy else { return Ok(()) };
    loop {
        // Nothing is ever written to either: what is there is the end.
        let mut descriptors =
            [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(proxy.as_fd(), PollFlags::POLLIN)];
        match poll(&mut descriptors, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => step("wait", other)?,
        };
        let ended = descriptors[1].revents().is_some_and(|events| !events.is_empty());
        let over = descriptors[0].revents().is_some_and(|events| !events.is_empty());
        if ended && !over {
            // It is not started again: what made it fall would again, and sessions know how to go without.
            eprintln!("casemate-init: session bus: the proxy ended; `casemate restart` brings it back");
        }
        if ended || over {
            return Ok(());
        }
    }
}
