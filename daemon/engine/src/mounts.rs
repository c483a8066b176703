//! Where a manifest's mounts come from: resolved through directory descriptors, judged by policy, and told to init as
//! path and inode, so that what is mounted is what was judged.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use casemate_manifest::{MountQuestion, MountRules, Policy};
use casemate_sandbox::plan::{Inode, Mount, Source};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::Error;
use crate::records::MountRecord;

/// What policy judges mounts by.
pub struct Judge<'a> {
    pub policy: &'a Policy,
    pub rules: MountRules,
    pub home: &'a Path,
}

const OPEN: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// Describe an open directory or file, so that it is recognised when it is opened again by path.
pub fn source(path: &Path, descriptor: &OwnedFd) -> Result<Source, Error> {
    let stat = rustix::fs::fstat(descriptor).map_err(Error::sys("look up", path))?;
    let text = path.to_str().ok_or_else(|| Error::NotUtf8 { what: "a mount", path: path.to_owned() })?;
    Ok(Source { path: text.to_owned(), inode: Inode { device: stat.st_dev, inode: stat.st_ino } })
}

/// Open one of our own directories and describe it.
pub fn own_source(path: &Path) -> Result<Source, Error> {
    let path = path.canonicalize().map_err(Error::io("resolve", path))?;
    let descriptor = rustix::fs::open(&path, OPEN, Mode::empty()).map_err(Error::sys("open", &path))?;
    source(&path, &descriptor)
}

/// The path by which the kernel knows an open directory, checked to be that directory still.
pub fn path_of(descriptor: BorrowedFd<'_>) -> Result<PathBuf, Error> {
    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    let path = std::fs::read_link(&link).map_err(Error::io("read", link))?;
    let named = rustix::fs::stat(&path).map_err(Error::sys("look up", &path))?;
    let held = rustix::fs::fstat(descriptor).map_err(Error::sys("look up", &path))?;
    if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino) {
        return Err(Error::ElsewherePath { path });
    }
    Ok(path)
}

/// Judge one mount of a manifest when it is built.
pub fn judge_new(
    judge: &Judge<'_>,
    directory: BorrowedFd<'_>,
    requested: &str,
    target: &str,
    read_only: bool,
) -> Result<MountRecord, Error> {
    let missing = |errno: Errno| match errno {
        Errno::NOENT => Error::NotFound {
            what: "mount source",
            name: requested.to_owned(),
            remedy: "make the directory, or correct [mounts] in the manifest",
        },
        errno => Error::Io { action: "open", path: requested.into(), source: errno.into() },
    };
    let expanded = match requested.strip_prefix("~/") {
        Some(rest) => judge.home.join(rest),
        None if requested == "~" => judge.home.to_owned(),
        None => PathBuf::from(requested),
    };
    let (descriptor, beneath_manifest) = if expanded.is_absolute() {
        (rustix::fs::open(&expanded, OPEN, Mode::empty()).map_err(missing)?, false)
    } else {
        match rustix::fs::openat2(
            directory,
            &expanded,
            OPEN,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        ) {
            Ok(descriptor) => (descriptor, true),
            // It leaves the manifest's directory: judged as an absolute path.
            Err(Errno::XDEV) => {
                (rustix::fs::openat(directory, &expanded, OPEN, Mode::empty()).map_err(missing)?, false)
            }
            Err(errno) => return Err(missing(errno)),
        }
    };
    let host = path_of(std::os::fd::AsFd::as_fd(&descriptor))?;
    let host_text = host.to_str().ok_or_else(|| Error::NotUtf8 { what: "a mount", path: host.clone() })?;
    let record = MountRecord {
        requested: requested.to_owned(),
        host: host_text.to_owned(),
        target: target.to_owned(),
        read_only,
        beneath_manifest,
    };
    judge_record(judge, &record)?;
    Ok(record)
}

fn judge_record(judge: &Judge<'_>, record: &MountRecord) -> Result<(), Error> {
    judge.rules.judge(&MountQuestion {
        source: &record.requested,
        resolved: Path::new(&record.host),
        is_beneath_manifest_directory: record.beneath_manifest,
    })?;
    Ok(())
}

/// Judge a recorded mount again and describe it to init: at each start, since policy and host may have changed.
pub fn plan(judge: &Judge<'_>, record: &MountRecord) -> Result<Mount, Error> {
    judge_record(judge, record)?;
    let path = Path::new(&record.host);
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let descriptor = rustix::fs::openat2(rustix::fs::CWD, path, OPEN, Mode::empty(), resolve).map_err(
        |errno| match errno {
            Errno::NOENT => Error::NotFound {
                what: "mount source",
                name: record.host.clone(),
                remedy: "bring the directory back, or change [mounts] in the manifest and build again",
            },
            errno => Error::Io { action: "open", path: path.to_owned(), source: errno.into() },
        },
    )?;
    Ok(Mount {
        source: source(path, &descriptor)?,
        target: record.target.clone(),
        read_only: record.read_only,
        no_exec: false,
    })
}
