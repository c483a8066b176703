//! How an environment is built: the manifest judged, its packages resolved, installed in two stages, one record committed.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use casemate_manifest::{Lock, LockedBase, Manifest};
use casemate_sandbox::plan::{File as PlanFile, Grants, Mount, Network, Plan, Root};
use casemate_store::{Digest, Id, Name, ReleaseName};
use casemate_worker::protocol::TreeRequest;

use crate::api::{BuildRequest, State};
use crate::downloads::Expected;
use crate::error::Error;
use crate::jobs::{Job, now};
use crate::layers::Pins;
use crate::records::{EnvironmentRecord, Lower, ReleaseRecord};
use crate::releases::{blocking, parse_reference, staging_name};
use crate::state::{Step, step};
use crate::{Inner, mounts, packages, sandboxes};

/// A manifest that was parsed and judged: nothing in it is unsupported or denied.
pub(crate) struct Judged {
    pub manifest: Manifest,
    pub text: String,
    pub release: ReleaseName,
    pub mounts: Vec<crate::records::MountRecord>,
    pub lock: Option<Lock>,
    pub locked: bool,
    pub offline: bool,
    pub unenforced_limits: bool,
}

/// What a build is about, handed on as one.
#[derive(Clone, Copy)]
struct Work<'a> {
    job: &'a Job,
    name: &'a Name,
    base: &'a ReleaseRecord,
    staging: &'a casemate_store::Staging,
}

impl Inner {
    /// All that can be said of a manifest before anything is done: the caller is told at once.
    pub(crate) fn judge(&self, request: &BuildRequest) -> Result<Judged, Error> {
        let manifest = Manifest::parse(&request.manifest)?;
        if let Some(found) = manifest.unsupported().into_iter().next() {
            return Err(Error::Unsupported { key: found.key, reason: found.reason });
        }
        let text = manifest.base.release.as_deref().ok_or_else(|| Error::Unsupported {
            key: "base.image".into(),
            reason: "only releases can be the base so far".into(),
        })?;
        let release = parse_reference(text)?;
        let mounts = self.with_judge(|judge| {
            judge.policy.judge_limits(&manifest.runtime.resource_limits)?;
            judge.policy.judge_variables(&manifest.environment)?;
            judge.policy.judge_ports(&manifest.runtime.ports)?;
            for device in manifest.hardware.names() {
                judge.policy.judge_device(&device)?;
            }
            for socket in manifest.sockets() {
                judge.policy.judge_socket(&socket)?;
            }
            judge.policy.judge_session_bus(&manifest.gui.session_bus)?;
            judge.policy.judge_nesting(manifest.runtime.nested_namespaces)?;
            manifest
                .mounts
                .values()
                .map(|mount| {
                    mounts::judge_new(
                        judge,
                        request.directory.as_fd(),
                        &mount.source,
                        &mount.target,
                        mount.read_only,
                    )
                })
                .collect()
        })?;
        let unmet = self.cgroups.unmet(&manifest.runtime.resource_limits);
        if let Some(unmet) = unmet.filter(|_| !request.unenforced_limits) {
            return Err(unmet.into());
        }
        let lock = request.lock.as_deref().map(Lock::parse).transpose().map_err(Error::Lock)?;
        if request.locked {
            match &lock {
                None => {
                    return Err(Error::LockMissing);
                }
                Some(lock) if !lock.fits(&manifest) => {
                    return Err(Error::LockOfAnother);
                }
                Some(_) => {}
            }
        }
        let lock = lock.filter(|lock| lock.fits(&manifest));
        Ok(Judged {
            manifest,
            text: request.manifest.clone(),
            release,
            mounts,
            lock,
            locked: request.locked,
            offline: request.offline,
            unenforced_limits: request.unenforced_limits,
        })
    }

    pub(crate) async fn build(
        self: Arc<Self>,
        job: Job,
        name: Name,
        judged: Judged,
    ) -> Result<Vec<(String, String)>, Error> {
        let base =
            self.release_record(&judged.release)?.filter(ReleaseRecord::is_there).ok_or_else(|| {
                Error::NotFound {
                    what: "release",
                    name: judged.release.to_string(),
                    remedy: "fetch it first with `casemate release fetch`",
                }
            })?;
        let existing = self.find(name.as_str());
        if let Some((id, environment)) = &existing {
            let lock_is_current =
                judged.lock.as_ref().is_none_or(|lock| lock.digest() == environment.lock_digest);
            if environment.manifest_digest == judged.manifest.digest()
                && environment.layers.ends_with(&base.layers)
                && environment.mounts == judged.mounts
                && environment.limits == judged.manifest.runtime.resource_limits
                && environment.unenforced_limits == judged.unenforced_limits
                && lock_is_current
            {
                return Ok(self.built(id, environment, false));
            }
            self.settle(id).await?;
            step(name.as_str(), self.state_of(id)?, Step::Build)?;
        }
        // Whoever removes the release meanwhile leaves its layers to us.
        let mut pins = self.pins();
        pins.add(&base.layers);
        let mut made = None;
        let outcome = async {
            let staging = self.store.staging(&staging_name(&job)?)?;
            let work = Work { job: &job, name: &name, base: &base, staging: &staging };
            let outcome = self.build_in(work, judged, existing, &mut pins, &mut made).await;
            self.drop_staging(&staging).await?;
            outcome
        }
        .await;
        pins.release().await;
        if let (Err(_), Some(upper)) = (&outcome, made) {
            let paths = vec![casemate_store::upper(&upper)];
            if let Err(error) = self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await {
                tracing::warn!(%error, "a writable directory that nobody needs stays until the next start");
            }
        }
        outcome
    }

    /// `made` is the writable directory, from when it is there until a record names it.
    async fn build_in(
        self: &Arc<Self>,
        work: Work<'_>,
        judged: Judged,
        existing: Option<(Id, EnvironmentRecord)>,
        pins: &mut Pins,
        made: &mut Option<Id>,
    ) -> Result<Vec<(String, String)>, Error> {
        let Work { job, name, base, staging } = work;
        let locked_base = LockedBase {
            reference: judged.release.to_string(),
            source: base.source.clone(),
            index_sha256: base.index_sha256.clone(),
            content: base.content(),
            index_date: base.index_date,
        };
        let wanted = &judged.manifest.system.packages;
        let lock = match judged.lock {
            Some(lock) if lock.base == locked_base => lock,
            Some(_) if judged.locked => {
                return Err(Error::LockPins { release: judged.release.to_string() });
            }
            _ if wanted.is_empty() => Lock::new(&judged.manifest, locked_base, vec![]),
            _ if judged.offline => {
                return Err(Error::LockOffline);
            }
            _ => {
                let packages = self.resolve_packages(work, wanted).await?;
                Lock::new(&judged.manifest, locked_base, packages)
            }
        };
        if !lock.packages.is_empty() {
            job.stage("downloading packages");
            let wanted: Vec<_> = lock.packages.iter().map(|p| (vec![p.url.clone()], expected(p))).collect();
            if judged.offline {
                let downloads = Arc::clone(&self.downloads);
                let missing = blocking(move || crate::releases::missing(&downloads, wanted)).await?;
                if let Some((_, one)) = missing.into_iter().next() {
                    return Err(Error::NotFound {
                        what: "download",
                        name: one.name,
                        remedy: "--offline was asked for; build once with the network",
                    });
                }
            } else {
                self.download(job, staging, wanted).await?;
            }
        }
        job.stage("installing packages");
        let layer = self.install(work, &lock, wanted, pins).await?;
        let mut layers = vec![layer];
        layers.extend_from_slice(&base.layers);

        job.stage("committing");
        job.check()?;
        let id = match &existing {
            Some((id, _)) => *id,
            None => Id::random().map_err(Error::io("read", "/dev/urandom"))?,
        };
        let upper = match &existing {
            Some((_, record)) => record.upper,
            None => {
                let upper = Id::random().map_err(Error::io("read", "/dev/urandom"))?;
                let request = TreeRequest::Prepare {
                    path: casemate_store::upper(&upper),
                    children: vec!["upper".into(), "work".into()],
                };
                *made = Some(upper);
                self.workers.tree(Some(job), &self.store, &request).await?;
                let engine = Arc::clone(self);
                blocking(move || Ok(engine.store.sync()?)).await?;
                upper
            }
        };
        let mut record = EnvironmentRecord {
            name: name.to_string(),
            state: State::Built,
            release: judged.release.to_string(),
            created_at: existing.as_ref().map_or_else(now, |(_, old)| old.created_at),
            built_at: now(),
            manifest_digest: judged.manifest.digest(),
            lock_digest: lock.digest(),
            layers,
            commits: vec![],
            upper,
            network: judged.manifest.runtime.network.as_str().to_owned(),
            ports: judged.manifest.runtime.ports.clone(),
            allow: judged.manifest.runtime.allow.clone(),
            manifest: judged.text,
            lock: lock.to_toml(),
            mounts: judged.mounts,
            devices: judged.manifest.hardware.names(),
            sockets: judged.manifest.sockets(),
            session_bus: judged.manifest.gui.session_bus.clone(),
            nested_namespaces: judged.manifest.runtime.nested_namespaces,
            sudo: judged.manifest.runtime.sudo,
            service: judged.manifest.runtime.service(),
            stop: judged.manifest.runtime.stop(),
            variables: judged.manifest.environment.clone(),
            limits: judged.manifest.runtime.resource_limits,
            unenforced_limits: judged.unenforced_limits,
        };
        // It may have been started since we looked, on the layers that are about to be replaced.
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        if existing.is_some() {
            self.settle(&id).await?;
            step(name.as_str(), self.state_of(&id)?, Step::Build)?;
            // What was committed stays on top; meanwhile it may have been stored.
            record.commits = self.with_environment(&id, |environment| environment.record.commits.clone())?;
        }
        let result = self.built(&id, &record, true);
        self.commit_environment(&id, record)?;
        *made = None;
        if let Some((_, old)) = existing {
            self.drop_lowers(&Lower::layers(&old.layers)).await?;
        }
        Ok(result)
    }

    /// Stage 1: the image's own package manager, with the host's network and nothing else, says what it would install.
    async fn resolve_packages(
        self: &Arc<Self>,
        work: Work<'_>,
        wanted: &[String],
    ) -> Result<Vec<casemate_manifest::LockedPackage>, Error> {
        let Work { job, base, staging, .. } = work;
        job.stage("resolving packages");
        let downloads = staging.relative(Some(&"downloads".parse()?));
        let resolve = staging.relative(Some(&"resolve".parse()?));
        for (path, children) in [(downloads, ["lists", "archives"]), (resolve, ["upper", "work"])] {
            let children = children.map(str::to_owned).to_vec();
            self.workers.tree(Some(job), &self.store, &TreeRequest::Prepare { path, children }).await?;
        }
        let at = |child: &str| mounts::own_source(&staging.path().join(child));
        let mount = |child: &str, target: &str| -> Result<Mount, Error> {
            Ok(Mount { source: at(child)?, target: target.into(), read_only: false, no_exec: true })
        };
        let mut files = self.host_files("resolve", &Network::Host);
        if let Some(bundle) = self.certificates() {
            files.push(PlanFile { path: "/etc/ssl/certs/ca-certificates.crt".into(), content: bundle });
        }
        let mut proxies = String::new();
        for (key, value) in [("http", &self.settings.http_proxy), ("https", &self.settings.https_proxy)] {
            if !value.is_empty() && !value.contains(['"', '\n', ';']) {
                proxies.push_str(&format!("Acquire::{key}::Proxy \"{value}\";\n"));
            }
        }
        if !proxies.is_empty() {
            files.push(PlanFile { path: "/etc/apt/apt.conf.d/90casemate-proxy".into(), content: proxies });
        }
        let plan = Plan {
            version: casemate_sandbox::plan::VERSION,
            id: format!("{}-resolve", staging_name(job)?),
            hostname: "resolve".into(),
            root: Root::Overlay {
                lowers: self.lowers(&base.layers).await?,
                upper: at("resolve/upper")?,
                work: at("resolve/work")?,
            },
            ids: self.plan_ids(),
            user: crate::releases::nobody(self),
            write_account: false,
            network: Network::Host,
            mounts: vec![
                mount("downloads/lists", "/var/lib/apt/lists")?,
                mount("downloads/archives", "/var/cache/apt/archives")?,
            ],
            grants: Grants::default(),
            sudo: None,
            service: None,
            stop_signal: rustix::process::Signal::TERM.as_raw(),
            stop_timeout: 0,
            files,
            deny_unix_sockets: true,
            linger: true,
            born_in_group: false,
        };
        let arguments = [std::slice::from_ref(&self.settings.no_proxy), wanted].concat();
        let output = self.run_script(job, &plan, &packages::resolve(), &arguments).await?;
        let output = String::from_utf8(output)
            .map_err(|_| Error::Package { message: "the package manager's answer is not UTF-8".into() })?;
        let found = packages::read_resolution(&output, wanted)?;
        // What stage 1 downloaded goes into the cache if it is what the index says; the rest is fetched by us.
        let archives = staging.path().join("downloads/archives");
        let cache = Arc::clone(&self.downloads);
        let list = found.clone();
        blocking(move || {
            use rustix::fs::{Mode, OFlags, ResolveFlags};
            let directory = rustix::fs::open(
                &archives,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map_err(Error::sys("open", &archives))?;
            for package in &list {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
                let Ok(file) = rustix::fs::openat2(
                    &directory,
                    packages::file_name(package),
                    flags,
                    Mode::empty(),
                    resolve,
                ) else {
                    continue;
                };
                let mut file = std::fs::File::from(file);
                let regular = file.metadata().is_ok_and(|meta| meta.is_file());
                if regular {
                    cache.put(&mut file, 0, &expected(package))?;
                }
            }
            Ok(())
        })
        .await?;
        Ok(found)
    }

    /// Stage 2: without network, the lock's packages and the user's account become a layer.
    async fn install(
        self: &Arc<Self>,
        work: Work<'_>,
        lock: &Lock,
        wanted: &[String],
        pins: &mut Pins,
    ) -> Result<Digest, Error> {
        let Work { job, name, base, staging } = work;
        let build: Name = "build".parse()?;
        let request = TreeRequest::Prepare {
            path: staging.relative(Some(&build)),
            children: vec!["upper".into(), "work".into()],
        };
        self.workers.tree(Some(job), &self.store, &request).await?;
        let archives = staging.path().join("packages");
        crate::releases::make_open_directory(&archives)?;
        let places = lock.packages.iter().map(|p| (expected(p), archives.join(packages::file_name(p))));
        self.place(places.collect()).await?;
        let at = |child: &str| mounts::own_source(&staging.path().join(child));
        let mut plan = Plan {
            version: casemate_sandbox::plan::VERSION,
            id: format!("{}-install", staging_name(job)?),
            hostname: name.to_string(),
            root: Root::Overlay {
                lowers: self.lowers(&base.layers).await?,
                upper: at("build/upper")?,
                work: at("build/work")?,
            },
            ids: self.plan_ids(),
            user: self.account(&base.layers),
            write_account: true,
            network: Network::None,
            mounts: vec![],
            grants: Grants::default(),
            sudo: None,
            service: None,
            stop_signal: rustix::process::Signal::TERM.as_raw(),
            stop_timeout: 0,
            files: self.host_files(name.as_str(), &Network::None),
            deny_unix_sockets: false,
            linger: true,
            born_in_group: false,
        };
        if lock.packages.is_empty() {
            let throwaway =
                sandboxes::Throwaway { workers: &self.workers, runtime: &self.settings.runtime, job };
            throwaway.run(&plan, &[], 0).await?;
        } else {
            plan.mounts.push(Mount {
                source: mounts::own_source(&archives)?,
                target: "/run/casemate/packages".into(),
                read_only: true,
                no_exec: true,
            });
            let names: Vec<String> =
                wanted.iter().map(|wanted| wanted.split('=').next().unwrap_or_default().to_owned()).collect();
            self.run_script(job, &plan, &packages::install(), &names).await?;
        }
        job.stage("storing");
        let (digest, _) =
            self.ingest(job, &format!("{}/upper", staging.relative(Some(&build))), pins).await?;
        Ok(digest)
    }

    fn built(&self, id: &Id, record: &EnvironmentRecord, changed: bool) -> Vec<(String, String)> {
        let mut result = vec![
            ("environment".into(), id.to_string()),
            ("lock-digest".into(), record.lock_digest.clone()),
            ("changed".into(), changed.to_string()),
        ];
        if let Some(unmet) = self.cgroups.unmet(&record.limits) {
            result.push(unenforced(&unmet.keys, &unmet.reason));
        }
        result
    }

    /// The system's certificates, for the image's package manager: what the host trusts counts, a proxy's own CA too. As the
    /// fetcher has it, what `SSL_CERT_FILE` and `SSL_CERT_DIR` name is in the place of the system's own.
    fn certificates(&self) -> Option<String> {
        let (file, directory) = (&self.settings.ssl_cert_file, &self.settings.ssl_cert_dir);
        if file.is_empty() && directory.is_empty() {
            let system = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt"];
            return system.iter().find_map(|path| std::fs::read_to_string(path).ok());
        }
        let mut paths = if file.is_empty() { vec![] } else { vec![PathBuf::from(file)] };
        for directory in std::env::split_paths(directory) {
            let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            paths.extend(entries.map(|entry| entry.path()).filter(|path| path.is_file()));
        }
        let texts = paths.iter().filter_map(|path| std::fs::read_to_string(path).ok());
        let bundle: Vec<_> = texts.filter(|text| text.contains("-----BEGIN CERTIFICATE-----")).collect();
        (!bundle.is_empty()).then(|| bundle.join("\n"))
    }
}

/// What a job's result says of limits that are not in force, for people.
pub(crate) fn unenforced(keys: &[String], reason: &str) -> (String, String) {
    ("unenforced".into(), format!("{}: {reason}", keys.join(", ")))
}

fn expected(package: &casemate_manifest::LockedPackage) -> Expected {
    Expected {
        name: format!("package {} {}", package.name, package.version),
        size: package.size,
        sha256: package.sha256.clone(),
    }
}
