//! Why the daemon ends other than well.

use std::path::PathBuf;

use casemate_interfaces::NAME;

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("casemated serves an ordinary user and does not run as root; start it as that user")]
    Root,
    #[error("HOME is not set and /etc/passwd has no entry for you; set HOME")]
    NoHome,
    #[error(
        "XDG_RUNTIME_DIR is not set; log in through systemd-logind, or set it to a directory of your own (mode 0700)"
    )]
    NoRuntime,
    #[error("the daemon's own directory cannot be told; give --libexec")]
    NoLibexec,
    #[error(transparent)]
    Engine(casemate_engine::Error),
    #[error("the session bus failed: {0}; is DBUS_SESSION_BUS_ADDRESS right?")]
    Bus(zbus::Error),
    #[error("systemd's user manager is on the bus and does not answer: {0}; see its log")]
    Systemd(zbus::Error),
    #[error(
        "the session bus at {0} is no Unix socket: it could not tell who calls; use one with a unix: address, as \
         `dbus-run-session` does"
    )]
    OddBus(String),
    #[error("{NAME} is taken on this bus, {}; stop that casemated, or use another bus", holder(*.0))]
    NameTaken(Option<u32>),
    #[error("the session bus went away or took {NAME}; environments go on, the next casemated finds them")]
    NameLost,
    #[error("cannot {action} {path}: {source}")]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
}

fn holder(pid: Option<u32>) -> String {
    pid.map_or_else(|| "nobody knows by whom".to_owned(), |pid| format!("by process {pid}"))
}
