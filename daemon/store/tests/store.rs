//! A store on a real file system: who may open it, what records survive, what damage is told.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use casemate_store::{Digest, Error, Id, Name, ReleaseName, SnapshotName, Store, StoreMode};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    number: u64,
    layers: Vec<Digest>,
    labels: BTreeMap<String, String>,
}

fn record(number: u64) -> Record {
    let labels = [("text".to_owned(), "two\nlines, ünïcode, \"quotes\" and checksum = \"x\"".to_owned())];
    Record { number, layers: vec![Digest::of(b"a"), Digest::of(b"b")], labels: labels.into() }
}

fn open(path: &Path) -> Store {
    Store::open(path, StoreMode::Range).unwrap()
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn a_new_store_is_laid_out_and_private() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("a/b/store");
    let store = open(&path);
    let mut names: Vec<_> =
        std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(
        names,
        [
            "environments",
            "layers",
            "lock",
            "objects",
            "releases",
            "snapshots",
            "staging",
            "uppers",
            "version"
        ]
    );
    for entry in std::iter::once(path.clone()).chain(names.iter().map(|name| path.join(name))) {
        assert_eq!(std::fs::metadata(&entry).unwrap().mode() & 0o077, 0, "{}", entry.display());
    }
    assert_eq!(store.mode(), StoreMode::Range);
    assert!(store.free_bytes().unwrap() > 0);
    store.sync().unwrap();
    drop(store);
    // Once more, and what others opened up is closed again.
    std::fs::set_permissions(path.join("layers"), std::fs::Permissions::from_mode(0o755)).unwrap();
    open(&path);
    assert_eq!(std::fs::metadata(path.join("layers")).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn one_at_a_time() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let Err(Error::Locked { holder, .. }) = Store::open(home.path(), StoreMode::Range) else { panic!() };
    assert_eq!(holder.pid, Some(std::process::id()));
    assert!(holder.start_time.is_some());
    assert!(Store::open(home.path(), StoreMode::Range).unwrap_err().to_string().contains("process"));
    drop(store);
    // What a dead holder left is no lock.
    std::fs::write(home.path().join("lock"), "1 1\n").unwrap();
    open(home.path());
}

#[test]
fn another_stores_format_or_mode_is_refused() {
    let home = tempfile::tempdir().unwrap();
    drop(open(home.path()));
    let error = Store::open(home.path(), StoreMode::Single).unwrap_err();
    assert!(matches!(error, Error::Mode { store_has_range: true, .. }));
    assert!(error.to_string().contains("purge"));
    let version = home.path().join("version");
    let body = "format = 3\nids = \"range\"\nnew = true\n";
    std::fs::write(&version, format!("checksum = \"{}\"\n{body}", Digest::of(body.as_bytes()))).unwrap();
    let error = Store::open(home.path(), StoreMode::Range).unwrap_err();
    assert!(matches!(error, Error::Format { found: 3, expected: 2, .. }));
    assert!(error.to_string().contains("newer"));
    let mut bytes = std::fs::read(&version).unwrap();
    bytes[90] ^= 1;
    std::fs::write(&version, bytes).unwrap();
    assert!(matches!(Store::open(home.path(), StoreMode::Range).unwrap_err(), Error::Damaged { .. }));
}

#[test]
fn an_older_store_is_brought_up_to_date() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    store.environments().commit(&name("one"), &record(1)).unwrap();
    drop(store);
    let version = home.path().join("version");
    let body = "format = 1\nids = \"range\"\n";
    let text = format!("checksum = \"{}\"\n{body}", Digest::of(body.as_bytes()));
    std::fs::write(&version, &text).unwrap();
    // Not by one who may not open it.
    assert!(matches!(Store::open(home.path(), StoreMode::Single).unwrap_err(), Error::Mode { .. }));
    assert_eq!(std::fs::read_to_string(&version).unwrap(), text);
    assert_eq!(open(home.path()).environments::<Name, Record>().load(&name("one")).unwrap(), record(1));
    assert!(std::fs::read_to_string(&version).unwrap().contains("format = 2\nids = \"range\"\n"));
    open(home.path());
}

#[test]
fn a_directory_of_somebody_elses_is_left_alone() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("thesis.tex"), "").unwrap();
    let error = Store::open(home.path(), StoreMode::Range).unwrap_err();
    assert!(matches!(&error, Error::NotAStore { found, .. } if found == "thesis.tex"), "{error}");
    assert!(!home.path().join("objects").exists());
    // A store that lost its version is not made a new one.
    let other = tempfile::tempdir().unwrap();
    drop(open(other.path()));
    std::fs::remove_file(other.path().join("version")).unwrap();
    assert!(matches!(Store::open(other.path(), StoreMode::Range).unwrap_err(), Error::NotAStore { .. }));
    std::os::unix::fs::symlink("/etc", home.path().join("link")).unwrap();
    assert!(Store::open(&home.path().join("link"), StoreMode::Range).is_err());
}

#[test]
fn records_live_and_die() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let records = store.environments::<Name, Record>();
    let (one, two) = (name("one"), name("two"));
    assert!(matches!(records.load(&one), Err(Error::Missing { .. })));
    records.create(&one, &record(1)).unwrap();
    assert!(matches!(records.create(&one, &record(2)), Err(Error::Exists { .. })));
    assert_eq!(records.load(&one).unwrap(), record(1));
    records.commit(&one, &record(2)).unwrap();
    records.commit(&two, &record(3)).unwrap();
    assert!(matches!(records.rename(&one, &two), Err(Error::Exists { .. })));
    records.rename(&one, &name("three")).unwrap();
    assert!(!records.exists(&one).unwrap());
    assert_eq!(records.load(&name("three")).unwrap(), record(2));
    std::fs::write(home.path().join("environments/.two.swp"), "").unwrap();
    let list = records.list().unwrap();
    assert_eq!(list.names, [name("three"), name("two")]);
    assert_eq!(list.foreign, [".two.swp"]);
    records.remove(&two).unwrap();
    assert!(matches!(records.remove(&two), Err(Error::Missing { .. })));
    assert!(matches!(records.rename(&two, &one), Err(Error::Missing { .. })));
    assert_eq!(std::fs::read_dir(home.path().join("staging")).unwrap().count(), 0);
}

#[test]
fn every_kind_has_its_names() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let release: ReleaseName = "debian/bookworm".parse().unwrap();
    store.releases().commit(&release, &record(1)).unwrap();
    assert!(home.path().join("releases/debian@bookworm.toml").exists());
    assert_eq!(store.releases::<ReleaseName, Record>().list().unwrap().names, [release]);
    let id = Id::random().unwrap();
    let snapshot = SnapshotName { environment: id, snapshot: name("before") };
    store.snapshots().commit(&snapshot, &record(2)).unwrap();
    assert_eq!(store.snapshots::<SnapshotName, Record>().list().unwrap().names, [snapshot]);
    store.environments().commit(&id, &record(3)).unwrap();
    assert_eq!(store.environments::<Id, Record>().load(&id).unwrap(), record(3));
}

#[test]
fn every_flipped_bit_of_a_record_is_told() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let records = store.environments::<Name, Record>();
    let key = name("one");
    records.commit(&key, &record(1)).unwrap();
    let path = home.path().join("environments/one.toml");
    let good = std::fs::read(&path).unwrap();
    for bit in 0..good.len() * 8 {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &bytes).unwrap();
        let error = records.load(&key).unwrap_err();
        assert!(matches!(error, Error::Damaged { .. } | Error::Malformed { .. }), "bit {bit}: {error}");
        assert!(error.to_string().contains("one.toml"));
    }
    for length in 0..good.len() {
        std::fs::write(&path, &good[..length]).unwrap();
        assert!(records.load(&key).is_err(), "cut to {length}");
    }
    std::fs::write(&path, &good).unwrap();
    assert_eq!(records.load(&key).unwrap(), record(1));
    // A record is no link to somewhere else, and nothing to wait for.
    std::fs::rename(&path, home.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(home.path().join("elsewhere"), &path).unwrap();
    assert!(records.load(&key).is_err());
}

#[test]
fn staging_is_each_jobs_own() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let staging = store.staging(&name("job-1")).unwrap();
    assert!(matches!(store.staging(&name("job-1")), Err(Error::Exists { .. })));
    assert_eq!(staging.relative(None), "staging/job-1");
    assert_eq!(staging.relative(Some(&name("tree"))), "staging/job-1/tree");
    std::fs::create_dir(staging.path().join("tree")).unwrap();
    staging.open_child(&name("tree")).unwrap();
    std::os::unix::fs::symlink("/etc", staging.path().join("link")).unwrap();
    assert!(staging.open_child(&name("link")).is_err());
    let mut spool = std::fs::File::from(staging.spool().unwrap());
    spool.write_all(b"x").unwrap();
    assert_eq!(std::fs::read_dir(staging.path()).unwrap().count(), 2, "a spool has no name");
    drop(store);
    std::fs::write(home.path().join("staging/record-7"), "half").unwrap();
    std::fs::create_dir(home.path().join("staging/.odd")).unwrap();
    let store = open(home.path());
    let leftovers = store.leftovers().unwrap();
    assert_eq!(leftovers.names, ["staging/job-1"]);
    assert_eq!(leftovers.foreign, [".odd"]);
}

#[test]
fn layers_and_uppers_are_found() {
    let home = tempfile::tempdir().unwrap();
    let store = open(home.path());
    let listing = b"casemate-listing 1\nd 0755 0 0 0.000000000 .\n";
    let digest = Digest::of(listing);
    let path = store.layer_path(&digest);
    assert!(matches!(store.check_listing(&digest), Err(Error::Missing { .. })));
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("listing"), listing).unwrap();
    store.check_listing(&digest).unwrap();
    std::fs::write(path.join("listing"), b"other").unwrap();
    assert!(matches!(store.check_listing(&digest), Err(Error::Damaged { .. })));
    std::fs::create_dir(home.path().join("layers/not-a-digest")).unwrap();
    let layers = store.layers().unwrap();
    assert_eq!((layers.names, layers.foreign), (vec![digest], vec!["not-a-digest".to_owned()]));
    let id = Id::random().unwrap();
    std::fs::create_dir(store.upper_path(&id)).unwrap();
    assert_eq!(store.uppers().unwrap().names, [id]);
    assert_eq!(store.upper_path(&id), PathBuf::from(home.path()).join(casemate_store::upper(&id)));
}
