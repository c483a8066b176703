//! What is different: an environment beside what it was, or beside a snapshot.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use casemate_store::{Id, Name, SnapshotName};
use casemate_worker::protocol::{TreeRequest, TreeResult};

use crate::api::{Caller, JobId};
use crate::error::Error;
use crate::jobs::Job;
use crate::records::Lower;
use crate::{Engine, Inner};

impl Engine {
    /// How an environment differs from a snapshot of it; without one, from what is below its upper, which is what was last
    /// committed, restored or built. `out` gets it from `casemate-tree`, line by line or as a patch.
    pub fn diff(
        &self,
        caller: &Caller,
        id: &str,
        snapshot: Option<&str>,
        patch: bool,
        out: OwnedFd,
    ) -> Result<JobId, Error> {
        let (id, name) = self.named(id)?;
        let snapshot = snapshot.map(|name| self.snapshot(&id.to_string(), name)).transpose()?;
        let snapshot = snapshot.map(|info| info.name.parse::<Name>()).transpose()?;
        let inner = Arc::clone(&self.inner);
        // It changes nothing, so nothing has to wait for it.
        self.inner
            .jobs
            .start(caller, "diff", &name, vec![], move |job| inner.diff(job, id, snapshot, patch, out))
    }
}

impl Inner {
    async fn diff(
        self: Arc<Self>,
        job: Job,
        id: Id,
        snapshot: Option<Name>,
        patch: bool,
        out: OwnedFd,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("comparing");
        let mut pins = self.pins();
        let (old, new) = {
            // Under the gate, so that nothing of it goes before it is held.
            let gate = self.gate(&id);
            let _one_at_a_time = gate.lock().await;
            let record = self.with_environment(&id, |environment| environment.record.clone())?;
            let old: Vec<Lower> = match snapshot {
                Some(snapshot) => {
                    self.snapshot(&SnapshotName { environment: id, snapshot })?.environment.stack().collect()
                }
                None => record.stack().collect(),
            };
            let new: Vec<Lower> = std::iter::once(Lower::Upper(record.upper)).chain(record.stack()).collect();
            pins.add_lowers(&old);
            pins.add_lowers(&new);
            (old, new)
        };
        let trees = |stack: &[Lower]| stack.iter().map(Lower::tree).collect();
        let request = TreeRequest::Diff { old: trees(&old), new: trees(&new), patch };
        let compared = self.workers.tree_to(Some(&job), &self.store, &request, out).await;
        pins.release().await;
        match compared? {
            TreeResult::Compared { differences } => Ok(vec![("differences".into(), differences.to_string())]),
            other => Err(Error::Nonsense { worker: "casemate-tree", answer: format!("{other:?}") }),
        }
    }
}
