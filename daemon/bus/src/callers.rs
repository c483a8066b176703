//! Who may call: processes of the same user that are in no environment nor other container. And how much at a time: the
//! session bus sets hardly any limits. The [gate](crate::gate) asks for every call.
//!
//! A verdict and a count are one connection's, known by its unique name, which a bus never gives twice; they go when the
//! connection does.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use casemate_engine::{Caller, Engine};
use casemate_interfaces::Error;
use futures_util::StreamExt;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::Notify;
use zbus::message::{Header, Type};
use zbus::names::BusName;
use zbus::{MatchRule, MessageStream};

use crate::DaemonError;

/// Levels of user namespaces that the kernel allows.
const DEPTH: usize = 33;

/// What one caller may have under way: calls, their bytes, their descriptors (sixteen times what Exec takes).
const EACH: Load = Load { calls: 64, bytes: 8 << 20, descriptors: 64 };
/// What all together may. For descriptors it is a quarter of this process's own limit.
const ALL: Load = Load { calls: 4_096, bytes: 32 << 20, descriptors: 256 };
/// Descriptors in one message: Exec has four.
const MESSAGE_DESCRIPTORS: usize = 8;

nix::ioctl_none!(ns_get_parent, 0xb7, 0x2);

/// A call on its way in.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub serial: NonZeroU32,
    /// Whether the caller wants a reply.
    pub wanted: bool,
    pub bytes: usize,
    pub descriptors: usize,
}

/// Why a call does not get in.
pub enum Refusal {
    Said(Error),
    /// Nobody to tell, or nothing that could be told without mixing up replies.
    Silent,
}

impl Refusal {
    pub fn too_long(caller: &str, length: usize, most: usize) -> Self {
        let text = format!("the message of {caller} has {length} bytes, more than the {most} that are taken");
        Self::Said(Error::TooManyRequests(text))
    }
}

/// What is under way.
#[derive(Debug, Clone, Copy, Default)]
struct Load {
    calls: usize,
    bytes: usize,
    descriptors: usize,
}

impl Load {
    fn with(self, call: &Call) -> Self {
        Self {
            calls: self.calls + 1,
            bytes: self.bytes + call.bytes,
            descriptors: self.descriptors + call.descriptors,
        }
    }

    fn without(self, call: &Call) -> Self {
        Self {
            calls: self.calls.saturating_sub(1),
            bytes: self.bytes.saturating_sub(call.bytes),
            descriptors: self.descriptors.saturating_sub(call.descriptors),
        }
    }

    /// What of it is more than `most`.
    fn excess(self, most: Self) -> Option<String> {
        let check = |what: &str, is: usize, most: usize| (is > most).then(|| format!("{most} {what}"));
        check("calls", self.calls, most.calls)
            .or_else(|| check("bytes", self.bytes, most.bytes))
            .or_else(|| check("descriptors", self.descriptors, most.descriptors))
    }
}

#[derive(Debug)]
struct Known {
    /// The user namespaces it is in, or why it may not call.
    verdict: Result<Vec<u64>, String>,
    calls: HashMap<NonZeroU32, Call>,
    load: Load,
    /// Left the bus; forgotten with the end of its last call.
    gone: bool,
}

#[derive(Debug, Default)]
struct Table {
    known: HashMap<String, Known>,
    load: Load,
}

pub struct Callers {
    pid_namespace: (u64, u64),
    uid: u32,
    /// What all callers together may have under way.
    most: Load,
    engine: Arc<Engine>,
    /// A connection of its own, since the main one stands still while its gate judges.
    bus: zbus::fdo::DBusProxy<'static>,
    table: Mutex<Table>,
    drained: Notify,
}

impl std::fmt::Debug for Callers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Callers").finish_non_exhaustive()
    }
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

/// The departure of one caller.
fn departure(caller: &str) -> zbus::Result<MatchRule<'_>> {
    MatchRule::builder()
        .msg_type(Type::Signal)
        .sender("org.freedesktop.DBus")
        .interface("org.freedesktop.DBus")
        .member("NameOwnerChanged")
        .arg(0, caller)
        .build()
}

impl Callers {
    pub async fn new(engine: Arc<Engine>) -> Result<Arc<Self>, DaemonError> {
        let own = "/proc/self/ns/pid";
        let pid_namespace = open(own).and_then(identity).map_err(|source| DaemonError::Io {
            action: "look at",
            path: own.into(),
            source,
        })?;
        let connection = zbus::connection::Builder::session().build().await.map_err(DaemonError::Bus)?;
        let bus = zbus::fdo::DBusProxy::new(&connection).await.map_err(DaemonError::Bus)?;
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let quarter = limit.map_or(usize::MAX, |limit| usize::try_from(limit / 4).unwrap_or(usize::MAX));
        let callers = Arc::new(Self {
            pid_namespace,
            uid: rustix::process::getuid().as_raw(),
            most: Load { descriptors: quarter.min(4_096), ..ALL },
            engine,
            bus,
            table: Mutex::default(),
            drained: Notify::new(),
        });
        tokio::spawn(Arc::clone(&callers).watch(MessageStream::from(&connection)));
        Ok(callers)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Counters are set, never left half way: a panic elsewhere changes nothing here.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forget callers that leave.
    async fn watch(self: Arc<Self>, mut messages: MessageStream) {
        while let Some(message) = messages.next().await {
            let Ok(message) = message else { continue };
            let header = message.header();
            if header.member().is_none_or(|member| member.as_str() != "NameOwnerChanged")
                || header.sender().is_none_or(|sender| sender.as_str() != "org.freedesktop.DBus")
            {
                continue;
            }
            let Ok((name, _, new)) = message.body().deserialize::<(String, String, String)>() else {
                continue;
            };
            if new.is_empty() {
                self.left(&name);
            }
        }
    }

    fn left(self: &Arc<Self>, caller: &str) {
        {
            let mut table = self.table();
            let Some(known) = table.known.get_mut(caller) else { return };
            known.gone = true;
            if known.calls.is_empty() {
                table.known.remove(caller);
            }
        }
        // A task of its own: who reads the bus's messages must not wait for one.
        let (callers, caller) = (Arc::clone(self), caller.to_owned());
        tokio::spawn(async move {
            if let Ok(rule) = departure(&caller)
                && let Err(error) = callers.bus.remove_match_rule(rule).await
            {
                tracing::debug!(caller, %error, "its departure is still watched for");
            }
        });
    }

    /// Let a call in, or say why not. It counts until it is [`answered`](Self::answered).
    pub async fn admit(self: &Arc<Self>, caller: &str, call: Call) -> Result<(), Refusal> {
        if !self.table().known.contains_key(caller) {
            // The gate alone calls this, one message after the other: nobody else looks at the same caller meanwhile. It
            // is known before it is looked at, so that its departure finds it.
            let verdict = Err("it has not been judged".to_owned());
            let known = Known { verdict, calls: HashMap::new(), load: Load::default(), gone: false };
            self.table().known.insert(caller.to_owned(), known);
            let verdict = self.look(caller).await;
            if verdict.is_err() && !self.is_there(caller).await {
                self.left(caller);
                return Err(Refusal::Silent);
            }
            if let Some(known) = self.table().known.get_mut(caller) {
                known.verdict = verdict;
            }
        }
        let inside = self.engine.environment_namespaces();
        let mut table = self.table();
        let all = table.load.with(&call);
        let Some(known) = table.known.get_mut(caller) else { return Err(Refusal::Silent) };
        let ancestors = known.verdict.as_ref().map_err(|reason| Refusal::Said(denied(reason)))?;
        if ancestors.iter().any(|namespace| inside.contains(namespace)) {
            return Err(Refusal::Said(denied("it comes from inside an environment")));
        }
        let many = |text: String| Err(Refusal::Said(Error::TooManyRequests(text)));
        if call.descriptors > MESSAGE_DESCRIPTORS {
            return many(format!(
                "a message may have {MESSAGE_DESCRIPTORS} descriptors, not {}",
                call.descriptors
            ));
        }
        let each = known.load.with(&call);
        if let Some(limit) = each.excess(EACH) {
            return many(format!("you have more than {limit} under way; wait for replies"));
        }
        if let Some(limit) = all.excess(self.most) {
            return many(format!("more than {limit} are under way for all callers; try again"));
        }
        if known.calls.contains_key(&call.serial) {
            // A reply could not tell the two apart.
            return Err(Refusal::Silent);
        }
        known.calls.insert(call.serial, call);
        known.load = each;
        table.load = all;
        Ok(())
    }

    /// The reply to a call leaves. Whether the caller wants it.
    pub fn answered(&self, caller: &str, serial: NonZeroU32) -> bool {
        let mut table = self.table();
        let Some(known) = table.known.get_mut(caller) else { return true };
        let Some(call) = known.calls.remove(&serial) else { return true };
        known.load = known.load.without(&call);
        let forget = known.gone && known.calls.is_empty();
        table.load = table.load.without(&call);
        if forget {
            table.known.remove(caller);
        }
        if table.load.calls == 0 {
            self.drained.notify_waiters();
        }
        call.wanted
    }

    /// Until no call is under way.
    pub async fn drained(&self) {
        loop {
            let mut next = std::pin::pin!(self.drained.notified());
            next.as_mut().enable();
            if self.table().load.calls == 0 {
                return;
            }
            next.await;
        }
    }

    /// Who sent a message. The gate has judged them.
    pub fn caller(header: &Header<'_>) -> Result<Caller, Error> {
        let sender = header.sender().ok_or_else(|| denied("the message has no sender"))?;
        Ok(Caller(sender.to_string()))
    }

    async fn credentials(&self, caller: &str) -> Result<(u32, u32, Option<OwnedFd>), String> {
        let name = BusName::try_from(caller).map_err(|error| error.to_string())?;
        let credentials = self
            .bus
            .get_connection_credentials(name)
            .await
            .map_err(|error| format!("its bus connection is gone: {error}"))?;
        let uid = credentials.unix_user_id().ok_or("the bus does not tell its user")?;
        let pid = credentials.process_id().ok_or("the bus does not tell its process")?;
        let held = credentials.into_process_fd().map(OwnedFd::from);
        Ok((uid, pid, held))
    }

    async fn is_there(&self, caller: &str) -> bool {
        match BusName::try_from(caller) {
            Ok(name) => self.bus.name_has_owner(name).await.unwrap_or(false),
            Err(_) => false,
        }
    }

    /// Watch for its departure, and look at it.
    async fn look(&self, caller: &str) -> Result<Vec<u64>, String> {
        let rule = departure(caller).map_err(|error| error.to_string())?;
        // The rule is sent first: a caller that leaves between the two is missing in the second.
        let (watched, judged) = tokio::join!(self.bus.add_match_rule(rule), self.ancestry(caller));
        watched.map_err(|error| format!("the bus does not tell when it leaves: {error}"))?;
        judged
    }

    /// The user namespaces of a caller whose user and pid namespace are ours.
    async fn ancestry(&self, caller: &str) -> Result<Vec<u64>, String> {
        let (uid, pid, held) = self.credentials(caller).await?;
        if uid != self.uid {
            return Err(format!("it is user {uid}'s, this daemon serves user {}", self.uid));
        }
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or("it is in another pid namespace")?;
        let by_bus = held.is_some();
        let process = match held {
            Some(process) => process,
            None => pidfd_open(raw, PidfdFlags::empty())
                .map_err(|error| format!("its process is gone: {error}"))?,
        };
        let look = || -> std::io::Result<((u64, u64), Vec<u64>)> {
            let pids = identity(open(&format!("/proc/{pid}/ns/pid"))?)?;
            Ok((pids, ancestry(open(&format!("/proc/{pid}/ns/user"))?)?))
        };
        let (pids, ancestors) = look().map_err(|error| format!("its namespaces cannot be read: {error}"))?;
        if !by_bus {
            // The connection lives, and the bus names the same pid: what was read was the caller's, not a successor's.
            let (_, again, _) = self.credentials(caller).await?;
            if again != pid {
                return Err("its process changed".to_owned());
            }
        }
        let mut poll = [rustix::event::PollFd::new(&process, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        match rustix::io::retry_on_intr(|| rustix::event::poll(&mut poll, Some(&now))) {
            Ok(0) => {}
            Ok(_) => return Err("its process is gone".to_owned()),
            Err(error) => return Err(format!("its process cannot be watched: {error}")),
        }
        if pids != self.pid_namespace {
            return Err("it comes from another pid namespace (a container or an environment)".to_owned());
        }
        Ok(ancestors)
    }
}
