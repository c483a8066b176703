//! A network namespace with nothing in it, made by the launcher while init, its child, mounts the root: either takes a third
//! of a millisecond, and they need not wait for each other.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::InitError;
use crate::handover::{hand_over, take_over};
use crate::mounts::step;

/// The launcher's part.
pub struct Parent(OwnedFd);

/// Init's.
pub struct Child(OwnedFd);

/// Before the fork.
pub fn begin() -> Result<(Parent, Child), InitError> {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    step("make a socket pair", pair).map(|(parent, child)| (Parent(parent), Child(child)))
}

impl Parent {
    pub fn make(self) -> Result<(), InitError> {
        step("make a network namespace", unshare(CloneFlags::CLONE_NEWNET))?;
        let namespace = step("hold the network namespace", File::open("/proc/self/ns/net"))?;
        hand_over("the network namespace", &self.0, &[namespace.as_fd()])
    }
}

impl Child {
    pub fn enter(self) -> Result<(), InitError> {
        let given = take_over("the network namespace", &self.0)?.and_then(|given| given.into_iter().next());
        let died = || std::io::Error::other("the launcher, which makes it, died");
        let namespace = step("enter the network namespace", given.ok_or_else(died))?;
        step("enter the network namespace", setns(namespace, CloneFlags::CLONE_NEWNET))
    }
}
