//! `sudo` inside, where the manifest grants it.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use casemate_tests::typist::Typist;
use casemate_tests::{World, text, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const GRANTED: &str = "[runtime]\nnetwork = \"none\"\nsudo = true\n[system]\npackages = [\"jq\"]\n";

/// The output of a command line that succeeds.
fn says(world: &World, name: &str, script: &str) -> String {
    let output = world.exec(&[name, "--", "sh", "-c", script]);
    assert!(output.status.success(), "{script}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout).trim_end().to_owned()
}

#[test]
fn as_people_type_it() {
    let (world, _) = World::shared_environment("sudo", GRANTED);
    let user = std::env::var("USER").expect("USER");
    for (script, expected) in [
        ("sudo id -u", "0"),
        ("sudo -n -- id -un", "root"),
        ("sudo -u nobody id -un", "nobody"),
        ("sudo -u '#65534' sh -c 'echo $USER $HOME'", "nobody /nonexistent"),
        ("sudo -H sh -c 'echo $HOME $SUDO_USER'", &format!("/root {user}")),
        ("sudo A=1 B='2 3' sh -c 'echo $A $B'", "1 2 3"),
        ("KEPT=1 sudo sh -c 'echo [$KEPT]'", "[]"),
        ("KEPT=1 sudo -E sh -c 'echo [$KEPT]'", "[1]"),
        ("cd /usr/share && sudo pwd", "/usr/share"),
        ("sudo -D /etc pwd", "/etc"),
        ("cd /usr && sudo -D share pwd", "/usr/share"),
        ("sudo -i pwd", "/root"),
        ("sudo -s echo by a shell", "by a shell"),
        ("sudo sudo -u nobody sudo -n true 2>&1 || echo refused", "refused"),
        ("sudo printf '%s|' 'a b' '$HOME' '\"'", "a b|$HOME|\"|"),
        ("sudo -v && sudo -k && echo valid", "valid"),
        ("sudo sh -c 'ls /proc/self/fd | wc -l'", "4"),
        ("sudo grep -c . /etc/shadow >/dev/null && echo read", "read"),
    ] {
        let said = says(world, "sudo", script);
        // The last line: whom nobody lets in says why first.
        assert_eq!(said.lines().next_back(), Some(expected), "{script}");
    }
    for (script, code) in [
        ("sudo sh -c 'exit 42'", 42),
        ("sudo sh -c 'kill -TERM $$'", 143),
        ("sudo no-such-command", 127),
        ("sudo /etc/passwd", 126),
        ("sudo -D /nowhere true", 125),
        ("sudo", 1),
        ("sudo -u no-such-user true", 1),
        ("sudo --no-such-option true", 1),
    ] {
        assert_eq!(world.exec(&["sudo", "--", "sh", "-c", script]).status.code(), Some(code), "{script}");
    }
    let all: Vec<u8> = (0..=255u8).cycle().take(1 << 20).collect();
    assert!(world.exec_with(&["sudo", "--", "sudo", "cat"], all.clone()).stdout == all, "bytes were changed");
    signals(world);
    at_a_terminal(world);
}

fn signals(world: &World) {
    // By its shell the signal would reach sudo and what it runs alike.
    let script = "exec sudo sh -c 'trap \"echo caught; exit 9\" TERM; echo ready; sleep 1000 & wait'";
    let mut child = world
        .casemate(&["exec", "sudo", "--", "bash", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .expect("casemate");
    let mut out = BufReader::new(child.stdout.take().expect("pipe")).lines();
    assert_eq!(out.next().expect("a line").expect("text"), "ready");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(pid, Signal::SIGTERM).expect("kill");
    assert_eq!(out.next().expect("a line").expect("text"), "caught");
    assert_eq!(child.wait().expect("status").code(), Some(9));
}

fn at_a_terminal(world: &World) {
    // What is typed before the prompt is there goes to what sudo runs, as everywhere.
    let mut typist = Typist::sit_down(world, &["enter", "sudo"]);
    typist.types("echo mine=$(tty) size=$(sudo stty size < /dev/tty | tr ' ' x)\n");
    typist.sees("mine=/dev/pts/");
    let line = typist.line();
    let mine = line.split_once(' ').expect("both").0.to_owned();
    assert!(line.ends_with("size=24x80"), "{line}");
    typist.sees("$ ");
    typist.types("sudo sh -c 'echo terminal=$(tty) size=$(stty size | tr \" \" x) id=$(id -u)'\n");
    typist.sees("terminal=/dev/pts/");
    let line = typist.line();
    let (theirs, rest) = line.split_once(' ').expect("both");
    assert!(theirs != mine && rest == "size=24x80 id=0", "{line}, mine is {mine}");
    typist.sees("$ ");
    // What runs as root is at another terminal: ^C goes there, and ours is as it was.
    typist.types("sudo sh -c 'echo ru\"\"ns; exec sleep 1000'\n");
    typist.sees("runs");
    typist.types("\x03");
    typist.sees("^C");
    typist.sees("$ ");
    typist.types("echo again=$? $(stty -a | grep -o ' icanon')\n");
    typist.sees("again=130 icanon");
    // apt asks, and hears the answer.
    typist.types("sudo apt-get remove jq\n");
    typist.sees("continue? [Y/n] ");
    typist.types("y\n");
    typist.sees("Removing jq");
    typist.sees("$ ");
    typist.types("jq --version; echo gone=$?\n");
    typist.sees("gone=127");
    typist.types("sudo -i\n");
    typist.sees("root@");
    typist.types("echo who=$(whoami) in=$PWD; exit 3\n");
    typist.sees("who=root in=/root");
    typist.sees("$ ");
    typist.types("echo left=$?\n");
    typist.sees("left=3");
    typist.ends_with(0);
}

#[test]
fn without_the_grant_it_says_what_to_do() {
    let (world, _) = World::shared_environment("no-sudo", "[runtime]\nnetwork = \"none\"\n");
    let refused = world.exec(&["no-sudo", "--", "sudo", "id"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = text(&refused.stderr);
    assert!(
        said.contains("not granted") && said.contains("sudo = true") && said.contains("--root"),
        "{said}"
    );
    // Root needs nobody's leave.
    assert_eq!(text(&world.exec(&["--root", "no-sudo", "--", "sudo", "id", "-u"]).stdout), "0\n");
}

/// Its socket is the user's alone, and whoever misuses it harms themselves.
#[test]
fn a_socket_for_the_user_alone() {
    let (world, _) = World::shared_environment("sudo-socket", "[runtime]\nnetwork = \"none\"\nsudo = true\n");
    let connect = "use Socket; socket(my $s, AF_UNIX, SOCK_SEQPACKET, 0) or die \"socket: $!\"; \
                   connect($s, sockaddr_un(\"/run/casemate/sudo\")) or die \"connect: $!\"; ";
    let perl = |as_whom: &[&str], more: &str| {
        let script = format!("{connect}{more}");
        let output = world.exec(&[as_whom, &["perl", "-e", &script]].concat());
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let user = &["sudo-socket", "--"][..];
    let answer = "recv($s, my $r, 65536, 0) // die; print $r";
    for (request, expected) in [
        ("garbage", "unreadable request"),
        ("{\"request\":\"run\"}", "missing field"),
        ("{\"request\":\"exec\"}", "unknown variant"),
        ("{\"request\":\"signal\",\"signal\":9}", "no session runs"),
        (
            "{\"request\":\"run\",\"command\":[\"id\"],\"login\":false,\"environment\":[],\"directory\":\"/\",\"directory_optional\":true,\"terminal\":null}",
            "descriptors are missing",
        ),
    ] {
        let (code, out, error) = perl(user, &format!("send($s, q({request}), 0); {answer}"));
        assert!(code == Some(0) && out.contains(expected), "{request}: {out}{error}");
    }
    // Another user of the environment is not the user.
    let nobody = &["--root", "sudo-socket", "--", "setpriv", "--reuid", "nobody", "--clear-groups"];
    let (code, _, error) = perl(nobody, "");
    assert!(code != Some(0) && error.contains("connect: Permission denied"), "{error}");
    // Nor root, whose files they are not. It needs no sudo.
    let (code, _, error) = perl(&["--root", "sudo-socket", "--"], "");
    assert!(code != Some(0) && error.contains("connect: Permission denied"), "{error}");

    // Held open by the dozen, they keep neither the daemon nor another request out.
    let script = format!(
        "for (1..60) {{ {connect} push @held, $s }} print qq(held\\n); $| = 1; print qq(\\n); <STDIN>"
    );
    let mut child = world
        .casemate(&["exec", "sudo-socket", "--", "perl", "-e", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("casemate");
    let mut line = String::new();
    let mut out = BufReader::new(child.stdout.take().expect("pipe"));
    out.read_line(&mut line).expect("a line");
    assert_eq!(line, "held\n");
    assert_eq!(text(&world.exec(&["sudo-socket", "--", "echo", "still here"]).stdout), "still here\n");
    drop(child.stdin.take());
    assert!(child.wait().expect("status").success());
    wait_for("room", || world.exec(&["sudo-socket", "--", "sudo", "true"]).status.success());
}

/// Sessions come and go while the daemon cannot listen, more than init keeps for it.
#[test]
fn a_daemon_that_missed_what_happened() {
    let world = World::with_environment("[runtime]\nnetwork = \"none\"\nsudo = true\n");
    world.run(&["start", "demo"]);
    let script = "read go; i=0; while [ $i -lt 600 ]; do sudo true || exit 9; i=$((i+1)); done; echo done; sudo sh -c 'echo more; read go'";
    let mut child = world
        .casemate(&["exec", "demo", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("casemate");
    let sessions = || {
        let shown: serde_json::Value =
            serde_json::from_str(&world.run(&["show", "demo", "--json"])).expect("JSON");
        shown["sessions"].as_u64()
    };
    wait_for("the session", || sessions() == Some(1));
    let daemon = Pid::from_raw(i32::try_from(world.daemon_pid()).expect("a pid"));
    kill(daemon, Signal::SIGSTOP).expect("kill");
    let mut stdin = child.stdin.take().expect("pipe");
    let mut out = BufReader::new(child.stdout.take().expect("pipe")).lines();
    stdin.write_all(b"go\n").expect("written");
    for expected in ["done", "more"] {
        assert_eq!(out.next().expect("a line").expect("text"), expected);
    }
    kill(daemon, Signal::SIGCONT).expect("kill");
    // The shell's and the last one of sudo's.
    wait_for("the daemon's knowledge", || sessions() == Some(2));
    assert!(world.daemon_log().contains("notices were lost"), "{}", world.daemon_log());
    drop(stdin);
    assert!(!child.wait().expect("status").success(), "read was not told of the end");
    wait_for("the sessions' end", || sessions() == Some(0));
}
