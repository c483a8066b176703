//! Workers: what is said to them ([`protocol`]).
pub mod protocol;
