//! Layers: who is at them, and the removal of those that nobody is.
//!
//! A layer is removed when no record names it and no job is at it. A job pins what it reads before it reads it, and what it
//! makes as soon as it is made; between the making (which may find the layer there already) and the pin nothing is removed,
//! for which there is [`Inner::sweeping`](crate::Inner).

use std::collections::HashSet;
use std::sync::Arc;

use casemate_sandbox::plan::Source;
use casemate_store::Digest;
use casemate_worker::protocol::{TreeRequest, TreeResult};

use crate::error::Error;
use crate::jobs::Job;
use crate::releases::blocking;
use crate::{Inner, mounts};

/// Layers that a job is at: kept until this is dropped, whatever becomes of the records that name them.
pub(crate) struct Pins {
    engine: Arc<Inner>,
    layers: Vec<Digest>,
}

impl Pins {
    pub fn add(&mut self, layers: &[Digest]) {
        self.engine.tables().pinned.extend(layers);
        self.layers.extend(layers);
    }

    /// Let go, and remove those that nobody else is at. What could not be removed is found by the next start.
    pub async fn release(self) {
        let (engine, layers) = (Arc::clone(&self.engine), self.layers.clone());
        drop(self);
        if let Err(error) = engine.drop_layers(&layers).await {
            tracing::warn!(%error, "layers that nobody needs stay until the next start");
        }
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut tables = self.engine.tables();
        for layer in &self.layers {
            if let Some(at) = tables.pinned.iter().position(|pinned| pinned == layer) {
                tables.pinned.swap_remove(at);
            }
        }
    }
}

impl Inner {
    pub(crate) fn pins(self: &Arc<Self>) -> Pins {
        Pins { engine: Arc::clone(self), layers: Vec::new() }
    }

    /// Every layer that a record names, or a job is at.
    pub(crate) fn layers_in_use(&self) -> HashSet<Digest> {
        let tables = self.tables();
        let of_releases = tables.releases.values().flat_map(|record| &record.layers);
        let of_environments = tables.environments.values().flat_map(|environment| &environment.record.layers);
        of_releases.chain(of_environments).chain(&tables.pinned).copied().collect()
    }

    /// Remove those of `layers` that no record names any more. While a record is damaged, nobody knows what it names.
    pub(crate) async fn drop_layers(&self, layers: &[Digest]) -> Result<(), Error> {
        if layers.is_empty() || !self.tables().damage.is_empty() {
            return Ok(());
        }
        let _alone = self.sweeping.write().await;
        let used = self.layers_in_use();
        let paths: Vec<String> =
            layers.iter().filter(|layer| !used.contains(layer)).map(casemate_store::layer).collect();
        if paths.is_empty() {
            return Ok(());
        }
        self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await?;
        Ok(())
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

    /// Lowers of a stack, each listing checked against its name.
    pub(crate) async fn lowers(self: &Arc<Self>, layers: &[Digest]) -> Result<Vec<Source>, Error> {
        let (engine, list) = (Arc::clone(self), layers.to_vec());
        blocking(move || engine.check_listings(&list)).await?;
        self.unchecked_lowers(layers)
    }

    pub(crate) fn unchecked_lowers(&self, layers: &[Digest]) -> Result<Vec<Source>, Error> {
        let trees = layers.iter().map(|digest| self.store.layer_path(digest).join("tree"));
        trees.map(|tree| mounts::own_source(&tree)).collect()
    }

    pub(crate) fn check_listings(&self, layers: &[Digest]) -> Result<(), Error> {
        layers.iter().try_for_each(|digest| Ok(self.store.check_listing(digest)?))
    }
}
