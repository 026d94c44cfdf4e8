//! The pool: threads that archive the file PostgreSQL asks for, and the ones it will ask for next.
//!
//! One thread asks ([`Archiver`]); workers take jobs in PostgreSQL's order, the file asked for first. A file that was
//! stored ahead is answered at once when its turn comes. Catalogue lines are written in PostgreSQL's order: a file that
//! is stored early waits for its line until those before it have theirs, and files that wait share one fsync.

use super::read_ahead::ReadAhead;
use super::source::WalFile;
use super::{Archive, StoredFile};
use crate::error::{Error, Kind, Result};
use crate::pulse::Pulse;
use crate::stamp::Stamp;
use crate::store::Facts;
use crate::sys::{map_buffers_from, release_cached_pages};
use crate::threads::with_signals_blocked;
use crate::wal::WalName;
use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Pauses between attempts at one file: doubled from the first up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a wait looks for more files to begin.
const LOOK_AHEAD_INTERVAL: Duration = Duration::from_secs(1);
/// How many of the newest store times are kept for percentiles.
const MOST_TIMES: usize = 1024;
/// Sources and bodies of this size go back to the kernel when they are done with, lest threads hoard what others need:
/// `memory_limit` counts what is in use.
const LARGE_BUFFER_BYTES: i32 = 1 << 20;
/// Threads at most, those included that hang in a storage that was configured before.
const MOST_WORKERS: usize = 256;

/// The answer to [`Archiver::poll`].
#[derive(Debug)]
pub enum Answer {
    /// The file asked for is durable, line and all.
    Stored(StoredFile),
    /// It failed, and trying again at once would not help.
    Failed(Error),
    /// Not yet. Ask again when the waker was called, and at the given time at the latest.
    Waiting(Option<Instant>),
}

/// How far one file has come.
#[derive(Clone, Debug)]
pub enum Progress {
    /// Waiting for a thread, or at work.
    Running,
    /// Stored ahead: PostgreSQL has yet to ask for it.
    Stored,
    /// It failed.
    Failed(Error),
}

/// What was done since the start of the process.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Files answered as stored.
    pub archived: u64,
    /// Plain bytes of them.
    pub bytes_read: u64,
    /// Bytes they took in the archive.
    pub bytes_stored: u64,
    /// Files that were stored before PostgreSQL asked for them.
    pub read_ahead_hits: u64,
    /// Attempts repeated inside one request.
    pub retries: u64,
    /// The newest store times.
    times: VecDeque<Duration>,
}

impl Totals {
    /// The store time that `percent` of the newest files stayed within, in milliseconds.
    pub fn percentile_ms(&self, percent: usize) -> Option<f64> {
        let mut times: Vec<Duration> = self.times.iter().copied().collect();
        times.sort_unstable();
        let at = (times.len() * percent).div_ceil(100).checked_sub(1)?;
        times.get(at).map(|time| time.as_secs_f64() * 1000.0)
    }

    fn add(&mut self, file: &StoredFile, was_ahead: bool) {
        self.archived += 1;
        self.bytes_read += file.plain_size;
        self.bytes_stored += file.stored_size;
        self.read_ahead_hits += u64::from(was_ahead);
        if self.times.len() == MOST_TIMES {
            self.times.pop_front();
        }
        self.times.push_back(file.took);
    }
}

/// Called from worker threads when the asking thread should look again. Must not block.
pub type Waker = Box<dyn Fn() + Send + Sync>;

/// The asking side. It belongs to one thread, never blocks on the storage, and answers for one file at a time.
pub struct Archiver {
    shared: Arc<Shared>,
    read_ahead: ReadAhead,
    looked_ahead_at: Option<Instant>,
    asked: Option<Asked>,
    /// Whether the last answer was a failure.
    is_failing: bool,
    totals: Totals,
}

struct Asked {
    name: WalName,
    path: PathBuf,
    was_ahead: bool,
    since: Instant,
    pause: Duration,
    retry_at: Option<Instant>,
}

struct Shared {
    state: Mutex<State>,
    /// Work for idle workers, or the word to end.
    work: Condvar,
    /// A worker has ended.
    ended: Condvar,
    waker: Waker,
    pulse: Arc<Pulse>,
    /// Whether others than this process read the sources.
    has_other_readers: AtomicBool,
    /// Attempts repeated by workers themselves, which have yet to be added to the totals.
    retries: AtomicU64,
}

#[derive(Default)]
struct State {
    archive: Option<Arc<Archive>>,
    /// Counts configurations; a result made under an older one is dropped.
    generation: u64,
    jobs: BTreeMap<WalName, Job>,
    asked: Option<WalName>,
    is_recording: bool,
    /// Workers of this generation. Those of earlier ones end as soon as they can; one that hangs in the storage it
    /// was made for keeps nobody from working on the new one.
    workers: usize,
    wanted_workers: usize,
    /// Workers of every generation.
    alive: usize,
    is_stopping: bool,
}

struct Job {
    path: PathBuf,
    phase: Phase,
}

enum Phase {
    Queued,
    Running,
    /// Durable at its place, waiting for its line.
    Stored(StoredFile),
    Recording,
    Done(StoredFile),
    Failed(Error),
}

impl Phase {
    fn is_finished(&self) -> bool {
        matches!(self, Phase::Done(_) | Phase::Failed(_))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Archiver {
    /// An archiver without threads or work yet. Workers call `waker`; the work beats `pulse`.
    pub fn new(waker: Waker, pulse: Arc<Pulse>) -> Self {
        map_buffers_from(LARGE_BUFFER_BYTES);
        let shared = Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            ended: Condvar::new(),
            waker,
            pulse,
            has_other_readers: AtomicBool::new(true),
            retries: AtomicU64::new(0),
        };
        Archiver {
            shared: Arc::new(shared),
            read_ahead: ReadAhead::default(),
            looked_ahead_at: None,
            asked: None,
            is_failing: false,
            totals: Totals::default(),
        }
    }

    /// From now on works on that archive, or on none. What was done or begun under the one before is never answered
    /// again.
    pub fn use_archive(&mut self, archive: Option<Arc<Archive>>) {
        let mut state = self.shared.lock();
        state.wanted_workers = archive.as_ref().map_or(0, |archive| archive.threads());
        if let Some(before) = std::mem::replace(&mut state.archive, archive) {
            before.retire();
        }
        state.generation += 1;
        state.workers = 0;
        state.jobs.clear();
        state.is_recording = false;
        drop(state);
        self.asked = None;
        self.shared.work.notify_all();
    }

    /// Says whether others read the same files; at first they may. Where nobody does, a file that is stored need not stay
    /// in the kernel's cache, as PostgreSQL itself has it where WAL is neither archived nor streamed (xlog.c,
    /// XLogFileClose).
    pub fn tell_other_readers(&self, has_other_readers: bool) {
        self.shared.has_other_readers.store(has_other_readers, Ordering::Relaxed);
    }

    /// Asks for one file; the answer comes from [`Archiver::poll`]. Files that wait behind it are begun as well.
    pub fn ask(&mut self, file: &WalFile) -> Result<()> {
        self.start_workers()?;
        let mut state = self.shared.lock();
        if state.is_stopping {
            return Err(Error::new(Kind::Interrupted, file.name.to_string(), "the archiver is stopping"));
        }
        let Some(archive) = state.archive.clone() else {
            return Err(Error::new(Kind::Internal, file.name.to_string(), "no archive was opened"));
        };
        state.asked = Some(file.name);
        // PostgreSQL asks in order: what lies before was removed or answered elsewhere.
        state.jobs.retain(|name, job| *name >= file.name || !job.phase.is_finished());
        let phase = state.jobs.get(&file.name).map(|job| &job.phase);
        let was_ahead = matches!(phase, Some(Phase::Done(_)));
        // A failure of reading ahead is nobody's answer: the file is tried again now that it is wanted.
        if matches!(phase, None | Some(Phase::Failed(_))) {
            state.jobs.insert(file.name, Job { path: file.path.clone(), phase: Phase::Queued });
        }
        drop(state);
        let (now, path) = (Instant::now(), file.path.clone());
        self.asked = Some(Asked { name: file.name, path, was_ahead, since: now, pause: FIRST_PAUSE, retry_at: None });
        self.look_ahead(&archive);
        // Also where nothing lies ahead: the file itself is work.
        self.shared.work.notify_all();
        Ok(())
    }

    /// Begins files that wait behind the one asked for, where the window is less than half full.
    fn look_ahead(&mut self, archive: &Archive) {
        let (most, asked) = (archive.config().read_ahead, self.asked.as_ref());
        let room = most.saturating_sub(self.shared.lock().jobs.len().saturating_sub(1));
        // While files fail, the one that PostgreSQL waits for gets the storage, and what room is left there, to itself.
        let Some(asked) = asked.filter(|_| !self.is_failing && room > most / 2) else { return };
        let Some(pg_wal) = asked.path.parent() else { return };
        self.looked_ahead_at = Some(Instant::now());
        let next = self.read_ahead.next_files(pg_wal, &asked.name, archive.cluster().segment_size, most);
        let mut state = self.shared.lock();
        for name in next {
            if state.jobs.len() > most {
                break;
            }
            state.jobs.entry(name).or_insert_with(|| Job { path: pg_wal.join(name.to_string()), phase: Phase::Queued });
        }
        drop(state);
        self.shared.work.notify_all();
    }

    /// While the storage is slow, more files become ready behind the one that PostgreSQL waits for.
    fn look_ahead_again(&mut self) {
        let archive = self.shared.lock().archive.clone();
        if let Some(archive) = archive
            && self.looked_ahead_at.is_none_or(|at| at.elapsed() >= LOOK_AHEAD_INTERVAL)
        {
            self.look_ahead(&archive);
        }
    }

    /// The answer for the file asked for, without waiting. A failure that may pass is tried again, with pauses, as
    /// long as `may_retry` and within the retry timeout.
    pub fn poll(&mut self, may_retry: bool) -> Answer {
        let answer = self.answer(may_retry);
        if matches!(answer, Answer::Waiting(_)) {
            self.look_ahead_again();
        }
        answer
    }

    fn answer(&mut self, may_retry: bool) -> Answer {
        let nothing_asked = || Answer::Failed(Error::new(Kind::Internal, "", "no file was asked for"));
        self.totals.retries += self.shared.retries.swap(0, Ordering::Relaxed);
        let Some(asked) = &mut self.asked else { return nothing_asked() };
        let mut state = self.shared.lock();
        let retry_timeout =
            state.archive.as_ref().map_or(Duration::ZERO, |archive| archive.config().destination.retry_timeout);
        let Some(job) = state.jobs.get_mut(&asked.name) else { return nothing_asked() };
        let now = Instant::now();
        match &job.phase {
            Phase::Failed(error) => {
                let may_try_again = may_retry && error.is_worth_retrying() && now - asked.since < retry_timeout;
                match asked.retry_at {
                    _ if !may_try_again => {
                        let error = error.clone();
                        self.is_failing = true;
                        state.jobs.remove(&asked.name);
                        state.asked = None;
                        self.asked = None;
                        return Answer::Failed(error);
                    }
                    None => {
                        asked.retry_at = Some(now + asked.pause);
                        asked.pause = (asked.pause * 2).min(LONGEST_PAUSE);
                    }
                    Some(at) if now >= at => {
                        asked.retry_at = None;
                        job.phase = Phase::Queued;
                        self.totals.retries += 1;
                        self.shared.work.notify_all();
                    }
                    Some(_) => {}
                }
                Answer::Waiting(asked.retry_at)
            }
            Phase::Done(stored) if Stamp::of_path(&job.path).ok() != Some(stored.stamp) => {
                // Re-created since it was read: what is stored is another file, and the duplicate rule will say so.
                asked.was_ahead = false;
                job.phase = Phase::Queued;
                self.shared.work.notify_all();
                Answer::Waiting(None)
            }
            Phase::Done(stored) => {
                let (stored, was_ahead) = (stored.clone(), asked.was_ahead);
                state.jobs.remove(&asked.name);
                if std::mem::take(&mut self.is_failing) {
                    // The trouble is over: what failed while reading ahead may be begun again.
                    state.jobs.retain(|_, job| !matches!(job.phase, Phase::Failed(_)));
                }
                state.asked = None;
                self.asked = None;
                drop(state);
                self.totals.add(&stored, was_ahead);
                Answer::Stored(stored)
            }
            Phase::Queued | Phase::Running | Phase::Stored(_) | Phase::Recording => Answer::Waiting(None),
        }
    }

    /// Files in progress or stored ahead.
    pub fn in_flight(&self) -> usize {
        self.shared.lock().jobs.values().filter(|job| !matches!(job.phase, Phase::Failed(_))).count()
    }

    /// How far each file has come that is in progress, stored ahead, or failed while it was read ahead.
    pub fn progress(&self) -> Vec<(WalName, Progress)> {
        let of_phase = |phase: &Phase| match phase {
            Phase::Queued | Phase::Running => Progress::Running,
            Phase::Stored(_) | Phase::Recording | Phase::Done(_) => Progress::Stored,
            Phase::Failed(error) => Progress::Failed(error.clone()),
        };
        self.shared.lock().jobs.iter().map(|(name, job)| (*name, of_phase(&job.phase))).collect()
    }

    /// What is known of the storage, once a file was stored there.
    pub fn store_facts(&self) -> Option<Facts> {
        let archive = self.shared.lock().archive.clone();
        archive.and_then(|archive| archive.store_facts())
    }

    /// What was done since the start.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// Ends the workers; waits for them until `deadline` at the latest and answers whether all have ended. A worker
    /// that hangs in the storage is left behind: it ends with the process, and nothing it does is reported.
    pub fn stop(&mut self, deadline: Instant) -> bool {
        self.shared.pulse.stop();
        let mut state = self.shared.lock();
        state.is_stopping = true;
        self.shared.work.notify_all();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.alive == 0 || left.is_zero() {
                return state.alive == 0;
            }
            let waited = self.shared.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn start_workers(&mut self) -> Result<()> {
        loop {
            let mut state = self.shared.lock();
            if state.is_stopping || state.workers >= state.wanted_workers {
                return Ok(());
            }
            if state.alive >= MOST_WORKERS {
                return enough_or(state.workers, "too many of them hang in the storage");
            }
            state.workers += 1;
            state.alive += 1;
            let (number, generation) = (state.workers, state.generation);
            drop(state);
            let shared = Arc::clone(&self.shared);
            let spawned = with_signals_blocked(|| {
                Builder::new().name(format!("archiver {number}")).spawn(move || run_worker(&shared, generation))
            });
            if let Err(error) = spawned {
                let mut state = self.shared.lock();
                state.workers -= 1;
                state.alive -= 1;
                return enough_or(state.workers, &crate::error::plain_cause(&error));
            }
        }
    }
}

/// Idle workers end; whoever is at work ends after its file.
impl Drop for Archiver {
    fn drop(&mut self) {
        self.shared.lock().is_stopping = true;
        self.shared.work.notify_all();
    }
}

/// Fewer workers than wanted will do, none will not.
fn enough_or(workers: usize, cause: &str) -> Result<()> {
    if workers > 0 {
        return Ok(());
    }
    let message = format!("could not start a worker thread: {cause}");
    Err(Error::new(Kind::Internal, "worker", message).hint(
        "Raise the limit of processes for the user that runs PostgreSQL, or restart the server if its storage hangs.",
    ))
}

/// A worker's whole life. Whatever goes wrong in it, it is counted out at the end.
fn run_worker(shared: &Shared, generation: u64) {
    let _ = catch_unwind(AssertUnwindSafe(|| work(shared, generation)));
    let mut state = shared.lock();
    state.alive -= 1;
    if state.generation == generation {
        state.workers -= 1;
    }
    shared.ended.notify_all();
}

fn work(shared: &Shared, generation: u64) {
    while let Some((file, level, archive)) = next_job(shared, generation) {
        let works_in_turn = archive.works_in_turn();
        let retried = || {
            shared.retries.fetch_add(1, Ordering::Relaxed);
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| match works_in_turn {
            true => archive.archive_whole(&file, level, retried),
            false => archive.store_at(&file, level),
        }));
        let outcome = outcome.unwrap_or_else(|panic| Err(panicked(&file.name, &*panic)));
        drop(archive);
        let is_stored = outcome.is_ok();
        let mut state = shared.lock();
        if state.generation == generation
            && let Some(job) = state.jobs.get_mut(&file.name)
            && matches!(job.phase, Phase::Running)
        {
            job.phase = match outcome {
                Ok(stored) if works_in_turn => Phase::Done(stored),
                Ok(stored) => Phase::Stored(stored),
                Err(error) => Phase::Failed(error),
            };
            if works_in_turn && !is_stored {
                // What comes behind it is not its hooks' turn before this one is archived.
                let asked = state.asked;
                state.jobs.retain(|name, job| asked == Some(*name) || !matches!(job.phase, Phase::Queued));
            }
        }
        drop(state);
        record_stored(shared);
        (shared.waker)();
        if is_stored && !shared.has_other_readers.load(Ordering::Relaxed) {
            // Gone by now, or in use again under another name: then nothing of it is kept from anybody.
            let _ = File::open(&file.path).map(|file| release_cached_pages(&file));
        }
    }
}

/// Waits for work. Nothing: this worker is to end.
fn next_job(shared: &Shared, generation: u64) -> Option<(WalFile, i32, Arc<Archive>)> {
    let mut state = shared.lock();
    loop {
        if state.is_stopping || state.generation != generation {
            return None;
        }
        // A file stored early may have waited for its line until it was asked for.
        if !state.recordable().is_empty() {
            drop(state);
            record_stored(shared);
            state = shared.lock();
            continue;
        }
        if let Some(job) = state.take_job() {
            return Some(job);
        }
        // Ended by a new job, or by the word to stop.
        state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

impl State {
    /// The file asked for if it is queued, else the first in PostgreSQL's order; and the level it is to be compressed at.
    fn take_job(&mut self) -> Option<(WalFile, i32, Arc<Archive>)> {
        let archive = self.archive.clone()?;
        let is_queued = |job: &Job| matches!(job.phase, Phase::Queued);
        let asked = self.asked.filter(|asked| self.jobs.get(asked).is_some_and(is_queued));
        let name = asked.or_else(|| self.jobs.iter().find(|(_, job)| is_queued(job)).map(|(name, _)| *name))?;
        let is_unfinished = |job: &&Job| matches!(job.phase, Phase::Queued | Phase::Running);
        let level = archive.level(self.jobs.values().filter(is_unfinished).count());
        let job = self.jobs.get_mut(&name)?;
        job.phase = Phase::Running;
        Some((WalFile { name, path: job.path.clone() }, level, archive))
    }

    /// The stored files whose line may be written now: in order, up to the first that is not stored yet; and the one
    /// asked for whatever lies before it. None while somebody writes.
    fn recordable(&self) -> Vec<WalName> {
        let mut names = Vec::new();
        let mut is_blocked = self.is_recording;
        for (name, job) in &self.jobs {
            match &job.phase {
                Phase::Stored(_) if !is_blocked || !self.is_recording && self.asked == Some(*name) => names.push(*name),
                Phase::Queued | Phase::Running => is_blocked = true,
                _ => {}
            }
        }
        names
    }

    fn take_recordable(&mut self) -> Vec<StoredFile> {
        let names = self.recordable();
        let take = |name| {
            let job = self.jobs.get_mut(&name)?;
            match std::mem::replace(&mut job.phase, Phase::Recording) {
                Phase::Stored(file) => Some(file),
                _ => None,
            }
        };
        names.into_iter().filter_map(take).collect()
    }
}

/// Writes the lines that may be written; whoever comes meanwhile leaves its file to the one who writes.
fn record_stored(shared: &Shared) {
    loop {
        let mut state = shared.lock();
        let generation = state.generation;
        let Some(archive) = state.archive.clone() else { return };
        let batch = state.take_recordable();
        if batch.is_empty() {
            return;
        }
        state.is_recording = true;
        drop(state);

        let record = |files: &[StoredFile]| {
            catch_unwind(AssertUnwindSafe(|| archive.record(files)))
                .unwrap_or_else(|panic| Err(panicked(&files[0].name, &*panic)))
        };
        let together = record(&batch);
        // What fails for one file must not be told of another.
        let recorded: Vec<Result<()>> = match together {
            Err(_) if batch.len() > 1 => batch.iter().map(|file| record(std::slice::from_ref(file))).collect(),
            other => vec![other; batch.len()],
        };
        shared.pulse.beat();

        let mut state = shared.lock();
        if state.generation != generation {
            return;
        }
        state.is_recording = false;
        for (file, recorded) in batch.into_iter().zip(recorded) {
            if let Some(job) = state.jobs.get_mut(&file.name) {
                job.phase = match recorded {
                    Ok(()) => Phase::Done(file),
                    Err(error) => Phase::Failed(error),
                };
            }
        }
        drop(state);
        (shared.waker)();
    }
}

fn panicked(name: &WalName, panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let cause = text.unwrap_or("no message");
    Error::new(Kind::Internal, name.to_string(), format!("internal error: {cause}"))
        .hint("This is a fault of the archiver: please report it. The file is tried again by itself.")
}
