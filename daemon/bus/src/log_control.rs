//! `org.freedesktop.LogControl1`: what `systemctl log-level` speaks to.

use tracing_subscriber::reload::Handle;
use tracing_subscriber::{EnvFilter, Registry};
use zbus::{fdo, interface};

#[derive(Clone)]
pub struct Filter(pub Handle<EnvFilter, Registry>);

pub struct LogControl(pub Filter);

/// syslog's names and ours.
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
    #[zbus(property)]
    fn log_level(&self) -> String {
        let current = self.0.0.with_current(ToString::to_string).unwrap_or_default();
        LEVELS.iter().find(|(_, ours)| *ours == current).map_or("info", |(syslog, _)| *syslog).to_owned()
    }

    #[zbus(property)]
    fn set_log_level(&mut self, level: String) -> fdo::Result<()> {
        let (_, ours) = LEVELS
            .iter()
            .find(|(syslog, _)| *syslog == level)
            .ok_or_else(|| fdo::Error::InvalidArgs(format!("{level:?} is no level of syslog")))?;
        self.0.0.reload(EnvFilter::new(ours)).map_err(|error| fdo::Error::Failed(error.to_string()))
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn log_target(&self) -> &str {
        "console"
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn syslog_identifier(&self) -> &str {
        "casemated"
    }
}
