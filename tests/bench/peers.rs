//! What Casemate is measured against.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use casemate_tests::World;

/// The layer of the release: a plain directory, the same root for all.
pub fn root(world: &World) -> PathBuf {
    let release: serde_json::Value =
        serde_json::from_str(&world.run(&["release", "show", "debian/bookworm", "--json"])).expect("JSON");
    let digest = release["digest"].as_str().expect("digest");
    world.store().join("layers").join(digest).join("tree")
}

/// A bare sandbox: all namespaces, the root read-only, /proc and /dev; no filter, no capabilities to drop, one id.
pub fn bubblewrap(world: &World, root: &Path, program: &[&str]) -> Command {
    let mut command = world.command("bwrap");
    command.args(["--unshare-all", "--ro-bind"]).arg(root).args(["/", "--proc", "/proc", "--dev", "/dev"]);
    command.args(program);
    command
}

/// podman, without control groups, which only systemd could give it. What it keeps is gone with this, and so is the process that
/// it leaves to hold its namespaces.
pub struct Podman<'a> {
    world: &'a World,
    /// It takes no path of more than 50 characters.
    kept: tempfile::TempDir,
}

impl<'a> Podman<'a> {
    pub fn new(world: &'a World) -> Self {
        Self { world, kept: tempfile::tempdir().expect("directory") }
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.world.command("podman");
        let kept = self.kept.path();
        command.arg("--root").arg(kept.join("root")).arg("--runroot").arg(kept.join("run"));
        command.args(["--log-level", "error", "--cgroup-manager", "cgroupfs", "--runtime", "crun"]);
        command.args(arguments);
        command
    }

    /// A container of this root, with podman's own profile and capabilities: made, or `run`.
    pub fn container(&self, verb: &[&str], root: &Path, program: &[&str]) -> Command {
        let mut command = self.command(verb);
        command.args(["--network", "none", "--cgroups", "disabled", "--read-only", "--rootfs"]).arg(root);
        command.args(program);
        command
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        // Without it there is a process left over, and no more.
        let _ = self.command(&["system", "migrate"]).output();
    }
}

fn start_of_range(path: &str) -> u32 {
    let text = std::fs::read_to_string(path).expect("ranges");
    let user = std::env::var("USER").expect("USER");
    let line = text.lines().find(|line| line.starts_with(&format!("{user}:"))).expect("a range");
    line.split(':').nth(1).expect("start").parse().expect("number")
}

/// crun on a bundle as `crun spec --rootless` makes it: the root read-only and without an overlay, namespaces, /dev, masked
/// paths and capabilities much like ours, no seccomp filter, no cgroup. With `range` it has the id map that podman gives
/// it, as many ids as we map; without, the user's id alone.
pub fn crun(world: &World, root: &Path, range: bool) -> Command {
    let bundle = world.project().join(if range { "crun-range" } else { "crun-single" });
    std::fs::create_dir(&bundle).expect("bundle");
    let spec = world.command("crun").args(["spec", "--rootless"]).current_dir(&bundle).status();
    assert!(spec.expect("crun").success());
    let path = bundle.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).expect("config")).expect("JSON");
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!(["true"]);
    config["root"]["path"] = root.to_str().expect("UTF-8").into();
    if range {
        let own = std::fs::metadata(&bundle).expect("bundle");
        for (kind, own, file) in
            [("uidMappings", own.uid(), "/etc/subuid"), ("gidMappings", own.gid(), "/etc/subgid")]
        {
            config["linux"][kind] = serde_json::json!([
                { "containerID": 0, "hostID": own, "size": 1 },
                { "containerID": 1, "hostID": start_of_range(file), "size": 65536 },
            ]);
        }
    }
    // Needs a cgroup, which is not made.
    config["mounts"].as_array_mut().expect("mounts").retain(|mount| mount["type"] != "cgroup");
    std::fs::write(&path, config.to_string()).expect("config");
    let mut command = world.command("crun");
    command.arg("--cgroup-manager=disabled").arg("run").arg("--bundle").arg(&bundle).arg("bench");
    command
}
