//! What an environment runs itself: planned, and its log, `$XDG_STATE_HOME/casemate/ID.log`. Init, which outlives daemons,
//! writes the log and keeps it short; it is there until the environment is destroyed.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

use casemate_sandbox::plan::{Health, Restart, Service};
use casemate_store::Id;

use crate::error::Error;
use crate::records::EnvironmentRecord;
use crate::{Engine, Inner, parse_id};

impl Inner {
    fn log_path(&self, id: &Id) -> PathBuf {
        self.settings.state.join(format!("{id}.log"))
    }

    /// For init, to append to.
    pub(crate) fn open_log(&self, id: &Id) -> Result<OwnedFd, Error> {
        let state = &self.settings.state;
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state)
            .map_err(Error::io("make", state))?;
        let path = self.log_path(id);
        let opened = File::options().create(true).read(true).append(true).mode(0o600).open(&path);
        opened.map(OwnedFd::from).map_err(Error::io("open", path))
    }

    pub(crate) fn remove_log(&self, id: &Id) -> Result<(), Error> {
        let path = self.log_path(id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("remove", path)(error))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn plan_service(&self, record: &EnvironmentRecord) -> Result<Option<Service>, Error> {
        let Some(service) = &record.service else { return Ok(None) };
        let account = self.account(&record.layers);
        // Nobody's variables are to be had but the manifest's.
        let environment = self.session_variables(record, &account, &[], service.root)?;
        let restart = match service.restart {
            casemate_manifest::Restart::No => Restart::No,
            casemate_manifest::Restart::OnFailure => Restart::OnFailure,
            casemate_manifest::Restart::Always => Restart::Always,
        };
        let health = service.health.as_ref().map(|health| Health {
            command: health.command.0.clone(),
            interval_seconds: health.interval,
            timeout_seconds: health.timeout,
            retries: health.retries,
            start_period_seconds: health.start_period,
            restarts: health.on_failure == casemate_manifest::OnFailure::Restart,
        });
        Ok(Some(Service {
            command: service.command.0.clone(),
            environment,
            directory: if service.root { "/root".to_owned() } else { account.home },
            root: service.root,
            restart,
            health,
        }))
    }
}

impl Engine {
    /// What the environment's own command has printed, to read.
    pub fn log(&self, id: &str) -> Result<OwnedFd, Error> {
        let id = parse_id(id)?;
        let name = self.inner.with_environment(&id, |environment| environment.record.name.clone())?;
        let path = self.inner.log_path(&id);
        match File::open(&path) {
            Ok(file) => Ok(file.into()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(Error::NotFound {
                what: "log of",
                name,
                remedy: "an environment has one once its own command ([runtime] command) was started",
            }),
            Err(error) => Err(Error::io("open", path)(error)),
        }
    }
}
