//! The checker of the tests: tries ways out of where it runs, one child for each, and tells which were open. The list is in
//! the files beside this one, a family each. Only tests start it: inside an environment, and in the controls that show that
//! each attempt succeeds where its guard is switched off.

// As attempts: what is tried is what the compiler warns of elsewhere.
#![allow(clippy::cast_possible_truncation)]

mod attempt;
mod control;
mod devices;
mod facts;
mod files;
mod identity;
mod init;
mod kernel;
mod mounts;
mod namespaces;
mod processes;
mod sockets;
mod victim;

// The product's own filter, by itself.
#[path = "../../../daemon/sandbox/src/filter.rs"]
mod filter;
#[path = "../../../daemon/sandbox/src/syscalls.rs"]
mod syscalls;
#[path = "../../../daemon/sandbox/src/verdicts.rs"]
mod verdicts;

use std::fs::File;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use casemate_tests::escapes::{End, Found, Listed, Role, Targets};

use crate::attempt::{Attempt, Done, Guard};

const FAMILIES: &[&[Attempt]] = &[
    files::ATTEMPTS,
    identity::ATTEMPTS,
    processes::ATTEMPTS,
    init::ATTEMPTS,
    namespaces::ATTEMPTS,
    mounts::ATTEMPTS,
    kernel::ATTEMPTS,
    sockets::ATTEMPTS,
    devices::ATTEMPTS,
];

/// Seconds that an attempt may take.
const PATIENCE: u32 = 10;

fn all() -> impl Iterator<Item = &'static Attempt> {
    FAMILIES.iter().flat_map(|family| family.iter())
}

/// Make an attempt, in a child of its own, after `before`.
fn run(attempt: &Attempt, targets: &Targets, before: impl FnOnce() -> Done) -> End {
    let made =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(io::Error::from).and_then(|(out, into)| {
            let mut into = Some(File::from(into));
            // SAFETY: this process has a single thread.
            let child = match unsafe { libc::fork() } {
                -1 => return Err(io::Error::last_os_error()),
                0 => {
                    // SAFETY: alarm takes a number.
                    unsafe { libc::alarm(PATIENCE) };
                    let end = match before() {
                        Err(error) => End::Held(format!("no control: {error}")),
                        Ok(()) => match (attempt.run)(targets) {
                            Ok(()) => End::Through,
                            Err(error) => End::Held(error.to_string()),
                        },
                    };
                    let text = serde_json::to_string(&end).expect("JSON");
                    let told = into.take().is_some_and(|mut into| into.write_all(text.as_bytes()).is_ok());
                    // SAFETY: a child of a fork ends without its parent's exit handlers.
                    unsafe { libc::_exit(i32::from(!told)) }
                }
                child => child,
            };
            drop(into);
            let mut text = String::new();
            // A child of the child's may hold the pipe; what is told ends with it.
            File::from(out).read_to_string(&mut text)?;
            let code = attempt::wait(child)?;
            match text.is_empty() {
                true => Ok(End::Held(format!("killed by signal {}", code - 128))),
                false => serde_json::from_str(&text).map_err(io::Error::other),
            }
        });
    made.unwrap_or_else(|error| End::Held(format!("no control: {error}")))
}

fn tell<T: serde::Serialize>(value: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

fn list() -> io::Result<()> {
    all().try_for_each(|attempt| {
        tell(&Listed {
            name: attempt.name.to_owned(),
            tries: attempt.tries.to_owned(),
            precedent: attempt.precedent.to_owned(),
            guards: attempt.guards.iter().map(|guard| format!("{guard:?}")).collect(),
            control: format!("{:?}", attempt.control),
            roles: attempt.roles.to_vec(),
            host_network: attempt.host_network,
        })
    })
}

fn inside(targets: &Targets, role: Role) -> io::Result<()> {
    all().filter(|attempt| attempt.roles.contains(&role)).try_for_each(|attempt| {
        let end = run(attempt, targets, || Ok(()));
        tell(&Found { name: attempt.name.to_owned(), alone: None, end })
    })
}

/// Each attempt bare, then with each of its guards that can be put up alone.
fn controls(targets: &Targets, capabilities: u64) -> io::Result<()> {
    control::leak()?;
    all().try_for_each(|attempt| {
        let name = attempt.name.to_owned();
        let end = control::bare(attempt, targets)?;
        let bare = end == End::Through;
        tell(&Found { name: name.clone(), alone: None, end })?;
        let alone =
            attempt.guards.iter().filter(|guard| matches!(guard, Guard::Filter | Guard::Capabilities));
        // What this kernel does not have shows nothing.
        alone.filter(|_| bare).try_for_each(|guard| {
            // Root keeps some, the user none.
            let kept = if attempt.roles == [Role::User] { 0 } else { capabilities };
            let end = control::alone(attempt, targets, *guard, kept)?;
            tell(&Found { name: name.clone(), alone: Some(format!("{guard:?}")), end })
        })
    })
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let targets = |text: &str| serde_json::from_str::<Targets>(text).map_err(io::Error::other);
    let done = match words[..] {
        ["list"] => list(),
        ["victim"] => victim::be(),
        ["facts"] => facts::gather().and_then(|facts| tell(&facts)),
        ["user", text] => targets(text).and_then(|targets| inside(&targets, Role::User)),
        ["root", text] => targets(text).and_then(|targets| inside(&targets, Role::Root)),
        ["controls", text, capabilities] => targets(text).and_then(|targets| {
            controls(&targets, u64::from_str_radix(capabilities, 16).map_err(io::Error::other)?)
        }),
        ["prepare", directory] => control::prepare(directory),
        ["gained-id"] => identity::gained_id(),
        ["gained-capability"] => identity::gained_capability(),
        _ => Err(io::Error::other("started by tests, which say what for")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("escape: {error}");
            ExitCode::FAILURE
        }
    }
}
