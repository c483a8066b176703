//! What goes through: the first byte on a terminal, bytes through standard input and output, bytes through the network.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use casemate_tests::{World, text};
use nix::pty::openpty;

use crate::measure::{Report, series, time};
use crate::peers::{self, Podman};

const TERMINALS: usize = 60;
const ROUNDS: usize = 10;
const BLOCK: usize = 1 << 20;
const BLOCKS: usize = 512;

/// From its start until a command at a terminal of its own has printed something.
fn first_byte(mut command: Command) -> Duration {
    let pty = openpty(None, None).expect("pty");
    let end = || Stdio::from(pty.slave.try_clone().expect("descriptor"));
    command.env("TERM", "xterm").stdin(end()).stdout(end()).stderr(end());
    let begin = Instant::now();
    let mut child = command.spawn().expect("a command");
    let mut master = std::fs::File::from(pty.master);
    let mut printed = vec![0];
    master.read_exact(&mut printed).expect("a byte");
    let taken = begin.elapsed();
    // A terminal that is not read from would hold it up.
    let reader = std::thread::spawn(move || {
        // EIO once nobody has the other end.
        let _ = master.read_to_end(&mut printed);
        printed
    });
    let status = child.wait().expect("wait");
    drop((command, pty.slave));
    let printed = reader.join().expect("reader");
    assert!(status.success() && printed.starts_with(b"$"), "{}", text(&printed));
    taken
}

/// A prompt, beside that of a sandbox made for it.
pub fn terminal(world: &World, report: &mut Report) {
    let (root, podman) = (peers::root(world), Podman::new(world));
    let [mut ours, mut theirs, mut podmans] = series();
    for _ in 0..TERMINALS {
        ours.add(first_byte(world.casemate(&["exec", "running", "--", "echo", "$"])));
        theirs.add(first_byte(peers::bubblewrap(world, &root, &["echo", "$"])));
    }
    for _ in 0..TERMINALS / 6 {
        podmans.add(first_byte(podman.container(&["run", "--rm", "--tty"], &root, &["echo", "$"])));
    }
    report.ratio("first byte at a terminal", &ours, "bwrap … echo", &theirs, None);
    report.ratio("the same", &ours, "podman run --tty … echo", &podmans, None);
}

/// So many bytes into a command and out of it again.
fn through(mut command: Command) -> Duration {
    let begin = Instant::now();
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a command");
    let mut input = child.stdin.take().expect("pipe");
    let writer = std::thread::spawn(move || {
        let block = vec![b'x'; BLOCK];
        (0..BLOCKS).for_each(|_| input.write_all(&block).expect("all is read"));
    });
    let mut output = child.stdout.take().expect("pipe");
    let (mut block, mut count) = (vec![0; BLOCK], 0);
    loop {
        match output.read(&mut block).expect("output") {
            0 => break,
            more => count += more,
        }
    }
    let taken = begin.elapsed();
    writer.join().expect("writer");
    assert!(child.wait().expect("wait").success());
    assert_eq!(count, BLOCK * BLOCKS);
    taken
}

/// Half a gibibyte through `cat`, beside a bare one.
pub fn pipes(world: &World, report: &mut Report) {
    let [mut ours, mut bare] = series();
    for _ in 0..ROUNDS {
        ours.add(through(world.casemate(&["exec", "running", "--", "cat"])));
        bare.add(through(world.command("cat")));
    }
    report.ratio("512 MiB through stdin and stdout", &ours, "cat on the host", &bare, None);
}

/// An address of the machine's that pasta does not copy, so that it is another machine's for the environment; scripts/bench
/// sees to it.
const ADDRESS: &str = "198.51.100.1:0";

/// Half a gibibyte to a server of this machine's, from inside by pasta, and from the host itself.
pub fn network(world: &World, report: &mut Report) {
    let listener = TcpListener::bind(ADDRESS).expect("a server");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for mut client in listener.incoming().flatten() {
            // The whole of it, and then a word, so that the client is done when it has arrived.
            let mut block = vec![0; BLOCK];
            while matches!(client.read(&mut block), Ok(1..)) {}
        }
    });
    let script = format!(
        "exec 3<>/dev/tcp/{}/{} && head -c {} /dev/zero >&3",
        address.ip(),
        address.port(),
        BLOCK * BLOCKS
    );
    world.run(&["start", "connected"]);
    let reached = world.exec(&["connected", "--", "bash", "-c", &script]);
    assert!(reached.status.success(), "{}", text(&reached.stderr));
    let [mut ours, mut bare] = series();
    for _ in 0..ROUNDS {
        ours.add(time(&mut world.casemate(&["exec", "connected", "--", "bash", "-c", &script])));
        bare.add(time(world.command("bash").args(["-c", &script])));
    }
    world.run(&["stop", "connected"]);
    report.ratio("512 MiB to the host, private network", &ours, "from the host itself", &bare, None);
}

/// `start` and `stop` by themselves, beside those of a container that podman has made.
pub fn start_and_stop(world: &World, report: &mut Report) {
    let (root, podman) = (peers::root(world), Podman::new(world));
    let [mut start, mut stop, mut their_start, mut their_stop] = series();
    time(&mut podman.container(&["create", "--name", "bench"], &root, &["sleep", "infinity"]));
    for _ in 0..ROUNDS {
        start.add(time(&mut world.casemate(&["start", "stopped"])));
        stop.add(time(&mut world.casemate(&["stop", "stopped"])));
        their_start.add(time(&mut podman.command(&["start", "bench"])));
        // Its command is PID 1 and takes no SIGTERM.
        let begin = Instant::now();
        time(&mut podman.command(&["kill", "bench"]));
        time(&mut podman.command(&["wait", "bench"]));
        their_stop.add(begin.elapsed());
    }
    time(&mut podman.command(&["rm", "--force", "bench"]));
    report.ratio("start", &start, "podman start", &their_start, None);
    report.ratio("stop", &stop, "podman kill, podman wait", &their_stop, None);
}
