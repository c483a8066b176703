//! What the daemon and its workers say to each other.
//!
//! A worker gets one request, a JSON document of at most [`REQUEST_MAX`] bytes, on standard input, and answers with
//! [`Event`]s, one JSON object a line of at most [`EVENT_LINE_MAX`] bytes, on descriptor [`FD_EVENTS`]. Logs go to
//! standard error, standard output is `/dev/null`. Everything else that a worker may touch is a descriptor, fixed at
//! spawn, from [`FD_FIRST`] on in the order that the request's type documents; all others are closed.
//!
//! The handshake of a worker whose ids `newuidmap` writes: it unshares its user namespace, says
//! [`Event::Unshared`], and waits for one byte (`\n`) on standard input, which comes once the maps are written. Then it
//! confines itself, says [`Event::Confined`], and only then reads the request, which the daemon sends on that word.
//!
//! The daemon believes nothing of what comes back: lines are bounded, unknown fields refused, sizes and digests
//! compared with what was asked for.

use serde::{Deserialize, Serialize};

/// Version of this protocol. Workers are spawned by path from the daemon's own libexec directory; a request that
/// names another version (an upgrade half done) is refused.
pub const PROTOCOL: u32 = 1;
/// Most bytes of one request.
pub const REQUEST_MAX: usize = 4 << 20;
/// Most bytes of one event line, newline included.
pub const EVENT_LINE_MAX: usize = 1 << 20;
/// The descriptor that events are written to.
pub const FD_EVENTS: i32 = 3;
/// The first of the descriptors that a request's type documents.
pub const FD_FIRST: i32 = 4;

/// The document on a worker's standard input.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope<R> {
    pub protocol: u32,
    pub request: R,
}

/// One line from a worker. `T` is the result type of its request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event<T> {
    /// The user namespace exists; its maps are awaited.
    Unshared,
    /// Confinement is complete; `layers` names each layer in force (`userns`, `mountns`, `seccomp`, `landlock:7`, …).
    Confined { layers: Vec<String> },
    /// How far the work is. Totals are 0 where they are not known.
    Progress { bytes: u64, bytes_total: u64, items: u64, items_total: u64 },
    /// The work is done; nothing follows.
    Done { result: T },
    /// The work failed; nothing follows.
    Failed { failure: Failure },
}

/// Why a worker gave up. `subject` is the thing that failed (a URL, a member's escaped name, a package), `message`
/// what was wrong with it. Both are shown to the user after escaping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    pub kind: FailureKind,
    pub subject: String,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// A signature or digest does not match.
    Verification,
    /// An index is older than one seen before, or expired.
    Stale,
    /// An archive, index or name that is refused whole.
    Refused,
    /// No mirror could be reached, or none answered as it should.
    Network,
    /// What was asked for is not there.
    NotFound,
    /// A cap on size, count, ratio, depth, memory or time was passed.
    Limit,
    /// No space, quota or descriptors left.
    Full,
    /// Another system error.
    Io,
    /// The request makes no sense to this worker.
    Request,
}

/// `casemate-fetch`. Descriptors: [`FD_FIRST`] is the regular file that the bodies are written to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchRequest {
    pub items: Vec<FetchItem>,
    /// `https_proxy`, `http_proxy` and `no_proxy` of the daemon's environment, empty where unset.
    pub proxies: Proxies,
    /// Items fetched at a time.
    pub connections: u8,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proxies {
    pub https: String,
    pub http: String,
    pub none: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchItem {
    /// Tried in order until one gives the whole body. `http:` only where `plain_http` says so.
    pub urls: Vec<String>,
    /// Where the body goes in the output file, in bytes from its start.
    pub offset: u64,
    /// Bytes of the body that are at `offset` already; the fetch resumes after them.
    pub resume: u64,
    /// The exact size, where an index tells it; another one is refused.
    pub size: Option<u64>,
    /// Most bytes to take where the size is not known.
    pub limit: u64,
    /// Whether `http:` will do: only where the body's hash is known beforehand or the body is signed.
    pub plain_http: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchResult {
    /// In the order of the request's items.
    pub items: Vec<Fetched>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetched {
    /// Which of the item's URLs served it, perhaps by redirects: by number, since what a server makes of an address is its own.
    pub from: u32,
    /// Size of the whole body in bytes.
    pub bytes: u64,
}

/// `casemate-index`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "index", rename_all = "kebab-case", deny_unknown_fields)]
pub enum IndexRequest {
    /// Verify a clear-signed `InRelease`. Descriptors: [`FD_FIRST`] the file, to read.
    Release {
        /// ASCII-armoured OpenPGP certificates; the index must carry a valid signature by one of them.
        keyring: Vec<String>,
        /// The one reference time of the whole operation, seconds since the epoch.
        now: u64,
        /// `Date` of the newest index of this suite ever accepted; an older one is [`FailureKind::Stale`].
        newest_seen: Option<u64>,
        /// `Codename` or `Suite` that it must name.
        suite: String,
        component: String,
        /// Debian's name of the architecture, such as `amd64`.
        architecture: String,
    },
    /// Check a `Packages` index against its hash and resolve the base set. Descriptors: [`FD_FIRST`] the compressed
    /// index, to read; the next one the catalogue, to write: a JSON array of [`Package`], in the order in which they
    /// can be unpacked.
    Packages {
        sha256: String,
        size: u64,
        compression: Compression,
        architecture: String,
        /// Packages wanted beside those of priority `required` and those marked `Essential`.
        include: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
    Bzip2,
}

/// Result of [`IndexRequest::Release`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseIndex {
    pub origin: String,
    pub suite: String,
    pub codename: String,
    /// `Version`, such as `12.12`; empty where there is none.
    pub version: String,
    /// Seconds since the epoch.
    pub date: u64,
    pub valid_until: Option<u64>,
    /// Fingerprint of the (sub)key that made the signature, upper-case hex.
    pub signer: String,
    /// SHA-256 of the whole `InRelease` file, lower-case hex.
    pub sha256: String,
    /// The best compressed `Packages` file of the component and architecture asked for.
    pub packages: IndexFile,
    pub acquire_by_hash: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexFile {
    /// Relative to the directory of the `InRelease`.
    pub path: String,
    pub size: u64,
    pub sha256: String,
    pub compression: Compression,
}

/// Result of [`IndexRequest::Packages`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackagesIndex {
    /// Packages in the whole index.
    pub known: u64,
    /// Packages written to the catalogue.
    pub chosen: u64,
    /// Bytes written to the catalogue.
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub architecture: String,
    /// Relative to the archive's root; without `..`, not absolute.
    pub filename: String,
    pub size: u64,
    /// Lower-case hex.
    pub sha256: String,
    pub essential: bool,
}

/// `casemate-unpack`. Descriptors from [`FD_FIRST`] on: the directory to extract into (it becomes the worker's root),
/// the archive or the file that holds the packages (to read), and an empty unlinked file for the spool.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "unpack", rename_all = "kebab-case", deny_unknown_fields)]
pub enum UnpackRequest {
    /// A root filesystem archive: tar, compressed or not; told by its magic number.
    Image { limits: UnpackLimits },
    /// The `data.tar` of each Debian package, one upon the other.
    Packages { items: Vec<Slice>, limits: UnpackLimits },
}

/// One file within the input.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    /// For messages.
    pub name: String,
    pub offset: u64,
    pub length: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnpackLimits {
    /// Decompressed bytes.
    pub bytes: u64,
    pub members: u64,
    /// Decompressed bytes for each compressed one, counted from the first 64 MiB on.
    pub ratio: u64,
    /// Path components of a name.
    pub depth: u32,
    /// Memory of the decoder, bytes.
    pub decoder_memory: u64,
}

impl Default for UnpackLimits {
    /// 64 GiB and 4 million members hold the largest images in use (CUDA toolkits, full distributions) with room to
    /// spare; a ratio of 200 is twice what text compresses to; 128 MiB is what `xz -9e` and `zstd --long=27` need.
    fn default() -> Self {
        Self { bytes: 64 << 30, members: 4_000_000, ratio: 200, depth: 256, decoder_memory: 128 << 20 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnpackResult {
    pub members: u64,
    /// Decompressed bytes.
    pub bytes: u64,
}

/// `casemate-tree`. Descriptors: [`FD_FIRST`] the store's directory; the next one is written to where a request says so, and
/// else may lead nowhere. Paths are relative to it, have no `..`, and begin
/// with `staging/`, `layers/` or `uppers/`; the records' directories are out of the worker's sight.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "tree", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TreeRequest {
    /// Make `path` a directory owned by the environments' root, mode 0755, with `children` in it alike. Parents exist.
    Prepare { path: String, children: Vec<String> },
    /// Make each of these uppers, `upper` and `work` in it: on the disk when this is answered.
    Uppers { make: Vec<NewUpper> },
    /// Copy the tree at `from` to `to`, whose parent is made for it: everything that a layer keeps, and overlay marks as well.
    /// Content is shared where the file system can (reflinks). On the disk when this is answered. Nobody may write to it
    /// meanwhile.
    Copy { from: String, to: String },
    /// Turn the tree at `path` into a layer: hash, link into `objects/`, write the listing, sync, rename to
    /// `layers/<digest>`. An upper's overlay marks are kept or dropped as DESIGN.md says.
    Ingest { path: String },
    /// Make one tree at `to`, in staging, of a stack of layers' trees, topmost first: with links to the same inodes, and marks
    /// such that it does to what is below it what the stack does.
    Flatten { stack: Vec<String>, to: String },
    /// Say how the stack `new` differs from `old`, each trees' paths, topmost first: lines on the second descriptor, or, with
    /// `patch`, a unified diff of what files hold. Either may be written to meanwhile.
    Diff { old: Vec<String>, new: Vec<String>, patch: bool },
    /// Remove these trees, and all objects that are linked from nowhere then; with `dry`, only tell. Nobody may store meanwhile.
    Sweep { trees: Vec<String>, dry: bool },
    /// Measure what everything takes: lines on the second descriptor.
    Tally,
    /// Say which layers have a file of this content: a line for each, its path in the store, on the second descriptor.
    Find { content: String },
    /// Remove each of these trees, whole. One that is not there is no error. Objects that only these trees used stay:
    /// that is `gc`'s, and `purge`'s, which may name `objects/ab` and what is in there as well.
    Remove { paths: Vec<String> },
    /// Walk a layer: listing against its digest, tree against the listing, objects against their names.
    Verify { layer: String },
}

/// An upper to be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewUpper {
    /// `uppers/<id>`, which is not there yet.
    pub path: String,
    /// The topmost tree below it. The root of an overlay has the attributes of its upper's, so they are that tree's.
    pub like: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "tree", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TreeResult {
    Prepared,
    Copied {
        entries: u64,
        /// Bytes of all regular files.
        bytes: u64,
    },
    Ingested {
        /// BLAKE3 of the listing, lower-case hex.
        digest: String,
        entries: u64,
        /// Bytes of all regular files.
        bytes: u64,
        new_objects: u64,
        new_bytes: u64,
    },
    Flattened {
        entries: u64,
    },
    Swept {
        objects: u64,
        /// All that was freed.
        bytes: u64,
    },
    Tallied {
        bytes: u64,
        entries: u64,
    },
    Found {
        entries: u64,
    },
    Compared {
        differences: u64,
    },
    Removed {
        entries: u64,
    },
    Verified {
        entries: u64,
        bytes: u64,
        /// Each damage, escaped and ready to be shown.
        damage: Vec<String>,
    },
}
