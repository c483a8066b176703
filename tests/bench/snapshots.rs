//! Committing, cloning, restoring.

use std::time::Duration;

use casemate_tests::{World, wait_for};

use crate::measure::{Report, series, time};

const ROUNDS: usize = 10;
/// DESIGN.md, "Speed".
const RECORD: Duration = Duration::from_millis(20);

/// 100 MB in 1,000 files, on the disk: what a commit then takes is its own.
const WRITE: &str = "mkdir -p ~/files; cd ~/files; for n in $(seq 1000); do head -c 100000 /dev/urandom > $n; done; sync -f .";

fn built(world: &World, name: &str) {
    wait_for("the environment's end", || {
        let list = world.run(&["list"]);
        list.lines().any(|line| line.starts_with(&format!("{name} ")) && line.contains(" built "))
    });
}

/// The job that hashes is not what the user waits for, nor is it to be in the way of the next round.
fn stored(world: &World) {
    wait_for("all to be stored", || {
        !world.run(&["jobs"]).lines().any(|line| line.contains("store") && line.contains("running"))
    });
}

pub fn measure(world: &World, report: &mut Report) {
    let [mut commit, mut clone, mut restore] = series();
    world.write_manifest("[runtime]\nnetwork = \"none\"\n");
    world.run(&["build", "kept", "--manifest", &world.manifest()]);
    for round in 0..ROUNDS {
        assert!(world.exec(&["kept", "--", "sh", "-c", WRITE]).status.success());
        built(world, "kept");
        let name = format!("snapshot-{round}");
        commit.add(time(&mut world.casemate(&["commit", "kept", "--name", &name])));
        stored(world);
        clone.add(time(&mut world.casemate(&["clone", "kept", "copy"])));
        world.run(&["destroy", "copy"]);
        restore.add(time(&mut world.casemate(&["restore", "kept", &name, "--discard"])));
    }
    let limit = RECORD.as_secs_f64() * 1e3;
    report.bound("commit, 100 MB in 1,000 files", commit.median(), "ms", limit);
    report.bound("clone", clone.median(), "ms", limit);
    report.bound("restore", restore.median(), "ms", limit);
    world.run(&["destroy", "kept"]);
}
