//! A small archive of packages made for a test, over plain HTTP on loopback, as apt takes it where it is told to trust it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Archive {
    port: u16,
    directory: tempfile::TempDir,
}

fn output(command: &mut Command) -> String {
    let output = command.env("LC_ALL", "C").output().expect("a command of dpkg's or coreutils'");
    assert!(output.status.success(), "{command:?}: {}", crate::text(&output.stderr));
    crate::text(&output.stdout)
}

impl Archive {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let port = listener.local_addr().expect("address").port();
        let directory = tempfile::tempdir().expect("directory");
        let served = directory.path().to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                // A client that breaks off is its own affair.
                std::thread::spawn(move || drop(serve(&served, stream)));
            }
        });
        let archive = Self { port, directory };
        archive.index(&[]);
        archive
    }

    /// Its line in `sources.list`.
    pub fn source(&self) -> String {
        format!("deb [trusted=yes] http://localhost:{}/ ./", self.port)
    }

    /// Packages of this name and maintainer script (`postinst`), and nothing else in it.
    pub fn offer(&self, packages: &[(&str, &str)]) {
        let built: Vec<PathBuf> = packages.iter().map(|(name, script)| self.build(name, script)).collect();
        self.index(&built);
    }

    fn build(&self, name: &str, script: &str) -> PathBuf {
        let tree = self.directory.path().join(format!("{name}.tree"));
        let control = tree.join("DEBIAN");
        fs::create_dir_all(&control).expect("directory");
        let text = format!(
            "Package: {name}\nVersion: 1.0\nArchitecture: all\nMaintainer: Tests <tests@casemate.example>\nDescription: a test\n"
        );
        fs::write(control.join("control"), text).expect("control");
        fs::write(control.join("postinst"), script).expect("script");
        crate::set_mode(&control.join("postinst"), 0o755);
        let package = self.directory.path().join(format!("{name}_1.0_all.deb"));
        output(Command::new("dpkg-deb").args(["--root-owner-group", "--build"]).arg(&tree).arg(&package));
        package
    }

    fn index(&self, packages: &[PathBuf]) {
        let hash = |path: &Path| {
            let line = output(Command::new("sha256sum").arg(path));
            line.split(' ').next().expect("a hash").to_owned()
        };
        let mut text = String::new();
        for package in packages {
            text += &output(Command::new("dpkg-deb").arg("--field").arg(package));
            let name = package.file_name().expect("a name").display();
            let size = fs::metadata(package).expect("a package").len();
            text += &format!("Filename: ./{name}\nSize: {size}\nSHA256: {}\n\n", hash(package));
        }
        let index = self.directory.path().join("Packages");
        fs::write(&index, &text).expect("index");
        let date = output(Command::new("date").args(["--utc", "--rfc-email"]));
        let release = format!("Date: {date}SHA256:\n {} {} Packages\n", hash(&index), text.len());
        fs::write(self.directory.path().join("Release"), release).expect("index");
    }
}

impl Default for Archive {
    fn default() -> Self {
        Self::new()
    }
}

fn serve(directory: &Path, mut stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let name = request.split(' ').nth(1).and_then(|path| path.rsplit('/').next()).unwrap_or_default();
    match fs::read(directory.join(name)) {
        Ok(body) => {
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
            stream.write_all(&body)
        }
        Err(_) => {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        }
    }
}
