//! What the client prints and how it ends: help, errors, `--json`, terminals, exit codes.
//!
//! Snapshots are in `tests/snapshots/`; `INSTA_UPDATE=always` writes them anew.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use casemate_tests::{World, text};
use serde_json::Value;

fn snapshot(name: &str, text: &str) {
    let mut settings = insta::Settings::clone_current();
    settings.set_snapshot_path("../snapshots");
    settings.set_prepend_module_to_snapshot(false);
    settings.bind(|| insta::assert_snapshot!(name, text));
}

#[test]
fn help() {
    let world = World::shared();
    for arguments in [
        &["--help"][..],
        &["release", "--help"],
        &["build", "--help"],
        &["exec", "--help"],
        &["commit", "--help"],
        &["restore", "--help"],
        &["diff", "--help"],
        &["gc", "--help"],
    ] {
        let output = world.casemate(arguments).output().expect("casemate");
        assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}");
        let name = arguments.join("-").replace("--help", "help");
        snapshot(&name, &text(&output.stdout));
    }
}

#[test]
fn errors() {
    let (world, project) = World::shared_environment("erring", "");
    let manifest = project.join("bad.toml");
    std::fs::write(&manifest, "manifest_version = 1\n[base]\nrelease = \"debian/bookworm\"\n[sytem]\n")
        .expect("file");
    let manifest = manifest.display().to_string();
    let mut seen = String::new();
    for arguments in [
        &["frobnicate"][..],
        &["exec", "erring"],
        &["exec", "nowhere", "--", "true"],
        &["exec", "--env", "LD_PRELOAD=/x.so", "erring", "--", "true"],
        &["enter", "erring"],
        &["show", ""],
        &["restore", "erring", "nonesuch"],
        &["rollback", "erring"],
        &["clone", "erring", "erring"],
        &["rename", "erring", "-"],
        &["thaw", "erring"],
        &["destroy", "nowhere"],
        &["release", "show", "debian/nonesuch"],
        &["release", "show", "no reference"],
        &["release", "fetch", "nowhere/bookworm"],
        &["release", "fetch", "debian/nonesuch"],
        &["release", "import", "x", "/nonesuch.tar"],
        &["build", "bad", "--manifest", &manifest],
        &["build", "bad", "--manifest", "/nonesuch.toml"],
        &["build", ".bad", "--manifest", &manifest],
        &["jobs", "--cancel", "999999"],
    ] {
        let told = world.refused(arguments);
        let shown = arguments.join(" ").replace(&manifest, "bad.toml");
        seen += &format!("$ casemate {shown}\n{}\n", told.replace(&manifest, "bad.toml"));
    }
    snapshot("errors", &seen);
}

#[test]
fn without_a_bus_or_a_daemon() {
    let mut world = World::new();
    let list = world.casemate(&["list"]).env("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonesuch").output();
    let list = list.expect("casemate");
    assert_eq!(list.status.code(), Some(125));
    assert!(text(&list.stderr).contains("cannot reach the session bus"), "{}", text(&list.stderr));
    world.kill_daemon();
    let error = world.refused(&["list"]);
    assert!(error.contains("casemated does not run") && error.contains("systemctl --user start"), "{error}");
    world.start_daemon();
}

/// A value's form: its keys, and of what kind each is.
fn form(value: &Value) -> Value {
    match value {
        Value::Object(fields) => fields.iter().map(|(key, value)| (key.clone(), form(value))).collect(),
        Value::Array(items) => {
            let mut forms: Vec<Value> = items.iter().map(form).collect();
            forms.dedup();
            Value::Array(forms)
        }
        Value::String(_) => "string".into(),
        Value::Number(_) => "number".into(),
        Value::Bool(_) => "bool".into(),
        Value::Null => Value::Null,
    }
}

/// One at a time: while a release is fetched, a second fetch of it is refused.
fn fetching() -> MutexGuard<'static, ()> {
    static FETCHING: Mutex<()> = Mutex::new(());
    FETCHING.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn json() {
    let _one_at_a_time = fetching();
    let (world, project) = World::shared_environment("told", "");
    let manifest = project.join("casemate.toml").display().to_string();
    let mut seen = String::new();
    for arguments in [
        &["list", "--json"][..],
        &["show", "told", "--json"],
        &["commit", "told", "--json", "-m", "told"],
        &["snapshots", "told", "--json"],
        &["restore", "told", "1", "--json"],
        &["diff", "told", "--json"],
        &["clone", "told", "told-again", "--json"],
        &["usage", "--json"],
        &["verify", "--json"],
        &["gc", "--json"],
        &["release", "list", "--json"],
        &["release", "show", "debian/bookworm", "--json"],
        &["release", "fetch", "debian/bookworm", "--json"],
        &["build", "told", "--json", "--manifest", &manifest],
        &["jobs", "--json"],
        &["doctor", "--json"],
    ] {
        let output = world.casemate(arguments).output().expect("casemate");
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        // All of standard output is one value, whatever is told on standard error.
        let mut value: Value = serde_json::from_slice(&output.stdout).expect("JSON alone");
        if let Some(fields) = value.as_object_mut() {
            // How many stages there were depends on what was there before.
            fields.retain(|key, _| !key.starts_with("seconds "));
        }
        let value = serde_json::to_string_pretty(&form(&value)).expect("JSON");
        seen += &format!("$ casemate {}\n{value}\n", arguments.join(" ").replace(&manifest, "casemate.toml"));
    }
    snapshot("json", &seen);
}

/// What a command prints when its standard output and error are a terminal.
/// As `casemate list | head` may find it.
#[test]
fn nobody_reads_to_the_end() {
    let world = World::shared();
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    for arguments in [&["doctor"][..], &["list"], &["list", "--json"]] {
        let writer = writer.try_clone().expect("a copy");
        let output = world.casemate(arguments).stdout(writer).output().expect("casemate");
        assert_eq!(output.status.code(), Some(141), "{arguments:?}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "", "{arguments:?}");
    }
}

fn on_a_terminal(mut command: Command) -> String {
    let pty = nix::pty::openpty(None, None).expect("pty");
    let end = || Stdio::from(pty.slave.try_clone().expect("descriptor"));
    let mut child = command.env("TERM", "xterm").stdout(end()).stderr(end()).spawn().expect("casemate");
    drop((command, pty.slave));
    let mut printed = Vec::new();
    let mut master = std::fs::File::from(pty.master);
    let mut block = [0; 4096];
    // EIO once nobody holds the other end.
    while let Ok(count @ 1..) = master.read(&mut block) {
        printed.extend_from_slice(&block[..count]);
    }
    assert!(child.wait().expect("status").success(), "{}", text(&printed));
    text(&printed)
}

/// Whether there is a sequence that sets a colour or a face.
fn coloured(printed: &str) -> bool {
    printed
        .split("\x1b[")
        .skip(1)
        .any(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m'))
}

#[test]
fn progress_and_colours_are_for_terminals() {
    let _one_at_a_time = fetching();
    let world = World::shared();
    let fetch = || world.casemate(&["release", "fetch", "debian/bookworm"]);
    assert!(on_a_terminal(fetch()).contains("\x1b["), "no progress on a terminal");
    let piped = fetch().output().expect("casemate");
    let printed = text(&piped.stdout) + &text(&piped.stderr);
    assert!(!printed.contains(['\x1b', '\r']) && printed.contains("is up to date"), "{printed}");
    for arguments in [&["--help"][..], &["list"], &["doctor"], &["release", "fetch", "debian/bookworm"]] {
        let mut plain = world.casemate(arguments);
        plain.env("NO_COLOR", "1");
        let printed = on_a_terminal(plain);
        assert!(!coloured(&printed), "{arguments:?}: {printed:?}");
    }
    assert!(coloured("\x1b[1;31mx") && !coloured("\x1b[2K\x1b[1Amm"));
}
