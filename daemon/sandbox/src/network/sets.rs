//! The allow-list in the kernel. Its rules are written by nft(8) before anything of the environment runs; the addresses of
//! names are put into its sets by the relay, over netlink, as answers pass through it.
//!
//! The network namespace belongs to the outer user namespace: nobody inside has a capability in it.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use casemate_sandbox::plan::{Allow, Destination, Host};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::InitError;
use crate::mounts::step;

const TABLE: &str = "casemate";
/// Most addresses of names at a time, in each set.
const SIZE: usize = 65_536;
/// The kernel answers at once, or something is wrong.
const ANSWER: i64 = 5;

fn rule(destination: &Destination) -> Option<String> {
    let Host::Network { address, bits } = destination.host else { return None };
    let family = if address.is_ipv4() { "ip" } else { "ip6" };
    let port = destination
        .port
        .map_or(String::new(), |port| format!(" meta l4proto {{ tcp, udp }} th dport {port}"));
    Some(format!("{family} daddr {address}/{bits}{port} accept"))
}

/// What nft is told. Answers to what came in by a published port are part of an established connection.
fn rules(destinations: &[Destination]) -> String {
    let mut text = format!("table inet {TABLE} {{\n");
    for (version, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "set ports{version} {{ type {kind} . inet_service; size {SIZE}; flags timeout; }}"
        );
        let _ = writeln!(text, "set hosts{version} {{ type {kind}; size {SIZE}; flags timeout; }}");
    }
    text.push_str(
        "chain output {\n\
         type filter hook output priority filter; policy drop;\n\
         oifname \"lo\" accept\n\
         ct state established,related accept\n\
         icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit } accept\n",
    );
    for rule in destinations.iter().filter_map(rule) {
        let _ = writeln!(text, "{rule}");
    }
    for (version, family) in [(4, "ip"), (6, "ip6")] {
        let _ =
            writeln!(text, "meta l4proto {{ tcp, udp }} {family} daddr . th dport @ports{version} accept");
        let _ = writeln!(text, "{family} daddr @hosts{version} accept");
    }
    text.push_str("reject with icmpx admin-prohibited\n}\n}\n");
    text
}

/// Write the rules of this network namespace.
pub fn write(allow: &Allow) -> Result<(), InitError> {
    let mut command = Command::new(&allow.nft);
    command.args(["-f", "-"]).env_clear().current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = step("start nft", command.spawn())?;
    if let Some(mut stdin) = child.stdin.take() {
        step("write to nft", stdin.write_all(rules(&allow.destinations).as_bytes()))?;
    }
    let output = step("wait for nft", child.wait_with_output())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or_default().escape_debug().to_string();
    Err(InitError::Network(format!(
        "nft could not write the allow-list ({}): {said}; this kernel may lack nf_tables (as root: modprobe nf_tables)",
        output.status
    )))
}

/// The sets of the network namespace in which it is opened.
pub struct Sets {
    socket: OwnedFd,
    sequence: u32,
}

/// The socket of [`Sets`]: who uses it needs CAP_NET_ADMIN in the namespace all the same.
pub fn open() -> Result<OwnedFd, InitError> {
    let made =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkNetFilter);
    let made = step("speak to nf_tables", made)?;
    step("speak to nf_tables", bind(made.as_raw_fd(), &NetlinkAddr::new(0, 0)))?;
    step("speak to nf_tables", setsockopt(&made, sockopt::ReceiveTimeout, &TimeVal::seconds(ANSWER)))?;
    Ok(made)
}

const NESTED: u16 = 0x8000;

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    // Keys, names and what nests them: some 200 bytes.
    let size = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = [&size.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn message(kind: u16, flags: u16, sequence: u32, family: u8, subsystem: u16, body: &[u8]) -> Vec<u8> {
    const REQUEST: u16 = 1;
    let size = u32::try_from(20 + body.len()).unwrap_or(u32::MAX);
    [
        &size.to_ne_bytes()[..],
        &kind.to_ne_bytes(),
        &(flags | REQUEST).to_ne_bytes(),
        &sequence.to_ne_bytes(),
        &[0; 4],
        &[family, 0],
        &subsystem.to_be_bytes(),
        body,
    ]
    .concat()
}

/// A set's name and its key for an address.
fn element(address: IpAddr, port: Option<u16>) -> (&'static str, Vec<u8>) {
    let mut key = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    if let Some(port) = port {
        // Each part of a key is filled up to four bytes.
        key.extend([&port.to_be_bytes()[..], &[0; 2]].concat());
    }
    let set = match (address.is_ipv4(), port.is_some()) {
        (true, true) => "ports4",
        (true, false) => "hosts4",
        (false, true) => "ports6",
        (false, false) => "hosts6",
    };
    (set, key)
}

/// One transaction: added in case it is not there, deleted, added with its new time.
fn batch(sequence: u32, address: IpAddr, port: Option<u16>, time: Duration) -> Vec<u8> {
    const NFTABLES: u16 = 10;
    const BATCH_BEGIN: u16 = 0x10;
    const BATCH_END: u16 = 0x11;
    const NEW_ELEMENT: u16 = NFTABLES << 8 | 12;
    const DELETE_ELEMENT: u16 = NFTABLES << 8 | 14;
    const ACK: u16 = 4;
    const CREATE: u16 = 0x400;
    const INET: u8 = 1;
    let (set, key) = element(address, port);
    let text = |kind, text: &str| attribute(kind, &[text.as_bytes(), b"\0"].concat());
    let key = attribute(1 | NESTED, &attribute(1, &key));
    let milliseconds = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let timeout = attribute(4, &milliseconds.to_be_bytes());
    let body = |element: &[u8]| {
        let list = attribute(3 | NESTED, &attribute(1 | NESTED, element));
        [text(1, TABLE), text(2, set), list].concat()
    };
    let new = body(&[&key[..], &timeout].concat());
    [
        message(BATCH_BEGIN, 0, sequence, 0, NFTABLES, &[]),
        message(NEW_ELEMENT, CREATE, sequence + 1, INET, 0, &new),
        message(DELETE_ELEMENT, 0, sequence + 2, INET, 0, &body(&key)),
        message(NEW_ELEMENT, CREATE | ACK, sequence + 3, INET, 0, &new),
        message(BATCH_END, 0, sequence + 4, 0, NFTABLES, &[]),
    ]
    .concat()
}

impl Sets {
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, sequence: 1 }
    }

    /// Let the environment reach an address, for so long.
    pub fn admit(&mut self, address: IpAddr, port: Option<u16>, time: Duration) -> io::Result<()> {
        const ERROR: u16 = 2;
        let sequence = self.sequence;
        // Far from its end whatever the environment asks for: at a thousand names a second, ten days. Then from 1 again.
        self.sequence = self.sequence.checked_add(5).filter(|next| *next < u32::MAX - 5).unwrap_or(1);
        send(self.socket.as_raw_fd(), &batch(sequence, address, port, time), MsgFlags::empty())?;
        let mut buffer = [0; 8 << 10];
        loop {
            let size = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let answer = &buffer[..size];
            let number = |from: usize| {
                answer.get(from..from + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes)
            };
            let (Some(kind), Some(of), Some(code)) = (answer.get(4..6), number(8), number(16)) else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            if kind != ERROR.to_ne_bytes() || !(sequence..sequence + 5).contains(&of) {
                continue;
            }
            match code.cast_signed() {
                0 if of == sequence + 3 => return Ok(()),
                0 => {}
                code => return Err(io::Error::from_raw_os_error(code.wrapping_neg())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_networks() {
        let network = |address: &str, bits, port| Destination {
            host: Host::Network { address: address.parse().expect("address"), bits },
            port,
        };
        let name = Destination { host: Host::Name("a.example".into()), port: Some(443) };
        assert_eq!(rule(&name), None);
        assert_eq!(rule(&network("10.0.0.0", 8, None)).expect("one"), "ip daddr 10.0.0.0/8 accept");
        assert_eq!(
            rule(&network("2001:db8::", 32, Some(22))).expect("one"),
            "ip6 daddr 2001:db8::/32 meta l4proto { tcp, udp } th dport 22 accept"
        );
        assert!(rules(&[]).ends_with("reject with icmpx admin-prohibited\n}\n}\n"));
    }

    #[test]
    fn keys_are_filled_up() {
        let (set, key) = element("192.0.2.1".parse().expect("address"), Some(443));
        assert_eq!((set, key.as_slice()), ("ports4", &[192, 0, 2, 1, 1, 187, 0, 0][..]));
        let (set, key) = element("::1".parse().expect("address"), None);
        assert_eq!((set, key.len()), ("hosts6", 16));
    }
}
