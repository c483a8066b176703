//! Sessions of an environment: started through its init, signalled.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use casemate_sandbox::control::{Exec, Reply, Request, Size};
use casemate_sandbox::plan::Account;
use casemate_store::Id;

use crate::api::{Change, ExecRequest, ProcessInfo, Started, State, Streams};
use crate::control::ControlError;
use crate::environments::Wanted;
use crate::error::Error;
use crate::jobs::now;
use crate::records::{EnvironmentRecord, MountRecord};
use crate::state::{Step, step};
use crate::{Inner, configuration};

/// Starts of an environment for one session: others' last sessions may end, and the environment with them, just before.
const ATTEMPTS: u32 = 8;

/// Where a directory of the host is inside, if it is in a mount. The longest mount counts, as it covers others.
fn inside(mounts: &[MountRecord], host: &str) -> Option<String> {
    let below = |mount: &MountRecord| Path::new(host).strip_prefix(&mount.host).ok().map(Path::to_owned);
    let mounted = mounts.iter().filter_map(|mount| Some((mount, below(mount)?)));
    let (mount, rest) = mounted.max_by_key(|(mount, _)| mount.host.len())?;
    Path::new(&mount.target).join(rest).to_str().map(str::to_owned)
}

/// The same for an init before version 3, which knows no login shells: by the shell that we would choose.
fn before_login(exec: Exec, shell: &str) -> Exec {
    if !exec.login {
        return exec;
    }
    let mut command = vec![shell.to_owned(), "-l".to_owned()];
    if !exec.command.is_empty() {
        command.extend(["-c", "exec \"$@\"", shell].map(str::to_owned));
        command.extend(exec.command);
    }
    Exec { login: false, command, ..exec }
}

impl Inner {
    /// `NAME=value`, complete; `client` is what the caller sent.
    pub(crate) fn session_variables(
        &self,
        record: &EnvironmentRecord,
        account: &Account,
        client: &[(String, String)],
        root: bool,
    ) -> Result<Vec<String>, Error> {
        let account = casemate_manifest::SessionAccount {
            name: if root { "root" } else { &account.name },
            uid: if root { 0 } else { account.uid },
            home: if root { "/root" } else { &account.home },
            shell: &account.shell,
        };
        let policy = configuration::policy(&self.settings.configuration)?;
        Ok(casemate_manifest::session_variables(&policy, &account, client, &record.variables, root)?)
    }

    pub(crate) async fn exec(self: &Arc<Self>, id: &Id, request: ExecRequest) -> Result<Started, Error> {
        let (record, account) = self.with_environment(id, |environment| {
            (environment.record.clone(), self.account(&environment.record.layers))
        })?;
        let environment = self.session_variables(&record, &account, &request.variables, request.root)?;
        let (terminal, streams): (_, Vec<OwnedFd>) = match request.streams {
            Streams::Given { input, output, error } => (None, vec![input, output, error]),
            Streams::Terminal { rows, columns } => (Some(Size { rows, columns }), vec![]),
        };
        let login = request.login || request.command.is_empty();
        let shown = match request.command.is_empty() {
            true => vec![format!("-{}", account.shell.rsplit('/').next().unwrap_or_default())],
            false => request.command.clone(),
        };
        let session = self.next_session();
        let home = if request.root { "/root" } else { &account.home };
        let mapped = || request.host_directory.as_deref().and_then(|host| inside(&record.mounts, host));
        let exec = Exec {
            session,
            command: request.command,
            login,
            environment,
            directory_optional: request.directory.is_none(),
            directory: request.directory.or_else(mapped).unwrap_or_else(|| home.to_owned()),
            root: request.root,
            terminal,
        };
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
                command: shown.clone(),
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
            let message = match sandbox.protocol.load(Ordering::Relaxed) {
                0..3 => before_login(exec.clone(), &account.shell),
                _ => exec.clone(),
            };
            let answer = control.ask(&Request::Exec(message), &descriptors).await;
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
                Err(error @ ControlError::TooLong(_)) => {
                    forget()?;
                    return Err(Error::Command(error));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_the_host_inside() {
        let mount = |host: &str, target: &str| MountRecord {
            requested: host.into(),
            host: host.into(),
            target: target.into(),
            read_only: false,
            beneath_manifest: false,
        };
        let mounts = [mount("/home/ann/work", "/workspace"), mount("/home/ann/work/data", "/data")];
        for (host, expected) in [
            ("/home/ann/work", Some("/workspace")),
            ("/home/ann/work/src/a", Some("/workspace/src/a")),
            ("/home/ann/work/data/x", Some("/data/x")),
            ("/home/ann/workshop", None),
            ("/home/ann", None),
        ] {
            let found = inside(&mounts, host);
            assert_eq!(found.as_deref().map(|path| path.trim_end_matches('/')), expected, "{host}");
        }
    }
}
