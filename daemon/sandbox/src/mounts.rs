//! The environment's mount tree, made by descriptor: nothing in the image is resolved but beneath its root, and no link
//! in it is followed.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use casemate_sandbox::elevation::PROGRAM;
use casemate_sandbox::plan::{Device, Ids, Mount, Network, Plan, Root, Source, WAYLAND};
use nix::mount::{MntFlags, MsFlags};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::InitError;
use crate::apart;
use crate::sys;
use crate::utmp::Utmp;

pub(crate) fn step<T, E: Into<io::Error>>(what: &str, result: Result<T, E>) -> Result<T, InitError> {
    result.map_err(|error| InitError::Step { what: what.to_owned(), source: error.into() })
}

const BENEATH: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

pub(crate) fn open_path(
    at: impl AsFd,
    path: &str,
    more: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    rustix::fs::openat2(at, path, OFlags::PATH | OFlags::CLOEXEC | more, Mode::empty(), resolve)
}

/// Open a source of the host and see that it is what the daemon judged.
pub(crate) fn open_source(source: &Source) -> Result<OwnedFd, InitError> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let descriptor =
        step(&format!("open {:?}", source.path), open_path(CWD, &source.path, OFlags::empty(), resolve))?;
    let stat = step("look at a source", rustix::fs::fstat(&descriptor))?;
    if (stat.st_dev, stat.st_ino) != (source.inode.device, source.inode.inode) {
        return Err(InitError::Swapped { path: source.path.clone() });
    }
    Ok(descriptor)
}

/// Open a device of the host, see that it is what the daemon judged, and that the user's sessions can open it: as the user
/// and in the groups that they have.
/// `None` where they cannot, and need not.
fn open_device(device: &Device, plan: &Plan) -> Result<Option<OwnedFd>, InitError> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let opened =
        step(&format!("open {:?}", device.path), open_path(CWD, &device.path, OFlags::NOFOLLOW, resolve))?;
    let stat = step("look at a device", rustix::fs::fstat(&opened))?;
    let kind = if device.is_block { FileType::BlockDevice } else { FileType::CharacterDevice };
    if FileType::from_raw_mode(stat.st_mode) != kind || stat.st_rdev != device.number {
        return Err(InitError::Swapped { path: device.path.clone() });
    }
    let (uid, gid) = match plan.ids {
        Ids::Range { user, group } => (Uid::from_raw(user), Gid::from_raw(group)),
        Ids::Single { .. } => (Uid::from_raw(0), Gid::from_raw(0)),
    };
    let own = (setfsgid(gid), setfsuid(uid));
    let access = sys::may_read_and_write(opened.as_fd());
    let was = setfsuid(own.1);
    setfsgid(own.0);
    if was != uid {
        return step("look at a device", Err(io::Error::other("the kernel refuses the user's id")));
    }
    match access {
        Err(error) if error.raw_os_error() == Some(libc::EACCES) && !device.is_needed => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
            Err(InitError::Group { name: device.name.clone(), path: device.path.clone() })
        }
        other => step(&format!("look at {:?}", device.path), other).map(|()| Some(opened)),
    }
}

pub(crate) fn clone_tree(descriptor: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(descriptor, "", flags)
}

pub(crate) fn attach(mount: &OwnedFd, target: &OwnedFd) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

pub(crate) fn file_system(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, InitError> {
    let make = || {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in options {
            fsconfig_set_string(context.as_fd(), *key, *value)?;
        }
        fsconfig_create(context.as_fd())?;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    step(&format!("make a {kind}"), make())
}

fn overlay(lowers: &[OwnedFd], upper: &OwnedFd, work: &OwnedFd) -> Result<OwnedFd, InitError> {
    let path = |descriptor: &OwnedFd| format!("/proc/self/fd/{}", descriptor.as_raw_fd());
    // Relative to that directory: a string of fsconfig's has 255 bytes at most, and this is all lowers in one.
    let short = |descriptor: &OwnedFd| descriptor.as_raw_fd().to_string();
    let make = |one_by_one: bool| {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let context = context.as_fd();
        if one_by_one {
            for lower in lowers {
                fsconfig_set_string(context, "lowerdir+", path(lower))?;
            }
        } else {
            fsconfig_set_string(context, "lowerdir", lowers.iter().map(short).collect::<Vec<_>>().join(":"))?;
        }
        fsconfig_set_string(context, "upperdir", path(upper))?;
        fsconfig_set_string(context, "workdir", path(work))?;
        fsconfig_set_flag(context, "userxattr")?;
        fsconfig_create(context)?;
        fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NODEV)
    };
    let all_at_once = || {
        let here = open_path(CWD, ".", OFlags::DIRECTORY, ResolveFlags::empty())?;
        rustix::process::chdir("/proc/self/fd")?;
        let made = make(false);
        rustix::process::fchdir(here)?;
        made
    };
    // `lowerdir+` came with Linux 6.7.
    step("mount the overlay", make(true).or_else(|_| all_at_once()))
}

/// The root under construction.
pub struct Tree {
    root: OwnedFd,
    /// Who owns what is made in the user's home and in their runtime directory; with one id, all is theirs.
    owner: Option<(Uid, Gid)>,
    owned: [String; 2],
    /// How many user namespaces there may be within the outer one.
    user_namespaces: File,
}

impl Tree {
    fn parts(path: &str) -> impl Iterator<Item = &str> {
        path.split('/').filter(|part| !part.is_empty())
    }

    fn open(&self, path: &str, more: OFlags) -> Result<OwnedFd, Errno> {
        let relative = path.trim_start_matches('/');
        open_path(&self.root, if relative.is_empty() { "." } else { relative }, more, BENEATH)
    }

    fn own(&self, path: &str, name: &str, directory: &OwnedFd) -> Result<(), Errno> {
        if let Some((uid, gid)) = self.owner
            && self
                .owned
                .iter()
                .any(|owned| path.strip_prefix(owned.as_str()).is_some_and(|rest| rest.starts_with('/')))
        {
            let owner = (rustix::fs::Uid::from_raw(uid.as_raw()), rustix::fs::Gid::from_raw(gid.as_raw()));
            rustix::fs::chownat(directory, name, Some(owner.0), Some(owner.1), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(())
    }

    /// Open a directory of the environment, made where it is missing, with its parents.
    fn directory(&self, path: &str) -> Result<OwnedFd, InitError> {
        let make = || {
            let mut directory = self.open("", OFlags::DIRECTORY)?;
            for name in Self::parts(path) {
                let next = match open_path(&directory, name, OFlags::DIRECTORY, BENEATH) {
                    Err(Errno::NOENT) => {
                        rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755))?;
                        self.own(path, name, &directory)?;
                        open_path(&directory, name, OFlags::DIRECTORY, BENEATH)?
                    }
                    other => other?,
                };
                directory = next;
            }
            Ok::<_, Errno>(directory)
        };
        step(&format!("open the directory {path:?} inside (links are not followed)"), make())
    }

    /// Open a regular file of the environment as a mount point, made where it is missing. A link in its place goes.
    fn file(&self, path: &str) -> Result<OwnedFd, InitError> {
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
        let directory = self.directory(parent)?;
        let make = || {
            match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink => {
                    rustix::fs::unlinkat(&directory, name, AtFlags::empty())?;
                }
                Ok(_) => return open_path(&directory, name, OFlags::NOFOLLOW, BENEATH),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&directory, name, flags, Mode::from_raw_mode(0o644))?;
            self.own(path, name, &directory)?;
            open_path(&directory, name, OFlags::NOFOLLOW, BENEATH)
        };
        step(&format!("open the file {path:?} inside"), make())
    }

    fn mount(&self, mount: &OwnedFd, path: &str) -> Result<(), InitError> {
        let target = self.directory(path)?;
        step(&format!("mount {path}"), attach(mount, &target))
    }

    fn node(&self, name: &str) -> Result<(), InitError> {
        let source = step(
            "open a device",
            open_path(CWD, &format!("/dev/{name}"), OFlags::NOFOLLOW, ResolveFlags::NO_SYMLINKS),
        )?;
        let stat = step("look at a device", rustix::fs::fstat(&source))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
            return Err(InitError::Swapped { path: format!("/dev/{name}") });
        }
        let tree = step("take a device", clone_tree(source.as_fd(), false))?;
        let target = self.file(&format!("/dev/{name}"))?;
        step("mount a device", attach(&tree, &target))
    }

    fn devices(&self, plan: &Plan) -> Result<(), InitError> {
        let plain = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        // 0755: with the default of 1777 fs.protected_regular keeps apt's `_apt` from writing /dev/null.
        self.mount(&file_system("tmpfs", &[("mode", "0755"), ("size", "4m")], plain)?, "/dev")?;
        for name in ["null", "zero", "full", "random", "urandom", "tty"] {
            self.node(name)?;
        }
        let mut options = vec![("ptmxmode", "0666"), ("mode", "0620")];
        if matches!(plan.ids, Ids::Range { .. }) {
            // Group `tty`, as everywhere.
            options.push(("gid", "5"));
        }
        self.mount(&file_system("devpts", &options, plain)?, "/dev/pts")?;
        let safe = plain | MountAttrFlags::MOUNT_ATTR_NODEV;
        self.mount(&file_system("tmpfs", &[("mode", "1777")], safe)?, "/dev/shm")?;
        self.mount(&file_system("mqueue", &[], safe)?, "/dev/mqueue")?;
        let dev = self.directory("/dev")?;
        for (target, name) in [
            ("pts/ptmx", "ptmx"),
            ("/proc/self/fd", "fd"),
            ("/proc/self/fd/0", "stdin"),
            ("/proc/self/fd/1", "stdout"),
            ("/proc/self/fd/2", "stderr"),
        ] {
            step("make a link in /dev", rustix::fs::symlinkat(target, &dev, name))?;
        }
        Ok(())
    }

    fn grant(&self, device: &Device, opened: &OwnedFd) -> Result<(), InitError> {
        let tree = step(&format!("take {:?}", device.path), clone_tree(opened.as_fd(), false))?;
        step("restrict a device", sys::mount_setattr(tree.as_fd(), sys::ATTR_NOSUID, false))?;
        let target = self.file(&device.target)?;
        step(&format!("mount {:?}", device.target), attach(&tree, &target))
    }

    /// Cover what is the machine's business: a file by /dev/null, a directory by an empty read-only tmpfs. The list is
    /// runc's and podman's.
    fn mask(&self) -> Result<(), InitError> {
        const MASKED: &[&str] = &[
            "/proc/acpi",
            "/proc/asound",
            "/proc/interrupts",
            "/proc/kcore",
            "/proc/keys",
            "/proc/latency_stats",
            "/proc/sched_debug",
            "/proc/scsi",
            "/proc/timer_list",
            "/proc/timer_stats",
            "/sys/dev/block",
            "/sys/devices/virtual/powercap",
            "/sys/firmware",
            "/sys/fs/selinux",
        ];
        const READ_ONLY: &[&str] =
            &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
        let null = step("open /dev/null", self.open("/dev/null", OFlags::NOFOLLOW))?;
        let safe = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        // One file system for all directories, as making one costs. What is cloned must be mounted (before Linux 6.15).
        let mut empty = None;
        // When a processor was too hot tells what others make it do (moby, 2025). Where one has it, all have.
        let heat = |processor: u32| format!("/sys/devices/system/cpu/cpu{processor}/thermal_throttle");
        let heat = (0..).map(heat).take_while(|path| self.open(path, OFlags::NOFOLLOW).is_ok());
        let paths: Vec<String> = MASKED.iter().map(|path| (*path).to_owned()).chain(heat).collect();
        for path in &paths {
            let target = match self.open(path, OFlags::NOFOLLOW) {
                Ok(target) => target,
                // Not every kernel has each; what it does not have need not be covered.
                Err(Errno::NOENT) => continue,
                Err(error) => return step(&format!("mask {path}"), Err(error)),
            };
            let stat = step("look at a path to mask", rustix::fs::fstat(&target))?;
            let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
            let cover = match (directory, &empty) {
                (false, _) => step("take /dev/null", clone_tree(null.as_fd(), false))?,
                (true, Some(empty)) => {
                    step("take an empty directory", clone_tree(OwnedFd::as_fd(empty), false))?
                }
                (true, None) => {
                    file_system("tmpfs", &[("mode", "0555"), ("size", "4k"), ("nr_inodes", "2")], safe)?
                }
            };
            step(&format!("mask {path}"), attach(&cover, &target))?;
            if directory && empty.is_none() {
                empty = Some(step(&format!("open {path}"), self.open(path, OFlags::DIRECTORY))?);
            }
        }
        for path in READ_ONLY {
            let target = match self.open(path, OFlags::NOFOLLOW) {
                Ok(target) => target,
                Err(Errno::NOENT) => continue,
                Err(error) => return step(&format!("open {path}"), Err(error)),
            };
            let tree = step("take a path of /proc", clone_tree(target.as_fd(), true))?;
            let attributes = sys::ATTR_RDONLY | sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
            step("make a path of /proc read-only", sys::mount_setattr(tree.as_fd(), attributes, true))?;
            step("mount a path of /proc", attach(&tree, &target))?;
        }
        Ok(())
    }

    fn runtime(&self, plan: &Plan) -> Result<(), InitError> {
        let safe = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        self.mount(&file_system("tmpfs", &[("mode", "0755")], safe)?, "/run")?;
        self.file("/run/utmp")?;
        let user = format!("/run/user/{}", plan.user.uid);
        for (path, mode) in [("/run/lock", 0o1777), (user.as_str(), 0o700)] {
            self.directory(path)?;
            let mode = Mode::from_raw_mode(mode);
            step("set a mode in /run", rustix::fs::chmodat(&self.root, &path[1..], mode, AtFlags::empty()))?;
        }
        if matches!(plan.ids, Ids::Range { .. }) {
            let owner = (rustix::fs::Uid::from_raw(plan.user.uid), rustix::fs::Gid::from_raw(plan.user.gid));
            let chown =
                rustix::fs::chownat(&self.root, &user[1..], Some(owner.0), Some(owner.1), AtFlags::empty());
            step("give the user their runtime directory", chown)?;
        }
        Ok(())
    }

    fn own_files(&self, plan: &Plan) -> Result<(), InitError> {
        for file in &plan.grants.files {
            let (parent, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
            let directory = self.directory(parent)?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&directory, name, flags, Mode::from_raw_mode(0o600));
            let mut made = File::from(step(&format!("make {}", file.path), made)?);
            step(&format!("write {}", file.path), made.write_all(&file.content))?;
            step(&format!("give the user {}", file.path), self.own(&file.path, name, &directory))?;
        }
        Ok(())
    }

    fn files(&self, plan: &Plan) -> Result<(), InitError> {
        let dev = self.directory("/dev")?;
        for file in &plan.files {
            // A file of the private /dev that loses its name at once: only its mount is left.
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let made = rustix::fs::openat(&dev, ".file", flags, Mode::from_raw_mode(0o644));
            let mut made = File::from(step("make a file of the plan", made)?);
            step("write a file of the plan", made.write_all(file.content.as_bytes()))?;
            let tree = step("take a file of the plan", clone_tree(made.as_fd(), false))?;
            let attributes = sys::ATTR_RDONLY | sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
            step("make a file read-only", sys::mount_setattr(tree.as_fd(), attributes, false))?;
            let target = self.file(&file.path)?;
            step(&format!("mount {}", file.path), attach(&tree, &target))?;
            step("unlink a file of the plan", rustix::fs::unlinkat(&dev, ".file", AtFlags::empty()))?;
        }
        Ok(())
    }

    fn bind(&self, mount: &Mount, source: &OwnedFd) -> Result<(), InitError> {
        let tree = step(&format!("take {:?}", mount.source.path), clone_tree(source.as_fd(), true))?;
        let mut attributes = sys::ATTR_NOSUID | sys::ATTR_NODEV;
        if mount.read_only {
            attributes |= sys::ATTR_RDONLY;
        }
        if mount.no_exec {
            attributes |= sys::ATTR_NOEXEC;
        }
        // Recursive: what is mounted beneath the source comes along, under the same rules.
        step("restrict a mount", sys::mount_setattr(tree.as_fd(), attributes, true))?;
        let stat = step("look at a source", rustix::fs::fstat(source))?;
        let target = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => self.directory(&mount.target)?,
            _ => self.file(&mount.target)?,
        };
        step(&format!("mount {:?}", mount.target), attach(&tree, &target))
    }

    /// The file of utmp(5), which [`Self::runtime`] has made.
    pub fn utmp(&self) -> Result<Utmp, InitError> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat2(&self.root, "run/utmp", flags, Mode::empty(), BENEATH);
        step("open /run/utmp", opened).map(Utmp::new)
    }

    /// Where an image has no place for it that can be reached without links, it goes without.
    fn sudo(&self, program: &Source, opened: &OwnedFd) -> Result<(), InitError> {
        let target = match self.file(PROGRAM) {
            Ok(target) => target,
            Err(error) => {
                eprintln!("casemate-init: no `sudo` inside: {error}");
                return Ok(());
            }
        };
        let tree = step(&format!("take {:?}", program.path), clone_tree(opened.as_fd(), false))?;
        let attributes = sys::ATTR_RDONLY | sys::ATTR_NOSUID | sys::ATTR_NODEV;
        step("restrict a mount", sys::mount_setattr(tree.as_fd(), attributes, false))?;
        step(&format!("mount {PROGRAM}"), attach(&tree, &target))
    }

    pub fn runtime_directory(&self, plan: &Plan) -> Result<OwnedFd, InitError> {
        let path = format!("/run/user/{}", plan.user.uid);
        step("open the runtime directory", self.open(&path, OFlags::DIRECTORY))
    }

    /// The compositor's own socket, in the runtime directory.
    pub fn compositor(&self, plan: &Plan, source: &Source) -> Result<(), InitError> {
        let target = format!("/run/user/{}/{WAYLAND}", plan.user.uid);
        let mount = Mount { source: source.clone(), target, read_only: false, no_exec: true };
        self.bind(&mount, &open_source(source)?)
    }

    /// No more than there are, whatever a filter lets through.
    pub fn forbid_user_namespaces(&self) -> Result<(), InitError> {
        step("forbid user namespaces", (&self.user_namespaces).write_all(b"0"))
    }

    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }
}

/// Make the whole tree; the process still has the host's root. Returns it and the environment's `/proc`.
pub fn build(plan: &Plan, apart: Option<apart::Child>) -> Result<(Tree, OwnedFd), InitError> {
    let none = None::<&str>;
    step(
        "make mounts private",
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none),
    )?;
    let sources: Result<Vec<OwnedFd>, _> =
        plan.mounts.iter().map(|mount| open_source(&mount.source)).collect();
    let sources = sources?;
    let devices: Result<Vec<Option<OwnedFd>>, _> =
        plan.grants.devices.iter().map(|device| open_device(device, plan)).collect();
    let devices = devices?;
    let sudo = plan.sudo.as_ref().map(|sudo| open_source(&sudo.program)).transpose()?;
    let root = match &plan.root {
        Root::Overlay { lowers, upper, work } => {
            let lowers: Result<Vec<OwnedFd>, _> = lowers.iter().map(open_source).collect();
            overlay(&lowers?, &open_source(upper)?, &open_source(work)?)?
        }
        Root::Directory { source } => {
            let tree = step("take the root", clone_tree(open_source(source)?.as_fd(), false))?;
            step("restrict the root", sys::mount_setattr(tree.as_fd(), sys::ATTR_NODEV, false))?;
            tree
        }
    };
    let safe = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    // What follows shows the network that it is mounted in.
    apart.map_or(Ok(()), apart::Child::enter)?;
    // A new /proc may be mounted only while a whole one is in sight: the host's, until the root changes.
    let proc = file_system("proc", &[], safe)?;
    let sys = match plan.network {
        Network::None | Network::Private(_) => {
            file_system("sysfs", &[], safe | MountAttrFlags::MOUNT_ATTR_RDONLY)?
        }
        Network::Host => {
            let host =
                step("open /sys", open_path(CWD, "/sys", OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS))?;
            let tree = step("take /sys", clone_tree(host.as_fd(), true))?;
            let attributes = sys::ATTR_RDONLY | sys::ATTR_NOSUID | sys::ATTR_NODEV | sys::ATTR_NOEXEC;
            step("make /sys read-only", sys::mount_setattr(tree.as_fd(), attributes, true))?;
            tree
        }
    };
    // Any directory will do: it is where the root hangs until it is the root.
    let place = step("open /sys", open_path(CWD, "/sys", OFlags::DIRECTORY, ResolveFlags::NO_SYMLINKS))?;
    step("mount the root", attach(&root, &place))?;

    let owner = match plan.ids {
        Ids::Range { .. } => Some((Uid::from_raw(plan.user.uid), Gid::from_raw(plan.user.gid))),
        Ids::Single { .. } => None,
    };
    let owned = [plan.user.home.clone(), format!("/run/user/{}", plan.user.uid)];
    // While /proc/sys can be written to.
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let user_namespaces = rustix::fs::openat(&proc, "sys/user/max_user_namespaces", flags, Mode::empty());
    let user_namespaces = File::from(step("open max_user_namespaces", user_namespaces)?);
    let tree = Tree { root, owner, owned, user_namespaces };
    tree.mount(&proc, "/proc")?;
    tree.mount(&sys, "/sys")?;
    tree.devices(plan)?;
    for (device, opened) in plan.grants.devices.iter().zip(&devices) {
        if let Some(opened) = opened {
            tree.grant(device, opened)?;
        }
    }
    tree.runtime(plan)?;
    tree.own_files(plan)?;
    if plan.network != Network::Host {
        network(&proc, plan.ids)?;
    }
    tree.mask()?;
    tree.files(plan)?;
    if let (Some(plan), Some(opened)) = (&plan.sudo, &sudo) {
        tree.sudo(&plan.program, opened)?;
    }
    for (mount, source) in plan.mounts.iter().zip(&sources) {
        tree.bind(mount, source)?;
    }
    Ok((tree, proc))
}

/// What root inside expects of a network of its own: loopback up, low ports and ping without capabilities in it.
fn network(proc: &OwnedFd, ids: Ids) -> Result<(), InitError> {
    step("bring loopback up", sys::loopback_up())?;
    // The kernel compares the host's numbers: the user's own group lies below the range that all others are in.
    let groups = match ids {
        Ids::Range { group, .. } if group < casemate_worker::ids::COUNT => format!("{group} 65535"),
        // Too high a number for one range with the others: ping is root's.
        Ids::Range { .. } => "0 65535".to_owned(),
        Ids::Single { .. } => "0 0".to_owned(),
    };
    for (path, value) in
        [("sys/net/ipv4/ip_unprivileged_port_start", "0"), ("sys/net/ipv4/ping_group_range", groups.as_str())]
    {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let write = rustix::fs::openat(proc, path, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).write_all(value.as_bytes()));
        step(path, write)?;
    }
    Ok(())
}

/// Leave the host's file system for good.
pub fn enter(tree: Tree) -> Result<(), InitError> {
    step("enter the root", rustix::process::fchdir(tree.descriptor()))?;
    step("change the root", nix::unistd::pivot_root(".", "."))?;
    step("leave the host's root", nix::mount::umount2(".", MntFlags::MNT_DETACH))?;
    step("enter the root", nix::unistd::chdir("/"))
}
