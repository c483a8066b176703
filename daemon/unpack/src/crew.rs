//! Threads that write files while the archive is read on.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::extract::FileTask;

/// Files on their way; each holds a directory open.
const QUEUE: usize = 128;
/// More would only wait for the file system.
const THREADS_MAX: usize = 4;
/// How long to wait without a sign of life.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct State {
    tasks: VecDeque<FileTask>,
    /// Being written.
    busy: usize,
    /// The first failure; nothing is begun after it.
    error: Option<Error>,
    closed: bool,
}

/// Writers of files.
pub struct Crew<'a> {
    state: Mutex<State>,
    arrived: Condvar,
    finished: Condvar,
    spool: &'a File,
    /// Called while waiting.
    idle: &'a dyn Fn(),
}

/// What the threads share: all but `idle`, which is the main thread's.
struct Shared<'c> {
    state: &'c Mutex<State>,
    arrived: &'c Condvar,
    finished: &'c Condvar,
    spool: &'c File,
}

fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Poisoned when a thread panicked; its scope panics as well when it is joined.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared<'_> {
    fn serve(&self) {
        let mut state = locked(self.state);
        loop {
            if let Some(task) = state.tasks.pop_front() {
                state.busy += 1;
                drop(state);
                let result = task.carry_out(self.spool);
                drop(task);
                state = locked(self.state);
                state.busy -= 1;
                if let Err(error) = result {
                    state.tasks.clear();
                    state.error.get_or_insert(error);
                }
                self.finished.notify_one();
            } else if state.closed {
                return;
            } else {
                state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

struct Close<'c>(Shared<'c>);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        locked(self.0.state).closed = true;
        self.0.arrived.notify_all();
    }
}

impl<'a> Crew<'a> {
    /// Run `body` with a crew, and wait for all that it handed in.
    pub fn run(spool: &'a File, idle: &'a dyn Fn(), body: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let crew =
            Self { state: Mutex::default(), arrived: Condvar::new(), finished: Condvar::new(), spool, idle };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(THREADS_MAX));
        std::thread::scope(|scope| {
            let _close = Close(crew.shared());
            for _ in 0..threads {
                let shared = crew.shared();
                // Without a name: to set it is a system call that no worker needs.
                std::thread::Builder::new()
                    .stack_size(256 << 10)
                    .spawn_scoped(scope, move || shared.serve())
                    .map_err(Error::io("start a thread"))?;
            }
            body(&crew)?;
            crew.barrier()
        })
    }

    fn shared(&self) -> Shared<'_> {
        Shared { state: &self.state, arrived: &self.arrived, finished: &self.finished, spool: self.spool }
    }

    fn wait_until(&self, enough: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>> {
        let mut state = locked(&self.state);
        loop {
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            if enough(&state) {
                return Ok(state);
            }
            let waited = self.finished.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            state = waited.0;
            if waited.1.timed_out() {
                drop(state);
                (self.idle)();
                state = locked(&self.state);
            }
        }
    }

    /// Hand in a file.
    pub fn submit(&self, task: FileTask) -> Result<()> {
        self.wait_until(|state| state.tasks.len() < QUEUE)?.tasks.push_back(task);
        self.arrived.notify_one();
        Ok(())
    }

    /// Wait until all files are there.
    pub fn barrier(&self) -> Result<()> {
        self.wait_until(|state| state.tasks.is_empty() && state.busy == 0).map(drop)
    }
}
