//! Names to addresses without libc: `/etc/hosts` and `/etc/resolv.conf` as they were when the worker started, read as
//! hosts(5) and resolv.conf(5) say, which is: what makes no sense is passed over.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::config::{
    ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts,
    ServerOrderingStrategy,
};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::Name as DnsName;
use hickory_resolver::{Resolver, TokioResolver};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

/// Most bytes of either file.
const FILE_MAX: usize = 4 << 20;
/// As many as libc uses.
const SERVERS_MAX: usize = 3;

/// Name servers and how to ask them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    pub servers: Vec<SocketAddr>,
    pub search: Vec<String>,
    pub dots: usize,
    pub timeout: Duration,
    pub attempts: usize,
    pub rotate: bool,
    pub tcp: bool,
    pub edns: bool,
    pub only_ipv4: bool,
    /// Names of `/etc/hosts`, in lower case.
    pub hosts: HashMap<String, Vec<IpAddr>>,
}

impl Configuration {
    /// Read the system's files. Missing ones are empty ones: addresses, and names in the other file, still work.
    pub fn read() -> Self {
        let read = |path| std::fs::read(path).unwrap_or_default();
        Self::parse(&read("/etc/resolv.conf"), &read("/etc/hosts"))
    }

    pub fn parse(resolv: &[u8], hosts: &[u8]) -> Self {
        let mut new = Self {
            servers: Vec::new(),
            search: Vec::new(),
            dots: 1,
            timeout: Duration::from_secs(5),
            attempts: 2,
            rotate: false,
            tcp: false,
            edns: false,
            only_ipv4: false,
            hosts: parse_hosts(hosts),
        };
        for line in lines(resolv) {
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") => {
                    // An address with a zone (fe80::1%eth0) is passed over: it would have to be looked up by now.
                    let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                    new.servers.extend(address.map(|address| SocketAddr::new(address, 53)));
                }
                // The last one counts.
                Some("search" | "domain") => new.search = words.take(32).map(str::to_owned).collect(),
                Some("options") => words.for_each(|word| new.option(word)),
                _ => {}
            }
        }
        new.servers.truncate(SERVERS_MAX);
        if new.servers.is_empty() {
            new.servers.push(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 53));
        }
        new
    }

    fn option(&mut self, word: &str) {
        let number = |most: usize| {
            word.split_once(':').and_then(|(_, n)| n.parse::<usize>().ok()).map(|n| n.min(most))
        };
        match word.split(':').next().unwrap_or_default() {
            "ndots" => self.dots = number(15).unwrap_or(self.dots),
            "timeout" => {
                self.timeout = number(30).map_or(self.timeout, |n| Duration::from_secs(n.max(1) as u64))
            }
            "attempts" => self.attempts = number(5).map_or(self.attempts, |n| n.max(1)),
            "rotate" => self.rotate = true,
            "use-vc" => self.tcp = true,
            "edns0" => self.edns = true,
            "no-aaaa" => self.only_ipv4 = true,
            _ => {}
        }
    }

    /// What is known without asking anybody.
    fn known(&self, name: &str) -> Option<Vec<IpAddr>> {
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        if let Some(found) = self.hosts.get(&name) {
            return Some(found.clone());
        }
        // RFC 6761, 6.3: never to be asked of a name server.
        let local = name == "localhost" || name.ends_with(".localhost");
        local.then(|| vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)])
    }

    fn open(&self) -> Result<TokioResolver, String> {
        let server = |address: &SocketAddr| {
            let mut connections = if self.tcp {
                vec![ConnectionConfig::tcp()]
            } else {
                vec![ConnectionConfig::udp(), ConnectionConfig::tcp()]
            };
            for connection in &mut connections {
                connection.port = address.port();
            }
            NameServerConfig::new(address.ip(), true, connections)
        };
        let search = self.search.iter().filter_map(|name| DnsName::from_utf8(name).ok()).collect();
        let config = ResolverConfig::from_parts(None, search, self.servers.iter().map(server).collect());
        let mut options = ResolverOpts::default();
        options.ndots = self.dots;
        options.timeout = self.timeout;
        options.attempts = self.attempts;
        options.edns0 = self.edns;
        options.try_tcp_on_error = true;
        options.num_concurrent_reqs = 1;
        options.server_ordering_strategy = match self.rotate {
            true => ServerOrderingStrategy::RoundRobin,
            false => ServerOrderingStrategy::UserProvidedOrder,
        };
        options.ip_strategy = match self.only_ipv4 {
            true => LookupIpStrategy::Ipv4Only,
            false => LookupIpStrategy::Ipv4AndIpv6,
        };
        options.use_hosts_file = ResolveHosts::Never;
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        builder.build().map_err(|error| error.to_string())
    }
}

/// Lines without comments.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &str> {
    let bytes = &bytes[..bytes.len().min(FILE_MAX)];
    let lines = bytes.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.map(|line| line.split(['#', ';']).next().unwrap_or_default())
}

fn parse_hosts(bytes: &[u8]) -> HashMap<String, Vec<IpAddr>> {
    let mut hosts: HashMap<String, Vec<IpAddr>> = HashMap::new();
    for line in lines(bytes) {
        let mut words = line.split_ascii_whitespace();
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        for name in words {
            let known = hosts.entry(name.trim_end_matches('.').to_ascii_lowercase()).or_default();
            if !known.contains(&address) {
                known.push(address);
            }
        }
    }
    hosts
}

/// The resolver that reqwest asks. To be made inside the runtime.
#[derive(Clone)]
pub struct SystemResolver {
    configuration: Arc<Configuration>,
    resolver: TokioResolver,
}

impl SystemResolver {
    pub fn new(configuration: Configuration) -> Result<Self, String> {
        let resolver = configuration.open()?;
        Ok(Self { configuration: Arc::new(configuration), resolver })
    }
}

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let own = self.clone();
        Box::pin(async move {
            let found = match own.configuration.known(name.as_str()) {
                Some(known) => known,
                None => own.resolver.lookup_ip(name.as_str()).await?.iter().collect(),
            };
            let addresses = found.into_iter().map(|address| SocketAddr::new(address, 0));
            Ok(Box::new(addresses) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolv_conf() {
        let text = b"# comment\nnameserver 10.0.0.1 # mine\nnameserver ::1\nnameserver fe80::1%eth0\nnameserver nonsense\n\
            search a.example\nsearch b.example c.example\noptions ndots:99 timeout:2 attempts:0 rotate edns0 use-vc no-aaaa \
            unknown ndots:x\n\xff\xfe\nnameserver 10.0.0.3\nnameserver 10.0.0.4\nsortlist 1.2.3.4\n";
        let found = Configuration::parse(text, b"");
        let servers: Vec<String> = found.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.0.0.1:53", "[::1]:53", "10.0.0.3:53"]);
        assert_eq!(found.search, ["b.example", "c.example"]);
        assert_eq!((found.dots, found.timeout.as_secs(), found.attempts), (15, 2, 1));
        assert!(found.rotate && found.edns && found.tcp && found.only_ipv4);
        let empty = Configuration::parse(b"", b"");
        assert_eq!(empty.servers, ["127.0.0.1:53".parse().expect("an address")]);
        assert_eq!((empty.dots, empty.timeout.as_secs(), empty.attempts), (1, 5, 2));
    }

    #[test]
    fn hosts() {
        let text =
            b"127.0.0.1 localhost Mirror.Example alias # comment\n::1 localhost\n10.0.0.9 mirror.example.\n\
            # 10.0.0.8 hidden\nnonsense name\n\xff\n10.0.0.7\n";
        let found = Configuration::parse(b"", text);
        let known =
            |name| found.known(name).map(|all| all.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(known("MIRROR.example").expect("known"), ["127.0.0.1", "10.0.0.9"]);
        assert_eq!(known("alias.").expect("known"), ["127.0.0.1"]);
        assert_eq!(known("localhost").expect("known"), ["127.0.0.1", "::1"]);
        assert_eq!(known("x.localhost").expect("known"), ["127.0.0.1", "::1"]);
        for unknown in ["hidden", "name", "comment", "example"] {
            assert_eq!(known(unknown), None, "{unknown}");
        }
    }
}
