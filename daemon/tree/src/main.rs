//! The worker `casemate-tree`: see the library's head.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use casemate_worker::profiles::TREE;
use casemate_worker::protocol::{FD_FIRST, TreeRequest};

fn main() -> ExitCode {
    casemate_worker::run(
        &TREE,
        || Ok(()),
        |(), request: TreeRequest, events| {
            // SAFETY: the daemon opened these descriptors for us, `run` kept them, and nobody else in here owns them.
            let (store, mut out) =
                unsafe { (OwnedFd::from_raw_fd(FD_FIRST), File::from_raw_fd(FD_FIRST + 1)) };
            casemate_tree::work(&store, &request, &mut out, &mut |bytes, items| {
                events.progress(bytes, 0, items, 0)
            })
        },
    )
}
