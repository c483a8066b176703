//! Names to addresses without libc: `/etc/resolv.conf` and `/etc/hosts` as they were when the worker started.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{Hosts, Resolver, TokioResolver};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};

struct Files {
    resolv: Vec<u8>,
    hosts: Vec<u8>,
}

/// Made outside the runtime, opened at the first question inside.
#[derive(Clone)]
pub struct SystemResolver {
    files: Arc<Files>,
    resolver: Arc<OnceLock<Result<TokioResolver, String>>>,
}

impl SystemResolver {
    /// Missing files are empty ones: addresses and names in the other file still work.
    pub fn read() -> Self {
        let read = |path| std::fs::read(path).unwrap_or_default();
        let files = Files { resolv: read("/etc/resolv.conf"), hosts: read("/etc/hosts") };
        Self { files: Arc::new(files), resolver: Arc::default() }
    }

    fn open(files: &Files) -> Result<TokioResolver, String> {
        let (config, options) = hickory_resolver::system_conf::parse_resolv_conf(&files.resolv)
            .map_err(|error| format!("/etc/resolv.conf: {error}"))?;
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = options;
        // Hosts come from what was read, not from a file that is out of sight by now.
        builder.options_mut().use_hosts_file = hickory_resolver::config::ResolveHosts::Never;
        let mut resolver = builder.build().map_err(|error| error.to_string())?;
        let mut hosts = Hosts::default();
        hosts.read_hosts_conf(files.hosts.as_slice()).map_err(|error| format!("/etc/hosts: {error}"))?;
        resolver.set_hosts(Arc::new(hosts));
        Ok(resolver)
    }
}

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let own = self.clone();
        Box::pin(async move {
            let opened = own.resolver.get_or_init(|| Self::open(&own.files));
            let resolver = opened.as_ref().map_err(|error| std::io::Error::other(error.clone()))?;
            let found = resolver.lookup_ip(name.as_str()).await?;
            let addresses: Vec<SocketAddr> =
                found.iter().map(|address| SocketAddr::new(address, 0)).collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}
