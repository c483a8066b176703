//! Threads that read, hash and link files while the main thread walks on. Results are taken in the order of the walk.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Result;

/// How long to wait without a sign of life.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

/// One piece of work and, later, its result.
#[derive(Debug)]
pub struct Task<J, R> {
    pub job: J,
    result: Mutex<Option<Result<R>>>,
}

struct Queue<J, R> {
    tasks: VecDeque<Arc<Task<J, R>>>,
    closed: bool,
}

/// Jobs in, results out.
pub struct Pool<'a, J, R> {
    queue: Mutex<Queue<J, R>>,
    arrived: Condvar,
    finished: Condvar,
    serving: std::sync::atomic::AtomicUsize,
    work: &'a (dyn Fn(&J) -> Result<R> + Sync),
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock means that a job panicked; the scope then panics as well when its thread is joined.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a, J: Send + Sync, R: Clone + Send> Pool<'a, J, R> {
    /// Run `body` with a pool of as many threads as there are processors.
    pub fn run<T>(
        work: &'a (dyn Fn(&J) -> Result<R> + Sync),
        body: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        let pool = Self {
            queue: Mutex::new(Queue { tasks: VecDeque::new(), closed: false }),
            arrived: Condvar::new(),
            finished: Condvar::new(),
            serving: Default::default(),
            work,
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(16));
        let mut serving = 0;
        std::thread::scope(|scope| {
            let _close = Close(&pool);
            for _ in 0..threads {
                // Without a name: to set it is a system call that no worker needs.
                let spawned =
                    std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, || pool.serve());
                // With none at all, the main thread does the work while it waits, only slower.
                serving += usize::from(spawned.is_ok());
            }
            pool.serving.store(serving, std::sync::atomic::Ordering::Relaxed);
            body(&pool)
        })
    }

    fn serve(&self) {
        loop {
            let mut queue = locked(&self.queue);
            let task = loop {
                if queue.closed {
                    return;
                }
                if let Some(task) = queue.tasks.pop_front() {
                    break task;
                }
                queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            self.carry_out(&task);
        }
    }

    fn carry_out(&self, task: &Task<J, R>) {
        let result = (self.work)(&task.job);
        *locked(&task.result) = Some(result);
        // Under the queue's lock, so that no waiter misses it between its look and its wait.
        let _queue = locked(&self.queue);
        self.finished.notify_all();
    }

    /// Hand in a job.
    pub fn submit(&self, job: J) -> Arc<Task<J, R>> {
        let task = Arc::new(Task { job, result: Mutex::new(None) });
        locked(&self.queue).tasks.push_back(task.clone());
        self.arrived.notify_one();
        task
    }

    /// Wait for a task's result; `idle` is called now and then, so that the daemon sees life.
    pub fn wait(&self, task: &Task<J, R>, idle: &mut dyn FnMut()) -> Result<R> {
        loop {
            let mut queue = locked(&self.queue);
            if let Some(result) = locked(&task.result).clone() {
                return result;
            }
            if self.serving.load(std::sync::atomic::Ordering::Relaxed) == 0
                && let Some(other) = queue.tasks.pop_front()
            {
                drop(queue);
                self.carry_out(&other);
                continue;
            }
            let waited = self.finished.wait_timeout(queue, PATIENCE).unwrap_or_else(PoisonError::into_inner);
            if waited.1.timed_out() {
                drop(waited);
                idle();
            }
        }
    }
}

struct Close<'p, 'a, J, R>(&'p Pool<'a, J, R>);

impl<J, R> Drop for Close<'_, '_, J, R> {
    fn drop(&mut self) {
        locked(&self.0.queue).closed = true;
        self.0.arrived.notify_all();
    }
}
