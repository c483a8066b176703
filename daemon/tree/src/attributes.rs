//! From inodes to what a listing says of them.

use casemate_store::listing::{Meta, Owner, Time, Xattr};
use rustix::fd::AsFd;
use rustix::fs::Stat;
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Inner id of the user's own number (DESIGN.md, "Ids"), as it looks from the outer namespace.
const INNER_USER: u32 = 65536;
/// The user in an ACL of a listing: no id that a kernel takes.
const ACL_USER: u32 = u32::MAX - 1;
/// Overlayfs's own marks that belong to one mount.
const MOUNT_MARKS: [&[u8]; 6] = [
    b"user.overlay.origin",
    b"user.overlay.impure",
    b"user.overlay.nlink",
    b"user.overlay.uuid",
    b"user.overlay.upper",
    b"user.overlay.protattr",
];
const OPAQUE: &[u8] = b"user.overlay.opaque";

/// Who the user is, as seen from this worker's namespace: the owner of the store's directory.
#[derive(Debug, Clone, Copy)]
pub struct User {
    uid: u32,
    gid: u32,
}

impl User {
    pub fn of(store: impl AsFd) -> Result<Self> {
        let stat = rustix::fs::fstat(store).map_err(Error::system("look at", b"the store"))?;
        Ok(Self { uid: stat.st_uid, gid: stat.st_gid })
    }

    /// Where only one id is mapped, it is root here, and all files are root's.
    fn owner(id: u32, user: u32) -> Owner {
        match id {
            0 => Owner::Id(0),
            id if id == user => Owner::User,
            INNER_USER => Owner::Id(user),
            id => Owner::Id(id),
        }
    }

    /// ACLs carry ids too: version, then tag, permissions and id, little-endian.
    fn acl(self, value: &mut [u8]) {
        const USER: u16 = 0x02;
        const GROUP: u16 = 0x08;
        let Some(entries) = value.get_mut(4..) else { return };
        for entry in entries.chunks_exact_mut(8) {
            let tag = u16::from_le_bytes([entry[0], entry[1]]);
            let user = match tag {
                USER => self.uid,
                GROUP => self.gid,
                _ => continue,
            };
            let id = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
            let id = match Self::owner(id, user) {
                Owner::User => ACL_USER,
                Owner::Id(id) => id,
            };
            entry[4..].copy_from_slice(&id.to_le_bytes());
        }
    }
}

/// Everything but xattrs.
pub fn meta(stat: &Stat, user: User) -> Meta {
    Meta {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: User::owner(stat.st_uid, user.uid),
        gid: User::owner(stat.st_gid, user.gid),
        mtime: Time { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 },
        xattrs: Vec::new(),
    }
}

/// The extended attributes of an inode, as far as a layer keeps them.
#[derive(Debug, Default)]
pub struct Attributes {
    /// Sorted.
    pub kept: Vec<Xattr>,
    pub opaque: bool,
    /// Marks to be removed from the inode.
    pub dropped: Vec<Vec<u8>>,
}

/// Read them. `user.*`, file capabilities and ACLs are kept; labels of the host's security modules are the host's.
pub fn read(fd: impl AsFd, user: User, path: &[u8]) -> Result<Attributes> {
    let failed = |errno| Error::system("read the attributes of", path)(errno);
    let mut attributes = Attributes::default();
    let mut buffer = [0; 1024];
    let mut long;
    let names = match rustix::fs::flistxattr(&fd, &mut buffer[..]) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(attributes),
        Ok(length) => &buffer[..length],
        Err(Errno::RANGE) => {
            long = vec![0; 65536];
            let length = rustix::fs::flistxattr(&fd, &mut long[..]).map_err(failed)?;
            long.truncate(length);
            &long[..]
        }
        Err(errno) => return Err(failed(errno)),
    };
    for name in names.split(|&b| b == 0).filter(|name| !name.is_empty()) {
        match name {
            name if MOUNT_MARKS.contains(&name) => attributes.dropped.push(name.to_vec()),
            OPAQUE => {
                if value(&fd, name, path)? != b"y" {
                    return Err(Error::refused(path, "user.overlay.opaque has a value that no layer has"));
                }
                attributes.opaque = true;
            }
            name if name.starts_with(b"user.overlay.") && !name.starts_with(b"user.overlay.overlay.") => {
                return Err(Error::refused(path, "an overlay attribute that no layer has"));
            }
            name if name.starts_with(b"user.") || name == b"security.capability" => {
                attributes.kept.push(Xattr { name: name.to_vec(), value: value(&fd, name, path)? });
            }
            name if name.starts_with(b"system.posix_acl_") => {
                let mut value = value(&fd, name, path)?;
                user.acl(&mut value);
                attributes.kept.push(Xattr { name: name.to_vec(), value });
            }
            _ => {}
        }
    }
    attributes.kept.sort_unstable();
    Ok(attributes)
}

fn value(fd: impl AsFd, name: &[u8], path: &[u8]) -> Result<Vec<u8>> {
    let failed = |errno| Error::system("read an attribute of", path)(errno);
    let mut buffer = [0; 1024];
    match rustix::fs::fgetxattr(&fd, name, &mut buffer[..]) {
        Ok(length) => Ok(buffer[..length].to_vec()),
        Err(Errno::RANGE) => {
            let mut long = vec![0; 65536];
            let length = rustix::fs::fgetxattr(&fd, name, &mut long[..]).map_err(failed)?;
            long.truncate(length);
            Ok(long)
        }
        Err(errno) => Err(failed(errno)),
    }
}

/// Take the marks of one mount off an inode.
pub fn drop_marks(fd: impl AsFd, attributes: &Attributes, path: &[u8]) -> Result<()> {
    for name in &attributes.dropped {
        rustix::fs::fremovexattr(&fd, &name[..])
            .map_err(Error::system("remove an overlay attribute of", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_do_not_depend_on_who_built() {
        for number in [1000, 1500] {
            assert_eq!(User::owner(number, number), Owner::User);
            assert_eq!(User::owner(INNER_USER, number), Owner::Id(number));
            assert_eq!(User::owner(33, number), Owner::Id(33));
            assert_eq!(User::owner(0, number), Owner::Id(0));
        }
        assert_eq!(User::owner(0, 0), Owner::Id(0));
    }

    #[test]
    fn acls_carry_tokens_too() {
        let user = User { uid: 1000, gid: 1001 };
        let acl = |uid: u32, gid: u32| {
            let mut acl = vec![2, 0, 0, 0];
            for (tag, id) in [(1u16, u32::MAX), (2, uid), (4, u32::MAX), (8, gid), (0x10, u32::MAX)] {
                acl.extend(tag.to_le_bytes());
                acl.extend(7u16.to_le_bytes());
                acl.extend(id.to_le_bytes());
            }
            acl
        };
        for (given, told) in [(1000, ACL_USER), (INNER_USER, 1000), (5, 5)] {
            let mut value = acl(given, 7);
            user.acl(&mut value);
            assert_eq!(value, acl(told, 7));
        }
        user.acl(&mut [2, 0, 0]);
    }
}
