//! The network of an environment: what its record asks for, with the tools that this machine has.

use std::path::PathBuf;

use casemate_manifest::{Destination, Host, Port, Protocol};
use casemate_sandbox::plan::{self, Allow, NAME_SERVER, Network, Private};

use crate::error::Error;
use crate::records::EnvironmentRecord;
use crate::{Inner, configuration};

/// Where distributions keep programs that are not in every user's `PATH`.
const MORE: [&str; 2] = ["/usr/sbin", "/sbin"];

/// A program of the host's, by name.
pub(crate) fn find(path: &[PathBuf], name: &str) -> Option<PathBuf> {
    path.iter().map(PathBuf::as_path).map(|directory| directory.join(name)).find(|path| path.is_file())
}

/// The directories of `PATH`, and those for administrators; without `PATH` there are no programs.
pub(crate) fn directories(path: &str) -> Vec<PathBuf> {
    let own = std::env::split_paths(path).filter(|directory| directory.is_absolute());
    let mut all: Vec<PathBuf> = own.collect();
    if !all.is_empty() {
        all.extend(MORE.map(PathBuf::from));
    }
    all
}

fn port(port: &Port) -> plan::Port {
    plan::Port {
        address: port.address,
        host: port.host,
        inside: port.inside,
        protocol: match port.protocol {
            Protocol::Tcp => plan::Protocol::Tcp,
            Protocol::Udp => plan::Protocol::Udp,
        },
    }
}

fn destination(destination: &Destination) -> plan::Destination {
    plan::Destination {
        host: match &destination.host {
            Host::Name(name) => plan::Host::Name(name.clone()),
            Host::Network { address, bits } => plan::Host::Network { address: *address, bits: *bits },
        },
        port: destination.port,
    }
}

/// What of the host's resolv.conf(5) is for libc inside: how to complete names. Servers are the relay's business.
fn completion(text: &str) -> impl Iterator<Item = &str> {
    let wanted = |line: &&str| {
        let word = line.split_ascii_whitespace().next();
        matches!(word, Some("search" | "domain" | "options")) && !line.contains(|c: char| c.is_control())
    };
    text.lines().filter(wanted)
}

impl Inner {
    pub(crate) fn tool(&self, name: &'static str) -> Option<PathBuf> {
        find(&directories(&self.settings.path), name)
    }

    pub(crate) fn need(
        &self,
        name: &'static str,
        package: &'static str,
        key: &'static str,
    ) -> Result<String, Error> {
        let path = self.tool(name).ok_or(Error::ToolMissing { tool: name, package, key })?;
        path.into_os_string().into_string().map_err(|path| Error::NotUtf8 { what: name, path: path.into() })
    }

    /// Policy is asked again: it may have changed since the environment was built.
    pub(crate) fn plan_network(&self, record: &EnvironmentRecord) -> Result<Network, Error> {
        match record.network.as_str() {
            "host" => Ok(Network::Host),
            "private" => {
                configuration::policy(&self.settings.configuration)?.judge_ports(&record.ports)?;
                let resolver = self.settings.resolver.to_str().ok_or_else(|| Error::NotUtf8 {
                    what: "resolv.conf",
                    path: self.settings.resolver.clone(),
                })?;
                let allow = match &record.allow {
                    None => None,
                    Some(list) => Some(Allow {
                        nft: self.need("nft", "nftables", "runtime.allow")?,
                        destinations: list.iter().map(destination).collect(),
                    }),
                };
                Ok(Network::Private(Private {
                    allow,
                    pasta: self.need("pasta", "passt", "runtime.network = \"private\"")?,
                    resolver: resolver.to_owned(),
                    ports: record.ports.iter().map(port).collect(),
                }))
            }
            _ => Ok(Network::None),
        }
    }

    /// `/etc/resolv.conf` inside.
    pub(crate) fn resolver_file(&self, network: &Network) -> String {
        // A host without the file has no servers.
        let host = || std::fs::read_to_string(&self.settings.resolver).unwrap_or_default();
        match network {
            Network::None => String::new(),
            Network::Host => host(),
            Network::Private(_) => {
                let mut text = format!(
                    "# casemate asks the host's servers, also when they change.\nnameserver {NAME_SERVER}\n"
                );
                completion(&host()).for_each(|line| {
                    text.push_str(line);
                    text.push('\n');
                });
                text
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn names_are_completed_as_on_the_host() {
        let host = "# x\nnameserver 9.9.9.9\nsearch a.example b.example\noptions edns0\n";
        assert_eq!(completion(host).collect::<Vec<_>>(), ["search a.example b.example", "options edns0"]);
    }

    #[test]
    fn tools_are_looked_for_in_absolute_directories() {
        assert!(directories("").is_empty());
        assert_eq!(
            directories("bin:/opt/bin"),
            [Path::new("/opt/bin"), Path::new("/usr/sbin"), Path::new("/sbin")]
        );
        assert_eq!(find(&directories("/usr/bin"), "no-such-tool"), None);
    }
}
