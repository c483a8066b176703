//! Releases: fetched from a signed Debian archive, or imported from an archive file.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use casemate_sandbox::plan::{Account, Ids, Mount, Network, Plan, Root};
use casemate_store::{Name, ReleaseName};
use casemate_worker::protocol::{
    FetchItem, FetchRequest, IndexRequest, Package, PackagesIndex, ReleaseIndex, Slice, TreeRequest,
    UnpackLimits, UnpackRequest,
};
use rustix::fs::FileType;

use crate::configuration::{self, SourceDefinition, SourceFile};
use crate::downloads::{self, Downloads, Expected};
use crate::error::Error;
use crate::jobs::{Job, now};
use crate::layers::Pins;
use crate::packages;
use crate::records::{Lower, ReleasePackage, ReleaseRecord};
use crate::sandboxes::Throwaway;
use crate::{Inner, mounts};

/// Most bytes of an `InRelease`; bookworm's has 150 KB.
const INRELEASE_MAX: u64 = 16 << 20;
/// Most bytes of a catalogue; a resolved base system has 40 KB.
const CATALOGUE_MAX: u64 = 16 << 20;
/// Downloads at a time: enough to hide a mirror's latency, few enough to be a polite guest.
pub const CONNECTIONS: u8 = 6;

/// Debian's name of this machine's architecture.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// A name as users write it: `debian/bookworm`, or `mine` for the imported `local/mine`.
pub fn parse_reference(text: &str) -> Result<ReleaseName, Error> {
    if text.contains('/') { Ok(text.parse()?) } else { Ok(format!("local/{text}").parse()?) }
}

/// The account that a sandbox has where nobody but root is needed.
pub fn nobody(inner: &Inner) -> Account {
    Account {
        name: "nobody".into(),
        uid: inner.uid,
        gid: inner.gid,
        home: "/".into(),
        shell: "/bin/sh".into(),
    }
}

impl Inner {
    pub(crate) fn plan_ids(&self) -> Ids {
        if self.range {
            Ids::Range { user: self.uid, group: self.gid }
        } else {
            Ids::Single { user: self.uid, group: self.gid }
        }
    }

    fn definition(&self, reference: &ReleaseName) -> Result<SourceDefinition, Error> {
        configuration::sources(&self.settings.configuration)?.remove(&reference.source).ok_or_else(|| Error::NotFound {
            what: "source",
            name: reference.source.to_string(),
            remedy: "add it to ~/.config/casemate/sources.d/, or import an archive with `casemate release import`",
        })
    }

    pub(crate) fn release_record(&self, reference: &ReleaseName) -> Result<Option<ReleaseRecord>, Error> {
        let records = self.store.releases::<ReleaseName, ReleaseRecord>();
        if !records.exists(reference)? {
            return Ok(None);
        }
        use casemate_store::Error as Store;
        match records.load(reference) {
            Ok(record) => Ok(Some(record)),
            Err(error @ (Store::Damaged { .. } | Store::Malformed { .. })) => {
                Err(crate::damaged("release", &reference.to_string(), &error.to_string()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What may be fetched: source and suite are known.
    pub(crate) fn check_fetchable(&self, reference: &ReleaseName) -> Result<(), Error> {
        let SourceFile::DebianArchive { suites, .. } = self.definition(reference)?.file;
        if suites.iter().any(|suite| suite == reference.release.as_str()) {
            return Ok(());
        }
        Err(Error::NotFound {
            what: "release",
            name: reference.to_string(),
            remedy: "its source does not list it under `suites` in sources.d/",
        })
    }

    pub(crate) async fn fetch(
        self: Arc<Self>,
        job: Job,
        reference: ReleaseName,
    ) -> Result<Vec<(String, String)>, Error> {
        let staging = self.store.staging(&staging_name(&job)?)?;
        let mut pins = self.pins();
        let outcome = self.fetch_in(&job, &reference, &staging, &mut pins).await;
        pins.release().await;
        self.drop_staging(&staging).await?;
        outcome
    }

    async fn fetch_in(
        &self,
        job: &Job,
        reference: &ReleaseName,
        staging: &casemate_store::Staging,
        pins: &mut Pins,
    ) -> Result<Vec<(String, String)>, Error> {
        let definition = self.definition(reference)?;
        let SourceFile::DebianArchive { mirrors, keyring, suites, component, include } = &definition.file;
        let suite = reference.release.as_str();
        let mut bases = Vec::new();
        for mirror in mirrors {
            if mirror == "apt" {
                // A mirror of another suite is one of the whole archive as a rule, so it is asked too, after those of this one.
                let others = suites.iter().map(String::as_str).filter(|other| *other != suite);
                let mut urls: Vec<String> = Vec::new();
                for suite in std::iter::once(suite).chain(others) {
                    let more = configuration::apt_mirrors(std::path::Path::new("/"), suite, component);
                    urls.extend(more.into_iter().filter(|url| !urls.contains(url)).collect::<Vec<_>>());
                }
                for url in urls {
                    // The encrypted form first; as the index is signed, the plain one will do where there is no other.
                    if let Some(rest) = url.strip_prefix("http://") {
                        bases.push(format!("https://{rest}"));
                    }
                    bases.push(url);
                }
            } else {
                bases.push(mirror.trim_end_matches('/').to_owned());
            }
        }
        if bases.is_empty() {
            return Err(Error::NotFound {
                what: "mirror of",
                name: reference.to_string(),
                remedy: "this host's apt has none; name mirrors in sources.d/",
            });
        }
        let known = self.release_record(reference)?;

        job.stage("reading the release index");
        let (file, served) = self
            .fetch_one(job, staging, &bases, &format!("dists/{suite}/InRelease"), None, INRELEASE_MAX)
            .await?;
        let request = IndexRequest::Release {
            keyring: configuration::keyring(&definition, keyring)?,
            now: now(),
            newest_seen: known.as_ref().map(|record| record.index_date),
            suite: suite.to_owned(),
            component: component.clone(),
            architecture: architecture().to_owned(),
        };
        let index: ReleaseIndex = self.workers.index(job, &request, vec![file.into()]).await?;
        job.log(&format!("index of {} signed by {}", index.codename, index.signer));
        if let Some(record) =
            known.as_ref().filter(|record| record.is_there() && record.index_sha256 == index.sha256)
        {
            return Ok(vec![
                ("release".into(), reference.to_string()),
                ("digest".into(), record.content()),
                ("changed".into(), "false".into()),
            ]);
        }

        job.stage("reading the package index");
        // What one mirror signed, the same mirror has; the others may be at another day.
        let base = served.strip_suffix(&format!("/dists/{suite}/InRelease")).unwrap_or(&served).to_owned();
        let mut from = vec![base.clone()];
        from.extend(bases.into_iter().filter(|other| *other != base));
        let path = match (index.acquire_by_hash, index.packages.path.rsplit_once('/')) {
            (true, Some((directory, _))) => {
                format!("dists/{suite}/{directory}/by-hash/SHA256/{}", index.packages.sha256)
            }
            _ => format!("dists/{suite}/{}", index.packages.path),
        };
        let (file, _) = self.fetch_one(job, staging, &from, &path, Some(index.packages.size), 0).await?;
        let request = IndexRequest::Packages {
            sha256: index.packages.sha256.clone(),
            size: index.packages.size,
            compression: index.packages.compression,
            architecture: architecture().to_owned(),
            include: include.clone(),
        };
        let catalogue = staging.spool()?;
        let copy = catalogue.try_clone().map_err(Error::io("read", "the catalogue"))?;
        let counts: PackagesIndex = self.workers.index(job, &request, vec![file.into(), catalogue]).await?;
        let chosen = read_catalogue(File::from(copy), &counts)?;

        job.stage("downloading packages");
        let expected: Vec<Expected> = chosen
            .iter()
            .map(|package| Expected {
                name: format!("package {}", package.filename),
                size: package.size,
                sha256: package.sha256.clone(),
            })
            .collect();
        let urls =
            |package: &Package| from.iter().map(|base| format!("{base}/{}", package.filename)).collect();
        let wanted = chosen
            .iter()
            .zip(&expected)
            .map(|(package, expected)| (urls(package), expected.clone()))
            .collect();
        self.download(job, staging, wanted).await?;

        job.stage("unpacking packages");
        let tree = "tree".parse::<Name>()?;
        let tree_path = staging.relative(Some(&tree));
        self.workers
            .tree(Some(job), &self.store, &TreeRequest::Prepare { path: tree_path.clone(), children: vec![] })
            .await?;
        let (downloads, spool, list) = (Arc::clone(&self.downloads), staging.spool()?, expected.clone());
        let (input, offsets) = blocking(move || downloads::concatenate(&downloads, &list, spool)).await?;
        let items = chosen
            .iter()
            .zip(&offsets)
            .map(|(package, offset)| Slice {
                name: package.name.clone(),
                offset: *offset,
                length: package.size,
            })
            .collect();
        let request = UnpackRequest::Packages { items, limits: UnpackLimits::default() };
        self.workers.unpack(job, &request, vec![staging.open_child(&tree)?, input, staging.spool()?]).await?;

        job.stage("configuring packages");
        let archives = staging.path().join("archives");
        make_open_directory(&archives)?;
        let files = chosen.iter().enumerate();
        let files = files.map(|(number, package)| archives.join(format!("{number:04}_{}.deb", package.name)));
        self.place(expected.into_iter().zip(files).collect()).await?;
        let plan = Plan {
            version: casemate_sandbox::plan::VERSION,
            id: staging_name(job)?.to_string(),
            hostname: suite.to_owned(),
            root: Root::Directory { source: mounts::own_source(&staging.path().join("tree"))? },
            ids: self.plan_ids(),
            user: nobody(self),
            write_account: false,
            network: Network::None,
            mounts: vec![Mount {
                source: mounts::own_source(&archives)?,
                target: "/run/casemate/packages".into(),
                read_only: true,
                no_exec: true,
            }],
            grants: casemate_sandbox::plan::Grants::default(),
            sudo: None,
            service: None,
            stop_signal: rustix::process::Signal::TERM.as_raw(),
            stop_timeout: 0,
            files: vec![],
            deny_unix_sockets: false,
            linger: true,
            born_in_group: false,
        };
        let source = [base.clone(), suite.to_owned(), component.clone()];
        self.run_script(job, &plan, packages::CONFIGURE_BASE, &source).await?;

        job.stage("storing");
        let (digest, bytes) = self.ingest(job, &tree_path, pins).await?;
        let record = ReleaseRecord {
            source: definition.name.to_string(),
            kind: "debian-archive".into(),
            patch_level: 0,
            architecture: architecture().into(),
            verification: format!("openpgp:{}", index.signer),
            index_date: index.date,
            index_sha256: index.sha256,
            added_at: now(),
            bytes,
            layers: vec![digest],
            packages: chosen
                .into_iter()
                .map(|p| ReleasePackage {
                    url: format!("{base}/{}", p.filename),
                    name: p.name,
                    version: p.version,
                    architecture: p.architecture,
                    sha256: p.sha256,
                    size: p.size,
                })
                .collect(),
        };
        self.commit_release(reference, record).await
    }

    pub(crate) async fn import(
        self: Arc<Self>,
        job: Job,
        reference: ReleaseName,
        archive: Archive,
    ) -> Result<Vec<(String, String)>, Error> {
        let staging = self.store.staging(&staging_name(&job)?)?;
        let mut pins = self.pins();
        let outcome = self.import_in(&job, &reference, &staging, archive, &mut pins).await;
        pins.release().await;
        self.drop_staging(&staging).await?;
        outcome
    }

    async fn import_in(
        &self,
        job: &Job,
        reference: &ReleaseName,
        staging: &casemate_store::Staging,
        archive: Archive,
        pins: &mut Pins,
    ) -> Result<Vec<(String, String)>, Error> {
        let archive = match archive {
            Archive::File(file) => file,
            Archive::Pipe(pipe) => {
                job.stage("reading the archive");
                tokio::select! {
                    file = spooled(job, pipe, staging) => file?,
                    () = job.cancelled() => return Err(Error::Cancelled),
                }
            }
        };
        job.stage("unpacking the archive");
        let tree = "tree".parse::<Name>()?;
        let tree_path = staging.relative(Some(&tree));
        self.workers
            .tree(Some(job), &self.store, &TreeRequest::Prepare { path: tree_path.clone(), children: vec![] })
            .await?;
        let request = UnpackRequest::Image { limits: UnpackLimits::default() };
        self.workers
            .unpack(job, &request, vec![staging.open_child(&tree)?, archive, staging.spool()?])
            .await?;
        job.stage("storing");
        let (digest, bytes) = self.ingest(job, &tree_path, pins).await?;
        let record = ReleaseRecord {
            source: reference.source.to_string(),
            kind: "file".into(),
            patch_level: 0,
            architecture: architecture().into(),
            verification: "unsigned".into(),
            index_date: 0,
            index_sha256: String::new(),
            added_at: now(),
            bytes,
            layers: vec![digest],
            packages: vec![],
        };
        self.commit_release(reference, record).await
    }

    async fn commit_release(
        &self,
        reference: &ReleaseName,
        record: ReleaseRecord,
    ) -> Result<Vec<(String, String)>, Error> {
        let replaced = self.release_record(reference)?.filter(ReleaseRecord::is_there);
        self.store.releases::<ReleaseName, ReleaseRecord>().commit(reference, &record)?;
        let result = vec![
            ("release".into(), reference.to_string()),
            ("digest".into(), record.content()),
            ("changed".into(), "true".into()),
        ];
        self.put_release(reference.clone(), record);
        if let Some(old) = replaced {
            self.drop_lowers(&Lower::layers(&old.layers)).await?;
        }
        Ok(result)
    }

    pub(crate) async fn remove(
        self: Arc<Self>,
        job: Job,
        reference: ReleaseName,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("removing");
        let records = self.store.releases::<ReleaseName, ReleaseRecord>();
        let mut record = match records.load(&reference) {
            // Neither its layers nor the date of its index are known any more.
            Err(casemate_store::Error::Damaged { .. } | casemate_store::Error::Malformed { .. }) => {
                records.remove(&reference)?;
                self.forget_release(&reference);
                return Ok(vec![("release".into(), reference.to_string())]);
            }
            other => other?,
        };
        let layers = std::mem::take(&mut record.layers);
        record.packages.clear();
        if record.index_date == 0 {
            records.remove(&reference)?;
        } else {
            records.commit(&reference, &record)?;
        }
        self.forget_release(&reference);
        self.drop_lowers(&Lower::layers(&layers)).await?;
        Ok(vec![("release".into(), reference.to_string())])
    }

    /// Make cached downloads appear at paths of ours.
    pub(crate) async fn place(&self, places: Vec<(Expected, PathBuf)>) -> Result<(), Error> {
        let downloads = Arc::clone(&self.downloads);
        blocking(move || places.iter().try_for_each(|(expected, to)| downloads.place(expected, to))).await
    }

    /// Run a script as root of a throwaway sandbox; anything but success is an error with its last words.
    pub(crate) async fn run_script(
        &self,
        job: &Job,
        plan: &Plan,
        script: &str,
        arguments: &[String],
    ) -> Result<Vec<u8>, Error> {
        let mut command =
            vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned(), "casemate".to_owned()];
        command.extend_from_slice(arguments);
        let throwaway = Throwaway { workers: &self.workers, runtime: &self.settings.runtime, job };
        let outcome = throwaway.run(plan, &command, packages::OUTPUT_MAX).await?;
        match outcome.status {
            casemate_sandbox::control::ExitStatus::Exit(0) => Ok(outcome.output),
            status => Err(Error::Package {
                message: format!(
                    "the package manager ended with {status:?}: {}",
                    outcome.last_lines.join(" | ")
                ),
            }),
        }
    }

    async fn fetch_one(
        &self,
        job: &Job,
        staging: &casemate_store::Staging,
        bases: &[String],
        path: &str,
        size: Option<u64>,
        limit: u64,
    ) -> Result<(File, String), Error> {
        let spool = staging.spool()?;
        let file = File::from(spool.try_clone().map_err(Error::io("read", path))?);
        let item = FetchItem {
            urls: bases.iter().map(|base| format!("{base}/{path}")).collect(),
            offset: 0,
            resume: 0,
            size,
            limit: size.unwrap_or(limit),
            plain_http: true,
        };
        let urls = item.urls.clone();
        let mut result = self.workers.fetch(job, &self.fetch_request(vec![item]), spool).await?;
        let fetched = result.items.pop().and_then(|fetched| usize::try_from(fetched.from).ok());
        // A URL of ours: where a server has sent us on to is its own affair, and no mirror's name.
        let url = fetched.and_then(|from| urls.into_iter().nth(from));
        Ok((
            file,
            url.ok_or_else(|| Error::Nonsense {
                worker: "casemate-fetch",
                answer: "with another item".into(),
            })?,
        ))
    }

    pub(crate) fn fetch_request(&self, items: Vec<FetchItem>) -> FetchRequest {
        FetchRequest {
            items,
            proxies: casemate_worker::protocol::Proxies {
                https: self.settings.https_proxy.clone(),
                http: self.settings.http_proxy.clone(),
                none: self.settings.no_proxy.clone(),
            },
            connections: CONNECTIONS,
        }
    }

    /// See that each file is in the cache, whole: what is not is downloaded, hashed by us, and put there.
    pub(crate) async fn download(
        &self,
        job: &Job,
        staging: &casemate_store::Staging,
        wanted: Vec<(Vec<String>, Expected)>,
    ) -> Result<(), Error> {
        let downloads = Arc::clone(&self.downloads);
        let missing = blocking(move || missing(&downloads, wanted)).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let mut items = Vec::with_capacity(missing.len());
        let mut offset = 0u64;
        for (urls, expected) in &missing {
            items.push(FetchItem {
                urls: urls.clone(),
                offset,
                resume: 0,
                size: Some(expected.size),
                limit: expected.size,
                plain_http: true,
            });
            // Sizes come from locks and indexes: what does not fit 64 bits fits no disk either.
            offset = offset.saturating_add(expected.size);
        }
        if offset > self.store.free_bytes()? {
            return Err(Error::Io {
                action: "download to",
                path: self.store.root().to_owned(),
                source: std::io::Error::new(
                    std::io::ErrorKind::StorageFull,
                    format!("{offset} bytes are needed"),
                ),
            });
        }
        let spool = staging.spool()?;
        let mut file = File::from(spool.try_clone().map_err(Error::io("read", "the downloads"))?);
        self.workers.fetch(job, &self.fetch_request(items), spool).await?;
        let downloads = Arc::clone(&self.downloads);
        blocking(move || {
            let mut offset = 0;
            for (_, expected) in &missing {
                downloads.put(&mut file, offset, expected)?;
                offset += expected.size;
            }
            Ok(())
        })
        .await
    }
}

/// What an archive is imported from.
pub enum Archive {
    File(OwnedFd),
    Pipe(OwnedFd),
}

impl Archive {
    pub fn of(descriptor: OwnedFd) -> Result<Self, Error> {
        let stat = rustix::fs::fstat(&descriptor).map_err(Error::sys("look at", "the archive"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(Self::File(descriptor)),
            FileType::Fifo => Ok(Self::Pipe(descriptor)),
            FileType::Directory => Err(Error::NoArchive { what: "a directory" }),
            FileType::Socket => Err(Error::NoArchive { what: "a socket" }),
            _ => Err(Error::NoArchive { what: "a device" }),
        }
    }
}

/// All that comes out of a pipe, in an unlinked file: unpacking reads an archive from several places at once.
async fn spooled(job: &Job, pipe: OwnedFd, staging: &casemate_store::Staging) -> Result<OwnedFd, Error> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let failed = || Error::io("read the archive from", "its pipe");
    let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe).map_err(failed())?;
    let spool = staging.spool()?;
    let kept = spool.try_clone().map_err(failed())?;
    let mut file = tokio::fs::File::from_std(File::from(spool));
    let mut block = vec![0; 256 << 10];
    let mut bytes = 0;
    loop {
        let count = pipe.read(&mut block).await.map_err(failed())?;
        if count == 0 {
            file.flush().await.map_err(Error::io("write the archive to", staging.path()))?;
            return Ok(kept);
        }
        file.write_all(&block[..count]).await.map_err(Error::io("write the archive to", staging.path()))?;
        bytes += count as u64;
        job.progress((bytes, 0), (0, 0));
    }
}

pub fn missing(
    downloads: &Downloads,
    wanted: Vec<(Vec<String>, Expected)>,
) -> Result<Vec<(Vec<String>, Expected)>, Error> {
    let mut missing = Vec::new();
    for (urls, expected) in wanted {
        if downloads.get(&expected)?.is_none() {
            missing.push((urls, expected));
        }
    }
    Ok(missing)
}

fn read_catalogue(mut file: File, counts: &PackagesIndex) -> Result<Vec<Package>, Error> {
    use std::io::{Read, Seek};
    let wrong = |what: String| Error::Nonsense {
        worker: "casemate-index",
        answer: format!("with a catalogue that {what}"),
    };
    if counts.bytes > CATALOGUE_MAX {
        return Err(wrong(format!("is longer than {CATALOGUE_MAX} bytes")));
    }
    let mut text = String::new();
    file.rewind().map_err(Error::io("read", "the catalogue"))?;
    file.take(counts.bytes).read_to_string(&mut text).map_err(Error::io("read", "the catalogue"))?;
    let packages: Vec<Package> =
        serde_json::from_str(&text).map_err(|error| wrong(format!("is none: {error}")))?;
    if packages.is_empty() || packages.len() as u64 != counts.chosen {
        return Err(wrong(format!("has {} packages, not {}", packages.len(), counts.chosen)));
    }
    // Names become file names and URLs here: judged again, since a worker's word is a stranger's.
    for package in &packages {
        let plain = |text: &str, more: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        let path = plain(&package.filename, "/+-._~:%")
            && !package.filename.starts_with('/')
            && package.filename.split('/').all(|part| !part.is_empty() && part != "..");
        if !plain(&package.name, "+-.") || package.name.starts_with('.') || !path {
            return Err(wrong(format!("names {:?} at {:?}", package.name, package.filename)));
        }
    }
    Ok(packages)
}

pub fn staging_name(job: &Job) -> Result<Name, Error> {
    Ok(format!("job-{}", job.id).parse()?)
}

/// A directory that root inside, who is not us, can enter, whatever our umask is.
pub fn make_open_directory(path: &std::path::Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir(path).map_err(Error::io("make", path))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).map_err(Error::io("open up", path))
}

/// Work that hashes or copies: off the thread that answers the bus.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(panic) => Err(Error::BrokeOff { what: "a step of the job", panic }),
    }
}
