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
pub fn bubblewrap(world: &World, root: &Path) -> Command {
    let mut command = world.command("bwrap");
    command
        .args(["--unshare-all", "--ro-bind"])
        .arg(root)
        .args(["/", "--proc", "/proc", "--dev", "/dev", "true"]);
    command
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
