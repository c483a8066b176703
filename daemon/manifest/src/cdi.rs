//! Specifications of the Container Device Interface: what a device such as `nvidia.com/gpu=all` consists of. They are the
//! machine's or the user's own configuration, made by a vendor's tool. What Casemate cannot do is refused by name: a
//! device of which a part is missing would fail later, and for odd reasons.

use std::collections::HashSet;

use serde::Deserialize;
use serde::de::IgnoredAny;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CdiError {
    #[error("it cannot be read: {0}")]
    Syntax(String),
    #[error("cdiVersion {0:?} is not known; versions from 0.3.0 to 1.x are")]
    Version(String),
    #[error(
        "{device} wants hooks run ({hooks}), which Casemate does not do: they are programs outside the wall. Generate the \
         specification without (for example `nvidia-ctk cdi generate --disable-hook=all`)"
    )]
    Hooks { device: String, hooks: String },
    #[error("{device}: {what} cannot be granted to an environment")]
    Unsupported { device: String, what: &'static str },
    #[error("{device}: {key} {value:?} {rule}")]
    Value { device: String, key: &'static str, value: String, rule: &'static str },
    #[error("{device} is in it twice")]
    Twice { device: String },
}

/// `vendor.example/class=name`, as manifests and policy have it.
pub fn is_qualified(text: &str) -> bool {
    let word = |text: &str, more: &str| {
        let good = |c: char| c.is_ascii_alphanumeric() || more.contains(c);
        !text.is_empty()
            && text.chars().all(good)
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text.ends_with(|c: char| c.is_ascii_alphanumeric())
    };
    let parts = text.split_once('=').and_then(|(kind, name)| Some((kind.split_once('/')?, name)));
    parts.is_some_and(|((vendor, class), name)| {
        word(vendor, "_-.") && word(class, "_-.") && word(name, "_-.:")
    })
}

/// What of a specification tells whether the rest matters.
#[derive(Deserialize)]
struct Head {
    kind: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Spec {
    cdi_version: String,
    #[serde(rename = "kind")]
    _kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: IgnoredAny,
    #[serde(default)]
    container_edits: Edits,
    devices: Vec<Device>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default, rename = "annotations")]
    _annotations: IgnoredAny,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<CdiNode>,
    mounts: Vec<CdiMount>,
    hooks: Vec<Hook>,
    net_devices: Vec<IgnoredAny>,
    intel_rdt: Option<IgnoredAny>,
    #[serde(rename = "additionalGids")]
    groups: Vec<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CdiNode {
    path: String,
    host_path: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    major: Option<u32>,
    minor: Option<u32>,
    permissions: Option<String>,
    // The node inside is the host's own, with its owner and mode.
    #[serde(rename = "fileMode")]
    _file_mode: Option<u32>,
    #[serde(rename = "uid")]
    _uid: Option<u32>,
    #[serde(rename = "gid")]
    _gid: Option<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct CdiMount {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Hook {
    hook_name: String,
}

/// A device node to be granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub host: String,
    /// Below `/dev`.
    pub inside: String,
    /// What the specification says it is.
    pub is_block: Option<bool>,
    pub number: Option<(u32, u32)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceMount {
    pub host: String,
    pub inside: String,
    pub read_only: bool,
    pub no_exec: bool,
}

/// All that a device consists of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parts {
    pub variables: Vec<(String, String)>,
    pub nodes: Vec<Node>,
    pub mounts: Vec<DeviceMount>,
    /// Ids of groups that its user must be in.
    pub groups: Vec<u32>,
}

impl Parts {
    /// Several devices of a specification share parts.
    pub fn add(&mut self, more: Self) {
        fn unite<T: PartialEq>(all: &mut Vec<T>, more: Vec<T>) {
            for one in more {
                if !all.contains(&one) {
                    all.push(one);
                }
            }
        }
        unite(&mut self.variables, more.variables);
        unite(&mut self.nodes, more.nodes);
        unite(&mut self.mounts, more.mounts);
        unite(&mut self.groups, more.groups);
    }
}

fn is_plain(path: &str) -> bool {
    path.len() > 1
        && path.starts_with('/')
        && path[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..")
        && !path.contains(|c: char| c.is_control())
}

impl Edits {
    fn parts(&self, device: &str) -> Result<Parts, CdiError> {
        if !self.hooks.is_empty() {
            let names: Vec<&str> = self.hooks.iter().map(|hook| hook.hook_name.as_str()).collect();
            return Err(CdiError::Hooks { device: device.to_owned(), hooks: names.join(", ") });
        }
        let unsupported = |what| Err(CdiError::Unsupported { device: device.to_owned(), what });
        if !self.net_devices.is_empty() {
            return unsupported("a network interface (netDevices)");
        }
        if self.intel_rdt.is_some() {
            return unsupported("a share of caches and memory bandwidth (intelRdt)");
        }
        let bad = |key, value: &str, rule| CdiError::Value {
            device: device.to_owned(),
            key,
            value: value.to_owned(),
            rule,
        };
        let variable = |text: &String| match text.split_once('=') {
            Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
            None => Err(bad("env", text, "is no NAME=VALUE")),
        };
        let node = |node: &CdiNode| {
            let host = node.host_path.as_ref().unwrap_or(&node.path);
            let own = ["/dev/pts", "/dev/shm", "/dev/mqueue"].iter().any(|own| {
                node.path == *own || node.path.strip_prefix(own).is_some_and(|rest| rest.starts_with('/'))
            });
            if !is_plain(&node.path) || !node.path.starts_with("/dev/") || own {
                return Err(bad("path of a device node", &node.path, "is no place for it below /dev"));
            }
            if !is_plain(host) {
                return Err(bad("hostPath", host, "is no absolute path"));
            }
            let is_block = match node.kind.as_deref() {
                None | Some("") => None,
                Some("c" | "u") => Some(false),
                Some("b") => Some(true),
                Some(other) => return Err(bad("type", other, "is neither c nor b")),
            };
            // The mount of a node cannot be less than the node.
            if let Some(permissions) = node.permissions.as_deref().filter(|text| !text.is_empty())
                && !(permissions.contains('r') && permissions.contains('w'))
            {
                return Err(bad(
                    "permissions",
                    permissions,
                    "cannot be enforced; only rw and rwm can be had",
                ));
            }
            let number = node.major.zip(node.minor).filter(|number| *number != (0, 0));
            Ok(Node { host: host.clone(), inside: node.path.clone(), is_block, number })
        };
        let mount = |mount: &CdiMount| {
            if !matches!(mount.kind.as_deref(), None | Some("" | "bind" | "none")) {
                return Err(bad("type of a mount", mount.kind.as_deref().unwrap_or_default(), "is no bind"));
            }
            for path in [&mount.host_path, &mount.container_path] {
                if !is_plain(path) {
                    return Err(bad("path of a mount", path, "is not absolute"));
                }
            }
            let inside = &mount.container_path;
            if ["/proc", "/sys", "/dev"].iter().any(|own| {
                inside == own || inside.strip_prefix(own).is_some_and(|rest| rest.starts_with('/'))
            }) {
                return Err(bad("containerPath", inside, "is the sandbox's own"));
            }
            let has = |option: &str| mount.options.iter().any(|have| have == option);
            Ok(DeviceMount {
                host: mount.host_path.clone(),
                inside: inside.clone(),
                read_only: has("ro"),
                no_exec: has("noexec"),
            })
        };
        Ok(Parts {
            variables: self.env.iter().map(variable).collect::<Result<_, _>>()?,
            nodes: self.device_nodes.iter().map(node).collect::<Result<_, _>>()?,
            mounts: self.mounts.iter().map(mount).collect::<Result<_, _>>()?,
            // The specification says of 0 that it is to be ignored.
            groups: self.groups.iter().copied().filter(|group| *group != 0).collect(),
        })
    }
}

/// How a specification is written; the name of its file tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Notation {
    Json,
    Yaml,
}

fn read<T: serde::de::DeserializeOwned>(text: &str, notation: Notation) -> Result<T, CdiError> {
    match notation {
        Notation::Json => serde_json::from_str(text).map_err(|error| CdiError::Syntax(error.to_string())),
        Notation::Yaml => serde_saphyr::from_str(text).map_err(|error| {
            // The first line says what and where; the rest draws it.
            let text = error.to_string();
            CdiError::Syntax(text.lines().next().unwrap_or_default().to_owned())
        }),
    }
}

fn is_known(version: &str) -> bool {
    let mut numbers = version.split('.').map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(0)), Some(Ok(minor))) => minor >= 3,
        (Some(Ok(major)), Some(Ok(_))) => major == 1,
        _ => false,
    }
}

/// What a specification says of `device`, a qualified name; `None` where it is about others.
pub fn parts(text: &str, notation: Notation, device: &str) -> Result<Option<Parts>, CdiError> {
    let head: Head = read(text, notation)?;
    let Some((kind, name)) = device.split_once('=').filter(|(kind, _)| *kind == head.kind) else {
        return Ok(None);
    };
    let spec: Spec = read(text, notation)?;
    if !is_known(&spec.cdi_version) {
        return Err(CdiError::Version(spec.cdi_version));
    }
    let mut names = HashSet::new();
    if let Some(twice) = spec.devices.iter().find(|device| !names.insert(&device.name)) {
        return Err(CdiError::Twice { device: format!("{kind}={}", twice.name) });
    }
    let Some(found) = spec.devices.iter().find(|device| device.name == name) else { return Ok(None) };
    let mut all = spec.container_edits.parts(device)?;
    all.add(found.container_edits.parts(device)?);
    Ok(Some(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `nvidia-ctk cdi generate` writes it, without hooks.
    const YAML: &str = r#"
cdiVersion: 0.5.0
kind: nvidia.com/gpu
containerEdits:
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  deviceNodes:
  - path: /dev/nvidiactl
  mounts:
  - containerPath: /usr/lib/libcuda.so.1
    hostPath: /usr/lib/libcuda.so.1
    options: [ro, nosuid, nodev, rbind, rprivate]
devices:
- name: "0"
  containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
      hostPath: /dev/nvidia0
      type: c
      major: 195
      minor: 0
      fileMode: 438
      permissions: rwm
- name: all
  containerEdits:
    additionalGids: [0, 44]
    deviceNodes:
    - path: /dev/nvidia0
    - path: /dev/nvidiactl
"#;

    fn of(text: &str, device: &str) -> Result<Option<Parts>, CdiError> {
        parts(text, Notation::Yaml, device)
    }

    #[test]
    fn a_device_is_its_own_parts_and_the_common_ones() {
        let all = of(YAML, "nvidia.com/gpu=all").expect("good").expect("there");
        let hosts: Vec<&str> = all.nodes.iter().map(|node| node.host.as_str()).collect();
        assert_eq!(hosts, ["/dev/nvidiactl", "/dev/nvidia0"]);
        assert_eq!(all.groups, [44]);
        assert_eq!(all.variables, [("NVIDIA_VISIBLE_DEVICES".to_owned(), "void".to_owned())]);
        assert!(all.mounts[0].read_only && !all.mounts[0].no_exec);
        let first = of(YAML, "nvidia.com/gpu=0").expect("good").expect("there");
        assert_eq!((first.nodes[1].number, first.nodes[1].is_block), (Some((195, 0)), Some(false)));
        for other in ["nvidia.com/gpu=1", "nvidia.com/mig=0", "amd.com/gpu=0"] {
            assert_eq!(of(YAML, other), Ok(None), "{other}");
        }
    }

    #[test]
    fn json_says_the_same() {
        let json = r#"{"cdiVersion": "1.0.0", "kind": "a.b/c", "devices": [{"name": "d", "containerEdits": {"deviceNodes": [{"path": "/dev/x"}]}}]}"#;
        assert_eq!(parts(json, Notation::Json, "a.b/c=d"), of(json, "a.b/c=d"));
        assert!(parts(json, Notation::Json, "a.b/c=d").expect("good").is_some());
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let device = "nvidia.com/gpu=all";
        for (from, to, said) in [
            ("- path: /dev/nvidiactl\n  mounts", "- path: /etc/shadow\n  mounts", "no place for it"),
            ("- path: /dev/nvidiactl\n  mounts", "- path: /dev/pts/0\n  mounts", "no place for it"),
            ("- path: /dev/nvidiactl\n  mounts", "- path: /dev/../x\n  mounts", "no place for it"),
            (
                "  mounts:",
                "  hooks:\n  - hookName: createContainer\n    path: /x\n  mounts:",
                "createContainer",
            ),
            ("  mounts:", "  intelRdt: {}\n  mounts:", "intelRdt"),
            ("  mounts:", "  unheardOf: 1\n  mounts:", "unheardOf"),
            ("0.5.0", "2.0.0", "2.0.0"),
            ("- name: \"0\"", "- name: all", "twice"),
            ("containerPath: /usr", "containerPath: /proc", "sandbox's own"),
            ("NVIDIA_VISIBLE_DEVICES=void", "NVIDIA", "NAME=VALUE"),
            ("cdiVersion: 0.5.0", "cdiVersion: [", "cannot be read"),
        ] {
            let error = of(&YAML.replace(from, to), device).expect_err(to).to_string();
            assert!(error.contains(said), "{to}: {error}");
        }
        let error = of(&YAML.replace("rwm", "r"), "nvidia.com/gpu=0").expect_err("refused").to_string();
        assert!(error.contains("cannot be enforced"), "{error}");
    }

    #[test]
    fn names() {
        for good in ["nvidia.com/gpu=all", "a/b=0", "v.w/c_d=e:0-1"] {
            assert!(is_qualified(good), "{good}");
        }
        for bad in ["gpu", "a/b", "a=b", "/b=c", "a/=c", "a/b=", "a/b=*", "a/b=c/d", "-a/b=c", "a/b=../c"] {
            assert!(!is_qualified(bad), "{bad}");
        }
    }
}
