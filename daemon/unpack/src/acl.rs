//! Access control lists: tar has them as text (`SCHILY.acl.*`), the kernel wants its own bytes.

const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;

/// `user::rwx,user:1000:r--,mask::r-x,…`, also one on a line, also with the number in a fourth field as star writes it.
/// `None`: an empty list, which is none.
pub fn encode(text: &[u8], default: bool) -> Result<Option<Vec<u8>>, &'static str> {
    let text = std::str::from_utf8(text).map_err(|_| "no access control list")?;
    let mut entries = Vec::new();
    for part in text.split([',', '\n']) {
        let part = part.split('#').next().unwrap_or_default().trim();
        if part.is_empty() {
            continue;
        }
        let part = if default { part.strip_prefix("default:").unwrap_or(part) } else { part };
        let fields: Vec<_> = part.split(':').collect();
        let (kind, name, permissions, number) = match fields[..] {
            [kind, name, permissions] => (kind, name, permissions, None),
            [kind, name, permissions, number] => (kind, name, permissions, Some(number)),
            // `mask:rwx` and `other:r--` may leave the empty name out.
            [kind @ ("mask" | "m" | "other" | "o"), permissions] => (kind, "", permissions, None),
            _ => return Err("an entry that is none"),
        };
        let id = match (name, number) {
            ("", None) => None,
            (_, Some(number)) => Some(number.parse().map_err(|_| "an entry whose number is none")?),
            (name, None) => {
                // Who a name is only the image's own passwd could tell.
                Some(name.parse().map_err(|_| "an entry that names somebody without their number")?)
            }
        };
        let tag: u16 = match (kind, id) {
            ("user" | "u", None) => 0x01,
            ("user" | "u", Some(_)) => 0x02,
            ("group" | "g", None) => 0x04,
            ("group" | "g", Some(_)) => 0x08,
            ("mask" | "m", None) => 0x10,
            ("other" | "o", None) => 0x20,
            _ => return Err("an entry that is none"),
        };
        if id.is_some_and(|id: u32| id > 65_535) {
            return Err("an entry for an id outside 0 to 65535");
        }
        let mut bits = 0u16;
        for letter in permissions.bytes() {
            bits |= match letter {
                b'r' => 4,
                b'w' => 2,
                b'x' => 1,
                b'-' => 0,
                _ => return Err("an entry whose permissions are none"),
            };
        }
        entries.push((tag, id.unwrap_or(NO_ID), bits));
    }
    if entries.is_empty() {
        return Ok(None);
    }
    if entries.len() > 1000 {
        return Err("too many entries");
    }
    entries.sort_unstable();
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, id, bits) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_the_kernels_bytes() {
        let text = b"user::rwx,group::r-x,other::---,user:1000:r--,mask::rwx";
        let bytes = encode(text, false).unwrap().unwrap();
        let expected = [
            &[2, 0, 0, 0][..],
            &[1, 0, 7, 0, 255, 255, 255, 255],
            &[2, 0, 4, 0, 0xe8, 3, 0, 0],
            &[4, 0, 5, 0, 255, 255, 255, 255],
            &[16, 0, 7, 0, 255, 255, 255, 255],
            &[32, 0, 0, 0, 255, 255, 255, 255],
        ]
        .concat();
        assert_eq!(bytes, expected);
        assert_eq!(
            encode(b"other:---\nuser::rwx # all\nuser:bob:r--:1000\ngroup::r-x\nm:rwx\n", false)
                .unwrap()
                .unwrap(),
            expected
        );
        assert_eq!(encode(b"", false).unwrap(), None);
        for bad in
            ["user:bob:r--", "user::rwz", "nobody::r", "user:70000:r--", "mask:5:r--", "user", "\u{ff}:"]
        {
            assert!(encode(bad.as_bytes(), false).is_err(), "{bad}");
        }
    }
}
