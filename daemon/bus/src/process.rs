//! `org.casemate.Casemate1.Process`.

use casemate_engine::{ProcessId, ProcessInfo};
use casemate_interfaces::{Error, environment_path};
use zbus::object_server::SignalEmitter;
use zbus::{OwnedObjectPath, fdo, interface};

use crate::Context;
use crate::convert::{Options, error, known};

pub struct Process {
    pub context: Context,
    pub id: ProcessId,
}

impl Process {
    fn info(&self) -> fdo::Result<ProcessInfo> {
        self.context.engine.process(&self.id).map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }
}

#[interface(name = "org.casemate.Casemate1.Process")]
impl Process {
    async fn signal(&self, signal: i32, options: Options) -> Result<(), Error> {
        known(&options, &[])?;
        self.context.engine.signal(&self.id, signal).await.map_err(error)
    }

    #[zbus(signal)]
    pub async fn exited(emitter: &SignalEmitter<'_>, exited: bool, status: i32) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn environment(&self) -> OwnedObjectPath {
        environment_path(&self.id.0)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn session(&self) -> u64 {
        self.id.1
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn pid(&self) -> fdo::Result<i32> {
        Ok(self.info()?.pid)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn command(&self) -> fdo::Result<Vec<String>> {
        Ok(self.info()?.command)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn root(&self) -> fdo::Result<bool> {
        Ok(self.info()?.root)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn terminal(&self) -> fdo::Result<bool> {
        Ok(self.info()?.terminal)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn started_at(&self) -> fdo::Result<u64> {
        Ok(self.info()?.started_at)
    }
}
