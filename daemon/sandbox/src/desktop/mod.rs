//! The user's desktop, as far as it is granted: the session bus through a [`proxy`], the compositor by a security context
//! ([`wayland`]). Both listen in the user's runtime directory inside; a [keeper](crate::keeper) sees to them.
//!
//! It forks two processes that are the user, since that is whom bus and compositor serve, and that can do little else. The
//! proxy parses what sessions say: it sees no file but programs and libraries, may make no namespace, and is in the outer
//! user namespace, so that Casemate's daemon takes it for the environment that it serves. The other one speaks to the
//! compositor, a program of the user's own session, before anything of the environment runs, and then ends; it is a process of
//! its own so that neither init nor the daemon parses what a compositor says.

mod keeper;
mod proxy;
mod wayland;

use std::os::fd::{AsFd, OwnedFd};

use casemate_sandbox::plan::Plan;
use nix::unistd::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::InitError;
use crate::keeper::{Keeper, Launcher};
use crate::mounts::step;
use crate::session::bound;

/// The compositor has no security contexts and is to be given as it is.
const PLAIN: &[u8] = b"plain";

pub struct Desktop {
    keeper: Keeper,
    /// What is listened to for the environment ends with this descriptor.
    _life: OwnedFd,
}

/// `None` where nothing of it is granted.
pub fn begin(plan: &Plan, launcher: &Launcher<'_>) -> Result<Option<Desktop>, InitError> {
    if plan.grants.bus.is_none() && plan.grants.wayland.is_none() {
        return Ok(None);
    }
    let (end, life) = step("make a pipe", nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC))?;
    let keeper = Keeper::begin(launcher, &[end.as_fd()], |socket| keeper::keep(socket, &end, plan))?;
    Ok(Some(Desktop { keeper, _life: life }))
}

impl Desktop {
    /// Say where to listen: in the user's runtime directory inside, which the host's processes find by its descriptor alone.
    pub fn attach(&self, directory: &OwnedFd) -> Result<(), InitError> {
        self.keeper.hand_over("the runtime directory", &[directory.as_fd()])
    }

    /// Until all that is granted is there; whether the compositor's own socket is still to be mounted.
    pub fn ready(&self) -> Result<bool, InitError> {
        Ok(self.keeper.ready(InitError::Desktop)? == PLAIN)
    }

    pub fn end(self) -> Result<(), InitError> {
        self.keeper.end()
    }
}

/// Become the user of the host's session, without rights and without a way to any.
fn become_user(plan: &Plan) -> Result<(), InitError> {
    use casemate_sandbox::plan::Ids;
    bound(CapabilitySet::empty())?;
    // With one id we are the user already.
    if let Ids::Range { user, group } = plan.ids {
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(group));
        step("become the user", nix::unistd::setresgid(gid, gid, gid))?;
        step("become the user", nix::unistd::setresuid(uid, uid, uid))?;
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    step("drop capabilities", rustix::thread::set_capabilities(None, sets))?;
    step("forbid new privileges", nix::sys::prctl::set_no_new_privs())
}
