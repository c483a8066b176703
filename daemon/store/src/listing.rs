//! Listings: a tree as text, in one form only, so that equal trees have equal digests.
//!
//! ```text
//! casemate-listing 1
//! d 0755 0 0 1700000000.000000000 .
//! d 0755 0 0 1700000000.000000000 bin
//! f 4755 0 0 1699999999.123456789 72072 <BLAKE3 of the content> bin/su security.capability=\x01…
//! h bin/su bin/su-too
//! l 0777 0 0 1700000000.000000000 usr/lib lib
//! o 0755 user user 1700000000.000000000 opaque-directory
//! w deleted
//! ```
//!
//! The first line names the format. Every other line is one entry, fields parted by one space, ended by one newline:
//!
//! | type | fields | |
//! | --- | --- | --- |
//! | `d`, `o` | META PATH XATTR… | directory; opaque directory (overlayfs: hides what is below it) |
//! | `f` | META SIZE DIGEST PATH XATTR… | regular file |
//! | `h` | TARGET PATH | another name of the file TARGET, an earlier `f` of this listing |
//! | `l` | META TARGET PATH XATTR… | symbolic link |
//! | `p`, `s` | META PATH XATTR… | fifo, socket |
//! | `w` | PATH | whiteout |
//!
//! META is `MODE UID GID MTIME`: four octal digits (permissions with set-id and sticky bits), decimal ids or the word
//! `user` (the user whose store it is; their number would make digests depend on who built), seconds and nine digits of
//! nanoseconds. XATTR is `NAME=VALUE`, sorted by name, each name once. PATH is relative, without `.`, `..` and empty
//! components; the root itself is `.`, and comes first.
//!
//! Bytes other than printable ASCII, and space, `\` and `=`, are written `\xHH`; no other byte is.
//!
//! Entries are sorted by their paths, component by component, as bytes: a directory comes right before all that is in it.
//! So a tree is listed, and a listing checked, in one walk with the memory of its depth. A parent is always listed.
//!
//! Sparse files need no note: holes are not content, and the object keeps them.

use std::cmp::Ordering;
use std::fmt::Write as _;
use std::io::{self, BufRead, Read, Write};
use std::str::FromStr;

use crate::names::Digest;

/// First line of every listing.
pub const HEADER: &[u8] = b"casemate-listing 1\n";
/// Most bytes of one line.
pub const LINE_MAX: usize = 4 << 20;

/// Why a listing can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ListingError {
    #[error("line {line}: {reason}")]
    Malformed { line: u64, reason: &'static str },
    #[error("entry {path}: {reason}")]
    Refused { path: String, reason: &'static str },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Who owns an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Owner {
    /// The user whose store it is.
    User,
    /// An id of the environment.
    Id(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Time {
    pub seconds: i64,
    /// Below 1,000,000,000; counts forward also where `seconds` is negative.
    pub nanoseconds: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Xattr {
    pub name: Vec<u8>,
    pub value: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Meta {
    /// The low twelve bits of `st_mode`.
    pub mode: u16,
    pub uid: Owner,
    pub gid: Owner,
    pub mtime: Time,
    /// Sorted by name, each name once.
    pub xattrs: Vec<Xattr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Node {
    Directory { meta: Meta, opaque: bool },
    File { meta: Meta, size: u64, content: Digest },
    HardLink { target: Vec<u8> },
    Symlink { meta: Meta, target: Vec<u8> },
    Fifo { meta: Meta },
    Socket { meta: Meta },
    Whiteout,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Entry {
    /// Relative to the tree's root, which is `.`.
    pub path: Vec<u8>,
    pub node: Node,
}

/// The order of entries: by components, each as bytes.
pub fn compare(a: &[u8], b: &[u8]) -> Ordering {
    match (a, b) {
        (b".", b".") => Ordering::Equal,
        (b".", _) => Ordering::Less,
        (_, b".") => Ordering::Greater,
        // No name holds a NUL, so `/` as the least byte sorts by components.
        _ => {
            let key = |&byte: &u8| if byte == b'/' { 0 } else { byte };
            a.iter().map(key).cmp(b.iter().map(key))
        }
    }
}

/// Write bytes in the listing's escaped form.
pub fn escape(bytes: &[u8], out: &mut String) {
    for &byte in bytes {
        match byte {
            b' ' | b'\\' | b'=' => _ = write!(out, "\\x{byte:02x}"),
            0x21..=0x7e => out.push(char::from(byte)),
            _ => _ = write!(out, "\\x{byte:02x}"),
        }
    }
}

/// A path as it may be shown.
pub fn escaped(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    escape(bytes, &mut text);
    text
}

fn unescape(text: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'\\' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let digits = tail.strip_prefix(b"x")?.get(..2)?;
        let value = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        bytes.push(value(digits[0])? << 4 | value(digits[1])?);
        rest = &tail[3..];
    }
    // Only one spelling is canonical.
    let mut again = String::with_capacity(text.len());
    escape(&bytes, &mut again);
    (again.as_bytes() == text).then_some(bytes)
}

fn good_path(path: &[u8]) -> bool {
    path == b"."
        || path.split(|&b| b == b'/').all(|component| {
            !component.is_empty() && component != b"." && component != b".." && !component.contains(&0)
        })
}

fn parent(path: &[u8]) -> &[u8] {
    path.iter().rposition(|&b| b == b'/').map_or(b".", |slash| &path[..slash])
}

impl Meta {
    /// META of the format, then XATTR… : also what an object's short digest is made of.
    pub(crate) fn encode(&self, between: &str, out: &mut String) {
        let owner = |owner: Owner| match owner {
            Owner::User => "user".to_owned(),
            Owner::Id(id) => id.to_string(),
        };
        let Time { seconds, nanoseconds } = self.mtime;
        let _ = write!(out, "{:04o} {} {} ", self.mode, owner(self.uid), owner(self.gid));
        let _ = write!(out, "{seconds}.{nanoseconds:09}{between}");
        for Xattr { name, value } in &self.xattrs {
            out.push(' ');
            escape(name, out);
            out.push('=');
            escape(value, out);
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.mode > 0o7777 {
            return Err("mode out of range");
        }
        if self.mtime.nanoseconds >= 1_000_000_000 {
            return Err("nanoseconds out of range");
        }
        if !self.xattrs.is_sorted_by(|a, b| a.name < b.name) {
            return Err("extended attributes out of order, or one twice");
        }
        if self.xattrs.iter().any(|x| x.name.is_empty() || x.name.contains(&0)) {
            return Err("bad name of an extended attribute");
        }
        Ok(())
    }
}

impl Entry {
    fn meta(&self) -> Option<&Meta> {
        match &self.node {
            Node::Directory { meta, .. }
            | Node::File { meta, .. }
            | Node::Symlink { meta, .. }
            | Node::Fifo { meta }
            | Node::Socket { meta } => Some(meta),
            Node::HardLink { .. } | Node::Whiteout => None,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        if !good_path(&self.path) {
            return Err("bad path");
        }
        if self.path == b"." && !matches!(self.node, Node::Directory { .. }) {
            return Err("the root is no directory");
        }
        self.meta().map_or(Ok(()), Meta::check)?;
        match &self.node {
            Node::Symlink { meta, .. } if meta.mode != 0o777 => Err("a symbolic link's mode is 0777"),
            Node::Symlink { target, .. } if target.is_empty() || target.contains(&0) => {
                Err("bad link target")
            }
            Node::HardLink { target } if !good_path(target) || target == b"." => Err("bad link target"),
            Node::HardLink { target } if compare(target, &self.path) != Ordering::Less => {
                Err("a hard link to a later entry")
            }
            _ => Ok(()),
        }
    }

    /// This entry's line, newline included.
    fn encode(&self, line: &mut String) {
        let path = |between: &str| {
            let mut text = String::from(between);
            escape(&self.path, &mut text);
            text
        };
        match &self.node {
            Node::Directory { meta, opaque } => {
                line.push_str(if *opaque { "o " } else { "d " });
                meta.encode(&path(" "), line);
            }
            Node::File { meta, size, content } => {
                line.push_str("f ");
                meta.encode(&path(&format!(" {size} {content} ")), line);
            }
            Node::HardLink { target } => {
                line.push_str("h ");
                escape(target, line);
                line.push_str(&path(" "));
            }
            Node::Symlink { meta, target } => {
                line.push_str("l ");
                meta.encode(&path(&format!(" {} ", escaped(target))), line);
            }
            Node::Fifo { meta } => {
                line.push_str("p ");
                meta.encode(&path(" "), line);
            }
            Node::Socket { meta } => {
                line.push_str("s ");
                meta.encode(&path(" "), line);
            }
            Node::Whiteout => {
                line.push('w');
                line.push_str(&path(" "));
            }
        }
        line.push('\n');
    }

    /// The entry of one line, without its newline.
    fn decode(line: &[u8]) -> Result<Self, &'static str> {
        let mut fields = Fields { rest: Some(line) };
        let kind = fields.next("type")?;
        let entry = match kind {
            b"d" | b"o" => {
                let mut meta = fields.meta()?;
                let path = fields.bytes("path")?;
                meta.xattrs = fields.xattrs()?;
                Self { path, node: Node::Directory { meta, opaque: kind == b"o" } }
            }
            b"f" => {
                let mut meta = fields.meta()?;
                let size = number(fields.next("size")?).ok_or("bad size")?;
                let content =
                    text(fields.next("digest")?).and_then(|t| t.parse().ok()).ok_or("bad digest")?;
                let path = fields.bytes("path")?;
                meta.xattrs = fields.xattrs()?;
                Self { path, node: Node::File { meta, size, content } }
            }
            b"h" => {
                let target = fields.bytes("target")?;
                Self { path: fields.bytes("path")?, node: Node::HardLink { target } }
            }
            b"l" => {
                let mut meta = fields.meta()?;
                let target = fields.bytes("target")?;
                let path = fields.bytes("path")?;
                meta.xattrs = fields.xattrs()?;
                Self { path, node: Node::Symlink { meta, target } }
            }
            b"p" | b"s" => {
                let mut meta = fields.meta()?;
                let path = fields.bytes("path")?;
                meta.xattrs = fields.xattrs()?;
                Self { path, node: if kind == b"p" { Node::Fifo { meta } } else { Node::Socket { meta } } }
            }
            b"w" => Self { path: fields.bytes("path")?, node: Node::Whiteout },
            _ => return Err("unknown type"),
        };
        if fields.rest.is_some() {
            return Err("trailing fields");
        }
        entry.check()?;
        Ok(entry)
    }
}

struct Fields<'a> {
    rest: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    fn next(&mut self, missing: &'static str) -> Result<&'a [u8], &'static str> {
        let rest = self.rest.ok_or(missing)?;
        let end = rest.iter().position(|&b| b == b' ');
        self.rest = end.map(|end| &rest[end + 1..]);
        let field = &rest[..end.unwrap_or(rest.len())];
        if field.is_empty() { Err(missing) } else { Ok(field) }
    }

    fn bytes(&mut self, what: &'static str) -> Result<Vec<u8>, &'static str> {
        unescape(self.next(what)?).ok_or("bad escape")
    }

    fn meta(&mut self) -> Result<Meta, &'static str> {
        let mode = self.next("mode")?;
        if mode.len() != 4 || !mode.iter().all(|b| (b'0'..=b'7').contains(b)) {
            return Err("bad mode");
        }
        let mode = mode.iter().fold(0, |mode, b| mode << 3 | u16::from(b - b'0'));
        let uid = owner(self.next("owner")?).ok_or("bad owner")?;
        let gid = owner(self.next("group")?).ok_or("bad group")?;
        let mtime = time(self.next("time")?).ok_or("bad time")?;
        Ok(Meta { mode, uid, gid, mtime, xattrs: Vec::new() })
    }

    fn xattrs(&mut self) -> Result<Vec<Xattr>, &'static str> {
        let mut xattrs = Vec::new();
        while self.rest.is_some() {
            let field = self.next("extended attribute")?;
            let equals = field.iter().position(|&b| b == b'=').ok_or("extended attribute without value")?;
            let name = unescape(&field[..equals]).ok_or("bad escape")?;
            let value = unescape(&field[equals + 1..]).ok_or("bad escape")?;
            xattrs.push(Xattr { name, value });
        }
        Ok(xattrs)
    }
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// A number in its one canonical spelling.
fn number<T: FromStr + ToString>(bytes: &[u8]) -> Option<T> {
    let text = text(bytes)?;
    let value = text.parse::<T>().ok()?;
    (value.to_string() == text).then_some(value)
}

fn owner(bytes: &[u8]) -> Option<Owner> {
    if bytes == b"user" { Some(Owner::User) } else { number(bytes).map(Owner::Id) }
}

fn time(bytes: &[u8]) -> Option<Time> {
    let point = bytes.iter().position(|&b| b == b'.')?;
    let (seconds, fraction) = (&bytes[..point], &bytes[point + 1..]);
    if fraction.len() != 9 || !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(Time { seconds: number(seconds)?, nanoseconds: text(fraction)?.parse().ok()? })
}

/// Sees that entries come in order and below listed directories; shared by both ends.
#[derive(Debug, Default)]
struct Order {
    last: Option<Vec<u8>>,
    /// Lengths of those prefixes of `last` that are directories.
    directories: Vec<usize>,
}

impl Order {
    fn check(&mut self, entry: &Entry) -> Result<(), &'static str> {
        let path = &entry.path;
        match &self.last {
            None if path == b"." => {}
            None => return Err("the root comes first"),
            Some(last) => {
                if compare(last, path) != Ordering::Less {
                    return Err("out of order");
                }
                let parent = parent(path);
                if parent != b"." {
                    if !(last.starts_with(parent)
                        && (last.len() == parent.len() || last[parent.len()] == b'/'))
                    {
                        return Err("its directory is not listed");
                    }
                    self.directories.retain(|&length| length <= parent.len());
                    if self.directories.last() != Some(&parent.len()) {
                        return Err("it is below something that is no directory");
                    }
                } else {
                    self.directories.clear();
                }
            }
        }
        if matches!(entry.node, Node::Directory { .. }) && path != b"." {
            self.directories.push(path.len());
        }
        self.last = Some(path.clone());
        Ok(())
    }
}

/// Writes a listing, entry by entry.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    hasher: blake3::Hasher,
    order: Order,
    line: String,
    entries: u64,
}

impl<W: Write> Writer<W> {
    /// `out` should be buffered.
    pub fn new(mut out: W) -> io::Result<Self> {
        out.write_all(HEADER)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(HEADER);
        Ok(Self { out, hasher, order: Order::default(), line: String::new(), entries: 0 })
    }

    /// Add an entry, which must be sound and come after those before it.
    pub fn write(&mut self, entry: &Entry) -> Result<(), ListingError> {
        let refused = |reason| ListingError::Refused { path: escaped(&entry.path), reason };
        entry.check().map_err(refused)?;
        self.order.check(entry).map_err(refused)?;
        self.line.clear();
        entry.encode(&mut self.line);
        if self.line.len() > LINE_MAX {
            return Err(refused("names and attributes too long"));
        }
        self.hasher.update(self.line.as_bytes());
        self.out.write_all(self.line.as_bytes())?;
        self.entries += 1;
        Ok(())
    }

    /// How many entries were written.
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Flush, and give back the output and the listing's digest.
    pub fn finish(mut self) -> Result<(W, Digest), ListingError> {
        if self.entries == 0 {
            return Err(ListingError::Refused { path: ".".to_owned(), reason: "the root is missing" });
        }
        self.out.flush()?;
        Ok((self.out, self.hasher.finalize().into()))
    }
}

/// Reads a listing, entry by entry, and takes nothing but what [`Writer`] writes.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    hasher: blake3::Hasher,
    order: Order,
    line: Vec<u8>,
    number: u64,
}

impl<R: BufRead> Reader<R> {
    pub fn new(input: R) -> Result<Self, ListingError> {
        let mut reader = Self {
            input,
            hasher: blake3::Hasher::new(),
            order: Order::default(),
            line: Vec::new(),
            number: 0,
        };
        if !reader.line()? || reader.line != HEADER {
            return Err(ListingError::Malformed { line: 1, reason: "no listing of a known format" });
        }
        Ok(reader)
    }

    fn line(&mut self) -> Result<bool, ListingError> {
        self.line.clear();
        self.number += 1;
        let bytes = (&mut self.input).take(LINE_MAX as u64 + 1).read_until(b'\n', &mut self.line)?;
        if bytes == 0 {
            return Ok(false);
        }
        if self.line.last() != Some(&b'\n') || bytes > LINE_MAX {
            return Err(ListingError::Malformed { line: self.number, reason: "cut off, or too long" });
        }
        self.hasher.update(&self.line);
        Ok(true)
    }

    /// The next entry; `None` at the end. Not an iterator: after an error there is no next.
    pub fn read(&mut self) -> Result<Option<Entry>, ListingError> {
        if !self.line()? {
            if self.number == 2 {
                return Err(ListingError::Malformed { line: 2, reason: "the root is missing" });
            }
            return Ok(None);
        }
        let malformed = |reason| ListingError::Malformed { line: self.number, reason };
        let entry = Entry::decode(&self.line[..self.line.len() - 1]).map_err(malformed)?;
        self.order.check(&entry).map_err(malformed)?;
        Ok(Some(entry))
    }

    /// The digest of all that was read; the listing's own once [`Reader::read`] gave `None`.
    pub fn digest(&self) -> Digest {
        self.hasher.finalize().into()
    }
}

#[cfg(test)]
#[path = "listing_tests.rs"]
mod tests;
