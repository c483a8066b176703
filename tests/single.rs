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

    the_daemon_refuses_a_store_with_ranges(&mut world);
    assert_eq!(text(&world.exec(&["demo", "--", "echo", "still"]).stdout), "still\n");
    world.run(&["destroy", "demo"]);
    world.run(&["release", "remove", "debian/bookworm"]);
    assert_eq!(world.in_store("layers"), Vec::<String>::new());
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
