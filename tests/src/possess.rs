//! A real worker, possessed: traced from its first instruction on and, once it has confined itself and read its request, made to
//! do what a test says in place of its own next system call. What confines it is its own doing, so what is refused here is
//! refused to the program that is shipped. Only tests start it.
//!
//! Started under a worker's name, it starts itself once more as the tracer, waits to be seized, and becomes the real worker. The
//! tracer puts what calls point to into a variable of the worker's environment, while that may still be written: once
//! confined, nothing of a worker but its registers is open to anybody.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use casemate_tests::misdeeds::{Argument, Outcome, PROGRESS, REAL, STEPS, Step};
use casemate_worker::confine::{close_from, exit};
use casemate_worker::protocol::{Event, FD_EVENTS, FD_FIRST};
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The tracer's own name: the test takes what is called like a worker for one.
const TRACER: &str = "tracer-of-tests";
/// The variable that makes room in the worker's memory; what it is called like comes first there.
const ROOM: &str = "CASEMATE_TESTS_ROOM";
/// Less than the kernel takes for one variable.
const ROOM_SIZE: usize = 100_000;

fn main() -> ExitCode {
    let mut arguments = std::env::args();
    let program = arguments.next().unwrap_or_default();
    if program == TRACER {
        let worker = arguments.next().and_then(|pid| pid.parse().ok()).expect("a pid");
        return match trace(Pid::from_raw(worker)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "{TRACER}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let name = program.rsplit('/').next().unwrap_or_default();
    let real = PathBuf::from(std::env::var_os(REAL).expect("where the real workers are")).join(name);
    let mut tracer = Command::new("/proc/self/exe");
    tracer.arg0(TRACER).arg(std::process::id().to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
    let seized = tracer.spawn().expect("the tracer").stdout.take().expect("pipe").read_exact(&mut [0]);
    if seized.is_err() {
        return exit::UNCONFINED.into();
    }
    let mut worker = Command::new(real);
    worker.arg0(&program).args(arguments).env_remove(REAL).env_remove(STEPS);
    let error = worker.env(ROOM, ".".repeat(ROOM_SIZE)).exec();
    let _ = writeln!(std::io::stderr(), "{program}: {error}");
    exit::UNCONFINED.into()
}

/// A step, with addresses in the worker in place of what it points to.
enum Deed {
    Call { number: i64, arguments: [u64; 6] },
    Connect { address: u64 },
    Write { descriptor: i32, text: u64, length: u64, times: u64 },
    Drip { text: u64, length: u64 },
    CloseEvents,
    Hang,
    Exit(i32),
}

/// What goes into the worker's memory.
struct Room {
    address: u64,
    content: Vec<u8>,
}

impl Room {
    fn put(&mut self, bytes: &[u8]) -> u64 {
        self.content.resize(self.content.len().next_multiple_of(16), 0);
        let address = self.address + self.content.len() as u64;
        self.content.extend_from_slice(bytes);
        address
    }

    fn argument(&mut self, argument: &Argument) -> u64 {
        match argument {
            Argument::Number(number) => *number as u64,
            Argument::Text(text) => self.put(format!("{text}\0").as_bytes()),
            Argument::Words(words) => {
                let words: Vec<u8> =
                    words.iter().flat_map(|word| self.argument(word).to_ne_bytes()).collect();
                self.put(&words)
            }
        }
    }

    fn deed(&mut self, step: &Step) -> Deed {
        let mut write = |descriptor, text: &String, times| {
            let length = text.len() as u64;
            Deed::Write { descriptor, text: self.put(text.as_bytes()), length, times }
        };
        match step {
            Step::Call { number, arguments } => {
                let mut words = [0; 6];
                for (word, given) in words.iter_mut().zip(arguments) {
                    *word = self.argument(given);
                }
                Deed::Call { number: *number, arguments: words }
            }
            Step::Connect { port } => {
                // struct sockaddr_in: loopback.
                let mut address = [0; 16];
                address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
                address[2..4].copy_from_slice(&port.to_be_bytes());
                address[4..8].copy_from_slice(&[127, 0, 0, 1]);
                Deed::Connect { address: self.put(&address) }
            }
            Step::Say { text, times } => write(FD_EVENTS, text, *times),
            Step::Log { text, times } => write(2, text, *times),
            Step::Drip => Deed::Drip { text: self.put(PROGRESS.as_bytes()), length: PROGRESS.len() as u64 },
            Step::CloseEvents => Deed::CloseEvents,
            Step::Hang => Deed::Hang,
            Step::Exit(code) => Deed::Exit(*code),
            Step::Panic | Step::Abort => panic!("{step:?} is no system call: `misbehave` does it"),
        }
    }
}

/// Where the kernel has put [`ROOM`] in a process that has just been executed, and its memory.
fn room(worker: Pid) -> std::io::Result<(File, u64)> {
    let missing = || std::io::Error::other(format!("no {ROOM} in the worker's environment"));
    let stat = std::fs::read_to_string(format!("/proc/{worker}/stat"))?;
    // Fields 50 and 51, begin and end of the environment; the third one is the first after the name.
    let mut fields = stat.rsplit_once(')').into_iter().flat_map(|(_, rest)| rest.split_whitespace()).skip(47);
    let mut field = || fields.next().and_then(|field| field.parse::<u64>().ok()).ok_or_else(missing);
    let (begin, end) = (field()?, field()?);
    let memory = File::options().read(true).write(true).open(format!("/proc/{worker}/mem"))?;
    let mut environment = vec![0; (end - begin) as usize];
    memory.read_exact_at(&mut environment, begin)?;
    let name = format!("{ROOM}=").into_bytes();
    let found = environment.windows(name.len()).position(|window| window == name).ok_or_else(missing)?;
    Ok((memory, begin + (found + name.len()) as u64))
}

fn trace(worker: Pid) -> std::io::Result<()> {
    // As a worker would keep its descriptors open for it, were it to.
    close_from(FD_FIRST).map_err(std::io::Error::other)?;
    let steps = std::env::var(STEPS).map_err(std::io::Error::other)?;
    let steps: Vec<Step> = serde_json::from_str(&steps)?;
    let options = Options::PTRACE_O_EXITKILL
        | Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACEFORK;
    ptrace::seize(worker, options)?;
    std::io::stdout().write_all(b"\n")?;
    std::io::stdout().flush()?;
    let mut deeds = Vec::new();
    // The one that works, and whether the one that started it is on its way again: it writes maps for the other.
    let (mut child, mut forked) = (None, false);
    loop {
        if let (Some(pid), true) = (child, forked) {
            child = None;
            match (Possessed { pid, at: None }).run(&deeds) {
                // Killed meanwhile, as it should be.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        match waitpid(None, Some(WaitPidFlag::__WALL)) {
            Ok(WaitStatus::PtraceEvent(pid, _, libc::PTRACE_EVENT_EXEC)) if pid == worker => {
                let (memory, address) = room(worker)?;
                let mut room = Room { address, content: Vec::new() };
                deeds = steps.iter().map(|step| room.deed(step)).collect();
                assert!(room.content.len() < ROOM_SIZE, "{} bytes of steps", room.content.len());
                memory.write_all_at(&room.content, address)?;
                ptrace::cont(worker, None)?;
            }
            Ok(WaitStatus::PtraceEvent(pid, _, libc::PTRACE_EVENT_STOP)) if pid != worker => {
                child = Some(pid);
            }
            Ok(WaitStatus::PtraceEvent(pid, _, event)) => {
                forked |= event == libc::PTRACE_EVENT_FORK;
                go_on(pid, None)?;
            }
            Ok(WaitStatus::Stopped(pid, signal)) => go_on(pid, Some(signal))?,
            Ok(_) => {}
            Err(Errno::ECHILD) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn go_on(pid: Pid, signal: Option<nix::sys::signal::Signal>) -> Result<(), Errno> {
    match ptrace::cont(pid, signal) {
        // Killed meanwhile.
        Err(Errno::ESRCH) => Ok(()),
        other => other,
    }
}

type Registers = libc::user_regs_struct;

#[cfg(target_arch = "x86_64")]
mod machine {
    use super::*;

    /// At the entry of a system call: make it another one.
    pub fn replace(pid: Pid, before: Registers, number: i64, arguments: [u64; 6]) -> Result<(), Errno> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        ptrace::setregs(pid, Registers { orig_rax: number as u64, rdi, rsi, rdx, r10, r8, r9, ..before })
    }

    /// At the exit of one: come to the entry of the one of `before` again.
    pub fn again(pid: Pid, before: Registers) -> Result<(), Errno> {
        ptrace::setregs(pid, Registers { rip: before.rip - 2, rax: before.orig_rax, ..before })
    }
}

#[cfg(target_arch = "aarch64")]
mod machine {
    use super::*;

    const NT_ARM_SYSTEM_CALL: libc::c_int = 0x404;

    /// At the entry of a system call: make it another one.
    pub fn replace(
        pid: Pid,
        mut registers: Registers,
        number: i64,
        arguments: [u64; 6],
    ) -> Result<(), Errno> {
        registers.regs[..6].copy_from_slice(&arguments);
        ptrace::setregs(pid, registers)?;
        let mut number = number as libc::c_int;
        let mut place = libc::iovec { iov_base: (&raw mut number).cast(), iov_len: size_of_val(&number) };
        // SAFETY: the kernel reads `number` through `place`; both live until it returns.
        let done =
            unsafe { libc::ptrace(libc::PTRACE_SETREGSET, pid.as_raw(), NT_ARM_SYSTEM_CALL, &raw mut place) };
        Errno::result(done).map(drop)
    }

    /// At the exit of one: come to the entry of the one of `before` again.
    pub fn again(pid: Pid, before: Registers) -> Result<(), Errno> {
        ptrace::setregs(pid, Registers { pc: before.pc - 4, ..before })
    }
}

/// Where a traced process stands.
enum Stop {
    Entry {
        number: u64,
        descriptor: u64,
    },
    Exit {
        value: i64,
    },
    /// It has become another program.
    Executed,
    Gone,
}

struct Possessed {
    pid: Pid,
    /// At the entry of a system call, what its registers were.
    at: Option<Registers>,
}

impl Possessed {
    /// Let it go on to its next stop.
    fn next(&mut self) -> Result<Stop, Errno> {
        let mut signal = None;
        loop {
            ptrace::syscall(self.pid, signal.take())?;
            match waitpid(self.pid, Some(WaitPidFlag::__WALL))? {
                WaitStatus::PtraceSyscall(_) => {
                    let info = ptrace::syscall_info(self.pid)?;
                    // SAFETY: `op` says which part of the union the kernel wrote.
                    return Ok(unsafe {
                        match info.op {
                            libc::PTRACE_SYSCALL_INFO_ENTRY => {
                                Stop::Entry { number: info.u.entry.nr, descriptor: info.u.entry.args[0] }
                            }
                            _ => Stop::Exit { value: info.u.exit.sval },
                        }
                    });
                }
                WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC) => return Ok(Stop::Executed),
                WaitStatus::Stopped(_, delivered) => signal = Some(delivered),
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Ok(Stop::Gone),
                _ => {}
            }
        }
    }

    /// To the first system call after it has read its request to the end.
    fn confined(&mut self) -> Result<bool, Errno> {
        let (mut reads, mut read) = (false, false);
        loop {
            match self.next()? {
                Stop::Entry { .. } if read => {
                    self.at = Some(ptrace::getregs(self.pid)?);
                    return Ok(true);
                }
                Stop::Entry { number, descriptor } => {
                    reads = number == libc::SYS_read as u64 && descriptor == 0;
                }
                Stop::Exit { value } => read = reads && value == 0,
                Stop::Executed => {}
                Stop::Gone => return Ok(false),
            }
        }
    }

    /// What the kernel answers; nothing where it was the last call.
    fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<Option<i64>, Errno> {
        let Some(before) = self.at else { return Ok(None) };
        machine::replace(self.pid, before, number, arguments)?;
        loop {
            match self.next()? {
                Stop::Exit { value } => {
                    machine::again(self.pid, before)?;
                    return match self.next()? {
                        Stop::Entry { .. } => Ok(Some(value)),
                        _ => Ok(None),
                    };
                }
                Stop::Executed => return Ok(Some(0)),
                Stop::Entry { .. } => {}
                Stop::Gone => return Ok(None),
            }
        }
    }

    fn write(&mut self, descriptor: i32, text: u64, length: u64) -> Result<Option<i64>, Errno> {
        let mut done = 0;
        while done < length {
            let arguments = [descriptor as u64, text + done, length - done, 0, 0, 0];
            match self.call(libc::SYS_write, arguments)? {
                Some(count @ 1..) => done += count as u64,
                other => return Ok(other),
            }
        }
        Ok(Some(0))
    }

    fn deed(&mut self, deed: &Deed) -> Result<Option<i64>, Errno> {
        match *deed {
            Deed::Call { number, arguments } => self.call(number, arguments),
            Deed::Connect { address } => {
                let kind = [libc::AF_INET, libc::SOCK_STREAM, 0].map(|word| word as u64);
                match self.call(libc::SYS_socket, [kind[0], kind[1], kind[2], 0, 0, 0])? {
                    Some(socket @ 0..) => self.call(libc::SYS_connect, [socket as u64, address, 16, 0, 0, 0]),
                    other => Ok(other),
                }
            }
            Deed::Write { descriptor, text, length, times } => {
                let mut done = 0;
                while times == 0 || done < times {
                    match self.write(descriptor, text, length)? {
                        Some(0) => done += 1,
                        other => return Ok(other),
                    }
                }
                Ok(Some(0))
            }
            Deed::Drip { text, length } => loop {
                match self.write(FD_EVENTS, text, length)? {
                    Some(0) => std::thread::sleep(Duration::from_millis(50)),
                    other => return Ok(other),
                }
            },
            Deed::CloseEvents => {
                nix::unistd::close(FD_EVENTS)?;
                self.call(libc::SYS_close, [FD_EVENTS as u64, 0, 0, 0, 0, 0])
            }
            // It stands still until somebody kills it.
            Deed::Hang => waitpid(self.pid, Some(WaitPidFlag::__WALL)).map(|_| None),
            Deed::Exit(code) => self.call(libc::SYS_exit_group, [code as u64, 0, 0, 0, 0, 0]),
        }
    }

    /// What the last deed gave is its last word, which we say for it.
    fn run(mut self, deeds: &[Deed]) -> Result<(), Errno> {
        if !self.confined()? {
            return Ok(());
        }
        let mut errno = 0;
        for deed in deeds {
            let Some(value) = self.deed(deed)? else { return Ok(()) };
            errno = if value < 0 { -value as i32 } else { 0 };
        }
        let done = serde_json::to_vec(&Event::Done { result: Outcome { errno } }).expect("JSON");
        // SAFETY: a deed that closes it is followed by one that ends the worker.
        let events = unsafe { BorrowedFd::borrow_raw(FD_EVENTS) };
        nix::unistd::write(events.as_fd(), &[done, b"\n".to_vec()].concat())?;
        nix::unistd::close(FD_EVENTS)?;
        self.deed(&Deed::Exit(exit::OK.into())).map(drop)
    }
}
