//! The daemon's end of an environment's control socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_sandbox::control::{Notice, PACKET_MAX, Reply, Request};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use tokio::io::unix::AsyncFd;

/// An init answers from its event loop, which blocks on nothing; one that takes longer is stopped or broken.
const ANSWER: Duration = Duration::from_secs(10);
/// Most descriptors in one packet: the session's pidfd and its terminal.
const DESCRIPTORS_MAX: usize = 4;

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("cannot reach init at {path}: {source}")]
    Connect { path: PathBuf, source: rustix::io::Errno },
    #[error("init closed the connection")]
    Closed,
    #[error("init did not answer within {} s", ANSWER.as_secs())]
    Silent,
    #[error("init answered nonsense: {0}")]
    Nonsense(String),
    #[error("the request has {0} bytes, more than the {PACKET_MAX} that fit; shorten command and variables")]
    TooLong(usize),
    #[error("{0}")]
    Refused(String),
    #[error("the control socket failed: {0}")]
    Socket(#[from] rustix::io::Errno),
    #[error("the control socket failed: {0}")]
    Io(#[from] std::io::Error),
}

/// Who listens, as the kernel tells: it cannot be forged, and names the process that called `listen`.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub pid: rustix::process::Pid,
}

/// What init says.
#[derive(Debug, serde::Deserialize)]
#[serde(untagged)]
pub enum Word {
    Reply(Reply),
    Notice(Notice),
    /// A later init's.
    Other(serde::de::IgnoredAny),
}

pub struct Control {
    path: PathBuf,
    socket: AsyncFd<OwnedFd>,
    /// A request whose answer was not waited for: what comes next would be taken for another's.
    unanswered: bool,
}

/// The socket that init is to listen on, bound where later daemons find it.
pub fn bind(path: &Path) -> Result<OwnedFd, ControlError> {
    let connect = |source| ControlError::Connect { path: path.to_owned(), source };
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(connect)?;
    let address = SocketAddrUnix::new(path).map_err(connect)?;
    rustix::net::bind(&socket, &address).map_err(connect)?;
    Ok(socket)
}

impl Control {
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        Ok(Self { path: path.to_owned(), socket: Self::socket(path)?, unanswered: false })
    }

    fn socket(path: &Path) -> Result<AsyncFd<OwnedFd>, ControlError> {
        let failed = |source| ControlError::Connect { path: path.to_owned(), source };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives.
        Ok(unsafe { AsyncFd::register(socket) }.map_err(std::io::Error::from)?)
    }

    /// Leave a connection on which an answer is still to come, or nothing any more, for one to the same process.
    pub fn reconnect(&mut self) -> Result<(), ControlError> {
        let was = self.peer()?.pid;
        use rustix::io::Errno;
        self.socket = match Self::socket(&self.path) {
            // Nobody listens any more, or what init left has been cleared away.
            Err(ControlError::Connect { source: Errno::CONNREFUSED | Errno::NOENT, .. }) => {
                return Err(ControlError::Closed);
            }
            socket => socket?,
        };
        if self.peer()?.pid != was {
            return Err(ControlError::Closed);
        }
        self.unanswered = false;
        Ok(())
    }

    pub fn peer(&self) -> Result<Peer, ControlError> {
        let credentials = rustix::net::sockopt::socket_peercred(self.socket.get_ref())?;
        Ok(Peer { pid: credentials.pid })
    }

    pub async fn send(&self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        let bytes = serde_json::to_vec(request).map_err(|error| ControlError::Nonsense(error.to_string()))?;
        if bytes.len() > PACKET_MAX {
            return Err(ControlError::TooLong(bytes.len()));
        }
        loop {
            let mut ready = self.socket.writable().await?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
            }
            let sent = rustix::net::sendmsg(
                self.socket.get_ref(),
                &[IoSlice::new(&bytes)],
                &mut ancillary,
                SendFlags::NOSIGNAL,
            );
            match sent {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => {
                    return Err(ControlError::Closed);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn receive(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), ControlError> {
        loop {
            let mut ready = self.socket.readable().await?;
            let mut bytes = vec![0; PACKET_MAX + 1];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                self.socket.get_ref(),
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::CMSG_CLOEXEC,
            );
            match received {
                Ok(message) if message.bytes == 0 => return Err(ControlError::Closed),
                Ok(message) => {
                    let mut descriptors = Vec::new();
                    for message in ancillary.drain() {
                        if let RecvAncillaryMessage::ScmRights(rights) = message {
                            descriptors.extend(rights);
                        }
                    }
                    bytes.truncate(message.bytes);
                    return Ok((bytes, descriptors));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::CONNRESET) => return Err(ControlError::Closed),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// One request, one answer; also where the last one was given up.
    pub async fn ask(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), ControlError> {
        if self.unanswered {
            self.reconnect()?;
        }
        self.unanswered = true;
        let exchange = async {
            self.send(request, descriptors).await?;
            self.receive().await
        };
        let (bytes, received) =
            tokio::time::timeout(ANSWER, exchange).await.map_err(|_| ControlError::Silent)??;
        self.unanswered = false;
        match parse(&bytes)? {
            Reply::Refused { message } => Err(ControlError::Refused(message)),
            reply => Ok((reply, received)),
        }
    }

    /// Whether the other end is.
    pub fn is_closed(&self) -> Result<bool, ControlError> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut ready = [PollFd::new(self.socket.get_ref(), PollFlags::empty())];
        // A child's end (SIGCHLD) interrupts even what does not wait.
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::io::retry_on_intr(|| poll(&mut ready, Some(&now)))?;
        Ok(!ready[0].revents().is_empty())
    }

    /// What comes next, however long it takes, where requests were only sent; [`ControlError::Closed`] when init is gone, or did
    /// not get rid of its notices.
    pub async fn next(&self) -> Result<Word, ControlError> {
        let (bytes, _) = self.receive().await?;
        parse(&bytes)
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, ControlError> {
    serde_json::from_slice(bytes).map_err(|error| ControlError::Nonsense(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(socket: &OwnedFd) -> Request {
        let mut bytes = vec![0; PACKET_MAX];
        let (count, _) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::empty()).expect("a request");
        parse(&bytes[..count]).expect("a request")
    }

    fn answer(socket: &OwnedFd, session: u64) {
        let bytes = serde_json::to_vec(&Reply::Started { session, pid: 1 }).expect("an answer");
        rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL).expect("sent");
    }

    /// An answer that comes late is not the next request's: it may carry the descriptors of another's session.
    #[tokio::test]
    async fn a_late_answer_is_nobody_elses() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("control");
        let listener = bind(&path).expect("a socket");
        rustix::net::listen(&listener, 4).expect("listen");
        let (given_up, was_given_up) = std::sync::mpsc::channel();
        let (answered, was_answered) = std::sync::mpsc::channel();
        let init = std::thread::spawn(move || {
            let first = rustix::net::accept(&listener).expect("a connection");
            assert_eq!(request(&first), Request::Hello);
            was_given_up.recv().expect("the client's word");
            answer(&first, 1);
            answered.send(()).expect("the client's ear");
            let second = rustix::net::accept(&listener).expect("another connection");
            assert_eq!(request(&second), Request::Watch);
            answer(&second, 2);
        });
        let mut control = Control::connect(&path).expect("a connection");
        let patience = Duration::from_millis(50);
        assert!(tokio::time::timeout(patience, control.ask(&Request::Hello, &[])).await.is_err());
        given_up.send(()).expect("init's ear");
        was_answered.recv().expect("init's word");
        let (reply, _) = control.ask(&Request::Watch, &[]).await.expect("an answer");
        assert_eq!(reply, Reply::Started { session: 2, pid: 1 });
        init.join().expect("init");
    }

    /// Whoever asks it next is told the same as the first, so that each of them starts it again.
    #[tokio::test]
    async fn an_init_that_is_gone_stays_gone() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("control");
        let listener = bind(&path).expect("a socket");
        rustix::net::listen(&listener, 4).expect("listen");
        let mut control = Control::connect(&path).expect("a connection");
        drop(listener);
        for _ in 0..2 {
            let gone = control.ask(&Request::Hello, &[]).await;
            assert!(matches!(gone, Err(ControlError::Closed)), "{gone:?}");
        }
        std::fs::remove_file(&path).expect("the socket");
        let gone = control.ask(&Request::Hello, &[]).await;
        assert!(matches!(gone, Err(ControlError::Closed)), "{gone:?}");
    }
}
