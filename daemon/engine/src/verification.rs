//! Verification of the whole store: every record is read, every layer is walked. What is damaged is named, with what it
//! affects and the way back.

use std::collections::BTreeSet;
use std::sync::Arc;

use casemate_store::{Id, ReleaseName, SnapshotName};
use casemate_worker::protocol::{TreeRequest, TreeResult};

use crate::accounts::Owner;
use crate::api::{Caller, JobId};
use crate::error::Error;
use crate::jobs::Job;
use crate::records::{EnvironmentRecord, Lower, ReleaseRecord, SnapshotRecord};
use crate::{Engine, Inner};

impl Engine {
    pub fn verify(&self, caller: &Caller) -> Result<JobId, Error> {
        let inner = Arc::clone(&self.inner);
        let subject = self.inner.settings.store.display().to_string();
        self.inner.jobs.start(caller, "verify", &subject, vec![], move |job| inner.verify(job))
    }
}

/// The way back, for people.
fn remedy(owners: &BTreeSet<&Owner>) -> String {
    let mut ways = Vec::new();
    for (kind, name) in owners {
        ways.push(match *kind {
            "release" => format!("`casemate release remove {name}` and fetch or import it again"),
            "environment" => {
                format!("build {name} anew from its manifest, or `casemate restore` a sound snapshot of it")
            }
            _ => format!("snapshot {name} cannot be had again but from a backup"),
        });
    }
    ways.join("; ")
}

impl Inner {
    async fn verify(self: Arc<Self>, job: Job) -> Result<Vec<(String, String)>, Error> {
        job.stage("reading records");
        let mut damaged = 0u64;
        let mut tell = |line: String| {
            job.log(&line);
            damaged += 1;
        };
        for line in self.unreadable_records()? {
            tell(line);
        }
        let owners = self.owners_of_lowers();
        let layers = self.store.layers()?;
        for name in layers.foreign {
            tell(format!("layers/{name}: no layer has such a name"));
        }
        let (mut entries, mut bytes) = (0u64, 0u64);
        let total = layers.names.len();
        for (number, layer) in layers.names.into_iter().enumerate() {
            job.stage(&format!("verifying layer {} of {total}", number + 1));
            let lower = Lower::Layer(layer);
            // Nobody removes it meanwhile.
            let mut pins = self.pins();
            pins.add_lowers(&[lower]);
            let request = TreeRequest::Verify { layer: layer.to_string() };
            let verified = self.workers.tree(Some(&job), &self.store, &request).await;
            pins.release().await;
            let whose: BTreeSet<&Owner> = owners.get(&lower).into_iter().flatten().collect();
            let affected =
                whose.iter().map(|(kind, name)| format!("{kind} {name}")).collect::<Vec<_>>().join(", ");
            match verified? {
                TreeResult::Verified { entries: here, bytes: read, damage } => {
                    entries += here;
                    bytes += read;
                    for one in damage {
                        tell(match whose.is_empty() {
                            true => format!("{lower}: {one}; no record names it, `casemate gc` removes it"),
                            false => format!("{lower}: {one}; affects {affected}; {}", remedy(&whose)),
                        });
                    }
                }
                other => {
                    return Err(Error::Nonsense { worker: "casemate-tree", answer: format!("{other:?}") });
                }
            }
        }
        for (lower, whose) in &owners {
            let path = self.store.root().join(lower.tree());
            if !path.is_dir() {
                let whose: BTreeSet<&Owner> = whose.iter().collect();
                tell(format!("{lower}: missing; {}", remedy(&whose)));
            }
        }
        Ok([("damaged", damaged), ("layers", total as u64), ("entries", entries), ("bytes", bytes)]
            .map(|(key, value)| (key.to_owned(), value.to_string()))
            .to_vec())
    }

    /// Those that were sound at the start are read again: what is in memory is no proof of what is on the disk.
    fn unreadable_records(&self) -> Result<Vec<String>, Error> {
        let mut lines: Vec<String> = Vec::new();
        fn told<T>(lines: &mut Vec<String>, what: String, loaded: Result<T, casemate_store::Error>) {
            match loaded {
                // Removed since it was listed.
                Ok(_) | Err(casemate_store::Error::Missing { .. }) => {}
                Err(error) => lines.push(format!("{what}: {error}")),
            }
        }
        let releases = self.store.releases::<ReleaseName, ReleaseRecord>();
        let environments = self.store.environments::<Id, EnvironmentRecord>();
        let snapshots = self.store.snapshots::<SnapshotName, SnapshotRecord>();
        let (of_releases, of_environments) = (releases.list()?, environments.list()?);
        let of_snapshots = snapshots.list()?;
        for name in &of_releases.names {
            told(&mut lines, format!("release {name}"), releases.load(name));
        }
        for name in &of_environments.names {
            told(&mut lines, format!("environment {name}"), environments.load(name));
        }
        for name in &of_snapshots.names {
            told(&mut lines, format!("snapshot {name}"), snapshots.load(name));
        }
        let foreign = [
            ("releases", of_releases.foreign),
            ("environments", of_environments.foreign),
            ("snapshots", of_snapshots.foreign),
        ];
        for (directory, names) in foreign {
            lines.extend(
                names.into_iter().map(|name| format!("{directory}/{name}: no record has such a name")),
            );
        }
        Ok(lines)
    }
}
