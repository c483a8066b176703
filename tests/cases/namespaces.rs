//! User namespaces inside: none, unless they are granted.

use casemate_tests::{World, text};

fn inside(world: &World, arguments: &[&str]) -> (bool, String) {
    let output = world.exec(arguments);
    (output.status.success(), (text(&output.stdout) + &text(&output.stderr)).trim().to_owned())
}

/// What the grant is for.
const USES: [&str; 3] = [
    "unshare --user --map-root-user sh -c 'test $(id -u) = 0'",
    "unshare --user --map-root-user --mount sh -c 'mount -t tmpfs none /mnt && touch /mnt/x && umount /mnt'",
    "bwrap --unshare-user --unshare-pid --ro-bind / / --tmpfs /tmp true",
];

/// What stays as it was, though one is root of a namespace: what is covered, what is read-only, a /proc without covers.
const HELD: [&str; 6] = [
    "umount /proc/keys",
    "umount /sys/firmware",
    "mount -o remount,bind,rw /proc/sys",
    "mount -o remount,bind,rw /sys",
    "sh -c 'mount -t proc none /mnt'",
    "sh -c 'mount -t sysfs none /mnt'",
];

#[test]
fn nested() {
    let world = World::with_release();
    let packages = "[system]\npackages = [\"bubblewrap\"]\n[runtime]\nnetwork = \"none\"\n";
    let granted = format!("{packages}nested_namespaces = true\n");
    world.write_manifest(&granted);
    let error = world.refused(&["build", "granted", "--manifest", &world.manifest()]);
    assert!(error.contains("nested_namespaces denied"), "{error}");
    let policy = world.config().join("policy.toml");
    std::fs::write(&policy, "[namespaces]\nnested = true\n").expect("policy");
    world.run(&["build", "granted", "--manifest", &world.manifest()]);
    world.write_manifest(packages);
    world.run(&["build", "without", "--manifest", &world.manifest()]);
    for name in ["granted", "without"] {
        world.run(&["start", name]);
    }

    let most = ["--", "cat", "/proc/sys/user/max_user_namespaces"];
    assert_eq!(inside(&world, &[&["without"], &most[..]].concat()).1, "0");
    assert_ne!(inside(&world, &[&["granted"], &most[..]].concat()).1, "0");
    for root in [&[][..], &["--root"]] {
        for script in USES {
            let run = |name: &str| inside(&world, &[root, &[name, "--", "sh", "-c", script]].concat());
            let (done, said) = run("granted");
            assert!(done, "{root:?} {script}: {said}");
            let (done, said) = run("without");
            assert!(!done, "{root:?} {script}: {said}");
        }
        for command in HELD {
            let script = format!("unshare --user --map-root-user --mount --pid --fork {command}");
            let (done, said) = inside(&world, &[root, &["granted", "--", "sh", "-c", &script]].concat());
            assert!(!done, "{root:?} {command}");
            assert!(!said.contains("unshare failed"), "{root:?} {command}: {said}");
        }
    }
    let shown = world.run(&["show", "granted"]);
    assert!(shown.contains("nested    user namespaces may be made inside"), "{shown}");

    world.run(&["stop", "granted"]);
    std::fs::write(&policy, "").expect("policy");
    let error = world.refused(&["exec", "granted", "--", "true"]);
    assert!(error.contains("nested_namespaces denied"), "{error}");
}
