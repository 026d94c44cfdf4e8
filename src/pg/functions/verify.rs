//! Whether what the archive holds is what was archived.

use super::{range, stream_from_storage, subject};
use crate::pg::report;
use archiver_core::Result;
use archiver_core::report::Report;
use archiver_core::verify::{self as core_verify, Request, Verified};
use pgrx::prelude::*;

/// A verdict on each file, as the files come: memory stays small, however many there are.
fn verdicts(from_name: Option<&str>, to_name: Option<&str>) -> Result<impl Iterator<Item = Result<Verified>> + use<>> {
    let subject = subject();
    let request = Request { range: range(from_name, to_name)?, system_identifier: subject.system_identifier };
    let mut stream = stream_from_storage(&subject, move |place, pulse, hand_over| {
        core_verify::verify(place, &request, pulse, hand_over)
    })?;
    Ok(std::iter::from_fn(move || stream.next().transpose()))
}

/// A verdict on every file between two names that both count: fetched, decoded, compared with what was archived, and
/// looked at page by page. Nothing is written.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn verify(
    from_name: default!(Option<&str>, "NULL"),
    to_name: default!(Option<&str>, "NULL"),
) -> TableIterator<'static, (name!(name, String), name!(state, &'static str), name!(detail, Option<String>))> {
    let verdicts = verdicts(from_name, to_name).unwrap_or_else(|error| report::raise(Report::of(&error)));
    TableIterator::new(verdicts.map(|verified| {
        let verified = verified.unwrap_or_else(|error| report::raise(Report::of(&error)));
        (verified.name.to_string(), verified.state.word(), verified.detail)
    }))
}
