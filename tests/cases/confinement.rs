//! Every worker, gone bad, tries what it may not: the real one, whose system calls are replaced once it has confined itself
//! (`tests/src/possess.rs`). Each misdeed is tried without confinement as well: where it succeeds, it is the confinement that
//! stops it.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use casemate_tests::misdeeds::{Argument, Outcome, PROGRESS, Step, UNCONFINED};
use casemate_tests::wait_for;
use casemate_tests::workers::{Bench, LIMITS, WORKERS, call, number, text};
use casemate_worker::confine::exit;
use casemate_worker::spawn::{Worker, WorkerError};
use command_fds::{CommandFdExt, FdMapping};
use tokio::sync::{Notify, watch};

const MISBEHAVE: &str = env!("CARGO_BIN_EXE_misbehave");
const POSSESS: &str = env!("CARGO_BIN_EXE_possess");

async fn bench() -> Bench {
    Bench::possessed(MISBEHAVE, POSSESS).await
}

const SIGSYS: i32 = 128 + libc::SIGSYS;

/// What becomes of a misdeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Works,
    Fails(i32),
    /// Ended with this code, or by this signal and 128.
    Ends(i32),
}
use Fate::{Ends, Fails, Works};

fn fate(outcome: Result<Outcome, WorkerError>) -> Fate {
    match outcome {
        Ok(Outcome { errno: 0 }) => Works,
        Ok(Outcome { errno }) => Fails(errno),
        Err(WorkerError::Died { status, .. }) => Ends(status.code().expect("a code")),
        Err(error) => panic!("{error}"),
    }
}

/// Without confinement.
#[derive(Debug, Clone, Copy)]
enum Control {
    /// It works.
    Works,
    /// The program that is executed ends well.
    Executes,
    /// The kernel may refuse it to everybody who is not root, or not know it; the confinement does not come to that.
    Lives,
    /// It would harm the test.
    Untried,
}

struct Misdeed {
    name: &'static str,
    step: Step,
    control: Control,
}

fn misdeed(
    name: &'static str,
    control: Control,
    call_number: i64,
    arguments: impl IntoIterator<Item = Argument>,
) -> Misdeed {
    Misdeed { name, step: call(call_number, arguments), control }
}

/// Calls that end every worker, but those of [`allowed`].
fn forbidden() -> Vec<Misdeed> {
    use Control::{Executes, Lives, Untried, Works};
    use libc::*;
    let n = |value: i32| number(value);
    let parent = || number(i64::from(std::process::id()));
    let secret: &'static [u64; 1] = &[42];
    let remote = || Argument::Words(vec![number(secret.as_ptr() as i64), n(8)]);
    let local = || Argument::Words(vec![Argument::Words(vec![n(0)]), n(8)]);
    let new_thread = CLONE_VM | CLONE_SIGHAND | CLONE_THREAD;
    #[allow(unused_mut)]
    let mut all = vec![
        misdeed("a TCP socket", Works, SYS_socket, [n(AF_INET), n(SOCK_STREAM), n(0)]),
        misdeed("a UDP socket", Works, SYS_socket, [n(AF_INET), n(SOCK_DGRAM), n(IPPROTO_UDP)]),
        misdeed("a pair of sockets", Works, SYS_socketpair, [n(AF_UNIX), n(SOCK_STREAM), n(0), local()]),
        misdeed("an AF_UNIX socket", Works, SYS_socket, [n(AF_UNIX), n(SOCK_STREAM), n(0)]),
        misdeed("an AF_NETLINK socket", Works, SYS_socket, [n(AF_NETLINK), n(SOCK_RAW), n(0)]),
        misdeed("an AF_PACKET socket", Lives, SYS_socket, [n(AF_PACKET), n(SOCK_RAW), n(0)]),
        misdeed("an AF_ALG socket", Lives, SYS_socket, [n(38), n(SOCK_SEQPACKET), n(0)]),
        misdeed("an AF_VSOCK socket", Lives, SYS_socket, [n(AF_VSOCK), n(SOCK_STREAM), n(0)]),
        misdeed("a raw socket", Lives, SYS_socket, [n(AF_INET), n(SOCK_RAW), n(IPPROTO_ICMP)]),
        misdeed("MPTCP", Lives, SYS_socket, [n(AF_INET), n(SOCK_STREAM), n(IPPROTO_MPTCP)]),
        misdeed("SCTP", Lives, SYS_socket, [n(AF_INET), n(SOCK_SEQPACKET), n(IPPROTO_SCTP)]),
        misdeed("a TIPC pair", Lives, SYS_socketpair, [n(30), n(SOCK_STREAM), n(0), local()]),
        misdeed("execve", Executes, SYS_execve, [text("/bin/true"), n(0), n(0)]),
        misdeed("execveat", Executes, SYS_execveat, [n(AT_FDCWD), text("/bin/true"), n(0), n(0), n(0)]),
        misdeed("clone without a thread", Untried, SYS_clone, [n(SIGCHLD)]),
        misdeed("a thread in a new namespace", Lives, SYS_clone, [n(new_thread | CLONE_NEWUTS)]),
        misdeed("ptrace the parent", Works, SYS_ptrace, [n(0x4206), parent()]),
        misdeed(
            "read the parent",
            Works,
            SYS_process_vm_readv,
            [parent(), local(), n(1), remote(), n(1), n(0)],
        ),
        misdeed(
            "write the parent",
            Lives,
            SYS_process_vm_writev,
            [parent(), local(), n(1), n(0), n(0), n(0)],
        ),
        misdeed("kill the parent", Works, SYS_kill, [parent(), n(0)]),
        misdeed("hold the parent", Works, SYS_pidfd_open, [parent(), n(0)]),
        misdeed("limit the parent", Works, SYS_prlimit64, [parent(), n(7), n(0), n(0)]),
        misdeed("a user namespace", Works, SYS_unshare, [n(CLONE_NEWUSER)]),
        misdeed("a mount namespace", Lives, SYS_unshare, [n(CLONE_NEWNS)]),
        misdeed("another's namespace", Lives, SYS_setns, [n(4), n(0)]),
        misdeed("mount", Lives, SYS_mount, [text("none"), text("/"), text("tmpfs"), n(0), n(0)]),
        misdeed("unmount", Lives, SYS_umount2, [text("/"), n(MNT_DETACH)]),
        misdeed("pivot_root", Lives, SYS_pivot_root, [text("."), text(".")]),
        misdeed("chroot", Lives, SYS_chroot, [text("/")]),
        misdeed("fsopen", Lives, SYS_fsopen, [text("tmpfs"), n(0)]),
        misdeed("open_tree", Lives, SYS_open_tree, [n(4), text("."), n(1)]),
        misdeed("move_mount", Lives, SYS_move_mount, [n(4), text("."), n(4), text("."), n(0)]),
        misdeed("open by handle", Lives, SYS_open_by_handle_at, [n(4), local(), n(0)]),
        misdeed("be dumpable", Works, SYS_prctl, [n(PR_SET_DUMPABLE), n(1)]),
        misdeed("become another", Lives, SYS_setresuid, [n(0), n(0), n(0)]),
        misdeed("take capabilities", Lives, SYS_capset, [local(), local()]),
        misdeed("raise a limit", Lives, SYS_setrlimit, [n(7), local()]),
        misdeed("bpf", Lives, SYS_bpf, [n(0), local(), n(8)]),
        misdeed("perf_event_open", Lives, SYS_perf_event_open, [local(), n(0), n(-1), n(-1), n(0)]),
        misdeed("io_uring", Lives, SYS_io_uring_setup, [n(1), n(0)]),
        misdeed("userfaultfd", Lives, SYS_userfaultfd, [n(0)]),
        misdeed("keyctl", Lives, SYS_keyctl, [n(0), n(-3), n(0)]),
        misdeed("a terminal's input", Lives, SYS_ioctl, [n(0), number(TIOCSTI as i64), local()]),
        misdeed("a kernel module", Lives, SYS_finit_module, [n(4), text(""), n(0)]),
        misdeed("a memory file", Works, SYS_memfd_create, [text("x"), n(0)]),
    ];
    #[cfg(target_arch = "x86_64")]
    all.extend([
        misdeed("fork", Untried, SYS_fork, []),
        misdeed("vfork", Untried, SYS_vfork, []),
        misdeed("the x32 ABI", Lives, 0x4000_0000 | SYS_getppid, []),
    ]);
    all
}

/// What a worker is there for.
fn allowed(worker: Worker, name: &str) -> bool {
    match worker {
        Worker::Fetch => ["a TCP socket", "a UDP socket", "a pair of sockets"].contains(&name),
        Worker::Index => false,
        // casemate-unpack's way to ask how many ids it has.
        Worker::Unpack | Worker::Tree => name == "a memory file",
    }
}

/// Where a Yama forbids ptrace among equals, the control needs our leave.
fn let_be_traced() {
    if fs::exists("/proc/sys/kernel/yama").expect("/proc") {
        // SAFETY: no pointers.
        let done = unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
        nix::errno::Errno::result(done).expect("prctl");
    }
}

#[tokio::test]
async fn forbidden_calls_kill() {
    let bench = bench().await;
    for worker in WORKERS {
        for Misdeed { name, step, .. } in forbidden() {
            let expected = if allowed(worker, name) { Works } else { Ends(SIGSYS) };
            let seen = fate(bench.run(worker, &[step]).await);
            assert_eq!(seen, expected, "{name}, {worker:?}");
        }
    }
    bench.end().await;
}

#[tokio::test]
async fn unconfined_they_would_not() {
    let_be_traced();
    let bench = bench().await;
    for Misdeed { name, step, control } in forbidden() {
        if let Control::Untried = control {
            continue;
        }
        let seen = fate(bench.run_as(UNCONFINED, Worker::Tree, &[step], LIMITS).await);
        match control {
            Control::Works => assert_eq!(seen, Works, "{name}"),
            Control::Executes => assert_eq!(seen, Ends(0), "{name}"),
            Control::Lives => assert!(matches!(seen, Works | Fails(_)), "{name}: {seen:?}"),
            Control::Untried => {}
        }
    }
    bench.end().await;
}

#[tokio::test]
async fn fetch_reaches_the_network_and_nobody_else_does() {
    let bench = bench().await;
    let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
    let connect = [Step::Connect { port: listener.local_addr().expect("address").port() }];
    for worker in WORKERS {
        let expected = if worker == Worker::Fetch { Works } else { Ends(SIGSYS) };
        assert_eq!(fate(bench.run(worker, &connect).await), expected, "{worker:?}");
    }
    bench.end().await;
}

fn open(path: impl Into<String>, flags: i32) -> Step {
    call(libc::SYS_openat, [number(libc::AT_FDCWD), text(path), number(flags), number(0o600)])
}

/// From the descriptor that is the worker's directory.
fn open_in(path: impl Into<String>, flags: i32) -> Step {
    call(libc::SYS_openat, [number(4), text(path), number(flags), number(0o600)])
}

fn stat(path: impl Into<String>) -> Step {
    let buffer = Argument::Words(vec![number(0); 32]);
    call(libc::SYS_newfstatat, [number(libc::AT_FDCWD), text(path), buffer, number(0)])
}

#[tokio::test]
async fn no_file_outside() {
    use libc::{EBADF, ENOENT, O_RDONLY};
    let bench = bench().await;
    let secret = bench.secret().display().to_string();
    // One that a careless part of the daemon forgot to mark.
    let leak = fs::File::open(bench.secret()).expect("secret");
    let leaked = nix::fcntl::fcntl(&leak, nix::fcntl::FcntlArg::F_DUPFD(200)).expect("descriptor");
    let read =
        call(libc::SYS_pread64, [number(leaked), Argument::Words(vec![number(0)]), number(6), number(0)]);
    for worker in WORKERS {
        let mut steps = vec![
            ("a host's file", open(&secret, O_RDONLY), ENOENT),
            ("whether a host's file is there", stat(&secret), ENOENT),
            ("the system's users", open("/etc/passwd", O_RDONLY), ENOENT),
            ("its own environment", open("/proc/self/environ", O_RDONLY), ENOENT),
            ("its parent's", open(format!("/proc/{}/environ", std::process::id()), O_RDONLY), ENOENT),
            ("a leaked descriptor", read.clone(), EBADF),
        ];
        if let Some(directory) = bench.directory(worker) {
            let depth = directory.strip_prefix(bench.home.path()).expect("beneath").components().count();
            let up = format!("{}secret", "../".repeat(depth));
            let link = if worker == Worker::Tree { "staging/link" } else { "link" };
            steps.push(("what is above its directory", open_in(up, O_RDONLY), ENOENT));
            steps.push(("where a link leads", open_in(link, O_RDONLY), ENOENT));
        }
        for (name, step, errno) in steps {
            let seen = fate(bench.run(worker, std::slice::from_ref(&step)).await);
            assert_eq!(seen, Fails(errno), "{name}, {worker:?}");
            let control = fate(bench.run_as(UNCONFINED, worker, &[step], LIMITS).await);
            assert_eq!(control, Works, "{name}, unconfined");
        }
    }
    nix::unistd::close(leaked).expect("ours");
    bench.end().await;
}

#[tokio::test]
async fn no_write_beside_its_directory() {
    use libc::{EACCES, ENOENT, EPERM, EROFS, O_CREAT, O_RDONLY, O_WRONLY};
    let bench = bench().await;
    for worker in [Worker::Fetch, Worker::Index] {
        for path in ["/new", "/tmp/new", "new"] {
            let seen = fate(bench.run(worker, &[open(path, O_CREAT | O_WRONLY)]).await);
            assert_eq!(seen, Fails(ENOENT), "{path}, {worker:?}");
        }
    }
    for worker in [Worker::Unpack, Worker::Tree] {
        let directory = bench.directory(worker).expect("directory");
        let beside = directory.parent().expect("parent").join("beside");
        let make = call(libc::SYS_mkdirat, [number(4), text("../beside"), number(0o755)]);
        assert_eq!(fate(bench.run(worker, std::slice::from_ref(&make)).await), Works);
        assert!(
            directory.join("beside").is_dir() && !beside.exists(),
            "{worker:?}: `..` of a root is itself"
        );
        let remove = call(libc::SYS_unlinkat, [number(4), text("beside"), number(libc::AT_REMOVEDIR)]);
        assert_eq!(fate(bench.run(worker, &[remove]).await), Works);
        assert_eq!(fate(bench.run_as(UNCONFINED, worker, &[make], LIMITS).await), Works);
        assert!(beside.is_dir(), "unconfined");
        fs::remove_dir(beside).expect("removal");

        let device = call(
            libc::SYS_mknodat,
            [number(4), text("device"), number(libc::S_IFCHR | 0o666), number(libc::makedev(1, 3) as i64)],
        );
        assert_eq!(fate(bench.run(worker, &[device]).await), Fails(EPERM), "{worker:?}");
    }

    let rename = |from: &str, to: &str| {
        call(libc::SYS_renameat2, [number(4), text(from), number(4), text(to), number(0)])
    };
    for (name, step, errno) in [
        ("read a record", open_in("releases/known", O_RDONLY), ENOENT),
        ("write a record", open_in("releases/new", O_CREAT | O_WRONLY), EACCES),
        ("write a record", open_in("snapshots/new", O_CREAT | O_WRONLY), EACCES),
        ("move a record away", rename("releases/known", "staging/known"), libc::EXDEV),
        ("move a record in", rename("staging/link", "environments/new"), libc::EXDEV),
        ("move the records", rename("releases", "staging/releases"), libc::EBUSY),
        (
            "remove the records",
            call(libc::SYS_unlinkat, [number(4), text("releases"), number(0x200)]),
            libc::EBUSY,
        ),
    ] {
        let seen = fate(bench.run(Worker::Tree, &[step]).await);
        let expected = if errno == EACCES { [EACCES, EROFS] } else { [errno; 2] };
        assert!(expected.map(Fails).contains(&seen), "{name}: {seen:?}");
    }
    for step in [
        open_in("releases/known", O_RDONLY),
        open_in("releases/new", O_CREAT | O_WRONLY),
        rename("releases/known", "staging/known"),
        rename("staging/known", "releases/known"),
    ] {
        assert_eq!(fate(bench.run_as(UNCONFINED, Worker::Tree, &[step], LIMITS).await), Works, "unconfined");
    }
    bench.end().await;
}

#[tokio::test]
async fn limits_are_in_force() {
    let bench = bench().await;
    for worker in WORKERS {
        let profile = worker.profile();
        let map = |bytes: u64| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let bytes = number(i64::try_from(bytes).expect("fits"));
            call(libc::SYS_mmap, [number(0), bytes, number(0), number(flags), number(-1), number(0)])
        };
        assert_eq!(fate(bench.run(worker, &[map(profile.memory / 2)]).await), Works, "{worker:?}");
        assert_eq!(fate(bench.run(worker, &[map(profile.memory)]).await), Fails(libc::ENOMEM), "{worker:?}");
        let control = bench.run_as(UNCONFINED, worker, &[map(profile.memory)], LIMITS).await;
        assert_eq!(fate(control), Works, "unconfined, as {worker:?}");
        let Ok(size) = i64::try_from(profile.file_size) else { continue };
        let last = if worker == Worker::Fetch { 4 } else { 5 };
        let grow = call(libc::SYS_ftruncate, [number(last), number(size + 1)]);
        let seen = fate(bench.run(worker, std::slice::from_ref(&grow)).await);
        // PID 1 of its namespace, it is spared SIGXFSZ.
        assert_eq!(seen, Fails(libc::EFBIG), "{worker:?}");
        let control = bench.run_as(UNCONFINED, worker, &[grow], LIMITS).await;
        assert_eq!(fate(control), Works, "unconfined, as {worker:?}");
    }
    bench.end().await;
}

fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = text.lines().find_map(|line| line.strip_prefix(field)).expect("field");
    line.trim_start_matches(':').trim().to_owned()
}

fn limit(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("limit");
    line.split_whitespace().nth(1).expect("hard limit").to_owned()
}

/// As the kernel tells it of both processes of a worker, from outside.
#[tokio::test]
async fn as_the_kernel_sees_them() {
    let bench = Arc::new(bench().await);
    let steps = [Step::Say { text: PROGRESS.to_owned(), times: 1 }, Step::Hang];
    for worker in WORKERS {
        let profile = worker.profile();
        let (cancel, cancelled) = watch::channel(false);
        let (started, steps, working) = (Arc::new(Notify::new()), steps.clone(), bench.clone());
        let notify = started.clone();
        let running = tokio::spawn(async move {
            working.run_with(worker, &steps, LIMITS, &mut |_| notify.notify_one(), cancelled).await
        });
        started.notified().await;
        let pids = bench.processes();
        assert_eq!(pids.len(), 2, "{worker:?}: one that waits, one that works");
        wait_for("the one that waits to lock itself up", || {
            pids.iter().all(|pid| status(*pid, "Seccomp") == "2")
        });
        for pid in &pids {
            assert_eq!(status(*pid, "NoNewPrivs"), "1", "{worker:?}");
            for secret in ["environ", "mem", "maps", "fd", "root", "ns/mnt"] {
                let path = format!("/proc/{pid}/{secret}");
                let seen = match secret {
                    "fd" => fs::read_dir(path).map(drop),
                    "root" | "ns/mnt" => fs::read_link(path).map(drop),
                    _ => fs::File::open(path).and_then(|mut file| file.read(&mut [0])).map(drop),
                };
                let kind = seen.map_err(|error| error.kind());
                assert_eq!(kind, Err(std::io::ErrorKind::PermissionDenied), "{worker:?}: {secret} of {pid}");
            }
        }
        let inner =
            *pids.iter().find(|pid| status(**pid, "NSpid").split_whitespace().count() > 1).expect("inner");
        let outer = *pids.iter().find(|pid| **pid != inner).expect("outer");
        let capabilities = format!("{:016x}", profile.capabilities.bits());
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            let expected =
                if set == "CapBnd" && profile.capabilities.is_empty() { None } else { Some(&capabilities) };
            if let Some(expected) = expected {
                assert_eq!(&status(inner, set), expected, "{worker:?}: {set}");
            }
        }
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(status(outer, set), "0000000000000000", "{worker:?}: {set}");
        }
        let unlimited =
            |value: u64| if value == u64::MAX { "unlimited".to_owned() } else { value.to_string() };
        assert_eq!(limit(inner, "Max address space"), profile.memory.to_string(), "{worker:?}");
        assert_eq!(limit(inner, "Max file size"), unlimited(profile.file_size), "{worker:?}");
        assert_eq!(limit(inner, "Max core file size"), "0", "{worker:?}");
        assert_eq!(limit(inner, "Max locked memory"), "0", "{worker:?}");
        assert_eq!(limit(inner, "Max open files"), "1024", "{worker:?}");
        cancel.send(true).expect("listener");
        let outcome = running.await.expect("task");
        assert!(matches!(outcome, Err(WorkerError::Cancelled)), "{outcome:?}");
        assert_eq!(bench.processes(), [0; 0], "{worker:?} is gone when its run is over");
    }
    Arc::into_inner(bench).expect("ours alone").end().await;
}

/// Answer a call with an error instead of making it.
fn deny(call: i64, argument: Option<(u8, i32)>) -> seccompiler::BpfProgram {
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    };
    let rules = argument.map(|(index, value)| {
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value as u64);
        SeccompRule::new(vec![condition.expect("condition")]).expect("rule")
    });
    let filter = SeccompFilter::new(
        [(call, rules.into_iter().collect())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into().expect("architecture"),
    );
    filter.expect("filter").try_into().expect("program")
}

/// Start a worker with its request at hand from the beginning. How it ended, what it said, and what it left unread.
fn start(
    bench: &Bench,
    mut command: Command,
    worker: Worker,
    input: &[u8],
) -> (Option<i32>, String, Vec<u8>) {
    let (events, events_in) = std::io::pipe().expect("pipe");
    let (request, mut request_in) = std::io::pipe().expect("pipe");
    std::io::Write::write_all(&mut request_in, input).expect("request");
    drop(request_in);
    let mut mappings = vec![FdMapping { parent_fd: events_in.into(), child_fd: 3 }];
    let directory = bench.directory(worker).unwrap_or_else(|| bench.home.path().to_owned());
    for child_fd in 4..4 + worker.profile().descriptors {
        mappings
            .push(FdMapping { parent_fd: fs::File::open(&directory).expect("directory").into(), child_fd });
    }
    command.stdin(Stdio::from(OwnedFd::from(request.try_clone().expect("clone"))));
    command.stdout(Stdio::null()).stderr(Stdio::null()).fd_mappings(mappings).expect("mappings");
    let status = command.status().expect("started");
    drop(command);
    let (mut said, mut unread) = (String::new(), Vec::new());
    { events }.read_to_string(&mut said).expect("events");
    { request }.read_to_end(&mut unread).expect("rest");
    (status.code(), said, unread)
}

/// Makes no sense to any worker, which it says once it has read it, and it does not read before it is confined.
const REQUEST: &[u8] = b"{\"protocol\":1,\"request\":[]}";

fn single(worker: Worker) -> Vec<String> {
    let (uid, gid) = (nix::unistd::getuid().to_string(), nix::unistd::getgid().to_string());
    let program = casemate_tests::binaries().join(worker.profile().name).display().to_string();
    vec![program, "single".to_owned(), uid, gid]
}

#[tokio::test]
async fn unable_to_confine_itself_it_ends() {
    let bench = bench().await;
    let unconfined = Some(i32::from(exit::UNCONFINED));
    for worker in WORKERS {
        let words = single(worker);
        // With nothing in its way it comes to its request, in this very harness.
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        let (code, said, unread) = start(&bench, command, worker, REQUEST);
        assert_eq!((code, unread.len()), (Some(exit::REQUEST.into()), 0), "{worker:?}: {said}");
        assert!(said.contains("confined"), "{worker:?}: {said}");

        let mut steps = vec![
            ("namespaces", libc::SYS_unshare, None),
            ("limits", libc::SYS_prlimit64, None),
            ("no way back for descriptors", libc::SYS_close_range, None),
            ("capabilities", libc::SYS_capset, None),
            ("a new root", libc::SYS_pivot_root, None),
            ("its mounts", libc::SYS_mount, None),
            ("no old root", libc::SYS_umount2, None),
            ("no new privileges", libc::SYS_prctl, Some((0, libc::PR_SET_NO_NEW_PRIVS))),
            ("undumpable", libc::SYS_prctl, Some((0, libc::PR_SET_DUMPABLE))),
            ("an end with its parent", libc::SYS_prctl, Some((0, libc::PR_SET_PDEATHSIG))),
            ("seccomp", libc::SYS_seccomp, None),
            ("Landlock", libc::SYS_landlock_restrict_self, None),
        ];
        if bench.directory(worker).is_some() {
            steps.push(("its directory", libc::SYS_move_mount, None));
        }
        for (name, call, argument) in steps {
            let program = deny(call, argument);
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]);
            // SAFETY: after fork, these only make system calls.
            unsafe {
                command.pre_exec(move || {
                    seccompiler::apply_filter(&program)
                        .map_err(|_| std::io::ErrorKind::PermissionDenied.into())
                });
            }
            let (code, said, unread) = start(&bench, command, worker, REQUEST);
            assert_eq!(code, unconfined, "{name}, {worker:?}: {said}");
            assert_eq!((said.as_str(), unread.as_slice()), ("", REQUEST), "{name}, {worker:?}");
        }

        let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "sh", "-c", script, "sh", &words[0], "single", "0", "0"]);
        let (code, said, unread) = start(&bench, command, worker, REQUEST);
        assert_eq!((code, said.as_str(), unread.as_slice()), (unconfined, "", REQUEST), "{worker:?}");
    }
    for worker in [Worker::Unpack, Worker::Tree] {
        let words = single(worker);
        // Its word to go on comes without the maps, or another one, or none.
        for input in ["\n", "x", ""] {
            let mut command = Command::new(&words[0]);
            command.args(["range", &words[2], &words[3]]);
            let (code, said, _) = start(&bench, command, worker, input.as_bytes());
            assert_eq!((code, said.as_str()), (unconfined, "{\"event\":\"unshared\"}\n"), "{worker:?}");
        }
    }
    for arguments in
        [&[][..], &["single"], &["range", "0"], &["single", "x", "0"], &["single", "0", "0", "0"]]
    {
        let words = single(Worker::Index);
        let mut command = Command::new(&words[0]);
        command.args(arguments);
        let (code, said, unread) = start(&bench, command, Worker::Index, REQUEST);
        assert_eq!((code, said.as_str(), unread.as_slice()), (unconfined, "", REQUEST), "{arguments:?}");
    }
    bench.end().await;
}
