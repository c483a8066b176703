//! Whether the host has a way out, and the kernel's word when that changes.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use crate::InitError;
use crate::mounts::step;

/// RTMGRP_IPV4_ROUTE and RTMGRP_IPV6_ROUTE
const GROUPS: u32 = 0x40 | 0x400;

/// Destination and mask of `/proc/net/route` are zero.
fn is_default(line: &str) -> bool {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
}

/// The same of `/proc/net/ipv6_route`; the unreachable routes of loopback are none.
fn is_default6(line: &str) -> bool {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    fields.first().is_some_and(|destination| destination.bytes().all(|byte| byte == b'0'))
        && fields.get(1) == Some(&"00")
        && fields.last() != Some(&"lo")
}

pub fn has_default() -> bool {
    // A kernel without a protocol has no such file, and no such routes.
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    read("/proc/net/route").lines().any(is_default) || read("/proc/net/ipv6_route").lines().any(is_default6)
}

/// A socket that becomes readable when routes change.
pub fn watch() -> Result<OwnedFd, InitError> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute);
    let made = step("watch routes", made)?;
    step("watch routes", bind(made.as_raw_fd(), &NetlinkAddr::new(0, GROUPS)))?;
    Ok(made)
}

/// Take all that has come; what it says is looked up anew.
pub fn drain(socket: &OwnedFd) -> Result<(), InitError> {
    let mut buffer = [0; 8 << 10];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            // ENOBUFS: some were lost, and there are more.
            Ok(_) | Err(nix::errno::Errno::ENOBUFS | nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::EAGAIN) => return Ok(()),
            Err(error) => return step("watch routes", Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_is_told_from_other_routes() {
        let header = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT";
        assert!(!is_default(header));
        assert!(is_default("eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0"));
        assert!(!is_default("eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0"));
        let zero = "00000000000000000000000000000000";
        let gateway = "fd000000000000000000000000000001";
        assert!(is_default6(&format!(
            "{zero} 00 {zero} 00 {gateway} 00000400 00000001 00000000 00000003     eth0"
        )));
        assert!(!is_default6(&format!(
            "{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200       lo"
        )));
    }
}
