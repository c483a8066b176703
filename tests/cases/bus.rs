//! The bus: what is served is what the XML says, and strangers' tools can use it.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use casemate_tests::{World, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const NAME: &str = "org.casemate.Casemate1";
const ROOT: &str = "/org/casemate/Casemate1";

fn gdbus(world: &World, arguments: &[&str]) -> std::process::Output {
    world.command("gdbus").args(arguments).output().expect("gdbus: install libglib2.0-bin")
}

/// The members of an interface, as `gdbus introspect --xml` or a file shows them.
fn members(xml: &str, interface: &str) -> Vec<String> {
    let start = xml
        .find(&format!("<interface name=\"{interface}\">"))
        .unwrap_or_else(|| panic!("{interface} is missing in {xml}"));
    let body = &xml[start..start + xml[start..].find("</interface>").expect("an end")];
    let mut kind = String::new();
    let mut found = Vec::new();
    for line in body.lines().map(str::trim) {
        let attribute = |name: &str| {
            line.split_once(&format!("{name}=\""))
                .and_then(|(_, rest)| rest.split_once('"'))
                .map(|(value, _)| value.to_owned())
        };
        for element in ["method", "signal", "property"] {
            if line.starts_with(&format!("<{element} ")) {
                let name = attribute("name").expect("a name");
                let more = [attribute("type"), attribute("access")].map(Option::unwrap_or_default).join(" ");
                kind = format!("{element} {name}");
                found.push(format!("{kind} {more}"));
            }
        }
        if line.starts_with("<arg ") {
            let direction = attribute("direction").unwrap_or_else(|| "out".into());
            let direction = if kind.starts_with("signal") { String::new() } else { direction };
            // zbus serves no names of what comes out.
            let name = if direction == "out" { None } else { attribute("name") };
            let name = name.unwrap_or_default();
            found.push(format!("{kind} {direction} {name} {}", attribute("type").expect("a type")));
        }
        if line.starts_with("<annotation ") && kind.starts_with("property") {
            let (name, value) = (attribute("name").expect("a name"), attribute("value").expect("a value"));
            found.push(format!("{kind} {name}={value}"));
        }
    }
    found.sort();
    found
}

#[test]
fn the_daemon_serves_what_the_xml_says() {
    let (world, _) = World::shared_environment("served", "");
    let method = format!("{NAME}.Manager.GetEnvironment");
    let found = gdbus(world, &["call", "--session", "-d", NAME, "-o", ROOT, "-m", &method, "served", "{}"]);
    let environment = path(&text(&found.stdout), "environment");
    let mut held = world.casemate(&["exec", "served", "--", "cat"]);
    let mut held = held.stdin(Stdio::piped()).spawn().expect("casemate");
    world.run(&["commit", "served"]);
    let process = environment.replace(&format!("{ROOT}/environment/"), "process/") + "_";
    let managed = || {
        let method = "org.freedesktop.DBus.ObjectManager.GetManagedObjects";
        text(&gdbus(world, &["call", "--session", "-d", NAME, "-o", ROOT, "-m", method]).stdout)
    };
    casemate_tests::wait_for("the session", || managed().contains(&process));
    let objects = managed();
    let mut paths = vec![ROOT.to_owned()];
    for kind in ["release/", "environment/", "job/", &process, "snapshot/"] {
        let prefix = format!("'/org/casemate/Casemate1/{kind}");
        let start = objects.find(&prefix).unwrap_or_else(|| panic!("no {kind} in {objects}"));
        paths.push(objects[start + 1..].split('\'').next().expect("a path").to_owned());
    }
    let contract = [
        ("Manager", include_str!("../../interfaces/org.casemate.Casemate1.Manager.xml")),
        ("Release", include_str!("../../interfaces/org.casemate.Casemate1.Release.xml")),
        ("Environment", include_str!("../../interfaces/org.casemate.Casemate1.Environment.xml")),
        ("Job", include_str!("../../interfaces/org.casemate.Casemate1.Job.xml")),
        ("Process", include_str!("../../interfaces/org.casemate.Casemate1.Process.xml")),
        ("Snapshot", include_str!("../../interfaces/org.casemate.Casemate1.Snapshot.xml")),
    ];
    for ((interface, xml), path) in contract.iter().zip(&paths) {
        let output =
            gdbus(world, &["introspect", "--session", "--xml", "-d", "org.casemate.Casemate1", "-o", path]);
        let served = text(&output.stdout);
        // Child nodes come after the object's own interfaces.
        let end = served.find("<node name=\"").filter(|end| *end > 400).unwrap_or(served.len());
        let served = &served[..end];
        let name = format!("org.casemate.Casemate1.{interface}");
        assert_eq!(members(served, &name), members(xml, &name), "{path}");
        if *interface == "Manager" {
            let manager = "<interface name=\"org.freedesktop.DBus.ObjectManager\">";
            assert!(served.contains(manager), "{served}");
        }
        // Nothing of ours that the contract does not name.
        for line in served.lines().filter(|line| line.contains("<interface name=\"org.casemate")) {
            assert!(line.contains(&name), "{path}: {line}");
        }
    }
    let log = ["introspect", "--session", "--xml", "-d", "org.casemate.Casemate1", "-o"];
    let served = text(&gdbus(world, &[&log[..], &["/org/freedesktop/LogControl1"]].concat()).stdout);
    let changes = "org.freedesktop.DBus.Property.EmitsChangedSignal";
    assert_eq!(
        members(&served, "org.freedesktop.LogControl1"),
        [
            format!("property LogLevel {changes}=false"),
            "property LogLevel s readwrite".to_owned(),
            format!("property LogTarget {changes}=false"),
            "property LogTarget s readwrite".to_owned(),
            format!("property SyslogIdentifier {changes}=const"),
            "property SyslogIdentifier s read".to_owned(),
        ]
    );
    drop(held.stdin.take());
    held.wait().expect("wait");
}

#[test]
fn strangers() {
    let world = World::shared();
    let call = |method: &str, arguments: &[&str]| {
        let mut all =
            vec!["call", "--session", "-d", "org.casemate.Casemate1", "-o", "/org/casemate/Casemate1", "-m"];
        let method = format!("org.casemate.Casemate1.Manager.{method}");
        all.push(&method);
        all.extend_from_slice(arguments);
        gdbus(world, &all)
    };
    let output = call("GetEnvironment", &["", "{}"]);
    assert!(text(&output.stderr).contains("Error.NotFound"), "{}", text(&output.stderr));
    let output = call("FetchRelease", &["debian/bookworm", "{'colour': <'red'>}"]);
    assert!(text(&output.stderr).contains("unknown option \"colour\""), "{}", text(&output.stderr));
    // From a container of its own: another user and pid namespace.
    let inside = world
        .command("unshare")
        .args([
            "--user",
            "--map-current-user",
            "--pid",
            "--fork",
            "gdbus",
            "call",
            "--session",
            "-d",
            "org.casemate.Casemate1",
        ])
        .args(["-o", "/org/casemate/Casemate1", "-m", "org.casemate.Casemate1.Manager.Doctor", "{}"])
        .output()
        .expect("unshare");
    assert!(
        text(&inside.stderr).contains("AccessDenied"),
        "{} {}",
        text(&inside.stdout),
        text(&inside.stderr)
    );
}

/// Start a monitor and wait until it listens; it is for the caller to end.
fn monitor(mut command: Command, first: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a monitor");
    let mut lines = BufReader::new(child.stdout.take().expect("pipe"));
    until(&mut lines, first);
    (child, lines)
}

/// Read to the line that has all of these, separated by blanks.
fn until(lines: &mut impl BufRead, words: &str) -> String {
    loop {
        let mut line = String::new();
        assert_ne!(lines.read_line(&mut line).expect("a line"), 0, "it ended without {words:?}");
        if words.split(' ').all(|word| line.contains(word)) {
            return line;
        }
    }
}

/// The first object path below `kind` in an answer.
fn path(answer: &str, kind: &str) -> String {
    let start = answer.find(&format!("{ROOT}/{kind}/")).unwrap_or_else(|| panic!("no {kind} in {answer:?}"));
    answer[start..].split(['\'', '"']).next().expect("a path").to_owned()
}

fn job_line(path: &str) -> String {
    format!("{path}: {NAME}.Job.Ended ('done',)")
}

#[test]
fn gdbus_lists_builds_executes_and_follows() {
    let (world, project) = World::shared_environment("by-gdbus", "");
    let mut watch = world.command("gdbus");
    watch.args(["monitor", "--session", "--dest", NAME]);
    let (mut watching, mut lines) = monitor(watch, "The name is owned by");

    // A handle is the number of a descriptor that gdbus has from whoever starts it.
    let manifest = std::fs::read_to_string(project.join("casemate.toml")).expect("manifest");
    let manifest = format!("{manifest}[environment]\nBY = \"gdbus\"\n");
    let call =
        format!("exec gdbus call --session -d {NAME} -o {ROOT} -m {NAME}.Manager.Build \"$@\" 3<\"$0\"");
    let built = world
        .command("sh")
        .args(["-c", &call])
        .arg(&project)
        .args(["by-gdbus", &manifest, "3", "{}"])
        .output();
    let built = built.expect("sh");
    assert!(built.status.success(), "{}", text(&built.stderr));
    until(&mut lines, &job_line(&path(&text(&built.stdout), "job")));

    let call = |object: &str, method: &str, more: &[&str]| {
        let mut all = vec!["call", "--session", "-d", NAME, "-o", object, "-m", method];
        all.extend_from_slice(more);
        let output = gdbus(world, &all);
        assert!(output.status.success(), "{method}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let environment = call(ROOT, &format!("{NAME}.Manager.GetEnvironment"), &["by-gdbus", "{}"]);
    let environment = path(&environment, "environment");
    let listed = call(ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects", &[]);
    assert!(listed.contains(&environment) && listed.contains("'Name': <'by-gdbus'>"), "{listed}");

    // Output and status go where gdbus's own answer goes.
    let exec = format!(
        "exec gdbus call --session -d {NAME} -o {environment} -m {NAME}.Environment.Exec \"$0\" 0 1 2 3 '{{}}' 3>&1"
    );
    let mut child = world.command("sh");
    child.args(["-c", &exec, "['sh', '-c', 'cat; echo by $BY; exit 5']"]);
    child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().expect("sh");
    child.stdin.take().expect("pipe").write_all(b"typed\n").expect("written");
    let output = child.wait_with_output().expect("output");
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    for part in ["typed\n", "by gdbus\n", "exit 5\n", "handle 0"] {
        assert!(out.contains(part), "no {part:?} in {out:?} {err}");
    }
    until(
        &mut lines,
        &format!("{environment}_ Process.Exited (true, 5)").replace("/environment/", "/process/"),
    );
    watching.kill().expect("kill");
    watching.wait().expect("wait");
}

/// busctl cannot pass descriptors ("UNIX file descriptor not supported as type"), so it builds and executes nothing.
#[test]
fn busctl_lists_starts_and_follows() {
    let (world, _) = World::shared_environment("by-busctl", "");
    let busctl = |arguments: &[&str]| {
        let output = world.command("busctl").args(["--user", "--json=short"]).args(arguments).output();
        let output = output.expect("busctl: install systemd");
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let listed = busctl(&["call", NAME, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects"]);
    assert!(listed.contains(r#""Name":{"type":"s","data":"by-busctl"}"#), "{listed}");
    let manager = format!("{NAME}.Manager");
    let environment = busctl(&["call", NAME, ROOT, &manager, "GetEnvironment", "sa{sv}", "by-busctl", "0"]);
    let environment = path(&environment, "environment");
    let listed = busctl(&["call", NAME, ROOT, &manager, "ListEnvironments", "a{sv}", "0"]);
    assert!(listed.contains(&format!("\"{environment}\",\"by-busctl\",")), "{listed}");
    let interface = format!("{NAME}.Environment");

    let mut watch = world.command("sh");
    watch.args(["-c", &format!("exec stdbuf -oL busctl --user --json=short monitor {NAME} 2>&1")]);
    let (mut watching, mut lines) = monitor(watch, "Monitoring");
    for (method, state) in [("Start", "running"), ("Stop", "built")] {
        let job = path(&busctl(&["call", NAME, &environment, &interface, method, "a{sv}", "0"]), "job");
        let ended = until(&mut lines, &format!("\"{job}\" \"Ended\""));
        assert!(ended.contains(r#""data":["done"]"#), "{ended}");
        let told = busctl(&["get-property", NAME, &environment, &interface, "State"]);
        assert!(told.contains(&format!("\"{state}\"")), "{told}");
    }
    watching.kill().expect("kill");
    watching.wait().expect("wait");
}

fn python(world: &World, directory: &Path, arguments: &[&str]) -> Command {
    // Ctrl-C works as in a terminal, also where the suite runs in a shell's background, which ignores it. Debian's own Python
    // has Debian's dbus-next.
    let mut command = world.command("env");
    command
        .args(["--default-signal=INT", "/usr/bin/python3"])
        .arg(World::shipped().join("examples/python-client/casemate.py"));
    command.args(arguments).current_dir(directory);
    command
}

#[test]
fn the_python_client_lists_builds_executes_follows_and_cancels() {
    let (world, project) = World::shared_environment("by-python", "[environment]\nBY = \"python\"\n");
    let run = |arguments: &[&str]| {
        let output = python(world, &project, arguments).output().expect("python3");
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let (code, out, err) = run(&["list"]);
    assert!(code == Some(0) && out.contains("by-python built debian/bookworm"), "{out} {err}");
    let (code, out, err) = run(&["build", "by-python-too"]);
    assert_eq!((code, out.as_str()), (Some(0), "by-python-too built\n"), "{err}");
    assert!(err.contains("stage: ") && err.contains("log: layer "), "{err}");
    assert_eq!(run(&["build", "by-python-too"]).1, "by-python-too is up to date\n");

    let mut child =
        python(world, &project, &["exec", "by-python-too", "sh", "-c", "cat; echo by $BY; exit 5"]);
    let child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.expect("python3");
    child.stdin.take().expect("pipe").write_all(b"\0typed\n").expect("written");
    let output = child.wait_with_output().expect("output");
    assert_eq!(
        (text(&output.stdout).as_str(), output.status.code()),
        ("\0typed\nby python\n", Some(5)),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(run(&["exec", "by-python-too", "sh", "-c", "kill -TERM $$"]).0, Some(143));
    let (code, _, err) = run(&["exec", "nowhere", "true"]);
    assert!(code == Some(1) && err.contains("Error.NotFound"), "{err}");

    // Ctrl-C while a job runs.
    let mut fetch = python(world, &project, &["fetch", "debian/trixie"]);
    let mut fetch = fetch.stderr(Stdio::piped()).spawn().expect("python3");
    let mut err = BufReader::new(fetch.stderr.take().expect("pipe"));
    until(&mut err, "stage:");
    kill(Pid::from_raw(i32::try_from(fetch.id()).expect("a pid")), Signal::SIGINT).expect("kill");
    let mut rest = String::new();
    err.read_to_string(&mut rest).expect("its last words");
    assert!(rest.contains("cancelled: cancelled") && rest.contains("Error.Cancelled"), "{rest}");
    assert!(!fetch.wait().expect("status").success());
    assert!(!world.run(&["release", "list"]).contains("trixie"));
}
