//! What changes in the engine, told on the bus: objects come and go, properties and signals follow.
//!
//! A job has ended for the bus when all that it changed has been told: until then its object says that it runs. Who waits
//! for it and then looks, sees its work.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use casemate_engine::{Change, JobState};
use casemate_interfaces::{environment_path, job_path, process_path, release_path, snapshot_path};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedObjectPath, Variant};

use crate::Context;
use crate::environment::Environment;
use crate::job::{Job, shown, state_name};
use crate::process::Process;
use crate::release::Release;
use crate::snapshot::Snapshot;

/// What is on the bus.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Served {
    Release(String),
    Environment(String),
    /// The environment's id and the snapshot's name.
    Snapshot(String, String),
    Job(u64),
    Process((String, u64)),
}

/// What the bus has been told.
#[derive(Default)]
pub struct Told {
    served: Mutex<HashSet<Served>>,
    ended: Mutex<HashSet<u64>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Sets, changed by one insertion or removal at a time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Told {
    /// Whether a job's end and what came before it have been told.
    pub fn has_ended(&self, job: u64) -> bool {
        locked(&self.ended).contains(&job)
    }
}

/// Changes taken together: a job that reports bytes changes faster than anybody reads.
const TOGETHER: std::time::Duration = std::time::Duration::from_millis(50);

/// Put everything that there is on the bus. What is there already stays.
pub async fn add_all(connection: &Connection, context: &Context) -> zbus::Result<()> {
    for info in context.engine.releases() {
        add_release(connection, context, &info.reference).await?;
    }
    for info in context.engine.environments() {
        add_environment(connection, context, info.id).await?;
    }
    for info in context.engine.snapshots() {
        add_snapshot(connection, context, &info.environment, &info.name).await?;
    }
    for info in context.engine.jobs() {
        add_job(connection, context, info.id).await?;
    }
    for info in context.engine.processes() {
        add_process(connection, context, info.id).await?;
    }
    Ok(())
}

/// Also called before a path is told, so that the object is there when the caller uses it.
pub async fn add_release(connection: &Connection, context: &Context, reference: &str) -> zbus::Result<()> {
    if let Ok(info) = context.engine.release(reference) {
        let release = Release { context: context.clone(), info };
        connection.object_server().at(release_path(reference), release).await?;
        locked(&context.told.served).insert(Served::Release(reference.to_owned()));
    }
    Ok(())
}

/// Also called before a path is told, so that the object is there when the caller uses it.
pub async fn add_environment(connection: &Connection, context: &Context, id: String) -> zbus::Result<()> {
    let path = environment_path(&id);
    locked(&context.told.served).insert(Served::Environment(id.clone()));
    connection.object_server().at(path, Environment { context: context.clone(), id }).await?;
    Ok(())
}

/// Also called before a path is told, so that the object is there when the caller uses it.
pub async fn add_snapshot(
    connection: &Connection,
    context: &Context,
    environment: &str,
    name: &str,
) -> zbus::Result<()> {
    let path = snapshot_path(environment, name);
    let (environment, name) = (environment.to_owned(), name.to_owned());
    locked(&context.told.served).insert(Served::Snapshot(environment.clone(), name.clone()));
    let snapshot = Snapshot { context: context.clone(), environment, name };
    connection.object_server().at(path, snapshot).await?;
    Ok(())
}

/// A job was started: its object is there before the caller hears of its path.
pub async fn job_started(
    connection: &Connection,
    context: &Context,
    started: Result<u64, casemate_engine::Error>,
) -> Result<OwnedObjectPath, casemate_interfaces::Error> {
    let id = started.map_err(crate::convert::error)?;
    add_job(connection, context, id).await?;
    Ok(job_path(id))
}

async fn add_job(connection: &Connection, context: &Context, id: u64) -> zbus::Result<()> {
    locked(&context.told.served).insert(Served::Job(id));
    connection.object_server().at(job_path(id), Job { context: context.clone(), id }).await?;
    Ok(())
}

async fn add_process(connection: &Connection, context: &Context, id: (String, u64)) -> zbus::Result<()> {
    let path = process_path(&id.0, id.1);
    locked(&context.told.served).insert(Served::Process(id.clone()));
    connection.object_server().at(path, Process { context: context.clone(), id }).await?;
    Ok(())
}

/// Take an object off the bus, if it is there.
async fn remove(connection: &Connection, context: &Context, served: Served) -> zbus::Result<()> {
    let server = connection.object_server();
    let removed = match &served {
        Served::Release(reference) => server.remove::<Release, _>(release_path(reference)).await,
        Served::Environment(id) => server.remove::<Environment, _>(environment_path(id)).await,
        Served::Snapshot(environment, name) => {
            server.remove::<Snapshot, _>(snapshot_path(environment, name)).await
        }
        Served::Job(id) => server.remove::<Job, _>(job_path(*id)).await,
        Served::Process(id) => server.remove::<Process, _>(process_path(&id.0, id.1)).await,
    };
    locked(&context.told.served).remove(&served);
    match removed {
        Ok(_) | Err(zbus::Error::InterfaceNotFound) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Make the bus what the engine is, whatever was missed.
async fn reconcile(connection: &Connection, context: &Context) -> zbus::Result<()> {
    add_all(connection, context).await?;
    let served: Vec<Served> = locked(&context.told.served).iter().cloned().collect();
    for object in served {
        let engine = &context.engine;
        let is_there = match &object {
            Served::Release(reference) => engine.release(reference).is_ok(),
            Served::Environment(id) => engine.environment(id).is_ok(),
            Served::Snapshot(environment, name) => engine.snapshot(environment, name).is_ok(),
            Served::Job(id) => engine.job(*id).is_ok(),
            Served::Process(id) => engine.process(id).is_ok(),
        };
        if !is_there {
            remove(connection, context, object).await?;
        }
    }
    for info in context.engine.environments() {
        environment_changed(connection, context, &info.id).await?;
    }
    for info in context.engine.snapshots() {
        snapshot_changed(connection, context, &info.environment, &info.name).await?;
    }
    for info in context.engine.jobs() {
        match info.state {
            JobState::Running => job_changed(connection, context, info.id).await?,
            _ if context.told.has_ended(info.id) => {}
            _ => job_ended(connection, context, info.id).await?,
        }
    }
    Ok(())
}

async fn changed(
    connection: &Connection,
    path: OwnedObjectPath,
    interface: &'static str,
    values: HashMap<&str, Variant<'_>>,
) -> zbus::Result<()> {
    let emitter = SignalEmitter::new(connection, path)?;
    let name = InterfaceName::from_static_str(interface)?;
    zbus::fdo::Properties::properties_changed(&emitter, name, values, Cow::Borrowed(&[])).await
}

async fn job_changed(connection: &Connection, context: &Context, id: u64) -> zbus::Result<()> {
    let Ok(info) = shown(context, id) else { return Ok(()) };
    let error =
        info.error.map_or_else(Default::default, |(kind, text)| (crate::convert::error_name(kind), text));
    let result: HashMap<String, String> = info.result.into_iter().collect();
    let state = state_name(info.state);
    let values = HashMap::from([
        ("State", Variant::from(state)),
        ("Stage", Variant::from(info.stage)),
        ("BytesDone", Variant::from(info.bytes_done)),
        ("BytesTotal", Variant::from(info.bytes_total)),
        ("ItemsDone", Variant::from(info.items_done)),
        ("ItemsTotal", Variant::from(info.items_total)),
        ("EndedAt", Variant::from(info.ended_at)),
        ("Result", Variant::from(result)),
        ("Error", Variant::from(error)),
    ]);
    changed(connection, job_path(id), "org.casemate.Casemate1.Job", values).await
}

async fn job_ended(connection: &Connection, context: &Context, id: u64) -> zbus::Result<()> {
    locked(&context.told.ended).insert(id);
    job_changed(connection, context, id).await?;
    let Ok(info) = shown(context, id) else { return Ok(()) };
    Job::ended(&SignalEmitter::new(connection, job_path(id))?, state_name(info.state)).await
}

async fn environment_changed(connection: &Connection, context: &Context, id: &str) -> zbus::Result<()> {
    let Ok(info) = context.engine.environment(id) else { return Ok(()) };
    let limits = crate::limits::values(&info.limits)?;
    let values = HashMap::from([
        ("Name", Variant::from(info.name)),
        ("State", Variant::from(info.state.to_string())),
        ("Release", Variant::from(info.release)),
        ("LockDigest", Variant::from(info.lock_digest)),
        ("Network", Variant::from(info.network)),
        ("Ports", Variant::from(info.ports)),
        ("Allow", Variant::from(info.allow)),
        ("Mounts", Variant::from(info.mounts)),
        ("Devices", Variant::from(info.devices)),
        ("Sockets", Variant::from(info.sockets)),
        ("NestedNamespaces", Variant::from(info.nested_namespaces)),
        ("BuiltAt", Variant::from(info.built_at)),
        ("Sessions", Variant::from(info.sessions)),
        ("Limits", Variant::from(limits)),
        ("UnenforcedLimits", Variant::from(info.unenforced_limits)),
        ("Command", Variant::from(info.command)),
        ("Health", Variant::from(info.health)),
        ("OomKills", Variant::from(info.oom_kills)),
        ("LastExitCode", Variant::from(info.last_exit_code)),
    ]);
    changed(connection, environment_path(id), "org.casemate.Casemate1.Environment", values).await
}

async fn snapshot_changed(
    connection: &Connection,
    context: &Context,
    environment: &str,
    name: &str,
) -> zbus::Result<()> {
    let Ok(info) = context.engine.snapshot(environment, name) else { return Ok(()) };
    let values = HashMap::from([("State", Variant::from(info.state))]);
    changed(connection, snapshot_path(environment, name), "org.casemate.Casemate1.Snapshot", values).await
}

async fn tell(connection: &Connection, context: &Context, change: Change) -> zbus::Result<()> {
    match change {
        Change::ReleaseAdded(reference) => add_release(connection, context, &reference).await?,
        Change::ReleaseRemoved(reference) => {
            remove(connection, context, Served::Release(reference)).await?;
        }
        Change::EnvironmentAdded(id) => add_environment(connection, context, id).await?,
        Change::EnvironmentChanged(id) => environment_changed(connection, context, &id).await?,
        Change::EnvironmentRemoved(id) => {
            remove(connection, context, Served::Environment(id)).await?;
        }
        Change::SnapshotAdded(environment, name) => {
            add_snapshot(connection, context, &environment, &name).await?;
        }
        Change::SnapshotChanged(environment, name) => {
            snapshot_changed(connection, context, &environment, &name).await?;
        }
        Change::SnapshotRemoved(environment, name) => {
            remove(connection, context, Served::Snapshot(environment, name)).await?;
        }
        Change::OutOfMemory(id, kills) => {
            let emitter = SignalEmitter::new(connection, environment_path(&id))?;
            Environment::out_of_memory(&emitter, kills).await?;
        }
        Change::JobAdded(id) => add_job(connection, context, id).await?,
        Change::JobChanged(id) => job_changed(connection, context, id).await?,
        Change::JobEnded(id) => job_ended(connection, context, id).await?,
        Change::JobLog(id, line) => Job::log(&SignalEmitter::new(connection, job_path(id))?, &line).await?,
        Change::JobRemoved(id) => {
            remove(connection, context, Served::Job(id)).await?;
            locked(&context.told.ended).remove(&id);
        }
        Change::ProcessAdded(id) => add_process(connection, context, id).await?,
        Change::ProcessEnded(id, exited, status) => {
            let path = process_path(&id.0, id.1);
            Process::exited(&SignalEmitter::new(connection, path)?, exited, status).await?;
            remove(connection, context, Served::Process(id)).await?;
        }
    }
    Ok(())
}

fn runs(context: &Context, job: u64) -> bool {
    context.engine.job(job).is_ok_and(|info| info.state == JobState::Running)
}

/// Until the engine is gone.
async fn anew(connection: &Connection, context: &Context, missed: u64) {
    tracing::warn!(missed, "too many changes at once; everything is told anew");
    if let Err(error) = reconcile(connection, context).await {
        tracing::warn!(%error, "cannot tell the bus");
    }
}

pub async fn follow(connection: Connection, context: Context, mut received: Receiver<Change>) {
    loop {
        let first = match received.recv().await {
            Ok(change) => change,
            Err(RecvError::Lagged(missed)) => {
                anew(&connection, &context, missed).await;
                continue;
            }
            Err(RecvError::Closed) => return,
        };
        let mut pending = vec![first];
        if matches!(pending[0], Change::JobChanged(id) if runs(&context, id)) {
            // Several of these in a row are one.
            tokio::time::sleep(TOGETHER).await;
            loop {
                match received.try_recv() {
                    Ok(change) if pending.last() != Some(&change) => pending.push(change),
                    Ok(_) => {}
                    Err(TryRecvError::Lagged(missed)) => {
                        anew(&connection, &context, missed).await;
                        pending.clear();
                    }
                    Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                }
            }
        }
        for change in pending {
            if let Err(error) = tell(&connection, &context, change).await {
                tracing::warn!(%error, "cannot tell the bus");
            }
        }
    }
}
