//! What an environment runs by itself while it is started: `[runtime]` command, restart, stop_signal, stop_timeout, and
//! `[runtime.health]`. Words and defaults are podman's where it has them.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

/// Most seconds of any time in here: a day.
pub const SECONDS_MAX: u64 = 86_400;
/// What sessions have to end in when the manifest does not say how long: podman's and docker's.
const STOP_SECONDS: u64 = 10;

/// A list of words, or a line for `/bin/sh -c`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct CommandLine(pub Vec<String>);

impl<'de> Deserialize<'de> for CommandLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Line(String),
            Words(Vec<String>),
        }
        let words = match Written::deserialize(deserializer) {
            Ok(Written::Line(line)) if !line.trim().is_empty() => vec!["/bin/sh".into(), "-c".into(), line],
            Ok(Written::Words(words)) if words.first().is_some_and(|word| !word.is_empty()) => words,
            _ => {
                return Err(D::Error::custom(
                    "a command is a list of words, or a line for the shell, and not empty",
                ));
            }
        };
        if words.iter().any(|word| word.contains('\0')) {
            return Err(D::Error::custom("a command holds no NUL"));
        }
        Ok(Self(words))
    }
}

/// When the command is started again after it has ended by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    #[default]
    No,
    /// When its status is not 0.
    OnFailure,
    Always,
}

/// A signal, by name (`TERM`, `SIGTERM`) or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct StopSignal(pub i32);

impl Default for StopSignal {
    fn default() -> Self {
        Self(15)
    }
}

/// signal(7), those that a program could be meant to end by.
const SIGNALS: &[(&str, i32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("TERM", 15),
    ("WINCH", 28),
];

impl<'de> Deserialize<'de> for StopSignal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(i32),
            Name(String),
        }
        let found = match Written::deserialize(deserializer) {
            Ok(Written::Number(number)) => (1..32).contains(&number).then_some(number),
            Ok(Written::Name(name)) => {
                let bare = name.strip_prefix("SIG").unwrap_or(&name);
                SIGNALS.iter().find(|(known, _)| *known == bare).map(|(_, number)| *number)
            }
            Err(_) => None,
        };
        let names = || SIGNALS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        found
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("give one of {}, or a number below 32", names())))
    }
}

/// What is done about a command that is unhealthy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// It is said on the bus.
    #[default]
    None,
    /// It is ended, and started again whatever `restart` says.
    Restart,
}

/// A command that tells, by status 0, that the environment's command does its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    pub command: CommandLine,
    /// Seconds between two checks.
    #[serde(default = "Health::thirty")]
    pub interval: u64,
    /// Seconds that one may take; longer is a failure.
    #[serde(default = "Health::thirty")]
    pub timeout: u64,
    /// Failures in a row that make it unhealthy.
    #[serde(default = "Health::three")]
    pub retries: u64,
    /// Seconds from the command's start in which failures do not count.
    #[serde(default)]
    pub start_period: u64,
    #[serde(default)]
    pub on_failure: OnFailure,
}

impl Health {
    fn thirty() -> u64 {
        30
    }

    fn three() -> u64 {
        3
    }
}

/// The keys of `[runtime]` that are about the command, together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Service {
    pub command: CommandLine,
    pub root: bool,
    pub restart: Restart,
    pub health: Option<Health>,
}

/// How sessions are told to end, and how long they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    pub signal: i32,
    /// Seconds.
    pub timeout: u64,
}

impl Default for Stop {
    fn default() -> Self {
        Self { signal: StopSignal::default().0, timeout: STOP_SECONDS }
    }
}

impl crate::Runtime {
    pub fn service(&self) -> Option<Service> {
        let command = self.command.clone()?;
        let restart = self.restart.unwrap_or_default();
        Some(Service { command, root: self.command_as_root, restart, health: self.health.clone() })
    }

    pub fn stop(&self) -> Stop {
        let usual = Stop::default();
        Stop {
            signal: self.stop_signal.unwrap_or_default().0,
            timeout: self.stop_timeout.unwrap_or(usual.timeout),
        }
    }

    /// What is wrong about the keys of this module: key, value, rule.
    pub(crate) fn check_service(&self) -> Result<(), (&'static str, String, &'static str)> {
        if self.command.is_none() {
            let needs = "needs runtime.command";
            for (key, is_there) in [
                ("runtime.restart", self.restart.is_some()),
                ("runtime.health", self.health.is_some()),
                ("runtime.command_as_root", self.command_as_root),
            ] {
                if is_there {
                    return Err((key, String::new(), needs));
                }
            }
        }
        let bound = |key, seconds: u64, least: u64| match (least..=SECONDS_MAX).contains(&seconds) {
            true => Ok(()),
            false if least == 0 => Err((key, seconds.to_string(), "is no number of seconds from 0 to 86400")),
            false => Err((key, seconds.to_string(), "is no number of seconds from 1 to 86400")),
        };
        bound("runtime.stop_timeout", self.stop_timeout.unwrap_or_default(), 0)?;
        if let Some(health) = &self.health {
            bound("runtime.health.interval", health.interval, 1)?;
            bound("runtime.health.timeout", health.timeout, 1)?;
            bound("runtime.health.start_period", health.start_period, 0)?;
            if !(1..=1_000).contains(&health.retries) {
                let rule = "is no number of failures from 1 to 1000";
                return Err(("runtime.health.retries", health.retries.to_string(), rule));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::Manifest;

    use super::*;

    fn runtime(text: &str) -> Result<crate::Runtime, String> {
        let text = format!("manifest_version = 1\n[base]\nrelease = \"a/b\"\n[runtime]\n{text}");
        Manifest::parse(&text).map(|manifest| manifest.runtime).map_err(|error| error.to_string())
    }

    #[test]
    fn commands() {
        let line =
            runtime("command = \"nginx -g 'daemon off;'\"\nrestart = \"on-failure\"\nstop_signal = \"QUIT\"");
        let line = line.expect("good");
        let service = line.service().expect("a command");
        assert_eq!(service.command.0, ["/bin/sh", "-c", "nginx -g 'daemon off;'"]);
        assert_eq!((service.restart, service.root), (Restart::OnFailure, false));
        assert_eq!(line.stop(), Stop { signal: 3, timeout: 10 });
        let words =
            runtime("command = [\"sleep\", \"1\"]\nstop_timeout = 0\nstop_signal = 12").expect("good");
        assert_eq!(words.service().expect("a command").command.0, ["sleep", "1"]);
        assert_eq!(words.stop(), Stop { signal: 12, timeout: 0 });
        let checked = runtime("command = \"x\"\n[runtime.health]\ncommand = \"y\"\non_failure = \"restart\"");
        let health = checked.expect("good").health.expect("a check");
        assert_eq!((health.interval, health.timeout, health.retries, health.start_period), (30, 30, 3, 0));
        assert_eq!(health.on_failure, OnFailure::Restart);
        assert_eq!(runtime("").expect("good").stop(), Stop::default());
    }

    #[test]
    fn bad_ones() {
        for (text, expected) in [
            ("command = \"\"", "not empty"),
            ("command = []", "not empty"),
            ("command = [\"a\\u0000\"]", "no NUL"),
            ("command = 1", "list of words"),
            ("restart = \"always\"", "needs runtime.command"),
            ("[runtime.health]\ncommand = \"x\"", "needs runtime.command"),
            ("command = \"x\"\nrestart = \"sometimes\"", "unknown variant"),
            ("stop_signal = \"STOP\"", "give one of HUP"),
            ("stop_signal = 37", "give one of HUP"),
            ("stop_timeout = 90000", "from 0 to 86400"),
            ("command = \"x\"\n[runtime.health]\ncommand = \"y\"\ninterval = 0", "from 1 to 86400"),
            ("command = \"x\"\n[runtime.health]\ncommand = \"y\"\nretries = 0", "from 1 to 1000"),
            ("command = \"x\"\n[runtime.health]\ncommand = \"y\"\nretry = 1", "did you mean `retries`?"),
        ] {
            let error = runtime(text).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
