//! A worker's main: confine, read the request, work, say how it ended.

use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::confine::{Profile, User, close_from, confine, exit};
use crate::protocol::{Envelope, Event, FD_EVENTS, FD_FIRST, Failure, FailureKind, PROTOCOL, REQUEST_MAX};

/// Progress is told about this often at most.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// The pipe that events go down.
pub struct Events {
    pipe: std::fs::File,
    last: Option<Instant>,
}

impl Events {
    fn send<T: Serialize>(&mut self, event: &Event<T>) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.pipe.write_all(&line)
    }

    /// How far the work is; totals are 0 where they are not known. A daemon that no longer listens ends the worker by
    /// other means, so a failed write is of no interest here.
    pub fn progress(&mut self, bytes: u64, bytes_total: u64, items: u64, items_total: u64) {
        if self.last.is_some_and(|last| last.elapsed() < PROGRESS_EVERY) {
            return;
        }
        self.last = Some(Instant::now());
        let _ = self.send::<()>(&Event::Progress { bytes, bytes_total, items, items_total });
    }
}

impl Failure {
    pub fn new(kind: FailureKind, subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind, subject: subject.into(), message: message.into() }
    }

    /// A system error: a full disk is told apart.
    pub fn io(subject: impl Into<String>, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        let kind = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => FailureKind::Full,
            _ => FailureKind::Io,
        };
        Self::new(kind, subject, error.to_string())
    }
}

/// Run a worker: `prepare` before it is confined, reading system configuration alone; `work` after.
pub fn run<P, Q: DeserializeOwned, R: Serialize>(
    profile: &Profile,
    prepare: impl FnOnce() -> Result<P, Failure>,
    work: impl FnOnce(P, Q, &mut Events) -> Result<R, Failure>,
) -> ExitCode {
    // SAFETY: the daemon opened FD_EVENTS for this process; nobody else takes it.
    let mut events = Events { pipe: unsafe { std::fs::File::from_raw_fd(FD_EVENTS) }, last: None };
    let outcome = (|| {
        close_from(FD_FIRST + profile.descriptors)?;
        let user = User::from_arguments(std::env::args().skip(1))?;
        let prepared = prepare();
        let layers = confine(profile, user, || events.send::<()>(&Event::Unshared))?;
        Ok::<_, crate::confine::ConfineError>((prepared, layers))
    })();
    let (prepared, layers) = match outcome {
        Ok(confined) => confined,
        Err(error) => {
            eprintln!("{}: {error}", profile.name);
            return exit::UNCONFINED.into();
        }
    };
    if events.send::<()>(&Event::Confined { layers }).is_err() {
        return exit::REQUEST.into();
    }
    let mut bytes = Vec::new();
    let read = std::io::stdin().lock().take(REQUEST_MAX as u64 + 1).read_to_end(&mut bytes);
    let request: Result<Envelope<Q>, String> = match read {
        Err(error) => Err(error.to_string()),
        Ok(count) if count > REQUEST_MAX => Err(format!("longer than {REQUEST_MAX} bytes")),
        Ok(_) => serde_json::from_slice(&bytes).map_err(|error| error.to_string()),
    };
    let request = match request {
        Ok(envelope) if envelope.protocol == PROTOCOL => envelope.request,
        Ok(envelope) => {
            eprintln!(
                "{}: the daemon speaks protocol {}, this worker {PROTOCOL}",
                profile.name, envelope.protocol
            );
            return exit::REQUEST.into();
        }
        Err(error) => {
            eprintln!("{}: the request cannot be read: {error}", profile.name);
            return exit::REQUEST.into();
        }
    };
    let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        prepared.and_then(|prepared| work(prepared, request, &mut events))
    }));
    let sent = match worked {
        Err(_) => return exit::PANIC.into(),
        Ok(Ok(result)) => events.send(&Event::Done { result }),
        Ok(Err(failure)) => events.send::<()>(&Event::Failed { failure }),
    };
    if sent.is_ok() { exit::OK.into() } else { exit::REQUEST.into() }
}
