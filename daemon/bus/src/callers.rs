//! Who may call: processes of the same user that are in no environment nor other container.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Mutex;

use casemate_engine::{Caller, Engine};
use casemate_interfaces::Error;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use zbus::Connection;
use zbus::message::Header;
use zbus::names::BusName;

/// Verdicts kept, each for one connection; unique names are never used again on a bus.
const KEPT: usize = 4_096;
/// Levels of user namespaces that the kernel allows.
const DEPTH: usize = 33;

nix::ioctl_none!(ns_get_parent, 0xb7, 0x2);

pub struct Callers {
    pid_namespace: (u64, u64),
    uid: u32,
    /// With the number of running environments' namespaces when they were judged: more of them, and the verdict is renewed.
    judged: Mutex<HashMap<String, Vec<u64>>>,
}

fn denied(reason: impl std::fmt::Display) -> Error {
    Error::AccessDenied(format!("call refused: {reason}"))
}

fn open(path: &str) -> std::io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

fn identity(descriptor: impl AsFd) -> std::io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(descriptor)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// A user namespace and its ancestors, as far as they can be seen.
fn ancestry(namespace: OwnedFd) -> std::io::Result<Vec<u64>> {
    let mut found = vec![identity(&namespace)?.1];
    let mut current = namespace;
    for _ in 0..DEPTH {
        // SAFETY: NS_GET_PARENT takes a namespace's descriptor and no argument, and returns a new descriptor.
        let parent = match unsafe { ns_get_parent(current.as_raw_fd()) } {
            // SAFETY: the kernel has just made this descriptor for us.
            Ok(raw) => unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw) },
            // The top, or out of our sight.
            Err(_) => break,
        };
        found.push(identity(&parent)?.1);
        current = parent;
    }
    Ok(found)
}

impl Callers {
    pub fn new() -> Result<Self, String> {
        let own = open("/proc/self/ns/pid")
            .and_then(identity)
            .map_err(|error| format!("/proc/self/ns/pid: {error}"))?;
        Ok(Self { pid_namespace: own, uid: rustix::process::getuid().as_raw(), judged: Mutex::default() })
    }

    /// Judge the sender of a message.
    pub async fn judge(
        &self,
        engine: &Engine,
        connection: &Connection,
        header: &Header<'_>,
    ) -> Result<Caller, Error> {
        let sender = header.sender().ok_or_else(|| denied("the message has no sender"))?.to_string();
        let inside = engine.environment_namespaces();
        let known =
            self.judged.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get(&sender).cloned();
        let ancestors = match known {
            Some(ancestors) => ancestors,
            None => {
                let ancestors = self.look(connection, &sender).await?;
                let mut judged = self.judged.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                if judged.len() >= KEPT {
                    judged.clear();
                }
                judged.insert(sender.clone(), ancestors.clone());
                ancestors
            }
        };
        if ancestors.iter().any(|namespace| inside.contains(namespace)) {
            return Err(denied("it comes from inside an environment"));
        }
        Ok(Caller(sender))
    }

    async fn credentials(
        &self,
        connection: &Connection,
        sender: &str,
    ) -> Result<(u32, u32, Option<OwnedFd>), Error> {
        let bus = zbus::fdo::DBusProxy::new(connection).await?;
        let name = BusName::try_from(sender).map_err(denied)?;
        let credentials = bus
            .get_connection_credentials(name)
            .await
            .map_err(|error| denied(format!("its bus connection is gone: {error}")))?;
        let uid = credentials.unix_user_id().ok_or_else(|| denied("the bus does not tell its user"))?;
        let pid = credentials.process_id().ok_or_else(|| denied("the bus does not tell its process"))?;
        let held = credentials.into_process_fd().map(OwnedFd::from);
        Ok((uid, pid, held))
    }

    /// The user namespaces of a caller whose user and pid namespace are ours.
    async fn look(&self, connection: &Connection, sender: &str) -> Result<Vec<u64>, Error> {
        let (uid, pid, held) = self.credentials(connection, sender).await?;
        if uid != self.uid {
            return Err(denied(format!("it is user {uid}'s, this daemon serves user {}", self.uid)));
        }
        let raw = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| denied("it is in another pid namespace"))?;
        let by_bus = held.is_some();
        let process = match held {
            Some(process) => process,
            None => pidfd_open(raw, PidfdFlags::empty())
                .map_err(|error| denied(format!("its process is gone: {error}")))?,
        };
        let look = || -> std::io::Result<((u64, u64), Vec<u64>)> {
            let pids = identity(open(&format!("/proc/{pid}/ns/pid"))?)?;
            Ok((pids, ancestry(open(&format!("/proc/{pid}/ns/user"))?)?))
        };
        let (pids, ancestors) =
            look().map_err(|error| denied(format!("its namespaces cannot be read: {error}")))?;
        if !by_bus {
            // The connection lives, and the bus names the same pid: what was read was the caller's, not a successor's.
            let (_, again, _) = self.credentials(connection, sender).await?;
            if again != pid {
                return Err(denied("its process changed"));
            }
        }
        let mut poll = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if rustix::event::poll(&mut poll, Some(&now)).map_err(denied)? != 0 {
            return Err(denied("its process is gone"));
        }
        if pids != self.pid_namespace {
            return Err(denied("it comes from another pid namespace (a container or an environment)"));
        }
        Ok(ancestors)
    }
}
