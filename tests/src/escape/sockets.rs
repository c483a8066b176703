//! Families of sockets, what only an administrator of a network may, and what listens outside.

use std::io::{self, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::attempt::Control::{Host, Maybe, Throwaway};
use crate::attempt::Guard::{Capabilities, Filter, Landlock, Network};
use crate::attempt::{Attempt, Done, Guard, attempt, done, held, only_if, own};
use crate::call;

const INET: i32 = libc::AF_INET;
const STREAM: i32 = libc::SOCK_STREAM;
const DATAGRAM: i32 = libc::SOCK_DGRAM;
const RAW: i32 = libc::SOCK_RAW;
const SEQUENCED: i32 = libc::SOCK_SEQPACKET;

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    call!(libc::SYS_socket, family, kind | libc::SOCK_CLOEXEC, protocol).map(own)
}

fn set(kind: i32, level: i32, option: i32, value: i32) -> Done {
    let socket = socket(INET, kind, 0)?;
    done(call!(libc::SYS_setsockopt, socket.as_raw_fd(), level, option, &raw const value, 4))
}

/// An ioctl on the interface `lo`, with its flags or its MTU.
fn interface(request: u64, value: i32) -> Done {
    let socket = socket(INET, DATAGRAM, 0)?;
    let mut words = [0u8; 40];
    words[..2].copy_from_slice(b"lo");
    words[16..20].copy_from_slice(&value.to_ne_bytes());
    done(call!(libc::SYS_ioctl, socket.as_raw_fd(), request, words.as_ptr()))
}

/// A message to a netlink family that asks for an acknowledgement, and its answer.
fn netlink(protocol: i32, messages: &[u8]) -> Done {
    let socket = socket(libc::AF_NETLINK, RAW, protocol)?;
    let timeout = [2i64, 0];
    call!(
        libc::SYS_setsockopt,
        socket.as_raw_fd(),
        libc::SOL_SOCKET,
        libc::SO_RCVTIMEO,
        timeout.as_ptr(),
        16
    )?;
    call!(libc::SYS_sendto, socket.as_raw_fd(), messages.as_ptr(), messages.len(), 0, 0, 0)?;
    let mut answer = [0u8; 4096];
    let size = call!(libc::SYS_recvfrom, socket.as_raw_fd(), answer.as_mut_ptr(), answer.len(), 0, 0, 0)?;
    let word = |at: usize| i32::from_ne_bytes(answer[at..at + 4].try_into().expect("four bytes"));
    // NLMSG_ERROR with 0 is an acknowledgement.
    if size >= 20 && word(4) & 0xffff == 2 && word(16) < 0 {
        return Err(io::Error::from_raw_os_error(-word(16)));
    }
    Ok(())
}

/// linux/netlink.h, struct nlmsghdr, and what follows it.
fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((16 + body.len() as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn address() -> Done {
    // RTM_NEWADDR, request and acknowledge and create: 192.0.2.9/32 on interface 1.
    let body = [&[2u8, 32, 0, 0, 1, 0, 0, 0, 8, 0, 2, 0, 192, 0, 2, 9][..]].concat();
    netlink(libc::NETLINK_ROUTE, &message(20, 0x405, &body))
}

fn table() -> Done {
    // A batch around NFT_MSG_NEWTABLE (10 << 8) with NFTA_TABLE_NAME.
    let batch = [0u8, 0, 0, 10];
    let body = [&[2u8, 0, 0, 0, 9, 0, 1, 0][..], b"leak\0\0\0\0"].concat();
    let all = [message(16, 1, &batch), message(10 << 8, 0x405, &body), message(17, 1, &batch)].concat();
    netlink(libc::NETLINK_NETFILTER, &all)
}

/// Dump the sockets of TCP that listen, and look for one's port.
fn diagnose(port: u16) -> Done {
    let socket = socket(libc::AF_NETLINK, RAW, libc::NETLINK_SOCK_DIAG)?;
    // struct inet_diag_req_v2: family, protocol, extensions, pad, states (TCP_LISTEN is 10), then an id of nobody.
    let mut body = vec![libc::AF_INET as u8, libc::IPPROTO_TCP as u8, 0, 0];
    body.extend((1u32 << 10).to_ne_bytes());
    body.resize(56, 0);
    let request = message(20, 0x301, &body);
    call!(libc::SYS_sendto, socket.as_raw_fd(), request.as_ptr(), request.len(), 0, 0, 0)?;
    let mut answer = vec![0u8; 65_536];
    loop {
        let size = call!(libc::SYS_recvfrom, socket.as_raw_fd(), answer.as_mut_ptr(), answer.len(), 0, 0, 0)?;
        let mut rest = &answer[..size as usize];
        while rest.len() >= 16 {
            let length = u32::from_ne_bytes(rest[..4].try_into().expect("four bytes")) as usize;
            let kind = u16::from_ne_bytes(rest[4..6].try_into().expect("two bytes"));
            if kind == 3 || kind == 2 || length < 16 {
                return held("not among the sockets");
            }
            // struct inet_diag_msg: four bytes, then the source port.
            if rest.len() >= 22 && rest[20..22] == port.to_be_bytes() {
                return Ok(());
            }
            rest = &rest[length.next_multiple_of(4).min(rest.len())..];
        }
    }
}

fn tcp(address: &str, port: u16) -> Done {
    let address = format!("{address}:{port}").parse().map_err(io::Error::other)?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    stream.read_exact(&mut [0; 5])
}

fn udp(port: u16) -> Done {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    socket.send_to(b"hello", ("127.0.0.1", port))?;
    done(socket.recv_from(&mut [0; 16]))
}

/// Connect to a socket of AF_UNIX; a name that begins with `@` is abstract.
pub fn unix(name: &str) -> Done {
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.extend(name.strip_prefix('@').map_or(name.to_owned(), |name| format!("\0{name}")).into_bytes());
    let mut end = io::Error::from_raw_os_error(libc::EPROTOTYPE);
    for kind in [STREAM, SEQUENCED] {
        let socket = socket(libc::AF_UNIX, kind | libc::SOCK_NONBLOCK, 0)?;
        match call!(libc::SYS_connect, socket.as_raw_fd(), address.as_ptr(), address.len()) {
            Err(error) if error.raw_os_error() == Some(libc::EPROTOTYPE) => end = error,
            other => return done(other),
        }
    }
    Err(end)
}

fn named(path: &str, what: &str) -> Done {
    only_if(std::fs::read_to_string(path)?.contains(what), "it is not listed")
}

/// Ask for every link and count them: loopback is one.
fn links() -> Done {
    let names = std::fs::read_to_string("/proc/net/dev")?;
    only_if(
        names.lines().skip(2).any(|line| !line.trim_start().starts_with("lo:")),
        "there is loopback alone",
    )
}

const OWN: &[Guard] = &[Capabilities];

#[rustfmt::skip]
pub const ATTEMPTS: &[Attempt] = &[
    attempt("af-alg", "the kernel's cryptography", "CVE-2026-31431", &[Filter], Maybe, |_| done(socket(libc::AF_ALG, SEQUENCED, 0))),
    attempt("af-vsock", "the machine's hypervisor", "CVE-2021-26708", &[Filter], Host, |_| done(socket(libc::AF_VSOCK, STREAM, 0))),
    attempt("af-vsock-high-bits", "the same with bits that the kernel drops", "CVE-2019-10063", &[Filter], Host, |_| {
        done(call!(libc::SYS_socket, (libc::AF_VSOCK as i64) | (1 << 32), STREAM, 0))
    }),
    attempt("af-vsock-pair", "a pair of them", "CVE-2021-26708", &[Filter], Host, |_| {
        crate::attempt::reaches(call!(libc::SYS_socketpair, libc::AF_VSOCK, STREAM, 0, [0u32; 2].as_mut_ptr()), libc::EOPNOTSUPP)
    }),
    attempt("af-packet", "frames of the network", "CVE-2020-14386", &[Filter, Capabilities], Throwaway, |_| done(socket(libc::AF_PACKET, RAW, 3))),
    attempt("af-key", "keys of IPsec", "CVE-2021-3715", &[Filter, Capabilities], Maybe, |_| done(socket(libc::AF_KEY, RAW, 2))),
    attempt("af-xdp", "frames past the network stack", "CVE-2022-2639", &[Filter, Capabilities], Maybe, |_| done(socket(libc::AF_XDP, RAW, 0))),
    attempt("af-tipc", "messages between clusters", "CVE-2021-43267", &[Filter], Maybe, |_| done(socket(libc::AF_TIPC, SEQUENCED, 0))),
    attempt("af-rds", "datagrams of Oracle's", "CVE-2010-3904", &[Filter], Maybe, |_| done(socket(libc::AF_RDS, SEQUENCED, 0))),
    attempt("af-can", "buses of cars", "CVE-2021-34866", &[Filter], Maybe, |_| done(socket(libc::AF_CAN, RAW, 1))),
    attempt("af-bluetooth", "Bluetooth", "CVE-2017-1000251", &[Filter], Maybe, |_| done(socket(libc::AF_BLUETOOTH, SEQUENCED, 0))),
    attempt("af-smc", "shared memory between machines", "CVE-2024-36945", &[Filter], Maybe, |_| done(socket(43, STREAM, 0))),
    attempt("af-kcm", "messages over TCP", "CVE-2023-1998", &[Filter], Maybe, |_| done(socket(41, SEQUENCED, 0))),
    attempt("af-rxrpc", "Andrew's file system", "CVE-2023-2006", &[Filter], Maybe, |_| done(socket(33, DATAGRAM, libc::AF_INET))),
    attempt("netlink-audit", "the audit system", "podman's profile", &[Filter], Maybe, |_| done(socket(libc::AF_NETLINK, RAW, 9))),
    attempt("netlink-audit-high-bits", "the same with bits that the kernel drops", "CVE-2019-10063", &[Filter], Maybe, |_| {
        done(call!(libc::SYS_socket, libc::AF_NETLINK, RAW, 9 | (1i64 << 32)))
    }),
    attempt("netlink-address", "an address for an interface", "podman's capabilities", OWN, Throwaway, |_| address()),
    attempt("netlink-table", "rules of nf_tables", "CVE-2024-1086", OWN, Throwaway, |_| table()),
    attempt("raw-icmp", "raw packets beyond ping", "podman's capabilities", OWN, Throwaway, |_| done(socket(INET, RAW, libc::IPPROTO_ICMP))),
    attempt("raw-icmp6", "the same for IPv6", "podman's capabilities", OWN, Throwaway, |_| done(socket(libc::AF_INET6, RAW, libc::IPPROTO_ICMPV6))),
    attempt("raw-any", "raw packets with headers of one's own", "podman's capabilities", OWN, Throwaway, |_| done(socket(INET, RAW, libc::IPPROTO_RAW))),
    attempt("interface-down", "take an interface down", "podman's capabilities", OWN, Throwaway, |_| interface(libc::SIOCSIFFLAGS, 0)),
    attempt("interface-mtu", "its packets' size", "podman's capabilities", OWN, Throwaway, |_| interface(libc::SIOCSIFMTU, 1400)),
    attempt("transparent", "speak as any address", "podman's capabilities", OWN, Throwaway, |_| set(STREAM, libc::SOL_IP, libc::IP_TRANSPARENT, 1)),
    attempt("mark", "mark packets, past rules of the firewall", "podman's capabilities", OWN, Throwaway, |_| set(STREAM, libc::SOL_SOCKET, libc::SO_MARK, 1)),
    attempt("large-buffers", "buffers beyond the limit", "podman's capabilities", OWN, Maybe, |_| set(DATAGRAM, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 1 << 28)),
    attempt("tcp-repair", "connections that never were", "podman's capabilities", OWN, Throwaway, |_| set(STREAM, libc::SOL_TCP, libc::TCP_REPAIR, 1)),
    attempt("iptables", "the older firewall's tables", "CVE-2021-22555", OWN, Maybe, |_| {
        let socket = socket(INET, RAW, libc::IPPROTO_RAW)?;
        let mut size = 84u32;
        done(call!(libc::SYS_getsockopt, socket.as_raw_fd(), libc::SOL_IP, 64, [0u8; 84].as_mut_ptr(), &raw mut size))
    }),
    attempt("host-tcp", "what listens on the host's loopback", "CVE-2020-15257", &[Network], Host, |targets| tcp("127.0.0.1", targets.victim.tcp)).own_network(),
    attempt("host-tcp6", "the same by IPv6", "CVE-2020-15257", &[Network], Host, |targets| tcp("[::ffff:127.0.0.1]", targets.victim.tcp)).own_network(),
    attempt("host-udp", "datagrams to the host's loopback", "CVE-2020-15257", &[Network], Host, |targets| udp(targets.victim.udp)).own_network(),
    attempt("host-abstract", "an abstract socket of the host", "CVE-2020-15257", &[Network, Landlock], Host, |targets| {
        unix(&format!("@{}", targets.victim.abstract_socket))
    }),
    attempt("host-sockets", "which sockets the host has", "CVE-2020-15257", &[Network], Host, |targets| named("/proc/net/unix", &targets.victim.abstract_socket)).own_network(),
    attempt("host-ports", "which ports the host has open", "podman's namespaces", &[Network], Host, |targets| diagnose(targets.victim.tcp)).own_network(),
    attempt("host-interfaces", "which interfaces the host has", "podman's namespaces", &[Network], Host, |_| links()).own_network(),
];

/// What the victim answers with.
pub fn greet(mut stream: TcpStream) {
    // Who hangs up at once is not greeted.
    let _ = stream.write_all(b"hello");
}
