//! `kill -9` of the daemon: what was committed is there, what runs goes on.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use casemate_tests::processes::{marked, parent, status};
use casemate_tests::{World, seed, soak, text, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

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
    an_init_that_does_not_answer_is_ended(&mut world);
}

/// Else it would hold the files of an environment that is listed as stopped.
fn an_init_that_does_not_answer_is_ended(world: &mut World) {
    let marker = format!("stuck-{}", std::process::id());
    let script = "echo before; sleep 1000; :";
    let mut command = world.casemate(&["exec", "demo", "--", "sh", "-c", script, &marker]);
    let mut client = command.stdout(Stdio::piped()).spawn().expect("casemate");
    let mut line = String::new();
    BufReader::new(client.stdout.as_mut().expect("pipe")).read_line(&mut line).expect("a line");
    let session = marked(&marker).into_iter().find(|pid| *pid != client.id()).expect("the session");
    let init = parent(session);
    kill(Pid::from_raw(i32::try_from(init).expect("a pid")), Signal::SIGSTOP).expect("stop");
    world.kill_daemon();
    world.start_daemon();
    assert!(!world.run(&["list"]).contains("running"), "{}", world.run(&["list"]));
    assert_eq!(client.wait().expect("wait").code(), Some(125));
    // Its parent is the host's init, whose it is to reap it.
    wait_for("init's end", || status(init, "State").is_none_or(|state| state.starts_with('Z')));
    assert_eq!(text(&world.exec(&["demo", "--", "echo", "anew"]).stdout), "anew\n");
}

/// The stages of jobs, as the daemon logs them.
struct Stages {
    log: File,
    unfinished: String,
}

impl Stages {
    fn from_now_on(world: &World) -> Self {
        let mut log = File::open(world.daemon_log_path()).expect("log");
        log.seek(SeekFrom::End(0)).expect("log");
        Self { log, unfinished: String::new() }
    }

    /// Those that began since the last look.
    fn begun(&mut self) -> Vec<String> {
        self.log.read_to_string(&mut self.unfinished).expect("log");
        let lines = self.unfinished.rfind('\n').map_or(0, |end| end + 1);
        let whole: String = self.unfinished.drain(..lines).collect();
        let stage = |line: &str| Some(line.split_once(" stage=\"")?.1.split_once('"')?.0.to_owned());
        whole.lines().filter_map(stage).collect()
    }
}

/// Before a job has said where it is.
const ASKING: &str = "asking";
const DOWNLOADING: &str = "downloading packages";

/// What a client asks for that is to be cut off.
#[derive(Clone)]
struct Operation {
    name: &'static str,
    /// How long each stage takes when it is not.
    stages: Vec<(String, Duration)>,
    /// In which it was.
    cut: BTreeMap<String, u32>,
}

/// Run it uncut, once.
fn measure(world: &World, name: &'static str, arguments: &[&str]) -> Operation {
    let mut log = Stages::from_now_on(world);
    let mut marks = vec![(ASKING.to_owned(), Instant::now())];
    let mut command = world.casemate(arguments);
    let mut client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("casemate");
    let status = loop {
        let ended = client.try_wait().expect("wait");
        marks.extend(log.begun().into_iter().map(|stage| (stage, Instant::now())));
        if let Some(status) = ended {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(status.success(), "{arguments:?}: {}", world.daemon_log());
    let mut end = Instant::now();
    let mut stages = Vec::new();
    for (stage, begin) in marks.into_iter().rev() {
        stages.insert(0, (stage, end - begin));
        end = begin;
    }
    Operation { name, stages, cut: BTreeMap::new() }
}

/// The text of all records, whatever they are records of.
fn records(directory: &Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(directory).expect("records") {
        let path = entry.expect("entry").path();
        text +=
            &if path.is_dir() { records(&path) } else { std::fs::read_to_string(&path).expect("a record") };
    }
    text
}

/// Nothing unfinished, and no layer or upper that nobody refers to.
pub fn nothing_stray(world: &World, moment: &str) {
    assert!(world.in_store("staging").is_empty(), "{moment}");
    let kinds = ["releases", "environments", "snapshots"];
    let known: String = kinds.iter().map(|kind| records(&world.store().join(kind))).collect();
    for kind in ["layers", "uppers"] {
        for name in world.in_store(kind) {
            assert!(known.contains(&name), "{moment}: {kind}/{name} belongs to nothing");
        }
    }
    let downloads = std::fs::read_dir(world.downloads()).expect("cache");
    for name in downloads.map(|entry| entry.expect("entry").file_name()) {
        assert!(!name.as_encoded_bytes().starts_with(b"."), "{moment}: the download {name:?} is unfinished");
    }
    let environments = world.in_store("environments").join(" ");
    for entry in std::fs::read_dir(world.runtime()).expect("runtime directory") {
        let entry = entry.expect("entry");
        // Beside them is the number of the last job.
        if !entry.file_type().expect("a type").is_dir() {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(environments.contains(&name), "{moment}: the sandbox {name} belongs to nothing");
    }
}

/// An archive that takes a while to import.
fn archive(world: &World) -> String {
    let tree = world.project().join("tree");
    for directory in 0..20 {
        let directory = tree.join(format!("usr/{directory}"));
        std::fs::create_dir_all(&directory).expect("directory");
        for file in 0..50 {
            let text = format!("{}/{file}\n", directory.display()).repeat(200);
            std::fs::write(directory.join(file.to_string()), text).expect("file");
        }
    }
    let path = world.project().join("archive.tar");
    let mut tar = world.command("tar");
    tar.arg("-C").arg(&tree).args(["--owner=0", "--group=0", "-cf"]).arg(&path).arg("usr");
    assert!(tar.status().expect("tar").success());
    path.display().to_string()
}

/// Twenty moments (`make soak`: 200) of fetch, import, build and exec: in each stage in turn, at any time of it. Of three
/// fetches, one is cut while it downloads. CASEMATE_SEED repeats a run.
#[test]
fn killed_at_any_moment_the_store_has_the_old_state_or_the_new() {
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);

    let mut world = World::with(&[("CASEMATE_LOG", "info,casemate_engine=debug"), ("NO_COLOR", "1")]);
    world.run(&["release", "fetch", "debian/bookworm"]);
    world.write_manifest("[environment]\nROUND = \"first\"\n");
    let manifest = world.manifest();
    world.run(&["build", "demo", "--manifest", &manifest]);
    world.run(&["build", "held", "--manifest", &manifest]);
    world.run(&["start", "held"]);
    let archive = archive(&world);
    world.forget_downloads();
    let mut operations = vec![
        measure(&world, "fetch", &["release", "fetch", "debian/trixie"]),
        measure(&world, "import", &["release", "import", "first", &archive]),
        measure(&world, "build", &["build", "new", "--manifest", &manifest]),
        measure(&world, "exec", &["exec", "demo", "--", "true"]),
    ];
    let rebuild = Operation { name: "rebuild", ..operations[2].clone() };
    operations.push(rebuild);
    world.run(&["destroy", "new"]);
    let mut built = "first".to_owned();
    let kinds = operations.len();
    let first = random.usize(..100);
    for round in 0..soak(200, 20) {
        let operation = &mut operations[round % kinds];
        let turn = round / kinds;
        let downloading = operation.stages.iter().position(|(stage, _)| stage == DOWNLOADING);
        let at = match downloading {
            Some(at) if turn % 3 == 0 => at,
            _ => (first + turn) % operation.stages.len(),
        };
        let (stage, takes) = operation.stages[at].clone();
        let moment = takes.mul_f64(random.f64());
        let label = format!(
            "CASEMATE_SEED={seed}, round {round}: {} killed {moment:?} after it was at {stage:?}",
            operation.name
        );
        if downloading.is_some_and(|downloading| at <= downloading) {
            world.forget_downloads();
        } else {
            world.recall_downloads();
        }
        let go = format!("go-{round}");
        let script =
            format!("echo before; until [ -e /workspace/{go} ]; do sleep 0.05; done; echo after; exit 7");
        let mut running = world.casemate(&["exec", "held", "--", "sh", "-c", &script]);
        let mut running = running.stdout(Stdio::piped()).spawn().expect("casemate");
        let mut out = BufReader::new(running.stdout.take().expect("pipe"));
        let mut line = String::new();
        out.read_line(&mut line).expect("a line");
        assert_eq!(line, "before\n", "{label}");

        let name = format!("round-{round}");
        let next = round.to_string();
        world.write_manifest(&format!("[environment]\nROUND = \"{next}\"\n"));
        if operation.name == "fetch" && world.run(&["release", "list"]).contains("debian/trixie") {
            world.run(&["release", "remove", "debian/trixie"]);
        }
        let arguments: Vec<&str> = match operation.name {
            "fetch" => vec!["release", "fetch", "debian/trixie"],
            "import" => vec!["release", "import", &name, &archive],
            "build" => vec!["build", &name, "--manifest", &manifest],
            "rebuild" => vec!["build", "demo", "--manifest", &manifest],
            _ => vec!["exec", "demo", "--", "true"],
        };
        let mut log = Stages::from_now_on(&world);
        let mut command = world.casemate(&arguments);
        let mut client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("casemate");
        // The moment of the kill is the test's subject, so this waits for time as well.
        let (mut reached, mut since) = (ASKING.to_owned(), (at == 0).then(Instant::now));
        let mut ended = false;
        while !ended && since.is_none_or(|since| since.elapsed() < moment) {
            std::thread::sleep(Duration::from_millis(1));
            ended = client.try_wait().expect("wait").is_some();
            for begun in log.begun() {
                if begun == stage {
                    since = Some(Instant::now());
                }
                reached = begun;
            }
        }
        world.kill_daemon();
        reached = log.begun().pop().unwrap_or(reached);
        *operation.cut.entry(if ended { "the end".to_owned() } else { reached }).or_default() += 1;
        world.start_daemon();
        // A client whose daemon died ends by itself.
        wait_for("the client", || client.try_wait().expect("wait").is_some());

        nothing_stray(&world, &label);
        let state = |name: &str| {
            let shown = world.run(&["show", name]);
            shown.lines().find_map(|line| line.strip_prefix("state")).expect("a state").trim().to_owned()
        };
        assert_eq!(state("held"), "running", "{label}");
        assert_eq!(text(&world.exec(&["held", "--", "echo", "new"]).stdout), "new\n", "{label}");
        std::fs::write(world.project().join(&go), "").expect("go");
        line.clear();
        out.read_to_string(&mut line).expect("the rest");
        assert_eq!((line.as_str(), running.wait().expect("wait").code()), ("after\n", Some(7)), "{label}");

        let told = world.exec(&["demo", "--", "sh", "-c", "echo $ROUND"]);
        assert!(told.status.success(), "{label}: {}", text(&told.stderr));
        let told = text(&told.stdout).trim().to_owned();
        assert!(told == built || operation.name == "rebuild" && told == next, "{label}: {told} is no state");
        built = told;
        for reference in ["debian/trixie".to_owned(), format!("local/{name}")] {
            if world.run(&["release", "list"]).contains(&reference) {
                world.run(&["release", "show", &reference]);
            }
        }
        if world.run(&["list"]).contains(&name) {
            assert!(world.exec(&[&name, "--", "true"]).status.success(), "{label}");
        }
        // What was cut off can be done over.
        if operation.name == "build" {
            world.run(&arguments);
            wait_for("the environment's end", || state(&name) == "built");
            world.run(&["destroy", &name]);
        }
        wait_for("the environment's end", || state("demo") == "built");
    }
    world.run(&["stop", "held"]);
    for Operation { name, stages, cut } in &operations {
        // To be read with --nocapture.
        println!("{name} cut at {cut:?}");
        // But the first, which is over in a moment.
        let missed: Vec<&String> =
            stages.iter().skip(1).map(|(stage, _)| stage).filter(|stage| !cut.contains_key(*stage)).collect();
        assert!(soak(false, true) || *name != "fetch" || missed.is_empty(), "{name}: not at {missed:?}");
    }
}

/// Flip one bit in the middle of a record.
fn damage(path: &Path) {
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

/// DESIGN.md, "Speed": 200 of them, from the start of a daemon until it tells of all.
const ADOPTED: Duration = Duration::from_secs(2);

/// Twenty environments (`make soak`: 200), a process in each: a new daemon knows them all as soon as it answers.
#[test]
fn many_running_environments_are_adopted_at_once() {
    let mut world = World::with_environment("[runtime]\nnetwork = \"none\"\n");
    let manifest = world.manifest();
    let names: Vec<String> = (0..soak(200, 20)).map(|number| format!("many-{number}")).collect();
    let mut sessions = Vec::new();
    for name in &names {
        world.run(&["build", name, "--manifest", &manifest]);
        let script = format!("echo up; read line; echo $line {name}; exit 7");
        let mut command = world.casemate(&["exec", name, "--", "sh", "-c", &script]);
        let mut client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("casemate");
        let mut out = BufReader::new(client.stdout.take().expect("pipe"));
        let mut line = String::new();
        out.read_line(&mut line).expect("a line");
        assert_eq!(line, "up\n", "{name}");
        sessions.push((name, client, out));
    }
    world.kill_daemon();
    let begin = Instant::now();
    world.start_daemon();
    let listed = world.run(&["list"]);
    let took = begin.elapsed();
    // To be read with --nocapture.
    println!("{} environments adopted in {took:?}", names.len());
    assert!(took < ADOPTED, "{took:?}");
    for name in &names {
        let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
        assert!(
            line.is_some_and(|line| line.contains("running")),
            "{name}: {line:?}\n{}",
            world.daemon_log()
        );
    }
    for (name, mut client, mut out) in sessions {
        writeln!(client.stdin.take().expect("pipe"), "still").expect("write");
        let mut rest = String::new();
        out.read_to_string(&mut rest).expect("output");
        let code = client.wait().expect("wait").code();
        assert_eq!((rest, code), (format!("still {name}\n"), Some(7)));
    }
}
