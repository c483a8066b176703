//! The wall, tried from inside: the checker `escape` (tests/src/escape) makes every attempt it knows in a real environment, as
//! the user and as root; none may succeed. The same attempts are made where the guard that should hold them is switched off,
//! and there they must succeed: else they would show nothing. `ESCAPES.md` lists them all.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use casemate_tests::escapes::{End, Facts, Found, Listed, PathState, Role, Targets, Victim};
use casemate_tests::{World, set_mode, soak, text};

const ESCAPE: &str = env!("CARGO_BIN_EXE_escape");
/// THREATS.md, "Goals in figures".
const AT_LEAST: usize = 120;

fn list() -> Vec<Listed> {
    let output = Command::new(ESCAPE).arg("list").output().expect("escape");
    assert!(output.status.success(), "{}", text(&output.stderr));
    lines(&text(&output.stdout))
}

fn lines<T: serde::de::DeserializeOwned>(told: &str) -> Vec<T> {
    told.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

/// A process of the user's on the host that attempts aim at.
struct Aim {
    process: Child,
    victim: Victim,
}

impl Aim {
    fn new() -> Self {
        let mut process = Command::new(ESCAPE)
            .arg("victim")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("victim");
        let mut line = String::new();
        let told = process.stdout.take().expect("its output");
        BufReader::new(told).read_line(&mut line).expect("its first line");
        Self { process, victim: serde_json::from_str(&line).expect("what it has") }
    }

    fn end(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().expect("its end").success());
    }
}

/// Standard streams that are files of the host's: what is made of them is part of what is tried.
fn with_files(mut command: Command, directory: &Path) -> String {
    let path = |name: &str| directory.join(name);
    fs::write(path("input"), "given\n").expect("input");
    command.stdin(File::open(path("input")).expect("input"));
    command.stdout(File::create(path("output")).expect("output"));
    command.stderr(File::create(path("errors")).expect("errors"));
    let status = command.status().expect("start");
    let read = |name: &str| fs::read_to_string(path(name)).expect("what it told");
    assert!(status.success(), "{command:?}: {status}: {}", read("errors"));
    read("output")
}

fn own_group() -> String {
    let text = fs::read_to_string("/proc/self/cgroup").expect("groups");
    let path = text.lines().find_map(|line| line.strip_prefix("0::")).expect("cgroup v2");
    let mounted = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let root = mounted.into_iter().find(|root| Path::new(root).join("cgroup.procs").exists());
    format!("{}{path}", root.expect("cgroup v2"))
}

fn outside(world: &World, project: &Path, name: &str, victim: &Victim) -> Targets {
    let secret = project.join("secret");
    fs::write(&secret, "the user's").expect("secret");
    set_mode(&secret, 0o600);
    let release: serde_json::Value =
        serde_json::from_str(&world.run(&["release", "show", "debian/bookworm", "--json"])).expect("JSON");
    let layer = world.store().join("layers").join(release["digest"].as_str().expect("digest"));
    let told = |path: &Path| path.display().to_string();
    Targets {
        user: rustix::process::getuid().as_raw(),
        secret: told(&secret),
        outside: told(&secret),
        scratch: "/tmp".into(),
        store: told(&world.store()),
        layer: told(&layer.join("tree/etc/debian_version")),
        runtime: told(&world.runtime()),
        control: told(&world.runtime().join(world.id(name)).join("control")),
        bus: world.bus_address().trim_start_matches("unix:path=").to_owned(),
        group: own_group(),
        host_name: fs::read_to_string("/proc/sys/kernel/hostname").expect("name").trim().to_owned(),
        set_id: "/tmp/set-id".into(),
        capable: "/tmp/capable".into(),
        victim: victim.clone(),
    }
}

/// All attempts in an environment, as one role.
fn inside(world: &World, project: &Path, name: &str, role: Role, targets: &Targets) -> Vec<Found> {
    let targets = Targets { secret: "/workspace/secret".into(), ..targets.clone() };
    let targets = serde_json::to_string(&targets).expect("JSON");
    let command = match role {
        Role::User => world.casemate(&["exec", name, "--", "/workspace/escape", "user", &targets]),
        Role::Root => world.casemate(&["exec", "--root", name, "--", "/workspace/escape", "root", &targets]),
    };
    lines(&with_files(command, project))
}

fn through(found: &[Found]) -> Vec<&str> {
    found.iter().filter(|one| one.end == End::Through).map(|one| one.name.as_str()).collect()
}

/// A running environment with the checker in it, and programs of root's that would make whoever executes them more.
fn prepared(name: &str, network: &str) -> (&'static World, std::path::PathBuf) {
    let (world, project) = World::shared_environment(name, &format!("[runtime]\nnetwork = \"{network}\"\n"));
    fs::copy(ESCAPE, project.join("escape")).expect("copy");
    set_mode(&project.join("escape"), 0o755);
    // Root inside is nobody in a directory that is the user's alone.
    set_mode(&project, 0o755);
    world.run(&["start", name]);
    let output = world.exec(&["--root", name, "--", "/workspace/escape", "prepare", "/tmp"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    (world, project)
}

#[test]
fn no_attempt_succeeds_and_each_would() {
    let listed: BTreeMap<String, Listed> = list().into_iter().map(|one| (one.name.clone(), one)).collect();
    let (world, project) = prepared("escape", "none");
    let aim = Aim::new();
    let targets = outside(world, &project, "escape", &aim.victim);

    let mut tried = BTreeSet::new();
    for role in [Role::User, Role::Root] {
        let found = inside(world, &project, "escape", role, &targets);
        let wanted = listed.values().filter(|one| one.roles.contains(&role)).count();
        assert_eq!(found.len(), wanted, "{role:?}: not all were tried");
        assert_eq!(through(&found), Vec::<&str>::new(), "{role:?} got through");
        tried.extend(found.into_iter().map(|one| one.name));
    }

    let status = text(&world.exec(&["--root", "escape", "--", "cat", "/proc/self/status"]).stdout);
    let bound = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).expect("CapBnd").trim();
    let mut command = Command::new(ESCAPE);
    command.args(["controls", &serde_json::to_string(&targets).expect("JSON"), bound]);
    let controls: Vec<Found> = lines(&with_files(command, &project));
    let bare: BTreeMap<&str, &End> =
        controls.iter().filter(|one| one.alone.is_none()).map(|one| (one.name.as_str(), &one.end)).collect();
    let (mut shown, mut show_nothing) = (0, Vec::new());
    for (name, attempt) in &listed {
        match (bare.get(name.as_str()).expect("a control"), attempt.control.as_str()) {
            (End::Through, _) => shown += 1,
            // This kernel may not have it: it does not count.
            (End::Held(_), "Maybe") => {}
            (End::Held(why), _) => show_nothing.push((name, why)),
        }
    }
    assert!(show_nothing.is_empty(), "these fail without their guard, too: {show_nothing:#?}");
    assert!(shown >= AT_LEAST, "{shown} attempts are shown to bite");
    let unmade = |one: &&Found| matches!(&one.end, End::Held(why) if why.starts_with("no control: "));
    assert_eq!(controls.iter().find(unmade).map(|one| &one.name), None, "its control was not made");
    let alone: Vec<(&str, &str)> = controls
        .iter()
        .filter(|one| one.end == End::Through)
        .filter_map(|one| Some((one.name.as_str(), one.alone.as_deref()?)))
        .collect();
    assert_eq!(alone, Vec::<(&str, &str)>::new(), "one guard does not do for these");
    assert!(tried.is_superset(&listed.keys().cloned().collect()));
    aim.end();
    println!("{} attempts, {shown} of which succeed without their guard", listed.len());
}

#[test]
fn nor_with_the_network_of_the_host() {
    let listed: BTreeMap<String, Listed> = list().into_iter().map(|one| (one.name.clone(), one)).collect();
    let (world, project) = prepared("escape-host", "host");
    let aim = Aim::new();
    let targets = outside(world, &project, "escape-host", &aim.victim);
    for role in [Role::User, Role::Root] {
        let found = inside(world, &project, "escape-host", role, &targets);
        let through: Vec<&str> =
            through(&found).into_iter().filter(|name| listed[*name].host_network).collect();
        assert_eq!(through, Vec::<&str>::new(), "{role:?} got through");
    }
    aim.end();
}

/// As the checker measures them from inside, as the user.
#[test]
fn what_holds_a_session() {
    let (world, project) = prepared("escape-facts", "none");
    let measure = || -> Facts {
        let told = with_files(
            world.casemate(&["exec", "escape-facts", "--", "/workspace/escape", "facts"]),
            &project,
        );
        serde_json::from_str(&told).expect("facts")
    };
    for _ in 0..soak(200, 3) {
        assert_eq!(measure().descriptors, [0, 1, 2]);
    }
    let facts = measure();
    let empty = |set: &&str| facts.capabilities[*set].trim_matches('0').is_empty();
    assert!(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].iter().all(empty), "{:?}", facts.capabilities);
    assert!(facts.no_new_privileges && facts.seccomp_mode == 2, "{facts:?}");
    let open: Vec<_> = facts.paths.iter().filter(|(_, state)| **state == PathState::Writable).collect();
    assert!(open.is_empty(), "{open:?}");
    for (name, inode) in &facts.namespaces {
        let ours = fs::metadata(format!("/proc/self/ns/{name}")).expect("a namespace").ino();
        assert!(*inode != ours || name.starts_with("time"), "{name} is the host's");
    }
    // Init, the checker and nobody else.
    assert_eq!(facts.processes, 2);
}

/// `ESCAPES.md` is what the checker says of itself; `INSTA_UPDATE=always` writes it anew.
#[test]
fn the_list_is_documented() {
    let mut page = String::from(
        "# Ways out that are tried\n\n\
         Written by `tests/cases/escape.rs` from the checker's own list (`tests/src/escape`). Each is tried inside as the user and as \
         root and has to fail; each is tried where its guard is switched off, on the host or in a throwaway of namespaces and full \
         capabilities, and has to succeed there. *Maybe*: only where this kernel has what is tried. Where a call can be given nothing \
         that it takes, reaching the kernel's own check of it is success (`reaches` in `attempt.rs`): the filter then stood in no way.\n\n\
         | attempt | what it tries | precedent | held by | succeeds in |\n| --- | --- | --- | --- | --- |\n",
    );
    for one in list() {
        let row = [&one.name, &one.tries, &one.precedent, &one.guards.join(", "), &one.control];
        page += &format!("| {} |\n", row.map(|cell| cell.replace('|', "\\|")).join(" | "));
    }
    let path = World::shipped().join("ESCAPES.md");
    if std::env::var("INSTA_UPDATE").is_ok_and(|update| update == "always") {
        fs::write(&path, &page).expect("ESCAPES.md");
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "{} is not what the checker says; INSTA_UPDATE=always writes it",
        path.display()
    );
}
