//! Devices: by name alone, those that were judged, and no more.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use casemate_tests::{World, binaries, text};
use casemate_worker::ids::IdMode;
use casemate_worker::spawn::{Spawner, StartError};
use serde_json::json;

const SPECIFICATION: &str = r#"
cdiVersion: 0.6.0
kind: test.example/device
containerEdits:
  env: [TEST_DEVICE=granted]
devices:
- name: both
  containerEdits:
    deviceNodes:
    - path: /dev/fuse
    - path: /dev/renamed/tun
      hostPath: /dev/net/tun
      type: c
      major: 10
      minor: 200
    mounts:
    - {hostPath: /usr/share/common-licenses, containerPath: /opt/licences, options: [ro]}
- name: hooked
  containerEdits:
    hooks:
    - {hookName: createContainer, path: /bin/true}
- name: gone
  containerEdits:
    deviceNodes: [{path: /dev/no-such-device}]
- name: another
  containerEdits:
    deviceNodes: [{path: /dev/fuse, type: c, major: 10, minor: 200}]
- name: file
  containerEdits:
    deviceNodes: [{path: /dev/file, hostPath: /etc/hostname}]
- name: secret
  containerEdits:
    mounts: [{hostPath: HOME, containerPath: /opt/home}]
- name: loader
  containerEdits:
    env: [LD_PRELOAD=/x]
- name: group
  containerEdits:
    deviceNodes: [{path: /dev/casemate-group}]
"#;

fn policy(world: &World, text: &str) {
    fs::write(world.config().join("policy.toml"), text).expect("policy");
}

fn specify(world: &World) {
    let directory = world.config().join("cdi");
    fs::create_dir_all(&directory).expect("directory");
    let home = std::env::var("HOME").expect("HOME");
    fs::write(directory.join("test.yaml"), SPECIFICATION.replace("HOME", &home)).expect("specification");
    // Another vendor's, which does not keep ours from anybody.
    fs::write(directory.join("broken.yaml"), "cdiVersion: [").expect("specification");
}

fn build(world: &World, hardware: &str) {
    world.write_manifest(&format!("[hardware]\n{hardware}\n[runtime]\nnetwork = \"none\"\n"));
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
}

fn inside(world: &World, root: bool, script: &str) -> String {
    let mut arguments = vec!["demo", "--", "sh", "-c", script];
    if root {
        arguments.insert(0, "--root");
    }
    let output = world.exec(&arguments);
    assert!(output.status.success(), "{script}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn devices() {
    let world = World::with_release();
    specify(&world);
    denied_without_policy(&world);
    by_specification(&world);
    what_is_not_there_is_named(&world);
    groups(&world);
}

fn denied_without_policy(world: &World) {
    for (hardware, name) in [
        ("gpu = true", "gpu"),
        ("audio = true", "audio"),
        ("input = true", "input"),
        ("kvm = true", "kvm"),
        ("devices = [\"test.example/device=both\"]", "test.example/device=both"),
    ] {
        world.write_manifest(&format!("[hardware]\n{hardware}\n"));
        let error = world.refused(&["build", "demo", "--manifest", &world.manifest()]);
        assert!(error.contains(&format!("device {name:?} denied")), "{error}");
    }
}

fn by_specification(world: &World) {
    build(world, "");
    assert_eq!(
        inside(
            world,
            false,
            "for path in /dev/fuse /dev/net /dev/renamed; do [ ! -e $path ] || echo $path; done"
        ),
        ""
    );
    assert_eq!(inside(world, false, "echo $TEST_DEVICE").trim(), "");

    policy(world, "[devices]\nallowed = [\"test.example/device=*\"]\n");
    build(world, "devices = [\"test.example/device=both\"]");
    let nodes = inside(world, false, "stat -c '%F %t:%T' /dev/fuse /dev/renamed/tun");
    assert_eq!(nodes, "character special file a:e5\ncharacter special file a:c8\n");
    // Open for real: a mount without devices would refuse.
    inside(world, false, "exec 3<>/dev/fuse 4<>/dev/renamed/tun");
    assert_eq!(inside(world, false, "echo $TEST_DEVICE").trim(), "granted");
    assert_eq!(inside(world, true, "echo $TEST_DEVICE").trim(), "");
    inside(world, false, "test -s /opt/licences/GPL-3 && ! touch /opt/licences/x 2>/dev/null");
    // All that honours a device is the sandbox's own six, its terminals, /dev itself, and what was granted.
    let script = "while read -r _ _ _ _ place options _; do case ,$options, in *,nodev,*) ;; *) echo $place ;; esac; \
                  done < /proc/self/mountinfo";
    let mut honoured: Vec<String> = inside(world, false, script).lines().map(str::to_owned).collect();
    honoured.retain(|place| !place.starts_with("/proc/") && !place.starts_with("/sys/"));
    honoured.sort();
    assert_eq!(
        honoured,
        [
            "/dev",
            "/dev/full",
            "/dev/fuse",
            "/dev/null",
            "/dev/pts",
            "/dev/random",
            "/dev/renamed/tun",
            "/dev/tty",
            "/dev/urandom",
            "/dev/zero"
        ]
    );
    assert!(world.run(&["show", "demo"]).contains("device    test.example/device=both"));

    // Policy is asked at each start.
    policy(world, "[devices]\nallowed = [\"kvm\"]\n");
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("device \"test.example/device=both\" denied"), "{error}");
}

fn what_is_not_there_is_named(world: &World) {
    policy(
        world,
        "[devices]\nallowed = [\"test.example/device=*\", \"no.such/thing=all\", \"gpu\", \"audio\", \"input\", \"kvm\"]\n",
    );
    // What cannot be read may have been about it.
    build(world, "devices = [\"no.such/thing=all\"]");
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("broken.yaml: it cannot be read"), "{error}");
    fs::remove_file(world.config().join("cdi/broken.yaml")).expect("removed");
    for (name, said) in [
        ("test.example/device=hooked", "createContainer"),
        ("test.example/device=gone", "/dev/no-such-device is not there"),
        ("test.example/device=another", "10:229, not what its specification says"),
        ("test.example/device=file", "/etc/hostname is no device"),
        ("test.example/device=secret", "kept out"),
        ("test.example/device=loader", "LD_PRELOAD denied"),
        ("test.example/device=none", "no device \"test.example/device=none\""),
        ("no.such/thing=all", "no device \"no.such/thing=all\""),
    ] {
        build(world, &format!("devices = [{name:?}]"));
        let error = world.refused(&["exec", "demo", "--", "true"]);
        assert!(error.contains(said), "{name}: {error}");
    }
    for (name, path) in
        [("gpu", "/dev/dri"), ("audio", "/dev/snd"), ("input", "/dev/input"), ("kvm", "/dev/kvm")]
    {
        build(world, &format!("{name} = true"));
        if Path::new(path).exists() {
            // It is granted, or not this user's.
            let output = world.exec(&["demo", "--", "ls", path]);
            assert!(
                output.status.success() || text(&output.stderr).contains("open"),
                "{}",
                text(&output.stderr)
            );
        } else {
            let error = world.refused(&["exec", "demo", "--", "true"]);
            assert!(
                error.contains(&format!("device {name:?} is granted, but {path} is not there")),
                "{error}"
            );
        }
    }
}

/// A device that is open to a group of the user's alone.
fn groups(world: &World) {
    let device = fs::metadata("/dev/casemate-group").expect("made by scripts/group-device");
    let ours = nix::unistd::getgroups().expect("groups");
    assert!(ours.iter().any(|group| group.as_raw() == device.gid()), "not in the group: log in anew");
    let allowed = "[devices]\nallowed = [\"test.example/device=*\"]\n";
    build(world, "devices = [\"test.example/device=group\"]");
    policy(world, allowed);
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("a group of yours alone") && error.contains("keep_groups"), "{error}");
    policy(world, &format!("{allowed}keep_groups = true\n"));
    inside(world, false, "exec 3<>/dev/casemate-group");
    assert!(!inside(world, false, "grep Groups: /proc/self/status").trim_end().ends_with("Groups:"));
    world.write_manifest("[hardware]\ndevices = [\"test.example/device=group\"]\n");
    world.run(&["build", "private", "--manifest", &world.manifest()]);
    let opened = world.exec(&["private", "--", "sh", "-c", "exec 3<>/dev/casemate-group"]);
    assert!(opened.status.success(), "{}", text(&opened.stderr));
    // Root inside is in none, and so are the sessions of environments without devices.
    assert_eq!(inside(world, true, "grep Groups: /proc/self/status").trim(), "Groups:");
    let closed = world.exec(&["--root", "demo", "--", "sh", "-c", "exec 3</dev/casemate-group"]);
    assert!(!closed.status.success());
    build(world, "");
    assert_eq!(inside(world, false, "grep Groups: /proc/self/status").trim(), "Groups:");
}

/// A plan for init, as the daemon would write it, with one device.
fn plan(root: &Path, number: u64) -> Vec<u8> {
    let meta = fs::metadata(root).expect("root");
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let plan = json!({
        "version": 3, "id": "swap", "hostname": "swap",
        "root": {"root": "directory", "source": {"path": root, "inode": {"device": meta.dev(), "inode": meta.ino()}}},
        "ids": {"ids": "range", "user": uid, "group": gid},
        "user": {"name": "u", "uid": uid, "gid": gid, "home": "/home/u", "shell": "/bin/sh"},
        "write_account": false, "network": "none", "mounts": [], "files": [],
        "grants": {"devices": [
            {"name": "fuse", "path": "/dev/fuse", "is_block": false, "number": number, "target": "/dev/fuse", "is_needed": true}
        ], "keep_groups": false, "files": [], "variables": []},
        "deny_unix_sockets": false, "linger": false, "stop_signal": 15, "stop_timeout": 0, "born_in_group": false,
    });
    serde_json::to_vec(&plan).expect("JSON")
}

#[tokio::test]
async fn a_device_that_is_not_the_one_that_was_judged() {
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let ids = IdMode::detect(&std::env::var("USER").unwrap_or_default(), uid, gid);
    let spawner = Spawner { libexec: binaries(), ids, environment: Vec::new() };
    let init = fs::File::open(binaries().join("casemate-init")).expect("casemate-init");
    let fuse = fs::metadata("/dev/fuse").expect("/dev/fuse").rdev();
    let tun = fs::metadata("/dev/net/tun").expect("/dev/net/tun").rdev();
    for (number, accepted) in [(tun, false), (fuse, true)] {
        let directory = tempfile::tempdir().expect("directory");
        let root = directory.path().join("root");
        fs::create_dir(&root).expect("root");
        // Root inside is somebody else outside.
        casemate_tests::set_mode(&root, 0o777);
        for name in ["dev", "proc", "sys", "run"] {
            fs::create_dir(root.join(name)).expect("directory");
        }
        let socket =
            std::os::unix::net::UnixListener::bind(directory.path().join("control")).expect("socket");
        let log = fs::File::create(directory.path().join("log")).expect("log");
        let (init, plan) = (init.try_clone().expect("copy").into(), plan(&root, number));
        let prepared = async |_| Ok::<_, std::io::Error>((plan, std::future::ready(Ok(()))));
        let started: Result<serde_json::Value, _> =
            spawner.start_init(&init, log.into(), vec![socket.into()], prepared).await;
        match started {
            // It ends by itself, unused.
            Ok(_) => assert!(accepted, "another device was mounted"),
            Err(StartError::Worker(error)) => {
                assert!(!accepted && error.to_string().contains("swapped"), "{error}");
            }
            Err(StartError::Prepare(error)) => panic!("{error}"),
        }
    }
}
