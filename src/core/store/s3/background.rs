//! The one thread that drives a store's requests.
//!
//! The callers are ordinary threads that wait; what they wait for is bounded by the requests' own deadlines and ends
//! when the pulse is told to stop ([`super::session`]).

use crate::error::{Error, Kind, Result, plain_cause};
use crate::threads::with_signals_blocked;
use std::future::Future;
use std::sync::mpsc;
use std::thread::{Builder, JoinHandle};
use tokio::runtime::{Builder as RuntimeBuilder, Handle};
use tokio::sync::oneshot;

/// A runtime of its own, for as long as this lives. Nothing is kept for the process: a session of the server that asked
/// the store one question has no more threads than before.
pub struct Background {
    handle: Handle,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Names are resolved and files read on threads of their own, since both may hang: one for each connection at once, and
/// some for files. They end when they are idle.
const MOST_BLOCKING_THREADS: usize = 68;

impl Background {
    /// Starts the thread. The runtime is made inside it, so that the threads it makes have its signal mask.
    pub fn start() -> Result<Self> {
        let failed = |cause: String| {
            Error::new(Kind::Internal, "thread", format!("could not start the thread of the store's requests: {cause}"))
                .retry_if(true)
        };
        let (sender, receiver) = mpsc::channel();
        let (end, ended) = oneshot::channel::<()>();
        let drive = move || {
            let mut builder = RuntimeBuilder::new_current_thread();
            let runtime = builder.enable_io().enable_time().max_blocking_threads(MOST_BLOCKING_THREADS).build();
            let runtime = match runtime {
                Ok(runtime) => runtime,
                Err(error) => return drop(sender.send(Err(plain_cause(&error)))),
            };
            drop(sender.send(Ok(runtime.handle().clone())));
            // Ends when the sender is dropped.
            let _ = runtime.block_on(ended);
            runtime.shutdown_background();
        };
        let spawned = with_signals_blocked(|| Builder::new().name("archiver s3".into()).spawn(drive));
        let thread = spawned.map_err(|error| failed(plain_cause(&error)))?;
        let handle = receiver.recv().unwrap_or_else(|_| Err("it ended".to_string())).map_err(failed)?;
        Ok(Background { handle, end: Some(end), thread: Some(thread) })
    }

    /// Begins `work`, which goes on beside the caller.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(work);
    }

    /// Does `work` and waits for it.
    pub fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let (sender, receiver) = mpsc::channel();
        self.handle.spawn(async move {
            // The caller waits.
            let _ = sender.send(work.await);
        });
        receiver.recv().map_err(|_| {
            Error::new(Kind::Internal, "thread", "internal error: a request to the store ended without an answer")
                .hint("This is a fault of the archiver: please report it. The file is tried again by itself.")
        })
    }
}

/// Requests that are under way are given up.
impl Drop for Background {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It waits for nothing: what may hang was handed to threads that are left behind.
            let _ = thread.join();
        }
    }
}
