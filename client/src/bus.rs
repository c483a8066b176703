//! The way to the daemon.

use casemate_interfaces::{EnvironmentProxy, Error, ManagerProxy, NAME, ROOT};
use zbus::{Connection, ObjectPath, fdo};

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("cannot reach the session bus: {0}; log in to a session, or run under `dbus-run-session`")]
    NoBus(zbus::Error),
    #[error(
        "casemated does not run and the bus has no file to start it by ({0}); start it with `systemctl --user start casemated`, or by hand: {by_hand}",
        by_hand = daemon()
    )]
    NoDaemon(String),
    #[error(
        "the bus started casemated, which did not come up ({0}); `journalctl --user -e` tells why, or start it by hand: {by_hand}",
        by_hand = daemon()
    )]
    NotUp(String),
    #[error("{0}")]
    Daemon(String),
    /// A job that ended otherwise than well.
    #[error("{0}")]
    Job(String),
    #[error("{0}")]
    Local(String),
}

/// Where `make install` has put it, seen from this program.
fn daemon() -> String {
    let own = std::env::current_exe().ok();
    let beside = own
        .as_deref()
        .and_then(|path| path.parent()?.parent())
        .map(|prefix| prefix.join("libexec/casemate/casemated"));
    beside.filter(|path| path.is_file()).map_or_else(|| "casemated".into(), |path| path.display().to_string())
}

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, text, _) => {
                Self::Daemon(text.unwrap_or_else(|| name.as_str().to_owned()))
            }
            zbus::Error::FDO(error) => match *error {
                fdo::Error::ServiceUnknown(text) => Self::NoDaemon(text),
                fdo::Error::SpawnExecFailed(text)
                | fdo::Error::SpawnForkFailed(text)
                | fdo::Error::SpawnChildExited(text)
                | fdo::Error::SpawnChildSignaled(text)
                | fdo::Error::SpawnFailed(text)
                | fdo::Error::TimedOut(text) => Self::NotUp(text),
                fdo::Error::UnknownObject(text) => Self::Daemon(format!(
                    "{text}; it may have ended or been removed: see `casemate list` and `casemate jobs`"
                )),
                other => Self::Daemon(format!("the daemon did not answer: {other}; see its log")),
            },
            other => Self::Daemon(format!("the daemon did not answer: {other}; see its log")),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Bus(error) => error.into(),
            other => Self::Daemon(other.to_string()),
        }
    }
}

impl From<fdo::Error> for Failure {
    fn from(error: fdo::Error) -> Self {
        Self::from(zbus::Error::from(error))
    }
}

pub async fn connect() -> Result<Connection, Failure> {
    zbus::connection::Builder::session().build().await.map_err(Failure::NoBus)
}

pub async fn manager(connection: &Connection) -> Result<ManagerProxy<'static>, Failure> {
    Ok(ManagerProxy::builder(connection)
        .destination(NAME)
        .path(ROOT)
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?)
}

/// The environment of a name or id.
pub async fn environment(
    connection: &Connection,
    selector: &str,
) -> Result<EnvironmentProxy<'static>, Failure> {
    let path: ObjectPath<'static> =
        manager(connection).await?.get_environment(selector, Default::default()).await?.into();
    Ok(EnvironmentProxy::builder(connection)
        .destination(NAME)
        .path(path)
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?)
}

/// All properties of an object, in one call.
pub async fn properties(
    connection: &Connection,
    path: &str,
    interface: &str,
) -> Result<std::collections::HashMap<String, zbus::OwnedVariant>, Failure> {
    let reply = connection
        .call_method(Some(NAME), path, Some("org.freedesktop.DBus.Properties"), "GetAll", &(interface))
        .await?;
    Ok(reply.body().deserialize()?)
}
