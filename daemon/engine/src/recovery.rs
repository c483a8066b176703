//! Recovery at start: everything in `staging/` goes, sandboxes that answer are adopted, the sockets of those that don't
//! are removed, snapshots of environments that are no more go, and so do uppers and layers that no record names. What was
//! sealed and is no layer yet is stored once the start is through ([`crate::storing`]).
//!
//! A record that cannot be read is damage, and costs no more than what it is about: it is told (log, `doctor`, `list`),
//! the rest works, and what it may have named is not known. So while there is damage, no layer and no upper is removed,
//! and a sandbox of an environment whose record is damaged runs on. Removing the damaged record (`destroy`, `release
//! remove`, `snapshots --remove`) ends that state; the next start then sweeps.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use casemate_store::{Id, Key, RecordList, ReleaseName, SnapshotName};
use casemate_worker::protocol::TreeRequest;

use crate::environments::Environment;
use crate::error::Error;
use crate::records::{EnvironmentRecord, Lower, ReleaseRecord, SnapshotRecord};
use crate::{Inner, sandboxes};

/// Records that could not be read, each with the reason.
#[derive(Default)]
pub(crate) struct Damage {
    pub environments: BTreeMap<Id, String>,
    pub releases: BTreeMap<ReleaseName, String>,
    pub snapshots: BTreeMap<SnapshotName, String>,
    /// Files among the records whose names are no records'.
    pub foreign: Vec<String>,
}

impl Damage {
    pub fn is_empty(&self) -> bool {
        self.environments.is_empty()
            && self.releases.is_empty()
            && self.snapshots.is_empty()
            && self.foreign.is_empty()
    }

    /// One line each: what, and why.
    pub fn reports(&self) -> Vec<(String, String)> {
        let environments =
            self.environments.iter().map(|(id, reason)| (format!("environment {id}"), reason.clone()));
        let releases = self.releases.iter().map(|(name, reason)| (format!("release {name}"), reason.clone()));
        let snapshots =
            self.snapshots.iter().map(|(name, reason)| (format!("snapshot {name}"), reason.clone()));
        let foreign = self.foreign.iter().map(|name| (name.clone(), "no record has such a name".to_owned()));
        environments.chain(releases).chain(snapshots).chain(foreign).collect()
    }
}

/// The foreign names of a directory of records, as paths in the store.
fn foreign<K: Key>(directory: &str, list: &RecordList<K>) -> Vec<String> {
    list.foreign.iter().map(|name| format!("{directory}/{name}")).collect()
}

impl Inner {
    pub(crate) async fn recover(self: &Arc<Self>) -> Result<(), Error> {
        self.read_records()?;
        self.readopt().await?;
        let stale = |id: &Id| self.with_environment(id, |found| found.sandbox.is_none()).unwrap_or(false);
        if let Err(error) = self.cgroups.sweep(&stale) {
            tracing::warn!(%error, "empty control groups stay");
        }
        let mut paths = self.store.leftovers()?.names;
        if self.tables().damage.is_empty() {
            for id in self.without_environment() {
                self.remove_snapshots(&id)?;
            }
            paths.extend(self.unreferenced()?);
        }
        if !paths.is_empty() {
            tracing::info!(count = paths.len(), "removing what an unfinished job left");
            self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await?;
        }
        Ok(())
    }

    fn read_records(&self) -> Result<(), Error> {
        let releases = self.store.releases::<ReleaseName, ReleaseRecord>();
        let environments = self.store.environments::<Id, EnvironmentRecord>();
        let snapshots = self.store.snapshots::<SnapshotName, SnapshotRecord>();
        let (of_releases, of_environments) = (releases.list()?, environments.list()?);
        let of_snapshots = snapshots.list()?;
        let mut tables = self.tables();
        tables.damage.foreign.extend(foreign("releases", &of_releases));
        tables.damage.foreign.extend(foreign("environments", &of_environments));
        tables.damage.foreign.extend(foreign("snapshots", &of_snapshots));
        for name in of_releases.names {
            match releases.load(&name) {
                Ok(record) if record.is_there() => {
                    tables.releases.insert(name, record);
                }
                Ok(_) => {}
                Err(error) => {
                    tables.damage.releases.insert(name, error.to_string());
                }
            }
        }
        for id in of_environments.names {
            match environments.load(&id) {
                Ok(record) => {
                    tables.environments.insert(id, Environment::new(record));
                }
                Err(error) => {
                    tables.damage.environments.insert(id, error.to_string());
                }
            }
        }
        for name in of_snapshots.names {
            match snapshots.load(&name) {
                Ok(record) => {
                    tables.snapshots.insert(name, record);
                }
                Err(error) => {
                    tables.damage.snapshots.insert(name, error.to_string());
                }
            }
        }
        for (what, reason) in tables.damage.reports() {
            tracing::error!(what, reason, "damaged; nothing is swept until it is repaired or removed");
        }
        Ok(())
    }

    /// Environments that have snapshots and are no more: `destroy` was killed between the two.
    fn without_environment(&self) -> Vec<Id> {
        let tables = self.tables();
        let mut ids: Vec<Id> = tables.snapshots.keys().map(|name| name.environment).collect();
        ids.dedup();
        ids.retain(|id| !tables.environments.contains_key(id));
        ids
    }

    /// Layers and uppers that no record names.
    pub(crate) fn unreferenced(&self) -> Result<Vec<String>, Error> {
        let used = self.in_use();
        let layers = self.store.layers()?.names.into_iter().map(Lower::Layer);
        let uppers = self.store.uppers()?.names.into_iter().map(Lower::Upper);
        let unused = layers.chain(uppers).filter(|lower| !used.contains(lower));
        Ok(unused.map(|lower| lower.to_string()).collect())
    }

    /// Adopt what runs; clear away what no longer does, and end throwaway sandboxes whose job is lost.
    async fn readopt(self: &Arc<Self>) -> Result<(), Error> {
        let runtime = &self.settings.runtime;
        for entry in std::fs::read_dir(runtime).map_err(Error::io("list", runtime))? {
            let directory = entry.map_err(Error::io("list", runtime))?.path();
            let Some(name) = directory.file_name().and_then(|name| name.to_str()) else { continue };
            if !directory.is_dir() || sandboxes::is_anothers(&directory, &self.settings.store) {
                continue;
            }
            if !directory.join("control").exists() {
                // The daemon died before it started anything in there.
                sandboxes::clear(&directory)?;
                continue;
            }
            sandboxes::thaw_after_copy(&directory, name).await?;
            let id = name.parse::<Id>().ok();
            if id.is_some_and(|id| self.tables().damage.environments.contains_key(&id)) {
                tracing::warn!(environment = name, "its record is damaged; if it runs, it runs on");
                continue;
            }
            let environment = id.and_then(|id| {
                self.with_environment(&id, |environment| (id, environment.record.name.clone())).ok()
            });
            let label = environment.as_ref().map_or(name, |(_, label)| label.as_str());
            // That it cannot be reached now, for want of descriptors say, does not mean that it is not there.
            if let Err(error) = sandboxes::is_heard(&directory) {
                tracing::error!(environment = label, %error, "it may run, and is left alone until casemated is restarted");
                continue;
            }
            let contact = match sandboxes::Sandbox::contact_frozen(&directory, name, label).await {
                Ok(None) => sandboxes::Sandbox::contact(&directory, name, label).await,
                Ok(Some(frozen)) => Ok(frozen),
                Err(error) => Err(error),
            };
            match (contact, environment.as_ref()) {
                (Ok(sandbox), Some((id, _))) => {
                    tracing::info!(environment = label, "re-adopted");
                    self.adopt(id, Arc::new(sandbox))?;
                }
                (Ok(sandbox), None) => {
                    sandbox.stop(Duration::ZERO).await;
                    sandboxes::clear(&directory)?;
                }
                (Err(error), _) => {
                    tracing::info!(environment = label, %error, "no longer runs");
                    sandboxes::end_listener(&directory).await;
                    sandboxes::clear(&directory)?;
                }
            }
        }
        Ok(())
    }

    /// Give up an environment whose record cannot be read: end it if it runs, remove the record. Its files are swept at
    /// the next start, once no damage is left that might name them too.
    pub(crate) async fn give_up_environment(&self, id: &Id) -> Result<(), Error> {
        let key = id.to_string();
        let directory = self.settings.runtime.join(&key);
        let contact = match sandboxes::Sandbox::contact_frozen(&directory, &key, &key).await {
            Ok(None) => sandboxes::Sandbox::contact(&directory, &key, &key).await.ok(),
            found => found.ok().flatten(),
        };
        if let Some(sandbox) = contact {
            sandbox.stop(Duration::ZERO).await;
        }
        sandboxes::clear(&directory)?;
        self.store.environments::<Id, EnvironmentRecord>().remove(id)?;
        self.tables().damage.environments.remove(id);
        self.forget_environment(id);
        self.remove_snapshots(id)?;
        self.remove_log(id)
    }
}
