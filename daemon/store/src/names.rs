//! Names, typed once: whoever holds one of these types needs no further check.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Most bytes of a [`Name`].
pub const NAME_MAX: usize = 64;

/// A text is no name of its kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {kind}: {rule}")]
pub struct BadName {
    pub kind: &'static str,
    pub text: String,
    pub rule: &'static str,
}

fn bad(kind: &'static str, text: &str, rule: &'static str) -> BadName {
    BadName { kind, text: text.chars().take(200).collect(), rule }
}

macro_rules! text_serde {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`: names of environments, sources, snapshots, jobs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl Name {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        const RULE: &str =
            "1 to 64 letters (a-z, A-Z), digits, '.', '_' and '-', the first a letter or a digit";
        let bytes = text.as_bytes();
        let good = (1..=NAME_MAX).contains(&bytes.len())
            && bytes[0].is_ascii_alphanumeric()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
        if good { Ok(Self(text.to_owned())) } else { Err(bad("name", text, RULE)) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

text_serde!(Name);

/// `SOURCE/RELEASE`, such as `debian/bookworm`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReleaseName {
    pub source: Name,
    pub release: Name,
}

impl FromStr for ReleaseName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        const RULE: &str = "a source's name, '/', and a release's name, as in debian/bookworm";
        let (source, release) = text.split_once('/').ok_or_else(|| bad("release", text, RULE))?;
        match (source.parse(), release.parse()) {
            (Ok(source), Ok(release)) => Ok(Self { source, release }),
            _ => Err(bad("release", text, RULE)),
        }
    }
}

impl fmt::Display for ReleaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.source, self.release)
    }
}

text_serde!(ReleaseName);

/// A snapshot: the environment's id, which outlives its names, `@`, and the snapshot's name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotName {
    pub environment: Id,
    pub snapshot: Name,
}

impl FromStr for SnapshotName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        const RULE: &str = "an environment's id, '@', and a name";
        let (environment, snapshot) = text.split_once('@').ok_or_else(|| bad("snapshot", text, RULE))?;
        match (environment.parse(), snapshot.parse()) {
            (Ok(environment), Ok(snapshot)) => Ok(Self { environment, snapshot }),
            _ => Err(bad("snapshot", text, RULE)),
        }
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.environment, self.snapshot)
    }
}

text_serde!(SnapshotName);

fn hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N || !digits.iter().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)) {
        return None;
    }
    let value = |b: u8| if b <= b'9' { b - b'0' } else { b - b'a' + 10 };
    Some(std::array::from_fn(|i| value(digits[2 * i]) << 4 | value(digits[2 * i + 1])))
}

fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|b| write!(f, "{b:02x}"))
}

/// A BLAKE3 digest; as text 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl From<[u8; 32]> for Digest {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl FromStr for Digest {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        hex(text).map(Self).ok_or_else(|| bad("digest", text, "64 hexadecimal digits, lower-case"))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

text_serde!(Digest);

/// 128 random bits; as text 32 lower-case hex digits. Names environments for their whole life, and uppers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id([u8; 16]);

impl Id {
    /// A new one, from the kernel's random numbers.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
                Ok(n) => filled += n,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self(bytes))
    }
}

impl FromStr for Id {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        hex(text).map(Self).ok_or_else(|| bad("id", text, "32 hexadecimal digits, lower-case"))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Id({self})")
    }
}

text_serde!(Id);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_are_none() {
        for text in ["", ".", "..", "-a", ".a", "_a", "a/b", "a b", "a\n", "ä", "a\0", &"a".repeat(65)] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
        for text in ["", "debian", "debian/", "/x", "a/b/c", "../x", "a/.."] {
            assert!(text.parse::<ReleaseName>().is_err(), "{text:?}");
        }
        for text in ["", "0", &"0".repeat(63), &"A".repeat(64), &"g".repeat(64), &"0".repeat(65)] {
            assert!(text.parse::<Digest>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn names_round_trip(text in "[A-Za-z0-9][A-Za-z0-9._-]{0,63}") {
            prop_assert_eq!(text.parse::<Name>().unwrap().to_string(), text);
        }

        #[test]
        fn digests_round_trip(bytes: [u8; 32]) {
            let digest = Digest::from(bytes);
            prop_assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        }
    }

    #[test]
    fn ids_differ() {
        assert_ne!(Id::random().unwrap(), Id::random().unwrap());
    }
}
