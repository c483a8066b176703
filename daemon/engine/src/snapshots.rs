//! Snapshots: what an environment was, kept by name; and environments made of them.
//!
//! A commit seals ([`crate::sealing`]) and then writes the snapshot's record; killed in between, the environment has the
//! files that it had, and there is no snapshot that anybody was told of. Hashing follows ([`crate::storing`]).
//!
//! A restore is up to three records, each of which leaves a whole state: the environment is sealed as it is, that is kept
//! as an automatic snapshot, and only then its record says what the snapshot said, with a fresh upper. A clone is one more
//! record, of an environment of its own, on the lowers of the first.

use std::sync::Arc;

use casemate_store::{Id, Name, SnapshotName};

use crate::api::{Caller, JobId, SnapshotInfo, State};
use crate::error::Error;
use crate::jobs::{Job, now};
use crate::layers::Pins;
use crate::records::{EnvironmentRecord, Lower, SnapshotRecord};
use crate::state::{Step, step};
use crate::{Engine, Inner, alterations, damaged, environment_claim};

/// Most bytes of a snapshot's message.
const MESSAGE_MAX: usize = 4_096;

/// Which snapshot an environment goes back to.
enum Target {
    Named(Name),
    /// The newest that was committed.
    Newest,
}

fn no_snapshot(name: &str) -> Error {
    Error::NotFound {
        what: "snapshot",
        name: name.chars().take(64).collect(),
        remedy: "`casemate snapshots` shows those that there are, `casemate commit` makes one",
    }
}

impl Engine {
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        let tables = self.inner.tables();
        let sound = tables.snapshots.iter().map(|(name, record)| record.info(name));
        let damaged = tables.damage.snapshots.keys().map(|name| SnapshotInfo {
            environment: name.environment.to_string(),
            name: name.snapshot.to_string(),
            state: "damaged".to_owned(),
            ..SnapshotInfo::default()
        });
        sound.chain(damaged).collect()
    }

    /// Those of one environment, oldest first.
    pub fn snapshots_of(&self, id: &str) -> Result<Vec<SnapshotInfo>, Error> {
        self.named(id)?;
        let mut found = self.snapshots();
        found.retain(|info| info.environment == id);
        found.sort_by_key(|info| info.number);
        Ok(found)
    }

    /// By the environment's id and its own name.
    pub fn snapshot(&self, id: &str, name: &str) -> Result<SnapshotInfo, Error> {
        let found = self.snapshots().into_iter().find(|info| info.environment == id && info.name == name);
        found.ok_or_else(|| no_snapshot(name))
    }

    /// Keep what is in an environment now. Without a name, the next number is its name.
    pub fn commit(
        &self,
        caller: &Caller,
        id: &str,
        message: &str,
        name: Option<&str>,
    ) -> Result<JobId, Error> {
        let (id, environment) = self.stepped(id, Step::Commit)?;
        let name = name.map(str::parse::<Name>).transpose()?;
        if message.len() > MESSAGE_MAX {
            return Err(Error::Message { bytes: message.len(), most: MESSAGE_MAX });
        }
        if let Some(name) = &name {
            self.inner.check_free(&id, name)?;
        }
        let (inner, message) = (Arc::clone(&self.inner), message.to_owned());
        let claims = vec![environment_claim(&environment)];
        self.inner
            .jobs
            .start(caller, "commit", &environment, claims, move |job| inner.commit(job, id, message, name))
    }

    /// Make an environment what a snapshot says. What it is now is kept as an automatic snapshot, or discarded.
    pub fn restore(&self, caller: &Caller, id: &str, snapshot: &str, discard: bool) -> Result<JobId, Error> {
        self.snapshot(id, snapshot)?;
        self.go_back(caller, id, "restore", Target::Named(snapshot.parse()?), discard)
    }

    /// The same with the newest snapshot that was committed.
    pub fn rollback(&self, caller: &Caller, id: &str, discard: bool) -> Result<JobId, Error> {
        self.go_back(caller, id, "rollback", Target::Newest, discard)
    }

    fn go_back(
        &self,
        caller: &Caller,
        id: &str,
        kind: &str,
        target: Target,
        discard: bool,
    ) -> Result<JobId, Error> {
        let (id, name) = self.stepped_or_ending(id, Step::Restore)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, kind, &name, vec![environment_claim(&name)], move |job| {
            inner.restore(job, id, target, discard)
        })
    }

    /// A new environment with the files and the manifest of another, as it is now or as a snapshot of it says.
    pub fn clone_environment(
        &self,
        caller: &Caller,
        id: &str,
        name: &str,
        snapshot: Option<&str>,
    ) -> Result<JobId, Error> {
        let (id, environment) = self.stepped(id, Step::Clone)?;
        let new: Name = name.parse()?;
        if self.inner.find(new.as_str()).is_some() {
            return Err(alterations::taken(&new));
        }
        let snapshot = snapshot.map(|name| self.snapshot(&id.to_string(), name)).transpose()?;
        let snapshot = snapshot.map(|info| info.name.parse::<Name>()).transpose()?;
        let inner = Arc::clone(&self.inner);
        let claims = vec![environment_claim(&environment), environment_claim(new.as_str())];
        self.inner.jobs.start(caller, "clone", &environment, claims, move |job| {
            inner.clone_environment(job, id, new, snapshot)
        })
    }

    /// Remove a snapshot: also one that is damaged.
    pub fn remove_snapshot(&self, caller: &Caller, id: &str, name: &str) -> Result<JobId, Error> {
        let (id, environment) = self.named(id)?;
        self.snapshot(&id.to_string(), name)?;
        let snapshot = SnapshotName { environment: id, snapshot: name.parse()? };
        let inner = Arc::clone(&self.inner);
        let claims = vec![environment_claim(&environment)];
        let subject = format!("{environment} {name}");
        self.inner
            .jobs
            .start(caller, "forget", &subject, claims, move |job| inner.remove_snapshot(job, snapshot))
    }
}

impl Inner {
    /// A snapshot's record, as it is now.
    pub(crate) fn snapshot(&self, name: &SnapshotName) -> Result<SnapshotRecord, Error> {
        let tables = self.tables();
        if let Some(reason) = tables.damage.snapshots.get(name) {
            return Err(damaged("snapshot", &name.to_string(), reason));
        }
        tables.snapshots.get(name).cloned().ok_or_else(|| no_snapshot(name.snapshot.as_str()))
    }

    fn check_free(&self, id: &Id, name: &Name) -> Result<(), Error> {
        let name = SnapshotName { environment: *id, snapshot: name.clone() };
        let tables = self.tables();
        if tables.snapshots.contains_key(&name) || tables.damage.snapshots.contains_key(&name) {
            return Err(Error::AlreadyExists {
                what: "snapshot",
                name: name.snapshot.to_string(),
                remedy: "choose another name, or remove it first with `casemate snapshots --remove`",
            });
        }
        Ok(())
    }

    /// Write the record of a new snapshot. The caller holds the gate.
    fn keep(
        &self,
        id: &Id,
        name: Option<Name>,
        message: String,
        automatic: bool,
        environment: EnvironmentRecord,
    ) -> Result<Name, Error> {
        let newest = {
            let tables = self.tables();
            let of = tables.snapshots.iter().filter(|(name, _)| name.environment == *id);
            of.map(|(_, record)| record.number).max().unwrap_or(0)
        };
        let number = newest.saturating_add(1);
        let name = match name {
            Some(name) => name,
            // Somebody may have given a snapshot a number for a name.
            None => (number..)
                .map(|number| number.to_string().parse::<Name>())
                .find(|name| name.as_ref().map_or(true, |name| self.check_free(id, name).is_ok()))
                .ok_or_else(|| no_snapshot(""))??,
        };
        let record = SnapshotRecord { number, message, created_at: now(), automatic, environment };
        let key = SnapshotName { environment: *id, snapshot: name.clone() };
        let created = self.store.snapshots::<SnapshotName, SnapshotRecord>().create(&key, &record);
        if matches!(created, Ok(()) | Err(casemate_store::Error::Unconfirmed { .. })) {
            self.put_snapshot(key, record);
        }
        created?;
        Ok(name)
    }

    async fn commit(
        self: Arc<Self>,
        job: Job,
        id: Id,
        message: String,
        name: Option<Name>,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("sealing");
        let mut pins = self.pins();
        let outcome = self.commit_in(&job, id, message, name, &mut pins).await;
        pins.release().await;
        self.store_sealed();
        outcome
    }

    async fn commit_in(
        self: &Arc<Self>,
        job: &Job,
        id: Id,
        message: String,
        name: Option<Name>,
        pins: &mut Pins,
    ) -> Result<Vec<(String, String)>, Error> {
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        self.settle(&id).await?;
        let (mut record, state, sandbox) = self.with_environment(&id, |environment| {
            (environment.record.clone(), environment.state(), environment.sandbox.clone())
        })?;
        step(&record.name, state, Step::Commit)?;
        self.check_depth(&record)?;
        match sandbox {
            Some(sandbox) => {
                let copy = self.copy_upper(job, pins, &id, &record, &sandbox).await?;
                record.commits.insert(0, Lower::Upper(copy));
            }
            None if self.is_untouched(&record) => {}
            None => {
                self.sync_store().await?;
                let [fresh] = self.fresh_uppers(job, pins, [Lower::Upper(record.upper)]).await?;
                job.check()?;
                record = self.seal(&id, record, fresh)?;
            }
        }
        let name = self.keep(&id, name, message, false, record)?;
        Ok(vec![("environment".into(), id.to_string()), ("snapshot".into(), name.to_string())])
    }

    async fn restore(
        self: Arc<Self>,
        job: Job,
        id: Id,
        target: Target,
        discard: bool,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("restoring");
        let mut pins = self.pins();
        let outcome = self.restore_in(&job, id, target, discard, &mut pins).await;
        pins.release().await;
        self.store_sealed();
        outcome
    }

    async fn restore_in(
        self: &Arc<Self>,
        job: &Job,
        id: Id,
        target: Target,
        discard: bool,
        pins: &mut Pins,
    ) -> Result<Vec<(String, String)>, Error> {
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        self.settle(&id).await?;
        let (mut record, state) =
            self.with_environment(&id, |environment| (environment.record.clone(), environment.state()))?;
        step(&record.name, state, Step::Restore)?;
        let name = match target {
            Target::Named(name) => name,
            Target::Newest => {
                let tables = self.tables();
                let of = tables
                    .snapshots
                    .iter()
                    .filter(|(name, record)| name.environment == id && !record.automatic);
                let newest = of.max_by_key(|(_, record)| record.number);
                newest.map(|(name, _)| name.snapshot.clone()).ok_or_else(|| no_snapshot("to go back to"))?
            }
        };
        let restored = self.snapshot(&SnapshotName { environment: id, snapshot: name.clone() })?.environment;
        let mut result = vec![("environment".into(), id.to_string()), ("snapshot".into(), name.to_string())];
        let top = restored.top();
        let upper = if discard || self.is_untouched(&record) {
            let [upper] = self.fresh_uppers(job, pins, [top]).await?;
            upper
        } else {
            let [fresh, upper] = self.fresh_uppers(job, pins, [Lower::Upper(record.upper), top]).await?;
            job.check()?;
            record = self.seal(&id, record, fresh)?;
            upper
        };
        if !discard && !self.is_kept(&id, &record) {
            let message = format!("before {name} was restored");
            let kept = self.keep(&id, None, message, true, record.clone())?;
            result.push(("kept".into(), kept.to_string()));
        }
        // What it names no longer goes when the pins are released, unless somebody else names it.
        pins.add_lowers(&[Lower::Upper(record.upper)]);
        pins.add_lowers(&record.stack().collect::<Vec<_>>());
        let record = EnvironmentRecord {
            name: record.name,
            state: State::Built,
            created_at: record.created_at,
            upper,
            ..restored
        };
        self.commit_environment(&id, record)?;
        Ok(result)
    }

    /// Whether a snapshot holds this very stack and manifest.
    fn is_kept(&self, id: &Id, record: &EnvironmentRecord) -> bool {
        let tables = self.tables();
        let mut of = tables.snapshots.iter().filter(|(name, _)| name.environment == *id);
        of.any(|(_, snapshot)| {
            let kept = &snapshot.environment;
            kept.commits == record.commits && kept.layers == record.layers && kept.manifest == record.manifest
        })
    }

    async fn clone_environment(
        self: Arc<Self>,
        job: Job,
        id: Id,
        new: Name,
        snapshot: Option<Name>,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("cloning");
        let mut pins = self.pins();
        let outcome = self.clone_in(&job, id, &new, snapshot, &mut pins).await;
        pins.release().await;
        self.store_sealed();
        outcome
    }

    async fn clone_in(
        self: &Arc<Self>,
        job: &Job,
        id: Id,
        new: &Name,
        snapshot: Option<Name>,
        pins: &mut Pins,
    ) -> Result<Vec<(String, String)>, Error> {
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        self.settle(&id).await?;
        let (mut record, state, sandbox) = self.with_environment(&id, |environment| {
            (environment.record.clone(), environment.state(), environment.sandbox.clone())
        })?;
        step(&record.name, state, Step::Clone)?;
        if self.find(new.as_str()).is_some() {
            return Err(alterations::taken(new));
        }
        let upper = match (snapshot, sandbox) {
            (Some(name), _) => {
                record = self.snapshot(&SnapshotName { environment: id, snapshot: name })?.environment;
                let [upper] = self.fresh_uppers(job, pins, [record.top()]).await?;
                upper
            }
            (None, Some(sandbox)) => {
                let copy = self.copy_upper(job, pins, &id, &record, &sandbox).await?;
                record.commits.insert(0, Lower::Upper(copy));
                let [upper] = self.fresh_uppers(job, pins, [record.top()]).await?;
                upper
            }
            (None, None) if self.is_untouched(&record) => {
                let [upper] = self.fresh_uppers(job, pins, [record.top()]).await?;
                upper
            }
            (None, None) => {
                let [fresh, upper] = self.fresh_uppers(job, pins, [Lower::Upper(record.upper); 2]).await?;
                job.check()?;
                record = self.seal(&id, record, fresh)?;
                upper
            }
        };
        let record = EnvironmentRecord {
            name: new.to_string(),
            state: State::Built,
            created_at: now(),
            upper,
            ..record
        };
        let own = Id::random().map_err(Error::io("read", "/dev/urandom"))?;
        self.commit_environment(&own, record)?;
        Ok(vec![("environment".into(), own.to_string())])
    }

    async fn remove_snapshot(
        self: Arc<Self>,
        job: Job,
        name: SnapshotName,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("removing");
        let lowers = {
            let gate = self.gate(&name.environment);
            let _one_at_a_time = gate.lock().await;
            self.store.snapshots::<SnapshotName, SnapshotRecord>().remove(&name)?;
            self.forget_snapshot(&name).map(|record| record.environment.stack().collect::<Vec<_>>())
        };
        self.drop_lowers(&lowers.unwrap_or_default()).await?;
        Ok(vec![("snapshot".into(), name.snapshot.to_string())])
    }
}
