//! What the store's records hold.

use std::collections::BTreeMap;

use casemate_manifest::ResourceLimits;
use casemate_store::{Digest, Id};
use serde::{Deserialize, Serialize};

use crate::api::{ReleaseInfo, State};

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

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    /// Topmost first.
    pub layers: Vec<Digest>,
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
