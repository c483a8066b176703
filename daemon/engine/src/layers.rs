//! Layers and uppers: who is at them, and the removal of those that nobody is.
//!
//! Nothing counts references: whatever a record names is in use, and what a job has pinned. A job pins what it reads before it
//! reads it, an upper before it is made, and a layer as soon as it is made; between the making (which may find the layer there
//! already) and the pin nothing is removed, for which there is [`Inner::sweeping`](crate::Inner).

use std::collections::HashSet;
use std::sync::Arc;

use casemate_sandbox::plan::Source;
use casemate_store::{Digest, Id, SnapshotName};
use casemate_worker::protocol::{TreeRequest, TreeResult};

use crate::error::Error;
use crate::jobs::Job;
use crate::records::{EnvironmentRecord, Lower, SnapshotRecord};
use crate::releases::blocking;
use crate::{Inner, Tables, mounts};

/// What a job is at: kept until this is dropped, whatever becomes of the records that name it.
pub(crate) struct Pins {
    engine: Arc<Inner>,
    lowers: Vec<Lower>,
}

impl Pins {
    pub fn add(&mut self, layers: &[Digest]) {
        self.add_lowers(&Lower::layers(layers));
    }

    pub fn add_lowers(&mut self, lowers: &[Lower]) {
        self.engine.tables().pinned.extend(lowers);
        self.lowers.extend(lowers);
    }

    /// Let go, and remove those that nobody else is at. What could not be removed is found by the next start.
    pub async fn release(self) {
        let (engine, lowers) = (Arc::clone(&self.engine), self.lowers.clone());
        drop(self);
        if let Err(error) = engine.drop_lowers(&lowers).await {
            tracing::warn!(%error, "layers that nobody needs stay until the next start");
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut tables = self.engine.tables();
        for lower in &self.lowers {
            if let Some(at) = tables.pinned.iter().position(|pinned| pinned == lower) {
                tables.pinned.swap_remove(at);
            }
        }
    }
}

impl Tables {
    /// Every layer and upper that a record names.
    fn named(&self) -> HashSet<Lower> {
        let of_releases = self.releases.values().flat_map(|record| Lower::layers(&record.layers));
        let environments = || self.environments.values().map(|environment| &environment.record);
        let of_environments = environments().flat_map(EnvironmentRecord::stack);
        let uppers = environments().map(|record| Lower::Upper(record.upper));
        let of_snapshots = self.snapshots.values().flat_map(|snapshot| snapshot.environment.stack());
        of_releases.chain(of_environments).chain(uppers).chain(of_snapshots).collect()
    }

    /// Whether a record does.
    pub(crate) fn name(&self, lower: &Lower) -> bool {
        self.named().contains(lower)
    }
}

impl Inner {
    pub(crate) fn pins(self: &Arc<Self>) -> Pins {
        Pins { engine: Arc::clone(self), lowers: Vec::new() }
    }

    /// Every layer and upper that a record names, or a job is at.
    pub(crate) fn in_use(&self) -> HashSet<Lower> {
        let tables = self.tables();
        let mut all = tables.named();
        all.extend(tables.stored.values().copied().map(Lower::Layer));
        all.extend(&tables.pinned);
        all
    }

    /// Remove those of `lowers` that no record names any more. While a record is damaged, nobody knows what it names.
    pub(crate) async fn drop_lowers(&self, lowers: &[Lower]) -> Result<(), Error> {
        if lowers.is_empty() || !self.tables().damage.is_empty() {
            return Ok(());
        }
        let _alone = self.sweeping.write().await;
        let used = self.in_use();
        let paths: Vec<String> =
            lowers.iter().filter(|lower| !used.contains(lower)).map(Lower::to_string).collect();
        if paths.is_empty() {
            return Ok(());
        }
        self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await?;
        Ok(())
    }

    /// Remove the snapshots of an environment that is no more. What they named is for the caller to drop.
    pub(crate) fn remove_snapshots(&self, id: &Id) -> Result<Vec<Lower>, Error> {
        let mut lowers = Vec::new();
        let (sound, damaged): (Vec<SnapshotName>, Vec<SnapshotName>) = {
            let tables = self.tables();
            let of = |name: &&SnapshotName| name.environment == *id;
            let sound = tables.snapshots.keys().filter(of).cloned().collect();
            (sound, tables.damage.snapshots.keys().filter(of).cloned().collect())
        };
        for name in sound.iter().chain(&damaged) {
            self.store.snapshots::<SnapshotName, SnapshotRecord>().remove(name)?;
            if let Some(record) = self.forget_snapshot(name) {
                lowers.extend(record.environment.stack());
            }
        }
        Ok(lowers)
    }

    /// Make a layer of a tree in staging, and pin it: no record names it yet.
    pub(crate) async fn ingest(
        &self,
        job: &Job,
        path: &str,
        pins: &mut Pins,
    ) -> Result<(Digest, u64), Error> {
        let request = TreeRequest::Ingest { path: path.to_owned() };
        let _nothing_goes = self.sweeping.read().await;
        match self.workers.tree(Some(job), &self.store, &request).await? {
            TreeResult::Ingested { digest, bytes, new_objects, .. } => {
                job.log(&format!("layer {digest}: {bytes} bytes, {new_objects} new objects"));
                let digest = digest.parse()?;
                pins.add(&[digest]);
                Ok((digest, bytes))
            }
            other => Err(Error::Nonsense { worker: "casemate-tree", answer: format!("{other:?}") }),
        }
    }

    /// Lowers of a stack of layers, each listing checked against its name.
    pub(crate) async fn lowers(self: &Arc<Self>, layers: &[Digest]) -> Result<Vec<Source>, Error> {
        let (engine, stack) = (Arc::clone(self), Lower::layers(layers));
        let list = stack.clone();
        blocking(move || engine.check_listings(&list)).await?;
        self.unchecked_lowers(&stack)
    }

    pub(crate) fn unchecked_lowers(&self, stack: &[Lower]) -> Result<Vec<Source>, Error> {
        stack.iter().map(|lower| mounts::own_source(&self.store.root().join(lower.tree()))).collect()
    }

    /// What is sealed and not stored yet has no listing.
    pub(crate) fn check_listings(&self, stack: &[Lower]) -> Result<(), Error> {
        stack.iter().try_for_each(|lower| match lower {
            Lower::Layer(digest) => Ok(self.store.check_listing(digest)?),
            Lower::Upper(_) => Ok(()),
        })
    }
}
