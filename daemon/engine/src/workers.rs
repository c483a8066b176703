//! The workers as the engine uses them: which descriptors each gets, how long it may take, and what its failures mean.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_sandbox::control::Ready;
use casemate_sandbox::plan::Plan;
use casemate_store::Store;
use casemate_worker::ids::IdMode;
use casemate_worker::protocol::{
    FailureKind, FetchRequest, FetchResult, IndexRequest, TreeRequest, TreeResult, UnpackRequest,
    UnpackResult,
};
use casemate_worker::spawn::{Limits, Progress, Spawner, StartError, Worker, WorkerError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::api::Settings;
use crate::error::{Error, WorkKind};
use crate::jobs::Job;
use crate::sandboxes::{self, Birth, Prepared};

/// Large images over slow lines take hours; a worker that works says so.
const TRANSFER: Limits = Limits { time: Duration::from_secs(24 * 3600), silence: Duration::from_secs(180) };
/// Decompressing, hashing and writing: bounded by the disk. One sync of a slow disk may be silent for minutes.
const WORK: Limits = Limits { time: Duration::from_secs(6 * 3600), silence: Duration::from_secs(900) };
/// Any input that a parser gets is decided quickly, or is an attack.
const PARSE: Limits = Limits { time: Duration::from_secs(120), silence: Duration::from_secs(120) };

pub struct Workers {
    spawner: Spawner,
    init: OwnedFd,
    store: PathBuf,
    never: watch::Sender<bool>,
}

impl From<WorkerError> for Error {
    fn from(error: WorkerError) -> Self {
        let (worker, kind, subject, message) = match error {
            WorkerError::Cancelled => return Self::Cancelled,
            WorkerError::Failed { worker, failure } => {
                let kind = match failure.kind {
                    FailureKind::Verification => WorkKind::Verification,
                    FailureKind::Stale => WorkKind::Stale,
                    FailureKind::Refused | FailureKind::Limit => WorkKind::Refused,
                    FailureKind::Network => WorkKind::Download,
                    FailureKind::NotFound => WorkKind::NotFound,
                    FailureKind::Full => WorkKind::Full,
                    FailureKind::Io | FailureKind::Request => WorkKind::Failed,
                };
                (worker, kind, failure.subject, failure.message)
            }
            other => ("worker".to_owned(), WorkKind::Failed, "step".to_owned(), other.to_string()),
        };
        Self::Worker { worker, kind, subject, message }
    }
}

/// For a worker that has a descriptor to write to, and nothing to write.
fn writable_null() -> Result<OwnedFd, Error> {
    let null = std::fs::File::options().write(true).open("/dev/null");
    null.map(OwnedFd::from).map_err(Error::io("open", "/dev/null"))
}

impl Workers {
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let ids = IdMode::detect(&settings.user_name, user, group);
        if let IdMode::Single { reason, .. } = &ids {
            tracing::warn!(reason, "no range of subordinate ids: environments have a single id");
        }
        let mut environment = Vec::new();
        for (name, value) in
            [("SSL_CERT_FILE", &settings.ssl_cert_file), ("SSL_CERT_DIR", &settings.ssl_cert_dir)]
        {
            if !value.is_empty() {
                environment.push((name.to_owned(), value.clone()));
            }
        }
        let init = sandboxes::sealed(&settings.libexec.join("casemate-init"))?;
        let spawner = Spawner { libexec: settings.libexec.clone(), ids, environment };
        Ok(Self { spawner, init, store: settings.store.clone(), never: watch::channel(false).0 })
    }

    /// Whose sandboxes are started here.
    pub fn store(&self) -> &Path {
        &self.store
    }

    pub fn ids(&self) -> &IdMode {
        &self.spawner.ids
    }

    pub fn has_range(&self) -> bool {
        matches!(self.spawner.ids, IdMode::Range { .. })
    }

    async fn run<Q: Serialize, R: DeserializeOwned>(
        &self,
        worker: Worker,
        job: Option<&Job>,
        request: &Q,
        descriptors: Vec<OwnedFd>,
        limits: Limits,
    ) -> Result<R, Error> {
        let mut progress = |progress: Progress| {
            if let Some(job) = job {
                job.progress((progress.bytes, progress.bytes_total), (progress.items, progress.items_total));
            }
        };
        let cancel = job.map_or_else(|| self.never.subscribe(), Job::cancel_receiver);
        Ok(self.spawner.run(worker, request, descriptors, limits, &mut progress, cancel).await?)
    }

    pub async fn fetch(
        &self,
        job: &Job,
        request: &FetchRequest,
        output: OwnedFd,
    ) -> Result<FetchResult, Error> {
        let result: FetchResult = self.run(Worker::Fetch, Some(job), request, vec![output], TRANSFER).await?;
        if result.items.len() != request.items.len() {
            let answer = format!("with {} items of {}", result.items.len(), request.items.len());
            return Err(Error::Nonsense { worker: "casemate-fetch", answer });
        }
        Ok(result)
    }

    pub async fn index<R: DeserializeOwned>(
        &self,
        job: &Job,
        request: &IndexRequest,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<R, Error> {
        if descriptors.len() == 1 {
            // Its profile has two; for an InRelease there is nothing to write.
            descriptors.push(writable_null()?);
        }
        self.run(Worker::Index, Some(job), request, descriptors, PARSE).await
    }

    pub async fn unpack(
        &self,
        job: &Job,
        request: &UnpackRequest,
        descriptors: Vec<OwnedFd>,
    ) -> Result<UnpackResult, Error> {
        self.run(Worker::Unpack, Some(job), request, descriptors, WORK).await
    }

    pub async fn tree(
        &self,
        job: Option<&Job>,
        store: &Store,
        request: &TreeRequest,
    ) -> Result<TreeResult, Error> {
        let out = writable_null()?;
        self.tree_to(job, store, request, out).await
    }

    /// The same where the answer is too long for one; it goes to `out`.
    pub async fn tree_to(
        &self,
        job: Option<&Job>,
        store: &Store,
        request: &TreeRequest,
        out: OwnedFd,
    ) -> Result<TreeResult, Error> {
        use rustix::fs::{Mode, OFlags};
        // A descriptor of its own: the store's may be a path only.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(store.root(), flags, Mode::empty()).map_err(Error::sys("open", store.root()))?;
        self.run(Worker::Tree, job, request, vec![directory, out], WORK).await
    }

    pub async fn start_init(
        &self,
        log: OwnedFd,
        socket: OwnedFd,
        birth: Birth,
        name: &str,
        prepare: impl AsyncFnOnce(u32) -> Result<Prepared, Error>,
    ) -> Result<Ready, Error> {
        let failed = |message: String| Error::Sandbox { name: name.to_owned(), message };
        let born_in_group = birth.born_in.is_some();
        let descriptors = std::iter::once(socket).chain(birth.born_in).chain(birth.log).collect();
        let prepare = async |process| {
            let Prepared { plan, meanwhile } = prepare(process).await?;
            let plan = serde_json::to_vec(&Plan { born_in_group, ..plan });
            Ok((plan.map_err(|error| failed(error.to_string()))?, meanwhile))
        };
        let started = self.spawner.start_init(&self.init, log, descriptors, prepare).await;
        started.map_err(|error| match error {
            StartError::Prepare(error) => error,
            StartError::Worker(WorkerError::Failed { failure, .. }) => failed(failure.message),
            StartError::Worker(other) => failed(other.to_string()),
        })
    }
}
