//! Collection: marks from the records, and sweeps what none of them names: layers, uppers, objects; and downloads that are old
//! and that no lock names.
//!
//! It holds [`Inner::sweeping`] alone, so that it waits for jobs that store, and they for it; what runs goes on, since its
//! layers are named by its record. While a record is damaged, nobody knows what it names, and nothing is collected.

use std::collections::{BTreeSet, HashSet};
use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::time::Duration;

use casemate_manifest::Lock;
use casemate_store::Digest;
use casemate_worker::protocol::{TreeRequest, TreeResult};

use crate::api::{Caller, JobId};
use crate::error::Error;
use crate::jobs::{Claim, Job};
use crate::records::Lower;
use crate::{Engine, Inner};

const DAY: u64 = 24 * 3_600;

impl Engine {
    /// Remove what nothing refers to, and downloads of so many days that no lock names; with `dry`, only tell.
    pub fn collect(&self, caller: &Caller, dry: bool, days: u64) -> Result<JobId, Error> {
        let inner = Arc::clone(&self.inner);
        let subject = self.inner.settings.store.display().to_string();
        let claims = vec![Claim { what: "collection of", name: subject.clone() }];
        self.inner.jobs.start(caller, "collect", &subject, claims, move |job| inner.collect(job, dry, days))
    }

    /// Tell why an object is kept: by its name in `objects/`, or the BLAKE3 of its content.
    pub fn explain(&self, caller: &Caller, object: &str) -> Result<JobId, Error> {
        let digits: String =
            object.trim_start_matches("objects/").chars().filter(|c| *c != '/').take(64).collect();
        let content: Digest = digits.parse()?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "explain", object, vec![], move |job| inner.explain(job, content))
    }
}

impl Inner {
    /// SHA-256 of every package that a lock names.
    fn locked_downloads(&self) -> Result<HashSet<String>, Error> {
        let locks: Vec<(String, String)> = {
            let tables = self.tables();
            let environments = tables.environments.values().map(|environment| &environment.record);
            let snapshots = tables.snapshots.values().map(|snapshot| &snapshot.environment);
            environments.chain(snapshots).map(|record| (record.name.clone(), record.lock.clone())).collect()
        };
        let mut named = HashSet::new();
        for (name, text) in locks {
            let lock = Lock::parse(&text).map_err(|error| Error::Uncollectable {
                what: format!("the lock of {name:?}"),
                reason: error.to_string(),
            })?;
            named.extend(lock.packages.into_iter().map(|package| package.sha256));
        }
        Ok(named)
    }

    async fn collect(
        self: Arc<Self>,
        job: Job,
        dry: bool,
        days: u64,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("waiting for jobs that store");
        let _alone = tokio::select! {
            alone = self.sweeping.write() => alone,
            () = job.cancelled() => return Err(Error::Cancelled),
        };
        if let Some((what, reason)) = self.tables().damage.reports().into_iter().next() {
            return Err(Error::Uncollectable { what, reason });
        }
        let before: u64 = self.measured(&job).await?.accounts.iter().map(|one| one.exclusive).sum();
        job.stage("collecting");
        let trees = self.unreferenced()?;
        for tree in &trees {
            job.log(&format!("{tree}: no record names it"));
        }
        let count = trees.len();
        let swept = self.workers.tree(Some(&job), &self.store, &TreeRequest::Sweep { trees, dry }).await?;
        let TreeResult::Swept { objects, bytes } = swept else {
            return Err(Error::Nonsense { worker: "casemate-tree", answer: format!("{swept:?}") });
        };
        let named = self.locked_downloads()?;
        let old = Duration::from_secs(days.saturating_mul(DAY));
        let (mut downloads, mut of_downloads) = (0u64, 0);
        for (name, bytes, age) in self.downloads.list()? {
            if age < old || named.contains(&name) {
                continue;
            }
            if !dry {
                self.downloads.remove(&name)?;
            }
            downloads += 1;
            of_downloads += bytes;
        }
        let freed = bytes + of_downloads;
        Ok([
            ("trees", count as u64),
            ("objects", objects),
            ("downloads", downloads),
            ("freed", freed),
            ("before", before),
            ("after", before.saturating_sub(freed)),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_string()))
        .to_vec())
    }

    async fn explain(self: Arc<Self>, job: Job, content: Digest) -> Result<Vec<(String, String)>, Error> {
        job.stage("reading listings");
        let request = TreeRequest::Find { content: content.to_string() };
        let answer = self.told_at_length(&job, &request).await?;
        let owners = self.owners_of_lowers();
        let mut keepers = BTreeSet::new();
        for line in BufReader::new(answer).lines() {
            let line = line.map_err(Error::io("read", "the answer"))?;
            let Some((layer, path)) = line.split_once(' ') else { continue };
            let owners = layer.parse::<Lower>().ok().and_then(|lower| owners.get(&lower));
            for (kind, name) in owners.into_iter().flatten() {
                job.log(&format!("{kind} {name}: {path} ({layer})"));
                keepers.insert((kind, name));
            }
        }
        if keepers.is_empty() {
            job.log("nothing that is named has it: the next collection takes it, if it is there at all");
        }
        Ok(vec![("keepers".into(), keepers.len().to_string())])
    }
}
