//! `org.casemate.Casemate1.Job`.

use std::collections::HashMap;

use casemate_engine::{JobId, JobInfo, JobState};
use casemate_interfaces::Error;
use zbus::object_server::SignalEmitter;
use zbus::{fdo, interface};

use crate::Context;
use crate::convert::{Options, error, error_name, known};

pub struct Job {
    pub context: Context,
    pub id: JobId,
}

pub fn state_name(state: JobState) -> &'static str {
    match state {
        JobState::Running => "running",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

impl Job {
    fn info(&self) -> fdo::Result<JobInfo> {
        shown(&self.context, self.id).map_err(|error| fdo::Error::UnknownObject(error.to_string()))
    }
}

/// A job as the bus has it: it runs until its end has been told.
pub fn shown(context: &Context, id: JobId) -> Result<JobInfo, casemate_engine::Error> {
    let info = context.engine.job(id)?;
    if context.told.has_ended(id) {
        return Ok(info);
    }
    Ok(JobInfo { state: JobState::Running, ended_at: 0, error: None, ..info })
}

#[interface(name = "org.casemate.Casemate1.Job")]
impl Job {
    async fn cancel(&self, options: Options) -> Result<(), Error> {
        known(&options, &[])?;
        self.context.engine.cancel(self.id).map_err(error)
    }

    async fn get_log(&self, options: Options) -> Result<Vec<String>, Error> {
        known(&options, &[])?;
        self.context.engine.job_log(self.id).map_err(error)
    }

    #[zbus(signal)]
    pub async fn log(emitter: &SignalEmitter<'_>, line: &str) -> zbus::Result<()>;

    #[zbus(signal)]
    pub async fn ended(emitter: &SignalEmitter<'_>, state: &str) -> zbus::Result<()>;

    #[zbus(property(emits_changed_signal = "const"))]
    fn kind(&self) -> fdo::Result<String> {
        Ok(self.info()?.kind)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn subject(&self) -> fdo::Result<String> {
        Ok(self.info()?.subject)
    }

    #[zbus(property)]
    fn state(&self) -> fdo::Result<String> {
        Ok(state_name(self.info()?.state).to_owned())
    }

    #[zbus(property)]
    fn stage(&self) -> fdo::Result<String> {
        Ok(self.info()?.stage)
    }

    #[zbus(property)]
    fn bytes_done(&self) -> fdo::Result<u64> {
        Ok(self.info()?.bytes_done)
    }

    #[zbus(property)]
    fn bytes_total(&self) -> fdo::Result<u64> {
        Ok(self.info()?.bytes_total)
    }

    #[zbus(property)]
    fn items_done(&self) -> fdo::Result<u64> {
        Ok(self.info()?.items_done)
    }

    #[zbus(property)]
    fn items_total(&self) -> fdo::Result<u64> {
        Ok(self.info()?.items_total)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn started_at(&self) -> fdo::Result<u64> {
        Ok(self.info()?.started_at)
    }

    #[zbus(property)]
    fn ended_at(&self) -> fdo::Result<u64> {
        Ok(self.info()?.ended_at)
    }

    #[zbus(property)]
    fn result(&self) -> fdo::Result<HashMap<String, String>> {
        Ok(self.info()?.result.into_iter().collect())
    }

    #[zbus(property)]
    fn error(&self) -> fdo::Result<(String, String)> {
        let error = self.info()?.error;
        Ok(error.map_or_else(Default::default, |(kind, text)| (error_name(kind), text)))
    }
}
