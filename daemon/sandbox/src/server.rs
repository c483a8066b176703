//! PID 1's life: one loop over signals and control connections. Nothing in it blocks on a peer.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use casemate_sandbox::control::{Exec, ExitStatus, Notice, PACKET_MAX, Reply, Request, SERVICE};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, Uid, fork};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags,
};

use crate::InitError;
use crate::inside::Inside;
use crate::mounts::step;
use crate::service::Supervisor;
use crate::session::{Sessions, Streams};
use crate::terminal;
use crate::utmp::Utmp;

/// Connections at a time: the daemon has two.
const CONNECTIONS_MAX: usize = 16;
/// Descriptors that are waited for before those of connections.
const FIXED: usize = 4;
/// An environment that nobody ever uses ends after this.
const UNUSED: Duration = Duration::from_secs(10);
/// Interactive shells ignore SIGTERM, also those without a terminal; SIGHUP they do not. What has something to do at its end
/// is not to be disturbed at once.
const HANG_UP: Duration = Duration::from_millis(300);
/// Most that sessions have to end in: a day.
const STOP_MAX_MS: u64 = 86_400_000;

pub struct Running {
    number: u64,
    /// `None` where nobody waits for it.
    status: Option<OwnedFd>,
    command: Vec<String>,
    root: bool,
    /// The number of its terminal.
    terminal: Option<u64>,
}

struct Connection {
    socket: OwnedFd,
    watches: bool,
}

pub struct Server {
    pub sessions: Sessions,
    pub listener: OwnedFd,
    pub signals: SignalFd,
    /// nsfs inode numbers: outer user, inner user, pid namespace.
    pub namespaces: [u64; 3],
    pub utmp: Utmp,
    /// Where `sudo` is granted.
    pub inside: Option<Inside>,
}

pub struct State {
    running: BTreeMap<i32, Running>,
    connections: Vec<Connection>,
    askers: u64,
    /// A daemon has made contact: it does so when what the environment consists of was checked.
    is_known: bool,
    pub supervisor: Option<Supervisor>,
    linger: bool,
    used: bool,
    began: Instant,
    stop_at: Option<Instant>,
    /// Sessions that still run then are sent SIGHUP.
    hang_up_at: Option<Instant>,
}

impl Server {
    /// Until the environment is to end; init's exit then kills all that is left in its pid namespace.
    pub fn serve(self, supervisor: Option<Supervisor>) -> Result<(), InitError> {
        let mut state = State {
            supervisor,
            running: BTreeMap::new(),
            connections: Vec::new(),
            askers: 0,
            is_known: false,
            linger: self.sessions.plan.linger,
            used: false,
            began: Instant::now(),
            stop_at: None,
            hang_up_at: None,
        };
        let ended = self.until_the_end(&mut state);
        if let Some(supervisor) = &mut state.supervisor {
            supervisor.take_all_output();
        }
        ended
    }

    fn until_the_end(&self, state: &mut State) -> Result<(), InitError> {
        loop {
            let now = Instant::now();
            if state.stop_at.is_some_and(|at| now >= at || state.running.is_empty()) {
                return Ok(());
            }
            if !state.is_stopping() && state.is_known {
                self.supervise(state, now);
            }
            let due =
                state.supervisor.as_ref().filter(|_| !state.is_stopping()).and_then(Supervisor::deadline);
            if state.hang_up_at.is_some_and(|at| now >= at) {
                state.hang_up_at = None;
                // The environment's own command was told by the signal that is meant for it.
                for (pid, _) in state.running.iter().filter(|(_, session)| session.number != SERVICE) {
                    let _ = kill(Pid::from_raw(*pid), Signal::SIGHUP);
                }
            }
            let mut deadline = state.stop_at.into_iter().chain(due).chain(state.hang_up_at).min();
            if state.running.is_empty() && !state.linger {
                if state.used {
                    return Ok(());
                }
                let at = state.began + UNUSED;
                if now >= at {
                    return Ok(());
                }
                deadline = Some(deadline.map_or(at, |other| other.min(at)));
            }
            let ready = self.wait(state, deadline)?;
            if ready[0] {
                while let Ok(Some(signal)) = self.signals.read_signal() {
                    // The service manager's, at the end of the user's session: from within one has a pid here.
                    if signal.ssi_signo == Signal::SIGTERM as u32 && signal.ssi_pid == 0 {
                        self.begin_stop(state, Duration::from_secs(self.sessions.plan.stop_timeout));
                    }
                }
                self.reap(state);
            }
            // The newest connections are at the end: serve the old ones first, so that indexes hold.
            let known = state.connections.len();
            let closed: Vec<usize> =
                (0..known).filter(|index| ready[FIXED + index] && !self.serve_one(state, *index)).collect();
            if let (true, Some(supervisor)) = (ready[3], &mut state.supervisor) {
                supervisor.take_output();
            }
            if ready[1] {
                self.accept(state);
            }
            if ready[2] && self.asked(state).is_some() {
                self.accept_asker(state);
            }
            for index in closed.into_iter().rev() {
                state.connections.remove(index);
            }
        }
    }

    fn wait(&self, state: &State, deadline: Option<Instant>) -> Result<Vec<bool>, InitError> {
        let output = state.supervisor.as_ref().and_then(Supervisor::output);
        let mut descriptors = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            // The listener stands in for what there is not: nothing comes in twice.
            PollFd::new(self.asked(state).unwrap_or(self.listener.as_fd()), PollFlags::POLLIN),
            PollFd::new(output.unwrap_or(self.listener.as_fd()), PollFlags::POLLIN),
        ];
        descriptors
            .extend(state.connections.iter().map(|c| PollFd::new(c.socket.as_fd(), PollFlags::POLLIN)));
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX)
            }
        };
        match poll(&mut descriptors, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return step("wait", Err(error)),
        }
        Ok(descriptors.iter().map(|d| d.revents().is_some_and(|events| !events.is_empty())).collect())
    }

    /// Every child: sessions, and orphans whose parent we became.
    fn reap(&self, state: &mut State) {
        loop {
            let (pid, status) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, ExitStatus::Exit(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, ExitStatus::Signal(signal as i32)),
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            let session = state.running.remove(&pid.as_raw());
            self.supervised(state, pid.as_raw(), status);
            let Some(session) = session else { continue };
            let line = match status {
                ExitStatus::Exit(code) => format!("exit {code}\n"),
                ExitStatus::Signal(signal) => format!("signal {signal}\n"),
            };
            if let Some(number) = session.terminal {
                self.utmp.note(number, pid.as_raw(), None);
            }
            // One short write into a pipe of its own; a client that is gone does not want it.
            if let Some(pipe) = &session.status {
                let _ = rustix::io::write(pipe, line.as_bytes());
            }
            notify(state, &Notice::Ended { session: session.number, status });
        }
    }

    fn accept(&self, state: &mut State) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        // The user's, and not from in here: a process of the environment has a pid in our namespace, one of the host none.
        let rightful = nix::sys::socket::getsockopt(&socket, nix::sys::socket::sockopt::PeerCredentials)
            .is_ok_and(|peer| peer.uid() == self.sessions.user().as_raw() && peer.pid() == 0);
        if rightful && state.connections.len() < CONNECTIONS_MAX {
            state.connections.push(Connection { socket, watches: false });
            state.is_known = true;
        }
    }

    /// One packet of a connection; `false` when it is to be closed.
    fn serve_one(&self, state: &mut State, index: usize) -> bool {
        let (bytes, descriptors) = match receive(&state.connections[index].socket) {
            Ok(Some(packet)) => packet,
            Ok(None) => return true,
            Err(()) => return false,
        };
        let (reply, descriptors) = match serde_json::from_slice(&bytes) {
            Ok(request) => self.answer(state, index, request, descriptors),
            Err(error) => (Reply::Refused { message: format!("unreadable request: {error}") }, vec![]),
        };
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        if !send(&state.connections[index].socket, &reply, &borrowed) {
            return false;
        }
        if state.connections[index].watches && matches!(reply, Reply::Done) {
            let socket = &state.connections[index].socket;
            let health =
                state.supervisor.as_ref().map(|supervisor| Notice::Health { state: supervisor.health() });
            return state.running.iter().all(|(pid, session)| send(socket, &session.started(*pid), &[]))
                && health.is_none_or(|health| send(socket, &health, &[]));
        }
        true
    }

    fn answer(
        &self,
        state: &mut State,
        index: usize,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> (Reply, Vec<OwnedFd>) {
        let refused = |message: &str| (Reply::Refused { message: message.to_owned() }, vec![]);
        match request {
            Request::Hello => {
                let [outer_user_namespace, inner_user_namespace, pid_namespace] = self.namespaces;
                let reply = Reply::Hello {
                    version: casemate_sandbox::plan::VERSION,
                    id: self.sessions.plan.id.clone(),
                    linger: state.linger,
                    outer_user_namespace,
                    inner_user_namespace,
                    pid_namespace,
                };
                (reply, vec![])
            }
            Request::Watch => {
                state.connections[index].watches = true;
                (Reply::Done, vec![])
            }
            Request::Linger { on } => {
                state.linger = on;
                if let (true, Some(supervisor)) = (on, &mut state.supervisor) {
                    supervisor.wanted();
                }
                (Reply::Done, vec![])
            }
            Request::Signal { session, signal } => {
                let target =
                    state.running.iter().find(|(_, running)| running.number == session).map(|(pid, _)| *pid);
                match (target, Signal::try_from(signal)) {
                    (None, _) => refused("that session has ended"),
                    (_, Err(_)) => refused("there is no such signal"),
                    (Some(pid), Ok(signal)) => match kill(Pid::from_raw(pid), signal) {
                        Ok(()) => (Reply::Done, vec![]),
                        Err(error) => refused(error.desc()),
                    },
                }
            }
            Request::Stop { timeout_ms } => {
                self.begin_stop(state, Duration::from_millis(timeout_ms.min(STOP_MAX_MS)));
                (Reply::Done, vec![])
            }
            Request::Exec(_) if state.is_stopping() => refused("the environment is stopping"),
            Request::Exec(request) => match self.exec(state, request, descriptors) {
                Ok(answer) => answer,
                Err(error) => refused(&error.to_string()),
            },
        }
    }

    fn begin_stop(&self, state: &mut State, timeout: Duration) {
        let signal = Signal::try_from(self.sessions.plan.stop_signal).unwrap_or(Signal::SIGTERM);
        for (pid, session) in &state.running {
            // One that is gone needs none of them.
            let _ = kill(Pid::from_raw(*pid), signal);
            if session.terminal.is_some() {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGHUP);
            }
            let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
        }
        let now = Instant::now();
        state.stop_at = Some(now + timeout);
        state.hang_up_at = Some(now + HANG_UP);
    }

    /// A session has been started.
    pub fn enter(&self, state: &mut State, pid: i32, session: Running) {
        let started = session.started(pid);
        state.running.insert(pid, session);
        state.used = true;
        notify(state, &started);
    }

    pub fn exec(
        &self,
        state: &mut State,
        request: Exec,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(Reply, Vec<OwnedFd>), InitError> {
        let mut descriptors = descriptors.into_iter();
        let mut next = || descriptors.next().ok_or(InitError::Descriptors);
        let (streams, terminal, master) = match request.terminal {
            None => (Streams::Given([next()?, next()?, next()?]), None, None),
            Some(size) => {
                let owner = if request.root { Uid::from_raw(0) } else { self.sessions.user() };
                let (slave, terminal) = terminal::open(owner, size)?;
                (Streams::Terminal(slave), Some(terminal.number), Some(terminal.master))
            }
        };
        let status = next()?;
        prepare_status(&status)?;
        // SAFETY: init has a single thread, and the child executes or ends without returning here.
        match step("fork", unsafe { fork() })? {
            ForkResult::Child => self.sessions.run(&request, streams),
            ForkResult::Parent { child } => {
                let pid = child.as_raw();
                let raw = rustix::process::Pid::from_raw(pid).ok_or(InitError::Descriptors)?;
                // Not reaped before the next turn of the loop: the pid is still the child's.
                let pidfd = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::empty());
                if pidfd.is_err() {
                    // A session that nobody could hold is none.
                    let _ = kill(child, Signal::SIGKILL);
                }
                let pidfd = step("open a pidfd", pidfd)?;
                if let Some(number) = terminal {
                    let user = if request.root { "root" } else { &self.sessions.plan.user.name };
                    self.utmp.note(number, pid, Some(user));
                }
                let session = Running {
                    number: request.session,
                    status: Some(status),
                    command: self.sessions.shown(&request),
                    root: request.root,
                    terminal,
                };
                self.enter(state, pid, session);
                let mut answer = vec![pidfd];
                answer.extend(master);
                Ok((Reply::Started { session: request.session, pid }, answer))
            }
        }
    }
}

impl State {
    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        self.running.values().map(|session| session.number)
    }

    /// How many have asked before.
    pub fn next_asker(&mut self) -> u64 {
        self.askers += 1;
        self.askers - 1
    }

    pub fn lingers(&self) -> bool {
        self.linger
    }

    pub fn linger_no_longer(&mut self) {
        self.linger = false;
    }

    pub fn is_stopping(&self) -> bool {
        self.stop_at.is_some()
    }
}

impl Running {
    /// A session that nobody waits for.
    pub fn without_caller(number: u64, command: Vec<String>, root: bool) -> Self {
        Self { number, status: None, command, root, terminal: None }
    }

    fn started(&self, pid: i32) -> Notice {
        Notice::Started {
            session: self.number,
            pid,
            command: self.command.clone(),
            root: self.root,
            terminal: self.terminal.is_some(),
        }
    }
}

/// Who gives us a pipe that is full, or something else, must not be able to hold us up at the session's end.
fn prepare_status(status: &OwnedFd) -> Result<(), InitError> {
    use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
    let kind = step("look at the status pipe", fstat(status))?.st_mode;
    if FileType::from_raw_mode(kind) != FileType::Fifo {
        return Err(InitError::Status);
    }
    let flags = step("look at the status pipe", fcntl_getfl(status))?;
    step("set the status pipe", fcntl_setfl(status, flags | OFlags::NONBLOCK))
}

/// Tell every watcher; one that does not keep up with its socket's buffer is dropped, and the daemon asks again.
pub fn notify(state: &mut State, notice: &Notice) {
    for connection in state.connections.iter_mut().filter(|connection| connection.watches) {
        if !send(&connection.socket, notice, &[]) {
            connection.watches = false;
            // The loop sees the end of file and removes it.
            let _ = rustix::net::shutdown(&connection.socket, rustix::net::Shutdown::Both);
        }
    }
}

pub fn send<T: serde::Serialize>(socket: &OwnedFd, message: &T, descriptors: &[BorrowedFd<'_>]) -> bool {
    let Ok(bytes) = serde_json::to_vec(message) else { return false };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return false;
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, flags).is_ok()
}

pub type Packet = (Vec<u8>, Vec<OwnedFd>);

/// A packet, `None` where there is none yet, an error at the end.
pub fn receive(socket: &OwnedFd) -> Result<Option<Packet>, ()> {
    let mut bytes = vec![0; PACKET_MAX + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
        Ok(message) if message.bytes == 0 || message.bytes > PACKET_MAX => Err(()),
        Ok(message) => {
            let mut descriptors = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            bytes.truncate(message.bytes);
            Ok(Some((bytes, descriptors)))
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(_) => Err(()),
    }
}
