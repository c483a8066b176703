//! The workers' own bench: the real ones, possessed, or `misbehave` under each worker's name, started as the daemon starts
//! workers.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_worker::ids::IdMode;
use casemate_worker::spawn::{Limits, Progress, Spawner, Worker, WorkerError};
use tokio::sync::watch;

use crate::misdeeds::{Argument, DEAF, MUTE, Outcome, REAL, STEPS, Step, UNCONFINED};

pub const WORKERS: [Worker; 4] = [Worker::Fetch, Worker::Index, Worker::Unpack, Worker::Tree];
pub const LIMITS: Limits = Limits { time: Duration::from_secs(60), silence: Duration::from_secs(30) };

/// A directory with the store that `casemate-tree` gets, the staging directory that `casemate-unpack` gets, and beside them
/// what neither may reach.
pub struct Bench {
    pub home: tempfile::TempDir,
    pub spawner: Spawner,
    /// Whether its workers are the real ones.
    real: bool,
}

pub fn number(number: impl Into<i64>) -> Argument {
    Argument::Number(number.into())
}

pub fn text(text: impl Into<String>) -> Argument {
    Argument::Text(text.into())
}

pub fn call(number: i64, arguments: impl IntoIterator<Item = Argument>) -> Step {
    Step::Call { number, arguments: arguments.into_iter().collect() }
}

impl Bench {
    /// `misbehave`, by its path, has each worker's profile, and does all that is asked.
    pub async fn new(misbehave: &str) -> Self {
        Self::with(misbehave, misbehave, false).await
    }

    /// The real workers do what can be done by system calls, by way of `possess`. What is run by other names is `misbehave`.
    pub async fn possessed(misbehave: &str, possess: &str) -> Self {
        Self::with(misbehave, possess, true).await
    }

    async fn with(misbehave: &str, worker: &str, real: bool) -> Self {
        let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        assert_ne!(uid, 0, "tests run as an ordinary user: `make test`, or scripts/as-user");
        let ids = IdMode::detect(&std::env::var("USER").unwrap_or_default(), uid, gid);
        assert!(matches!(ids, IdMode::Range { .. }), "this user has no range of ids: {ids:?}");
        let home = tempfile::tempdir().expect("directory");
        let libexec = home.path().join("libexec");
        fs::create_dir(&libexec).expect("libexec");
        for name in WORKERS.map(|worker| worker.profile().name) {
            symlink(worker, libexec.join(name)).expect("link");
        }
        for name in [UNCONFINED, DEAF, MUTE] {
            symlink(misbehave, libexec.join(name)).expect("link");
        }
        let bench = Self { home, spawner: Spawner { libexec, ids, environment: Vec::new() }, real };
        for directory in ["staging", "releases", "environments", "snapshots"] {
            fs::create_dir_all(bench.store().join(directory)).expect("store");
        }
        fs::write(bench.store().join("releases/known"), "a record").expect("record");
        fs::write(bench.secret(), "secret").expect("secret");
        fs::set_permissions(bench.secret(), fs::Permissions::from_mode(0o644)).expect("mode");
        symlink(bench.secret(), bench.store().join("staging/link")).expect("link");
        // As `casemate-tree` prepares it: the environment's root owns it.
        let made = bench
            .run(
                Worker::Tree,
                &[
                    call(libc::SYS_mkdirat, [number(4), text("staging/tree"), number(0o755)]),
                    call(
                        libc::SYS_symlinkat,
                        [text(bench.secret().to_str().expect("UTF-8")), number(4), text("staging/tree/link")],
                    ),
                ],
            )
            .await;
        assert_eq!(made.expect("staging"), Outcome { errno: 0 });
        bench
    }

    pub fn store(&self) -> PathBuf {
        self.home.path().join("store")
    }

    pub fn secret(&self) -> PathBuf {
        self.home.path().join("secret")
    }

    /// The directory that a worker has as its root, if any.
    pub fn directory(&self, worker: Worker) -> Option<PathBuf> {
        match worker {
            Worker::Fetch | Worker::Index => None,
            Worker::Unpack => Some(self.store().join("staging/tree")),
            Worker::Tree => Some(self.store()),
        }
    }

    fn descriptors(&self, worker: Worker) -> Vec<OwnedFd> {
        let file = || OwnedFd::from(tempfile::tempfile().expect("file"));
        let directory = |path: &Path| OwnedFd::from(File::open(path).expect("directory"));
        let mut all: Vec<OwnedFd> = self.directory(worker).map(|path| directory(&path)).into_iter().collect();
        all.resize_with(worker.profile().descriptors as usize, file);
        all
    }

    pub async fn run(&self, worker: Worker, steps: &[Step]) -> Result<Outcome, WorkerError> {
        let (_keep, cancel) = watch::channel(false);
        self.run_with(worker, steps, LIMITS, &mut |_| (), cancel).await
    }

    pub async fn run_with(
        &self,
        worker: Worker,
        steps: &[Step],
        limits: Limits,
        progress: &mut (dyn FnMut(Progress) + Send),
        cancel: watch::Receiver<bool>,
    ) -> Result<Outcome, WorkerError> {
        let environment = if self.real {
            let real = crate::binaries().display().to_string();
            vec![(REAL.to_owned(), real), (STEPS.to_owned(), serde_json::to_string(steps).expect("JSON"))]
        } else {
            Vec::new()
        };
        let Spawner { libexec, ids, .. } = &self.spawner;
        let spawner = Spawner { libexec: libexec.clone(), ids: ids.clone(), environment };
        spawner.run(worker, &steps, self.descriptors(worker), limits, progress, cancel).await
    }

    /// One of the names that are no worker's, with a worker's descriptors.
    pub async fn run_as(
        &self,
        name: &'static str,
        worker: Worker,
        steps: &[Step],
        limits: Limits,
    ) -> Result<Outcome, WorkerError> {
        let (_keep, cancel) = watch::channel(false);
        let program = self.spawner.libexec.join(name);
        let descriptors = self.descriptors(worker);
        self.spawner
            .run_program(&program, name, false, &steps, descriptors, limits, &mut |_| (), cancel)
            .await
    }

    /// All processes of this bench's workers.
    pub fn processes(&self) -> Vec<u32> {
        let program = self.spawner.libexec.to_str().expect("UTF-8").as_bytes().to_vec();
        let pids = fs::read_dir("/proc").expect("/proc").filter_map(|entry| {
            let entry = entry.expect("entry");
            let pid = entry.file_name().to_str()?.parse().ok()?;
            // One that has just ended has none.
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            line.starts_with(&program).then_some(pid)
        });
        pids.collect()
    }

    /// Remove what belongs to the environment's root, which only a worker can.
    pub async fn end(self) {
        let mut steps = Vec::new();
        for entry in fs::read_dir(self.store().join("staging/tree")).expect("staging") {
            let path = format!("staging/tree/{}", entry.expect("entry").file_name().to_str().expect("UTF-8"));
            let flags = if self.store().join(&path).is_dir() { libc::AT_REMOVEDIR } else { 0 };
            steps.push(call(libc::SYS_unlinkat, [number(4), text(path), number(flags)]));
        }
        let flags = number(libc::AT_REMOVEDIR);
        steps.push(call(libc::SYS_unlinkat, [number(4), text("staging/tree"), flags]));
        assert_eq!(self.run(Worker::Tree, &steps).await.expect("removal"), Outcome { errno: 0 });
        assert_eq!(self.processes(), [0; 0], "workers outlive their test");
        self.home.close().expect("removal");
    }
}
