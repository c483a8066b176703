//! The contract: names, errors, object paths, and proxies generated from the XML files beside this crate's `src/`
//! (`make interfaces`; a test holds them to each other).

mod errors;
mod paths;
mod proxies;

pub use errors::Error;
pub use paths::{environment_path, job_path, process_path, release_path, snapshot_path};
pub use proxies::environment::EnvironmentProxy;
pub use proxies::job::JobProxy;
pub use proxies::manager::ManagerProxy;
pub use proxies::process::ProcessProxy;
pub use proxies::release::ReleaseProxy;
pub use proxies::snapshot::SnapshotProxy;

/// The well-known name.
pub const NAME: &str = "org.casemate.Casemate1";
/// The manager's object, with ObjectManager.
pub const ROOT: &str = "/org/casemate/Casemate1";

/// Each interface's name with its XML.
pub const INTERFACES: &[(&str, &str)] = &[
    ("org.casemate.Casemate1.Environment", include_str!("../org.casemate.Casemate1.Environment.xml")),
    ("org.casemate.Casemate1.Job", include_str!("../org.casemate.Casemate1.Job.xml")),
    ("org.casemate.Casemate1.Manager", include_str!("../org.casemate.Casemate1.Manager.xml")),
    ("org.casemate.Casemate1.Process", include_str!("../org.casemate.Casemate1.Process.xml")),
    ("org.casemate.Casemate1.Release", include_str!("../org.casemate.Casemate1.Release.xml")),
    ("org.casemate.Casemate1.Snapshot", include_str!("../org.casemate.Casemate1.Snapshot.xml")),
];
