//! How streaming stands, and where it begins.

use super::STORAGE_PATIENCE;
use crate::pg::{ffi, guc, off_thread, report};
use archiver_core::Result;
use archiver_core::config::{Destination, Streaming};
use archiver_core::identity::Marker;
use archiver_core::report::Report;
use archiver_core::state::unix_us;
use archiver_core::stream::{Beginning, Facts, Heard, Reset, Seen, Streamer, look, told};
use pgrx::prelude::*;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// For all questions that a reset asks the server.
const RESET_PATIENCE: Duration = Duration::from_secs(120);

/// What the status row is made from; `sql/views.sql` names the columns again.
#[derive(Serialize)]
struct Shown {
    streaming_archiver: Option<bool>,
    directory: Option<String>,
    #[serde(flatten)]
    facts: Facts,
}

fn directory() -> Result<Option<PathBuf>> {
    let settings = guc::settings();
    Streaming::directory(&settings, &Destination::parse(&settings)?)
}

/// Where this server stands, where it is the one whose WAL is received: it knows that better than whoever asked a while ago.
fn this_server(seen: &Seen, now_us: i64) -> Option<Heard> {
    let received_from = seen.standing.as_ref()?.system_identifier?;
    let is_this_one = received_from == ffi::cluster().system_identifier && !ffi::is_in_recovery();
    is_this_one.then(|| Heard { at_us: now_us, position: ffi::flushed_lsn() })
}

/// The cluster that WAL is received from, where that is known.
pub(super) fn received_cluster() -> Option<u64> {
    let directory = directory().ok()??;
    // It may lie on a dead mount.
    off_thread::run(STORAGE_PATIENCE, move |_| told(&directory)).ok()?.ok()??.system_identifier
}

/// How streaming stands, for `archiver.receive_wal_status()`. What cannot be known is not there.
#[pg_extern]
pub(super) fn receive_wal_facts() -> pgrx::JsonB {
    let directory = directory().ok().flatten();
    let seen = directory.clone().and_then(|directory| {
        // It may lie on a dead mount.
        off_thread::run(STORAGE_PATIENCE, move |_| look(&directory)).ok()?.ok()
    });
    let now_us = unix_us(SystemTime::now());
    let facts = seen.map_or_else(Facts::default, |seen| seen.facts(this_server(&seen, now_us), now_us));
    let shown = Shown {
        streaming_archiver: Streaming::is_on(&guc::settings()).ok(),
        directory: directory.map(|directory| directory.display().to_string()),
        facts,
    };
    pgrx::JsonB(serde_json::to_value(shown).unwrap_or_default())
}

fn reset() -> Result<Reset> {
    let (config, streaming) = guc::receiver(&ffi::data_directory())?;
    let marker = Marker::of_data_directory(&ffi::data_directory());
    off_thread::run_to_an_end(RESET_PATIENCE, move |pulse| {
        let beginning = Beginning::RememberedBy(marker);
        Streamer::new(config, streaming, beginning, Arc::clone(pulse), Arc::new(|_| {}))?.reset()
    })?
}

/// Lets receiving begin where the server or its slot is, though WAL before that was not received: the archive keeps a gap.
/// Answers with which segment, or NULL where there was nothing to do.
#[pg_extern]
#[search_path(pg_catalog, pg_temp)]
pub(super) fn reset_receive_wal() -> Option<String> {
    match reset() {
        Ok(Reset::NothingToDo) => None,
        Ok(Reset::To(segment)) => Some(segment.to_string()),
        Err(error) => report::raise(Report::of(&error)),
    }
}
