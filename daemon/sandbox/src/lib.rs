//! The sandbox: a pure plan, the protocol of `casemate-init`, and (in `main.rs`) init itself.
pub mod control;
pub mod elevation;
pub mod plan;
