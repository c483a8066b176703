//! What changes an environment's record alone: its name, and the states that keep it as it is.

use std::sync::Arc;

use casemate_store::{Id, Name};

use crate::api::{Caller, JobId};
use crate::error::Error;
use crate::jobs::Job;
use crate::state::{Step, step};
use crate::{Engine, Inner, environment_claim};

/// The name is free.
pub(crate) fn taken(name: &Name) -> Error {
    Error::AlreadyExists {
        what: "environment",
        name: name.to_string(),
        remedy: "choose another name, or destroy it first with `casemate destroy`",
    }
}

impl Engine {
    pub fn rename(&self, caller: &Caller, id: &str, name: &str) -> Result<JobId, Error> {
        let (id, old) = self.stepped_or_ending(id, Step::Rename)?;
        let new: Name = name.parse()?;
        if self.inner.find(new.as_str()).is_some() {
            return Err(taken(&new));
        }
        let inner = Arc::clone(&self.inner);
        let claims = vec![environment_claim(&old), environment_claim(new.as_str())];
        self.inner.jobs.start(caller, "rename", &old, claims, move |job| inner.rename(job, id, new))
    }

    /// No writes from now on.
    pub fn freeze(&self, caller: &Caller, id: &str) -> Result<JobId, Error> {
        self.enter_state(caller, id, Step::Freeze, "freeze")
    }

    pub fn thaw(&self, caller: &Caller, id: &str) -> Result<JobId, Error> {
        self.enter_state(caller, id, Step::Thaw, "thaw")
    }

    pub fn archive(&self, caller: &Caller, id: &str) -> Result<JobId, Error> {
        self.enter_state(caller, id, Step::Archive, "archive")
    }

    pub fn unarchive(&self, caller: &Caller, id: &str) -> Result<JobId, Error> {
        self.enter_state(caller, id, Step::Unarchive, "unarchive")
    }

    /// An illegal step is refused at once; but one that is about to stop by itself is waited for, by the job.
    pub(crate) fn stepped_or_ending(&self, id: &str, asked: Step) -> Result<(Id, String), Error> {
        let (id, name) = self.named(id)?;
        let (state, is_ending) =
            self.inner.with_environment(&id, |environment| (environment.state(), environment.is_ending()))?;
        if !is_ending {
            step(&name, state, asked)?;
        }
        Ok((id, name))
    }

    fn enter_state(&self, caller: &Caller, id: &str, asked: Step, kind: &str) -> Result<JobId, Error> {
        let (id, name) = self.stepped_or_ending(id, asked)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, kind, &name, vec![environment_claim(&name)], move |job| {
            inner.enter_state(job, id, asked)
        })
    }
}

impl Inner {
    async fn rename(self: Arc<Self>, job: Job, id: Id, new: Name) -> Result<Vec<(String, String)>, Error> {
        job.stage("renaming");
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        self.settle(&id).await?;
        let (mut record, state) =
            self.with_environment(&id, |environment| (environment.record.clone(), environment.state()))?;
        step(&record.name, state, Step::Rename)?;
        if self.find(new.as_str()).is_some() {
            return Err(taken(&new));
        }
        record.name = new.to_string();
        self.commit_environment(&id, record)?;
        Ok(vec![("environment".into(), id.to_string())])
    }

    async fn enter_state(
        self: Arc<Self>,
        job: Job,
        id: Id,
        asked: Step,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("changing its state");
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        self.settle(&id).await?;
        let (mut record, state) =
            self.with_environment(&id, |environment| (environment.record.clone(), environment.state()))?;
        record.state = step(&record.name, state, asked)?;
        self.commit_environment(&id, record)?;
        Ok(vec![("environment".into(), id.to_string())])
    }
}
