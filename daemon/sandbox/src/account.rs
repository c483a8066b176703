//! The user's entry in the environment's account files, and their home: made when an environment is built, before
//! anything of the image runs. The files are an image's: read bounded, written anew, links refused.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};

use casemate_sandbox::plan::{Account, Ids};
use rustix::fs::{Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;

use crate::InitError;
use crate::mounts::step;

/// Most bytes of an account file. Debian's with 1,000 users has 60 KB.
const FILE_MAX: u64 = 4 << 20;
const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

fn directory(root: BorrowedFd<'_>, path: &str, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = rustix::fs::openat2(root, ".", flags, Mode::empty(), BENEATH)?;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        at = match rustix::fs::openat2(&at, part, flags, Mode::empty(), BENEATH) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&at, part, Mode::from_raw_mode(mode))?;
                rustix::fs::openat2(&at, part, flags, Mode::empty(), BENEATH)?
            }
            other => other?,
        };
    }
    Ok(at)
}

/// `account`'s line first among those of its id, no other line of its name.
fn with_line(text: &str, name: &str, id: Option<u32>, line: &str) -> String {
    let field = |entry: &str, index: usize| entry.split(':').nth(index).map(str::to_owned);
    let mut lines: Vec<&str> =
        text.lines().filter(|entry| field(entry, 0).as_deref() != Some(name) && !entry.is_empty()).collect();
    let same_id = |entry: &&str| id.is_some() && field(entry, 2) == id.map(|id| id.to_string());
    let place = lines.iter().position(same_id).unwrap_or(lines.len());
    lines.insert(place, line);
    lines.join("\n") + "\n"
}

fn rewrite(
    etc: &OwnedFd,
    file: &str,
    create: bool,
    edit: impl FnOnce(&str) -> String,
) -> Result<(), InitError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let (text, mode) = match rustix::fs::openat2(etc, file, flags, Mode::empty(), BENEATH) {
        Ok(descriptor) => {
            let stat = step("look at an account file", rustix::fs::fstat(&descriptor))?;
            let mut bytes = Vec::new();
            let read = File::from(descriptor).take(FILE_MAX + 1).read_to_end(&mut bytes);
            let size = step("read an account file", read)?;
            if size as u64 > FILE_MAX
                || rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile
            {
                return Err(InitError::AccountFile { file: file.to_owned() });
            }
            let text =
                String::from_utf8(bytes).map_err(|_| InitError::AccountFile { file: file.to_owned() })?;
            (text, stat.st_mode & 0o777)
        }
        Err(Errno::NOENT) if create => (String::new(), 0o644),
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return step(&format!("open /etc/{file} (links are refused)"), Err(error)),
    };
    let temporary = format!(".{file}.casemate");
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let made = rustix::fs::openat(etc, temporary.as_str(), flags, Mode::from_raw_mode(0o600));
    let mut out = File::from(step("make an account file", made)?);
    step("write an account file", out.write_all(edit(&text).as_bytes()))?;
    step("set an account file's mode", rustix::fs::fchmod(&out, Mode::from_raw_mode(mode)))?;
    step("put an account file in place", rustix::fs::renameat(etc, temporary.as_str(), etc, file))
}

pub fn write(root: BorrowedFd<'_>, account: &Account, ids: Ids) -> Result<(), InitError> {
    let Account { name, uid, gid, home, shell } = account;
    let etc = step("open /etc inside", directory(root, "etc", 0o755))?;
    rewrite(&etc, "passwd", true, |text| {
        with_line(text, name, Some(*uid), &format!("{name}:x:{uid}:{gid}::{home}:{shell}"))
    })?;
    rewrite(&etc, "group", true, |text| with_line(text, name, Some(*gid), &format!("{name}:x:{gid}:")))?;
    rewrite(&etc, "shadow", false, |text| {
        with_line(text, name, None, &format!("{name}:!:19000:0:99999:7:::"))
    })?;
    rewrite(&etc, "gshadow", false, |text| with_line(text, name, None, &format!("{name}:!::")))?;

    let (parent, leaf) = home.rsplit_once('/').unwrap_or(("", home));
    let parent = step("open the home's parent", directory(root, parent, 0o755))?;
    match rustix::fs::mkdirat(&parent, leaf, Mode::from_raw_mode(0o700)) {
        Ok(()) => {}
        // Of an image, or of an earlier build: it is the user's from now on.
        Err(Errno::EXIST) => {}
        Err(error) => return step("make the home", Err(error)),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let home = step("open the home", rustix::fs::openat2(&parent, leaf, flags, Mode::empty(), BENEATH))?;
    let owned = matches!(ids, Ids::Range { .. });
    let own = |descriptor: &File| match owned {
        true => rustix::fs::fchown(descriptor, Some(Uid::from_raw(*uid)), Some(Gid::from_raw(*gid))),
        false => Ok(()),
    };
    let Ok(skeleton) = rustix::fs::openat2(&etc, "skel", flags, Mode::empty(), BENEATH) else {
        let home = File::from(home);
        return step("give the user their home", own(&home));
    };
    for entry in step("list /etc/skel", rustix::fs::Dir::read_from(&skeleton))? {
        let entry = step("list /etc/skel", entry)?;
        let name = entry.file_name();
        let read = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let Ok(from) = rustix::fs::openat2(&skeleton, name, read, Mode::empty(), BENEATH) else { continue };
        let stat = step("look at /etc/skel", rustix::fs::fstat(&from))?;
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile {
            continue;
        }
        let make = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mut to = match rustix::fs::openat(&home, name, make, Mode::from_raw_mode(stat.st_mode & 0o755)) {
            Ok(to) => File::from(to),
            Err(Errno::EXIST) => continue,
            Err(error) => return step("copy /etc/skel", Err(error)),
        };
        step("copy /etc/skel", std::io::copy(&mut File::from(from).take(FILE_MAX), &mut to))?;
        step("give the user a file of /etc/skel", own(&to))?;
    }
    step("give the user their home", own(&File::from(home)))
}

#[cfg(test)]
mod tests {
    use super::with_line;

    #[test]
    fn the_user_comes_before_an_entry_of_the_same_number_and_replaces_one_of_the_same_name() {
        let text =
            "root:x:0:0::/root:/bin/sh\nnode:x:1000:1000::/home/node:/bin/sh\nann:x:7:7::/:/bin/false\n";
        assert_eq!(
            with_line(text, "ann", Some(1000), "ann:x:1000:1000::/home/ann:/bin/bash"),
            "root:x:0:0::/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/bash\nnode:x:1000:1000::/home/node:/bin/sh\n"
        );
        assert_eq!(with_line("", "ann", Some(1), "ann:x:1"), "ann:x:1\n");
    }
}
