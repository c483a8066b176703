//! `org.freedesktop.LogControl1`: what `systemctl service-log-level` speaks to.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing_subscriber::reload::Handle;
use tracing_subscriber::{EnvFilter, Registry};
use zbus::{fdo, interface};

#[derive(Clone)]
pub struct Filter(pub Handle<EnvFilter, Registry>);

pub struct LogControl {
    filter: Filter,
    /// As it was set, where it was.
    level: Mutex<Option<&'static str>>,
}

impl LogControl {
    pub fn new(filter: Filter) -> Self {
        Self { filter, level: Mutex::default() }
    }

    fn level(&self) -> MutexGuard<'_, Option<&'static str>> {
        self.level.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Standard error, which is the journal where systemd started us.
const TARGET: &str = "console";

/// syslog's names and ours; the first of several that are the same to us is what is told.
const LEVELS: &[(&str, &str)] = &[
    ("debug", "debug"),
    ("info", "info"),
    ("notice", "info"),
    ("warning", "warn"),
    ("err", "error"),
    ("crit", "error"),
    ("alert", "error"),
    ("emerg", "error"),
];

#[interface(name = "org.freedesktop.LogControl1")]
impl LogControl {
    #[zbus(property(emits_changed_signal = "false"))]
    fn log_level(&self) -> String {
        if let Some(level) = *self.level() {
            return level.to_owned();
        }
        let current = self.filter.0.with_current(ToString::to_string).unwrap_or_default();
        LEVELS.iter().find(|(_, ours)| *ours == current).map_or("info", |(syslog, _)| *syslog).to_owned()
    }

    #[zbus(property)]
    fn set_log_level(&self, level: String) -> fdo::Result<()> {
        let (syslog, ours) = LEVELS
            .iter()
            .find(|(syslog, _)| *syslog == level)
            .ok_or_else(|| fdo::Error::InvalidArgs(format!("{level:?} is no level of syslog")))?;
        self.filter
            .0
            .reload(EnvFilter::new(ours))
            .map_err(|error| fdo::Error::Failed(format!("the log level cannot be changed: {error}")))?;
        *self.level() = Some(syslog);
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn log_target(&self) -> &str {
        TARGET
    }

    #[zbus(property)]
    fn set_log_target(&self, target: String) -> fdo::Result<()> {
        if target == TARGET {
            return Ok(());
        }
        Err(fdo::Error::NotSupported(format!(
            "casemated logs to standard error ({TARGET:?}), not to {target:?}"
        )))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn syslog_identifier(&self) -> &str {
        "casemated"
    }
}
