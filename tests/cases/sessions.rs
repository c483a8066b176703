//! Sessions: status, streams, ids, and what is inside.

use std::path::Path;
use std::process::Stdio;

use casemate_tests::{World, set_mode, soak, text};

#[test]
fn sessions() {
    let (world, project) = World::shared_environment("sessions", "[runtime]\nnetwork = \"none\"\n");
    exit_codes(world);
    streams(world, &project);
    the_users_files(world, &project);
    what_is_inside(world);
    where_one_begins(world, &project);
    login_shells(world);
    several_at_once(world);
}

fn exit_codes(world: &World) {
    for code in [0, 1, 42, 255] {
        assert_eq!(
            world.exec(&["sessions", "--", "sh", "-c", &format!("exit {code}")]).status.code(),
            Some(code)
        );
    }
    assert_eq!(world.exec(&["sessions", "--", "no-such-command"]).status.code(), Some(127));
    assert_eq!(world.exec(&["sessions", "--", "/etc/passwd"]).status.code(), Some(126));
    assert_eq!(world.exec(&["sessions", "--", "sh", "-c", "kill -TERM $$"]).status.code(), Some(128 + 15));
    let missing = world.exec(&["nowhere", "--", "true"]);
    assert_eq!(missing.status.code(), Some(125));
    assert!(text(&missing.stderr).contains("no environment \"nowhere\""), "{}", text(&missing.stderr));
}

fn streams(world: &World, project: &Path) {
    let all: Vec<u8> = (0..=255u8).cycle().take(3 << 20).collect();
    let output = world.exec_with(&["sessions", "--", "cat"], all.clone());
    assert!(output.status.success());
    assert!(output.stdout == all, "what went in did not come out");
    // A regular file as standard input is relayed.
    let manifest = project.join("casemate.toml");
    let file = std::fs::File::open(&manifest).expect("file");
    let output = world.casemate(&["exec", "sessions", "--", "cat"]).stdin(file).output().expect("casemate");
    assert_eq!(output.stdout, std::fs::read(&manifest).expect("file"));
    let output = world.exec(&["sessions", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("out\n".into(), "err\n".into()));
    // Exactly three descriptors, whatever the shell itself opens to look.
    let look = "for n in $(seq 3 40); do [ ! -e /proc/$$/fd/$n ] || echo $n; done";
    assert_eq!(text(&world.exec(&["sessions", "--", "sh", "-c", look]).stdout), "");
}

fn the_users_files(world: &World, project: &Path) {
    let secret = project.join("secret");
    std::fs::write(&secret, "secret").expect("file");
    set_mode(&secret, 0o600);
    assert_eq!(text(&world.exec(&["sessions", "--", "cat", "/workspace/secret"]).stdout), "secret");
    assert!(world.exec(&["sessions", "--", "sh", "-c", "echo mine > /workspace/made"]).status.success());
    assert_eq!(std::fs::read_to_string(project.join("made")).expect("made by the user"), "mine\n");
    let as_root = |script: &str| world.exec(&["--root", "sessions", "--", "sh", "-c", script]);
    let denied = as_root("cat /workspace/secret");
    assert!(
        !denied.status.success() && text(&denied.stderr).contains("Permission denied"),
        "{}",
        text(&denied.stderr)
    );
    let uid = text(&world.exec(&["sessions", "--", "id", "-u"]).stdout).trim().to_owned();
    // Root becomes a user of the same number, but not the user.
    let script = format!(
        "setpriv --reuid {uid} --clear-groups id -u && ! setpriv --reuid {uid} --clear-groups cat /workspace/secret 2>/dev/null && ! touch /workspace/by-root 2>/dev/null"
    );
    let became = as_root(&script);
    assert!(became.status.success(), "{} {}", text(&became.stdout), text(&became.stderr));
    assert_eq!(text(&became.stdout).trim(), uid);
    // An image's own user of the user's number works: files can be given to it.
    let own = as_root(&format!("touch /srv/f && chown {uid} /srv/f && stat -c %u /srv/f"));
    assert_eq!(text(&own.stdout).trim(), uid, "{}", text(&own.stderr));
}

fn what_is_inside(world: &World) {
    let user = |script: &str| text(&world.exec(&["sessions", "--", "sh", "-c", script]).stdout);
    assert!(user("grep CapEff /proc/self/status").contains("0000000000000000"));
    assert!(user("grep CapBnd /proc/self/status").contains("0000000000000000"));
    assert!(user("grep NoNewPrivs /proc/self/status").contains('1'));
    assert!(user("grep Seccomp: /proc/self/status").contains('2'));
    assert_eq!(user("ls /sys/class/net").trim(), "lo");
    assert_eq!(user("cat /proc/kcore | wc -c").trim(), "0");
    assert_eq!(user("echo 1 > /proc/sys/kernel/hostname 2>/dev/null || echo denied").trim(), "denied");
    assert_eq!(user("cat /proc/1/environ 2>/dev/null || echo denied").trim(), "denied");
    assert_eq!(user("unshare -U true 2>/dev/null || echo denied").trim(), "denied");
    let root = |script: &str| text(&world.exec(&["--root", "sessions", "--", "sh", "-c", script]).stdout);
    assert_eq!(root("unshare -U true 2>/dev/null || echo denied").trim(), "denied");
    assert_eq!(root("mount -t tmpfs none /mnt 2>/dev/null || echo denied").trim(), "denied");
    assert_eq!(root("hostname other 2>/dev/null || echo denied").trim(), "denied");
    assert_eq!(root("kill -9 1 2>/dev/null; echo alive").trim(), "alive");
    assert_eq!(root("mknod /dev/x c 1 3 2>/dev/null || echo denied").trim(), "denied");
}

/// Several rounds, so that some come while the environment stops since the last one's sessions have ended.
fn several_at_once(world: &World) {
    for round in 0..soak(50, 5) {
        let started: Vec<_> = (0..8)
            .map(|number| {
                let script = format!("echo {round} {number}");
                let mut command = world.casemate(&["exec", "sessions", "--", "sh", "-c", &script]);
                let piped = command.stdout(Stdio::piped()).stderr(Stdio::piped());
                piped.spawn().expect("casemate")
            })
            .collect();
        for (number, child) in started.into_iter().enumerate() {
            let output = child.wait_with_output().expect("output");
            assert_eq!(text(&output.stdout), format!("{round} {number}\n"), "{}", text(&output.stderr));
        }
    }
}

fn where_one_begins(world: &World, project: &Path) {
    let home = text(&world.exec(&["sessions", "--", "sh", "-c", "echo $HOME"]).stdout).trim().to_owned();
    let sub = project.join("sub/deeper");
    let closed = project.join("closed");
    for directory in [&sub, &closed] {
        std::fs::create_dir_all(directory).expect("directory");
    }
    set_mode(&closed, 0o700);
    let begins = |directory: &Path, more: &[&str]| {
        let mut command = world.casemate(&["exec"]);
        let output = command.args(more).args(["sessions", "--", "pwd"]).current_dir(directory).output();
        let output = output.expect("casemate");
        (text(&output.stdout).trim().to_owned(), output.status.code())
    };
    for (directory, more, expected) in [
        (project, &[][..], "/workspace"),
        (&sub, &[], "/workspace/sub/deeper"),
        (&closed, &[], "/workspace/closed"),
        // Root of the environment is not the user, who alone may enter.
        (&closed, &["--root"], "/root"),
        (Path::new("/usr"), &[], home.as_str()),
        (&sub, &["--workdir", "/etc"], "/etc"),
    ] {
        let found = begins(directory, more);
        assert_eq!(found, (expected.to_owned(), Some(0)), "{directory:?} {more:?}");
    }
    assert_eq!(begins(project, &["--workdir", "/nowhere"]).1, Some(125));
}

fn login_shells(world: &World) {
    let run = |arguments: &[&str]| {
        let output = world.exec(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let root = |script: &str| run(&["--root", "sessions", "--", "sh", "-c", script]);
    root("echo 'export MARK=\"by profile\"' > /etc/profile.d/mark.sh");
    let show = ["sh", "-c", "printf '%s|' \"$MARK\" \"$SHELL\" \"$@\"", "name", "a b", "$HOME", "\"'"];
    assert_eq!(run(&[&["sessions", "--"], &show[..]].concat()), "|/bin/bash|a b|$HOME|\"'|");
    let login = [&["--login", "sessions", "--"], &show[..]].concat();
    assert_eq!(run(&login), "by profile|/bin/bash|a b|$HOME|\"'|");
    let script = "echo $0 $MARK; exit 5".to_owned();
    let shell = world.exec_with(&["--login", "sessions"], script.into_bytes());
    assert_eq!((text(&shell.stdout), shell.status.code()), ("-bash by profile\n".into(), Some(5)));
    // The environment's own passwd decides, and one that its root has spoiled locks nobody out.
    let user = std::env::var("USER").expect("USER");
    root(&format!("cp /etc/passwd /etc/kept && sed -i '/^{user}:/s:/bin/bash$:/bin/dash:' /etc/passwd"));
    assert_eq!(run(&login), "by profile|/bin/dash|a b|$HOME|\"'|");
    root("rm /etc/passwd && mkdir /etc/passwd");
    assert_eq!(run(&login), "by profile|/bin/bash|a b|$HOME|\"'|");
    root("rmdir /etc/passwd && mv /etc/kept /etc/passwd && rm /etc/profile.d/mark.sh");
}
