//! `kill -9` of the daemon: what was committed is there, what runs goes on.

use std::process::Stdio;
use std::time::{Duration, Instant};

use casemate_tests::{World, text, wait_for};

#[test]
fn sessions_and_environments_outlive_the_daemon() {
    let mut world = World::with_environment("");
    world.run(&["start", "demo"]);
    let script = "echo before; until [ -e /workspace/go ]; do sleep 0.05; done; echo after; exit 7";
    let mut command = world.casemate(&["exec", "demo", "--", "sh", "-c", script]);
    let running = command.stdout(Stdio::piped()).spawn().expect("casemate");
    wait_for("the session", || world.run(&["list"]).contains(" 1 "));
    world.kill_daemon();
    world.start_daemon();
    assert!(world.run(&["list"]).contains("running"), "{}", world.run(&["list"]));
    assert_eq!(text(&world.exec(&["demo", "--", "echo", "new"]).stdout), "new\n");
    std::fs::write(world.project().join("go"), "").expect("go");
    let output = running.wait_with_output().expect("output");
    assert_eq!((text(&output.stdout), output.status.code()), ("before\nafter\n".into(), Some(7)));
    let second = world.daemon_command().output().expect("a second daemon");
    assert_eq!(second.status.code(), Some(1));
    assert!(text(&second.stderr).contains("held by"), "{}", text(&second.stderr));
    world.run(&["stop", "demo"]);
}

/// Twenty moments (`make soak`: 200), spread over each operation.
#[test]
fn killed_at_any_moment_the_store_has_the_old_state_or_the_new() {
    let mut world = World::with_environment("");
    let rounds: u64 = if std::env::var_os("CASEMATE_SOAK").is_some() { 200 } else { 20 };
    for round in 0..rounds {
        let variable = format!("[environment]\nROUND = \"{round}\"\n");
        world.write_manifest(&variable);
        let manifest = world.manifest();
        let arguments: Vec<&str> = match round % 3 {
            0 => vec!["build", "demo", "--manifest", &manifest],
            1 => vec!["exec", "demo", "--", "true"],
            _ => vec!["release", "fetch", "debian/bookworm"],
        };
        let mut command = world.casemate(&arguments);
        let mut client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("casemate");
        // The moment of the kill is the test's subject, so this waits for time and nothing else.
        let moment = Duration::from_millis(round * 37 % 400);
        let begin = Instant::now();
        while begin.elapsed() < moment && client.try_wait().expect("wait").is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        world.kill_daemon();
        world.start_daemon();
        // A client whose daemon died ends by itself.
        wait_for("the client", || client.try_wait().expect("wait").is_some());
        assert!(world.in_store("staging").is_empty(), "round {round}");
        assert_eq!(world.in_store("environments").len(), 1, "round {round}");
        let output = world.exec(&["demo", "--", "sh", "-c", "echo $ROUND"]);
        assert!(output.status.success(), "round {round}: {}", text(&output.stderr));
    }
}

/// Flip one bit in the middle of a record.
fn damage(path: &std::path::Path) {
    let mut bytes = std::fs::read(path).expect("a record");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).expect("a record");
}

#[test]
fn a_damaged_record_costs_what_it_is_about_and_nothing_is_swept() {
    let mut world = World::with_environment("");
    world.run(&["build", "other", "--manifest", &world.manifest()]);
    assert!(world.exec(&["demo", "--", "sh", "-c", "echo kept > ~/file"]).status.success());
    world.run(&["start", "demo"]);
    let id = world.id("demo");
    world.kill_daemon();
    let record = world.store().join(format!("environments/{id}.toml"));
    let sound = std::fs::read(&record).expect("a record");
    damage(&record);
    // No record names these; nobody knows whether the damaged one did.
    let upper = world.store().join("uppers/00000000000000000000000000000000");
    std::fs::create_dir_all(upper.join("upper")).expect("an upper");
    let before = (world.in_store("layers"), world.in_store("uppers"));
    world.start_daemon();
    assert_eq!((world.in_store("layers"), world.in_store("uppers")), before);
    // Named, and all else works.
    let list = world.run(&["list"]);
    let line = list.lines().find(|line| line.contains(&id)).expect("the damaged one is listed");
    assert!(line.contains("damaged"), "{list}");
    let refused = world.refused(&["exec", &id, "--", "true"]);
    assert!(refused.contains("cannot be read") && refused.contains(&format!("{id}.toml")), "{refused}");
    assert!(text(&world.casemate(&["doctor"]).output().expect("casemate").stdout).contains(&id));
    assert!(world.daemon_log().contains("nothing is swept"), "{}", world.daemon_log());
    assert_eq!(text(&world.exec(&["other", "--", "echo", "works"]).stdout), "works\n");
    // Another one's end does not take along what the two share.
    world.run(&["destroy", "--force", "other"]);
    assert_eq!(world.in_store("layers"), before.0);
    // Put back, it is as it was, and had been running all the time; what is nobody's goes.
    world.kill_daemon();
    std::fs::write(&record, sound).expect("a record");
    world.start_daemon();
    assert!(world.run(&["list"]).contains("running"), "{}", world.run(&["list"]));
    assert_eq!(text(&world.exec(&["demo", "--", "sh", "-c", "cat ~/file"]).stdout), "kept\n");
    assert!(!upper.exists());
    // Given up, its files go with the next start.
    world.run(&["stop", "demo"]);
    world.kill_daemon();
    damage(&record);
    world.start_daemon();
    world.run(&["destroy", &id]);
    assert!(!world.run(&["list"]).contains(&id));
    world.kill_daemon();
    world.start_daemon();
    assert!(world.in_store("uppers").is_empty(), "{:?}", world.in_store("uppers"));
}

#[test]
fn a_damaged_release_is_named_and_can_be_removed() {
    let mut world = World::with_environment("");
    world.kill_daemon();
    damage(&world.store().join("releases/debian@bookworm.toml"));
    world.start_daemon();
    assert!(world.run(&["release", "list"]).contains("damaged"));
    let refused = world.refused(&["release", "fetch", "debian/bookworm"]);
    assert!(refused.contains("debian@bookworm.toml"), "{refused}");
    assert_eq!(text(&world.exec(&["demo", "--", "echo", "works"]).stdout), "works\n");
    world.run(&["release", "remove", "debian/bookworm"]);
    world.run(&["release", "fetch", "debian/bookworm"]);
}
