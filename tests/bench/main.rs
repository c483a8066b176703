//! `make bench`: Casemate beside its peers, in one run, on one file system, as an ordinary user. Runs of both sides
//! alternate, so that what else the machine does hits both; what is told is the ratio of the medians.
//!
//! A table goes to standard error, one JSON object for each line of it to standard output. A budget that is missed is said
//! and does not fail: a busy machine is no defect. Arguments choose: `exec`, `streams`, `network`, `import`, `snapshots`, `list`,
//! `idle`; none is all.

mod daemon;
mod exec;
mod import;
mod measure;
mod peers;
mod snapshots;
mod streams;

use std::time::Duration;

use casemate_tests::World;
use measure::Report;

fn main() {
    // `cargo bench` adds an argument of its own.
    let chosen: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let known = ["exec", "streams", "network", "import", "snapshots", "list", "idle"];
    if let Some(word) = chosen.iter().find(|word| !known.contains(&word.as_str())) {
        eprintln!("bench: there is no {word:?}; there are {known:?}");
        std::process::exit(2);
    }
    let wanted = |name: &str| chosen.is_empty() || chosen.iter().any(|word| word == name);
    let mut report = Report::default();
    let mut world = World::with_release();
    // A network as the peers are given: a namespace with nothing in it. `connected` has the default, which starts pasta.
    for (name, manifest) in [
        ("running", "[runtime]\nnetwork = \"none\"\n"),
        ("stopped", "[runtime]\nnetwork = \"none\"\n"),
        ("connected", ""),
    ] {
        world.write_manifest(manifest);
        world.run(&["build", name, "--manifest", &world.manifest()]);
    }
    world.run(&["start", "running"]);
    if wanted("exec") {
        exec::running(&world, &mut report);
        exec::stopped(&world, &mut report);
    }
    if wanted("streams") {
        streams::terminal(&world, &mut report);
        streams::pipes(&world, &mut report);
        streams::start_and_stop(&world, &mut report);
    }
    if wanted("network") {
        streams::network(&world, &mut report);
    }
    if wanted("import") {
        import::measure(&world, &mut report);
    }
    if wanted("snapshots") {
        snapshots::measure(&world, &mut report);
    }
    world.run(&["stop", "running"]);
    if wanted("list") {
        daemon::list(&mut world, &mut report);
    }
    if wanted("idle") {
        // Longer than the daemon's own clock ever was.
        daemon::idle(&mut world, &mut report, Duration::from_secs(40));
    }
    report.table();
}
