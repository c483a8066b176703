//! Somebody at a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::{Winsize, openpty};

use crate::{DEADLINE, World, text};

/// A client in a terminal of its own, at which the test types.
pub struct Typist {
    pub child: Child,
    master: File,
    /// Another path to the client's terminal.
    pub name: std::path::PathBuf,
    printed: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Typist {
    pub fn sit_down(world: &World, arguments: &[&str]) -> Self {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(Some(&size), None).expect("pty");
        // The client must not hold its own window open.
        for end in [&pty.master, &pty.slave] {
            fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).expect("fcntl");
        }
        let name = nix::unistd::ttyname(&pty.slave).expect("name");
        let end = |slave: &OwnedFd| Stdio::from(slave.try_clone().expect("descriptor"));
        let mut command = world.command("setsid");
        command.args(["--ctty", "--wait"]).arg(world.casemate(&[]).get_program()).args(arguments);
        command.env("TERM", "xterm").stdin(end(&pty.slave)).stdout(end(&pty.slave)).stderr(end(&pty.slave));
        let child = command.spawn().expect("setsid");
        let master = File::from(pty.master);
        let mut reader = master.try_clone().expect("descriptor");
        let (sender, printed) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // EIO once the client, who alone holds the other end, is gone.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { child, master, name, printed, seen: Vec::new() }
    }

    pub fn types(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("typed");
    }

    /// Wait until this is printed; what came before it is forgotten.
    pub fn sees(&mut self, what: &str) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            if let Some(at) = text(&self.seen).find(what) {
                self.seen.drain(..at + what.len());
                return;
            }
            match self.printed.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(more) => self.seen.extend(more),
                Err(RecvTimeoutError::Timeout) => panic!("no {what:?} in {:?}", text(&self.seen)),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait().expect("status");
                    panic!("the client ended ({status}) without {what:?}: {:?}", text(&self.seen))
                }
            }
        }
    }

    /// The rest of a line.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        while !line.ends_with('\n') {
            if self.seen.is_empty() {
                self.seen = self.printed.recv_timeout(DEADLINE).expect("the rest of a line");
            }
            line.push(char::from(self.seen.remove(0)));
        }
        line.trim_end().to_owned()
    }

    /// Close the window.
    pub fn leaves(mut self) -> Child {
        drop(self.printed);
        // The reader ends, and with it its end of the terminal, when there is something to read that nobody wants.
        self.master.write_all(b"x").expect("typed");
        self.child
    }

    pub fn ends_with(mut self, code: i32) {
        self.types(&format!("exit {code}\n"));
        assert_eq!(self.child.wait().expect("status").code(), Some(code), "{:?}", text(&self.seen));
    }
}
