//! Who is at which terminal: `/run/utmp` of utmp(5), for who(1) and its like. The file is opened before anything of the
//! environment runs and written by descriptor alone; what its root does to it afterwards is its own loss.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

/// Terminals beyond this are not listed: the file stays below 400 KiB.
const TERMINALS_MAX: u64 = 1_024;

pub struct Utmp(File);

/// Copy what fits, and leave a NUL at the end.
fn fill(field: &mut [libc::c_char], text: &str) {
    let most = field.len().saturating_sub(1);
    for (to, from) in field[..most].iter_mut().zip(text.bytes()) {
        *to = from as libc::c_char;
    }
}

impl Utmp {
    pub fn new(file: OwnedFd) -> Self {
        Self(file.into())
    }

    /// A session of `user` begins at terminal `number`, or (`None`) ends. It goes on without an entry where that fails, as
    /// the file is the environment's root's to spoil.
    pub fn note(&self, number: u64, pid: i32, user: Option<&str>) {
        if number >= TERMINALS_MAX {
            return;
        }
        // SAFETY: all zero is a valid utmpx.
        let mut entry: libc::utmpx = unsafe { std::mem::zeroed() };
        entry.ut_type = if user.is_some() { libc::USER_PROCESS } else { libc::DEAD_PROCESS };
        entry.ut_pid = pid;
        fill(&mut entry.ut_line, &format!("pts/{number}"));
        fill(&mut entry.ut_id, &number.to_string());
        fill(&mut entry.ut_user, user.unwrap_or_default());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        entry.ut_tv.tv_sec = now.as_secs() as _;
        entry.ut_tv.tv_usec = now.subsec_micros() as _;
        // SAFETY: the structure holds numbers alone and was zeroed, so each of its bytes, padding too, has a value.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const entry).cast::<u8>(), size_of::<libc::utmpx>()) };
        let _ = self.0.write_all_at(bytes, number * size_of::<libc::utmpx>() as u64);
    }
}
