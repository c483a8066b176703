//! Manifests, policy, and the life of an environment.

use casemate_tests::World;

#[test]
fn life_and_refusals() {
    let world = World::with_environment("[system]\npackages = [\"jq\"]\n");
    let lock = std::fs::read_to_string(world.project().join("casemate.lock")).expect("a lock");
    assert!(
        lock.contains("name = \"jq\"") && lock.contains("sha256 = ") && lock.contains("url = "),
        "{lock}"
    );
    assert!(world.exec(&["demo", "--", "jq", "--version"]).status.success());

    // Unchanged: nothing is done. With the lock, offline: the same bytes.
    assert!(world.run(&["build", "demo", "--manifest", &world.manifest()]).contains("up to date"));
    world.run(&["build", "again", "--locked", "--offline", "--manifest", &world.manifest()]);
    assert_eq!(std::fs::read_to_string(world.project().join("casemate.lock")).expect("a lock"), lock);

    world.run(&["start", "demo"]);
    assert!(world.run(&["list"]).contains("running"));
    assert!(world.refused(&["destroy", "demo"]).contains("is running"));
    let layers = world.in_store("layers");
    refusals(&world);
    assert_eq!(world.in_store("layers"), layers, "a failed build left a layer");
    assert!(world.in_store("staging").is_empty());
    world.run(&["stop", "demo"]);
    assert!(!world.run(&["list"]).contains("running"));

    assert!(world.exec(&["demo", "--", "sh", "-c", "echo kept > ~/file"]).status.success());
    assert!(world.exec(&["demo", "--", "grep", "kept", "file"]).status.success());
    world.run(&["destroy", "demo"]);
    world.run(&["destroy", "again"]);
    assert!(world.refused(&["destroy", ""]).contains("no environment"));
    assert_eq!(world.in_store("environments"), Vec::<String>::new());
    assert_eq!(world.in_store("uppers"), Vec::<String>::new());
}

fn refusals(world: &World) {
    let build = |manifest: &str, expected: &str| {
        let path = world.project().join("bad.toml");
        std::fs::write(
            &path,
            format!("manifest_version = 1\n[base]\nrelease = \"debian/bookworm\"\n{manifest}"),
        )
        .expect("manifest");
        let error = world.refused(&["build", "bad", "--manifest", &path.display().to_string()]);
        assert!(error.contains(expected), "{manifest}: {error}");
    };
    build("[sytem]\n", "line 4, column 2: unknown field `sytem`");
    build("[mounts]\na = \"/etc:/mnt\"\n", "denied");
    let keys = std::path::PathBuf::from(std::env::var_os("HOME").expect("HOME")).join(".ssh");
    std::fs::create_dir_all(&keys).expect("a directory");
    build("[mounts]\na = \"~/.ssh:/mnt\"\n", "kept out");
    build("[mounts]\na = \"../../../../../../etc:/mnt\"\n", "denied");
    build("[environment]\nSSH_AUTH_SOCK = \"/x\"\n", "SSH_AUTH_SOCK denied");
    build("[runtime.resource_limits]\nmemory_limit_mb = 99999999\n", "above the");
    build("[runtime.resource_limits]\nmemory_limit_mb = 1\n", "no memory for an environment");
    build("[hardware]\ngpu = true\n", "device \"gpu\" denied");
    build("[system]\npackages = [\"no-such-package-anywhere\"]\n", "installing packages failed");
}

#[test]
fn a_purge_leaves_nothing() {
    let world = World::with_environment("");
    assert!(world.exec(&["demo", "--", "sh", "-c", "echo kept > ~/file"]).status.success());
    world.run(&["commit", "demo"]);
    world.run(&["start", "demo"]);
    assert!(world.refused(&["purge"]).contains("--yes"));
    world.run(&["purge", "--yes"]);
    for directory in ["objects", "layers", "releases", "environments", "snapshots", "uppers", "staging"] {
        assert_eq!(world.in_store(directory), Vec::<String>::new(), "{directory}");
    }
    assert_eq!(world.run(&["list"]).lines().count(), 1);
    assert_eq!(world.run(&["release", "list"]).lines().count(), 1);
}
