//! `org.casemate.Casemate1.Environment`.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

use casemate_engine::{EnvironmentInfo, ExecRequest, Streams, Usage};
use casemate_interfaces::{Error, process_path, snapshot_path};
use rustix::fs::FileType;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, OwnedFd, OwnedObjectPath, fdo, interface};

use crate::Context;
use crate::callers::Callers;
use crate::changes::{add_snapshot, job_started};
use crate::convert::{Options, error, known, option};

/// Most bytes of a command line: what fits into one packet to init, less variables.
const COMMAND_MAX: usize = 96 << 10;

/// A snapshot in short: object, name, message, when it was made, whether a restore made it, state.
type ListedSnapshot = (OwnedObjectPath, String, String, u64, bool, String);

pub struct Environment {
    pub context: Context,
    pub id: String,
}

/// What may become a session's stream: nothing that could be reopened from inside with other rights.
fn judge_stream(name: &str, descriptor: impl AsFd) -> Result<(), Error> {
    let refused =
        |what: &str| Err(Error::InvalidArgument(format!("{name} is {what}; relay it through a pipe")));
    let stat =
        rustix::fs::fstat(&descriptor).map_err(|error| Error::InvalidArgument(format!("{name}: {error}")))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => Ok(()),
        FileType::CharacterDevice if !rustix::termios::isatty(&descriptor) => Ok(()),
        FileType::CharacterDevice => refused("a terminal"),
        FileType::RegularFile => refused("a regular file"),
        FileType::Directory => Err(Error::InvalidArgument(format!("{name} is a directory"))),
        _ => refused("neither pipe, socket nor device"),
    }
}

fn judge_status(descriptor: impl AsFd) -> Result<(), Error> {
    let bad = || Error::InvalidArgument("status is not the write end of a pipe".into());
    let stat = rustix::fs::fstat(&descriptor).map_err(|_| bad())?;
    let flags = rustix::fs::fcntl_getfl(&descriptor).map_err(|_| bad())?;
    let writable = flags.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR);
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo && writable { Ok(()) } else { Err(bad()) }
}

/// What is written to for a caller: nothing that the worker could do more with.
fn judge_output(descriptor: impl AsFd) -> Result<(), Error> {
    let bad = || Error::InvalidArgument("output is neither a pipe nor a file that can be written to".into());
    let stat = rustix::fs::fstat(&descriptor).map_err(|_| bad())?;
    let flags = rustix::fs::fcntl_getfl(&descriptor).map_err(|_| bad())?;
    let writable = flags.intersects(rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::RDWR);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::RegularFile if writable => Ok(()),
        _ => Err(bad()),
    }
}

struct Asked {
    root: bool,
    directory: Option<String>,
    host_directory: Option<String>,
    login: bool,
    variables: Vec<(String, String)>,
}

fn asked(command: &[String], options: &Options) -> Result<Asked, Error> {
    known(options, &["root", "directory", "host-directory", "login", "variables"])?;
    if command.iter().map(|word| word.len() + 1).sum::<usize>() > COMMAND_MAX {
        return Err(Error::InvalidArgument(format!("the command line is longer than {COMMAND_MAX} bytes")));
    }
    if command.iter().any(|word| word.contains('\0')) {
        return Err(Error::InvalidArgument("the command line holds a NUL".into()));
    }
    let path = |name: &str| match option::<String>(options, name)? {
        Some(path) if !path.starts_with('/') => {
            Err(Error::InvalidArgument(format!("{name} is not an absolute path")))
        }
        path => Ok(path),
    };
    let (directory, host_directory) = (path("directory")?, path("host-directory")?);
    let variables: HashMap<String, String> = option(options, "variables")?.unwrap_or_default();
    let mut variables: Vec<_> = variables.into_iter().collect();
    variables.sort();
    let flag = |name: &str| Ok::<_, Error>(option(options, name)?.unwrap_or(false));
    Ok(Asked { root: flag("root")?, directory, host_directory, login: flag("login")?, variables })
}

impl Asked {
    fn request(self, command: Vec<String>, streams: Streams, status: OwnedFd) -> ExecRequest {
        let Self { root, directory, host_directory, login, variables } = self;
        let status = status.into();
        ExecRequest { command, streams, status, root, directory, host_directory, login, variables }
    }
}

impl Environment {
    /// As systemd has it: the highest number where nothing is counted.
    fn used(&self, of: impl FnOnce(Usage) -> Option<u64>) -> u64 {
        self.context.engine.usage(&self.id).ok().and_then(of).unwrap_or(u64::MAX)
    }

    fn info(&self) -> fdo::Result<EnvironmentInfo> {
        self.context
            .engine
            .environment(&self.id)
            .map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }
}

#[interface(name = "org.casemate.Casemate1.Environment")]
impl Environment {
    #[allow(clippy::too_many_arguments)]
    pub async fn exec(
        &self,
        command: Vec<String>,
        input: OwnedFd,
        output: OwnedFd,
        error: OwnedFd,
        status: OwnedFd,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, OwnedFd), Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        let asked = asked(&command, &options)?;
        if command.is_empty() && !asked.login {
            return Err(Error::InvalidArgument("the command is empty".into()));
        }
        judge_stream("input", &input)?;
        judge_stream("output", &output)?;
        judge_stream("error", &error)?;
        judge_status(&status)?;
        let streams = Streams::Given { input: input.into(), output: output.into(), error: error.into() };
        let request = asked.request(command, streams, status);
        let started = engine.exec(&caller, &self.id, request).await.map_err(crate::convert::error)?;
        Ok((process_path(&started.process.0, started.process.1), started.pidfd.into()))
    }

    #[allow(clippy::too_many_arguments)]
    async fn open_terminal(
        &self,
        command: Vec<String>,
        status: OwnedFd,
        rows: u16,
        columns: u16,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, OwnedFd, OwnedFd), Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        let asked = asked(&command, &options)?;
        judge_status(&status)?;
        let streams = Streams::Terminal { rows, columns };
        let request = asked.request(command, streams, status);
        let started = engine.exec(&caller, &self.id, request).await.map_err(error)?;
        let terminal =
            started.terminal.ok_or_else(|| Error::SandboxFailed("init sent no terminal".into()))?;
        Ok((process_path(&started.process.0, started.process.1), started.pidfd.into(), terminal.into()))
    }

    async fn start(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["unenforced-limits"])?;
        let unenforced_limits = option(&options, "unenforced-limits")?.unwrap_or(false);
        let started = engine.start(&caller, &self.id, unenforced_limits);
        job_started(connection, &self.context, started).await
    }

    async fn restart(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["timeout", "unenforced-limits"])?;
        let timeout = option(&options, "timeout")?.map(Duration::from_millis);
        let unenforced_limits = option(&options, "unenforced-limits")?.unwrap_or(false);
        let started = engine.restart(&caller, &self.id, timeout, unenforced_limits);
        job_started(connection, &self.context, started).await
    }

    async fn kill(
        &self,
        signal: i32,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.kill(&caller, &self.id, signal)).await
    }

    async fn pause(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.pause(&caller, &self.id, true)).await
    }

    async fn unpause(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.pause(&caller, &self.id, false)).await
    }

    async fn set_limits(
        &self,
        limits: Options,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        let before = engine.environment(&self.id).map_err(error)?.limits;
        let limits = crate::limits::changed(before, &limits)?;
        job_started(connection, &self.context, engine.limit(&caller, &self.id, limits)).await
    }

    async fn stop(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["timeout"])?;
        let timeout = option(&options, "timeout")?.map(Duration::from_millis);
        job_started(connection, &self.context, engine.stop(&caller, &self.id, timeout)).await
    }

    async fn commit(
        &self,
        message: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["name"])?;
        let name: Option<String> = option(&options, "name")?;
        let started = engine.commit(&caller, &self.id, message, name.as_deref());
        job_started(connection, &self.context, started).await
    }

    async fn list_snapshots(
        &self,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<Vec<ListedSnapshot>, Error> {
        known(&options, &[])?;
        let mut listed = Vec::new();
        for one in self.context.engine.snapshots_of(&self.id).map_err(error)? {
            let path = snapshot_path(&self.id, &one.name);
            add_snapshot(connection, &self.context, &self.id, &one.name).await?;
            listed.push((path, one.name, one.message, one.created_at, one.automatic, one.state));
        }
        Ok(listed)
    }

    async fn get_snapshot(
        &self,
        name: &str,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        known(&options, &[])?;
        let info = self.context.engine.snapshot(&self.id, name).map_err(error)?;
        add_snapshot(connection, &self.context, &self.id, &info.name).await?;
        Ok(snapshot_path(&self.id, &info.name))
    }

    async fn rollback(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["discard"])?;
        let discard = option(&options, "discard")?.unwrap_or(false);
        job_started(connection, &self.context, engine.rollback(&caller, &self.id, discard)).await
    }

    async fn clone_as(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        let started = engine.clone_environment(&caller, &self.id, name, None);
        job_started(connection, &self.context, started).await
    }

    async fn diff(
        &self,
        output: OwnedFd,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["snapshot", "patch"])?;
        judge_output(&output)?;
        let snapshot: Option<String> = option(&options, "snapshot")?;
        let patch = option(&options, "patch")?.unwrap_or(false);
        let started = engine.diff(&caller, &self.id, snapshot.as_deref(), patch, output.into());
        job_started(connection, &self.context, started).await
    }

    async fn rename(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.rename(&caller, &self.id, name)).await
    }

    async fn freeze(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.freeze(&caller, &self.id)).await
    }

    async fn thaw(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.thaw(&caller, &self.id)).await
    }

    async fn archive(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.archive(&caller, &self.id)).await
    }

    async fn unarchive(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.context, engine.unarchive(&caller, &self.id)).await
    }

    async fn destroy(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["force"])?;
        let force = option(&options, "force")?.unwrap_or(false);
        job_started(connection, &self.context, engine.destroy(&caller, &self.id, force)).await
    }

    async fn open_log(&self, options: Options) -> Result<OwnedFd, Error> {
        known(&options, &[])?;
        self.context.engine.log(&self.id).map(OwnedFd::from).map_err(error)
    }

    async fn get_lock(&self, options: Options) -> Result<String, Error> {
        known(&options, &[])?;
        self.context.engine.lock_text(&self.id).map_err(error)
    }

    async fn get_manifest(&self, options: Options) -> Result<String, Error> {
        known(&options, &[])?;
        self.context.engine.manifest_text(&self.id).map_err(error)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id(&self) -> &str {
        &self.id
    }

    #[zbus(property)]
    fn name(&self) -> fdo::Result<String> {
        Ok(self.info()?.name)
    }

    #[zbus(property)]
    fn state(&self) -> fdo::Result<String> {
        Ok(self.info()?.state.to_string())
    }

    #[zbus(property)]
    fn release(&self) -> fdo::Result<String> {
        Ok(self.info()?.release)
    }

    #[zbus(property)]
    fn lock_digest(&self) -> fdo::Result<String> {
        Ok(self.info()?.lock_digest)
    }

    #[zbus(property)]
    fn network(&self) -> fdo::Result<String> {
        Ok(self.info()?.network)
    }

    #[zbus(property)]
    fn ports(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.ports)
    }

    #[zbus(property)]
    fn allow(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.allow)
    }

    #[zbus(property)]
    fn devices(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.devices)
    }

    #[zbus(property)]
    fn sockets(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.sockets)
    }

    #[zbus(property)]
    fn nested_namespaces(&self) -> fdo::Result<bool> {
        Ok(self.info()?.nested_namespaces)
    }

    #[zbus(property)]
    fn mounts(&self) -> fdo::Result<Vec<(String, String, bool)>> {
        Ok(self.info()?.mounts)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id_mode(&self) -> fdo::Result<String> {
        Ok(self.info()?.id_mode)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn created_at(&self) -> fdo::Result<u64> {
        Ok(self.info()?.created_at)
    }

    #[zbus(property)]
    fn built_at(&self) -> fdo::Result<u64> {
        Ok(self.info()?.built_at)
    }

    #[zbus(property)]
    fn sessions(&self) -> fdo::Result<u32> {
        Ok(self.info()?.sessions)
    }

    #[zbus(property)]
    fn limits(&self) -> fdo::Result<Options> {
        crate::limits::values(&self.info()?.limits)
    }

    #[zbus(property)]
    fn unenforced_limits(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.unenforced_limits)
    }

    #[zbus(property)]
    fn oom_kills(&self) -> fdo::Result<u64> {
        Ok(self.info()?.oom_kills)
    }

    #[zbus(property)]
    fn command(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.command)
    }

    #[zbus(property)]
    fn health(&self) -> fdo::Result<String> {
        Ok(self.info()?.health)
    }

    #[zbus(property)]
    fn last_exit_code(&self) -> fdo::Result<i32> {
        Ok(self.info()?.last_exit_code)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn memory_current(&self) -> u64 {
        self.used(|usage| usage.memory)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn memory_peak(&self) -> u64 {
        self.used(|usage| usage.memory_peak)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn swap_current(&self) -> u64 {
        self.used(|usage| usage.swap)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn cpu_usage(&self) -> u64 {
        self.used(|usage| usage.cpu)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn pids_current(&self) -> u64 {
        self.used(|usage| usage.pids)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn io_read_bytes(&self) -> u64 {
        self.used(|usage| usage.read_bytes)
    }

    #[zbus(property(emits_changed_signal = "false"))]
    fn io_write_bytes(&self) -> u64 {
        self.used(|usage| usage.written_bytes)
    }

    #[zbus(signal)]
    pub async fn out_of_memory(emitter: &SignalEmitter<'_>, kills: u64) -> zbus::Result<()>;
}
