//! The user's desktop, by grant: the session bus through a proxy that lets only what is named pass, and the compositor.
//! What serves them is started by init's launcher, so that nobody parses an environment's bytes with the user's rights.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use casemate_manifest::{Policy, SessionBus};
use casemate_sandbox::plan::{BUS, Bus, Grants, WAYLAND, Wayland};

use crate::Inner;
use crate::error::Error;
use crate::mounts::Judge;
use crate::releases::blocking;
use crate::sockets::{SESSION, find};

const PROXY: &str = "xdg-dbus-proxy";
/// Those before cut off clients that send the end of their handshake along with what follows it, as libsystemd and zbus do (its
/// issue 21).
const PROXY_NEEDED: (u32, u32, u32) = (0, 1, 6);
const KEY: &str = "gui.session_bus";

/// The numbers in `xdg-dbus-proxy 0.1.6`.
fn version(said: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = said.split_whitespace().nth(1)?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next().unwrap_or(Some(0))?))
}

fn check_version(program: &Path) -> Result<(), Error> {
    let mut command = Command::new(program);
    command.arg("--version").env_clear().current_dir("/").stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().map_err(Error::io("start", program))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    match version(&said) {
        Some(found) if found >= PROXY_NEEDED => Ok(()),
        _ => Err(Error::ToolTooOld { tool: PROXY, said, key: KEY, needed: "0.1.6", package: PROXY }),
    }
}

/// The path of the first address in a list of D-Bus addresses that has one, `unix:path=…`.
fn path_of(addresses: &str) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let values = addresses.split(';').filter_map(|address| address.strip_prefix("unix:"));
    let value = values.flat_map(|keys| keys.split(',')).find_map(|pair| pair.strip_prefix("path="))?;
    let mut bytes = Vec::new();
    let mut rest = value.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            plain => plain,
        });
    }
    Some(PathBuf::from(std::ffi::OsString::from_vec(bytes)))
}

impl Inner {
    /// The proxy of an environment that is granted names on the session bus.
    pub(crate) async fn bus_proxy(&self, granted: &SessionBus) -> Result<Option<String>, Error> {
        if granted.is_empty() {
            return Ok(None);
        }
        let found = self.need(PROXY, PROXY, KEY)?;
        // As it is called where it runs, among the system's directories alone.
        let program = Path::new(&found).canonicalize().map_err(Error::io("resolve", &found))?;
        let path = program.to_str().map(str::to_owned).ok_or_else(|| Error::Configuration {
            path: found.into(),
            message: "it leads to a path that is not UTF-8; rename that".to_owned(),
        })?;
        blocking(move || check_version(&program)).await?;
        Ok(Some(path))
    }

    /// What [`Self::bus_proxy`] says, for `doctor`.
    pub(crate) async fn bus_proxy_found(&self) -> Result<PathBuf, Error> {
        let any = SessionBus { talk: vec![String::new()], own: vec![] };
        self.bus_proxy(&any).await.map(|path| path.unwrap_or_default().into())
    }

    pub(crate) fn plan_bus(
        &self,
        policy: &Policy,
        granted: &SessionBus,
        proxy: Option<String>,
        grants: &mut Grants,
    ) -> Result<(), Error> {
        policy.judge_session_bus(granted)?;
        let Some(proxy) = proxy else { return Ok(()) };
        let host = &self.settings.sockets;
        let wrong = |what: String| Error::Socket { socket: "session-bus", what, remedy: SESSION };
        let path = match host.bus.as_str() {
            "" => host.runtime.join("bus"),
            addresses => path_of(addresses).ok_or_else(|| {
                wrong(format!("casemated's DBUS_SESSION_BUS_ADDRESS, {addresses:?}, names no socket by path"))
            })?,
        };
        let socket = find(&path)?.ok_or_else(|| wrong(format!("no bus listens at {}", path.display())))?;
        grants.variables.push(format!("DBUS_SESSION_BUS_ADDRESS=unix:path={}", self.inside(BUS)));
        grants.bus = Some(Bus { proxy, socket, talk: granted.talk.clone(), own: granted.own.clone() });
        Ok(())
    }

    pub(crate) fn plan_wayland(&self, judge: &Judge<'_>, grants: &mut Grants) -> Result<(), Error> {
        let host = &self.settings.sockets;
        // As libwayland looks for it; an absolute path stays what it is.
        let name = if host.wayland.is_empty() { "wayland-0" } else { &host.wayland };
        let path = host.runtime.join(name);
        let socket = find(&path)?.ok_or_else(|| {
            let what = format!("no compositor listens at {} (casemated's WAYLAND_DISPLAY)", path.display());
            Error::Socket { socket: "wayland", what, remedy: SESSION }
        })?;
        grants.variables.push(format!("WAYLAND_DISPLAY={WAYLAND}"));
        grants.wayland = Some(Wayland { socket, plain: judge.policy.judge_socket("wayland-plain").is_ok() });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_proxy() {
        assert_eq!(version("xdg-dbus-proxy 0.1.6"), Some(PROXY_NEEDED));
        assert_eq!(version("xdg-dbus-proxy 1.0\n"), Some((1, 0, 0)));
        assert!(version("xdg-dbus-proxy 0.1.4").expect("a version") < PROXY_NEEDED);
        assert!(version("xdg-dbus-proxy 0.1.10").expect("a version") > PROXY_NEEDED);
        for odd in
            ["", "xdg-dbus-proxy", "xdg-dbus-proxy new", "xdg-dbus-proxy 1", "xdg-dbus-proxy 0.1.6-rc1"]
        {
            assert_eq!(version(odd), None, "{odd}");
        }
    }

    #[test]
    fn addresses_of_a_bus() {
        let bus = |text| path_of(text).map(|path| path.display().to_string());
        assert_eq!(bus("unix:path=/run/user/1000/bus"), Some("/run/user/1000/bus".to_owned()));
        assert_eq!(bus("tcp:host=x;unix:guid=1,path=/a%20b"), Some("/a b".to_owned()));
        for none in ["", "unix:abstract=/tmp/x", "unix:path=/a%2", "unix:path=/%zz", "tcp:host=a,path=/b"] {
            assert_eq!(bus(none), None, "{none}");
        }
    }
}
