//! Threads that read, hash and link files while the main thread walks on. Results are taken in the order of the walk.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::Result;

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
            work,
        };
        // The main thread works too while it waits for a result.
        let threads =
            std::thread::available_parallelism().map_or(1, |n| n.get().saturating_sub(1).clamp(1, 15));
        std::thread::scope(|scope| {
            let _close = Close(&pool);
            for _ in 0..threads {
                // Without a name: to set it is a system call that no worker needs.
                let spawned =
                    std::thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, || pool.serve());
                if spawned.is_err() {
                    // The main thread does it all, only slower.
                    break;
                }
            }
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

    /// Wait for a task's result, working off others meanwhile.
    pub fn wait(&self, task: &Task<J, R>) -> Result<R> {
        loop {
            let mut queue = locked(&self.queue);
            if let Some(result) = locked(&task.result).clone() {
                return result;
            }
            if let Some(other) = queue.tasks.pop_front() {
                drop(queue);
                self.carry_out(&other);
                continue;
            }
            drop(self.finished.wait(queue).unwrap_or_else(PoisonError::into_inner));
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
