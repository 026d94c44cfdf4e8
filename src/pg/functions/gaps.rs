//! What the archive lacks.

use super::{stream_from_storage, subject};
use crate::pg::report;
use archiver_core::gaps::{Findings, find};
use archiver_core::report::Report;
use archiver_core::{Error, Kind, Result};
use pgrx::PgLogLevel;
use pgrx::prelude::*;

fn findings() -> Result<Findings> {
    let cluster = subject();
    let mut stream = stream_from_storage(&cluster, move |place, pulse, hand_over| {
        let findings = find(place, cluster.system_identifier, cluster.segment_size, pulse)?;
        let _ = hand_over(findings);
        Ok(())
    })?;
    stream.next()?.ok_or_else(|| Error::new(Kind::Internal, "thread", "internal error in a thread"))
}

/// Runs of segments that are missing, of all timelines; and single files of other kinds that the archive's records name
/// and that are not there.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn gaps() -> TableIterator<
    'static,
    (name!(timeline, i64), name!(first_missing, String), name!(last_missing, String), name!(segments, i64)),
> {
    let findings = findings().unwrap_or_else(|error| report::raise(Report::of(&error)));
    for doubt in &findings.doubts {
        report::log(PgLogLevel::WARNING, Report::new("gaps may be hidden", doubt));
    }
    TableIterator::new(findings.gaps.into_iter().map(|gap| {
        let segments = i64::try_from(gap.segments).unwrap_or(i64::MAX);
        (i64::from(gap.timeline.0), gap.first.to_string(), gap.last.to_string(), segments)
    }))
}
