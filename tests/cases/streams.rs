//! What flows through a session: a gigabyte through a pipe, terminals, signals; and what an environment does around it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Stdio};

use casemate_tests::processes::{marked, parent, status};
use casemate_tests::typist::Typist;
use casemate_tests::{World, soak, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Largest resident set so far, in KiB.
fn peak(pid: u32) -> u64 {
    let line = status(pid, "VmHWM").expect("VmHWM");
    line.trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn a_gigabyte_passes_without_growth() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: usize = 1 << 10;
    let (world, _) = World::shared_environment("gigabyte", "");
    let marker = format!("gigabyte-{}", std::process::id());
    let mut child = world
        .casemate(&["exec", "gigabyte", "--", "sh", "-c", "cat; :", &marker])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("casemate");
    let mut stdin = child.stdin.take().expect("pipe");
    let mut stdout = child.stdout.take().expect("pipe");
    // Every chunk is another one, and has every byte in it.
    let chunk = |number: usize| -> Vec<u8> { (0..CHUNK).map(|at| (at ^ (at >> 8) ^ number) as u8).collect() };
    let writer = std::thread::spawn(move || {
        for number in 0..CHUNKS {
            stdin.write_all(&chunk(number)).expect("all is read");
        }
    });
    let mut watched = BTreeMap::new();
    let mut begin = BTreeMap::new();
    let mut read = vec![0; CHUNK];
    let peaks = |watched: &BTreeMap<&'static str, u32>| -> BTreeMap<&str, u64> {
        watched.iter().map(|(name, pid)| (*name, peak(*pid))).collect()
    };
    for number in 0..CHUNKS {
        stdout.read_exact(&mut read).expect("all comes back");
        assert!(read == chunk(number), "MiB {number} is another one");
        if number == 0 {
            // The client has the marker in its command line, and so has the session, whose parent is init.
            let session = marked(&marker).into_iter().find(|pid| *pid != child.id()).expect("the session");
            let init = parent(session);
            assert_eq!(status(init, "NSpid").expect("NSpid").split_whitespace().last(), Some("1"));
            watched = BTreeMap::from([
                ("client", child.id()),
                ("daemon", world.daemon_pid()),
                ("init", init),
                ("session", session),
            ]);
            begin = peaks(&watched);
        }
        // Before the last one: with that read, all may have ended.
        if number == CHUNKS - 2 {
            let end = peaks(&watched);
            let grown = |name: &&str| end[*name] - begin[*name] >= 4096;
            assert!(!end.keys().any(grown), "KiB: {begin:?}, then {end:?}");
        }
    }
    assert_eq!(stdout.read(&mut read).expect("end"), 0);
    writer.join().expect("writer");
    assert!(child.wait().expect("status").success());
}

#[test]
fn a_terminal_of_the_environments_own() {
    let (world, _) = World::shared_environment("terminal", "");
    let mut typist = Typist::sit_down(world, &["enter", "terminal"]);
    typist.types("echo size=$(stty size | tr ' ' x)\n");
    typist.sees("size=24x80");
    let resized =
        world.command("stty").arg("-F").arg(&typist.name).args(["rows", "40", "cols", "100"]).status();
    assert!(resized.expect("stty").success());
    // The size goes by signal: ask until it has come, and say so once.
    typist.types(
        "until [ \"$(stty size)\" = '40 100' ]; do sleep 0.05; done; echo now=$(stty size | tr ' ' x)\n",
    );
    typist.sees("now=40x100");
    typist.types("echo tty=$(tty) owner=$(stat -c %U $(tty))\n");
    typist.sees("tty=/dev/pts/");
    typist.sees(&format!("owner={}", std::env::var("USER").expect("USER")));
    // One session after the other, so there is one at a time.
    typist.types("echo there: $(who | wc -l) $(who | awk '{print $1, \"/dev/\" $2}') and $(tty)\n");
    typist.sees(&format!("there: 1 {} ", std::env::var("USER").expect("USER")));
    let line = typist.line();
    let (listed, own) = line.split_once(" and ").expect("both");
    assert_eq!(listed, own);
    // ^C reaches the command, not the client.
    typist.types("sh -c 'echo ru\"\"ns; exec sleep 1000'\n");
    typist.sees("runs");
    typist.types("\x03");
    typist.sees("^C");
    typist.types("echo again=$?\n");
    typist.sees("again=130");
    typist.ends_with(7);
    let mut root = Typist::sit_down(world, &["enter", "--root", "terminal"]);
    root.types("echo owner=$(stat -c %u $(tty)) id=$(id -u)\n");
    root.sees("owner=0 id=0");
    root.types("echo there: $(who | awk '{print $1}')\n");
    root.sees("there: root\r");
    root.ends_with(0);
}

/// Closed, or its client killed: the shell hears of it, tells its jobs, and nothing stays.
#[test]
fn a_window_that_closes() {
    let (world, project) = World::shared_environment("window", "");
    // Else it ended with the shell, and what the job has to do at its end would be cut short.
    world.run(&["start", "window"]);
    let sessions = || {
        let shown = world.run(&["show", "window"]);
        shown.lines().find_map(|line| line.strip_prefix("sessions")).expect("sessions").trim().to_owned()
    };
    for way in ["closed", "killed"] {
        let mut typist = Typist::sit_down(world, &["enter", "window"]);
        let job = format!(
            "sh -c 'trap \"touch /workspace/{way}; exit\" HUP; echo ru\"\"ns; while :; do sleep 0.1; done'\n"
        );
        typist.types(&job);
        typist.sees("runs");
        let mut child = match way {
            "closed" => typist.leaves(),
            _ => {
                signal(&typist.child, Signal::SIGKILL);
                typist.child
            }
        };
        child.wait().expect("status");
        wait_for("the job's end", || project.join(way).exists());
        wait_for("the session's end", || sessions() == "0");
    }
    world.run(&["stop", "window"]);
}

/// Text typed before the shell reads, or before the client has its terminal in raw mode, arrives all the same.
#[test]
fn terminals_one_after_the_other_and_several_at_once() {
    let (world, _) = World::shared_environment("terminals", "");
    for round in 0..soak(100, 5) {
        let mut typist = Typist::sit_down(world, &["enter", "terminals"]);
        typist.types(&format!("echo first=$(({round}+1000))\n"));
        typist.sees(&format!("first={}", round + 1000));
        typist.ends_with(round % 7);
    }
    let mut typists: Vec<_> = (0..4).map(|_| Typist::sit_down(world, &["enter", "terminals"])).collect();
    for (number, typist) in typists.iter_mut().enumerate() {
        typist.types(&format!("echo mine=$(({number}+50)) on=$(tty)\n"));
    }
    let mut names = std::collections::BTreeSet::new();
    for (number, typist) in typists.iter_mut().enumerate() {
        typist.sees(&format!("mine={} on=", number + 50));
        names.insert(typist.line());
    }
    assert_eq!(names.len(), 4, "two have the same terminal: {names:?}");
    for (number, typist) in typists.into_iter().enumerate() {
        typist.ends_with(i32::try_from(number).expect("small"));
    }
}

/// Start a command whose first line tells that it runs.
fn ready(world: &World, arguments: &[&str]) -> Child {
    let mut command = world.casemate(&["exec"]);
    let mut child = command.args(arguments).stdout(Stdio::piped()).spawn().expect("casemate");
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.as_mut().expect("pipe"));
    out.read_line(&mut line).expect("a line");
    assert_eq!(line, "ready\n");
    child
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), signal).expect("kill");
}

#[test]
fn signals_reach_the_command() {
    let (world, _) = World::shared_environment("signals", "");
    for (sent, code) in [
        (Signal::SIGTERM, 143),
        (Signal::SIGINT, 130),
        (Signal::SIGHUP, 129),
        (Signal::SIGQUIT, 131),
        (Signal::SIGUSR1, 138),
    ] {
        for root in [&["signals"][..], &["--root", "signals"]] {
            let arguments = [root, &["--", "sh", "-c", "echo ready; exec sleep 1000"]].concat();
            let mut child = ready(world, &arguments);
            signal(&child, sent);
            assert_eq!(child.wait().expect("status").code(), Some(code), "{sent} {root:?}");
        }
    }
    // One that the command catches does not end it.
    let script = "trap 'echo caught; exit 9' TERM; echo ready; sleep 1000 & wait";
    let mut child = ready(world, &["signals", "--", "sh", "-c", script]);
    signal(&child, Signal::SIGTERM);
    let mut rest = String::new();
    child.stdout.take().expect("pipe").read_to_string(&mut rest).expect("output");
    assert_eq!((rest.as_str(), child.wait().expect("status").code()), ("caught\n", Some(9)));
}

#[test]
fn a_stopped_environment_runs_for_as_long_as_its_sessions() {
    let (world, _) = World::shared_environment("stopped", "");
    let state = || {
        let shown = world.run(&["show", "stopped"]);
        shown.lines().find_map(|line| line.strip_prefix("state")).expect("a state").trim().to_owned()
    };
    wait_for("the build's end", || state() == "built");
    let mut first = world.casemate(&["exec", "stopped", "--", "cat"]);
    let mut first = first.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("casemate");
    wait_for("the session", || state() == "running");
    assert!(world.exec(&["stopped", "--", "true"]).status.success());
    assert_eq!(state(), "running", "another session's end ended it");
    drop(first.stdin.take());
    assert!(first.wait().expect("status").success());
    wait_for("the environment's end", || state() == "built");
}

/// Output to a file goes through a relay of the client's; what a command leaves in the background does not hold it up.
#[test]
fn a_background_process_does_not_hold_the_client() {
    let world = World::with_environment("");
    let path = world.project().join("output");
    let file = File::create(&path).expect("a file");
    let script = "yes | head -c 1000000; sleep 100000 & echo last";
    let status =
        world.casemate(&["exec", "demo", "--", "sh", "-c", script]).stdout(file).status().expect("casemate");
    assert!(status.success());
    let written = std::fs::read_to_string(path).expect("output");
    assert!(written.len() == 1_000_005 && written.ends_with("last\n"), "{}", written.len());
    world.run(&["stop", "--timeout", "0", "demo"]);
}
