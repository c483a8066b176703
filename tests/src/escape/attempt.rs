//! What an attempt is, and the few ways to make one.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use casemate_tests::escapes::{Role, Targets};

/// What holds an attempt; several where several do, each by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// The system call filter.
    Filter,
    /// Capabilities that are not there.
    Capabilities,
    /// Two id maps: no id inside but the user's own is the user's.
    Ids,
    /// A root of its own, with nothing of the host's in it that was not granted.
    Root,
    /// A namespace of its own.
    Processes,
    Network,
    Ipc,
    Names,
    /// Paths of /proc and /sys: covered, or read-only.
    Covered,
    ReadOnly,
    /// A private /dev.
    Devices,
    NoNewPrivileges,
    /// Init belongs to nobody inside.
    Undumpable,
    /// Three descriptors, none of them a regular file or a directory of the host.
    Descriptors,
    /// Overlayfs allows no marks of its own.
    Overlay,
    /// With the host's network.
    Landlock,
}

/// Where it is shown to succeed: the guard switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// The same user, outside: no wall at all.
    Host,
    /// Root of new namespaces of every kind, with all capabilities, the user mapped as themselves; no filter, nothing covered.
    Throwaway,
    /// This kernel may not have what is tried: it counts where it succeeds in a throwaway.
    Maybe,
}

pub type Done = io::Result<()>;

pub struct Attempt {
    pub name: &'static str,
    pub tries: &'static str,
    pub precedent: &'static str,
    pub guards: &'static [Guard],
    pub control: Control,
    pub roles: &'static [Role],
    /// `false` where it is no escape with `network = "host"`, or cannot be told from one.
    pub host_network: bool,
    pub run: fn(&Targets) -> Done,
}

pub const BOTH: &[Role] = &[Role::User, Role::Root];

pub const fn attempt(
    name: &'static str,
    tries: &'static str,
    precedent: &'static str,
    guards: &'static [Guard],
    control: Control,
    run: fn(&Targets) -> Done,
) -> Attempt {
    Attempt { name, tries, precedent, guards, control, roles: BOTH, host_network: true, run }
}

impl Attempt {
    pub const fn by(mut self, roles: &'static [Role]) -> Self {
        self.roles = roles;
        self
    }

    pub const fn own_network(mut self) -> Self {
        self.host_network = false;
        self
    }
}

/// A word that is passed to the kernel.
pub trait Word {
    fn word(self) -> i64;
}

impl Word for i32 {
    fn word(self) -> i64 {
        self.into()
    }
}

impl Word for i64 {
    fn word(self) -> i64 {
        self
    }
}

impl Word for u32 {
    fn word(self) -> i64 {
        self.into()
    }
}

impl Word for u64 {
    fn word(self) -> i64 {
        self as i64
    }
}

impl Word for usize {
    fn word(self) -> i64 {
        self as i64
    }
}

impl Word for &CStr {
    fn word(self) -> i64 {
        self.as_ptr() as i64
    }
}

impl<T> Word for *const T {
    fn word(self) -> i64 {
        self as i64
    }
}

impl<T> Word for *mut T {
    fn word(self) -> i64 {
        self as i64
    }
}

pub fn raw(number: i64, words: [i64; 6]) -> io::Result<i64> {
    let [a, b, c, d, e, f] = words;
    // SAFETY: none that the compiler could know of. Attempts pass memory of theirs that outlives the call, of the size that
    // the call takes, or addresses that the kernel refuses.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A system call, by itself. What its words point to, which may be made for it alone, lives until it returns: so does all that a
/// match looks at, unlike what a `let` is made of.
#[macro_export]
macro_rules! call {
    ($number:expr $(, $word:expr)* $(,)?) => {
        match [$($crate::attempt::Word::word($word)),*] {
            given => {
                let mut words = [0; 6];
                words[..given.len()].copy_from_slice(&given);
                $crate::attempt::raw($number, words)
            }
        }
    };
}

pub fn done<T>(result: io::Result<T>) -> Done {
    result.map(drop)
}

/// Through, too, where the kernel's code is reached and says this: there is nothing that it could be given here.
pub fn reaches(result: io::Result<i64>, errno: i32) -> Done {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => Ok(()),
        other => done(other),
    }
}

pub fn held(why: &str) -> Done {
    Err(io::Error::other(why.to_owned()))
}

pub fn only_if(through: bool, why_not: &str) -> Done {
    if through { Ok(()) } else { held(why_not) }
}

pub fn c(text: &str) -> CString {
    CString::new(text).expect("no NUL")
}

pub fn own(descriptor: i64) -> OwnedFd {
    let descriptor = i32::try_from(descriptor).expect("a descriptor");
    // SAFETY: the kernel has just made it for the caller.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

pub fn read(path: &str) -> Done {
    let mut file = File::open(path)?;
    done(io::Read::read(&mut file, &mut [0; 16]))
}

pub fn write(path: &str, text: &str) -> Done {
    let mut file = File::options().write(true).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}

/// That it is there and open to us, whatever it holds.
pub fn open(path: &str, flags: i32) -> io::Result<OwnedFd> {
    call!(libc::SYS_openat, libc::AT_FDCWD, c(path).as_c_str(), flags | libc::O_CLOEXEC | libc::O_NONBLOCK)
        .map(own)
}

/// Fork; the child ends with what `run` gives it to end with.
pub fn in_child(run: impl FnOnce() -> i32) -> io::Result<i32> {
    // SAFETY: this process has a single thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = run();
            // SAFETY: a child of a fork ends without its parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
        pid => wait(pid),
    }
}

/// The exit code of a child, 128 and more for a signal.
pub fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the status outlives the call.
        match unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } {
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            -1 => return Err(io::Error::last_os_error()),
            _ if libc::WIFSIGNALED(status) => return Ok(128 + libc::WTERMSIG(status)),
            _ => return Ok(libc::WEXITSTATUS(status)),
        }
    }
}
