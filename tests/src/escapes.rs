//! What the checker of the tests, `escape`, is told, and what it tells.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// What is outside and to be left alone, and by which names.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Targets {
    /// The user's number.
    pub user: u32,
    /// A file of the user's with mode 0600, as it is named where the checker runs.
    pub secret: String,
    /// The same, as the host names it.
    pub outside: String,
    /// Where both user and root may write.
    pub scratch: String,
    /// Paths of the host.
    pub store: String,
    /// A file of a layer: root's of the range, not the user's.
    pub layer: String,
    pub runtime: String,
    /// The control socket of the environment.
    pub control: String,
    pub bus: String,
    /// The user's own control group, where they may make others.
    pub group: String,
    pub host_name: String,
    /// A copy of the checker with its set-id bit, and one with a capability.
    pub set_id: String,
    pub capable: String,
    pub victim: Victim,
}

/// A process of the user's on the host, and what it holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Victim {
    pub pid: i32,
    /// Where [`SECRET`] is in its memory.
    pub address: u64,
    /// An open file of its own.
    pub descriptor: i32,
    pub terminal: String,
    pub shared_memory: String,
    pub queue: String,
    /// Of System V: shared memory, messages, semaphores.
    pub keys: [i32; 3],
    pub tcp: u16,
    pub udp: u16,
    pub abstract_socket: String,
}

pub const SECRET: &[u8; 16] = b"a user's secret.";

/// As whom attempts are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    User,
    Root,
}

/// An attempt, as `escape list` tells it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listed {
    pub name: String,
    pub tries: String,
    pub precedent: String,
    pub guards: Vec<String>,
    pub control: String,
    pub roles: Vec<Role>,
    /// Whether it is to fail where the network is the host's, too.
    pub host_network: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    Through,
    Held(String),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Found {
    pub name: String,
    /// In a control: the one guard that was left, if any.
    pub alone: Option<String>,
    pub end: End,
}

/// What holds a process, as it sees it itself: to compare sandboxes with one another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Facts {
    /// As /proc/self/status has them: `CapEff` and so on.
    pub capabilities: BTreeMap<String, String>,
    pub no_new_privileges: bool,
    pub seccomp_mode: u8,
    pub seccomp_filters: u32,
    /// Numbers of system calls that are answered with EPERM or ENOSYS, or by death, whatever their arguments.
    pub refused: BTreeSet<i64>,
    /// Inodes of /proc/self/ns.
    pub namespaces: BTreeMap<String, u64>,
    /// Paths of /proc and /sys that somebody covers or makes read-only.
    pub paths: BTreeMap<String, PathState>,
    pub descriptors: Vec<i32>,
    pub processes: usize,
    /// Mount points that can be written to.
    pub writable: BTreeSet<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PathState {
    Writable,
    ReadOnly,
    Covered,
    Missing,
}
