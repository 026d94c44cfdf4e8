//! Whether archiving works: what the server says of itself, and what the storage looks like.

use super::{STORAGE_PATIENCE, pg_wal, state, subject};
use crate::pg::{ffi, guc, off_thread};
use archiver_core::check::{self as core_check, Home, Row};
use archiver_core::config::{Config, Limits, Streaming};
use archiver_core::pulse::Pulse;
use archiver_core::stream::check as core_streaming;
use archiver_core::wal::WalName;
use archiver_core::{Error, Kind};
use pgrx::prelude::*;
use std::sync::Arc;
use std::time::Duration;

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
}

impl ServerFacts {
    /// Whether this is a standby that archives nothing before it is promoted.
    fn waits_for_promotion(&self) -> bool {
        self.archive_mode == "on" && ffi::is_in_recovery()
    }

    /// Whether nothing is archived by file, and that is as it should be.
    fn only_receives(&self) -> bool {
        self.archive_mode == "off" && guc::receives_wal()
    }

    fn read() -> Result<Self, pgrx::spi::Error> {
        Spi::connect(|client| {
            let row = client
                .select(
                    "SELECT pg_catalog.current_setting('archive_mode'), pg_catalog.current_setting('archive_library'), \
                     pg_catalog.current_setting('archive_command'), archived_count, last_archived_wal, \
                     EXTRACT(epoch FROM pg_catalog.clock_timestamp() - last_archived_time)::float8, last_failed_wal, \
                     last_failed_time > COALESCE(last_archived_time, '-infinity') \
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
            })
        })
    }
}

/// For all that the server answers that WAL is received from: with the patience of every other item it makes 30 s.
const STREAMING_PATIENCE: Duration = Duration::from_secs(10);
const AT_PROMOTION: &str = "archiving starts at promotion";
const NO_WAL_HINT: &str = "SELECT * FROM archiver.archive_now()";

fn archive_mode(facts: &ServerFacts) -> Row {
    let name = "archive_mode";
    match facts.archive_mode.as_str() {
        "on" if facts.waits_for_promotion() => Row::ok(name, format!("on; this is a standby: {AT_PROMOTION}")),
        mode @ ("on" | "always") => Row::ok(name, mode),
        mode if facts.only_receives() => Row::ok(name, format!("{mode}: WAL is archived as it is received")),
        mode => Row::failed(name, mode, "Set archive_mode = on in postgresql.conf and restart the server."),
    }
}

/// Whether a value of archive_library, or one of shared_preload_libraries, names this library, with or without a directory and
/// the file's ending.
pub(super) fn is_ours(archive_library: &str) -> bool {
    archive_library.rsplit('/').next().is_some_and(|file| file.split('.').next() == Some("archiver"))
}

fn archive_library(facts: &ServerFacts) -> Row {
    let name = "archive_library";
    match facts.archive_library.as_str() {
        other if is_ours(other) => Row::ok(name, other),
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
            state().and_then(|state| state.last_error).unwrap_or_else(|| "The server log says why.".into()),
        ),
        _ if facts.waits_for_promotion() => Row::ok(name, AT_PROMOTION),
        _ if facts.archived_count == 0 => Row::warning(name, "nothing was archived yet", NO_WAL_HINT),
        _ => Row::ok(name, format!("{} files archived", facts.archived_count)),
    }
}

fn last_archived(facts: &ServerFacts, limits: &Limits) -> Row {
    let name = "last archived WAL";
    match (&facts.last_archived_wal, facts.seconds_since_archived) {
        (Some(wal), Some(seconds)) => {
            let detail = format!("{wal}, {seconds:.0} s ago");
            match limits.last_wal_maximum_age {
                Some(most) if seconds > most.as_secs_f64() => Row::failed(
                    name,
                    format!("{detail}; archiver.last_wal_maximum_age allows {} s", most.as_secs()),
                    "An idle server archives nothing: archive_timeout or archiver.archive_now() completes a segment.",
                ),
                _ => Row::ok(name, detail),
            }
        }
        _ if facts.waits_for_promotion() => Row::ok(name, AT_PROMOTION),
        _ => Row::warning(name, "none", NO_WAL_HINT),
    }
}

/// A file of keys may lie on a dead mount.
fn encryption(config: &Config) -> Row {
    let config = config.clone();
    off_thread::run(STORAGE_PATIENCE, move |_| core_check::encryption(&config))
        .unwrap_or_else(|error| Row::of_error("encryption", &error))
}

fn storage_rows(config: &Config, is_probe: bool) -> Vec<Row> {
    let subject = subject();
    let home = subject.system_identifier.map(|system_identifier| Home {
        system_identifier,
        data_directory: ffi::data_directory(),
        is_elsewhere: subject.is_elsewhere,
    });
    let off_thread = |name, work: fn(&Config, Option<&Home>, &Arc<Pulse>) -> Vec<Row>| {
        let (config, home) = (config.clone(), home.clone());
        off_thread::run(STORAGE_PATIENCE, move |pulse| work(&config, home.as_ref(), pulse))
            .unwrap_or_else(|error| vec![Row::of_error(name, &error)])
    };
    let mut rows = off_thread("storage", core_check::check_storage);
    if is_probe {
        rows.extend(off_thread("probe", |config, home, pulse| {
            let unknown = || Row::failed("probe", "it is not known whose WAL is received", "See that some is, first.");
            vec![home.map_or_else(unknown, |home| core_check::probe_storage(config, home, pulse))]
        }));
    }
    rows
}

/// Whether WAL is received, where it is to be; and whether a slot is left where it is not.
fn streaming_rows() -> Vec<Row> {
    let is_on = Streaming::is_on(&guc::settings()).unwrap_or(true);
    let Ok((_, streaming)) = guc::receiver(&ffi::data_directory()) else { return Vec::new() };
    let asked = streaming.clone();
    if !is_on {
        let left = off_thread::run(STREAMING_PATIENCE, move |pulse| core_streaming::left_slot(&asked, pulse));
        return left.ok().flatten().into_iter().collect();
    }
    if guc::receives_own_wal() && ffi::is_in_recovery() {
        return vec![Row::ok(
            "receive-wal running",
            "this is a standby: its own WAL is received from its promotion on",
        )];
    }
    let mut rows = Vec::new();
    let is_preloaded = ffi::preloaded_libraries().split(',').any(|name| is_ours(name.trim().trim_matches('"')));
    if !is_preloaded {
        rows.push(Row::failed(
            "streaming worker",
            "the library is not preloaded: nobody heeds archiver.streaming_archiver",
            "Add archiver to shared_preload_libraries and restart the server.",
        ));
    }
    let receiver = off_thread::run(STORAGE_PATIENCE, move |_| core_streaming::receiver(&streaming));
    rows.extend(receiver.unwrap_or_else(|error| vec![Row::of_error("receive-wal running", &error)]));
    let server = off_thread::run(STREAMING_PATIENCE, move |pulse| core_streaming::server(&asked, pulse));
    rows.extend(server.unwrap_or_else(|_| {
        let detail = format!("the server did not answer within {} s", STREAMING_PATIENCE.as_secs());
        vec![Row::failed(core_streaming::CONNECTION, detail, "Is it reachable from here?")]
    }));
    rows
}

/// Whether archiving works, one row for each thing that could keep it from working. With `probe`, which a superuser may
/// ask for, an object is written to the storage, read back and removed.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn check(
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
    let config = guc::config(&ffi::data_directory());
    let limits = guc::limits().unwrap_or_default();
    match ServerFacts::read() {
        Ok(facts) => {
            rows.push(archive_mode(&facts));
            if !facts.only_receives() {
                rows.extend([archive_library, archive_command, continuous_archiving].map(|row| row(&facts)));
                rows.push(last_archived(&facts, &limits));
            }
            rows.push(core_check::refused(state().as_ref()));
        }
        Err(error) => {
            let error =
                Error::new(Kind::Internal, "server", format!("could not read the server's statistics: {error}"));
            rows.push(Row::of_error("server", &error));
        }
    }
    rows.push(core_check::waiting(&pg_wal(), &limits));
    let problems = guc::problems(&ffi::data_directory());
    rows.extend(problems.iter().map(|error| Row::of_error("settings", error)));
    if problems.is_empty() {
        rows.push(Row::ok("settings", "all known and valid"));
    }
    // Nothing can be known of a storage that is not named rightly.
    if let Ok(config) = config {
        rows.push(core_check::compression(&config));
        rows.push(encryption(&config));
        rows.extend(core_check::hooks(&config));
        rows.extend(storage_rows(&config, is_probe));
        rows.extend(streaming_rows());
    }
    let in_columns = |row: Row| (row.name.to_string(), row.verdict.word().to_string(), row.detail, row.hint);
    TableIterator::new(rows.into_iter().map(in_columns))
}
