//! `casemated`: the engine on the session bus. One file for each interface; translation only.

mod callers;
mod changes;
mod convert;
mod environment;
mod job;
mod log_control;
mod manager;
mod process;
mod release;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use casemate_engine::{Engine, Settings};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::callers::Callers;

/// What every interface's handle has.
#[derive(Clone)]
pub struct Context {
    pub engine: Arc<Engine>,
    pub callers: Arc<Callers>,
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
    /// Directory of shipped sources, keys and policy [default: ../../share/casemate beside the daemon's]
    #[arg(long, env = "CASEMATE_DATA")]
    data: Option<PathBuf>,
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

fn settings(options: &Options) -> Result<Settings, String> {
    let uid = nix::unistd::getuid();
    if uid.is_root() || nix::unistd::geteuid().is_root() {
        return Err(
            "casemated serves an ordinary user and does not run as root; start it as that user".into()
        );
    }
    let user = nix::unistd::User::from_uid(uid).ok().flatten();
    let home = variable("HOME")
        .or_else(|| user.as_ref().map(|user| user.dir.clone()))
        .ok_or("HOME is not set and /etc/passwd has no entry for you; set HOME")?;
    let user_name =
        user.map(|user| user.name).or_else(|| std::env::var("USER").ok()).unwrap_or_else(|| uid.to_string());
    let runtime = variable("XDG_RUNTIME_DIR")
        .ok_or("XDG_RUNTIME_DIR is not set; log in through systemd-logind, or set it to a directory of your own (mode 0700)")?;
    let own = std::env::current_exe()
        .ok()
        .and_then(|path| path.parent().map(PathBuf::from))
        .ok_or("the daemon's own directory cannot be told; give --libexec")?;
    let data = options.data.clone().unwrap_or_else(|| own.join("../../share/casemate"));
    let configuration = variable("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config")).join("casemate");
    Ok(Settings {
        store: options.store.clone().unwrap_or_else(|| {
            variable("XDG_DATA_HOME").unwrap_or_else(|| home.join(".local/share")).join("casemate")
        }),
        cache: variable("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("casemate"),
        runtime: runtime.join("casemate"),
        configuration: vec![configuration, PathBuf::from("/etc/casemate"), data],
        libexec: options.libexec.clone().unwrap_or(own),
        https_proxy: text(&["https_proxy", "HTTPS_PROXY"]),
        http_proxy: text(&["http_proxy"]),
        no_proxy: text(&["no_proxy", "NO_PROXY"]),
        ssl_cert_file: text(&["SSL_CERT_FILE"]),
        ssl_cert_dir: text(&["SSL_CERT_DIR"]),
        user_name,
        home,
    })
}

async fn serve(options: Options, filter: log_control::Filter) -> Result<(), String> {
    let settings = settings(&options)?;
    let engine = Engine::open(settings).await.map_err(|error| error.to_string())?;
    // Before anything is served, so that no change falls between.
    let received = engine.subscribe();
    let context = Context { engine: Arc::clone(&engine), callers: Arc::new(Callers::new()?) };
    let connect = async {
        zbus::connection::Builder::session()
            .serve_at(casemate_interfaces::ROOT, zbus::fdo::ObjectManager)
            .serve_at(casemate_interfaces::ROOT, manager::Manager(context.clone()))
            .serve_at("/org/freedesktop/LogControl1", log_control::LogControl(filter))
            .build()
            .await
    };
    let connection = connect.await.map_err(|error| {
        format!("cannot reach the session bus: {error}; is DBUS_SESSION_BUS_ADDRESS right?")
    })?;
    changes::add_all(&connection, &context).await.map_err(|error| error.to_string())?;
    let follower = tokio::spawn(changes::follow(connection.clone(), context.clone(), received));
    let flags = zbus::fdo::RequestNameFlags::DO_NOT_QUEUE;
    connection.request_name_with_flags(casemate_interfaces::NAME, flags).await.map_err(|error| {
        format!("{} is taken on this bus: {error}; another casemated runs", casemate_interfaces::NAME)
    })?;
    tracing::info!("ready");
    notify(&[sd_notify::NotifyState::Ready]);
    wait_for_end(&engine, options.idle_exit).await.map_err(|error| error.to_string())?;
    notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping; environments go on");
    // The name first: whoever calls from now on gets a new daemon.
    connection.release_name(casemate_interfaces::NAME).await.map_err(|error| error.to_string())?;
    engine.shutdown().await;
    follower.abort();
    Ok(())
}

fn notify(states: &[sd_notify::NotifyState<'_>]) {
    // Without a service manager there is nobody to tell.
    let _ = sd_notify::notify(states);
}

async fn wait_for_end(engine: &Engine, idle_exit: u64) -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let watchdog = sd_notify::watchdog_enabled();
    let period = watchdog.map_or(Duration::from_secs(30), |limit| limit / 2);
    let period = if idle_exit > 0 { period.min(Duration::from_secs(idle_exit)) } else { period };
    let mut clock = tokio::time::interval(period);
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = clock.tick() => {
                if watchdog.is_some() {
                    notify(&[sd_notify::NotifyState::Watchdog]);
                }
                engine.forget_old_jobs();
                let idle = engine.idle_since().is_some_and(|since| since.elapsed() >= Duration::from_secs(idle_exit));
                if idle_exit > 0 && idle {
                    return Ok(());
                }
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
        Err(error) => Err(error.to_string()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("casemated: {error}");
            ExitCode::FAILURE
        }
    }
}
