//! What SQL sees. `sql/views.sql` joins it with what PostgreSQL tells by itself, and says who may see it.
//!
//! Status, check and queue never raise for a thing that cannot be known: it is NULL, or a row that says why.

mod archive_now;
mod check;
mod delete;
mod errors;
mod gaps;
mod list;
mod queue;
mod rebuild;
mod receive_wal;
mod status;
mod verify;

use super::off_thread::{self, Stream};
use super::{ffi, guc};
use archiver_core::config::Config;
use archiver_core::hash::HashKey;
use archiver_core::listing::Range;
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::state::State;
use archiver_core::wal::{SegmentSize, WalName};
use archiver_core::{Error, Kind, Result};
use pgrx::extension_sql_file;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long one look at the storage may take.
const STORAGE_PATIENCE: Duration = Duration::from_secs(5);

/// The cluster whose archive is asked about: this server's, unless that archives nothing of its own and receives another
/// one's WAL. Of that, what is not known is nothing.
#[derive(Clone, Copy)]
struct Subject {
    system_identifier: Option<u64>,
    segment_size: Option<SegmentSize>,
    hash_key: Option<HashKey>,
    /// Whether it is another one's.
    is_elsewhere: bool,
}

impl Subject {
    /// Its system identifier, for whoever changes something in its archive.
    fn known(&self) -> Result<u64> {
        self.system_identifier.ok_or_else(|| {
            Error::new(Kind::Identity, "archive", "it is not known whose WAL is received here")
                .detail("Nothing was changed.")
                .hint("See that WAL is received: archiver.receive_wal_status() tells. Or use the program, on the archive itself.")
        })
    }
}

fn subject() -> Subject {
    let own = ffi::cluster();
    let only_receives = !ffi::archives_by_file() && guc::receives_wal() && !guc::receives_own_wal();
    let received = if only_receives { receive_wal::received_cluster() } else { Some(own.system_identifier) };
    if received == Some(own.system_identifier) {
        let (system_identifier, segment_size) = (Some(own.system_identifier), Some(own.segment_size));
        return Subject { system_identifier, segment_size, hash_key: own.hash_key, is_elsewhere: false };
    }
    Subject { system_identifier: received, segment_size: None, hash_key: None, is_elsewhere: true }
}

/// Does `work` in the storage that is configured now, on a thread of its own.
fn in_storage<T: Send + 'static>(work: impl FnOnce(&Place) -> Result<T> + Send + 'static) -> Result<T> {
    let config: Config = guc::config(&ffi::data_directory())?;
    let destination = config.destination.within(STORAGE_PATIENCE);
    off_thread::run(STORAGE_PATIENCE, move |pulse| work(&Place::open(&destination, pulse)?))?
}

/// The same for work of any length, which hands over one thing after the other.
fn stream_from_storage<T: Send + 'static>(
    subject: &Subject,
    work: impl FnOnce(&Place, &Arc<Pulse>, &mut dyn FnMut(T) -> ControlFlow<()>) -> Result<()> + Send + 'static,
) -> Result<Stream<T>> {
    let destination = guc::config(&ffi::data_directory())?.destination;
    // A file that cannot be fetched is tried for so long, and then told of.
    let silence = destination.retry_timeout + STORAGE_PATIENCE;
    let hash_key = subject.hash_key;
    off_thread::stream(silence, move |pulse, hand_over| {
        work(&Place::open(&destination, pulse)?.known_to(hash_key), pulse, hand_over)
    })
}

/// What a name in a range stands for.
fn bound(name: Option<&str>) -> Result<Option<WalName>> {
    let parse = |name| WalName::parse(name).map_err(|bad| Error::new(Kind::Configuration, name, bad.to_string()));
    name.map(parse).transpose()
}

/// The files between two names that both count.
fn range(from_name: Option<&str>, to_name: Option<&str>) -> Result<Range> {
    bound(from_name).and_then(|from| Ok(Range { from, to: bound(to_name)? }))
}

/// Changes something there. That may take longer, as long as it moves; where it is cancelled it is given the time to come
/// to an end of its own.
fn change_storage<T: Send + 'static>(
    work: impl FnOnce(&Place, &Arc<Pulse>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let config: Config = guc::config(&ffi::data_directory())?;
    let destination = config.destination;
    let patience = destination.attempt_timeout + destination.retry_timeout;
    off_thread::run_to_an_end(patience, move |pulse| work(&Place::open(&destination, pulse)?, pulse))?
}

/// The directory of WAL files.
fn pg_wal() -> PathBuf {
    ffi::data_directory().join("pg_wal")
}

/// What the archiver process that runs now tells of itself; what came with a copy of the data directory, or was left by
/// an earlier process, says nothing.
fn state() -> Option<State> {
    let state = State::of_running_server(&ffi::data_directory(), ffi::cluster().system_identifier)?;
    (state.server_started_us == ffi::server_started_us()).then_some(state)
}

extension_sql_file!(
    "../../../sql/views.sql",
    name = "views",
    requires = [
        status::facts,
        check::check,
        queue::queue,
        errors::error_rows,
        errors::clear_error,
        archive_now::archive_now,
        list::list_wal,
        delete::delete_wal,
        gaps::gaps,
        verify::verify,
        rebuild::rebuild_catalogue,
        receive_wal::receive_wal_facts,
        receive_wal::reset_receive_wal,
    ],
    finalize
);
