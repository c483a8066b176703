use super::*;
use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

fn meta(mode: u16) -> Meta {
    let mtime = Time { seconds: 1_700_000_000, nanoseconds: 5 };
    Meta { mode, uid: Owner::Id(0), gid: Owner::Id(0), mtime, xattrs: Vec::new() }
}

fn directory(path: &[u8]) -> Entry {
    Entry { path: path.to_vec(), node: Node::Directory { meta: meta(0o755), opaque: false } }
}

fn file(path: &[u8]) -> Entry {
    Entry {
        path: path.to_vec(),
        node: Node::File { meta: meta(0o644), size: 3, content: Digest::of(b"abc") },
    }
}

fn write(entries: &[Entry]) -> Result<(Vec<u8>, Digest), ListingError> {
    let mut writer = Writer::new(Vec::new())?;
    for entry in entries {
        writer.write(entry)?;
    }
    writer.finish()
}

fn read(bytes: &[u8]) -> Result<(Vec<Entry>, Digest), ListingError> {
    let mut reader = Reader::new(bytes)?;
    let mut entries = Vec::new();
    while let Some(entry) = reader.read()? {
        entries.push(entry);
    }
    Ok((entries, reader.digest()))
}

#[test]
fn a_listing_looks_as_documented() {
    let mut su = file(b"bin/su");
    if let Node::File { meta, .. } = &mut su.node {
        meta.mode = 0o4755;
        meta.xattrs = vec![Xattr { name: b"user.a=b".to_vec(), value: b"\x01 x".to_vec() }];
    }
    let mut mtime = meta(0o777);
    mtime.mtime = Time { seconds: -1, nanoseconds: 0 };
    mtime.uid = Owner::User;
    let entries = [
        directory(b"."),
        directory(b"bin"),
        su,
        Entry { path: b"bin/su-too".to_vec(), node: Node::HardLink { target: b"bin/su".to_vec() } },
        Entry { path: b"bin-\xff".to_vec(), node: Node::Symlink { meta: mtime, target: b"../\n".to_vec() } },
        Entry { path: b"gone".to_vec(), node: Node::Whiteout },
        Entry { path: b"o".to_vec(), node: Node::Directory { meta: meta(0o1777), opaque: true } },
        Entry { path: b"p".to_vec(), node: Node::Fifo { meta: meta(0) } },
        Entry { path: b"s".to_vec(), node: Node::Socket { meta: meta(0o600) } },
    ];
    let (bytes, digest) = write(&entries).unwrap();
    let expected = format!(
        "casemate-listing 1\n\
         d 0755 0 0 1700000000.000000005 .\n\
         d 0755 0 0 1700000000.000000005 bin\n\
         f 4755 0 0 1700000000.000000005 3 {} bin/su user.a\\x3db=\\x01\\x20x\n\
         h bin/su bin/su-too\n\
         l 0777 user 0 -1.000000000 ../\\x0a bin-\\xff\n\
         w gone\n\
         o 1777 0 0 1700000000.000000005 o\n\
         p 0000 0 0 1700000000.000000005 p\n\
         s 0600 0 0 1700000000.000000005 s\n",
        Digest::of(b"abc")
    );
    assert_eq!(String::from_utf8(bytes.clone()).unwrap(), expected);
    assert_eq!(digest, Digest::of(expected.as_bytes()));
    assert_eq!(read(&bytes).unwrap(), (entries.to_vec(), digest));
}

#[test]
fn only_sound_entries_in_order_are_written() {
    let cases: &[&[Entry]] = &[
        &[],
        &[file(b"a")],
        &[file(b".")],
        &[directory(b"."), directory(b".")],
        &[directory(b"."), file(b"b"), file(b"a")],
        &[directory(b"."), file(b"a"), file(b"a")],
        &[directory(b"."), file(b"a"), file(b"a/b")],
        &[directory(b"."), file(b"a/b")],
        &[directory(b"."), directory(b"a"), file(b"a/b"), directory(b"b"), file(b"a/c")],
        &[directory(b"."), directory(b"a"), file(b"ab"), file(b"a/b")],
        &[directory(b"."), directory(b"a"), directory(b"a/b"), file(b"a/c"), file(b"a/c/d")],
        &[directory(b"."), file(b"../a")],
        &[directory(b"."), file(b"/a")],
        &[directory(b"."), file(b"a\0")],
        &[directory(b"."), file(b"")],
        &[directory(b"."), Entry { path: b"a".to_vec(), node: Node::HardLink { target: b"b".to_vec() } }],
        &[directory(b"."), Entry { path: b"a".to_vec(), node: Node::HardLink { target: b"a".to_vec() } }],
        &[
            directory(b"."),
            Entry { path: b"a".to_vec(), node: Node::Symlink { meta: meta(0o777), target: Vec::new() } },
        ],
    ];
    for case in cases {
        assert!(write(case).is_err(), "{case:?}");
    }
    // A directory comes before its content, also where a sibling's name continues the directory's.
    write(&[directory(b"."), directory(b"a"), file(b"a/z"), file(b"a-b")]).unwrap();
}

#[test]
fn only_the_canonical_form_is_read() {
    let digest = Digest::of(b"abc");
    let root = "casemate-listing 1\nd 0755 0 0 0.000000000 .\n";
    let bad = [
        String::new(),
        "casemate-listing 2\nd 0755 0 0 0.000000000 .\n".to_owned(),
        "casemate-listing 1\n".to_owned(),
        root.trim_end().to_owned(),
        format!("{root}w a"),
        format!("{root}\n"),
        format!("{root}x a\n"),
        format!("{root}w a b\n"),
        format!("{root}w  a\n"),
        format!("{root} w a\n"),
        format!("{root}w a \n"),
        format!("{root}w a\r\n"),
        format!("{root}w \\x61\n"),
        format!("{root}w \\xFF\n"),
        format!("{root}w \\x0\n"),
        format!("{root}w a\u{e4}\n"),
        format!("{root}w a=b\n"),
        format!("{root}w a/../b\n"),
        format!("{root}d 755 0 0 0.000000000 a\n"),
        format!("{root}d 00755 0 0 0.000000000 a\n"),
        format!("{root}d 0855 0 0 0.000000000 a\n"),
        format!("{root}d 0755 00 0 0.000000000 a\n"),
        format!("{root}d 0755 +1 0 0.000000000 a\n"),
        format!("{root}d 0755 -1 0 0.000000000 a\n"),
        format!("{root}d 0755 4294967296 0 0.000000000 a\n"),
        format!("{root}d 0755 User 0 0.000000000 a\n"),
        format!("{root}d 0755 0 0 0 a\n"),
        format!("{root}d 0755 0 0 0.0 a\n"),
        format!("{root}d 0755 0 0 -0.000000000 a\n"),
        format!("{root}d 0755 0 0 0.0000000000 a\n"),
        format!("{root}d 0755 0 0 0.000000000 a user.b=1 user.a=1\n"),
        format!("{root}d 0755 0 0 0.000000000 a user.a=1 user.a=1\n"),
        format!("{root}d 0755 0 0 0.000000000 a user.a\n"),
        format!("{root}d 0755 0 0 0.000000000 a =1\n"),
        format!("{root}l 0755 0 0 0.000000000 t a\n"),
        format!("{root}f 0644 0 0 0.000000000 03 {digest} a\n"),
        format!("{root}f 0644 0 0 0.000000000 18446744073709551616 {digest} a\n"),
        format!("{root}f 0644 0 0 0.000000000 3 {} a\n", digest.to_string().to_uppercase()),
    ];
    read(root.as_bytes()).unwrap();
    for text in &bad {
        assert!(read(text.as_bytes()).is_err(), "{text:?}");
    }
}

#[test]
fn an_endless_line_is_given_up() {
    let input = HEADER.chain(io::repeat(b'a'));
    let mut reader = Reader::new(io::BufReader::new(input)).unwrap();
    assert!(matches!(reader.read(), Err(ListingError::Malformed { line: 2, .. })));
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..12)
}

fn component() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>().prop_map(|b| if b == 0 || b == b'/' { b'-' } else { b }), 1..6)
        .prop_map(|c| if c == b"." || c == b".." { b"x".to_vec() } else { c })
}

fn any_meta() -> impl Strategy<Value = Meta> {
    let owner = || prop_oneof![Just(Owner::User), any::<u32>().prop_map(Owner::Id)];
    let xattrs = btree_map(component(), bytes(), 0..3)
        .prop_map(|map| map.into_iter().map(|(name, value)| Xattr { name, value }).collect());
    (0u16..0o10000, owner(), owner(), any::<i64>(), 0u32..1_000_000_000, xattrs).prop_map(
        |(mode, uid, gid, seconds, nanoseconds, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime: Time { seconds, nanoseconds },
            xattrs,
        },
    )
}

#[derive(Debug, Clone)]
enum Tree {
    Leaf(Node),
    Directory(Meta, bool, std::collections::BTreeMap<Vec<u8>, Tree>),
}

fn tree() -> impl Strategy<Value = Tree> {
    let target = component();
    let leaf = prop_oneof![
        (any_meta(), any::<u64>(), any::<[u8; 32]>()).prop_map(|(meta, size, content)| Node::File {
            meta,
            size,
            content: content.into()
        }),
        (any_meta(), target)
            .prop_map(|(meta, target)| Node::Symlink { meta: Meta { mode: 0o777, ..meta }, target }),
        any_meta().prop_map(|meta| Node::Fifo { meta }),
        any_meta().prop_map(|meta| Node::Socket { meta }),
        Just(Node::Whiteout),
    ]
    .prop_map(Tree::Leaf);
    leaf.prop_recursive(4, 40, 6, |inner| {
        (any_meta(), any::<bool>(), btree_map(component(), inner, 0..6))
            .prop_map(|(meta, opaque, children)| Tree::Directory(meta, opaque, children))
    })
}

fn flatten(tree: Tree, path: Vec<u8>, entries: &mut Vec<Entry>) {
    match tree {
        Tree::Leaf(node) => entries.push(Entry { path, node }),
        Tree::Directory(meta, opaque, children) => {
            entries.push(Entry { path: path.clone(), node: Node::Directory { meta, opaque } });
            for (name, child) in children {
                let child_path = if path == b"." { name } else { [&path[..], b"/", &name].concat() };
                flatten(child, child_path, entries);
            }
        }
    }
}

proptest! {
    #[test]
    fn listings_round_trip(children in btree_map(component(), tree(), 0..8), meta in any_meta()) {
        let mut entries = Vec::new();
        flatten(Tree::Directory(meta, false, children), b".".to_vec(), &mut entries);
        let (bytes, digest) = write(&entries).unwrap();
        prop_assert_eq!(read(&bytes).unwrap(), (entries, digest));
    }

    #[test]
    fn what_is_read_is_canonical(text in "[dofhlpsw] (0755 0 0 0\\.000000000 )?[a-c./\\\\x0-9 =]{0,12}\n") {
        let text = format!("casemate-listing 1\nd 0755 0 0 0.000000000 .\n{text}");
        if let Ok((entries, _)) = read(text.as_bytes()) {
            prop_assert_eq!(write(&entries).unwrap().0, text.as_bytes());
        }
    }

    #[test]
    fn flipped_bytes_never_panic(position in 0usize..400, byte: u8) {
        let entries = [directory(b"."), directory(b"bin"), file(b"bin/su"), file(b"c")];
        let (mut bytes, digest) = write(&entries).unwrap();
        let position = position % bytes.len();
        bytes[position] = byte;
        if let Ok((read, found)) = read(&bytes) {
            prop_assert_eq!(found == digest, read == entries);
        }
    }
}
