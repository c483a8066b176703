//! What the store's records hold.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use casemate_manifest::ResourceLimits;
use casemate_store::names::BadName;
use casemate_store::{Digest, Id, SnapshotName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::api::{ReleaseInfo, SnapshotInfo, State};

/// One lower of a stack. As text it is its path in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lower {
    Layer(Digest),
    /// A sealed upper that is no layer yet, or that a sandbox still has mounted.
    Upper(Id),
}

impl Lower {
    pub fn layers(layers: &[Digest]) -> Vec<Self> {
        layers.iter().copied().map(Self::Layer).collect()
    }

    /// The tree that is mounted, relative to the store.
    pub fn tree(&self) -> String {
        match self {
            Self::Layer(digest) => format!("{}/tree", casemate_store::layer(digest)),
            Self::Upper(upper) => format!("{}/upper", casemate_store::upper(upper)),
        }
    }
}

impl fmt::Display for Lower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&match self {
            Self::Layer(digest) => casemate_store::layer(digest),
            Self::Upper(upper) => casemate_store::upper(upper),
        })
    }
}

impl FromStr for Lower {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        match text.split_once('/') {
            Some(("layers", digest)) => digest.parse().map(Self::Layer),
            Some(("uppers", upper)) => upper.parse().map(Self::Upper),
            _ => Err(BadName {
                kind: "lower",
                text: text.chars().take(200).collect(),
                rule: "layers/ and a digest, or uppers/ and an id",
            }),
        }
    }
}

impl Serialize for Lower {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lower {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A release. One that was removed stays as a record without layers: the date of the newest index seen must outlive it,
/// or a mirror could serve an older one after a removal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRecord {
    pub source: String,
    pub kind: String,
    pub patch_level: u32,
    pub architecture: String,
    pub verification: String,
    /// Seconds since the epoch; 0 where the source has no dated index.
    pub index_date: u64,
    /// SHA-256 of the signed index; empty where there is none.
    pub index_sha256: String,
    pub added_at: u64,
    pub bytes: u64,
    /// Topmost first.
    pub layers: Vec<Digest>,
    #[serde(default)]
    pub packages: Vec<ReleasePackage>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleasePackage {
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub url: String,
    pub sha256: String,
    pub size: u64,
}

impl ReleaseRecord {
    pub fn is_there(&self) -> bool {
        !self.layers.is_empty()
    }

    /// What the lock pins: the digest of the package list, or of the content where there is none.
    pub fn content(&self) -> String {
        if self.packages.is_empty() {
            return self.layers.first().map(Digest::to_string).unwrap_or_default();
        }
        let mut hasher = blake3::Hasher::new();
        for package in &self.packages {
            hasher.update(
                format!("{} {} {} {}\n", package.name, package.version, package.architecture, package.sha256)
                    .as_bytes(),
            );
        }
        hasher.finalize().to_hex().to_string()
    }

    pub fn info(&self, reference: &str) -> ReleaseInfo {
        ReleaseInfo {
            reference: reference.to_owned(),
            source: self.source.clone(),
            patch_level: self.patch_level,
            digest: self.layers.first().map(Digest::to_string).unwrap_or_default(),
            architecture: self.architecture.clone(),
            verification: self.verification.clone(),
            index_date: self.index_date,
            added_at: self.added_at,
            bytes: self.bytes,
            packages: self
                .packages
                .iter()
                .map(|p| (p.name.clone(), p.version.clone(), p.architecture.clone()))
                .collect(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnvironmentRecord {
    pub name: String,
    /// `running` is never written: what runs is found out at start.
    pub state: State,
    pub release: String,
    pub created_at: u64,
    pub built_at: u64,
    pub manifest_digest: String,
    pub lock_digest: String,
    /// What was built, topmost first.
    pub layers: Vec<Digest>,
    /// What was committed on top of that, topmost first.
    #[serde(default)]
    pub commits: Vec<Lower>,
    /// The writable directory, `uppers/<upper>`.
    pub upper: Id,
    pub network: String,
    #[serde(default)]
    pub ports: Vec<casemate_manifest::Port>,
    pub allow: Option<Vec<casemate_manifest::Destination>>,
    pub manifest: String,
    pub lock: String,
    /// It runs although limits cannot be enforced: that was asked for.
    #[serde(default)]
    pub unenforced_limits: bool,
    #[serde(default)]
    pub mounts: Vec<MountRecord>,
    /// Names of devices, judged and resolved at each start.
    #[serde(default)]
    pub devices: Vec<String>,
    #[serde(default)]
    pub sockets: Vec<String>,
    /// What of the session bus is granted.
    #[serde(default)]
    pub session_bus: casemate_manifest::SessionBus,
    /// Whether user namespaces may be made inside.
    #[serde(default)]
    pub nested_namespaces: bool,
    /// Whether `sudo` inside is granted.
    #[serde(default)]
    pub sudo: bool,
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
    /// What it runs itself while it is started.
    #[serde(default)]
    pub service: Option<casemate_manifest::Service>,
    #[serde(default)]
    pub stop: casemate_manifest::Stop,
    /// The manifest's, or what they were changed to since.
    #[serde(default)]
    pub limits: ResourceLimits,
}

/// A mount that policy allowed when the environment was built. It is judged again at each start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRecord {
    /// As the manifest has it, for messages.
    pub requested: String,
    /// Resolved, absolute, on the host.
    pub host: String,
    pub target: String,
    pub read_only: bool,
    /// Relative in the manifest and beneath its directory.
    pub beneath_manifest: bool,
}

impl EnvironmentRecord {
    /// All lowers, topmost first.
    pub fn stack(&self) -> impl Iterator<Item = Lower> {
        self.commits.iter().copied().chain(self.layers.iter().copied().map(Lower::Layer))
    }

    /// The topmost of them; its own upper where a record, against all we write, has none.
    pub fn top(&self) -> Lower {
        self.stack().next().unwrap_or(Lower::Upper(self.upper))
    }

    /// Name a layer where the sealed upper is named that it was made of.
    pub fn replace(&mut self, upper: &Id, layer: Digest) {
        for lower in &mut self.commits {
            if *lower == Lower::Upper(*upper) {
                *lower = Lower::Layer(layer);
            }
        }
    }
}

/// What an environment was at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRecord {
    /// They count up within an environment.
    pub number: u64,
    pub message: String,
    pub created_at: u64,
    /// Made so that a restore loses nothing.
    pub automatic: bool,
    /// The environment's own record. `name`, `state` and `upper` are what they were and restore nothing.
    pub environment: EnvironmentRecord,
}

impl SnapshotRecord {
    pub fn info(&self, name: &SnapshotName) -> SnapshotInfo {
        let is_stored = self.environment.commits.iter().all(|lower| matches!(lower, Lower::Layer(_)));
        SnapshotInfo {
            environment: name.environment.to_string(),
            name: name.snapshot.to_string(),
            number: self.number,
            message: self.message.clone(),
            created_at: self.created_at,
            automatic: self.automatic,
            state: if is_stored { "stored" } else { "sealed" }.to_owned(),
            release: self.environment.release.clone(),
            lock_digest: self.environment.lock_digest.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use casemate_store::{Store, StoreMode};

    use super::*;

    /// Written by the version before snapshots.
    const OLD: &str = include_str!("../tests/records/environment-1.toml");

    #[test]
    fn a_record_of_format_1_is_still_read() {
        let home = tempfile::tempdir().expect("directory");
        let store = Store::open(home.path(), StoreMode::Range).expect("a store");
        let id = "0123456789abcdef0123456789abcdef".parse::<Id>().expect("an id");
        std::fs::write(home.path().join(format!("environments/{id}.toml")), OLD).expect("a record");
        let mut record: EnvironmentRecord = store.environments().load(&id).expect("a sound record");
        assert_eq!((record.name.as_str(), record.state), ("demo", State::Built));
        assert_eq!((record.layers.len(), &record.commits[..]), (2, &[][..]));
        assert_eq!(record.stack().collect::<Vec<_>>(), Lower::layers(&record.layers));
        // And what is written in its place.
        record.commits = vec![Lower::Upper(record.upper), Lower::Layer(record.layers[0])];
        store.environments().commit(&id, &record).expect("written");
        assert_eq!(store.environments::<Id, EnvironmentRecord>().load(&id).expect("read"), record);
        record.replace(&record.upper.clone(), record.layers[1]);
        let expected = [record.layers[1], record.layers[0], record.layers[0], record.layers[1]];
        assert_eq!(record.stack().collect::<Vec<_>>(), Lower::layers(&expected));
    }

    #[test]
    fn lowers_that_are_none() {
        for text in ["", "layers/", "uppers/../x", "objects/ab", &format!("uppers/{}", "0".repeat(64))] {
            assert!(text.parse::<Lower>().is_err(), "{text:?}");
        }
    }
}
