//! The bus: what is served is what the XML says, and strangers' tools can use it.

use casemate_tests::{World, text};

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
    let world = World::with_environment("");
    world.run(&["start", "demo"]);
    let mut held = world.casemate(&["exec", "demo", "--", "cat"]);
    let mut held = held.stdin(std::process::Stdio::piped()).spawn().expect("casemate");
    casemate_tests::wait_for("the session", || world.run(&["list"]).contains(" 1 "));
    let objects = gdbus(
        &world,
        &[
            "call",
            "--session",
            "-d",
            "org.casemate.Casemate1",
            "-o",
            "/org/casemate/Casemate1",
            "-m",
            "org.freedesktop.DBus.ObjectManager.GetManagedObjects",
        ],
    );
    let objects = text(&objects.stdout);
    let mut paths = vec!["/org/casemate/Casemate1".to_owned()];
    for kind in ["release", "environment", "job", "process"] {
        let prefix = format!("'/org/casemate/Casemate1/{kind}/");
        let start = objects.find(&prefix).unwrap_or_else(|| panic!("no {kind} in {objects}"));
        paths.push(objects[start + 1..].split('\'').next().expect("a path").to_owned());
    }
    let contract = [
        ("Manager", include_str!("../../interfaces/org.casemate.Casemate1.Manager.xml")),
        ("Release", include_str!("../../interfaces/org.casemate.Casemate1.Release.xml")),
        ("Environment", include_str!("../../interfaces/org.casemate.Casemate1.Environment.xml")),
        ("Job", include_str!("../../interfaces/org.casemate.Casemate1.Job.xml")),
        ("Process", include_str!("../../interfaces/org.casemate.Casemate1.Process.xml")),
    ];
    for ((interface, xml), path) in contract.iter().zip(&paths) {
        let output =
            gdbus(&world, &["introspect", "--session", "--xml", "-d", "org.casemate.Casemate1", "-o", path]);
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
    let served = text(&gdbus(&world, &[&log[..], &["/org/freedesktop/LogControl1"]].concat()).stdout);
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
    let world = World::new();
    let call = |method: &str, arguments: &[&str]| {
        let mut all =
            vec!["call", "--session", "-d", "org.casemate.Casemate1", "-o", "/org/casemate/Casemate1", "-m"];
        let method = format!("org.casemate.Casemate1.Manager.{method}");
        all.push(&method);
        all.extend_from_slice(arguments);
        gdbus(&world, &all)
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
