//! Jobs: long operations that report where they are, can be cancelled, and stay to be read for a while after they end.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use tokio::sync::{broadcast, watch};

use crate::api::{Caller, Change, JobId, JobInfo, JobState};
use crate::error::{Error, ErrorKind};

/// How long a job stays after its end. Long enough for a person to come back from another window.
pub const JOB_KEPT: Duration = Duration::from_secs(300);
/// Most ended jobs kept, oldest dropped first.
const ENDED_MAX: usize = 64;
/// Most lines of a job's log; the oldest go first.
const LOG_MAX: usize = 2_000;
/// Most bytes of one line of a log.
const LINE_MAX: usize = 1_024;
/// Jobs that run at a time, whoever asked for them.
const RUNNING_MAX: usize = 32;
/// Jobs of one caller that run at a time.
const RUNNING_EACH: usize = 8;
/// Numbers taken at a time.
const BLOCK: JobId = 1_000;
/// Whoever claims this is alone.
pub const EVERYTHING: &str = "the store";

struct Entry {
    info: JobInfo,
    log: std::collections::VecDeque<String>,
    caller: Caller,
    cancel: watch::Sender<bool>,
    ended: Option<Instant>,
}

/// Numbers of jobs, unique for as long as the runtime directory lives, across restarts and daemons that share it: a path on the
/// bus, and a directory of a job's sandbox, never name two. A daemon takes a block at a time.
struct Numbers {
    file: PathBuf,
    next: JobId,
    end: JobId,
}

impl Numbers {
    fn take(&mut self) -> Result<JobId, Error> {
        if self.next == self.end {
            use std::os::unix::fs::FileExt;
            let path = &self.file;
            let options = File::options().read(true).write(true).create(true).truncate(false).open(path);
            let file = options.map_err(Error::io("open", path))?;
            // Released when it is closed.
            rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(Error::sys("lock", path))?;
            let text = std::io::read_to_string(&file).map_err(Error::io("read", path))?;
            let taken: JobId = match text.trim() {
                "" => 0,
                number => number.parse().map_err(|_| Error::Odd {
                    path: path.clone(),
                    what: "it is no number; remove it".into(),
                })?,
            };
            let end = taken.saturating_add(BLOCK);
            file.write_all_at(format!("{end}\n").as_bytes(), 0).map_err(Error::io("write", path))?;
            (self.next, self.end) = (taken + 1, end + 1);
        }
        let number = self.next;
        self.next += 1;
        Ok(number)
    }
}

struct Table {
    numbers: Numbers,
    jobs: BTreeMap<JobId, Entry>,
    /// What running jobs have to themselves.
    held: HashSet<String>,
    /// The daemon ends; nothing new begins.
    stopping: bool,
}

pub(crate) struct Jobs {
    table: Mutex<Table>,
    changes: broadcast::Sender<Change>,
}

/// What a job's own code holds.
pub(crate) struct Job {
    pub id: JobId,
    jobs: Arc<Jobs>,
    cancel: watch::Receiver<bool>,
    stage_began: Mutex<Instant>,
}

/// What a job holds alone while it runs; another that wants it is [`Error::Busy`].
pub(crate) struct Claim {
    pub what: &'static str,
    pub name: String,
}

pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Jobs {
    pub fn new(changes: broadcast::Sender<Change>, runtime: &Path) -> Arc<Self> {
        let numbers = Numbers { file: runtime.join("jobs"), next: 0, end: 0 };
        let table = Table { numbers, jobs: BTreeMap::new(), held: HashSet::new(), stopping: false };
        Arc::new(Self { table: Mutex::new(table), changes })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // A panic while the table was held cannot leave it half written: every change is one assignment.
        self.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn list(&self) -> Vec<JobInfo> {
        self.lock().jobs.values().map(|entry| entry.info.clone()).collect()
    }

    pub fn get(&self, id: JobId) -> Result<JobInfo, Error> {
        self.with(id, |entry| entry.info.clone())
    }

    pub fn log(&self, id: JobId) -> Result<Vec<String>, Error> {
        self.with(id, |entry| entry.log.iter().cloned().collect())
    }

    pub fn cancel(&self, id: JobId) -> Result<(), Error> {
        self.with(id, |entry| {
            entry.cancel.send_replace(true);
        })
    }

    /// Those that somebody asked for: not the daemon's own.
    pub fn asked_for(&self) -> usize {
        let table = self.lock();
        table.jobs.values().filter(|entry| entry.ended.is_none() && !entry.caller.is_daemon()).count()
    }

    /// Ask the daemon's own jobs to end.
    pub fn cancel_own(&self) {
        for entry in self.lock().jobs.values().filter(|entry| entry.caller.is_daemon()) {
            entry.cancel.send_replace(true);
        }
    }

    /// Ask all jobs to end, and start no more.
    pub fn stop(&self) {
        let mut table = self.lock();
        table.stopping = true;
        for entry in table.jobs.values() {
            entry.cancel.send_replace(true);
        }
    }

    pub fn running(&self) -> usize {
        self.lock().jobs.values().filter(|entry| entry.ended.is_none()).count()
    }

    /// When the next ended job is to be forgotten.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.lock().jobs.values().filter_map(|entry| entry.ended).min().map(|ended| ended + JOB_KEPT)
    }

    fn with<T>(&self, id: JobId, read: impl FnOnce(&mut Entry) -> T) -> Result<T, Error> {
        self.lock().jobs.get_mut(&id).map(read).ok_or_else(|| Error::NotFound {
            what: "job",
            name: id.to_string(),
            remedy: "it may have ended a while ago; see `casemate jobs`",
        })
    }

    fn tell(&self, change: Change) {
        // Without a listener there is nobody to tell.
        let _ = self.changes.send(change);
    }

    fn change(&self, id: JobId, write: impl FnOnce(&mut JobInfo)) {
        let known = self.with(id, |entry| write(&mut entry.info)).is_ok();
        if known {
            self.tell(Change::JobChanged(id));
        }
    }

    /// Drop jobs that ended long ago; called whenever one starts or ends, and by the engine's clock.
    pub fn forget_old(&self) {
        let mut table = self.lock();
        let mut ended: Vec<(Instant, JobId)> =
            table.jobs.iter().filter_map(|(id, entry)| Some((entry.ended?, *id))).collect();
        ended.sort();
        let surplus = ended.len().saturating_sub(ENDED_MAX);
        let gone: Vec<JobId> = ended
            .iter()
            .enumerate()
            .filter(|(index, (when, _))| *index < surplus || when.elapsed() >= JOB_KEPT)
            .map(|(_, (_, id))| *id)
            .collect();
        for id in &gone {
            table.jobs.remove(id);
        }
        drop(table);
        for id in gone {
            self.tell(Change::JobRemoved(id));
        }
    }

    /// Start a job. Its work runs as a task of its own; `claim` is held until it ends.
    pub fn start<F, W>(
        self: &Arc<Self>,
        caller: &Caller,
        kind: &str,
        subject: &str,
        claims: Vec<Claim>,
        work: W,
    ) -> Result<JobId, Error>
    where
        W: FnOnce(Job) -> F,
        F: Future<Output = Result<Vec<(String, String)>, Error>> + Send + 'static,
    {
        self.forget_old();
        let (cancel, cancelled) = watch::channel(false);
        let mut table = self.lock();
        if table.stopping {
            return Err(Error::Stopping);
        }
        let running = || table.jobs.values().filter(|entry| entry.ended.is_none());
        // The daemon's own are few by themselves.
        let bounded = !caller.is_daemon();
        if bounded && running().filter(|entry| entry.caller == *caller).count() >= RUNNING_EACH {
            return Err(Error::TooManyJobs { whose: "of yours", most: RUNNING_EACH });
        }
        if bounded && running().count() >= RUNNING_MAX {
            return Err(Error::TooManyJobs { whose: "of all callers", most: RUNNING_MAX });
        }
        if let Some(key) = table.held.iter().find(|key| key.starts_with(EVERYTHING)) {
            return Err(Error::Busy { what: EVERYTHING, name: key[EVERYTHING.len()..].trim().to_owned() });
        }
        let keys: Vec<String> = claims.iter().map(|claim| format!("{} {}", claim.what, claim.name)).collect();
        for (claim, key) in claims.iter().zip(&keys) {
            if table.held.contains(key) {
                return Err(Error::Busy { what: claim.what, name: claim.name.clone() });
            }
        }
        let id = table.numbers.take()?;
        table.held.extend(keys.iter().cloned());
        let info = JobInfo {
            id,
            kind: kind.to_owned(),
            subject: subject.to_owned(),
            state: JobState::Running,
            stage: String::new(),
            bytes_done: 0,
            bytes_total: 0,
            items_done: 0,
            items_total: 0,
            started_at: now(),
            ended_at: 0,
            result: Vec::new(),
            error: None,
        };
        table
            .jobs
            .insert(id, Entry { info, log: Default::default(), caller: caller.clone(), cancel, ended: None });
        drop(table);
        self.tell(Change::JobAdded(id));
        let job =
            Job { id, jobs: Arc::clone(self), cancel: cancelled, stage_began: Mutex::new(Instant::now()) };
        let running = tokio::spawn(work(job));
        let jobs = Arc::clone(self);
        tokio::spawn(async move {
            let outcome = match running.await {
                Ok(outcome) => outcome,
                Err(panic) => Err(Error::BrokeOff { what: "the job", panic }),
            };
            jobs.end(id, &keys, outcome);
        });
        Ok(id)
    }

    fn end(&self, id: JobId, keys: &[String], outcome: Result<Vec<(String, String)>, Error>) {
        {
            let mut table = self.lock();
            for key in keys {
                table.held.remove(key);
            }
            if let Some(entry) = table.jobs.get_mut(&id) {
                entry.ended = Some(Instant::now());
                entry.info.ended_at = now();
                match outcome {
                    Ok(result) => {
                        entry.info.state = JobState::Done;
                        entry.info.result.extend(result);
                        tracing::info!(
                            job = id,
                            kind = entry.info.kind,
                            subject = entry.info.subject,
                            "done"
                        );
                    }
                    Err(error) => {
                        let cancelled = error.kind() == ErrorKind::Cancelled;
                        entry.info.state = if cancelled { JobState::Cancelled } else { JobState::Failed };
                        tracing::warn!(job = id, kind = entry.info.kind, subject = entry.info.subject, %error, "failed");
                        entry.info.error = Some((error.kind(), error.to_string()));
                    }
                }
            }
        }
        self.tell(Change::JobEnded(id));
        self.forget_old();
    }
}

impl Job {
    /// A new stage begins. How long the last one took goes into the result, so that a user sees where time goes.
    pub fn stage(&self, stage: &str) {
        let began = std::mem::replace(
            &mut *self.stage_began.lock().unwrap_or_else(std::sync::PoisonError::into_inner),
            Instant::now(),
        );
        self.jobs.change(self.id, |info| {
            if !info.stage.is_empty() {
                let seconds = format!("{:.1}", began.elapsed().as_secs_f64());
                info.result.push((format!("seconds {}", info.stage), seconds));
            }
            info.stage = stage.to_owned();
            (info.bytes_done, info.bytes_total, info.items_done, info.items_total) = (0, 0, 0, 0);
        });
        tracing::debug!(job = self.id, stage, "stage");
    }

    pub fn progress(&self, bytes: (u64, u64), items: (u64, u64)) {
        self.jobs.change(self.id, |info| {
            (info.bytes_done, info.bytes_total) = bytes;
            (info.items_done, info.items_total) = items;
        });
    }

    /// A line for people. Control characters are escaped here, once, since most lines come out of sandboxes.
    pub fn log(&self, line: &str) {
        let mut line: String = line.chars().flat_map(escape).collect();
        if line.len() > LINE_MAX {
            let mut end = LINE_MAX;
            while !line.is_char_boundary(end) {
                end -= 1;
            }
            line.truncate(end);
            line.push('…');
        }
        let kept = self.jobs.with(self.id, |entry| {
            if entry.log.len() == LOG_MAX {
                entry.log.pop_front();
            }
            entry.log.push_back(line.clone());
        });
        if kept.is_ok() {
            self.jobs.tell(Change::JobLog(self.id, line));
        }
    }

    pub fn check(&self) -> Result<(), Error> {
        if *self.cancel.borrow() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Ready when the job is cancelled; for ever pending otherwise.
    pub fn cancelled(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut cancel = self.cancel.clone();
        async move {
            if cancel.wait_for(|cancelled| *cancelled).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    pub fn cancel_receiver(&self) -> watch::Receiver<bool> {
        self.cancel.clone()
    }
}

fn escape(character: char) -> impl Iterator<Item = char> {
    let plain = !character.is_control() || character == '\t';
    let escaped = (!plain).then(|| character.escape_default());
    plain.then_some(character).into_iter().chain(escaped.into_iter().flatten())
}
