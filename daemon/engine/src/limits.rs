//! Limits, usage, pauses and signals of environments that run.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use casemate_manifest::ResourceLimits;
use casemate_sandbox::control::Request;
use casemate_store::Id;

use crate::Inner;
use crate::api::Change;
use crate::cgroups::{Group, Scope, Unmet, Usage};
use crate::configuration;
use crate::error::Error;
use crate::jobs::Job;
use crate::records::EnvironmentRecord;
use crate::sandboxes::Sandbox;
use crate::state::{Step, step};

impl Sandbox {
    /// See which limits are in force.
    pub(crate) fn look_at_limits(&self, limits: &ResourceLimits) {
        let unmet = match &self.group {
            Some(group) => group.unmet(limits),
            None => limits.keys().map(str::to_owned).collect(),
        };
        *self.unenforced.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = unmet;
    }

    pub(crate) fn oom_kills(&self) -> Option<u64> {
        self.group.as_ref()?.out_of_memory()?.oom_kills()
    }

    pub(crate) fn unenforced(&self) -> Vec<String> {
        self.unenforced.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

impl Inner {
    /// A fresh sandbox is where it should be, and what was set is in force: a manager's word is not enough. If not, it
    /// does not live on.
    pub(crate) async fn check_group(
        &self,
        sandbox: &Sandbox,
        scope: &Scope,
        record: &EnvironmentRecord,
    ) -> Result<(), Error> {
        let keys = match &sandbox.group {
            Some(group) => group.unmet(&scope.limits),
            None => {
                sandbox.stop(Duration::ZERO).await;
                let message = format!("it is not in the control group {} that was made for it", scope.unit);
                return Err(Error::Sandbox { name: record.name.clone(), message });
            }
        };
        if keys.is_empty() {
            return Ok(());
        }
        sandbox.stop(Duration::ZERO).await;
        let maker = self.cgroups.scopes().map_or("nobody", |scopes| scopes.maker());
        let reason = format!("{maker} took them, but the kernel's files do not show them");
        Err(Unmet { keys, reason }.into())
    }

    fn running(&self, id: &Id, asked: Step) -> Result<(String, Option<Arc<Sandbox>>), Error> {
        let (name, state, sandbox) = self.with_environment(id, |environment| {
            (environment.record.name.clone(), environment.state(), environment.sandbox.clone())
        })?;
        step(&name, state, asked)?;
        Ok((name, sandbox))
    }

    pub(crate) fn group(&self, id: &Id) -> Option<Group> {
        let sandbox = self.with_environment(id, |environment| environment.sandbox.clone()).ok()??;
        sandbox.group.clone()
    }

    pub(crate) fn usage(&self, id: &Id) -> Usage {
        self.group(id).map(|group| group.usage()).unwrap_or_default()
    }

    /// Freeze or thaw.
    pub(crate) async fn pause(
        self: Arc<Self>,
        job: Job,
        id: Id,
        on: bool,
    ) -> Result<Vec<(String, String)>, Error> {
        let (asked, stage, action) = match on {
            true => (Step::Pause, "pausing", "be paused"),
            false => (Step::Unpause, "unpausing", "be unpaused"),
        };
        job.stage(stage);
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        let (name, sandbox) = self.running(&id, asked)?;
        let Some(sandbox) = sandbox else { return Ok(vec![]) };
        let Some(group) = &sandbox.group else {
            let reason = self.cgroups.scopes().map_or_else(str::to_owned, |_| {
                "it was started when there were no control groups; restart it".to_owned()
            });
            return Err(Error::NoGroup { name, action, reason });
        };
        // Init answers nobody while it is frozen: what it is being asked now it answers before.
        let _asked = sandbox.control.lock().await;
        let frozen = group.freeze(on).await;
        sandbox.paused.store(group.is_frozen(), Ordering::Relaxed);
        self.tell(Change::EnvironmentChanged(id.to_string()));
        frozen.map_err(|source| Error::Group { name, source })?;
        Ok(vec![("environment".into(), id.to_string())])
    }

    /// SIGKILL ends the whole environment; any other signal goes to its sessions.
    pub(crate) async fn kill(
        self: Arc<Self>,
        job: Job,
        id: Id,
        signal: i32,
    ) -> Result<Vec<(String, String)>, Error> {
        if signal == rustix::process::Signal::KILL.as_raw() {
            return self.stop(job, id, Some(Duration::ZERO)).await;
        }
        job.stage("sending a signal");
        let (name, sandbox) = self.running(&id, Step::Signal)?;
        let Some(sandbox) = sandbox else { return Ok(vec![]) };
        let sessions: Vec<u64> =
            self.with_environment(&id, |environment| environment.sessions.keys().copied().collect())?;
        for session in &sessions {
            let asked =
                sandbox.control.lock().await.ask(&Request::Signal { session: *session, signal }, &[]).await;
            match asked {
                Ok(_) => {}
                // One that ended meanwhile needs no signal.
                Err(_) if self.with_environment(&id, |e| !e.sessions.contains_key(session))? => {}
                Err(error) => return Err(Error::Sandbox { name, message: error.to_string() }),
            }
        }
        Ok(vec![("environment".into(), id.to_string()), ("sessions".into(), sessions.len().to_string())])
    }

    /// New limits, from now on: on record, and in force where it runs.
    pub(crate) async fn limit(
        self: Arc<Self>,
        job: Job,
        id: Id,
        limits: ResourceLimits,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("setting limits");
        limits.check()?;
        configuration::policy(&self.settings.configuration)?.judge_limits(&limits)?;
        if let Some(unmet) = self.cgroups.unmet(&limits) {
            return Err(unmet.into());
        }
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        let (mut record, sandbox) = self
            .with_environment(&id, |environment| (environment.record.clone(), environment.sandbox.clone()))?;
        let before = std::mem::replace(&mut record.limits, limits);
        if let Some(sandbox) = &sandbox {
            let failed = |source| Error::Group { name: record.name.clone(), source };
            let Some(group) = &sandbox.group else {
                let reason = "it was started when there were no control groups; restart it".to_owned();
                return Err(Error::NoGroup { name: record.name, action: "be limited", reason });
            };
            self.cgroups.limit(group, &limits).await.map_err(failed)?;
            let keys = group.unmet(&limits);
            if !keys.is_empty() {
                self.cgroups.limit(group, &before).await.map_err(failed)?;
                let reason = "they were set, but the kernel's files do not show them".to_owned();
                return Err(Unmet { keys, reason }.into());
            }
            sandbox.look_at_limits(&limits);
        }
        self.store.environments::<Id, EnvironmentRecord>().commit(&id, &record)?;
        self.put_environment(id, record);
        Ok(vec![("environment".into(), id.to_string())])
    }

    /// Tell of processes that are killed for want of memory, until init is gone.
    pub(crate) async fn follow_memory(&self, id: &Id, sandbox: &Sandbox) {
        let Some(mut events) = sandbox.group.as_ref().and_then(Group::out_of_memory) else {
            return std::future::pending().await;
        };
        loop {
            if let Some(kills) = events.oom_kills() {
                self.oom_kills(id, kills);
            }
            if let Err(error) = events.changed().await {
                tracing::warn!(environment = %id, %error, "memory.events cannot be watched");
                return std::future::pending().await;
            }
        }
    }

    /// The last ones: init may be gone before its group is looked at again.
    pub(crate) fn count_oom_kills(&self, id: &Id, sandbox: &Sandbox) {
        if let Some(kills) = sandbox.oom_kills() {
            self.oom_kills(id, kills);
        }
    }

    fn oom_kills(&self, id: &Id, kills: u64) {
        let before =
            self.with_environment(id, |environment| std::mem::replace(&mut environment.oom_kills, kills));
        if before.is_ok_and(|before| kills > before) {
            tracing::warn!(environment = %id, kills, "out of memory: processes were killed");
            self.tell(Change::OutOfMemory(id.to_string(), kills));
            self.tell(Change::EnvironmentChanged(id.to_string()));
        }
    }
}
