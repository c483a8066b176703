//! A private network. Beside init, in the host's network namespace, live the [`keeper`], its child pasta(1), which carries
//! the traffic, and its child the [`relay`], which carries questions to the host's name servers.
//!
//! All three are root of the outer namespace, so no ids of the user's, and end when init ends: the keeper holds one end of
//! a socket whose other end the launcher and then init hold, until their last breath. Init waits for pasta before it says
//! that it is ready; meanwhile it sets up the rest.

mod child;
mod gate;
mod keeper;
mod pasta;
mod relay;
mod resolver;
mod routes;
mod sets;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use casemate_sandbox::plan::{NAME_SERVER, Private};
use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::ForkResult;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, socketpair,
};

use crate::group::{Group, fork_into};
use crate::mounts::step;
use crate::{InitError, sys};

/// The keeper's answer: nothing where all went well, else why not.
const ANSWER_MAX: usize = 4 << 10;
/// Init waits so long for its network to be taken down, so that published ports are free for the next one.
const END_MS: u16 = 1000;

/// Init's end of the socket.
pub struct Connection(OwnedFd);

/// Fork the keeper; before the launcher leaves the host's namespaces, but as root of the outer one. `in_groups`: the
/// launcher is in supplementary groups of the user's, which are not the keeper's business.
pub fn begin(private: &Private, group: Option<&Group>, in_groups: bool) -> Result<Connection, InitError> {
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let (ours, theirs) = step("make a socket", pair)?;
    // SAFETY: the launcher has a single thread.
    match step("fork", unsafe { fork_into(group) })? {
        ForkResult::Child => {
            let groups = if in_groups { nix::unistd::setgroups(&[]) } else { Ok(()) };
            let outcome = step("drop groups", groups).and_then(|()| keeper::keep(&theirs, private));
            if let Err(error) = &outcome {
                eprintln!("casemate-init: {error}");
                // An init that is gone, or was told of readiness, needs no word.
                let message = format!("-{error}");
                let _ = rustix::net::send(&theirs, message.as_bytes(), SendFlags::NOSIGNAL);
            }
            // SAFETY: exit handlers are the launcher's.
            unsafe { libc::_exit(i32::from(outcome.is_err())) }
        }
        ForkResult::Parent { .. } => Ok(Connection(ours)),
    }
}

impl Connection {
    /// Hand the namespace that the launcher has just made to the keeper.
    pub fn attach(&self, private: &Private) -> Result<(), InitError> {
        let sets = match &private.allow {
            None => None,
            Some(allow) => {
                sets::write(allow)?;
                Some(sets::open()?)
            }
        };
        step("bring loopback up", sys::loopback_up())?;
        let namespace = step("hold the network namespace", File::open("/proc/self/ns/net"))?;
        let address = (NAME_SERVER, 53);
        let udp = step("bind the name server", UdpSocket::bind(address))?;
        let tcp = step("bind the name server", TcpListener::bind(address))?;
        let mut descriptors = vec![namespace.as_fd(), udp.as_fd(), tcp.as_fd()];
        descriptors.extend(sets.as_ref().map(AsFd::as_fd));
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let sent = rustix::net::sendmsg(&self.0, &[IoSlice::new(b"\n")], &mut ancillary, SendFlags::NOSIGNAL);
        step("hand the network namespace over", sent.map(drop))
    }

    /// Until the keeper has connected the namespace.
    pub fn ready(&self) -> Result<(), InitError> {
        let mut answer = vec![0; ANSWER_MAX];
        let (_, size) =
            step("wait for the network", rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty()))?;
        match answer.get(..size) {
            Some([b'+']) => Ok(()),
            Some([b'-', message @ ..]) => {
                Err(InitError::Keeper(String::from_utf8_lossy(message).into_owned()))
            }
            _ => Err(InitError::Network("the process that keeps it died".to_owned())),
        }
    }

    /// Take the network down and see it gone.
    pub fn end(self) -> Result<(), InitError> {
        step("end the network", rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write))?;
        let mut descriptors = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        step("wait for the network's end", poll(&mut descriptors, END_MS).map(drop))
    }
}

/// What [`Connection::attach`] sends; `None` where the launcher failed before it did.
fn receive(socket: &OwnedFd) -> Result<Option<Vec<OwnedFd>>, InitError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    );
    if step("wait for the namespace", received)?.bytes == 0 {
        return Ok(None);
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    Ok(Some(descriptors))
}
