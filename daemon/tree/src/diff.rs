//! What is different between two stacks. Parts that both have are not walked: what it costs is what was changed.
//!
//! The answer goes to a descriptor, one line for each difference, in the order of listings:
//!
//! ```text
//! modified f:0644:0:0 f:0644:0:0 etc/motd
//! added - d:0755:user:user home/ann/src
//! ```
//!
//! WHAT OLD NEW PATH, where WHAT is `added`, `deleted`, `type`, `modified` (content, or the target of a link), `mode` (mode or
//! owner, and nothing else) or `attributes` (extended attributes alone). OLD and NEW are TYPE:MODE:UID:GID as in listings, or
//! `-`. PATH is escaped as there. Times alone are no difference.
//!
//! As a patch it is what `git apply` takes.

use std::io::{self, Write};
use std::time::Duration;

use casemate_store::listing::{Meta, Owner, escaped};
use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, Stat};
use rustix::io::Errno;
use similar::TextDiff;

use crate::attributes::{self, User};
use crate::error::{Error, Result};
use crate::file;
use crate::ingest::Progress;
use crate::path::StorePath;
use crate::view::{Parts, View};

/// Directories below each other: each is open, in each of both stacks' parts.
const DEPTH: usize = 200;
/// Most bytes of a file whose lines are compared.
const TEXT_MAX: u64 = 4 << 20;
/// What is not found to be shorter in this time is told longer.
const PATIENCE: Duration = Duration::from_secs(5);
const CHUNK: usize = 128 << 10;

struct Comparison<'a> {
    out: io::BufWriter<&'a mut dyn Write>,
    user: User,
    patch: bool,
    differences: u64,
    /// Of both sides, as far as it was read.
    bytes: u64,
    looked: u64,
    progress: Progress<'a>,
}

/// One side of what is compared.
struct One<'a> {
    view: &'a View,
    name: &'a [u8],
}

/// Write how the stack `new` differs from `old`.
pub fn diff(
    store: &OwnedFd,
    [old, new]: [&[String]; 2],
    patch: bool,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<TreeResult> {
    let open = |paths: &[String]| {
        let paths = paths.iter().map(|path| StorePath::parse(path)).collect::<Result<Vec<_>>>()?;
        Parts::open(store, &paths)
    };
    let (old, new) = (open(old)?, open(new)?);
    let mut comparison = Comparison {
        out: io::BufWriter::with_capacity(64 << 10, out),
        user: User::of(store)?,
        patch,
        differences: 0,
        bytes: 0,
        looked: 0,
        progress,
    };
    let root = |parts| View::Directory { parts, closed: false };
    comparison.views(&root(old), &root(new), b".", b".", 0)?;
    comparison.out.flush().map_err(Error::io("write", b"the differences"))?;
    Ok(TreeResult::Compared { differences: comparison.differences })
}

fn kind(stat: &Stat) -> char {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => 'd',
        FileType::RegularFile => 'f',
        FileType::Symlink => 'l',
        FileType::Fifo => 'p',
        FileType::Socket => 's',
        _ => '?',
    }
}

impl View {
    fn stat(&self) -> Option<&Stat> {
        match self {
            Self::Absent | Self::Whiteout => None,
            Self::Leaf { stat, .. } => Some(stat),
            Self::Directory { parts, .. } => parts.top().map(|(_, stat)| stat),
        }
    }
}

impl Comparison<'_> {
    fn views(&mut self, old: &View, new: &View, name: &[u8], path: &[u8], depth: usize) -> Result<()> {
        self.looked += 1;
        (self.progress)(self.bytes, self.looked);
        let sides = [One { view: old, name }, One { view: new, name }];
        if let Some(what) = self.what(&sides, path)? {
            self.tell(what, &sides, path)?;
        }
        let parts = |view: &View| match view {
            View::Directory { parts, .. } => Some(parts.clone()),
            _ => None,
        };
        match (parts(old), parts(new)) {
            (Some(old), Some(new)) if old.are(&new) => Ok(()),
            (None, None) => Ok(()),
            (old, new) => self.directories(&old.unwrap_or_default(), &new.unwrap_or_default(), path, depth),
        }
    }

    fn directories(&mut self, old: &Parts, new: &Parts, path: &[u8], depth: usize) -> Result<()> {
        if depth == DEPTH {
            return Err(Error::Limit {
                path: escaped(path),
                reason: "differences lie deeper than 200 directories",
            });
        }
        let mut names = old.names(path)?;
        names.extend(new.names(path)?);
        for name in names {
            let child = if path == b"." { name.clone() } else { [path, b"/", &name].concat() };
            let (old, new) = (old.look(&name, self.user, &child)?, new.look(&name, self.user, &child)?);
            self.views(&old, &new, &name, &child, depth + 1)?;
        }
        Ok(())
    }

    /// In what way they differ, if they do.
    fn what(&mut self, [old, new]: &[One<'_>; 2], path: &[u8]) -> Result<Option<&'static str>> {
        let (before, after) = match (old.view.stat(), new.view.stat()) {
            (None, None) => return Ok(None),
            (None, Some(_)) => return Ok(Some("added")),
            (Some(_), None) => return Ok(Some("deleted")),
            (Some(before), Some(after)) => (before, after),
        };
        if (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino) {
            return Ok(None);
        }
        if kind(before) != kind(after) {
            return Ok(Some("type"));
        }
        let is_changed = match FileType::from_raw_mode(before.st_mode) {
            FileType::RegularFile => before.st_size != after.st_size || !self.same_content(old, new, path)?,
            FileType::Symlink => target(old, path)? != target(new, path)?,
            _ => false,
        };
        if is_changed {
            return Ok(Some("modified"));
        }
        let meta = |stat: &Stat| {
            let Meta { mode, uid, gid, .. } = attributes::meta(stat, self.user);
            (mode, uid, gid)
        };
        if meta(before) != meta(after) {
            return Ok(Some("mode"));
        }
        let differs = self.xattrs(old, path)? != self.xattrs(new, path)?;
        Ok(differs.then_some("attributes"))
    }

    /// Only directories and regular files have any that a layer keeps.
    fn xattrs(&self, side: &One<'_>, path: &[u8]) -> Result<Vec<casemate_store::listing::Xattr>> {
        let opened;
        let fd = match side.view {
            View::Directory { parts, .. } => match parts.top() {
                Some((fd, _)) => &**fd,
                None => return Ok(Vec::new()),
            },
            View::Leaf { directory, stat }
                if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile =>
            {
                opened = match file::open(&**directory, side.name) {
                    Ok(opened) => opened,
                    Err(Errno::NOENT) => return Ok(Vec::new()),
                    Err(errno) => return Err(Error::system("open", path)(errno)),
                };
                &opened
            }
            _ => return Ok(Vec::new()),
        };
        Ok(attributes::read(fd, self.user, path)?.kept)
    }

    fn same_content(&mut self, old: &One<'_>, new: &One<'_>, path: &[u8]) -> Result<bool> {
        let (Some(old), Some(new)) = (open(old, path)?, open(new, path)?) else { return Ok(false) };
        let (mut one, mut other) = (vec![0; CHUNK], vec![0; CHUNK]);
        loop {
            let (read, also) = (fill(&old, &mut one, path)?, fill(&new, &mut other, path)?);
            self.bytes += (read + also) as u64;
            (self.progress)(self.bytes, self.looked);
            if one[..read] != other[..also] {
                return Ok(false);
            }
            if read < CHUNK {
                return Ok(true);
            }
        }
    }

    fn shown(&self, side: &One<'_>) -> String {
        let Some(stat) = side.view.stat() else { return "-".to_owned() };
        let Meta { mode, uid, gid, .. } = attributes::meta(stat, self.user);
        let owner = |owner| match owner {
            Owner::User => "user".to_owned(),
            Owner::Id(id) => id.to_string(),
        };
        format!("{}:{mode:04o}:{}:{}", kind(stat), owner(uid), owner(gid))
    }

    fn tell(&mut self, what: &str, sides: &[One<'_>; 2], path: &[u8]) -> Result<()> {
        self.differences += 1;
        if self.patch {
            return self.patch(what, sides, path);
        }
        let [old, new] = [self.shown(&sides[0]), self.shown(&sides[1])];
        writeln!(self.out, "{what} {old} {new} {}", escaped(path)).map_err(Error::io("write", path))
    }

    /// What git would say: it knows files and links, and of their modes whether they can be executed.
    fn patch(&mut self, what: &str, [old, new]: &[One<'_>; 2], path: &[u8]) -> Result<()> {
        let (before, after) = (git_mode(old), git_mode(new));
        if before.is_none() && after.is_none() {
            return Ok(());
        }
        let contents = match what {
            // They hold the same, be it text or not.
            "mode" | "attributes" => Some((Vec::new(), Vec::new())),
            _ => content(old, path)?.zip(content(new, path)?),
        };
        if before == after && contents.as_ref().is_some_and(|(before, after)| before == after) {
            return Ok(());
        }
        let [a, b] = [quoted(b"a/", path), quoted(b"b/", path)];
        let mut head = format!("diff --git {a} {b}\n");
        match (before, after) {
            (None, Some(mode)) => head += &format!("new file mode {mode:06o}\n"),
            (Some(mode), None) => head += &format!("deleted file mode {mode:06o}\n"),
            (Some(before), Some(after)) if before != after => {
                head += &format!("old mode {before:06o}\nnew mode {after:06o}\n");
            }
            _ => {}
        }
        let written = Error::io("write", path);
        let a = if before.is_some() { a } else { "/dev/null".to_owned() };
        let b = if after.is_some() { b } else { "/dev/null".to_owned() };
        let body = match &contents {
            None => format!("Binary files {a} and {b} differ\n").into_bytes(),
            Some((before, after)) if before == after => Vec::new(),
            Some((before, after)) => {
                let diff = TextDiff::configure().timeout(PATIENCE).diff_lines(&before[..], &after[..]);
                let mut body = Vec::new();
                diff.unified_diff()
                    .header(&a, &b)
                    .to_writer(&mut body)
                    .map_err(Error::io("compare", path))?;
                body
            }
        };
        self.out.write_all(head.as_bytes()).and_then(|()| self.out.write_all(&body)).map_err(written)
    }
}

fn git_mode(side: &One<'_>) -> Option<u32> {
    let stat = side.view.stat()?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if stat.st_mode & 0o111 != 0 => Some(0o100_755),
        FileType::RegularFile => Some(0o100_644),
        FileType::Symlink => Some(0o120_000),
        _ => None,
    }
}

/// As git shows a name: bytes that are none of a plain one's in octal.
fn quoted(prefix: &[u8], path: &[u8]) -> String {
    let plain = |byte: &u8| matches!(byte, 0x20..=0x7e) && !b"\"\\".contains(byte);
    let all: Vec<u8> = [prefix, path].concat();
    if all.iter().all(plain) {
        return all.iter().map(|byte| char::from(*byte)).collect();
    }
    let mut text = String::from('"');
    for byte in &all {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(*byte)]),
            0x20..=0x7e => text.push(char::from(*byte)),
            byte => text += &format!("\\{byte:03o}"),
        }
    }
    text + "\""
}

fn target(side: &One<'_>, path: &[u8]) -> Result<Vec<u8>> {
    let View::Leaf { directory, .. } = side.view else { return Ok(Vec::new()) };
    match rustix::fs::readlinkat(&**directory, side.name, Vec::new()) {
        Ok(target) => Ok(target.into_bytes()),
        // The environment runs, and has just replaced it.
        Err(Errno::NOENT | Errno::INVAL) => Ok(Vec::new()),
        Err(errno) => Err(Error::system("read the link", path)(errno)),
    }
}

fn open(side: &One<'_>, path: &[u8]) -> Result<Option<OwnedFd>> {
    let View::Leaf { directory, .. } = side.view else { return Ok(None) };
    match file::open(&**directory, side.name) {
        Ok(opened) => Ok(Some(opened)),
        Err(Errno::NOENT | Errno::LOOP) => Ok(None),
        Err(errno) => Err(Error::system("open", path)(errno)),
    }
}

/// Text to be compared line by line: empty where there is none, `None` where it is no text.
fn content(side: &One<'_>, path: &[u8]) -> Result<Option<Vec<u8>>> {
    let Some(stat) = side.view.stat() else { return Ok(Some(Vec::new())) };
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => target(side, path).map(Some),
        FileType::RegularFile if stat.st_size as u64 > TEXT_MAX => Ok(None),
        FileType::RegularFile => {
            let Some(opened) = open(side, path)? else { return Ok(Some(Vec::new())) };
            let mut bytes = vec![0; usize::try_from(stat.st_size).unwrap_or_default()];
            let length = fill(&opened, &mut bytes, path)?;
            bytes.truncate(length);
            Ok((!bytes.contains(&0)).then_some(bytes))
        }
        _ => Ok(Some(Vec::new())),
    }
}

/// As much as there is, up to a full buffer.
fn fill(fd: &OwnedFd, buffer: &mut [u8], path: &[u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match rustix::io::read(fd, &mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::system("read", path)(errno)),
        }
    }
    Ok(filled)
}
