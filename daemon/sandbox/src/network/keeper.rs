//! The keeper: starts pasta and the relay, tells the relay of the host's name servers, and ends both when init is gone.
//! It reads nothing but the host's own files, and has no capability once the relay is forked.
//!
//! Without a route to anywhere there is nothing for pasta to copy: then the keeper waits for one. The same where pasta
//! dies of itself.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use casemate_sandbox::plan::{Port, Private, Protocol};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::gate::Gate;
use super::pasta::{self, Start};
use super::relay::Relay;
use super::resolver::Resolver;
use super::routes;
use crate::InitError;
use crate::child::Child;
use crate::handover::take_over;
use crate::keeper::tell_ready;
use crate::mounts::step;
use crate::session::bound;

/// A pasta that lived shorter would die again at once.
const STABLE: Duration = Duration::from_secs(10);
/// The environment's pasta of before may still be going.
const PORT_TAKEN: Duration = Duration::from_millis(500);

fn check_ports(ports: &[Port]) -> Result<(), String> {
    let begin = Instant::now();
    for port in ports {
        let address = SocketAddr::new(port.address, port.host);
        let bind = || match port.protocol {
            Protocol::Tcp => TcpListener::bind(address).map(drop),
            Protocol::Udp => UdpSocket::bind(address).map(drop),
        };
        let mut bound = bind();
        while bound.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::AddrInUse)
            && begin.elapsed() < PORT_TAKEN
        {
            std::thread::sleep(Duration::from_millis(20));
            bound = bind();
        }
        bound.map_err(|error| {
            let protocol = match port.protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
            };
            format!(
                "cannot publish {protocol} port {address}: {error}; choose another one in [runtime] ports"
            )
        })?;
    }
    Ok(())
}

fn check_tun() -> Result<(), String> {
    const TUN: &str = "/dev/net/tun";
    match std::fs::File::options().read(true).write(true).open(TUN) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!(
            "cannot open {TUN}: {error}; as root: modprobe tun && chmod 666 {TUN} (udev does so at boot)"
        )),
    }
}

/// `Ok(None)`: nothing to connect to as yet.
fn connect(socket: &OwnedFd, namespace: &OwnedFd, private: &Private) -> Result<Option<Child>, String> {
    if !routes::has_default() {
        return Ok(None);
    }
    match pasta::start(socket, namespace, private) {
        Ok(Start::Running(pasta)) => Ok(Some(pasta)),
        Ok(Start::Over) => Ok(None),
        Err(message) => Err(message),
    }
}

/// Have no capability, but leave pasta, which is executed as the namespace's root, what it needs to set itself up. It opens
/// our descriptor of the namespace by /proc, which nobody may who has less than we have.
fn drop_rights() -> Result<(), InitError> {
    const PASTA: CapabilitySet = CapabilitySet::SYS_ADMIN
        .union(CapabilitySet::NET_ADMIN)
        .union(CapabilitySet::NET_BIND_SERVICE)
        .union(CapabilitySet::SYS_PTRACE)
        .union(CapabilitySet::SETPCAP)
        .union(CapabilitySet::SETGID)
        .union(CapabilitySet::SETUID);
    bound(PASTA)?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    step("drop capabilities", rustix::thread::set_capabilities(None, sets))?;
    step("be dumpable", prctl::set_dumpable(true))
}

/// Until init is gone.
pub fn keep(socket: &OwnedFd, private: &Private) -> Result<(), InitError> {
    // pasta goes into the background: it becomes our child.
    step("adopt orphans", prctl::set_child_subreaper(true))?;
    let Some(received) = take_over("the network namespace", socket)? else { return Ok(()) };
    let mut received = received.into_iter();
    let mut next = || received.next().ok_or(InitError::Descriptors);
    let (namespace, udp, tcp) = (next()?, next()?, next()?);
    let gate = match &private.allow {
        None => Gate::Open,
        Some(allow) => Gate::listed(&allow.destinations, next()?),
    };
    let mut resolver = Resolver::new(Path::new(&private.resolver))?;
    let relay = Relay::begin(udp, tcp, gate)?;
    drop_rights()?;
    relay.tell(resolver.servers())?;

    let mut pasta = check_tun()
        .and_then(|()| check_ports(&private.ports))
        .and_then(|()| connect(socket, &namespace, private))
        .map_err(InitError::Network)?;
    tell_ready(socket, b"");
    let changes = routes::watch()?;
    let mut since = Instant::now();
    loop {
        let mut descriptors = vec![
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(relay.as_fd(), PollFlags::POLLIN),
            PollFd::new(resolver.as_fd(), PollFlags::POLLIN),
        ];
        // Either pasta ends, or what it needs comes.
        descriptors
            .push(PollFd::new(pasta.as_ref().map_or(changes.as_fd(), Child::as_fd), PollFlags::POLLIN));
        match poll(&mut descriptors, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => step("wait", other)?,
        };
        let ready: Vec<bool> =
            descriptors.iter().map(|one| one.revents().is_some_and(|events| !events.is_empty())).collect();
        if ready[0] {
            // Both children end as they are dropped, and then the socket is closed, for which init waits.
            return Ok(());
        }
        if ready[1] {
            return Err(InitError::Network("the relay of names died".to_owned()));
        }
        if ready[2] && resolver.changed()? {
            relay.tell(resolver.servers())?;
        }
        if ready[3] {
            routes::drain(&changes)?;
            if pasta.take().is_some() {
                eprintln!("casemate-init: network: pasta ended");
                if since.elapsed() < STABLE {
                    continue;
                }
            }
            since = Instant::now();
            pasta = connect(socket, &namespace, private).unwrap_or_else(|message| {
                eprintln!("casemate-init: network: {message}; trying again when routes change");
                None
            });
        }
    }
}
