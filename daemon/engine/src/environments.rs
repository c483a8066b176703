//! Environments: started, watched, stopped, destroyed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use casemate_sandbox::control::{HealthState, Notice, Reply, Request};
use casemate_sandbox::plan::{Account, File as PlanFile, Network, Plan, Root, Sudo};
use casemate_store::{Digest, Id};
use casemate_worker::protocol::TreeRequest;
use rustix::fs::FileType;

use crate::api::{Change, ProcessInfo, State};
use crate::build::unenforced;
use crate::cgroups::{Group, ScopeError};
use crate::control::{ControlError, Word};
use crate::error::Error;
use crate::jobs::{Job, now};
use crate::records::{EnvironmentRecord, Lower};
use crate::releases::blocking;
use crate::sandboxes::{self, Birth, Prepared, Sandbox};
use crate::state::{Step, step};
use crate::{Inner, configuration, mounts};

/// What is known of an environment while the daemon runs.
pub(crate) struct Environment {
    pub record: EnvironmentRecord,
    pub sandbox: Option<Arc<Sandbox>>,
    pub sessions: BTreeMap<u64, ProcessInfo>,
    /// Since it was started last.
    pub oom_kills: u64,
    pub last_exit_code: i32,
    pub health: HealthState,
}

impl Environment {
    pub fn new(record: EnvironmentRecord) -> Self {
        Self {
            record,
            sandbox: None,
            sessions: BTreeMap::new(),
            oom_kills: 0,
            last_exit_code: -1,
            health: HealthState::Unknown,
        }
    }

    /// Whether it is about to stop by itself, since the last session has ended.
    pub fn is_ending(&self) -> bool {
        let lingers = |sandbox: &Arc<Sandbox>| sandbox.linger.load(Ordering::Relaxed);
        self.sessions.is_empty() && self.sandbox.as_ref().is_some_and(|sandbox| !lingers(sandbox))
    }

    pub fn health(&self) -> &'static str {
        match self.health {
            HealthState::Unknown => "",
            HealthState::Starting => "starting",
            HealthState::Healthy => "healthy",
            HealthState::Unhealthy => "unhealthy",
        }
    }

    pub fn sessions(&self) -> u32 {
        u32::try_from(self.sessions.len()).unwrap_or(u32::MAX)
    }

    pub fn state(&self) -> State {
        match &self.sandbox {
            Some(sandbox) if sandbox.paused.load(Ordering::Relaxed) => State::Paused,
            Some(_) => State::Running,
            None => self.record.state,
        }
    }
}

/// What an environment is to run for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub step: Step,
    /// Keep it running without sessions.
    pub linger: bool,
    /// Though limits cannot be enforced; also where it was built so.
    pub unenforced_limits: bool,
}

/// Before init is asked again for its notices: it may have more to tell than we can hear.
const AGAIN: Duration = Duration::from_millis(200);
/// An init without sessions ends at once; one that takes longer has got a new one.
const ENDING: Duration = Duration::from_secs(5);

impl Inner {
    pub(crate) fn with_judge<T>(
        &self,
        judge: impl FnOnce(&mounts::Judge<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let policy = configuration::policy(&self.settings.configuration)?;
        let mut own =
            [&self.settings.store, &self.settings.cache, &self.settings.runtime, &self.settings.state]
                .map(Clone::clone)
                .to_vec();
        own.extend(self.settings.configuration.first().cloned());
        let home = &self.settings.home;
        let rules = policy.mount_rules(home, &own, |path| path.canonicalize().ok());
        judge(&mounts::Judge { policy: &policy, rules, home })
    }

    /// Bash where the image has it. The answer is of the topmost layer that has such a name: there a whiteout, which is a device,
    /// hides what is below.
    pub(crate) fn account(&self, layers: &[Digest]) -> Account {
        let has = |path: &str| {
            let found = layers.iter().find_map(|digest| self.store.kind_in_layer(digest, path));
            matches!(found, Some(FileType::RegularFile | FileType::Symlink))
        };
        let shell = if has("usr/bin/bash") || has("bin/bash") { "/bin/bash" } else { "/bin/sh" };
        Account {
            name: self.settings.user_name.clone(),
            uid: self.uid,
            gid: self.gid,
            home: format!("/home/{}", self.settings.user_name),
            shell: shell.into(),
        }
    }

    pub(crate) fn host_files(&self, hostname: &str, network: &Network) -> Vec<PlanFile> {
        let file = |path: &str, content: String| PlanFile { path: path.into(), content };
        vec![
            file("/etc/resolv.conf", self.resolver_file(network)),
            file("/etc/hostname", format!("{hostname}\n")),
            file(
                "/etc/hosts",
                format!(
                    "127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
                ),
            ),
        ]
    }

    /// The sandbox of an environment, started if there is none.
    pub(crate) async fn ensure_running(
        self: &Arc<Self>,
        id: &Id,
        wanted: Wanted,
    ) -> Result<Arc<Sandbox>, Error> {
        let linger = wanted.linger;
        let gate = self.gate(id);
        let _one_at_a_time = gate.lock().await;
        let (record, state, running) = self.with_environment(id, |environment| {
            (environment.record.clone(), environment.state(), environment.sandbox.clone())
        })?;
        step(&record.name, state, wanted.step)?;
        if let Some(sandbox) = running {
            if linger && !sandbox.linger.load(Ordering::Relaxed) {
                let mut control = sandbox.control.lock().await;
                if control.ask(&Request::Linger { on: true }, &[]).await.is_ok() {
                    sandbox.linger.store(true, Ordering::Relaxed);
                    drop(control);
                    return Ok(sandbox);
                }
                drop(control);
                self.ended(id, &sandbox).await?;
            } else {
                return Ok(sandbox);
            }
        }
        let unmet = self.cgroups.unmet(&record.limits);
        match unmet {
            Some(unmet) if !(record.unenforced_limits || wanted.unenforced_limits) => {
                return Err(unmet.into());
            }
            Some(unmet) => {
                let keys = unmet.keys.join(", ");
                tracing::warn!(environment = record.name, keys, reason = unmet.reason, "limits not enforced");
            }
            None => {}
        }
        let network = self.plan_network(&record)?;
        let proxy = self.bus_proxy(&record.session_bus).await?;
        let stack: Vec<Lower> = record.stack().collect();
        let upper = self.store.upper_path(&record.upper);
        let plan = || -> Result<Plan, Error> {
            let mut mounts: Vec<_> = self
                .with_judge(|judge| record.mounts.iter().map(|mount| mounts::plan(judge, mount)).collect())?;
            let (grants, more) = self.with_judge(|judge| {
                let (mut grants, mut mounts) = self.plan_devices(judge, &record.devices)?;
                self.plan_sockets(judge, &record.sockets, &mut grants, &mut mounts)?;
                self.plan_bus(judge.policy, &record.session_bus, proxy.clone(), &mut grants)?;
                judge.policy.judge_nesting(record.nested_namespaces)?;
                grants.nested_namespaces = record.nested_namespaces;
                Ok((grants, mounts))
            })?;
            mounts.extend(more);
            Ok(Plan {
                version: casemate_sandbox::plan::VERSION,
                id: id.to_string(),
                hostname: record.name.clone(),
                root: Root::Overlay {
                    lowers: self.unchecked_lowers(&stack)?,
                    upper: mounts::own_source(&upper.join("upper"))?,
                    work: mounts::own_source(&upper.join("work"))?,
                },
                ids: self.plan_ids(),
                user: self.account(&record.layers),
                write_account: false,
                files: self.host_files(&record.name, &network),
                network,
                mounts,
                grants,
                sudo: Some(Sudo {
                    program: mounts::own_source(&self.settings.libexec.join("casemate-sudo"))?,
                    granted: record.sudo,
                }),
                deny_unix_sockets: false,
                linger,
                service: self.plan_service(&record)?,
                stop_signal: record.stop.signal,
                stop_timeout: record.stop.timeout,
                born_in_group: false,
            })
        };
        let directory = self.settings.runtime.join(id.to_string());
        let scope = self.cgroups.scope(id, self.next_session(), &record.name, &record.limits);
        let no_group = |error: ScopeError| sandboxes::no_group(&record.name, &error);
        let group = scope.as_ref().map_or(Ok(None), |scope| self.cgroups.prepare(scope)).map_err(no_group)?;
        let born_in = group.as_ref().map(Group::open).transpose().map_err(no_group)?;
        let prepare = async |process| {
            if let (Some(scope), None) = (&scope, &group) {
                self.cgroups.create(scope, process).await.map_err(no_group)?;
            }
            // Hashing takes as long as the mounts, so both are done at once.
            let (engine, stack) = (Arc::clone(self), stack.clone());
            let meanwhile = Box::pin(blocking(move || engine.check_listings(&stack)));
            Ok(Prepared { plan: plan()?, meanwhile })
        };
        let key = id.to_string();
        let log = record.service.as_ref().map(|_| self.open_log(id)).transpose()?;
        let birth = Birth { born_in, log };
        let started = sandboxes::start(&self.workers, &key, &directory, &record.name, birth, prepare).await;
        if let (Err(_), Some(group)) = (&started, &group)
            && let Err(error) = self.cgroups.remove(group).await
        {
            tracing::warn!(environment = record.name, %error, "its control group stays");
        }
        let sandbox = Arc::new(started?);
        if let Some(scope) = &scope {
            self.check_group(&sandbox, scope, &record).await?;
        }
        self.adopt(id, Arc::clone(&sandbox))?;
        Ok(sandbox)
    }

    /// Take a running sandbox into the table and watch it until it ends.
    pub(crate) fn adopt(self: &Arc<Self>, id: &Id, sandbox: Arc<Sandbox>) -> Result<(), Error> {
        let limits = self.with_environment(id, |environment| {
            environment.sandbox = Some(Arc::clone(&sandbox));
            // Those before were told of before.
            environment.oom_kills = sandbox.oom_kills().unwrap_or(0);
            environment.record.limits
        })?;
        sandbox.look_at_limits(&limits);
        self.tell(Change::EnvironmentChanged(id.to_string()));
        let (engine, id) = (Arc::clone(self), *id);
        tokio::spawn(async move {
            tokio::select! {
                () = engine.follow_notices(&id, &sandbox) => {}
                () = engine.follow_memory(&id, &sandbox) => {}
            }
            engine.count_oom_kills(&id, &sandbox);
            if let Err(error) = engine.ended(&id, &sandbox).await {
                tracing::warn!(environment = %id, %error, "what a stopped environment left could not be removed");
            }
        });
        Ok(())
    }

    /// Until init is gone.
    async fn follow_notices(&self, id: &Id, sandbox: &Sandbox) {
        let mut watch = sandbox.watch.lock().await;
        let result: Result<(), ControlError> = async {
            // Sessions that were known when notices were lost, and those told of since, until all have been.
            let mut told: Option<(BTreeSet<u64>, BTreeSet<u64>)> = None;
            loop {
                match watch.next().await {
                    Ok(Word::Reply(Reply::Hello { linger, version, .. })) => {
                        sandbox.linger.store(linger, Ordering::Relaxed);
                        sandbox.protocol.store(version, Ordering::Relaxed);
                        if let Some((known, told)) = told.take() {
                            self.forget_sessions(id, &known - &told);
                        }
                    }
                    Ok(Word::Reply(_) | Word::Other(_)) => {}
                    Ok(Word::Notice(notice)) => {
                        if let (Some((_, told)), Notice::Started { session, .. }) = (&mut told, &notice) {
                            told.insert(*session);
                        }
                        self.noticed(id, notice);
                    }
                    // Init drops a watcher that does not keep up. Is it gone? Then nobody can be reached.
                    Err(ControlError::Closed) => {
                        watch.reconnect()?;
                        tracing::warn!(environment = %id, "init's notices were lost; it is asked again");
                        tokio::time::sleep(AGAIN).await;
                        told = Some((self.started_sessions(id), BTreeSet::new()));
                        // The answer to the second tells that all answers to the first have come.
                        for request in [Request::Watch, Request::Hello] {
                            watch.send(&request, &[]).await?;
                        }
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        .await;
        match result {
            Ok(()) | Err(ControlError::Closed) => {}
            Err(error) => tracing::warn!(environment = %id, %error, "init's notices broke off"),
        }
    }

    /// Those that have a process; others are about to be started.
    fn started_sessions(&self, id: &Id) -> BTreeSet<u64> {
        let started = self.with_environment(id, |environment| {
            let started = environment.sessions.iter().filter(|(_, session)| session.pid != 0);
            started.map(|(number, _)| *number).collect()
        });
        started.unwrap_or_default()
    }

    /// Their end was missed; nobody knows how they ended.
    fn forget_sessions(&self, id: &Id, ended: BTreeSet<u64>) {
        let key = id.to_string();
        for session in ended {
            let was_there =
                self.with_environment(id, |environment| environment.sessions.remove(&session).is_some());
            if matches!(was_there, Ok(true)) {
                self.tell(Change::ProcessEnded((key.clone(), session), false, 0));
            }
        }
        self.tell(Change::EnvironmentChanged(key));
    }

    fn noticed(&self, id: &Id, notice: Notice) {
        let key = id.to_string();
        match notice {
            Notice::Started { session, pid, command, root, terminal } => {
                let added = self.with_environment(id, |environment| {
                    let known = environment.sessions.get_mut(&session);
                    if let Some(known) = known {
                        known.pid = pid;
                        return false;
                    }
                    let started_at = now();
                    let info =
                        ProcessInfo { id: (key.clone(), session), pid, command, root, terminal, started_at };
                    environment.sessions.insert(session, info);
                    true
                });
                if matches!(added, Ok(true)) {
                    self.tell(Change::ProcessAdded((key.clone(), session)));
                    self.tell(Change::EnvironmentChanged(key));
                }
            }
            Notice::Health { state } => {
                if self.with_environment(id, |environment| environment.health = state).is_ok() {
                    self.tell(Change::EnvironmentChanged(key));
                }
            }
            Notice::Linger { on } => {
                let sandbox = self.with_environment(id, |environment| environment.sandbox.clone());
                if let Ok(Some(sandbox)) = sandbox {
                    sandbox.linger.store(on, Ordering::Relaxed);
                }
            }
            Notice::Ended { session, status } => {
                use casemate_sandbox::control::ExitStatus;
                let (exited, number) = match status {
                    ExitStatus::Exit(code) => (true, code),
                    ExitStatus::Signal(signal) => (false, signal),
                };
                let known = self.with_environment(id, |environment| {
                    environment.last_exit_code = if exited { number } else { 128 + number };
                    environment.sessions.remove(&session).is_some()
                });
                if matches!(known, Ok(true)) {
                    self.tell(Change::ProcessEnded((key.clone(), session), exited, number));
                    self.tell(Change::EnvironmentChanged(key));
                }
            }
        }
    }

    /// Wait for the end of an environment that is about to stop by itself, rather than refuse what a stopped one allows.
    pub(crate) async fn settle(self: &Arc<Self>, id: &Id) -> Result<(), Error> {
        let ending = self.with_environment(id, |environment| {
            environment.sandbox.clone().filter(|_| environment.is_ending())
        })?;
        if let Some(sandbox) = ending
            && tokio::time::timeout(ENDING, sandboxes::gone(&sandbox.pidfd)).await.is_ok()
        {
            self.ended(id, &sandbox).await?;
        }
        Ok(())
    }

    /// A sandbox is gone, or about to be: forget it, once.
    pub(crate) async fn ended(self: &Arc<Self>, id: &Id, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
        sandboxes::gone(&sandbox.pidfd).await;
        let key = id.to_string();
        let left = self.with_environment(id, |environment| {
            if !environment.sandbox.as_ref().is_some_and(|known| Arc::ptr_eq(known, sandbox)) {
                return None;
            }
            environment.sandbox = None;
            environment.health = HealthState::Unknown;
            if !environment.sessions.is_empty() {
                environment.last_exit_code = 128 + 9;
            }
            Some(std::mem::take(&mut environment.sessions))
        });
        if let Ok(Some(sessions)) = left {
            sandboxes::clear(&self.settings.runtime.join(&key))?;
            self.clear_group(sandbox).await;
            for session in sessions.into_keys() {
                self.tell(Change::ProcessEnded((key.clone(), session), false, 9));
            }
            self.tell(Change::EnvironmentChanged(key));
            // What it had mounted while it became a layer can be named by that now.
            self.store_sealed();
        }
        Ok(())
    }

    pub(crate) async fn start(
        self: Arc<Self>,
        job: Job,
        id: Id,
        unenforced_limits: bool,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("starting");
        let wanted = Wanted { step: Step::Start, linger: true, unenforced_limits };
        let sandbox = self.ensure_running(&id, wanted).await?;
        Ok(self.started(&id, &sandbox))
    }

    fn started(&self, id: &Id, sandbox: &Sandbox) -> Vec<(String, String)> {
        let mut result = vec![("environment".into(), id.to_string())];
        let keys = sandbox.unenforced();
        if !keys.is_empty() {
            let reason = match self.cgroups.scopes() {
                Ok(_) => "they are not in force here",
                Err(reason) => reason,
            };
            result.push(unenforced(&keys, reason));
        }
        result
    }

    pub(crate) async fn restart(
        self: Arc<Self>,
        job: Job,
        id: Id,
        timeout: Option<Duration>,
        unenforced_limits: bool,
    ) -> Result<Vec<(String, String)>, Error> {
        let (name, state) =
            self.with_environment(&id, |environment| (environment.record.name.clone(), environment.state()))?;
        step(&name, state, Step::Restart)?;
        job.stage("stopping");
        self.end(&id, timeout).await?;
        self.start(job, id, unenforced_limits).await
    }

    pub(crate) async fn stop(
        self: Arc<Self>,
        job: Job,
        id: Id,
        timeout: Option<Duration>,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("stopping");
        self.end(&id, timeout).await?;
        Ok(vec![("environment".into(), id.to_string())])
    }

    /// Without a timeout it is the manifest's.
    async fn end(self: &Arc<Self>, id: &Id, timeout: Option<Duration>) -> Result<(), Error> {
        let gate = self.gate(id);
        let _one_at_a_time = gate.lock().await;
        let (name, state, sandbox, usual) = self.with_environment(id, |environment| {
            let record = &environment.record;
            (record.name.clone(), environment.state(), environment.sandbox.clone(), record.stop.timeout)
        })?;
        step(&name, state, Step::Stop)?;
        if let Some(sandbox) = sandbox {
            sandbox.stop(timeout.unwrap_or(Duration::from_secs(usual))).await;
            self.ended(id, &sandbox).await?;
            // Whoever saw it end first may still be at it.
            self.clear_group(&sandbox).await;
        }
        Ok(())
    }

    async fn clear_group(&self, sandbox: &Sandbox) {
        if let Some(group) = &sandbox.group
            && let Err(error) = self.cgroups.remove(group).await
        {
            tracing::warn!(%error, "a control group is left");
        }
    }

    pub(crate) async fn destroy(
        self: Arc<Self>,
        job: Job,
        id: Id,
        force: bool,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("removing");
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        self.settle(&id).await?;
        let (record, state, sandbox) = self.with_environment(&id, |environment| {
            (environment.record.clone(), environment.state(), environment.sandbox.clone())
        })?;
        match sandbox {
            Some(sandbox) if force => {
                sandbox.stop(Duration::ZERO).await;
                self.ended(&id, &sandbox).await?;
            }
            _ => {
                step(&record.name, state, Step::Destroy)?;
            }
        }
        self.store.environments::<Id, EnvironmentRecord>().remove(&id)?;
        self.forget_environment(&id);
        // Killed in between, the next start removes snapshots of what is no more.
        let mut lowers = self.remove_snapshots(&id)?;
        self.remove_log(&id)?;
        lowers.extend(record.stack());
        if self.in_use().contains(&Lower::Upper(record.upper)) {
            // Something still reads it.
            lowers.push(Lower::Upper(record.upper));
        } else {
            let paths = vec![casemate_store::upper(&record.upper)];
            self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await?;
        }
        self.drop_lowers(&lowers).await?;
        Ok(vec![("environment".into(), id.to_string())])
    }
}
