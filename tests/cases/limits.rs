//! Pausing, killing, waiting; limits where the machine enforces them, and their refusal where it does not. What needs
//! systemd or controllers of cgroup v2 is tested in the virtual machine (`tests/vm`).

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::{World, text, wait_for};

fn spawn(world: &World, arguments: &[&str]) -> Child {
    let mut command = world.casemate(arguments);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("casemate")
}

/// A session that counts in the workspace until it is told to go.
fn counter(world: &World) -> Child {
    let script = "n=0; until [ -e go ]; do n=$((n+1)); echo $n > n.new; mv n.new n; done; exit 7";
    // The last counter's too, or its file would say that this one counts.
    for file in ["go", "n"] {
        let _ = std::fs::remove_file(world.project().join(file));
    }
    let child = spawn(world, &["exec", "-w", "/workspace", "demo", "--", "sh", "-c", script]);
    wait_for("the counter", || count(world) > 0);
    child
}

fn count(world: &World) -> u64 {
    let text = std::fs::read_to_string(world.project().join("n")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}

fn state(world: &World) -> String {
    let shown = world.run(&["show", "demo"]);
    let line = shown.lines().find_map(|line| line.strip_prefix("state")).expect("a state");
    line.trim().to_owned()
}

/// Control groups of environments beside our own.
fn groups() -> Vec<PathBuf> {
    let own = std::fs::read_to_string("/proc/self/cgroup").expect("cgroup");
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup v2: see scripts/as-user");
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let root = root.into_iter().find(|root| root.join("cgroup.controllers").exists()).expect("cgroup v2");
    let entries = std::fs::read_dir(root.join(own)).expect("our group");
    entries.map(|entry| entry.expect("entry").path()).filter(|path| path.is_dir()).collect()
}

fn group_of(world: &World) -> Option<PathBuf> {
    let shown = world.run(&["show", "demo"]);
    let id = shown.lines().find_map(|line| line.strip_prefix("id")).expect("an id").trim().to_owned();
    groups().into_iter().find(|path| path.to_string_lossy().contains(&format!("casemate-{id}-")))
}

#[test]
fn pause_kill_restart_wait() {
    let mut world = World::with_environment("");
    assert!(world.refused(&["pause", "demo"]).contains("is built"), "not running");
    world.run(&["start", "demo"]);
    paused_it_stands_still(&mut world);
    a_paused_one_is_stopped(&world);
    signals_and_waiting(&world);
    restarting(&world);
    stopping_a_shell_takes_no_time(&world);
    usage(&world);
    world.run(&["stop", "demo"]);
    assert_eq!(group_of(&world), None, "a control group is left");
    what_nobody_cleared_away(&mut world);
}

/// An environment that ends while there is no daemon leaves its group to the next one.
fn what_nobody_cleared_away(world: &mut World) {
    world.run(&["start", "demo"]);
    let group = group_of(world).expect("a control group");
    world.kill_daemon();
    std::fs::write(group.join("cgroup.kill"), "1").expect("kill");
    wait_for("its end", || {
        std::fs::read_to_string(group.join("cgroup.events")).expect("events").contains("populated 0")
    });
    assert!(group.exists());
    world.start_daemon();
    assert_eq!(group_of(world), None, "a control group is left");
}

fn paused_it_stands_still(world: &mut World) {
    let session = counter(world);
    let group = group_of(world).expect("a control group of its own");
    world.run(&["pause", "demo"]);
    let events = std::fs::read_to_string(group.join("cgroup.events")).expect("events");
    assert!(events.contains("frozen 1"), "{events}");
    assert_eq!(state(world), "paused");
    let before = count(world);
    for arguments in [
        vec!["exec", "demo", "--", "true"],
        vec!["start", "demo"],
        vec!["restart", "demo"],
        vec!["kill", "-s", "TERM", "demo"],
        vec!["pause", "demo"],
        vec!["destroy", "demo"],
    ] {
        let error = world.refused(&arguments);
        assert!(error.contains("is paused") && error.contains("casemate unpause"), "{arguments:?}: {error}");
    }
    // Known again by a daemon that never saw it awake.
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(state(world), "paused", "{}", world.daemon_log());
    assert_eq!(count(world), before, "it went on");
    world.run(&["unpause", "demo"]);
    assert_eq!(state(world), "running");
    wait_for("the counter to go on", || count(world) > before);
    wait_for("its session", || world.run(&["list"]).contains(" 1 "));
    assert!(world.refused(&["unpause", "demo"]).contains("is running"));
    std::fs::write(world.project().join("go"), "").expect("go");
    assert_eq!(session.wait_with_output().expect("output").status.code(), Some(7));
}

fn a_paused_one_is_stopped(world: &World) {
    for arguments in [vec!["stop", "demo"], vec!["kill", "demo"]] {
        world.run(&["start", "demo"]);
        let session = counter(world);
        world.run(&["pause", "demo"]);
        let begin = Instant::now();
        world.run(&arguments);
        assert!(begin.elapsed() < Duration::from_secs(5), "{arguments:?} took {:?}", begin.elapsed());
        assert_eq!(state(world), "built");
        assert!(!session.wait_with_output().expect("output").status.success());
        assert_eq!(group_of(world), None, "a control group is left");
    }
}

fn signals_and_waiting(world: &World) {
    world.run(&["start", "demo"]);
    let session = counter(world);
    world.run(&["kill", "-s", "USR1", "demo"]);
    assert_eq!(session.wait_with_output().expect("output").status.code(), Some(128 + 10));
    assert_eq!(state(world), "running", "a signal to sessions is none to the environment");

    let mut waiting = spawn(world, &["wait", "demo"]);
    let session = counter(world);
    assert!(waiting.try_wait().expect("wait").is_none(), "it runs, and `wait` is over");
    world.run(&["kill", "demo"]);
    assert!(!session.wait_with_output().expect("output").status.success());
    let output = waiting.wait_with_output().expect("output");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "137\n");
    assert_eq!(state(world), "built");
    // One that does not run is not waited for.
    world.run(&["wait", "demo"]);
    assert!(world.refused(&["kill", "-s", "TERM", "demo"]).contains("is built"));
    assert!(world.refused(&["wait", "nowhere"]).contains("no environment"));
}

fn restarting(world: &World) {
    // From built, and from running: what runs then is another one.
    let file = || world.exec(&["--root", "demo", "--", "test", "-e", "/run/mark"]).status.success();
    world.run(&["restart", "demo"]);
    assert_eq!(state(world), "running");
    assert!(world.exec(&["--root", "demo", "--", "touch", "/run/mark"]).status.success());
    assert!(file(), "/run is kept while it runs");
    world.run(&["restart", "demo"]);
    assert_eq!(state(world), "running");
    assert!(!file(), "/run outlived a restart");
}

fn stopping_a_shell_takes_no_time(world: &World) {
    world.run(&["start", "demo"]);
    let mut shell = world.casemate(&["exec", "demo", "--", "bash", "-i"]);
    let mut shell =
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("casemate");
    wait_for("the shell", || world.run(&["list"]).contains(" 1 "));
    let begin = Instant::now();
    world.run(&["stop", "demo"]);
    assert!(begin.elapsed() < Duration::from_secs(1), "it took {:?}", begin.elapsed());
    shell.wait().expect("wait");
}

fn usage(world: &World) {
    world.run(&["start", "demo"]);
    let session = counter(world);
    let stats = world.run(&["stats", "--no-stream", "--json"]);
    let number = |key: &str| -> Option<f64> {
        let (_, rest) = stats.split_once(&format!("\"{key}\": ")).expect("a number");
        rest.split([',', '\n']).next().and_then(|value| value.parse().ok())
    };
    assert!(stats.contains("\"name\": \"demo\""), "{stats}");
    assert!(number("cpu_microseconds").is_some_and(|used| used > 0.0), "{stats}");
    assert!(number("cpu_percent").is_some_and(|percent| percent > 1.0), "a busy loop uses nothing: {stats}");
    assert!(world.run(&["stats", "--no-stream", "demo"]).contains("demo"));
    std::fs::write(world.project().join("go"), "").expect("go");
    session.wait_with_output().expect("output");
    assert!(world.refused(&["stats", "--no-stream", "nowhere"]).contains("no environment"));
}

#[test]
fn limits_are_enforced_or_refused() {
    let world = World::with_release();
    let manifest = world.manifest();
    let findings = world.casemate(&["doctor"]).output().expect("casemate");
    let findings = text(&findings.stdout);
    let line = findings.lines().find(|line| line.contains("control groups")).expect("a finding").to_owned();
    // What is asked for is what this machine lacks; if it lacks nothing, all of it is enforced.
    let lacking = [("memory", "memory_limit_mb = 256"), ("pids", "pids = 200"), ("io", "io_weight = 50")];
    let lacking = lacking.into_iter().find(|(controller, _)| {
        line.starts_with("degraded")
            && (!line.contains("without")
                || line.split(':').any(|part| part.contains("without") && part.contains(controller)))
    });
    let Some((_, asked)) = lacking else {
        world.write_manifest("[runtime.resource_limits]\nmemory_limit_mb = 256\npids = 200\n");
        world.run(&["build", "demo", "--manifest", &manifest]);
        world.run(&["start", "demo"]);
        let group = group_of(&world).expect("a control group");
        let in_force = std::fs::read_to_string(group.join("pids.max")).expect("pids.max");
        assert_eq!(in_force.trim(), "200");
        return;
    };
    world.write_manifest(&format!("[runtime.resource_limits]\n{asked}\n"));
    let refused = world.refused(&["build", "demo", "--manifest", &manifest]);
    assert!(refused.contains("cannot be enforced") && refused.contains("--unenforced-limits"), "{refused}");
    let aloud = |arguments: &[&str]| {
        let output = world.casemate(arguments).output().expect("casemate");
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("limits are not enforced"), "{}", text(&output.stderr));
    };
    aloud(&["build", "demo", "--unenforced-limits", "--manifest", &manifest]);
    aloud(&["start", "demo"]);
    assert!(world.run(&["show", "demo"]).contains(&format!("{asked} (not enforced)")));
    assert!(world.run(&["limits", "demo"]).contains("(not enforced)"));
    let change = asked.replace(" = ", "=");
    assert!(world.refused(&["limits", "demo", &change]).contains("cannot be enforced"));
    // Lifted, there is nothing to refuse any more.
    let (key, _) = change.split_once('=').expect("a key");
    world.run(&["limits", "demo", &format!("{key}=max")]);
    assert_eq!(world.run(&["limits", "demo"]), "");
    assert!(world.refused(&["limits", "demo", "memory_limit_mb=99999999"]).contains("above the"));
    assert!(world.refused(&["limits", "demo", "memory=1"]).contains("unknown option"));
    assert!(world.refused(&["limits", "demo", "pids=1"]).contains("no number of processes"));
}
