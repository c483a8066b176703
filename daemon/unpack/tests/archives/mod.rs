//! Archives written byte by byte, so that they can be wrong in any way, and a place to unpack them.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use casemate_worker::protocol::{Failure, Slice, UnpackLimits, UnpackRequest, UnpackResult};

/// A tar archive in the making.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

/// One header, to be bent out of shape.
#[derive(Clone)]
pub struct Header(pub [u8; 512]);

pub fn octal(value: u64, width: usize) -> Vec<u8> {
    format!("{value:0width$o}\0", width = width - 1).into_bytes()
}

impl Header {
    pub fn new(kind: u8, name: &[u8]) -> Self {
        let mut header = Self([0; 512]);
        header.put(0, &name[..name.len().min(100)]);
        let mode = if kind == b'5' { 0o755 } else { 0o644 };
        header.put(100, &octal(mode, 8)).put(108, &octal(0, 8)).put(116, &octal(0, 8));
        header.put(124, &octal(0, 12)).put(136, &octal(1_700_000_000, 12));
        header.0[156] = kind;
        header.put(257, b"ustar\x0000").put(329, &octal(0, 8)).put(337, &octal(0, 8));
        header
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn gnu(mut self) -> Self {
        self.put(257, b"ustar  \0");
        self
    }

    pub fn old(mut self) -> Self {
        self.0[257..].fill(0);
        self
    }

    pub fn size(mut self, size: u64) -> Self {
        self.put(124, &octal(size, 12));
        self
    }

    pub fn mode(mut self, mode: u64) -> Self {
        self.put(100, &octal(mode, 8));
        self
    }

    pub fn link(mut self, target: &[u8]) -> Self {
        self.put(157, target);
        self
    }

    pub fn with(mut self, at: usize, bytes: &[u8]) -> Self {
        self.put(at, bytes);
        self
    }

    pub fn sealed(mut self) -> [u8; 512] {
        self.put(148, b"        ");
        let sum: u64 = self.0.iter().map(|&b| u64::from(b)).sum();
        self.put(148, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

impl Tar {
    pub fn new() -> Self {
        Self::default()
    }

    /// A header as it is, then data and padding.
    pub fn raw(mut self, header: Header, data: &[u8]) -> Self {
        self.0.extend(header.sealed());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn file(self, name: &[u8], data: &[u8]) -> Self {
        self.raw(Header::new(b'0', name).size(data.len() as u64), data)
    }

    pub fn directory(self, name: &[u8]) -> Self {
        self.raw(Header::new(b'5', name), b"")
    }

    pub fn symlink(self, name: &[u8], target: &[u8]) -> Self {
        self.raw(Header::new(b'2', name).mode(0o777).link(target), b"")
    }

    pub fn hardlink(self, name: &[u8], target: &[u8]) -> Self {
        self.raw(Header::new(b'1', name).link(target), b"")
    }

    pub fn pax(self, records: &[(&[u8], &[u8])]) -> Self {
        let data: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        self.raw(Header::new(b'x', b"PaxHeaders/x").size(data.len() as u64), &data)
    }

    pub fn long(self, kind: u8, name: &[u8]) -> Self {
        let data = [name, b"\0"].concat();
        self.raw(Header::new(kind, b"././@LongLink").gnu().size(data.len() as u64), &data)
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Xz,
    Zstd,
    Bzip2,
}

pub const COMPRESSIONS: [Compression; 5] =
    [Compression::None, Compression::Gzip, Compression::Xz, Compression::Zstd, Compression::Bzip2];

pub fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Xz => {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        Compression::Bzip2 => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
    }
}

pub fn limits() -> UnpackLimits {
    UnpackLimits { bytes: 1 << 30, members: 100_000, ratio: 200, depth: 256, decoder_memory: 64 << 20 }
}

/// A directory to unpack into, with something beside it that must not change.
pub struct Place {
    home: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("root")).unwrap();
        std::fs::write(home.path().join("secret"), "secret").unwrap();
        Self { home }
    }

    pub fn root(&self) -> PathBuf {
        self.home.path().join("root")
    }

    pub fn home(&self) -> &Path {
        self.home.path()
    }

    pub fn unpack(&self, archive: &[u8], limits: UnpackLimits) -> Result<UnpackResult, Failure> {
        self.run(archive, &UnpackRequest::Image { limits })
    }

    pub fn packages(&self, packages: &[(&str, Vec<u8>)]) -> Result<UnpackResult, Failure> {
        let mut all = Vec::new();
        let mut items = Vec::new();
        for (name, bytes) in packages {
            let (offset, length) = (all.len() as u64, bytes.len() as u64);
            items.push(Slice { name: (*name).to_owned(), offset, length });
            all.extend(bytes);
        }
        self.run(&all, &UnpackRequest::Packages { items, limits: limits() })
    }

    fn run(&self, input: &[u8], request: &UnpackRequest) -> Result<UnpackResult, Failure> {
        let mut archive = tempfile::tempfile().unwrap();
        archive.write_all(input).unwrap();
        let spool = tempfile::tempfile_in(self.home()).unwrap();
        let root = File::open(self.root()).unwrap();
        casemate_unpack::work(root.into(), archive, spool, request, &mut |_, _| ())
    }

    /// Nothing was extracted, and nothing beside was touched.
    pub fn untouched(&self) -> bool {
        let empty = std::fs::read_dir(self.root()).unwrap().next().is_none();
        let mut beside: Vec<_> =
            std::fs::read_dir(self.home()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        beside.sort();
        empty
            && beside == ["root", "secret"]
            && std::fs::read(self.home().join("secret")).unwrap() == b"secret"
    }
}

/// A Debian package around a `data.tar`.
pub fn deb(data: &[u8]) -> Vec<u8> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", &b"2.0\n"[..]), ("control.tar", b""), ("data.tar", data)] {
        writeln!(bytes, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, content.len()).unwrap();
        bytes.extend(content);
        bytes.resize(bytes.len().next_multiple_of(2), b'\n');
    }
    bytes
}
