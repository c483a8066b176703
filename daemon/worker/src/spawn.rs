//! The daemon's side: start a worker, write its id maps, hand it the request, and judge every byte that comes back.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::watch;

use crate::ids::{self, Extent, IdMode};
use crate::namespaces::Ids;
use crate::profiles;
use crate::protocol::{EVENT_LINE_MAX, Envelope, Event, FD_EVENTS, FD_FIRST, Failure, PROTOCOL};

/// Most bytes of events and of logs that one worker may write.
const OUTPUT_MAX: usize = 64 << 20;
const LOG_MAX: usize = 64 << 10;
/// A worker is confined and asks for its request within this time, or not at all.
const START: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worker {
    Fetch,
    Index,
    Unpack,
    Tree,
}

impl Worker {
    pub fn profile(self) -> &'static crate::confine::Profile {
        match self {
            Self::Fetch => &profiles::FETCH,
            Self::Index => &profiles::INDEX,
            Self::Unpack => &profiles::UNPACK,
            Self::Tree => &profiles::TREE,
        }
    }
}

/// How long a worker may take, and how long it may say nothing.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub time: Duration,
    pub silence: Duration,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub bytes: u64,
    pub bytes_total: u64,
    pub items: u64,
    pub items_total: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("{worker}: {}: {}", .failure.subject, .failure.message)]
    Failed { worker: String, failure: Failure },
    #[error("{worker} was still not done after {} s and was killed", .after.as_secs())]
    TimedOut { worker: String, after: Duration },
    #[error("{worker} said nothing for {} s and was killed", .after.as_secs())]
    Silent { worker: String, after: Duration },
    #[error("{worker} wrote nonsense and was killed: {line}")]
    Garbage { worker: String, line: String },
    #[error("{worker} wrote more than it may and was killed")]
    TooMuchOutput { worker: String },
    #[error("{worker} died ({status}) before it was done: {log}")]
    Died { worker: String, status: ExitStatus, log: String },
    #[error("cannot start {program}: {source}")]
    Spawn { program: PathBuf, source: std::io::Error },
    #[error("{program} refused to map ids: {message}; check /etc/subuid and /etc/subgid (`casemate doctor`)")]
    Ids { program: PathBuf, message: String },
    #[error("cannot talk to {worker}: {source}")]
    Pipe { worker: String, source: std::io::Error },
    #[error("cancelled")]
    Cancelled,
}

/// Starts workers.
pub struct Spawner {
    pub libexec: PathBuf,
    pub ids: IdMode,
    /// All of a worker's environment.
    pub environment: Vec<(String, String)>,
}

struct Lines {
    pipe: tokio::net::unix::pipe::Receiver,
    pending: Vec<u8>,
    total: usize,
}

impl Lines {
    /// The next whole line; `None` at the end.
    async fn next(&mut self, worker: &str) -> Result<Option<Vec<u8>>, WorkerError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let rest = self.pending.split_off(end + 1);
                let mut line = std::mem::replace(&mut self.pending, rest);
                line.pop();
                return Ok(Some(line));
            }
            if self.pending.len() > EVENT_LINE_MAX || self.total > OUTPUT_MAX {
                return Err(WorkerError::TooMuchOutput { worker: worker.to_owned() });
            }
            let mut block = [0; 16 << 10];
            let count = self
                .pipe
                .read(&mut block)
                .await
                .map_err(|source| WorkerError::Pipe { worker: worker.to_owned(), source })?;
            if count == 0 {
                return match self.pending.is_empty() {
                    true => Ok(None),
                    false => Err(garbage(worker, &self.pending)),
                };
            }
            self.total += count;
            self.pending.extend_from_slice(&block[..count]);
        }
    }

    async fn event<T: DeserializeOwned>(&mut self, worker: &str) -> Result<Option<Event<T>>, WorkerError> {
        let Some(line) = self.next(worker).await? else { return Ok(None) };
        serde_json::from_slice(&line).map(Some).map_err(|_| garbage(worker, &line))
    }
}

fn garbage(worker: &str, line: &[u8]) -> WorkerError {
    let shown = &line[..line.len().min(200)];
    WorkerError::Garbage { worker: worker.to_owned(), line: shown.escape_ascii().to_string() }
}

/// A started process in the middle of the handshake.
struct Started {
    name: String,
    child: Child,
    lines: Lines,
}

impl Started {
    /// Kill it and say how it ended, with the end of its log.
    async fn died(mut self, log: Option<tokio::task::JoinHandle<String>>) -> WorkerError {
        // Its pipe is closed, so it has ended or is about to: then the status is its own.
        if tokio::time::timeout(Duration::from_secs(2), self.child.wait()).await.is_err() {
            let _ = self.child.start_kill();
        }
        let log = match log {
            Some(log) => log.await.unwrap_or_default(),
            None => String::new(),
        };
        match self.child.wait().await {
            Ok(status) => WorkerError::Died { worker: self.name, status, log },
            Err(source) => WorkerError::Pipe { worker: self.name, source },
        }
    }
}

async fn read_log(worker: &'static str, mut pipe: tokio::process::ChildStderr) -> String {
    let mut kept = Vec::new();
    let mut block = [0; 4 << 10];
    let mut total = 0usize;
    while let Ok(count) = pipe.read(&mut block).await {
        if count == 0 || total > LOG_MAX {
            break;
        }
        total += count;
        tracing::debug!(worker, "{}", block[..count].escape_ascii());
        kept.extend_from_slice(&block[..count]);
    }
    let from = kept.len().saturating_sub(600);
    String::from_utf8_lossy(&kept[from..]).trim_end().escape_debug().to_string()
}

impl Spawner {
    fn start(
        &self,
        program: &Path,
        name: &str,
        descriptors: Vec<OwnedFd>,
        stderr: Stdio,
    ) -> Result<Started, WorkerError> {
        let failed = |source| WorkerError::Spawn { program: program.to_owned(), source };
        let (events, events_in) = tokio::net::unix::pipe::pipe()
            .and_then(|(sender, receiver)| Ok((receiver, sender.into_blocking_fd()?)))
            .map_err(failed)?;
        let mut command = std::process::Command::new(program);
        command.args(self.ids.arguments()).env_clear().envs(self.environment.iter().cloned());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(stderr).current_dir("/");
        let mut mappings = vec![FdMapping { parent_fd: events_in, child_fd: FD_EVENTS }];
        mappings.extend(
            (FD_FIRST..).zip(descriptors).map(|(child_fd, parent_fd)| FdMapping { parent_fd, child_fd }),
        );
        command.fd_mappings(mappings).map_err(|error| failed(std::io::Error::other(error.to_string())))?;
        let mut command = Command::from(command);
        command.kill_on_drop(true);
        let child = command.spawn().map_err(failed)?;
        Ok(Started {
            name: name.to_owned(),
            child,
            lines: Lines { pipe: events, pending: Vec::new(), total: 0 },
        })
    }

    /// Write both maps of a process that has unshared its user namespace.
    async fn write_maps(&self, pid: u32) -> Result<(), WorkerError> {
        let IdMode::Range { user, group, uid_start, gid_start, newuidmap, newgidmap } = &self.ids else {
            return Ok(());
        };
        let run = |program: PathBuf, map: Vec<Extent>| async move {
            let mut command = Command::new(&program);
            command.env_clear().arg(pid.to_string()).stdin(Stdio::null());
            for (inside, outside, count) in map {
                command.args([inside, outside, count].map(|number| number.to_string()));
            }
            let output = command
                .output()
                .await
                .map_err(|source| WorkerError::Spawn { program: program.clone(), source })?;
            if output.status.success() {
                return Ok(());
            }
            let message = String::from_utf8_lossy(&output.stderr).trim_end().escape_debug().to_string();
            Err(WorkerError::Ids { program, message })
        };
        tokio::try_join!(
            run(newuidmap.clone(), ids::outer(*user, *uid_start)),
            run(newgidmap.clone(), ids::outer(*group, *gid_start)),
        )?;
        Ok(())
    }

    /// The handshake up to the maps.
    async fn map(
        &self,
        started: &mut Started,
        stdin: &mut tokio::process::ChildStdin,
    ) -> Result<(), WorkerError> {
        let name = started.name.clone();
        match started.lines.event::<()>(&name).await? {
            Some(Event::Unshared) => {}
            Some(_) => return Err(garbage(&name, b"an event out of order")),
            None => return Err(garbage(&name, b"nothing")),
        }
        // Not reaped yet, so the pid is still this process's.
        let pid = started.child.id().ok_or_else(|| garbage(&name, b"nothing"))?;
        self.write_maps(pid).await?;
        stdin.write_all(b"\n").await.map_err(|source| WorkerError::Pipe { worker: name, source })
    }

    /// Run a worker to its end.
    pub async fn run<Q: Serialize, R: DeserializeOwned>(
        &self,
        worker: Worker,
        request: &Q,
        descriptors: Vec<OwnedFd>,
        limits: Limits,
        progress: &mut (dyn FnMut(Progress) + Send),
        cancel: watch::Receiver<bool>,
    ) -> Result<R, WorkerError> {
        let profile = worker.profile();
        let program = self.libexec.join(profile.name);
        let mapped = profile.ids != Ids::Own && matches!(self.ids, IdMode::Range { .. });
        self.run_program(&program, profile.name, mapped, request, descriptors, limits, progress, cancel).await
    }

    /// Run a program that behaves as a worker should.
    #[allow(clippy::too_many_arguments)]
    pub async fn run_program<Q: Serialize, R: DeserializeOwned>(
        &self,
        program: &Path,
        name: &'static str,
        mapped: bool,
        request: &Q,
        descriptors: Vec<OwnedFd>,
        limits: Limits,
        progress: &mut (dyn FnMut(Progress) + Send),
        mut cancel: watch::Receiver<bool>,
    ) -> Result<R, WorkerError> {
        let document = serde_json::to_vec(&Envelope { protocol: PROTOCOL, request })
            .map_err(|error| garbage(name, error.to_string().as_bytes()))?;
        let mut started = self.start(program, name, descriptors, Stdio::piped())?;
        let log = started.child.stderr.take().map(|pipe| tokio::spawn(read_log(name, pipe)));
        let outcome = {
            let work = self.converse(&mut started, mapped, &document, limits, progress);
            let cancelled = async {
                if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                outcome = work => outcome,
                () = cancelled => Err(WorkerError::Cancelled),
                () = tokio::time::sleep(limits.time) => {
                    Err(WorkerError::TimedOut { worker: name.to_owned(), after: limits.time })
                }
            }
        };
        match outcome {
            Ok(Some(result)) => {
                // Done is its last word; what it still does is of no interest.
                let _ = started.child.start_kill();
                let _ = started.child.wait().await;
                Ok(result)
            }
            Ok(None) => Err(started.died(log).await),
            Err(WorkerError::Pipe { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
                Err(started.died(log).await)
            }
            Err(error) => {
                let _ = started.child.start_kill();
                let _ = started.child.wait().await;
                Err(error)
            }
        }
    }

    /// `None`: it ended without a last word.
    async fn converse<R: DeserializeOwned>(
        &self,
        started: &mut Started,
        mapped: bool,
        document: &[u8],
        limits: Limits,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<Option<R>, WorkerError> {
        let name = started.name.clone();
        let Some(mut stdin) = started.child.stdin.take() else { return Ok(None) };
        let begin = async {
            if mapped {
                self.map(started, &mut stdin).await?;
            }
            match started.lines.event::<()>(&name).await? {
                Some(Event::Confined { layers }) => {
                    tracing::debug!(worker = name, ?layers, "confined");
                    Ok(true)
                }
                Some(_) => Err(garbage(&name, b"an event out of order")),
                None => Ok(false),
            }
        };
        match tokio::time::timeout(START, begin).await {
            Err(_) => return Err(WorkerError::Silent { worker: name, after: START }),
            Ok(Err(WorkerError::Garbage { line, .. })) if line == "nothing" => return Ok(None),
            Ok(Err(error)) => return Err(error),
            Ok(Ok(false)) => return Ok(None),
            Ok(Ok(true)) => {}
        }
        stdin
            .write_all(document)
            .await
            .map_err(|source| WorkerError::Pipe { worker: name.clone(), source })?;
        drop(stdin);
        loop {
            let next = tokio::time::timeout(limits.silence, started.lines.event::<R>(&name));
            match next
                .await
                .map_err(|_| WorkerError::Silent { worker: name.clone(), after: limits.silence })??
            {
                None => return Ok(None),
                Some(Event::Progress { bytes, bytes_total, items, items_total }) => {
                    progress(Progress { bytes, bytes_total, items, items_total });
                }
                Some(Event::Done { result }) => return Ok(Some(result)),
                Some(Event::Failed { failure }) => return Err(WorkerError::Failed { worker: name, failure }),
                Some(Event::Unshared | Event::Confined { .. }) => {
                    return Err(garbage(&name, b"an event out of order"));
                }
            }
        }
    }

    /// Start `casemate-init` from its sealed copy in memory and see it through to `ready`. From then on it lives without
    /// us.
    pub async fn start_init(
        &self,
        program: &OwnedFd,
        plan: &[u8],
        log: OwnedFd,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(), WorkerError> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", program.as_raw_fd()));
        let mut started = self.start(&path, "casemate-init", descriptors, Stdio::from(log))?;
        let Some(mut stdin) = started.child.stdin.take() else { return Err(started.died(None).await) };
        let name = started.name.clone();
        let begin = async {
            if matches!(self.ids, IdMode::Range { .. }) {
                self.map(&mut started, &mut stdin).await?;
            }
            stdin
                .write_all(plan)
                .await
                .map_err(|source| WorkerError::Pipe { worker: name.clone(), source })?;
            drop(stdin);
            started.lines.event::<String>(&name).await
        };
        let outcome = tokio::time::timeout(START, begin).await;
        match outcome {
            Err(_) => Err(WorkerError::Silent { worker: name, after: START }),
            Ok(Ok(Some(Event::Done { .. }))) => {
                // The process that we started has made another one and ends; init itself is that other one.
                let ended = tokio::time::timeout(START, started.child.wait()).await;
                match ended {
                    Ok(_) => Ok(()),
                    Err(_) => Err(WorkerError::Silent { worker: name, after: START }),
                }
            }
            Ok(Ok(Some(Event::Failed { failure }))) => Err(WorkerError::Failed { worker: name, failure }),
            Ok(Ok(Some(_))) => Err(garbage(&name, b"an event out of order")),
            Ok(Ok(None)) => Err(started.died(None).await),
            Ok(Err(WorkerError::Garbage { line, .. })) if line == "nothing" => Err(started.died(None).await),
            Ok(Err(error)) => Err(error),
        }
    }
}
