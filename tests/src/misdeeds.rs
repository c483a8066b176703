//! What the workers of the tests, `misbehave` and `possess`, are asked to do, and how it went.

use serde::{Deserialize, Serialize};

/// Instead of a worker's name: no confinement at all, to see that it is the confinement that stops a misdeed.
pub const UNCONFINED: &str = "unconfined";
/// Confined as `casemate-index`, but never reads its request.
pub const DEAF: &str = "deaf";
/// Never says a word.
pub const MUTE: &str = "mute";

/// Variables that `possess` is started with: the directory of the real workers, and the steps.
pub const REAL: &str = "CASEMATE_TESTS_REAL";
pub const STEPS: &str = "CASEMATE_TESTS_STEPS";

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Argument {
    Number(i64),
    /// Its address is passed.
    Text(String),
    /// The address of these is passed.
    Words(Vec<Argument>),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Step {
    /// A system call, made as it is.
    Call {
        number: i64,
        arguments: Vec<Argument>,
    },
    /// TCP on loopback.
    Connect {
        port: u16,
    },
    /// To the daemon, `times` over; 0 is for ever.
    Say {
        text: String,
        times: u64,
    },
    /// The same on standard error.
    Log {
        text: String,
        times: u64,
    },
    /// Say a word of progress every 50 ms, for ever.
    Drip,
    CloseEvents,
    Hang,
    Panic,
    Abort,
    Exit(i32),
}

/// Of the last step: 0, or why it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    pub errno: i32,
}

pub const PROGRESS: &str =
    "{\"event\":\"progress\",\"bytes\":1,\"bytes_total\":2,\"items\":3,\"items_total\":4}\n";
