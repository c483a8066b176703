//! Commit, snapshots, restore, rollback, clone, rename, freeze, archive: what is kept, what is shared, what goes.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::Stdio;

use casemate_tests::{World, text, wait_for};
use serde_json::Value;

const NETWORK: &str = "[runtime]\nnetwork = \"none\"\n";

/// Run a script inside and see it succeed.
pub fn inside(world: &World, root: bool, environment: &str, script: &str) -> String {
    let mut arguments = if root { vec!["--root"] } else { vec![] };
    arguments.extend([environment, "--", "sh", "-c", script]);
    let output = world.exec(&arguments);
    assert!(output.status.success(), "{script}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn write(world: &World, environment: &str, content: &str) {
    inside(world, false, environment, &format!("echo {content} > ~/file"));
}

fn read(world: &World, environment: &str) -> String {
    inside(world, false, environment, "cat ~/file").trim().to_owned()
}

/// Nothing is left to be hashed.
pub fn stored(world: &World) {
    wait_for("all to be stored", || {
        let jobs = world.run(&["jobs", "--json"]);
        let jobs: Value = serde_json::from_str(&jobs).expect("JSON");
        let jobs = jobs.as_array().expect("a list");
        !jobs.iter().any(|job| job["kind"] == "store" && job["state"] == "running")
    });
}

pub fn snapshots(world: &World, environment: &str) -> Vec<Value> {
    let shown = world.run(&["snapshots", environment, "--json"]);
    serde_json::from_str(&shown).expect("JSON")
}

fn state(world: &World, environment: &str) -> String {
    let shown: Value = serde_json::from_str(&world.run(&["show", environment, "--json"])).expect("JSON");
    shown["state"].as_str().expect("a state").to_owned()
}

/// All that can be told of what is in an environment, by its root. What init mounts there is left out, and homes, which are
/// closed to it. Counts of links are the store's, so that names of one file are told otherwise.
const TELL: &str = r#"
cd /
find . -xdev \( -path ./etc/hosts -o -path ./etc/hostname -o -path ./etc/resolv.conf -o -path ./usr/local/bin/sudo \
        -o -path ./run -o -path ./dev -o -path ./proc -o -path ./sys -o -path ./workspace -o -path './home/*' \) -prune \
    -o -type d -printf '%p %y %m %U %G %T@\n' -o -printf '%p %y %m %U %G %T@ %s %l\n' | LC_ALL=C sort
find srv etc var/lib/dpkg -xdev -type f ! -path etc/hosts ! -path etc/hostname ! -path etc/resolv.conf -print0 |
    LC_ALL=C sort -z | xargs -0 sha256sum
find srv -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m - 2>/dev/null
find srv -print0 | LC_ALL=C sort -z | xargs -0 getfacl -n 2>/dev/null
getcap -r srv
[ ! -e srv/many ] || { stat -c %i srv/many/first srv/many/deep/second srv/third | uniq | wc -l; du -k srv/sparse; }
"#;

/// And what the user has there, which is nobody's inside.
const TELL_OWN: &str = r#"cd; find . -printf '%p %y %m %u %g %T@\n' | LC_ALL=C sort; find . -type f -exec sha256sum {} +; stat -c %i too mine/file | uniq | wc -l"#;

/// By the environment's root: files of all its ids, and whatever else a file system has.
const MAKE: &str = r#"
set -e
cd /srv
mkdir -p many/deep empty
echo one > many/first; ln many/first many/deep/second; ln many/first third
echo secret > closed; chmod 000 closed
mkdir locked; echo in > locked/in; chmod 000 locked
touch owned-by-33 owned-by-last; chown 33:34 owned-by-33; chown 65534:65534 owned-by-last
printf content > capable; chmod 755 capable; setcap cap_net_raw+ep capable
printf content > set-id; chmod 6755 set-id; chown 1:2 set-id; chmod 6755 set-id
echo x > attributes; setfattr -n user.note -v value attributes; setfattr -n user.note empty
setfacl -m u:33:rw,g:34:r attributes; setfacl -d -m u:33:rwx many
truncate -s 50M sparse; printf middle | dd of=sparse bs=1 seek=20M conv=notrunc status=none
mkfifo fifo; ln -s /nowhere/at/all link; ln -s "$(printf 'a\nb')" odd-link
printf x > "$(printf 'a\377\n\\ =')"
perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0); bind(S, sockaddr_un("socket")) or die'
rm -r /usr/share/doc; mkdir /usr/share/doc; echo new > /usr/share/doc/new
rm /etc/issue /usr/bin/dpkg-split; rm -r /usr/share/man
chmod 700 /etc/skel; chown 33 /etc/debian_version; echo more >> /etc/motd
chmod 1755 /
touch -d '2001-02-03 04:05:06.123456789' many/first many empty
"#;

#[test]
fn everything_survives_commit_and_restore() {
    let world = World::with_environment(&format!(
        "{NETWORK}[system]\npackages = [\"acl\", \"attr\", \"libcap2-bin\"]\n"
    ));
    let before = inside(&world, true, "demo", TELL);
    inside(&world, true, "demo", MAKE);
    inside(
        &world,
        false,
        "demo",
        "mkdir ~/mine; echo mine > ~/mine/file; chmod 600 ~/mine/file; ln ~/mine/file ~/too",
    );
    let (made, own) = (inside(&world, true, "demo", TELL), inside(&world, false, "demo", TELL_OWN));
    assert!(
        made.contains("cap_net_raw=ep") && made.contains("user:33:rw-") && made.contains("user.note"),
        "{made}"
    );
    assert_ne!(made, before);
    let same = |environment: &str, when: &str| {
        let told = [inside(&world, true, environment, TELL), inside(&world, false, environment, TELL_OWN)];
        for (told, expected) in told.iter().zip([&made, &own]) {
            let at = told.lines().zip(expected.lines()).position(|(a, b)| a != b).unwrap_or_default();
            let near = |text: &str| text.lines().skip(at).take(3).collect::<Vec<_>>().join(" / ");
            assert!(told == expected, "{when}: {} is not {}", near(told), near(expected));
        }
    };

    world.run(&["commit", "demo", "-m", "all of it"]);
    stored(&world);
    assert_eq!(snapshots(&world, "demo")[0]["state"], "stored");
    same("demo", "on the layer that the upper became");
    inside(
        &world,
        true,
        "demo",
        "rm -rf /srv/* /home/*/mine /etc/skel; chmod 755 /; echo other > /srv/other",
    );
    world.run(&["commit", "demo"]);
    // Also before it is hashed: on the sealed upper.
    world.run(&["restore", "demo", "1"]);
    same("demo", "restored");
    stored(&world);
    same("demo", "restored, and all is stored");
    world.run(&["clone", "demo", "twin", "--snapshot", "1"]);
    same("twin", "cloned");
    // The user's own stay theirs.
    assert_eq!(inside(&world, false, "demo", "echo more >> ~/mine/file; cat ~/mine/file"), "mine\nmore\n");
    world.run(&["restore", "demo", "2"]);
    assert_eq!(inside(&world, true, "demo", "ls /srv; stat -c %a /"), "other\n755\n");
}

#[test]
fn snapshots_come_and_go() {
    let world = World::with_environment(NETWORK);
    assert!(snapshots(&world, "demo").is_empty());
    assert!(world.refused(&["rollback", "demo"]).contains("no snapshot"));
    write(&world, "demo", "first");
    assert_eq!(world.run(&["commit", "demo", "-m", "the first"]), "demo committed as 1\n");
    write(&world, "demo", "second");
    world.run(&["commit", "demo", "--name", "tested"]);
    write(&world, "demo", "third");
    assert!(world.refused(&["commit", "demo", "--name", "tested"]).contains("already"));
    assert!(world.refused(&["commit", "demo", "--name", "../x"]).contains("no name"));
    assert!(world.refused(&["restore", "demo", "9"]).contains("no snapshot"));

    // What was there is kept; what is kept already is not kept twice.
    assert_eq!(world.run(&["restore", "demo", "1"]), "demo is 1 again; what it was is 3\n");
    assert_eq!(read(&world, "demo"), "first");
    stored(&world);
    let told = world.run(&["restore", "demo", "3", "--json"]);
    let told: Value = serde_json::from_str(&told).expect("JSON");
    assert_eq!(read(&world, "demo"), "third");
    // Reading may have written: then that is kept. `kept` is what it is called.
    let kept = told.get("kept").map(|name| name.as_str().expect("a name").to_owned());
    assert_eq!(world.run(&["rollback", "demo", "--discard"]), "demo is tested again\n");
    assert_eq!(read(&world, "demo"), "second");
    let names: Vec<String> = snapshots(&world, "demo")
        .iter()
        .map(|one| one["name"].as_str().expect("a name").to_owned())
        .collect();
    let expected: Vec<String> =
        ["1", "tested", "3"].into_iter().map(str::to_owned).chain(kept.clone()).collect();
    assert_eq!(names, expected);
    let automatic = &snapshots(&world, "demo")[2];
    assert_eq!(
        (&automatic["automatic"], &automatic["message"]),
        (&Value::Bool(true), &"before 1 was restored".into())
    );

    // A snapshot goes with what it alone names.
    stored(&world);
    let layers = world.in_store("layers").len();
    world.run(&["snapshots", "demo", "--remove", "3"]);
    if let Some(name) = kept {
        world.run(&["snapshots", "demo", "--remove", &name]);
    }
    assert!(world.in_store("layers").len() < layers, "{:?}", world.in_store("layers"));
    assert!(world.refused(&["restore", "demo", "3"]).contains("no snapshot"));
    world.run(&["restore", "demo", "1", "--discard"]);
    assert_eq!(read(&world, "demo"), "first");

    // A release that is removed, and a rebuild, leave what snapshots name.
    world.write_manifest("[runtime]\nnetwork = \"none\"\n[environment]\nREBUILT = \"yes\"\n");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    assert_eq!(read(&world, "demo"), "first", "what was committed stays on top");
    world.run(&["release", "remove", "debian/bookworm"]);
    world.run(&["restore", "demo", "tested"]);
    assert_eq!(read(&world, "demo"), "second");
    assert_eq!(inside(&world, false, "demo", "echo $REBUILT"), "\n", "the manifest of that time");

    world.run(&["destroy", "demo"]);
    stored(&world);
    for kind in ["environments", "snapshots", "uppers", "layers", "staging"] {
        wait_for(kind, || world.in_store(kind).is_empty());
    }
}

#[test]
fn clones_are_their_own() {
    let mut world = World::with_environment(NETWORK);
    write(&world, "demo", "shared");
    world.run(&["commit", "demo"]);
    write(&world, "demo", "uncommitted");
    world.run(&["clone", "demo", "twin"]);
    assert!(world.refused(&["clone", "demo", "twin"]).contains("already"));
    assert!(world.refused(&["clone", "demo", "a/b"]).contains("no name"));
    assert_eq!((read(&world, "demo"), read(&world, "twin")), ("uncommitted".into(), "uncommitted".into()));
    write(&world, "twin", "other");
    assert_eq!((read(&world, "demo"), read(&world, "twin")), ("uncommitted".into(), "other".into()));
    assert!(snapshots(&world, "twin").is_empty(), "snapshots stay with the first");
    assert_ne!(world.id("demo"), world.id("twin"));

    // What a running one has mounted stays there until it stops, whoever stores it. Much to hash, so that it is still
    // sealed when it is mounted.
    inside(&world, false, "twin", "mkdir ~/many; cd ~/many; for n in $(seq 5000); do echo $n > $n; done");
    world.run(&["commit", "twin"]);
    world.run(&["start", "twin"]);
    world.run(&["clone", "demo", "third"]);
    stored(&world);
    let record = world.store().join(format!("environments/{}.toml", world.id("twin")));
    let record = std::fs::read_to_string(record).expect("a record");
    let commits = record.lines().find(|line| line.starts_with("commits = ")).expect("commits").to_owned();
    let mounted = world.in_store("uppers").into_iter().filter(|upper| commits.contains(upper)).count();
    assert!(mounted > 0 && commits.matches("uppers/").count() == mounted, "{commits}");
    world.run(&["destroy", "demo"]);
    assert_eq!(read(&world, "twin"), "other");
    world.kill_daemon();
    world.start_daemon();
    assert_eq!((read(&world, "twin"), read(&world, "third")), ("other".into(), "uncommitted".into()));
    world.run(&["stop", "twin"]);
    stored(&world);
    assert_eq!(read(&world, "twin"), "other");
    // Each has an upper of its own, and nothing else is left of them.
    wait_for("the sealed uppers to go", || world.in_store("uppers").len() == 2);

    assert_eq!(world.run(&["rename", "third", "renamed"]), "third is renamed now\n");
    assert!(world.refused(&["show", "third"]).contains("no environment"));
    assert!(world.refused(&["rename", "renamed", "twin"]).contains("already"));
    assert_eq!(read(&world, "renamed"), "uncommitted");
    world.run(&["start", "renamed"]);
    assert!(world.refused(&["rename", "renamed", "other"]).contains("is running"));
}

/// More commits than one wants to have on each other (`make soak`: more than overlayfs takes lowers).
#[test]
fn deep_stacks_become_flat() {
    let world = World::with_environment(NETWORK);
    inside(&world, true, "demo", "mkdir /srv/dir; echo old > /srv/dir/old; rm -r /usr/share/doc");
    let rounds = casemate_tests::soak(520, 30);
    for round in 0..rounds {
        let script = format!(
            "echo {round} > /srv/{round}; rm -f /srv/$(({round} - 3)); rm -r /srv/dir; mkdir /srv/dir; echo {round} > /srv/dir/file"
        );
        inside(&world, true, "demo", &script);
        world.run(&["commit", "demo"]);
    }
    wait_for("the stack to be flat", || {
        stored(&world);
        let record = world.store().join(format!("environments/{}.toml", world.id("demo")));
        let record = std::fs::read_to_string(record).expect("a record");
        let commits = record.lines().find(|line| line.starts_with("commits = ")).expect("commits").to_owned();
        commits.matches("layers/").count() <= 24 && !commits.contains("uppers/")
    });
    let last = rounds - 1;
    let told =
        inside(&world, true, "demo", "cd /srv; ls; cat dir/file; ls dir; ls /usr/share/doc || echo none");
    assert_eq!(told, format!("{}\n{}\n{last}\ndir\n{last}\nfile\nnone\n", last - 2, last - 1));
    // Each snapshot still has its own.
    world.run(&["restore", "demo", "10", "--discard"]);
    assert_eq!(inside(&world, true, "demo", "cat /srv/dir/file"), "9\n");
}

#[test]
fn frozen_and_archived_environments() {
    let mut world = World::with_environment(NETWORK);
    write(&world, "demo", "kept");
    assert!(world.refused(&["archive", "demo"]).contains("casemate freeze"));
    world.run(&["freeze", "demo"]);
    assert_eq!(state(&world, "demo"), "frozen");
    world.run(&["commit", "demo"]);
    let manifest = world.manifest();
    let changes: [&[&str]; 6] = [
        &["exec", "demo", "--", "true"],
        &["start", "demo"],
        &["restore", "demo", "1"],
        &["rollback", "demo"],
        &["destroy", "demo"],
        &["freeze", "demo"],
    ];
    for arguments in changes {
        let told = world.refused(arguments);
        assert!(told.contains("is frozen") && told.contains("casemate thaw"), "{arguments:?}: {told}");
    }
    world.write_manifest("[environment]\nOTHER = \"1\"\n");
    assert!(world.refused(&["build", "demo", "--manifest", &manifest]).contains("is frozen"));
    world.run(&["archive", "demo"]);
    for arguments in changes {
        let told = world.refused(arguments);
        assert!(told.contains("is archived") && told.contains("casemate unarchive"), "{arguments:?}: {told}");
    }
    // Whatever else happens, it is there.
    world.run(&["release", "remove", "debian/bookworm"]);
    world.kill_daemon();
    world.start_daemon();
    assert_eq!(state(&world, "demo"), "archived");
    world.run(&["clone", "demo", "twin"]);
    assert_eq!(read(&world, "twin"), "kept");
    world.run(&["unarchive", "demo"]);
    assert_eq!(state(&world, "demo"), "frozen");
    assert!(world.refused(&["unarchive", "demo"]).contains("not archived"));
    world.run(&["thaw", "demo"]);
    assert_eq!(read(&world, "demo"), "kept");
}

fn init_of(world: &World, environment: &str) -> String {
    let state = world.runtime().join(world.id(environment)).join("state.toml");
    let told = std::fs::read_to_string(state).expect("a state file");
    told.lines().find_map(|line| line.strip_prefix("pid = ")).expect("a pid").to_owned()
}

fn group_of(process: &str) -> PathBuf {
    let groups = std::fs::read_to_string(format!("/proc/{process}/cgroup")).expect("cgroup");
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup v2").to_owned();
    let root = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    root.into_iter().find(|root| root.join("cgroup.controllers").exists()).expect("cgroup v2").join(own)
}

#[test]
fn a_running_environment_stands_still_while_it_is_copied() {
    let mut world = World::with_environment(NETWORK);
    // Two files that are always written one after the other.
    let script =
        "cd; echo up; n=0; until [ -e /workspace/go ]; do n=$((n+1)); echo $n > a; echo $n > b; done; exit 7";
    let mut command = world.casemate(&["exec", "demo", "--", "sh", "-c", script]);
    let mut session = command.stdout(Stdio::piped()).spawn().expect("casemate");
    let mut out = BufReader::new(session.stdout.take().expect("pipe"));
    let mut line = String::new();
    out.read_line(&mut line).expect("a line");
    for round in 1..=5 {
        world.run(&["commit", "demo"]);
        assert_eq!(state(&world, "demo"), "running");
        let name = format!("copy-{round}");
        world.run(&["clone", "demo", &name, "--snapshot", &round.to_string()]);
        // Cut off between truncation and write, one of them may be empty; never do they differ by more than a step.
        let told = inside(&world, false, &name, "cat a; echo; cat b");
        let (a, b) = told.split_once("\n\n").unwrap_or((told.trim(), ""));
        let number = |text: &str| text.trim().parse::<i64>().ok();
        if let (Some(a), Some(b)) = (number(a), number(b)) {
            assert!((0..=1).contains(&(a - b)), "{told:?}");
        }
    }
    world.run(&["clone", "demo", "now"]);
    stored(&world);
    assert!(snapshots(&world, "demo").iter().all(|one| one["state"] == "stored"));
    // One that was paused before is paused after.
    world.run(&["pause", "demo"]);
    world.run(&["commit", "demo"]);
    assert_eq!(state(&world, "demo"), "paused");
    world.run(&["unpause", "demo"]);
    assert!(world.refused(&["restore", "demo", "1"]).contains("is running"));

    // A daemon that dies while it has everything frozen leaves it to the next one.
    let init = init_of(&world, "demo");
    let group = group_of(&init);
    world.kill_daemon();
    std::fs::write(world.runtime().join(world_id(&world)).join("copying"), "").expect("a mark");
    std::fs::write(group.join("cgroup.freeze"), "1").expect("freeze");
    world.start_daemon();
    assert_eq!(state(&world, "demo"), "running", "{}", world.daemon_log());
    assert!(std::fs::read_to_string(group.join("cgroup.events")).expect("events").contains("frozen 0"));

    // Without a group of its own it could be copied only while it is written to.
    let daemons = group_of(&world.daemon_pid().to_string());
    std::fs::write(daemons.join("cgroup.procs"), &init).expect("move");
    world.kill_daemon();
    world.start_daemon();
    for arguments in [&["commit", "demo"][..], &["clone", "demo", "later"]] {
        let told = world.refused(arguments);
        assert!(told.contains("control group") && told.contains("casemate stop"), "{told}");
    }
    std::fs::write(world.project().join("go"), "").expect("go");
    line.clear();
    out.read_to_string(&mut line).expect("the rest");
    assert_eq!(session.wait().expect("wait").code(), Some(7));
    wait_for("its end", || state(&world, "demo") == "built");
    world.run(&["commit", "demo"]);
    wait_for("what no copy needs any more", || world.in_store("staging").is_empty());
}

/// Also where no daemon answers.
fn world_id(world: &World) -> String {
    let names = world.in_store("environments");
    let of = |name: &&String| {
        let path = world.store().join("environments").join(name);
        std::fs::read_to_string(path).expect("a record").contains("name = \"demo\"\n")
    };
    names.iter().find(of).expect("demo").trim_end_matches(".toml").to_owned()
}

#[test]
fn a_damaged_snapshot_is_named_and_can_be_removed() {
    let mut world = World::with_environment(NETWORK);
    write(&world, "demo", "first");
    world.run(&["commit", "demo"]);
    world.run(&["commit", "demo", "--name", "other"]);
    stored(&world);
    world.kill_daemon();
    let record = world.store().join(format!("snapshots/{}@1.toml", world_id(&world)));
    let mut bytes = std::fs::read(&record).expect("a record");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&record, bytes).expect("a record");
    // No record that can be read names it; nobody knows whether the damaged one did.
    let upper = world.store().join("uppers/00000000000000000000000000000000");
    std::fs::create_dir_all(upper.join("upper")).expect("an upper");
    world.start_daemon();
    let list = snapshots(&world, "demo");
    assert!(list.iter().any(|one| one["name"] == "1" && one["state"] == "damaged"), "{list:?}");
    let told = world.refused(&["restore", "demo", "1"]);
    assert!(told.contains("@1.toml") && told.contains("snapshots --remove"), "{told}");
    world.run(&["restore", "demo", "other"]);
    assert_eq!(read(&world, "demo"), "first");
    assert!(upper.exists(), "swept while a record is damaged");
    world.run(&["snapshots", "demo", "--remove", "1"]);
    world.kill_daemon();
    world.start_daemon();
    assert!(!upper.exists());
}
