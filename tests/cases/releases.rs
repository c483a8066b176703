//! Releases: the real archive, and archives that are not what they should be.

use std::path::Path;
use std::process::{Command, Stdio};

use casemate_tests::{World, text};

#[test]
fn fetched_releases_are_signed_and_fetched_once() {
    let world = World::with_release();
    let shown = world.run(&["release", "show", "debian/bookworm"]);
    assert!(shown.contains("openpgp:"), "{shown}");
    assert!(world.run(&["release", "fetch", "debian/bookworm"]).contains("up to date"));
    world.run(&["release", "remove", "debian/bookworm"]);
    assert_eq!(world.in_store("layers"), Vec::<String>::new());
    assert!(!world.run(&["release", "list"]).contains("bookworm"));
    assert!(world.refused(&["release", "fetch", "debian/nonesuch"]).contains("no release"));
    assert!(world.refused(&["release", "fetch", "nowhere/bookworm"]).contains("no source"));
}

#[test]
fn a_key_that_did_not_sign_is_no_key() {
    let world = World::new();
    let sources = world.config().join("sources.d");
    std::fs::create_dir_all(&sources).expect("sources.d");
    // A real key of Debian's, but one that signs another suite.
    let key = include_str!("../../keys/debian/debian-archive-trixie-stable.asc");
    std::fs::write(world.config().join("other.asc"), key).expect("key");
    let source = "kind = \"debian-archive\"\nmirrors = [\"apt\"]\nkeyring = [\"other.asc\"]\nsuites = [\"bookworm\"]\n";
    std::fs::write(sources.join("debian.toml"), source).expect("source");
    let error = world.refused(&["release", "fetch", "debian/bookworm"]);
    assert!(error.contains("no valid signature"), "{error}");
    assert_eq!(world.in_store("layers"), Vec::<String>::new());
    assert_eq!(world.in_store("staging"), Vec::<String>::new());
    assert_eq!(world.in_store("releases"), Vec::<String>::new());
}

fn archive(directory: &Path, name: &str, arguments: &[&str]) -> String {
    let path = directory.join(name);
    let status = Command::new("tar")
        .arg("-C")
        .arg(directory)
        .arg("-cf")
        .arg(&path)
        .args(arguments)
        .status()
        .expect("tar");
    assert!(status.success());
    path.display().to_string()
}

#[test]
fn imported_archives() {
    let world = World::new();
    let directory = world.project();
    std::fs::create_dir_all(directory.join("etc")).expect("etc");
    std::fs::write(directory.join("etc/os-release"), "NAME=x\n").expect("file");
    let bad =
        archive(&directory, "bad.tar", &["-P", "--transform", "s,^etc/os-release,../x,", "etc/os-release"]);
    let error = world.refused(&["release", "import", "bad", &bad]);
    assert!(error.contains("../x"), "the member is not named: {error}");
    assert!(world.daemon_log().lines().any(|line| line.contains("failed") && line.contains("../x")));
    for kind in ["layers", "objects", "staging", "uppers", "releases"] {
        assert_eq!(world.in_store(kind), Vec::<String>::new(), "{kind}");
    }
    let good = archive(&directory, "good.tar", &["--owner=0", "--group=0", "etc"]);
    world.run(&["release", "import", "good", &good]);
    assert!(world.run(&["release", "list"]).contains("local/good"));
    assert!(world.refused(&["release", "import", "good", &good]).contains("already"));
    // What bears a source's name was signed by its keys.
    let error = world.refused(&["release", "import", "debian/bookworm", &good]);
    assert!(error.contains("source's name"), "{error}");
    // Out of a pipe, with the same content; and from what is neither.
    let mut piped = world.casemate(&["release", "import", "piped", "/dev/stdin"]);
    let mut piped = piped.stdin(Stdio::piped()).spawn().expect("casemate");
    let mut pipe = piped.stdin.take().expect("a pipe");
    std::io::copy(&mut std::fs::File::open(&good).expect("archive"), &mut pipe).expect("write");
    drop(pipe);
    assert!(piped.wait().expect("casemate").success(), "{}", world.daemon_log());
    let digest = |name: &str| {
        let shown = world.run(&["release", "show", name]);
        shown.lines().find_map(|line| line.strip_prefix("digest")).expect("a digest").to_owned()
    };
    assert_eq!(digest("local/piped"), digest("local/good"));
    for (path, what) in [("/", "is a directory"), ("/dev/null", "is a device")] {
        let error = world.refused(&["release", "import", "odd", path]);
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn trixie_from_end_to_end() {
    let world = World::new();
    world.run(&["release", "fetch", "debian/trixie"]);
    let shown = world.run(&["release", "show", "debian/trixie"]);
    assert!(shown.contains("openpgp:"), "{shown}");
    world.write_manifest_on("debian/trixie", "[system]\npackages = [\"jq\"]\n");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    let inside = |script: &str| {
        let output = world.exec(&["demo", "--", "sh", "-c", script]);
        assert!(output.status.success(), "{script}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(inside("cat /etc/os-release").contains("VERSION_CODENAME=trixie"));
    assert_eq!(inside("echo '{\"a\": [1, 2]}' | jq -c .a"), "[1,2]\n");
    assert_eq!(inside("id -un"), format!("{}\n", std::env::var("USER").expect("USER")));
    let root = world.exec(&["--root", "demo", "--", "dpkg", "--audit"]);
    assert!(root.status.success() && root.stdout.is_empty(), "{}", text(&root.stdout));
}
