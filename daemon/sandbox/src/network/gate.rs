//! Which names may be asked for, and what becomes of the answers: with an allow-list, the addresses of a name are opened
//! for as long as programs may hold on to them. So what is resolved inside and what is open never differ.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use casemate_sandbox::plan::{Destination, Host};
use hickory_proto::op::Message;
use hickory_proto::rr::RData;
use rustix::thread::CapabilitySet;

use super::sets::Sets;

/// Programs keep addresses for longer than they should; a fresh answer begins the time anew.
const LEAST: Duration = Duration::from_secs(3600);
const MOST: Duration = Duration::from_secs(7 * 24 * 3600);

pub enum Gate {
    /// Every name.
    Open,
    Listed {
        names: Vec<(String, Option<u16>)>,
        socket: i32,
        sets: Mutex<Sets>,
    },
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => name.len() > suffix.len() && name.ends_with(suffix),
        None => name == pattern,
    }
}

/// What is open of the one name that is asked for; `None` where nothing is.
fn asked(names: &[(String, Option<u16>)], question: &[u8]) -> Option<Vec<Option<u16>>> {
    let message = Message::from_vec(question).ok()?;
    let [query] = message.queries.as_slice() else { return None };
    let name = query.name.to_ascii().to_ascii_lowercase();
    let name = name.trim_end_matches('.');
    let ports: Vec<_> =
        names.iter().filter(|(pattern, _)| matches(pattern, name)).map(|(_, port)| *port).collect();
    (!ports.is_empty()).then_some(ports)
}

fn addresses(answer: &[u8]) -> io::Result<Vec<(IpAddr, Duration)>> {
    let message = Message::from_vec(answer).map_err(io::Error::other)?;
    let address = |data: &RData| match data {
        RData::A(address) => Some(IpAddr::V4(address.0)),
        RData::AAAA(address) => Some(IpAddr::V6(address.0)),
        _ => None,
    };
    let time = |seconds: u32| Duration::from_secs(seconds.into()).clamp(LEAST, MOST);
    Ok(message.answers.iter().filter_map(|record| Some((address(&record.data)?, time(record.ttl)))).collect())
}

impl Gate {
    pub fn listed(destinations: &[Destination], socket: OwnedFd) -> Self {
        let name = |destination: &Destination| match &destination.host {
            Host::Name(name) => Some((name.clone(), destination.port)),
            Host::Network { .. } => None,
        };
        Self::Listed {
            names: destinations.iter().filter_map(name).collect(),
            socket: socket.as_raw_fd(),
            sets: Mutex::new(Sets::new(socket)),
        }
    }

    pub fn descriptor(&self) -> Option<i32> {
        match self {
            Self::Open => None,
            Self::Listed { socket, .. } => Some(*socket),
        }
    }

    /// What it takes to change the sets. It is one in the environment's network alone.
    pub fn capabilities(&self) -> CapabilitySet {
        match self {
            Self::Open => CapabilitySet::empty(),
            Self::Listed { .. } => CapabilitySet::NET_ADMIN,
        }
    }

    /// Whether a question may be asked, and which ports its answer opens.
    pub fn asked(&self, question: &[u8]) -> Option<Vec<Option<u16>>> {
        match self {
            Self::Open => Some(Vec::new()),
            Self::Listed { names, .. } => asked(names, question),
        }
    }

    pub fn answered(&self, answer: &[u8], ports: &[Option<u16>]) -> io::Result<()> {
        let Self::Listed { sets, .. } = self else { return Ok(()) };
        let addresses = addresses(answer)?;
        let mut sets = sets.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, time) in addresses {
            // Loopback is the environment's own, and open anyway.
            if address.is_loopback() || address.is_unspecified() || address.is_multicast() {
                continue;
            }
            for port in ports {
                sets.admit(address, *port, time)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(name: &str) -> Vec<u8> {
        let mut bytes = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(u8::try_from(label.len()).expect("short"));
            bytes.extend(label.as_bytes());
        }
        bytes.extend([0, 0, 1, 0, 1]);
        bytes
    }

    #[test]
    fn names_of_the_list() {
        let names = [
            ("a.example".to_owned(), Some(443)),
            ("*.b.example".to_owned(), None),
            ("a.example".to_owned(), Some(80)),
        ];
        assert_eq!(asked(&names, &question("A.Example")), Some(vec![Some(443), Some(80)]));
        assert_eq!(asked(&names, &question("x.y.b.example")), Some(vec![None]));
        for other in ["b.example", "xa.example", "xb.example", "a.example.net", "example"] {
            assert_eq!(asked(&names, &question(other)), None, "{other}");
        }
        assert_eq!(asked(&names, b"no question at all"), None);
    }

    #[test]
    fn addresses_of_an_answer() {
        let mut answer = question("a.example");
        answer[2] = 0x81;
        answer[7] = 1;
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4, 192, 0, 2, 1]);
        assert_eq!(addresses(&answer).expect("good"), [("192.0.2.1".parse().expect("address"), LEAST)]);
        assert!(addresses(&answer[..answer.len() - 1]).is_err());
    }
}
