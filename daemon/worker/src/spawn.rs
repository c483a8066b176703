//! The daemon's side: start a worker, write its id maps, hand it the request, and judge every byte that comes back.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::signal::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::error::Elapsed;

use crate::confine::exit;
use crate::ids::{self, Extent, IdMode};
use crate::namespaces::Ids;
use crate::profiles;
use crate::protocol::{EVENT_LINE_MAX, Envelope, Event, FD_EVENTS, FD_FIRST, Failure, PROTOCOL};

/// Most bytes of events and of logs that one worker may write.
const OUTPUT_MAX: usize = 64 << 20;
const LOG_MAX: usize = 64 << 10;
/// Most characters of a worker's own words that are shown.
const WORDS_MAX: usize = 4_096;
/// A worker is confined and asks for its request within this time, or not at all.
const START: Duration = Duration::from_secs(30);
/// A worker that is done, or killed, is gone within this time, unless the kernel still holds it.
const END: Duration = Duration::from_secs(10);

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
    #[error("{worker} {} before it was done: {log}", ended(*.status))]
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

/// Why an init does not run: it failed, or who starts it could not say what it is to do.
#[derive(Debug)]
pub enum StartError<E> {
    Worker(WorkerError),
    Prepare(E),
}

impl<E> From<WorkerError> for StartError<E> {
    fn from(error: WorkerError) -> Self {
        Self::Worker(error)
    }
}

/// In words, since the number is of our own making.
fn ended(status: ExitStatus) -> String {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    let signal = code.and_then(|code| code.checked_sub(exit::SIGNAL)).map(i32::from);
    match (code, signal.map(Signal::try_from)) {
        (Some(exit::UNCONFINED), _) => "could not confine itself and gave up".to_owned(),
        (Some(exit::REQUEST), _) => "did not understand its request and gave up".to_owned(),
        (Some(exit::PANIC), _) => "panicked".to_owned(),
        (_, Some(Ok(Signal::SIGSYS))) => "was killed for a system call that it may not make".to_owned(),
        (_, Some(Ok(signal))) => format!("was killed by {signal}"),
        _ => format!("died ({status})"),
    }
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
    /// Where in `pending` the next line begins.
    start: usize,
    /// Bytes of `pending` known to hold no newline: whoever sends a line byte by byte makes nobody search it anew.
    searched: usize,
    total: usize,
}

impl Lines {
    fn new(pipe: tokio::net::unix::pipe::Receiver) -> Self {
        Self { pipe, pending: Vec::new(), start: 0, searched: 0, total: 0 }
    }

    /// The next whole line; `None` at the end.
    async fn next(&mut self, worker: &str) -> Result<Option<Vec<u8>>, WorkerError> {
        loop {
            if let Some(end) = self.pending[self.searched..].iter().position(|byte| *byte == b'\n') {
                let end = self.searched + end;
                let line = self.pending[self.start..end].to_vec();
                self.start = end + 1;
                self.searched = self.start;
                return Ok(Some(line));
            }
            self.pending.drain(..self.start);
            self.start = 0;
            self.searched = self.pending.len();
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
        parse(worker, &line).map(Some)
    }

    /// Until nobody holds the other end.
    async fn drain(&mut self) {
        let mut block = [0; 4 << 10];
        while self.pipe.read(&mut block).await.is_ok_and(|count| count > 0) {}
    }
}

fn parse<T: DeserializeOwned>(worker: &str, line: &[u8]) -> Result<Event<T>, WorkerError> {
    let event = serde_json::from_slice(line).map_err(|_| garbage(worker, line))?;
    Ok(match event {
        Event::Failed { failure } => Event::Failed { failure: failure.printable() },
        event => event,
    })
}

impl Failure {
    /// A worker's words are a stranger's: nothing of theirs moves a cursor, turns the writing round or fills a screen.
    fn printable(self) -> Self {
        let printable = |text: String| {
            let escape = |c: char| match c {
                '\'' | '"' | '\\' => c.to_string(),
                _ => c.escape_debug().to_string(),
            };
            let mut shown = String::new();
            for (at, piece) in text.chars().map(escape).enumerate() {
                if at == WORDS_MAX {
                    shown.push('…');
                    break;
                }
                shown.push_str(&piece);
            }
            shown
        };
        Self { kind: self.kind, subject: printable(self.subject), message: printable(self.message) }
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
    /// End both of its processes. The one that we started is our child; the other one, which does the work, dies of its
    /// death, and with it the last end of the events' pipe: only then nobody writes any more where it could.
    async fn kill(&mut self) {
        let _ = self.child.start_kill();
        let _ = self.child.wait().await;
        if tokio::time::timeout(END, self.lines.drain()).await.is_err() {
            tracing::warn!(worker = self.name, "killed, but the kernel still holds it");
        }
    }

    /// Say how it ended, with the end of its log.
    async fn died(mut self, log: Option<JoinHandle<String>>) -> WorkerError {
        // Its pipe is closed, so it has ended or is about to: then the status is its own.
        if tokio::time::timeout(Duration::from_secs(2), self.child.wait()).await.is_err() {
            let _ = self.child.start_kill();
        }
        let status = self.child.wait().await;
        let log = match log {
            Some(log) => tokio::time::timeout(END, log).await.map(Result::unwrap_or_default),
            None => Ok(String::new()),
        };
        match status {
            Ok(status) => WorkerError::Died { worker: self.name, status, log: log.unwrap_or_default() },
            Err(source) => WorkerError::Pipe { worker: self.name, source },
        }
    }
}

/// Gives the end of what it wrote. A worker that writes too much is told of through `flood`.
async fn read_log(
    worker: &'static str,
    mut pipe: tokio::process::ChildStderr,
    flood: oneshot::Sender<()>,
) -> String {
    let mut kept = Vec::new();
    let mut block = [0; 4 << 10];
    while let Ok(count) = pipe.read(&mut block).await {
        if count == 0 {
            break;
        }
        if kept.len() + count > LOG_MAX {
            // Nobody listens where the worker is at its end already.
            let _ = flood.send(());
            break;
        }
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
        Ok(Started { name: name.to_owned(), child, lines: Lines::new(events) })
    }

    /// Write both maps of a process that has unshared its user namespace.
    async fn write_maps(&self, pid: u32) -> Result<(), WorkerError> {
        let IdMode::Range { user, group, uid_start, gid_start, newuidmap, newgidmap } = &self.ids else {
            return Ok(());
        };
        let run = |program: PathBuf, map: Vec<Extent>| async move {
            let mut command = Command::new(&program);
            command.env_clear().arg(pid.to_string()).stdin(Stdio::null()).kill_on_drop(true);
            for (inside, outside, count) in map {
                command.args([inside, outside, count].map(|number| number.to_string()));
            }
            command.stdout(Stdio::null()).stderr(Stdio::piped());
            // In a thread: whoever starts a process waits until it has executed, and these two need not wait for each other.
            let started = tokio::task::spawn_blocking(move || command.spawn()).await;
            let output = async { started.map_err(std::io::Error::other)??.wait_with_output().await };
            let output =
                output.await.map_err(|source| WorkerError::Spawn { program: program.clone(), source })?;
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

    /// The handshake up to the maps. `false`: it ended instead.
    async fn map(
        &self,
        started: &mut Started,
        stdin: &mut tokio::process::ChildStdin,
    ) -> Result<bool, WorkerError> {
        let name = started.name.clone();
        match started.lines.event::<()>(&name).await? {
            Some(Event::Unshared) => {}
            Some(_) => return Err(garbage(&name, b"an event out of order")),
            None => return Ok(false),
        }
        // Not reaped yet, so the pid is still this process's.
        let Some(pid) = started.child.id() else { return Ok(false) };
        self.write_maps(pid).await?;
        stdin.write_all(b"\n").await.map_err(|source| WorkerError::Pipe { worker: name, source })?;
        Ok(true)
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
        // One too few, and a descriptor that we leaked would be taken for it.
        if i32::try_from(descriptors.len()) != Ok(profile.descriptors) {
            let source = std::io::Error::from(std::io::ErrorKind::InvalidInput);
            return Err(WorkerError::Spawn { program, source });
        }
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
        let (flood, flooded) = oneshot::channel();
        let log = started.child.stderr.take().map(|pipe| tokio::spawn(read_log(name, pipe, flood)));
        let outcome = {
            let work = self.converse(&mut started, mapped, &document, limits, progress);
            let cancelled = async {
                if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                // Whoever flooded finds its log closed, and may say that it is done all the same.
                biased;
                Ok(()) = flooded => Err(WorkerError::TooMuchOutput { worker: name.to_owned() }),
                () = cancelled => Err(WorkerError::Cancelled),
                outcome = work => outcome,
                () = tokio::time::sleep(limits.time) => {
                    Err(WorkerError::TimedOut { worker: name.to_owned(), after: limits.time })
                }
            }
        };
        match outcome {
            Ok(Some(result)) => {
                match tokio::time::timeout(END.min(limits.silence), started.child.wait()).await {
                    Ok(Ok(status)) if status.success() => Ok(result),
                    _ => Err(started.died(log).await),
                }
            }
            Ok(None) => Err(started.died(log).await),
            Err(WorkerError::Pipe { source, .. }) if source.kind() == std::io::ErrorKind::BrokenPipe => {
                Err(started.died(log).await)
            }
            Err(error) => {
                started.kill().await;
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
            if mapped && !self.map(started, &mut stdin).await? {
                return Ok(false);
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
        let silent = |after| {
            let worker = name.clone();
            move |_: Elapsed| WorkerError::Silent { worker, after }
        };
        let start = START.min(limits.silence);
        if !tokio::time::timeout(start, begin).await.map_err(silent(start))?? {
            return Ok(None);
        }
        tokio::time::timeout(limits.silence, stdin.write_all(document))
            .await
            .map_err(silent(limits.silence))?
            .map_err(|source| WorkerError::Pipe { worker: name.clone(), source })?;
        drop(stdin);
        loop {
            let next = tokio::time::timeout(limits.silence, started.lines.event::<R>(&name));
            match next.await.map_err(silent(limits.silence))?? {
                None => return Ok(None),
                Some(Event::Progress { bytes, bytes_total, items, items_total }) => {
                    progress(Progress { bytes, bytes_total, items, items_total });
                }
                Some(Event::Done { result }) => {
                    // Its last word: what follows is the end, or a lie.
                    let last = tokio::time::timeout(END.min(limits.silence), started.lines.next(&name));
                    return match last.await.map_err(silent(END.min(limits.silence)))?? {
                        None => Ok(Some(result)),
                        Some(line) => Err(garbage(&name, &line)),
                    };
                }
                Some(Event::Failed { failure }) => return Err(WorkerError::Failed { worker: name, failure }),
                Some(Event::Unshared | Event::Confined { .. }) => {
                    return Err(garbage(&name, b"an event out of order"));
                }
            }
        }
    }

    /// Start `casemate-init` from its sealed copy in memory and see it through to `ready`. From then on it lives without
    /// us. Its plan is made by `prepare` while it starts and its ids are mapped, which takes as long; it gets the pid, of
    /// which no other process is made before the plan is there. What comes with the plan is done while init carries it out, and
    /// must succeed as well. Gives init's first words.
    pub async fn start_init<R: DeserializeOwned, E, F: Future<Output = Result<(), E>>>(
        &self,
        program: &OwnedFd,
        log: OwnedFd,
        descriptors: Vec<OwnedFd>,
        prepare: impl AsyncFnOnce(u32) -> Result<(Vec<u8>, F), E>,
    ) -> Result<R, StartError<E>> {
        let path = PathBuf::from(format!("/proc/self/fd/{}", program.as_raw_fd()));
        let mut started = self.start(&path, "casemate-init", descriptors, Stdio::from(log))?;
        let Some(mut stdin) = started.child.stdin.take() else { return Err(started.died(None).await.into()) };
        let name = started.name.clone();
        let begin = async {
            // Not reaped yet, so the pid is still this process's.
            let Some(pid) = started.child.id() else { return Ok(None) };
            let prepared = async { prepare(pid).await.map_err(StartError::Prepare) };
            let mapped = async {
                match self.ids {
                    IdMode::Range { .. } => Ok(self.map(&mut started, &mut stdin).await?),
                    IdMode::Single { .. } => Ok(true),
                }
            };
            let ((plan, meanwhile), mapped) = tokio::try_join!(prepared, mapped)?;
            if !mapped {
                return Ok(None);
            }
            let written = stdin.write_all(&plan).await;
            written.map_err(|source| WorkerError::Pipe { worker: name.clone(), source })?;
            drop(stdin);
            let meanwhile = async { meanwhile.await.map_err(StartError::Prepare) };
            let event = async { started.lines.event::<R>(&name).await.map_err(StartError::from) };
            let ((), event) = tokio::try_join!(meanwhile, event)?;
            Ok(event)
        };
        let outcome = tokio::time::timeout(START, begin).await;
        match outcome {
            Err(_) => Err(WorkerError::Silent { worker: name, after: START }.into()),
            Ok(Ok(Some(Event::Done { result }))) => {
                // The process that we started has made another one and ends; init itself is that other one. Nobody waits for the
                // end of the first, but it must not be killed either: init has yet to tell it of its own birth.
                tokio::spawn(async move {
                    if tokio::time::timeout(START, started.child.wait()).await.is_err() {
                        tracing::warn!(worker = name, "what started it does not end");
                    }
                });
                Ok(result)
            }
            Ok(Ok(Some(Event::Failed { failure }))) => {
                Err(WorkerError::Failed { worker: name, failure }.into())
            }
            Ok(Ok(Some(_))) => Err(garbage(&name, b"an event out of order").into()),
            Ok(Ok(None)) => Err(started.died(None).await.into()),
            Ok(Err(error)) => Err(error),
        }
    }
}

#[cfg(test)]
#[path = "spawn_tests.rs"]
mod tests;
