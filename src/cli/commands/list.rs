//! `archiver list` and `archiver exists`: what is in the archive.

use super::{open, range};
use crate::args::{Arguments, Exists, List};
use crate::output::{self, End, rfc3339, write_json};
use archiver_core::listing::{Archived, list_page, locate};
use serde::Serialize;
use std::io::{self, Write};

/// Files that are looked at before the first of them is printed: the bound on memory.
const PAGE: usize = 1000;

/// An archived file, as `archiver.list_wal` names its columns.
#[derive(Serialize)]
struct Row {
    name: String,
    kind: &'static str,
    timeline: u32,
    size: Option<u64>,
    stored_size: u64,
    stored_at: String,
    compression: &'static str,
    encryption: &'static str,
    location: String,
}

impl Row {
    fn of(file: Archived) -> Self {
        Row {
            kind: file.name.kind().word(),
            timeline: file.name.timeline().0,
            name: file.name.to_string(),
            size: file.plain_size,
            stored_size: file.stored_size,
            stored_at: rfc3339(file.stored_at, 6),
            compression: file.format.compression.name(),
            encryption: file.format.encryption.name(),
            location: file.location,
        }
    }
}

/// Columns of fixed width: the widest row may come last.
fn write_columns(out: &mut impl Write, columns: [&str; 8]) -> io::Result<()> {
    let [name, kind, timeline, size, stored_size, stored_at, compression, location] = columns;
    writeln!(
        out,
        "{name:<40}  {kind:<12}  {timeline:>8}  {size:>10}  {stored_size:>11}  {stored_at:<20}  {compression:<11}  \
         {location}"
    )
}

fn write_plain(out: &mut impl Write, file: Archived) -> io::Result<()> {
    let stored_at = rfc3339(file.stored_at, 0);
    let row = Row::of(file);
    let size = row.size.map_or_else(|| "-".to_string(), |size| size.to_string());
    let (timeline, stored_size) = (row.timeline.to_string(), row.stored_size.to_string());
    write_columns(
        out,
        [&row.name, row.kind, &timeline, &size, &stored_size, &stored_at, row.compression, &row.location],
    )
}

/// Prints the archived files of the range, page by page.
pub fn list(arguments: &Arguments, wanted: &List) -> Result<u8, End> {
    let Some(range) = range(wanted.from, wanted.to) else { return Ok(output::USAGE) };
    let (place, system_identifier) = open(arguments)?;
    // An empty list is an answer, too.
    place.confirm_archive(system_identifier)?;
    let mut out = output::standard_output();
    if wanted.json {
        out.write_all(b"[")?;
    } else {
        write_columns(
            &mut out,
            ["name", "kind", "timeline", "size", "stored_size", "stored_at", "compression", "location"],
        )?;
    }
    let (mut after, mut separator) = (None::<String>, "\n");
    loop {
        let (page, next) = list_page(&place, after.as_deref(), &range, PAGE)?;
        for file in page {
            if wanted.json {
                out.write_all(separator.as_bytes())?;
                write_json(&mut out, &Row::of(file))?;
                separator = ",\n";
            } else {
                write_plain(&mut out, file)?;
            }
        }
        match next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    if wanted.json {
        out.write_all(b"\n]\n")?;
    }
    out.flush()?;
    Ok(output::DONE)
}

#[derive(Serialize)]
struct Answer {
    name: String,
    exists: bool,
    location: Option<String>,
}

/// Prints where the file lies; the exit code says whether it does.
pub fn exists(arguments: &Arguments, wanted: &Exists) -> Result<u8, End> {
    let (place, system_identifier) = open(arguments)?;
    let location = locate(&place, &wanted.name, system_identifier)?;
    let code = if location.is_some() { output::DONE } else { output::NO };
    let mut out = output::standard_output();
    let written = if wanted.json {
        let answer = Answer { name: wanted.name.to_string(), exists: location.is_some(), location };
        write_json(&mut out, &answer).and_then(|()| out.write_all(b"\n"))
    } else {
        location.map_or(Ok(()), |location| writeln!(out, "{location}"))
    };
    match written.and_then(|()| out.flush()).map_err(End::from) {
        // The exit code is the answer.
        Ok(()) | Err(End::ReaderLeft) => Ok(code),
        Err(failed) => Err(failed),
    }
}
