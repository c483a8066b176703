//! `casemate.lock`: what a manifest came to, byte for byte.

use serde::{Deserialize, Serialize};

use crate::locate;
use crate::manifest::Manifest;

const VERSION: u32 = 1;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LockError {
    #[error("line {line}, column {column}: {message}")]
    Syntax { line: usize, column: usize, message: String },
    #[error("lock_version is {0}; this Casemate reads version 1")]
    Version(u32),
    #[error("package {name:?}: {what}")]
    Package { name: String, what: &'static str },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    lock_version: u32,
    /// Of the part of the manifest that this is the lock of.
    manifest: String,
    pub base: LockedBase,
    #[serde(default, rename = "package")]
    pub packages: Vec<LockedPackage>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedBase {
    pub reference: String,
    pub source: String,
    /// SHA-256 of the signed index; empty for an imported archive.
    pub index_sha256: String,
    /// BLAKE3 of the package list, or of the content where there is none.
    pub content: String,
    /// Seconds since the epoch; 0 for an imported archive.
    pub index_date: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedPackage {
    pub name: String,
    pub version: String,
    pub architecture: String,
    pub url: String,
    /// Lower-case hex.
    pub sha256: String,
    pub size: u64,
    /// Whether the manifest names it; else it is a dependency.
    pub requested: bool,
}

impl LockedPackage {
    /// What is wrong with it: whoever names packages, a file or an image's own programs, is a stranger.
    pub fn check(&self) -> Result<(), &'static str> {
        let plain = |text: &str, more: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        // These become file names, so nothing but what Debian Policy 5.6 allows.
        if !plain(&self.name, "+-.") || self.name.starts_with(['.', '-']) {
            return Err("that is no package name");
        }
        if !plain(&self.version, ".+-:~") || !plain(&self.architecture, "-") {
            return Err("version or architecture is malformed");
        }
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if self.sha256.len() != 64 || !self.sha256.bytes().all(hex) {
            return Err("sha256 is not 64 lower-case hex digits");
        }
        let scheme = self.url.starts_with("https://") || self.url.starts_with("http://");
        if !scheme || self.url.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err("its url is neither https nor http");
        }
        Ok(())
    }
}

impl Lock {
    pub fn new(manifest: &Manifest, base: LockedBase, mut packages: Vec<LockedPackage>) -> Self {
        packages.sort_by(|a, b| (&a.name, &a.architecture).cmp(&(&b.name, &b.architecture)));
        Self { lock_version: VERSION, manifest: manifest.lock_digest(), base, packages }
    }

    pub fn parse(text: &str) -> Result<Self, LockError> {
        let lock: Self = toml::from_str(text).map_err(|error| {
            let (line, column, message) = locate(text, &error);
            LockError::Syntax { line, column, message }
        })?;
        if lock.lock_version != VERSION {
            return Err(LockError::Version(lock.lock_version));
        }
        for package in &lock.packages {
            package.check().map_err(|what| LockError::Package { name: package.name.clone(), what })?;
        }
        let key = |package: &LockedPackage| (package.name.clone(), package.architecture.clone());
        if let Some(pair) = lock.packages.windows(2).find(|pair| key(&pair[0]) >= key(&pair[1])) {
            return Err(LockError::Package {
                name: pair[1].name.clone(),
                what: "it stands twice, or out of order",
            });
        }
        Ok(lock)
    }

    /// The canonical text: what [`Lock::digest`] hashes and what stands in `casemate.lock`.
    pub fn to_toml(&self) -> String {
        let body = toml::to_string(self).unwrap_or_else(|_| format!("{self:?}"));
        format!("# Made by `casemate build`; keep it beside casemate.toml and do not edit it.\n{body}")
    }

    /// `LockDigest`: BLAKE3 of the canonical text.
    pub fn digest(&self) -> String {
        blake3::hash(self.to_toml().as_bytes()).to_hex().to_string()
    }

    /// Whether this is the lock of such a manifest.
    pub fn fits(&self, manifest: &Manifest) -> bool {
        self.manifest == manifest.lock_digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> (Manifest, Lock) {
        let manifest = Manifest::parse(
            "manifest_version = 1\n[base]\nrelease = \"debian/bookworm\"\n[system]\npackages = [\"jq\"]\n",
        )
        .expect("good");
        let base = LockedBase {
            reference: "debian/bookworm".into(),
            source: "debian".into(),
            index_sha256: "ab".into(),
            content: "cd".into(),
            index_date: 7,
        };
        let package = |name: &str| LockedPackage {
            name: name.into(),
            version: "1:2.0~rc1-1+b2".into(),
            architecture: "amd64".into(),
            url: "https://mirror.example/pool/x.deb".into(),
            sha256: "0".repeat(64),
            size: 5,
            requested: name == "jq",
        };
        let lock = Lock::new(&manifest, base, vec![package("libjq1"), package("jq")]);
        (manifest, lock)
    }

    #[test]
    fn round_trip() {
        let (manifest, lock) = lock();
        let again = Lock::parse(&lock.to_toml()).expect("good");
        assert_eq!(again, lock);
        assert_eq!(again.digest(), lock.digest());
        assert!(again.fits(&manifest));
        let other =
            Manifest::parse("manifest_version = 1\n[base]\nrelease = \"debian/bookworm\"\n").expect("good");
        assert!(!again.fits(&other));
    }

    #[test]
    fn hostile_locks_are_refused() {
        let text = lock().1.to_toml();
        for (from, to) in [
            ("name = \"jq\"", "name = \"../jq\""),
            ("name = \"jq\"", "name = \"zz\""),
            ("name = \"libjq1\"", "name = \"jq\""),
            ("https://", "file://"),
            ("1:2.0~rc1-1+b2", "1/../2"),
            ("sha256 = \"0", "sha256 = \"G"),
            ("lock_version = 1", "lock_version = 2"),
            ("size = 5", "size = -5"),
            ("requested", "requestet"),
        ] {
            assert!(text.contains(from), "{from}");
            assert!(Lock::parse(&text.replace(from, to)).is_err(), "{from} → {to}");
        }
    }
}
