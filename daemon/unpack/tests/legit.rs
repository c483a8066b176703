//! Archives as people have them, odd ones among them, taken unchanged: what GNU tar extracts is what we extract.

mod archives;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use archives::{COMPRESSIONS, Header, Place, Tar, compress, deb, limits, octal};

#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: u32,
    mode: u32,
    mtime: (i64, i64),
    content: Vec<u8>,
    /// The first path of this inode.
    same_as: PathBuf,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    sparse: bool,
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    let names = names[..length]
        .split(|&b| b == 0)
        .filter(|n| n.starts_with(b"user.") || n.starts_with(b"system.posix"));
    names
        .map(|name| {
            let mut value = vec![0; 65_536];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
            (name.to_vec(), value[..length].to_vec())
        })
        .collect()
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(path) = left.pop() {
        let full = root.join(&path);
        let meta = full.symlink_metadata().unwrap();
        let kind = meta.mode() & 0o170_000;
        let mut content = Vec::new();
        if meta.is_dir() {
            left.extend(std::fs::read_dir(&full).unwrap().map(|entry| path.join(entry.unwrap().file_name())));
        } else if meta.is_symlink() {
            content = std::fs::read_link(&full).unwrap().into_os_string().into_vec();
        } else if meta.is_file() {
            content = std::fs::read(&full).unwrap();
        }
        inodes
            .entry(meta.ino())
            .and_modify(|first: &mut PathBuf| *first = path.clone().min(first.clone()))
            .or_insert(path.clone());
        let sparse = meta.is_file() && meta.blocks() * 512 + 65_536 < meta.len();
        let entry = Seen {
            kind,
            mode: meta.mode() & 0o7777,
            mtime: (meta.mtime(), meta.mtime_nsec()),
            content,
            same_as: PathBuf::from(meta.ino().to_string()),
            xattrs: xattrs(&full),
            sparse,
        };
        seen.insert(path, entry);
    }
    for entry in seen.values_mut() {
        let inode: u64 = entry.same_as.to_str().unwrap().parse().unwrap();
        entry.same_as = inodes[&inode].clone();
    }
    // Mode and time of the place itself are not the archive's.
    seen.remove(Path::new(""));
    seen
}

fn gnu_tar(arguments: &[&OsStr], directory: &Path) {
    let output =
        Command::new("tar").args(arguments).current_dir(directory).env("LC_ALL", "C").output().unwrap();
    assert!(output.status.success(), "tar: {}", String::from_utf8_lossy(&output.stderr));
}

/// Extract with GNU tar, as the same user.
fn by_tar(archive: &[u8]) -> (tempfile::TempDir, BTreeMap<PathBuf, Seen>) {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("a.tar"), archive).unwrap();
    std::fs::create_dir(home.path().join("x")).unwrap();
    let arguments = ["-xpf", "../a.tar", "--no-same-owner", "--xattrs", "--xattrs-include=*", "--acls"];
    gnu_tar(&arguments.map(OsStr::new), &home.path().join("x"));
    let seen = tree(&home.path().join("x"));
    (home, seen)
}

fn same(what: &str, archive: &[u8]) {
    let (_home, expected) = by_tar(archive);
    let place = Place::new();
    place.unpack(archive, limits()).unwrap_or_else(|failure| panic!("{what}: {failure:?}"));
    let found = tree(&place.root());
    for (path, seen) in &expected {
        assert_eq!(found.get(path), Some(seen), "{what}: {}", path.display());
    }
    assert_eq!(found.len(), expected.len(), "{what}: {:?}", found.keys());
}

/// A tree with everything an ordinary user can make.
fn make_tree(root: &Path, formats: bool) {
    let write = |name: &[u8], content: &[u8], mode: u32| {
        let path = root.join(OsStr::from_bytes(name));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    };
    write(b"usr/bin/su", b"#!/bin/sh\n", 0o4755);
    write(b"usr/bin/wall", b"x", 0o2755);
    write(b"etc/shadow", b"root:*:\n", 0o640);
    write(b"etc/empty", b"", 0o400);
    write(b"-rf", b"dash", 0o644);
    write(b"with space\nand newline", b"odd", 0o644);
    write(b"not utf-8 \xff\xfe", b"odd", 0o644);
    write(b"big", &b"0123456789abcdef".repeat(100_000), 0o644);
    write(b"a/b/c/d/e/f", b"deep", 0o600);
    std::fs::hard_link(root.join("usr/bin/su"), root.join("usr/bin/zu")).unwrap();
    std::fs::hard_link(root.join("usr/bin/su"), root.join("a/su")).unwrap();
    std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
    std::os::unix::fs::symlink("/etc/absolute", root.join("etc/link")).unwrap();
    std::os::unix::fs::symlink("../../../outside", root.join("etc/up")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, root.join("fifo"), rustix::fs::FileType::Fifo, 0o620.into(), 0)
        .unwrap();
    std::fs::create_dir(root.join("tmp")).unwrap();
    std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777)).unwrap();
    if formats {
        let long = format!("{}/{}", "directory-with-a-long-name".repeat(6), "f".repeat(200));
        write(long.as_bytes(), b"long", 0o644);
        std::os::unix::fs::symlink("t".repeat(300), root.join("long-target")).unwrap();
        std::fs::hard_link(root.join(&long), root.join("long-hard-link")).unwrap();
    }
    // Times of directories last.
    let times = rustix::fs::Timestamps {
        last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 },
        last_modification: rustix::fs::Timespec { tv_sec: 1_234_567_890, tv_nsec: 0 },
    };
    for directory in ["usr/bin", "usr", "a/b", "tmp"] {
        let fd = File::open(root.join(directory)).unwrap();
        rustix::fs::futimens(&fd, &times).unwrap();
    }
}

fn pack(root: &Path, options: &[&str]) -> Vec<u8> {
    let archive = root.parent().unwrap().join("made.tar");
    let mut arguments: Vec<&OsStr> = vec![OsStr::new("-cf"), archive.as_os_str()];
    arguments.extend(options.iter().map(OsStr::new));
    arguments.push(OsStr::new("."));
    gnu_tar(&arguments, root);
    std::fs::read(&archive).unwrap()
}

#[test]
fn every_format_of_gnu_tar() {
    for format in ["v7", "oldgnu", "gnu", "ustar", "pax"] {
        let home = tempfile::tempdir().unwrap();
        let root = home.path().join("made");
        std::fs::create_dir(&root).unwrap();
        make_tree(&root, !["v7", "ustar"].contains(&format));
        let mut options = vec![format!("--format={format}")];
        if format == "v7" {
            options.push("--exclude=./fifo".to_owned());
        }
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let archive = pack(&root, &options);
        for compression in COMPRESSIONS {
            same(&format!("{format}, {compression:?}"), &compress(&archive, compression));
        }
    }
}

#[test]
fn plain_names_and_implied_directories() {
    let archive = Tar::new().file(b"a/b/c", b"x").file(b"d", b"y").directory(b"a").end();
    let place = Place::new();
    place.unpack(&archive, limits()).unwrap();
    let found = tree(&place.root());
    assert_eq!(found[Path::new("a/b/c")].content, b"x");
    let implied = &found[Path::new("a/b")];
    assert_eq!((implied.mode, implied.mtime), (0o755, (0, 0)), "the same whenever it is unpacked");
    assert_eq!(found[Path::new("a")].mtime, (1_700_000_000, 0));
    assert_eq!(std::fs::metadata(place.root()).unwrap().mtime(), 0);
}

#[test]
fn extended_attributes() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("made");
    std::fs::create_dir_all(root.join("d")).unwrap();
    std::fs::write(root.join("f"), "x").unwrap();
    for path in ["f", "d"] {
        for (name, value) in
            [("user.plain", &b"value"[..]), ("user.bytes", b"\0\n=\xff"), ("user.empty", b"")]
        {
            rustix::fs::setxattr(root.join(path), name, value, rustix::fs::XattrFlags::empty()).unwrap();
        }
    }
    same("xattrs", &pack(&root, &["--format=pax", "--xattrs"]));
}

#[test]
fn access_control_lists() {
    // user::rw-, user:7:r--, group::r--, mask::rw-, other::---
    let entry = |tag: u16, bits: u16, id: u32| {
        [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let all = u32::MAX;
    let list = [
        2u32.to_le_bytes().to_vec(),
        entry(1, 6, all),
        entry(2, 4, 7),
        entry(4, 4, all),
        entry(16, 6, all),
        entry(32, 0, all),
    ]
    .concat();
    let archive = Tar::new()
        .pax(&[(b"SCHILY.acl.access", b"user::rw-,user:7:r--,group::r--,mask::rw-,other::---")])
        .raw(Header::new(b'0', b"f").mode(0o660), b"")
        .pax(&[(b"SCHILY.acl.default", b"user::rw-\nuser:7:r--\ngroup::r--\nmask::rw-\nother::---")])
        .directory(b"d")
        .end();
    let place = Place::new();
    place.unpack(&archive, limits()).unwrap();
    let found = tree(&place.root());
    assert_eq!(found[Path::new("f")].xattrs.get(&b"system.posix_acl_access"[..]), Some(&list));
    assert_eq!(found[Path::new("f")].mode, 0o660);
    assert_eq!(found[Path::new("d")].xattrs.get(&b"system.posix_acl_default"[..]), Some(&list));
}

#[test]
fn sparse_files_of_every_kind() {
    let home = tempfile::tempdir().unwrap();
    let root = home.path().join("made");
    std::fs::create_dir(&root).unwrap();
    let file = |name: &str, regions: &[(u64, usize)], size: u64| {
        use std::os::unix::fs::FileExt;
        let file = File::create(root.join(name)).unwrap();
        for &(offset, length) in regions {
            file.write_all_at(&vec![b'x'; length], offset).unwrap();
        }
        file.set_len(size).unwrap();
    };
    file("hole-first", &[(1 << 20, 5000)], (1 << 20) + 5000);
    file("hole-last", &[(0, 5000)], 10 << 20);
    file("all-hole", &[], 3 << 20);
    let many: Vec<_> = (0..200).map(|n| (n * 65_536, 4096)).collect();
    file("many-holes", &many, 20 << 20);
    for options in [
        &["--format=gnu"][..],
        &["--format=oldgnu"],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let archive = pack(&root, &[options, &["-S"]].concat());
        same(&format!("{options:?}"), &archive);
        let place = Place::new();
        place.unpack(&archive, limits()).unwrap();
        let found = tree(&place.root());
        assert!(found.values().filter(|seen| seen.sparse).count() >= 4, "holes stay holes: {options:?}");
    }
}

#[test]
fn odd_but_good_members() {
    let archive = Tar::new()
        .raw(Header::new(b'7', b"contiguous").size(1), b"7")
        .raw(Header::new(0, b"old-file").old().size(3), b"old")
        .raw(Header::new(0, b"old-directory/").old().mode(0o755), b"")
        .raw(Header::new(b'0', b"type-in-mode").mode(0o100_640), b"")
        .raw(Header::new(b'0', b"base-256").with(124, b"\x80\0\0\0\0\0\0\0\0\0\0\x02"), b"ab")
        .raw(Header::new(b'0', b"before-the-epoch").with(136, &[0xff; 12]), b"")
        .pax(&[(b"mtime", b"-1.25"), (b"comment", b"x"), (b"VENDOR.key", b"x"), (b"uname", b"somebody")])
        .file(b"long-before", b"")
        .pax(&[(b"mtime", b"1700000000.123456789"), (b"size", b"3")])
        .file(b"nanoseconds", b"abc")
        .pax(&[(b"path", b"name \xff")])
        .file(b"fallback", b"")
        .directory(b"prefix/")
        .directory(b"prefix/of/")
        .directory(b"prefix/of/ustar/")
        .raw(Header::new(b'0', b"f").with(345, b"prefix/of/ustar"), b"")
        .raw(Header::new(b'g', b"pax_global_header").size(13), b"13 comment=x\n")
        .file(b"x", b"x")
        .end();
    same("odd members", &archive);
    let labels = Tar::new()
        .pax(&[(b"SCHILY.xattr.security.selinux", b"label"), (b"RHT.security.selinux", b"label")])
        .file(b"x", b"")
        .end();
    let place = Place::new();
    place.unpack(&labels, limits()).unwrap();
    assert!(place.root().join("x").exists());
}

#[test]
fn devices_below_dev_are_passed_over() {
    let device = |kind, name: &[u8]| Header::new(kind, name).with(329, &octal(1, 8)).with(337, &octal(3, 8));
    let archive = Tar::new()
        .directory(b"./")
        .directory(b"./dev/")
        .raw(device(b'3', b"./dev/null"), b"")
        .raw(device(b'4', b"./dev/block/sda"), b"")
        .symlink(b"./dev/fd", b"/proc/self/fd")
        .end();
    let place = Place::new();
    place.unpack(&archive, limits()).unwrap();
    assert!(place.root().join("dev/fd").is_symlink());
    assert!(!place.root().join("dev/null").exists());
}

#[test]
fn the_roots_own_entry_sets_its_time_alone() {
    let archive = Tar::new().raw(Header::new(b'5', b"./").mode(0o777), b"").file(b"./x", b"").end();
    let place = Place::new();
    place.unpack(&archive, limits()).unwrap();
    let meta = std::fs::metadata(place.root()).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o755, 1_700_000_000));
}

#[test]
fn packages_upon_each_other() {
    let one = Tar::new()
        .directory(b"./")
        .directory(b"./bin/")
        .file(b"./bin/sh", b"one")
        .file(b"./bin/same", b"one")
        .directory(b"./usr/")
        .directory(b"./usr/share/")
        .raw(Header::new(b'5', b"./tmp").mode(0o1777), b"")
        .symlink(b"./usr/share/link", b"one")
        .end();
    let two = Tar::new()
        .directory(b"./")
        .directory(b"./usr/")
        .directory(b"./usr/bin/")
        .file(b"./usr/bin/same", b"two")
        .hardlink(b"./usr/bin/hard", b"./usr/bin/same")
        .file(b"./lib64/ld.so", b"ld")
        .hardlink(b"./lib64/hard", b"./lib64/ld.so")
        .raw(Header::new(b'5', b"./tmp").mode(0o755), b"")
        .symlink(b"./usr/share/link", b"two")
        .end();
    let three =
        Tar::new().symlink(b"./bin", b"usr/bin").symlink(b"./lib64", b"usr/lib64").file(b"./x", b"").end();
    let place = Place::new();
    place.packages(&[("one", deb(&one)), ("two", deb(&two)), ("three", deb(&three))]).unwrap();
    let found = tree(&place.root());
    let content = |path: &str| &found[Path::new(path)].content[..];
    assert_eq!(content("bin"), b"usr/bin");
    assert_eq!(content("lib64"), b"usr/lib64");
    assert_eq!(content("sbin"), b"usr/sbin");
    assert_eq!(content("usr/bin/sh"), b"one");
    assert_eq!(content("usr/bin/same"), b"two");
    assert_eq!(content("usr/share/link"), b"two");
    assert_eq!(found[Path::new("usr/bin/hard")].same_as, found[Path::new("usr/bin/same")].same_as);
    assert_eq!(found[Path::new("usr/lib64/hard")].same_as, found[Path::new("usr/lib64/ld.so")].same_as);
    assert_eq!(found[Path::new("tmp")].mode, 0o1777, "the first package decides about a directory");
    assert!(!found.contains_key(Path::new("lib32")));
}
