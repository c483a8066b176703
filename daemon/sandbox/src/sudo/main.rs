//! `sudo` inside: asks init for a session as the environment's root (see [`casemate_sandbox::elevation`]) and is to it what the
//! client is to a session of the host. Not set-id, and of no rights of its own. Its options are those of sudo(8) that people
//! type; the rest is refused rather than passed over.

mod relay;
mod target;

use std::ffi::OsString;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::ExitCode;

use casemate_sandbox::control::{PACKET_MAX, Reply, Size};
use casemate_sandbox::elevation::{PROGRAM, Request, Run, SOCKET};
use clap::Parser;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::target::Target;

/// sudo's own failures.
const FAILED: u8 = 1;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Run a command as the environment's root.
#[derive(Parser)]
#[command(name = "sudo", version, disable_help_flag = true)]
struct Options {
    /// As another user of the environment
    #[arg(short, long, default_value = "root")]
    user: String,
    /// By that user's login shell, in their home
    #[arg(short = 'i', long)]
    login: bool,
    /// By our own shell
    #[arg(short, long, conflicts_with = "login")]
    shell: bool,
    /// Keep all variables
    #[arg(short = 'E', long)]
    preserve_env: bool,
    /// HOME is the target user's, as it is anyway
    #[arg(short = 'H', long)]
    set_home: bool,
    /// Begin in this directory
    #[arg(short = 'D', long)]
    chdir: Option<String>,
    /// Ask for no password, as nobody does here
    #[arg(short, long)]
    non_interactive: bool,
    /// As above
    #[arg(short = 'S', long)]
    stdin: bool,
    /// Say whether it is granted
    #[arg(short, long)]
    validate: bool,
    /// There is nothing to forget
    #[arg(short = 'k', long)]
    reset_timestamp: bool,
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Variables and command
    #[arg(value_name = "NAME=VALUE|COMMAND", trailing_var_arg = true)]
    words: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(
        "not granted in this environment: set `sudo = true` in [runtime] of casemate.toml and build it again, or, on the host, \
         run `casemate exec --root ENVIRONMENT -- COMMAND`"
    )]
    NotGranted,
    #[error("{SOCKET} is not init's: another process listens on it")]
    Impostor,
    #[error("cannot {what}: {source}")]
    Step { what: &'static str, source: std::io::Error },
    #[error("init refused: {0}")]
    Refused(String),
    #[error("init answered nonsense")]
    Nonsense,
    #[error("no command; `sudo -s` or `sudo -i` is a shell")]
    NoCommand,
    #[error("{0:?} is not UTF-8")]
    Text(OsString),
    #[error("there is no user {0:?} in this environment")]
    User(String),
    #[error("the environment was stopped before the command ended")]
    Stopped,
}

fn step<T, E: Into<std::io::Error>>(what: &'static str, result: Result<T, E>) -> Result<T, Failure> {
    result.map_err(|source| Failure::Step { what, source: source.into() })
}

fn text(word: OsString) -> Result<String, Failure> {
    word.into_string().map_err(Failure::Text)
}

/// What is to run, apart from who runs it.
struct Wanted {
    /// By a login shell; with an empty command that shell itself.
    login: bool,
    command: Vec<String>,
    /// `NAME=VALUE` of the command line.
    variables: Vec<String>,
}

fn wanted(options: &Options) -> Result<Wanted, Failure> {
    let words: Result<Vec<String>, Failure> = options.words.iter().cloned().map(text).collect();
    let words = words?;
    let assigned = |word: &String| word.split_once('=').is_some_and(|(name, _)| is_variable(name));
    let first = words.iter().position(|word| !assigned(word)).unwrap_or(words.len());
    let (variables, command) = words.split_at(first);
    let (variables, mut command) = (variables.to_vec(), command.to_vec());
    if options.shell {
        let shell = std::env::var("SHELL").ok().filter(|shell| shell.starts_with('/'));
        let shell = shell.unwrap_or_else(|| "/bin/sh".to_owned());
        command = match command.is_empty() {
            true => vec![shell],
            false => {
                let script = ["-c", "exec \"$@\"", "sh"].map(str::to_owned);
                std::iter::once(shell).chain(script).chain(command).collect()
            }
        };
    }
    if command.is_empty() && !options.login {
        return Err(Failure::NoCommand);
    }
    Ok(Wanted { login: options.login, command, variables })
}

fn is_variable(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The variables of the command: few of ours, unless all were asked for; who it is; what was said on the command line.
fn environment(options: &Options, wanted: &Wanted, target: &Target) -> Vec<String> {
    let kept = |name: &str| ["TERM", "COLORTERM", "LANG", "TZ"].contains(&name) || name.starts_with("LC_");
    let mut variables: std::collections::BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| options.preserve_env || kept(name))
        .collect();
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let own = std::env::var("USER").unwrap_or_else(|_| uid.to_string());
    let shown = match wanted.command.is_empty() {
        true => target.shell.clone(),
        false => wanted.command.join(" "),
    };
    for (name, value) in [
        ("PATH", PATH),
        ("HOME", &target.home),
        ("USER", &target.name),
        ("LOGNAME", &target.name),
        ("SHELL", &target.shell),
        ("SUDO_USER", &own),
        ("SUDO_UID", &uid.to_string()),
        ("SUDO_GID", &gid.to_string()),
        ("SUDO_COMMAND", &shown),
    ] {
        variables.insert(name.to_owned(), value.to_owned());
    }
    for assignment in &wanted.variables {
        if let Some((name, value)) = assignment.split_once('=') {
            variables.insert(name.to_owned(), value.to_owned());
        }
    }
    variables.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

/// A connection to init: whoever listens must be PID 1 of this namespace, which nobody else can be.
fn connect() -> Result<OwnedFd, Failure> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = step("make a socket", socket)?;
    let address = step("reach init", SocketAddrUnix::new(SOCKET))?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) => {}
        Err(rustix::io::Errno::NOENT) => return Err(Failure::NotGranted),
        other => step("reach init", other)?,
    }
    let peer = step("look at init", rustix::net::sockopt::socket_peercred(&socket))?;
    if peer.pid.as_raw_nonzero().get() != 1 {
        return Err(Failure::Impostor);
    }
    Ok(socket)
}

fn ask(
    socket: &OwnedFd,
    request: &Request,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(Reply, Vec<OwnedFd>), Failure> {
    let bytes = step("ask init", serde_json::to_vec(request))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL);
    step("ask init", sent)?;
    let mut answer = vec![0; PACKET_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut answer)], &mut ancillary, flags);
    let count = step("hear init", received)?.bytes;
    let mut given = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            given.extend(rights);
        }
    }
    match serde_json::from_slice(&answer[..count]) {
        Ok(Reply::Refused { message }) => Err(Failure::Refused(message)),
        Ok(reply) => Ok((reply, given)),
        Err(_) => Err(Failure::Nonsense),
    }
}

/// As root already, or become the target's: no init is needed.
fn execute(target: &Target, wanted: &Wanted, environment: Vec<String>) -> Result<u8, Failure> {
    target.assume()?;
    let (file, arguments) = match wanted.login {
        true => {
            let mut arguments = Vec::new();
            if !wanted.command.is_empty() {
                arguments.extend(["-c", "exec \"$@\"", "sh"].map(str::to_owned));
                arguments.extend(wanted.command.iter().cloned());
            }
            (target.shell.clone(), arguments)
        }
        false => (wanted.command[0].clone(), wanted.command[1..].to_vec()),
    };
    let mut command = std::process::Command::new(&file);
    if wanted.login {
        command.arg0(format!("-{}", file.rsplit('/').next().unwrap_or(&file)));
        step("enter the home", std::env::set_current_dir(&target.home))?;
    }
    command.args(arguments).env_clear();
    command.envs(environment.iter().filter_map(|variable| variable.split_once('=')));
    let error = command.exec();
    eprintln!("sudo: {file}: {error}");
    Ok(if error.kind() == std::io::ErrorKind::NotFound { 127 } else { 126 })
}

/// What a directory is relative to.
fn base<'a>(directory: &str, own: &'a str) -> &'a str {
    if directory.starts_with('/') { "" } else { own }
}

fn run(options: &Options) -> Result<u8, Failure> {
    let is_root = rustix::process::geteuid().is_root();
    if options.validate || (options.reset_timestamp && options.words.is_empty()) {
        if !is_root {
            connect()?;
        }
        return Ok(0);
    }
    let wanted = wanted(options)?;
    let target = Target::find(&options.user)?;
    if let (true, Some(directory)) = (is_root, &options.chdir) {
        step("enter the directory", std::env::set_current_dir(directory))?;
    }
    let variables = environment(options, &wanted, &target);
    if is_root {
        return execute(&target, &wanted, variables);
    }
    let own =
        std::env::current_dir().ok().and_then(|directory| directory.into_os_string().into_string().ok());
    let own = own.unwrap_or_else(|| "/".to_owned());
    let mut asked = Run {
        command: wanted.command.clone(),
        login: wanted.login,
        environment: variables,
        // Where it was asked for by name, nothing runs elsewhere.
        directory: options
            .chdir
            .as_ref()
            .map_or(own.clone(), |asked| format!("{}/{asked}", base(asked, &own))),
        directory_optional: options.chdir.is_none(),
        terminal: None,
    };
    if !target.is_root() {
        // Root of the environment becomes them by this same program.
        let mut words: Vec<String> = [PROGRAM, "-u", &options.user].map(str::to_owned).to_vec();
        words.extend(wanted.login.then(|| "-i".to_owned()));
        words.extend(options.preserve_env.then(|| "-E".to_owned()));
        words.push("--".to_owned());
        words.extend(wanted.variables.iter().cloned());
        words.extend(wanted.command.iter().cloned());
        (asked.command, asked.login) = (words, false);
    } else if wanted.login && options.chdir.is_none() {
        asked.directory = target.home.clone();
    }
    let socket = connect()?;
    let terminal = relay::terminal();
    asked.terminal = terminal.map(|size| Size { rows: size.ws_row, columns: size.ws_col });
    let signals = relay::Signals::catch()?;
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()];
    let given = if terminal.is_some() { &[] } else { &streams[..] };
    let (_, received) = ask(&socket, &Request::Run(asked), given)?;
    let mut received = received.into_iter();
    let status = received.next().ok_or(Failure::Nonsense)?;
    let forward = |signal: i32| {
        // It may have ended in this moment; its status is on the way then.
        let _ = ask(&socket, &Request::Signal { signal }, &[]);
    };
    match received.next() {
        Some(master) => relay::follow(&status, &signals, Some(&master), forward),
        None => relay::follow(&status, &signals, None, forward),
    }
}

fn main() -> ExitCode {
    let options = Options::try_parse().unwrap_or_else(|error| {
        let code = if error.use_stderr() { FAILED } else { 0 };
        let _ = error.print();
        std::process::exit(code.into())
    });
    match run(&options) {
        Ok(code) => code.into(),
        Err(failure) => {
            eprintln!("sudo: {failure}");
            FAILED.into()
        }
    }
}
