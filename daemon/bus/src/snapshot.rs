//! `org.casemate.Casemate1.Snapshot`.

use casemate_engine::SnapshotInfo;
use casemate_interfaces::{Error, environment_path};
use zbus::message::Header;
use zbus::{Connection, OwnedObjectPath, fdo, interface};

use crate::Context;
use crate::callers::Callers;
use crate::changes::job_started;
use crate::convert::{Options, known, option};

pub struct Snapshot {
    pub context: Context,
    /// The environment's id.
    pub environment: String,
    pub name: String,
}

impl Snapshot {
    fn info(&self) -> fdo::Result<SnapshotInfo> {
        self.context
            .engine
            .snapshot(&self.environment, &self.name)
            .map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }
}

#[interface(name = "org.casemate.Casemate1.Snapshot")]
impl Snapshot {
    async fn restore(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &["discard"])?;
        let discard = option(&options, "discard")?.unwrap_or(false);
        let started = engine.restore(&caller, &self.environment, &self.name, discard);
        job_started(connection, &self.context, started).await
    }

    async fn clone_as(
        &self,
        name: &str,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        let started = engine.clone_environment(&caller, &self.environment, name, Some(&self.name));
        job_started(connection, &self.context, started).await
    }

    async fn remove(
        &self,
        options: Options,
        #[zbus(header)] header: Header<'_>,
        #[zbus(connection)] connection: &Connection,
    ) -> Result<OwnedObjectPath, Error> {
        let engine = &self.context.engine;
        let caller = Callers::caller(&header)?;
        known(&options, &[])?;
        let started = engine.remove_snapshot(&caller, &self.environment, &self.name);
        job_started(connection, &self.context, started).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn environment(&self) -> OwnedObjectPath {
        environment_path(&self.environment)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn name(&self) -> &str {
        &self.name
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn message(&self) -> fdo::Result<String> {
        Ok(self.info()?.message)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn number(&self) -> fdo::Result<u64> {
        Ok(self.info()?.number)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn created_at(&self) -> fdo::Result<u64> {
        Ok(self.info()?.created_at)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn automatic(&self) -> fdo::Result<bool> {
        Ok(self.info()?.automatic)
    }

    #[zbus(property)]
    fn state(&self) -> fdo::Result<String> {
        Ok(self.info()?.state)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn release(&self) -> fdo::Result<String> {
        Ok(self.info()?.release)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn lock_digest(&self) -> fdo::Result<String> {
        Ok(self.info()?.lock_digest)
    }
}
