//! The worker `casemate-fetch`: see the library's head.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::process::ExitCode;

use casemate_fetch::certificates;
use casemate_fetch::resolver::Configuration;
use casemate_fetch::{Limits, Network, fetch};
use casemate_worker::profiles::FETCH;
use casemate_worker::protocol::{FD_FIRST, Failure, FailureKind, FetchRequest, FetchResult};
use casemate_worker::{Events, run};
use rustls::pki_types::CertificateDer;

/// What is read of the system before confinement. Parsing waits until after it.
struct Prepared {
    certificates: Vec<CertificateDer<'static>>,
    resolver: Configuration,
}

fn untrusting(error: certificates::CertificatesError) -> Failure {
    Failure::new(FailureKind::Network, "CA certificates", error.to_string())
}

fn prepare() -> Result<Prepared, Failure> {
    Ok(Prepared { certificates: certificates::read().map_err(untrusting)?, resolver: Configuration::read() })
}

fn work(prepared: Prepared, request: FetchRequest, events: &mut Events) -> Result<FetchResult, Failure> {
    // SAFETY: the daemon opened FD_FIRST for this process, and nothing else takes it.
    let output = unsafe { File::from_raw_fd(FD_FIRST) };
    let network = Network {
        tls: certificates::tls(prepared.certificates).map_err(untrusting)?,
        resolver: prepared.resolver,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(|error| Failure::io("runtime", &error))?;
    let mut tell = |now: casemate_fetch::Progress| {
        events.progress(now.bytes, now.bytes_total, now.items, now.items_total);
    };
    runtime.block_on(fetch(&request, network, &Limits::default(), &output, &mut tell))
}

fn main() -> ExitCode {
    run(&FETCH, prepare, work)
}
