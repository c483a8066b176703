//! Whom a command is to run as: a line of the environment's passwd(5), read without NSS, which could load its code.

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::{Failure, step};

pub struct Target {
    pub name: String,
    pub home: String,
    pub shell: String,
    uid: u32,
    gid: u32,
}

impl Target {
    /// By name, or `#` and a number, as sudo(8) has it.
    pub fn find(wanted: &str) -> Result<Self, Failure> {
        let passwd = step("read /etc/passwd", std::fs::read_to_string("/etc/passwd"))?;
        let found = passwd.lines().filter_map(Self::parse);
        let mut found = found.filter(|one| {
            one.name == wanted || wanted.strip_prefix('#') == Some(one.uid.to_string().as_str())
        });
        found.next().ok_or_else(|| Failure::User(wanted.to_owned()))
    }

    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
        let absolute = |path: &str, default: &str| {
            if path.starts_with('/') { path.to_owned() } else { default.to_owned() }
        };
        Some(Self {
            name: name.to_owned(),
            home: absolute(home, "/"),
            shell: absolute(shell, "/bin/sh"),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
        })
    }

    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Become them, for good. Root stays as it is.
    pub fn assume(&self) -> Result<(), Failure> {
        if self.is_root() {
            return Ok(());
        }
        let group = std::fs::read_to_string("/etc/group").unwrap_or_default();
        let member = |line: &str| {
            let fields: Vec<&str> = line.split(':').collect();
            let [_, _, gid, members] = fields[..] else { return None };
            members.split(',').any(|one| one == self.name).then(|| gid.parse().ok()).flatten()
        };
        let mut groups: Vec<Gid> = group.lines().filter_map(member).map(Gid::from_raw).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        groups.push(gid);
        step("set groups", setgroups(&groups))?;
        step("change the group", setresgid(gid, gid, gid))?;
        step("change the user", setresuid(uid, uid, uid))
    }
}
