//! The background worker that receives WAL and archives it: registered whenever the library is preloaded, idle until
//! `archiver.streaming_archiver` is on, so that a reload can switch it.
//!
//! The work is done by a thread; the process's main thread waits, and logs what that tells.

use super::ffi;
use super::report::{log, log_line};
use super::{guc, off_thread};
use archiver_core::config::{Config, Streaming};
use archiver_core::error::plain_cause;
use archiver_core::identity::Marker;
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use archiver_core::stream::{Beginning, Note, Streamer, Tell};
use archiver_core::threads::with_signals_blocked;
use archiver_core::{Error, Kind, Result};
use pgrx::PgLogLevel;
use pgrx::bgworkers::{BackgroundWorker, BackgroundWorkerBuilder, BgWorkerStartTime, SignalWakeFlags};
use pgrx::pg_sys::Datum;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long PostgreSQL waits before it starts a worker that has ended again.
const RESTART_PAUSE: Duration = Duration::from_secs(5);
/// How long the thread may take to end: pg_receivewal writes what it has, and is killed after five seconds.
const END_PATIENCE: Duration = Duration::from_secs(8);
/// How long that may take where the configuration was changed, what it archives included.
const CHANGE_PATIENCE: Duration = Duration::from_secs(20);
/// Before a thread that could not begin is started again.
const BEGIN_PAUSE: Duration = Duration::from_secs(10);
/// How often the thread is looked at where nothing wakes.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const SHORT_LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// More notes than these that nobody has logged yet are not kept.
const MOST_NOTES: usize = 1000;
/// PostgreSQL starts a worker again unless it ends with 0.
const EXIT_CODE: i32 = 1;

/// Registers the worker. Only where the library is preloaded can that be done.
pub fn register() {
    if !ffi::is_preloading() || ffi::is_being_upgraded() {
        return;
    }
    BackgroundWorkerBuilder::new("archiver streaming")
        .set_library("archiver")
        .set_function("archiver_streaming_main")
        // On a standby, too: which server it receives from is a setting.
        .set_start_time(BgWorkerStartTime::ConsistentState)
        .set_restart_time(Some(RESTART_PAUSE))
        .load();
}

/// The worker's process, which PostgreSQL calls by this name.
#[unsafe(no_mangle)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn archiver_streaming_main(_argument: Datum) {
    BackgroundWorker::attach_signal_handlers(SignalWakeFlags::SIGHUP | SignalWakeFlags::SIGTERM);
    match Worker::new() {
        Ok(mut worker) => worker.work(),
        Err(error) => log(PgLogLevel::WARNING, Report::new("WAL is not being received", &error)),
    }
    ffi::exit(EXIT_CODE);
}

/// What is to be done, by the configuration.
type Wanted = Option<(Config, Streaming)>;

struct Worker {
    wake_up: UnixStream,
    waker: Arc<UnixStream>,
    notes: Arc<Mutex<VecDeque<Note>>>,
    configuration_read_at: Option<i64>,
    /// Whether it is this server's own promotion that is waited for.
    waits_for_promotion: bool,
    wanted: Result<Wanted>,
    thread: Option<Thread>,
    /// Before that no thread is started again that could not begin.
    rests_until: Option<Instant>,
    /// Why the last one could not; told already.
    complaint: Option<Error>,
}

/// A thread that receives.
struct Thread {
    does: (Config, Streaming),
    pulse: Arc<Pulse>,
    /// Since when it is to end.
    stopped_at: Option<Instant>,
    handle: JoinHandle<Result<()>>,
}

impl Worker {
    fn new() -> Result<Self> {
        let (wake_up, waker) = off_thread::wake_up_pair()?;
        Ok(Worker {
            wake_up,
            waker: Arc::new(waker),
            notes: Arc::default(),
            configuration_read_at: None,
            waits_for_promotion: false,
            wanted: Ok(None),
            thread: None,
            rests_until: None,
            complaint: None,
        })
    }

    fn work(&mut self) {
        while !ffi::shutdown_is_pending() {
            ffi::take_reload();
            self.take_configuration();
            self.see_to_the_thread();
            self.tell_notes();
            let is_ending = self.thread.as_ref().is_some_and(|thread| thread.pulse.is_stopped());
            if !self.sleep(if is_ending { SHORT_LOOK_INTERVAL } else { LOOK_INTERVAL }) {
                return;
            }
        }
        self.end();
    }

    /// Answers whether the postmaster lives.
    fn sleep(&self, timeout: Duration) -> bool {
        let woken = ffi::wait(self.wake_up.as_fd(), timeout);
        off_thread::drain(&self.wake_up);
        if woken.by_latch {
            ffi::reset_latch();
        }
        ffi::check_for_interrupts();
        !woken.by_postmaster_death
    }

    fn take_configuration(&mut self) {
        let read_at = ffi::configuration_read_at();
        let is_promoted = self.waits_for_promotion && !ffi::is_in_recovery();
        if self.configuration_read_at == Some(read_at) && !is_promoted {
            return;
        }
        self.configuration_read_at = Some(read_at);
        let wanted = guc::streaming(Path::new("."));
        // As with archiving by file: of all the copies of a server only the primary archives its own WAL.
        self.waits_for_promotion = matches!(wanted, Ok(Some(_))) && guc::receives_own_wal() && ffi::is_in_recovery();
        let wanted = if self.waits_for_promotion { Ok(None) } else { wanted };
        if wanted == self.wanted {
            return;
        }
        if let Err(error) = &wanted {
            log(PgLogLevel::LOG, Report::new("WAL is not received", error));
        }
        (self.wanted, self.rests_until, self.complaint) = (wanted, None, None);
    }

    /// Ends a thread that does what is not wanted any more, and starts one where none does what is. One that hangs takes the
    /// process with it.
    fn see_to_the_thread(&mut self) {
        let wanted = self.wanted.as_ref().ok().and_then(Option::as_ref);
        match self.thread.take() {
            Some(thread) if thread.handle.is_finished() => {
                if !thread.pulse.is_stopped() {
                    self.rests_until = Some(Instant::now() + BEGIN_PAUSE);
                }
                // What it has started ends, too.
                thread.pulse.stop();
                self.take_end(thread.handle);
            }
            Some(mut thread) => {
                if Some(&thread.does) != wanted && thread.stopped_at.is_none() {
                    log_line(PgLogLevel::LOG, "receiving WAL ends: its configuration was changed".to_string());
                    thread.pulse.stop();
                    thread.stopped_at = Some(Instant::now());
                }
                // Also where what it did is wanted again by now: it does not do it any more.
                if thread.stopped_at.is_some_and(|stopped_at| stopped_at.elapsed() > CHANGE_PATIENCE) {
                    leave(&thread.does.1);
                }
                self.thread = Some(thread);
            }
            None => {
                let is_resting = self.rests_until.is_some_and(|until| Instant::now() < until);
                if let Some(does) = wanted.filter(|_| !is_resting) {
                    match self.start(does.clone()) {
                        Ok(thread) => self.thread = Some(thread),
                        Err(error) => {
                            self.rests_until = Some(Instant::now() + BEGIN_PAUSE);
                            self.complain(error);
                        }
                    }
                }
            }
        }
    }

    fn start(&self, does: (Config, Streaming)) -> Result<Thread> {
        let pulse: Arc<Pulse> = Arc::default();
        let (notes, waker) = (Arc::clone(&self.notes), Arc::clone(&self.waker));
        let tell: Tell = Arc::new(move |note| {
            let mut notes = notes.lock().unwrap_or_else(PoisonError::into_inner);
            if notes.len() < MOST_NOTES {
                notes.push_back(note);
            }
            off_thread::wake(&waker);
        });
        let cluster = ffi::cluster();
        let marker = Marker::of_data_directory(&ffi::data_directory());
        let configuration_file = ffi::config_file();
        let ((config, streaming), beaten) = (does.clone(), Arc::clone(&pulse));
        let waker = Arc::clone(&self.waker);
        let receive = move || {
            let streamer = Streamer::new(config, streaming, Beginning::RememberedBy(marker), beaten, tell);
            let ended = streamer.and_then(|streamer| {
                let streamer = streamer
                    .with_hash_key(Some(cluster.system_identifier), cluster.hash_key)
                    .with_configuration_file(configuration_file);
                Arc::new(streamer).run()
            });
            off_thread::wake(&waker);
            ended
        };
        let spawned =
            with_signals_blocked(|| std::thread::Builder::new().name("archiver receive".into()).spawn(receive));
        let handle = spawned.map_err(|error| {
            Error::new(Kind::Internal, "thread", format!("could not start a thread: {}", plain_cause(&error)))
        })?;
        Ok(Thread { does, pulse, stopped_at: None, handle })
    }

    fn take_end(&mut self, handle: JoinHandle<Result<()>>) {
        let panicked = |_| Err(Error::new(Kind::Internal, "thread", "internal error in the thread that receives"));
        match handle.join().unwrap_or_else(panicked) {
            Ok(()) => self.complaint = None,
            Err(error) => self.complain(error),
        }
    }

    fn complain(&mut self, error: Error) {
        if self.complaint.as_ref() != Some(&error) {
            log(PgLogLevel::WARNING, Report::new("WAL is not being received", &error));
            self.complaint = Some(error);
        }
    }

    fn tell_notes(&self) {
        let notes = std::mem::take(&mut *self.notes.lock().unwrap_or_else(PoisonError::into_inner));
        for note in notes {
            match note {
                Note::Progress(line) => log_line(PgLogLevel::DEBUG1, line),
                Note::Log(line) => log_line(PgLogLevel::LOG, line),
                Note::Warning(report) => log(PgLogLevel::WARNING, report),
            }
        }
    }

    /// Ends the thread, so that pg_receivewal writes what it has: the server stops.
    fn end(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        thread.pulse.stop();
        let deadline = Instant::now() + END_PATIENCE;
        while !thread.handle.is_finished() && Instant::now() < deadline && self.sleep(SHORT_LOOK_INTERVAL) {
            self.tell_notes();
        }
        self.tell_notes();
    }
}

/// Ends the process with its thread, which a file system does not let go. PostgreSQL starts another one.
fn leave(hangs: &Streaming) {
    let directory = hangs.directory.display().to_string();
    let message = format!("receiving into \"{directory}\" does not end");
    let error = Error::new(Kind::Storage, directory, message);
    let error = error.hint("Does the file system answer? The worker is started again and heeds the new configuration.");
    log(PgLogLevel::WARNING, Report::of(&error));
    ffi::exit(EXIT_CODE);
}
