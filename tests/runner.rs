//! All end-to-end tests, one binary.

mod cases {
    pub mod beside;
    pub mod builds;
    pub mod bus;
    pub mod client;
    pub mod confinement;
    pub mod crash;
    pub mod crash_snapshots;
    pub mod descriptors;
    pub mod desktop;
    pub mod devices;
    pub mod diff;
    pub mod environments;
    pub mod escape;
    pub mod install;
    pub mod judgement;
    pub mod limits;
    pub mod namespaces;
    pub mod network;
    pub mod peers;
    pub mod proxies;
    pub mod releases;
    pub mod services;
    pub mod sessions;
    pub mod snapshots;
    pub mod sockets;
    pub mod store;
    pub mod streams;
    pub mod sudo;
    pub mod tampering;
}

/// A file that nobody names would never run.
#[test]
fn no_test_file_is_forgotten() {
    let own = include_str!("runner.rs");
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    for entry in std::fs::read_dir(directory).expect("cases") {
        let name = entry.expect("entry").file_name().to_string_lossy().into_owned();
        let stem = name.strip_suffix(".rs").expect("a Rust file");
        assert!(own.contains(&format!("pub mod {stem};")), "{name} is not in runner.rs");
    }
}
