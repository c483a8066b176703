//! `casemate-fetch`: URLs in, bodies out into one inherited file. It speaks to the network and sees nothing else:
//! certificates and resolver configuration are read before it is confined.

mod resolver;
mod transfer;

use std::fs::File;
use std::os::fd::FromRawFd;
use std::process::ExitCode;
use std::sync::Arc;

use casemate_worker::profiles::FETCH;
use casemate_worker::protocol::{FD_FIRST, Failure, FailureKind, FetchRequest, FetchResult};
use casemate_worker::{Events, run};

use crate::resolver::SystemResolver;

/// What is read of the system before confinement.
struct Prepared {
    certificates: rustls::RootCertStore,
    resolver: SystemResolver,
}

fn prepare() -> Result<Prepared, Failure> {
    let found = rustls_native_certs::load_native_certs();
    let mut certificates = rustls::RootCertStore::empty();
    let (added, _) = certificates.add_parsable_certificates(found.certs);
    if added == 0 {
        let why = found.errors.first().map(ToString::to_string).unwrap_or_default();
        return Err(Failure::new(
            FailureKind::Network,
            "CA certificates",
            format!("there are none to check servers by; install the package ca-certificates {why}"),
        ));
    }
    Ok(Prepared { certificates, resolver: SystemResolver::read() })
}

fn work(prepared: Prepared, request: FetchRequest, events: &mut Events) -> Result<FetchResult, Failure> {
    // SAFETY: the daemon opened FD_FIRST for this process, and nothing else takes it.
    let output = unsafe { File::from_raw_fd(FD_FIRST) };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| Failure::io("runtime", &error))?;
    let provider = rustls::crypto::ring::default_provider();
    let tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| Failure::new(FailureKind::Network, "TLS", error.to_string()))?
        .with_root_certificates(prepared.certificates)
        .with_no_client_auth();
    runtime.block_on(transfer::fetch(&request, tls, prepared.resolver, &output, events))
}

fn main() -> ExitCode {
    run(&FETCH, prepare, work)
}
