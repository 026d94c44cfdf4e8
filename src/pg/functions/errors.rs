//! Files that were refused or set aside.

use super::{change_storage, in_storage, pg_wal, state, subject};
use crate::pg::report;
use archiver_core::report::Report;
use archiver_core::set_aside;
use pgrx::PgLogLevel;
use pgrx::datum::datetime_support::to_timestamp;
use pgrx::prelude::*;

/// What `archiver.errors()` is made from; a time in a file's name is read there.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
#[expect(clippy::type_complexity, reason = "the columns of a function are written out where it is declared")]
pub(super) fn error_rows() -> TableIterator<
    'static,
    (
        name!(name, String),
        name!(reason, String),
        name!(since, Option<TimestampWithTimeZone>),
        name!(since_text, Option<String>),
        name!(in_pg_wal, bool),
        name!(location, String),
        name!(detail, Option<String>),
    ),
> {
    let directory = pg_wal();
    let refused = state().map(|state| state.refused).unwrap_or_default();
    let mut rows: Vec<_> = refused
        .into_iter()
        .map(|file| {
            let is_there = directory.join(&file.name).exists();
            let since = to_timestamp(file.since_us as f64 / 1e6);
            (file.name, "refused".to_string(), Some(since), None, is_there, file.location, Some(file.detail))
        })
        .collect();
    match in_storage(set_aside::list) {
        Ok(files) => rows.extend(files.into_iter().map(|file| {
            let is_there = directory.join(&file.name).exists();
            let since = Some(file.since).filter(|since| !since.is_empty());
            (file.name, file.reason, None, since, is_there, file.location, None)
        })),
        Err(error) => {
            report::log(PgLogLevel::WARNING, Report::new("could not look for files that were set aside", &error));
        }
    }
    TableIterator::new(rows)
}

/// Removes one file that was set aside, by its exact name; answers where it lay. What is refused in pg_wal stays.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn clear_error(name: String) -> String {
    let cleared = subject().known().and_then(|system_identifier| {
        change_storage(move |place, _| {
            place.confirm_archive(Some(system_identifier))?;
            set_aside::clear(place, &name)
        })
    });
    cleared.unwrap_or_else(|error| report::raise(Report::of(&error)))
}
