//! The relay: a name server inside that asks the host's. What it carries is a stranger's, so it is a process of its own
//! that sees no file and may do nothing but speak to the network.
//!
//! One thread a question, blocking: the simplest that holds. Their number is bounded; beyond it questions are dropped, as
//! a resolver expects of UDP.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use casemate_worker::confine::{RootDirectory, drop_capabilities, enter_root};
use casemate_worker::profiles;
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::unistd::{ForkResult, fork};
use rustix::process::Pid;
use rustix::thread::CapabilitySet;

use super::gate::Gate;
use crate::child::Child;
use crate::mounts::step;
use crate::{InitError, sys};

/// Questions and connections at a time.
const THREADS_MAX: usize = 128;
const STACK: usize = 256 << 10;
/// How long one server may think; the resolver that asks us gives up after 5 s.
const ANSWER: Duration = Duration::from_millis(2500);
/// A connection that says nothing is closed.
const IDLE: Duration = Duration::from_secs(10);
/// Bytes of a message's header, the bit in it that tells answers, and codes of failure.
const HEADER: usize = 12;
const RESPONSE: u8 = 0x80;
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

/// The keeper's side of it.
pub struct Relay {
    child: Child,
    servers: File,
}

impl Relay {
    pub fn begin(udp: OwnedFd, tcp: OwnedFd, gate: Gate) -> Result<Self, InitError> {
        let (updates, servers) = step("make a pipe", nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC))?;
        // SAFETY: the keeper has a single thread.
        match step("fork", unsafe { fork() })? {
            ForkResult::Child => {
                let mut keep = vec![updates.as_raw_fd(), udp.as_raw_fd(), tcp.as_raw_fd()];
                keep.extend(gate.descriptor());
                let outcome = step("close inherited descriptors", sys::close_all_but(&keep))
                    .and_then(|()| confine(gate.capabilities()))
                    .and_then(|()| serve(updates.into(), udp.into(), tcp.into(), gate));
                if let Err(error) = &outcome {
                    eprintln!("casemate-init: relay: {error}");
                }
                // SAFETY: exit handlers are the launcher's.
                unsafe { libc::_exit(i32::from(outcome.is_err())) }
            }
            ForkResult::Parent { child } => {
                let pid = Pid::from_raw(child.as_raw()).ok_or(InitError::Descriptors)?;
                Ok(Self { child: step("open a pidfd", Child::new(pid))?, servers: servers.into() })
            }
        }
    }

    /// Whom to ask from now on.
    pub fn tell(&self, servers: &[SocketAddr]) -> Result<(), InitError> {
        let servers: Vec<String> = servers.iter().map(SocketAddr::to_string).collect();
        let line = format!("{}\n", servers.join(" "));
        step("tell the relay", (&self.servers).write_all(line.as_bytes()))
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.child.as_fd()
    }
}

fn confine(keep: CapabilitySet) -> Result<(), InitError> {
    step("die with the keeper", prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL))?;
    let spaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    step("make namespaces", unshare(spaces))?;
    enter_root(RootDirectory::Empty)?;
    drop_capabilities(keep)?;
    step("forbid new privileges", prctl::set_no_new_privs())?;
    step("be undumpable", prctl::set_dumpable(false))?;
    casemate_worker::seccomp::apply(profiles::RELAY).map_err(|error| InitError::Confine(error.into()))
}

type Servers = RwLock<Vec<SocketAddr>>;

/// What every thread needs.
struct Shared {
    servers: Servers,
    gate: Gate,
    threads: AtomicUsize,
}

struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.threads.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// Do `work` in a thread, if there is room for one more.
    fn spawn(self: &Arc<Self>, work: impl FnOnce(&Self) + Send + 'static) {
        let place = Place(Arc::clone(self));
        if self.threads.fetch_add(1, Ordering::Relaxed) >= THREADS_MAX {
            return;
        }
        let thread = std::thread::Builder::new().stack_size(STACK).spawn(move || work(&place.0));
        // No memory for a thread: the question goes unanswered, and its place is free again.
        drop(thread);
    }
}

fn serve(updates: File, udp: UdpSocket, tcp: TcpListener, gate: Gate) -> Result<(), InitError> {
    let shared = Arc::new(Shared { servers: Servers::default(), gate, threads: AtomicUsize::new(0) });
    let threads = || std::thread::Builder::new().stack_size(STACK);
    let (socket, of) = (Arc::new(udp), Arc::clone(&shared));
    step("start a thread", threads().spawn(move || datagrams(&socket, &of)))?;
    let of = Arc::clone(&shared);
    step("start a thread", threads().spawn(move || connections(&tcp, &of)))?;
    for line in BufReader::new(updates).lines() {
        let line = step("read the servers", line)?;
        let new = line.split(' ').filter_map(|server| server.parse().ok()).collect();
        *shared.servers.write().unwrap_or_else(PoisonError::into_inner) = new;
    }
    // The keeper is gone.
    Ok(())
}

fn datagrams(socket: &Arc<UdpSocket>, shared: &Arc<Shared>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        // An error is one of an earlier answer's, which its asker did not wait for.
        let Ok((size, asker)) = socket.recv_from(&mut buffer) else { continue };
        let question = buffer[..size].to_vec();
        let socket = Arc::clone(socket);
        shared.spawn(move |shared| {
            if let Some(answer) = shared.resolve(&question, ask_datagram) {
                // Whoever no longer listens does not want it.
                let _ = socket.send_to(&answer, asker);
            }
        });
    }
}

fn connections(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let Ok((stream, _)) = listener.accept() else { continue };
        // The end of a connection is its asker's business.
        shared.spawn(move |shared| drop(converse(&stream, shared)));
    }
}

fn read_message(mut stream: &TcpStream) -> std::io::Result<Vec<u8>> {
    let mut size = [0; 2];
    stream.read_exact(&mut size)?;
    let mut message = vec![0; u16::from_be_bytes(size).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn write_message(mut stream: &TcpStream, message: &[u8]) -> std::io::Result<()> {
    let size = u16::try_from(message.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&size.to_be_bytes()[..], message].concat())
}

fn converse(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    loop {
        let question = read_message(stream)?;
        let Some(answer) = shared.resolve(&question, ask_stream) else { return Ok(()) };
        write_message(stream, &answer)?;
    }
}

fn ask_datagram(server: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let any = match server {
        SocketAddr::V4(_) => SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0),
        SocketAddr::V6(_) => SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.send(question)?;
    let end = Instant::now() + ANSWER;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let size = socket.recv(&mut buffer)?;
        if size >= HEADER && buffer[..2] == question[..2] {
            buffer.truncate(size);
            return Ok(buffer);
        }
    }
}

fn ask_stream(server: SocketAddr, question: &[u8]) -> std::io::Result<Vec<u8>> {
    let stream = TcpStream::connect_timeout(&server, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    write_message(&stream, question)?;
    let answer = read_message(&stream)?;
    if answer.len() < HEADER || answer[..2] != question[..2] {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    Ok(answer)
}

/// An answer without records.
fn fail(question: &[u8], code: u8) -> Vec<u8> {
    let mut failure = question.to_vec();
    failure[2] |= RESPONSE;
    failure[3] = failure[3] & 0xf0 | code;
    failure
}

impl Shared {
    /// The first answer that a server gives, else SERVFAIL; nothing to what is no question. What the gate does not let
    /// through does not exist.
    fn resolve(
        &self,
        question: &[u8],
        ask: impl Fn(SocketAddr, &[u8]) -> std::io::Result<Vec<u8>>,
    ) -> Option<Vec<u8>> {
        if question.len() < HEADER || question[2] & RESPONSE != 0 {
            return None;
        }
        let Some(ports) = self.gate.asked(question) else { return Some(fail(question, NXDOMAIN)) };
        let servers = self.servers.read().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = servers.into_iter().find_map(|server| ask(server, question).ok());
        // Before the asker has the address, it must be open to them.
        let admitted = answer.filter(|answer| match self.gate.answered(answer, &ports) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("casemate-init: relay: an answer was dropped: {error}");
                false
            }
        });
        Some(admitted.unwrap_or_else(|| fail(question, SERVFAIL)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(list: &[&str]) -> Shared {
        let servers = list.iter().map(|server| server.parse().expect("address")).collect();
        Shared { servers: RwLock::new(servers), gate: Gate::Open, threads: AtomicUsize::new(0) }
    }

    #[test]
    fn the_next_server_is_asked_where_one_fails() {
        let question = [7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, b'q'];
        let ask = |server: SocketAddr, question: &[u8]| match server.port() {
            1 => Err(std::io::ErrorKind::TimedOut.into()),
            _ => Ok([question, b"!"].concat()),
        };
        let answer = shared(&["192.0.2.1:1", "192.0.2.2:53"]).resolve(&question, ask).expect("an answer");
        assert_eq!(answer, [&question[..], b"!"].concat());
        let failure = shared(&["192.0.2.1:1"]).resolve(&question, ask).expect("an answer");
        assert_eq!(failure, [7, 7, 0x81, 2, 0, 1, 0, 0, 0, 0, 0, 0, b'q']);
        assert_eq!(shared(&[]).resolve(&question[..11], ask), None);
        assert_eq!(shared(&[]).resolve(&failure, ask), None);
    }
}
