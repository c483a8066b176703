//! Sockets of the user's session that an environment is granted by name. They are where the daemon's own variables say,
//! which the session sets for the user's services; inside, they lie in the runtime directory of the user, which nobody else
//! in there can enter. A server that is started anew has another socket, which a running environment does not see.

use std::path::{Path, PathBuf};

use casemate_sandbox::plan::{Grants, Mount, OwnFile, Source};
use rustix::fs::{FileType, Mode, OFlags};

use crate::error::Error;
use crate::mounts::{self, Judge};
use crate::{Inner, configuration};

/// Where X servers listen, inside too: clients know no other place.
const X11: &str = "/tmp/.X11-unix";
/// Any host: the environment's name is not the host's.
const FAMILY_WILD: u16 = 0xffff;
const FAMILY_LOCAL: u16 = 256;

pub(crate) const SESSION: &str = "set it for the user's services (`systemctl --user import-environment NAME`, or restart casemated with it), or \
                       remove the grant from the manifest";

/// `None` where there is nothing of that name.
pub(crate) fn find(path: &Path) -> Result<Option<Source>, Error> {
    let Ok(path) = path.canonicalize() else { return Ok(None) };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(Error::sys("open", &path))?;
    let stat = rustix::fs::fstat(&opened).map_err(Error::sys("look at", &path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Ok(None);
    }
    mounts::source(&path, &opened).map(Some)
}

fn at(source: Source, target: String) -> Mount {
    Mount { source, target, read_only: false, no_exec: true }
}

/// The number of a display of this machine: `:0`, `:0.0`, `unix:0`.
fn display_number(display: &str) -> Option<&str> {
    let rest = display.strip_prefix("unix").unwrap_or(display).strip_prefix(':')?;
    let number = rest.split('.').next()?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(number)
}

/// What of an Xauthority(5) file lets one into the display, for whatever the host is called; empty where nothing does.
fn cookies(mut bytes: &[u8], display: &str) -> Option<Vec<u8>> {
    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = bytes.split_at_checked(count)?;
        *bytes = rest;
        Some(taken)
    }
    fn number(bytes: &mut &[u8]) -> Option<u16> {
        Some(u16::from_be_bytes(take(bytes, 2)?.try_into().ok()?))
    }
    fn counted<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
        let count = number(bytes)?;
        take(bytes, count.into())
    }
    let mut kept = Vec::new();
    while !bytes.is_empty() {
        let family = number(&mut bytes)?;
        counted(&mut bytes)?;
        let fields = [counted(&mut bytes)?, counted(&mut bytes)?, counted(&mut bytes)?];
        let is_its = fields[0].is_empty() || fields[0] == display.as_bytes();
        if is_its && [FAMILY_LOCAL, FAMILY_WILD].contains(&family) {
            kept.extend(FAMILY_WILD.to_be_bytes());
            kept.extend(0u16.to_be_bytes());
            for field in fields {
                kept.extend(u16::try_from(field.len()).ok()?.to_be_bytes());
                kept.extend(field);
            }
        }
    }
    Some(kept)
}

impl Inner {
    /// In the user's runtime directory inside.
    pub(crate) fn inside(&self, name: &str) -> String {
        format!("/run/user/{}/{name}", self.uid)
    }

    /// The sound servers' sockets; whether there are any.
    pub(crate) fn plan_sound(&self, grants: &mut Grants, mounts: &mut Vec<Mount>) -> Result<bool, Error> {
        let host = &self.settings.sockets;
        let pulse = match host.pulse.as_str() {
            "" => host.runtime.join("pulse/native"),
            named => PathBuf::from(named.strip_prefix("unix:").unwrap_or(named)),
        };
        let before = mounts.len();
        if let Some(source) = find(&pulse)? {
            let target = self.inside("pulse/native");
            grants.variables.push(format!("PULSE_SERVER=unix:{target}"));
            mounts.push(at(source, target));
        }
        if let Some(source) = find(&host.runtime.join("pipewire-0"))? {
            grants.variables.push("PIPEWIRE_REMOTE=pipewire-0".to_owned());
            mounts.push(at(source, self.inside("pipewire-0")));
        }
        Ok(mounts.len() > before)
    }

    fn plan_agent(&self, grants: &mut Grants, mounts: &mut Vec<Mount>) -> Result<(), Error> {
        let path = &self.settings.sockets.ssh_agent;
        let source = find(Path::new(path))?.ok_or_else(|| Error::Socket {
            socket: "ssh-agent",
            what: match path.as_str() {
                "" => "casemated has no SSH_AUTH_SOCK".to_owned(),
                path => format!("no agent listens at {path:?}, casemated's SSH_AUTH_SOCK"),
            },
            remedy: SESSION,
        })?;
        let target = self.inside("ssh-agent");
        grants.variables.push(format!("SSH_AUTH_SOCK={target}"));
        mounts.push(at(source, target));
        Ok(())
    }

    fn plan_x11(&self, grants: &mut Grants, mounts: &mut Vec<Mount>) -> Result<(), Error> {
        let host = &self.settings.sockets;
        let wrong = |what: String| Error::Socket { socket: "x11", what, remedy: SESSION };
        let number = display_number(&host.display).ok_or_else(|| {
            wrong(format!("casemated's DISPLAY, {:?}, is no display of this machine", host.display))
        })?;
        let path = format!("{X11}/X{number}");
        let source =
            find(Path::new(&path))?.ok_or_else(|| wrong(format!("no X server listens at {path}")))?;
        mounts.push(at(source, path));
        grants.variables.push(format!("DISPLAY=:{number}"));
        let authority = match host.x_authority.as_str() {
            "" => self.settings.home.join(".Xauthority"),
            named => PathBuf::from(named),
        };
        // A server that goes by who one is needs no cookie.
        let Some(bytes) = configuration::read_bytes(&authority)? else { return Ok(()) };
        let content = cookies(&bytes, number)
            .ok_or_else(|| wrong(format!("{} is no Xauthority file", authority.display())))?;
        if !content.is_empty() {
            let path = self.inside("Xauthority");
            grants.variables.push(format!("XAUTHORITY={path}"));
            grants.files.push(OwnFile { path, content });
        }
        Ok(())
    }

    pub(crate) fn plan_sockets(
        &self,
        judge: &Judge<'_>,
        names: &[String],
        grants: &mut Grants,
        mounts: &mut Vec<Mount>,
    ) -> Result<(), Error> {
        for name in names {
            judge.policy.judge_socket(name)?;
            match name.as_str() {
                "ssh-agent" => self.plan_agent(grants, mounts)?,
                "x11" => self.plan_x11(grants, mounts)?,
                "wayland" => self.plan_wayland(judge, grants)?,
                other => {
                    let reason = "no such socket is known".to_owned();
                    return Err(Error::Unsupported { key: other.to_owned(), reason });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn displays_of_this_machine() {
        assert_eq!([":0", ":10.1", "unix:7"].map(display_number), [Some("0"), Some("10"), Some("7")]);
        for other in ["", ":", "host:0", "localhost:10.0", ":0/../x", "/tmp/launch:0"] {
            assert_eq!(display_number(other), None, "{other}");
        }
    }

    #[test]
    fn cookies_of_the_display_alone() {
        let entry = |family: u16, address: &str, number: &str, data: &str| {
            let mut bytes = family.to_be_bytes().to_vec();
            for field in [address, number, "MIT-MAGIC-COOKIE-1", data] {
                bytes.extend(u16::try_from(field.len()).expect("short").to_be_bytes());
                bytes.extend(field.as_bytes());
            }
            bytes
        };
        let file = [
            entry(FAMILY_LOCAL, "host", "0", "this"),
            entry(FAMILY_LOCAL, "host", "1", "another's"),
            entry(0, "\x7f\0\0\x01", "0", "of TCP"),
        ]
        .concat();
        assert_eq!(cookies(&file, "0"), Some(entry(FAMILY_WILD, "", "0", "this")));
        assert_eq!(cookies(&file[..file.len() - 1], "0"), None);
        assert_eq!(cookies(&file, "7"), Some(Vec::new()));
    }
}
