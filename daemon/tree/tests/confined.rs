//! The real workers in their sandboxes, with the user's real id ranges: files of many ids, modes that keep the user out, and
//! what only root of the namespace can do. Needs `casemate-unpack` beside `casemate-tree`: build both first.

use std::fs::File;
use std::io::{BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_store::listing::{Entry, Node, Owner, Reader};
use casemate_store::{Digest, Name, Store, StoreMode};
use casemate_worker::ids::IdMode;
use casemate_worker::protocol::{
    FailureKind, TreeRequest, TreeResult, UnpackLimits, UnpackRequest, UnpackResult,
};
use casemate_worker::spawn::{Limits, Spawner, Worker, WorkerError};

const LIMITS: Limits = Limits { time: Duration::from_secs(120), silence: Duration::from_secs(60) };

struct Fixture {
    home: tempfile::TempDir,
    store: Store,
    spawner: Spawner,
}

impl Fixture {
    fn new(single: bool) -> Self {
        let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        assert_ne!(uid, 0, "run as an ordinary user with a range in /etc/subuid");
        let name = std::env::var("USER").unwrap_or_default();
        let ids = if single {
            IdMode::Single { user: uid, group: gid, reason: "the test wants it".to_owned() }
        } else {
            IdMode::detect(&name, uid, gid)
        };
        let mode = match &ids {
            IdMode::Range { .. } => StoreMode::Range,
            IdMode::Single { reason, .. } => {
                assert!(single, "this user has no range of ids: {reason}");
                StoreMode::Single
            }
        };
        let libexec = Path::new(env!("CARGO_BIN_EXE_casemate-tree")).parent().unwrap().to_owned();
        assert!(libexec.join("casemate-unpack").exists(), "cargo build --release -p casemate-unpack");
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(&home.path().join("store"), mode).unwrap();
        Self { home, store, spawner: Spawner { libexec, ids, environment: Vec::new() } }
    }

    fn directory(&self) -> Vec<OwnedFd> {
        let null = File::options().write(true).open("/dev/null").unwrap();
        vec![self.store.directory().try_clone_to_owned().unwrap(), null.into()]
    }

    async fn tree(&self, request: TreeRequest) -> Result<TreeResult, WorkerError> {
        let (_keep, cancel) = tokio::sync::watch::channel(false);
        self.spawner.run(Worker::Tree, &request, self.directory(), LIMITS, &mut |_| (), cancel).await
    }

    async fn unpack(&self, job: &str, archive: &[u8]) -> Result<String, WorkerError> {
        let staging = self.store.staging(&job.parse().unwrap()).unwrap();
        let tree: Name = "tree".parse().unwrap();
        let path = staging.relative(Some(&tree));
        self.tree(TreeRequest::Prepare { path: path.clone(), children: Vec::new() }).await?;
        let mut input = tempfile::tempfile().unwrap();
        input.write_all(archive).unwrap();
        let descriptors = vec![staging.open_child(&tree).unwrap(), input.into(), staging.spool().unwrap()];
        let request = UnpackRequest::Image { limits: UnpackLimits::default() };
        let (_keep, cancel) = tokio::sync::watch::channel(false);
        let _: UnpackResult =
            self.spawner.run(Worker::Unpack, &request, descriptors, LIMITS, &mut |_| (), cancel).await?;
        Ok(path)
    }

    async fn import(&self, job: &str, archive: &[u8]) -> Digest {
        let path = self.unpack(job, archive).await.unwrap();
        let TreeResult::Ingested { digest, .. } = self.tree(TreeRequest::Ingest { path }).await.unwrap()
        else {
            panic!()
        };
        digest.parse().unwrap()
    }

    fn listing(&self, digest: &Digest) -> Vec<Entry> {
        let file = File::open(self.store.layer_path(digest).join("listing")).unwrap();
        let mut reader = Reader::new(BufReader::new(file)).unwrap();
        let mut entries = Vec::new();
        while let Some(entry) = reader.read().unwrap() {
            entries.push(entry);
        }
        entries
    }

    async fn verify(&self, digest: &Digest) -> Vec<String> {
        match self.tree(TreeRequest::Verify { layer: digest.to_string() }).await.unwrap() {
            TreeResult::Verified { damage, .. } => damage,
            other => panic!("{other:?}"),
        }
    }

    /// As `purge` does it: what belongs to other ids, only the worker can remove.
    async fn purge(self) {
        let mut paths: Vec<String> = Vec::new();
        for directory in ["objects", "layers", "uppers", "staging"] {
            for entry in std::fs::read_dir(self.store.root().join(directory)).unwrap() {
                paths.push(format!("{directory}/{}", entry.unwrap().file_name().to_str().unwrap()));
            }
        }
        self.tree(TreeRequest::Remove { paths }).await.unwrap();
        drop(self.store);
        let path: PathBuf = self.home.keep();
        std::fs::remove_dir_all(path).unwrap();
    }
}

fn header(kind: u8, name: &str, mode: u32, owner: (u32, u32), size: usize, link: &str) -> Vec<u8> {
    let mut block = [0u8; 512];
    let mut put = |at: usize, text: &[u8]| block[at..at + text.len()].copy_from_slice(text);
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}").as_bytes());
    put(108, format!("{:07o}", owner.0).as_bytes());
    put(116, format!("{:07o}", owner.1).as_bytes());
    put(124, format!("{size:011o}").as_bytes());
    put(136, format!("{:011o}", 1_700_000_000).as_bytes());
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block.to_vec()
}

/// A tree with files of several ids, the user's own number among them, and with modes that keep everybody out.
fn archive(user: u32, group: u32) -> Vec<u8> {
    let capability = b"36 SCHILY.xattr.security.capability=";
    // VFS_CAP_REVISION_2, effective: cap_net_raw.
    let value = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let length = capability.len() + value.len() + 1;
    let record = [format!("{length} SCHILY.xattr.security.capability=").as_bytes(), &value, b"\n"].concat();
    assert_eq!(record.len(), length);
    let mut padded = record.clone();
    padded.resize(512, 0);
    let content = |bytes: &[u8]| {
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(512), 0);
        padded
    };
    [
        header(b'5', "./", 0o755, (0, 0), 0, ""),
        header(b'0', "./root", 0o600, (0, 0), 4, ""),
        content(b"root"),
        header(b'0', "./daemon", 0o4711, (1, 2), 6, ""),
        content(b"daemon"),
        header(b'0', "./same-number", 0o600, (user, group), 4, ""),
        content(b"same"),
        header(b'0', "./nobody", 0o644, (65534, 65534), 0, ""),
        header(b'0', "./last", 0o644, (65535, 65535), 0, ""),
        header(b'5', "./closed", 0o000, (33, 33), 0, ""),
        header(b'5', "./closed/more", 0o000, (33, 0), 0, ""),
        header(b'0', "./closed/more/file", 0o000, (33, 33), 6, ""),
        content(b"closed"),
        header(b'2', "./link", 0o777, (33, 34), 0, "closed/more"),
        header(b'6', "./fifo", 0o600, (33, 34), 0, ""),
        header(b'x', "pax", 0o644, (0, 0), record.len(), ""),
        padded,
        header(b'0', "./ping", 0o755, (0, 0), 0, ""),
        vec![0; 1024],
    ]
    .concat()
}

#[tokio::test]
async fn files_of_every_id() {
    let fixture = Fixture::new(false);
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let archive = archive(user, group);
    let digest = fixture.import("one", &archive).await;
    let entries = fixture.listing(&digest);
    let node = |path: &str| &entries.iter().find(|entry| entry.path == path.as_bytes()).unwrap().node;
    let owner = |path: &str| match node(path) {
        Node::File { meta, .. }
        | Node::Directory { meta, .. }
        | Node::Symlink { meta, .. }
        | Node::Fifo { meta } => (meta.mode, meta.uid, meta.gid),
        other => panic!("{other:?}"),
    };
    let id = |uid, gid| (Owner::Id(uid), Owner::Id(gid));
    let expect = |path: &str, mode: u16, (uid, gid)| assert_eq!(owner(path), (mode, uid, gid), "{path}");
    expect("root", 0o600, id(0, 0));
    expect("daemon", 0o4711, id(1, 2));
    expect("nobody", 0o644, id(65534, 65534));
    expect("last", 0o644, id(65535, 65535));
    expect("closed", 0, id(33, 33));
    expect("closed/more", 0, id(33, 0));
    expect("closed/more/file", 0, id(33, 33));
    expect("link", 0o777, id(33, 34));
    expect("fifo", 0o600, id(33, 34));
    // The image's user of the user's own number is not the user.
    expect("same-number", 0o600, id(user, group));
    let tree = fixture.store.layer_path(&digest).join("tree");
    let on_host = |path: &str| tree.join(path).symlink_metadata().unwrap().uid();
    assert!(on_host("same-number") != user && on_host("root") != user && on_host("root") != 0);
    assert_eq!(on_host("same-number") - on_host("root"), user);
    let Node::File { meta, .. } = node("ping") else { panic!() };
    assert_eq!(meta.xattrs[0].name, b"security.capability");
    assert_eq!(meta.xattrs[0].value[3], 2, "told as the environment's root sees it");
    assert_eq!(fixture.verify(&digest).await, [""; 0]);
    // The second time, all of it is known.
    assert_eq!(fixture.import("two", &archive).await, digest);
    // Copied, owners and capabilities are as they were.
    let to = "uppers/00112233445566778899aabbccddeeff/upper".to_owned();
    let copy = TreeRequest::Copy { from: format!("layers/{digest}/tree"), to: to.clone() };
    let TreeResult::Copied { .. } = fixture.tree(copy).await.unwrap() else { panic!() };
    let TreeResult::Ingested { digest: of_copy, .. } =
        fixture.tree(TreeRequest::Ingest { path: to }).await.unwrap()
    else {
        panic!()
    };
    assert_eq!(of_copy, digest.to_string());
    fixture.purge().await;
}

#[tokio::test]
async fn digests_do_not_depend_on_the_ids_behind() {
    // The user's own files, made by the daemon's user in an upper, are `user` in the listing.
    let fixture = Fixture::new(false);
    let staging = fixture.store.staging(&"own".parse().unwrap()).unwrap();
    let path = staging.relative(Some(&"tree".parse().unwrap()));
    std::fs::create_dir(staging.path().join("tree")).unwrap();
    std::fs::write(staging.path().join("tree/mine"), "mine").unwrap();
    let TreeResult::Ingested { digest, .. } = fixture.tree(TreeRequest::Ingest { path }).await.unwrap()
    else {
        panic!()
    };
    let entries = fixture.listing(&digest.parse().unwrap());
    for entry in &entries {
        let (Node::Directory { meta, .. } | Node::File { meta, .. }) = &entry.node else { panic!() };
        assert_eq!((meta.uid, meta.gid), (Owner::User, Owner::User));
    }
    fixture.purge().await;
}

#[tokio::test]
async fn with_one_id_only() {
    let fixture = Fixture::new(true);
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let archive = archive(user, group);
    let digest = fixture.import("one", &archive).await;
    for entry in fixture.listing(&digest) {
        if let Node::File { meta, .. } | Node::Directory { meta, .. } = &entry.node {
            assert_eq!((meta.uid, meta.gid), (Owner::Id(0), Owner::Id(0)), "{:?}", entry.path);
        }
    }
    assert_eq!(fixture.verify(&digest).await, [""; 0]);
    fixture.purge().await;
}

#[tokio::test]
async fn a_refusal_comes_through() {
    let fixture = Fixture::new(false);
    let evil = [header(b'0', "../evil", 0o644, (0, 0), 0, ""), vec![0; 1024]].concat();
    let Err(WorkerError::Failed { failure, .. }) = fixture.unpack("one", &evil).await else { panic!() };
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(failure.message.contains("'../evil'"), "{failure:?}");
    assert_eq!(std::fs::read_dir(fixture.store.root().join("staging/one/tree")).unwrap().count(), 0);
    // Records are out of the tree worker's sight, whatever it is asked for.
    std::fs::write(fixture.store.root().join("environments/x"), "").unwrap();
    let remove = TreeRequest::Remove { paths: vec!["staging/../environments/x".to_owned()] };
    let Err(WorkerError::Failed { failure, .. }) = fixture.tree(remove).await else { panic!() };
    assert_eq!(failure.kind, FailureKind::Request);
    fixture.purge().await;
}
