//! Environments: built from a manifest, started, stopped, destroyed; and their sessions.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use casemate_manifest::{Lock, LockedBase, Manifest};
use casemate_sandbox::control::{Exec, Notice, Reply, Request, Size};
use casemate_sandbox::plan::{Account, File as PlanFile, Mount, Network, Plan, Root};
use casemate_store::{Digest, Id, Name, ReleaseName};
use casemate_worker::protocol::TreeRequest;

use crate::api::{BuildRequest, Change, ExecRequest, ProcessInfo, Started, State, Streams};
use crate::control::ControlError;
use crate::downloads::Expected;
use crate::error::Error;
use crate::jobs::{Job, now};
use crate::records::{EnvironmentRecord, ReleaseRecord};
use crate::releases::{blocking, parse_reference, staging_name};
use crate::sandboxes::{self, Sandbox};
use crate::state::{Step, step};
use crate::{Inner, configuration, mounts, packages};

/// What is known of an environment while the daemon runs.
pub(crate) struct Environment {
    pub record: EnvironmentRecord,
    pub sandbox: Option<Arc<Sandbox>>,
    pub sessions: BTreeMap<u64, ProcessInfo>,
}

impl Environment {
    pub fn state(&self) -> State {
        if self.sandbox.is_some() { State::Running } else { self.record.state }
    }
}

/// A manifest that was parsed and judged: nothing in it is unsupported or denied.
pub(crate) struct Judged {
    pub manifest: Manifest,
    pub text: String,
    pub release: ReleaseName,
    pub mounts: Vec<crate::records::MountRecord>,
    pub lock: Option<Lock>,
    pub locked: bool,
    pub offline: bool,
}

impl Inner {
    pub(crate) fn with_judge<T>(
        &self,
        judge: impl FnOnce(&mounts::Judge<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let policy = configuration::policy(&self.settings.configuration)?;
        let mut own =
            vec![self.settings.store.clone(), self.settings.cache.clone(), self.settings.runtime.clone()];
        own.extend(self.settings.configuration.first().cloned());
        judge(&mounts::Judge { policy: &policy, home: &self.settings.home, own: &own })
    }

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
        if !manifest.runtime.resource_limits.is_empty() {
            return Err(Error::LimitUnenforceable(
                "[runtime.resource_limits] cannot be enforced by this version of Casemate; remove the section".into(),
            ));
        }
        let lock = request
            .lock
            .as_deref()
            .map(Lock::parse)
            .transpose()
            .map_err(|error| Error::Lock(error.to_string()))?;
        if request.locked {
            match &lock {
                None => {
                    return Err(Error::Lock(
                        "not found, but --locked asks for it; build once without --locked".into(),
                    ));
                }
                Some(lock) if !lock.fits(&manifest) => {
                    return Err(Error::Lock(
                        "it was made for another manifest; build once without --locked".into(),
                    ));
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
                && lock_is_current
            {
                return Ok(result(id, environment, false));
            }
            step(name.as_str(), self.state_of(id)?, Step::Build)?;
        }
        let staging = self.store.staging(&staging_name(&job)?)?;
        let outcome = self.build_in(&job, &name, judged, &base, existing, &staging).await;
        self.drop_staging(&staging).await?;
        outcome
    }

    async fn build_in(
        &self,
        job: &Job,
        name: &Name,
        judged: Judged,
        base: &ReleaseRecord,
        existing: Option<(Id, EnvironmentRecord)>,
        staging: &casemate_store::Staging,
    ) -> Result<Vec<(String, String)>, Error> {
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
                return Err(Error::Lock(format!(
                    "it pins another state of {} than the one that is here; fetch that release, or build without --locked",
                    judged.release
                )));
            }
            _ if wanted.is_empty() => Lock::new(&judged.manifest, locked_base, vec![]),
            _ if judged.offline => {
                return Err(Error::Lock(
                    "no lock fits, and --offline forbids to resolve packages anew".into(),
                ));
            }
            _ => {
                let packages = self.resolve_packages(job, base, wanted, staging).await?;
                Lock::new(&judged.manifest, locked_base, packages)
            }
        };
        if !lock.packages.is_empty() {
            job.stage("downloading packages");
            let wanted: Vec<_> = lock.packages.iter().map(|p| (vec![p.url.clone()], expected(p))).collect();
            if judged.offline {
                for (_, one) in &wanted {
                    if self.downloads.get(one)?.is_none() {
                        return Err(Error::NotFound {
                            what: "download",
                            name: one.name.clone(),
                            remedy: "--offline was asked for; build once with the network",
                        });
                    }
                }
            }
            self.download(job, staging, wanted).await?;
        }
        job.stage("installing packages");
        let layer = self.install(job, name, base, &lock, wanted, staging).await?;
        let mut layers = vec![layer];
        layers.extend_from_slice(&base.layers);

        job.stage("committing");
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
                self.workers.tree(Some(job), &self.store, &request).await?;
                self.store.sync()?;
                upper
            }
        };
        job.check()?;
        let record = EnvironmentRecord {
            name: name.to_string(),
            state: State::Built,
            release: judged.release.to_string(),
            created_at: existing.as_ref().map_or_else(now, |(_, old)| old.created_at),
            built_at: now(),
            manifest_digest: judged.manifest.digest(),
            lock_digest: lock.digest(),
            layers,
            upper,
            network: judged.manifest.runtime.network.as_str().to_owned(),
            manifest: judged.text,
            lock: lock.to_toml(),
            mounts: judged.mounts,
            variables: judged.manifest.environment.clone(),
        };
        self.store.environments::<Id, EnvironmentRecord>().commit(&id, &record)?;
        let result = result(&id, &record, true);
        self.put_environment(id, record);
        if let Some((_, old)) = existing {
            self.drop_layers(&old.layers).await?;
        }
        Ok(result)
    }

    /// Stage 1: the image's own package manager, with the host's network and nothing else, says what it would install.
    async fn resolve_packages(
        &self,
        job: &Job,
        base: &ReleaseRecord,
        wanted: &[String],
        staging: &casemate_store::Staging,
    ) -> Result<Vec<casemate_manifest::LockedPackage>, Error> {
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
        let mut files = self.host_files("resolve", Network::Host);
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
                lowers: self.lowers(&base.layers)?,
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
            files,
            deny_unix_sockets: true,
            linger: true,
        };
        let output = self.run_script(job, &plan, &packages::resolve(), wanted).await?;
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
        &self,
        job: &Job,
        name: &Name,
        base: &ReleaseRecord,
        lock: &Lock,
        wanted: &[String],
        staging: &casemate_store::Staging,
    ) -> Result<Digest, Error> {
        let build: Name = "build".parse()?;
        let request = TreeRequest::Prepare {
            path: staging.relative(Some(&build)),
            children: vec!["upper".into(), "work".into()],
        };
        self.workers.tree(Some(job), &self.store, &request).await?;
        let archives = staging.path().join("packages");
        std::fs::create_dir(&archives).map_err(Error::io("make", &archives))?;
        for package in &lock.packages {
            self.downloads.place(&expected(package), &archives.join(packages::file_name(package)))?;
        }
        let at = |child: &str| mounts::own_source(&staging.path().join(child));
        let mut plan = Plan {
            version: casemate_sandbox::plan::VERSION,
            id: format!("{}-install", staging_name(job)?),
            hostname: name.to_string(),
            root: Root::Overlay {
                lowers: self.lowers(&base.layers)?,
                upper: at("build/upper")?,
                work: at("build/work")?,
            },
            ids: self.plan_ids(),
            user: self.account(&base.layers),
            write_account: true,
            network: Network::None,
            mounts: vec![],
            files: self.host_files(name.as_str(), Network::None),
            deny_unix_sockets: false,
            linger: true,
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
        let (digest, _) = self.ingest(job, &format!("{}/upper", staging.relative(Some(&build)))).await?;
        Ok(digest)
    }

    /// Lowers of a stack, each listing checked against its name.
    fn lowers(&self, layers: &[Digest]) -> Result<Vec<casemate_sandbox::plan::Source>, Error> {
        layers
            .iter()
            .map(|digest| {
                self.store.check_listing(digest)?;
                mounts::own_source(&self.store.layer_path(digest).join("tree"))
            })
            .collect()
    }

    fn account(&self, layers: &[Digest]) -> Account {
        let has = |path: &str| {
            layers.iter().any(|digest| {
                self.store.layer_path(digest).join("tree").join(path).symlink_metadata().is_ok()
            })
        };
        let shell = if has("usr/bin/bash") || has("bin/bash") { "/bin/bash" } else { "/bin/sh" };
        Account {
            name: self.settings.user_name.clone(),
            uid: self.uid,
            gid: self.gid,
            home: format!("/home/{}", self.settings.user_name),
            shell: shell.into(),
        }
    }

    fn host_files(&self, hostname: &str, network: Network) -> Vec<PlanFile> {
        let file = |path: &str, content: String| PlanFile { path: path.into(), content };
        let resolver = match network {
            Network::Host => std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
            Network::None => String::new(),
        };
        vec![
            file("/etc/resolv.conf", resolver),
            file("/etc/hostname", format!("{hostname}\n")),
            file(
                "/etc/hosts",
                format!(
                    "127.0.0.1\tlocalhost\n127.0.1.1\t{hostname}\n::1\tlocalhost ip6-localhost ip6-loopback\n"
                ),
            ),
        ]
    }

    /// The system's certificates, for the image's package manager: what the host trusts counts, a proxy's own CA too.
    fn certificates(&self) -> Option<String> {
        let configured = Path::new(&self.settings.ssl_cert_file);
        [
            configured,
            Path::new("/etc/ssl/certs/ca-certificates.crt"),
            Path::new("/etc/pki/tls/certs/ca-bundle.crt"),
        ]
        .into_iter()
        .filter(|path| !path.as_os_str().is_empty())
        .find_map(|path| std::fs::read_to_string(path).ok())
    }

    /// The sandbox of an environment, started if there is none.
    pub(crate) async fn ensure_running(
        self: &Arc<Self>,
        id: &Id,
        linger: bool,
    ) -> Result<Arc<Sandbox>, Error> {
        let gate = self.gate(id);
        let _one_at_a_time = gate.lock().await;
        let (record, running) = self
            .with_environment(id, |environment| (environment.record.clone(), environment.sandbox.clone()))?;
        if let Some(sandbox) = running {
            if linger && !sandbox.linger.load(Ordering::Relaxed) {
                let control = sandbox.control.lock().await;
                if control.ask(&Request::Linger { on: true }, &[]).await.is_ok() {
                    sandbox.linger.store(true, Ordering::Relaxed);
                    drop(control);
                    return Ok(sandbox);
                }
                drop(control);
                self.ended(id, &sandbox).await?;
            } else {
                return Ok(sandbox);
            }
        }
        step(&record.name, record.state, Step::Start)?;
        let network = if record.network == "host" { Network::Host } else { Network::None };
        let upper = self.store.upper_path(&record.upper);
        let mounts =
            self.with_judge(|judge| record.mounts.iter().map(|mount| mounts::plan(judge, mount)).collect())?;
        let plan = Plan {
            version: casemate_sandbox::plan::VERSION,
            id: id.to_string(),
            hostname: record.name.clone(),
            root: Root::Overlay {
                lowers: self.lowers(&record.layers)?,
                upper: mounts::own_source(&upper.join("upper"))?,
                work: mounts::own_source(&upper.join("work"))?,
            },
            ids: self.plan_ids(),
            user: self.account(&record.layers),
            write_account: false,
            network,
            mounts,
            files: self.host_files(&record.name, network),
            deny_unix_sockets: false,
            linger,
        };
        let directory = self.settings.runtime.join(id.to_string());
        let sandbox = Arc::new(sandboxes::start(&self.workers, &plan, &directory, &record.name).await?);
        self.adopt(id, Arc::clone(&sandbox))?;
        Ok(sandbox)
    }

    /// Take a running sandbox into the table and watch it until it ends.
    pub(crate) fn adopt(self: &Arc<Self>, id: &Id, sandbox: Arc<Sandbox>) -> Result<(), Error> {
        self.with_environment(id, |environment| environment.sandbox = Some(Arc::clone(&sandbox)))?;
        self.tell(Change::EnvironmentChanged(id.to_string()));
        let (engine, id) = (Arc::clone(self), *id);
        tokio::spawn(async move {
            loop {
                match sandbox.watch.notice().await {
                    Ok(notice) => engine.noticed(&id, notice),
                    Err(ControlError::Closed) => break,
                    Err(error) => {
                        tracing::warn!(environment = %id, %error, "init's notices broke off");
                        break;
                    }
                }
            }
            if let Err(error) = engine.ended(&id, &sandbox).await {
                tracing::warn!(environment = %id, %error, "what a stopped environment left could not be removed");
            }
        });
        Ok(())
    }

    fn noticed(&self, id: &Id, notice: Notice) {
        let key = id.to_string();
        match notice {
            Notice::Started { session, pid, command, root, terminal } => {
                let added = self.with_environment(id, |environment| {
                    let known = environment.sessions.get_mut(&session);
                    if let Some(known) = known {
                        known.pid = pid;
                        return false;
                    }
                    let started_at = now();
                    let info =
                        ProcessInfo { id: (key.clone(), session), pid, command, root, terminal, started_at };
                    environment.sessions.insert(session, info);
                    true
                });
                if matches!(added, Ok(true)) {
                    self.tell(Change::ProcessAdded((key.clone(), session)));
                    self.tell(Change::EnvironmentChanged(key));
                }
            }
            Notice::Ended { session, status } => {
                use casemate_sandbox::control::ExitStatus;
                let known =
                    self.with_environment(id, |environment| environment.sessions.remove(&session).is_some());
                if matches!(known, Ok(true)) {
                    let (exited, number) = match status {
                        ExitStatus::Exit(code) => (true, code),
                        ExitStatus::Signal(signal) => (false, signal),
                    };
                    self.tell(Change::ProcessEnded((key.clone(), session), exited, number));
                    self.tell(Change::EnvironmentChanged(key));
                }
            }
        }
    }

    /// A sandbox is gone, or about to be: forget it, once.
    async fn ended(&self, id: &Id, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
        sandboxes::gone(&sandbox.pidfd).await;
        let key = id.to_string();
        let left = self.with_environment(id, |environment| {
            if !environment.sandbox.as_ref().is_some_and(|known| Arc::ptr_eq(known, sandbox)) {
                return None;
            }
            environment.sandbox = None;
            Some(std::mem::take(&mut environment.sessions))
        });
        if let Ok(Some(sessions)) = left {
            sandboxes::clear(&self.settings.runtime.join(&key))?;
            for session in sessions.into_keys() {
                self.tell(Change::ProcessEnded((key.clone(), session), false, 9));
            }
            self.tell(Change::EnvironmentChanged(key));
        }
        Ok(())
    }

    pub(crate) async fn start(self: Arc<Self>, job: Job, id: Id) -> Result<Vec<(String, String)>, Error> {
        job.stage("starting");
        self.ensure_running(&id, true).await?;
        Ok(vec![("environment".into(), id.to_string())])
    }

    pub(crate) async fn stop(
        self: Arc<Self>,
        job: Job,
        id: Id,
        timeout: Duration,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("stopping");
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        let (name, state, sandbox) = self.with_environment(&id, |environment| {
            (environment.record.name.clone(), environment.state(), environment.sandbox.clone())
        })?;
        step(&name, state, Step::Stop)?;
        if let Some(sandbox) = sandbox {
            sandbox.stop(timeout).await;
            self.ended(&id, &sandbox).await?;
        }
        Ok(vec![("environment".into(), id.to_string())])
    }

    pub(crate) async fn destroy(
        self: Arc<Self>,
        job: Job,
        id: Id,
        force: bool,
    ) -> Result<Vec<(String, String)>, Error> {
        job.stage("removing");
        let gate = self.gate(&id);
        let _one_at_a_time = gate.lock().await;
        let (record, state, sandbox) = self.with_environment(&id, |environment| {
            (environment.record.clone(), environment.state(), environment.sandbox.clone())
        })?;
        match sandbox {
            Some(sandbox) if force => {
                sandbox.stop(Duration::ZERO).await;
                self.ended(&id, &sandbox).await?;
            }
            _ => {
                step(&record.name, state, Step::Destroy)?;
            }
        }
        self.store.environments::<Id, EnvironmentRecord>().remove(&id)?;
        self.forget_environment(&id);
        let paths = vec![casemate_store::upper(&record.upper)];
        self.workers.tree(None, &self.store, &TreeRequest::Remove { paths }).await?;
        self.drop_layers(&record.layers).await?;
        Ok(vec![("environment".into(), id.to_string())])
    }

    pub(crate) async fn exec(self: &Arc<Self>, id: &Id, request: ExecRequest) -> Result<Started, Error> {
        let (record, account) = self.with_environment(id, |environment| {
            (environment.record.clone(), self.account(&environment.record.layers))
        })?;
        let environment = casemate_manifest::session_variables(
            &casemate_manifest::SessionAccount {
                name: if request.root { "root" } else { &account.name },
                uid: if request.root { 0 } else { account.uid },
                home: if request.root { "/root" } else { &account.home },
                shell: &account.shell,
            },
            &request.variables,
            &record.variables,
            request.root,
        )?;
        let (terminal, streams): (_, Vec<OwnedFd>) = match request.streams {
            Streams::Given { input, output, error } => (None, vec![input, output, error]),
            Streams::Terminal { rows, columns } => (Some(Size { rows, columns }), vec![]),
        };
        let mut command = request.command;
        if command.is_empty() {
            command = vec![account.shell.clone(), "-l".into()];
        }
        let session = self.next_session();
        let home = if request.root { "/root".to_owned() } else { account.home };
        let message = Request::Exec(Exec {
            session,
            command: command.clone(),
            environment,
            directory_optional: request.directory.is_none(),
            directory: request.directory.unwrap_or(home),
            root: request.root,
            terminal,
        });
        let key = id.to_string();
        let mut descriptors: Vec<_> = streams.iter().map(AsFd::as_fd).collect();
        descriptors.push(request.status.as_fd());
        // An environment that stops by itself may do so between our look and our request: then it is started again.
        for attempt in 0.. {
            let sandbox = self.ensure_running(id, false).await?;
            let info = ProcessInfo {
                id: (key.clone(), session),
                pid: 0,
                command: command.clone(),
                root: request.root,
                terminal: terminal.is_some(),
                started_at: now(),
            };
            self.with_environment(id, |environment| environment.sessions.insert(session, info))?;
            let answer = sandbox.control.lock().await.ask(&message, &descriptors).await;
            let forget = || self.with_environment(id, |environment| environment.sessions.remove(&session));
            match answer {
                Ok((Reply::Started { pid, .. }, received)) => {
                    let mut received = received.into_iter();
                    let pidfd = received.next().ok_or_else(|| Error::Sandbox {
                        name: record.name.clone(),
                        message: "init sent no pidfd".into(),
                    })?;
                    let there = self.with_environment(id, |environment| {
                        environment.sessions.get_mut(&session).map(|known| known.pid = pid).is_some()
                    })?;
                    if there {
                        self.tell(Change::ProcessAdded((key.clone(), session)));
                        self.tell(Change::EnvironmentChanged(key.clone()));
                    }
                    return Ok(Started { process: (key, session), pidfd, terminal: received.next() });
                }
                Err(ControlError::Closed) if attempt == 0 => {
                    forget()?;
                    self.ended(id, &sandbox).await?;
                }
                Ok((reply, _)) => {
                    forget()?;
                    let message = format!("init answered {reply:?} to exec");
                    return Err(Error::Sandbox { name: record.name, message });
                }
                Err(ControlError::TooLong(bytes)) => {
                    forget()?;
                    return Err(Error::Argument(ControlError::TooLong(bytes).to_string()));
                }
                Err(error) => {
                    forget()?;
                    return Err(Error::Sandbox { name: record.name, message: error.to_string() });
                }
            }
        }
        Err(Error::Sandbox {
            name: record.name,
            message: "it stopped twice while a session was to start".into(),
        })
    }

    pub(crate) async fn signal(&self, id: &Id, session: u64, signal: i32) -> Result<(), Error> {
        let (name, sandbox) = self.with_environment(id, |environment| {
            (
                environment.record.name.clone(),
                environment.sandbox.clone().filter(|_| environment.sessions.contains_key(&session)),
            )
        })?;
        let sandbox = sandbox.ok_or_else(|| Error::NotFound {
            what: "process",
            name: session.to_string(),
            remedy: "it has ended",
        })?;
        let control = sandbox.control.lock().await;
        control
            .ask(&Request::Signal { session, signal }, &[])
            .await
            .map(|_| ())
            .map_err(|error| Error::Sandbox { name, message: error.to_string() })
    }
}

fn expected(package: &casemate_manifest::LockedPackage) -> Expected {
    Expected {
        name: format!("package {} {}", package.name, package.version),
        size: package.size,
        sha256: package.sha256.clone(),
    }
}

fn result(id: &Id, record: &EnvironmentRecord, changed: bool) -> Vec<(String, String)> {
    vec![
        ("environment".into(), id.to_string()),
        ("lock-digest".into(), record.lock_digest.clone()),
        ("changed".into(), changed.to_string()),
    ]
}
