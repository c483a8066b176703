//! `org.casemate.Casemate1.Manager`.

use casemate_engine::BuildRequest;
use casemate_interfaces::{Error, environment_path, release_path};
use zbus::message::Header;
use zbus::{Connection, OwnedFd, OwnedObjectPath, interface};

use crate::Context;
use crate::callers::Callers;
use crate::changes::{add_environment, add_release, job_started};
use crate::convert::{Options, error, known, option};
use crate::environment::Environment;

/// Most bytes of a manifest or lock.
const TEXT_MAX: usize = 1 << 20;
/// Days that a download stays where no lock names it.
const DOWNLOADS_KEPT: u64 = 30;

pub struct Manager(pub Context);

/// An environment in short: object, name, id, state, release, network, number of sessions.
type Listed = (OwnedObjectPath, String, String, String, String, String, u32);

fn bounded(what: &str, text: &str) -> Result<(), Error> {
    if text.len() > TEXT_MAX {
        return Err(Error::InvalidArgument(format!("the {what} is longer than {TEXT_MAX} bytes")));
    }
    Ok(())
}

#[interface(name = "org.casemate.Casemate1.Manager")]
impl Manager {
    async fn fetch_release(
        &self,
        reference: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.0, engine.fetch_release(&caller, reference)).await
    }

    async fn import_release(
        &self,
        name: &str,
        archive: OwnedFd,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.0, engine.import_release(&caller, name, archive.into())).await
    }

    async fn build(
        &self,
        name: &str,
        manifest: &str,
        directory: OwnedFd,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["lock", "locked", "offline", "unenforced-limits"])?;
        let lock: Option<String> = option(&options, "lock")?;
        bounded("manifest", manifest)?;
        bounded("lock", lock.as_deref().unwrap_or_default())?;
        let request = BuildRequest {
            name: name.to_owned(),
            manifest: manifest.to_owned(),
            directory: directory.into(),
            lock,
            locked: option(&options, "locked")?.unwrap_or(false),
            offline: option(&options, "offline")?.unwrap_or(false),
            unenforced_limits: option(&options, "unenforced-limits")?.unwrap_or(false),
        };
        job_started(connection, &self.0, engine.build(&caller, request)).await
    }

    async fn get_release(
        &self,
        reference: &str,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        known(&options, &[])?;
        let info = self.0.engine.release(reference).map_err(error)?;
        add_release(connection, &self.0, &info.reference).await?;
        Ok(release_path(&info.reference))
    }

    async fn get_environment(
        &self,
        selector: &str,
        options: Options,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        known(&options, &[])?;
        let info = self.0.engine.environment(selector).map_err(error)?;
        let path = environment_path(&info.id);
        add_environment(connection, &self.0, info.id).await?;
        Ok(path)
    }

    async fn list_environments(&self, options: Options) -> Result<Vec<Listed>, Error> {
        known(&options, &[])?;
        let mut environments = self.0.engine.listed();
        environments.sort_by(|a, b| a.name.cmp(&b.name));
        let listed = environments.into_iter().map(|one| {
            let path = environment_path(&one.id);
            (path, one.name, one.id, one.state.to_string(), one.release, one.network, one.sessions)
        });
        Ok(listed.collect())
    }

    #[allow(clippy::too_many_arguments)]
    async fn exec(
        &self,
        selector: &str,
        command: Vec<String>,
        input: OwnedFd,
        output: OwnedFd,
        error: OwnedFd,
        status: OwnedFd,
        options: Options,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<(OwnedObjectPath, OwnedFd), Error> {
        let id = self.0.engine.environment(selector).map_err(crate::convert::error)?.id;
        let environment = Environment { context: self.0.clone(), id };
        environment.exec(command, input, output, error, status, options, header).await
    }

    async fn doctor(&self, options: Options) -> Result<Vec<(String, String, String, String)>, Error> {
        known(&options, &[])?;
        let findings = self.0.engine.doctor().await;
        Ok(findings.into_iter().map(|f| (f.check, f.severity, f.detail, f.remedy)).collect())
    }

    async fn collect_garbage(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["dry-run", "days"])?;
        let dry = option(&options, "dry-run")?.unwrap_or(false);
        let days = option(&options, "days")?.unwrap_or(DOWNLOADS_KEPT);
        job_started(connection, &self.0, engine.collect(&caller, dry, days)).await
    }

    async fn explain_object(
        &self,
        object: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.0, engine.explain(&caller, object)).await
    }

    async fn measure_usage(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.0, engine.measure(&caller)).await
    }

    async fn get_usage(&self, options: Options) -> Result<(u64, Vec<(String, String, u64, u64)>), Error> {
        known(&options, &[])?;
        let usages = self.0.engine.usages();
        let accounts = usages.accounts.into_iter().map(|one| (one.kind, one.name, one.exclusive, one.shared));
        Ok((usages.measured_at, accounts.collect()))
    }

    async fn verify(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.0, engine.verify(&caller)).await
    }

    async fn purge(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.0.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        job_started(connection, &self.0, engine.purge(&caller)).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn store_format(&self) -> u32 {
        self.0.engine.store_format()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn id_mode(&self) -> String {
        self.0.engine.id_mode()
    }
}
