//! `casemate.toml`. Every section refuses unknown keys; what is known but not built yet is parsed, and named by
//! [`Manifest::unsupported`], so that a manifest of a later version, or of Karapace, is refused for what it asks, not for
//! how it is written.

use std::collections::BTreeMap;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::limits::ResourceLimits;
use crate::locate;
use crate::network::{Destination, Port};
use crate::service::{CommandLine, Health, Restart, StopSignal};
use crate::session_bus::SessionBus;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ManifestError {
    #[error("casemate.toml, line {line}, column {column}: {message}")]
    Syntax { line: usize, column: usize, message: String },
    #[error("casemate.toml: manifest_version is {0}; this Casemate reads version 1")]
    Version(u32),
    #[error("casemate.toml: [base] needs either release or image, and not both")]
    Base,
    #[error("casemate.toml: {key}: {value:?} {rule}")]
    Value { key: String, value: String, rule: &'static str },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub manifest_version: u32,
    pub base: Base,
    #[serde(default)]
    pub system: System,
    #[serde(default)]
    pub gui: Gui,
    #[serde(default)]
    pub hardware: Hardware,
    /// Name → mount. Names are for people.
    #[serde(default)]
    pub mounts: BTreeMap<String, Mount>,
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    #[serde(default)]
    pub runtime: Runtime,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// `debian/bookworm`, or the name of an imported release.
    pub release: Option<String>,
    pub image: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct System {
    /// `name` or `name=version`.
    #[serde(default)]
    pub packages: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gui {
    #[serde(default)]
    pub apps: Vec<String>,
    /// The X server's socket: whoever has it sees and types into all of its windows.
    #[serde(default)]
    pub x11: bool,
    /// The compositor's socket, with a security context where it knows them.
    #[serde(default)]
    pub wayland: bool,
    #[serde(default, skip_serializing_if = "SessionBus::is_empty")]
    pub session_bus: SessionBus,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    #[serde(default)]
    pub gpu: bool,
    #[serde(default)]
    pub audio: bool,
    #[serde(default)]
    pub input: bool,
    #[serde(default)]
    pub kvm: bool,
    /// Of the Container Device Interface: `nvidia.com/gpu=all`.
    #[serde(default)]
    pub devices: Vec<String>,
}

impl Hardware {
    /// What is asked for, as policy names it.
    pub fn names(&self) -> Vec<String> {
        let classes = [("gpu", self.gpu), ("audio", self.audio), ("input", self.input), ("kvm", self.kvm)];
        let asked = classes.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name.to_owned());
        asked.chain(self.devices.iter().cloned()).collect()
    }
}

/// `source:target`, `source:target:ro` or `source:target:rw`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mount {
    pub source: String,
    pub target: String,
    pub read_only: bool,
}

impl<'de> Deserialize<'de> for Mount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (rest, read_only) = match (text.strip_suffix(":ro"), text.strip_suffix(":rw")) {
            (Some(rest), _) => (rest, true),
            (_, Some(rest)) => (rest, false),
            _ => (text.as_str(), false),
        };
        let (source, target) = rest.rsplit_once(':').ok_or_else(|| {
            D::Error::custom(format!("{text:?} is no mount; write \"SOURCE:TARGET\" or \"SOURCE:TARGET:ro\""))
        })?;
        let bad = |what: &str| Err(D::Error::custom(format!("mount {text:?}: {what}")));
        if source.is_empty() || text.contains(|c: char| c.is_control()) {
            return bad("the source is empty, or there are control characters in it");
        }
        let plain = target.starts_with('/')
            && target.len() > 1
            && target[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        if !plain {
            return bad(
                "the target must be an absolute path without `.`, `..` or doubled slashes, and not `/`",
            );
        }
        for taken in ["/proc", "/sys", "/dev", "/run", "/etc"] {
            if target == taken || (target.starts_with(&format!("{taken}/")) && taken != "/etc") {
                return bad("the target is the sandbox's own; choose another one");
            }
        }
        Ok(Self { source: source.to_owned(), target: target.to_owned(), read_only })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Loopback alone.
    None,
    /// A network of its own with a way out.
    #[default]
    Private,
    Host,
}

impl Network {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Private => "private",
            Self::Host => "host",
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runtime {
    /// `namespace`, or `oci`.
    pub backend: Option<String>,
    #[serde(default)]
    pub network: Network,
    /// The socket of the user's ssh-agent(1).
    #[serde(default)]
    pub ssh_agent: bool,
    /// `sudo` inside gives the user's sessions the environment's root.
    #[serde(default)]
    pub sudo: bool,
    /// Programs inside may make user namespaces, as browsers and bubblewrap do.
    #[serde(default)]
    pub nested_namespaces: bool,
    /// What it runs while it is started.
    pub command: Option<CommandLine>,
    /// The command runs as the environment's root.
    #[serde(default)]
    pub command_as_root: bool,
    pub restart: Option<Restart>,
    /// What tells the command, and all sessions, to end.
    pub stop_signal: Option<StopSignal>,
    /// Seconds that they have to end in.
    pub stop_timeout: Option<u64>,
    /// Published ports.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// Where it may go, if not everywhere.
    pub allow: Option<Vec<Destination>>,
    pub health: Option<Health>,
    #[serde(default)]
    pub resource_limits: ResourceLimits,
}

/// Something a manifest may say but this version can't do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsupported {
    pub key: String,
    pub reason: String,
}

fn package_name(text: &str) -> bool {
    let (name, version) = text.split_once('=').map_or((text, None), |(name, version)| (name, Some(version)));
    let name_is_good = name.len() >= 2
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c));
    let version_is_good = version.is_none_or(|version| {
        !version.is_empty()
            && version.starts_with(|c: char| c.is_ascii_digit())
            && version.chars().all(|c| c.is_ascii_alphanumeric() || ".+-:~".contains(c))
    });
    name_is_good && version_is_good
}

pub(crate) fn variable_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

impl Manifest {
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        let manifest: Self = toml::from_str(text).map_err(|error| {
            let (line, column, message) = locate(text, &error);
            ManifestError::Syntax { line, column, message }
        })?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestError> {
        if self.manifest_version != 1 {
            return Err(ManifestError::Version(self.manifest_version));
        }
        if self.base.release.is_some() == self.base.image.is_some() {
            return Err(ManifestError::Base);
        }
        let bad = |key: &str, value: &str, rule| {
            Err(ManifestError::Value { key: key.to_owned(), value: value.to_owned(), rule })
        };
        for package in &self.system.packages {
            if !package_name(package) {
                return bad(
                    "system.packages",
                    package,
                    "is no package name (lower case, digits, + - .; `name=version` pins one)",
                );
            }
        }
        for (name, value) in &self.environment {
            if !variable_name(name) {
                return bad("environment", name, "is no variable name");
            }
            if value.contains(['\0', '\n', '\x1b']) {
                return bad(&format!("environment.{name}"), value, "holds NUL, newline or escape");
            }
        }
        for device in &self.hardware.devices {
            if !crate::cdi::is_qualified(device) {
                return bad("hardware.devices", device, "is no device; write \"VENDOR/CLASS=NAME\"");
            }
        }
        let mut devices = self.hardware.devices.clone();
        devices.sort_unstable();
        if let Some(twice) = devices.windows(2).find(|pair| pair[0] == pair[1]) {
            return bad("hardware.devices", &twice[0], "is named twice");
        }
        let mut targets: Vec<&str> = self.mounts.values().map(|mount| mount.target.as_str()).collect();
        targets.sort_unstable();
        if let Some(twice) = targets.windows(2).find(|pair| pair[0] == pair[1]) {
            return bad("mounts", twice[0], "is the target of two mounts");
        }
        if let Some(port) = self.runtime.ports.first()
            && self.runtime.network != Network::Private
        {
            return bad("runtime.ports", &port.to_string(), "needs runtime.network = \"private\"");
        }
        if let Some(list) = &self.runtime.allow {
            let all = list.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            if list.is_empty() {
                return bad("runtime.allow", &all, "allows nothing; that is runtime.network = \"none\"");
            }
            if self.runtime.network != Network::Private {
                return bad("runtime.allow", &all, "needs runtime.network = \"private\"");
            }
        }
        // pasta takes each but once, whatever the address.
        let mut taken: Vec<_> = self.runtime.ports.iter().map(|port| (port.host, port.protocol)).collect();
        taken.sort_unstable();
        if let Some(twice) = taken.windows(2).find(|pair| pair[0] == pair[1]) {
            return bad("runtime.ports", &twice[0].0.to_string(), "is published twice");
        }
        if let Err((key, value, rule)) = self.gui.session_bus.check() {
            return bad(key, &value, rule);
        }
        if let Err((key, value, rule)) = self.runtime.check_service() {
            return bad(key, &value, rule);
        }
        if let Err(error) = self.runtime.resource_limits.check() {
            let key = format!("runtime.resource_limits.{}", error.key);
            return bad(&key, &error.value, error.rule);
        }
        match self.runtime.backend.as_deref() {
            None | Some("namespace" | "oci") => Ok(()),
            Some(other) => bad("runtime.backend", other, "is no backend; choose \"namespace\" or \"oci\""),
        }
    }

    /// Sockets that are asked for, as policy names them.
    pub fn sockets(&self) -> Vec<String> {
        let asked =
            [("ssh-agent", self.runtime.ssh_agent), ("x11", self.gui.x11), ("wayland", self.gui.wayland)];
        asked.into_iter().filter(|(_, asked)| *asked).map(|(name, _)| name.to_owned()).collect()
    }

    /// What this version can't do, in the order of the sections. Resource limits are not in here: policy judges them
    /// first.
    pub fn unsupported(&self) -> Vec<Unsupported> {
        let mut found = Vec::new();
        let mut add = |present: bool, key: &str, reason: &str| {
            if present {
                found.push(Unsupported { key: key.to_owned(), reason: reason.to_owned() });
            }
        };
        add(self.base.image.is_some(), "base.image", "only releases can be the base so far");
        add(!self.gui.apps.is_empty(), "gui.apps", "applications are not exported yet");
        add(
            self.runtime.backend.as_deref() == Some("oci"),
            "runtime.backend",
            "only \"namespace\" is there so far",
        );
        found
    }

    /// BLAKE3 of the meaning: comments, order and layout do not change it.
    pub fn digest(&self) -> String {
        blake3::hash(self.canonical().as_bytes()).to_hex().to_string()
    }

    /// What the lock depends on: base and packages.
    pub fn lock_digest(&self) -> String {
        let mut packages = self.system.packages.clone();
        packages.sort();
        packages.dedup();
        let base = self.base.release.as_deref().or(self.base.image.as_deref()).unwrap_or_default();
        blake3::hash(format!("{base}\n{}\n", packages.join("\n")).as_bytes()).to_hex().to_string()
    }

    fn canonical(&self) -> String {
        // A structure of strings, numbers and maps always has a form in TOML; its sections are sorted.
        toml::to_string(self).unwrap_or_else(|_| format!("{self:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"
manifest_version = 1
[base]
release = "debian/bookworm"
[system]
packages = ["git", "jq=1.6-2.1"]
[gui]
apps = []
[hardware]
gpu = false
audio = false
[mounts]
workspace = "./:/workspace"
[environment]
EDITOR = "vi"
[runtime]
backend = "namespace"
network = "host"
[runtime.resource_limits]
memory_limit_mb = 2048
cpu_shares = 512
"#;

    fn error(text: &str) -> String {
        Manifest::parse(text).expect_err("refused").to_string()
    }

    #[test]
    fn the_example_of_design_md() {
        let manifest = Manifest::parse(FULL).expect("good");
        assert_eq!(manifest.mounts["workspace"].source, "./");
        assert_eq!(manifest.runtime.resource_limits.memory_limit_mb, Some(2048));
        assert!(manifest.unsupported().is_empty());
    }

    #[test]
    fn layout_and_comments_do_not_change_the_digest() {
        let other = FULL.replace("[gui]\napps = []\n", "# nothing\n").replace("\"git\", ", "\"git\",   ");
        assert_eq!(
            Manifest::parse(FULL).expect("good").digest(),
            Manifest::parse(&other).expect("good").digest()
        );
        let changed = FULL.replace("\"vi\"", "\"ed\"");
        assert_ne!(
            Manifest::parse(FULL).expect("good").digest(),
            Manifest::parse(&changed).expect("good").digest()
        );
    }

    #[test]
    fn unknown_keys_are_refused_with_place_and_nearest_key() {
        assert_eq!(
            error("manifest_version = 1\n[base]\nrelase = \"debian/bookworm\"\n"),
            "casemate.toml, line 3, column 1: unknown field `relase`, expected `release` or `image`; did you mean `release`?"
        );
        assert!(
            error("manifest_version = 1\n[base]\nrelease=\"a/b\"\n[sytem]\n")
                .contains("did you mean `system`?")
        );
        assert!(
            error(&FULL.replace("cpu_shares", "cpu_share")).contains("line 21, column 1"),
            "{}",
            error(&FULL.replace("cpu_shares", "cpu_share"))
        );
    }

    #[test]
    fn bad_values_are_refused() {
        for (from, to) in [
            ("manifest_version = 1", "manifest_version = 2"),
            ("\"git\"", "\"--allow-unauthenticated\""),
            ("\"git\"", "\"Git\""),
            ("./:/workspace", "./:workspace"),
            ("./:/workspace", "./:/a/../etc"),
            ("./:/workspace", "./:/proc/self"),
            ("./:/workspace", ":/x"),
            ("\"vi\"", "\"a\\nb\""),
            ("EDITOR", "\"ED=X\""),
            ("release = ", "image = \"x\"\nrelease = "),
            ("\"namespace\"", "\"chroot\""),
            ("2048", "\"2048\""),
            ("network = \"host\"", "network = \"host\"\nports = [\"8080:80\"]"),
            ("network = \"host\"", "ports = [\"8080:80\", \"0.0.0.0:8080:81/tcp\"]"),
            ("network = \"host\"", "ports = [\"8080\"]"),
            ("network = \"host\"", "network = \"host\"\nallow = [\"a.example\"]"),
            ("network = \"host\"", "allow = []"),
            ("network = \"host\"", "allow = [\"a b\"]"),
            ("audio = false", "devices = [\"gpu\"]"),
            ("audio = false", "devices = [\"a/b=c\", \"a/b=c\"]"),
            ("2048", "1"),
            ("cpu_shares = 512", "cpus = 0"),
            ("cpu_shares = 512", "cpus = \"2\""),
            ("cpu_shares = 512", "pids = 1"),
            ("apps = []", "session_bus = [\"org.example.A\"]"),
            ("apps = []", "session_bus = { talk = [\"org.casemate.Casemate1\"] }"),
            ("apps = []", "session_bus = { own = [\"org.casemate.*\"] }"),
        ] {
            let text = FULL.replace(from, to);
            assert!(Manifest::parse(&text).is_err(), "{from} → {to}");
        }
    }
}
