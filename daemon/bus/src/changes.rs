//! What changes in the engine, told on the bus: objects come and go, properties and signals follow.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use casemate_engine::{Change, JobState};
use casemate_interfaces::{environment_path, job_path, process_path, release_path};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedObjectPath, Variant};

use crate::Context;
use crate::environment::Environment;
use crate::job::{Job, state_name};
use crate::process::Process;
use crate::release::Release;

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
    }
    Ok(())
}

/// Also called before a path is told, so that the object is there when the caller uses it.
pub async fn add_environment(connection: &Connection, context: &Context, id: String) -> zbus::Result<()> {
    let path = environment_path(&id);
    connection.object_server().at(path, Environment { context: context.clone(), id }).await?;
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
    connection.object_server().at(job_path(id), Job { context: context.clone(), id }).await?;
    Ok(())
}

async fn add_process(connection: &Connection, context: &Context, id: (String, u64)) -> zbus::Result<()> {
    let path = process_path(&id.0, id.1);
    connection.object_server().at(path, Process { context: context.clone(), id }).await?;
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

async fn job_changed(
    connection: &Connection,
    context: &Context,
    id: u64,
    told: &mut HashSet<u64>,
) -> zbus::Result<()> {
    let Ok(info) = context.engine.job(id) else { return Ok(()) };
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
    changed(connection, job_path(id), "org.casemate.Casemate1.Job", values).await?;
    if info.state != JobState::Running && told.insert(id) {
        let emitter = SignalEmitter::new(connection, job_path(id))?;
        Job::ended(&emitter, state).await?;
    }
    Ok(())
}

async fn environment_changed(connection: &Connection, context: &Context, id: &str) -> zbus::Result<()> {
    let Ok(info) = context.engine.environment(id) else { return Ok(()) };
    let values = HashMap::from([
        ("Name", Variant::from(info.name)),
        ("State", Variant::from(info.state.to_string())),
        ("Release", Variant::from(info.release)),
        ("LockDigest", Variant::from(info.lock_digest)),
        ("Network", Variant::from(info.network)),
        ("Mounts", Variant::from(info.mounts)),
        ("BuiltAt", Variant::from(info.built_at)),
        ("Sessions", Variant::from(info.sessions)),
    ]);
    changed(connection, environment_path(id), "org.casemate.Casemate1.Environment", values).await
}

async fn tell(
    connection: &Connection,
    context: &Context,
    change: Change,
    told: &mut HashSet<u64>,
) -> zbus::Result<()> {
    let server = connection.object_server();
    match change {
        Change::ReleaseAdded(reference) => add_release(connection, context, &reference).await?,
        Change::ReleaseRemoved(reference) => {
            server.remove::<Release, _>(release_path(&reference)).await?;
        }
        Change::EnvironmentAdded(id) => add_environment(connection, context, id).await?,
        Change::EnvironmentChanged(id) => environment_changed(connection, context, &id).await?,
        Change::EnvironmentRemoved(id) => {
            server.remove::<Environment, _>(environment_path(&id)).await?;
        }
        Change::JobAdded(id) => add_job(connection, context, id).await?,
        Change::JobChanged(id) => job_changed(connection, context, id, told).await?,
        Change::JobLog(id, line) => Job::log(&SignalEmitter::new(connection, job_path(id))?, &line).await?,
        Change::JobRemoved(id) => {
            told.remove(&id);
            server.remove::<Job, _>(job_path(id)).await?;
        }
        Change::ProcessAdded(id) => add_process(connection, context, id).await?,
        Change::ProcessEnded(id, exited, status) => {
            let path = process_path(&id.0, id.1);
            Process::exited(&SignalEmitter::new(connection, path.clone())?, exited, status).await?;
            server.remove::<Process, _>(path).await?;
        }
    }
    Ok(())
}

/// Until the engine is gone.
pub async fn follow(connection: Connection, context: Context, mut received: Receiver<Change>) {
    let mut told = HashSet::new();
    loop {
        let first = match received.recv().await {
            Ok(change) => change,
            Err(RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "too many changes at once; everything is told anew");
                if let Err(error) = add_all(&connection, &context).await {
                    tracing::warn!(%error, "cannot tell the bus");
                }
                continue;
            }
            Err(RecvError::Closed) => return,
        };
        let mut pending = vec![first];
        if matches!(pending[0], Change::JobChanged(_)) {
            // Several of these in a row are one.
            tokio::time::sleep(TOGETHER).await;
            // A listener that fell behind is told so by the next `recv`.
            while let Ok(change) = received.try_recv() {
                if pending.last() != Some(&change) {
                    pending.push(change);
                }
            }
        }
        for change in pending {
            if let Err(error) = tell(&connection, &context, change, &mut told).await {
                tracing::warn!(%error, "cannot tell the bus");
            }
        }
    }
}
