//! `casemate-fetch`: URLs in, bodies out into one inherited file. It speaks to the network and sees nothing else:
//! certificates and the resolver's configuration are read before it is confined.
//!
//! [`address`] judges URLs, [`attempt`] speaks to one server, [`transfer`] tries mirrors in turn. What is written is
//! believed by nobody: the daemon hashes it.

pub mod address;
pub mod attempt;
pub mod certificates;
pub mod proxy;
pub mod range;
pub mod resolver;
pub mod transfer;

use std::time::Duration;

pub use transfer::{Network, fetch};

/// How long to bear with a server.
#[derive(Debug, Clone)]
pub struct Limits {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// Of this time on average, fewer bytes a second than [`Limits::slowest`] are too few.
    pub patience: Duration,
    pub slowest: u64,
    /// Times that one mirror is asked for an item.
    pub tries: u32,
    /// Between two tries.
    pub pause: Duration,
    /// Redirects followed.
    pub hops: usize,
}

impl Default for Limits {
    /// THREATS.md, B.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(20),
            patience: Duration::from_secs(60),
            slowest: 30,
            tries: 2,
            pause: Duration::from_secs(1),
            hops: 10,
        }
    }
}

/// How far all items are; totals are 0 where they are not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    pub bytes: u64,
    pub bytes_total: u64,
    pub items: u64,
    pub items_total: u64,
}
