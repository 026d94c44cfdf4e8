//! What the status row is made from.

use super::{pg_wal, state};
use crate::pg::{ffi, guc};
use archiver_core::config::Setting;
use archiver_core::queue::{Summary, waiting};
use archiver_core::state::State;
use archiver_core::wal::WalName;
use pgrx::prelude::*;
use serde::Serialize;

/// What the status row is made from beside PostgreSQL's own views; `sql/views.sql` names the columns again.
#[derive(Serialize)]
struct Facts {
    storage: Option<String>,
    server_name: String,
    system_identifier: String,
    configured: bool,
    config_error: Option<String>,
    compression: String,
    encryption: String,
    queue_files: u64,
    queue_bytes: u64,
    oldest_ready_seconds: Option<f64>,
    lag_bytes: Option<u64>,
    #[serde(flatten)]
    process: Option<Process>,
}

/// What the archiver process told of itself.
#[derive(Serialize)]
struct Process {
    in_flight: u64,
    last_error: Option<String>,
    failing_since_us: Option<i64>,
    bytes_read: u64,
    bytes_stored: u64,
    compression_ratio: Option<f64>,
    read_ahead_hits: u64,
    retries: u64,
    put_ms_p50: Option<f64>,
    put_ms_p99: Option<f64>,
    create_only: Option<String>,
    credential_source: Option<String>,
    stats_since_us: i64,
}

impl From<State> for Process {
    fn from(state: State) -> Self {
        Process {
            in_flight: state.in_flight,
            last_error: state.last_error,
            failing_since_us: state.failing_since_us,
            bytes_read: state.bytes_read,
            bytes_stored: state.bytes_stored,
            compression_ratio: (state.bytes_stored > 0).then(|| state.bytes_read as f64 / state.bytes_stored as f64),
            read_ahead_hits: state.read_ahead_hits,
            retries: state.retries,
            put_ms_p50: state.put_ms_p50,
            put_ms_p99: state.put_ms_p99,
            create_only: state.create_only,
            credential_source: state.credential_source,
            stats_since_us: state.stats_since_us,
        }
    }
}

/// Bytes of WAL written beyond the last archived segment, on a primary.
fn lag_bytes(last_archived_wal: Option<&str>) -> Option<u64> {
    let name = WalName::parse(last_archived_wal?).ok()?;
    let size = ffi::cluster().segment_size;
    let archived_to = name.segment()?.next(size)?.start(size)?;
    (!ffi::is_in_recovery()).then(|| ffi::written_lsn().saturating_sub(archived_to.0))
}

/// Everything about archiving that this library knows, for the status view; the argument is what PostgreSQL tells.
#[pg_extern]
pub(super) fn facts(last_archived_wal: Option<&str>) -> pgrx::JsonB {
    let settings = guc::settings();
    let config = guc::config(&ffi::data_directory());
    let queue = Summary::of(&waiting(&pg_wal()));
    let facts = Facts {
        storage: Some(settings.get(Setting::Storage).to_string()).filter(|storage| !storage.is_empty()),
        server_name: settings.get(Setting::ServerName).to_string(),
        system_identifier: ffi::cluster().system_identifier.to_string(),
        configured: config.is_ok(),
        config_error: config.err().map(|error| error.to_string()),
        compression: settings.get(Setting::Compression).to_string(),
        encryption: settings.get(Setting::Encryption).to_string(),
        queue_files: queue.files,
        queue_bytes: queue.bytes,
        oldest_ready_seconds: queue.age_seconds(),
        lag_bytes: lag_bytes(last_archived_wal),
        process: state().map(Process::from),
    };
    pgrx::JsonB(serde_json::to_value(facts).unwrap_or_default())
}
