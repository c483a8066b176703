//! A user without a range of subordinate ids: `scripts/as-user` runs this binary, alone, as one who has none. Root inside is
//! the user outside; everything else holds.

use std::os::unix::fs::MetadataExt;

use casemate_tests::{World, text};

#[test]
fn one_id_is_enough() {
    let mut world = World::new();
    let doctor = world.run(&["doctor"]);
    let lost = "no range of subordinate ids: root inside is you outside, and files have one owner";
    assert!(doctor.contains(&format!("degraded  ids: {lost}")), "{doctor}");
    assert!(doctor.contains("usermod --add-subuids"), "{doctor}");

    world.run(&["release", "fetch", "debian/bookworm"]);
    // Its maintainer scripts make a user and give files to it.
    world.write_manifest("[system]\npackages = [\"dbus\"]\n[runtime]\nnetwork = \"none\"\n");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    let shown = world.run(&["show", "demo"]);
    assert!(shown.contains("single: root inside is you outside"), "{shown}");

    let run = |arguments: &[&str]| {
        let output = world.exec(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    let uid = nix::unistd::getuid();
    assert_eq!(run(&["demo", "--", "id", "-u"]), uid.to_string());
    assert_eq!(run(&["--root", "demo", "--", "id", "-u"]), "0");
    assert_eq!(run(&["--root", "demo", "--", "dpkg", "--audit"]), "");
    assert!(run(&["demo", "--", "getent", "passwd", "messagebus"]).starts_with("messagebus:"));
    for (name, root) in [("by-user", &["demo"][..]), ("by-root", &["--root", "demo"])] {
        let script = format!("echo written > /workspace/{name} && cat /workspace/{name}");
        assert_eq!(run(&[root, &["--", "sh", "-c", &script]].concat()), "written");
        let made = world.project().join(name).metadata().expect("a file");
        assert_eq!(made.uid(), uid.as_raw(), "{name}");
    }
    // What is kept of the isolation.
    let inside = |script: &str| run(&["--root", "demo", "--", "sh", "-c", script]);
    assert_eq!(inside("mount -t tmpfs none /mnt 2>/dev/null || echo denied"), "denied");
    assert_eq!(inside("unshare -U true 2>/dev/null || echo denied"), "denied");
    assert_eq!(inside("ls /sys/class/net"), "lo");
    assert_eq!(run(&["demo", "--", "grep", "CapEff", "/proc/self/status"]), "CapEff:\t0000000000000000");

    root_by_sudo(&world);
    the_session_bus(&world);
    the_daemon_refuses_a_store_with_ranges(&mut world);
    assert_eq!(text(&world.exec(&["demo", "--", "echo", "still"]).stdout), "still\n");
    world.run(&["destroy", "demo"]);
    world.run(&["release", "remove", "debian/bookworm"]);
    assert_eq!(world.in_store("layers"), Vec::<String>::new());
}

/// Root inside, who is the user outside: what `sudo` gives is what `--root` gives.
fn root_by_sudo(world: &World) {
    world.run(&["build", "sudo", "--manifest", &manifest(world, "sudo = true\n")]);
    let run = |arguments: &[&str]| {
        let output = world.exec(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    };
    assert_eq!(run(&["sudo", "--", "sudo", "id", "-u"]), "0");
    assert_eq!(run(&["sudo", "--", "sh", "-c", "sudo sh -c 'exit 42'; echo $?"]), "42");
    assert_eq!(run(&["sudo", "--", "sudo", "sh", "-c", "dpkg --audit && touch /etc/made && id -un"]), "root");
    let rights = ["grep", "-E", "CapEff|CapBnd|NoNewPrivs|Seccomp:", "/proc/self/status"];
    let by_sudo = run(&[&["sudo", "--", "sudo"], &rights[..]].concat());
    assert_eq!(by_sudo, run(&[&["--root", "sudo", "--"], &rights[..]].concat()));
    // Without the grant it says what to do.
    let refused = world.exec(&["demo", "--", "sudo", "true"]);
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("--root"), "{}", text(&refused.stderr));
    world.run(&["destroy", "sudo"]);
}

/// Bus and proxy take the user for who they are, whatever their number is inside.
fn the_session_bus(world: &World) {
    std::fs::write(world.config().join("policy.toml"), "[session_bus]\ntalk = [\"org.example.A\"]\n")
        .expect("policy");
    let more = "[gui.session_bus]\ntalk = [\"org.example.A\"]\n[system]\npackages = [\"dbus\"]\n";
    world.run(&["build", "desktop", "--manifest", &manifest(world, more)]);
    let names =
        "dbus-send --session --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.ListNames";
    let output = world.exec(&["desktop", "--", "sh", "-c", names]);
    let names = text(&output.stdout);
    assert!(output.status.success() && names.contains("org.freedesktop.DBus"), "{}", text(&output.stderr));
    assert!(!names.contains("org.casemate"), "{names}");
    world.run(&["destroy", "desktop"]);
}

fn manifest(world: &World, more: &str) -> String {
    world.write_manifest(&format!("[runtime]\nnetwork = \"none\"\n{more}"));
    world.manifest()
}

/// As a user who had a range has it after they have lost it.
fn the_daemon_refuses_a_store_with_ranges(world: &mut World) {
    world.kill_daemon();
    let version = world.store().join("version");
    let single = std::fs::read_to_string(&version).expect("version");
    let other = format!("{}-other", world.store().display());
    std::fs::create_dir(&other).expect("another store");
    // As the daemon of a user with a range writes it.
    let ranges = "checksum = \"8af65f086643d9576c43d39a8eb44d3e8163d983210be8d5af70bde2ef732d4c\"\nformat = 1\nids = \"range\"\n";
    std::fs::write(format!("{other}/version"), ranges).expect("version");
    let refused = world.daemon_command().args(["--store", &other]).output().expect("casemated");
    assert_eq!(refused.status.code(), Some(1));
    let error = text(&refused.stderr);
    assert!(error.contains(&format!("{other} was made with a range of subordinate ids")), "{error}");
    assert_eq!(std::fs::read_to_string(&version).expect("version"), single);
    world.start_daemon();
}
