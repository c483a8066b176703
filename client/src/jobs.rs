//! Waiting for a job: progress while it runs, its result when it is done.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::Duration;

use casemate_interfaces::{JobProxy, NAME};
use futures_util::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use zbus::{Connection, OwnedObjectPath, OwnedVariant};

use crate::bus::{Failure, properties};
use crate::output::printable;

const INTERFACE: &str = "org.casemate.Casemate1.Job";
/// How often progress is redrawn, and how long the end can go unnoticed where its signal is lost.
const TICK: Duration = Duration::from_millis(100);

/// A job's properties at one moment.
pub struct Snapshot(pub HashMap<String, OwnedVariant>);

impl Snapshot {
    pub async fn read(connection: &Connection, path: &OwnedObjectPath) -> Result<Self, Failure> {
        properties(connection, path.as_str(), INTERFACE).await.map(Self)
    }

    pub fn text(&self, name: &str) -> String {
        self.0
            .get(name)
            .and_then(|value| value.try_clone().ok())
            .and_then(|value| String::try_from(value).ok())
            .unwrap_or_default()
    }

    pub fn number(&self, name: &str) -> u64 {
        self.0
            .get(name)
            .and_then(|value| value.try_clone().ok())
            .and_then(|value| u64::try_from(value).ok())
            .unwrap_or_default()
    }

    pub fn result(&self) -> HashMap<String, String> {
        let value = self.0.get("Result").and_then(|value| value.try_clone().ok());
        value.and_then(|value| HashMap::try_from(value).ok()).unwrap_or_default()
    }

    pub fn error(&self) -> String {
        let value = self.0.get("Error").and_then(|value| value.try_clone().ok());
        value
            .and_then(|value| <(String, String)>::try_from(value).ok())
            .map(|(_, text)| text)
            .unwrap_or_default()
    }
}

/// Shows stages: a bar on a terminal, a line each elsewhere.
struct Display {
    bar: Option<ProgressBar>,
    stage: String,
    seen: HashMap<String, String>,
}

impl Display {
    fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { bar: terminal.then(ProgressBar::new_spinner), stage: String::new(), seen: HashMap::new() }
    }

    fn show(&mut self, job: &Snapshot) {
        let (done, total) = (job.number("BytesDone"), job.number("BytesTotal"));
        let stage = printable(&job.text("Stage"));
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(stage.clone());
            let template = match total {
                0 => "{spinner} {msg}",
                _ => "{spinner} {msg} {wide_bar} {bytes}/{total_bytes}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar.tick();
        }
        let mut timings: Vec<(String, String)> =
            job.result().into_iter().filter(|(key, _)| key.starts_with("seconds ")).collect();
        timings.sort();
        for (key, seconds) in timings {
            if self.seen.insert(key.clone(), seconds.clone()).is_none() {
                self.line(&format!("{} ({seconds} s)", printable(&key["seconds ".len()..])));
            }
        }
        self.stage = stage;
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

/// Follow a job to its end; Ctrl-C asks it to end, and once more leaves it to itself.
pub async fn follow(
    connection: &Connection,
    path: &OwnedObjectPath,
) -> Result<HashMap<String, String>, Failure> {
    let proxy = JobProxy::builder(connection)
        .destination(NAME)
        .path(path.clone())
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await?;
    // Before the first look: a job that ends between the two is told of.
    let mut ended = proxy.receive_ended().await?;
    let mut display = Display::new();
    let mut clock = tokio::time::interval(TICK);
    let (mut cancelled, mut listening) = (false, true);
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            Some(_) = ended.next() => {}
            interrupt = tokio::signal::ctrl_c(), if listening => {
                if interrupt.is_ok() && cancelled {
                    return Err(Failure::Job("it goes on; `casemate jobs` shows it".into()));
                }
                listening = interrupt.is_ok();
                if listening {
                    cancelled = true;
                    display.line("cancelling…");
                    proxy.cancel(Default::default()).await?;
                }
            }
        }
        let job = Snapshot::read(connection, path).await?;
        display.show(&job);
        match job.text("State").as_str() {
            "running" => {}
            state => {
                if let Some(bar) = &display.bar {
                    bar.finish_and_clear();
                }
                return match state {
                    "done" => Ok(job.result()),
                    "cancelled" => Err(Failure::Job("cancelled".into())),
                    _ => Err(Failure::Job(job.error())),
                };
            }
        }
    }
}
