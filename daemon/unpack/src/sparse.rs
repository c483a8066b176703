//! Sparse files in tar: GNU's old header and PAX 0.0, 0.1 and 1.0, each with a cap, each map proven before it is used.

use std::io::Read;

use crate::error::{Error, Result};
use crate::tar::{BLOCK, decimal, number};

/// Most regions of one file.
const ENTRIES_MAX: usize = 65_536;

/// The header of type `S`.
pub struct SparseHeader<'a> {
    pub block: &'a [u8; BLOCK],
}

/// `GNU.sparse.*` of a PAX header.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PaxSparse {
    major: Option<u64>,
    minor: Option<u64>,
    name: Option<Vec<u8>>,
    real: Option<u64>,
    count: Option<u64>,
    /// 0.0: offsets and lengths in turns. 0.1: the map.
    pairs: Option<Vec<(u64, u64)>>,
    offset: Option<u64>,
}

/// A proven map.
pub struct Map {
    pub entries: Vec<(u64, u64)>,
    pub stored: u64,
    pub real: u64,
    pub name: Option<Vec<u8>>,
}

impl PaxSparse {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Take one record; `None` where it makes no sense.
    pub fn take(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"major" => self.major = Some(decimal(value)?),
            b"minor" => self.minor = Some(decimal(value)?),
            b"name" if !value.is_empty() && !value.contains(&0) => self.name = Some(value.to_vec()),
            // 0.x call it `size`, 1.0 `realsize`; both at once is one too many.
            b"size" | b"realsize" if self.real.is_none() => self.real = Some(decimal(value)?),
            b"numblocks" => self.count = Some(decimal(value)?),
            b"offset" if self.offset.is_none() => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let pair = (self.offset.take()?, decimal(value)?);
                let pairs = self.pairs.get_or_insert_default();
                if pairs.len() >= ENTRIES_MAX {
                    return None;
                }
                pairs.push(pair);
            }
            b"map" if self.pairs.is_none() => {
                let mut pairs = Vec::new();
                let mut numbers = value.split(|&b| b == b',').filter(|n| !(value.is_empty() && n.is_empty()));
                while let Some(offset) = numbers.next() {
                    if pairs.len() >= ENTRIES_MAX {
                        return None;
                    }
                    pairs.push((decimal(offset)?, decimal(numbers.next()?)?));
                }
                self.pairs = Some(pairs);
            }
            _ => return None,
        }
        Some(())
    }
}

/// Find the map of a member whose header says `size`, reading what of it lies before the data.
pub fn read(
    gnu: Option<SparseHeader<'_>>,
    pax: PaxSparse,
    input: &mut impl Read,
    size: u64,
    path: &[u8],
) -> Result<Map> {
    let bad = |reason: &'static str| Error::member(path, reason);
    let map = match (gnu, pax.is_empty()) {
        (Some(_), false) => return Err(bad("sparse maps of two kinds")),
        (Some(header), true) => old_gnu(header, input, size, path)?,
        (None, _) => {
            let real = pax.real.ok_or_else(|| bad("a sparse file without its real size"))?;
            match (pax.major, pax.minor) {
                (Some(1), Some(0)) if pax.pairs.is_none() && pax.count.is_none() => {
                    let (entries, used) = version_1(input, size, path)?;
                    Map { entries, stored: size - used, real, name: pax.name }
                }
                (None, None) | (Some(0), Some(0 | 1)) => {
                    let entries = pax.pairs.ok_or_else(|| bad("a sparse file without map"))?;
                    if pax.offset.is_some() || pax.count.is_some_and(|n| n != entries.len() as u64) {
                        return Err(bad("a sparse map of another length than it says"));
                    }
                    Map { entries, stored: size, real, name: pax.name }
                }
                _ => return Err(bad("a sparse map of an unknown version")),
            }
        }
    };
    let mut end = 0u64;
    let mut total = 0u64;
    for &(offset, length) in &map.entries {
        let sound = offset >= end;
        end =
            offset.checked_add(length).filter(|_| sound).ok_or_else(|| bad("a sparse map that overlaps"))?;
        total = total.checked_add(length).ok_or_else(|| bad("a sparse map without end"))?;
    }
    if end > map.real || total != map.stored {
        return Err(bad("a sparse map that does not fit its file"));
    }
    Ok(map)
}

fn too_many(path: &[u8]) -> Error {
    Error::member(path, "a sparse map with too many regions")
}

fn old_gnu(header: SparseHeader<'_>, input: &mut impl Read, size: u64, path: &[u8]) -> Result<Map> {
    let bad = |reason: &'static str| Error::member(path, reason);
    let unsigned = |field: &[u8]| number(field).and_then(|n| u64::try_from(n).ok());
    if &header.block[257..265] != b"ustar  \0" {
        return Err(bad("a GNU sparse file in another format"));
    }
    let mut entries = Vec::new();
    let mut ended = false;
    let mut take = |descriptors: &[u8]| -> Result<()> {
        for descriptor in descriptors.chunks_exact(24) {
            if descriptor.iter().all(|&b| b == 0) {
                ended = true;
                continue;
            }
            if ended {
                return Err(bad("a sparse map with a gap"));
            }
            if entries.len() >= ENTRIES_MAX {
                return Err(too_many(path));
            }
            let offset = unsigned(&descriptor[..12]);
            let length = unsigned(&descriptor[12..]);
            entries.push(offset.zip(length).ok_or_else(|| bad("a sparse map whose numbers are none"))?);
        }
        Ok(())
    };
    take(&header.block[386..482])?;
    let mut extended = header.block[482];
    while extended != 0 {
        let mut block = [0; BLOCK];
        input.read_exact(&mut block).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => bad("the archive ends in its sparse map"),
            _ => crate::decode::explain(error),
        })?;
        take(&block[..504])?;
        extended = block[504];
    }
    let real = unsigned(&header.block[483..495]).ok_or_else(|| bad("its real size is no number"))?;
    Ok(Map { entries, stored: size, real, name: None })
}

/// Decimal lines before the data, padded to a block. Returns the map and the bytes it took.
fn version_1(input: &mut impl Read, size: u64, path: &[u8]) -> Result<(Vec<(u64, u64)>, u64)> {
    let bad = |reason: &'static str| Error::member(path, reason);
    let mut block = [0; BLOCK];
    let mut position = BLOCK;
    let mut used = 0u64;
    let mut line = || -> Result<u64> {
        let mut digits = [0; 20];
        let mut length = 0;
        loop {
            if position == BLOCK {
                used += BLOCK as u64;
                if used > size {
                    return Err(bad("a sparse map longer than its member"));
                }
                input.read_exact(&mut block).map_err(|error| match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => bad("the archive ends in its sparse map"),
                    _ => crate::decode::explain(error),
                })?;
                position = 0;
            }
            let byte = block[position];
            position += 1;
            if byte == b'\n' {
                return decimal(&digits[..length]).ok_or_else(|| bad("a sparse map whose numbers are none"));
            }
            *digits.get_mut(length).ok_or_else(|| bad("a sparse map whose numbers are none"))? = byte;
            length += 1;
        }
    };
    let count = line()?;
    if count > ENTRIES_MAX as u64 {
        return Err(too_many(path));
    }
    let mut entries = Vec::new();
    for _ in 0..count {
        entries.push((line()?, line()?));
    }
    Ok((entries, used))
}
