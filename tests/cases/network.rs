//! The network of environments. The addresses here are ones that scripts/test gives this machine: its own address is the
//! environment's too, as pasta copies it.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use casemate_tests::{World, text, wait_for};

const HOST: &str = "198.51.100.1";
const HOST6: &str = "2001:db8:6361::1";

fn listen(address: &str) -> (TcpListener, u16) {
    let listener = TcpListener::bind((address, 0))
        .unwrap_or_else(|error| panic!("{address}: {error}; scripts/test gives the machine this address"));
    let port = listener.local_addr().expect("address").port();
    (listener, port)
}

/// Say hello to everybody who connects.
fn greet(listener: TcpListener) {
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // Who hangs up at once is not greeted.
            let _ = stream.write_all(b"hello\n");
        }
    });
}

/// Give back every datagram, reversed.
fn echo(address: &str) -> u16 {
    let socket = UdpSocket::bind((address, 0)).expect("socket");
    let port = socket.local_addr().expect("address").port();
    std::thread::spawn(move || {
        let mut buffer = [0; 1500];
        while let Ok((size, from)) = socket.recv_from(&mut buffer) {
            buffer[..size].reverse();
            let _ = socket.send_to(&buffer[..size], from);
        }
    });
    port
}

/// A name server that answers every question for an address with `address`; to names that begin with `b` over TCP alone.
struct NameServer(SocketAddr);

impl NameServer {
    fn start(address: [u8; 4]) -> Self {
        // One port for both protocols.
        let (tcp, udp) = loop {
            let (tcp, port) = listen("127.0.0.1");
            if let Ok(udp) = UdpSocket::bind(("127.0.0.1", port)) {
                break (tcp, udp);
            }
        };
        let own = udp.local_addr().expect("address");
        std::thread::spawn(move || {
            let mut buffer = [0; 1500];
            while let Ok((size, from)) = udp.recv_from(&mut buffer) {
                let answer = answer(&buffer[..size], address, true);
                let _ = udp.send_to(&answer, from);
            }
        });
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = tcp.accept() {
                let mut size = [0; 2];
                if stream.read_exact(&mut size).is_err() {
                    continue;
                }
                let mut question = vec![0; u16::from_be_bytes(size).into()];
                stream.read_exact(&mut question).expect("a question");
                let answer = answer(&question, address, false);
                let size = u16::try_from(answer.len()).expect("short").to_be_bytes();
                stream.write_all(&[&size[..], &answer].concat()).expect("answered");
            }
        });
        Self(own)
    }
}

fn answer(question: &[u8], address: [u8; 4], datagram: bool) -> Vec<u8> {
    let end = 12 + question[12..].iter().position(|byte| *byte == 0).expect("a name") + 5;
    let is_address = question[end - 4..end] == [0, 1, 0, 1];
    let truncated = datagram && question[13] == b'b';
    let answers = u8::from(is_address && !truncated);
    let flags = if truncated { 0x83 } else { 0x81 };
    let mut answer =
        [&question[..2], &[flags, 0x80, 0, 1, 0, answers, 0, 0, 0, 0], &question[12..end]].concat();
    if answers == 1 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 30, 0, 4]);
        answer.extend(address);
    }
    answer
}

/// resolv.conf of a world: where the environment's ids, which are not the user's, can read it.
struct Resolver(PathBuf);

impl Resolver {
    fn new(name: &str, server: &NameServer) -> Self {
        let directory = PathBuf::from(format!("/tmp/casemate-{name}-{}", std::process::id()));
        fs::create_dir(&directory).expect("directory");
        casemate_tests::set_mode(&directory, 0o755);
        let resolver = Self(directory);
        resolver.set(server);
        resolver
    }

    fn path(&self) -> PathBuf {
        self.0.join("resolv.conf")
    }

    fn set(&self, server: &NameServer) {
        let new = self.0.join("new");
        let SocketAddr::V4(address) = server.0 else { panic!("IPv4") };
        fs::write(&new, format!("nameserver [{}]:{}\n", address.ip(), address.port())).expect("written");
        fs::rename(new, self.path()).expect("renamed");
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A port that nobody listens on.
fn free_port() -> u16 {
    listen("127.0.0.1").1
}

fn build(world: &World, name: &str, runtime: &str) {
    world.write_manifest(&format!("[runtime]\n{runtime}"));
    world.run(&["build", name, "--manifest", &world.manifest()]);
}

fn inside(world: &World, arguments: &[&str], script: &str) -> String {
    let mut all = arguments.to_vec();
    all.extend(["--", "bash", "-c", script]);
    let output = world.exec(&all);
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

/// Send a datagram and print what comes back within 10 s.
fn datagram(family: &str, address: &str, port: u16) -> String {
    format!(
        "perl -MSocket -e '$f = {family}; socket(S, $f, SOCK_DGRAM, 0) or die; $p = Socket::inet_pton($f, \"{address}\"); \
         $a = $f == AF_INET ? sockaddr_in({port}, $p) : Socket::pack_sockaddr_in6({port}, $p); \
         send(S, \"olleh\", 0, $a) or die \"send: $!\"; alarm 10; recv(S, $b, 99, 0); print $b'"
    )
}

/// An echo request by a socket that needs no rights; its answer is type 0.
fn ping(address: &str) -> String {
    format!(
        "perl -MSocket -e 'socket(S, PF_INET, SOCK_DGRAM, 1) or die \"socket: $!\"; \
         connect(S, sockaddr_in(0, inet_aton(\"{address}\"))) or die \"connect: $!\"; \
         send(S, pack(\"CCnnn\", 8, 0, 0, 1, 1) . \"casemate\", 0) or die \"send: $!\"; \
         alarm 10; recv(S, $b, 99, 0); print \"type \", unpack(\"C\", $b)'"
    )
}

/// Accept one connection on a port inside and say hello.
fn serve_inside(world: &World, port: u16) -> Child {
    let script = format!(
        "perl -MIO::Socket::INET -e '$l = IO::Socket::INET->new(Listen => 5, LocalPort => {port}, ReuseAddr => 1) or die \"listen: $!\"; \
         $SIG{{PIPE}} = \"IGNORE\"; while ($c = $l->accept) {{ print $c \"hello\\n\"; close $c }}'"
    );
    world
        .casemate(&["exec", "--root", "net", "--", "bash", "-c", &script])
        .stdout(Stdio::null())
        .spawn()
        .expect("casemate")
}

fn greeted(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    let mut greeting = String::new();
    // Where nobody listens inside, the connection is made and then reset.
    stream.read_to_string(&mut greeting).is_ok() && greeting == "hello\n"
}

#[test]
fn a_private_network() {
    let first = NameServer::start([192, 0, 2, 77]);
    let resolver = Resolver::new("private", &first);
    let world = World::with(&[("CASEMATE_RESOLVER", resolver.path().to_str().expect("UTF-8"))]);
    world.run(&["release", "fetch", "debian/bookworm"]);
    let (tcp, udp) = (free_port(), free_port());
    build(&world, "net", &format!("ports = [\"{tcp}:80\", \"127.0.0.1:{udp}:{udp}/udp\"]\n"));
    world.run(&["start", "net"]);
    outgoing(&world);
    out_of_reach(&world);
    names(&world, &resolver);
    published(&world, tcp, udp);
}

fn outgoing(world: &World) {
    let (listener, port) = listen(HOST);
    greet(listener);
    assert_eq!(inside(world, &["net"], &format!("cat < /dev/tcp/{HOST}/{port}")), "hello\n");
    assert_eq!(inside(world, &["--root", "net"], &format!("cat < /dev/tcp/{HOST}/{port}")), "hello\n");
    assert_eq!(inside(world, &["net"], &datagram("AF_INET", HOST, echo(HOST))), "hello");
    assert_eq!(inside(world, &["net"], &ping(HOST)), "type 0");
    assert_eq!(inside(world, &["--root", "net"], &ping(HOST)), "type 0");
    let routes = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    let is_default =
        |line: &str| line.starts_with(&format!("{} 00 ", "0".repeat(32))) && !line.ends_with(" lo");
    if routes.lines().any(is_default) {
        let (listener, port) = listen(HOST6);
        greet(listener);
        assert_eq!(inside(world, &["net"], &format!("cat < /dev/tcp/{HOST6}/{port}")), "hello\n");
        assert_eq!(inside(world, &["net"], &datagram("AF_INET6", HOST6, echo(HOST6))), "hello");
    } else {
        println!("this machine has no way out by IPv6: not tried");
    }
}

/// What the host says to itself alone.
fn out_of_reach(world: &World) {
    let gateway = inside(
        world,
        &["net"],
        "while read -r i d g rest; do [ $d = 00000000 ] && printf '%d.%d.%d.%d' 0x${g:6:2} 0x${g:4:2} 0x${g:2:2} 0x${g:0:2}; done < /proc/net/route",
    );
    gateway.parse::<IpAddr>().expect("a gateway");
    for own in ["127.0.0.1", "::1"] {
        let (listener, port) = listen(own);
        listener.set_nonblocking(true).expect("nonblocking");
        for address in ["127.0.0.1", "127.0.0.2", "::1", gateway.as_str(), HOST] {
            let script = format!("timeout 3 bash -c 'cat < /dev/tcp/{address}/{port}' && echo REACHED");
            assert!(!inside(world, &["net"], &script).contains("REACHED"), "{own} by {address}");
            let script = format!("timeout 3 {}", datagram("AF_INET", "127.0.0.1", echo("127.0.0.1")));
            assert!(!inside(world, &["net"], &script).contains("hello"), "a datagram");
        }
        assert!(listener.accept().is_err(), "somebody came to {own}");
    }
    use std::os::linux::net::SocketAddrExt;
    let name = format!("casemate-{}", std::process::id());
    let address = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("address");
    let _listener = std::os::unix::net::UnixListener::bind_addr(&address).expect("socket");
    let script = format!(
        "perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0) or die; connect(S, pack_sockaddr_un(\"\\0{name}\")) or die \"no: $!\"; print \"REACHED\"'"
    );
    let found = inside(world, &["net"], &script);
    assert!(found.contains("no: Connection refused"), "{found}");
    // Root inside has no say in it.
    let root = |script: &str| inside(world, &["--root", "net"], script);
    assert!(root("echo 1 > /proc/sys/net/ipv4/ip_forward").contains("Read-only"), "sysctl");
    let raw = "perl -MSocket -e 'socket(S, PF_INET, SOCK_RAW, 1) or die \"no: $!\"'";
    assert!(root(raw).contains("no: Operation not permitted"), "a raw socket");
}

fn names(world: &World, resolver: &Resolver) {
    let ask = |name: &str| inside(world, &["net"], &format!("getent ahostsv4 {name}"));
    assert!(ask("a.example").starts_with("192.0.2.77 "), "{}", ask("a.example"));
    assert!(ask("big.example").starts_with("192.0.2.77 "), "over TCP");
    let second = NameServer::start([192, 0, 2, 78]);
    resolver.set(&second);
    wait_for("the new name server", || ask("a.example").starts_with("192.0.2.78 "));
}

fn published(world: &World, tcp: u16, udp: u16) {
    let shown = world.run(&["show", "net"]);
    assert!(shown.contains(&format!("127.0.0.1:{tcp}:80/tcp")), "{shown}");
    // Port 80 is a low one, and root inside is nobody outside.
    let mut server = serve_inside(world, 80);
    wait_for("a published port", || greeted(tcp));
    assert!(TcpStream::connect((HOST, tcp)).is_err(), "published on loopback alone");
    server.kill().expect("kill");
    server.wait().expect("wait");
    // One number on both sides: Debian 12's pasta loses the answers of a UDP port that changes its number.
    let script = format!(
        "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(Proto => \"udp\", LocalPort => {udp}) or die \"$!\"; \
         while ($s->recv($b, 99)) {{ $s->send(scalar reverse $b) }}'"
    );
    let mut server = world.casemate(&["exec", "net", "--", "bash", "-c", &script]).spawn().expect("casemate");
    let socket = UdpSocket::bind("127.0.0.1:0").expect("socket");
    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("timeout");
    let mut buffer = [0; 99];
    wait_for("a published UDP port", || {
        socket.send_to(b"olleh", ("127.0.0.1", udp)).expect("sent");
        socket.recv(&mut buffer).is_ok_and(|size| &buffer[..size] == b"hello")
    });
    server.kill().expect("kill");
    server.wait().expect("wait");
}

#[test]
fn an_allow_list() {
    let first = NameServer::start([198, 51, 100, 1]);
    let resolver = Resolver::new("allow", &first);
    let world = World::with(&[("CASEMATE_RESOLVER", resolver.path().to_str().expect("UTF-8"))]);
    world.run(&["release", "fetch", "debian/bookworm"]);
    let ports: Vec<u16> = (0..3)
        .map(|_| {
            let (listener, port) = listen("0.0.0.0");
            greet(listener);
            port
        })
        .collect();
    let (by_address, by_name, never) = (ports[0], ports[1], ports[2]);
    let published = free_port();
    build(
        &world,
        "net",
        &format!(
            "ports = [\"{published}:80\"]\nallow = [\"{HOST}:{by_address}\", \"one.example:{by_name}\", \"*.all.example\"]\n"
        ),
    );
    assert!(world.run(&["show", "net"]).contains(&format!("one.example:{by_name}")));
    // What is open is open until the environment stops.
    world.run(&["start", "net"]);
    let user = |script: &str| inside(&world, &["net"], script);
    let open = |host: &str, port: u16| user(&format!("timeout 10 cat < /dev/tcp/{host}/{port}")) == "hello\n";
    assert_eq!(user(&format!("cat < /dev/tcp/{HOST}/{by_address}")), "hello\n");
    assert!(!open(HOST, by_name), "its name was not asked for yet");
    assert!(!open(HOST, never));
    let echo = echo(HOST);
    assert!(!user(&datagram("AF_INET", HOST, echo)).contains("hello"));
    assert!(!user(&ping(HOST)).contains("type 0"));
    assert!(
        !inside(&world, &["--root", "net"], &format!("timeout 10 cat < /dev/tcp/{HOST}/{never}"))
            .contains("hello")
    );

    assert_eq!(user("getent ahostsv4 other.example"), "");
    assert!(open("one.example", by_name));
    assert!(!open("one.example", never));
    let second = NameServer::start([198, 51, 100, 2]);
    resolver.set(&second);
    assert!(!open("198.51.100.2", by_name));
    wait_for("the name's new address", || open("one.example", by_name) && open("198.51.100.2", by_name));

    assert!(user("getent ahostsv4 x.all.example").starts_with("198.51.100.2 "));
    assert_eq!(user(&ping("198.51.100.2")), "type 0");
    assert_eq!(user(&datagram("AF_INET", "198.51.100.2", self::echo("198.51.100.2"))), "hello");
    assert!(!user(&ping(HOST)).contains("type 0"));

    // Root inside cannot so much as delete the table.
    let delete = "perl -MSocket -e 'socket(S, 16, SOCK_RAW, 12) or die \"no socket: $!\"; \
                  sub m { my ($k, $f, $s, $a, $r, $b) = @_; pack(\"LSSLL\", 20 + length $b, $k, $f, $s, 0) . pack(\"CCn\", $a, 0, $r) . $b } \
                  send(S, m(16, 1, 1, 0, 10, \"\") . m(10 << 8 | 2, 5, 2, 1, 0, pack(\"SS\", 13, 1) . \"casemate\\0\\0\\0\\0\") . m(17, 1, 3, 0, 10, \"\"), 0) or die \"no: $!\"; \
                  recv(S, $b, 999, 0); print \"error \", unpack(\"l\", substr $b, 16, 4)'";
    let answer = inside(&world, &["--root", "net"], delete);
    assert!(answer.contains("error -1") || answer.contains("no"), "{answer}");
    assert!(!open(HOST, never));

    // Whoever comes in by a published port is answered.
    let mut server = serve_inside(&world, 80);
    wait_for("a published port", || greeted(published));
    server.kill().expect("kill");
    server.wait().expect("wait");
}

/// Processes of the host whose command line has `part`.
fn processes(part: &str) -> Vec<String> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| text(&line).replace('\0', " ")).filter(|line| line.contains(part)).collect()
}

#[test]
fn pasta_lives_as_long_as_its_environment() {
    let mut world = World::with_release();
    let port = free_port();
    build(&world, "net", &format!("ports = [\"{port}:80\"]\n"));
    world.run(&["start", "net"]);
    let pasta = || processes(&format!("127.0.0.1/{port}:80")).len();
    assert_eq!(pasta(), 1);
    world.kill_daemon();
    assert_eq!(pasta(), 1, "it went with the daemon");
    world.start_daemon();
    let mut server = serve_inside(&world, 80);
    wait_for("a published port", || greeted(port));
    world.run(&["stop", "net"]);
    assert_eq!(pasta(), 0, "it is still there after the environment's end");
    server.wait().expect("wait");

    // The port is free at once; and init's death is enough, even without a daemon.
    world.run(&["start", "net"]);
    assert_eq!(pasta(), 1);
    let state = world.runtime().join(world.id("net")).join("state.toml");
    let state = fs::read_to_string(state).expect("what is remembered of an environment that runs");
    let pid = state.lines().find_map(|line| line.strip_prefix("pid = ")).expect("a pid").to_owned();
    world.kill_daemon();
    assert!(world.command("/bin/kill").args(["-9", &pid]).status().expect("kill").success());
    wait_for("pasta's end", || pasta() == 0);
    world.start_daemon();
}

#[test]
fn what_is_missing_or_taken_is_named() {
    let world = World::with(&[("PATH", "/nowhere")]);
    world.run(&["release", "fetch", "debian/bookworm"]);
    build(&world, "net", "");
    let refusal = world.refused(&["exec", "net", "--", "true"]);
    assert!(refusal.contains("pasta") && refusal.contains("install the package passt"), "{refusal}");
    let found = world.casemate(&["doctor"]).output().expect("casemate");
    assert!(text(&found.stdout).contains("install the package passt"), "{}", text(&found.stdout));
    drop(world);

    let world = World::with_release();
    let (_taken, port) = listen("127.0.0.1");
    build(&world, "net", &format!("ports = [\"{port}:80\"]\n"));
    let refusal = world.refused(&["exec", "net", "--", "true"]);
    assert!(refusal.contains(&format!("cannot publish TCP port 127.0.0.1:{port}")), "{refusal}");
    world.write_manifest("[runtime]\nports = [\"80:80\"]\n");
    let refusal = world.refused(&["build", "net", "--manifest", &world.manifest()]);
    assert!(refusal.contains("80 is below 1024"), "{refusal}");
}
