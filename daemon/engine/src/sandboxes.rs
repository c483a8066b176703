//! Running sandboxes: starting `casemate-init`, finding it again, and throwaway ones for risky steps.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use casemate_sandbox::control::{Exec, ExitStatus, Ready, Reply, Request};
use casemate_sandbox::plan::{OLDEST, Plan, VERSION};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

use crate::cgroups::Group;
use crate::control::{self, Control, ControlError};
use crate::error::Error;
use crate::jobs::Job;
use crate::workers::Workers;

/// What is remembered of a running environment, so that the next daemon knows it again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`, clock ticks since boot.
    pub start_time: u64,
    pub boot_id: String,
}

/// A running init.
pub struct Sandbox {
    /// Requests; one at a time.
    pub control: tokio::sync::Mutex<Control>,
    /// Notices, and before them answers to what was sent with [`Request::Watch`]. Whoever follows them holds it.
    pub watch: tokio::sync::Mutex<Control>,
    pub pidfd: OwnedFd,
    pub linger: AtomicBool,
    /// The version that its init speaks; of one that is frozen the oldest, until it tells.
    pub protocol: AtomicU32,
    /// nsfs inode numbers of the outer and inner user namespace.
    pub user_namespaces: [u64; 2],
    /// `None` where there are no control groups, and for throwaway sandboxes.
    pub group: Option<Group>,
    pub paused: AtomicBool,
    /// Limits that were asked for and are not in force.
    pub unenforced: std::sync::Mutex<Vec<String>>,
}

/// The state file of a running environment.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    pid: i32,
    start_time: u64,
    boot_id: String,
    /// Of an init that is frozen when a daemon starts, which cannot be asked.
    #[serde(default)]
    user_namespaces: [u64; 2],
}

impl Remembered {
    fn read(path: &Path, name: &str) -> Result<Option<Self>, Error> {
        match std::fs::read_to_string(path) {
            Ok(text) => toml::from_str(&text).map(Some).map_err(|error| Error::Sandbox {
                name: name.to_owned(),
                message: format!("{}: {error}", path.display()),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", path)(error)),
        }
    }

    fn identity(&self) -> Identity {
        Identity { pid: self.pid, start_time: self.start_time, boot_id: self.boot_id.clone() }
    }
}

const STATE_FILE: &str = "state.toml";
/// Is there while an environment is frozen for a copy of its upper, and not because somebody asked for that.
const COPY_FILE: &str = "copying";
/// Holds the path of the store that a sandbox belongs to: another store's daemon leaves it alone.
const STORE_FILE: &str = "store";

/// Whether a sandbox's directory is that of another store's.
pub fn is_anothers(directory: &Path, store: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    std::fs::read(directory.join(STORE_FILE)).is_ok_and(|named| named != store.as_os_str().as_bytes())
}

fn sandbox_error(name: &str) -> impl Fn(ControlError) -> Error + '_ {
    move |error| Error::Sandbox { name: name.to_owned(), message: error.to_string() }
}

fn identity(pid: Pid) -> Result<Identity, Error> {
    let path = format!("/proc/{}/stat", pid.as_raw_nonzero());
    let stat = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    // The command, field 2, may hold anything, also blanks and brackets: count from its end.
    let start_time = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| Error::Odd { path: path.clone().into(), what: "it has no start time".into() })?;
    let boot = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(boot).map_err(Error::io("read", boot))?.trim().to_owned();
    Ok(Identity { pid: pid.as_raw_nonzero().get(), start_time, boot_id })
}

/// The init at the other end, held.
fn peer(control: &Control, name: &str) -> Result<(Pid, OwnedFd), Error> {
    let pid = control.peer().map_err(sandbox_error(name))?.pid;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| {
        let message = format!("its init {} is gone: {errno}", pid.as_raw_nonzero());
        Error::Sandbox { name: name.to_owned(), message }
    })?;
    Ok((pid, pidfd))
}

fn remember(directory: &Path, is: Identity, user_namespaces: [u64; 2]) -> Result<(), Error> {
    let recorded = directory.join(STATE_FILE);
    let Identity { pid, start_time, boot_id } = is;
    let text = toml::to_string(&Remembered { pid, start_time, boot_id, user_namespaces })
        .map_err(|error| Error::Odd { path: recorded.clone(), what: error.to_string() })?;
    // Whole or not at all: half a file would make the next daemon take a running init for a stranger.
    let beside = directory.join("state.new");
    std::fs::write(&beside, text).map_err(Error::io("write", &beside))?;
    std::fs::rename(&beside, &recorded).map_err(Error::io("write", &recorded))
}

/// From now on it is frozen for a copy.
pub fn mark_copy(directory: &Path) -> Result<(), Error> {
    let path = directory.join(COPY_FILE);
    std::fs::write(&path, "").map_err(Error::io("write", &path))
}

/// It no longer is.
pub fn unmark_copy(directory: &Path) -> Result<(), Error> {
    let path = directory.join(COPY_FILE);
    match std::fs::remove_file(&path) {
        // It ended meanwhile, and its directory is cleared away.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::io("remove", &path)),
    }
}

/// Thaw an environment that the last daemon froze for a copy and did not live to thaw.
pub async fn thaw_after_copy(directory: &Path, id: &str) -> Result<(), Error> {
    if !directory.join(COPY_FILE).exists() {
        return Ok(());
    }
    let remembered = Remembered::read(&directory.join(STATE_FILE), id)?;
    let init = remembered.and_then(|was| Pid::from_raw(was.pid));
    // Where the pid is another process's by now, there is no group of this environment's.
    if let Some(group) = init.and_then(|init| group(init, id)).filter(Group::is_frozen) {
        tracing::info!(environment = id, "it was frozen to be copied, and goes on");
        let failed = |source| Error::Group { name: id.to_owned(), source };
        group.freeze(false).await.map_err(failed)?;
    }
    unmark_copy(directory)
}

impl Sandbox {
    /// Take up contact with the init whose socket is in `directory`. `id` is whom it must say it is.
    pub async fn contact(directory: &Path, id: &str, name: &str) -> Result<Self, Error> {
        let failed = sandbox_error(name);
        let path = directory.join("control");
        let mut control = Control::connect(&path).map_err(&failed)?;
        let (peer, pidfd) = peer(&control, name)?;
        // Both at once: init answers in one turn of its loop.
        let mut watch = Control::connect(&path).map_err(&failed)?;
        let (greeted, watched) =
            tokio::join!(control.ask(&Request::Hello, &[]), watch.ask(&Request::Watch, &[]));
        let (reply, _) = greeted.map_err(&failed)?;
        watched.map_err(&failed)?;
        let wrong = |message: String| Error::Sandbox { name: name.to_owned(), message };
        let Reply::Hello { id: found, version, linger, outer_user_namespace, inner_user_namespace, .. } =
            reply
        else {
            return Err(wrong("init gave no greeting".to_owned()));
        };
        if found != id {
            return Err(wrong(format!("another environment, {found:?}, answers on its socket")));
        }
        // Init answered after the pidfd was opened, so the pid was not used again in between.
        let is = identity(peer)?;
        let user_namespaces = [outer_user_namespace, inner_user_namespace];
        match Remembered::read(&directory.join(STATE_FILE), name)?.map(|was| was.identity()) {
            Some(was) if was != is => {
                return Err(wrong(format!("{was:?} is on record, {is:?} answers")));
            }
            Some(_) => {}
            // The daemon that started it died before it wrote this down.
            None => remember(directory, is, user_namespaces)?,
        }
        let sandbox = Self::new(control, watch, pidfd, user_namespaces, group(peer, id));
        sandbox.linger.store(linger, Ordering::Relaxed);
        sandbox.protocol.store(version, Ordering::Relaxed);
        Ok(sandbox)
    }

    /// The same with the init that this daemon has just started and that said it is ready.
    async fn meet(directory: &Path, id: &str, name: &str, ready: Ready) -> Result<Self, Error> {
        let failed = sandbox_error(name);
        let path = directory.join("control");
        let watch = Control::connect(&path).map_err(&failed)?;
        // Before there is a connection for other requests, since init serves the oldest first: so no session's end is missed.
        watch.send(&Request::Watch, &[]).await.map_err(&failed)?;
        let control = Control::connect(&path).map_err(&failed)?;
        let (peer, pidfd) = peer(&control, name)?;
        let is = identity(peer)?;
        // Init alone holds the listening socket. It did when the pidfd was there: so the pid was not used again in between.
        if control.is_closed().map_err(&failed)? {
            let message = "init ended as soon as it was ready".to_owned();
            return Err(Error::Sandbox { name: name.to_owned(), message });
        }
        let user_namespaces = [ready.outer_user_namespace, ready.inner_user_namespace];
        remember(directory, is, user_namespaces)?;
        Ok(Self::new(control, watch, pidfd, user_namespaces, group(peer, id)))
    }

    fn new(
        control: Control,
        watch: Control,
        pidfd: OwnedFd,
        user_namespaces: [u64; 2],
        group: Option<Group>,
    ) -> Self {
        Self {
            control: tokio::sync::Mutex::new(control),
            watch: tokio::sync::Mutex::new(watch),
            pidfd,
            linger: AtomicBool::new(false),
            protocol: AtomicU32::new(VERSION),
            user_namespaces,
            group,
            paused: AtomicBool::new(false),
            unenforced: Default::default(),
        }
    }

    /// The same with an init that is frozen and cannot answer: the kernel tells who listens on its socket, and the record
    /// must name the same process. `None` if it is not frozen.
    pub async fn contact_frozen(directory: &Path, id: &str, name: &str) -> Result<Option<Self>, Error> {
        let failed = sandbox_error(name);
        let Some(was) = Remembered::read(&directory.join(STATE_FILE), name)? else { return Ok(None) };
        let Some(pid) = Pid::from_raw(was.pid) else { return Ok(None) };
        let Some(group) = group(pid, id).filter(Group::is_frozen) else { return Ok(None) };
        let wrong = |message: String| Error::Sandbox { name: name.to_owned(), message };
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            .map_err(|errno| wrong(format!("its init {} is gone: {errno}", was.pid)))?;
        let path = directory.join("control");
        let control = Control::connect(&path).map_err(&failed)?;
        let (peer, is) = (control.peer().map_err(&failed)?, identity(pid)?);
        if peer.pid != pid || is != was.identity() {
            return Err(wrong(format!("{:?} is on record, {is:?} holds its socket", was.identity())));
        }
        let watch = Control::connect(&path).map_err(&failed)?;
        for request in [Request::Hello, Request::Watch] {
            watch.send(&request, &[]).await.map_err(&failed)?;
        }
        let sandbox = Self::new(control, watch, pidfd, was.user_namespaces, Some(group));
        // Until it tells; one that is paused does not end by itself.
        sandbox.linger.store(true, Ordering::Relaxed);
        sandbox.paused.store(true, Ordering::Relaxed);
        sandbox.protocol.store(OLDEST, Ordering::Relaxed);
        Ok(Some(sandbox))
    }

    /// Ask for the end and see to it. One that is paused is thawed for it; without time to end in, it is killed as it is.
    pub async fn stop(&self, timeout: Duration) {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        let answers = match &self.group {
            Some(group) if self.paused.load(Ordering::Relaxed) => {
                timeout_ms > 0 && group.freeze(false).await.is_ok()
            }
            _ => true,
        };
        let asked = match answers {
            true => self.control.lock().await.ask(&Request::Stop { timeout_ms }, &[]).await.is_ok(),
            false => false,
        };
        let grace = if asked { timeout + Duration::from_secs(2) } else { Duration::ZERO };
        if tokio::time::timeout(grace, gone(&self.pidfd)).await.is_err() {
            // ESRCH: it is gone already, which is what is wanted.
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
            if let Some(group) = &self.group
                && self.paused.load(Ordering::Relaxed)
                // Whoever serves the environment in its group (the keeper of its network) must run to see its end.
                && let Err(error) = group.freeze(false).await
            {
                tracing::warn!(%error, "what a killed environment left stays frozen");
            }
            gone(&self.pidfd).await;
        }
    }
}

/// Between two looks at a process that cannot be waited for.
const LOOK: Duration = Duration::from_millis(50);

/// Until the process has ended: its pidfd becomes readable.
pub async fn gone(pidfd: &OwnedFd) {
    if let Ok(copy) = pidfd.try_clone() {
        // SAFETY: an OwnedFd gives the same open descriptor for as long as it lives.
        let ready =
            unsafe { tokio::io::unix::AsyncFd::register_with_interest(copy, tokio::io::Interest::READABLE) };
        if let Ok(ready) = ready
            && ready.readable().await.is_ok()
        {
            return;
        }
    }
    // Without a descriptor to wait with there is still looking.
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        let mut ready = [rustix::event::PollFd::new(pidfd, rustix::event::PollFlags::IN)];
        if rustix::event::poll(&mut ready, Some(&now)).is_ok_and(|count| count > 0) {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Why an environment was not started.
pub fn no_group(name: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Sandbox { name: name.to_owned(), message: format!("no control group for it: {error}") }
}

fn group(init: Pid, id: &str) -> Option<Group> {
    Group::of(init.as_raw_nonzero().get(), &id.parse().ok()?)
}

/// What is known of an init before its plan.
#[derive(Default)]
pub struct Birth {
    /// The directory of the control group to be born in.
    pub born_in: Option<OwnedFd>,
    /// Of the command in its plan, which has one then.
    pub log: Option<OwnedFd>,
}

/// A plan, and what is done while init carries it out: where that fails, init ends before anything of the environment runs.
pub struct Prepared {
    pub plan: Plan,
    pub meanwhile: Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>,
}

/// Start the init of `id` in `directory`, which is made anew, and take up contact with it. `prepare` makes its plan, and gets
/// its pid before it makes other processes.
pub async fn start(
    workers: &Workers,
    id: &str,
    directory: &Path,
    name: &str,
    birth: Birth,
    prepare: impl AsyncFnOnce(u32) -> Result<Prepared, Error>,
) -> Result<Sandbox, Error> {
    clear(directory)?;
    std::fs::create_dir_all(directory).map_err(Error::io("make", directory))?;
    let store = directory.join(STORE_FILE);
    std::fs::write(&store, workers.store().as_os_str().as_encoded_bytes())
        .map_err(Error::io("write", &store))?;
    let socket = control::bind(&directory.join("control")).map_err(sandbox_error(name))?;
    let log_path = directory.join("init.log");
    let log =
        File::options().create(true).append(true).open(&log_path).map_err(Error::io("make", &log_path))?;
    let started = workers.start_init(log.into(), socket, birth, name, prepare).await;
    let contact = match started {
        Ok(ready) => Sandbox::meet(directory, id, name, ready).await,
        Err(error) => Err(error),
    };
    if contact.is_err() {
        end_listener(directory).await;
        clear(directory)?;
    }
    contact
}

/// Whether somebody listens in `directory`; an error where that cannot be told.
pub fn is_heard(directory: &Path) -> Result<bool, ControlError> {
    use rustix::io::Errno;
    match Control::connect(&directory.join("control")) {
        Ok(_) => Ok(true),
        Err(ControlError::Connect { source: Errno::CONNREFUSED | Errno::NOENT, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// End the init that listens in `directory`, if one does: nobody can take up contact with it, and it would hold the
/// environment's files for ever.
pub async fn end_listener(directory: &Path) {
    let peer = Control::connect(&directory.join("control")).and_then(|control| control.peer());
    let Ok(peer) = peer else { return };
    if let Ok(pidfd) = rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()) {
        // ESRCH: it is gone already, which is what is wanted.
        let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
        gone(&pidfd).await;
    }
}

/// Remove what is left of a sandbox that no longer runs.
pub fn clear(directory: &Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(directory) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io("remove", directory)(error)),
    }
}

/// What a command left running may still say something in this time.
const LEFT: Duration = Duration::from_secs(2);

/// What a throwaway sandbox's command left.
pub struct Outcome {
    pub status: ExitStatus,
    /// Standard output, whole.
    pub output: Vec<u8>,
    /// The last lines of standard error.
    pub last_lines: Vec<String>,
}

pub struct Throwaway<'a> {
    pub workers: &'a Workers,
    pub runtime: &'a Path,
    pub job: &'a Job,
}

impl Throwaway<'_> {
    fn directory(&self, plan: &Plan) -> PathBuf {
        self.runtime.join(&plan.id)
    }

    /// Set up the plan, run one command as the environment's root, and tear everything down. What it prints on standard
    /// error goes to the job's log. Without a command the sandbox is set up and torn down, for what setting up does.
    pub async fn run(&self, plan: &Plan, command: &[String], output_max: usize) -> Result<Outcome, Error> {
        self.job.check()?;
        let directory = self.directory(plan);
        let prepare = async |_| Ok(Prepared { plan: plan.clone(), meanwhile: Box::pin(async { Ok(()) }) });
        let sandbox = start(self.workers, &plan.id, &directory, &plan.id, Birth::default(), prepare).await?;
        let outcome = if command.is_empty() {
            Ok(Outcome { status: ExitStatus::Exit(0), output: Vec::new(), last_lines: Vec::new() })
        } else {
            tokio::select! {
                outcome = self.session(&sandbox, &plan.id, command, output_max) => outcome,
                () = self.job.cancelled() => Err(Error::Cancelled),
            }
        };
        sandbox.stop(Duration::ZERO).await;
        clear(&directory)?;
        outcome
    }

    async fn session(
        &self,
        sandbox: &Sandbox,
        id: &str,
        command: &[String],
        output_max: usize,
    ) -> Result<Outcome, Error> {
        let pipe = || {
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(Error::sys("make", "a pipe"))
        };
        let null = File::open("/dev/null").map_err(Error::io("open", "/dev/null"))?;
        let ((output, output_in), (errors, errors_in), (status, status_in)) = (pipe()?, pipe()?, pipe()?);
        let request = Request::Exec(Exec {
            login: false,
            session: 1,
            command: command.to_vec(),
            environment: vec![
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin".into(),
                "HOME=/root".into(),
                "TERM=dumb".into(),
            ],
            directory: "/".into(),
            directory_optional: false,
            root: true,
            terminal: None,
        });
        let descriptors = [null.as_fd(), output_in.as_fd(), errors_in.as_fd(), status_in.as_fd()];
        sandbox.control.lock().await.ask(&request, &descriptors).await.map_err(sandbox_error(id))?;
        drop((output_in, errors_in, status_in));
        let job = self.job;
        let reading = async {
            let mut last_lines = std::collections::VecDeque::new();
            let lines = read_lines(errors, |line| {
                job.log(line);
                if last_lines.len() == 8 {
                    last_lines.pop_front();
                }
                last_lines.push_back(line.to_owned());
            });
            let (output, lines) = tokio::join!(read_all(output, output_max), lines);
            lines.and(output).map(|output| (output, Vec::from(last_lines)))
        };
        let mut reading = std::pin::pin!(reading);
        let mut ending = std::pin::pin!(read_all(status, 64));
        let (read, status) = tokio::select! {
            read = &mut reading => (Some(read), ending.await),
            status = &mut ending => (None, status),
        };
        let read = match read {
            Some(read) => read,
            // What it left running has its pipes still; init ends that, and then nobody has.
            None => match tokio::time::timeout(LEFT, &mut reading).await {
                Ok(read) => read,
                Err(_) => {
                    job.log("processes that the command left behind are killed");
                    // ESRCH: it is gone already, which is what is wanted.
                    let _ = rustix::process::pidfd_send_signal(&sandbox.pidfd, Signal::KILL);
                    reading.await
                }
            },
        };
        let (output, last_lines) = read?;
        let status = parse_status(&status?).ok_or_else(|| Error::Sandbox {
            name: id.to_owned(),
            message: "init was killed before the command ended".to_owned(),
        })?;
        Ok(Outcome { status, output, last_lines })
    }
}

/// `exit N` or `signal N`, one line.
pub fn parse_status(bytes: &[u8]) -> Option<ExitStatus> {
    let line = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
    match line.split_once(' ')? {
        ("exit", code) => Some(ExitStatus::Exit(code.parse().ok()?)),
        ("signal", number) => Some(ExitStatus::Signal(number.parse().ok()?)),
        _ => None,
    }
}

fn receiver(descriptor: OwnedFd) -> Result<tokio::net::unix::pipe::Receiver, Error> {
    tokio::net::unix::pipe::Receiver::from_owned_fd(descriptor).map_err(Error::io("read", "a pipe"))
}

/// All of a pipe; more than `max` bytes is an error, and the writer then gets SIGPIPE.
async fn read_all(descriptor: OwnedFd, max: usize) -> Result<Vec<u8>, Error> {
    use tokio::io::AsyncReadExt;
    let mut bytes = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    receiver(descriptor)?.take(limit).read_to_end(&mut bytes).await.map_err(Error::io("read", "a pipe"))?;
    if bytes.len() > max {
        return Err(Error::Package { message: format!("a command printed more than {max} bytes") });
    }
    Ok(bytes)
}

async fn read_lines(descriptor: OwnedFd, mut each: impl FnMut(&str)) -> Result<(), Error> {
    use tokio::io::AsyncReadExt;
    let mut pipe = receiver(descriptor)?;
    let mut pending = Vec::new();
    let mut block = vec![0; 16 << 10];
    loop {
        let count = pipe.read(&mut block).await.map_err(Error::io("read", "a pipe"))?;
        pending.extend_from_slice(&block[..count]);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            each(&String::from_utf8_lossy(&pending[..end]));
            pending.drain(..=end);
        }
        // A line without end is cut, or it would eat the daemon's memory.
        if count == 0 || pending.len() > 64 << 10 {
            if !pending.is_empty() {
                each(&String::from_utf8_lossy(&pending));
                pending.clear();
            }
            if count == 0 {
                return Ok(());
            }
        }
    }
}

/// A sealed copy of init in memory: neither an upgrade nor anything inside can change what runs.
pub fn sealed(path: &Path) -> Result<OwnedFd, Error> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(Error::io("read", path))?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = rustix::fs::memfd_create("casemate-init", flags).map_err(Error::sys("copy", path))?;
    let mut file = File::from(memory.try_clone().map_err(Error::io("copy", path))?);
    std::io::Write::write_all(&mut file, &bytes).map_err(Error::io("copy", path))?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&memory, seals).map_err(Error::sys("seal", path))?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_one_whole_line() {
        assert_eq!(parse_status(b"exit 3\n"), Some(ExitStatus::Exit(3)));
        assert_eq!(parse_status(b"signal 15\n"), Some(ExitStatus::Signal(15)));
        for broken in [&b""[..], b"exit 3", b"exit\n", b"exit x\n", b"gone 1\n"] {
            assert_eq!(parse_status(broken), None);
        }
    }
}
