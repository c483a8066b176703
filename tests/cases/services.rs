//! What an environment runs itself: `[runtime]` command, its restarts, its health, its end, its log.

use std::path::Path;
use std::process::Stdio;

use casemate_tests::{World, text, wait_for};

fn build(name: &str, runtime: &str) -> (&'static World, std::path::PathBuf) {
    World::shared_environment(name, &format!("[runtime]\nnetwork = \"none\"\n{runtime}"))
}

fn shown(world: &World, name: &str, key: &str) -> serde_json::Value {
    let shown: serde_json::Value = serde_json::from_str(&world.run(&["show", name, "--json"])).expect("JSON");
    shown[key].clone()
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap_or_default().lines().count()
}

#[test]
fn it_runs_while_the_environment_is_started() {
    let (world, project) = build(
        "service",
        "command = \"echo begins as $(id -u) in $PWD; echo $GREETING >&2; trap 'echo ends; exit 3' USR1; while :; do sleep 0.1; done\"\n\
         stop_signal = \"USR1\"\n[environment]\nGREETING = \"hello\"\n",
    );
    let uid = nix::unistd::getuid().to_string();
    let home = format!("/home/{}", std::env::var("USER").expect("USER"));
    // A session alone does not start it.
    assert!(world.exec(&["service", "--", "true"]).status.success());
    assert_eq!(world.run(&["logs", "service"]), "");
    world.run(&["start", "service"]);
    assert_eq!(shown(world, "service", "command")[0], "/bin/sh");
    let log = || world.run(&["logs", "service"]);
    wait_for("its output", || log() == format!("begins as {uid} in {home}\nhello\n"));
    assert_eq!(shown(world, "service", "sessions"), 1);
    // Followed until the end, which is by the signal that the manifest names.
    let follow = world.casemate(&["logs", "--follow", "-n", "1", "service"]).stdout(Stdio::piped()).spawn();
    let follow = follow.expect("casemate");
    world.run(&["stop", "service"]);
    let followed = follow.wait_with_output().expect("output");
    assert_eq!(text(&followed.stdout), "hello\nends\n");
    assert_eq!(shown(world, "service", "last_exit_code"), 3);
    assert_eq!(shown(world, "service", "state"), "built");
    drop(project);
}

#[test]
fn when_it_has_ended_for_good_so_has_the_environment() {
    // As much at its end as a pipe holds.
    let (world, _) =
        build("service-once", "command = \"head -c 60000 /dev/zero | tr '\\\\0' x; echo last; exit 4\"\n");
    world.run(&["start", "service-once"]);
    wait_for("the environment's end", || shown(world, "service-once", "state") == "built");
    assert_eq!(shown(world, "service-once", "last_exit_code"), 4);
    let printed = world.run(&["logs", "service-once"]);
    assert!(printed.len() == 60_005 && printed.ends_with("xlast\n"), "{} bytes", printed.len());
    // As root, where the manifest says so.
    let (world, project) = build(
        "service-root",
        "command = [\"sh\", \"-c\", \"id -u > /srv/who; sleep 1000\"]\ncommand_as_root = true\n",
    );
    world.run(&["start", "service-root"]);
    let who = || text(&world.exec(&["service-root", "--", "cat", "/srv/who"]).stdout);
    wait_for("the command", || who() == "0\n");
    world.run(&["stop", "--timeout", "0", "service-root"]);
    drop(project);
}

#[test]
fn it_is_started_again() {
    let (world, project) = build(
        "service-again",
        "command = \"echo run >> /workspace/runs; [ $(wc -l < /workspace/runs) -ge 3 ] && exit 0; exit 1\"\nrestart = \"on-failure\"\n",
    );
    let runs = project.join("runs");
    world.run(&["start", "service-again"]);
    wait_for("the third run", || lines(&runs) == 3);
    // That one has ended well.
    wait_for("the environment's end", || shown(world, "service-again", "state") == "built");
    assert_eq!(lines(&runs), 3);

    // Killed from outside its loop it comes again too; a daemon that is killed meanwhile does not matter.
    let (world, project) = build(
        "service-always",
        "command = \"echo run >> /workspace/runs; exec sleep 1000\"\nrestart = \"always\"\n",
    );
    let runs = project.join("runs");
    world.run(&["start", "service-always"]);
    wait_for("the first run", || lines(&runs) == 1);
    world.run(&["kill", "--signal", "USR2", "service-always"]);
    wait_for("the second run", || lines(&runs) == 2);
    world.run(&["stop", "--timeout", "0", "service-always"]);
    assert_eq!(shown(world, "service-always", "state"), "built");
}

#[test]
fn its_health() {
    let (world, project) = build(
        "service-health",
        "command = \"echo run >> /workspace/runs; exec sleep 1000\"\n[runtime.health]\ncommand = \"echo look >> /workspace/looks; \
         test -e /workspace/sound\"\ninterval = 1\ntimeout = 5\nretries = 2\nstart_period = 0\non_failure = \"restart\"\n",
    );
    let (runs, sound) = (project.join("runs"), project.join("sound"));
    std::fs::write(&sound, "").expect("a file");
    let health = || shown(world, "service-health", "health").as_str().expect("text").to_owned();
    assert_eq!(health(), "");
    world.run(&["start", "service-health"]);
    wait_for("health", || health() == "healthy");
    assert!(world.run(&["show", "service-health"]).contains("health    healthy"));
    std::fs::remove_file(&sound).expect("removed");
    wait_for("a new run", || lines(&runs) >= 2);
    std::fs::write(&sound, "").expect("a file");
    wait_for("health again", || health() == "healthy");
    // Checks are nobody's sessions.
    assert_eq!(shown(world, "service-health", "sessions"), 1);
    world.run(&["stop", "--timeout", "0", "service-health"]);
    assert_eq!(health(), "");

    // A check that hangs is a failure, and is killed.
    let (world, project) = build(
        "service-hangs",
        "command = \"exec sleep 1000\"\n[runtime.health]\ncommand = \"echo $$ >> /workspace/checks; sleep 1000\"\ninterval = 1\n\
         timeout = 1\nretries = 1\n",
    );
    world.run(&["start", "service-hangs"]);
    wait_for("the verdict", || shown(world, "service-hangs", "health") == "unhealthy");
    wait_for("a second check", || lines(&project.join("checks")) >= 2);
    // The first one, its shell and what that waited for, is gone.
    let first = "pid=$(head -n 1 /workspace/checks); for p in /proc/[0-9]*; do cut -d' ' -f6 $p/stat; done | grep -cx $pid";
    let seen = || text(&world.exec(&["service-hangs", "--", "sh", "-c", first]).stdout);
    wait_for("the end of the first check", || seen() == "0\n");
    world.run(&["stop", "--timeout", "0", "service-hangs"]);
}

/// It goes on under the next daemon, which knows its health and its end.
#[test]
fn it_outlives_the_daemon() {
    let mut world = World::with_release();
    world.write_manifest(
        "[runtime]\nnetwork = \"none\"\ncommand = \"trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done\"\n\
         [runtime.health]\ncommand = \"true\"\ninterval = 1\n",
    );
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    world.run(&["start", "demo"]);
    wait_for("health", || shown(&world, "demo", "health") == "healthy");
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(shown(&world, "demo", "state"), "running");
    wait_for("health, told anew", || shown(&world, "demo", "health") == "healthy");
    assert_eq!(world.run(&["logs", "demo"]), "up\n");
    world.run(&["stop", "demo"]);
    assert_eq!(shown(&world, "demo", "last_exit_code"), 7);
    world.run(&["destroy", "demo"]);
}
