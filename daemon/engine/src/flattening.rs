//! Deep stacks: when many commits lie on each other, they become one layer, of the same objects. The kernel mounts 500 layers
//! at most (some 80 before Linux 6.7, by the length of their names), and looks a name up in each.
//!
//! It is done like storing ([`crate::storing`]), by the same job: the layer is on the disk before the one record that names
//! it in the others' place, under the environment's gate, while it does not run. Snapshots keep the stacks that they have.

use std::collections::HashSet;
use std::sync::Arc;

use casemate_store::{Id, Name};
use casemate_worker::protocol::TreeRequest;

use crate::error::Error;
use crate::jobs::Job;
use crate::layers::Pins;
use crate::records::{EnvironmentRecord, Lower};
use crate::{Inner, Tables};

/// Commits on each other that stay as they are.
const DEEP: usize = 24;
/// Where something keeps them from becoming one: no more are put on top.
const DEEPEST: usize = 64;

fn is_deep(record: &EnvironmentRecord) -> bool {
    record.commits.len() > DEEP && record.commits.iter().all(|lower| matches!(lower, Lower::Layer(_)))
}

/// An environment whose stack is to be made flat.
pub(crate) fn next_deep(tables: &Tables, failed: &HashSet<Id>) -> Option<Id> {
    let mut deep = tables.environments.iter().filter(|(id, environment)| {
        environment.sandbox.is_none() && is_deep(&environment.record) && !failed.contains(id)
    });
    deep.next().map(|(id, _)| *id)
}

impl Inner {
    /// There is room for another commit.
    pub(crate) fn check_depth(&self, record: &EnvironmentRecord) -> Result<(), Error> {
        if record.commits.len() < DEEPEST {
            return Ok(());
        }
        Err(Error::Deep { name: record.name.clone(), most: DEEPEST })
    }

    pub(crate) async fn flatten(self: &Arc<Self>, job: &Job, id: &Id) -> Result<(), Error> {
        job.check()?;
        job.stage("flattening");
        let mut pins = self.pins();
        let commits = {
            let gate = self.gate(id);
            let _one_at_a_time = gate.lock().await;
            let commits = self.with_environment(id, |environment| environment.record.commits.clone())?;
            pins.add_lowers(&commits);
            commits
        };
        let outcome = self.flatten_pinned(job, id, &commits, &mut pins).await;
        pins.release().await;
        outcome
    }

    async fn flatten_pinned(
        &self,
        job: &Job,
        id: &Id,
        commits: &[Lower],
        pins: &mut Pins,
    ) -> Result<(), Error> {
        let staging = self.store.staging(&format!("flatten-{id}").parse::<Name>()?)?;
        let to = staging.relative(Some(&"tree".parse()?));
        let request =
            TreeRequest::Flatten { stack: commits.iter().map(Lower::tree).collect(), to: to.clone() };
        let made = async {
            self.workers.tree(Some(job), &self.store, &request).await?;
            self.ingest(job, &to, pins).await
        }
        .await;
        self.drop_staging(&staging).await?;
        let (layer, _) = made?;
        let gate = self.gate(id);
        let _one_at_a_time = gate.lock().await;
        let (mut record, runs) = self.with_environment(id, |environment| {
            (environment.record.clone(), environment.sandbox.is_some())
        })?;
        // It runs, or was restored: then another time.
        if runs || !record.commits.ends_with(commits) {
            return Ok(());
        }
        record.commits.truncate(record.commits.len() - commits.len());
        record.commits.push(Lower::Layer(layer));
        self.commit_environment(id, record)
    }
}
