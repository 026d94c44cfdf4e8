//! The check that a DBA trusts: a segment is completed, and stands in the archive before the answer comes.

use super::{in_storage, pg_wal, state};
use crate::pg::{ffi, guc, report};
use archiver_core::error::{Error, Kind, Result};
use archiver_core::queue;
use archiver_core::report::Report;
use archiver_core::wal::{Lsn, SegmentName, Timeline, WalName};
use pgrx::datum::Interval;
use pgrx::prelude::*;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How often the wait looks whether the segment is archived.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How often it looks whether the archiver has failed.
const STATE_INTERVAL: Duration = Duration::from_millis(500);
/// PostgreSQL tries a file three times, a second apart, before it rests (pgarch.c, `NUM_ARCHIVE_RETRIES`).
const ATTEMPTS: u64 = 3;
/// A day.
const LONGEST_TIMEOUT_US: i128 = 24 * 3600 * 1_000_000;

fn wrong_state(message: &str, hint: &str) -> Error {
    Error::new(Kind::Configuration, "server", message).hint(hint)
}

/// Fails where PostgreSQL would not hand the segment to this library.
fn see_that_archiving_is_on() -> Result<()> {
    if ffi::is_in_recovery() {
        return Err(wrong_state("recovery is in progress", "WAL is switched on the primary."));
    }
    let setting = |name: &str| {
        let text = Spi::get_one::<String>(&format!("SELECT pg_catalog.current_setting('{name}')"));
        text.ok().flatten().unwrap_or_default()
    };
    if setting("archive_mode") == "off" {
        return Err(wrong_state("archive_mode is off", "Set archive_mode = on and restart the server."));
    }
    if !super::check::is_ours(&setting("archive_library")) {
        let hint = "Set archive_library = 'archiver' and reload the configuration.";
        return Err(wrong_state("archive_library is not archiver", hint));
    }
    guc::config(&ffi::data_directory()).map(drop)
}

/// Ends the segment in use, which holds at least one record, and answers its name.
fn switch_wal() -> Result<WalName> {
    // Without one, an idle server would have nothing to switch.
    Spi::run("SELECT pg_catalog.pg_logical_emit_message(false, 'archiver', 'archive_now')")
        .map_err(|error| Error::new(Kind::Internal, "WAL", format!("could not write to WAL: {error}")))?;
    let (timeline, end) = ffi::switch_wal();
    // The end of the switch record, which may be that of the segment.
    let last = Lsn(end.saturating_sub(1));
    Ok(WalName::Segment(SegmentName::containing(Timeline(timeline), last, ffi::cluster().segment_size)))
}

/// Whether PostgreSQL was told that the file is archived.
fn is_answered(name: &WalName) -> bool {
    let pg_wal = pg_wal();
    let status = |suffix| pg_wal.join(format!("archive_status/{name}.{suffix}")).exists();
    // Archived files are removed in time, and their status with them.
    !status("ready") && (status("done") || !pg_wal.join(name.to_string()).exists())
}

/// The archiver's own words on why a file is not archived, if it has failed since `began`.
fn failure(name: &WalName, began: SystemTime, least_attempts: u64) -> Option<Error> {
    let state = state()?;
    let failed_at = UNIX_EPOCH + Duration::from_micros(u64::try_from(state.last_error_us?).ok()?);
    if state.failed_attempts < least_attempts.max(1) || failed_at < began {
        return None;
    }
    let message = format!("WAL file \"{name}\" is not archived");
    let error = Error::new(Kind::Storage, name.to_string(), message).detail(format!("{}.", state.last_error?));
    Some(match state.last_error_hint {
        Some(hint) => error.hint(hint),
        None => error,
    })
}

fn wait_until_archived(name: &WalName, timeout: Duration) -> Result<()> {
    let (began, deadline) = (SystemTime::now(), Instant::now() + timeout);
    let mut looked_at = Instant::now();
    while !is_answered(name) {
        if looked_at.elapsed() >= STATE_INTERVAL {
            looked_at = Instant::now();
            if let Some(error) = failure(name, began, ATTEMPTS) {
                return Err(error);
            }
        }
        if Instant::now() >= deadline {
            return Err(failure(name, began, 1).unwrap_or_else(|| timed_out(name, timeout)));
        }
        ffi::sleep(LOOK_INTERVAL);
    }
    Ok(())
}

fn timed_out(name: &WalName, timeout: Duration) -> Error {
    let files = queue::waiting(&pg_wal());
    let before = files.iter().take_while(|file| file.name != name.to_string()).count();
    let message = format!("WAL file \"{name}\" was not archived within {} s", timeout.as_secs_f64());
    Error::new(Kind::Storage, name.to_string(), message)
        .detail(format!("{before} files wait before it."))
        .hint("It is archived when its turn comes: SELECT * FROM archiver.queue() shows how far that is.")
}

/// Where the file lies; fails where it does not.
fn location(name: WalName) -> Result<String> {
    in_storage(move |place| {
        if let Some(stored) = place.find(&name)? {
            return Ok(place.store.location(&stored.key));
        }
        let location = place.wal_location(&name);
        let message = format!("WAL file \"{name}\" was archived and is not at \"{location}\"");
        Err(Error::new(Kind::Storage, location, message)
            .hint("Did the settings change meanwhile, or did somebody remove it?"))
    })
}

/// Completes the segment in use and waits until it stands in the archive; raises why if it does not within `timeout`.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn archive_now(
    timeout: default!(Option<Interval>, "'60 s'"),
) -> TableIterator<'static, (name!(name, String), name!(location, String), name!(seconds, f64))> {
    let began = Instant::now();
    let timeout_us = timeout.map_or(60_000_000, |timeout| timeout.as_micros()).clamp(0, LONGEST_TIMEOUT_US);
    let timeout = Duration::from_micros(u64::try_from(timeout_us).unwrap_or(0));
    let archived = see_that_archiving_is_on().and_then(|()| {
        let name = switch_wal()?;
        wait_until_archived(&name, timeout)?;
        Ok((name, location(name)?))
    });
    match archived {
        Ok((name, location)) => TableIterator::once((name.to_string(), location, began.elapsed().as_secs_f64())),
        Err(error) => report::raise(Report::of(&error)),
    }
}
