//! The gate: the daemon's end of its bus connection, which every message passes before zbus sees it. Here, once and for
//! methods, properties, introspection and GetManagedObjects alike, callers are judged and what they may have under way is
//! bounded: zbus itself makes a task of every call, reads messages of up to 128 MiB into memory, and counts nothing.
//!
//! A call counts from here until its reply leaves. So that every call has one, the flag that wants none is taken off,
//! and the reply held back on its way out.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use casemate_interfaces::Error;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use zbus::connection::socket::{ReadHalf, Socket, Split, WriteHalf};
use zbus::export::async_trait::async_trait;
use zbus::message::Type;
use zbus::names::BusName;
use zbus::{DBusError, Message};

use crate::callers::{Call, Callers, Refusal};

/// Bytes of a message: a manifest and a lock of the longest, and room for the rest.
pub const MESSAGE_MAX: usize = (2 << 20) + (256 << 10);
/// Bytes of a message's header: a path and a few names.
const HEAD_MAX: usize = 64 << 10;
/// What the kernel passes at most in one packet (SCM_MAX_FD).
const PACKET_DESCRIPTORS: usize = 253;
/// Refusals that wait to be sent; then reading waits too.
const REFUSALS: usize = 64;

/// Bytes of a message before its fields: byte order, type, flags, version, the body's length, serial, the fields' length.
const PRIMARY: usize = 16;
const TYPE_AT: usize = 1;
const FLAGS_AT: usize = 2;
const BODY_AT: usize = 4;
const FIELDS_AT: usize = 12;
const NO_REPLY: u8 = 1;

#[derive(Debug)]
pub struct Gate {
    stream: UnixStream,
    callers: Arc<Callers>,
    refusals: mpsc::Sender<Message>,
}

impl Gate {
    /// The second part is to be sent by [`answer`] once the connection stands.
    pub fn new(stream: UnixStream, callers: Arc<Callers>) -> (Self, mpsc::Receiver<Message>) {
        let (refusals, refused) = mpsc::channel(REFUSALS);
        (Self { stream, callers, refusals }, refused)
    }
}

/// Send what the gate refuses with.
pub async fn answer(connection: zbus::Connection, mut refused: mpsc::Receiver<Message>) {
    while let Some(message) = refused.recv().await {
        if let Err(error) = connection.send(&message).await {
            tracing::debug!(%error, "cannot refuse a call");
        }
    }
}

impl Socket for Gate {
    type ReadHalf = Incoming;
    type WriteHalf = Outgoing;

    fn split(self) -> Split<Incoming, Outgoing> {
        let stream = Arc::new(self.stream);
        let incoming = Incoming {
            stream: Arc::clone(&stream),
            ahead: Vec::new(),
            callers: Arc::clone(&self.callers),
            refusals: self.refusals,
        };
        Split::new(incoming, Outgoing { stream, callers: self.callers })
    }
}

#[derive(Debug)]
pub struct Incoming {
    stream: Arc<UnixStream>,
    /// What was read beyond the end of the handshake.
    ahead: Vec<u8>,
    callers: Arc<Callers>,
    refusals: mpsc::Sender<Message>,
}

/// A message as it came, or as much of it as is kept.
struct Frame {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    /// Its length on the wire.
    length: usize,
}

impl Frame {
    /// Only its header was kept.
    fn is_cut(&self) -> bool {
        self.bytes.len() < self.length
    }
}

/// Bytes that were read already, for zbus to make a message of.
#[derive(Debug)]
struct Replay {
    bytes: Vec<u8>,
    position: usize,
    descriptors: Vec<OwnedFd>,
}

#[async_trait]
impl ReadHalf for Replay {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> std::io::Result<(usize, Vec<OwnedFd>)> {
        let left = &self.bytes[self.position..];
        let count = left.len().min(buffer.len());
        buffer[..count].copy_from_slice(&left[..count]);
        self.position += count;
        Ok((count, std::mem::take(&mut self.descriptors)))
    }
}

fn broken(message: &'static str) -> zbus::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, message).into()
}

fn ended() -> zbus::Error {
    std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the bus closed the connection").into()
}

/// A length in a message's primary header.
fn number(header: &[u8; PRIMARY], at: usize) -> zbus::Result<usize> {
    let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
    let number = match header[0] {
        b'l' => u32::from_le_bytes(bytes),
        b'B' => u32::from_be_bytes(bytes),
        _ => return Err(broken("a message has no byte order")),
    };
    usize::try_from(number).map_err(|_| broken("a message is longer than memory"))
}

impl Incoming {
    async fn fill(&mut self, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> zbus::Result<()> {
        let mut position = self.ahead.len().min(buffer.len());
        buffer[..position].copy_from_slice(&self.ahead[..position]);
        self.ahead.drain(..position);
        while position < buffer.len() {
            let (count, more) = self.recvmsg(&mut buffer[position..]).await?;
            if count == 0 {
                return Err(ended());
            }
            descriptors.extend(more);
            position += count;
        }
        Ok(())
    }

    /// Read and forget.
    async fn skip(&mut self, mut count: usize, descriptors: &mut Vec<OwnedFd>) -> zbus::Result<()> {
        let mut sink = vec![0; count.min(64 << 10)];
        while count > 0 {
            let part = count.min(sink.len());
            self.fill(&mut sink[..part], descriptors).await?;
            count -= part;
        }
        Ok(())
    }

    /// One message. Of one that is too long only the header is kept, as that of a message without a body; `None` where not
    /// even that is of a bearable length.
    async fn frame(&mut self) -> zbus::Result<Option<Frame>> {
        let mut descriptors = Vec::new();
        let mut header = [0; PRIMARY];
        self.fill(&mut header, &mut descriptors).await?;
        let head = (PRIMARY + number(&header, FIELDS_AT)?).next_multiple_of(8);
        let length = head + number(&header, BODY_AT)?;
        if head > HEAD_MAX {
            self.skip(length - PRIMARY, &mut descriptors).await?;
            return Ok(None);
        }
        let kept = if length > MESSAGE_MAX { head } else { length };
        let mut bytes = vec![0; kept];
        bytes[..PRIMARY].copy_from_slice(&header);
        self.fill(&mut bytes[PRIMARY..], &mut descriptors).await?;
        if kept < length {
            bytes[BODY_AT..BODY_AT + 4].fill(0);
            self.skip(length - kept, &mut descriptors).await?;
        }
        Ok(Some(Frame { bytes, descriptors, length }))
    }

    async fn refuse(&self, call: &Message, error: &Error) {
        let text = error.description().unwrap_or_default();
        match Message::error(&call.header(), error.name()).build(&text) {
            Ok(reply) => {
                // Nobody to send it: the daemon ends.
                let _ = self.refusals.send(reply).await;
            }
            Err(error) => tracing::debug!(%error, "cannot refuse a call"),
        }
    }
}

#[async_trait]
impl ReadHalf for Incoming {
    async fn receive_message(
        &mut self,
        sequence: u64,
        // The bus passes no descriptors before it has answered Hello.
        ahead: &mut Vec<u8>,
        _descriptors: &mut Vec<OwnedFd>,
    ) -> zbus::Result<Message> {
        self.ahead.append(ahead);
        loop {
            let Some(mut frame) = self.frame().await? else {
                tracing::warn!("a message with too long a header was dropped");
                continue;
            };
            let wanted = frame.bytes[FLAGS_AT] & NO_REPLY == 0;
            let (cut, length, descriptors) = (frame.is_cut(), frame.length, frame.descriptors.len());
            let is_call = frame.bytes[TYPE_AT] == Type::MethodCall as u8;
            if is_call {
                frame.bytes[FLAGS_AT] &= !NO_REPLY;
            }
            let mut replay = Replay { bytes: frame.bytes, position: 0, descriptors: frame.descriptors };
            let message = replay.receive_message(sequence, &mut Vec::new(), &mut Vec::new()).await;
            let message = match message {
                Ok(message) => message,
                // Nonsense, or fewer descriptors than it says: this process could hold no more.
                Err(error) => {
                    tracing::warn!(%error, length, descriptors, "a message cannot be read");
                    continue;
                }
            };
            if !is_call {
                if cut {
                    tracing::warn!(length, "a message that is no call is too long");
                    continue;
                }
                return Ok(message);
            }
            let outcome = {
                let header = message.header();
                let call = Call { serial: header.primary().serial_num(), wanted, bytes: length, descriptors };
                match header.sender() {
                    Some(sender) if cut => Err(Refusal::too_long(sender, length, MESSAGE_MAX)),
                    Some(sender) => self.callers.admit(sender.as_str(), call).await,
                    None => Err(Refusal::Silent),
                }
            };
            match outcome {
                Ok(()) => return Ok(message),
                Err(Refusal::Said(error)) if wanted => self.refuse(&message, &error).await,
                Err(_) => {}
            }
        }
    }

    async fn recvmsg(&mut self, buffer: &mut [u8]) -> std::io::Result<(usize, Vec<OwnedFd>)> {
        loop {
            self.stream.readable().await?;
            let received = self.stream.try_io(Interest::READABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
                let mut ancillary = RecvAncillaryBuffer::new(&mut space);
                let mut parts = [IoSliceMut::new(buffer)];
                let received =
                    rustix::net::recvmsg(&self.stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
                let mut descriptors = Vec::new();
                for message in ancillary.drain() {
                    if let RecvAncillaryMessage::ScmRights(rights) = message {
                        descriptors.extend(rights);
                    }
                }
                Ok((received.bytes, descriptors))
            });
            match received {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

#[derive(Debug)]
pub struct Outgoing {
    stream: Arc<UnixStream>,
    callers: Arc<Callers>,
}

#[async_trait]
impl WriteHalf for Outgoing {
    async fn send_message(&mut self, message: &Message) -> zbus::Result<()> {
        if matches!(message.message_type(), Type::MethodReturn | Type::Error) {
            let header = message.header();
            if let (Some(BusName::Unique(caller)), Some(serial)) =
                (header.destination(), header.reply_serial())
                && !self.callers.answered(caller.as_str(), serial)
            {
                return Ok(());
            }
        }
        let data = message.data();
        let mut position = 0;
        while position < data.len() {
            // Descriptors go with the first byte.
            let descriptors: Vec<BorrowedFd<'_>> = match position {
                0 => data.fds().iter().map(AsFd::as_fd).collect(),
                _ => Vec::new(),
            };
            position += self.sendmsg(&data[position..], &descriptors).await?;
        }
        Ok(())
    }

    async fn sendmsg(&mut self, buffer: &[u8], descriptors: &[BorrowedFd<'_>]) -> std::io::Result<usize> {
        loop {
            self.stream.writable().await?;
            let sent = self.stream.try_io(Interest::WRITABLE, || {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_DESCRIPTORS))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
                    return Err(std::io::ErrorKind::InvalidInput.into());
                }
                let parts = [IoSlice::new(buffer)];
                Ok(rustix::net::sendmsg(&self.stream, &parts, &mut ancillary, SendFlags::NOSIGNAL)?)
            });
            match sent {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    async fn close(&mut self) -> std::io::Result<()> {
        rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both)?;
        Ok(())
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}
