//! Objects: one inode for each content with each set of attributes.
//!
//! ```text
//! objects/ab/cdef…-0123456789abcdef        the object
//! objects/ab/cdef…-0123456789abcdef.1      another copy, when the first one has all the links its file system allows
//! ```
//!
//! `abcdef…` is the BLAKE3 of the content, as `b3sum` prints it. The sixteen digits are the first 64 bits of the BLAKE3 of
//! mode, owner, mtime and xattrs in the form of [`crate::listing`]. They tell attributes apart, they don't prove them: 64
//! bits can be made to collide, so whoever links to an object compares its attributes first and takes another copy's number
//! where they differ.

use std::fmt;
use std::str::FromStr;

use crate::listing::Meta;
use crate::names::{BadName, Digest};

/// Most copies of one object.
pub const COPIES_MAX: u32 = 99_999;

/// An object's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    pub content: Digest,
    attributes: u64,
    /// 0 is the object itself.
    pub copy: u32,
}

impl ObjectName {
    pub fn new(content: Digest, meta: &Meta) -> Self {
        let mut text = String::new();
        meta.encode("", &mut text);
        let digest = Digest::of(text.as_bytes());
        let (first, _) = digest.as_bytes().split_first_chunk::<8>().expect("a digest has 32 bytes");
        Self { content, attributes: u64::from_be_bytes(*first), copy: 0 }
    }

    /// The first copy of the next higher number.
    pub fn next_copy(self) -> Option<Self> {
        (self.copy < COPIES_MAX).then_some(Self { copy: self.copy + 1, ..self })
    }

    /// The directory below `objects/`.
    pub fn directory(&self) -> String {
        format!("{:02x}", self.content.as_bytes()[0])
    }

    /// The name in that directory.
    pub fn file_name(&self) -> String {
        let content = self.content.to_string();
        let mut name = format!("{}-{:016x}", &content[2..], self.attributes);
        if self.copy > 0 {
            name.push_str(&format!(".{}", self.copy));
        }
        name
    }
}

/// `ab/cdef…`, relative to `objects/`.
impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.directory(), self.file_name())
    }
}

impl FromStr for ObjectName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let parse = || {
            let (directory, name) = text.split_once('/')?;
            let (content, rest) = name.split_once('-')?;
            let (attributes, copy) = match rest.split_once('.') {
                Some((attributes, copy)) => (attributes, copy.parse().ok().filter(|&c| c > 0)?),
                None => (rest, 0),
            };
            let content = format!("{directory}{content}").parse().ok()?;
            let name = Self { content, attributes: u64::from_str_radix(attributes, 16).ok()?, copy };
            (copy <= COPIES_MAX && name.to_string() == text).then_some(name)
        };
        parse().ok_or_else(|| BadName {
            kind: "object",
            text: text.chars().take(200).collect(),
            rule: "two digits, '/', 62 digits, '-', 16 digits, and perhaps '.' and a number",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listing::{Owner, Time, Xattr};

    fn meta() -> Meta {
        Meta {
            mode: 0o755,
            uid: Owner::Id(0),
            gid: Owner::User,
            mtime: Time { seconds: 1, nanoseconds: 2 },
            xattrs: vec![Xattr { name: b"user.a".to_vec(), value: b" \0".to_vec() }],
        }
    }

    #[test]
    fn names_round_trip_and_tell_attributes_apart() {
        let content = Digest::of(b"content");
        let name = ObjectName::new(content, &meta());
        let copy = name.next_copy().unwrap();
        for name in [name, copy] {
            assert_eq!(name.to_string().parse::<ObjectName>().unwrap(), name);
            assert!(name.to_string().starts_with(&content.to_string()[..2]));
        }
        let others = [
            Meta { mode: 0o4755, ..meta() },
            Meta { uid: Owner::User, ..meta() },
            Meta { gid: Owner::Id(0), ..meta() },
            Meta { mtime: Time { seconds: 1, nanoseconds: 3 }, ..meta() },
            Meta { xattrs: vec![], ..meta() },
        ];
        for other in others {
            assert_ne!(ObjectName::new(content, &other), name);
        }
        for text in ["", "ab", "ab/cd", &format!("{name}.0"), &format!("{name}."), &format!("{name}.100000")]
        {
            assert!(text.parse::<ObjectName>().is_err(), "{text:?}");
        }
    }
}
