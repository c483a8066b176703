//! Workers: confined child processes that each do one risky step.
//!
//! [`protocol`] is what daemon and workers say to each other; [`spawn`] is the daemon's side of it; [`run`], [`confine`],
//! [`namespaces`], [`seccomp`] and [`profiles`] are the worker's; [`ids`] serves both.

#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod confine;
pub mod ids;
pub mod namespaces;
pub mod profiles;
pub mod protocol;
mod run;
pub mod seccomp;
pub mod spawn;

pub use run::{Events, run};
