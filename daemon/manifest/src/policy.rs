//! `policy.toml`: what manifests may ask for. The defaults are DESIGN.md's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::limits::{Cpus, ResourceLimits};
use crate::locate;
use crate::network::Port;
use crate::session_bus::SessionBus;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}, column {column}: {message}")]
pub struct PolicyError {
    line: usize,
    column: usize,
    message: String,
}

/// What policy refuses, and what to change.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Refusal {
    #[error(
        "mount of {requested:?} ({resolved}) denied: {reason}; to allow it, change [mounts] in policy.toml"
    )]
    MountDenied { requested: String, resolved: String, reason: String },
    #[error("variable {name} denied: {reason}; remove it from the manifest")]
    VariableDenied { name: String, reason: &'static str },
    #[error(
        "{key} = {asked} is above the {bound} that policy allows; lower it, or raise {key} in policy.toml, [resource_limits]"
    )]
    ResourceLimitExceeded { key: &'static str, asked: String, bound: String },
    #[error(
        "port {port} denied: {host} is below {lowest}, the lowest of the host that policy lets environments publish; choose a higher one, or change [network] in policy.toml"
    )]
    PortDenied { port: String, host: u16, lowest: u16 },
    #[error("device {name:?} denied; to allow it, add it to allowed in policy.toml, [devices]")]
    DeviceDenied { name: String },
    #[error("socket {name:?} denied; to allow it, add it to allowed in policy.toml, [sockets]")]
    SocketDenied { name: String },
    #[error(
        "session bus: to {verb} {name:?} is denied; to allow it, add it to {verb} in policy.toml, [session_bus]"
    )]
    NameDenied { verb: &'static str, name: String },
    #[error("nested_namespaces denied; to allow it, set nested in policy.toml, [namespaces]")]
    NestingDenied,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    mounts: Mounts,
    devices: Devices,
    sockets: Sockets,
    session_bus: SessionBus,
    namespaces: Namespaces,
    variables: Variables,
    network: NetworkRules,
    resource_limits: Bounds,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Mounts {
    /// Absolute directories below which absolute sources may lie.
    allowed: Vec<PathBuf>,
    /// Relative to the user's home.
    denied_in_home: Vec<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Devices {
    /// `gpu`, `audio`, `input`, `kvm`, or a qualified name; its last part may be `*`.
    allowed: Vec<String>,
    /// Sessions of environments with devices keep the user's supplementary groups.
    keep_groups: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sockets {
    /// `ssh-agent`, `x11`, `wayland`, `wayland-plain`.
    allowed: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Namespaces {
    /// Environments may be granted to make user namespaces of their own.
    nested: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Variables {
    denied: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NetworkRules {
    /// Lowest port of the host that may be published.
    lowest_port: u16,
}

/// Upper bounds. The defaults are beyond any machine this runs on, so that only a slip of the pen meets them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Bounds {
    memory_limit_mb: u64,
    swap_limit_mb: u64,
    cpu_shares: u64,
    cpus: Cpus,
    pids: u64,
    io_weight: u64,
}

impl Default for Mounts {
    fn default() -> Self {
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect();
        Self {
            allowed: paths(&["/home", "/tmp"]),
            denied_in_home: paths(&[
                ".ssh",
                ".gnupg",
                ".aws",
                ".azure",
                ".kube",
                ".docker",
                ".config/gcloud",
                ".netrc",
                ".pki",
                ".password-store",
                ".local/share/keyrings",
                ".local/share/kwalletd",
                ".mozilla",
                ".thunderbird",
                ".config/google-chrome",
                ".config/chromium",
                ".config/BraveSoftware",
                ".config/microsoft-edge",
                ".config/vivaldi",
                ".config/opera",
                ".var/app",
                "snap",
            ]),
        }
    }
}

impl Default for Variables {
    fn default() -> Self {
        let names = ["SSH_AUTH_SOCK", "GPG_AGENT_INFO", "AWS_SECRET_ACCESS_KEY", "DOCKER_HOST"];
        Self { denied: names.map(str::to_owned).to_vec() }
    }
}

impl Default for NetworkRules {
    fn default() -> Self {
        // Below, the kernel asks for rights that the user does not have.
        Self { lowest_port: 1024 }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            memory_limit_mb: 1 << 20,
            swap_limit_mb: 1 << 20,
            cpu_shares: 10_000,
            cpus: Cpus::from_thousandths(1_024_000),
            pids: 65_536,
            io_weight: 10_000,
        }
    }
}

/// A mount to be judged. The path is resolved: the engine did that, by descriptors.
#[derive(Debug, Clone, Copy)]
pub struct MountQuestion<'a> {
    /// As the manifest has it.
    pub source: &'a str,
    pub resolved: &'a Path,
    /// Relative in the manifest and still beneath its directory once resolved.
    pub is_beneath_manifest_directory: bool,
}

/// The policy on mounts as it applies on this machine: a resolved path is held against paths that are resolved likewise,
/// since a home, or `~/.ssh`, may itself be a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountRules {
    allowed: Vec<PathBuf>,
    kept_out: Vec<PathBuf>,
}

impl MountRules {
    pub fn judge(&self, question: &MountQuestion<'_>) -> Result<(), Refusal> {
        let deny = |reason: String| {
            Err(Refusal::MountDenied {
                requested: question.source.to_owned(),
                resolved: question.resolved.display().to_string(),
                reason,
            })
        };
        let path = question.resolved;
        for denied in &self.kept_out {
            if path.starts_with(denied) {
                return deny(format!("{} is kept out of environments", denied.display()));
            }
            if denied.starts_with(path) {
                return deny(format!("it contains {}, which is kept out of environments", denied.display()));
            }
        }
        let below = |root: &PathBuf| path.starts_with(root) && path != root;
        if question.is_beneath_manifest_directory || self.allowed.iter().any(below) {
            return Ok(());
        }
        let roots: Vec<String> = self.allowed.iter().map(|root| root.display().to_string()).collect();
        deny(format!("absolute paths may lie below {} only", roots.join(" and ")))
    }
}

/// The loader and the shell read these before the program that they are meant for: they would run code of the manifest's
/// choice with the rights of whatever is started.
const LOADER: &[&str] =
    &["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "LD_DEBUG_OUTPUT", "BASH_ENV", "ENV", "GCONV_PATH"];

impl Policy {
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        toml::from_str(text).map_err(|error| {
            let (line, column, message) = locate(text, &error);
            PolicyError { line, column, message }
        })
    }

    /// `own` are Casemate's directories: store, cache, runtime, configuration. `resolve` follows the links of a path, and
    /// is `None` where there is nothing.
    pub fn mount_rules(
        &self,
        home: &Path,
        own: &[PathBuf],
        resolve: impl Fn(&Path) -> Option<PathBuf>,
    ) -> MountRules {
        let both = |path: PathBuf| {
            let resolved = resolve(&path).filter(|resolved| *resolved != path);
            std::iter::once(path).chain(resolved)
        };
        let homes: Vec<PathBuf> = both(home.to_owned()).collect();
        let secrets =
            homes.iter().flat_map(|home| self.mounts.denied_in_home.iter().map(|name| home.join(name)));
        MountRules {
            allowed: self.mounts.allowed.iter().cloned().flat_map(&both).collect(),
            kept_out: secrets.chain(own.iter().cloned()).flat_map(&both).collect(),
        }
    }

    pub fn judge_variables(&self, variables: &BTreeMap<String, String>) -> Result<(), Refusal> {
        for name in variables.keys() {
            let deny = |reason| Err(Refusal::VariableDenied { name: name.clone(), reason });
            if self.variables.denied.contains(name) {
                return deny("it leads to secrets of the host");
            }
            if LOADER.contains(&name.as_str()) {
                return deny("it changes what every program loads");
            }
            if ["HOME", "USER", "LOGNAME", "SHELL", "XDG_RUNTIME_DIR"].contains(&name.as_str()) {
                return deny("it is the environment's own");
            }
        }
        Ok(())
    }

    pub fn judge_limits(&self, limits: &ResourceLimits) -> Result<(), Refusal> {
        let bounds = &self.resource_limits;
        for (key, asked, bound) in [
            ("memory_limit_mb", limits.memory_limit_mb, bounds.memory_limit_mb),
            ("swap_limit_mb", limits.swap_limit_mb, bounds.swap_limit_mb),
            ("cpu_shares", limits.cpu_shares, bounds.cpu_shares),
            ("pids", limits.pids, bounds.pids),
            ("io_weight", limits.io_weight, bounds.io_weight),
        ] {
            if let Some(asked) = asked.filter(|asked| *asked > bound) {
                let (asked, bound) = (asked.to_string(), bound.to_string());
                return Err(Refusal::ResourceLimitExceeded { key, asked, bound });
            }
        }
        if let Some(asked) = limits.cpus.filter(|asked| *asked > bounds.cpus) {
            let (asked, bound) = (asked.to_string(), bounds.cpus.to_string());
            return Err(Refusal::ResourceLimitExceeded { key: "cpus", asked, bound });
        }
        Ok(())
    }

    pub fn judge_ports(&self, ports: &[Port]) -> Result<(), Refusal> {
        let lowest = self.network.lowest_port;
        match ports.iter().find(|port| port.host < lowest) {
            None => Ok(()),
            Some(port) => Err(Refusal::PortDenied { port: port.to_string(), host: port.host, lowest }),
        }
    }

    pub fn judge_device(&self, name: &str) -> Result<(), Refusal> {
        let all_of_a_kind = name.split_once('=').map(|(kind, _)| format!("{kind}=*"));
        if self
            .devices
            .allowed
            .iter()
            .any(|allowed| allowed == name || Some(allowed) == all_of_a_kind.as_ref())
        {
            return Ok(());
        }
        Err(Refusal::DeviceDenied { name: name.to_owned() })
    }

    pub fn judge_socket(&self, name: &str) -> Result<(), Refusal> {
        if self.sockets.allowed.iter().any(|allowed| allowed == name) {
            return Ok(());
        }
        Err(Refusal::SocketDenied { name: name.to_owned() })
    }

    pub fn judge_session_bus(&self, asked: &SessionBus) -> Result<(), Refusal> {
        match self.session_bus.first_denied(asked) {
            None => Ok(()),
            Some((verb, name)) => Err(Refusal::NameDenied { verb, name }),
        }
    }

    pub fn judge_nesting(&self, asked: bool) -> Result<(), Refusal> {
        if asked && !self.namespaces.nested { Err(Refusal::NestingDenied) } else { Ok(()) }
    }

    /// Whether sessions may keep the user's supplementary groups where a device is granted. The kernel lets a process
    /// without rights keep all of them or none.
    pub fn keep_groups(&self) -> bool {
        self.devices.keep_groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge_with(
        resolved: &str,
        beneath: bool,
        resolve: impl Fn(&Path) -> Option<PathBuf>,
    ) -> Result<(), Refusal> {
        let own = [PathBuf::from("/home/ann/.local/share/casemate")];
        Policy::default().mount_rules(Path::new("/home/ann"), &own, resolve).judge(&MountQuestion {
            source: resolved,
            resolved: Path::new(resolved),
            is_beneath_manifest_directory: beneath,
        })
    }

    fn judge(resolved: &str, beneath: bool) -> Result<(), Refusal> {
        judge_with(resolved, beneath, |path| Some(path.to_owned()))
    }

    #[test]
    fn links_hide_no_secret() {
        // /home leads to /var/home, and ~/.gnupg to another disk.
        let resolve = |path: &Path| {
            let keys = path.ends_with("ann/.gnupg").then(|| PathBuf::from("/disk/keys"));
            keys.or_else(|| path.strip_prefix("/home").ok().map(|rest| Path::new("/var/home").join(rest)))
        };
        for (path, beneath) in [("/var/home/ann/.ssh", true), ("/disk/keys", true), ("/disk", true)] {
            let verdict = judge_with(path, beneath, resolve);
            assert!(matches!(verdict, Err(Refusal::MountDenied { .. })), "{path}");
        }
        assert_eq!(judge_with("/var/home/ann/src", false, resolve), Ok(()));
    }

    #[test]
    fn mounts() {
        for (path, beneath) in
            [("/home/ann/src", false), ("/tmp/x", false), ("/srv/project", true), ("/home/ann/.sshx", false)]
        {
            assert_eq!(judge(path, beneath), Ok(()), "{path}");
        }
        for (path, beneath) in [
            ("/home/ann/.ssh", false),
            ("/home/ann/.ssh/id", true),
            ("/home/ann", false),
            ("/home", false),
            ("/", true),
            ("/etc", false),
            ("/homer/x", false),
            ("/home/ann/.local/share/casemate/objects", true),
            ("/home/ann/.local", true),
            ("/home/ann/.mozilla/firefox", false),
            ("/tmp", false),
        ] {
            assert!(matches!(judge(path, beneath), Err(Refusal::MountDenied { .. })), "{path}");
        }
    }

    #[test]
    fn limits_and_variables_and_devices() {
        let policy =
            Policy::parse("[resource_limits]\nmemory_limit_mb = 1024\n[devices]\nallowed = [\"kvm\"]\n")
                .expect("good");
        let limits = ResourceLimits { memory_limit_mb: Some(2048), ..ResourceLimits::default() };
        assert_eq!(
            policy.judge_limits(&limits),
            Err(Refusal::ResourceLimitExceeded {
                key: "memory_limit_mb",
                asked: "2048".into(),
                bound: "1024".into()
            })
        );
        let port = |text: &str| [text.parse().expect("a port")];
        assert_eq!(policy.judge_ports(&port("8080:80")), Ok(()));
        assert!(matches!(policy.judge_ports(&port("1023:80")), Err(Refusal::PortDenied { host: 1023, .. })));
        let limits =
            ResourceLimits { cpus: Some(Cpus::from_thousandths(1_500)), ..ResourceLimits::default() };
        assert_eq!(policy.judge_limits(&limits), Ok(()));
        let error = Policy::parse("[resource_limits]\ncpus = 1.25\n").expect("good").judge_limits(&limits);
        assert!(error.expect_err("refused").to_string().contains("cpus = 1.5 is above the 1.25"));
        assert!(policy.judge_device("kvm").is_ok());
        assert!(policy.judge_device("gpu").is_err());
        let policy = Policy::parse("[devices]\nallowed = [\"a.b/c=*\", \"a.b/d=0\"]\n").expect("good");
        for (device, allowed) in
            [("a.b/c=x", true), ("a.b/d=0", true), ("a.b/d=1", false), ("a.b/cc=x", false)]
        {
            assert_eq!(policy.judge_device(device).is_ok(), allowed, "{device}");
        }
        for name in ["SSH_AUTH_SOCK", "LD_PRELOAD", "HOME"] {
            assert!(
                policy.judge_variables(&BTreeMap::from([(name.to_owned(), String::new())])).is_err(),
                "{name}"
            );
        }
        assert!(
            Policy::parse("[mount]\n").expect_err("refused").to_string().contains("did you mean `mounts`?")
        );
    }
}
