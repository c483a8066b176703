//! What was changed: told, as JSON, as a patch.

use std::io::Write;
use std::process::Stdio;

use casemate_tests::{World, text};
use serde_json::Value;

use super::snapshots::{inside, stored};

fn diff(world: &World, arguments: &[&str]) -> Vec<Value> {
    let mut all = vec!["diff", "changed", "--json"];
    all.extend(arguments);
    serde_json::from_str(&world.run(&all)).expect("JSON")
}

fn of<'a>(differences: &'a [Value], path: &str) -> Option<&'a Value> {
    differences.iter().find(|one| one["path"] == path)
}

#[test]
fn what_was_changed_is_told() {
    let (world, _) = World::shared_environment("changed", "[runtime]\nnetwork = \"none\"\n");
    inside(
        world,
        true,
        "changed",
        "echo one > /srv/file; echo two >> /srv/file; printf 'a\\0b' > /srv/binary",
    );
    world.run(&["commit", "changed"]);
    // Nothing since: also once it is a layer.
    stored(world);
    let since = diff(world, &[]);
    assert!(since.iter().all(|one| !one["path"].as_str().expect("a path").starts_with("/srv")), "{since:?}");
    let script = "cd /srv; echo three >> file; chmod 600 binary; mkdir dir; echo x > 'dir/a b'; ln -s x link; \
                  rm -r /usr/share/doc; mkdir /usr/share/doc; rm /etc/issue; ln -s motd /etc/issue; chown 33 /etc/debian_version";
    inside(world, true, "changed", script);
    inside(world, false, "changed", "echo mine > ~/mine");
    // While it runs, too.
    let mut held = world.casemate(&["exec", "changed", "--", "cat"]);
    let mut held = held.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("casemate");
    held.stdin.as_mut().expect("pipe").write_all(b"up\n").expect("written");
    let found = diff(world, &[]);
    let user = std::env::var("USER").expect("USER");
    let mine = format!("/home/{user}/mine");
    for (path, change) in [
        ("/srv/file", "modified"),
        ("/srv/binary", "mode"),
        ("/srv/dir", "added"),
        ("/srv/dir/a\\x20b", "added"),
        ("/srv/link", "added"),
        ("/etc/issue", "type"),
        ("/etc/debian_version", "mode"),
        ("/usr/share/doc/dpkg", "deleted"),
        (mine.as_str(), "added"),
    ] {
        assert_eq!(of(&found, path).map(|one| &one["change"]), Some(&change.into()), "{path}: {found:?}");
    }
    let binary = of(&found, "/srv/binary").expect("one");
    assert_eq!((&binary["old"]["mode"], &binary["new"]["mode"]), (&"0644".into(), &"0600".into()));
    assert_eq!(of(&found, "/etc/debian_version").expect("one")["new"]["uid"], "33");
    assert_eq!(of(&found, &mine).expect("one")["new"]["uid"], "user");
    // What is as it was, or was only looked at, is no difference.
    assert!(of(&found, "/srv").is_none() && of(&found, "/usr/share/doc").is_none(), "{found:?}");
    assert_eq!(diff(world, &["1"]).len(), found.len(), "a snapshot of the same");
    let told = world.run(&["diff", "changed"]);
    assert!(told.contains("modified   /srv/file\n") && told.contains("(0644 0:0 → 0600 0:0)"), "{told}");
    drop(held.stdin.take());
    held.wait().expect("wait");

    // A patch that git takes, in a tree of the old files.
    let patch = world.casemate(&["diff", "changed", "--patch"]).output().expect("casemate");
    assert!(patch.status.success(), "{}", text(&patch.stderr));
    let tree = tempfile::tempdir().expect("directory");
    std::fs::create_dir(tree.path().join("srv")).expect("srv");
    std::fs::write(tree.path().join("srv/file"), "one\ntwo\n").expect("file");
    let mut git = world.command("git");
    git.current_dir(&tree).args([
        "apply",
        "--include=srv/file",
        "--include=srv/dir/*",
        "--include=srv/link",
        "-",
    ]);
    let mut git = git.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("git");
    git.stdin.take().expect("pipe").write_all(&patch.stdout).expect("written");
    let output = git.wait_with_output().expect("output");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_to_string(tree.path().join("srv/file")).expect("it"), "one\ntwo\nthree\n");
    assert_eq!(std::fs::read_to_string(tree.path().join("srv/dir/a b")).expect("it"), "x\n");
    assert_eq!(std::fs::read_link(tree.path().join("srv/link")).expect("it"), std::path::Path::new("x"));

    assert!(world.refused(&["diff", "changed", "nonesuch"]).contains("no snapshot"));
    // Nobody reads to the end: that is no harm.
    let mut cut = world.command("sh");
    cut.args(["-c", "\"$0\" diff changed --patch | head -c 10"])
        .arg(casemate_tests::binaries().join("casemate"));
    assert!(cut.output().expect("sh").status.success());
    world.run(&["destroy", "changed"]);
}
