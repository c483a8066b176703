//! Reading tar, strictly: ustar, PAX, GNU and the old format, and of each only what says one thing.
//!
//! Readers that differ over an archive are what attacks are made of, so whatever two of them could read differently is
//! refused: a name given by PAX and by GNU, a key twice, a header that disagrees with its PAX size, a link or directory
//! with a size, a number that is none, an end that is none. This is a parser of our own for that reason: of the crates
//! looked at, `tar-core` comes nearest, but it merges all headers of a member before the caller sees which spoke, has no
//! negative or fractional times, takes `+7` for a number, and skips stray zero blocks.
//!
//! Nothing in here judges names or touches a file system.

use std::io::Read;

use crate::error::{Error, Result};
use crate::sparse::{self, SparseHeader};

pub const BLOCK: usize = 512;
/// Most bytes of the headers that belong to one member.
const EXTENSION_MAX: u64 = 1 << 20;

/// What kind of thing a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    HardLink,
    Symlink,
    CharacterDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One member, all its headers taken together. Names are as the archive has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: Kind,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of data in the archive.
    pub stored: u64,
    /// Bytes of the file.
    pub size: u64,
    /// Where the data belongs in a sparse file: offset and length, in order, without overlap.
    pub sparse: Option<Vec<(u64, u64)>>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Major and minor number.
    pub device: (u64, u64),
}

/// Reads members off a stream. After [`TarReader::next_member`] the input stands at the member's data, which the next call skips.
#[derive(Debug)]
pub struct TarReader<R> {
    input: R,
    /// Data bytes of the current member that were not read yet, and the padding after them.
    left: u64,
    padding: u64,
    current: Vec<u8>,
}

/// A stream that can skip without reading.
pub trait Skip: Read {
    fn skip(&mut self, bytes: u64) -> std::io::Result<()>;
}

#[derive(Default)]
struct Extensions {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

/// The records of a PAX header that matter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: sparse::PaxSparse,
}

impl<R: Skip> TarReader<R> {
    pub fn new(input: R) -> Self {
        Self { input, left: 0, padding: 0, current: Vec::new() }
    }

    /// What is read from.
    pub fn input(&self) -> &R {
        &self.input
    }

    /// The next member; `None` at a clean end, after which nothing but zeros may follow: see [`TarReader::finish`].
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        self.input.skip(self.left + self.padding).map_err(|error| self.cut(error))?;
        (self.left, self.padding) = (0, 0);
        let mut extensions = Extensions::default();
        loop {
            let block = self.block()?;
            if block.iter().all(|&b| b == 0) {
                if !extensions.is_empty() {
                    return Err(Error::archive("a header for a next member, and no next member"));
                }
                if self.block()?.iter().any(|&b| b != 0) {
                    return Err(Error::archive("a single zero block amid members"));
                }
                return Ok(None);
            }
            let header = Header::parse(&block)?;
            self.current.clone_from(&header.path);
            match header.kind {
                b'x' => {
                    let data = self.extension(&header)?;
                    if extensions.pax.is_some() {
                        return Err(Error::archive("two PAX headers for one member"));
                    }
                    extensions.pax = Some(Pax::parse(&data)?);
                }
                b'g' => {
                    let data = self.extension(&header)?;
                    if !extensions.is_empty() {
                        return Err(Error::archive("a global PAX header between a member's headers"));
                    }
                    // Only `git archive` writes one, with a comment. Defaults for all members would make each mean
                    // something else depending on its place.
                    if Pax::parse(&data)? != Pax::default() {
                        return Err(Error::archive("a global PAX header that changes members"));
                    }
                }
                b'L' | b'K' => {
                    let data = self.extension(&header)?;
                    let name = long_name(data)?;
                    let slot = if header.kind == b'L' {
                        &mut extensions.long_name
                    } else {
                        &mut extensions.long_link
                    };
                    if slot.replace(name).is_some() {
                        return Err(Error::archive("two GNU long names for one member"));
                    }
                }
                _ => return self.member(header, extensions).map(Some),
            }
        }
    }

    fn block(&mut self) -> Result<[u8; BLOCK]> {
        let mut block = [0; BLOCK];
        self.input.read_exact(&mut block).map_err(|error| self.cut(error))?;
        Ok(block)
    }

    fn cut(&self, error: std::io::Error) -> Error {
        if error.kind() == std::io::ErrorKind::UnexpectedEof {
            return match &self.current[..] {
                [] => Error::archive("it ends too early: no tar archive, or cut off"),
                name => Error::member(name, "the archive ends in it or right after it, without an end mark"),
            };
        }
        crate::decode::explain(error)
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>> {
        if !header.extended {
            return Err(Error::member(&header.path, "an extension header in the old tar format"));
        }
        if header.size > EXTENSION_MAX {
            return Err(Error::Limit {
                what: "bytes of extension headers for one member",
                limit: EXTENSION_MAX,
            });
        }
        let padded = header.size.next_multiple_of(BLOCK as u64);
        let mut data = vec![0; padded as usize];
        self.input.read_exact(&mut data).map_err(|error| self.cut(error))?;
        data.truncate(header.size as usize);
        Ok(data)
    }

    fn member(&mut self, header: Header, extensions: Extensions) -> Result<Member> {
        let Extensions { pax, long_name, long_link } = extensions;
        let pax = pax.unwrap_or_default();
        let mut path =
            one_of(pax.path, long_name, "name", &header.path)?.unwrap_or_else(|| header.path.clone());
        self.current.clone_from(&path);
        let bad = |reason: &'static str| Error::member(&path, reason);
        let link = one_of(pax.link, long_link, "link target", &path)?.unwrap_or(header.link);
        let kind = match header.kind {
            // In the old format a directory is a file whose name ends in a slash.
            b'0' | 0 if header.old && path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharacterDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(Error::member(
                    &path,
                    format!("a member of unknown type {:?}", char::from(other)),
                ));
            }
        };
        let size = match pax.size {
            None => header.size,
            // Where the field is too small for the size, writers put 0 or the largest number.
            Some(size)
                if size == header.size
                    || (size > 0o77_777_777_777 && [0, 0o77_777_777_777].contains(&header.size)) =>
            {
                size
            }
            Some(_) => return Err(bad("its PAX header and its tar header disagree about its size")),
        };
        if kind != Kind::File && size != 0 {
            return Err(bad("a size on something that has no content"));
        }
        if !matches!(kind, Kind::HardLink | Kind::Symlink) && !link.is_empty() {
            return Err(bad("a link target on something that is no link"));
        }
        let mut sparse = None;
        let (mut stored, mut real) = (size, size);
        if header.kind == b'S' || !pax.sparse.is_empty() {
            if kind != Kind::File {
                return Err(bad("a sparse map on something that has no content"));
            }
            let gnu = (header.kind == b'S').then_some(SparseHeader { block: &header.block });
            let map = sparse::read(gnu, pax.sparse, &mut self.input, size, &path)?;
            stored = map.stored;
            real = map.real;
            sparse = Some(map.entries);
            if let Some(name) = map.name {
                path = name;
                self.current.clone_from(&path);
            }
        }
        self.left = stored;
        self.padding = stored
            .checked_next_multiple_of(BLOCK as u64)
            .map(|end| end - stored)
            .ok_or_else(|| Error::member(&path, "its size is too large for any archive"))?;
        // Readers add the two; the sum of all positions must stay a number.
        if stored > i64::MAX as u64 || real > i64::MAX as u64 {
            return Err(Error::member(&path, "its size is too large for any file"));
        }
        Ok(Member {
            kind,
            link,
            mode: header.mode,
            uid: pax.uid.unwrap_or(header.uid),
            gid: pax.gid.unwrap_or(header.gid),
            mtime: pax.mtime.unwrap_or((header.mtime, 0)),
            stored,
            size: real,
            sparse,
            xattrs: pax.xattrs,
            device: header.device,
            path,
        })
    }

    /// See that nothing but zeros follows the end, and give the input back.
    pub fn finish(mut self) -> Result<R> {
        let mut buffer = [0; 4096];
        loop {
            match self.input.read(&mut buffer) {
                Ok(0) => return Ok(self.input),
                Ok(length) if buffer[..length].iter().all(|&b| b == 0) => {}
                Ok(_) => return Err(Error::archive("something follows its end")),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(crate::decode::explain(error)),
            }
        }
    }
}

impl Extensions {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

fn one_of(pax: Option<Vec<u8>>, gnu: Option<Vec<u8>>, what: &str, path: &[u8]) -> Result<Option<Vec<u8>>> {
    match (pax, gnu) {
        (Some(_), Some(_)) => Err(Error::member(path, format!("PAX and GNU headers both give its {what}"))),
        (pax, gnu) => Ok(pax.or(gnu)),
    }
}

fn long_name(mut data: Vec<u8>) -> Result<Vec<u8>> {
    if data.last() == Some(&0) {
        data.pop();
    }
    if data.is_empty() || data.contains(&0) {
        return Err(Error::archive("a GNU long name that is empty or holds a NUL"));
    }
    Ok(data)
}

struct Header {
    path: Vec<u8>,
    link: Vec<u8>,
    kind: u8,
    mode: u32,
    uid: u64,
    gid: u64,
    size: u64,
    mtime: i64,
    device: (u64, u64),
    /// The format has extension headers.
    extended: bool,
    old: bool,
    block: [u8; BLOCK],
}

impl Header {
    fn parse(block: &[u8; BLOCK]) -> Result<Self> {
        let text = |from: usize, length: usize| {
            let field = &block[from..from + length];
            &field[..field.iter().position(|&b| b == 0).unwrap_or(length)]
        };
        let mut path = text(0, 100).to_vec();
        let checksum = number(&block[148..156]).filter(|&sum| sum >= 0);
        let sum: u32 = block[..148].iter().chain(&block[156..]).map(|&b| u32::from(b)).sum();
        if checksum != Some(i64::from(sum + 8 * u32::from(b' '))) {
            return Err(Error::archive("a header with a wrong checksum: no tar archive, or damaged"));
        }
        let (ustar, gnu) = (&block[257..265] == b"ustar\x0000", &block[257..265] == b"ustar  \0");
        let old = !ustar && !gnu;
        // GNU tar's own old format still fills in the device numbers; names in there would be another format's.
        if old && (block[257..265].iter().any(|&b| b != 0) || block[345..].iter().any(|&b| b != 0)) {
            return Err(Error::member(&path, "a header of an unknown format"));
        }
        if ustar && !text(345, 155).is_empty() {
            path = [text(345, 155), b"/", &path].concat();
        }
        let field = |from: usize, length: usize, what: &str| {
            number(&block[from..from + length])
                .ok_or_else(|| Error::member(&path, format!("its {what} is no number")))
        };
        let positive = |from: usize, length: usize, what: &str| {
            u64::try_from(field(from, length, what)?)
                .map_err(|_| Error::member(&path, format!("its {what} is negative")))
        };
        let mode = positive(100, 8, "mode")?;
        // Old writers put the file type in as well; that one is the type flag's to tell.
        let mode = u32::try_from(mode)
            .ok()
            .filter(|mode| mode & !0o177_777 == 0)
            .ok_or_else(|| Error::member(&path, "its mode is none"))?
            & 0o7777;
        let device = if old { (0, 0) } else { (positive(329, 8, "device")?, positive(337, 8, "device")?) };
        let header = Self {
            link: text(157, 100).to_vec(),
            kind: block[156],
            mode,
            uid: positive(108, 8, "owner")?,
            gid: positive(116, 8, "group")?,
            size: positive(124, 12, "size")?,
            mtime: field(136, 12, "time")?,
            device,
            extended: !old,
            old,
            block: *block,
            path: Vec::new(),
        };
        Ok(Self { path, ..header })
    }
}

/// A number of a header: octal digits, spaces before and spaces or NULs after; or GNU's base 256. All blank is 0.
pub(crate) fn number(field: &[u8]) -> Option<i64> {
    if let Some((&first @ (0x80 | 0xff), rest)) = field.split_first() {
        let negative = first == 0xff;
        let filler = if negative { 0xff } else { 0 };
        let (head, tail) = rest.split_at(rest.len().saturating_sub(8));
        if head.iter().any(|&b| b != filler) {
            return None;
        }
        // Eight bytes for the long fields, seven for the short ones.
        let start = if negative { -1i64 } else { 0 };
        let value = tail.iter().fold(start, |value, &b| value << 8 | i64::from(b));
        return (tail.len() < 8 || (value < 0) == negative).then_some(value);
    }
    let start = field.iter().position(|&b| b != b' ').unwrap_or(field.len());
    let digits = &field[start..];
    let length = digits.iter().position(|b| !(b'0'..=b'7').contains(b)).unwrap_or(digits.len());
    if digits[length..].iter().any(|&b| b != 0 && b != b' ') {
        return None;
    }
    digits[..length].iter().try_fold(0i64, |value, &b| value.checked_mul(8)?.checked_add(i64::from(b - b'0')))
}

/// A decimal number without sign, as PAX has them.
pub(crate) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `seconds` or `seconds.fraction`, perhaps negative.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (seconds, fraction) = match text.iter().position(|&b| b == b'.') {
        Some(point) => (&text[..point], &text[point + 1..]),
        None => (text, &b"0"[..]),
    };
    if fraction.is_empty() || !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(decimal(seconds)?).ok()?;
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanoseconds = digits.fold(0u32, |value, &b| value * 10 + u32::from(b - b'0'));
    Some(match (negative, nanoseconds) {
        (false, n) => (seconds, n),
        (true, 0) => (-seconds, 0),
        (true, n) => (-seconds - 1, 1_000_000_000 - n),
    })
}

impl Pax {
    /// `LENGTH KEY=VALUE\n`, again and again.
    pub fn parse(mut data: &[u8]) -> Result<Self> {
        let bad = |reason: &'static str| Error::archive(reason);
        let mut pax = Self::default();
        let mut seen: Vec<&[u8]> = Vec::new();
        while !data.is_empty() {
            let space = data
                .iter()
                .take(20)
                .position(|&b| b == b' ')
                .ok_or_else(|| bad("a PAX record without length"))?;
            let length = decimal(&data[..space])
                .and_then(|length| usize::try_from(length).ok())
                .filter(|&length| length > space + 1 && length <= data.len() && data[0] != b'0')
                .ok_or_else(|| bad("a PAX record whose length is wrong"))?;
            let record = data[space + 1..length]
                .strip_suffix(b"\n")
                .ok_or_else(|| bad("a PAX record whose length is wrong"))?;
            data = &data[length..];
            let equals =
                record.iter().position(|&b| b == b'=').ok_or_else(|| bad("a PAX record without '='"))?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            if key.is_empty() {
                return Err(bad("a PAX record without key"));
            }
            let repeatable = matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes");
            if !repeatable {
                if seen.contains(&key) {
                    return Err(Error::archive(format!("the PAX key {} twice", crate::error::shown(key))));
                }
                if seen.len() >= 1000 {
                    return Err(Error::Limit { what: "PAX records for one member", limit: 1000 });
                }
                seen.push(key);
            }
            pax.take(key, value)?;
        }
        Ok(pax)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let bad = || {
            Error::archive(format!(
                "the PAX key {} has the value {}",
                crate::error::shown(key),
                crate::error::shown(value)
            ))
        };
        let name =
            || if value.is_empty() || value.contains(&0) { Err(bad()) } else { Ok(Some(value.to_vec())) };
        match key {
            b"path" => self.path = name()?,
            b"linkpath" => self.link = name()?,
            b"size" => self.size = Some(decimal(value).ok_or_else(bad)?),
            b"uid" => self.uid = Some(decimal(value).ok_or_else(bad)?),
            b"gid" => self.gid = Some(decimal(value).ok_or_else(bad)?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(bad)?),
            b"hdrcharset" if value == b"BINARY" || value == b"ISO-IR 10646 2000 UTF-8" => {}
            b"atime" | b"ctime" | b"uname" | b"gname" | b"comment" | b"charset" => {}
            _ if key.starts_with(b"SCHILY.xattr.") => {
                let name = &key[b"SCHILY.xattr.".len()..];
                if name.is_empty() || name.contains(&0) {
                    return Err(bad());
                }
                self.xattrs.push((name.to_vec(), value.to_vec()));
            }
            b"SCHILY.acl.access" | b"SCHILY.acl.default" => {
                let (name, default) = match key {
                    b"SCHILY.acl.access" => (&b"system.posix_acl_access"[..], false),
                    _ => (&b"system.posix_acl_default"[..], true),
                };
                let acl = crate::acl::encode(value, default).map_err(|reason| {
                    Error::archive(format!("the PAX key {}: {reason}", crate::error::shown(key)))
                })?;
                self.xattrs.extend(acl.map(|acl| (name.to_vec(), acl)));
            }
            _ if key.starts_with(b"GNU.sparse.") => {
                self.sparse.take(&key[b"GNU.sparse.".len()..], value).ok_or_else(bad)?
            }
            // A vendor's own words change nothing that we keep; POSIX's reserved ones would.
            _ if key.contains(&b'.') && !key.starts_with(b"realtime.") && !key.starts_with(b"security.") => {}
            _ => return Err(Error::archive(format!("an unknown PAX key {}", crate::error::shown(key)))),
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
