//! One file a command.

pub mod alterations;
pub mod build;
pub mod diff;
pub mod doctor;
pub mod enter;
pub mod exec;
pub mod jobs;
pub mod kill;
pub mod lifecycle;
pub mod limits;
pub mod list;
pub mod logs;
pub mod release;
pub mod show;
pub mod snapshots;
pub mod stats;
pub mod store;
pub mod wait;
