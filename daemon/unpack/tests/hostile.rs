//! THREATS.md, section A, row by row: archives that must be refused, in every compression, with nothing extracted, nothing
//! touched beside, and the culprit named.

mod archives;

use std::io::Write;

use archives::{COMPRESSIONS, Compression, Header, Place, Tar, compress, deb, limits, octal, pax_record};
use casemate_worker::protocol::{FailureKind, UnpackLimits};

struct Case {
    name: &'static str,
    archive: Vec<u8>,
    /// What the message must say.
    says: &'static str,
}

fn case(name: &'static str, says: &'static str, archive: Vec<u8>) -> Case {
    Case { name, archive, says }
}

/// A good member before and after, so that a refusal is known to be of the whole.
fn amid(bad: impl FnOnce(Tar) -> Tar) -> Vec<u8> {
    bad(Tar::new().directory(b"etc/").file(b"etc/good", b"good")).file(b"z", b"z").end()
}

fn names() -> Vec<Case> {
    let deep = [&b"d/".repeat(300)[..], b"f"].concat();
    vec![
        case("dot-dot", "'../x'", amid(|t| t.file(b"../x", b"x"))),
        case("dot-dot inside", "'a/../../x'", amid(|t| t.file(b"a/../../x", b"x"))),
        case("dot-dot at the end", "'a/..'", amid(|t| t.directory(b"a/.."))),
        case("dot-dot after ./", "'./../x'", amid(|t| t.file(b"./../x", b"x"))),
        case("absolute", "'/etc/x'", amid(|t| t.file(b"/etc/x", b"x"))),
        case("two slashes", "'//etc/x'", amid(|t| t.file(b"//etc/x", b"x"))),
        case(
            "dot-dot by ustar prefix",
            "'../../x'",
            amid(|t| t.raw(Header::new(b'0', b"x").with(345, b"../.."), b"")),
        ),
        case(
            "absolute by ustar prefix",
            "'/etc/x'",
            amid(|t| t.raw(Header::new(b'0', b"x").with(345, b"/etc"), b"")),
        ),
        case("dot-dot by PAX", "'../x'", amid(|t| t.pax(&[(b"path", b"../x")]).file(b"x", b""))),
        case("absolute by PAX", "'/x'", amid(|t| t.pax(&[(b"path", b"/x")]).file(b"x", b""))),
        case(
            "dot-dot by GNU long name",
            "'../x'",
            amid(|t| t.long(b'L', b"../x").raw(Header::new(b'0', b"x").gnu(), b"")),
        ),
        case(
            "absolute by sparse name",
            "'/x'",
            amid(|t| {
                t.pax(&[
                    (b"GNU.sparse.major", b"1"),
                    (b"GNU.sparse.minor", b"0"),
                    (b"GNU.sparse.name", b"/x"),
                    (b"GNU.sparse.realsize", b"0"),
                ])
                .raw(Header::new(b'0', b"x").size(512), b"0\n")
            }),
        ),
        case("empty component", "'a//b'", amid(|t| t.file(b"a//b", b""))),
        case("dot component", "'a/./b'", amid(|t| t.file(b"a/./b", b""))),
        case("empty name", "''", amid(|t| t.file(b"", b""))),
        case("root as a file", "'.'", amid(|t| t.file(b".", b""))),
        case("root as a link", "'./'", amid(|t| t.symlink(b"./", b"/etc"))),
        case("file with a slash", "'a/'", amid(|t| t.file(b"a/", b""))),
        case("link with a slash", "'a/'", amid(|t| t.symlink(b"a/", b"b"))),
        case("NUL by PAX", "path", amid(|t| t.pax(&[(b"path", b"a\0b")]).file(b"x", b""))),
        case(
            "NUL by GNU long name",
            "NUL",
            amid(|t| t.long(b'L', b"a\0b").raw(Header::new(b'0', b"x").gnu(), b"")),
        ),
        case("too deep", "deeper than 256", amid(|t| t.pax(&[(b"path", &deep)]).file(b"x", b""))),
        case(
            "component too long",
            "above 255",
            amid(|t| t.pax(&[(b"path", &b"n".repeat(256))]).file(b"x", b"")),
        ),
        case("escapes in a name", r"'../\x1b[2J\n'", amid(|t| t.file(b"../\x1b[2J\n", b""))),
    ]
}

fn links() -> Vec<Case> {
    vec![
        case(
            "through an absolute symbolic link",
            "'l/x'",
            amid(|t| t.symlink(b"l", b"/tmp").file(b"l/x", b"x")),
        ),
        case(
            "through a relative symbolic link",
            "'l/x'",
            amid(|t| t.symlink(b"l", b"..").file(b"l/x", b"x")),
        ),
        case(
            "through a link to a good directory",
            "'l/x'",
            amid(|t| t.symlink(b"l", b"etc").file(b"l/x", b"x")),
        ),
        case("directory through a link", "'l/d'", amid(|t| t.symlink(b"l", b"..").directory(b"l/d"))),
        case("link through a link", "'l/m'", amid(|t| t.symlink(b"l", b"..").symlink(b"l/m", b"x"))),
        case("deep below a link", "'a/l/b/c'", amid(|t| t.symlink(b"a/l", b"..").file(b"a/l/b/c", b"x"))),
        case("link in the place of a directory", "'etc'", amid(|t| t.symlink(b"etc", b"/tmp"))),
        case("directory in the place of a link", "'l'", amid(|t| t.symlink(b"l", b"..").directory(b"l"))),
        case("file in the place of a link", "'l'", amid(|t| t.symlink(b"l", b"../secret").file(b"l", b"x"))),
        case(
            "link in the place of an implied directory",
            "'a'",
            amid(|t| t.file(b"a/b", b"").symlink(b"a", b"..")),
        ),
        case("below a file", "'etc/good/x'", amid(|t| t.file(b"etc/good/x", b"x"))),
        case("empty target", "'l'", amid(|t| t.symlink(b"l", b""))),
        case(
            "target too long",
            "'l'",
            amid(|t| t.pax(&[(b"linkpath", &b"t".repeat(4096))]).symlink(b"l", b"t")),
        ),
        case("hard link outside", "'h'", amid(|t| t.hardlink(b"h", b"../secret"))),
        case("absolute hard link", "'h'", amid(|t| t.hardlink(b"h", b"/etc/passwd"))),
        case(
            "hard link by PAX outside",
            "'h'",
            amid(|t| t.pax(&[(b"linkpath", b"../secret")]).hardlink(b"h", b"etc/good")),
        ),
        case(
            "hard link by GNU long link outside",
            "'h'",
            amid(|t| t.long(b'K', b"../secret").raw(Header::new(b'1', b"h").gnu(), b"")),
        ),
        case("hard link forward", "'h'", amid(|t| t.hardlink(b"h", b"later").file(b"later", b""))),
        case("hard link to itself", "'h'", amid(|t| t.hardlink(b"h", b"h"))),
        case("hard link to nothing", "'h'", amid(|t| t.hardlink(b"h", b"nothing"))),
        case(
            "hard link to a symbolic link",
            "'h'",
            amid(|t| t.symlink(b"l", b"../secret").hardlink(b"h", b"l")),
        ),
        case("hard link to a directory", "'h'", amid(|t| t.hardlink(b"h", b"etc"))),
        case("hard link through a link", "'h'", amid(|t| t.symlink(b"l", b"etc").hardlink(b"h", b"l/good"))),
        case("hard link without target", "'h'", amid(|t| t.hardlink(b"h", b""))),
        case(
            "hard link with content",
            "'h'",
            amid(|t| t.raw(Header::new(b'1', b"h").link(b"etc/good").size(4), b"evil")),
        ),
        case(
            "symbolic link with content",
            "'l'",
            amid(|t| t.raw(Header::new(b'2', b"l").link(b"x").size(4), b"evil")),
        ),
        case("directory with content", "'d'", amid(|t| t.raw(Header::new(b'5', b"d").size(4), b"evil"))),
        case("fifo with content", "'p'", amid(|t| t.raw(Header::new(b'6', b"p").size(4), b"evil"))),
        case(
            "file with a link target",
            "'f'",
            amid(|t| t.raw(Header::new(b'0', b"f").link(b"etc/good"), b"")),
        ),
    ]
}

fn kinds() -> Vec<Case> {
    let device = |kind, name: &[u8], major, minor| {
        Header::new(kind, name).with(329, &octal(major, 8)).with(337, &octal(minor, 8))
    };
    let xattr = |name: &'static [u8], value: &'static [u8]| {
        amid(|t| t.pax(&[(&[b"SCHILY.xattr.", name].concat(), value)]).file(b"x", b""))
    };
    vec![
        case("character device", "'mem'", amid(|t| t.raw(device(b'3', b"mem", 1, 1), b""))),
        case("block device", "'sda'", amid(|t| t.raw(device(b'4', b"sda", 8, 0), b""))),
        case(
            "device in a directory like dev",
            "'develop/mem'",
            amid(|t| t.raw(device(b'3', b"develop/mem", 1, 1), b"")),
        ),
        case("overlayfs whiteout", "whiteout", amid(|t| t.raw(device(b'3', b"gone", 0, 0), b""))),
        case("overlayfs whiteout in dev", "whiteout", amid(|t| t.raw(device(b'3', b"dev/gone", 0, 0), b""))),
        case("whiteout", "'etc/.wh.good'", amid(|t| t.file(b"etc/.wh.good", b""))),
        case("opaque whiteout", "'etc/.wh..wh..opq'", amid(|t| t.file(b"etc/.wh..wh..opq", b""))),
        case("below a whiteout", "'.wh.x/y'", amid(|t| t.file(b".wh.x/y", b""))),
        case("unknown type", "unknown type", amid(|t| t.raw(Header::new(b'M', b"x"), b""))),
        case("volume label", "unknown type", amid(|t| t.raw(Header::new(b'V', b"x").gnu(), b""))),
        case("old long name", "unknown type", amid(|t| t.raw(Header::new(b'N', b"x").gnu(), b""))),
        case("xattr trusted.overlay", "trusted.overlay", xattr(b"trusted.overlay.opaque", b"y")),
        case("xattr user.overlay", "user.overlay", xattr(b"user.overlay.opaque", b"y")),
        case("xattr user.overlay.redirect", "user.overlay", xattr(b"user.overlay.redirect", b"/etc")),
        case("xattr system", "system.nfs4_acl", xattr(b"system.nfs4_acl", b"x")),
        case("xattr security", "security.other", xattr(b"security.other", b"x")),
        case("xattr without namespace", "'x'", xattr(b"nothing", b"x")),
        case("xattr without name", "'SCHILY.xattr.'", xattr(b"", b"x")),
        case(
            "xattr on a link",
            "'l'",
            amid(|t| t.pax(&[(b"SCHILY.xattr.user.a", b"x")]).symlink(b"l", b"x")),
        ),
        case(
            "xattrs too large",
            "too long",
            amid(|t| t.pax(&[(b"SCHILY.xattr.user.a", &b"x".repeat(70_000))]).file(b"x", b"")),
        ),
        case(
            "ACL that names nobody",
            "SCHILY.acl",
            amid(|t| t.pax(&[(b"SCHILY.acl.access", b"user:eve:rwx")]).file(b"x", b"")),
        ),
        case(
            "owner too high",
            "outside of 0 to 65535",
            amid(|t| t.pax(&[(b"uid", b"65536")]).file(b"x", b"")),
        ),
        case(
            "group too high",
            "outside of 0 to 65535",
            amid(|t| t.pax(&[(b"gid", b"4294967296")]).file(b"x", b"")),
        ),
    ]
}

fn ambiguities() -> Vec<Case> {
    let big = octal(0o77_777_777_777, 12);
    let record = |bytes: &'static [u8]| {
        amid(|t| t.raw(Header::new(b'x', b"p").size(bytes.len() as u64), bytes).file(b"x", b""))
    };
    let sparse = |records: &[(&[u8], &[u8])], size: u64, data: &[u8]| {
        amid(|t| t.pax(records).raw(Header::new(b'0', b"s").size(size), data))
    };
    let old_sparse = |descriptors: &[(u64, u64)], real: u64, size: u64| {
        let mut header = Header::new(b'S', b"s").gnu().size(size).with(483, &octal(real, 12));
        for (index, (offset, length)) in descriptors.iter().enumerate() {
            header = header
                .with(386 + 24 * index, &octal(*offset, 12))
                .with(398 + 24 * index, &octal(*length, 12));
        }
        amid(|t| t.raw(header, &vec![b'x'; size as usize]))
    };
    let one: &[(&[u8], &[u8])] =
        &[(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")];
    vec![
        case(
            "PAX and GNU name",
            "both",
            amid(|t| t.pax(&[(b"path", b"a")]).long(b'L', b"b").file(b"x", b"")),
        ),
        case(
            "PAX and GNU link",
            "both",
            amid(|t| t.pax(&[(b"linkpath", b"etc/good")]).long(b'K', b"z").hardlink(b"x", b"y")),
        ),
        case(
            "two PAX headers",
            "two PAX",
            amid(|t| t.pax(&[(b"path", b"a")]).pax(&[(b"path", b"b")]).file(b"x", b"")),
        ),
        case("two GNU names", "two GNU", amid(|t| t.long(b'L', b"a").long(b'L', b"b").file(b"x", b""))),
        case(
            "PAX key twice",
            "'path' twice",
            amid(|t| t.pax(&[(b"path", b"a"), (b"path", b"b")]).file(b"x", b"")),
        ),
        case(
            "xattr twice",
            "twice",
            amid(|t| {
                t.pax(&[(b"SCHILY.xattr.user.a", b"1"), (b"SCHILY.xattr.user.a", b"2")]).file(b"x", b"")
            }),
        ),
        // TARmageddon: which of the two sizes says where the next header is?
        case("PAX size against header", "disagree", amid(|t| t.pax(&[(b"size", b"1024")]).file(b"x", b""))),
        case(
            "smaller PAX size",
            "disagree",
            amid(|t| {
                t.pax(&[(b"size", b"0")])
                    .raw(Header::new(b'0', b"x").size(512), &Header::new(b'0', b"../evil").sealed())
            }),
        ),
        case(
            "PAX size where the field is full",
            "disagree",
            amid(|t| t.pax(&[(b"size", b"5")]).raw(Header::new(b'0', b"x").with(124, &big), b"12345")),
        ),
        case("PAX size that is none", "'size'", amid(|t| t.pax(&[(b"size", b"1e3")]).file(b"x", b""))),
        case("negative PAX size", "'size'", amid(|t| t.pax(&[(b"size", b"-1")]).file(b"x", b""))),
        case("PAX size with a plus", "'size'", amid(|t| t.pax(&[(b"size", b"+1")]).file(b"x", b"x"))),
        case(
            "huge PAX size",
            "'size'",
            amid(|t| t.pax(&[(b"size", b"99999999999999999999")]).file(b"x", b"")),
        ),
        case("PAX time that is none", "'mtime'", amid(|t| t.pax(&[(b"mtime", b"now")]).file(b"x", b""))),
        case(
            "PAX time out of range",
            "time is out of range",
            amid(|t| t.pax(&[(b"mtime", b"99999999999999")]).file(b"x", b"")),
        ),
        case("empty PAX path", "'path'", amid(|t| t.pax(&[(b"path", b"")]).file(b"x", b""))),
        case("unknown PAX key", "'filename'", amid(|t| t.pax(&[(b"filename", b"y")]).file(b"x", b""))),
        case("PAX record length short", "length is wrong", record(b"5 path=a\n")),
        case("PAX record length long", "length is wrong", record(b"99 path=a\n")),
        case("PAX record length with zero", "length is wrong", record(b"010 path=a\n")),
        case("PAX record without newline", "length is wrong", record(b"9 path=abc")),
        case("PAX record without length", "without length", record(b"path=abc\n")),
        case("PAX record without equals", "without '='", record(b"8 patha\n")),
        case(
            "global header that renames",
            "global",
            amid(|t| {
                let data = pax_record(b"path", b"evil");
                t.raw(Header::new(b'g', b"g").size(data.len() as u64), &data).file(b"x", b"")
            }),
        ),
        case(
            "header without member",
            "no next member",
            Tar::new().file(b"x", b"").pax(&[(b"path", b"y")]).end(),
        ),
        case(
            "PAX in the old format",
            "old tar format",
            amid(|t| t.raw(Header::new(b'x', b"p").old(), b"").file(b"x", b"")),
        ),
        case(
            "a format of its own",
            "unknown format",
            amid(|t| t.raw(Header::new(b'0', b"x").with(257, b"evil\0\0\0\0"), b"")),
        ),
        case("twice", "twice", amid(|t| t.file(b"etc/good", b"evil"))),
        case("twice, spelled differently", "twice", amid(|t| t.file(b"./etc/good", b"evil"))),
        case("directory twice", "twice", amid(|t| t.directory(b"etc"))),
        case(
            "hard link in the place of a file",
            "twice",
            amid(|t| t.file(b"f", b"").hardlink(b"f", b"etc/good")),
        ),
        case(
            "negative size",
            "size is negative",
            amid(|t| t.raw(Header::new(b'0', b"x").with(124, &[0xff; 12]), b"")),
        ),
        case(
            "huge size",
            "",
            amid(|t| {
                t.raw(Header::new(b'0', b"x").with(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), b"")
            }),
        ),
        case(
            "overflowing size",
            "size is no number",
            amid(|t| {
                t.raw(
                    Header::new(b'0', b"x").with(124, b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
                    b"",
                )
            }),
        ),
        case("size beyond the end", "", amid(|t| t.raw(Header::new(b'0', b"x").size(1 << 30), b""))),
        case(
            "size that is none",
            "size is no number",
            amid(|t| t.raw(Header::new(b'0', b"x").with(124, b"12x45678901\0"), b"")),
        ),
        case(
            "negative owner",
            "owner is negative",
            amid(|t| t.raw(Header::new(b'0', b"x").with(108, &[0xff; 8]), b"")),
        ),
        case(
            "mode that is none",
            "mode",
            amid(|t| t.raw(Header::new(b'0', b"x").with(100, b"7777777\0"), b"")),
        ),
        case(
            "sparse map that overlaps",
            "overlaps",
            sparse(&[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,4,2,4")], 8, b"12345678"),
        ),
        case(
            "sparse map backwards",
            "overlaps",
            sparse(&[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"5,2,0,2")], 4, b"1234"),
        ),
        case(
            "sparse map beyond the file",
            "fit",
            sparse(&[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"8,4")], 4, b"1234"),
        ),
        case(
            "sparse map of more data",
            "fit",
            sparse(&[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,8")], 4, b"1234"),
        ),
        case(
            "sparse map that overflows",
            "overlaps",
            sparse(&[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"18446744073709551615,4")], 4, b"1234"),
        ),
        case(
            "sparse map of odd length",
            "map",
            sparse(&[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.map", b"0,4,8")], 4, b"1234"),
        ),
        case(
            "sparse map of other length",
            "length",
            sparse(
                &[(b"GNU.sparse.size", b"9"), (b"GNU.sparse.numblocks", b"2"), (b"GNU.sparse.map", b"0,4")],
                4,
                b"1234",
            ),
        ),
        case("sparse without size", "real size", sparse(&[(b"GNU.sparse.map", b"0,4")], 4, b"1234")),
        case("sparse without map", "map", sparse(&[(b"GNU.sparse.size", b"9")], 4, b"1234")),
        case(
            "sparse version 2",
            "version",
            sparse(
                &[(b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")],
                4,
                b"1234",
            ),
        ),
        case("sparse map without end", "too many", sparse(one, 512, b"18446744073709551615\n")),
        case(
            "sparse map longer than its member",
            "longer",
            sparse(one, 512, &[b"200\n", &b"1\n".repeat(254)[..]].concat()),
        ),
        case("sparse map of no numbers", "none", sparse(one, 512, b"x\n")),
        case(
            "huge sparse file",
            "more bytes of files",
            sparse(&[(b"GNU.sparse.size", b"1152921504606846976"), (b"GNU.sparse.map", b"0,4")], 4, b"1234"),
        ),
        case("old sparse map that overlaps", "overlaps", old_sparse(&[(0, 4), (2, 4)], 9, 8)),
        case("old sparse map with a gap", "gap", {
            let header = Header::new(b'S', b"s")
                .gnu()
                .size(4)
                .with(483, &octal(9, 12))
                .with(410, &octal(0, 12))
                .with(422, &octal(4, 12));
            amid(|t| t.raw(header, b"1234"))
        }),
        case("old sparse map without end", "", {
            let header = Header::new(b'S', b"s").gnu().size(0).with(483, &octal(9, 12)).with(482, b"\x01");
            let mut tar = Tar::new().raw(header, b"");
            for _ in 0..4000 {
                let mut block = [0; 512];
                block[504] = 1;
                for descriptor in block[..504].chunks_exact_mut(24) {
                    descriptor.copy_from_slice(&[octal(0, 12), octal(0, 12)].concat());
                }
                tar.0.extend(block);
            }
            tar.end()
        }),
    ]
}

fn ends() -> Vec<Case> {
    let good = || Tar::new().file(b"x", b"x");
    let mut cut_data = Tar::new().file(b"x", &[b'x'; 2048]).0;
    cut_data.truncate(1500);
    let mut damaged = good().end();
    damaged[1] ^= 1;
    vec![
        case("nothing", "too short", Vec::new()),
        case("a few bytes", "too short", b"tar".to_vec()),
        case("no archive", "checksum", vec![b'x'; 4096]),
        case("only zeros", "empty", vec![0; 10240]),
        case("no end", "'x'", good().0),
        case("half an end", "'x'", [good().0, vec![0; 512]].concat()),
        case("cut in the data", "'x'", cut_data),
        case("cut in a header", "'x'", [good().0, vec![b'a'; 100]].concat()),
        case(
            "one zero block amid",
            "zero block",
            [good().0, vec![0; 512], Tar::new().file(b"y", b"").end()].concat(),
        ),
        case("something after the end", "follows", [good().end(), b"more".to_vec()].concat()),
        case(
            "an archive after the end",
            "follows",
            [good().end(), Tar::new().file(b"../x", b"").end()].concat(),
        ),
        case("wrong checksum", "checksum", damaged),
    ]
}

#[test]
fn hostile_archives_are_refused_whole() {
    let cases: Vec<Case> = [names(), links(), kinds(), ambiguities(), ends()].into_iter().flatten().collect();
    assert!(cases.len() >= 130, "only {}", cases.len());
    let mut taken = Vec::new();
    for Case { name, archive, says } in &cases {
        for compression in COMPRESSIONS {
            let place = Place::new();
            let outcome = place.unpack(&compress(archive, compression), limits());
            let Err(failure) = outcome else {
                taken.push(format!("{name} ({compression:?}): taken"));
                continue;
            };
            if !matches!(failure.kind, FailureKind::Refused | FailureKind::Limit) {
                taken.push(format!("{name} ({compression:?}): {failure:?}"));
            }
            // An empty archive has no compressed form to be told by.
            let unsaid = says == &"too short" && compression != Compression::None;
            if !(failure.message.contains(says) || unsaid) {
                taken.push(format!("{name} ({compression:?}) says {:?}", failure.message));
            }
            if failure.message.bytes().any(|b| b.is_ascii_control()) {
                taken.push(format!("{name} ({compression:?}): control bytes in {:?}", failure.message));
            }
            if !place.untouched() {
                taken.push(format!("{name} ({compression:?}): something was written"));
            }
        }
    }
    assert!(taken.is_empty(), "{}", taken.join("\n"));
}

#[test]
fn damaged_compression_is_refused() {
    let good = Tar::new().file(b"x", &b"some text, again and again. ".repeat(4000)).end();
    for compression in &COMPRESSIONS[1..] {
        let whole = compress(&good, *compression);
        Place::new().unpack(&whole, limits()).unwrap();
        let mut flipped = whole.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0x10;
        let mut bad = vec![("flipped", flipped), ("garbage after", [&whole[..], b"garbage"].concat())];
        for cut in [1, 4, 8, whole.len() / 2, whole.len() - 7] {
            bad.push(("cut", whole[..whole.len() - cut].to_vec()));
        }
        for (what, bytes) in bad {
            let place = Place::new();
            let failure = place.unpack(&bytes, limits()).expect_err(what);
            assert_eq!(failure.kind, FailureKind::Refused, "{compression:?} {what}: {failure:?}");
            assert!(place.untouched(), "{compression:?} {what}");
        }
        // Two streams, one after the other, are one.
        let (first, second) = good.split_at(5000);
        let parts = [compress(first, *compression), compress(second, *compression)].concat();
        Place::new().unpack(&parts, limits()).unwrap();
    }
}

#[test]
fn bombs_are_given_up() {
    let zeros = vec![0; 300 << 20];
    let mut tar = Tar::new().raw(Header::new(b'0', b"zeros").size(zeros.len() as u64), b"");
    tar.0.extend(zeros);
    let bomb = tar.end();
    for compression in COMPRESSIONS {
        let small = UnpackLimits { bytes: 100 << 20, ..limits() };
        let place = Place::new();
        let bytes = compress(&bomb, compression);
        let failure = place.unpack(&bytes, small).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Limit, "{compression:?}: {failure:?}");
        assert!(place.untouched());
        if compression != Compression::None {
            let failure = place.unpack(&bytes, limits()).unwrap_err();
            assert!(failure.message.contains("for each compressed one"), "{compression:?}: {failure:?}");
            assert!(place.untouched());
        }
    }
}

#[test]
fn decoders_that_want_too_much_memory_are_refused() {
    let tar = Tar::new().file(b"x", &[b'x'; 1 << 20]).end();
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    options.dict_size(256 << 20);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&options);
    let stream =
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc32).unwrap();
    let mut xz = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    xz.write_all(&tar).unwrap();
    let mut zst = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    zst.window_log(27).unwrap();
    zst.long_distance_matching(true).unwrap();
    // Streamed, without a size: the header then asks for the whole window.
    zst.write_all(&tar).unwrap();
    for (bytes, what) in [(xz.finish().unwrap(), "xz"), (zst.finish().unwrap(), "zstd")] {
        let place = Place::new();
        let failure = place.unpack(&bytes, limits()).expect_err(what);
        assert!(failure.message.contains("memory"), "{what}: {failure:?}");
        assert!(place.untouched());
        place.unpack(&bytes, UnpackLimits { decoder_memory: 300 << 20, ..limits() }).expect(what);
    }
}

#[test]
fn counts_and_sizes_have_caps() {
    let mut tar = Tar::new();
    for number in 0..101 {
        tar = tar.file(format!("f{number}").as_bytes(), b"");
    }
    let place = Place::new();
    let failure = place.unpack(&tar.end(), UnpackLimits { members: 100, ..limits() }).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Limit);
    let long = Tar::new().raw(Header::new(b'L', b"x").gnu().size(2 << 20), &vec![b'a'; 2 << 20]);
    let failure = place.unpack(&long.file(b"x", b"").end(), limits()).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Limit);
    let many: Vec<_> = (0..1001).map(|n| format!("vendor.key{n}").into_bytes()).collect();
    let records: Vec<_> = many.iter().map(|key| (&key[..], &b""[..])).collect();
    let failure = place.unpack(&Tar::new().pax(&records).file(b"x", b"").end(), limits()).unwrap_err();
    assert_eq!(failure.kind, FailureKind::Limit);
    assert!(place.untouched());
}

#[test]
fn hostile_packages_are_refused() {
    let base =
        || ("base", deb(&Tar::new().directory(b"./").directory(b"./usr").symlink(b"./usr/l", b"..").end()));
    type Members = Vec<(&'static str, Vec<u8>)>;
    let cases: Vec<(&str, Members)> = vec![
        (
            "through an earlier package's link",
            vec![base(), ("evil", deb(&Tar::new().file(b"usr/l/x", b"").end()))],
        ),
        (
            "directory over an earlier package's link",
            vec![base(), ("evil", deb(&Tar::new().directory(b"usr/l").end()))],
        ),
        (
            "link over an earlier package's directory",
            vec![base(), ("evil", deb(&Tar::new().symlink(b"usr", b"/").end()))],
        ),
        ("merged link elsewhere", vec![base(), ("evil", deb(&Tar::new().symlink(b"bin", b"../bin").end()))]),
        (
            "file in the place of a merged link",
            vec![
                base(),
                ("evil", deb(&Tar::new().file(b"lib", b"").end())),
                ("evil", deb(&Tar::new().file(b"lib/x", b"").end())),
            ],
        ),
        (
            "twice in a package",
            vec![base(), ("evil", deb(&Tar::new().file(b"bin/x", b"").file(b"usr/bin/x", b"").end()))],
        ),
        ("dot-dot", vec![base(), ("evil", deb(&Tar::new().file(b"./../x", b"").end()))]),
        ("no package", vec![base(), ("evil", Tar::new().file(b"x", b"").end())]),
        (
            "hard link over packages through a link",
            vec![base(), ("evil", deb(&Tar::new().hardlink(b"h", b"usr/l/secret").end()))],
        ),
    ];
    for (what, packages) in cases {
        let place = Place::new();
        let failure = place.packages(&packages).expect_err(what);
        assert_eq!(
            (failure.kind, &failure.subject[..]),
            (FailureKind::Refused, "evil"),
            "{what}: {failure:?}"
        );
        assert!(place.untouched(), "{what}");
    }
}
