//! Becoming somebody else, and reaching the user's own files as root of the environment.

use std::io;

use casemate_tests::escapes::{Role, Targets};

use crate::attempt::Control::{Maybe, Throwaway};
use crate::attempt::Guard::{Capabilities, Ids, NoNewPrivileges};
use crate::attempt::{Attempt, Done, attempt, c, done, in_child, only_if, open, read};
use crate::call;

const ROOT: &[Role] = &[Role::Root];
const USER: &[Role] = &[Role::User];
const NO_CHANGE: i32 = -1;

/// As the user of that number; capabilities are lost on the way.
fn become_user(targets: &Targets) -> io::Result<i64> {
    call!(libc::SYS_setresuid, targets.user, targets.user, targets.user)
}

fn as_user_read(targets: &Targets) -> Done {
    become_user(targets)?;
    read(&targets.secret)
}

fn as_user_create(targets: &Targets) -> Done {
    let directory = targets.secret.rsplit_once('/').expect("a directory").0.to_owned();
    become_user(targets)?;
    let made = format!("{directory}/by-root");
    std::fs::write(&made, "")?;
    std::fs::remove_file(made)
}

/// With the user's number for files alone; capabilities for files are lost on the way.
fn file_system_id(targets: &Targets) -> Done {
    call!(libc::SYS_setfsuid, targets.user)?;
    read(&targets.secret)
}

/// Execute `program` as the user; it tells by its status whether it gained anything.
fn gains(program: &str, word: &str, targets: &Targets) -> Done {
    let program = c(program);
    let word = c(word);
    let arguments = [program.as_ptr(), word.as_ptr(), std::ptr::null()];
    let variables = [std::ptr::null::<u8>()];
    let code = in_child(|| {
        if call!(libc::SYS_geteuid).is_ok_and(|id| id == 0) {
            let _ = call!(libc::SYS_setresgid, targets.user, targets.user, targets.user);
            let _ = become_user(targets);
        }
        let _ = call!(libc::SYS_execve, program.as_c_str(), arguments.as_ptr(), variables.as_ptr());
        99
    })?;
    match code {
        99 => Err(io::Error::other(format!("{program:?} cannot be executed"))),
        code => only_if(code == 0, "nothing was gained"),
    }
}

/// What the program that was executed says.
pub fn gained_id() -> Done {
    only_if(call!(libc::SYS_geteuid)? != call!(libc::SYS_getuid)?, "the same id")
}

pub fn gained_capability() -> Done {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let permitted = status.lines().find_map(|line| line.strip_prefix("CapPrm:"));
    only_if(permitted.is_some_and(|set| set.trim().contains(|digit| digit != '0')), "no capability")
}

/// linux/capability.h: version 3 of this process, then effective, permitted, inheritable of 32 each.
fn capabilities(set: [u32; 6]) -> Done {
    let header = [0x2008_0522u32, 0];
    done(call!(libc::SYS_capset, header.as_ptr(), set.as_ptr()))
}

const SYS_ADMIN: u32 = 1 << 21;
const NET_RAW: u32 = 1 << 13;

fn ambient() -> Done {
    capabilities([NET_RAW, NET_RAW, NET_RAW, 0, 0, 0])?;
    done(call!(libc::SYS_prctl, libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, 13, 0, 0))
}

fn give_capability(targets: &Targets) -> Done {
    let path = format!("{}/file", targets.scratch);
    std::fs::write(&path, "")?;
    // linux/capability.h, struct vfs_cap_data of version 2: effective, CAP_NET_RAW.
    let data = [0x0200_0001u32, NET_RAW, 0, 0, 0];
    let path = c(&path);
    done(call!(
        libc::SYS_setxattr,
        path.as_c_str(),
        c"security.capability",
        data.as_ptr(),
        size_of_val(&data),
        0
    ))
}

fn limit(resource: u32, more: u64) -> Done {
    let mut now = [0u64; 2];
    call!(libc::SYS_prlimit64, 0, resource, 0, now.as_mut_ptr())?;
    let next = [now[0], now[1].checked_add(more).ok_or(io::ErrorKind::InvalidInput)?];
    done(call!(libc::SYS_prlimit64, 0, resource, next.as_ptr(), 0))
}

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("read-as-root", "the user's private file, with root's capabilities", "DESIGN.md, ids", &[Ids], Throwaway, |targets| read(&targets.secret)).by(ROOT),
    attempt("write-as-root", "write to it", "DESIGN.md, ids", &[Ids], Throwaway, |targets| done(open(&targets.secret, libc::O_WRONLY | libc::O_APPEND))).by(ROOT),
    attempt("become-user", "become the user and read it", "DESIGN.md, ids", &[Ids], Throwaway, as_user_read).by(ROOT),
    attempt("become-user-create", "become the user and make a file in their directory", "DESIGN.md, ids", &[Ids], Throwaway, as_user_create).by(ROOT),
    attempt("become-user-for-files", "the same for files alone", "DESIGN.md, ids", &[Ids], Throwaway, file_system_id).by(ROOT),
    attempt("chown-users-file", "give the user's file away", "DESIGN.md, ids", &[Ids], Throwaway, |targets| {
        done(call!(libc::SYS_fchownat, libc::AT_FDCWD, c(&targets.secret).as_c_str(), targets.user, NO_CHANGE, 0))
    }).by(ROOT),
    attempt("chmod-users-file", "open the user's file to all", "DESIGN.md, ids", &[Ids], Throwaway, |targets| {
        done(call!(libc::SYS_fchmodat, libc::AT_FDCWD, c(&targets.secret).as_c_str(), 0o600, 0))
    }).by(ROOT),
    attempt("mark-users-file", "an attribute on the user's file", "DESIGN.md, ids", &[Ids], Throwaway, |targets| {
        done(call!(libc::SYS_setxattr, c(&targets.secret).as_c_str(), c"user.mark", c"x", 1, 0))
    }).by(ROOT),
    attempt("link-users-file", "another name for the user's file", "CVE-2024-42472", &[Ids], Throwaway, |targets| {
        let other = format!("{}-linked", targets.secret);
        std::fs::hard_link(&targets.secret, &other)?;
        std::fs::remove_file(other)
    }).by(ROOT),
    attempt("create-as-root", "a file of root's in the user's directory", "DESIGN.md, ids", &[Ids], Throwaway, |targets| {
        let made = format!("{}-by-root", targets.secret);
        std::fs::write(&made, "")?;
        std::fs::remove_file(made)
    }).by(ROOT),
    attempt("setuid", "become somebody else", "podman's capabilities", &[Capabilities], Throwaway, |_| done(call!(libc::SYS_setuid, 1))).by(USER),
    attempt("setresuid", "the same, by the other call", "podman's capabilities", &[Capabilities], Throwaway, |_| done(call!(libc::SYS_setresuid, 1, 1, 1))).by(USER),
    attempt("setgid", "join another group", "podman's capabilities", &[Capabilities], Throwaway, |_| done(call!(libc::SYS_setgid, 1))).by(USER),
    attempt("setgroups", "have more groups", "CVE-2018-7169", &[Capabilities], Throwaway, |_| {
        let groups = [0u32, 5];
        done(call!(libc::SYS_setgroups, 2, groups.as_ptr()))
    }).by(USER),
    attempt("set-id-program", "a program of root's with the set-id bit", "CVE-2021-4034", &[NoNewPrivileges], Throwaway, |targets| {
        gains(&targets.set_id, "gained-id", targets)
    }).by(USER),
    attempt("capable-program", "a program with capabilities", "CVE-2018-18955", &[NoNewPrivileges], Throwaway, |targets| {
        gains(&targets.capable, "gained-capability", targets)
    }).by(USER),
    attempt("capset", "take CAP_SYS_ADMIN", "podman's capabilities", &[Capabilities], Throwaway, |_| capabilities([SYS_ADMIN, SYS_ADMIN, 0, 0, 0, 0])),
    attempt("capset-raw", "take CAP_NET_RAW", "podman's capabilities", &[Capabilities], Throwaway, |_| capabilities([NET_RAW, NET_RAW, 0, 0, 0, 0])),
    attempt("ambient", "have programs inherit capabilities", "CVE-2022-24769", &[Capabilities], Throwaway, |_| ambient()),
    attempt("securebits", "change what root means", "podman's capabilities", &[Capabilities], Throwaway, |_| {
        done(call!(libc::SYS_prctl, libc::PR_SET_SECUREBITS, 1, 0, 0, 0))
    }).by(USER),
    attempt("file-capability", "give a program capabilities", "CVE-2018-18955", &[Capabilities], Throwaway, give_capability).by(USER),
    attempt("more-descriptors", "a higher limit on open files", "podman's capabilities", &[Capabilities], Maybe, |_| limit(libc::RLIMIT_NOFILE, 1)),
    attempt("spared", "not to be killed when memory runs out", "podman's capabilities", &[Capabilities], Maybe, |_| {
        crate::attempt::write("/proc/self/oom_score_adj", "-1000")
    }),
];
