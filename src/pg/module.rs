//! The archive module: PostgreSQL's callbacks, and the wait for the one file it asks for.
//!
//! The callbacks never raise and never unwind into C. They run on the archiver's main thread, one at a time.

use super::ffi::{self, Callbacks};
use super::report::{log, log_line};
use super::{guc, off_thread};
use archiver_core::archive::{Answer, Archive, Archiver, Episode, StoredFile, WalFile, waiting_files};
use archiver_core::config::Config;
use archiver_core::hooks::Notes;
use archiver_core::identity::Marker;
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use archiver_core::state::{STATE_FILE, State, unix_us};
use archiver_core::wal::WalName;
use archiver_core::{Error, Kind, Result};
use once_cell::sync::OnceCell;
use pgrx::PgLogLevel;
use std::ffi::c_char;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant, SystemTime};

const ARCHIVE_STATUS: &str = "pg_wal/archive_status";
/// The postmaster writes its state into the eighth line (miscinit.c, `LOCK_FILE_LINE_PM_STATUS`).
const POSTMASTER_STATUS: (&str, usize) = ("postmaster.pid", 7);

/// Without progress for this long, a file is given up while the server stops or a reload waits.
const SHORT_PATIENCE: Duration = Duration::from_secs(4);
/// After a hook has failed while the server stops, for this long it is not run for the same file again.
const HOOK_REST: Duration = Duration::from_secs(10);
/// How often a wait looks at what no event tells: progress, and the postmaster's status.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How long the exit of the process waits for threads at work.
const EXIT_PATIENCE: Duration = Duration::from_secs(1);
/// At most this often the state file is written while files keep coming.
const STATE_INTERVAL: Duration = Duration::from_secs(1);

/// Made at the first callback of the archiver process, never in the postmaster.
static MODULE: OnceCell<Mutex<Module>> = OnceCell::new();
/// Of the work in progress; reachable while the module is locked by the very callback that the process exits from.
static PULSE: OnceCell<Arc<Pulse>> = OnceCell::new();

struct Module {
    archiver: Archiver,
    /// What hooks wrote, and what became of them: threads may not log.
    notes: Arc<Notes>,
    /// Readable when a worker has something to tell.
    wake_up: UnixStream,
    pulse: Arc<Pulse>,
    /// Which reading of the configuration the fields below stand for.
    configuration_read_at: Option<i64>,
    config: Result<Config>,
    episode: Episode,
    given_up: Option<GivenUp>,
    /// What the last interrupt raised, told already: PostgreSQL raises it again and again.
    interrupted: Option<String>,
    state: State,
    state_written: Option<Instant>,
}

/// A file given up while the server was stopping.
struct GivenUp {
    name: WalName,
    until: Until,
    error: Error,
}

/// How long a file stays given up.
enum Until {
    /// Until something moves again, from that count of beats on.
    Moved(u64),
    /// Until then: as long as PostgreSQL asks again at once.
    Time(Instant),
}

impl GivenUp {
    /// For a hook that does not succeed: PostgreSQL asks three times within seconds, and the hook would take that long each
    /// time.
    fn of_hook(name: WalName, error: Error) -> Self {
        GivenUp { name, until: Until::Time(Instant::now() + HOOK_REST), error }
    }

    fn still_stands(&self, beats: u64) -> bool {
        match self.until {
            Until::Moved(then) => then == beats,
            Until::Time(until) => Instant::now() < until,
        }
    }
}

impl Module {
    fn new() -> Result<Self> {
        let (wake_up, waker) = off_thread::wake_up_pair()?;
        let pulse = Arc::clone(PULSE.get_or_init(Arc::default));
        let archiver = Archiver::new(Box::new(move || off_thread::wake(&waker)), Arc::clone(&pulse));
        let now_us = unix_us(SystemTime::now());
        let state = State {
            system_identifier: ffi::cluster().system_identifier,
            data_directory_inode: off_thread::inode_of(Path::new(".")),
            server_started_us: ffi::server_started_us(),
            archiver_pid: std::process::id().cast_signed(),
            stats_since_us: now_us,
            ..State::default()
        };
        let unread = Err(Error::new(Kind::Configuration, "archiver.storage", "the configuration was not read yet"));
        Ok(Module {
            archiver,
            notes: Arc::default(),
            wake_up,
            pulse,
            configuration_read_at: None,
            config: unread,
            episode: Episode::default(),
            given_up: None,
            interrupted: None,
            state,
            state_written: None,
        })
    }

    /// Takes notice of a reload; answers whether files can be archived. Cheap where nothing was reloaded.
    fn is_configured(&mut self) -> bool {
        let read_at = ffi::configuration_read_at();
        if self.configuration_read_at != Some(read_at) {
            self.configuration_read_at = Some(read_at);
            if let Err(error) = guc::limits() {
                log(PgLogLevel::LOG, Report::new("check() judges without a limit", &error));
            }
            self.take_config(guc::config(Path::new(".")));
        }
        if let Err(error) = &self.config {
            ffi::tell_why_not_configured(error);
        }
        self.config.is_ok()
    }

    fn take_config(&mut self, config: Result<Config>) {
        if config == self.config {
            return;
        }
        let archive = config.clone().and_then(|config| {
            let marker = Marker::of_data_directory(Path::new("."));
            let archive = Archive::new(config, ffi::cluster(), Some(marker), Arc::clone(&self.pulse))?;
            let notes = Arc::clone(&self.notes);
            Ok(archive.with_hooks_of(ffi::config_file().as_deref(), Arc::new(move |note| notes.push(note))))
        });
        match archive {
            Ok(archive) => {
                let storage = &archive.config().destination.storage;
                log_line(PgLogLevel::LOG, format!("archiving WAL to \"{storage}\""));
                self.config = config;
                self.archiver.use_archive(Some(Arc::new(archive)));
            }
            Err(error) => {
                if self.config.as_ref() != Err(&error) {
                    log(PgLogLevel::LOG, Report::new("WAL is not archived", &error));
                }
                self.config = Err(error);
                // What was begun ahead must not go on under settings that are gone.
                self.archiver.use_archive(None);
            }
        }
        self.given_up = None;
        self.write_state(true);
    }

    fn archive_file(&mut self, name: &str, path: &str) -> bool {
        if !self.is_configured() {
            return false;
        }
        let archived = WalName::parse(name)
            .map_err(|bad| Error::new(Kind::Source, path, bad.to_string()))
            .and_then(|name| self.archive(&WalFile { name, path: PathBuf::from(path) }));
        match &archived {
            Ok(stored) => self.tell_success(stored),
            Err(error) => self.tell_failure(name, error),
        }
        archived.is_ok()
    }

    fn archive(&mut self, file: &WalFile) -> Result<StoredFile> {
        if let Some(given_up) = &self.given_up
            && given_up.name == file.name
            && given_up.still_stands(self.pulse.beats())
            && server_is_stopping()
        {
            return Err(given_up.error.clone());
        }
        self.given_up = None;
        self.archiver.tell_other_readers(ffi::wal_has_readers());
        self.archiver.ask(file)?;
        let mut latch = ConsumedLatch(false);
        self.wait_for(file, &mut latch)
    }

    fn wait_for(&mut self, file: &WalFile, latch: &mut ConsumedLatch) -> Result<StoredFile> {
        let retry_timeout = self.config.as_ref().map_or(SHORT_PATIENCE, |config| config.destination.retry_timeout);
        let mut beats = self.pulse.beats();
        let mut moved_at = Instant::now();
        let mut looked_at = Instant::now();
        // A server that was stopping a moment ago still is, unless it only waits for its sessions.
        let (mut is_stopping, mut is_reloading) = (self.pulse.is_hurried() && server_is_stopping(), false);
        loop {
            if !is_reloading && ffi::reload_is_pending() {
                (is_reloading, moved_at) = (true, Instant::now());
            }
            let is_short_of_time = is_stopping || is_reloading;
            self.pulse.hurry(is_short_of_time);
            let answer = self.archiver.poll(!is_short_of_time);
            self.tell_notes();
            let retry_at = match answer {
                Answer::Stored(stored) => return Ok(stored),
                Answer::Failed(error) => {
                    if is_stopping && error.kind() == Kind::Hook {
                        self.given_up = Some(GivenUp::of_hook(file.name, error.clone()));
                    }
                    return Err(error);
                }
                Answer::Waiting(retry_at) => retry_at,
            };
            let now = Instant::now();
            if self.pulse.beats() != beats {
                (beats, moved_at) = (self.pulse.beats(), now);
            }
            let patience = if is_short_of_time { SHORT_PATIENCE.min(retry_timeout) } else { retry_timeout };
            if now - moved_at >= patience {
                let error = stalled(patience);
                if is_stopping {
                    self.given_up = Some(GivenUp { name: file.name, until: Until::Moved(beats), error: error.clone() });
                }
                return Err(error);
            }
            if now - looked_at >= LOOK_INTERVAL {
                looked_at = now;
                if !is_stopping && server_is_stopping() {
                    (is_stopping, moved_at) = (true, now);
                }
                self.write_state(false);
            }
            let until_retry = retry_at.map_or(LOOK_INTERVAL, |at| at.saturating_duration_since(now));
            self.sleep(until_retry.min(LOOK_INTERVAL), latch)?;
        }
    }

    fn sleep(&mut self, timeout: Duration, latch: &mut ConsumedLatch) -> Result<()> {
        // The wait itself can raise: out of descriptors, say.
        let woken = ffi::caught(|| ffi::wait(self.wake_up.as_fd(), timeout))
            .map_err(|cause| Error::new(Kind::Internal, "latch", format!("could not wait for the storage: {cause}")))?;
        if woken.by_postmaster_death {
            return Err(Error::new(Kind::Interrupted, "postmaster", "the postmaster died"));
        }
        off_thread::drain(&self.wake_up);
        if woken.by_latch {
            ffi::reset_latch();
            latch.0 = true;
        }
        // Other backends wait for this process to absorb barriers (DROP DATABASE, for one). What that raises is not
        // this file's trouble.
        let interrupted = ffi::caught(ffi::check_for_interrupts).err();
        if let Some(cause) = interrupted.as_ref().filter(|_| interrupted != self.interrupted) {
            log_line(PgLogLevel::WARNING, format!("interrupt while a WAL file is archived: {cause}"));
        }
        self.interrupted = interrupted;
        Ok(())
    }

    /// Logs what hooks have told. Their lines come before the file's own.
    fn tell_notes(&self) {
        for note in self.notes.take() {
            log_line(if note.is_trouble { PgLogLevel::WARNING } else { PgLogLevel::LOG }, note.message);
        }
    }

    fn tell_success(&mut self, stored: &StoredFile) {
        let saved = if stored.created { "archived" } else { "found in the archive, identical:" };
        log_line(
            PgLogLevel::DEBUG1,
            format!(
                "{saved} WAL file \"{}\" at \"{}\": {} bytes as {}, {}, {:.1} ms",
                stored.name,
                stored.location,
                stored.plain_size,
                stored.stored_size,
                stored.format.compression.name(),
                stored.took.as_secs_f64() * 1000.0
            ),
        );
        if let Some(recovered) = self.episode.succeed(Instant::now()) {
            let waiting = waiting_files(Path::new(ARCHIVE_STATUS)).count().saturating_sub(1);
            log_line(
                PgLogLevel::LOG,
                format!(
                    "archiving works again after {:.0} s and {} failed attempts; {waiting} more files are waiting",
                    recovered.lasted.as_secs_f64(),
                    recovered.failures
                ),
            );
        }
        self.state.take_success(&stored.name.to_string());
        self.write_state(self.archiver.in_flight() == 0);
    }

    fn tell_failure(&mut self, name: &str, error: &Error) {
        if error.kind() == Kind::Interrupted {
            // The process is about to end, and nothing failed.
            return;
        }
        if let Some(count) = self.episode.fail(error, Instant::now()) {
            let report = Report::new(&format!("could not archive WAL file \"{name}\""), error);
            let report = match count {
                1 => report,
                _ => report.add_detail(&format!("{count} attempts have failed since the last such message.")),
            };
            log(PgLogLevel::WARNING, report);
        }
        self.state.take_failure(name, error, self.episode.failures(), unix_us(SystemTime::now()));
        self.write_state(true);
    }

    /// Tells SQL functions how things stand; not at every file while they come fast.
    fn write_state(&mut self, is_change: bool) {
        if !is_change && self.state_written.is_some_and(|at| at.elapsed() < STATE_INTERVAL) {
            return;
        }
        let totals = self.archiver.totals();
        self.state.in_flight = self.archiver.in_flight() as u64;
        self.state.bytes_read = totals.bytes_read;
        self.state.bytes_stored = totals.bytes_stored;
        self.state.read_ahead_hits = totals.read_ahead_hits;
        self.state.retries = totals.retries;
        self.state.put_ms_p50 = totals.percentile_ms(50);
        self.state.put_ms_p99 = totals.percentile_ms(99);
        if let Some(facts) = self.archiver.store_facts() {
            self.state.retries += facts.retries;
            self.state.create_only = Some(facts.create_only.to_string());
            self.state.credential_source = facts.credentials.map(|credentials| credentials.source);
        }
        self.state.take_progress(&self.archiver.progress(), unix_us(SystemTime::now()));
        self.state.retain_refused(|name| Path::new(ARCHIVE_STATUS).join(format!("{name}.ready")).exists());
        self.state_written = Some(Instant::now());
        // It is only told: WAL is archived all the same.
        if let Err(error) = self.state.write(Path::new(STATE_FILE)) {
            log(PgLogLevel::DEBUG1, Report::new("could not tell the archiver's state", &error));
        }
    }
}

/// Whether the wait has consumed a set of the process's latch, by which a stop, a reload or a new segment was told: the
/// archiver's own loop must see it, too, so it is given back in the end, however that comes.
struct ConsumedLatch(bool);

impl Drop for ConsumedLatch {
    fn drop(&mut self) {
        if self.0 {
            // It sets a flag and wakes this very process; it does not raise.
            let _ = ffi::caught(ffi::set_latch);
        }
    }
}

fn stalled(patience: Duration) -> Error {
    let seconds = patience.as_secs();
    Error::new(Kind::Storage, "storage", format!("the storage did not answer for {seconds} s"))
        .hint("The file is tried again by itself. Is the storage of the archive reachable?")
}

/// Whether somebody has asked the server to stop; a smart stop says so while sessions still run.
fn server_is_stopping() -> bool {
    let (file, line) = POSTMASTER_STATUS;
    std::fs::read_to_string(file)
        .is_ok_and(|text| text.lines().nth(line).is_some_and(|status| status.trim() == "stopping"))
}

/// Runs `work` on the module and ends there whatever it raises: a callback answers, it never raises.
fn callback(what: &str, work: impl FnOnce(&mut Module) -> bool) -> bool {
    let outcome = ffi::caught(|| {
        let module = match MODULE.get_or_try_init(|| Module::new().map(Mutex::new)) {
            Ok(module) => module,
            Err(error) => {
                log(PgLogLevel::WARNING, Report::new("could not start archiving", &error));
                return false;
            }
        };
        work(&mut module.lock().unwrap_or_else(PoisonError::into_inner))
    });
    outcome.unwrap_or_else(|cause| {
        // Should even this raise, there is nothing left to say.
        let _ = ffi::caught(|| log_line(PgLogLevel::WARNING, format!("internal error while {what}: {cause}")));
        false
    })
}

fn check_configured() -> bool {
    callback("reading the configuration", Module::is_configured)
}

/// # Safety
/// PostgreSQL's: both are NUL-terminated strings that live for the length of the call.
unsafe fn archive_file(file: *const c_char, path: *const c_char) -> bool {
    callback("archiving a WAL file", |module| {
        // SAFETY: the caller's promise.
        match unsafe { (ffi::text(file), ffi::text(path)) } {
            (Some(file), Some(path)) => module.archive_file(&file, &path),
            _ => false,
        }
    })
}

/// Ends the workers. Not reached by SIGQUIT or SIGKILL, and nothing that lasts depends on it.
fn shut_down() {
    let _ = ffi::caught(|| {
        if let Some(pulse) = PULSE.get() {
            pulse.stop();
        }
        // An orphan keeps the next start waiting: then no waiting here.
        let patience = if ffi::postmaster_is_alive() { EXIT_PATIENCE } else { Duration::ZERO };
        let Some(module) = MODULE.get() else { return };
        match module.try_lock() {
            Ok(mut module) => drop(module.archiver.stop(Instant::now() + patience)),
            Err(TryLockError::Poisoned(module)) => drop(module.into_inner().archiver.stop(Instant::now() + patience)),
            // The process exits from inside a callback; its workers end with it.
            Err(TryLockError::WouldBlock) => {}
        }
    });
}

#[cfg(feature = "pg15")]
mod entry {
    use super::{Callbacks, archive_file, c_char, check_configured, shut_down};

    unsafe extern "C-unwind" fn check_configured_cb() -> bool {
        check_configured()
    }

    unsafe extern "C-unwind" fn archive_file_cb(file: *const c_char, path: *const c_char) -> bool {
        // SAFETY: PostgreSQL's promise is the one asked for.
        unsafe { archive_file(file, path) }
    }

    unsafe extern "C-unwind" fn shutdown_cb() {
        shut_down();
    }

    /// The archive module's entry in PostgreSQL 15: fills the struct that the server hands in.
    ///
    /// # Safety
    /// PostgreSQL's: `callbacks` points to a zeroed struct.
    #[unsafe(no_mangle)]
    pub unsafe extern "C-unwind" fn _PG_archive_module_init(callbacks: *mut Callbacks) {
        // SAFETY: the caller's promise.
        unsafe {
            (*callbacks).check_configured_cb = Some(check_configured_cb);
            (*callbacks).archive_file_cb = Some(archive_file_cb);
            (*callbacks).shutdown_cb = Some(shutdown_cb);
        }
        // Says what is wrong now, and not only when the first file waits.
        check_configured();
    }
}

#[cfg(not(feature = "pg15"))]
mod entry {
    use super::{Callbacks, archive_file, c_char, check_configured, shut_down};
    use crate::pg::ffi::ModuleState;

    /// Says what is wrong now, and not only when the first file waits.
    unsafe extern "C-unwind" fn startup_cb(_state: *mut ModuleState) {
        check_configured();
    }

    unsafe extern "C-unwind" fn check_configured_cb(_state: *mut ModuleState) -> bool {
        check_configured()
    }

    unsafe extern "C-unwind" fn archive_file_cb(
        _state: *mut ModuleState,
        file: *const c_char,
        path: *const c_char,
    ) -> bool {
        // SAFETY: PostgreSQL's promise is the one asked for.
        unsafe { archive_file(file, path) }
    }

    unsafe extern "C-unwind" fn shutdown_cb(_state: *mut ModuleState) {
        shut_down();
    }

    static CALLBACKS: Callbacks = Callbacks {
        startup_cb: Some(startup_cb),
        check_configured_cb: Some(check_configured_cb),
        archive_file_cb: Some(archive_file_cb),
        shutdown_cb: Some(shutdown_cb),
    };

    /// The archive module's entry since PostgreSQL 16: hands out callbacks that live for ever.
    #[unsafe(no_mangle)]
    pub extern "C-unwind" fn _PG_archive_module_init() -> *const Callbacks {
        &raw const CALLBACKS
    }
}
