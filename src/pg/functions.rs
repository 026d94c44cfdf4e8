//! What SQL sees. `sql/views.sql` joins it with what PostgreSQL tells by itself, and says who may see it.
//!
//! Nothing here raises for a thing that cannot be known: it is NULL, or a row that says why.

use super::module::STATE_FILE;
use super::{ffi, guc, off_thread};
use archiver_core::archive::waiting_files;
use archiver_core::check::{self, Row};
use archiver_core::config::{Config, Setting};
use archiver_core::identity::Cluster;
use archiver_core::state::State;
use archiver_core::wal::WalName;
use archiver_core::{Error, Kind};
use pgrx::prelude::*;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How long one check that reaches the storage may take.
const CHECK_PATIENCE: Duration = Duration::from_secs(5);

/// What the status row is made from beside PostgreSQL's own views; `sql/views.sql` names the columns again.
#[derive(Serialize)]
struct Facts {
    storage: Option<String>,
    server_name: String,
    system_identifier: String,
    configured: bool,
    config_error: Option<String>,
    compression: String,
    encryption: &'static str,
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
            stats_since_us: state.stats_since_us,
        }
    }
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

/// The files that wait in pg_wal.
#[derive(Default)]
struct Queue {
    files: u64,
    bytes: u64,
    oldest: Option<SystemTime>,
}

fn queue() -> Queue {
    let pg_wal = ffi::data_directory().join("pg_wal");
    let status = pg_wal.join("archive_status");
    let mut queue = Queue::default();
    for name in waiting_files(&status) {
        queue.files += 1;
        // Either may be gone by now.
        queue.bytes += std::fs::metadata(pg_wal.join(name.to_string())).map_or(0, |meta| meta.len());
        let ready = std::fs::metadata(status.join(format!("{name}.ready"))).and_then(|meta| meta.modified()).ok();
        queue.oldest = queue.oldest.into_iter().chain(ready).min();
    }
    queue
}

fn seconds_since(time: SystemTime) -> f64 {
    time.elapsed().unwrap_or_default().as_secs_f64()
}

/// Bytes of WAL written beyond the last archived segment, on a primary.
fn lag_bytes(last_archived_wal: Option<&str>) -> Option<u64> {
    let name = WalName::parse(last_archived_wal?).ok()?;
    let size = ffi::cluster().segment_size;
    let archived_to = name.segment()?.next(size)?.start(size)?;
    (!ffi::is_in_recovery()).then(|| ffi::written_lsn().saturating_sub(archived_to.0))
}

/// Everything about archiving that this library knows, for the status view. Both arguments are what PostgreSQL tells.
#[pg_extern]
fn facts(last_archived_wal: Option<&str>, archiver_pid: Option<i32>) -> pgrx::JsonB {
    let settings = guc::settings();
    let config = guc::config(&ffi::data_directory());
    let queue = queue();
    let facts = Facts {
        storage: Some(settings.get(Setting::Storage).to_string()).filter(|storage| !storage.is_empty()),
        server_name: settings.get(Setting::ServerName).to_string(),
        system_identifier: ffi::cluster().system_identifier.to_string(),
        configured: config.is_ok(),
        config_error: config.err().map(|error| error.to_string()),
        compression: settings.get(Setting::Compression).to_string(),
        encryption: "none",
        queue_files: queue.files,
        queue_bytes: queue.bytes,
        oldest_ready_seconds: queue.oldest.map(seconds_since),
        lag_bytes: lag_bytes(last_archived_wal),
        process: state_of(archiver_pid).map(Process::from),
    };
    pgrx::JsonB(serde_json::to_value(facts).unwrap_or_default())
}

/// What the server's own settings and counters say; the rows that concern PostgreSQL.
struct ServerFacts {
    archive_mode: String,
    archive_library: String,
    archive_command: String,
    archived_count: i64,
    last_archived_wal: Option<String>,
    seconds_since_archived: Option<f64>,
    last_failed_wal: Option<String>,
    failed_after_archived: bool,
    archiver_pid: Option<i32>,
}

impl ServerFacts {
    /// Whether this is a standby that archives nothing before it is promoted.
    fn waits_for_promotion(&self) -> bool {
        self.archive_mode == "on" && ffi::is_in_recovery()
    }

    fn read() -> Result<Self, pgrx::spi::Error> {
        Spi::connect(|client| {
            let row = client
                .select(
                    "SELECT pg_catalog.current_setting('archive_mode'), pg_catalog.current_setting('archive_library'), \
                     pg_catalog.current_setting('archive_command'), archived_count, last_archived_wal, \
                     EXTRACT(epoch FROM pg_catalog.clock_timestamp() - last_archived_time)::float8, last_failed_wal, \
                     last_failed_time > COALESCE(last_archived_time, '-infinity'), \
                     (SELECT pid FROM pg_catalog.pg_stat_activity WHERE backend_type = 'archiver') \
                     FROM pg_catalog.pg_stat_archiver",
                    Some(1),
                    &[],
                )?
                .first();
            Ok(ServerFacts {
                archive_mode: row.get(1)?.unwrap_or_default(),
                archive_library: row.get(2)?.unwrap_or_default(),
                archive_command: row.get(3)?.unwrap_or_default(),
                archived_count: row.get(4)?.unwrap_or_default(),
                last_archived_wal: row.get(5)?,
                seconds_since_archived: row.get(6)?,
                last_failed_wal: row.get(7)?,
                failed_after_archived: row.get(8)?.unwrap_or_default(),
                archiver_pid: row.get(9)?,
            })
        })
    }
}

const AT_PROMOTION: &str = "archiving starts at promotion";
const NO_WAL_HINT: &str = "SELECT pg_switch_wal() makes one as soon as anything was written.";

fn archive_mode(facts: &ServerFacts) -> Row {
    let name = "archive_mode";
    match facts.archive_mode.as_str() {
        "on" if facts.waits_for_promotion() => Row::ok(name, format!("on; this is a standby: {AT_PROMOTION}")),
        mode @ ("on" | "always") => Row::ok(name, mode),
        mode => Row::failed(name, mode, "Set archive_mode = on in postgresql.conf and restart the server."),
    }
}

fn archive_library(facts: &ServerFacts) -> Row {
    let name = "archive_library";
    match facts.archive_library.as_str() {
        "archiver" => Row::ok(name, "archiver"),
        other if other.rsplit('/').next().is_some_and(|file| file.split('.').next() == Some("archiver")) => {
            Row::ok(name, other)
        }
        other => Row::failed(
            name,
            format!("\"{other}\""),
            "Set archive_library = 'archiver' in postgresql.conf and reload the configuration.",
        ),
    }
}

fn archive_command(facts: &ServerFacts) -> Row {
    let name = "archive_command";
    match facts.archive_command.as_str() {
        "" | "(disabled)" => Row::ok(name, "not set"),
        _ => Row::failed(
            name,
            "set",
            "Beside archive_library, PostgreSQL 15 ignores it and later versions refuse to archive: reset it.",
        ),
    }
}

/// Barman's rule: archiving goes on if it never failed, or last failed before it last succeeded, or failed for a history
/// file of a timeline that is already archived.
fn continuous_archiving(facts: &ServerFacts) -> Row {
    let name = "continuous archiving";
    if !matches!(facts.archive_mode.as_str(), "on" | "always") {
        return Row::failed(
            name,
            "archiving is off",
            "Set archive_mode = on in postgresql.conf and restart the server.",
        );
    }
    let failed = facts.last_failed_wal.as_deref();
    let [failed_name, archived_name] =
        [failed, facts.last_archived_wal.as_deref()].map(|name| name.and_then(|name| WalName::parse(name).ok()));
    let is_old_history = matches!(
        (failed_name, archived_name),
        (Some(WalName::History(failed)), Some(archived)) if failed <= archived.timeline()
    );
    match failed {
        Some(failed) if facts.failed_after_archived && !is_old_history => Row::failed(
            name,
            format!("the last attempt failed, for \"{failed}\""),
            state_of(facts.archiver_pid)
                .and_then(|state| state.last_error)
                .unwrap_or_else(|| "The server log says why.".into()),
        ),
        _ if facts.waits_for_promotion() => Row::ok(name, AT_PROMOTION),
        _ if facts.archived_count == 0 => Row::warning(name, "nothing was archived yet", NO_WAL_HINT),
        _ => Row::ok(name, format!("{} files archived", facts.archived_count)),
    }
}

fn last_archived(facts: &ServerFacts) -> Row {
    let name = "last archived WAL";
    match (&facts.last_archived_wal, facts.seconds_since_archived) {
        (Some(wal), Some(seconds)) => Row::ok(name, format!("{wal}, {seconds:.0} s ago")),
        _ if facts.waits_for_promotion() => Row::ok(name, AT_PROMOTION),
        _ => Row::warning(name, "none", NO_WAL_HINT),
    }
}

fn waiting() -> Row {
    let name = "waiting WAL";
    let queue = queue();
    let age = queue.oldest.map_or(0.0, seconds_since);
    let detail = format!("{} files, {} MiB, the oldest for {age:.0} s", queue.files, queue.bytes >> 20);
    // A file waits for a moment at any time; one that waits for minutes means that archiving stands or lags.
    if age > 300.0 {
        Row::warning(name, detail, "Archiving stands or lags: see \"continuous archiving\" and the server log.")
    } else {
        Row::ok(name, detail)
    }
}

fn storage_rows(config: &Config, is_probe: bool) -> Vec<Row> {
    let off_thread = |name, work: fn(&Config, &Cluster, &Path) -> Vec<Row>| {
        let (config, cluster, data_directory) = (config.clone(), ffi::cluster(), ffi::data_directory());
        off_thread::run(CHECK_PATIENCE, move || work(&config, &cluster, &data_directory))
            .unwrap_or_else(|error| vec![Row::of_error(name, &error)])
    };
    let mut rows = off_thread("storage", check::check_storage);
    if is_probe {
        rows.extend(off_thread("probe", |config, cluster, directory| {
            vec![check::probe_storage(config, cluster, directory)]
        }));
    }
    rows
}

/// Whether archiving works, one row for each thing that could keep it from working. With `probe`, which a superuser may
/// ask for, an object is written to the storage, read back and removed.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
fn check(
    probe: default!(Option<bool>, false),
) -> TableIterator<
    'static,
    (name!(name, String), name!(state, String), name!(detail, String), name!(hint, Option<String>)),
> {
    let is_probe = probe.unwrap_or(false);
    if is_probe && !ffi::is_superuser() {
        ereport!(
            ERROR,
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE,
            "only a superuser may check with probe => true",
            "It writes to the storage."
        );
    }
    let mut rows = Vec::new();
    match ServerFacts::read() {
        Ok(facts) => rows.extend(
            [archive_mode, archive_library, archive_command, continuous_archiving, last_archived]
                .map(|row| row(&facts)),
        ),
        Err(error) => {
            let error =
                Error::new(Kind::Internal, "server", format!("could not read the server's statistics: {error}"));
            rows.push(Row::of_error("server", &error));
        }
    }
    rows.push(waiting());
    match guc::config(&ffi::data_directory()) {
        Ok(config) => {
            rows.push(Row::ok("settings", "all known and valid"));
            rows.push(check::compression(&config));
            rows.extend(storage_rows(&config, is_probe));
        }
        Err(error) => rows.push(Row::of_error("settings", &error)),
    }
    let in_columns = |row: Row| (row.name.to_string(), row.verdict.word().to_string(), row.detail, row.hint);
    TableIterator::new(rows.into_iter().map(in_columns))
}

extension_sql_file!("../../sql/views.sql", name = "views", requires = [facts, check], finalize);
