use super::*;
use proptest::prelude::*;

fn limits() -> UnpackLimits {
    UnpackLimits { bytes: 1 << 20, members: 1000, ratio: 200, depth: 8, decoder_memory: 1 << 20 }
}

fn member(kind: Kind, path: &[u8]) -> Member {
    Member {
        path: path.to_vec(),
        link: if kind == Kind::Symlink { b"target".to_vec() } else { Vec::new() },
        kind,
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        stored: 0,
        size: 0,
        sparse: None,
        xattrs: Vec::new(),
        device: (0, 0),
    }
}

fn names(judge: &Judge, kind: Kind, path: &[u8]) -> Option<Vec<u8>> {
    judge.item(member(kind, path)).ok().flatten().map(|item| item.path)
}

#[test]
fn final_names() {
    let judge = Judge::new(Source::Image, limits());
    for (name, expected) in [
        (&b"a/b"[..], &b"a/b"[..]),
        (b"./a/b", b"a/b"),
        (b"bin/sh", b"bin/sh"),
        (b"...", b"..."),
        (b"..a/b..", b"..a/b.."),
        (b"a\n\xff", b"a\n\xff"),
        (b"-rf", b"-rf"),
        (b".wh", b".wh"),
    ] {
        assert_eq!(names(&judge, Kind::File, name).as_deref(), Some(expected), "{}", name.escape_ascii());
    }
    for root in [&b"."[..], b"./", b"./."] {
        let expected = (root != b"./.").then_some(&b""[..]);
        assert_eq!(names(&judge, Kind::Directory, root).as_deref(), expected);
    }
    assert_eq!(names(&judge, Kind::Directory, b"a/b/").as_deref(), Some(&b"a/b"[..]));
    assert_eq!(names(&judge, Kind::Directory, b"a/b//"), None);
}

#[test]
fn packages_land_in_a_merged_usr() {
    let judge = Judge::new(Source::Packages, limits());
    for (name, expected) in [
        (&b"./bin/sh"[..], &b"usr/bin/sh"[..]),
        (b"./lib64/ld.so", b"usr/lib64/ld.so"),
        (b"./usr/bin/sh", b"usr/bin/sh"),
        (b"./library/x", b"library/x"),
        (b"./etc/lib/x", b"etc/lib/x"),
    ] {
        assert_eq!(names(&judge, Kind::File, name).as_deref(), Some(expected));
    }
    assert_eq!(names(&judge, Kind::Directory, b"./lib/").as_deref(), Some(&b"usr/lib"[..]));
    let link =
        |target: &[u8]| judge.item(Member { link: target.to_vec(), ..member(Kind::Symlink, b"./lib64") });
    assert!(link(b"usr/lib64").unwrap().is_none());
    assert!(link(b"/usr/lib64").unwrap().is_none());
    assert!(link(b"usr/lib").is_err());
    assert!(link(b"../usr/lib64").is_err());
}

#[test]
fn merged_links_are_those_that_are_needed() {
    let mut judge = Judge::new(Source::Packages, limits());
    assert_eq!(judge.merged().collect::<Vec<_>>(), [&b"bin"[..], b"lib", b"sbin"]);
    let item = judge.item(member(Kind::File, b"./lib64/ld.so")).unwrap().unwrap();
    judge.admit(&item).unwrap();
    assert_eq!(judge.merged().collect::<Vec<_>>(), [&b"bin"[..], b"lib", b"lib64", b"sbin"]);
    assert_eq!(Judge::new(Source::Image, limits()).merged().count(), 0);
}

proptest! {
    /// Whatever the names are, what is admitted forms a tree: every parent a directory, nothing twice.
    #[test]
    fn what_is_admitted_is_a_tree(
        entries in proptest::collection::vec((0u8..4, "[ab](/[ab./]{1,3}){0,2}/?"), 1..20)
    ) {
        let mut judge = Judge::new(Source::Image, limits());
        let mut tree: std::collections::BTreeMap<Vec<u8>, (Kind, bool)> = Default::default();
        for (kind, name) in entries {
            let kind = [Kind::File, Kind::Directory, Kind::Symlink, Kind::Fifo][usize::from(kind)];
            let Ok(Some(item)) = judge.item(member(kind, name.as_bytes())) else { continue };
            let path = item.path.clone();
            prop_assert!(path.split(|&b| b == b'/').all(|c| !c.is_empty() && c != b"." && c != b".."));
            let parents: Vec<_> =
                (0..path.len()).filter(|&i| path[i] == b'/').map(|i| path[..i].to_vec()).collect();
            let below_other = parents.iter().any(|p| tree.get(p).is_some_and(|(k, _)| *k != Kind::Directory));
            let clash = match tree.get(&path) {
                None => false,
                Some((Kind::Directory, false)) => kind != Kind::Directory,
                Some(_) => true,
            };
            let admitted = judge.admit(&item).is_ok();
            prop_assert_eq!(admitted, !below_other && !clash);
            if !admitted {
                break;
            }
            for parent in parents {
                tree.entry(parent).or_insert((Kind::Directory, false));
            }
            tree.insert(path, (kind, true));
        }
    }
}
