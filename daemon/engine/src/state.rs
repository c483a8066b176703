//! The states of an environment and the one table of legal steps between them.

use std::fmt;

use crate::api::State;
use crate::error::Error;

/// What is asked of an environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Build,
    Start,
    /// A session is started.
    Enter,
    /// Its sessions get a signal.
    Signal,
    Pause,
    Unpause,
    Restart,
    Stop,
    Destroy,
}

impl Step {
    fn verb(self) -> &'static str {
        match self {
            Self::Build => "be built",
            Self::Start => "be started",
            Self::Enter => "be entered",
            Self::Signal => "be sent a signal",
            Self::Pause => "be paused",
            Self::Unpause => "be unpaused",
            Self::Restart => "be restarted",
            Self::Stop => "be stopped",
            Self::Destroy => "be destroyed",
        }
    }
}

/// The table. A step that is not in it is refused.
///
/// ```text
/// defined ── build ──▶ built ── start, enter, restart ──▶ running ── pause ──▶ paused
///                       ▲ └─ build                         │  ▲ └─ signal        │ │
///                       │◀───────────── stop ──────────────┘  └──── unpause ─────┘ │
///                       └─────────────── stop ─────────────────────────────────────┘
/// ```
///
/// `frozen` and `archived` are entered by steps that are not built yet; a record that holds them is kept.
const STEPS: &[(State, Step, State)] = &[
    (State::Defined, Step::Build, State::Built),
    (State::Built, Step::Build, State::Built),
    (State::Built, Step::Start, State::Running),
    (State::Built, Step::Enter, State::Running),
    (State::Built, Step::Restart, State::Running),
    (State::Running, Step::Start, State::Running),
    (State::Running, Step::Enter, State::Running),
    (State::Running, Step::Restart, State::Running),
    (State::Running, Step::Signal, State::Running),
    (State::Running, Step::Pause, State::Paused),
    (State::Paused, Step::Unpause, State::Running),
    (State::Paused, Step::Stop, State::Built),
    (State::Running, Step::Stop, State::Built),
    (State::Built, Step::Stop, State::Built),
    (State::Defined, Step::Destroy, State::Defined),
    (State::Built, Step::Destroy, State::Defined),
];

pub fn step(name: &str, from: State, step: Step) -> Result<State, Error> {
    STEPS.iter().find(|(state, with, _)| *state == from && *with == step).map(|(_, _, to)| *to).ok_or_else(
        || {
            let remedy = match from {
                State::Running if step == Step::Unpause => "it is not paused",
                State::Running => "stop it first (`casemate stop`)",
                State::Defined => "build it first (`casemate build`)",
                State::Paused => "unpause it first (`casemate unpause`)",
                State::Frozen => "thaw it first",
                State::Archived => "unarchive it first",
                State::Built if matches!(step, Step::Pause | Step::Unpause | Step::Signal) => {
                    "start it first (`casemate start`)"
                }
                State::Built => "see `casemate show`",
                State::Damaged => "see `casemate doctor`",
            };
            Error::Transition { name: name.to_owned(), from, action: step.verb(), remedy }
        },
    )
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Defined => "defined",
            Self::Built => "built",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Frozen => "frozen",
            Self::Archived => "archived",
            Self::Damaged => "damaged",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_environment_is_neither_built_nor_destroyed() {
        for with in [Step::Build, Step::Destroy] {
            let error = step("demo", State::Running, with).expect_err("illegal");
            assert_eq!(error.kind(), crate::ErrorKind::IllegalTransition);
            assert!(error.to_string().contains("\"demo\" is running"), "{error}");
        }
    }

    #[test]
    fn a_paused_environment_is_unpaused_or_stopped_and_nothing_else() {
        for with in [Step::Build, Step::Start, Step::Enter, Step::Signal, Step::Restart, Step::Pause] {
            let error = step("demo", State::Paused, with).expect_err("illegal");
            assert!(error.to_string().contains("casemate unpause"), "{error}");
        }
        assert_eq!(step("demo", State::Paused, Step::Unpause).expect("legal"), State::Running);
        assert_eq!(step("demo", State::Paused, Step::Stop).expect("legal"), State::Built);
    }

    #[test]
    fn a_defined_environment_does_not_start() {
        let error = step("demo", State::Defined, Step::Start).expect_err("illegal");
        assert!(error.to_string().contains("casemate build"), "{error}");
    }
}
