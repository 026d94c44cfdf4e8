//! Every declaration and call of C: the archive module's shapes per version, latches, settings, server facts.
//!
//! Whatever PostgreSQL raises inside a call made here arrives as a Rust panic (pgrx guards each of its functions);
//! [`caught`] ends it. All functions belong to the process's main thread.

use archiver_core::Error;
use archiver_core::hash::HashKey;
use archiver_core::identity::Cluster;
#[cfg(any(feature = "pg17", feature = "pg18"))]
use archiver_core::report::Report;
use archiver_core::wal::SegmentSize;
use pgrx::guc::GucSetting;
use pgrx::pg_sys;
use pgrx::pg_sys::panic::CaughtError;
use std::any::Any;
use std::ffi::{CStr, CString, c_char};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "pg15")]
pub use v15::Callbacks;
#[cfg(not(feature = "pg15"))]
pub use v16::{Callbacks, ModuleState};

/// PostgreSQL 15: the server hands in a zeroed struct to be filled (postmaster/pgarch.h).
#[cfg(feature = "pg15")]
mod v15 {
    pub type Callbacks = pgrx::pg_sys::ArchiveModuleCallbacks;
}

/// PostgreSQL 16 and later: the module returns a struct of static lifetime (archive/archive_module.h, which pgrx 0.18
/// does not bind).
#[cfg(not(feature = "pg15"))]
mod v16 {
    use std::ffi::{c_char, c_void};

    /// `ArchiveModuleState`
    #[repr(C)]
    pub struct ModuleState {
        private_data: *mut c_void,
    }

    /// `ArchiveModuleCallbacks`
    #[repr(C)]
    pub struct Callbacks {
        pub startup_cb: Option<unsafe extern "C-unwind" fn(*mut ModuleState)>,
        pub check_configured_cb: Option<unsafe extern "C-unwind" fn(*mut ModuleState) -> bool>,
        pub archive_file_cb:
            Option<unsafe extern "C-unwind" fn(*mut ModuleState, *const c_char, *const c_char) -> bool>,
        pub shutdown_cb: Option<unsafe extern "C-unwind" fn(*mut ModuleState)>,
    }

    const _: () = assert!(size_of::<Callbacks>() == 4 * size_of::<*const c_void>());
    const _: () = assert!(size_of::<ModuleState>() == size_of::<*const c_void>());
}

/// Since PostgreSQL 17 the server logs a DETAIL where check_configured answered false.
#[cfg(any(feature = "pg17", feature = "pg18"))]
mod detail {
    use std::ffi::{CString, c_char};
    use std::sync::{Mutex, PoisonError};

    unsafe extern "C" {
        /// archive/archive_module.h, which pgrx 0.18 does not bind.
        static mut arch_module_check_errdetail_string: *const c_char;
    }

    /// What the server's pointer points to, until the next.
    static TEXT: Mutex<Option<CString>> = Mutex::new(None);

    pub fn set(sentences: &str) {
        let mut text = TEXT.lock().unwrap_or_else(PoisonError::into_inner);
        let text = text.insert(CString::new(sentences).unwrap_or_default());
        // SAFETY: the server clears its pointer before it asks check_configured, and reads it right after the answer, on
        // the thread that is here now; until then the text stays.
        unsafe { arch_module_check_errdetail_string = text.as_ptr() };
    }
}

/// Tells the server why check_configured is about to answer false; before PostgreSQL 17 nobody would listen.
pub fn tell_why_not_configured(error: &Error) {
    #[cfg(any(feature = "pg17", feature = "pg18"))]
    detail::set(&Report::of(error).sentences());
    #[cfg(not(any(feature = "pg17", feature = "pg18")))]
    let _ = error;
}

/// Runs `work` and ends there whatever it raises, PostgreSQL's errors and our own panics alike; the text says which.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        // Harmless where nothing was raised by PostgreSQL; else its error stack, five deep, must not fill up.
        // SAFETY: called on the main thread, outside of any error handling of PostgreSQL's own.
        unsafe { pg_sys::FlushErrorState() };
        text_of(&*panic)
    })
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    if let Some(caught) = panic.downcast_ref::<CaughtError>() {
        return match caught {
            CaughtError::PostgresError(error)
            | CaughtError::ErrorReport(error)
            | CaughtError::RustPanic { ereport: error, .. } => error.message().to_string(),
        };
    }
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panic without a message").to_string()
}

/// The text behind a C string of the server's; nothing for a null pointer or what is no UTF-8.
///
/// # Safety
/// `text` must be null or point to a NUL-terminated string that lives for the length of the call.
pub unsafe fn text(text: *const c_char) -> Option<String> {
    // SAFETY: the caller's promise.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })?.to_str().ok().map(str::to_string)
}

/// What ended a wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct Woken {
    /// The process's latch was set. It stays set until [`reset_latch`].
    pub by_latch: bool,
    /// The postmaster is gone.
    pub by_postmaster_death: bool,
}

/// Sleeps for `timeout` in a backend; a cancel, a statement_timeout or a termination ends it by raising.
pub fn sleep(timeout: Duration) {
    let timeout_ms = milliseconds(timeout);
    // An orphan would keep the next start of the server waiting: the process ends where its postmaster does.
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_TIMEOUT | pg_sys::WL_EXIT_ON_PM_DEATH;
    // SAFETY: MyLatch is set in every process that runs code of ours.
    let woken = unsafe { pg_sys::WaitLatch(pg_sys::MyLatch, events as i32, timeout_ms, pg_sys::PG_WAIT_EXTENSION) };
    if woken as u32 & pg_sys::WL_LATCH_SET != 0 {
        reset_latch();
    }
    check_for_interrupts();
}

fn milliseconds(timeout: Duration) -> i64 {
    i64::try_from(timeout.as_millis()).unwrap_or(i64::MAX).clamp(1, 3_600_000)
}

/// Ends the WAL segment in use; answers the timeline and the end of the record that says so. May raise.
pub fn switch_wal() -> (u32, u64) {
    // SAFETY: called in a backend of a primary, inside a transaction, as pg_switch_wal() does.
    unsafe { (pg_sys::GetWALInsertionTimeLine(), pg_sys::RequestXLogSwitch(false)) }
}

/// Sleeps until the latch is set, `socket` is readable, the postmaster dies or the time is over. It may raise (out of
/// descriptors, say).
pub fn wait(socket: BorrowedFd<'_>, timeout: Duration) -> Woken {
    let timeout_ms = milliseconds(timeout);
    let events = pg_sys::WL_LATCH_SET | pg_sys::WL_SOCKET_READABLE | pg_sys::WL_TIMEOUT | pg_sys::WL_POSTMASTER_DEATH;
    // SAFETY: MyLatch is set in every process that runs code of ours, and the socket is borrowed for the call.
    let woken = unsafe {
        pg_sys::WaitLatchOrSocket(
            pg_sys::MyLatch,
            events as i32,
            socket.as_raw_fd(),
            timeout_ms,
            pg_sys::PG_WAIT_EXTENSION,
        )
    } as u32;
    Woken { by_latch: woken & pg_sys::WL_LATCH_SET != 0, by_postmaster_death: woken & pg_sys::WL_POSTMASTER_DEATH != 0 }
}

/// Clears the latch; whoever does must set it again before it gives the process back ([`set_latch`]).
pub fn reset_latch() {
    // SAFETY: as in `wait`.
    unsafe { pg_sys::ResetLatch(pg_sys::MyLatch) };
}

/// Sets the process's own latch.
pub fn set_latch() {
    // SAFETY: as in `wait`.
    unsafe { pg_sys::SetLatch(pg_sys::MyLatch) };
}

/// CHECK_FOR_INTERRUPTS: absorbs barriers; in a backend it raises when the query was cancelled.
pub fn check_for_interrupts() {
    pg_sys::check_for_interrupts!();
}

/// Whether a reload of the configuration waits to be taken notice of.
pub fn reload_is_pending() -> bool {
    // SAFETY: a flag that signal handlers set, read on the main thread.
    unsafe { pg_sys::ConfigReloadPending != 0 }
}

/// Reads the configuration again where a reload waits, in a process of our own. It may raise.
pub fn take_reload() {
    if reload_is_pending() {
        // SAFETY: as every process of PostgreSQL does it, on its main thread.
        unsafe {
            pg_sys::ConfigReloadPending = 0;
            pg_sys::ProcessConfigFile(pg_sys::GucContext::PGC_SIGHUP);
        }
    }
}

/// Whether this process was asked to end.
pub fn shutdown_is_pending() -> bool {
    // SAFETY: a flag that signal handlers set, read on the main thread.
    unsafe { pg_sys::ShutdownRequestPending != 0 }
}

/// Ends this process, a background worker; it does not return, which not every binding of it says.
pub fn exit(code: i32) {
    // SAFETY: called on the main thread, outside of any error handling.
    unsafe { pg_sys::proc_exit(code) };
}

/// Whether the postmaster is loading shared_preload_libraries: the only time when a background worker can be registered.
pub fn is_preloading() -> bool {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::process_shared_preload_libraries_in_progress }
}

/// Whether pg_upgrade has started this server: what it writes then is nobody's WAL.
pub fn is_being_upgraded() -> bool {
    // SAFETY: set once by the postmaster, before it loads libraries.
    unsafe { pg_sys::IsBinaryUpgrade }
}

/// The libraries that the postmaster has loaded, as they were set.
pub fn preloaded_libraries() -> String {
    // SAFETY: it belongs to a setting that only a start of the server changes, read on the main thread.
    unsafe { text(pg_sys::shared_preload_libraries_string) }.unwrap_or_default()
}

/// When this process last read its configuration; it changes with each reload.
pub fn configuration_read_at() -> i64 {
    // SAFETY: a plain variable of this process.
    unsafe { pg_sys::PgReloadTime }
}

/// Whether the postmaster lives: it is this process's parent until it dies.
pub fn postmaster_is_alive() -> bool {
    // SAFETY: set once by the postmaster, before it started this process.
    i64::from(std::os::unix::process::parent_id()) == i64::from(unsafe { pg_sys::PostmasterPid })
}

/// Defines a setting that is a text, read at reload, without a check hook.
pub fn define_text_setting(
    name: &'static CStr,
    description: &'static CStr,
    default: &'static CStr,
    value: &'static GucSetting<Option<CString>>,
) {
    // SAFETY: all texts live for ever; `value` is a static that PostgreSQL writes and only the main thread reads.
    unsafe {
        pg_sys::DefineCustomStringVariable(
            name.as_ptr(),
            description.as_ptr(),
            std::ptr::null(),
            value.as_ptr(),
            default.as_ptr(),
            pg_sys::GucContext::PGC_SIGHUP,
            0,
            None,
            None,
            None,
        );
    }
}

/// Makes PostgreSQL warn of names with that prefix that nobody defined, and drop them.
pub fn reserve_setting_prefix(prefix: &'static CStr) {
    // SAFETY: the text lives for ever.
    unsafe { pg_sys::MarkGUCPrefixReserved(prefix.as_ptr()) };
}

/// The configuration file in use.
pub fn config_file() -> Option<PathBuf> {
    // SAFETY: set once by the postmaster, before any process of ours.
    unsafe { text(pg_sys::ConfigFileName) }.map(PathBuf::from)
}

/// The data directory.
pub fn data_directory() -> PathBuf {
    // SAFETY: set once by the postmaster, before any process of ours.
    unsafe { text(pg_sys::DataDir) }.map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// What the cluster says of itself.
pub fn cluster() -> Cluster {
    // SAFETY: both are read from the control file before any process of ours starts, and never change.
    let (system_identifier, segment_bytes) = unsafe { (pg_sys::GetSystemIdentifier(), pg_sys::wal_segment_size) };
    Cluster {
        system_identifier,
        major: pg_sys::PG_MAJORVERSION_NUM,
        segment_size: SegmentSize::new(segment_bytes as u64).unwrap_or(SegmentSize::DEFAULT),
        hash_key: hash_key(),
    }
}

/// What the noted hashes of encrypted files are compared by: see `archiver_core::data_directory::hash_key`.
fn hash_key() -> Option<HashKey> {
    // SAFETY: it answers a pointer into this process's copy of the control file, read before any process of ours starts:
    // 32 bytes (pg_control.h, MOCK_AUTH_NONCE_LEN) that never change.
    let secret: Option<&[u8; 32]> = unsafe { pg_sys::GetMockAuthenticationNonce().cast::<[u8; 32]>().as_ref() };
    secret.map(HashKey::of_secret)
}

/// When the server was started, in microseconds since the Unix epoch.
pub fn server_started_us() -> i64 {
    // SAFETY: set once by the postmaster.
    unix_us(unsafe { pg_sys::PgStartTime })
}

/// PostgreSQL counts microseconds from 2000-01-01.
fn unix_us(timestamp: pg_sys::TimestampTz) -> i64 {
    const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
    timestamp.saturating_add(POSTGRES_EPOCH_US)
}

/// Whether the server is a standby or recovers from a crash.
pub fn is_in_recovery() -> bool {
    // SAFETY: it reads shared memory that every backend is attached to.
    unsafe { pg_sys::RecoveryInProgress() }
}

/// Whether other processes read WAL files: walsenders, or a recovery.
pub fn wal_has_readers() -> bool {
    // SAFETY: every process that is attached to shared memory has the array, of as many entries as the setting said when
    // the server was started. A PID is read without the entry's lock, and one of a moment ago does as well.
    let is_sent = unsafe {
        let senders = (&raw const (*pg_sys::WalSndCtl).walsnds).cast::<pg_sys::WalSnd>();
        (0..pg_sys::max_wal_senders as usize).any(|index| (&raw const (*senders.add(index)).pid).read_volatile() != 0)
    };
    is_sent || is_in_recovery()
}

/// Whether archive_mode is on or always.
pub fn archives_by_file() -> bool {
    // SAFETY: a plain variable, set when the server starts.
    unsafe { pg_sys::XLogArchiveMode != pg_sys::ArchiveMode::ARCHIVE_MODE_OFF as i32 }
}

/// How far WAL was flushed, on a primary.
pub fn flushed_lsn() -> u64 {
    // SAFETY: as in `written_lsn`; a null pointer means that the timeline is not wanted.
    unsafe { pg_sys::GetFlushRecPtr(std::ptr::null_mut()) }
}

/// How far WAL was written, on a primary.
pub fn written_lsn() -> u64 {
    // SAFETY: as in `is_in_recovery`; the callers have seen that this is a primary.
    unsafe { pg_sys::GetXLogWriteRecPtr() }
}

/// Whether the current user is a superuser.
pub fn is_superuser() -> bool {
    // SAFETY: called in a backend, inside a transaction.
    unsafe { pg_sys::superuser() }
}
