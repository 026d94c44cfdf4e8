//! `archiver gaps`: what the archive lacks.

use super::open;
use crate::args::{Arguments, Gaps};
use crate::output::{self, End, tell, write_json};
use crate::settings;
use archiver_core::data_directory::segment_size;
use archiver_core::gaps::{Findings, Gap, find};
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use serde::Serialize;
use std::io::{self, Write};

/// A gap, as `archiver.gaps` names its columns.
#[derive(Serialize)]
struct Row {
    timeline: u32,
    first_missing: String,
    last_missing: String,
    segments: u64,
}

impl Row {
    fn of(gap: &Gap) -> Self {
        Row {
            timeline: gap.timeline.0,
            first_missing: gap.first.to_string(),
            last_missing: gap.last.to_string(),
            segments: gap.segments,
        }
    }
}

/// Prints the gaps; the exit code says whether there is one, or may be one.
pub fn run(arguments: &Arguments, wanted: &Gaps) -> Result<u8, End> {
    let (place, system_identifier) = open(arguments)?;
    let data_directory = settings::data_directory(arguments, None);
    let segment_size = system_identifier.and_then(|cluster| segment_size(&data_directory, cluster));
    let findings = find(&place, system_identifier, segment_size, &Pulse::new())?;
    findings.doubts.iter().for_each(|doubt| tell(Report::new("gaps may be hidden", doubt)));
    let rows: Vec<Row> = findings.gaps.iter().map(Row::of).collect();
    let code = if findings.is_whole() { output::DONE } else { output::NO };
    match write(&rows, &findings, wanted.json).map_err(End::from) {
        // The exit code is the answer.
        Ok(()) | Err(End::ReaderLeft) => Ok(code),
        Err(failed) => Err(failed),
    }
}

fn write(rows: &[Row], findings: &Findings, is_json: bool) -> io::Result<()> {
    let mut out = output::standard_output();
    if is_json {
        write_json(&mut out, &rows)?;
        out.write_all(b"\n")?;
    } else if findings.is_whole() {
        writeln!(out, "no gaps")?;
    } else if !rows.is_empty() {
        writeln!(out, "{:>8}  {:<40}  {:<40}  {:>8}", "timeline", "first_missing", "last_missing", "segments")?;
        for row in rows {
            let Row { timeline, first_missing, last_missing, segments } = row;
            writeln!(out, "{timeline:>8}  {first_missing:<40}  {last_missing:<40}  {segments:>8}")?;
        }
    }
    out.flush()
}
