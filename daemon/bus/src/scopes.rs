//! Control groups as transient scopes of the user's systemd manager: one for each environment, in a slice of their own. A
//! scope is no part of the daemon's unit, so a stop or restart of that leaves environments alone.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_engine::{Pending, ResourceLimits, Scope, ScopeError, Scopes};
use futures_util::StreamExt;
use zbus::proxy::CacheProperties;
use zbus::{Connection, OwnedObjectPath, Variant, proxy};

/// The manager answers from its event loop; one that takes longer is stuck.
const ANSWER: Duration = Duration::from_secs(20);
/// What an environment gets from SIGTERM to SIGKILL when the manager itself stops it, at the end of the user's session.
const STOP: Duration = Duration::from_secs(15);
const SLICE: &str = "casemate.slice";

type Properties<'a> = Vec<(&'a str, Variant<'a>)>;

#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
trait Manager {
    fn subscribe(&self) -> zbus::Result<()>;

    fn start_transient_unit(
        &self,
        name: &str,
        mode: &str,
        properties: &[(&str, Variant<'_>)],
        auxiliary: &[(&str, &[(&str, Variant<'_>)])],
    ) -> zbus::Result<OwnedObjectPath>;

    fn set_unit_properties(
        &self,
        name: &str,
        runtime: bool,
        properties: &[(&str, Variant<'_>)],
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: String, result: String) -> zbus::Result<()>;

    #[zbus(property)]
    fn control_group(&self) -> zbus::Result<String>;
}

pub struct Systemd {
    manager: ManagerProxy<'static>,
    /// The manager's own group: what it was given is what scopes can have.
    group: PathBuf,
}

fn failed(error: impl std::fmt::Display) -> ScopeError {
    ScopeError::Manager(error.to_string())
}

impl Systemd {
    /// The user's manager, if it is on this bus and works with cgroup v2. The connection is one of its own: this one is
    /// there before the engine, by which callers on the daemon's connection are judged.
    pub async fn find() -> zbus::Result<Option<Self>> {
        let connection = &Connection::session().await?;
        let name = "org.freedesktop.systemd1".try_into()?;
        // Asked for first: calling it would have the bus try to start one.
        if !zbus::fdo::DBusProxy::new(connection).await?.name_has_owner(name).await? {
            return Ok(None);
        }
        let manager = ManagerProxy::builder(connection).cache_properties(CacheProperties::No).build().await?;
        manager.subscribe().await?;
        let own = manager.control_group().await?;
        let group = casemate_engine::hierarchy().map(|root| root.join(own.trim_start_matches('/')));
        Ok(group.filter(|group| group.is_dir()).map(|group| Self { manager, group }))
    }

    async fn start(&self, scope: &Scope, process: u32) -> Result<(), ScopeError> {
        let mut removed = self.manager.receive_job_removed().await.map_err(failed)?;
        let stop = u64::try_from(STOP.as_micros()).unwrap_or(u64::MAX);
        let mut properties: Properties<'_> = vec![
            ("Description", scope.description.as_str().into()),
            ("Slice", SLICE.into()),
            ("PIDs", vec![process].into()),
            ("Delegate", true.into()),
            ("CollectMode", "inactive-or-failed".into()),
            ("TimeoutStopUSec", stop.into()),
            ("MemoryAccounting", true.into()),
            ("TasksAccounting", true.into()),
            ("CPUAccounting", true.into()),
            ("IOAccounting", true.into()),
        ];
        properties.extend(limits(&scope.limits));
        let job = self.manager.start_transient_unit(&scope.unit, "fail", &properties, &[]);
        let job = job.await.map_err(failed)?;
        while let Some(signal) = removed.next().await {
            let ended = signal.args().map_err(failed)?;
            if *ended.job() == job {
                return match ended.result().as_str() {
                    "done" => Ok(()),
                    result => Err(failed(format!("the job that starts {}: {result}", scope.unit))),
                };
            }
        }
        Err(failed("the bus connection was lost"))
    }
}

/// Limits as properties of a unit; one that is missing is lifted.
fn limits(limits: &ResourceLimits) -> Properties<'static> {
    let (memory, swap) = limits.memory();
    let or_none = |limit: Option<u64>| Variant::from(limit.unwrap_or(u64::MAX));
    vec![
        ("MemoryMax", or_none(memory)),
        ("MemorySwapMax", or_none(swap)),
        ("CPUWeight", or_none(limits.cpu_weight())),
        ("CPUQuotaPerSecUSec", or_none(limits.cpus.map(|cpus| cpus.thousandths() * 1_000))),
        ("TasksMax", or_none(limits.pids)),
        ("IOWeight", or_none(limits.io_weight)),
    ]
}

async fn in_time(work: impl Future<Output = Result<(), ScopeError>>) -> Result<(), ScopeError> {
    let silent = || failed(format!("no answer within {} s", ANSWER.as_secs()));
    tokio::time::timeout(ANSWER, work).await.map_err(|_| silent())?
}

impl Scopes for Systemd {
    fn maker(&self) -> &'static str {
        "systemd's user manager"
    }

    fn controllers(&self) -> BTreeSet<String> {
        // Where the file cannot be read there are none, and limits are refused.
        let text = std::fs::read_to_string(self.group.join("cgroup.controllers")).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn remedy(&self) -> &'static str {
        "as root: `systemctl edit user@.service`, add \"[Service]\" and \"Delegate=cpu io memory pids\", and log in again"
    }

    fn create<'a>(&'a self, scope: &'a Scope, process: u32) -> Pending<'a> {
        Box::pin(in_time(self.start(scope, process)))
    }

    fn limit<'a>(&'a self, group: &'a Path, asked: &'a ResourceLimits) -> Pending<'a> {
        Box::pin(in_time(async move {
            let unit = group.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            self.manager.set_unit_properties(unit, true, &limits(asked)).await.map_err(failed)?;
            // It answers first and writes to the group in the next turn of its loop: another answer comes after that.
            self.manager.control_group().await.map(drop).map_err(failed)
        }))
    }

    /// The manager sees by itself that a scope is empty.
    fn remove<'a>(&'a self, _group: &'a Path) -> Pending<'a> {
        Box::pin(std::future::ready(Ok(())))
    }
}
