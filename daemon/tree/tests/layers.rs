//! Trees become layers, layers are verified, everything can be removed: without a sandbox, by the user alone.

use std::fs::{File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use casemate_store::listing::{Entry, Node, Reader};
use casemate_store::{Digest, Store, StoreMode};
use casemate_worker::protocol::{Failure, FailureKind, NewUpper, TreeRequest, TreeResult};

struct Fixture {
    home: tempfile::TempDir,
    store: Store,
}

fn touch(path: &Path, seconds: i64) {
    let times = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT },
        last_modification: rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 123_456_789 },
    };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

impl Fixture {
    fn new() -> Self {
        // The worker's own; files made before its first call shall have the same modes as those after.
        rustix::process::umask(0.into());
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store"), StoreMode::Single).unwrap();
        Self { home, store }
    }

    fn work(&self, request: &TreeRequest) -> Result<TreeResult, Failure> {
        let fd: OwnedFd = self.store.directory().try_clone_to_owned().unwrap();
        casemate_tree::work(&fd, request, &mut std::io::sink(), &mut |_, _| ())
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.store.root().join(relative)
    }

    /// A tree at `staging/JOB/tree`.
    fn staged(&self, job: &str, make: impl FnOnce(&Path)) -> String {
        let staging = self.store.staging(&job.parse().unwrap()).unwrap();
        let tree = staging.path().join("tree");
        std::fs::create_dir(&tree).unwrap();
        make(&tree);
        touch(&tree, 1_000_000_000);
        format!("staging/{job}/tree")
    }

    fn ingest(&self, path: &str) -> (Digest, u64) {
        match self.work(&TreeRequest::Ingest { path: path.to_owned() }).unwrap() {
            TreeResult::Ingested { digest, new_objects, .. } => (digest.parse().unwrap(), new_objects),
            other => panic!("{other:?}"),
        }
    }

    fn listing(&self, digest: &Digest) -> Vec<Entry> {
        let file = File::open(self.store.layer_path(digest).join("listing")).unwrap();
        let mut reader = Reader::new(std::io::BufReader::new(file)).unwrap();
        let mut entries = Vec::new();
        while let Some(entry) = reader.read().unwrap() {
            entries.push(entry);
        }
        assert_eq!(reader.digest(), *digest);
        entries
    }

    fn verify(&self, digest: &Digest) -> Vec<String> {
        match self.work(&TreeRequest::Verify { layer: digest.to_string() }).unwrap() {
            TreeResult::Verified { damage, .. } => damage,
            other => panic!("{other:?}"),
        }
    }
}

/// Everything that a user can make.
fn make(tree: &Path) {
    let file = |name: &str, content: &[u8], mode: u32| {
        std::fs::write(tree.join(name), content).unwrap();
        std::fs::set_permissions(tree.join(name), Permissions::from_mode(mode)).unwrap();
        touch(&tree.join(name), 1_100_000_000);
    };
    for directory in ["bin", "bin/sub", "empty", "opaque"] {
        std::fs::create_dir(tree.join(directory)).unwrap();
    }
    file("bin/su", b"su", 0o4755);
    file("bin/sub/x", b"x", 0o600);
    file("bin-after", b"sorts after the directory", 0o644);
    file("nothing", b"", 0o644);
    file("nothing-either", b"", 0o644);
    file("big", &vec![7; 3 << 20], 0o644);
    file("secret", b"mode 000", 0o400);
    file("with space", b"odd", 0o644);
    std::fs::write(tree.join(std::ffi::OsStr::from_bytes(b"\xff\n")), b"odd").unwrap();
    std::fs::hard_link(tree.join("bin/su"), tree.join("su-too")).unwrap();
    std::fs::hard_link(tree.join("bin/su"), tree.join("bin/sub/su")).unwrap();
    symlink("/etc/absolute", tree.join("link")).unwrap();
    touch(&tree.join("link"), 1_200_000_000);
    rustix::fs::mknodat(rustix::fs::CWD, tree.join("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
        .unwrap();
    std::os::unix::net::UnixListener::bind(tree.join("socket")).unwrap();
    set_xattr(&tree.join("big"), "user.note", b"a\0b");
    set_xattr(&tree.join("big"), "user.overlay.origin", b"mount's");
    set_xattr(&tree.join("bin"), "user.overlay.impure", b"y");
    set_xattr(&tree.join("opaque"), "user.overlay.opaque", b"y");
    for directory in ["bin/sub", "bin", "empty", "opaque"] {
        touch(&tree.join(directory), 1_300_000_000);
    }
    for name in [&b"\xff\n"[..], b"fifo", b"socket"] {
        touch(&tree.join(std::ffi::OsStr::from_bytes(name)), 1_400_000_000);
    }
}

fn node<'a>(entries: &'a [Entry], path: &[u8]) -> &'a Node {
    &entries.iter().find(|entry| entry.path == path).unwrap_or_else(|| panic!("{}", path.escape_ascii())).node
}

#[test]
fn a_tree_becomes_a_layer() {
    let fixture = Fixture::new();
    let path = fixture.staged("one", make);
    let (digest, new) = fixture.ingest(&path);
    assert!(!fixture.path(&path).exists(), "it moved");
    let entries = fixture.listing(&digest);
    assert_eq!(new, 8, "equal files are one object: {entries:#?}");
    let layer = fixture.store.layer_path(&digest);

    let Node::File { meta, size, content } = node(&entries, b"bin/su") else { panic!() };
    assert_eq!((meta.mode, *size, *content), (0o4755, 2, Digest::of(b"su")));
    assert_eq!((meta.mtime.seconds, meta.mtime.nanoseconds), (1_100_000_000, 123_456_789));
    let Node::HardLink { target } = node(&entries, b"bin/sub/su") else { panic!() };
    assert_eq!(target, b"bin/su");
    assert_eq!(*node(&entries, b"su-too"), Node::HardLink { target: b"bin/su".to_vec() });
    let inode = |path: &str| std::fs::symlink_metadata(layer.join("tree").join(path)).unwrap().ino();
    assert_eq!(inode("bin/su"), inode("su-too"));
    assert_eq!(inode("nothing"), inode("nothing-either"));
    assert!(
        matches!(node(&entries, b"nothing-either"), Node::File { .. }),
        "not linked in the tree that came"
    );
    assert!(matches!(node(&entries, b"opaque"), Node::Directory { opaque: true, .. }));
    let Node::File { meta, .. } = node(&entries, b"big") else { panic!() };
    assert_eq!(meta.xattrs.len(), 1, "marks of one mount are gone: {meta:?}");
    let mut buffer = [0; 256];
    let length = rustix::fs::listxattr(layer.join("tree/big"), &mut buffer[..]).unwrap();
    assert!(!buffer[..length].escape_ascii().to_string().contains("origin"));
    let Node::Directory { meta, opaque: false } = node(&entries, b"bin") else { panic!() };
    assert_eq!(meta.mtime.seconds, 1_300_000_000);
    assert!(meta.xattrs.is_empty());
    let Node::Symlink { meta, target } = node(&entries, b"link") else { panic!() };
    assert_eq!((&target[..], meta.mtime.seconds), (&b"/etc/absolute"[..], 1_200_000_000));
    assert!(matches!(node(&entries, b"fifo"), Node::Fifo { .. }));
    assert!(matches!(node(&entries, b"socket"), Node::Socket { .. }));
    assert_eq!(std::fs::metadata(layer.join("tree/bin")).unwrap().mtime(), 1_300_000_000);
    assert_eq!(fixture.verify(&digest), [""; 0]);
    fixture.store.check_listing(&digest).unwrap();
}

#[test]
fn the_same_tree_is_the_same_layer() {
    let fixture = Fixture::new();
    let (first, _) = fixture.ingest(&fixture.staged("one", make));
    let (second, new) = fixture.ingest(&fixture.staged("two", make));
    assert_eq!((first, new), (second, 0));
    assert_eq!(fixture.store.layers().unwrap().names, [first]);
    // Known objects replace files, which changes directories' times: they must be put back.
    let (third, new) = fixture.ingest(&fixture.staged("three", |tree| {
        make(tree);
        std::fs::write(tree.join("one-more"), "one more").unwrap();
    }));
    assert_ne!(third, first);
    assert_eq!(new, 1);
    let tree = fixture.store.layer_path(&third).join("tree");
    for directory in ["bin", "bin/sub", "empty"] {
        assert_eq!(std::fs::metadata(tree.join(directory)).unwrap().mtime(), 1_300_000_000, "{directory}");
    }
    let inode = |digest: &Digest, path: &str| {
        std::fs::metadata(fixture.store.layer_path(digest).join("tree").join(path)).unwrap().ino()
    };
    assert_eq!(inode(&third, "big"), inode(&first, "big"));
    assert_eq!(inode(&third, "bin/su"), inode(&third, "su-too"), "hard links follow");
    assert_eq!(fixture.verify(&third), [""; 0]);
    assert_eq!(fixture.verify(&first), [""; 0]);
    // Jobs leave nothing but their own directory.
    for job in ["one", "two", "three"] {
        assert_eq!(std::fs::read_dir(fixture.path("staging").join(job)).unwrap().count(), 0, "{job}");
    }
}

#[test]
fn a_sealed_upper_stays_where_it_is() {
    let fixture = Fixture::new();
    let upper = "uppers/00112233445566778899aabbccddeeff";
    let children = vec!["upper".to_owned(), "work".to_owned()];
    fixture.work(&TreeRequest::Prepare { path: upper.to_owned(), children }).unwrap();
    make(&fixture.path(upper).join("upper"));
    touch(&fixture.path(upper).join("upper"), 1_000_000_000);
    let (digest, _) = fixture.ingest(&format!("{upper}/upper"));
    assert!(fixture.path(upper).join("upper/bin/su").exists());
    assert_eq!(fixture.verify(&digest), [""; 0]);
    assert_eq!(
        fixture.listing(&digest).len(),
        fixture.listing(&fixture.ingest(&fixture.staged("a", make)).0).len()
    );
    let ino = |path: PathBuf| std::fs::metadata(path).unwrap().ino();
    let tree = fixture.store.layer_path(&digest).join("tree");
    assert_eq!(ino(fixture.path(upper).join("upper/big")), ino(tree.join("big")), "not a copy");
    assert_eq!(fixture.store.leftovers().unwrap().names, ["staging/a"]);
    // Once more, as after a crash between the rename and the record.
    assert_eq!(fixture.ingest(&format!("{upper}/upper")).0, digest);
}

/// What an upper has beside what [`make`] makes.
fn make_upper(tree: &Path) {
    use rustix::fs::{CWD, FileType};
    make(tree);
    // A default ACL, set when there was something in there already: user::rwx, group::---, other::---.
    let entries: [u64; 3] = [1 | 7 << 16, 4, 0x20];
    let acl: Vec<u8> = [2u32.to_le_bytes().to_vec()]
        .into_iter()
        .chain(entries.map(|entry| (entry | 0xffff_ffff << 32).to_le_bytes().to_vec()))
        .flatten()
        .collect();
    set_xattr(&tree.join("bin"), "system.posix_acl_default", &acl);
    rustix::fs::mknodat(CWD, tree.join("deleted"), FileType::CharacterDevice, 0.into(), 0).unwrap();
    let sparse = File::create(tree.join("sparse")).unwrap();
    sparse.write_all_at(b"begin", 0).unwrap();
    sparse.write_all_at(b"middle", 5 << 20).unwrap();
    sparse.set_len(50 << 20).unwrap();
    for name in ["sparse", "."] {
        touch(&tree.join(name), 1_500_000_000);
    }
}

#[test]
fn a_copy_is_the_same_in_everything_that_a_layer_keeps() {
    let fixture = Fixture::new();
    let upper = "uppers/00112233445566778899aabbccddeeff";
    let children = vec!["upper".to_owned(), "work".to_owned()];
    fixture.work(&TreeRequest::Prepare { path: upper.to_owned(), children }).unwrap();
    make_upper(&fixture.path(upper).join("upper"));
    let to = "uppers/ffeeddccbbaa99887766554433221100/upper";
    let copy = || TreeRequest::Copy { from: format!("{upper}/upper"), to: to.to_owned() };
    let TreeResult::Copied { entries, .. } = fixture.work(&copy()).unwrap() else { panic!() };
    assert_eq!(entries, 16);
    let sparse = std::fs::metadata(fixture.path(to).join("sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "{} blocks", sparse.blocks());
    let inode = |path: &str| std::fs::symlink_metadata(fixture.path(path)).unwrap().ino();
    assert_ne!(inode(&format!("{to}/big")), inode(&format!("{upper}/upper/big")), "a copy");
    assert_eq!(inode(&format!("{to}/su-too")), inode(&format!("{to}/bin/su")), "hard links follow");
    assert_eq!(std::fs::read_dir(fixture.path(to).parent().unwrap()).unwrap().count(), 1, "only the copy");
    let of_copy = fixture.listing(&fixture.ingest(to).0);
    let of_original = fixture.listing(&fixture.ingest(&format!("{upper}/upper")).0);
    for (copied, original) in of_copy.iter().zip(&of_original) {
        assert_eq!(copied, original);
    }
    assert_eq!(of_copy.len(), of_original.len());
    assert!(matches!(node(&of_copy, b"deleted"), Node::Whiteout));
    assert!(matches!(node(&of_copy, b"opaque"), Node::Directory { opaque: true, .. }));
    assert!(fixture.work(&copy()).is_err(), "never over something");
    assert!(fixture.store.leftovers().unwrap().names.is_empty());
}

#[test]
fn a_fresh_upper_has_the_root_of_what_is_below_it() {
    let fixture = Fixture::new();
    let (digest, _) = fixture.ingest(&fixture.staged("one", |tree| {
        std::fs::set_permissions(tree, Permissions::from_mode(0o1770)).unwrap();
        set_xattr(tree, "user.note", b"kept");
        set_xattr(tree, "user.overlay.opaque", b"y");
    }));
    let path = "uppers/00112233445566778899aabbccddeeff".to_owned();
    let like = format!("layers/{digest}/tree");
    let request = TreeRequest::Uppers { make: vec![NewUpper { path: path.clone(), like: like.clone() }] };
    fixture.work(&request).unwrap();
    let upper = fixture.path(&path).join("upper");
    let meta = std::fs::metadata(&upper).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o1770, 1_000_000_000));
    let mut buffer = [0; 256];
    let length = rustix::fs::listxattr(&upper, &mut buffer[..]).unwrap();
    let names = buffer[..length].escape_ascii().to_string();
    assert!(names.contains("user.note") && !names.contains("overlay"), "{names}");
    assert!(fixture.path(&path).join("work").is_dir());
    assert!(fixture.work(&request).is_err(), "never twice");
    for (path, like) in
        [("uppers/../version", &*like), ("uppers/x", "releases/x"), ("uppers/x", "layers/gone")]
    {
        let make = vec![NewUpper { path: path.to_owned(), like: like.to_owned() }];
        assert!(fixture.work(&TreeRequest::Uppers { make }).is_err(), "{path} {like}");
    }
}

#[test]
fn differences_between_stacks() {
    use rustix::fs::{CWD, FileType};
    let fixture = Fixture::new();
    let file = |tree: &Path, name: &str, content: &str| {
        std::fs::write(tree.join(name), content).unwrap();
        touch(&tree.join(name), 1);
    };
    let (base, _) = fixture.ingest(&fixture.staged("base", |tree| {
        for directory in ["same", "gone", "gone/deep", "replaced", "mode"] {
            std::fs::create_dir(tree.join(directory)).unwrap();
        }
        for name in
            ["same/a", "gone/deep/b", "replaced/old", "replaced/kept", "touched", "changed", "becomes"]
        {
            file(tree, name, "one\ntwo\n");
        }
        file(tree, "binary", "a\0b");
        symlink("here", tree.join("link")).unwrap();
    }));
    let upper = "uppers/00112233445566778899aabbccddeeff";
    let children = vec!["upper".to_owned(), "work".to_owned()];
    fixture.work(&TreeRequest::Prepare { path: upper.to_owned(), children }).unwrap();
    let tree = fixture.path(upper).join("upper");
    let whiteout = |name: &str| {
        rustix::fs::mknodat(CWD, tree.join(name), FileType::CharacterDevice, 0.into(), 0).unwrap();
    };
    for name in ["gone", "link", "never-was"] {
        whiteout(name);
    }
    for directory in ["replaced", "mode", "becomes", "new"] {
        std::fs::create_dir(tree.join(directory)).unwrap();
    }
    std::fs::set_permissions(&tree, Permissions::from_mode(0o777)).unwrap();
    set_xattr(&tree.join("replaced"), "user.overlay.opaque", b"y");
    std::fs::set_permissions(tree.join("mode"), Permissions::from_mode(0o700)).unwrap();
    file(&tree, "replaced/kept", "one\ntwo\n");
    file(&tree, "touched", "one\ntwo\n");
    touch(&tree.join("touched"), 7);
    file(&tree, "changed", "one\nthree\n");
    file(&tree, "binary", "a\0c");
    file(&tree, "new/odd name", "new");
    set_xattr(&tree.join("new"), "user.note", b"x");

    let (old, new) = (vec![format!("layers/{base}/tree")], format!("{upper}/upper"));
    let diff = |from: &[String], to: &[String], patch: bool| {
        let request = TreeRequest::Diff { old: from.to_vec(), new: to.to_vec(), patch };
        let fd: OwnedFd = fixture.store.directory().try_clone_to_owned().unwrap();
        let mut out = Vec::new();
        let result = casemate_tree::work(&fd, &request, &mut out, &mut |_, _| ()).unwrap();
        let TreeResult::Compared { differences } = result else { panic!() };
        (String::from_utf8(out).unwrap(), differences)
    };
    let both = [vec![new], old.clone()].concat();
    let (told, differences) = diff(&old, &both, false);
    let expected = [
        "type f d becomes",
        "modified f f binary",
        "modified f f changed",
        "deleted d - gone",
        "deleted d - gone/deep",
        "deleted f - gone/deep/b",
        "deleted l - link",
        "mode d d mode",
        "added - d new",
        "added - f new/odd\\x20name",
        "deleted f - replaced/old",
    ];
    // Modes and owners depend on who runs the test.
    let kinds = |line: &str| {
        let mut words: Vec<&str> = line.split(' ').collect();
        for word in &mut words[1..3] {
            *word = word.split(':').next().unwrap();
        }
        words.join(" ")
    };
    assert_eq!(told.lines().map(kinds).collect::<Vec<_>>(), expected);
    assert!(told.lines().any(|line| line.starts_with("mode d:0777:") && line.contains(" d:0700:")), "{told}");
    assert_eq!(differences, expected.len() as u64);
    assert_eq!(diff(&both, &both, false), (String::new(), 0));
    let (back, _) = diff(&both, &old, false);
    assert!(back.contains("added - f") && back.contains("gone/deep/b"), "{back}");

    let (patch, _) = diff(&old, &both, true);
    for part in [
        "diff --git a/changed b/changed\n--- a/changed\n+++ b/changed\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n",
        "diff --git a/binary b/binary\nBinary files a/binary and b/binary differ\n",
        "deleted file mode 120000\n--- a/link\n+++ /dev/null\n@@ -1 +0,0 @@\n-here\n\\ No newline at end of file\n",
        "new file mode 100644\n--- /dev/null\n+++ b/new/odd name\n@@ -0,0 +1 @@\n+new\n\\ No newline at end of file\n",
    ] {
        assert!(patch.contains(part), "{part} is not in {patch}");
    }
    assert!(!patch.contains("touched") && !patch.contains("kept"), "{patch}");
}

/// A stack and what it was flattened to, on top of the same base, look the same: [`differences_between_stacks`] holds what
/// looks into them to what overlayfs does.
#[test]
fn a_flat_stack_is_the_same() {
    use rustix::fs::{CWD, FileType};
    let fixture = Fixture::new();
    let file = |tree: &Path, name: &str, content: &str| {
        std::fs::write(tree.join(name), content).unwrap();
        touch(&tree.join(name), 1);
    };
    let whiteout = |tree: &Path, name: &str| {
        rustix::fs::mknodat(CWD, tree.join(name), FileType::CharacterDevice, 0.into(), 0).unwrap();
    };
    let directory = |tree: &Path, name: &str| std::fs::create_dir(tree.join(name)).unwrap();
    let mut layers = Vec::new();
    let mut layer = |job: &str, make: &dyn Fn(&Path)| {
        layers
            .insert(0, format!("layers/{}/tree", fixture.ingest(&fixture.staged(job, |tree| make(tree))).0));
    };
    layer("base", &|tree| {
        for name in ["a", "b", "c", "d", "e"] {
            directory(tree, name);
            file(tree, &format!("{name}/base"), name);
        }
        file(tree, "file", "base");
        file(tree, "gone", "base");
    });
    layer("one", &|tree| {
        whiteout(tree, "a");
        whiteout(tree, "gone");
        file(tree, "b", "a file now");
        directory(tree, "c");
        set_xattr(&tree.join("c"), "user.overlay.opaque", b"y");
        file(tree, "c/one", "one");
        directory(tree, "e");
        whiteout(tree, "e/base");
        file(tree, "e/one", "one");
    });
    layer("two", &|tree| {
        for name in ["a", "b", "c", "d", "e"] {
            directory(tree, name);
            file(tree, &format!("{name}/two"), name);
        }
        std::fs::set_permissions(tree.join("d"), Permissions::from_mode(0o711)).unwrap();
        set_xattr(&tree.join("d"), "user.note", b"two");
        file(tree, "file", "two");
        file(tree, "again", "two");
        std::fs::hard_link(tree.join("again"), tree.join("e/again")).unwrap();
    });
    layer("three", &|tree| {
        directory(tree, "e");
        whiteout(tree, "e/one");
        whiteout(tree, "again");
    });
    let staging = fixture.store.staging(&"flat".parse().unwrap()).unwrap();
    let to = staging.relative(Some(&"tree".parse().unwrap()));
    let request = TreeRequest::Flatten { stack: layers[..3].to_vec(), to: to.clone() };
    assert!(matches!(fixture.work(&request).unwrap(), TreeResult::Flattened { entries: 16.. }));
    let (flat, new) = fixture.ingest(&to);
    assert_eq!(new, 0, "links to what was there");
    let entries = fixture.listing(&flat);
    for (path, opaque) in [(&b"a"[..], true), (b"b", true), (b"c", true), (b"d", false), (b"e", false)] {
        assert!(
            matches!(node(&entries, path), Node::Directory { opaque: found, .. } if *found == opaque),
            "{}: {:?}",
            path.escape_ascii(),
            node(&entries, path)
        );
    }
    for path in [&b"gone"[..], b"again", b"e/base", b"e/one"] {
        assert_eq!(*node(&entries, path), Node::Whiteout, "{}", path.escape_ascii());
    }
    let fd: OwnedFd = fixture.store.directory().try_clone_to_owned().unwrap();
    let new = vec![format!("layers/{flat}/tree"), layers[3].clone()];
    let mut out = Vec::new();
    let request = TreeRequest::Diff { old: layers.clone(), new, patch: false };
    casemate_tree::work(&fd, &request, &mut out, &mut |_, _| ()).unwrap();
    assert_eq!(String::from_utf8(out).unwrap(), "");
    assert_eq!(fixture.verify(&flat), [""; 0]);
}

#[test]
fn a_damaged_object_is_never_taken() {
    let fixture = Fixture::new();
    let one = |tree: &Path| {
        std::fs::write(tree.join("f"), "good").unwrap();
        touch(&tree.join("f"), 1);
    };
    let (digest, _) = fixture.ingest(&fixture.staged("one", one));
    let file = fixture.store.layer_path(&digest).join("tree/f");
    let damaged = File::options().write(true).open(&file).unwrap();
    damaged.write_all_at(b"b", 0).unwrap();
    touch(&file, 1);
    assert_eq!(fixture.verify(&digest).len(), 1);
    let (again, new) = fixture.ingest(&fixture.staged("two", |tree| {
        one(tree);
        std::fs::create_dir(tree.join("d")).unwrap();
    }));
    assert_eq!(new, 1, "another copy");
    let tree = fixture.store.layer_path(&again).join("tree");
    assert_eq!(std::fs::read(tree.join("f")).unwrap(), b"good");
    assert_eq!(fixture.verify(&again), [""; 0]);
    let name = walk(&fixture.path("objects")).into_iter().find(|path| path.to_str().unwrap().ends_with(".1"));
    assert!(name.is_some());
}

fn walk(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn a_damaged_listing_is_healed_by_the_same_tree() {
    let fixture = Fixture::new();
    let (digest, _) = fixture.ingest(&fixture.staged("one", make));
    let listing = fixture.store.layer_path(&digest).join("listing");
    std::fs::write(&listing, "damage").unwrap();
    fixture.store.check_listing(&digest).unwrap_err();
    assert_eq!(fixture.verify(&digest).len(), 1);
    fixture.ingest(&fixture.staged("two", make));
    fixture.store.check_listing(&digest).unwrap();
    assert_eq!(fixture.verify(&digest), [""; 0]);
}

#[test]
fn every_damage_is_found_and_named() {
    type Harm = fn(&Path);
    let cases: &[(&str, &str, Harm)] = &[
        ("content", "bin/su: content", |tree| {
            File::options().write(true).open(tree.join("bin/su")).unwrap().write_all_at(b"x", 1).unwrap();
            std::fs::set_permissions(tree.join("bin/su"), Permissions::from_mode(0o4755)).unwrap();
            touch(&tree.join("bin/su"), 1_100_000_000);
        }),
        ("length", "big: content", |tree| {
            File::options().append(true).open(tree.join("big")).unwrap().set_len((3 << 20) + 1).unwrap();
            touch(&tree.join("big"), 1_100_000_000);
        }),
        ("mode", "bin/su: an attribute", |tree| {
            std::fs::set_permissions(tree.join("bin/su"), Permissions::from_mode(0o755)).unwrap();
        }),
        ("time", "bin-after: an attribute", |tree| touch(&tree.join("bin-after"), 5)),
        ("directory's time", "empty: an attribute", |tree| touch(&tree.join("empty"), 5)),
        ("directory's mode", "empty: an attribute", |tree| {
            std::fs::set_permissions(tree.join("empty"), Permissions::from_mode(0o700)).unwrap();
        }),
        ("link's target", "link: the link's target", |tree| {
            std::fs::remove_file(tree.join("link")).unwrap();
            symlink("/etc/evil", tree.join("link")).unwrap();
            touch(&tree.join("link"), 1_200_000_000);
            touch(tree, 1_000_000_000);
        }),
        ("missing", "fifo: missing", |tree| {
            std::fs::remove_file(tree.join("fifo")).unwrap();
            touch(tree, 1_000_000_000);
        }),
        ("missing at the end", "with\\x20space: missing", |tree| {
            std::fs::remove_file(tree.join("with space")).unwrap();
            touch(tree, 1_000_000_000);
        }),
        ("one too many", "evil: not in the listing", |tree| {
            std::fs::write(tree.join("evil"), "evil").unwrap();
            touch(tree, 1_000_000_000);
        }),
        ("one too many in a directory", "empty/evil: not in the listing", |tree| {
            std::fs::write(tree.join("empty/evil"), "evil").unwrap();
            touch(&tree.join("empty"), 1_300_000_000);
        }),
        ("xattr", "big: an attribute", |tree| set_xattr(&tree.join("big"), "user.note", b"other")),
        ("opaque mark", "empty: an attribute", |tree| {
            set_xattr(&tree.join("empty"), "user.overlay.opaque", b"y")
        }),
        ("type", "socket: the type", |tree| {
            std::fs::remove_file(tree.join("socket")).unwrap();
            symlink("x", tree.join("socket")).unwrap();
            touch(tree, 1_000_000_000);
        }),
        ("hard link", "su-too: no longer a hard link", |tree| {
            std::fs::remove_file(tree.join("su-too")).unwrap();
            std::fs::write(tree.join("su-too"), "su").unwrap();
            touch(tree, 1_000_000_000);
        }),
        ("foreign attribute", "nothing: an overlay attribute", |tree| {
            set_xattr(&tree.join("nothing"), "user.overlay.redirect", b"/etc");
        }),
    ];
    for (name, says, harm) in cases {
        let fixture = Fixture::new();
        let (digest, _) = fixture.ingest(&fixture.staged("one", make));
        harm(&fixture.store.layer_path(&digest).join("tree"));
        let damage = fixture.verify(&digest);
        // `nothing` and `nothing-either` are one inode.
        let expected = if *name == "foreign attribute" { 2 } else { 1 };
        assert_eq!(damage.len(), expected, "{name}: {damage:?}");
        assert!(damage[0].contains(says), "{name}: {damage:?}");
    }
}

#[test]
fn missing_parts_are_found() {
    let fixture = Fixture::new();
    let (digest, _) = fixture.ingest(&fixture.staged("one", make));
    for path in walk(&fixture.path("objects")) {
        std::fs::remove_file(path).unwrap();
    }
    let damage = fixture.verify(&digest);
    assert_eq!(damage.iter().filter(|d| d.contains("is missing (used by")).count(), damage.len());
    assert_eq!(damage.len(), 9);
    std::fs::remove_file(fixture.store.layer_path(&digest).join("listing")).unwrap();
    assert_eq!(fixture.verify(&digest).len(), 1);
    let gone = fixture.work(&TreeRequest::Verify { layer: Digest::of(b"gone").to_string() });
    assert_eq!(gone.unwrap_err().kind, FailureKind::NotFound);
}

#[test]
fn every_flipped_byte_of_a_listing_is_found() {
    let fixture = Fixture::new();
    let (digest, _) = fixture.ingest(&fixture.staged("one", make));
    let path = fixture.store.layer_path(&digest).join("listing");
    let good = std::fs::read(&path).unwrap();
    for position in 0..good.len() {
        let mut bytes = good.clone();
        bytes[position] ^= 1 << (position % 8);
        std::fs::write(&path, &bytes).unwrap();
        assert!(!fixture.verify(&digest).is_empty(), "byte {position}");
    }
}

#[test]
fn unfit_trees_are_refused() {
    let fixture = Fixture::new();
    type Make = fn(&Path);
    let cases: &[(&str, Make)] = &[
        ("redirect", |tree| {
            std::fs::create_dir(tree.join("d")).unwrap();
            set_xattr(&tree.join("d"), "user.overlay.redirect", b"/etc");
        }),
        ("metacopy", |tree| {
            std::fs::write(tree.join("f"), "").unwrap();
            set_xattr(&tree.join("f"), "user.overlay.metacopy", b"");
        }),
        ("opaque-file", |tree| {
            std::fs::write(tree.join("f"), "").unwrap();
            set_xattr(&tree.join("f"), "user.overlay.opaque", b"y");
        }),
        ("opaque-x", |tree| {
            std::fs::create_dir(tree.join("d")).unwrap();
            set_xattr(&tree.join("d"), "user.overlay.opaque", b"x");
        }),
    ];
    for (job, make) in cases {
        let path = fixture.staged(job, make);
        let failure = fixture.work(&TreeRequest::Ingest { path }).expect_err(job);
        assert_eq!(failure.kind, FailureKind::Refused, "{job}: {failure:?}");
    }
    assert!(fixture.store.layers().unwrap().names.is_empty());
    // What is left goes with the job.
    let paths = fixture.store.leftovers().unwrap().names;
    fixture.work(&TreeRequest::Remove { paths }).unwrap();
    assert!(fixture.store.leftovers().unwrap().names.is_empty());
}

#[test]
fn trees_two_thousand_deep() {
    let fixture = Fixture::new();
    let depth = 2000;
    let path = fixture.staged("deep", |tree| {
        let mut at = rustix::fs::open(tree, rustix::fs::OFlags::DIRECTORY, 0.into()).unwrap();
        for _ in 0..depth {
            rustix::fs::mkdirat(&at, "directory", 0o755.into()).unwrap();
            at = rustix::fs::openat(&at, "directory", rustix::fs::OFlags::DIRECTORY, 0.into()).unwrap();
        }
        rustix::fs::openat(
            &at,
            "file",
            rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY,
            0o644.into(),
        )
        .unwrap();
    });
    let (digest, _) = fixture.ingest(&path);
    assert_eq!(fixture.listing(&digest).len(), depth + 2);
    assert_eq!(fixture.verify(&digest), [""; 0]);
    let removed = fixture.work(&TreeRequest::Remove { paths: vec![format!("layers/{digest}")] }).unwrap();
    assert_eq!(removed, TreeResult::Removed { entries: depth as u64 + 4 });
    assert!(fixture.store.layers().unwrap().names.is_empty());
    assert!(std::fs::read_dir(fixture.path("staging")).unwrap().all(|e| e.unwrap().file_name() == "deep"));
}

/// More equal files than the file system allows links (65,000 on ext4; where there is no limit, one object serves).
#[test]
fn more_links_than_the_file_system_allows() {
    let fixture = Fixture::new();
    let path = fixture.staged("many", |tree| {
        for directory in 0..7 {
            std::fs::create_dir(tree.join(directory.to_string())).unwrap();
            for file in 0..10_000 {
                let path = tree.join(format!("{directory}/{file}"));
                File::create(&path).unwrap();
                touch(&path, 1);
            }
        }
    });
    let (digest, new) = fixture.ingest(&path);
    assert!(new <= 2, "{new}");
    assert_eq!(fixture.listing(&digest).len(), 70_008);
    assert_eq!(fixture.verify(&digest), [""; 0]);
}

#[test]
fn removal_takes_anything_and_only_that() {
    let fixture = Fixture::new();
    std::fs::write(fixture.home.path().join("outside"), "stays").unwrap();
    let outside = fixture.home.path().to_owned();
    let path = fixture.staged("one", |tree| {
        make(tree);
        symlink(&outside, tree.join("bin/way-out")).unwrap();
        for number in 0..5000 {
            std::fs::write(tree.join(format!("empty/{number}")), "").unwrap();
        }
    });
    let missing = "staging/never".to_owned();
    let request =
        TreeRequest::Remove { paths: vec![missing.clone(), path, "staging/one".to_owned(), missing] };
    let TreeResult::Removed { entries } = fixture.work(&request).unwrap() else { panic!() };
    assert!(entries > 5000);
    assert!(fixture.store.leftovers().unwrap().names.is_empty());
    assert_eq!(std::fs::read(outside.join("outside")).unwrap(), b"stays");
    for path in ["", "version", "releases/x", "objects", "staging/../version", "/etc/passwd", "staging"] {
        let failure = fixture.work(&TreeRequest::Remove { paths: vec![path.to_owned()] }).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Request, "{path:?}");
    }
    // A symbolic link on the way is not followed.
    symlink(fixture.path("environments"), fixture.path("staging/link")).unwrap();
    std::fs::write(fixture.path("environments/x"), "stays").unwrap();
    fixture.work(&TreeRequest::Remove { paths: vec!["staging/link/x".to_owned()] }).unwrap_err();
    fixture.work(&TreeRequest::Remove { paths: vec!["staging/link".to_owned()] }).unwrap();
    assert!(fixture.path("environments/x").exists());
}

#[test]
fn prepare_makes_what_is_not_there() {
    let fixture = Fixture::new();
    let request = TreeRequest::Prepare {
        path: "staging/x".to_owned(),
        children: vec!["upper".to_owned(), "work".to_owned()],
    };
    fixture.work(&request).unwrap();
    for path in ["staging/x", "staging/x/upper", "staging/x/work"] {
        assert_eq!(std::fs::metadata(fixture.path(path)).unwrap().mode() & 0o7777, 0o755, "{path}");
    }
    assert!(fixture.work(&request).is_err(), "never twice");
    for (path, child) in
        [("staging/y", "../z"), ("staging/y", "a/b"), ("objects/y", "a"), ("staging/missing/y", "a")]
    {
        let request = TreeRequest::Prepare { path: path.to_owned(), children: vec![child.to_owned()] };
        assert!(fixture.work(&request).is_err(), "{path} {child}");
    }
}
