//! `casemate-unpack`: from an archive to a tree, judging before touching.
//!
//! Pass 1 decompresses the archive, once, into the spool, an unlinked file, and judges every member as it goes by
//! ([`judge`]); the first bad one refuses the archive while the directory is still empty. Pass 2 extracts from the spool
//! ([`extract`]), pass 3 gives the directories their attributes. What is judged is so what is extracted, and a source that
//! changes meanwhile changes nothing.
//!
//! Nothing is synced here: that is `casemate-tree`'s, once for all.

mod acl;
mod crew;
pub mod deb;
pub mod decode;
pub mod error;
pub mod extract;
pub mod judge;
pub mod sparse;
pub mod spool;
pub mod tar;

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::sync::Arc;

use casemate_worker::protocol::{Failure, UnpackRequest, UnpackResult};
use rustix::fd::OwnedFd;

use crew::Crew;
use decode::{Chunks, Slice};
use error::{Error, Result};
use extract::Extractor;
use judge::{Judge, Source};
use spool::{Spooled, Tee};
use tar::{Kind, TarReader};

/// One archive in the spool.
struct Archive<'a> {
    name: &'a str,
    start: u64,
    end: u64,
}

/// Unpack `input` into the empty directory `root`. `progress` gets bytes and members done, each pass from 0 on.
pub fn work(
    root: OwnedFd,
    input: File,
    spool: File,
    request: &UnpackRequest,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<UnpackResult, Failure> {
    let input = Arc::new(input);
    let spool = Arc::new(spool);
    let (source, limits) = match request {
        UnpackRequest::Image { limits } => (Source::Image, limits),
        UnpackRequest::Packages { limits, .. } => (Source::Packages, limits),
    };
    let progress = RefCell::new(progress);
    let (bytes, members) = (Cell::new(0), Cell::new(0));
    let tell = || (progress.borrow_mut())(bytes.get(), members.get());
    let tick = |position| {
        bytes.set(position);
        tell();
    };
    let mut judge = Judge::new(source, *limits);
    let mut archives: Vec<Archive<'_>> = Vec::new();
    let spent = Arc::default();
    let start = |slice: Result<Slice>| slice.and_then(|slice| Chunks::start(slice, limits, &spent));
    let mut add = |name, chunks: Result<Chunks>| {
        let start = archives.last().map_or(0, |archive: &Archive<'_>| archive.end);
        let end = chunks
            .and_then(|chunks| judge_one(Tee::new(chunks, spool.clone(), start, &tick), &mut judge, &members))
            .map_err(|error| error.failure(name))?;
        archives.push(Archive { name, start, end });
        Ok(())
    };
    match request {
        UnpackRequest::Image { .. } => {
            let size =
                input.metadata().map_err(|e| Error::io("look at the archive")(e).failure("archive"))?.len();
            add("archive", start(Slice::new(input, 0, size)))?;
        }
        UnpackRequest::Packages { items, .. } => {
            let open = |item: &casemate_worker::protocol::Slice| {
                start(Slice::new(input.clone(), item.offset, item.length).and_then(deb::data))
            };
            // While one package is judged, the next one is decoded.
            let mut next = items.first().map(open);
            for (index, item) in items.iter().enumerate() {
                let Some(chunks) = next.take() else { break };
                next = items.get(index + 1).map(open);
                add(&item.name, chunks)?;
            }
        }
    }
    if judge.devices > 0 {
        eprintln!("{} device nodes below dev/ were passed over", judge.devices);
    }

    let general = |error: Error| error.failure(archives.first().map_or("archive", |archive| archive.name));
    let mut extractor = Extractor::new(root, source).map_err(general)?;
    extractor.merge(judge.merged()).map_err(general)?;
    members.set(0);
    for archive in &archives {
        Crew::run(&spool, &tell, |crew| {
            let mut reader = archive.read(&spool);
            while let Some(member) = reader.next_member()? {
                if let Some(item) = judge.item(member)? {
                    extractor.extract(item, reader.input().position(), crew)?;
                }
                members.set(members.get() + 1);
                tick(reader.input().position());
            }
            Ok(())
        })
        .map_err(|error| error.failure(archive.name))?;
    }
    for archive in &archives {
        finish_one(archive, &mut judge, &mut extractor, &spool)
            .map_err(|error| error.failure(archive.name))?;
    }
    if judge.implied(b"") {
        extractor.finish(b"", None).map_err(general)?;
    }
    let bytes = archives.last().map_or(0, |archive| archive.end);
    Ok(UnpackResult { members: judge.members, bytes })
}

impl Archive<'_> {
    fn read(&self, spool: &Arc<File>) -> TarReader<Spooled> {
        TarReader::new(Spooled::new(spool.clone(), self.start, self.end))
    }
}

/// Pass 1. Returns where the archive ends in the spool.
fn judge_one(input: Tee<'_>, judge: &mut Judge, members: &Cell<u64>) -> Result<u64> {
    judge.next_package();
    let mut reader = TarReader::new(input);
    let before = judge.members;
    while let Some(member) = reader.next_member()? {
        if let Some(item) = judge.item(member)? {
            judge.admit(&item)?;
        }
        members.set(judge.members);
    }
    if judge.members == before {
        return Err(Error::archive("it is empty"));
    }
    Ok(reader.finish()?.end)
}

/// Pass 3.
fn finish_one(
    archive: &Archive<'_>,
    judge: &mut Judge,
    extractor: &mut Extractor,
    spool: &Arc<File>,
) -> Result<()> {
    let mut reader = archive.read(spool);
    let mut last_parent: Option<Vec<u8>> = None;
    while let Some(member) = reader.next_member()? {
        let Some(item) = judge.item(member)? else { continue };
        let parent = item.path.iter().rposition(|&b| b == b'/').map_or(&b""[..], |slash| &item.path[..slash]);
        if last_parent.as_deref() != Some(parent) {
            // Directories that no member describes.
            let ends = (1..=parent.len()).filter(|&end| end == parent.len() || parent[end] == b'/');
            for prefix in ends.map(|end| &parent[..end]) {
                if judge.implied(prefix) {
                    judge.finish(prefix);
                    extractor.finish(prefix, None)?;
                }
            }
            last_parent = Some(parent.to_vec());
        }
        if item.member.kind == Kind::Directory {
            // In packages, the first one to describe a directory decides, as with dpkg.
            if judge.finish(&item.path) {
                extractor.finish(&item.path, Some(&item.member))?;
            }
        }
    }
    Ok(())
}
