//! Sessions as root for the user's sessions: init's side of [`casemate_sandbox::elevation`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use casemate_sandbox::control::{Exec, Reply};
use casemate_sandbox::elevation::{Request, Run, SOCKET};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid};
use rustix::fs::{AtFlags, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::InitError;
use crate::mounts::step;
use crate::server::{Server, State, receive, send};

/// At a time; more are closed unheard.
const CONNECTIONS_MAX: usize = 64;
/// The daemon counts its sessions from the microseconds since the epoch; these begin far above.
const FIRST: u64 = 1 << 62;

/// Where requests come in, and who has asked.
pub struct Inside {
    listener: OwnedFd,
    user: Uid,
}

/// A program inside that has asked, or is about to.
pub struct Asker {
    pub socket: OwnedFd,
    /// The session's process, while it runs; then 0.
    session: Option<i32>,
}

#[derive(Default)]
pub struct Askers {
    all: Vec<Asker>,
    next: u64,
}

impl Inside {
    /// Listen: before anything of the environment runs, and while init may give files to the user.
    pub fn listen(user: Uid, group: Gid) -> Result<Self, InitError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let listener = step("make a socket", socket)?;
        let directory = SOCKET.rsplit_once('/').map_or("/", |(directory, _)| directory);
        step("make /run/casemate", rustix::fs::mkdir(directory, Mode::from_raw_mode(0o755)))?;
        let address = step("bind a socket", SocketAddrUnix::new(SOCKET))?;
        step("bind a socket", rustix::net::bind(&listener, &address))?;
        step("close a socket to others", rustix::fs::chmod(SOCKET, Mode::from_raw_mode(0o600)))?;
        let owner = (rustix::fs::Uid::from_raw(user.as_raw()), rustix::fs::Gid::from_raw(group.as_raw()));
        let given = rustix::fs::chownat(
            rustix::fs::CWD,
            SOCKET,
            Some(owner.0),
            Some(owner.1),
            AtFlags::SYMLINK_NOFOLLOW,
        );
        step("give the user a socket", given)?;
        step("listen", rustix::net::listen(&listener, 16))?;
        Ok(Self { listener, user })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    pub fn accept(&self, askers: &mut Askers) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        // The user's, and from in here.
        let rightful = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)
            .is_ok_and(|peer| peer.uid() == self.user.as_raw() && peer.pid() != 0);
        if rightful && askers.all.len() < CONNECTIONS_MAX {
            askers.all.push(Asker { socket, session: None });
        }
    }
}

impl Askers {
    pub fn all(&self) -> &[Asker] {
        &self.all
    }

    /// A process of ours has ended and its number may become another's.
    pub fn ended(&mut self, pid: i32) {
        for asker in self.all.iter_mut().filter(|asker| asker.session == Some(pid)) {
            asker.session = Some(0);
        }
    }

    pub fn close(&mut self, index: usize) {
        self.all.remove(index);
    }
}

impl Server {
    /// One packet; `false` when the connection is to be closed.
    pub fn serve_asker(&self, state: &mut State, index: usize) -> bool {
        let (bytes, descriptors) = match receive(&state.askers.all[index].socket) {
            Ok(Some(packet)) => packet,
            Ok(None) => return true,
            Err(()) => return false,
        };
        let refused = |message: String| (Reply::Refused { message }, vec![]);
        let (reply, descriptors) = match serde_json::from_slice(&bytes) {
            Ok(Request::Run(_)) if state.is_stopping() => refused("the environment is stopping".into()),
            Ok(Request::Run(run)) => match self.elevate(state, index, run, descriptors) {
                Ok(answer) => answer,
                Err(error) => refused(error.to_string()),
            },
            Ok(Request::Signal { signal }) => {
                match (state.askers.all[index].session, Signal::try_from(signal)) {
                    (None | Some(0), _) => refused("no session runs".into()),
                    (_, Err(_)) => refused("there is no such signal".into()),
                    // Not reaped before the next turn of the loop, so the pid is still the session's.
                    (Some(pid), Ok(signal)) => match kill(Pid::from_raw(pid), signal) {
                        Ok(()) => (Reply::Done, vec![]),
                        Err(error) => refused(error.desc().to_owned()),
                    },
                }
            }
            Err(error) => refused(format!("unreadable request: {error}")),
        };
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        send(&state.askers.all[index].socket, &reply, &borrowed)
    }

    fn elevate(
        &self,
        state: &mut State,
        index: usize,
        run: Run,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(Reply, Vec<OwnedFd>), InitError> {
        let refused = |message: &str| Ok((Reply::Refused { message: message.to_owned() }, vec![]));
        if state.askers.all[index].session.is_some() {
            return refused("this connection has had its session");
        }
        if run.command.is_empty() && !run.login {
            return refused("the command is empty");
        }
        let exec = Exec {
            session: FIRST + state.askers.next,
            command: run.command,
            login: run.login,
            environment: run.environment,
            directory: run.directory,
            directory_optional: true,
            root: true,
            terminal: run.terminal,
        };
        let (reply, given) = self.exec(state, exec, descriptors)?;
        state.askers.next += 1;
        if let Reply::Started { pid, .. } = &reply {
            state.askers.all[index].session = Some(*pid);
        }
        // The pidfd is the daemon's to have; here the status pipe tells the end.
        Ok((reply, given.into_iter().skip(1).collect()))
    }
}
