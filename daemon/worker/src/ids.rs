//! The two nested id maps of DESIGN.md, "Ids", computed; and the ranges in `/etc/subuid` and `/etc/subgid`, read.
//!
//! With `U` the user's id and `S` the start of the range: the outer namespace maps *x* → `S+x`, but `U` → `U`, and
//! 65536 → `S+U`; the inner one, a child of outer, maps *x* → *x*, but `U` → 65536.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Ids that an environment has: 0 to 65535, as Debian Policy 9.2 allots them.
pub const COUNT: u32 = 65_536;

/// One line of a map: first id inside, first id outside, count.
pub type Extent = (u32, u32, u32);

/// How ids are mapped for this user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdMode {
    /// Both maps, written by `newuidmap` and `newgidmap`.
    Range { user: u32, group: u32, uid_start: u32, gid_start: u32, newuidmap: PathBuf, newgidmap: PathBuf },
    /// One id: 0 is the user. `reason` says what is missing for a range.
    Single { user: u32, group: u32, reason: String },
}

/// The outer map of `id` with a range that begins at `start`.
pub fn outer(id: u32, start: u32) -> Vec<Extent> {
    if id >= COUNT {
        return vec![(0, start, COUNT), (id, id, 1)];
    }
    let all = [(0, start, id), (id, id, 1), (id + 1, start + id + 1, COUNT - 1 - id), (COUNT, start + id, 1)];
    all.into_iter().filter(|(_, _, count)| *count > 0).collect()
}

/// The inner map of `id`; its outside is the outer namespace.
pub fn inner(id: u32) -> Vec<Extent> {
    if id >= COUNT {
        return vec![(0, 0, COUNT)];
    }
    let all = [(0, 0, id), (id, COUNT, 1), (id + 1, id + 1, COUNT - 1 - id)];
    all.into_iter().filter(|(_, _, count)| *count > 0).collect()
}

/// As `/proc/PID/uid_map` takes it.
pub fn to_text(map: &[Extent]) -> String {
    let mut text = String::new();
    for (inside, outside, count) in map {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{inside} {outside} {count}");
    }
    text
}

/// The first range of at least [`COUNT`] ids for a user, by name or number.
pub fn find_range(file: &str, name: &str, number: u32) -> Option<u32> {
    let number = number.to_string();
    file.lines().find_map(|line| {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        let start: u32 = fields.next()?.parse().ok()?;
        let count: u32 = fields.next()?.parse().ok()?;
        let fits = count >= COUNT && start >= COUNT && start.checked_add(COUNT).is_some();
        ((owner == name || owner == number) && fields.next().is_none() && fits).then_some(start)
    })
}

impl IdMode {
    /// What this machine allows `user`.
    pub fn detect(name: &str, user: u32, group: u32) -> Self {
        match Self::range(name, user, group) {
            Ok(mode) => mode,
            Err(reason) => Self::Single { user, group, reason },
        }
    }

    fn range(name: &str, user: u32, group: u32) -> Result<Self, String> {
        let start = |path: &str| {
            let text = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
            find_range(&text, name, user).ok_or_else(|| {
                format!(
                    "{path} has no range of {COUNT} ids for {name}; as root: usermod --add-subuids 100000-165535 --add-subgids \
                     100000-165535 {name}"
                )
            })
        };
        let program = |name: &str| {
            let candidates = ["/usr/bin", "/bin", "/usr/local/bin", "/run/wrappers/bin"];
            candidates
                .iter()
                .map(|directory| Path::new(directory).join(name))
                .find(|path| path.is_file())
                .ok_or_else(|| format!("{name} is missing: install the package uidmap"))
        };
        Ok(Self::Range {
            user,
            group,
            uid_start: start("/etc/subuid")?,
            gid_start: start("/etc/subgid")?,
            newuidmap: program("newuidmap")?,
            newgidmap: program("newgidmap")?,
        })
    }

    pub fn user(&self) -> u32 {
        match self {
            Self::Range { user, .. } | Self::Single { user, .. } => *user,
        }
    }

    pub fn group(&self) -> u32 {
        match self {
            Self::Range { group, .. } | Self::Single { group, .. } => *group,
        }
    }

    /// What a worker is told on its command line: `range UID GID` or `single UID GID`.
    pub fn arguments(&self) -> [String; 3] {
        let mode = match self {
            Self::Range { .. } => "range",
            Self::Single { .. } => "single",
        };
        [mode.to_owned(), self.user().to_string(), self.group().to_string()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maps_of_design_md() {
        assert_eq!(
            outer(1000, 100_000),
            [(0, 100_000, 1000), (1000, 1000, 1), (1001, 101_001, 64_535), (65_536, 101_000, 1)]
        );
        assert_eq!(inner(1000), [(0, 0, 1000), (1000, 65_536, 1), (1001, 1001, 64_535)]);
        assert_eq!(outer(65_535, 100_000), [(0, 100_000, 65_535), (65_535, 65_535, 1), (65_536, 165_535, 1)]);
        assert_eq!(outer(200_000, 300_000), [(0, 300_000, 65_536), (200_000, 200_000, 1)]);
        assert_eq!(inner(200_000), [(0, 0, 65_536)]);
    }

    #[test]
    fn no_id_inside_the_inner_map_is_the_user() {
        for id in [1, 33, 1000, 65_534, 65_535, 70_000] {
            let outside = |map: &[Extent], x: u32| {
                map.iter()
                    .find(|(first, _, count)| x >= *first && x - first < *count)
                    .map(|(first, to, _)| to + (x - first))
            };
            for x in 0..COUNT {
                let host = outside(&inner(id), x).and_then(|x| outside(&outer(id, 100_000), x));
                assert!(host.is_some_and(|host| host != id || id >= 100_000), "{x} of {id}");
                assert_eq!(host, Some(100_000 + x));
            }
        }
    }

    #[test]
    fn ranges() {
        let file = "root:100000:65536\nann:165536:1000\nann:200000:65536\n1007:300000:65536\nbad\n";
        assert_eq!(find_range(file, "ann", 1001), Some(200_000));
        assert_eq!(find_range(file, "bob", 1007), Some(300_000));
        assert_eq!(find_range(file, "eve", 1002), None);
        assert_eq!(find_range("ann:4294967295:65536\nann:0:65536", "ann", 1001), None);
    }
}
