//! The way to the daemon.

use casemate_interfaces::{EnvironmentProxy, Error, ManagerProxy, NAME, ROOT};
use zbus::{Connection, ObjectPath};

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("cannot reach the session bus: {0}; log in to a session, or run under `dbus-run-session`")]
    NoBus(zbus::Error),
    #[error(
        "casemated does not run and the bus cannot start it ({0}); start it with `systemctl --user start casemated`, or by hand"
    )]
    NoDaemon(String),
    #[error("{0}")]
    Daemon(String),
    /// A job that ended otherwise than well.
    #[error("{0}")]
    Job(String),
    #[error("{0}")]
    Local(String),
}

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Self {
        match error {
            zbus::Error::MethodError(name, text, _) => {
                let name = name.as_str();
                let text = text.unwrap_or_else(|| name.to_owned());
                match name {
                    "org.freedesktop.DBus.Error.ServiceUnknown" => Self::NoDaemon(text),
                    _ if name.starts_with("org.freedesktop.DBus.Error.Spawn") => Self::NoDaemon(text),
                    _ => Self::Daemon(text),
                }
            }
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

impl From<zbus::fdo::Error> for Failure {
    fn from(error: zbus::fdo::Error) -> Self {
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
