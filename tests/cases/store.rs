//! The store as a whole: what it takes, what is collected, what verification finds.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use casemate_tests::{World, text};
use serde_json::Value;

use super::snapshots::{inside, stored};

const NETWORK: &str = "[runtime]\nnetwork = \"none\"\n";

fn told(world: &World, arguments: &[&str]) -> Value {
    serde_json::from_str(&world.run(arguments)).expect("JSON")
}

/// What du(1) says of a directory, by root of a namespace that all ids of the store are mapped in.
fn du(world: &World, directory: &Path) -> u64 {
    let mut command = world.command("unshare");
    command.args(["--user", "--map-root-user", "--map-auto", "du", "-s", "--block-size=1"]).arg(directory);
    let output = command.output().expect("unshare");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let told = text(&output.stdout);
    told.split_whitespace().next().and_then(|bytes| bytes.parse().ok()).expect("bytes")
}

fn account<'a>(accounts: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let found = accounts.iter().find(|one| one["kind"] == kind && one["name"] == name);
    found.unwrap_or_else(|| panic!("no {kind} {name:?} in {accounts:?}"))
}

fn objects(world: &World) -> Vec<PathBuf> {
    let directories = world.in_store("objects");
    let all = directories.iter().flat_map(|directory| {
        let directory = format!("objects/{directory}");
        let names = world.in_store(&directory);
        let path = world.store().join(directory);
        names.into_iter().map(move |name| path.join(name)).collect::<Vec<_>>()
    });
    all.collect()
}

#[test]
fn usage_adds_up_and_collection_frees_what_it_says() {
    let mut world = World::with_environment(NETWORK);
    inside(&world, false, "demo", "head -c 8000000 /dev/urandom > ~/big; echo small > ~/small");
    world.run(&["commit", "demo", "--name", "big"]);
    inside(&world, false, "demo", "rm ~/big");
    world.run(&["clone", "demo", "twin"]);
    stored(&world);

    let usage = told(&world, &["usage", "--json"]);
    let accounts = usage.as_array().expect("accounts");
    let bytes = |one: &Value| one["exclusive_bytes"].as_u64().expect("a number");
    let sum: u64 = accounts.iter().map(bytes).sum();
    let cache = world.config().ancestors().nth(2).expect("a root").join("cache/casemate/sha256");
    let files: u64 = cache
        .read_dir()
        .expect("it")
        .map(|entry| entry.expect("entry").metadata().expect("it").blocks() * 512)
        .sum();
    assert_eq!(sum, du(&world, &world.store()) + files, "{accounts:?}");
    // The twin, the snapshot and the first all have the big file's layer.
    assert!(account(accounts, "snapshot", "demo big")["shared_bytes"].as_u64() > Some(8_000_000));
    assert!(bytes(account(accounts, "release", "debian/bookworm")) < 8_000_000, "environments share it");
    let own = told(&world, &["usage", "demo", "--json"]);
    assert_eq!(own.as_array().expect("accounts").len(), 2, "{own}");

    // Nobody names it any more: that is told, and then it is so.
    world.run(&["destroy", "twin"]);
    world.run(&["restore", "demo", "big", "--discard"]);
    inside(&world, false, "demo", "rm ~/big; echo other > ~/small");
    world.run(&["commit", "demo", "--name", "small"]);
    world.run(&["destroy", "demo"]);
    stored(&world);
    let usage = told(&world, &["usage", "--json"]);
    let reclaimable = bytes(account(usage.as_array().expect("accounts"), "reclaimable", ""));
    assert!(reclaimable > 8_000_000, "{usage}");
    let before = objects(&world).len();
    let dry = told(&world, &["gc", "--dry-run", "--json"]);
    assert_eq!(objects(&world).len(), before, "a dry run removes nothing");
    assert_eq!(dry["freed"].as_str().and_then(|bytes| bytes.parse().ok()), Some(reclaimable), "{dry}");
    world.write_manifest(&format!("{NETWORK}[system]\npackages = [\"jq\"]\n"));
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    world.run(&["start", "demo"]);
    let done = told(&world, &["gc", "--json"]);
    assert!(done["freed"].as_str().and_then(|bytes| bytes.parse::<u64>().ok()) > Some(8_000_000), "{done}");
    let number = |key: &str| done[key].as_str().and_then(|text| text.parse::<u64>().ok()).expect("a number");
    assert_eq!(number("before") - number("freed"), number("after"));
    assert!(objects(&world).iter().all(|path| path.metadata().expect("an object").nlink() > 1));
    assert_eq!(told(&world, &["gc", "--json"])["objects"], "0");
    // What runs, runs on; what was there before is there.
    inside(&world, false, "demo", "cat /etc/os-release > /dev/null");
    assert!(world.run(&["verify"]).contains("all as it was written"));
    a_kept_object_is_explained(&world);
    downloads_by_age(&world, &cache);

    // What a record that cannot be read names, nobody knows.
    world.run(&["commit", "demo"]);
    stored(&world);
    world.kill_daemon();
    let name = world.in_store("snapshots").pop().expect("a snapshot");
    let record = world.store().join("snapshots").join(&name);
    std::fs::write(&record, "checksum = \"odd\"\n").expect("a record");
    world.start_daemon();
    let refused = world.refused(&["gc"]);
    assert!(
        refused.contains("nothing is collected") && refused.contains(name.trim_end_matches(".toml")),
        "{refused}"
    );
    let verified = world.casemate(&["verify"]).output().expect("casemate");
    assert_eq!(verified.status.code(), Some(1));
    assert!(text(&verified.stdout).contains("snapshot "), "{}", text(&verified.stdout));
}

fn a_kept_object_is_explained(world: &World) {
    let content = inside(world, false, "demo", "cat /etc/debian_version");
    let digest = blake3::hash(content.as_bytes()).to_hex().to_string();
    let explained = world.run(&["gc", "--explain", &digest]);
    assert!(
        explained.contains("release debian/bookworm: etc/debian_version")
            && explained.contains("environment demo: etc/"),
        "{explained}"
    );
    let object = objects(world)
        .into_iter()
        .find(|path| path.display().to_string().replace('/', "").contains(&format!("objects{digest}")));
    let object = object.expect("an object");
    let name = object.strip_prefix(world.store()).expect("in the store").display().to_string();
    assert_eq!(world.run(&["gc", "--explain", &name]), explained);
    let unknown = world.run(&["gc", "--explain", &"0".repeat(64)]);
    assert!(unknown.contains("nothing that is named has it"), "{unknown}");
    assert!(world.refused(&["gc", "--explain", "odd"]).contains("no digest"));
}

/// Old ones go, but for what a lock names.
fn downloads_by_age(world: &World, cache: &Path) {
    let lock = std::fs::read_to_string(world.project().join("casemate.lock")).expect("a lock");
    let named = lock.lines().find_map(|line| line.strip_prefix("sha256 = ")).expect("a package");
    let named = cache.join(named.trim_matches('"'));
    let (old, young) = (cache.join("2".repeat(64)), cache.join("3".repeat(64)));
    for path in [&old, &young] {
        std::fs::write(path, "x").expect("a download");
    }
    for path in [&named, &old] {
        let month = SystemTime::now() - Duration::from_secs(40 * 24 * 3600);
        std::fs::File::options().write(true).open(path).expect("it").set_modified(month).expect("aged");
    }
    assert_eq!(told(world, &["gc", "--dry-run", "--json"])["downloads"], "1");
    assert!(old.exists());
    world.run(&["gc"]);
    assert!(named.exists() && young.exists() && !old.exists());
    world.run(&["gc", "--days", "0"]);
    assert!(named.exists() && !young.exists());
}

/// Every kind of file in a layer: changed, it is named, with what it affects.
#[test]
fn verification_names_what_is_damaged_and_what_that_affects() {
    let world = World::with_environment(NETWORK);
    inside(&world, false, "demo", "echo precious > ~/file");
    world.run(&["commit", "demo", "--name", "kept"]);
    world.run(&["clone", "demo", "twin"]);
    stored(&world);
    let clean = told(&world, &["verify", "--json"]);
    assert_eq!(
        (&clean["damaged"], clean["damage"].as_array().map(Vec::len)),
        (&0.into(), Some(0)),
        "{clean}"
    );
    assert!(clean["entries"].as_u64() > Some(5_000), "{clean}");

    // The user's own file, so that the user can harm it.
    let digest = blake3::hash(b"precious\n").to_hex().to_string();
    let object = world.store().join("objects").join(&digest[..2]);
    let object =
        object.read_dir().expect("it").map(|entry| entry.expect("entry").path()).find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&digest[2..]))
        });
    let object = object.expect("the object");
    let meta = object.metadata().expect("it");
    std::fs::set_permissions(&object, std::fs::Permissions::from_mode(0o644)).expect("writable");
    let mut file = std::fs::File::options().write(true).open(&object).expect("it");
    file.write_all(b"PRECIOUS").expect("written");
    file.set_modified(meta.modified().expect("a time")).expect("as before");
    drop(file);
    let output = world.casemate(&["verify"]).stderr(Stdio::null()).output().expect("casemate");
    let found = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{found}");
    for part in [
        "/file: content differs from the listing",
        "environment demo",
        "environment twin",
        "snapshot demo kept",
        "casemate restore",
    ] {
        assert!(found.contains(part), "{part} is not in {found}");
    }
    assert!(!found.contains("release"), "not affected: {found}");
}
