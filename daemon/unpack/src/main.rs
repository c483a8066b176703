//! The worker `casemate-unpack`: see the library's head.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use casemate_worker::profiles::UNPACK;
use casemate_worker::protocol::{FD_FIRST, UnpackRequest};

fn main() -> ExitCode {
    casemate_worker::run(
        &UNPACK,
        || Ok(()),
        |(), request: UnpackRequest, events| {
            // SAFETY: the daemon opened these three descriptors for us, `run` kept them, and nobody else in here owns them.
            let (root, input, spool) = unsafe {
                (
                    OwnedFd::from_raw_fd(FD_FIRST),
                    File::from_raw_fd(FD_FIRST + 1),
                    File::from_raw_fd(FD_FIRST + 2),
                )
            };
            casemate_unpack::work(root, input, spool, &request, &mut |bytes, items| {
                events.progress(bytes, 0, items, 0);
            })
        },
    )
}
