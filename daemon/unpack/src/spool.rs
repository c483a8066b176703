//! The spool: what was decompressed once and judged is what is extracted, byte for byte.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::decode::Chunks;
use crate::tar::Skip;

/// Headers are read, and data passed over: more would be copied for nothing.
const BUFFER: usize = 4 << 10;

/// Reads decompressed bytes and writes each of them to the spool as well.
pub struct Tee<'a> {
    chunks: Chunks,
    chunk: Vec<u8>,
    position: usize,
    spool: Arc<File>,
    /// Where in the spool the next chunk goes.
    pub end: u64,
    done: bool,
    tick: &'a dyn Fn(u64),
}

impl<'a> Tee<'a> {
    /// `tick` is told how far the spool is filled.
    pub fn new(chunks: Chunks, spool: Arc<File>, start: u64, tick: &'a dyn Fn(u64)) -> Self {
        Self { chunks, chunk: Vec::new(), position: 0, spool, end: start, done: false, tick }
    }

    fn fill(&mut self) -> io::Result<()> {
        if self.position < self.chunk.len() || self.done {
            return Ok(());
        }
        let next = self.chunks.receive()?;
        self.chunks.recycle(std::mem::replace(&mut self.chunk, next));
        self.position = 0;
        self.done = self.chunk.is_empty();
        self.spool.write_all_at(&self.chunk, self.end)?;
        self.end += self.chunk.len() as u64;
        (self.tick)(self.end);
        Ok(())
    }
}

impl Read for Tee<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill()?;
        let rest = &self.chunk[self.position..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.position += length;
        Ok(length)
    }
}

impl Skip for Tee<'_> {
    fn skip(&mut self, mut bytes: u64) -> io::Result<()> {
        while bytes > 0 {
            self.fill()?;
            let rest = self.chunk.len() - self.position;
            if rest == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let step = usize::try_from(bytes).map_or(rest, |bytes| bytes.min(rest));
            self.position += step;
            bytes -= step as u64;
        }
        Ok(())
    }
}

/// Reads one archive back from the spool.
#[derive(Debug)]
pub struct Spooled {
    spool: Arc<File>,
    position: u64,
    end: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl Spooled {
    pub fn new(spool: Arc<File>, start: u64, end: u64) -> Self {
        Self { spool, position: start, end, buffer: Vec::new(), used: 0 }
    }

    /// Where in the spool the next byte is.
    pub fn position(&self) -> u64 {
        self.position - (self.buffer.len() - self.used) as u64
    }
}

impl Read for Spooled {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.used == self.buffer.len() {
            let left = usize::try_from(self.end - self.position).unwrap_or(usize::MAX);
            if buffer.len() >= BUFFER {
                let wanted = buffer.len().min(left);
                let length = self.spool.read_at(&mut buffer[..wanted], self.position)?;
                self.position += length as u64;
                return Ok(length);
            }
            self.buffer.resize(BUFFER.min(left), 0);
            self.used = 0;
            let length = self.spool.read_at(&mut self.buffer, self.position)?;
            self.buffer.truncate(length);
            self.position += length as u64;
        }
        let rest = &self.buffer[self.used..];
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.used += length;
        Ok(length)
    }
}

impl Skip for Spooled {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let buffered = (self.buffer.len() - self.used) as u64;
        if bytes <= buffered {
            self.used += bytes as usize;
            return Ok(());
        }
        self.buffer.clear();
        self.used = 0;
        let position = self.position.checked_add(bytes - buffered).filter(|&p| p <= self.end);
        self.position = position.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(())
    }
}
