//! `org.casemate.Casemate1.Release`.

use casemate_engine::ReleaseInfo;
use casemate_interfaces::Error;
use zbus::message::Header;
use zbus::{Connection, OwnedObjectPath, interface};

use crate::Context;
use crate::callers::Callers;
use crate::changes::job_started;
use crate::convert::{Options, known};

pub struct Release {
    pub context: Context,
    /// It does not change: a newer state is a new object.
    pub info: ReleaseInfo,
}

#[interface(name = "org.casemate.Casemate1.Release")]
impl Release {
    async fn get_packages(&self, options: Options) -> Result<Vec<(String, String, String)>, Error> {
        known(&options, &[])?;
        Ok(self.info.packages.clone())
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
        job_started(connection, &self.context, engine.remove_release(&caller, &self.info.reference)).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn reference(&self) -> &str {
        &self.info.reference
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn source(&self) -> &str {
        &self.info.source
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn patch_level(&self) -> u32 {
        self.info.patch_level
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn digest(&self) -> &str {
        &self.info.digest
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn architecture(&self) -> &str {
        &self.info.architecture
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn verification(&self) -> &str {
        &self.info.verification
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn index_date(&self) -> u64 {
        self.info.index_date
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn added_at(&self) -> u64 {
        self.info.added_at
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn bytes(&self) -> u64 {
        self.info.bytes
    }
}
