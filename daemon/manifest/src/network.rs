//! `[runtime] ports` and `[runtime] allow`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A port of the host that leads inside: `HOST:INSIDE`, with `ADDRESS:` before (`[ADDRESS]:` for IPv6) and `/tcp` or `/udp`
/// after. Without an address it is the host's loopback, which nobody but the host's users can reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    pub address: IpAddr,
    pub host: u16,
    pub inside: u16,
    pub protocol: Protocol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no port: {what}; write \"HOST:INSIDE\", \"ADDRESS:HOST:INSIDE\" or \"…/udp\"")]
pub struct BadPort {
    text: String,
    what: &'static str,
}

fn number(text: &str) -> Option<u16> {
    // No sign, no blank, no leading zero: one spelling for one port.
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
    text.parse().ok().filter(|_| plain)
}

impl FromStr for Port {
    type Err = BadPort;

    fn from_str(text: &str) -> Result<Self, BadPort> {
        let bad = |what| BadPort { text: text.to_owned(), what };
        let (rest, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(bad("the protocol is neither tcp nor udp")),
        };
        let (rest, inside) = rest.rsplit_once(':').ok_or_else(|| bad("the port inside is missing"))?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => (Some(address), host),
        };
        let address = match address {
            None => Ok(Ipv4Addr::LOCALHOST.into()),
            Some(address) => match address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                Some(address) => address.parse().map(IpAddr::V6),
                None => address.parse().map(IpAddr::V4),
            },
        };
        let address = address.map_err(|_| bad("the address is none (an IPv6 one stands in brackets)"))?;
        let range = || bad("ports are numbers from 1 to 65535");
        let (host, inside) = (number(host).ok_or_else(range)?, number(inside).ok_or_else(range)?);
        Ok(Self { address, host, inside, protocol })
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{}:{}/{protocol}", std::net::SocketAddr::new(self.address, self.host), self.inside)
    }
}

impl<'de> Deserialize<'de> for Port {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Port {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Where an environment may go: `NAME`, `*.NAME` for all names below it, `ADDRESS`, `ADDRESS/BITS` (an IPv6 address in
/// brackets), each with `:PORT` where not every port is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    pub host: Host,
    /// Of TCP and UDP. Without it everything is open, ping too.
    pub port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// In lower case.
    Name(String),
    Network {
        address: IpAddr,
        bits: u8,
    },
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{text:?} is no destination: {what}; write \"NAME:PORT\", \"10.0.0.0/8\" or \"[2001:db8::]/32:22\"")]
pub struct BadDestination {
    text: String,
    what: &'static str,
}

fn host_name(text: &str) -> bool {
    let plain = text.strip_prefix("*.").unwrap_or(text);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    // What looks like an address is none that is meant as a name.
    let numeric = plain.rsplit('.').next().is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    plain.len() <= 253 && plain.split('.').all(label) && !numeric
}

/// `BITS` of an address; without them it is the address alone.
fn network(address: IpAddr, bits: Option<&str>) -> Result<Host, &'static str> {
    let (value, all) = match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    };
    let bits = match bits {
        None => all,
        Some("0") => 0,
        Some(bits) => number(bits)
            .and_then(|bits| u8::try_from(bits).ok())
            .filter(|bits| *bits <= all)
            .ok_or("so many bits no address has")?,
    };
    if value.checked_shl(bits.into()).unwrap_or(0) != 0 {
        return Err("the address has bits beyond its network");
    }
    Ok(Host::Network { address, bits })
}

impl FromStr for Destination {
    type Err = BadDestination;

    fn from_str(text: &str) -> Result<Self, BadDestination> {
        let bad = |what| BadDestination { text: text.to_owned(), what };
        let (address, rest) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, rest) = rest.split_once(']').ok_or_else(|| bad("the bracket is not closed"))?;
                let address = address.parse().map_err(|_| bad("in the brackets is no IPv6 address"))?;
                (Some(IpAddr::V6(address)), rest)
            }
            None => (None, text),
        };
        let (rest, port) = match rest.split_once(':') {
            None => (rest, None),
            Some((rest, port)) => {
                (rest, Some(number(port).ok_or_else(|| bad("ports are numbers from 1 to 65535"))?))
            }
        };
        let host = match address {
            Some(address) => match (rest.is_empty(), rest.strip_prefix('/')) {
                (true, _) => network(address, None),
                (false, Some(bits)) => network(address, Some(bits)),
                (false, None) => Err("there is something behind the bracket"),
            },
            None => {
                let (plain, bits) = match rest.split_once('/') {
                    None => (rest, None),
                    Some((plain, bits)) => (plain, Some(bits)),
                };
                match plain.parse::<Ipv4Addr>() {
                    Ok(address) => network(address.into(), bits),
                    Err(_) if bits.is_none() && host_name(plain) => {
                        Ok(Host::Name(plain.to_ascii_lowercase()))
                    }
                    Err(_) => Err("that is neither a name nor an address"),
                }
            }
        };
        Ok(Self { host: host.map_err(bad)?, port })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => f.write_str(name)?,
            Host::Network { address: IpAddr::V4(address), bits } => write!(f, "{address}/{bits}")?,
            Host::Network { address: IpAddr::V6(address), bits } => write!(f, "[{address}]/{bits}")?,
        }
        self.port.map_or(Ok(()), |port| write!(f, ":{port}"))
    }
}

impl<'de> Deserialize<'de> for Destination {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Destination {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        for (text, canonical) in [
            ("Deb.Debian.org:443", "deb.debian.org:443"),
            ("*.example.org", "*.example.org"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("0.0.0.0/0:443", "0.0.0.0/0:443"),
            ("192.0.2.1:22", "192.0.2.1/32:22"),
            ("[2001:db8::]/32:22", "[2001:db8::]/32:22"),
            ("[::]/0", "[::]/0"),
            ("[::1]", "[::1]/128"),
        ] {
            let destination: Destination = text.parse().expect(text);
            assert_eq!(destination.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(destination));
        }
        for text in [
            "",
            ":443",
            "a.example:",
            "a.example:0",
            "a.example:99999",
            "a..example",
            "-a.example",
            "*",
            "*.",
            "a.*.example",
            "a b",
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0/08",
            "10.0.0",
            "1.2.3.4.5",
            "2001:db8::1",
            "[2001:db8::1]/32",
            "[2001:db8::]x",
            "[10.0.0.1]",
            "[2001:db8::",
            "https://a.example",
            "a.example/8",
            "a.example:443:80",
            "a\n.example",
        ] {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
    }

    #[test]
    fn ports() {
        for (text, canonical) in [
            ("8080:80", "127.0.0.1:8080:80/tcp"),
            ("127.0.0.1:5353:53/udp", "127.0.0.1:5353:53/udp"),
            ("0.0.0.0:8080:80/tcp", "0.0.0.0:8080:80/tcp"),
            ("[::1]:8080:80", "[::1]:8080:80/tcp"),
        ] {
            let port: Port = text.parse().expect(text);
            assert_eq!(port.to_string(), canonical);
            assert_eq!(canonical.parse(), Ok(port));
        }
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:0",
            "65536:80",
            "+80:80",
            "080:80",
            "80:80/",
            "80:80/sctp",
            "80 :80",
            "::1:80:80",
            "[127.0.0.1]:80:80",
            "localhost:80:80",
            "[::1]80:80",
            "80:80/tcp/udp",
            "1-2:3",
        ] {
            assert!(text.parse::<Port>().is_err(), "{text}");
        }
    }
}
