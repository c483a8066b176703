//! The engine: releases, environments, jobs; their states, transitions and recovery. No bus types, no network, no
//! archive formats: what is risky runs in workers and sandboxes.
//!
//! One [`Engine`] holds the store's lock. State lives in three places: records in the store (the truth), sandboxes that
//! run (found again by their sockets), and tables in memory, which are rebuilt from the two at each start.
//!
//! What a start finds is sorted out by [`recovery`].

mod accounts;
mod alterations;
mod api;
mod build;
mod cgroups;
mod comparing;
mod configuration;
mod control;
mod delegated;
mod desktop;
mod devices;
mod doctor;
mod downloads;
mod environments;
mod error;
mod flattening;
mod garbage;
mod jobs;
mod layers;
mod limits;
mod mounts;
mod network;
mod packages;
mod records;
mod recovery;
mod releases;
mod sandboxes;
mod sealing;
mod services;
mod sessions;
mod snapshots;
mod sockets;
mod state;
mod storing;
mod verification;
mod workers;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use casemate_store::{Digest, Id, Name, ReleaseName, SnapshotName, Store, StoreMode};
use casemate_worker::protocol::TreeRequest;
use tokio::sync::broadcast;

pub use api::*;
pub use cgroups::{Pending, Scope, ScopeError, Scopes, Usage, hierarchy};
pub use error::{Error, ErrorKind};
pub use jobs::JOB_KEPT;

use environments::Environment;
use jobs::{Claim, Jobs};
use records::{EnvironmentRecord, Lower, ReleaseRecord, SnapshotRecord};

/// Changes that a slow listener may fall behind by before it has to read everything anew.
const CHANGES_KEPT: usize = 1_024;

pub struct Engine {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    settings: Settings,
    uid: u32,
    gid: u32,
    /// Whether there is a range of subordinate ids.
    range: bool,
    store: Store,
    downloads: Arc<downloads::Downloads>,
    workers: workers::Workers,
    cgroups: cgroups::Cgroups,
    changes: broadcast::Sender<Change>,
    jobs: Arc<Jobs>,
    tables: Mutex<Tables>,
    session: AtomicU64,
    /// Held while layers are removed; shared while one is made and not pinned yet.
    sweeping: tokio::sync::RwLock<()>,
}

#[derive(Default)]
struct Tables {
    releases: BTreeMap<ReleaseName, ReleaseRecord>,
    environments: BTreeMap<Id, Environment>,
    snapshots: BTreeMap<SnapshotName, SnapshotRecord>,
    damage: recovery::Damage,
    gates: HashMap<Id, Arc<tokio::sync::Mutex<()>>>,
    idle_since: Option<Instant>,
    /// What jobs are at, each as often as there are such jobs.
    pinned: Vec<Lower>,
    /// Sealed uppers that are layers by now, and still named or mounted.
    stored: HashMap<Id, Digest>,
    /// A job stores what is sealed.
    is_storing: bool,
    /// What was measured last.
    usages: Usages,
}

impl Inner {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Each change of a table is one insertion or removal: a panic elsewhere leaves nothing half done.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tell(&self, change: Change) {
        // Without a listener there is nobody to tell.
        let _ = self.changes.send(change);
    }

    pub(crate) fn next_session(&self) -> u64 {
        self.session.fetch_add(1, Ordering::Relaxed)
    }

    /// Held while an environment starts, stops or goes.
    pub(crate) fn gate(&self, id: &Id) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(self.tables().gates.entry(*id).or_default())
    }

    pub(crate) fn with_environment<T>(
        &self,
        id: &Id,
        read: impl FnOnce(&mut Environment) -> T,
    ) -> Result<T, Error> {
        let mut tables = self.tables();
        let tables = &mut *tables;
        tables.environments.get_mut(id).map(read).ok_or_else(|| match tables.damage.environments.get(id) {
            Some(reason) => damaged("environment", &id.to_string(), reason),
            None => no_environment(&id.to_string()),
        })
    }

    pub(crate) fn state_of(&self, id: &Id) -> Result<State, Error> {
        self.with_environment(id, |environment| environment.state())
    }

    /// By full name or id; nothing shorter selects.
    pub(crate) fn find(&self, selector: &str) -> Option<(Id, EnvironmentRecord)> {
        self.tables()
            .environments
            .iter()
            .find(|(id, environment)| environment.record.name == selector || id.to_string() == selector)
            .map(|(id, environment)| (*id, environment.record.clone()))
    }

    pub(crate) fn put_environment(&self, id: Id, record: EnvironmentRecord) {
        let mut tables = self.tables();
        let change = match tables.environments.get_mut(&id) {
            Some(known) => {
                known.record = record;
                Change::EnvironmentChanged(id.to_string())
            }
            None => {
                tables.environments.insert(id, Environment::new(record));
                Change::EnvironmentAdded(id.to_string())
            }
        };
        drop(tables);
        self.tell(change);
    }

    pub(crate) fn forget_environment(&self, id: &Id) {
        let mut tables = self.tables();
        tables.environments.remove(id);
        tables.gates.remove(id);
        drop(tables);
        self.tell(Change::EnvironmentRemoved(id.to_string()));
    }

    pub(crate) fn put_release(&self, name: ReleaseName, record: ReleaseRecord) {
        let replaced = self.tables().releases.insert(name.clone(), record).is_some_and(|old| old.is_there());
        if replaced {
            self.tell(Change::ReleaseRemoved(name.to_string()));
        }
        self.tell(Change::ReleaseAdded(name.to_string()));
    }

    pub(crate) fn forget_release(&self, name: &ReleaseName) {
        let mut tables = self.tables();
        tables.releases.remove(name);
        tables.damage.releases.remove(name);
        drop(tables);
        self.tell(Change::ReleaseRemoved(name.to_string()));
    }

    pub(crate) fn put_snapshot(&self, name: SnapshotName, record: SnapshotRecord) {
        let (environment, key) = (name.environment.to_string(), name.snapshot.to_string());
        let known = self.tables().snapshots.insert(name, record).is_some();
        self.tell(match known {
            true => Change::SnapshotChanged(environment, key),
            false => Change::SnapshotAdded(environment, key),
        });
    }

    pub(crate) fn forget_snapshot(&self, name: &SnapshotName) -> Option<SnapshotRecord> {
        let mut tables = self.tables();
        let record = tables.snapshots.remove(name);
        tables.damage.snapshots.remove(name);
        drop(tables);
        self.tell(Change::SnapshotRemoved(name.environment.to_string(), name.snapshot.to_string()));
        record
    }

    pub(crate) async fn drop_staging(&self, staging: &casemate_store::Staging) -> Result<(), Error> {
        let request = TreeRequest::Remove { paths: vec![staging.relative(None)] };
        self.workers.tree(None, &self.store, &request).await?;
        Ok(())
    }
}

fn damaged(what: &'static str, name: &str, reason: &str) -> Error {
    Error::Damaged { what, name: name.to_owned(), reason: reason.to_owned() }
}

/// Most characters of a caller's text that an error repeats.
const REPEATED_MAX: usize = 200;

fn no_environment(selector: &str) -> Error {
    Error::NotFound {
        what: "environment",
        name: selector.chars().take(REPEATED_MAX).collect(),
        remedy: "`casemate list` shows those that there are",
    }
}

fn parse_id(text: &str) -> Result<Id, Error> {
    text.parse().map_err(|_| no_environment(text))
}

impl Engine {
    /// Lock the store, recover it, adopt what runs. `systemd` makes control groups where the user's service manager is
    /// there.
    pub async fn open(settings: Settings, systemd: Option<Arc<dyn Scopes>>) -> Result<Arc<Self>, Error> {
        for directory in [&settings.store, &settings.cache, &settings.runtime] {
            std::fs::create_dir_all(directory).map_err(Error::io("make", directory))?;
        }
        let mut settings = settings;
        for directory in [&mut settings.store, &mut settings.cache, &mut settings.runtime] {
            *directory = directory.canonicalize().map_err(Error::io("resolve", directory.clone()))?;
        }
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&settings.runtime, std::fs::Permissions::from_mode(0o700))
            .map_err(Error::io("change the mode of", &settings.runtime))?;
        let workers = workers::Workers::new(&settings)?;
        let range = workers.has_range();
        let mode = if range { StoreMode::Range } else { StoreMode::Single };
        let store = Store::open(&settings.store, mode)?;
        let downloads = Arc::new(downloads::Downloads::open(&settings.cache)?);
        let (changes, _) = broadcast::channel(CHANGES_KEPT);
        // Numbers of sessions must not repeat while an init lives that an earlier daemon started.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let jobs = Jobs::new(changes.clone(), &settings.runtime);
        let inner = Arc::new(Inner {
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            settings,
            range,
            store,
            downloads,
            workers,
            cgroups: cgroups::Cgroups::new(systemd),
            jobs,
            changes,
            tables: Mutex::new(Tables { idle_since: Some(Instant::now()), ..Tables::default() }),
            session: AtomicU64::new(u64::try_from(since.as_micros()).unwrap_or(1)),
            sweeping: tokio::sync::RwLock::default(),
        });
        inner.recover().await?;
        inner.store_sealed();
        Ok(Arc::new(Self { inner }))
    }

    pub fn subscribe(&self) -> broadcast::Receiver<Change> {
        self.inner.changes.subscribe()
    }

    /// `range` or `single`.
    pub fn id_mode(&self) -> String {
        if self.inner.range { "range" } else { "single" }.to_owned()
    }

    pub fn store_format(&self) -> u32 {
        casemate_store::FORMAT
    }

    pub fn releases(&self) -> Vec<ReleaseInfo> {
        let tables = self.inner.tables();
        let sound = tables.releases.iter().map(|(name, record)| record.info(&name.to_string()));
        let damaged = tables.damage.releases.keys().map(|name| ReleaseInfo {
            reference: name.to_string(),
            verification: "damaged".to_owned(),
            ..ReleaseInfo::default()
        });
        sound.chain(damaged).collect()
    }

    pub fn release(&self, reference: &str) -> Result<ReleaseInfo, Error> {
        let name = releases::parse_reference(reference)?.to_string();
        self.releases().into_iter().find(|info| info.reference == name).ok_or(Error::NotFound {
            what: "release",
            name,
            remedy: "`casemate release list` shows those that there are, `casemate release fetch` gets one",
        })
    }

    fn info(&self, id: &Id, environment: &Environment) -> EnvironmentInfo {
        let record = &environment.record;
        EnvironmentInfo {
            id: id.to_string(),
            name: record.name.clone(),
            state: environment.state(),
            release: record.release.clone(),
            lock_digest: record.lock_digest.clone(),
            network: record.network.clone(),
            ports: record.ports.iter().map(ToString::to_string).collect(),
            allow: record.allow.iter().flatten().map(ToString::to_string).collect(),
            devices: record.devices.clone(),
            sockets: record.sockets.iter().cloned().chain(record.session_bus.words()).collect(),
            nested_namespaces: record.nested_namespaces,
            mounts: record.mounts.iter().map(|m| (m.host.clone(), m.target.clone(), m.read_only)).collect(),
            id_mode: self.id_mode(),
            created_at: record.created_at,
            built_at: record.built_at,
            sessions: environment.sessions(),
            limits: record.limits,
            unenforced_limits: match &environment.sandbox {
                Some(sandbox) => sandbox.unenforced(),
                None => self.inner.cgroups.unmet(&record.limits).map_or_else(Vec::new, |unmet| unmet.keys),
            },
            oom_kills: environment.oom_kills,
            command: record.service.as_ref().map_or_else(Vec::new, |service| service.command.0.clone()),
            health: environment.health().to_owned(),
            last_exit_code: environment.last_exit_code,
        }
    }

    pub fn environments(&self) -> Vec<EnvironmentInfo> {
        let tables = self.inner.tables();
        let sound = tables.environments.iter().map(|(id, environment)| self.info(id, environment));
        let damaged = tables.damage.environments.keys().map(|id| self.damaged(id));
        sound.chain(damaged).collect()
    }

    /// The same in short, for lists of many.
    pub fn listed(&self) -> Vec<Listed> {
        let tables = self.inner.tables();
        let sound = tables.environments.iter().map(|(id, environment)| Listed {
            id: id.to_string(),
            name: environment.record.name.clone(),
            state: environment.state(),
            release: environment.record.release.clone(),
            network: environment.record.network.clone(),
            sessions: environment.sessions(),
        });
        let damaged = tables.damage.environments.keys().map(|id| {
            let EnvironmentInfo { id, name, state, .. } = self.damaged(id);
            Listed { id, name, state, ..Listed::default() }
        });
        sound.chain(damaged).collect()
    }

    fn damaged(&self, id: &Id) -> EnvironmentInfo {
        EnvironmentInfo {
            id: id.to_string(),
            // Its name is not known: it goes by its id.
            name: id.to_string(),
            state: State::Damaged,
            id_mode: self.id_mode(),
            ..EnvironmentInfo::default()
        }
    }

    /// By full name or id. Objects on the bus ask for each property, so not all are described for one.
    pub fn environment(&self, selector: &str) -> Result<EnvironmentInfo, Error> {
        let tables = self.inner.tables();
        let id = selector.parse::<Id>().ok();
        let by_id = id.and_then(|id| tables.environments.get_key_value(&id));
        let by_name =
            || tables.environments.iter().find(|(_, environment)| environment.record.name == selector);
        if let Some((id, environment)) = by_id.or_else(by_name) {
            return Ok(self.info(id, environment));
        }
        let damaged = id.filter(|id| tables.damage.environments.contains_key(id));
        damaged.map(|id| self.damaged(&id)).ok_or_else(|| no_environment(selector))
    }

    pub fn jobs(&self) -> Vec<JobInfo> {
        self.inner.jobs.list()
    }

    pub fn job(&self, id: JobId) -> Result<JobInfo, Error> {
        self.inner.jobs.get(id)
    }

    pub fn job_log(&self, id: JobId) -> Result<Vec<String>, Error> {
        self.inner.jobs.log(id)
    }

    /// Drop jobs that ended long ago. The edge calls it now and then; jobs that start or end do as well.
    pub fn forget_old_jobs(&self) {
        self.inner.jobs.forget_old();
    }

    /// When [`Self::forget_old_jobs`] has something to do next.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.inner.jobs.next_expiry()
    }

    /// Ask a job to end. One that has ended already is left as it is.
    pub fn cancel(&self, job: JobId) -> Result<(), Error> {
        self.inner.jobs.cancel(job)
    }

    pub fn processes(&self) -> Vec<ProcessInfo> {
        let tables = self.inner.tables();
        tables.environments.values().flat_map(|environment| environment.sessions.values().cloned()).collect()
    }

    pub fn process(&self, id: &ProcessId) -> Result<ProcessInfo, Error> {
        let found = self
            .inner
            .with_environment(&parse_id(&id.0)?, |environment| environment.sessions.get(&id.1).cloned())?;
        found.ok_or_else(|| Error::NotFound {
            what: "process",
            name: id.1.to_string(),
            remedy: "it has ended",
        })
    }

    pub fn lock_text(&self, id: &str) -> Result<String, Error> {
        self.inner.with_environment(&parse_id(id)?, |environment| environment.record.lock.clone())
    }

    pub fn manifest_text(&self, id: &str) -> Result<String, Error> {
        self.inner.with_environment(&parse_id(id)?, |environment| environment.record.manifest.clone())
    }

    pub fn fetch_release(&self, caller: &Caller, reference: &str) -> Result<JobId, Error> {
        let name: ReleaseName = reference.parse()?;
        self.inner.check_fetchable(&name)?;
        let inner = Arc::clone(&self.inner);
        let claims = vec![release_claim(&name)];
        self.inner.jobs.start(caller, "fetch", &name.to_string(), claims, move |job| inner.fetch(job, name))
    }

    pub fn import_release(&self, caller: &Caller, name: &str, archive: OwnedFd) -> Result<JobId, Error> {
        // Names of sources are for what their keys have signed.
        if name.split_once('/').is_some_and(|(source, _)| source != "local") {
            return Err(Error::SourcesName { name: name.to_owned() });
        }
        let archive = releases::Archive::of(archive)?;
        let name = releases::parse_reference(name)?;
        if self.inner.tables().releases.contains_key(&name) {
            return Err(Error::AlreadyExists {
                what: "release",
                name: name.to_string(),
                remedy: "remove it first with `casemate release remove`, or import under another name",
            });
        }
        let inner = Arc::clone(&self.inner);
        let claims = vec![release_claim(&name)];
        self.inner
            .jobs
            .start(caller, "import", &name.to_string(), claims, move |job| inner.import(job, name, archive))
    }

    pub fn remove_release(&self, caller: &Caller, reference: &str) -> Result<JobId, Error> {
        let name = releases::parse_reference(reference)?;
        self.release(reference)?;
        let inner = Arc::clone(&self.inner);
        let claims = vec![release_claim(&name)];
        self.inner.jobs.start(caller, "remove", &name.to_string(), claims, move |job| inner.remove(job, name))
    }

    pub fn build(&self, caller: &Caller, request: BuildRequest) -> Result<JobId, Error> {
        let name: Name = request.name.parse()?;
        let judged = self.inner.judge(&request)?;
        let inner = Arc::clone(&self.inner);
        let claims = vec![Claim { what: "environment", name: name.to_string() }];
        self.inner
            .jobs
            .start(caller, "build", &request.name, claims, move |job| inner.build(job, name, judged))
    }

    pub fn start(&self, caller: &Caller, id: &str, unenforced_limits: bool) -> Result<JobId, Error> {
        let (id, name) = self.named(id)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "start", &name, vec![environment_claim(&name)], move |job| {
            inner.start(job, id, unenforced_limits)
        })
    }

    pub fn stop(&self, caller: &Caller, id: &str, timeout: Option<Duration>) -> Result<JobId, Error> {
        let (id, name) = self.named(id)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "stop", &name, vec![environment_claim(&name)], move |job| {
            inner.stop(job, id, timeout)
        })
    }

    pub fn restart(
        &self,
        caller: &Caller,
        id: &str,
        timeout: Option<Duration>,
        unenforced_limits: bool,
    ) -> Result<JobId, Error> {
        let (id, name) = self.stepped(id, state::Step::Restart)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "restart", &name, vec![environment_claim(&name)], move |job| {
            inner.restart(job, id, timeout, unenforced_limits)
        })
    }

    /// SIGKILL ends the whole environment; any other signal goes to its sessions.
    pub fn kill(&self, caller: &Caller, id: &str, signal: i32) -> Result<JobId, Error> {
        let asked = match signal == rustix::process::Signal::KILL.as_raw() {
            true => state::Step::Stop,
            false => state::Step::Signal,
        };
        let (id, name) = self.stepped(id, asked)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "kill", &name, vec![environment_claim(&name)], move |job| {
            inner.kill(job, id, signal)
        })
    }

    /// Freeze all processes of an environment, or thaw them.
    pub fn pause(&self, caller: &Caller, id: &str, on: bool) -> Result<JobId, Error> {
        let (step, kind) = if on { (state::Step::Pause, "pause") } else { (state::Step::Unpause, "unpause") };
        let (id, name) = self.stepped(id, step)?;
        let inner = Arc::clone(&self.inner);
        self.inner
            .jobs
            .start(caller, kind, &name, vec![environment_claim(&name)], move |job| inner.pause(job, id, on))
    }

    /// Change limits, also of an environment that runs.
    pub fn limit(&self, caller: &Caller, id: &str, limits: ResourceLimits) -> Result<JobId, Error> {
        let (id, name) = self.named(id)?;
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "limit", &name, vec![environment_claim(&name)], move |job| {
            inner.limit(job, id, limits)
        })
    }

    /// What an environment uses now; nothing where it does not run, or nobody counts.
    pub fn usage(&self, id: &str) -> Result<Usage, Error> {
        Ok(self.inner.usage(&parse_id(id)?))
    }

    pub fn destroy(&self, caller: &Caller, id: &str, force: bool) -> Result<JobId, Error> {
        if let Ok(damaged) = id.parse::<Id>()
            && self.inner.tables().damage.environments.contains_key(&damaged)
        {
            let inner = Arc::clone(&self.inner);
            return self.inner.jobs.start(
                caller,
                "destroy",
                id,
                vec![environment_claim(id)],
                move |job: jobs::Job| async move {
                    job.stage("removing the damaged record");
                    inner.give_up_environment(&damaged).await?;
                    Ok(vec![("environment".into(), damaged.to_string())])
                },
            );
        }
        let (id, name) = self.named(id)?;
        let (state, ending) =
            self.inner.with_environment(&id, |environment| (environment.state(), environment.is_ending()))?;
        if !force && !ending {
            state::step(&name, state, state::Step::Destroy)?;
        }
        let inner = Arc::clone(&self.inner);
        self.inner.jobs.start(caller, "destroy", &name, vec![environment_claim(&name)], move |job| {
            inner.destroy(job, id, force)
        })
    }

    /// Everything: environments, releases, downloads.
    pub fn purge(&self, caller: &Caller) -> Result<JobId, Error> {
        if self.inner.jobs.asked_for() > 0 {
            return Err(Error::Busy {
                what: jobs::EVERYTHING,
                name: self.inner.settings.store.display().to_string(),
            });
        }
        // What would be stored is about to go.
        self.inner.jobs.cancel_own();
        let inner = Arc::clone(&self.inner);
        let subject = self.inner.settings.store.display().to_string();
        let claims = vec![Claim { what: jobs::EVERYTHING, name: subject.clone() }];
        self.inner.jobs.start(caller, "purge", &subject, claims, move |job| inner.purge(job))
    }

    pub async fn exec(&self, _caller: &Caller, id: &str, request: ExecRequest) -> Result<Started, Error> {
        self.inner.exec(&parse_id(id)?, request).await
    }

    pub async fn signal(&self, process: &ProcessId, signal: i32) -> Result<(), Error> {
        self.inner.signal(&parse_id(&process.0)?, process.1, signal).await
    }

    pub async fn doctor(&self) -> Vec<Finding> {
        doctor::examine(&self.inner).await
    }

    /// User namespaces that a caller must not be in nor descend from.
    pub fn environment_namespaces(&self) -> Vec<u64> {
        let tables = self.inner.tables();
        let running = tables.environments.values().filter_map(|environment| environment.sandbox.as_ref());
        running.flat_map(|sandbox| sandbox.user_namespaces).collect()
    }

    /// Since when nothing has run; `None` while a job or an environment does.
    pub fn idle_since(&self) -> Option<Instant> {
        let busy = self.inner.jobs.running() > 0;
        let mut tables = self.inner.tables();
        let running = tables.environments.values().any(|environment| environment.sandbox.is_some());
        if busy || running {
            tables.idle_since = None;
        } else if tables.idle_since.is_none() {
            tables.idle_since = Some(Instant::now());
        }
        tables.idle_since
    }

    /// Cancel all jobs and wait for them. Environments go on.
    pub async fn shutdown(&self) {
        let mut changes = self.inner.changes.subscribe();
        self.inner.jobs.stop();
        while self.inner.jobs.running() > 0 {
            if let Err(broadcast::error::RecvError::Closed) = changes.recv().await {
                return;
            }
        }
    }

    /// The same, and the step is a legal one: an illegal one is refused at once.
    pub(crate) fn stepped(&self, id: &str, step: state::Step) -> Result<(Id, String), Error> {
        let (id, name) = self.named(id)?;
        state::step(&name, self.inner.state_of(&id)?, step)?;
        Ok((id, name))
    }

    pub(crate) fn named(&self, id: &str) -> Result<(Id, String), Error> {
        let id = parse_id(id)?;
        let name = self.inner.with_environment(&id, |environment| environment.record.name.clone())?;
        Ok((id, name))
    }
}

impl Inner {
    async fn purge(self: Arc<Self>, job: jobs::Job) -> Result<Vec<(String, String)>, Error> {
        job.stage("stopping environments");
        let _alone = self.sweeping.write().await;
        let ids: Vec<Id> = self.tables().environments.keys().copied().collect();
        for id in ids {
            let gate = self.gate(&id);
            let _one_at_a_time = gate.lock().await;
            let sandbox = self.with_environment(&id, |environment| environment.sandbox.clone())?;
            if let Some(sandbox) = sandbox {
                sandbox.stop(Duration::ZERO).await;
                self.ended(&id, &sandbox).await?;
            }
            self.store.environments::<Id, EnvironmentRecord>().remove(&id)?;
            self.forget_environment(&id);
            self.remove_log(&id)?;
        }
        let damaged: Vec<Id> = self.tables().damage.environments.keys().copied().collect();
        for id in damaged {
            self.give_up_environment(&id).await?;
        }
        let snapshots = self.store.snapshots::<SnapshotName, SnapshotRecord>();
        for name in snapshots.list()?.names {
            snapshots.remove(&name)?;
            self.forget_snapshot(&name);
        }
        let records = self.store.releases::<ReleaseName, ReleaseRecord>();
        for name in records.list()?.names {
            records.remove(&name)?;
            self.forget_release(&name);
        }
        job.stage("removing");
        let mut paths: Vec<String> = self.store.layers()?.names.iter().map(casemate_store::layer).collect();
        paths.extend(self.store.uppers()?.names.iter().map(casemate_store::upper));
        // By their first byte, as they are laid out: `objects` itself is the store's.
        paths.extend((0..=u8::MAX).map(|first| format!("objects/{first:02x}")));
        self.workers.tree(Some(&job), &self.store, &TreeRequest::Remove { paths }).await?;
        self.tables().stored.clear();
        let downloads = Arc::clone(&self.downloads);
        releases::blocking(move || downloads.remove_all()).await?;
        Ok(vec![])
    }
}

fn release_claim(name: &ReleaseName) -> Claim {
    Claim { what: "release", name: name.to_string() }
}

pub(crate) fn environment_claim(name: &str) -> Claim {
    Claim { what: "environment", name: name.to_owned() }
}
