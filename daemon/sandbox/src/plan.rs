//! What `casemate-init` is to set up, as data. The engine makes a [`Plan`] out of a manifest and the policy; init
//! carries it out line by line. Nothing in here touches the system, so every plan can be tested without one.
//!
//! A plan travels as one JSON document on init's standard input. Paths of sources are the host's, absolute; init opens
//! each with openat2 in its own mount namespace and compares device and inode with what the daemon judged ([`Inode`]).

use serde::{Deserialize, Serialize};

/// Version of plan and control protocol. An init answers with the version it speaks for as long as it lives.
pub const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    pub version: u32,
    /// The environment's id, or the job's for a throwaway sandbox.
    pub id: String,
    pub hostname: String,
    pub root: Root,
    pub ids: Ids,
    pub user: Account,
    /// Add `user` to `/etc/passwd` and `/etc/group` and make the home: when an environment is built, not later.
    pub write_account: bool,
    pub network: Network,
    pub mounts: Vec<Mount>,
    /// Files of the environment that the host decides (`/etc/resolv.conf`, `/etc/hosts`, `/etc/hostname`, …): each is
    /// written to a private tmpfs and mounted read-only over its place, which is made where it is missing.
    pub files: Vec<File>,
    /// Deny AF_UNIX sockets by seccomp: stage 1 of package managers on the host's network.
    pub deny_unix_sockets: bool,
    /// Keep running when the last session ends.
    pub linger: bool,
}

/// How a directory is recognised again: `st_dev` and `st_ino`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inode {
    pub device: u64,
    pub inode: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub path: String,
    pub inode: Inode,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "root", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Root {
    /// Native overlayfs with `userxattr`. Lowers topmost first.
    Overlay { lowers: Vec<Source>, upper: Source, work: Source },
    /// One writable directory: how a release is configured in staging.
    Directory { source: Source },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ids", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Ids {
    /// Outer and inner namespaces of DESIGN.md, "Ids"; `user` and `group` are the host's numbers.
    Range { user: u32, group: u32 },
    /// One id: outer maps 0 to the user. The user's sessions run in an inner namespace that maps `user` to 0, and a
    /// seccomp filter answers ownership calls.
    Single { user: u32, group: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    pub name: String,
    pub uid: u32,
    pub gid: u32,
    /// Absolute, inside.
    pub home: String,
    pub shell: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A namespace of its own with loopback alone.
    None,
    /// The host's, with abstract sockets and signals scoped by Landlock.
    Host,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mount {
    pub source: Source,
    /// Absolute, inside; made where it is missing; links in it are refused.
    pub target: String,
    pub read_only: bool,
    /// Forbid execution as well as devices and set-id bits (which no bind mount ever honours).
    pub no_exec: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub path: String,
    pub content: String,
}

/// A plan that init would not carry out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("the plan has version {0}, this init speaks {VERSION}")]
    Version(u32),
    #[error("{0:?} is no absolute path without `.`, `..`, doubled slashes and NUL")]
    Path(String),
    #[error("{0:?} is the sandbox's own place; choose another target")]
    Target(String),
    #[error("{0:?} cannot stand in /etc/passwd")]
    Account(String),
    #[error("{0:?} is no host name of 1 to 64 bytes without control characters")]
    Hostname(String),
    #[error("an overlay needs at least one lower")]
    NoLower,
}

/// Where the sandbox mounts file systems of its own, whole.
const OWN: &[&str] = &["/proc", "/sys", "/dev"];

fn absolute(path: &str) -> Result<(), PlanError> {
    let plain = |rest: &str| rest.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    match path.strip_prefix('/') {
        Some(rest) if (rest.is_empty() || plain(rest)) && !path.contains('\0') => Ok(()),
        _ => Err(PlanError::Path(path.to_owned())),
    }
}

fn target(path: &str) -> Result<(), PlanError> {
    absolute(path)?;
    let own = |own: &&str| path == **own || path.strip_prefix(**own).is_some_and(|rest| rest.starts_with('/'));
    match path == "/" || OWN.iter().any(|place| own(&place)) {
        true => Err(PlanError::Target(path.to_owned())),
        false => Ok(()),
    }
}

impl Plan {
    /// What can be judged without a system. Init refuses a plan that does not pass.
    pub fn check(&self) -> Result<(), PlanError> {
        if self.version != VERSION {
            return Err(PlanError::Version(self.version));
        }
        if self.hostname.is_empty() || self.hostname.len() > 64 || self.hostname.chars().any(char::is_control) {
            return Err(PlanError::Hostname(self.hostname.clone()));
        }
        let sources: Vec<&Source> = match &self.root {
            Root::Overlay { lowers, .. } if lowers.is_empty() => return Err(PlanError::NoLower),
            Root::Overlay { lowers, upper, work } => lowers.iter().chain([upper, work]).collect(),
            Root::Directory { source } => vec![source],
        };
        let mounted = self.mounts.iter().map(|mount| &mount.source);
        sources.into_iter().chain(mounted).try_for_each(|source| absolute(&source.path))?;
        self.mounts.iter().try_for_each(|mount| target(&mount.target))?;
        self.files.iter().try_for_each(|file| target(&file.path))?;
        absolute(&self.user.home)?;
        let odd = |text: &str| text.is_empty() || text.contains(|c: char| c == ':' || c.is_control());
        match [&self.user.name, &self.user.home, &self.user.shell].into_iter().find(|text| odd(text)) {
            Some(text) => Err(PlanError::Account(text.clone())),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        let source = |path: &str| Source { path: path.into(), inode: Inode { device: 1, inode: 2 } };
        Plan {
            version: VERSION,
            id: "x".into(),
            hostname: "box".into(),
            root: Root::Overlay { lowers: vec![source("/a")], upper: source("/b"), work: source("/c") },
            ids: Ids::Range { user: 1000, group: 1000 },
            user: Account {
                name: "ann".into(),
                uid: 1000,
                gid: 1000,
                home: "/home/ann".into(),
                shell: "/bin/sh".into(),
            },
            write_account: false,
            network: Network::None,
            mounts: vec![Mount { source: source("/w"), target: "/workspace".into(), read_only: false, no_exec: false }],
            files: vec![File { path: "/etc/hosts".into(), content: String::new() }],
            deny_unix_sockets: false,
            linger: false,
        }
    }

    #[test]
    fn a_plan_is_judged_before_anything_is_done() {
        assert_eq!(plan().check(), Ok(()));
        for bad in ["workspace", "/a/../b", "/a//b", "/a/.", "/a/", "", "/a\0b"] {
            let mut plan = plan();
            plan.mounts[0].target = bad.into();
            assert_eq!(plan.check(), Err(PlanError::Path(bad.into())), "{bad:?}");
        }
        for own in ["/", "/proc", "/proc/sys", "/dev/null", "/sys/fs"] {
            let mut plan = plan();
            plan.files[0].path = own.into();
            assert_eq!(plan.check(), Err(PlanError::Target(own.into())));
        }
        let mut device = plan();
        device.mounts[0].target = "/devices".into();
        assert_eq!(device.check(), Ok(()));
        let mut account = plan();
        account.user.shell = "/bin/sh\nroot2::0:0::/:/bin/sh".into();
        assert!(matches!(account.check(), Err(PlanError::Account(_))));
        let mut bare = plan();
        bare.root = Root::Overlay {
            lowers: vec![],
            upper: bare.mounts[0].source.clone(),
            work: bare.mounts[0].source.clone(),
        };
        assert_eq!(bare.check(), Err(PlanError::NoLower));
    }

    #[test]
    fn a_plan_travels_as_json() {
        let text = serde_json::to_string(&plan()).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&text).unwrap(), plan());
        assert!(serde_json::from_str::<Plan>(&text.replacen("\"id\"", "\"idd\"", 1)).is_err());
    }
}
