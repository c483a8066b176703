//! A mirror on loopback, over TLS: the real one's files, fetched by apt as this machine reaches it, of which any may be
//! changed on its way, or be elsewhere.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

/// What is done to a body.
type Change = dyn Fn(&str, &mut Vec<u8>) + Send + Sync;
/// To where a request for a file is redirected, as the header has it, if it is.
type Redirect = dyn Fn(&str) -> Option<String> + Send + Sync;

pub struct Mirror {
    port: u16,
    directory: PathBuf,
}

struct Shared {
    upstream: String,
    directory: PathBuf,
    change: Box<Change>,
    redirect: Box<Redirect>,
    number: AtomicU32,
    tls: Arc<ServerConfig>,
}

/// The mirror that apt uses here for bookworm.
fn upstream() -> String {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"])
        .output()
        .expect("apt-get");
    let targets = crate::text(&output.stdout);
    let mirror = targets.lines().find_map(|line| line.strip_prefix("bookworm "));
    mirror.expect("a mirror of bookworm in apt's sources").trim_end_matches('/').to_owned()
}

impl Mirror {
    pub fn start(change: impl Fn(&str, &mut Vec<u8>) + Send + Sync + 'static) -> Self {
        Self::with(Box::new(change), Box::new(|_| None))
    }

    /// What it is asked for is what stands behind `/debian/`; what it has is found by what follows `dists/` or `pool/`, whatever
    /// stands before.
    pub fn redirecting(redirect: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::with(Box::new(|_, _| ()), Box::new(redirect))
    }

    fn with(change: Box<Change>, redirect: Box<Redirect>) -> Self {
        let key = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("certificate");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(
                vec![key.cert.der().clone()],
                PrivatePkcs8KeyDer::from(key.signing_key.serialize_der()).into(),
            )
            .expect("server");
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let port = listener.local_addr().expect("address").port();
        let home = PathBuf::from(std::env::var_os("HOME").expect("HOME"));
        let directory = home.join(format!("casemate-tests/mirror-{}-{port}", std::process::id()));
        fs::create_dir_all(&directory).expect("directory");
        fs::write(directory.join("ca.pem"), key.cert.pem()).expect("certificate");
        let shared = Arc::new(Shared {
            upstream: upstream(),
            directory: directory.clone(),
            change,
            redirect,
            number: AtomicU32::new(0),
            tls: Arc::new(tls),
        });
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                // A client that breaks off is its own affair.
                std::thread::spawn(move || drop(serve(&shared, stream)));
            }
        });
        Self { port, directory }
    }

    pub fn certificate(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// Host and port.
    pub fn authority(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// A source that knows this mirror alone, and the keys of Debian's.
    pub fn source(&self, keys: &Path) -> String {
        let keys = fs::read_dir(keys).expect("keys");
        let keys: Vec<String> = keys.map(|key| format!("{:?}", key.expect("key").path())).collect();
        format!(
            "kind = \"debian-archive\"\nmirrors = [\"https://{}/debian\"]\nkeyring = [{}]\nsuites = [\"bookworm\"]\ncomponent = \"main\"\ninclude = [\"apt\", \"ca-certificates\"]\n",
            self.authority(),
            keys.join(", ")
        )
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn serve(shared: &Shared, stream: TcpStream) -> std::io::Result<()> {
    let connection = ServerConnection::new(Arc::clone(&shared.tls)).map_err(std::io::Error::other)?;
    let mut stream = BufReader::new(StreamOwned::new(connection, stream));
    let mut request = String::new();
    stream.read_line(&mut request)?;
    let mut line = String::new();
    while stream.read_line(&mut line)? > 2 {
        line.clear();
    }
    let path = request.split(' ').nth(1).and_then(|path| path.strip_prefix("/debian/")).unwrap_or("nothing");
    if let Some(location) = (shared.redirect)(path) {
        let answer = stream.get_mut();
        write!(
            answer,
            "HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )?;
        answer.conn.send_close_notify();
        return answer.flush();
    }
    let path = ["dists/", "pool/"].iter().find_map(|start| path.find(start)).map_or(path, |at| &path[at..]);
    let file = shared.directory.join(shared.number.fetch_add(1, Ordering::Relaxed).to_string());
    let found = Command::new("/usr/lib/apt/apt-helper")
        .args(["-q", "download-file"])
        .arg(format!("{}/{path}", shared.upstream))
        .arg(&file)
        .output()?
        .status
        .success();
    let answer = stream.get_mut();
    if found {
        let mut body = fs::read(&file)?;
        fs::remove_file(&file)?;
        (shared.change)(path, &mut body);
        write!(answer, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
        answer.write_all(&body)?;
    } else {
        answer.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    }
    answer.conn.send_close_notify();
    answer.flush()
}
