//! Peers on the bus: too many calls, too long ones, callers that vanish, callers from containers, names taken, ends.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::{DEADLINE, World, text, wait_for};
use futures_util::future::join_all;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use zbus::{Connection, Message, Variant};

const NAME: &str = "org.casemate.Casemate1";
const ROOT: &str = "/org/casemate/Casemate1";
const MANAGER: &str = "org.casemate.Casemate1.Manager";
const ENVIRONMENT: &str = "org.casemate.Casemate1.Environment";
/// Resident memory that the daemon never exceeds.
const MEMORY_MAX: u64 = 128 << 20;

type Options<'a> = HashMap<&'a str, Variant<'a>>;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(DEADLINE, future).await.expect("within the deadline") })
}

async fn connect(world: &World) -> Connection {
    zbus::connection::Builder::address(world.bus_address().as_str()).build().await.expect("the bus")
}

/// The name of the error that a call ends with, without what all have in common; empty where it succeeds.
fn error_name(reply: zbus::Result<Message>) -> String {
    match reply {
        Ok(_) => String::new(),
        Err(zbus::Error::MethodError(name, _, _)) => {
            name.trim_start_matches("org.casemate.Casemate1.Error.").to_owned()
        }
        Err(other) => panic!("no answer: {other}"),
    }
}

async fn get_environment(connection: &Connection, selector: &str) -> zbus::Result<Message> {
    connection
        .call_method(Some(NAME), ROOT, Some(MANAGER), "GetEnvironment", &(selector, Options::new()))
        .await
}

/// A number of `/proc/PID/status`.
fn status(world: &World, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{}/status", world.daemon_pid())).expect("status");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("the field");
    line.trim_start_matches(':').split_whitespace().next().expect("a number").parse().expect("a number")
}

/// The most memory that the daemon ever had.
fn peak(world: &World) -> u64 {
    status(world, "VmHWM") << 10
}

fn descriptors(world: &World) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", world.daemon_pid())).expect("descriptors").count()
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(i32::try_from(pid).expect("a pid")), signal).expect("a signal");
}

/// The process of a running environment's init.
fn init_pid(world: &World, id: &str) -> u32 {
    let state = std::fs::read_to_string(world.runtime().join(id).join("state.toml")).expect("state");
    let line = state.lines().find_map(|line| line.strip_prefix("pid = ")).expect("a pid");
    line.parse().expect("a pid")
}

/// An Exec of `true` and what its caller keeps.
struct Asked {
    message: Message,
    _pipe: std::io::PipeReader,
}

fn exec_call(id: &str) -> Asked {
    let (pipe, write) = std::io::pipe().expect("a pipe");
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").expect("/dev/null");
    let fd = |descriptor| zbus::Fd::from(descriptor);
    let body = (
        vec!["true"],
        fd(null.as_fd()),
        fd(null.as_fd()),
        fd(null.as_fd()),
        fd(write.as_fd()),
        Options::new(),
    );
    let message = Message::method_call(format!("{ROOT}/environment/{}", label(id)).as_str(), "Exec")
        .destination(NAME)
        .interface(ENVIRONMENT)
        .build(&body)
        .expect("a message");
    Asked { message, _pipe: pipe }
}

/// An id as a part of a path.
fn label(id: &str) -> String {
    match id.as_bytes()[0] {
        digit @ b'0'..=b'9' => format!("_{digit:02x}{}", &id[1..]),
        _ => id.to_owned(),
    }
}

/// 100,000 calls from 1,000 clients in `make soak`; as many from 50 in `make test`.
#[test]
fn floods() {
    let world = World::new();
    let (clients, calls) =
        if std::env::var_os("CASEMATE_SOAK").is_some() { (1_000, 100) } else { (50, 2_000) };
    let before = descriptors(&world);
    block_on(async {
        let connections = join_all((0..clients).map(|_| connect(&world))).await;
        let flood = join_all(connections.iter().map(|connection| async move {
            for number in 0..calls {
                let reply = match number % 3 {
                    0 => get_environment(connection, "nothing").await,
                    1 => {
                        connection
                            .call_method(
                                Some(NAME),
                                ROOT,
                                Some("org.freedesktop.DBus.Properties"),
                                "GetAll",
                                &(MANAGER),
                            )
                            .await
                    }
                    _ => {
                        connection
                            .call_method(Some(NAME), ROOT, Some("org.freedesktop.DBus.Peer"), "Ping", &())
                            .await
                    }
                };
                let wanted = if number % 3 == 0 { "NotFound" } else { "" };
                assert_eq!(error_name(reply), wanted);
            }
        }));
        // Meanwhile others are answered.
        let other = async {
            let mut command = tokio::process::Command::from(world.casemate(&["list"]));
            command.output().await.expect("casemate")
        };
        let (_, other) = tokio::join!(flood, other);
        assert!(other.status.success(), "{}", text(&other.stderr));
    });
    wait_for("the descriptors", || descriptors(&world) <= before);
    assert!(peak(&world) < MEMORY_MAX, "{} bytes", peak(&world));
}

/// Calls that want no reply are counted like others, and nothing of a flood of them stays.
#[test]
fn calls_without_reply() {
    let world = World::new();
    let before = descriptors(&world);
    block_on(async {
        let connection = connect(&world).await;
        for _ in 0..20_000 {
            let message = Message::method_call(ROOT, "GetEnvironment")
                .destination(NAME)
                .interface(MANAGER)
                .with_flags(zbus::message::Flags::NO_REPLY_EXPECTED)
                .build(&("nothing", Options::new()))
                .expect("a message");
            connection.send(&message).await.expect("sent");
        }
        // Others are answered; so is the flooder, once the share of theirs is free again.
        assert_eq!(error_name(get_environment(&connect(&world).await, "nothing").await), "NotFound");
        while error_name(get_environment(&connection, "nothing").await) != "NotFound" {}
    });
    wait_for("the descriptors", || descriptors(&world) <= before);
    assert!(peak(&world) < MEMORY_MAX, "{} bytes", peak(&world));
}

#[test]
fn messages_too_long() {
    let world = World::new();
    block_on(async {
        let connection = connect(&world).await;
        for length in [3 << 20, 120 << 20] {
            let reply = get_environment(&connection, &"x".repeat(length)).await;
            assert_eq!(error_name(reply), "TooManyRequests", "{length}");
        }
        // A path may be as long as a message.
        let long = format!("/{}", "x".repeat(1 << 20));
        let message =
            Message::method_call(long.as_str(), "Ping").destination(NAME).build(&()).expect("a message");
        connection.send(&message).await.expect("sent");
        assert_eq!(error_name(get_environment(&connection, "nothing").await), "NotFound");
    });
    assert!(peak(&world) < MEMORY_MAX, "{} bytes", peak(&world));
}

#[test]
fn descriptors_of_a_message() {
    let world = World::new();
    let before = descriptors(&world);
    block_on(async {
        let connection = connect(&world).await;
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        // The bus itself takes sixteen.
        let many: Vec<_> = (0..12).map(|_| zbus::Fd::from(null.as_fd())).collect();
        let reply = connection.call_method(Some(NAME), ROOT, Some(MANAGER), "Doctor", &(many)).await;
        assert_eq!(error_name(reply), "TooManyRequests");
        assert_eq!(error_name(get_environment(&connection, "nothing").await), "NotFound");
    });
    wait_for("the descriptors", || descriptors(&world) <= before);
}

/// An init that does not answer holds calls up; the caller's share of them is bounded, others are served.
#[test]
fn calls_under_way() {
    let world = World::with_environment("");
    world.run(&["start", "demo"]);
    let id = world.id("demo");
    let before = descriptors(&world);
    let init = init_pid(&world, &id);
    signal(init, Signal::SIGSTOP);
    block_on(async {
        let connection = connect(&world).await;
        let asked: Vec<Asked> = (0..40).map(|_| exec_call(&id)).collect();
        let mut replies = zbus::MessageStream::from(&connection);
        for call in &asked {
            connection.send(&call.message).await.expect("sent");
        }
        // Sixteen times four descriptors are under way; the others are refused at once.
        let mut refused = 0;
        while refused < 24 {
            let reply = futures_util::StreamExt::next(&mut replies).await.expect("a reply").expect("a reply");
            if let Some(name) = reply.header().error_name() {
                assert_eq!(name.as_str(), "org.casemate.Casemate1.Error.TooManyRequests");
                refused += 1;
            }
        }
        let other = connect(&world).await;
        assert_eq!(error_name(get_environment(&other, "demo").await), "");
        // Its caller vanishes, with all calls under way.
        connection.close().await.expect("close");
        signal(init, Signal::SIGCONT);
        // What was the vanished caller's ends, and another can do the same.
        let call = exec_call(&id);
        let mut replies = zbus::MessageStream::from(&other);
        other.send(&call.message).await.expect("sent");
        loop {
            let reply = futures_util::StreamExt::next(&mut replies).await.expect("a reply").expect("a reply");
            if reply.header().reply_serial() == Some(call.message.primary_header().serial_num()) {
                assert!(reply.header().error_name().is_none(), "{reply:?}");
                break;
            }
        }
    });
    wait_for("the descriptors", || descriptors(&world) <= before);
}

#[test]
fn callers_that_vanish() {
    let world = World::with_environment("");
    world.run(&["start", "demo"]);
    let id = world.id("demo");
    let before = descriptors(&world);
    block_on(async {
        for _ in 0..100 {
            let connection = connect(&world).await;
            connection.send(&exec_call(&id).message).await.expect("sent");
            connection.close().await.expect("close");
        }
    });
    wait_for("the descriptors", || descriptors(&world) <= before);
    wait_for("the sessions", || world.run(&["list"]).contains(" 0 "));
}

#[test]
fn jobs_of_one_caller() {
    let world = World::new();
    block_on(async {
        let connection = connect(&world).await;
        let mut held = Vec::new();
        for number in 0..9 {
            // An archive that never ends: the job runs until it is cancelled.
            let (read, write) = std::io::pipe().expect("a pipe");
            let body = (format!("n{number}"), zbus::Fd::from(read.as_fd()), Options::new());
            let reply = connection.call_method(Some(NAME), ROOT, Some(MANAGER), "ImportRelease", &body).await;
            held.push(write);
            if number < 8 {
                assert_eq!(error_name(reply), "", "{number}");
            } else {
                assert_eq!(error_name(reply), "TooManyRequests");
            }
        }
        // Not another's.
        let other = connect(&world).await;
        let (read, _write) = std::io::pipe().expect("a pipe");
        let body = ("other", zbus::Fd::from(read.as_fd()), Options::new());
        let reply = other.call_method(Some(NAME), ROOT, Some(MANAGER), "ImportRelease", &body).await;
        assert_eq!(error_name(reply), "");
        drop(held);
    });
    wait_for("the jobs", || !world.run(&["jobs"]).contains("running"));
}

fn gdbus(world: &World, before: &[&str], object: &str, method: &str, arguments: &[&str]) -> Output {
    let mut words = before.to_vec();
    words.extend(["gdbus", "call", "--session", "-d", NAME, "-o", object, "-m", method]);
    words.extend(arguments);
    world.command(words[0]).args(&words[1..]).output().expect("gdbus")
}

/// Everything that the daemon answers is judged: methods, properties, introspection, the whole state.
#[test]
fn containers() {
    let world = World::new();
    let container = ["unshare", "--user", "--map-current-user", "--pid", "--fork"];
    let log = "/org/freedesktop/LogControl1";
    let calls: [(&str, &str, &[&str]); 7] = [
        (ROOT, "org.casemate.Casemate1.Manager.Doctor", &["{}"]),
        (ROOT, "org.freedesktop.DBus.Properties.Get", &[MANAGER, "Version"]),
        (ROOT, "org.freedesktop.DBus.Properties.GetAll", &[MANAGER]),
        (ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects", &[]),
        (ROOT, "org.freedesktop.DBus.Introspectable.Introspect", &[]),
        (ROOT, "org.freedesktop.DBus.Peer.Ping", &[]),
        (
            log,
            "org.freedesktop.DBus.Properties.Set",
            &["org.freedesktop.LogControl1", "LogLevel", "<'debug'>"],
        ),
    ];
    for (object, method, arguments) in calls {
        let inside = gdbus(&world, &container, object, method, arguments);
        assert!(text(&inside.stderr).contains("Error.AccessDenied"), "{method}: {inside:?}");
        let outside = gdbus(&world, &[], object, method, arguments);
        assert!(outside.status.success(), "{method}: {outside:?}");
    }
}

#[test]
fn log_control() {
    let world = World::new();
    let log = "/org/freedesktop/LogControl1";
    let interface = "org.freedesktop.LogControl1";
    let get = |name| {
        text(&gdbus(&world, &[], log, "org.freedesktop.DBus.Properties.Get", &[interface, name]).stdout)
    };
    let set = |name: &str, value: &str| {
        gdbus(&world, &[], log, "org.freedesktop.DBus.Properties.Set", &[interface, name, value])
    };
    assert_eq!(get("LogTarget"), "(<'console'>,)\n");
    assert_eq!(get("SyslogIdentifier"), "(<'casemated'>,)\n");
    for level in ["debug", "info", "notice", "warning", "err", "crit", "alert", "emerg"] {
        assert!(set("LogLevel", &format!("<'{level}'>")).status.success(), "{level}");
        assert_eq!(get("LogLevel"), format!("(<'{level}'>,)\n"));
    }
    assert!(text(&set("LogLevel", "<'loud'>").stderr).contains("no level of syslog"));
    assert!(text(&set("LogTarget", "<'journal'>").stderr).contains("standard error"));
    assert!(set("LogTarget", "<'console'>").status.success());
}

/// Only full names and ids select.
#[test]
fn partial_names() {
    let world = World::with_environment("");
    let id = world.id("demo");
    for selector in ["", "d", "dem", "demo ", "DEMO", &id[..8], &id.to_uppercase(), "*", "%", "."] {
        for command in [vec!["show"], vec!["stop"], vec!["start"], vec!["destroy", "--force"]] {
            let mut arguments = command.clone();
            arguments.extend(["--", selector]);
            let refused = world.refused(&arguments);
            assert!(refused.contains("no environment"), "{arguments:?}: {refused}");
        }
        let output = world.exec(&[selector, "--", "true"]);
        assert_eq!(output.status.code(), Some(125), "exec {selector:?}");
    }
    for reference in [
        "",
        "d",
        "debian",
        "debian/",
        "debian/b",
        "debian/book*",
        "/bookworm",
        "bookworm",
        "debian/bookworm/",
    ] {
        for command in ["show", "remove", "fetch"] {
            let refused = world.refused(&["release", command, "--", reference]);
            assert!(
                refused.contains("is no") || refused.contains("there is no"),
                "{command} {reference:?}: {refused}"
            );
        }
    }
    assert_eq!(world.in_store("environments").len(), 1);
    assert!(world.run(&["release", "list"]).contains("debian/bookworm"));
}

#[test]
fn a_second_daemon() {
    let world = World::with_environment("");
    world.run(&["start", "demo"]);
    // On the same store.
    let second = world.daemon_command().output().expect("casemated");
    assert_eq!(second.status.code(), Some(1));
    let said = text(&second.stderr);
    assert!(said.contains("is held by") && said.contains(&world.daemon_pid().to_string()), "{said}");
    // On another store, but the same bus and runtime directory.
    let store = world.project().join("store");
    let second = world.daemon_command().arg("--store").arg(&store).output().expect("casemated");
    assert_eq!(second.status.code(), Some(1));
    let said = text(&second.stderr);
    let holder = format!("is taken on this bus, by process {}", world.daemon_pid());
    assert!(said.contains(&holder), "{said}");
    // It left the first one's environments alone.
    assert!(world.run(&["list"]).contains("running"));
    assert!(world.exec(&["demo", "--", "true"]).status.success());
    assert!(world.run(&["list"]).contains("running"));
}

#[test]
fn without_its_bus_it_ends() {
    let mut world = World::new();
    world.kill_bus();
    let (code, log) = (world.wait_for_daemon(), world.daemon_log());
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("the session bus went away"), "{log}");
    // And the client says what to do.
    let refused = world.refused(&["list"]);
    assert!(refused.contains("dbus-run-session"), "{refused}");
}

#[test]
fn nobody_starts_it() {
    let mut world = World::new();
    world.kill_daemon();
    let refused = world.refused(&["list"]);
    assert!(refused.contains("systemctl --user start casemated"), "{refused}");
}

/// What systemd would hear and do: ready, alive, stopping; a job cancelled, an environment that goes on.
#[test]
fn stopped_by_systemd() {
    let home = std::path::PathBuf::from(std::env::var_os("HOME").expect("HOME"));
    let path = home.join(format!("casemate-notify-{}", std::process::id()));
    let socket = UnixDatagram::bind(&path).expect("a socket");
    // Read all the time, as systemd does: few datagrams wait.
    let (said, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok(count) = socket.recv(&mut buffer) {
            if said.send(text(&buffer[..count])).is_err() {
                break;
            }
        }
    });
    let hear = |wanted: &str| {
        while !heard.recv_timeout(DEADLINE).expect(wanted).contains(wanted) {}
    };
    let mut world =
        World::with(&[("NOTIFY_SOCKET", path.to_str().expect("a path")), ("WATCHDOG_USEC", "400000")]);
    hear("READY=1");
    hear("WATCHDOG=1");
    hear("WATCHDOG=1");
    world.run(&["release", "fetch", "debian/bookworm"]);
    world.write_manifest("");
    world.run(&["build", "demo", "--manifest", &world.manifest()]);
    world.run(&["start", "demo"]);
    let mut import = world
        .casemate(&["release", "import", "endless", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("casemate");
    let held = import.stdin.take().expect("a pipe");
    wait_for("the job", || world.run(&["jobs"]).contains("running"));
    signal(world.daemon_pid(), Signal::SIGTERM);
    hear("STOPPING=1");
    assert_eq!(world.wait_for_daemon(), Some(0), "{}", world.daemon_log());
    drop(held);
    assert_eq!(import.wait().expect("casemate").code(), Some(125));
    world.start_daemon();
    assert!(world.run(&["list"]).contains("running"), "{}", world.run(&["list"]));
    assert!(world.in_store("staging").is_empty());
    std::fs::remove_file(path).expect("the socket");
}

#[test]
fn idle() {
    let mut world = World::with_environment("");
    // It wakes for nothing.
    let switches = |world: &World| status(world, "voluntary_ctxt_switches");
    let rest = Duration::from_secs(2);
    let mut last = (switches(&world), Instant::now());
    // Time is the subject: two seconds in which nothing happens.
    wait_for("rest", || {
        let now = switches(&world);
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.1.elapsed() > rest
    });
    world.kill_daemon();
    world.start_daemon_with(&["--idle-exit", "4"]);
    world.run(&["start", "demo"]);
    let begin = Instant::now();
    wait_for("more than its patience", || begin.elapsed() > Duration::from_secs(6));
    world.run(&["stop", "demo"]);
    assert_eq!(world.wait_for_daemon(), Some(0), "{}", world.daemon_log());
    world.start_daemon();
}

#[test]
fn the_unit_is_sound() {
    let world = World::new();
    let unit =
        std::fs::read_to_string(World::shipped().join("systemd/casemated.service.in")).expect("the unit");
    let path = world.project().join("casemated.service");
    let unit = unit.replace(
        "@LIBEXECDIR@",
        world
            .daemon_command()
            .get_program()
            .to_str()
            .and_then(|path| path.strip_suffix("/casemated"))
            .expect("libexec"),
    );
    std::fs::File::create(&path).and_then(|mut file| file.write_all(unit.as_bytes())).expect("a unit");
    // A machine without a user's session bus has none; what is judged is our unit.
    std::fs::write(world.project().join("dbus.socket"), "[Socket]\nListenStream=%t/bus\n").expect("a unit");
    std::fs::write(world.project().join("dbus.service"), "[Service]\nExecStart=/bin/true\n").expect("a unit");
    let output = world
        .command("systemd-analyze")
        .args(["verify", "--user", "--man=no"])
        .arg(&path)
        .output()
        .expect("systemd-analyze: install the package systemd");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
}
