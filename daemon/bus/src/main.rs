//! `casemated`: the engine on the session bus. One file for each interface; translation only.

mod callers;
mod changes;
mod convert;
mod environment;
mod error;
mod gate;
mod job;
mod limits;
mod log_control;
mod manager;
mod process;
mod release;
mod scopes;
mod snapshot;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use casemate_engine::{Engine, ErrorKind, Scopes, Settings};
use casemate_interfaces::NAME;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use zbus::Connection;

use crate::callers::Callers;
use crate::error::DaemonError;

/// How long a new daemon waits for the last one to let go of the store.
const HANDOVER: Duration = Duration::from_secs(2);
/// How long jobs and calls may take to end; systemd's own patience is 90 seconds.
const GRACE: Duration = Duration::from_secs(20);
/// Open files wanted: some thousand environments.
const DESCRIPTORS: u64 = 16_384;

/// What every interface's handle has.
#[derive(Clone)]
pub struct Context {
    pub engine: Arc<Engine>,
    pub told: Arc<changes::Told>,
}

/// The Casemate daemon. It is started by the session bus or systemd, seldom by hand.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Directory of the store [default: $XDG_DATA_HOME/casemate]
    #[arg(long, env = "CASEMATE_STORE")]
    store: Option<PathBuf>,
    /// Directory of the workers [default: the daemon's own]
    #[arg(long, env = "CASEMATE_LIBEXEC")]
    libexec: Option<PathBuf>,
    /// Directory of shipped sources, keys and policy [default: ../../lib/casemate beside the daemon's]
    #[arg(long, env = "CASEMATE_DATA")]
    data: Option<PathBuf>,
    /// The host's resolv.conf(5), which private networks follow
    #[arg(long, env = "CASEMATE_RESOLVER", default_value = "/etc/resolv.conf")]
    resolver: PathBuf,
    /// Exit after so many seconds with nothing to do; 0: never
    #[arg(long, default_value_t = 300)]
    idle_exit: u64,
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

fn text(names: &[&str]) -> String {
    names.iter().find_map(|name| std::env::var(name).ok()).unwrap_or_default()
}

fn settings(options: &Options) -> Result<Settings, DaemonError> {
    let uid = nix::unistd::getuid();
    if uid.is_root() || nix::unistd::geteuid().is_root() {
        return Err(DaemonError::Root);
    }
    let user = nix::unistd::User::from_uid(uid).ok().flatten();
    let home =
        variable("HOME").or_else(|| user.as_ref().map(|user| user.dir.clone())).ok_or(DaemonError::NoHome)?;
    let user_name =
        user.map(|user| user.name).or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| uid.to_string());
    let runtime = variable("XDG_RUNTIME_DIR").ok_or(DaemonError::NoRuntime)?;
    let own = std::env::current_exe()
        .ok()
        .and_then(|path| path.parent().map(PathBuf::from))
        .ok_or(DaemonError::NoLibexec)?;
    let data = options.data.clone().unwrap_or_else(|| own.join("../../lib/casemate"));
    let configuration = variable("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config")).join("casemate");
    Ok(Settings {
        store: options.store.clone().unwrap_or_else(|| {
            variable("XDG_DATA_HOME").unwrap_or_else(|| home.join(".local/share")).join("casemate")
        }),
        cache: variable("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("casemate"),
        runtime: runtime.join("casemate"),
        state: variable("XDG_STATE_HOME").unwrap_or_else(|| home.join(".local/state")).join("casemate"),
        configuration: vec![configuration, PathBuf::from("/etc/casemate"), data],
        libexec: options.libexec.clone().unwrap_or(own),
        https_proxy: text(&["https_proxy", "HTTPS_PROXY"]),
        http_proxy: text(&["http_proxy"]),
        no_proxy: text(&["no_proxy", "NO_PROXY"]),
        ssl_cert_file: text(&["SSL_CERT_FILE"]),
        ssl_cert_dir: text(&["SSL_CERT_DIR"]),
        resolver: options.resolver.clone(),
        sockets: casemate_engine::HostSockets {
            ssh_agent: text(&["SSH_AUTH_SOCK"]),
            display: text(&["DISPLAY"]),
            x_authority: text(&["XAUTHORITY"]),
            pulse: text(&["PULSE_SERVER"]),
            bus: text(&["DBUS_SESSION_BUS_ADDRESS"]),
            wayland: text(&["WAYLAND_DISPLAY"]),
            runtime,
        },
        path: text(&["PATH"]),
        user_name,
        home,
    })
}

/// Wait for a daemon that is about to end: one that let go of its name for idleness still holds the store for a moment.
async fn open(settings: Settings, systemd: Option<Arc<dyn Scopes>>) -> Result<Arc<Engine>, DaemonError> {
    let deadline = Instant::now() + HANDOVER;
    loop {
        match Engine::open(settings.clone(), systemd.clone()).await {
            Err(error) if error.kind() == ErrorKind::StoreLocked && Instant::now() < deadline => {
                tokio::time::sleep(HANDOVER / 20).await;
            }
            other => return other.map_err(DaemonError::Engine),
        }
    }
}

/// Each running environment costs descriptors, so the soft limit goes up; init lowers it again for sessions.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = Some(limit.maximum.map_or(DESCRIPTORS, |most| most.min(DESCRIPTORS)));
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// The session bus, through the [gate].
async fn connect(
    callers: &Arc<Callers>,
    context: &Context,
    filter: log_control::Filter,
) -> Result<Connection, DaemonError> {
    let address = zbus::Address::session().map_err(DaemonError::Bus)?;
    let stream = bus_socket(&address)?;
    let (gate, refused) = gate::Gate::new(stream, Arc::clone(callers));
    let connection = zbus::connection::Builder::socket(gate)
        .serve_at(casemate_interfaces::ROOT, zbus::fdo::ObjectManager)
        .serve_at(casemate_interfaces::ROOT, manager::Manager(context.clone()))
        .serve_at("/org/freedesktop/LogControl1", log_control::LogControl::new(filter))
        .build()
        .await
        .map_err(DaemonError::Bus)?;
    tokio::spawn(gate::answer(connection.clone(), refused));
    Ok(connection)
}

fn bus_socket(address: &zbus::Address) -> Result<tokio::net::UnixStream, DaemonError> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixStream};
    use zbus::address::transport::{Transport, UnixSocket};
    let failed = |source| DaemonError::Io {
        action: "connect to the session bus at",
        path: address.to_string().into(),
        source,
    };
    let socket = match address.transport() {
        Transport::Unix(unix) => match unix.path() {
            UnixSocket::File(path) => SocketAddr::from_pathname(path),
            UnixSocket::Abstract(name) => SocketAddr::from_abstract_name(name.as_bytes()),
            _ => return Err(DaemonError::OddBus(address.to_string())),
        },
        _ => return Err(DaemonError::OddBus(address.to_string())),
    };
    let stream = socket.and_then(|socket| UnixStream::connect_addr(&socket)).map_err(failed)?;
    stream.set_nonblocking(true).map_err(failed)?;
    tokio::net::UnixStream::from_std(stream).map_err(failed)
}

/// Take the name, or say who has it.
async fn take_name(connection: &Connection) -> Result<(), DaemonError> {
    let flags = zbus::fdo::RequestNameFlags::DO_NOT_QUEUE;
    match connection.request_name_with_flags(NAME, flags).await {
        Ok(_) => Ok(()),
        Err(zbus::Error::NameTaken) => {
            let bus = zbus::fdo::DBusProxy::new(connection).await.map_err(DaemonError::Bus)?;
            let holder = match zbus::names::BusName::try_from(NAME) {
                Ok(name) => bus.get_connection_unix_process_id(name).await.ok(),
                Err(_) => None,
            };
            Err(DaemonError::NameTaken(holder))
        }
        Err(error) => Err(DaemonError::Bus(error)),
    }
}

async fn serve(options: Options, filter: log_control::Filter) -> Result<(), DaemonError> {
    raise_descriptor_limit();
    let settings = settings(&options)?;
    let systemd = scopes::Systemd::find().await.map_err(DaemonError::Systemd)?;
    let systemd = systemd.map(|found| Arc::new(found) as Arc<dyn Scopes>);
    let engine = open(settings, systemd).await?;
    // Before anything is served, so that no change falls between.
    let received = engine.subscribe();
    let callers = Callers::new(Arc::clone(&engine)).await?;
    let context = Context { engine: Arc::clone(&engine), told: Arc::default() };
    let connection = connect(&callers, &context, filter).await?;
    changes::add_all(&connection, &context).await.map_err(DaemonError::Bus)?;
    let follower = tokio::spawn(changes::follow(connection.clone(), context.clone(), received));
    take_name(&connection).await?;
    tracing::info!("ready");
    notify(&[sd_notify::NotifyState::Ready]);
    let outcome = tokio::select! {
        outcome = wait_for_end(&engine, options.idle_exit) => outcome,
        () = lost(&connection) => Err(DaemonError::NameLost),
    };
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping; environments go on");
    if outcome.is_ok() {
        // The name first: whoever calls from now on gets a new daemon.
        connection.release_name(NAME).await.map_err(DaemonError::Bus)?;
    }
    let end = async {
        engine.shutdown().await;
        callers.drained().await;
    };
    if tokio::time::timeout(GRACE, end).await.is_err() {
        tracing::warn!("some jobs did not end in time; the next start clears up after them");
    }
    follower.abort();
    outcome
}

/// Until the bus is gone, or has taken the name away.
async fn lost(connection: &Connection) {
    let name_lost = async {
        let Ok(bus) = zbus::fdo::DBusProxy::new(connection).await else { return };
        let Ok(mut lost) = bus.receive_name_lost().await else { return };
        while let Some(signal) = futures_util::StreamExt::next(&mut lost).await {
            if signal.args().is_ok_and(|arguments| arguments.name.as_str() == NAME) {
                return;
            }
        }
    };
    tokio::select! {
        () = connection.closed() => {}
        () = name_lost => {}
    }
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(states);
}

/// Sleep for ever where there is no moment to wait for: an idle daemon wakes for its watchdog alone.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn wait_for_end(engine: &Engine, idle_exit: u64) -> Result<(), DaemonError> {
    let failed = |source| DaemonError::Io { action: "wait for", path: "signals".into(), source };
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut changes = engine.subscribe();
    let period = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    let patience = Duration::from_secs(idle_exit);
    let mut alive = period.map(|period| Instant::now() + period);
    loop {
        let idle =
            engine.idle_since().filter(|_| idle_exit > 0).map(|since| since + Duration::from_secs(idle_exit));
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            // Whatever changed, the moments may have.
            _ = changes.recv() => {}
            // Once more: something may have begun in the same moment.
            () = until(idle) => {
                if engine.idle_since().is_some_and(|since| since.elapsed() >= patience) {
                    return Ok(());
                }
            }
            () = until(engine.next_expiry()) => engine.forget_old_jobs(),
            () = until(alive) => {
                notify(&[sd_notify::NotifyState::Watchdog]);
                alive = period.map(|period| Instant::now() + period);
            }
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let level = std::env::var("CASEMATE_LOG").unwrap_or_else(|_| "info".into());
    let (layer, handle) = tracing_subscriber::reload::Layer::new(tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::registry()
        .with(layer)
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).without_time())
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(serve(options, log_control::Filter(handle))),
        Err(source) => Err(DaemonError::Io { action: "make", path: "a runtime".into(), source }),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemated: {error}");
            ExitCode::FAILURE
        }
    }
}
