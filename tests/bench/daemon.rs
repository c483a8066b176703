//! Many environments, and none in use.

use std::fs;
use std::path::Path;
use std::time::Duration;

use casemate_tests::World;

use crate::measure::{Report, series, time};

const ROUNDS: usize = 40;

/// Records of as many environments as are wanted: the built ones, and copies of one of them but for id and name.
fn populate(world: &mut World, wanted: usize) {
    let directory = world.store().join("environments");
    world.kill_daemon();
    let records = || fs::read_dir(&directory).expect("records").map(|entry| entry.expect("entry").path());
    for copy in records().filter(|path| content(path).contains("name = \"copy-")) {
        fs::remove_file(copy).expect("remove");
    }
    let model = records().find(|path| content(path).contains("name = \"stopped\"")).expect("a record");
    let model = content(&model);
    for number in records().count()..wanted {
        let body = model.replace("name = \"stopped\"", &format!("name = \"copy-{number}\""));
        let checksum = blake3::hash(body.as_bytes());
        let path = directory.join(format!("{number:032x}.toml"));
        fs::write(path, format!("checksum = \"{checksum}\"\n{body}")).expect("record");
    }
    world.start_daemon();
    let count = world.run(&["list"]).lines().count() - 1;
    assert_eq!(count, wanted, "environments listed");
}

fn content(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("record");
    text.split_once('\n').expect("a checksum").1.to_owned()
}

pub fn list(world: &mut World, report: &mut Report) {
    let [mut few, mut many] = series();
    populate(world, 10);
    for _ in 0..ROUNDS {
        few.add(time(&mut world.casemate(&["list"])));
    }
    populate(world, 1_000);
    for _ in 0..ROUNDS {
        many.add(time(&mut world.casemate(&["list"])));
    }
    report.ratio("list, 1,000 environments", &many, "list, 10 environments", &few, Some(3.0));
    report.bound("list, 1,000 environments", many.median(), "ms", 50.0);
}

fn status(pid: u32, field: &str) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("tasks");
    let read = |path: std::path::PathBuf| {
        let text = fs::read_to_string(path.join("status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    tasks.map(|task| read(task.expect("task").path())).sum()
}

/// What the daemon costs when nobody asks it anything. The harness gives it neither watchdog nor idle exit.
pub fn idle(world: &mut World, report: &mut Report, watched: Duration) {
    populate(world, 100);
    let pid = world.daemon_pid();
    let switches = || status(pid, "voluntary_ctxt_switches") + status(pid, "nonvoluntary_ctxt_switches");
    // What listing them caused is over when it has slept twice as long as it puts changes together.
    std::thread::sleep(Duration::from_millis(500));
    let before = switches();
    std::thread::sleep(watched);
    report.bound("idle, wake-ups", (switches() - before) as f64, &format!("in {} s", watched.as_secs()), 0.0);
    let statm = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let resident = statm.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kilobytes: f64 = resident.trim().trim_end_matches(" kB").parse().expect("number");
    report.bound("idle, resident, 100 environments", kilobytes / 1024.0, "MiB", 16.0);
}
