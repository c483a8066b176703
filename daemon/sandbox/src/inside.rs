//! Sessions as root for the user's sessions: init's side of [`casemate_sandbox::elevation`].
//!
//! Init hands every connection to a process of its own at once, which reads it, starts the session and sees it through. What
//! the asker passes along never lies with init: the last close of a descriptor may block for as long as who made it likes (a
//! socket that lingers, say), and so may what is done with one.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use casemate_sandbox::control::{Exec, Reply};
use casemate_sandbox::elevation::{Request, Run, SOCKET};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork};
use rustix::fs::{AtFlags, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::InitError;
use crate::mounts::step;
use crate::server::{Running, Server, State, receive, send};
use crate::session::Streams;
use crate::terminal;

/// At a time; more wait until there is room.
const CONNECTIONS_MAX: usize = 64;
/// Who connects asks within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// The daemon counts its sessions from the microseconds since the epoch; these begin far above.
const FIRST: u64 = 1 << 62;

/// Where requests come in.
pub struct Inside {
    listener: OwnedFd,
    user: Uid,
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
}

impl Server {
    /// The socket to wait at for who asks, while there is room.
    pub fn asked(&self, state: &State) -> Option<BorrowedFd<'_>> {
        let inside = self.inside.as_ref()?;
        let of_ours = state.numbers().filter(|number| *number >= FIRST).count();
        (of_ours < CONNECTIONS_MAX && !state.is_stopping()).then(|| inside.as_fd())
    }

    /// Hand the next connection to a process of its own.
    pub fn accept_asker(&self, state: &mut State) {
        let Some(inside) = &self.inside else { return };
        let Ok(socket) = rustix::net::accept_with(&inside.listener, SocketFlags::CLOEXEC) else { return };
        // SAFETY: init has a single thread, and the child ends without returning here.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                let code = self.serve_asker(&socket, inside.user).unwrap_or_else(|error| {
                    eprintln!("casemate-init: sudo: {error}");
                    125
                });
                // SAFETY: the child of a fork ends without running the parent's exit handlers.
                unsafe { libc::_exit(code) }
            }
            Ok(ForkResult::Parent { child }) => {
                let number = FIRST + state.next_asker();
                self.enter(state, child.as_raw(), Running::without_caller(number, vec!["sudo".into()], true));
            }
            Err(error) => eprintln!("casemate-init: sudo: cannot fork: {error}"),
        }
    }

    /// One connection, from the request to the session's end; the exit code is the session's.
    fn serve_asker(&self, socket: &OwnedFd, user: Uid) -> Result<i32, InitError> {
        // The user's, and from in here.
        let rightful = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials)
            .is_ok_and(|peer| peer.uid() == user.as_raw() && peer.pid() != 0);
        let patience = PollTimeout::try_from(PATIENCE.as_millis()).unwrap_or(PollTimeout::MAX);
        let asks = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], patience);
        if !rightful || asks != Ok(1) {
            return Ok(0);
        }
        let Ok(Some((bytes, descriptors))) = receive(socket) else { return Ok(0) };
        let refuse = |message: String| {
            send(socket, &Reply::Refused { message }, &[]);
            Ok(125)
        };
        let run = match serde_json::from_slice(&bytes) {
            Ok(Request::Run(run)) if run.command.is_empty() && !run.login => {
                return refuse("the command is empty".into());
            }
            Ok(Request::Run(run)) => run,
            Ok(Request::Signal { .. }) => return refuse("no session runs".into()),
            Err(error) => return refuse(format!("unreadable request: {error}")),
        };
        match self.elevate(socket, run, descriptors) {
            Err(error) => refuse(error.to_string()),
            ended => ended,
        }
    }

    fn elevate(&self, socket: &OwnedFd, run: Run, descriptors: Vec<OwnedFd>) -> Result<i32, InitError> {
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or(InitError::Descriptors);
        let (streams, terminal) = match run.terminal {
            None => (Streams::Given([next()?, next()?, next()?]), None),
            Some(size) => {
                let (slave, terminal) = terminal::open(Uid::from_raw(0), size)?;
                (Streams::Terminal(slave), Some(terminal))
            }
        };
        // Ours alone to write to: the asker gets the other end.
        let (status, status_in) =
            step("make a pipe", rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC))?;
        let request = Exec {
            session: FIRST,
            command: run.command,
            login: run.login,
            environment: run.environment,
            directory: run.directory,
            directory_optional: run.directory_optional,
            root: true,
            terminal: run.terminal,
        };
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGCHLD,
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGQUIT,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGPIPE,
        ] {
            mask.add(signal);
        }
        step("block signals", mask.thread_block())?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = step("read signals", SignalFd::with_flags(&mask, flags))?;
        // SAFETY: this process has a single thread, and the child executes or ends without returning here.
        let child = match step("fork", unsafe { fork() })? {
            ForkResult::Child => self.sessions.run(&request, streams),
            ForkResult::Parent { child } => child,
        };
        drop((streams, descriptors));
        if let Some(terminal) = &terminal {
            self.utmp.note(terminal.number, child.as_raw(), Some("root"));
        }
        let mut given = vec![status.as_fd()];
        given.extend(terminal.as_ref().map(|terminal| terminal.master.as_fd()));
        send(socket, &Reply::Started { session: FIRST, pid: child.as_raw() }, &given);
        drop(status);
        let number = terminal.map(|terminal| terminal.number);
        let (line, code) = follow(socket, &signals, child)?;
        if let Some(number) = number {
            self.utmp.note(number, child.as_raw(), None);
        }
        // One short write into a fresh pipe; who is gone does not want it.
        let _ = rustix::io::write(&status_in, line.as_bytes());
        Ok(code)
    }
}

/// Until the session has ended; what init tells it, and the asker, is passed on.
fn follow(socket: &OwnedFd, signals: &SignalFd, child: Pid) -> Result<(String, i32), InitError> {
    let mut listens = true;
    loop {
        let asker = if listens { socket.as_fd() } else { signals.as_fd() };
        let mut ready =
            [PollFd::new(signals.as_fd(), PollFlags::POLLIN), PollFd::new(asker, PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => step("wait", Err(error))?,
        }
        let [signalled, asked] = ready.map(|one| one.revents().is_some_and(|events| !events.is_empty()));
        while let (true, Ok(Some(signal))) = (signalled, signals.read_signal()) {
            let sent = i32::try_from(signal.ssi_signo).ok().and_then(|number| Signal::try_from(number).ok());
            if let Some(signal) =
                sent.filter(|signal| *signal != Signal::SIGCHLD && *signal != Signal::SIGPIPE)
            {
                // Not reaped yet, so the pid is still the session's.
                let _ = kill(child, signal);
            }
        }
        match waitpid(child, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => return Ok((format!("exit {code}\n"), code)),
            Ok(WaitStatus::Signaled(_, signal, _)) => {
                return Ok((format!("signal {}\n", signal as i32), 128 + signal as i32));
            }
            _ => {}
        }
        if asked && listens {
            match receive(socket) {
                Ok(Some((bytes, _))) => {
                    let answer = match serde_json::from_slice(&bytes) {
                        Ok(Request::Signal { signal }) => {
                            match Signal::try_from(signal).map(|signal| kill(child, signal)) {
                                Ok(Ok(())) => Reply::Done,
                                Ok(Err(error)) => Reply::Refused { message: error.desc().to_owned() },
                                Err(_) => Reply::Refused { message: "there is no such signal".into() },
                            }
                        }
                        Ok(Request::Run(_)) => {
                            Reply::Refused { message: "this connection has had its session".into() }
                        }
                        Err(error) => Reply::Refused { message: format!("unreadable request: {error}") },
                    };
                    send(socket, &answer, &[]);
                }
                Ok(None) => {}
                // The session goes on without who asked for it, as with sudo(8).
                Err(()) => listens = false,
            }
        }
    }
}
