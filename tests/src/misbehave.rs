//! A worker gone bad: confined as the worker by whose name it is started, it does what its request says. Only tests start
//! it.

use std::ffi::CString;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::process::ExitCode;
use std::time::Duration;

use casemate_tests::misdeeds::{Argument, DEAF, MUTE, Outcome, PROGRESS, Step, UNCONFINED};
use casemate_worker::confine::{User, close_from, confine, exit};
use casemate_worker::profiles::{FETCH, INDEX, TREE, UNPACK};
use casemate_worker::protocol::{Envelope, FD_EVENTS, FD_FIRST, Failure};
use casemate_worker::run;

/// To descriptors that others own: a bad worker minds no ownership.
fn write(descriptor: i32, mut bytes: &[u8]) -> Result<(), nix::Error> {
    // SAFETY: standard error and FD_EVENTS stay open for as long as this process, unless a step closes them, and then
    // nothing else is opened.
    let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor) };
    while !bytes.is_empty() {
        bytes = &bytes[nix::unistd::write(descriptor, bytes)?..];
    }
    Ok(())
}

fn repeat(descriptor: i32, text: &str, times: u64) -> Result<(), nix::Error> {
    let mut done = 0;
    while times == 0 || done < times {
        write(descriptor, text.as_bytes())?;
        done += 1;
    }
    Ok(())
}

/// The memory that arguments point to is never freed: the process is short.
fn argument(argument: &Argument) -> i64 {
    match argument {
        Argument::Number(number) => *number,
        Argument::Text(text) => CString::new(text.as_str()).expect("no NUL").into_raw() as i64,
        Argument::Words(words) => {
            let words: Vec<i64> = words.iter().map(self::argument).collect();
            words.leak().as_mut_ptr() as i64
        }
    }
}

fn step(step: &Step) -> i32 {
    let done = match step {
        Step::Call { number, arguments } => {
            let mut words = [0; 6];
            for (word, given) in words.iter_mut().zip(arguments) {
                *word = argument(given);
            }
            let [a, b, c, d, e, f] = words;
            // SAFETY: none that the compiler could know of. The tests give calls that fail, or that touch only memory
            // made for them above.
            nix::errno::Errno::result(unsafe { libc::syscall(*number, a, b, c, d, e, f) }).map(drop)
        }
        Step::Connect { port } => {
            return match std::net::TcpStream::connect(("127.0.0.1", *port)) {
                Ok(_) => 0,
                Err(error) => error.raw_os_error().unwrap_or(-1),
            };
        }
        Step::Say { text, times } => repeat(FD_EVENTS, text, *times),
        Step::Log { text, times } => repeat(2, text, *times),
        Step::Drip => loop {
            if let Err(error) = write(FD_EVENTS, PROGRESS.as_bytes()) {
                break Err(error);
            }
            std::thread::sleep(Duration::from_millis(50));
        },
        Step::CloseEvents => nix::unistd::close(FD_EVENTS),
        Step::Hang => hang(),
        Step::Panic => panic!("as asked"),
        Step::Abort => std::process::abort(),
        Step::Exit(code) => std::process::exit(*code),
    };
    done.map_or_else(|errno| errno as i32, |()| 0)
}

fn hang() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn work(steps: &[Step]) -> Outcome {
    Outcome { errno: steps.iter().fold(0, |_, one| step(one)) }
}

fn unconfined() -> ExitCode {
    let confined = "{\"event\":\"confined\",\"layers\":[]}\n";
    let mut request = Vec::new();
    write(FD_EVENTS, confined.as_bytes()).expect("events");
    std::io::stdin().lock().read_to_end(&mut request).expect("request");
    let request: Envelope<Vec<Step>> = serde_json::from_slice(&request).expect("steps");
    let errno = work(&request.request).errno;
    let done = format!("{{\"event\":\"done\",\"result\":{{\"errno\":{errno}}}}}\n");
    write(FD_EVENTS, done.as_bytes()).expect("events");
    exit::OK.into()
}

fn deaf() -> ExitCode {
    close_from(FD_FIRST + INDEX.descriptors).expect("close");
    let user = User::from_arguments(std::env::args().skip(1)).expect("user");
    confine(&INDEX, user, || Ok(())).expect("confinement");
    write(FD_EVENTS, b"{\"event\":\"confined\",\"layers\":[]}\n").expect("events");
    hang()
}

fn main() -> ExitCode {
    let program = std::env::args().next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default();
    if let Some(profile) = [&FETCH, &INDEX, &UNPACK, &TREE].into_iter().find(|profile| profile.name == name) {
        return run(profile, || Ok::<_, Failure>(()), |(), steps: Vec<Step>, _| Ok(work(&steps)));
    }
    match name {
        UNCONFINED => unconfined(),
        DEAF => deaf(),
        MUTE => hang(),
        _ => {
            let _ = writeln!(std::io::stderr(), "{program}: started by tests, under a name that says how");
            exit::UNCONFINED.into()
        }
    }
}
