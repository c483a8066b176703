//! Beside podman: the checker of the escape suite measures a session as root, podman's default container was measured by it
//! before (`scripts/podman-facts`), and in nothing may ours be weaker. SECURITY.md has the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use casemate_tests::escapes::{Facts, PathState};
use casemate_tests::{World, set_mode, text};
use serde::Deserialize;

/// Allowed here and refused by podman 4.3, whose list is older than they are; later lists of podman's allow them. See
/// daemon/sandbox/src/syscalls.rs.
const NEWER: &[i64] = &[443, 446, 449, 450, 451, 452, 453, 454, 455, 456];
/// personality(2), asked with every bit set: its argument has 32 bits for the kernel and for our filter, 64 for podman's. The
/// values that are allowed are the same (daemon/sandbox/src/filter_tests.rs).
const BY_VALUE: i64 = 135;
const BEGIN: &str = "<!-- beside podman, written by tests/cases/beside.rs -->\n";
const END: &str = "<!-- end -->\n";

#[derive(Deserialize)]
struct Podman {
    version: String,
    shared_namespaces: BTreeSet<String>,
    facts: Measured,
}

/// [`Facts`] without the namespaces, whose numbers mean nothing later.
#[derive(Deserialize)]
struct Measured {
    capabilities: BTreeMap<String, String>,
    no_new_privileges: bool,
    refused: BTreeSet<i64>,
    paths: BTreeMap<String, PathState>,
    descriptors: Vec<i32>,
    processes: usize,
    writable: BTreeSet<String>,
}

fn measure(world: &World, as_whom: &[&str]) -> Facts {
    let output = world.exec(&[as_whom, &["beside", "--", "/workspace/escape", "facts"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("facts")
}

fn set(facts: &BTreeMap<String, String>, name: &str) -> u64 {
    u64::from_str_radix(&facts[name], 16).expect("a set")
}

fn joined<T: ToString>(list: impl IntoIterator<Item = T>) -> String {
    let words: Vec<String> = list.into_iter().map(|one| one.to_string()).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}

#[test]
fn in_nothing_weaker_than_podman() {
    let (world, project) = World::shared_environment("beside", "[runtime]\nnetwork = \"none\"\n");
    fs::copy(env!("CARGO_BIN_EXE_escape"), project.join("escape")).expect("the checker");
    set_mode(&project.join("escape"), 0o755);
    // Root inside is not the user, who owns it.
    set_mode(&project, 0o755);
    let (ours, user) = (measure(world, &["--root"]), measure(world, &[]));
    let podman = World::shipped().join("tests/fixtures/podman.json");
    let podman: Podman =
        serde_json::from_str(&fs::read_to_string(podman).expect("podman.json")).expect("JSON");
    let theirs = &podman.facts;

    for name in ["CapBnd", "CapEff", "CapPrm", "CapInh", "CapAmb"] {
        let more = set(&ours.capabilities, name) & !set(&theirs.capabilities, name);
        assert_eq!(more, 0, "{name}: {more:x}");
        assert_eq!(set(&user.capabilities, name), 0, "{name} of the user");
    }
    assert!(ours.no_new_privileges >= theirs.no_new_privileges);
    let allowed = theirs.refused.difference(&ours.refused).copied();
    let allowed: Vec<i64> = allowed.filter(|number| *number != BY_VALUE && !NEWER.contains(number)).collect();
    assert_eq!(allowed, Vec::<i64>::new(), "calls that podman refuses");
    let shared: BTreeSet<String> = ours
        .namespaces
        .iter()
        .filter(|(name, inode)| {
            fs::metadata(format!("/proc/self/ns/{name}")).is_ok_and(|own| own.ino() == **inode)
        })
        .map(|(name, _)| name.clone())
        .collect();
    assert!(shared.is_subset(&podman.shared_namespaces), "{shared:?}");
    let weaker: Vec<_> = ours.paths.iter().filter(|(path, state)| **state < theirs.paths[*path]).collect();
    // That a path is missing for podman is its kernel's doing or its own; covered is as good.
    let weaker: Vec<_> = weaker.into_iter().filter(|(_, state)| **state < PathState::Covered).collect();
    assert!(weaker.is_empty(), "{weaker:?}");
    assert_eq!(ours.descriptors, theirs.descriptors);
    // Their command is PID 1 itself; ours has init, which shows nothing, beside it.
    assert!(ours.processes <= theirs.processes + 1);
    // What covers a file is the null device, which takes what is written and gives nothing.
    let own = |points: &BTreeSet<String>, paths: &BTreeMap<String, PathState>| -> BTreeSet<String> {
        points.iter().filter(|point| paths.get(*point) != Some(&PathState::Covered)).cloned().collect()
    };
    let (our_points, their_points) = (own(&ours.writable, &ours.paths), own(&theirs.writable, &theirs.paths));
    let granted = ["/workspace", "/run"];
    let more: Vec<_> =
        our_points.difference(&their_points).filter(|path| !granted.contains(&path.as_str())).collect();
    assert!(more.is_empty(), "{more:?}");

    // Of what is measured the table has what is the same on every kernel; the rest was judged above.
    let writable_paths = |facts: &BTreeMap<String, PathState>| {
        joined(facts.iter().filter(|(_, state)| **state == PathState::Writable).map(|(path, _)| path))
    };
    let rows = [
        (
            "capabilities of root",
            set(&theirs.capabilities, "CapEff").count_ones().to_string(),
            set(&ours.capabilities, "CapEff").count_ones().to_string(),
        ),
        ("no new privileges", theirs.no_new_privileges.to_string(), ours.no_new_privileges.to_string()),
        (
            "system calls refused by number",
            theirs.refused.len().to_string(),
            "those, but for calls that later lists of podman's allow; and more".to_owned(),
        ),
        ("namespaces shared with the host", joined(&podman.shared_namespaces), joined(&shared)),
        (
            "paths of /proc and /sys that tell of the machine, left writable",
            writable_paths(&theirs.paths),
            writable_paths(&ours.paths),
        ),
        ("open descriptors", joined(&theirs.descriptors), joined(&ours.descriptors)),
        ("processes seen", theirs.processes.to_string(), ours.processes.to_string()),
        ("mount points writable", joined(&their_points), joined(&our_points)),
    ];
    let mut table = format!(
        "{BEGIN}| root's session, measured | {} | Casemate |\n| --- | --- | --- |\n",
        podman.version.replace(" version", "")
    );
    for (what, podman, casemate) in rows {
        table += &format!("| {what} | {podman} | {casemate} |\n");
    }
    table += "| root of it is, for the host | the user | a subordinate id |\n";
    table += "| capabilities of the user's own session | as root's | none |\n";
    table += END;
    let path = World::shipped().join("SECURITY.md");
    let page = fs::read_to_string(&path).expect("SECURITY.md");
    let (before, rest) = page.split_once(BEGIN).expect("the table's beginning");
    let (_, after) = rest.split_once(END).expect("the table's end");
    let made = format!("{before}{table}{after}");
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        fs::write(&path, &made).expect("SECURITY.md");
    }
    let page = fs::read_to_string(&path).expect("SECURITY.md");
    assert!(page == made, "SECURITY.md is not what is measured; INSTA_UPDATE=always writes it:\n{table}");
}
