//! The environment's own command: started while the environment is to be kept running, started again as its plan says, looked
//! after by a health check. When it has ended for good, nothing keeps the environment running any more.

use std::fs::File;
use std::io::{Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use casemate_sandbox::control::{Exec, ExitStatus, HealthState, Notice, SERVICE};
use casemate_sandbox::plan::{Health, Restart, Service};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork};

use crate::InitError;
use crate::mounts::step;
use crate::server::{Running, Server, State, notify};
use crate::session::Streams;

/// Between an end and the next start: doubled each time, until it has run for [`STABLE`].
const DELAY: Duration = Duration::from_millis(100);
const DELAY_MAX: Duration = Duration::from_secs(60);
const STABLE: Duration = Duration::from_secs(10);
/// Most bytes of its log; then the older half goes.
const LOG_MAX: u64 = 8 << 20;

/// Read at a time.
const BLOCK: usize = 16 << 10;
/// What a pipe holds at most, however it is set (`fs.pipe-max-size`).
const PIPE_MAX: usize = 1 << 20;

enum Phase {
    Idle,
    Running(i32),
    Waiting(Instant),
    /// Ended, and not to be started again.
    Over,
}

struct Check {
    pid: i32,
    until: Instant,
}

pub struct Supervisor {
    service: Service,
    phase: Phase,
    began: Instant,
    delay: Duration,
    health: HealthState,
    failures: u64,
    check: Option<Check>,
    next_check: Instant,
    /// It is being ended since it is unhealthy; killed at this time.
    ending: Option<Instant>,
    log: Log,
}

/// What it prints, on its way into a file that the daemon has opened.
struct Log {
    file: File,
    pipe: Option<OwnedFd>,
}

impl Log {
    /// Take what has come, and say whether there was something; the end of the pipe is the end of all that hold it.
    fn take(&mut self) -> bool {
        let Some(pipe) = &self.pipe else { return false };
        let mut block = [0; BLOCK];
        match rustix::io::read(pipe, &mut block) {
            Ok(0) => self.pipe = None,
            // A full disk costs the log, not the command.
            Ok(count) => {
                let _ = self.write(&block[..count]);
                return true;
            }
            Err(_) => {}
        }
        false
    }

    /// Take all that is in the pipe. Who is still writing does not keep us.
    fn take_all(&mut self) {
        for _ in 0..PIPE_MAX / BLOCK {
            if !self.take() {
                return;
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let length = self.file.metadata()?.len();
        if length + bytes.len() as u64 > LOG_MAX {
            let mut kept = vec![0; usize::try_from(length.min(LOG_MAX / 2)).unwrap_or_default()];
            let from = length - kept.len() as u64;
            self.file.read_exact_at(&mut kept, from)?;
            let line = kept.iter().position(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            self.file.set_len(0)?;
            self.file.rewind()?;
            self.file.write_all(&kept[line..])?;
        }
        self.file.write_all(bytes)
    }
}

impl Supervisor {
    /// `log` is open for reading and appending.
    pub fn new(service: Service, log: OwnedFd) -> Self {
        let health = if service.health.is_some() { HealthState::Starting } else { HealthState::Unknown };
        let now = Instant::now();
        Self {
            service,
            phase: Phase::Idle,
            began: now,
            delay: DELAY,
            health,
            failures: 0,
            check: None,
            next_check: now,
            ending: None,
            log: Log { file: log.into(), pipe: None },
        }
    }

    /// It is to be kept running: one that has ended for good begins anew.
    pub fn wanted(&mut self) {
        if matches!(self.phase, Phase::Over) {
            (self.phase, self.delay) = (Phase::Idle, DELAY);
        }
    }

    pub fn health(&self) -> HealthState {
        self.health
    }

    /// Readable when there is something for [`Self::take_output`].
    pub fn output(&self) -> Option<BorrowedFd<'_>> {
        self.log.pipe.as_ref().map(AsFd::as_fd)
    }

    pub fn take_output(&mut self) {
        self.log.take();
    }

    /// What was printed last, before the end.
    pub fn take_all_output(&mut self) {
        self.log.take_all();
    }

    /// When there is next something to do, unless something happens before.
    pub fn deadline(&self) -> Option<Instant> {
        let due = match self.phase {
            Phase::Idle | Phase::Over => None,
            Phase::Waiting(until) => Some(until),
            Phase::Running(_) => match (&self.service.health, &self.check) {
                (None, _) => None,
                (_, Some(check)) => Some(check.until),
                (Some(_), None) => Some(self.next_check),
            },
        };
        due.into_iter().chain(self.ending).min()
    }

    /// A child has ended; whether it was the command or its check.
    fn ended(&mut self, pid: i32, status: ExitStatus, now: Instant) -> Ended {
        if self.check.as_ref().is_some_and(|check| check.pid == pid) {
            self.check = None;
            // One that outlives the command says nothing about the next one.
            return match self.phase {
                Phase::Running(_) => self.checked(status == ExitStatus::Exit(0), now),
                _ => Ended::Other,
            };
        }
        if !matches!(self.phase, Phase::Running(running) if running == pid) {
            return Ended::Other;
        }
        self.log.take_all();
        let again = match self.service.restart {
            Restart::Always => true,
            Restart::OnFailure => status != ExitStatus::Exit(0),
            Restart::No => false,
        };
        if again || self.ending.is_some() {
            self.delay = match now.duration_since(self.began) {
                ran if ran >= STABLE => DELAY,
                _ => (self.delay * 2).min(DELAY_MAX),
            };
            self.phase = Phase::Waiting(now + self.delay);
        } else {
            self.phase = Phase::Over;
        }
        self.ending = None;
        self.failures = 0;
        let before = self.health;
        if self.service.health.is_some() {
            self.health = HealthState::Starting;
        }
        Ended::Command { over: matches!(self.phase, Phase::Over), health_changed: before != self.health }
    }

    fn checked(&mut self, sound: bool, now: Instant) -> Ended {
        let Some(health) = &self.service.health else { return Ended::Other };
        self.next_check = now + health.interval();
        let before = self.health;
        if sound {
            self.failures = 0;
            self.health = HealthState::Healthy;
        } else if now.duration_since(self.began) >= health.start_period() {
            self.failures += 1;
            if self.failures >= health.retries {
                self.health = HealthState::Unhealthy;
            }
        }
        Ended::Check { health_changed: before != self.health }
    }
}

enum Ended {
    Command { over: bool, health_changed: bool },
    Check { health_changed: bool },
    Other,
}

impl Server {
    /// Do what is due.
    pub fn supervise(&self, state: &mut State, now: Instant) {
        let Some(mut supervisor) = state.supervisor.take() else { return };
        let due = match supervisor.phase {
            Phase::Idle => state.lingers(),
            Phase::Waiting(until) => now >= until,
            Phase::Running(_) | Phase::Over => false,
        };
        if due && let Err(error) = self.begin(state, &mut supervisor, now) {
            eprintln!("casemate-init: cannot start the command: {error}");
            supervisor.delay = (supervisor.delay * 2).min(DELAY_MAX);
            supervisor.phase = Phase::Waiting(now + supervisor.delay);
        }
        if let Phase::Running(pid) = supervisor.phase {
            if supervisor.ending.is_some_and(|at| now >= at) {
                // Not reaped yet, so the pid is still the command's.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                supervisor.ending = Some(now + DELAY_MAX);
            }
            self.look_after(&mut supervisor, now);
        }
        state.supervisor = Some(supervisor);
    }

    fn begin(&self, state: &mut State, supervisor: &mut Supervisor, now: Instant) -> Result<(), InitError> {
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (output, output_in) = step("make a pipe", rustix::pipe::pipe_with(flags))?;
        // The command's end blocks, as programs expect.
        step("make a pipe", rustix::io::ioctl_fionbio(&output_in, false))?;
        let pid = self.run(&supervisor.service, supervisor.service.command.clone(), output_in)?;
        supervisor.log.pipe = Some(output);
        supervisor.phase = Phase::Running(pid);
        supervisor.began = now;
        if let Some(health) = &supervisor.service.health {
            supervisor.next_check = now + health.interval();
        }
        let running =
            Running::without_caller(SERVICE, supervisor.service.command.clone(), supervisor.service.root);
        self.enter(state, pid, running);
        Ok(())
    }

    fn look_after(&self, supervisor: &mut Supervisor, now: Instant) {
        let Some(health) = supervisor.service.health.clone() else { return };
        match &supervisor.check {
            Some(check) if now >= check.until => {
                // It leads a session of its own, and so a process group.
                let _ = kill(Pid::from_raw(-check.pid), Signal::SIGKILL);
                let _ = kill(Pid::from_raw(check.pid), Signal::SIGKILL);
                supervisor.check = Some(Check { pid: check.pid, until: now + health.timeout() });
            }
            None if now >= supervisor.next_check => match self.check(&supervisor.service, &health) {
                Ok(pid) => supervisor.check = Some(Check { pid, until: now + health.timeout() }),
                Err(error) => {
                    eprintln!("casemate-init: cannot check the command: {error}");
                    supervisor.next_check = now + health.interval();
                }
            },
            _ => {}
        }
    }

    fn check(&self, service: &Service, health: &Health) -> Result<i32, InitError> {
        let null = step("open /dev/null", File::options().write(true).open("/dev/null"))?;
        self.run(service, health.command.clone(), null.into())
    }

    /// A session that nobody called for, with `output` as standard output and error.
    fn run(&self, service: &Service, command: Vec<String>, output: OwnedFd) -> Result<i32, InitError> {
        let request = Exec {
            session: SERVICE,
            command,
            login: false,
            environment: service.environment.clone(),
            directory: service.directory.clone(),
            directory_optional: true,
            root: service.root,
            terminal: None,
        };
        let null: OwnedFd = step("open /dev/null", File::open("/dev/null"))?.into();
        let error = step("copy a pipe", output.try_clone())?;
        // SAFETY: init has a single thread, and the child executes or ends without returning here.
        match step("fork", unsafe { fork() })? {
            ForkResult::Child => self.sessions.run(&request, Streams::Given([null, output, error])),
            ForkResult::Parent { child } => Ok(child.as_raw()),
        }
    }

    /// A child has ended. Sessions are reaped whether or not the supervisor knows them.
    pub fn supervised(&self, state: &mut State, pid: i32, status: ExitStatus) {
        let Some(supervisor) = &mut state.supervisor else { return };
        let now = Instant::now();
        let ended = supervisor.ended(pid, status, now);
        let health = supervisor.health;
        let (over, health_changed) = match ended {
            Ended::Command { over, health_changed } => (over, health_changed),
            Ended::Check { health_changed } => (false, health_changed),
            Ended::Other => return,
        };
        let restart = supervisor.service.health.as_ref().is_some_and(|health| health.restarts);
        if let (HealthState::Unhealthy, Phase::Running(command), None, true) =
            (health, &supervisor.phase, supervisor.ending, restart)
        {
            eprintln!("casemate-init: the command is unhealthy and is started again");
            let plan = &self.sessions.plan;
            let signal = Signal::try_from(plan.stop_signal).unwrap_or(Signal::SIGTERM);
            let _ = kill(Pid::from_raw(*command), signal);
            supervisor.ending = Some(now + Duration::from_secs(plan.stop_timeout));
        }
        if health_changed {
            notify(state, &Notice::Health { state: health });
        }
        if over {
            state.linger_no_longer();
            notify(state, &Notice::Linger { on: false });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervisor(restart: Restart, health: Option<Health>) -> Supervisor {
        let service = Service {
            command: vec!["x".into()],
            environment: vec![],
            directory: "/".into(),
            root: false,
            restart,
            health,
        };
        Supervisor::new(service, tempfile::tempfile().expect("a file").into())
    }

    #[test]
    fn when_it_is_started_again() {
        for (restart, status, again) in [
            (Restart::No, ExitStatus::Exit(1), false),
            (Restart::OnFailure, ExitStatus::Exit(0), false),
            (Restart::OnFailure, ExitStatus::Exit(1), true),
            (Restart::OnFailure, ExitStatus::Signal(9), true),
            (Restart::Always, ExitStatus::Exit(0), true),
        ] {
            let mut one = supervisor(restart, None);
            one.phase = Phase::Running(7);
            assert!(matches!(one.ended(8, status, Instant::now()), Ended::Other));
            let ended = one.ended(7, status, Instant::now());
            assert!(matches!(ended, Ended::Command { over, .. } if over != again), "{restart:?} {status:?}");
        }
    }

    #[test]
    fn it_waits_longer_each_time_until_it_has_run_for_a_while() {
        let mut one = supervisor(Restart::Always, None);
        let mut delays = Vec::new();
        let begin = Instant::now();
        for _ in 0..12 {
            (one.phase, one.began) = (Phase::Running(7), begin);
            one.ended(7, ExitStatus::Exit(1), begin + Duration::from_secs(1));
            delays.push(one.delay.as_millis());
        }
        assert_eq!(delays[..3], [200, 400, 800]);
        assert_eq!(delays[11], DELAY_MAX.as_millis());
        (one.phase, one.began) = (Phase::Running(7), begin);
        one.ended(7, ExitStatus::Exit(1), begin + STABLE);
        assert_eq!(one.delay, DELAY);
    }

    #[test]
    fn failures_in_a_row_after_the_start() {
        let health = Health {
            command: vec!["y".into()],
            interval_seconds: 1,
            timeout_seconds: 1,
            retries: 2,
            start_period_seconds: 5,
            restarts: false,
        };
        let mut one = supervisor(Restart::No, Some(health));
        let begin = one.began;
        let mut check = |after: u64, sound: bool| {
            let now = begin + Duration::from_secs(after);
            one.phase = Phase::Running(7);
            one.check = Some(Check { pid: 9, until: now });
            one.ended(9, ExitStatus::Exit(i32::from(!sound)), now);
            one.health
        };
        use HealthState::{Healthy, Starting, Unhealthy};
        for (after, sound, expected) in [
            (1, false, Starting),
            (2, false, Starting),
            (3, true, Healthy),
            (6, false, Healthy),
            (7, true, Healthy),
            (8, false, Healthy),
            (9, false, Unhealthy),
            (10, true, Healthy),
        ] {
            assert_eq!(check(after, sound), expected, "after {after} s");
        }
    }

    #[test]
    fn a_log_keeps_its_newer_half() {
        let file = tempfile::tempfile().expect("a file");
        let mut log = Log { file: file.try_clone().expect("copy"), pipe: None };
        let line = [[b'x'; 1023].as_slice(), b"\n"].concat();
        for _ in 0..LOG_MAX / 1024 {
            log.write(&line).expect("written");
        }
        assert_eq!(file.metadata().expect("size").len(), LOG_MAX);
        log.write(b"last\n").expect("written");
        let length = file.metadata().expect("size").len();
        // Nobody knows that the half began with a whole line.
        assert_eq!(length, LOG_MAX / 2 - 1024 + 5);
        let mut end = [0; 5];
        file.read_exact_at(&mut end, length - 5).expect("read");
        assert_eq!(&end, b"last\n");
    }
}
