//! Sealing: what is writable now becomes a lower, and is never written again.
//!
//! Of an environment that does not run, the upper itself is sealed, where it lies, by one rename of the environment's record,
//! which names it among the lowers and a fresh upper in its place. The fresh one is on the disk before that. Killed before
//! the rename, the fresh upper is nobody's and swept at the next start; after it, the environment has the same files as
//! before on a stack that is one deeper. There is nothing in between: whoever mounts an upper reads the record first, and both
//! hold the environment's gate.
//!
//! The upper of one that runs can't be sealed under its mount. It is copied while everything in the environment stands
//! still, and the copy is a lower from its first moment. A file beside the control socket says that it was us who froze it:
//! the next daemon thaws it then ([`crate::sandboxes::thaw_after_copy`]), and sweeps the copy that no record names.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use casemate_store::Id;
use casemate_worker::protocol::{NewUpper, TreeRequest};

use crate::Inner;
use crate::error::Error;
use crate::jobs::Job;
use crate::layers::Pins;
use crate::records::{EnvironmentRecord, Lower};
use crate::releases::blocking;
use crate::sandboxes::{self, Sandbox};

/// A new upper's name. Where no record comes to name it, it goes with the pins.
fn new_upper(pins: &mut Pins) -> Result<Id, Error> {
    let id = Id::random().map_err(Error::io("read", "/dev/urandom"))?;
    pins.add_lowers(&[Lower::Upper(id)]);
    Ok(id)
}

impl Inner {
    /// Commit an environment's record, and have it in the table: also where the disk did not confirm what it did, since a
    /// sealed upper that the table takes for a writable one would be mounted.
    pub(crate) fn commit_environment(&self, id: &Id, record: EnvironmentRecord) -> Result<(), Error> {
        let committed = self.store.environments::<Id, EnvironmentRecord>().commit(id, &record);
        if matches!(committed, Ok(()) | Err(casemate_store::Error::Unconfirmed { .. })) {
            self.put_environment(*id, record);
        }
        Ok(committed?)
    }

    /// Fresh uppers, each to be right on top of one of these. They are on the disk.
    pub(crate) async fn fresh_uppers<const COUNT: usize>(
        &self,
        job: &Job,
        pins: &mut Pins,
        below: [Lower; COUNT],
    ) -> Result<[Id; COUNT], Error> {
        let mut ids = Vec::with_capacity(COUNT);
        for _ in 0..COUNT {
            ids.push(new_upper(pins)?);
        }
        let make = ids.iter().zip(below);
        let make = make
            .map(|(id, below)| NewUpper { path: casemate_store::upper(id), like: below.tree() })
            .collect();
        self.workers.tree(Some(job), &self.store, &TreeRequest::Uppers { make }).await?;
        Ok(std::array::from_fn(|at| ids[at]))
    }

    /// Whether nothing was written since the upper was made. It is our own directory; what is in it is not looked at.
    pub(crate) fn is_untouched(&self, record: &EnvironmentRecord) -> bool {
        let upper = self.store.upper_path(&record.upper).join("upper");
        std::fs::read_dir(upper).is_ok_and(|mut entries| entries.next().is_none())
    }

    /// Everything that was written is on the disk: a snapshot is not to lose what a power cut takes from an environment.
    pub(crate) async fn sync_store(self: &Arc<Self>) -> Result<(), Error> {
        let engine = Arc::clone(self);
        blocking(move || Ok(engine.store.sync()?)).await
    }

    /// Seal the upper of an environment that does not run; `fresh` is its new one. The caller holds the gate.
    pub(crate) fn seal(
        &self,
        id: &Id,
        mut record: EnvironmentRecord,
        fresh: Id,
    ) -> Result<EnvironmentRecord, Error> {
        record.commits.insert(0, Lower::Upper(record.upper));
        record.upper = fresh;
        self.commit_environment(id, record.clone())?;
        Ok(record)
    }

    /// Copy the upper of a running environment while it stands still; the copy is on the disk then. The caller holds the
    /// gate, so that nobody stops or pauses it meanwhile.
    pub(crate) async fn copy_upper(
        &self,
        job: &Job,
        pins: &mut Pins,
        id: &Id,
        record: &EnvironmentRecord,
        sandbox: &Sandbox,
    ) -> Result<Id, Error> {
        let copy = new_upper(pins)?;
        let request =
            TreeRequest::Copy { from: Lower::Upper(record.upper).tree(), to: Lower::Upper(copy).tree() };
        job.stage("copying");
        if sandbox.paused.load(Ordering::Relaxed) {
            self.workers.tree(Some(job), &self.store, &request).await?;
            return Ok(copy);
        }
        let name = &record.name;
        let Some(group) = &sandbox.group else {
            let reason = match self.cgroups.scopes() {
                Ok(_) => "it was started when there were none",
                Err(reason) => reason,
            };
            let reason = format!("{reason}; stop it first (`casemate stop`)");
            return Err(Error::NoGroup { name: name.clone(), action: "be copied while it runs", reason });
        };
        let failed = |source| Error::Group { name: name.clone(), source };
        let directory = self.settings.runtime.join(id.to_string());
        // Init answers nobody while it is frozen: whoever asks waits for this lock.
        let asked = sandbox.control.lock().await;
        sandboxes::mark_copy(&directory)?;
        let copied = match group.freeze(true).await {
            Ok(()) => self.workers.tree(Some(job), &self.store, &request).await.map(|_| ()),
            Err(source) => Err(failed(source)),
        };
        let thawed = group.freeze(false).await.map_err(failed);
        if thawed.is_ok() {
            sandboxes::unmark_copy(&directory)?;
        }
        drop(asked);
        // That it stands still is what the user must know first.
        thawed.and(copied)?;
        Ok(copy)
    }
}
