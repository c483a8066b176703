//! From a slice of a file to its decompressed bytes, within limits.
//!
//! The format is told by its magic number, never by a name. Decoding runs on a thread of its own, so that it overlaps with
//! judging and spooling.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use casemate_worker::protocol::UnpackLimits;

use crate::error::{Error, Result};

const CHUNK: usize = 256 << 10;
/// Chunks on their way from the decoder: enough for a small package whole, which then is ready when its turn comes.
const AHEAD: usize = 16;
/// Below this, a ratio says nothing.
const RATIO_FROM: u64 = 64 << 20;

/// Part of a file, read by position: descriptors may be shared.
#[derive(Debug, Clone)]
pub struct Slice {
    pub file: Arc<File>,
    pub position: u64,
    pub end: u64,
    /// Bytes that were read of it.
    pub consumed: Arc<AtomicU64>,
}

impl Slice {
    pub fn new(file: Arc<File>, offset: u64, length: u64) -> Result<Self> {
        let size = file.metadata().map_err(Error::io("look at the archive"))?.len();
        let end = offset.checked_add(length).filter(|&end| end <= size);
        let end = end.ok_or_else(|| Error::archive("it ends before the end that it was said to have"))?;
        Ok(Self { file, position: offset, end, consumed: Arc::default() })
    }

    /// Exactly these bytes from its start, if it is so long.
    pub fn peek(&self, buffer: &mut [u8]) -> Result<bool> {
        if self.end - self.position < buffer.len() as u64 {
            return Ok(false);
        }
        self.file.read_exact_at(buffer, self.position).map_err(Error::io("read the archive"))?;
        Ok(true)
    }
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.end - self.position).unwrap_or(usize::MAX));
        let length = self.file.read_at(&mut buffer[..wanted], self.position)?;
        self.position += length as u64;
        self.consumed.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

/// A limit that was passed, on its way through `io::Error`.
#[derive(Debug, thiserror::Error)]
#[error("more {what} than allowed ({limit})")]
struct Passed {
    what: &'static str,
    limit: u64,
}

/// What an error of a decoder means.
pub fn explain(error: io::Error) -> Error {
    if let Some(&Passed { what, limit }) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        return Error::Limit { what, limit };
    }
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<liblzma::stream::Error>());
    if inner == Some(&liblzma::stream::Error::MemLimit) || error.to_string().contains("too much memory") {
        return Error::archive("its decoder would need more memory than allowed");
    }
    if error.raw_os_error().is_some() {
        return Error::Io { action: "read the archive", source: error };
    }
    Error::archive(format!("its compressed data is damaged or cut off, or something follows it ({error})"))
}

enum Decoder {
    Plain(BufReader<Slice>),
    Gzip(Box<flate2::bufread::MultiGzDecoder<BufReader<Slice>>>),
    Xz(Box<liblzma::bufread::XzDecoder<BufReader<Slice>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, BufReader<Slice>>>),
    Bzip2(Box<bzip2::bufread::MultiBzDecoder<BufReader<Slice>>>),
}

impl Decoder {
    fn new(slice: Slice, memory: u64) -> Result<Self> {
        let mut magic = [0; 6];
        if !slice.peek(&mut magic)? {
            return Err(Error::archive("too short for an archive"));
        }
        let input = BufReader::with_capacity(CHUNK, slice);
        Ok(match magic {
            [0x1f, 0x8b, 0x08, ..] => Self::Gzip(Box::new(flate2::bufread::MultiGzDecoder::new(input))),
            [0xfd, b'7', b'z', b'X', b'Z', 0] => {
                let stream =
                    liblzma::stream::Stream::new_stream_decoder(memory, liblzma::stream::CONCATENATED)
                        .map_err(|error| explain(error.into()))?;
                Self::Xz(Box::new(liblzma::bufread::XzDecoder::new_stream(input, stream)))
            }
            [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(explain)?;
                // Beside its window a decoder needs little; the window is a power of two.
                decoder.window_log_max(memory.max(1 << 10).ilog2().min(31)).map_err(explain)?;
                Self::Zstd(Box::new(decoder))
            }
            [b'B', b'Z', b'h', b'1'..=b'9', ..] => {
                Self::Bzip2(Box::new(bzip2::bufread::MultiBzDecoder::new(input)))
            }
            _ => Self::Plain(input),
        })
    }

    fn reader(&mut self) -> &mut dyn Read {
        match self {
            Self::Plain(reader) => reader,
            Self::Gzip(reader) => reader,
            Self::Xz(reader) => reader,
            Self::Zstd(reader) => reader,
            Self::Bzip2(reader) => reader,
        }
    }
}

/// Decompressed chunks, as they come from the decoder's thread.
#[derive(Debug)]
pub struct Chunks {
    filled: Receiver<io::Result<Vec<u8>>>,
    empty: SyncSender<Vec<u8>>,
}

impl Chunks {
    /// Begin to decode. `spent` counts the bytes of all slices of a request.
    pub fn start(slice: Slice, limits: &UnpackLimits, spent: &Arc<AtomicU64>) -> Result<Self> {
        let consumed = slice.consumed.clone();
        let mut decoder = Decoder::new(slice, limits.decoder_memory)?;
        let (fill, filled) = sync_channel(AHEAD);
        let (empty, emptied) = sync_channel::<Vec<u8>>(AHEAD + 2);
        let (bytes, ratio) = (limits.bytes, limits.ratio);
        let spent = spent.clone();
        let decode = move || {
            let mut own = 0u64;
            loop {
                let mut chunk = emptied.try_recv().unwrap_or_default();
                let result = next_chunk(decoder.reader(), &mut chunk).and_then(|()| {
                    let length = chunk.len() as u64;
                    own += length;
                    let compressed = consumed.load(Ordering::Relaxed).max(1);
                    if spent.fetch_add(length, Ordering::Relaxed) + length > bytes {
                        Err(io::Error::other(Passed { what: "decompressed bytes", limit: bytes }))
                    } else if own > RATIO_FROM && own / compressed > ratio {
                        Err(io::Error::other(Passed {
                            what: "decompressed bytes for each compressed one",
                            limit: ratio,
                        }))
                    } else {
                        Ok(chunk)
                    }
                });
                let last = result.as_ref().map_or(true, Vec::is_empty);
                if fill.send(result).is_err() || last {
                    return;
                }
            }
        };
        // Without a name: to set it is a system call that no worker needs.
        std::thread::Builder::new()
            .stack_size(512 << 10)
            .spawn(decode)
            .map_err(Error::io("start the decoder's thread"))?;
        Ok(Self { filled, empty })
    }

    /// The next chunk; empty at the end.
    pub fn receive(&mut self) -> io::Result<Vec<u8>> {
        self.filled.recv().unwrap_or_else(|_| Err(io::Error::other("the decoder died")))
    }

    /// Give a chunk back to be filled again.
    pub fn recycle(&self, chunk: Vec<u8>) {
        // When the decoder is done, nobody wants it.
        let _ = self.empty.try_send(chunk);
    }
}

fn next_chunk(reader: &mut dyn Read, chunk: &mut Vec<u8>) -> io::Result<()> {
    chunk.resize(CHUNK, 0);
    let mut filled = 0;
    while filled < CHUNK {
        match reader.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    chunk.truncate(filled);
    Ok(())
}
