//! Deletes archived WAL that nobody needs any more.

use super::{change_storage, subject};
use crate::pg::{ffi, guc, report};
use archiver_core::config::{Destination, HookScripts};
use archiver_core::deletion::{Attendant, Attended, Bound, Deletion, Departing, Request};
use archiver_core::hooks::{Hooks, Notes};
use archiver_core::report::Report;
use archiver_core::{Error, Kind, Result};
use pgrx::PgLogLevel;
use pgrx::prelude::*;
use std::sync::Arc;

/// So many files that could not be deleted are told one by one.
const MOST_TOLD: usize = 100;

/// What became of the files.
struct Deleted {
    files: Vec<Departing>,
    failures: Vec<Error>,
    failed: usize,
    notices: Vec<Error>,
    ended: Result<()>,
}

fn delete(before: Bound, dry_run: bool, notes: &Arc<Notes>) -> Result<Deleted> {
    let cluster = subject();
    let system_identifier = Some(cluster.known()?);
    let settings = guc::settings();
    let (scripts, destination) = (HookScripts::parse(&settings)?, Destination::parse(&settings)?);
    let (configuration_file, notes) = (ffi::config_file(), Arc::clone(notes));
    change_storage(move |place, pulse| {
        let hooks = Hooks::new(&scripts, &destination, Arc::clone(pulse));
        let hooks = hooks.of_configuration_file(configuration_file.as_deref(), Arc::new(move |note| notes.push(note)));
        let request = Request { before, keeps: Vec::new(), system_identifier, segment_size: cluster.segment_size };
        let deletion = Deletion::plan(place, &request)?;
        let notices = deletion.notices().to_vec();
        let mut done = Deleted { files: Vec::new(), failures: Vec::new(), failed: 0, notices, ended: Ok(()) };
        if dry_run {
            deletion.list(pulse, &mut |file| done.files.push(file))?;
            return Ok(done);
        }
        let mut attended = Attended::by(&hooks);
        let attendant = attended.as_mut().map(|attended| attended as &mut dyn Attendant);
        let settled = deletion.carry_out(pulse, attendant, &mut |file, outcome| match outcome {
            Ok(()) => done.files.push(file.clone()),
            Err(error) => {
                done.failed += 1;
                if done.failures.len() < MOST_TOLD {
                    done.failures.push(error.clone());
                }
            }
        });
        match settled {
            Ok(settled) => done.notices.extend(settled.broken),
            Err(error) => done.ended = Err(error),
        }
        Ok(done)
    })
}

/// Deletes the archived segments, partial ones, backup labels and parts before that one, along its own history, and answers
/// with them; by default it only shows what would go. History files stay, and so does every other timeline.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn delete_wal(
    before: String,
    dry_run: default!(bool, "true"),
) -> TableIterator<'static, (name!(name, String), name!(stored_size, i64), name!(location, String))> {
    let bound = Bound::parse(&before).map_err(|bad| Error::new(Kind::Configuration, before, bad.to_string()));
    let notes = Arc::new(Notes::default());
    let done = bound.and_then(|bound| delete(bound, dry_run, &notes));
    for note in notes.take() {
        report::log_line(if note.is_trouble { PgLogLevel::WARNING } else { PgLogLevel::LOG }, note.message);
    }
    let done = done.unwrap_or_else(|error| report::raise(Report::of(&error)));
    for notice in &done.notices {
        report::log(PgLogLevel::NOTICE, Report::of(notice));
    }
    for failure in &done.failures {
        report::log(PgLogLevel::WARNING, Report::of(failure));
    }
    if done.failed > done.failures.len() {
        let more = done.failed - done.failures.len();
        report::log_line(PgLogLevel::WARNING, format!("{more} more files could not be deleted"));
    }
    if let Err(error) = done.ended {
        let count = done.files.len();
        let what = format!("only {count} files were deleted");
        report::raise(Report::new(&what, &error));
    }
    TableIterator::new(
        done.files
            .into_iter()
            .map(|file| (file.item.to_string(), i64::try_from(file.stored_size).unwrap_or(i64::MAX), file.location)),
    )
}
