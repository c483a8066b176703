//! What may be in an archive. Judged is the final name, after all headers; one bad member refuses the archive.
//!
//! | member | |
//! | --- | --- |
//! | names | `x/y`, `./x/y`, `x/y/` for directories, `.` for the root; any bytes but NUL. Absolute names, `..`, empty and `.` components inside, components above 255 bytes: refused |
//! | parents | a directory of this archive, or implied (then made as root's, 0755, at time 0); a member below a link or file is refused |
//! | duplicates | refused; in packages directories repeat, and a file or link may take the place of an earlier package's |
//! | hard links | to a regular file that came before in this archive (packages: in this package or before) |
//! | symbolic links | any target: they are never followed here, and the sandbox resolves them inside |
//! | devices | below `dev/` passed over and counted, since root file systems carry them and no user may make them; elsewhere refused, as is 0:0, overlayfs's whiteout, anywhere |
//! | fifos | taken: nothing on the host opens one to wait |
//! | `.wh.…` | refused: whiteouts belong to layers of other formats, not to a base |
//! | mode | taken with set-id and sticky bits: ids are subordinate ones, mounts are nosuid for the host |
//! | owner | 0 to 65535, all that an environment maps |
//! | xattrs | `user.…` (not `user.overlay.…`), `security.capability`, `system.posix_acl_…` on files and directories; labels of security modules (`security.selinux`, `.ima`, `.evm`, `.apparmor`, `.SMACK64…`) are the host's and passed over; all others refused |
//! | root | its entry sets the time; mode and owner stay 0755 and root's |
//!
//! Packages are Debian's, and land in a merged `/usr`: `bin/x` becomes `usr/bin/x`, and so for `sbin`, `lib`, `lib32`,
//! `lib64`, `libx32`, `libo32`. The links `bin → usr/bin`, … are made before extraction; a package that ships such a
//! link agrees with what is there, or is refused.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};

use casemate_worker::protocol::UnpackLimits;

use crate::error::{Error, Result};
use crate::tar::{Kind, Member};

/// Most bytes of a symbolic link's target that a kernel takes.
const TARGET_MAX: usize = 4095;
/// Directories that a merged `/usr` has as links.
const MERGED: [&[u8]; 7] = [b"bin", b"sbin", b"lib", b"lib32", b"lib64", b"libx32", b"libo32"];
/// Those that every architecture has.
const MERGED_ALWAYS: [&[u8]; 3] = [b"bin", b"sbin", b"lib"];
/// What all file systems in use can keep: 1901 (32 bits, signed) to 2446 (ext4).
const TIMES: std::ops::Range<i64> = -(1 << 31)..(1 << 34) - (1 << 31);

/// What is being unpacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Image,
    Packages,
}

/// A member that was found good, with its final name: no `./`, no trailing `/`, the root is empty.
#[derive(Debug)]
pub struct Item {
    pub path: Vec<u8>,
    /// Of a hard link, in the same form.
    pub target: Vec<u8>,
    pub member: Member,
}

/// What became known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Seen {
    /// A directory that only other names imply.
    Implied = 0,
    Directory = 1,
    File = 2,
    Symlink = 3,
    Other = 4,
    /// A directory that has its attributes.
    Finished = 5,
}

impl Seen {
    fn is_directory(self) -> bool {
        matches!(self, Self::Implied | Self::Directory | Self::Finished)
    }
}

/// 61 bits of a path's keyed hash and three of [`Seen`]: nine bytes a path, for archives of millions. The key is random, so
/// nobody can aim at a collision; by chance, one archive of a million members in five million is refused for a duplicate
/// that it does not have, and taken when tried again.
#[derive(Debug, Clone, Copy)]
struct Mark(u64);

impl PartialEq for Mark {
    fn eq(&self, other: &Self) -> bool {
        self.0 >> 3 == other.0 >> 3
    }
}

impl Eq for Mark {}

impl Hash for Mark {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0 >> 3);
    }
}

/// Marks are hashes already.
#[derive(Debug, Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {}

    fn write_u64(&mut self, value: u64) {
        // The table takes its tag from the top bits.
        self.0 = value << 3 | value >> 58;
    }
}

type Marks = HashSet<Mark, BuildHasherDefault<AsIs>>;

/// Judges members, one after the other, of one archive or of several packages.
pub struct Judge {
    source: Source,
    limits: UnpackLimits,
    key: RandomState,
    marks: Marks,
    /// Names of the current package: each once.
    own: Marks,
    merged: BTreeSet<&'static [u8]>,
    pub members: u64,
    /// Bytes of all files, holes included.
    bytes: u64,
    /// Device nodes passed over.
    pub devices: u64,
}

impl Judge {
    pub fn new(source: Source, limits: UnpackLimits) -> Self {
        let merged = if source == Source::Packages { MERGED_ALWAYS.into() } else { BTreeSet::new() };
        Self {
            source,
            limits,
            key: RandomState::new(),
            marks: Marks::default(),
            own: Marks::default(),
            merged,
            members: 0,
            bytes: 0,
            devices: 0,
        }
    }

    /// The links of a merged `/usr` that are due.
    pub fn merged(&self) -> impl Iterator<Item = &'static [u8]> {
        self.merged.iter().copied()
    }

    /// The next package begins.
    pub fn next_package(&mut self) {
        self.own = Marks::default();
    }

    /// What depends on the member alone: its final name, or `None` where it is passed over. The same for every pass.
    pub fn item(&self, member: Member) -> Result<Option<Item>> {
        let bad = |reason: &'static str| Error::member(&member.path, reason);
        let mut path = self.name(&member.path, member.kind == Kind::Directory)?;
        if self.source == Source::Packages {
            let first = path.split(|&b| b == b'/').next().unwrap_or_default();
            if MERGED.contains(&first) {
                if path == first && member.kind == Kind::Symlink {
                    let agrees = [&b"usr/"[..], b"/usr/"]
                        .iter()
                        .any(|usr| member.link.strip_prefix(*usr) == Some(first));
                    return if agrees {
                        Ok(None)
                    } else {
                        Err(bad("a link in the place of a merged /usr's"))
                    };
                }
                path = [b"usr/", &path[..]].concat();
            }
        }
        let mut target = Vec::new();
        match member.kind {
            Kind::HardLink => {
                target = self
                    .name(&member.link, false)
                    .map_err(|_| bad("its target is no name in the archive"))?;
                let first = target.split(|&b| b == b'/').next().unwrap_or_default();
                if self.source == Source::Packages && MERGED.contains(&first) {
                    target = [b"usr/", &target[..]].concat();
                }
            }
            Kind::Symlink => {
                if member.link.is_empty() || member.link.len() > TARGET_MAX || member.link.contains(&0) {
                    return Err(bad("its target is empty, too long, or holds a NUL"));
                }
            }
            Kind::CharacterDevice | Kind::BlockDevice => {
                if member.device == (0, 0) {
                    return Err(bad("a whiteout in a base"));
                }
                if !path.starts_with(b"dev/") {
                    return Err(bad("a device node"));
                }
            }
            Kind::File | Kind::Directory | Kind::Fifo => {}
        }
        if path.is_empty() && member.kind != Kind::Directory {
            return Err(bad("the root, but no directory"));
        }
        if member.uid > 65_535 || member.gid > 65_535 {
            return Err(Error::member(
                &member.path,
                format!(
                    "its owner {}:{} is outside of 0 to 65535, which is all that an environment has",
                    member.uid, member.gid
                ),
            ));
        }
        if !TIMES.contains(&member.mtime.0) {
            return Err(bad("its time is out of range"));
        }
        let mut member = member;
        let xattrs = std::mem::take(&mut member.xattrs);
        member.xattrs = self.xattrs(&member, xattrs)?;
        Ok(Some(Item { path, target, member }))
    }

    fn name(&self, name: &[u8], directory: bool) -> Result<Vec<u8>> {
        let bad = |reason: &'static str| Error::member(name, reason);
        let mut rest = name;
        if rest.is_empty() {
            return Err(bad("an empty name"));
        }
        if rest.contains(&0) {
            return Err(bad("a NUL in its name"));
        }
        if rest.starts_with(b"/") {
            return Err(bad("an absolute name"));
        }
        if let Some(stripped) = rest.strip_suffix(b"/") {
            if !directory {
                return Err(bad("a trailing slash on something that is no directory"));
            }
            rest = stripped;
        }
        if rest == b"." {
            return Ok(Vec::new());
        }
        rest = rest.strip_prefix(b"./").unwrap_or(rest);
        let mut depth = 0;
        for component in rest.split(|&b| b == b'/') {
            match component {
                b"" | b"." => return Err(bad("an empty or '.' component in its name")),
                b".." => return Err(bad("'..' in its name")),
                c if c.len() > 255 => return Err(bad("a component above 255 bytes in its name")),
                c if c.starts_with(b".wh.") => return Err(bad("a whiteout in a base")),
                _ => depth += 1,
            }
        }
        if depth > self.limits.depth {
            return Err(Error::member(name, format!("deeper than {} directories", self.limits.depth)));
        }
        Ok(rest.to_vec())
    }

    fn xattrs(&self, member: &Member, xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        const LABELS: [&[u8]; 5] = [
            b"security.selinux",
            b"security.ima",
            b"security.evm",
            b"security.apparmor",
            b"security.SMACK64",
        ];
        let mut kept = Vec::new();
        let mut total = 0;
        for (name, value) in xattrs {
            let bad = |reason: &str| {
                Error::member(
                    &member.path,
                    format!("its extended attribute {}: {reason}", crate::error::shown(&name)),
                )
            };
            if LABELS.iter().any(|label| name.starts_with(label)) {
                continue;
            }
            let good = (name.starts_with(b"user.") && name.len() > 5 && !name.starts_with(b"user.overlay."))
                || name == b"security.capability"
                || name == b"system.posix_acl_access"
                || name == b"system.posix_acl_default";
            if !good {
                return Err(bad("not one that an environment may bring"));
            }
            if !matches!(member.kind, Kind::File | Kind::Directory) {
                return Err(bad("on something that can't have one"));
            }
            total += name.len() + value.len();
            if name.len() > 255 || total > 65_536 {
                return Err(bad("too long, or too many"));
            }
            kept.push((name, value));
        }
        Ok(kept)
    }

    /// The marks of a path's prefixes, the path itself last.
    fn prefixes(&self, path: &[u8]) -> Vec<u64> {
        let mut hasher = self.key.build_hasher();
        let mut prefixes = Vec::with_capacity(8);
        for component in path.split(|&b| b == b'/') {
            hasher.write(component);
            hasher.write_u8(b'/');
            prefixes.push(hasher.finish());
        }
        prefixes
    }

    fn seen(&self, hash: u64) -> Option<Seen> {
        self.marks.get(&Mark(hash)).map(|mark| match mark.0 & 7 {
            0 => Seen::Implied,
            1 => Seen::Directory,
            2 => Seen::File,
            3 => Seen::Symlink,
            5 => Seen::Finished,
            _ => Seen::Other,
        })
    }

    fn mark(&mut self, hash: u64, seen: Seen) {
        self.marks.replace(Mark(hash & !7 | seen as u64));
    }

    /// What depends on the members before: to be asked once for each item, in order.
    pub fn admit(&mut self, item: &Item) -> Result<()> {
        let Item { path, target, member } = item;
        let bad = |reason: &'static str| Error::member(&member.path, reason);
        self.members += 1;
        if self.members > self.limits.members {
            return Err(Error::Limit { what: "members", limit: self.limits.members });
        }
        self.bytes = self.bytes.saturating_add(member.size);
        if self.bytes > self.limits.bytes {
            return Err(Error::Limit { what: "bytes of files", limit: self.limits.bytes });
        }
        let prefixes = self.prefixes(path);
        let (&own, parents) = prefixes.split_last().expect("a split has at least one part");
        if !path.is_empty() {
            for &parent in parents {
                match self.seen(parent) {
                    None => self.mark(parent, Seen::Implied),
                    Some(seen) if seen.is_directory() => {}
                    Some(Seen::Symlink) => return Err(bad("below a symbolic link of this archive")),
                    Some(_) => return Err(bad("below something that is no directory")),
                }
            }
        }
        if let Some(alias) = self.alias(path) {
            self.merged.insert(alias);
        }
        let directory = member.kind == Kind::Directory;
        let repeated = self.source == Source::Packages && !self.own.insert(Mark(own));
        match self.seen(own) {
            None => {}
            Some(Seen::Implied) if directory => {}
            Some(seen) if self.source == Source::Packages && directory && seen.is_directory() => {}
            Some(seen)
                if self.source == Source::Packages && !repeated && !directory && !seen.is_directory() => {}
            Some(seen) if seen.is_directory() != directory => {
                return Err(bad("a directory and something else of the same name"));
            }
            Some(_) => return Err(bad("twice in the archive")),
        }
        if member.kind == Kind::HardLink {
            let to = self.prefixes(target).last().copied().unwrap_or_default();
            if to == own || self.seen(to) != Some(Seen::File) {
                return Err(bad("a hard link to what is no regular file before it in the archive"));
            }
        }
        let seen = match member.kind {
            Kind::Directory => Seen::Directory,
            // Another name of a file is a file.
            Kind::File | Kind::HardLink => Seen::File,
            Kind::Symlink => Seen::Symlink,
            Kind::CharacterDevice | Kind::BlockDevice => {
                self.devices += 1;
                Seen::Other
            }
            Kind::Fifo => Seen::Other,
        };
        self.mark(own, seen);
        Ok(())
    }

    /// The merged directory that a package's path lies in.
    fn alias(&self, path: &[u8]) -> Option<&'static [u8]> {
        if self.source != Source::Packages {
            return None;
        }
        let mut components = path.split(|&b| b == b'/');
        let first = components.next().filter(|&first| first == b"usr").and(components.next())?;
        // `usr/lib64` may be there in its own right; then the link is right as well.
        MERGED.into_iter().find(|&merged| merged == first)
    }

    /// Whether a directory is there, and no member has described it.
    pub fn implied(&self, path: &[u8]) -> bool {
        let own = self.prefixes(path).last().copied().unwrap_or_default();
        match self.seen(own) {
            Some(seen) => seen == Seen::Implied,
            None => path.is_empty(),
        }
    }

    /// Whether a directory's attributes are due; from then on they are not.
    pub fn finish(&mut self, path: &[u8]) -> bool {
        let own = self.prefixes(path).last().copied().unwrap_or_default();
        let due = matches!(self.seen(own), Some(Seen::Implied | Seen::Directory));
        if due {
            self.mark(own, Seen::Finished);
        }
        due
    }
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
