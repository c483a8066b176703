//! `casemate jobs`.

use casemate_interfaces::{JobProxy, NAME, ROOT, job_path};
use clap::Args;
use serde::Serialize;

use crate::bus::{Failure, connect};
use crate::jobs::{Snapshot, follow};
use crate::output::{date, json, printable, say, table};

#[derive(Args)]
pub struct Jobs {
    /// Follow a job to its end
    #[arg(long, value_name = "ID", conflicts_with = "cancel")]
    follow: Option<u64>,
    /// Cancel a job
    #[arg(long, value_name = "ID")]
    cancel: Option<u64>,
    /// Print a job's log
    #[arg(long, value_name = "ID", conflicts_with_all = ["follow", "cancel"])]
    log: Option<u64>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown {
    id: u64,
    kind: String,
    subject: String,
    state: String,
    stage: String,
    started_at: u64,
    error: String,
}

pub async fn run(jobs: Jobs) -> Result<u8, Failure> {
    let connection = connect().await?;
    if let Some(id) = jobs.follow {
        let result = follow(&connection, &job_path(id)).await?;
        if jobs.json {
            json(&result)?;
        }
        return Ok(0);
    }
    if let Some(id) = jobs.cancel.or(jobs.log) {
        let job = JobProxy::builder(&connection).destination(NAME).path(job_path(id)).build().await?;
        if jobs.cancel.is_some() {
            job.cancel(Default::default()).await?;
        } else {
            for line in job.get_log(Default::default()).await? {
                say!("{}", printable(&line));
            }
        }
        return Ok(0);
    }
    let objects =
        zbus::fdo::ObjectManagerProxy::builder(&connection).destination(NAME).path(ROOT).build().await?;
    let mut shown = Vec::new();
    for (path, interfaces) in objects.get_managed_objects().await? {
        if interfaces.keys().any(|name| name.as_str() == "org.casemate.Casemate1.Job") {
            let id = path.as_str().rsplit('/').next().and_then(|id| id.parse().ok()).unwrap_or_default();
            let job = Snapshot::read(&connection, &path).await?;
            shown.push(Shown {
                id,
                kind: job.text("Kind"),
                subject: job.text("Subject"),
                state: job.text("State"),
                stage: job.text("Stage"),
                started_at: job.number("StartedAt"),
                error: job.error(),
            });
        }
    }
    shown.sort_by_key(|job| job.id);
    if jobs.json {
        json(&shown)?;
    } else {
        let row = |j: &Shown| {
            vec![
                j.id.to_string(),
                j.kind.clone(),
                j.subject.clone(),
                j.state.clone(),
                date(j.started_at),
                j.error.clone(),
            ]
        };
        table(
            &["ID", "KIND", "SUBJECT", "STATE", "STARTED", "ERROR"],
            &shown.iter().map(row).collect::<Vec<_>>(),
        );
    }
    Ok(0)
}
