//! The way out: proxies and certificates as the user's variables say.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use casemate_tests::World;
use casemate_tests::mirror::Mirror;

/// A proxy that knows CONNECT alone, and notes to where.
struct Proxy {
    url: String,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let url = format!("http://{}", listener.local_addr().expect("address"));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let noted = Arc::clone(&noted);
                // Either side breaking off is that side's affair.
                std::thread::spawn(move || drop(connect(&noted, stream)));
            }
        });
        Self { url, asked }
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().expect("one at a time").clone()
    }
}

fn connect(noted: &Mutex<Vec<String>>, client: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(client.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let target = request.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
    noted.lock().expect("one at a time").push(target.to_owned());
    let server = TcpStream::connect(target)?;
    let (mut to_client, mut to_server) = (client, server.try_clone()?);
    to_client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut reader, &mut to_server);
        let _ = to_server.shutdown(std::net::Shutdown::Write);
    });
    std::io::copy(&mut &server, &mut to_client)?;
    to_client.shutdown(std::net::Shutdown::Write)
}

/// Serves a release index that is refused only once it has arrived.
fn mirror() -> Mirror {
    Mirror::start(|_, body| body.iter_mut().for_each(|byte| *byte ^= 1))
}

fn refusal(mirror: &Mirror, variables: &[(&str, &str)]) -> String {
    let world = World::with(variables);
    world.know_only(mirror);
    world.refused(&["release", "fetch", "debian/bookworm"])
}

const ARRIVED: &str = "verification failed: InRelease";

#[test]
fn proxies_and_their_exceptions() {
    let mirror = mirror();
    let certificate = mirror.certificate().display().to_string();
    let trusted = ("SSL_CERT_FILE", certificate.as_str());
    let proxy = Proxy::start();
    let error = refusal(&mirror, &[trusted, ("https_proxy", &proxy.url)]);
    assert!(error.contains(ARRIVED), "{error}");
    let asked = proxy.asked();
    assert!(!asked.is_empty() && asked.iter().all(|target| *target == mirror.authority()), "{asked:?}");

    let spared = Proxy::start();
    let error =
        refusal(&mirror, &[trusted, ("https_proxy", &spared.url), ("no_proxy", "example.org,localhost")]);
    assert!(error.contains(ARRIVED), "{error}");
    assert_eq!(spared.asked(), Vec::<String>::new());

    // A proxy that is not there is not gone around.
    let nowhere = TcpListener::bind("127.0.0.1:0").expect("loopback").local_addr().expect("address");
    let error = refusal(&mirror, &[trusted, ("https_proxy", &format!("http://{nowhere}"))]);
    assert!(!error.contains(ARRIVED) && error.contains("InRelease"), "{error}");
}

#[test]
fn certificates() {
    let mirror = mirror();
    let certificate = mirror.certificate().display().to_string();
    let error = refusal(&mirror, &[("SSL_CERT_FILE", &certificate)]);
    assert!(error.contains(ARRIVED), "{error}");
    // One that nobody vouches for: the system's certificates do not know it, and neither do another mirror's.
    let stranger = self::mirror();
    let other = stranger.certificate().display().to_string();
    for variables in [&[][..], &[("SSL_CERT_FILE", other.as_str())]] {
        let error = refusal(&mirror, variables);
        assert!(!error.contains(ARRIVED) && error.contains("certificate"), "{error}");
    }
}
