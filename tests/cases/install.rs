//! `make install` for one user, bus activation of what it installed, `make uninstall`.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use casemate_tests::{World, binaries, text};

/// A home directory with nothing but what is installed into it.
struct Home(PathBuf);

impl Home {
    fn new(name: &str) -> Self {
        let tests = PathBuf::from(std::env::var_os("HOME").expect("HOME")).join("casemate-tests");
        let home = tests.join(format!("{name}-{}", std::process::id()));
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(home.join("run")).expect("directory");
        Self(home)
    }

    fn prefix(&self) -> PathBuf {
        self.0.join(".local")
    }

    fn make(&self, target: &str) {
        let output = Command::new("make")
            .arg("-C")
            .arg(World::shipped())
            .arg(target)
            .arg(format!("PREFIX={}", self.prefix().display()))
            .arg(format!("BUILT={}", binaries().display()))
            .output()
            .expect("make: install the package make");
        assert!(output.status.success(), "make {target}: {}", text(&output.stderr));
    }

    /// As a new login has it: `~/.local/bin` in PATH, nothing set for Casemate. The bus takes home from /etc/passwd, so where
    /// data is must be said.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("HOME", &self.0)
            .env("XDG_DATA_HOME", self.prefix().join("share"))
            .env("PATH", format!("{}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", self.prefix().display()))
            .env("XDG_RUNTIME_DIR", self.0.join("run"))
            .stdin(Stdio::null());
        command
    }

    /// On a session bus of its own, in a shell.
    fn session(&self, script: &str) -> Output {
        let mut command = self.command("dbus-run-session");
        command.args(["--", "sh", "-c", script]).output().expect("dbus-run-session")
    }

    /// Files beneath the prefix, but for those of the store.
    fn installed(&self) -> Vec<String> {
        fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(directory).expect("directory") {
                let entry = entry.expect("entry");
                match entry.file_type().expect("type").is_dir() {
                    true => walk(&entry.path(), found),
                    false => found.push(entry.path()),
                }
            }
        }
        let prefix = self.prefix();
        let mut found = Vec::new();
        walk(&prefix, &mut found);
        let store = prefix.join("share/casemate");
        let relative = |path: &PathBuf| path.strip_prefix(&prefix).expect("beneath").display().to_string();
        found.iter().filter(|path| !path.starts_with(&store)).map(relative).collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        // The stores made here are empty: all is the user's own.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_is_installed_for_one_user_is_activated_by_the_bus() {
    let home = Home::new("install");
    home.make("install");
    for path in [
        "bin/casemate",
        "libexec/casemate/casemated",
        "libexec/casemate/casemate-init",
        "share/systemd/user/casemated.service",
        "share/man/man1/casemate-build.1",
        "share/bash-completion/completions/casemate",
        "share/zsh/site-functions/_casemate",
        "share/fish/vendor_completions.d/casemate.fish",
    ] {
        assert!(home.prefix().join(path).is_file(), "{path} is missing in {:?}", home.installed());
    }

    let doctor = home.session("casemate doctor");
    assert!(doctor.status.success(), "{}{}", text(&doctor.stdout), text(&doctor.stderr));
    assert!(text(&doctor.stdout).contains("user namespaces"), "{}", text(&doctor.stdout));
    // The store is where the user's data is, and it is not mixed with what is shipped.
    assert!(home.prefix().join("share/casemate/version").is_file());

    // The source that was installed is found: what it does not list is refused before any network.
    let potato = home.session("casemate release fetch debian/potato");
    assert_eq!(potato.status.code(), Some(125));
    assert!(text(&potato.stderr).contains("its source does not list it"), "{}", text(&potato.stderr));

    home.make("uninstall");
    assert_eq!(home.installed(), Vec::<String>::new());
    assert!(home.prefix().join("share/casemate/version").is_file(), "uninstall removed the user's store");
}

#[test]
fn the_client_says_how_to_start_the_daemon() {
    let home = Home::new("start");
    home.make("install");
    let no_bus = home.command("casemate").arg("list").output().expect("casemate");
    assert_eq!(no_bus.status.code(), Some(125));
    assert!(text(&no_bus.stderr).contains("dbus-run-session"), "{}", text(&no_bus.stderr));

    let service = "share/dbus-1/services/org.casemate.Casemate1.service";
    std::fs::remove_file(home.prefix().join(service)).expect("the activation file");
    let no_service = home.session("casemate list");
    assert_eq!(no_service.status.code(), Some(125));
    assert!(
        text(&no_service.stderr).contains("systemctl --user start casemated"),
        "{}",
        text(&no_service.stderr)
    );
}
