//! A user namespace of one's own, from inside: unshared, mapped, entered.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, unshare};

use crate::confine::ConfineError;
use crate::ids;

/// Who this process is to be in its new user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// The user, as themselves.
    Own,
    /// Root of the outer namespace.
    Outer,
    /// The same, still in the user's supplementary groups, which are never to be had again once they are dropped.
    OuterInGroups,
    /// Root of the inner namespace, through an outer one.
    Inner,
}

/// What the command line says of the user: `range UID GID` or `single UID GID`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub range: bool,
    pub uid: u32,
    pub gid: u32,
}

impl User {
    pub fn from_arguments(mut arguments: impl Iterator<Item = String>) -> Result<Self, ConfineError> {
        let parse = |text: Option<String>| text.and_then(|text| text.parse().ok());
        let range = match arguments.next().as_deref() {
            Some("range") => true,
            Some("single") => false,
            _ => return Err(ConfineError::Arguments),
        };
        match (parse(arguments.next()), parse(arguments.next()), arguments.next()) {
            (Some(uid), Some(gid), None) => Ok(Self { range, uid, gid }),
            _ => Err(ConfineError::Arguments),
        }
    }
}

pub(crate) fn step<T, E: Into<std::io::Error>>(
    what: &'static str,
    result: Result<T, E>,
) -> Result<T, ConfineError> {
    result.map_err(|error| ConfineError::Step { what, source: error.into() })
}

fn write(path: &str, text: &str) -> Result<(), ConfineError> {
    step(
        "write an id map",
        File::options().write(true).open(path).and_then(|mut file| file.write_all(text.as_bytes())),
    )
}

/// Map one id by ourselves, as anybody may.
fn map_one(inside: (u32, u32), user: User) -> Result<(), ConfineError> {
    write("/proc/self/setgroups", "deny")?;
    write("/proc/self/uid_map", &format!("{} {} 1", inside.0, user.uid))?;
    write("/proc/self/gid_map", &format!("{} {} 1", inside.1, user.gid))
}

/// Become root of the user namespace we are in.
pub fn become_root(groups: bool) -> Result<(), ConfineError> {
    let root = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
    if groups {
        step("drop groups", nix::unistd::setgroups(&[]))?;
    }
    step("become root of the namespace", nix::unistd::setresgid(root.1, root.1, root.1))?;
    step("become root of the namespace", nix::unistd::setresuid(root.0, root.0, root.0))
}

/// Unshare the user namespace. With a range the daemon is told (`announce`) and writes the maps; its word is one byte on
/// standard input. Afterwards we are root of the outer namespace, or ourselves for [`Ids::Own`].
pub fn enter_user_namespace(
    ids: Ids,
    user: User,
    announce: impl FnOnce() -> std::io::Result<()>,
) -> Result<(), ConfineError> {
    step("make a user namespace", unshare(CloneFlags::CLONE_NEWUSER))?;
    match ids {
        Ids::Own => map_one((user.uid, user.gid), user),
        Ids::Outer | Ids::OuterInGroups | Ids::Inner if user.range => {
            step("announce the user namespace", announce())?;
            let mut go = [0];
            step("wait for the id maps", std::io::stdin().lock().read_exact(&mut go))?;
            if go != *b"\n" {
                return Err(ConfineError::Arguments);
            }
            become_root(ids != Ids::OuterInGroups)
        }
        Ids::Outer | Ids::OuterInGroups | Ids::Inner => {
            map_one((0, 0), user)?;
            become_root(false)
        }
    }
}

/// `/proc/PID` of a child, kept open so that its maps can be written when our own root has no `/proc` any more.
pub struct ChildProc(OwnedFd);

impl ChildProc {
    pub fn open(pid: i32) -> Result<Self, ConfineError> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        step("open a child's /proc", rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty())).map(Self)
    }

    /// Write the inner map of a child that has unshared its user namespace. It must be dumpable: else its files in
    /// `/proc` belong to nobody we could be.
    pub fn write_inner(&self, user: User) -> Result<(), ConfineError> {
        use rustix::fs::{Mode, OFlags};
        for (name, id) in [("uid_map", user.uid), ("gid_map", user.gid)] {
            let file = rustix::fs::openat(&self.0, name, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            let mut file = File::from(step("open the inner id map", file)?);
            step("write the inner id map", file.write_all(ids::to_text(&ids::inner(id)).as_bytes()))?;
        }
        Ok(())
    }
}
