//! A session's streams, terminal, signals and status, on the client's side.

use std::collections::HashMap;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

use casemate_interfaces::{EnvironmentProxy, ManagerProxy};
use rustix::fs::FileType;
use rustix::process::Signal;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize};
use tokio::signal::unix::{SignalKind, signal};
use zbus::Variant;

use crate::bus::Failure;

/// What both `exec` and `enter` take.
pub struct Request {
    pub command: Vec<String>,
    pub root: bool,
    pub directory: Option<String>,
    pub login: bool,
    pub variables: Vec<String>,
}

fn local(what: &'static str) -> impl Fn(rustix::io::Errno) -> Failure {
    move |error| Failure::Local(format!("cannot {what}: {error}"))
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> Failure {
    move |error| Failure::Local(format!("cannot {what}: {error}"))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Failure> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(local("make a pipe"))
}

/// Variables of our own environment that a session should see, and those asked for by hand (`NAME=value`, or `NAME` for
/// our own value).
fn variables(asked: &[String]) -> HashMap<String, String> {
    let own = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let mut variables: HashMap<String, String> = own
        .filter(|(name, _)| {
            ["TERM", "LANG", "COLORTERM", "TZ"].contains(&name.as_str()) || name.starts_with("LC_")
        })
        .collect();
    for one in asked {
        match one.split_once('=') {
            Some((name, value)) => variables.insert(name.to_owned(), value.to_owned()),
            None => std::env::var(one).ok().and_then(|value| variables.insert(one.clone(), value)),
        };
    }
    variables
}

fn options(request: &Request) -> HashMap<&'static str, Variant<'static>> {
    let mut options = HashMap::from([("variables", Variant::from(variables(&request.variables)))]);
    if request.root {
        options.insert("root", Variant::from(true));
    }
    if request.login {
        options.insert("login", Variant::from(true));
    }
    if let Some(directory) = &request.directory {
        options.insert("directory", Variant::from(directory.clone()));
    } else if let Some(own) =
        std::env::current_dir().ok().and_then(|own| own.into_os_string().into_string().ok())
    {
        options.insert("host-directory", Variant::from(own));
    }
    options
}

/// Whether a descriptor can be handed over as it is: a regular file or a terminal could be opened anew from inside.
fn direct(descriptor: impl AsFd) -> Result<bool, Failure> {
    let stat = rustix::fs::fstat(&descriptor).map_err(local("look at a standard stream"))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo | FileType::Socket => Ok(true),
        FileType::CharacterDevice => Ok(!rustix::termios::isatty(&descriptor)),
        FileType::Directory => Err(Failure::Local("a standard stream is a directory; redirect it".into())),
        _ => Ok(false),
    }
}

/// Copy until the end of either side, in a thread: files and terminals know no readiness.
fn relay(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut block = vec![0; 64 << 10];
        while let Ok(count) = from.read(&mut block) {
            // Either end being gone is the end of the relay; the command's status tells the rest.
            if count == 0 || to.write_all(&block[..count]).is_err() || to.flush().is_err() {
                break;
            }
        }
    })
}

/// Output to a file or terminal, on its way.
struct Relayed {
    thread: std::thread::JoinHandle<()>,
    /// Closed when the command has ended: then the relay ends with what is in the pipe. Waiting for its last writer would
    /// be waiting for what the command left in the background.
    ended: OwnedFd,
}

impl Relayed {
    fn start(reader: OwnedFd, to: OwnedFd) -> Result<Self, Failure> {
        use rustix::event::{PollFd, PollFlags, poll};
        let (end, ended) = pipe()?;
        let thread = std::thread::spawn(move || {
            let (mut from, mut to) = (std::fs::File::from(reader), std::fs::File::from(to));
            let mut block = vec![0; 64 << 10];
            loop {
                let mut ready = [PollFd::new(&from, PollFlags::IN), PollFd::new(&end, PollFlags::IN)];
                match poll(&mut ready, None) {
                    Ok(_) => {}
                    Err(rustix::io::Errno::INTR) => continue,
                    Err(_) => break,
                }
                if !ready[1].revents().is_empty() {
                    // All that the command itself wrote is in the pipe by now.
                    let left = rustix::io::ioctl_fionread(&from).unwrap_or_default();
                    let _ = std::io::copy(&mut from.take(left), &mut to);
                    break;
                }
                match from.read(&mut block) {
                    Ok(count) if count > 0 && to.write_all(&block[..count]).is_ok() => {}
                    _ => break,
                }
            }
        });
        Ok(Self { thread, ended })
    }

    /// What was printed last is printed before we end.
    fn finish(self) {
        drop(self.ended);
        let _ = self.thread.join();
    }
}

fn copy(descriptor: impl AsFd) -> Result<OwnedFd, Failure> {
    descriptor.as_fd().try_clone_to_owned().map_err(io("copy a standard stream"))
}

fn input() -> Result<OwnedFd, Failure> {
    let stdin = std::io::stdin();
    if direct(&stdin)? {
        return copy(&stdin);
    }
    let (reader, writer) = pipe()?;
    relay(std::fs::File::from(copy(&stdin)?), std::fs::File::from(writer));
    Ok(reader)
}

fn output(descriptor: impl AsFd, relays: &mut Vec<Relayed>) -> Result<OwnedFd, Failure> {
    if direct(&descriptor)? {
        return copy(&descriptor);
    }
    let (reader, writer) = pipe()?;
    relays.push(Relayed::start(reader, copy(&descriptor)?)?);
    Ok(writer)
}

/// Signals to us that are meant for the command. Caught from before it starts: one that comes in between waits here.
struct Signals(Vec<(SignalKind, tokio::signal::unix::Signal)>);

impl Signals {
    fn catch() -> Result<Self, Failure> {
        let kinds = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        let caught = kinds.into_iter().map(|kind| signal(kind).map(|stream| (kind, stream)));
        caught.collect::<Result<_, _>>().map(Self).map_err(io("catch signals"))
    }
}

/// The session's end, as init tells it: independent of the daemon.
async fn status(pipe: OwnedFd, pidfd: &OwnedFd, mut signals: Signals) -> Result<u8, Failure> {
    use tokio::io::AsyncReadExt;
    let mut receiver =
        tokio::net::unix::pipe::Receiver::from_owned_fd(pipe).map_err(io("read the exit status"))?;
    let mut line = Vec::new();
    let mut block = [0; 64];
    loop {
        let mut forward = std::pin::pin!(std::future::poll_fn(|context| {
            for (kind, stream) in &mut signals.0 {
                if stream.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(kind.as_raw_value());
                }
            }
            std::task::Poll::Pending
        }));
        tokio::select! {
            read = receiver.read(&mut block) => match read.map_err(io("read the exit status"))? {
                0 => break,
                count => line.extend_from_slice(&block[..count]),
            },
            number = &mut forward => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    // It may have ended in this moment; its status is on the way then.
                    let _ = rustix::process::pidfd_send_signal(pidfd, signal);
                }
            }
        }
    }
    let text = String::from_utf8_lossy(&line);
    let ended =
        text.trim_end().split_once(' ').and_then(|(how, number)| Some((how, number.parse::<u8>().ok()?)));
    match ended {
        Some(("exit", code)) => Ok(code),
        Some(("signal", number)) => Ok(number.saturating_add(128)),
        _ => Err(Failure::Local(
            "the environment was stopped before the command ended; see `casemate show`".into(),
        )),
    }
}

/// Run a command with our own streams.
pub async fn exec(manager: &ManagerProxy<'_>, environment: &str, request: Request) -> Result<u8, Failure> {
    let signals = Signals::catch()?;
    let (reader, writer) = pipe()?;
    let mut relays = Vec::new();
    let input = input()?;
    let out = output(std::io::stdout(), &mut relays)?;
    let err = output(std::io::stderr(), &mut relays)?;
    let command: Vec<&str> = request.command.iter().map(String::as_str).collect();
    let options = options(&request);
    let options = options.iter().map(|(key, value)| (*key, value)).collect();
    let (_, pidfd) = manager
        .exec(
            environment,
            &command,
            input.as_fd().into(),
            out.as_fd().into(),
            err.as_fd().into(),
            writer.as_fd().into(),
            options,
        )
        .await?;
    // Ours would hold the pipes open when the session's are closed.
    drop((input, out, err, writer));
    let code = status(reader, &pidfd.into(), signals).await?;
    relays.into_iter().for_each(Relayed::finish);
    Ok(code)
}

/// The terminal in raw mode, put back however this ends.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self, Failure> {
        let before = tcgetattr(std::io::stdin()).map_err(local("read the terminal's settings"))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Drain, &raw)
            .map_err(local("set the terminal to raw"))?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// Run a command, or the login shell, in a terminal of the environment's own.
pub async fn terminal(environment: &EnvironmentProxy<'_>, request: Request) -> Result<u8, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::Local("standard input and output are no terminal; use `casemate exec`".into()));
    }
    let signals = Signals::catch()?;
    let (reader, writer) = pipe()?;
    let size = tcgetwinsize(std::io::stdout()).map_err(local("read the terminal's size"))?;
    let command: Vec<&str> = request.command.iter().map(String::as_str).collect();
    let options = options(&request);
    let options = options.iter().map(|(key, value)| (*key, value)).collect();
    let (_, pidfd, master) =
        environment.open_terminal(&command, writer.as_fd().into(), size.ws_row, size.ws_col, options).await?;
    drop(writer);
    let master: OwnedFd = master.into();
    let raw = Raw::set()?;
    relay(std::fs::File::from(copy(std::io::stdin())?), std::fs::File::from(copy(&master)?));
    let shown = relay(std::fs::File::from(copy(&master)?), std::io::stdout());
    let resizer = copy(&master)?;
    let resize = tokio::spawn(async move {
        let Ok(mut changes) = signal(SignalKind::window_change()) else { return };
        while changes.recv().await.is_some() {
            if let Ok(size) = tcgetwinsize(std::io::stdout()) {
                // The session may be gone already.
                let _ = tcsetwinsize(&resizer, size);
            }
        }
    });
    let code = status(reader, &pidfd.into(), signals).await;
    resize.abort();
    drop(master);
    // The other side is closed when the last process in the terminal ends; one in the background may keep it.
    let waited = tokio::task::spawn_blocking(move || shown.join());
    let _ = tokio::time::timeout(std::time::Duration::from_millis(500), waited).await;
    drop(raw);
    code
}
