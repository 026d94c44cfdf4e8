//! Work that several threads share, whose results come in the order in which it was given out.

use crate::error::{Error, Kind, Result, plain_cause};
use crate::threads::with_signals_blocked;
use std::collections::BTreeMap;
use std::num::NonZero;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, available_parallelism, scope};

/// Files read at once where a network lies before them: most of the time each waits for it.
const REMOTE_THREADS: usize = 16;
/// Files read at once from a local file system at most.
const MOST_LOCAL_THREADS: usize = 8;

/// How many files are best read at once.
pub fn file_threads(is_remote: bool) -> usize {
    match is_remote {
        true => REMOTE_THREADS,
        false => available_parallelism().map_or(1, NonZero::get).min(MOST_LOCAL_THREADS),
    }
}

/// Pieces of work in progress for each thread: enough that none waits for a slow neighbour, few enough to be remembered.
const AHEAD: usize = 4;

/// Lets `threads` threads do `work` on everything that `produce` gives out, and hands on the results in that order, on
/// the caller's thread, until `each` has heard enough. Fails with the first failure of either, in that order.
pub fn in_order<J: Send, R: Send>(
    threads: usize,
    produce: impl FnOnce(&mut dyn FnMut(J) -> Result<()>) -> Result<()>,
    work: impl Fn(&J) -> Result<R> + Sync,
    each: &mut dyn FnMut(R) -> ControlFlow<()>,
) -> Result<()> {
    let (jobs, queue) = channel::<(u64, J)>();
    let (done, results) = channel();
    let queue = Mutex::new(queue);
    scope(|scope| {
        let mut started = Err(Error::new(Kind::Internal, "thread", "could not start a thread"));
        for _ in 0..threads.max(1) {
            let (queue, done, work) = (&queue, done.clone(), &work);
            let thread =
                || Builder::new().name("archiver files".into()).spawn_scoped(scope, || serve(queue, done, work));
            match with_signals_blocked(thread) {
                Ok(_) => started = Ok(()),
                Err(error) if started.is_err() => {
                    let message = format!("could not start a thread: {}", plain_cause(&error));
                    started = Err(Error::new(Kind::Internal, "thread", message));
                }
                // Fewer do as well.
                Err(_) => break,
            }
        }
        drop(done);
        started?;
        let mut line = Line {
            jobs,
            results,
            given_out: 0,
            handed_on: 0,
            ready: BTreeMap::new(),
            most: threads.max(1) * AHEAD,
            is_enough: false,
            each,
        };
        let finished = produce(&mut |job| line.give_out(job)).and_then(|()| line.hand_on_until(0));
        // The threads end when nobody gives out work, or takes it back.
        let is_enough = line.is_enough;
        drop(line);
        if is_enough { Ok(()) } else { finished }
    })
}

/// One thread's share.
fn serve<J, R>(queue: &Mutex<Receiver<(u64, J)>>, done: Sender<(u64, Result<R>)>, work: &impl Fn(&J) -> Result<R>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((number, job)) = next else { return };
        let result = catch_unwind(AssertUnwindSafe(|| work(&job)));
        let panicked = |_| Err(Error::new(Kind::Internal, "thread", "internal error in a thread"));
        if done.send((number, result.unwrap_or_else(panicked))).is_err() {
            return;
        }
    }
}

/// What was given out, and what has come back.
struct Line<'a, J, R> {
    jobs: Sender<(u64, J)>,
    results: Receiver<(u64, Result<R>)>,
    given_out: u64,
    handed_on: u64,
    ready: BTreeMap<u64, Result<R>>,
    most: usize,
    is_enough: bool,
    each: &'a mut dyn FnMut(R) -> ControlFlow<()>,
}

impl<J, R> Line<'_, J, R> {
    fn give_out(&mut self, job: J) -> Result<()> {
        self.hand_on_until(self.most - 1)?;
        self.given_out += 1;
        self.jobs.send((self.given_out, job)).map_err(|_| ended())
    }

    /// Hands on results until no more than so many are still to come.
    fn hand_on_until(&mut self, open: usize) -> Result<()> {
        while self.given_out - self.handed_on > open as u64 {
            let (number, result) = self.results.recv().map_err(|_| ended())?;
            self.ready.insert(number, result);
            while let Some(result) = self.ready.remove(&(self.handed_on + 1)) {
                self.handed_on += 1;
                if (self.each)(result?).is_break() {
                    self.is_enough = true;
                    return Err(ended());
                }
            }
        }
        Ok(())
    }
}

fn ended() -> Error {
    Error::new(Kind::Interrupted, "work", "stopped before it was done")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn run(
        threads: usize,
        jobs: u64,
        work: impl Fn(&u64) -> Result<u64> + Sync,
        most: usize,
    ) -> (Vec<u64>, Result<()>) {
        let mut seen = Vec::new();
        let finished = in_order(threads, |give_out| (0..jobs).try_for_each(give_out), work, &mut |result| {
            seen.push(result);
            if seen.len() == most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        (seen, finished)
    }

    #[test]
    fn results_come_in_the_order_of_the_work_whatever_takes_longest() {
        for threads in [0, 1, 3, 16] {
            let slow_first = |job: &u64| {
                std::thread::sleep(Duration::from_micros(if job.is_multiple_of(7) { 2000 } else { 10 }));
                Ok(job * 2)
            };
            let (seen, finished) = run(threads, 200, slow_first, usize::MAX);
            assert_eq!(seen, (0..200).map(|job| job * 2).collect::<Vec<_>>(), "{threads} threads");
            finished.unwrap();
        }
        assert_eq!(run(2, 0, |job| Ok(*job), 1), (Vec::new(), Ok(())));
    }

    #[test]
    fn whoever_has_heard_enough_ends_it() {
        let (seen, finished) = run(4, u64::MAX, |job| Ok(*job), 5);
        assert_eq!((seen, finished), (vec![0, 1, 2, 3, 4], Ok(())));
    }

    #[test]
    fn a_failure_and_a_panic_end_it_after_what_came_before() {
        for is_panic in [false, true] {
            let work = |job: &u64| match job {
                9 if is_panic => panic!("as the test wants it"),
                9 => Err(ended()),
                job => Ok(*job),
            };
            let (seen, finished) = run(4, 1000, work, usize::MAX);
            assert_eq!(seen, (0..9).collect::<Vec<_>>());
            assert!(finished.is_err());
        }
    }
}
