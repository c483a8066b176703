//! What was sealed becomes a layer, by a job of the daemon's own: hashed, linked into objects, and named by its digest where
//! its upper was named.
//!
//! The order makes it hold whenever it is killed: the layer is on the disk, whole, before a record names it
//! (`casemate-tree` sees to that); each record that names the upper is written anew by itself, and says the same before and
//! after, as both are there; the upper goes when no record names it any more. What is cut off is found again by the records
//! and done over; what was done already is found in `objects/`.
//!
//! A running environment has the upper mounted as a lower, and its record goes on naming it until it stops. Records are
//! changed under the gate of their environment, and so are they copied (by a clone, a restore): whoever copied the old name
//! has its copy in the tables before we look for the last time.

use std::collections::HashSet;
use std::sync::Arc;

use casemate_store::{Digest, Id, SnapshotName};
use casemate_worker::protocol::TreeRequest;

use crate::api::Caller;
use crate::error::{Error, ErrorKind};
use crate::jobs::Job;
use crate::layers::Pins;
use crate::records::{EnvironmentRecord, Lower, SnapshotRecord};
use crate::{Inner, Tables, flattening};

/// What the job has to do.
enum Work {
    /// A sealed upper.
    Store(Id),
    /// An environment.
    Flatten(Id),
}

fn names(record: &EnvironmentRecord, upper: &Id) -> bool {
    record.commits.contains(&Lower::Upper(*upper))
}

/// A sealed upper that something can be done about.
fn next_sealed(tables: &Tables, failed: &HashSet<Id>) -> Option<Id> {
    let of_environments = tables.environments.values().flat_map(|environment| {
        let is_free = environment.sandbox.is_none();
        environment.record.commits.iter().map(move |lower| (lower, is_free))
    });
    let of_snapshots = tables.snapshots.values().flat_map(|snapshot| &snapshot.environment.commits);
    of_environments.chain(of_snapshots.map(|lower| (lower, true))).find_map(|(lower, is_free)| {
        let Lower::Upper(upper) = lower else { return None };
        let is_due = is_free || !tables.stored.contains_key(upper);
        (is_due && !failed.contains(upper)).then_some(*upper)
    })
}

impl Inner {
    /// Start the job that stores what is sealed, unless there is one, or nothing to do.
    pub(crate) fn store_sealed(self: &Arc<Self>) {
        {
            let mut tables = self.tables();
            if tables.is_storing {
                return;
            }
            tables.is_storing = true;
        }
        // Where there is nothing, this takes the mark away again.
        if self.next_work(&HashSet::new()).is_none() {
            return;
        }
        let engine = Arc::clone(self);
        let started =
            self.jobs.start(&Caller::daemon(), "store", "commits", vec![], move |job| engine.store_all(job));
        if let Err(error) = started {
            self.tables().is_storing = false;
            if !matches!(error.kind(), ErrorKind::Busy) {
                tracing::warn!(%error, "what was committed is hashed at the next start");
            }
        }
    }

    /// With nothing left, the job is over in the same moment: whoever seals next starts another.
    fn next_work(&self, failed: &HashSet<Id>) -> Option<Work> {
        let mut tables = self.tables();
        let sealed = next_sealed(&tables, failed).map(Work::Store);
        let next = sealed.or_else(|| flattening::next_deep(&tables, failed).map(Work::Flatten));
        tables.is_storing = next.is_some();
        next
    }

    async fn store_all(self: Arc<Self>, job: Job) -> Result<Vec<(String, String)>, Error> {
        let (mut stored, mut failed, mut first) = (0u64, HashSet::new(), None);
        while let Some(work) = self.next_work(&failed) {
            let (subject, outcome) = match work {
                Work::Store(upper) => (upper, self.store_one(&job, &upper).await),
                Work::Flatten(id) => (id, self.flatten(&job, &id).await),
            };
            match outcome {
                Ok(()) => stored += 1,
                Err(error) if error.kind() == ErrorKind::Cancelled => {
                    self.tables().is_storing = false;
                    return Err(error);
                }
                Err(error) => {
                    job.log(&format!("{subject} stays as it is: {error}"));
                    failed.insert(subject);
                    first.get_or_insert(error);
                }
            }
        }
        first.map_or_else(|| Ok(vec![("stored".into(), stored.to_string())]), Err)
    }

    async fn store_one(self: &Arc<Self>, job: &Job, upper: &Id) -> Result<(), Error> {
        job.check()?;
        job.stage("storing");
        let sealed = Lower::Upper(*upper);
        let mut pins = self.pins();
        pins.add_lowers(&[sealed]);
        let outcome = self.store_pinned(job, upper, &mut pins).await;
        // Replaced everywhere, or destroyed: then there is nothing to remember it for, and it goes with the pins.
        let layer = {
            let mut tables = self.tables();
            if tables.name(&sealed) { None } else { tables.stored.remove(upper) }
        };
        pins.add(&layer.into_iter().collect::<Vec<_>>());
        pins.release().await;
        outcome
    }

    async fn store_pinned(&self, job: &Job, upper: &Id, pins: &mut Pins) -> Result<(), Error> {
        let known = self.tables().stored.get(upper).copied();
        let layer = match known {
            Some(layer) => layer,
            None => {
                let tree = Lower::Upper(*upper).tree();
                let ingested = self.ingest(job, &tree, pins).await;
                if ingested.is_err() {
                    let paths = vec![format!("staging/{}.layer", tree.replace('/', "-"))];
                    self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await?;
                }
                let (layer, _) = ingested?;
                self.tables().stored.insert(*upper, layer);
                layer
            }
        };
        // Each round writes all that it finds; a clone may have come meanwhile.
        loop {
            let owners = self.owners(upper);
            if owners.is_empty() {
                return Ok(());
            }
            for id in owners {
                self.replace_in(&id, upper, layer).await?;
            }
        }
    }

    /// Environments with records that name the upper and can be written anew: their own, or a snapshot's.
    fn owners(&self, upper: &Id) -> HashSet<Id> {
        let tables = self.tables();
        let own = tables
            .environments
            .iter()
            .filter(|(_, environment)| environment.sandbox.is_none() && names(&environment.record, upper));
        let snapshots = tables.snapshots.iter().filter(|(_, snapshot)| names(&snapshot.environment, upper));
        own.map(|(id, _)| *id).chain(snapshots.map(|(name, _)| name.environment)).collect()
    }

    async fn replace_in(&self, id: &Id, upper: &Id, layer: Digest) -> Result<(), Error> {
        let gate = self.gate(id);
        let _one_at_a_time = gate.lock().await;
        let (own, snapshots) = {
            let tables = self.tables();
            let own = tables.environments.get(id).filter(|environment| environment.sandbox.is_none());
            let own = own.map(|environment| environment.record.clone()).filter(|record| names(record, upper));
            let of = tables.snapshots.iter().filter(|(name, _)| name.environment == *id);
            let naming = of.filter(|(_, snapshot)| names(&snapshot.environment, upper));
            let snapshots: Vec<(SnapshotName, SnapshotRecord)> =
                naming.map(|(name, record)| (name.clone(), record.clone())).collect();
            (own, snapshots)
        };
        for (name, mut record) in snapshots {
            record.environment.replace(upper, layer);
            self.store.snapshots::<SnapshotName, SnapshotRecord>().commit(&name, &record)?;
            self.put_snapshot(name, record);
        }
        if let Some(mut record) = own {
            record.replace(upper, layer);
            self.commit_environment(id, record)?;
        }
        Ok(())
    }
}
