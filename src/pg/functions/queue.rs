//! The files that wait to be archived.

use super::{pg_wal, state};
use archiver_core::queue::{Waiting, waiting};
use archiver_core::state::State;
use pgrx::datum::datetime_support::to_timestamp;
use pgrx::prelude::*;
use std::time::{SystemTime, UNIX_EPOCH};

/// A time as SQL shows it.
pub fn timestamp(time: SystemTime) -> TimestampWithTimeZone {
    to_timestamp(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64())
}

/// How far a file has come, and what is wrong with it.
fn progress(file: &Waiting, state: Option<&State>) -> (&'static str, Option<String>) {
    if file.size.is_none() {
        return ("skipped", Some("the file is gone: PostgreSQL passes over it".into()));
    }
    let Some(state) = state else { return ("waiting", None) };
    // The file that PostgreSQL asked for last; those that failed ahead of it are among the files.
    let told = state.last_error.as_deref().filter(|_| state.failed_attempts > 0);
    if let Some(error) = told.and_then(|error| error.strip_prefix(file.name.as_str())?.strip_prefix(": ")) {
        return ("error", Some(error.to_string()));
    }
    match state.files.iter().find(|known| known.name == file.name) {
        Some(known) if known.error.is_some() => ("error", known.error.clone()),
        Some(known) if known.is_stored => ("ready", None),
        Some(_) => ("in progress", None),
        None => ("waiting", None),
    }
}

/// The files that wait to be archived, in the order in which PostgreSQL will ask for them.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
#[expect(clippy::type_complexity, reason = "the columns of a function are written out where it is declared")]
pub(super) fn queue() -> TableIterator<
    'static,
    (
        name!(name, String),
        name!(kind, Option<&'static str>),
        name!(size, Option<i64>),
        name!(ready_since, Option<TimestampWithTimeZone>),
        name!(state, &'static str),
        name!(error, Option<String>),
    ),
> {
    let state = state();
    let rows: Vec<_> = waiting(&pg_wal())
        .into_iter()
        .map(|file| {
            let (word, error) = progress(&file, state.as_ref());
            let kind = file.wal_name().map(|name| name.kind().word());
            let size = file.size.and_then(|size| i64::try_from(size).ok());
            (file.name, kind, size, file.ready_since.map(timestamp), word, error)
        })
        .collect();
    TableIterator::new(rows)
}
