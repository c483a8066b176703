//! Terminals of the environment's own devpts (/dev/ptmx leads to /dev/pts/ptmx).

use std::os::fd::{AsFd, OwnedFd};

use casemate_sandbox::control::Size;
use nix::unistd::{Uid, setfsuid};
use rustix::pty::{OpenptFlags, openpt};

use crate::InitError;
use crate::mounts::step;
use crate::sys;

pub struct Terminal {
    pub master: OwnedFd,
    pub number: u64,
}

/// It belongs to whoever opens it, so that init, which may change nobody's files, need not give it away. First is the slave.
pub fn open(owner: Uid, size: Size) -> Result<(OwnedFd, Terminal), InitError> {
    let own = setfsuid(owner);
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC);
    // The call tells no failure, but whose files were ours until now.
    let was = setfsuid(own);
    let master = step("open a terminal", master)?;
    if was != owner {
        return step("open a terminal", Err(std::io::Error::other("the kernel refuses the user's id")));
    }
    step("unlock a terminal", rustix::pty::unlockpt(&master))?;
    let window =
        rustix::termios::Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    step("size a terminal", rustix::termios::tcsetwinsize(&master, window))?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = step("open a terminal", rustix::pty::ioctl_tiocgptpeer(&master, flags))?;
    let number = step("look at a terminal", sys::terminal_number(master.as_fd()))?;
    Ok((slave, Terminal { master, number }))
}
