//! The host's resolv.conf(5): read, and followed through what replaces it.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::inotify;

use crate::InitError;
use crate::mounts::step;

/// As many as libc uses.
const SERVERS_MAX: usize = 3;

pub struct Resolver {
    path: PathBuf,
    watch: OwnedFd,
    servers: Vec<SocketAddr>,
}

/// `ADDRESS`, `ADDRESS%INTERFACE`, or OpenBSD's `[ADDRESS]:PORT`.
fn server(text: &str) -> Option<SocketAddr> {
    if let Some((address, port)) = text.strip_prefix('[').and_then(|rest| rest.split_once("]:")) {
        return Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?));
    }
    if let Some((address, interface)) = text.split_once('%') {
        let scope = interface.parse().ok().or_else(|| nix::net::if_::if_nametoindex(interface).ok())?;
        return Some(SocketAddrV6::new(address.parse().ok()?, 53, 0, scope).into());
    }
    Some(SocketAddr::new(text.parse::<IpAddr>().ok()?, 53))
}

fn parse(text: &str) -> Vec<SocketAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        if words.next() == Some("nameserver") { server(words.next()?) } else { None }
    });
    servers.take(SERVERS_MAX).collect()
}

impl Resolver {
    pub fn new(path: &Path) -> Result<Self, InitError> {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch = step("watch resolv.conf", inotify::init(flags))?;
        let mut resolver = Self { path: path.to_owned(), watch, servers: Vec::new() };
        resolver.read()?;
        Ok(resolver)
    }

    pub fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// Watch where it is and where it leads, then read it, so that no change falls between.
    fn read(&mut self) -> Result<(), InitError> {
        use inotify::WatchFlags;
        let events = WatchFlags::CLOSE_WRITE
            | WatchFlags::MOVED_TO
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::ONLYDIR;
        let target = self.path.canonicalize().ok();
        for directory in
            [Some(self.path.as_path()), target.as_deref()].into_iter().flatten().map(Path::parent)
        {
            let Some(directory) = directory else { continue };
            if let Err(error) = inotify::add_watch(&self.watch, directory, events) {
                // Then what it says now is all there is to know.
                eprintln!("casemate-init: network: cannot watch {}: {error}", directory.display());
            }
        }
        // Gone for the moment, or not for us to read: then there is no name server.
        let text = std::fs::read_to_string(&self.path).unwrap_or_else(|error| {
            eprintln!("casemate-init: network: {}: {error}", self.path.display());
            String::new()
        });
        self.servers = parse(&text);
        Ok(())
    }

    /// Take what inotify has to say; whether the servers are others now.
    pub fn changed(&mut self) -> Result<bool, InitError> {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4 << 10];
        let mut reader = inotify::Reader::new(&self.watch, &mut buffer);
        loop {
            match reader.next() {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return step("watch resolv.conf", Err(error)),
            }
        }
        let before = std::mem::take(&mut self.servers);
        self.read()?;
        Ok(before != self.servers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_a_file() {
        let text = "# nameserver 9.9.9.9\nsearch example\nnameserver 127.0.0.53\n\tnameserver\t::1 # x\nnameserver bad\n\
                    nameserver [127.0.0.1]:5353\nnameserver 192.0.2.9\n";
        let found: Vec<String> = parse(text).iter().map(SocketAddr::to_string).collect();
        assert_eq!(found, ["127.0.0.53:53", "[::1]:53", "127.0.0.1:5353"]);
        assert_eq!(server("fe80::1%7").expect("good").to_string(), "[fe80::1%7]:53");
        assert_eq!(server("fe80::1%no-such-interface"), None);
    }

    #[test]
    fn a_file_that_is_replaced_is_followed() {
        let directory = tempfile::tempdir().expect("directory");
        let (path, next) = (directory.path().join("resolv.conf"), directory.path().join("next"));
        std::fs::write(&path, "nameserver 192.0.2.1\n").expect("written");
        let mut resolver = Resolver::new(&path).expect("read");
        assert_eq!(resolver.servers().len(), 1);
        assert!(!resolver.changed().expect("nothing"));
        std::fs::write(&next, "nameserver 192.0.2.1\nnameserver 192.0.2.2\n").expect("written");
        std::fs::rename(&next, &path).expect("renamed");
        assert!(resolver.changed().expect("a change"));
        assert_eq!(resolver.servers().len(), 2);
    }
}
