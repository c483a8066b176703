//! Devices that an environment is granted by name: found and judged anew at each start, since policy, drivers and
//! specifications may have changed. Init opens each node again and mounts what it opened, if it is what was judged here.

use std::path::{Path, PathBuf};

use casemate_manifest::MountQuestion;
use casemate_manifest::cdi::{self, CdiError, DeviceMount, Node, Notation, Parts};
use casemate_sandbox::plan::{Device, Grants, Mount};
use rustix::fs::{Access, AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::error::Error;
use crate::mounts::{self, Judge};
use crate::{Inner, configuration};

/// Specifications of the machine's devices; those of later directories count over those of earlier ones. The user's own
/// directory comes last.
const SPECIFICATIONS: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];

const REMOVE: &str = "remove it from [hardware], or bring the device back";
const NO_ACCESS: &str = "become a member of its group (log in anew), or let udev give you access";

/// Devices that the kernel names alike everywhere.
fn class(name: &str) -> Option<&'static str> {
    match name {
        "gpu" => Some("/dev/dri"),
        "audio" => Some("/dev/snd"),
        "input" => Some("/dev/input"),
        "kvm" => Some("/dev/kvm"),
        _ => None,
    }
}

/// Whether we, in all our groups, can open it.
fn is_ours(path: &Path) -> bool {
    rustix::fs::accessat(CWD, path, Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS).is_ok()
}

/// Describe a device node to init; `None` for what is none.
fn describe(name: &str, host: &Path, target: &str) -> Result<Option<Device>, Error> {
    let missing = |errno: Errno| Error::Device {
        device: name.to_owned(),
        path: host.to_owned(),
        what: match errno {
            Errno::NOENT => "is not there".to_owned(),
            errno => format!("cannot be opened: {errno}"),
        },
        remedy: REMOVE,
    };
    let path =
        host.canonicalize().map_err(|error| missing(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&path, flags, Mode::empty()).map_err(missing)?;
    let stat = rustix::fs::fstat(&opened).map_err(Error::sys("look at", &path))?;
    let is_block = match FileType::from_raw_mode(stat.st_mode) {
        FileType::CharacterDevice => false,
        FileType::BlockDevice => true,
        _ => return Ok(None),
    };
    let path = path
        .into_os_string()
        .into_string()
        .map_err(|path| Error::NotUtf8 { what: "a device", path: path.into() })?;
    let (name, target) = (name.to_owned(), target.to_owned());
    Ok(Some(Device { name, path, is_block, number: stat.st_rdev, target, is_needed: true }))
}

/// One that must be there, and be open to the user.
fn node(name: &str, node: &Node) -> Result<Device, Error> {
    let path = PathBuf::from(&node.host);
    let wrong =
        |what: String, remedy| Error::Device { device: name.to_owned(), path: path.clone(), what, remedy };
    let device = describe(name, &path, &node.inside)?
        .ok_or_else(|| wrong("is no device".to_owned(), "correct its specification"))?;
    let (major, minor) = (rustix::fs::major(device.number), rustix::fs::minor(device.number));
    if node.is_block.is_some_and(|is_block| is_block != device.is_block)
        || node.number.is_some_and(|number| number != (major, minor))
    {
        let kind = if device.is_block { "block" } else { "character" };
        let what = format!("is the {kind} device {major}:{minor}, not what its specification says");
        return Err(wrong(what, "generate the specification anew"));
    }
    if !is_ours(&path) {
        return Err(wrong("is not open to you".to_owned(), NO_ACCESS));
    }
    Ok(device)
}

/// All nodes of a directory that are open to the user.
fn nodes(name: &str, directory: &Path) -> Result<Vec<Device>, Error> {
    let wrong = |what: String, remedy| Error::Device {
        device: name.to_owned(),
        path: directory.to_owned(),
        what,
        remedy,
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(wrong("is not there".to_owned(), REMOVE));
        }
        Err(error) => return Err(Error::io("list", directory)(error)),
    };
    let mut found = Vec::new();
    let mut closed = 0;
    for entry in entries {
        let path = entry.map_err(Error::io("list", directory))?.path();
        let Some(target) = path.to_str() else { continue };
        let Some(device) = describe(name, &path, target)? else { continue };
        if is_ours(&path) {
            found.push(device);
        } else {
            closed += 1;
        }
    }
    match (found.is_empty(), closed) {
        (true, 0) => Err(wrong("has no devices".to_owned(), REMOVE)),
        (true, _) => Err(wrong("has no device that is open to you".to_owned(), NO_ACCESS)),
        (false, _) => Ok(found),
    }
}

fn mount(judge: &Judge<'_>, mount: &DeviceMount) -> Result<Mount, Error> {
    let path = Path::new(&mount.host).canonicalize().map_err(Error::io("resolve", &mount.host))?;
    // Specifications are not a manifest's, so they may name any place but those that are kept out.
    judge.rules.judge(&MountQuestion {
        source: &mount.host,
        resolved: &path,
        is_beneath_manifest_directory: true,
    })?;
    Ok(Mount {
        source: mounts::own_source(&path)?,
        target: mount.inside.clone(),
        read_only: mount.read_only,
        no_exec: mount.no_exec,
    })
}

impl Inner {
    fn specification(&self, device: &str) -> Result<Parts, Error> {
        let own = self.settings.configuration.first().map(|own| own.join("cdi"));
        let (mut found, mut unreadable) = (None, None);
        for directory in SPECIFICATIONS.map(PathBuf::from).into_iter().chain(own) {
            let entries = match std::fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("list", directory)(error)),
            };
            let mut here = None;
            for entry in entries {
                let path = entry.map_err(Error::io("list", &directory))?.path();
                let notation = match path.extension().and_then(|extension| extension.to_str()) {
                    Some("json") => Notation::Json,
                    Some("yaml" | "yml") => Notation::Yaml,
                    _ => continue,
                };
                let Some(text) = configuration::read(&path)? else { continue };
                let parts = match cdi::parts(&text, notation, device) {
                    // It may be about other devices; if it is about this one, nobody else is.
                    Err(source @ (CdiError::Syntax(_) | CdiError::Version(_))) => {
                        tracing::warn!(path = %path.display(), error = %source, "passed over");
                        unreadable = Some(Error::Cdi { path, source });
                        continue;
                    }
                    parts => parts.map_err(|source| Error::Cdi { path: path.clone(), source })?,
                };
                if parts.is_some() && here.is_some() {
                    let source = CdiError::Twice { device: device.to_owned() };
                    return Err(Error::Cdi { path: directory, source });
                }
                here = here.or(parts);
            }
            found = here.or(found);
        }
        let missing = || Error::NotFound {
            what: "device",
            name: device.to_owned(),
            remedy: "no specification in /etc/cdi, /var/run/cdi or ~/.config/casemate/cdi has it: make one (as with \
                     `nvidia-ctk cdi generate`), or remove it from [hardware]",
        };
        found.ok_or_else(|| unreadable.unwrap_or_else(missing))
    }

    /// What init is to grant, and to mount for it.
    pub(crate) fn plan_devices(
        &self,
        judge: &Judge<'_>,
        names: &[String],
    ) -> Result<(Grants, Vec<Mount>), Error> {
        let (mut grants, mut mounts) = (Grants::default(), Vec::new());
        let mut parts = Parts::default();
        grants.keep_groups = !names.is_empty() && judge.policy.keep_groups();
        for name in names {
            judge.policy.judge_device(name)?;
            match class(name) {
                Some(path) if name == "kvm" => {
                    let (host, inside) = (path.to_owned(), path.to_owned());
                    let kvm = Node { host, inside, is_block: Some(false), number: None };
                    grants.devices.push(node(name, &kvm)?);
                }
                Some(directory) if name == "audio" => {
                    let served = self.plan_sound(&mut grants, &mut mounts)?;
                    match nodes(name, Path::new(directory)) {
                        Ok(found) => {
                            let found = found.into_iter();
                            grants.devices.extend(found.map(|one| Device { is_needed: !served, ..one }));
                        }
                        // A sound server is enough.
                        Err(Error::Device { .. }) if served => {}
                        Err(error) => return Err(error),
                    }
                }
                Some(directory) => grants.devices.extend(nodes(name, Path::new(directory))?),
                None => {
                    let mut of_it = self.specification(name)?;
                    for group in &of_it.groups {
                        self.check_membership(name, *group, grants.keep_groups)?;
                    }
                    // Two devices may share nodes.
                    of_it.nodes.retain(|node| !parts.nodes.contains(node));
                    for one in &of_it.nodes {
                        grants.devices.push(node(name, one)?);
                    }
                    parts.add(of_it);
                }
            }
        }
        judge.policy.judge_variables(&parts.variables.iter().cloned().collect())?;
        grants.variables.extend(parts.variables.iter().map(|(name, value)| format!("{name}={value}")));
        for one in &parts.mounts {
            mounts.push(mount(judge, one)?);
        }
        Ok((grants, mounts))
    }

    fn check_membership(&self, device: &str, group: u32, kept: bool) -> Result<(), Error> {
        let ours = rustix::process::getgroups().map_err(Error::sys("list", "our groups"))?;
        let member = ours.iter().any(|have| have.as_raw() == group);
        if group == self.gid || (kept && member) {
            return Ok(());
        }
        Err(Error::Device {
            device: device.to_owned(),
            path: format!("group {group}").into(),
            what: "is not one that sessions are in".to_owned(),
            remedy: match member {
                true => "set keep_groups in policy.toml, [devices]",
                false => "become a member of it (log in anew), and set keep_groups in policy.toml, [devices]",
            },
        })
    }
}
