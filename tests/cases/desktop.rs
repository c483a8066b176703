//! The user's desktop, by grant: the session bus through the real xdg-dbus-proxy, real compositors. `scripts/newer` has them.

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use casemate_tests::processes::{marked, status};
use casemate_tests::{NEWER, World, binaries, set_mode, text, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const GRANTED: &str = "org.example.Granted";
const HIDDEN: &str = "org.example.Hidden";
const BELOW: &str = "org.example.below.Deep";

struct Echo;

#[zbus::interface(name = "org.example.Echo")]
impl Echo {
    fn say(&self, what: String) -> String {
        what
    }
}

/// Services on the world's bus, until the test binary ends or the bus does. The daemon's own name there.
fn serve(world: &World) -> String {
    let address = world.bus_address();
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut connections = Vec::new();
            for name in [GRANTED, HIDDEN, BELOW] {
                let builder = zbus::connection::Builder::address(address.as_str()).name(name);
                let built = builder.serve_at("/", Echo).build().await;
                connections.push(built.expect("a connection"));
            }
            let bus = zbus::fdo::DBusProxy::new(&connections[0]).await.expect("the bus");
            let name = zbus::names::BusName::try_from("org.casemate.Casemate1").expect("a name");
            let owner = bus.get_name_owner(name).await.expect("an owner");
            ready.send(owner.to_string()).expect("the test");
            std::future::pending::<()>().await;
        });
    });
    is_ready.recv().expect("services")
}

fn inside(world: &World, arguments: &[&str]) -> (bool, String) {
    let output = world.exec(arguments);
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

/// What the service says: busctl is libsystemd's, which sends the end of its handshake along with the first call.
fn says(world: &World, name: &str) -> bool {
    let (done, said) = inside(
        world,
        &["demo", "--", "busctl", "--user", "call", name, "/", "org.example.Echo", "Say", "s", "hello"],
    );
    assert!(!done || said.trim() == "s \"hello\"", "{said}");
    done
}

fn policy(world: &World, policy: &str) {
    std::fs::write(world.config().join("policy.toml"), policy).expect("policy");
}

fn takes(world: &World, name: &str) -> bool {
    let request =
        ["org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "RequestName", "su"];
    let command = [&["demo", "--", "busctl", "--user", "call"], &request[..], &[name, "0"]].concat();
    let (done, said) = inside(world, &command);
    assert!(!done || said.trim() == "u 1", "{said}");
    done
}

#[test]
fn session_bus() {
    let tools = tempfile::tempdir().expect("directory");
    set_mode(tools.path(), 0o755);
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin", tools.path().display());
    let mut world = World::with(&[("PATH", &path)]);
    let daemon = serve(&world);
    world.run(&["release", "fetch", "debian/bookworm"]);
    let grants = format!(
        "[system]\npackages = [\"systemd\"]\n[runtime]\nnetwork = \"none\"\n\
         [gui.session_bus]\ntalk = [\"{GRANTED}\", \"org.example.below.*\"]\nown = [\"org.example.Mine\"]\n"
    );
    what_is_denied(&world, &grants);
    policy(
        &world,
        "[session_bus]\ntalk = [\"org.example.Granted\", \"org.example.below.*\"]\nown = [\"org.example.Mine\"]\n",
    );
    world.write_manifest(&grants);
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    world.write_manifest("[runtime]\nnetwork = \"none\"\n");
    world.run(&["build", "without", "--manifest", &world.manifest()]);
    an_old_proxy_is_refused(&world, tools.path());

    // Nothing where nothing is granted.
    let (_, found) = inside(&world, &["without", "--", "sh", "-c", "ls $XDG_RUNTIME_DIR; env | grep DBUS"]);
    assert_eq!(found, "");

    world.run(&["start", "demo"]);
    assert!(says(&world, GRANTED) && says(&world, BELOW));
    assert!(!says(&world, HIDDEN), "a name that was not granted is reached");
    assert!(takes(&world, "org.example.Mine"));
    assert!(!takes(&world, "org.example.Other"), "a name that was not granted is taken");
    let (done, names) = inside(&world, &["demo", "--", "busctl", "--user", "list", "--acquired"]);
    assert!(done && names.contains(GRANTED), "{names}");
    assert!(!names.contains(HIDDEN) && !names.contains("org.casemate"), "{names}");
    let shown = world.run(&["show", "demo"]);
    for line in ["session-bus talk org.example.below.*", "session-bus own org.example.Mine"] {
        assert!(shown.contains(line), "{shown}");
    }
    nobody_inside_reaches_casemate(&world, &daemon);
    // It is the user's alone.
    let (done, _) = inside(&world, &["--root", "demo", "--", "sh", "-c", "ls /run/user/*/bus"]);
    assert!(!done, "root inside reaches the bus");

    let proxy = the_proxy_is_confined();
    world.kill_daemon();
    world.start_daemon();
    assert!(says(&world, GRANTED));
    assert_eq!(the_proxy(), proxy);
    world.run(&["stop", "demo"]);
    wait_for("the proxy's end", || marked("--filter").is_empty());
    // Nor does it outlive an init that is killed.
    world.run(&["start", "demo"]);
    the_proxy();
    let state = world.runtime().join(world.id("demo")).join("state.toml");
    let state = std::fs::read_to_string(state).expect("state");
    let init = state.lines().find_map(|line| line.strip_prefix("pid = ")).expect("a pid");
    kill(Pid::from_raw(init.parse().expect("a number")), Signal::SIGKILL).expect("kill");
    wait_for("the proxy's end", || marked("--filter").is_empty());

    // Policy is asked at each start.
    policy(&world, "");
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("to talk \"org.example.Granted\" is denied"), "{error}");
}

fn what_is_denied(world: &World, grants: &str) {
    for (policy_text, said) in [
        ("", "session bus: to talk \"org.example.Granted\" is denied"),
        ("[session_bus]\ntalk = [\"org.example.Granted\"]\n", "to talk \"org.example.below.*\" is denied"),
        ("[session_bus]\ntalk = [\"org.example.*\"]\n", "to own \"org.example.Mine\" is denied"),
    ] {
        policy(world, policy_text);
        world.write_manifest(grants);
        let error = world.refused(&["build", "demo", "--manifest", &world.manifest()]);
        assert!(error.contains(said), "{error}");
    }
    // Not even where policy says so.
    policy(world, "[session_bus]\ntalk = [\"org.casemate.*\", \"org.casemate.Casemate1\"]\n");
    for name in ["org.casemate.Casemate1", "org.casemate.*"] {
        world.write_manifest(&format!("[gui.session_bus]\ntalk = [\"{name}\"]\n"));
        let error = world.refused(&["build", "demo", "--manifest", &world.manifest()]);
        assert!(error.contains("leads to Casemate itself"), "{error}");
    }
}

/// Debian 12's is 0.1.4. What it says of itself is what counts.
fn an_old_proxy_is_refused(world: &World, tools: &Path) {
    let program = tools.join("xdg-dbus-proxy");
    std::fs::write(&program, "#!/bin/sh\necho xdg-dbus-proxy 0.1.4\n").expect("a script");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("mode");
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("\"xdg-dbus-proxy 0.1.4\"") && error.contains("0.1.6 or newer"), "{error}");
    let doctor = world.run(&["doctor"]);
    assert!(doctor.contains("degraded  session bus"), "{doctor}");
    std::fs::remove_file(&program).expect("the script");
    symlink(Path::new(NEWER).join("xdg-dbus-proxy"), &program).expect("a link");
    let doctor = world.run(&["doctor"]);
    assert!(doctor.contains(&format!("session bus: xdg-dbus-proxy is {NEWER}")), "{doctor}");
}

/// By its name, by its connection, or with its own client, who is heard outside.
fn nobody_inside_reaches_casemate(world: &World, daemon: &str) {
    let ping = |name: &str| {
        let call = [
            "busctl",
            "--user",
            "call",
            name,
            "/org/casemate/Casemate1",
            "org.freedesktop.DBus.Peer",
            "Ping",
        ];
        inside(world, &[&["demo", "--"], &call[..]].concat()).0
    };
    for name in ["org.casemate.Casemate1", daemon] {
        let mut outside = world.command("busctl");
        outside.args([
            "--user",
            "call",
            name,
            "/org/casemate/Casemate1",
            "org.freedesktop.DBus.Peer",
            "Ping",
        ]);
        assert!(outside.status().expect("busctl").success(), "{name}");
        assert!(!ping(name), "{name} is reached");
    }
    let client = world.project().join("casemate");
    std::fs::copy(binaries().join("casemate"), &client).expect("the client");
    set_mode(&client, 0o755);
    let (done, said) = inside(world, &["demo", "--", "/workspace/casemate", "list"]);
    assert!(!done && !said.contains("demo"), "{said}");
    std::fs::remove_file(client).expect("the client");
}

fn the_proxy() -> u32 {
    let found = marked("--filter");
    assert_eq!(found.len(), 1, "{found:?}");
    found[0]
}

/// It parses what sessions say, as the user.
fn the_proxy_is_confined() -> u32 {
    let proxy = the_proxy();
    for (field, value) in [
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("CapBnd", "0000000000000000"),
        ("CapEff", "0000000000000000"),
    ] {
        assert_eq!(status(proxy, field).as_deref(), Some(value), "{field}");
    }
    assert!(status(proxy, "NSpid").expect("NSpid").ends_with("\t1"), "PID 1 of a namespace");
    let own =
        |name: &str, pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).expect("a namespace");
    for name in ["mnt", "pid", "net", "ipc", "uts", "user"] {
        assert_ne!(own(name, "self"), own(name, &proxy.to_string()), "{name}");
    }
    let entries = std::fs::read_dir(format!("/proc/{proxy}/root")).expect("its root");
    let names: Vec<String> =
        entries.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
    for name in ["home", "tmp", "run", "proc", "sys", "etc", "root", "var"] {
        assert!(!names.contains(&name.to_owned()), "{names:?}");
    }
    assert!(std::fs::File::create(format!("/proc/{proxy}/root/new")).is_err(), "its root can be written to");
    proxy
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A compositor without a screen, and its socket.
fn compositor(directory: &Path, program: &str, arguments: &[&str], socket: &str) -> (Server, PathBuf) {
    let mut command = Command::new(Path::new(NEWER).join(program));
    command.args(arguments).env("XDG_RUNTIME_DIR", directory).env_remove("WAYLAND_DISPLAY");
    command.envs([
        ("WLR_BACKENDS", "headless"),
        ("WLR_RENDERER", "pixman"),
        ("WLR_LIBINPUT_NO_DEVICES", "1"),
    ]);
    let log = std::fs::File::create(directory.join(program)).expect("a log");
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
    let server = Server(child.expect("scripts/newer has the compositors"));
    let socket = directory.join(socket);
    wait_for(program, || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    (server, socket)
}

fn interfaces_outside(socket: &Path) -> String {
    let output = Command::new(Path::new(NEWER).join("wayland-info")).env("WAYLAND_DISPLAY", socket).output();
    text(&output.expect("wayland-info").stdout)
}

fn descriptors(server: &Server) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", server.0.id())).expect("descriptors").count()
}

/// Kept from clients in a security context.
const PRIVILEGED: [&str; 3] =
    ["wp_security_context_manager_v1", "zwlr_screencopy_manager_v1", "zwp_virtual_keyboard_manager_v1"];

#[test]
fn wayland() {
    let directory = tempfile::tempdir().expect("directory");
    let directory = directory.path();
    let (sway, sways) = compositor(directory, "sway", &["--config", "/dev/null"], "wayland-1");
    let arguments = [
        "--backend=headless",
        "--shell=kiosk",
        "--renderer=noop",
        "--no-config",
        "--idle-time=0",
        "--socket=of-weston",
    ];
    let (_weston, westons) = compositor(directory, "weston", &arguments, "of-weston");
    let world = World::with(&[("WAYLAND_DISPLAY", "compositor")]);
    let shown = world.runtime().parent().expect("runtime directory").join("compositor");
    let show = |socket: &Path| {
        // There may be none yet.
        let _ = std::fs::remove_file(&shown);
        symlink(socket, &shown).expect("a link");
    };
    world.run(&["release", "fetch", "debian/bookworm"]);
    world.write_manifest(
        "[system]\npackages = [\"wayland-utils\"]\n[runtime]\nnetwork = \"none\"\n[gui]\nwayland = true\n",
    );
    let error = world.refused(&["build", "demo", "--manifest", &world.manifest()]);
    assert!(error.contains("socket \"wayland\" denied"), "{error}");
    policy(&world, "[sockets]\nallowed = [\"wayland\"]\n");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("no compositor listens at"), "{error}");

    show(&sways);
    let before = descriptors(&sway);
    world.run(&["start", "demo"]);
    let (done, found) = inside(&world, &["demo", "--", "wayland-info"]);
    assert!(done && found.contains("wl_compositor"), "{found}");
    let all = interfaces_outside(&sways);
    for privileged in PRIVILEGED {
        assert!(all.contains(privileged), "not even outside: {privileged}");
        assert!(!found.contains(privileged), "{found}");
    }
    assert!(world.run(&["show", "demo"]).contains("socket    wayland"));
    let (done, _) = inside(&world, &["--root", "demo", "--", "sh", "-c", "ls /run/user/*/wayland-0"]);
    assert!(!done, "root inside reaches the compositor");
    assert!(descriptors(&sway) > before, "it does not listen for the environment");
    world.run(&["stop", "demo"]);
    wait_for("the compositor to listen no more", || descriptors(&sway) == before);

    show(&westons);
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("has no security contexts") && error.contains("\"wayland-plain\""), "{error}");
    policy(&world, "[sockets]\nallowed = [\"wayland\", \"wayland-plain\"]\n");
    let (done, found) = inside(&world, &["demo", "--", "wayland-info"]);
    assert!(done && found.contains("weston_capture_v1"), "{found}");
    // The plain one is for compositors that lack the other alone.
    wait_for("the environment's end", || !world.run(&["list"]).contains("running"));
    show(&sways);
    let (done, found) = inside(&world, &["demo", "--", "wayland-info"]);
    assert!(done && !found.contains(PRIVILEGED[0]), "{found}");
    wait_for("the environment's end", || !world.run(&["list"]).contains("running"));
    odd_compositors(&world, directory, show);
}

/// One that talks nonsense, and one that says nothing at all.
fn odd_compositors(world: &World, directory: &Path, show: impl Fn(&Path)) {
    let socket = directory.join("nonsense");
    let listener = UnixListener::bind(&socket).expect("socket");
    let (heard, is_heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().expect("a client");
        let size = client.read(&mut [0; 64]).expect("a request");
        // It may have had enough before all is said.
        let _ = client.write_all(&[0xff; 4096]);
        heard.send(size).expect("the test");
    });
    show(&socket);
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("wayland: cannot speak to the compositor at"), "{error}");
    assert!(is_heard.recv().expect("what was said") > 0);
    let socket = directory.join("silence");
    let _listener = UnixListener::bind(&socket).expect("socket");
    show(&socket);
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("it said nothing for"), "{error}");
}
