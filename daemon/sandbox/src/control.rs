//! The protocol on an environment's control socket: `SOCK_SEQPACKET`, one JSON document a packet, descriptors beside
//! it (SCM_RIGHTS). Init listens on it and thereby is its peer: SO_PEERCRED names init's pid and cannot be forged.
//! Each connection carries requests one after the other; [`Request::Watch`] turns it into a stream of [`Notice`]s.
//!
//! An init goes on under later daemons, so both sides may be the older one. Init refuses a request with anything in it that it
//! does not know, rather than carry out half of it; the daemon passes over what it does not know in an answer. What is new in
//! a request is left out where it says nothing, comes with a higher [`VERSION`](crate::plan::VERSION), and the daemon has
//! another way, or a refusal that says "restart it", for an init below that. `tests/protocol.rs` holds us to it.

use serde::{Deserialize, Serialize};

/// Most bytes of one packet; longer command lines are refused before they are sent. Below the kernel's default
/// `net.core.wmem_default` (212,992) with room for its bookkeeping.
pub const PACKET_MAX: usize = 160 << 10;

/// The session of the environment's own command.
pub const SERVICE: u64 = 0;

/// What the check of the environment's own command says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HealthState {
    /// There is no check.
    #[default]
    Unknown,
    /// It has not been sound since its start.
    Starting,
    Healthy,
    Unhealthy,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Who are you? Answered by [`Reply::Hello`].
    Hello,
    /// Start a session. Descriptors: standard input, output, error and the pipe for the exit status; with `terminal`
    /// the status pipe alone. Answered by [`Reply::Started`] with the session's pidfd and, with `terminal`, the master.
    Exec(Exec),
    /// Send a signal to a session's process.
    Signal { session: u64, signal: i32 },
    /// Keep running without sessions, or no longer.
    Linger { on: bool },
    /// SIGTERM to every session, SIGKILL to the whole namespace after `timeout_ms`. Answered before it begins; the end
    /// is the connection's.
    Stop { timeout_ms: u64 },
    /// Answered by [`Reply::Done`], then a [`Notice`] for each session that starts or ends, beginning with one
    /// [`Notice::Started`] for each that runs.
    Watch,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The session's number, chosen by init's caller; unique within the environment.
    pub session: u64,
    /// `argv[0]` is looked up in `PATH` of `environment` where it has no slash. Empty, with `login`: the shell itself.
    pub command: Vec<String>,
    /// By a login shell: that of the environment's /etc/passwd, else the plan's. Since version 3.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub login: bool,
    /// `NAME=value`, complete: init adds nothing.
    pub environment: Vec<String>,
    /// Absolute, inside; falls back to the user's home, then `/`, where it is not there and `directory_optional`.
    pub directory: String,
    pub directory_optional: bool,
    /// As the environment's root (in the inner namespace) and not as the user.
    pub root: bool,
    pub terminal: Option<Size>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Size {
    pub rows: u16,
    pub columns: u16,
}

/// Init's first words, to who started it: inode numbers (`st_ino` on nsfs) of the namespaces that a caller of the bus must not
/// be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ready {
    pub outer_user_namespace: u64,
    pub inner_user_namespace: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    Hello {
        version: u32,
        id: String,
        linger: bool,
        /// Inode numbers (`st_ino` on nsfs) of the namespaces that a caller of the bus must not be in.
        outer_user_namespace: u64,
        inner_user_namespace: u64,
        pid_namespace: u64,
    },
    Started {
        session: u64,
        /// In init's pid namespace.
        pid: i32,
    },
    Done,
    /// Nothing was changed.
    Refused {
        message: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "notice", rename_all = "kebab-case")]
pub enum Notice {
    Started {
        session: u64,
        pid: i32,
        command: Vec<String>,
        root: bool,
        terminal: bool,
    },
    Ended {
        session: u64,
        status: ExitStatus,
    },
    /// The environment's own command is, or is no longer, sound. Since version 3.
    Health {
        state: HealthState,
    },
    /// It keeps running without sessions, or no longer: its own command has ended for good. Since version 3.
    Linger {
        on: bool,
    },
}

/// How a session ended. On a status pipe it is one line, `exit N` or `signal N`; end of file without a line means that
/// init was killed. A command that could not be started is `exit 126` (not executable) or `exit 127` (not found).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum ExitStatus {
    Exit(i32),
    Signal(i32),
}
