//! Builds that meet each other, releases that go meanwhile, and packages that leave something running.

use std::fs::File;
use std::process::{Child, Stdio};
use std::time::Instant;

use casemate_tests::archive::Archive;
use casemate_tests::processes::marked;
use casemate_tests::{World, manifest_text, seed, soak, text, wait_for};

const BASE: &str = "debian/bookworm";

/// A manifest of its own, in a directory of its own.
fn manifest(world: &World, name: &str, more: &str) -> String {
    let directory = world.project().join(name);
    std::fs::create_dir_all(&directory).expect("directory");
    let path = directory.join("casemate.toml");
    std::fs::write(&path, manifest_text(BASE, more)).expect("manifest");
    path.display().to_string()
}

fn begin(world: &World, arguments: &[&str]) -> Child {
    let mut command = world.casemate(arguments);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("casemate")
}

fn succeeds(world: &World, what: &str, client: Child) {
    let output = client.wait_with_output().expect("wait");
    assert!(output.status.success(), "{what}: {}\n{}", text(&output.stderr), world.daemon_log());
}

/// Wait until this job is at this stage.
fn wait_for_stage(world: &World, subject: &str, stage: &str) {
    wait_for(&format!("{subject}: {stage}"), || {
        let jobs: serde_json::Value = serde_json::from_str(&world.run(&["jobs", "--json"])).expect("JSON");
        let jobs = jobs.as_array().expect("jobs");
        let running = jobs.iter().find(|job| job["subject"] == subject && job["state"] == "running");
        assert!(running.is_some() || jobs.iter().all(|job| job["subject"] != subject), "{subject} is over");
        running.is_some_and(|job| job["stage"] == stage)
    });
}

fn inside(world: &World, name: &str, script: &str) -> String {
    let output = world.exec(&[name, "--", "sh", "-c", script]);
    assert!(output.status.success(), "{name}: {script}: {}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn at_once_and_while_their_release_goes() {
    let world = World::with_release();
    let one = manifest(&world, "one", "[system]\npackages = [\"jq\"]\n");
    let two = manifest(&world, "two", "[system]\npackages = [\"jq\", \"file\"]\n");

    // The same package in both. Soon nothing but they needs the release's layer, then there is a new one.
    let first = begin(&world, &["build", "one", "--manifest", &one]);
    let second = begin(&world, &["build", "two", "--manifest", &two]);
    wait_for_stage(&world, "two", "resolving packages");
    world.run(&["release", "remove", BASE]);
    assert!(world.refused(&["build", "late", "--manifest", &one]).contains("no release"));
    world.run(&["release", "fetch", BASE]);
    succeeds(&world, "one", first);
    succeeds(&world, "two", second);
    assert_eq!(inside(&world, "one", "echo 1 | jq .+1"), "2\n");
    assert_eq!(inside(&world, "two", "echo 1 | jq .+1; file -b /dev/null"), "2\ncharacter special (1/3)\n");
    assert!(!world.exec(&["one", "--", "which", "file"]).status.success(), "each has its own packages");

    // And nobody holds what nobody needs.
    for name in ["one", "two"] {
        world.run(&["destroy", "--force", name]);
    }
    world.run(&["release", "remove", BASE]);
    for kind in ["layers", "staging", "uppers"] {
        assert_eq!(world.in_store(kind), Vec::<String>::new(), "{kind}");
    }
}

/// An archive's layer is the same by whatever name it is imported: what removes one name must not take it from another that is
/// being imported meanwhile, and two can be imported at once. CASEMATE_SEED repeats a run.
#[test]
fn a_layer_that_goes_and_comes_at_once() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let world = World::new();
    let tree = world.project().join("tree/etc");
    std::fs::create_dir_all(&tree).expect("directory");
    for file in 0..200 {
        std::fs::write(tree.join(file.to_string()), format!("{file}\n")).expect("file");
    }
    let archive = world.project().join("archive.tar").display().to_string();
    let mut tar = world.command("tar");
    tar.arg("-C").arg(world.project().join("tree")).args(["--owner=0", "--group=0", "-cf", &archive, "etc"]);
    assert!(tar.status().expect("tar").success());
    let start = Instant::now();
    world.run(&["release", "import", "even", &archive]);
    let takes = start.elapsed();
    let names = ["even", "odd"];
    for round in 0..soak(400, 30) {
        let (old, new) = (names[round % 2], names[(round + 1) % 2]);
        let importing = begin(&world, &["release", "import", new, &archive]);
        // When they meet is the test's subject, so this waits for time and nothing else.
        let moment = takes.mul_f64(random.f64());
        std::thread::sleep(moment);
        world.run(&["release", "remove", &format!("local/{old}")]);
        succeeds(&world, "import", importing);
        let label = format!("CASEMATE_SEED={seed}, round {round}: removed after {moment:?}");
        assert_eq!(world.in_store("layers").len(), 1, "{label}: {new} has no layer");
        if round % 5 == 0 {
            world.run(&["release", "remove", &format!("local/{new}")]);
            let both = names.map(|name| begin(&world, &["release", "import", name, &archive]));
            for importing in both {
                succeeds(&world, &label, importing);
            }
            world.run(&["release", "remove", &format!("local/{old}")]);
            assert_eq!(world.in_store("layers").len(), 1, "{label}: {new} has no layer");
        }
    }
}

/// What an image's package manager can be told to do on the host's network: here, to ask for a socket of the host's processes.
const PROBE: &str = "APT::Update::Pre-Invoke { \"perl -MSocket -e 'socket(S, AF_UNIX, SOCK_STREAM, 0); warn qq(AF_UNIX: $!);'\"; };\n";

#[test]
fn what_packages_and_their_manager_do_beside_installing() {
    let archive = Archive::new();
    let marker = format!("left-{}", std::process::id());
    // One that holds what it was given to write to, and one that holds nothing and heeds no signal.
    let script = format!(
        "#!/bin/sh\nset -e\nsetsid sh -c 'sleep 10000; :' {marker} &\n\
        setsid sh -c 'trap \"\" TERM HUP INT; sleep 10000; :' {marker} </dev/null >/dev/null 2>&1 &\n\
        echo installed > /etc/leaver\n"
    );
    archive.offer(&[("leaver", &script)]);

    // The release with this archive as its only one.
    let world = World::with_environment("");
    let source =
        format!("echo '{}' > /etc/apt/sources.list; cat > /etc/apt/apt.conf.d/probe", archive.source());
    let set = world.exec_with(&["--root", "demo", "--", "sh", "-c", &source], PROBE.into());
    assert!(set.status.success(), "{}", text(&set.stderr));
    let base = world.project().join("base.tar");
    let mut tar =
        world.casemate(&["exec", "--root", "demo", "--", "tar", "-C", "/", "--one-file-system", "-c"]);
    tar.args([
        "--exclude=./usr/share/doc",
        "--exclude=./usr/share/locale",
        "--exclude=./workspace",
        "--exclude=./home/*",
        ".",
    ]);
    assert!(tar.stdout(File::create(&base).expect("file")).status().expect("casemate").success());
    world.run(&["release", "import", "base", &base.display().to_string()]);

    world.write_manifest_on("local/base", "[system]\npackages = [\"leaver\"]\n");
    let mut building = begin(&world, &["build", "left", "--manifest", &world.manifest()]);
    wait_for("the build's end", || building.try_wait().expect("wait").is_some());
    succeeds(&world, "left", building);
    let jobs: serde_json::Value = serde_json::from_str(&world.run(&["jobs", "--json"])).expect("JSON");
    let job =
        jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["subject"] == "left")).expect("a job");
    let log = world.run(&["jobs", "--log", &job["id"].to_string()]);
    assert!(log.contains("AF_UNIX: Address family not supported"), "{log}");
    assert_eq!(marked(&marker), [0; 0], "they outlive the build");
    assert_eq!(inside(&world, "left", "cat /etc/leaver; dpkg-query -W leaver"), "installed\nleaver\t1.0\n");
    assert!(world.in_store("staging").is_empty());
}
