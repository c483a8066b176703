//! What `casemate-sudo`, inside, asks of init: a session as the environment's root with the caller's descriptors. One JSON
//! document a packet on [`SOCKET`], `SOCK_SEQPACKET`, which init listens on where the manifest grants it. No set-id program
//! is involved, and none would work: the user's sessions can gain no privileges.
//!
//! Whoever runs as the user in there may ask; what they get is root of the environment, which is not the user and has
//! nothing of the host.

use serde::{Deserialize, Serialize};

use crate::control::Size;

/// In a directory of root's, so that nobody else can take its place.
pub const SOCKET: &str = "/run/casemate/sudo";
/// Where the program is to be found, before an image's own.
pub const PROGRAM: &str = "/usr/local/bin/sudo";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Once for each connection. Descriptors: standard input, output and error, or, with `terminal`, none. Answered by
    /// [`Reply::Started`](crate::control::Reply), with a pipe from which the exit status is read, and the terminal's master.
    Run(Run),
    /// To the session of this connection. Answered likewise, by `done` or `refused`.
    Signal { signal: i32 },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Run {
    /// Empty, with `login`: the shell itself.
    pub command: Vec<String>,
    pub login: bool,
    pub environment: Vec<String>,
    /// Absolute. Root's home where root cannot enter it and `directory_optional`: the user's directories need not be open to
    /// root of the environment.
    pub directory: String,
    pub directory_optional: bool,
    pub terminal: Option<Size>,
}
