//! The harness: a private bus, temporary XDG directories, the real daemon and client. Each world begins with the downloads
//! of those before it, by hard link (they are hashed again on each use); everything else is a test's own. Tests that
//! leave a world as they found it share one: [`World::shared`].

pub mod archive;
pub mod escapes;
pub mod mirror;
pub mod misdeeds;
pub mod processes;
pub mod signer;
pub mod typist;
pub mod workers;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Long enough for the slowest machine; a test that meets it has failed.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Programs that `scripts/newer` has unpacked.
pub const NEWER: &str = "/usr/local/lib/casemate-tests/bin";

static NUMBER: AtomicU32 = AtomicU32::new(0);

pub struct World {
    root: PathBuf,
    bus: Child,
    daemon: Option<Child>,
    /// Variables of the daemon and all clients, beside the usual ones.
    variables: Vec<(String, String)>,
}

pub fn binaries() -> PathBuf {
    let set = std::env::var_os("CASEMATE_LIBEXEC").map(PathBuf::from);
    set.unwrap_or_else(|| {
        // target/TRIPLE/release/deps/runner-…
        let own = std::env::current_exe().expect("own path");
        own.ancestors().nth(2).expect("target directory").to_owned()
    })
}

fn data() -> PathBuf {
    std::env::var_os("CASEMATE_DATA")
        .map(PathBuf::from)
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
}

/// A manifest on this release, with its directory as workspace.
pub fn manifest_text(release: &str, more: &str) -> String {
    format!(
        "manifest_version = 1\n[base]\nrelease = \"{release}\"\n[mounts]\nworkspace = \"./:/workspace\"\n{more}"
    )
}

/// `make soak` wants the full counts, `make test` a sample.
pub fn soak<T>(full: T, sample: T) -> T {
    if std::env::var_os("CASEMATE_SOAK").is_some() { full } else { sample }
}

/// What a random test begins with; CASEMATE_SEED repeats a run.
pub fn seed() -> u64 {
    let seed = std::env::var("CASEMATE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("CASEMATE_SEED={seed}");
    seed
}

fn private(path: &Path) {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).expect("directory");
}

/// Hard links in `to` of what `from` has and `to` has not.
fn link_all(from: &Path, to: &Path) {
    let Ok(entries) = fs::read_dir(from) else { return };
    for entry in entries {
        let path = entry.expect("entry").path();
        let name = path.file_name().expect("a name");
        // Files that begin with a dot are being written.
        if !name.as_encoded_bytes().starts_with(b".") {
            match fs::hard_link(&path, to.join(name)) {
                // There already, or just gone from another world's purge.
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                linked => linked.expect("link a download"),
            }
        }
    }
}

/// Wait for something to become true.
pub fn wait_for(what: &str, mut ready: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !ready() {
        assert!(begin.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl World {
    /// A bus and a daemon on an empty store.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// The same, with variables beside the usual ones.
    pub fn with(variables: &[(&str, &str)]) -> Self {
        assert!(!is_root(), "tests run as an ordinary user: `make test`, or scripts/as-user");
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let home = PathBuf::from(std::env::var_os("HOME").expect("HOME"));
        let root = home.join(format!("casemate-tests/{}-{number}", std::process::id()));
        for directory in ["data", "config/casemate", "run", "project", "cache/casemate/sha256"] {
            private(&root.join(directory));
        }
        let address = format!("unix:path={}", root.join("run/bus").display());
        let bus = Command::new("dbus-daemon")
            .args(["--session", "--nofork", "--nopidfile", "--address"])
            .arg(address)
            .stdout(Stdio::null())
            .spawn()
            .expect("dbus-daemon: install the package dbus-daemon");
        let socket = root.join("run/bus");
        // The socket is there a moment before anybody listens on it.
        wait_for("the bus", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
        let variables =
            variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut world = Self { root, bus, daemon: None, variables };
        world.recall_downloads();
        world.start_daemon();
        world
    }

    /// A world with the release debian/bookworm.
    pub fn with_release() -> Self {
        let world = Self::new();
        world.run(&["release", "fetch", "debian/bookworm"]);
        world
    }

    /// A world with the environment `demo`, whose workspace is the project directory.
    pub fn with_environment(more: &str) -> Self {
        let world = Self::with_release();
        world.write_manifest(more);
        world.run(&["build", "demo", "--manifest", &world.manifest()]);
        world
    }

    /// A world with the release debian/bookworm and a running daemon, for tests that leave both as they are. It goes when
    /// the test binary ends, however that ends.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<World> = OnceLock::new();
        SHARED.get_or_init(|| {
            let world = Self::with_release();
            world.removed_after_us();
            world
        })
    }

    /// An environment of this name in the shared world; its project directory is its workspace.
    pub fn shared_environment(name: &str, more: &str) -> (&'static Self, PathBuf) {
        let world = Self::shared();
        let project = world.root.join(format!("project-{name}"));
        private(&project);
        let manifest = project.join("casemate.toml");
        fs::write(&manifest, manifest_text("debian/bookworm", more)).expect("manifest");
        world.run(&["build", name, "--manifest", &manifest.display().to_string()]);
        (world, project)
    }

    /// Have a process clean up that waits for our end.
    fn removed_after_us(&self) {
        static HELD: Mutex<Vec<Child>> = Mutex::new(Vec::new());
        let script = "read -r _; \"$0\" purge --yes; kill \"$1\" \"$2\"; rm -rf \"$3\"";
        let mut command = self.command("sh");
        command.args(["-c", script]).arg(binaries().join("casemate"));
        command.args([self.daemon_pid().to_string(), self.bus.id().to_string()]).arg(&self.root);
        let reaper = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        // Its standard input is the pipe that our end closes.
        HELD.lock().expect("one at a time").push(reaper.expect("sh"));
    }

    /// Where the daemon keeps what it has downloaded.
    pub fn downloads(&self) -> PathBuf {
        self.root.join("cache/casemate/sha256")
    }

    /// What all worlds have downloaded.
    fn shared_downloads(&self) -> PathBuf {
        let shared = self.root.parent().expect("parent").join("downloads");
        private(&shared);
        shared
    }

    /// What is fetched from now on comes over the network.
    pub fn forget_downloads(&self) {
        link_all(&self.downloads(), &self.shared_downloads());
        for entry in fs::read_dir(self.downloads()).expect("cache") {
            fs::remove_file(entry.expect("entry").path()).expect("a download");
        }
    }

    /// What any world has downloaded is there.
    pub fn recall_downloads(&self) {
        link_all(&self.shared_downloads(), &self.downloads());
    }

    /// From now on, this mirror is the only one there is.
    pub fn know_only(&self, mirror: &mirror::Mirror) {
        self.know_only_by(mirror, &Self::shipped().join("keys/debian"));
    }

    /// The same, and its indexes are signed by the keys in this directory.
    pub fn know_only_by(&self, mirror: &mirror::Mirror, keys: &Path) {
        let sources = self.config().join("sources.d");
        fs::create_dir_all(&sources).expect("sources.d");
        let source = mirror.source(keys);
        fs::write(sources.join("debian.toml"), source).expect("source");
    }

    /// What Casemate ships: keys, sources, policy.
    pub fn shipped() -> PathBuf {
        data()
    }

    pub fn project(&self) -> PathBuf {
        self.root.join("project")
    }

    pub fn config(&self) -> PathBuf {
        self.root.join("config/casemate")
    }

    pub fn store(&self) -> PathBuf {
        self.root.join("data/casemate")
    }

    /// Where the daemon keeps the sockets of what runs.
    pub fn runtime(&self) -> PathBuf {
        self.root.join("run/casemate")
    }

    pub fn manifest(&self) -> String {
        self.project().join("casemate.toml").display().to_string()
    }

    pub fn write_manifest(&self, more: &str) {
        self.write_manifest_on("debian/bookworm", more);
    }

    pub fn write_manifest_on(&self, release: &str, more: &str) {
        fs::write(self.project().join("casemate.toml"), manifest_text(release, more)).expect("manifest");
    }

    fn environment(&self, command: &mut Command) {
        let home = std::env::var_os("HOME").expect("HOME");
        command
            .env_clear()
            .env("HOME", home)
            .env("PATH", format!("{NEWER}:/usr/local/bin:/usr/bin:/bin:/usr/sbin"))
            .env("LANG", "C.UTF-8")
            .env("XDG_DATA_HOME", self.root.join("data"))
            .env("XDG_CONFIG_HOME", self.root.join("config"))
            .env("XDG_CACHE_HOME", self.root.join("cache"))
            .env("XDG_RUNTIME_DIR", self.root.join("run"))
            .env("CASEMATE_DATA", data())
            .env("CASEMATE_LIBEXEC", binaries())
            .env("DBUS_SESSION_BUS_ADDRESS", self.bus_address())
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
    }

    /// Any program on this world's bus.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        self.environment(&mut command);
        command.stdin(Stdio::null());
        command
    }

    pub fn casemate(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(binaries().join("casemate"));
        command.args(arguments);
        command
    }

    pub fn daemon_command(&self) -> Command {
        self.command(binaries().join("casemated"))
    }

    pub fn start_daemon(&mut self) {
        self.start_daemon_with(&["--idle-exit", "0"]);
    }

    pub fn start_daemon_with(&mut self, arguments: &[&str]) {
        let log = fs::File::options().create(true).append(true).open(self.daemon_log_path()).expect("log");
        // As the unit has it.
        let mut masked = self.command("/bin/sh");
        masked.args(["-c", "umask 077; exec \"$0\" \"$@\""]).arg(self.daemon_command().get_program());
        let daemon = masked.args(arguments).stderr(log).spawn().expect("casemated");
        self.daemon = Some(daemon);
        wait_for("the daemon", || self.casemate(&["list"]).output().expect("casemate").status.success());
    }

    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("a daemon").id()
    }

    pub fn daemon_log_path(&self) -> PathBuf {
        self.root.join("daemon.log")
    }

    pub fn daemon_log(&self) -> String {
        fs::read_to_string(self.daemon_log_path()).unwrap_or_default()
    }

    /// `kill -9`.
    pub fn kill_daemon(&mut self) {
        let mut daemon = self.daemon.take().expect("a daemon");
        daemon.kill().expect("kill");
        daemon.wait().expect("wait");
    }

    pub fn kill_bus(&mut self) {
        self.bus.kill().expect("kill");
        self.bus.wait().expect("wait");
    }

    /// Its exit code, once it has ended by itself.
    pub fn wait_for_daemon(&mut self) -> Option<i32> {
        let mut daemon = self.daemon.take().expect("a daemon");
        let mut status = None;
        wait_for("the daemon's end", || {
            status = daemon.try_wait().expect("wait");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }

    pub fn bus_address(&self) -> String {
        format!("unix:path={}", self.root.join("run/bus").display())
    }

    /// Run the client and see it succeed.
    pub fn run(&self, arguments: &[&str]) -> String {
        let output = self.casemate(arguments).output().expect("casemate");
        assert!(
            output.status.success(),
            "casemate {arguments:?}: {}\n{}",
            text(&output.stderr),
            self.daemon_log()
        );
        text(&output.stdout)
    }

    /// Run the client and see Casemate refuse; its error text.
    pub fn refused(&self, arguments: &[&str]) -> String {
        let output = self.casemate(arguments).output().expect("casemate");
        assert_eq!(output.status.code(), Some(125), "casemate {arguments:?}: {}", text(&output.stdout));
        text(&output.stderr)
    }

    pub fn exec(&self, arguments: &[&str]) -> Output {
        let mut all = vec!["exec"];
        all.extend_from_slice(arguments);
        self.casemate(&all).output().expect("casemate")
    }

    /// Give `input` to a command inside.
    pub fn exec_with(&self, arguments: &[&str], input: Vec<u8>) -> Output {
        let mut all = vec!["exec"];
        all.extend_from_slice(arguments);
        let mut child = self
            .casemate(&all)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("casemate");
        let mut stdin = child.stdin.take().expect("pipe");
        let writer = std::thread::spawn(move || stdin.write_all(&input));
        let output = child.wait_with_output().expect("output");
        writer.join().expect("writer").expect("all was read");
        output
    }

    /// The id of an environment.
    pub fn id(&self, name: &str) -> String {
        let shown = self.run(&["list"]);
        let line = shown.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.and_then(|line| line.split_whitespace().last()).expect("an environment").to_owned()
    }

    /// Names in a directory of the store.
    pub fn in_store(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.store().join(directory)).expect("store");
        let mut names: Vec<String> =
            entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.daemon_log());
        }
        link_all(&self.downloads(), &self.shared_downloads());
        if self.daemon.is_some() {
            // The store's content is of subordinate ids: only Casemate can remove it.
            let _ = self.casemate(&["purge", "--yes"]).output();
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let _ = self.bus.kill();
        let _ = self.bus.wait();
        let _ = fs::remove_dir_all(&self.root);
    }
}

pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

pub fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
}
