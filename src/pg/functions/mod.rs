//! What SQL sees. `sql/views.sql` joins it with what PostgreSQL tells by itself, and says who may see it.
//!
//! Status, check and queue never raise for a thing that cannot be known: it is NULL, or a row that says why.

mod archive_now;
mod check;
mod errors;
mod list;
mod queue;
mod status;

use super::{ffi, guc, off_thread};
use archiver_core::Result;
use archiver_core::config::Config;
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::state::{STATE_FILE, State};
use pgrx::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long one look at the storage may take.
const STORAGE_PATIENCE: Duration = Duration::from_secs(5);

/// Does `work` in the storage that is configured now, on a thread of its own.
fn in_storage<T: Send + 'static>(work: impl FnOnce(&Place) -> Result<T> + Send + 'static) -> Result<T> {
    let config: Config = guc::config(&ffi::data_directory())?;
    off_thread::run(STORAGE_PATIENCE, move || work(&Place::open(&config.destination, &Arc::new(Pulse::new()))?))?
}

/// The directory of WAL files.
fn pg_wal() -> PathBuf {
    ffi::data_directory().join("pg_wal")
}

/// The archiver process that runs now. Hidden from a role that may not see the server's statistics.
fn archiver_pid() -> Option<i32> {
    let pid = "SELECT pid FROM pg_catalog.pg_stat_activity WHERE backend_type = 'archiver'";
    // What was seen before in this transaction would be told again.
    Spi::run("SELECT pg_catalog.pg_stat_clear_snapshot()").and_then(|()| Spi::get_one(pid)).ok().flatten()
}

/// The state file, if the archiver process that runs now wrote it: one that came with a copy of the data directory, or
/// that an earlier process left, says nothing.
fn state_of(archiver_pid: Option<i32>) -> Option<State> {
    let data_directory = ffi::data_directory();
    let state = State::read(&data_directory.join(STATE_FILE)).ok()??;
    let is_ours = state.system_identifier == ffi::cluster().system_identifier
        && state.data_directory_inode == off_thread::inode_of(&data_directory)
        && state.server_started_us == ffi::server_started_us()
        && Some(state.archiver_pid) == archiver_pid;
    is_ours.then_some(state)
}

extension_sql_file!(
    "../../../sql/views.sql",
    name = "views",
    requires =
        [status::facts, check::check, queue::queue, errors::error_rows, archive_now::archive_now, list::list_wal],
    finalize
);
