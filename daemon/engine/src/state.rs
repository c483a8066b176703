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
    Commit,
    Restore,
    Clone,
    Rename,
    Freeze,
    Thaw,
    Archive,
    Unarchive,
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
            Self::Commit => "be committed",
            Self::Restore => "be restored",
            Self::Clone => "be cloned",
            Self::Rename => "be renamed",
            Self::Freeze => "be frozen",
            Self::Thaw => "be thawed",
            Self::Archive => "be archived",
            Self::Unarchive => "be unarchived",
        }
    }
}

/// The table. A step that is not in it is refused.
///
/// ```text
/// defined ── build ──▶ built ── start, enter, restart ──▶ running ── pause ──▶ paused
///                       ▲ └─ build, restore                │  ▲ └─ signal        │ │
///                       │◀───────────── stop ──────────────┘  └──── unpause ─────┘ │
///                       │◀────────────── stop ─────────────────────────────────────┘
///                       └── thaw ── ◀── freeze ── frozen ── archive ──▶ archived
///                                                    ◀──── unarchive ──────┘
/// ```
///
/// What changes no state is allowed as follows: a commit wherever files can be or could have been changed, a clone of all
/// that was built, a new name to all that does not run. Frozen and archived ones are not destroyed: that is what they are for.
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
    (State::Built, Step::Commit, State::Built),
    (State::Running, Step::Commit, State::Running),
    (State::Paused, Step::Commit, State::Paused),
    (State::Frozen, Step::Commit, State::Frozen),
    (State::Built, Step::Restore, State::Built),
    (State::Built, Step::Clone, State::Built),
    (State::Running, Step::Clone, State::Running),
    (State::Paused, Step::Clone, State::Paused),
    (State::Frozen, Step::Clone, State::Frozen),
    (State::Archived, Step::Clone, State::Archived),
    (State::Built, Step::Rename, State::Built),
    (State::Frozen, Step::Rename, State::Frozen),
    (State::Archived, Step::Rename, State::Archived),
    (State::Built, Step::Freeze, State::Frozen),
    (State::Frozen, Step::Thaw, State::Built),
    (State::Frozen, Step::Archive, State::Archived),
    (State::Archived, Step::Unarchive, State::Frozen),
];

pub fn step(name: &str, from: State, step: Step) -> Result<State, Error> {
    STEPS.iter().find(|(state, with, _)| *state == from && *with == step).map(|(_, _, to)| *to).ok_or_else(
        || {
            let remedy = match from {
                State::Running if step == Step::Unpause => "it is not paused",
                State::Running => "stop it first (`casemate stop`)",
                State::Defined => "build it first (`casemate build`)",
                State::Paused => "unpause it first (`casemate unpause`)",
                State::Frozen if step == Step::Unarchive => "it is not archived",
                State::Frozen => "thaw it first (`casemate thaw`)",
                State::Archived => "unarchive it first (`casemate unarchive`)",
                State::Built if matches!(step, Step::Pause | Step::Unpause | Step::Signal) => {
                    "start it first (`casemate start`)"
                }
                State::Built if step == Step::Archive => "freeze it first (`casemate freeze`)",
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
    fn frozen_and_archived_ones_are_left_as_they_are() {
        let changes = [Step::Build, Step::Start, Step::Enter, Step::Restart, Step::Restore, Step::Destroy];
        for (state, remedy) in [(State::Frozen, "casemate thaw"), (State::Archived, "casemate unarchive")] {
            for with in changes {
                let error = step("demo", state, with).expect_err("illegal").to_string();
                assert!(error.contains(&state.to_string()) && error.contains(remedy), "{error}");
            }
            assert_eq!(step("demo", state, Step::Clone).expect("legal"), state);
        }
        assert_eq!(step("demo", State::Built, Step::Freeze).expect("legal"), State::Frozen);
        assert_eq!(step("demo", State::Frozen, Step::Archive).expect("legal"), State::Archived);
        assert_eq!(step("demo", State::Archived, Step::Unarchive).expect("legal"), State::Frozen);
        assert_eq!(step("demo", State::Frozen, Step::Thaw).expect("legal"), State::Built);
        let error = step("demo", State::Built, Step::Archive).expect_err("illegal").to_string();
        assert!(error.contains("casemate freeze"), "{error}");
    }

    #[test]
    fn a_defined_environment_does_not_start() {
        let error = step("demo", State::Defined, Step::Start).expect_err("illegal");
        assert!(error.to_string().contains("casemate build"), "{error}");
    }
}
