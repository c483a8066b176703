//! The worker `casemate-tree`: see the library's head.

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use casemate_worker::profiles::TREE;
use casemate_worker::protocol::{FD_FIRST, TreeRequest};

fn main() -> ExitCode {
    casemate_worker::run(
        &TREE,
        || Ok(()),
        |(), request: TreeRequest, events| {
            // SAFETY: the daemon opened this descriptor for us, `run` kept it, and nobody else in here owns it.
            let store = unsafe { OwnedFd::from_raw_fd(FD_FIRST) };
            casemate_tree::work(&store, &request, &mut |bytes, items| events.progress(bytes, 0, items, 0))
        },
    )
}
