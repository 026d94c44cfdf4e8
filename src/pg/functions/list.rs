//! What lies in the archive.

use super::queue::timestamp;
use super::{in_storage, range, subject};
use crate::pg::report;
use archiver_core::Result;
use archiver_core::listing::{self, Archived, Range};
use archiver_core::report::Report;
use pgrx::prelude::*;
use std::collections::VecDeque;

/// Files looked at in one go: few enough to be quick where each has to be opened.
const OPENED_FILES: usize = 100;
/// Where a listing tells all of them: one request's worth.
const LISTED_FILES: usize = 1000;

/// The archived files of a range, fetched page by page as they are asked for: memory stays small, however many there are.
struct Listing {
    range: Range,
    page: VecDeque<Archived>,
    after: Option<String>,
    is_over: bool,
}

impl Listing {
    fn next_file(&mut self) -> Result<Option<Archived>> {
        while self.page.is_empty() && !self.is_over {
            let (range, after) = (self.range, self.after.clone());
            // Once, with the first page.
            let subject = after.is_none().then(subject);
            let (page, after) = in_storage(move |place| {
                if let Some(subject) = subject {
                    place.confirm_archive(subject.system_identifier)?;
                }
                let most = if place.is_remote() { LISTED_FILES } else { OPENED_FILES };
                listing::list_page(place, after.as_deref(), &range, most)
            })?;
            self.page = page.into();
            self.is_over = after.is_none();
            self.after = after;
        }
        Ok(self.page.pop_front())
    }
}

/// The archived files, of all timelines, between two names that both count; in order of where they lie.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
#[expect(clippy::type_complexity, reason = "the columns of a function are written out where it is declared")]
pub(super) fn list_wal(
    from_name: default!(Option<&str>, "NULL"),
    to_name: default!(Option<&str>, "NULL"),
) -> TableIterator<
    'static,
    (
        name!(name, String),
        name!(kind, &'static str),
        name!(timeline, i64),
        name!(size, Option<i64>),
        name!(stored_size, i64),
        name!(stored_at, TimestampWithTimeZone),
        name!(compression, &'static str),
        name!(encryption, &'static str),
        name!(location, String),
    ),
> {
    let range = range(from_name, to_name).unwrap_or_else(|error| report::raise(Report::of(&error)));
    let mut listing = Listing { range, page: VecDeque::new(), after: None, is_over: false };
    let files =
        std::iter::from_fn(move || listing.next_file().unwrap_or_else(|error| report::raise(Report::of(&error))));
    TableIterator::new(files.map(|file| {
        (
            file.name.to_string(),
            file.name.kind().word(),
            i64::from(file.name.timeline().0),
            file.plain_size.and_then(|size| i64::try_from(size).ok()),
            i64::try_from(file.stored_size).unwrap_or(i64::MAX),
            timestamp(file.stored_at),
            file.format.compression.name(),
            file.format.encryption.name(),
            file.location,
        )
    }))
}
