//! The store: objects, layers and records of one user, on one file system.
//!
//! # Layout
//!
//! ```text
//! version            format number and id mode, a record like the others
//! lock               flock(2) for as long as a Store lives; its text says by whom
//! objects/ab/cdef…   contents, see `object`
//! layers/<digest>/   `listing` (see `listing`) and `tree/`
//! releases/  environments/  snapshots/    records, see `record`
//! uppers/<id>/       `upper/` and `work/` of an environment, or an upper that was sealed: a lower, never written again
//! staging/<job>/     everything unfinished
//! ```
//!
//! The directories named here belong to the user and are 0700: files inside are of every id of the user's range, some of
//! them set-id, and nobody else may reach them. What lies below `objects`, `layers/<digest>`, `uppers/<id>` and
//! `staging/<job>/…` is made, moved and removed by `casemate-tree`, in the outer namespace; the daemon could not.
//!
//! # Commitment
//!
//! Everything is built in `staging/`, on the same file system, and becomes real by one rename. The daemon commits
//! [`record`]s: written to a staging file, synced, renamed, directory synced. What a record refers to (layers, uppers)
//! must be synced before: `casemate-tree` does so when it ingests, [`Store::sync`] does it for the rest. An old state is
//! intact until the rename of the new record.
//!
//! # Locking
//!
//! One [`Store`] at a time, held by an exclusive `flock` that dies with its process. Workers need none: the daemon starts
//! them and gives each job its own staging directory. Two ingesting workers may meet in `objects/`: they link, never
//! replace, so whoever comes second finds the first one's object and takes it.
//!
//! # Collection
//!
//! Nothing here counts references. What is reachable is decided by walking the records; the rest of `layers/` and
//! `uppers/`, and objects whose link count is 1, are garbage. Whoever collects must hold back jobs that ingest.
//!
//! # What a change costs
//!
//! Layout, listing and record format are covered by [`FORMAT`]. A store of another format is refused, so a change of any of
//! them needs a migration (build the new form in `staging/`, commit `version` last) before [`FORMAT`] is raised. The
//! listing's format enters the names of layers: a change renames every layer.
//!
//! | format | since | what came, and how an older store gets there |
//! | --- | --- | --- |
//! | 1 | the first store | |
//! | 2 | snapshots | `snapshots/` is used, and environments name what was committed. A store of format 1 is one without either, so that its number is raised when it is opened. One who reads only 1 must refuse it: they would sweep away what snapshots alone name. |

pub mod listing;
pub mod names;
pub mod object;
pub mod record;

mod error;
mod lock;
mod store;

pub use error::{Error, Result};
pub use lock::Holder;
pub use names::{Digest, Id, Name, ReleaseName, SnapshotName};
pub use record::{Key, Kind, RecordList, Records};
pub use store::{Contents, Staging, Store, StoreMode, layer, upper};

/// Number of the store's format.
pub const FORMAT: u32 = 2;
/// The oldest one that is read, and brought up to [`FORMAT`] when it is opened.
pub const OLDEST_FORMAT: u32 = 1;
