//! A Debian package: an `ar` archive of `debian-binary`, `control.tar…`, `data.tar…`, in that order, and nothing else (but
//! members whose names begin with `_`, which deb(5) says to pass over).

use crate::decode::Slice;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"!<arch>\n";
const HEADER: u64 = 60;
/// More are in no package.
const MEMBERS_MAX: u32 = 16;

/// The slice of a package that is its `data.tar…`.
pub fn data(mut package: Slice) -> Result<Slice> {
    let bad = |reason: &'static str| Error::archive(format!("no Debian package: {reason}"));
    let mut magic = [0; 8];
    if !package.peek(&mut magic)? || &magic != MAGIC {
        return Err(bad("its first bytes are not those of an ar archive"));
    }
    package.position += 8;
    let mut expected = ["debian-binary", "control.tar", "data.tar"].into_iter();
    let mut found = None;
    for _ in 0..MEMBERS_MAX {
        if package.position == package.end {
            return found.ok_or_else(|| bad("it has no data.tar"));
        }
        let mut header = [0; HEADER as usize];
        if !package.peek(&mut header)? || &header[58..] != b"`\n" {
            return Err(bad("a member's header is cut off or damaged"));
        }
        let name = header[..16].trim_ascii_end();
        let name = name.strip_suffix(b"/").unwrap_or(name);
        let size =
            crate::tar::decimal(header[48..58].trim_ascii_end()).ok_or_else(|| bad("a size that is none"))?;
        let start = package.position + HEADER;
        let end = start.checked_add(size).filter(|&end| end <= package.end);
        let end = end.ok_or_else(|| bad("a member is cut off"))?;
        let content = Slice { position: start, end, ..package.clone() };
        // Members begin at even places; the very last one may lack its padding.
        package.position = (end + size % 2).min(package.end);
        if name.starts_with(b"_") {
            continue;
        }
        match expected.next() {
            Some("debian-binary") if name == b"debian-binary" => {
                let mut version = [0; 2];
                if !content.peek(&mut version)? || &version != b"2." {
                    return Err(bad("its format is not 2"));
                }
            }
            Some("control.tar") if compressed(name, "control.tar") => {}
            Some("data.tar") if compressed(name, "data.tar") => found = Some(content),
            _ => return Err(bad("its members are not those of a package, or not in their order")),
        }
    }
    Err(bad("too many members"))
}

fn compressed(name: &[u8], stem: &str) -> bool {
    let rest = name.strip_prefix(stem.as_bytes());
    rest.is_some_and(|suffix| [&b""[..], b".gz", b".xz", b".zst", b".bz2"].contains(&suffix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::Arc;

    fn ar(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for (name, content) in members {
            let size = content.len();
            writeln!(bytes, "{name:<16}{:<12}{:<6}{:<6}{:<8}{size:<10}`", 0, 0, 0, 100_644).unwrap();
            bytes.extend(*content);
            bytes.resize(bytes.len().next_multiple_of(2), b'\n');
        }
        bytes
    }

    fn open(bytes: &[u8]) -> Result<Vec<u8>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let mut data = data(Slice::new(Arc::new(file), 0, bytes.len() as u64)?)?;
        let mut content = Vec::new();
        data.read_to_end(&mut content).unwrap();
        Ok(content)
    }

    #[test]
    fn packages_and_what_is_none() {
        let binary = ("debian-binary", &b"2.0\n"[..]);
        let control = ("control.tar.xz", &b"c"[..]);
        let tar = ("data.tar", &b"data!"[..]);
        assert_eq!(open(&ar(&[binary, control, tar])).unwrap(), b"data!");
        assert_eq!(
            open(&ar(&[("debian-binary/", b"2.1\n"), ("_x", b"1"), control, ("data.tar.zst/", b"z")]))
                .unwrap(),
            b"z"
        );
        let mut unpadded = ar(&[binary, control, tar]);
        unpadded.pop();
        assert_eq!(open(&unpadded).unwrap(), b"data!");
        let mut cut = unpadded.clone();
        cut.pop();
        let mut longer = ar(&[binary, control, tar]);
        longer.extend(b"x");
        let bad = [
            vec![],
            b"!<arch>\n".to_vec(),
            ar(&[binary, control]),
            ar(&[binary, tar, control]),
            ar(&[control, binary, tar]),
            ar(&[("debian-binary", b"3.0\n"), control, tar]),
            ar(&[binary, control, tar, tar]),
            ar(&[binary, control, tar, ("more", b"")]),
            ar(&[binary, control, ("data.tar.exe", b"")]),
            cut,
            longer,
        ];
        for bytes in bad {
            assert!(open(&bytes).is_err(), "{}", bytes.escape_ascii());
        }
    }
}
