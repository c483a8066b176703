//! Who has a file of this content: told by the listings.

use std::fs::File;
use std::io::{BufReader, Write};

use casemate_store::Digest;
use casemate_store::listing::{Node, Reader, escaped};
use casemate_worker::protocol::TreeResult;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;

use crate::error::{Error, Result};
use crate::ingest::Progress;
use crate::walk::{open_beneath, open_directory, sorted_names};

/// Lines that are written; the rest is counted.
const TOLD: u64 = 1_000;

/// Write `layers/DIGEST PATH` for each file of this content.
pub fn find(
    store: &OwnedFd,
    content: &str,
    out: &mut dyn Write,
    progress: Progress<'_>,
) -> Result<TreeResult> {
    let wanted: Digest =
        content.parse().map_err(|_| Error::Request { path: content.chars().take(100).collect() })?;
    let layers = open_directory(store, "layers").map_err(Error::system("open", b"layers"))?;
    let (mut entries, mut read) = (0, 0);
    for name in sorted_names(&layers, b"layers")? {
        let path = [&name[..], b"/listing"].concat();
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        // One that cannot be read is for `verify` to tell.
        let Ok(listing) = open_beneath(&layers, &path[..], flags) else { continue };
        let Ok(mut listing) = Reader::new(BufReader::new(File::from(listing))) else { continue };
        while let Ok(Some(entry)) = listing.read() {
            read += 1;
            progress(0, read);
            if !matches!(entry.node, Node::File { content, .. } if content == wanted) {
                continue;
            }
            entries += 1;
            if entries <= TOLD {
                writeln!(out, "layers/{} {}", escaped(&name), escaped(&entry.path))
                    .map_err(Error::io("write", &entry.path))?;
            }
        }
    }
    Ok(TreeResult::Found { entries })
}
