//! Sockets of the user's session: the real servers, by grant alone.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use casemate_tests::{World, text, wait_for};

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn agent(socket: &Path) -> Server {
    let child = Command::new("ssh-agent").arg("-D").arg("-a").arg(socket).stdout(Stdio::null()).spawn();
    let server = Server(child.expect("ssh-agent"));
    wait_for("ssh-agent", || socket.exists());
    server
}

/// An X server that asks for a cookie, and its display.
fn x_server(authority: &Path) -> (Server, String) {
    let cookie = "00112233445566778899aabbccddeeff";
    let mut server = Command::new("Xvfb");
    server.args(["-displayfd", "1", "-nolisten", "tcp", "-auth"]).arg(authority).stdout(Stdio::piped());
    // Before it knows its display: the server takes any entry, clients those of theirs.
    let add = |display: &str| {
        let mut xauth = Command::new("xauth");
        xauth.arg("-f").arg(authority).args(["add", display, "MIT-MAGIC-COOKIE-1", cookie]);
        assert!(xauth.status().expect("xauth").success());
    };
    add(":0");
    let mut child = server.stderr(Stdio::null()).spawn().expect("Xvfb: install the package xvfb");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("pipe")).read_line(&mut line).expect("a display");
    let display = format!(":{}", line.trim());
    add(&display);
    (Server(child), display)
}

fn build(world: &World, name: &str, grants: &str) {
    world.write_manifest(&format!(
        "[system]\npackages = [\"openssh-client\", \"xsel\", \"pulseaudio\"]\n{grants}"
    ));
    world.run(&["build", name, "--manifest", &world.manifest()]);
}

fn inside(world: &World, arguments: &[&str]) -> (bool, String) {
    let output = world.exec(arguments);
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

#[test]
fn sockets() {
    let home = tempfile::tempdir().expect("directory");
    let (socket, authority) = (home.path().join("agent"), home.path().join("authority"));
    let agent = agent(&socket);
    let (_x_server, display) = x_server(&authority);
    let world = World::with(&[
        ("SSH_AUTH_SOCK", socket.to_str().expect("UTF-8")),
        ("DISPLAY", &display),
        ("XAUTHORITY", authority.to_str().expect("UTF-8")),
    ]);
    world.run(&["release", "fetch", "debian/bookworm"]);

    let all =
        "[runtime]\nnetwork = \"none\"\nssh_agent = true\n[gui]\nx11 = true\n[hardware]\naudio = true\n";
    for (grant, said) in [
        ("[runtime]\nssh_agent = true\n", "socket \"ssh-agent\" denied"),
        ("[gui]\nx11 = true\n", "socket \"x11\" denied"),
    ] {
        world.write_manifest(grant);
        let error = world.refused(&["build", "demo", "--manifest", &world.manifest()]);
        assert!(error.contains(said), "{error}");
    }
    let policy = "[sockets]\nallowed = [\"ssh-agent\", \"x11\"]\n[devices]\nallowed = [\"audio\"]\n";
    std::fs::write(world.config().join("policy.toml"), policy).expect("policy");

    // Nothing where nothing is asked for, whatever policy allows.
    build(&world, "without", "[runtime]\nnetwork = \"none\"\n");
    let script = "ls $XDG_RUNTIME_DIR /tmp/.X11-unix 2>/dev/null; env | grep -E '^(SSH_AUTH_SOCK|DISPLAY|XAUTHORITY|PULSE_SERVER)='";
    let (_, found) = inside(&world, &["without", "--", "sh", "-c", script]);
    assert!(!found.contains('=') && !found.contains("agent") && !found.contains('X'), "{found}");

    build(&world, "demo", all);
    let runtime = world.runtime().parent().expect("runtime directory").to_owned();
    let (_pulse, _pipewire) = sound_servers(&world, &runtime);
    of_the_agent(&world);
    of_the_x_server(&world);
    of_sound(&world);
    let shown = world.run(&["show", "demo"]);
    for line in ["socket    ssh-agent", "socket    x11", "device    audio"] {
        assert!(shown.contains(line), "{shown}");
    }
    // Nothing of it is root's inside: not in variables, nor within reach.
    let script = "! env | grep -E '^(SSH_AUTH_SOCK|DISPLAY|XAUTHORITY|PULSE_SERVER)=' && ! ls /run/user/*/";
    assert!(inside(&world, &["--root", "demo", "--", "sh", "-c", script]).0);

    world.run(&["stop", "demo"]);
    drop(agent);
    std::fs::remove_file(&socket).expect("the agent's socket");
    let error = world.refused(&["exec", "demo", "--", "true"]);
    assert!(error.contains("no agent listens at"), "{error}");
}

/// PulseAudio is in the other environment: one on the host may displace what its user has.
fn sound_servers(world: &World, runtime: &Path) -> (Server, UnixListener) {
    let mut pulse = world.casemate(&["exec", "without", "--", "pulseaudio", "-n", "--daemonize=no"]);
    pulse.args(["--exit-idle-time=-1", "--use-pid-file=no", "--disable-shm=yes"]);
    pulse.args(["-L", "module-null-sink sink_name=wall"]);
    pulse.args(["-L", "module-native-protocol-unix socket=/workspace/pulse auth-anonymous=1"]);
    let pulse = Server(pulse.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("casemate"));
    let socket = world.project().join("pulse");
    wait_for("pulseaudio", || socket.exists());
    std::fs::create_dir(runtime.join("pulse")).expect("directory");
    std::os::unix::fs::symlink(socket, runtime.join("pulse/native")).expect("link");
    (pulse, UnixListener::bind(runtime.join("pipewire-0")).expect("socket"))
}

fn of_the_agent(world: &World) {
    world.run(&["start", "demo"]);
    let (_, none) = inside(world, &["demo", "--", "ssh-add", "-l"]);
    assert!(none.contains("The agent has no identities"), "{none}");
    let script = "ssh-keygen -q -t ed25519 -N '' -f key && ssh-add -q key && ssh-add -l";
    let (done, listed) = inside(world, &["demo", "--", "sh", "-c", script]);
    assert!(done && listed.contains("ED25519"), "{listed}");
    // It is the host's agent that has the key now.
    let outside = world.command("ssh-add").arg("-l").output().expect("ssh-add");
    assert_eq!(text(&outside.stdout), listed);
    // Only as granted: neither the caller nor the manifest can name another one.
    let error = world.refused(&["exec", "--env", "SSH_AUTH_SOCK=/x", "demo", "--", "true"]);
    assert!(error.contains("SSH_AUTH_SOCK denied"), "{error}");
}

fn of_the_x_server(world: &World) {
    let (done, said) = inside(world, &["demo", "--", "xsel", "-o"]);
    assert!(done, "{said}");
    // The server does ask for the cookie.
    let (done, _) = inside(world, &["--env", "XAUTHORITY=/dev/null", "demo", "--", "xsel", "-o"]);
    assert!(!done, "the X server lets everybody in");
    let (done, mode) = inside(world, &["demo", "--", "sh", "-c", "stat -c %a $XAUTHORITY"]);
    assert!(done && mode.trim() == "600", "{mode}");
}

fn of_sound(world: &World) {
    let (done, sinks) = inside(world, &["demo", "--", "pactl", "list", "short", "sinks"]);
    assert!(done && sinks.contains("wall"), "{sinks}");
    let connect = "use IO::Socket::UNIX; exit !IO::Socket::UNIX->new(Peer => \"$ENV{XDG_RUNTIME_DIR}/$ENV{PIPEWIRE_REMOTE}\")";
    let (done, said) = inside(world, &["demo", "--", "perl", "-e", connect]);
    assert!(done, "{said}");
}
