//! What flows through a session: a gigabyte through a pipe, a terminal that changes its size.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::Stdio;

use casemate_tests::{World, text};
use nix::pty::{Winsize, openpty};

/// Largest resident set so far, in KiB.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").trim().parse().expect("a number")
}

#[test]
fn a_gigabyte_passes_without_growth() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: usize = 1 << 10;
    let world = World::with_environment("");
    assert!(world.exec(&["demo", "--", "true"]).status.success());
    let mut child = world
        .casemate(&["exec", "demo", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("casemate");
    let mut stdin = child.stdin.take().expect("pipe");
    let mut stdout = child.stdout.take().expect("pipe");
    // Every chunk is another one, and has every byte in it.
    let chunk = |number: usize| -> Vec<u8> { (0..CHUNK).map(|at| (at ^ (at >> 8) ^ number) as u8).collect() };
    let writer = std::thread::spawn(move || {
        for number in 0..CHUNKS {
            stdin.write_all(&chunk(number)).expect("all is read");
        }
    });
    let (client, daemon) = (child.id(), world.daemon_pid());
    let mut begin = (0, 0);
    let mut read = vec![0; CHUNK];
    for number in 0..CHUNKS {
        stdout.read_exact(&mut read).expect("all comes back");
        assert!(read == chunk(number), "MiB {number} is another one");
        if number == 0 {
            begin = (peak(client), peak(daemon));
        }
        if number == CHUNKS - 1 {
            let end = (peak(client), peak(daemon));
            assert!(
                end.0 - begin.0 < 4096 && end.1 - begin.1 < 4096,
                "KiB of client, daemon: {begin:?}, then {end:?}"
            );
        }
    }
    assert_eq!(stdout.read(&mut read).expect("end"), 0);
    writer.join().expect("writer");
    assert!(child.wait().expect("status").success());
}

#[test]
fn a_terminal_of_the_environments_own() {
    let world = World::with_environment("");
    let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = openpty(Some(&size), None).expect("pty");
    let name = nix::unistd::ttyname(&pty.slave).expect("name");
    let end = || Stdio::from(pty.slave.try_clone().expect("descriptor"));
    let casemate = world.casemate(&[]);
    let mut command = world.command("setsid");
    command.args(["--ctty", "--wait"]).arg(casemate.get_program()).args(["enter", "demo"]);
    command.env("TERM", "xterm").stdin(end()).stdout(end()).stderr(end());
    let mut child = command.spawn().expect("setsid");
    drop(command);
    let mut master = File::from(pty.master);
    let mut reader = master.try_clone().expect("descriptor");
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        // EIO once nobody holds the other end.
        while let Ok(count @ 1..) = reader.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut seen = Vec::new();
    let mut wait_for = |what: &str| {
        let deadline = std::time::Instant::now() + casemate_tests::DEADLINE;
        while !text(&seen).contains(what) {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            seen.extend(
                receiver.recv_timeout(left).unwrap_or_else(|_| panic!("no {what:?} in {:?}", text(&seen))),
            );
        }
    };
    master.write_all(b"echo size=$(stty size | tr ' ' x)\n").expect("typed");
    wait_for("size=24x80");
    let resized = world.command("stty").arg("-F").arg(&name).args(["rows", "40", "cols", "100"]).status();
    assert!(resized.expect("stty").success());
    // The size goes by signal: ask until it has come, and say so once.
    master
        .write_all(
            b"until [ \"$(stty size)\" = '40 100' ]; do sleep 0.05; done; echo now=$(stty size | tr ' ' x)\n",
        )
        .expect("typed");
    wait_for("now=40x100");
    master.write_all(b"echo tty=$(tty)\n").expect("typed");
    wait_for("tty=/dev/pts/");
    // ^C reaches the command, not the client.
    master.write_all(b"sleep 1000; echo code=$?\n").expect("typed");
    wait_for("sleep 1000");
    master.write_all(b"\x03").expect("typed");
    master.write_all(b"echo again=$((40+2))\n").expect("typed");
    wait_for("again=42");
    master.write_all(b"exit 7\n").expect("typed");
    assert_eq!(child.wait().expect("status").code(), Some(7));
}

/// Output to a file goes through a relay of the client's; what a command leaves in the background does not hold it up.
#[test]
fn a_background_process_does_not_hold_the_client() {
    let world = World::with_environment("");
    let path = world.project().join("output");
    let file = File::create(&path).expect("a file");
    let script = "yes | head -c 1000000; sleep 100000 & echo last";
    let status =
        world.casemate(&["exec", "demo", "--", "sh", "-c", script]).stdout(file).status().expect("casemate");
    assert!(status.success());
    let written = fs::read_to_string(path).expect("output");
    assert!(written.len() == 1_000_005 && written.ends_with("last\n"), "{}", written.len());
    world.run(&["stop", "--timeout", "0", "demo"]);
}
