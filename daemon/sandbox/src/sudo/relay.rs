//! Between our streams and the session's: signals, the exit status, and, where ours are a terminal, a terminal of its own, so
//! that what runs as root can neither type into ours nor lose job control.

use std::io::IsTerminal;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{
    OptionalActions, Termios, Winsize, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr, tcsetwinsize,
};

use crate::{Failure, step};

/// The size of our terminal, if all our streams are one and we are in its foreground: from the background it could not be
/// set to raw.
pub fn terminal() -> Option<Winsize> {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    if !(stdin.is_terminal() && stdout.is_terminal() && stderr.is_terminal()) {
        return None;
    }
    let foreground = tcgetpgrp(&stdin).is_ok_and(|group| group == rustix::process::getpgrp());
    if foreground { tcgetwinsize(&stdin).ok() } else { None }
}

/// Signals to us that are meant for the command. Caught from before it starts.
pub struct Signals(SignalFd);

impl Signals {
    pub fn catch() -> Result<Self, Failure> {
        let mut mask = SigSet::empty();
        for signal in [
            Signal::SIGINT,
            Signal::SIGTERM,
            Signal::SIGHUP,
            Signal::SIGQUIT,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGWINCH,
        ] {
            mask.add(signal);
        }
        step("block signals", mask.thread_block())?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        step("catch signals", SignalFd::with_flags(&mask, flags)).map(Self)
    }
}

/// The terminal in raw mode, put back however this ends.
struct Raw(Termios);

impl Raw {
    fn set() -> Result<Self, Failure> {
        let stdin = std::io::stdin();
        let before = step("read the terminal's settings", tcgetattr(&stdin))?;
        let mut raw = before.clone();
        raw.make_raw();
        step("set the terminal to raw", tcsetattr(&stdin, OptionalActions::Drain, &raw))?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no setting.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.0);
    }
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Copy what is there. `false` at the end of either side.
fn copy(from: impl AsFd, to: impl AsFd) -> bool {
    let mut block = [0; 16 << 10];
    match rustix::io::read(from, &mut block) {
        Ok(0) => false,
        Ok(count) => write_all(to, &block[..count]).is_ok(),
        Err(error) => error == Errno::INTR || error == Errno::AGAIN,
    }
}

/// Until the session has ended; its exit status.
pub fn follow(
    status: &OwnedFd,
    signals: &Signals,
    master: Option<&OwnedFd>,
    forward: impl Fn(i32),
) -> Result<u8, Failure> {
    let raw = master.map(|_| Raw::set()).transpose()?;
    let (stdin, stdout) = (std::io::stdin(), std::io::stdout());
    let (mut reads, mut shows) = (master.is_some(), master.is_some());
    let mut line = Vec::new();
    loop {
        let nothing = PollFlags::empty();
        let wanted = |yes: bool| if yes { PollFlags::IN } else { nothing };
        // A descriptor that is not asked about still tells of its end: then another one stands in for it.
        let input = if reads { stdin.as_fd() } else { status.as_fd() };
        let output = if shows { master.unwrap_or(status).as_fd() } else { status.as_fd() };
        let mut ready = [
            PollFd::new(status, PollFlags::IN),
            PollFd::new(&signals.0, PollFlags::IN),
            PollFd::from_borrowed_fd(input, wanted(reads)),
            PollFd::from_borrowed_fd(output, wanted(shows)),
        ];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            error => {
                step("wait", error)?;
            }
        }
        let [ended, signalled, typed, printed] = ready.map(|one| !one.revents().is_empty());
        while let (true, Ok(Some(signal))) = (signalled, signals.0.read_signal()) {
            let number = i32::try_from(signal.ssi_signo).unwrap_or_default();
            match (number == Signal::SIGWINCH as i32, master) {
                (true, Some(master)) => {
                    if let Ok(size) = tcgetwinsize(&stdin) {
                        // The session may be gone already.
                        let _ = tcsetwinsize(master, size);
                    }
                }
                (true, None) => {}
                (false, _) => forward(number),
            }
        }
        if let Some(master) = master {
            if printed && shows {
                shows = copy(master, &stdout);
            }
            if typed && reads {
                reads = copy(&stdin, master);
            }
        }
        if ended {
            let mut block = [0; 64];
            match rustix::io::read(status, &mut block) {
                Ok(0) => break,
                Ok(count) => line.extend_from_slice(&block[..count]),
                Err(Errno::INTR) => {}
                Err(error) => step("read the exit status", Err(error))?,
            }
        }
    }
    if let (Some(master), true) = (master, shows) {
        // What it printed last is there by now; who it left in the background is not waited for.
        let _ = rustix::io::ioctl_fionbio(master, true);
        let mut block = [0; 16 << 10];
        while let Ok(count @ 1..) = rustix::io::read(master, &mut block) {
            if write_all(&stdout, &block[..count]).is_err() {
                break;
            }
        }
    }
    drop(raw);
    let text = String::from_utf8_lossy(&line);
    let ended =
        text.trim_end().split_once(' ').and_then(|(how, number)| Some((how, number.parse::<u8>().ok()?)));
    match ended {
        Some(("exit", code)) => Ok(code),
        Some(("signal", number)) => Ok(number.saturating_add(128)),
        _ => Err(Failure::Stopped),
    }
}
