//! The archive's records made anew.

use super::{stream_from_storage, subject};
use crate::pg::report;
use archiver_core::rebuild::{Rebuilt, rebuild};
use archiver_core::report::Report;
use archiver_core::{Error, Kind, Result};
use pgrx::PgLogLevel;
use pgrx::prelude::*;

fn rebuilt() -> Result<Rebuilt> {
    let subject = subject();
    let system_identifier = subject.known()?;
    let mut stream = stream_from_storage(&subject, move |place, pulse, hand_over| {
        let _ = hand_over(rebuild(place, Some(system_identifier), pulse)?);
        Ok(())
    })?;
    stream.next()?.ok_or_else(|| Error::new(Kind::Internal, "thread", "internal error in a thread"))
}

/// Makes catalogue and sums of a local archive anew from what is stored; archiving goes on meanwhile. What went, and what
/// could not be read, is told in warnings.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn rebuild_catalogue() -> TableIterator<
    'static,
    (
        name!(files, i64),
        name!(lines_added, i64),
        name!(lines_changed, i64),
        name!(lines_dropped, i64),
        name!(sums_made, i64),
        name!(sums_dropped, i64),
        name!(unread, i64),
    ),
> {
    let rebuilt = rebuilt().unwrap_or_else(|error| report::raise(Report::of(&error)));
    rebuilt.notes.iter().for_each(|note| report::log(PgLogLevel::WARNING, Report::of(note)));
    let Rebuilt { files, lines_added, lines_changed, lines_dropped, sums_made, sums_dropped, unread, .. } = rebuilt;
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    TableIterator::once((
        number(files),
        number(lines_added),
        number(lines_changed),
        number(lines_dropped),
        number(sums_made),
        number(sums_dropped),
        number(unread),
    ))
}
