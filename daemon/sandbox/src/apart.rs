//! A network namespace with nothing in it, made by the launcher while init, its child, mounts the root: either takes a third
//! of a millisecond, and they need not wait for each other.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::InitError;
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
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [namespace.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = sendmsg(&self.0, &[IoSlice::new(b"\n")], &mut ancillary, SendFlags::NOSIGNAL);
        step("hand the network namespace over", sent.map(drop))
    }
}

impl Child {
    pub fn enter(self) -> Result<(), InitError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.0, &mut [IoSliceMut::new(&mut [0])], &mut ancillary, flags);
        step("wait for the network namespace", received)?;
        let given = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut rights) => rights.next(),
            _ => None,
        });
        let died = || std::io::Error::other("the launcher, which makes it, died");
        let namespace = step("enter the network namespace", given.ok_or_else(died))?;
        step("enter the network namespace", setns(namespace, CloneFlags::CLONE_NEWNET))
    }
}
