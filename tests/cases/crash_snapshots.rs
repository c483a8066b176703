//! `kill -9` of the daemon, and with it of its workers, while snapshots and clones are made, stored, restored, removed and
//! collected: the old state or the new, and every snapshot still says what it said.

use std::process::Stdio;
use std::time::{Duration, Instant};

use casemate_tests::{World, soak, wait_for};

use super::crash::nothing_stray;
use super::snapshots::{inside, snapshots, stored};

/// Enough that hashing takes a while. The first file and the last say the same, or something was torn.
fn write(world: &World, value: &str) {
    let script = format!(
        "mkdir -p ~/many; cd ~/many; echo {value} > 0; for n in $(seq 1 400); do echo {value} $n > $n; done; echo {value} > z"
    );
    inside(world, false, "demo", &script);
}

fn read(world: &World, environment: &str, label: &str) -> String {
    let told = inside(world, false, environment, "cd ~/many; cat 0 400 z");
    let words: Vec<&str> = told.split_whitespace().collect();
    let [first, last, "400", end] = words[..] else { panic!("{label}: {told:?}") };
    assert!(first == last && first == end, "{label}: {told:?}");
    first.to_owned()
}

/// A model of what there is: each snapshot's name and what it says.
struct Model {
    now: String,
    kept: Vec<(String, String)>,
}

fn names(world: &World) -> Vec<String> {
    let listed = snapshots(world, "demo");
    listed.iter().map(|one| one["name"].as_str().expect("a name").to_owned()).collect()
}

fn listed(world: &World) -> Vec<String> {
    let list = world.run(&["list"]);
    list.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

fn built(world: &World, name: &str) {
    wait_for("the environment's end", || world.run(&["list"]).contains(" built "));
    wait_for("the environment's end", || {
        let list = world.run(&["list"]);
        !list.lines().any(|line| line.starts_with(&format!("{name} ")) && line.contains("running"))
    });
}

/// Thirty moments (`make soak`: 600). CASEMATE_SEED repeats a run.
#[test]
fn killed_at_any_moment_snapshots_say_what_they_said() {
    let seed = std::env::var("CASEMATE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    let mut random = fastrand::Rng::with_seed(seed);
    println!("CASEMATE_SEED={seed}");

    let mut world = World::with_environment("[runtime]\nnetwork = \"none\"\n");
    write(&world, "first");
    built(&world, "demo");
    let begin = Instant::now();
    world.run(&["commit", "demo"]);
    stored(&world);
    let takes = begin.elapsed();
    let mut model = Model { now: "first".to_owned(), kept: vec![("1".to_owned(), "first".to_owned())] };
    world.run(&["clone", "demo", "clone"]);
    for round in 0..soak(600, 30) {
        let value = format!("value-{round}");
        let operation = ["commit", "restore", "clone", "forget", "gc", "destroy", "commit"][round % 7];
        if ["commit", "restore", "clone"].contains(&operation) {
            write(&world, &value);
            built(&world, "demo");
            model.now = value;
        }
        let name = model.kept[random.usize(..model.kept.len())].0.clone();
        let arguments: Vec<&str> = match operation {
            "commit" => vec!["commit", "demo"],
            "restore" => vec!["restore", "demo", &name],
            "clone" => vec!["clone", "demo", "clone"],
            "forget" => vec!["snapshots", "demo", "--remove", &name],
            "gc" => vec!["gc"],
            _ => vec!["destroy", "clone"],
        };
        if operation == "clone" && listed(&world).contains(&"clone".to_owned()) {
            world.run(&["destroy", "clone"]);
        }
        if operation == "destroy" {
            built(&world, "clone");
        }
        let moment = takes.mul_f64(random.f64());
        let label = format!("CASEMATE_SEED={seed}, round {round}: {arguments:?} killed after {moment:?}");
        let mut command = world.casemate(&arguments);
        let mut client = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("casemate");
        // The moment of the kill is the test's subject, so this waits for time and nothing else.
        let begin = Instant::now();
        while begin.elapsed() < moment {
            std::thread::sleep(Duration::from_millis(1));
        }
        world.kill_daemon();
        world.start_daemon();
        wait_for("the client", || client.try_wait().expect("wait").is_some());

        let now = read(&world, "demo", &label);
        let before: Vec<String> = model.kept.iter().map(|(name, _)| name.clone()).collect();
        let after = names(&world);
        match operation {
            "commit" | "restore" => {
                assert_eq!(after[..before.len()], before[..], "{label}");
                if let [new] = &after[before.len()..] {
                    model.kept.push((new.clone(), model.now.clone()));
                } else {
                    assert_eq!(after.len(), before.len(), "{label}");
                }
            }
            "forget" => model.kept.retain(|(name, _)| after.contains(name)),
            _ => assert_eq!(after, before, "{label}"),
        }
        assert!(model.kept.len() + 1 >= before.len(), "{label}: {before:?}, {after:?}");
        let restored = model.kept.iter().find(|(kept, _)| *kept == name).map(|(_, value)| value.clone());
        if operation == "restore" && Some(&now) == restored.as_ref() {
            model.now = now;
        } else {
            assert_eq!(now, model.now, "{label}");
        }
        if operation == "clone" && listed(&world).contains(&"clone".to_owned()) {
            assert_eq!(read(&world, "clone", &label), model.now, "{label}");
        }
        // Every other time while it is stored.
        if random.bool() {
            stored(&world);
        }
        for (name, value) in &model.kept {
            world.run(&["clone", "demo", "probe", "--snapshot", name]);
            assert_eq!(read(&world, "probe", &label), *value, "{label}: snapshot {name}");
            built(&world, "probe");
            world.run(&["destroy", "probe"]);
        }
        built(&world, "demo");
        stored(&world);
        wait_for("staging to be empty", || world.in_store("staging").is_empty());
        wait_for("sandboxes to be cleared away", || {
            let entries = world.runtime().read_dir().expect("it");
            entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().is_dir())).count() == 0
        });
        nothing_stray(&world, &label);
        if round % 7 == 4 {
            assert!(world.run(&["verify"]).contains("all as it was written"), "{label}");
        }
        if model.kept.is_empty() || model.kept.len() > 3 {
            if let Some((oldest, _)) = model.kept.first() {
                world.run(&["snapshots", "demo", "--remove", oldest]);
                model.kept.remove(0);
            } else {
                world.run(&["commit", "demo", "--name", &format!("again-{round}")]);
                model.kept.push((format!("again-{round}"), model.now.clone()));
                stored(&world);
            }
        }
        if !listed(&world).contains(&"clone".to_owned()) {
            world.run(&["clone", "demo", "clone"]);
        }
    }
}
