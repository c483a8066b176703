//! Manifest, lock, policy and the variables of a session: pure, without I/O, clock or environment of their own.

pub mod cdi;
mod limits;
mod lock;
mod manifest;
mod network;
mod policy;
mod service;
mod session_bus;
mod variables;

pub use limits::{BadLimit, Cpus, ResourceLimits};
pub use lock::{Lock, LockError, LockedBase, LockedPackage};
pub use manifest::{
    Base, Gui, Hardware, Manifest, ManifestError, Mount, Network, Runtime, System, Unsupported,
};
pub use network::{Destination, Host, Port, Protocol};
pub use policy::{MountQuestion, MountRules, Policy, PolicyError, Refusal};
pub use service::{CommandLine, Health, OnFailure, Restart, Service, Stop, StopSignal};
pub use session_bus::SessionBus;
pub use variables::{SessionAccount, session_variables};

/// Where in a text a TOML error is, and what it says, with the nearest known key where one is misspelt.
pub(crate) fn locate(text: &str, error: &toml::de::Error) -> (usize, usize, String) {
    let offset = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.get(..offset).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    let message = error.message();
    let mut words = message.split('`').skip(1).step_by(2);
    let nearest = match (message.starts_with("unknown field"), words.next()) {
        (true, Some(unknown)) => words
            .map(|known| (strsim::damerau_levenshtein(unknown, known), known))
            .min()
            .filter(|(distance, known)| *distance <= known.len().div_ceil(2))
            .map(|(_, known)| format!("; did you mean `{known}`?")),
        _ => None,
    };
    (line, column, format!("{message}{}", nearest.unwrap_or_default()))
}
