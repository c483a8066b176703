//! What a mirror may do to whoever asks it. One byte changed on the way, or an index of former times: refused, named, nothing
//! left. Where it sends on to is its own affair.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use casemate_tests::mirror::Mirror;
use casemate_tests::signer::Signer;
use casemate_tests::{World, text};

fn flip(body: &mut [u8]) {
    let middle = body.len() / 2;
    body[middle] ^= 1;
}

/// A world that knows one mirror only, and has downloaded nothing yet.
fn world(mirror: &Mirror) -> World {
    let certificate = mirror.certificate();
    let cache = certificate.with_file_name("cache");
    let world = World::with(&[
        ("SSL_CERT_FILE", &certificate.display().to_string()),
        ("XDG_CACHE_HOME", &cache.display().to_string()),
    ]);
    world.know_only(mirror);
    world
}

fn refused(change: fn(&str, &mut Vec<u8>), named: &[&str]) {
    let mirror = Mirror::start(change);
    let world = world(&mirror);
    refuses(&world, named);
    for kind in ["layers", "objects", "staging", "uppers", "releases"] {
        assert_eq!(world.in_store(kind), Vec::<String>::new(), "{kind}");
    }
}

/// The log line is all that it leaves.
fn refuses(world: &World, named: &[&str]) {
    let before = world.daemon_log().len();
    let error = world.refused(&["release", "fetch", "debian/bookworm"]);
    for name in named {
        assert!(error.contains(name), "{name:?} is not in: {error}");
    }
    let log = world.daemon_log().split_off(before);
    let told =
        log.lines().any(|line| line.contains("failed") && named.iter().all(|name| line.contains(name)));
    assert!(told, "{named:?} are not in one line of: {log}");
}

#[test]
fn what_is_unchanged_is_taken() {
    let mirror = Mirror::start(|_, _| {});
    let world = world(&mirror);
    world.run(&["release", "fetch", "debian/bookworm"]);
    assert!(world.run(&["release", "list"]).contains("bookworm"));
}

#[test]
fn a_changed_release_index() {
    refused(
        |path, body| {
            if path.ends_with("InRelease") {
                // In the text that is signed, not in the signature's armour.
                let place = body.windows(7).position(|seven| seven == b"SHA256:").expect("hashes") + 9;
                body[place] = if body[place] == b'0' { b'1' } else { b'0' };
            }
        },
        &["InRelease", "signature"],
    );
}

#[test]
fn a_changed_package_index() {
    refused(
        |path, body| {
            if path.contains("/binary-") {
                flip(body);
            }
        },
        &["Packages"],
    );
}

#[test]
fn a_changed_package() {
    refused(
        |path, body| {
            if path.contains("/base-files_") {
                flip(body);
            }
        },
        &["base-files"],
    );
}

/// Signed as it should be, but of a day before the last one seen.
#[test]
fn an_index_of_former_times() {
    let signer = Signer::new();
    let keys = tempfile::tempdir().expect("directory");
    signer.publish(keys.path());
    let replayed = Arc::new(AtomicBool::new(false));
    let mirror = {
        let replayed = Arc::clone(&replayed);
        // No two signatures are the same, so each is made once.
        let signed = [const { OnceLock::<Vec<u8>>::new() }; 2];
        Mirror::start(move |path, body| {
            if path.ends_with("InRelease") {
                let (index, day) = match replayed.load(Ordering::SeqCst) {
                    true => (0, "Wed, 01 Jan"),
                    false => (1, "Sat, 01 Feb"),
                };
                let dated = |line: &str| match line.starts_with("Date: ") {
                    true => format!("Date: {day} 2025 10:00:00 UTC\n"),
                    false => format!("{line}\n"),
                };
                let sign = || signer.sign_instead(body, |text| text.lines().map(dated).collect());
                let signed = signed[index].get_or_init(sign);
                body.clone_from(signed);
            }
        })
    };
    let mut world = World::with(&[("SSL_CERT_FILE", &mirror.certificate().display().to_string())]);
    world.know_only_by(&mirror, keys.path());
    world.run(&["release", "fetch", "debian/bookworm"]);
    assert!(world.run(&["release", "fetch", "debian/bookworm"]).contains("up to date"));

    let state = |world: &World| {
        let names = ["layers", "objects", "staging", "uppers", "releases"].map(|kind| world.in_store(kind));
        (names, world.run(&["release", "show", "debian/bookworm"]))
    };
    let before = state(&world);
    replayed.store(true, Ordering::SeqCst);
    // Both days, in seconds since 1970.
    let named = ["InRelease", "replays an old index", "1735725600", "1738404000"];
    refuses(&world, &named);
    assert!(state(&world) == before, "{}", world.run(&["release", "show", "debian/bookworm"]));

    // What was seen was seen, also when the release is gone and by a daemon that did not see it.
    world.run(&["release", "remove", "debian/bookworm"]);
    world.kill_daemon();
    world.start_daemon();
    refuses(&world, &named);
    for kind in ["layers", "staging", "uppers"] {
        assert_eq!(world.in_store(kind), Vec::<String>::new(), "{kind}");
    }
    assert!(!world.run(&["release", "list"]).contains("bookworm"));
}

/// What a shell would do something about, in places where a URL may have it.
const WORDS: &str =
    "x';touch$IFS/redirected;echo$IFS'$(touch$IFS/redirected)&&%60touch%20/redirected%60|%0a%1b[2J";

#[test]
fn where_it_sends_on_to_is_no_mirror_of_ours() {
    let mirror =
        Mirror::redirecting(|path| (!path.contains("redirected")).then(|| format!("/debian/{WORDS}/{path}")));
    let world = World::with(&[("SSL_CERT_FILE", &mirror.certificate().display().to_string())]);
    world.know_only(&mirror);
    world.run(&["release", "fetch", "debian/bookworm"]);
    world.write_manifest("");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    let inside = |script: &str| text(&world.exec(&["demo", "--", "sh", "-c", script]).stdout);
    assert_eq!(inside("ls -d /redirected* /*/redirected* 2>/dev/null"), "");
    let source = format!("deb https://{}/debian bookworm main\n", mirror.authority());
    assert_eq!(inside("cat /etc/apt/sources.list"), source);
    let records =
        std::fs::read_to_string(world.store().join("releases/debian@bookworm.toml")).expect("a record");
    assert!(records.contains(&mirror.authority()) && !records.contains("redirected"), "{records}");
    // Nor has the image's own package manager, which is sent on as well, anything of it to tell.
    world.write_manifest("[system]\npackages = [\"jq\"]\n");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    let lock = std::fs::read_to_string(world.project().join("casemate.lock")).expect("a lock");
    assert!(lock.contains(&mirror.authority()) && !lock.contains("redirected"), "{lock}");
    assert_eq!(inside("ls -d /redirected* /*/redirected* 2>/dev/null"), "");
    assert!(inside("jq --version").starts_with("jq-"));
}
