//! `archiver rebuild`: catalogue and sums made anew.

use super::open;
use crate::args::{Arguments, Rebuild};
use crate::output::{self, End, tell, write_json};
use archiver_core::pulse::Pulse;
use archiver_core::rebuild::{Rebuilt, rebuild};
use archiver_core::report::Report;
use serde::Serialize;
use std::io::{self, Write};

/// What was done, as `archiver.rebuild_catalogue` names its columns.
#[derive(Serialize)]
struct Summary {
    files: u64,
    lines_added: u64,
    lines_changed: u64,
    lines_dropped: u64,
    sums_made: u64,
    sums_dropped: u64,
    unread: u64,
    notes: Vec<String>,
}

/// Makes the records anew; the exit code says whether every file could be read that had to be.
pub fn run(arguments: &Arguments, wanted: &Rebuild) -> Result<u8, End> {
    let (place, system_identifier) = open(arguments)?;
    let rebuilt = rebuild(&place, system_identifier, &Pulse::new())?;
    let code = if rebuilt.unread == 0 { output::DONE } else { output::NO };
    match write(&rebuilt, wanted.json).map_err(End::from) {
        // It is done, whoever listens.
        Ok(()) | Err(End::ReaderLeft) => Ok(code),
        Err(failed) => Err(failed),
    }
}

fn write(rebuilt: &Rebuilt, is_json: bool) -> io::Result<()> {
    let mut out = output::standard_output();
    let Rebuilt { files, lines_added, lines_changed, lines_dropped, sums_made, sums_dropped, unread, notes } = rebuilt;
    if is_json {
        let summary = Summary {
            files: *files,
            lines_added: *lines_added,
            lines_changed: *lines_changed,
            lines_dropped: *lines_dropped,
            sums_made: *sums_made,
            sums_dropped: *sums_dropped,
            unread: *unread,
            notes: notes.iter().map(|note| note.message().to_string()).collect(),
        };
        write_json(&mut out, &summary)?;
        out.write_all(b"\n")?;
    } else {
        notes.iter().for_each(|note| tell(Report::of(note)));
        writeln!(
            out,
            "files: {files}, lines added: {lines_added}, changed: {lines_changed}, dropped: {lines_dropped}, \
             sums made: {sums_made}, dropped: {sums_dropped}, unread: {unread}"
        )?;
    }
    out.flush()
}
