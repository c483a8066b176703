//! One byte changed on the way: refused, named, nothing left.

use casemate_tests::World;
use casemate_tests::mirror::{Change, Mirror};

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

fn refused(change: Change, named: &[&str]) {
    let mirror = Mirror::start(change);
    let world = world(&mirror);
    let error = world.refused(&["release", "fetch", "debian/bookworm"]);
    for name in named {
        assert!(error.contains(name), "{name:?} is not in: {error}");
    }
    // The log line is all that is left.
    let log = world.daemon_log();
    let told =
        log.lines().any(|line| line.contains("failed") && named.iter().all(|name| line.contains(name)));
    assert!(told, "{named:?} are not in one line of: {log}");
    for kind in ["layers", "objects", "staging", "uppers", "releases"] {
        assert_eq!(world.in_store(kind), Vec::<String>::new(), "{kind}");
    }
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
