//! `casemate wait`: until the environment neither runs nor is paused, whichever daemon sees it.

use casemate_interfaces::NAME;
use futures_util::StreamExt;

use crate::bus::{Failure, connect, environment, properties};
use crate::commands::show::{INTERFACE, Shown};
use crate::output::say;

pub async fn run(selector: &str) -> Result<u8, Failure> {
    let connection = connect().await?;
    let proxy = environment(&connection, selector).await?;
    let path = proxy.inner().path().to_string();
    // Both before the first look, so that no change falls between.
    let bus = zbus::fdo::DBusProxy::new(&connection).await?;
    let mut owners = bus.receive_name_owner_changed_with_args(&[(0, NAME)]).await?;
    let all = zbus::fdo::PropertiesProxy::builder(&connection)
        .destination(NAME)
        .path(path.as_str())
        .build()
        .await?;
    let mut changes = all.receive_properties_changed().await?;
    loop {
        let found = properties(&connection, &path, INTERFACE).await;
        let shown = match found {
            Ok(found) => Shown::from_properties(&found),
            // Destroyed meanwhile.
            Err(Failure::Daemon(_)) => return Ok(0),
            Err(failure) => return Err(failure),
        };
        if !["running", "paused"].contains(&shown.state.as_str()) {
            say!("{}", shown.last_exit_code.max(0));
            return Ok(0);
        }
        // Without a daemon nobody knows; the next one tells.
        loop {
            let known = tokio::select! {
                change = changes.next() => change.map(|_| true),
                owner = owners.next() => match owner {
                    Some(owner) => Some(owner.args()?.new_owner().is_some()),
                    None => None,
                },
            };
            match known {
                Some(true) => break,
                Some(false) => {}
                None => return Err(Failure::Local("the session bus is gone".into())),
            }
        }
    }
}
