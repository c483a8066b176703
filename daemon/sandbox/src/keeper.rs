//! Keepers: processes beside init, outside its namespaces, that serve the environment and end with it. A keeper holds one
//! end of a socket whose other end the launcher and then init hold, until their last breath. Init waits for its word before
//! it says that it is ready; meanwhile it sets up the rest.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, poll};
use nix::unistd::ForkResult;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};

use crate::group::{Group, fork_into};
use crate::handover::hand_over;
use crate::mounts::step;
use crate::{InitError, sys};

/// A keeper's answer: a word where all went well, else why not.
const ANSWER_MAX: usize = 4 << 10;
/// Init waits so long for what a keeper keeps to be taken down: published ports are to be free for the next one.
const END_MS: u16 = 1000;

/// Init's end of the socket.
pub struct Keeper(OwnedFd);

/// The launcher, before it leaves the host's namespaces, but as root of the outer one.
pub struct Launcher<'a> {
    pub group: Option<&'a Group>,
    /// It is in supplementary groups of the user's, which are no keeper's business.
    pub in_groups: bool,
}

impl Keeper {
    /// Fork one, which lives for as long as `keep` takes; of all descriptors it has the socket and those of `with`.
    pub fn begin(
        launcher: &Launcher<'_>,
        with: &[BorrowedFd<'_>],
        keep: impl FnOnce(&OwnedFd) -> Result<(), InitError>,
    ) -> Result<Self, InitError> {
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (ours, theirs) = step("make a socket", pair)?;
        // SAFETY: the launcher has a single thread.
        match step("fork", unsafe { fork_into(launcher.group) })? {
            ForkResult::Child => {
                let kept: Vec<i32> =
                    with.iter().map(AsRawFd::as_raw_fd).chain([theirs.as_raw_fd()]).collect();
                let groups = if launcher.in_groups { nix::unistd::setgroups(&[]) } else { Ok(()) };
                let outcome = step("drop groups", groups)
                    .and_then(|()| step("begin a session", nix::unistd::setsid()))
                    .and_then(|_| step("close inherited descriptors", sys::close_all_but(&kept)))
                    .and_then(|()| keep(&theirs));
                if let Err(error) = &outcome {
                    eprintln!("casemate-init: {error}");
                    // An init that is gone, or was told of readiness, needs no word.
                    let message = format!("-{error}");
                    let _ = rustix::net::send(&theirs, message.as_bytes(), SendFlags::NOSIGNAL);
                }
                // SAFETY: exit handlers are the launcher's.
                unsafe { libc::_exit(i32::from(outcome.is_err())) }
            }
            ForkResult::Parent { .. } => Ok(Self(ours)),
        }
    }

    pub fn hand_over(&self, what: &str, descriptors: &[BorrowedFd<'_>]) -> Result<(), InitError> {
        hand_over(what, &self.0, descriptors)
    }

    /// Until it says that it is ready; what it says along with it. `failed` names what it keeps.
    pub fn ready(&self, failed: fn(String) -> InitError) -> Result<Vec<u8>, InitError> {
        let mut answer = vec![0; ANSWER_MAX];
        let received = rustix::net::recv(&self.0, &mut answer[..], RecvFlags::empty());
        let (_, size) = step("wait for a keeper", received)?;
        match answer.get(..size) {
            Some([b'+', word @ ..]) => Ok(word.to_vec()),
            Some([b'-', message @ ..]) => {
                Err(InitError::Keeper(String::from_utf8_lossy(message).into_owned()))
            }
            _ => Err(failed("the process that keeps it died".to_owned())),
        }
    }

    /// Tell it that this is the end, and see it gone.
    pub fn end(self) -> Result<(), InitError> {
        step("end a keeper", rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write))?;
        let mut descriptors = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        step("wait for a keeper's end", poll(&mut descriptors, END_MS).map(drop))
    }
}

/// The keeper's word to init.
pub fn tell_ready(socket: &OwnedFd, word: &[u8]) {
    // An init that is gone needs no word: who waits for its end sees it.
    let _ = rustix::net::send(socket, &[b"+", word].concat(), SendFlags::NOSIGNAL);
}
