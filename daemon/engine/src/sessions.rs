//! Sessions of an environment: started through its init, signalled.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use casemate_sandbox::control::{Exec, Reply, Request, Size};
use casemate_store::Id;

use crate::api::{Change, ExecRequest, ProcessInfo, Started, State, Streams};
use crate::control::ControlError;
use crate::environments::Wanted;
use crate::error::Error;
use crate::jobs::now;
use crate::state::{Step, step};
use crate::{Inner, configuration};

/// Starts of an environment for one session: others' last sessions may end, and the environment with them, just before.
const ATTEMPTS: u32 = 8;

impl Inner {
    pub(crate) async fn exec(self: &Arc<Self>, id: &Id, request: ExecRequest) -> Result<Started, Error> {
        let (record, account) = self.with_environment(id, |environment| {
            (environment.record.clone(), self.account(&environment.record.layers))
        })?;
        let environment = casemate_manifest::session_variables(
            &configuration::policy(&self.settings.configuration)?,
            &casemate_manifest::SessionAccount {
                name: if request.root { "root" } else { &account.name },
                uid: if request.root { 0 } else { account.uid },
                home: if request.root { "/root" } else { &account.home },
                shell: &account.shell,
            },
            &request.variables,
            &record.variables,
            request.root,
        )?;
        let (terminal, streams): (_, Vec<OwnedFd>) = match request.streams {
            Streams::Given { input, output, error } => (None, vec![input, output, error]),
            Streams::Terminal { rows, columns } => (Some(Size { rows, columns }), vec![]),
        };
        let mut command = request.command;
        if command.is_empty() {
            command = vec![account.shell.clone(), "-l".into()];
        }
        let session = self.next_session();
        let home = if request.root { "/root".to_owned() } else { account.home };
        let message = Request::Exec(Exec {
            session,
            command: command.clone(),
            environment,
            directory_optional: request.directory.is_none(),
            directory: request.directory.unwrap_or(home),
            root: request.root,
            terminal,
        });
        let key = id.to_string();
        let mut descriptors: Vec<_> = streams.iter().map(AsFd::as_fd).collect();
        descriptors.push(request.status.as_fd());
        // An environment that stops by itself may do so between our look and our request: then it is started again.
        for attempt in 1..=ATTEMPTS {
            let wanted = Wanted { step: Step::Enter, linger: false, unenforced_limits: false };
            let sandbox = self.ensure_running(id, wanted).await?;
            let info = ProcessInfo {
                id: (key.clone(), session),
                pid: 0,
                command: command.clone(),
                root: request.root,
                terminal: terminal.is_some(),
                started_at: now(),
            };
            self.with_environment(id, |environment| environment.sessions.insert(session, info))?;
            let forget = || self.with_environment(id, |environment| environment.sessions.remove(&session));
            let mut control = sandbox.control.lock().await;
            if sandbox.paused.load(Ordering::Relaxed) {
                // Between our look and now; frozen, init would not answer.
                forget()?;
                step(&record.name, State::Paused, Step::Enter)?;
            }
            let answer = control.ask(&message, &descriptors).await;
            drop(control);
            match answer {
                Ok((Reply::Started { pid, .. }, received)) => {
                    let mut received = received.into_iter();
                    let pidfd = received.next().ok_or_else(|| Error::Sandbox {
                        name: record.name.clone(),
                        message: "init sent no pidfd".into(),
                    })?;
                    let there = self.with_environment(id, |environment| {
                        environment.sessions.get_mut(&session).map(|known| known.pid = pid).is_some()
                    })?;
                    if there {
                        self.tell(Change::ProcessAdded((key.clone(), session)));
                        self.tell(Change::EnvironmentChanged(key.clone()));
                    }
                    return Ok(Started { process: (key, session), pidfd, terminal: received.next() });
                }
                Err(ControlError::Closed) if attempt < ATTEMPTS => {
                    forget()?;
                    self.ended(id, &sandbox).await?;
                }
                Ok((reply, _)) => {
                    forget()?;
                    let message = format!("init answered {reply:?} to exec");
                    return Err(Error::Sandbox { name: record.name, message });
                }
                Err(ControlError::TooLong(bytes)) => {
                    forget()?;
                    return Err(Error::Argument(ControlError::TooLong(bytes).to_string()));
                }
                Err(error) => {
                    forget()?;
                    return Err(Error::Sandbox { name: record.name, message: error.to_string() });
                }
            }
        }
        Err(Error::Sandbox {
            name: record.name,
            message: format!("it stopped {ATTEMPTS} times while a session was to start"),
        })
    }

    pub(crate) async fn signal(&self, id: &Id, session: u64, signal: i32) -> Result<(), Error> {
        let (name, state, sandbox) = self.with_environment(id, |environment| {
            (
                environment.record.name.clone(),
                environment.state(),
                environment.sandbox.clone().filter(|_| environment.sessions.contains_key(&session)),
            )
        })?;
        let sandbox = sandbox.ok_or_else(|| Error::NotFound {
            what: "process",
            name: session.to_string(),
            remedy: "it has ended",
        })?;
        step(&name, state, Step::Signal)?;
        let mut control = sandbox.control.lock().await;
        control
            .ask(&Request::Signal { session, signal }, &[])
            .await
            .map(|_| ())
            .map_err(|error| Error::Sandbox { name, message: error.to_string() })
    }
}
