//! What `casemate-init` is to set up, as data. The engine makes a [`Plan`] out of a manifest and the policy; init
//! carries it out line by line. Nothing in here touches the system, so every plan can be tested without one.
//!
//! A plan travels as one JSON document on init's standard input. Paths of sources are the host's, absolute; init opens
//! each with openat2 in its own mount namespace and compares device and inode with what the daemon judged ([`Inode`]).

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Version of plan and control protocol. An init answers with the version it speaks for as long as it lives.
pub const VERSION: u32 = 3;
/// The oldest that a daemon still speaks to.
pub const OLDEST: u32 = 2;

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
    #[serde(default)]
    pub grants: Grants,
    pub sudo: Option<Sudo>,
    /// Files of the environment that the host decides (`/etc/resolv.conf`, `/etc/hosts`, `/etc/hostname`, …): each is
    /// written to a private tmpfs and mounted read-only over its place, which is made where it is missing.
    pub files: Vec<File>,
    /// Deny AF_UNIX sockets by seccomp: stage 1 of package managers on the host's network.
    pub deny_unix_sockets: bool,
    /// Keep running when the last session ends.
    pub linger: bool,
    /// What it runs itself while it lingers. A descriptor of its log follows the others, open for reading and appending.
    pub service: Option<Service>,
    /// What tells sessions to end.
    pub stop_signal: i32,
    /// Seconds that they have where nobody says otherwise.
    pub stop_timeout: u64,
    /// A descriptor of a control group's directory, to be born in, follows the control socket's.
    pub born_in_group: bool,
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

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// A namespace of its own with loopback alone.
    None,
    /// A namespace of its own, which pasta connects to the outside.
    Private(Private),
    /// The host's, with abstract sockets and signals scoped by Landlock.
    Host,
}

/// Where the name server of a private network listens.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Private {
    /// The program pasta(1).
    pub pasta: String,
    /// The host's resolv.conf(5), followed for as long as the environment runs.
    pub resolver: String,
    pub ports: Vec<Port>,
    /// Where the environment may go, if not everywhere.
    pub allow: Option<Allow>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Allow {
    /// The program nft(8).
    pub nft: String,
    pub destinations: Vec<Destination>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Destination {
    pub host: Host,
    /// Of TCP and UDP; without it everything.
    pub port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Host {
    /// In lower case; `*.` before it stands for all names below it.
    Name(String),
    Network {
        address: IpAddr,
        bits: u8,
    },
}

/// A port of the host that leads inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// Where the host listens.
    pub address: IpAddr,
    pub host: u16,
    pub inside: u16,
    pub protocol: Protocol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    Tcp,
    Udp,
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

/// What of the host the user's sessions get by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grants {
    pub devices: Vec<Device>,
    /// They stay in the supplementary groups that the daemon was started with.
    pub keep_groups: bool,
    /// Small files of the user's own, as a cookie is: below their runtime directory, and gone with the environment.
    pub files: Vec<OwnFile>,
    /// `NAME=value`, where a session has no variable of that name.
    pub variables: Vec<String>,
    /// A way to the session bus, through a proxy that lets only what is named pass.
    pub bus: Option<Bus>,
    pub wayland: Option<Wayland>,
    /// Sessions may make user namespaces, and in them the others.
    #[serde(default)]
    pub nested_namespaces: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bus {
    /// The program xdg-dbus-proxy(1).
    pub proxy: String,
    /// Where the session bus listens.
    pub socket: Source,
    /// Names, or all below a name (`.*`), that may be talked to.
    pub talk: Vec<String>,
    /// Those that may be taken.
    pub own: Vec<String>,
}

/// The sockets' names in the user's runtime directory inside.
pub const BUS: &str = "bus";
pub const WAYLAND: &str = "wayland-0";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wayland {
    /// Where the compositor listens.
    pub socket: Source,
    /// A compositor that knows no security contexts is given as it is.
    pub plain: bool,
}

/// The environment's own command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    pub command: Vec<String>,
    /// `NAME=value`, complete.
    pub environment: Vec<String>,
    pub directory: String,
    pub root: bool,
    pub restart: Restart,
    pub health: Option<Health>,
}

/// When it is started again after it has ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    No,
    OnFailure,
    Always,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    pub command: Vec<String>,
    pub interval_seconds: u64,
    pub timeout_seconds: u64,
    /// Failures in a row that make it unhealthy.
    pub retries: u64,
    /// From the start of the command, in which failures do not count.
    pub start_period_seconds: u64,
    /// Whether an unhealthy command is ended and started again.
    pub restarts: bool,
}

impl Health {
    pub fn interval(&self) -> Duration {
        Duration::from_secs(self.interval_seconds)
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds)
    }

    pub fn start_period(&self) -> Duration {
        Duration::from_secs(self.start_period_seconds)
    }
}

/// A program `sudo` that asks init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sudo {
    pub program: Source,
    /// Without it the program is there to say what to do.
    pub granted: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// As manifest and policy name it, for messages.
    pub name: String,
    /// The host's, absolute, without links.
    pub path: String,
    pub is_block: bool,
    /// `st_rdev` of what the daemon judged.
    pub number: u64,
    /// Inside, below `/dev`.
    pub target: String,
    /// Without it, where it is not open to the user's sessions, there is no environment.
    pub is_needed: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnFile {
    /// Inside.
    pub path: String,
    pub content: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub path: String,
    pub content: String,
}
