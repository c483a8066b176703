//! `casemate-index`: signed indexes in, what they vouch for out. It has neither network nor files: bytes come and go on
//! descriptors.

mod packages;
mod release;
mod version;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::FromRawFd;
use std::process::ExitCode;

use casemate_worker::profiles::INDEX;
use casemate_worker::protocol::{FD_FIRST, Failure, FailureKind, IndexRequest};
use casemate_worker::{Events, run};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Most bytes of an `InRelease`.
const RELEASE_MAX: u64 = 16 << 20;
/// Most bytes of a compressed `Packages`.
const PACKAGES_MAX: u64 = 256 << 20;

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Release(Box<casemate_worker::protocol::ReleaseIndex>),
    Packages(casemate_worker::protocol::PackagesIndex),
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn read(name: &str, most: u64) -> Result<Vec<u8>, Failure> {
    // SAFETY: the daemon opened FD_FIRST for this process, and this is called once.
    let mut file = unsafe { File::from_raw_fd(FD_FIRST) };
    let mut bytes = Vec::new();
    let rewound = std::io::Seek::rewind(&mut file);
    rewound
        .and_then(|()| file.take(most + 1).read_to_end(&mut bytes))
        .map_err(|error| Failure::io(name, &error))?;
    if bytes.len() as u64 > most {
        return Err(Failure::new(FailureKind::Limit, name, format!("longer than {most} bytes")));
    }
    Ok(bytes)
}

fn work((): (), request: IndexRequest, _events: &mut Events) -> Result<Answer, Failure> {
    match request {
        IndexRequest::Release { keyring, now, newest_seen, suite, component, architecture } => {
            let bytes = read("InRelease", RELEASE_MAX)?;
            let text = release::verify(&bytes, &keyring, now)?;
            let wanted = release::Wanted {
                now,
                newest_seen,
                suite: &suite,
                component: &component,
                architecture: &architecture,
            };
            let mut index = release::judge(&text.text, &wanted)?;
            index.signer = text.signer;
            index.sha256 = sha256(&bytes);
            Ok(Answer::Release(Box::new(index)))
        }
        IndexRequest::Packages { sha256: expected, size, compression, architecture, include } => {
            let bytes = read("Packages", PACKAGES_MAX.min(size))?;
            let found = sha256(&bytes);
            if bytes.len() as u64 != size || found != expected {
                let message = format!(
                    "it has {} bytes and SHA-256 {found}, the signed index says {size} and {expected}",
                    bytes.len()
                );
                return Err(Failure::new(FailureKind::Verification, "Packages", message));
            }
            let text = packages::decompress(&bytes, compression)?;
            let known = packages::parse(&text, &architecture)?;
            let chosen = packages::choose(&known, &include)?;
            let catalogue = serde_json::to_vec(&chosen)
                .map_err(|error| Failure::new(FailureKind::Io, "catalogue", error.to_string()))?;
            // SAFETY: the daemon opened this descriptor for the catalogue, and nothing else takes it.
            let mut out = unsafe { File::from_raw_fd(FD_FIRST + 1) };
            out.write_all(&catalogue).map_err(|error| Failure::io("catalogue", &error))?;
            Ok(Answer::Packages(casemate_worker::protocol::PackagesIndex {
                known: known.len() as u64,
                chosen: chosen.len() as u64,
                bytes: catalogue.len() as u64,
            }))
        }
    }
}

fn main() -> ExitCode {
    run(&INDEX, || Ok(()), work)
}
