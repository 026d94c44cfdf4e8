//! `archiver errors`: files that were refused or set aside.

use super::open;
use crate::args::{Arguments, Errors};
use crate::output::{self, End, rfc3339, tell, write_json};
use crate::settings;
use archiver_core::Kind;
use archiver_core::report::Report;
use archiver_core::set_aside::{self, SetAside};
use archiver_core::state::{Refused, State};
use serde::Serialize;
use std::io::{self, BufWriter, StdoutLock, Write};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

/// A file, as `archiver.errors()` names its columns.
#[derive(Serialize)]
struct Row {
    name: String,
    reason: String,
    since: Option<String>,
    in_pg_wal: bool,
    location: String,
    detail: Option<String>,
}

impl Row {
    fn of_refused(file: Refused, data_directory: &Path) -> Self {
        let since = u64::try_from(file.since_us).ok().map(|us| rfc3339(UNIX_EPOCH + Duration::from_micros(us), 6));
        let in_pg_wal = is_in_pg_wal(data_directory, &file.name);
        let (name, reason, detail) = (file.name, "refused".to_string(), Some(file.detail));
        Row { name, reason, since, in_pg_wal, location: file.location, detail }
    }

    fn of_set_aside(file: SetAside, data_directory: &Path) -> Self {
        let in_pg_wal = is_in_pg_wal(data_directory, &file.name);
        let since = file.set_aside_at().map(|time| rfc3339(time, 6));
        Row { name: file.name, reason: file.reason, since, in_pg_wal, location: file.location, detail: None }
    }
}

fn is_in_pg_wal(data_directory: &Path, name: &str) -> bool {
    data_directory.join("pg_wal").join(name).exists()
}

#[derive(Serialize)]
struct Cleared {
    name: String,
    cleared: bool,
    location: Option<String>,
}

/// Shows the files, or removes one of them.
pub fn run(arguments: &Arguments, wanted: &Errors) -> Result<u8, End> {
    let (place, system_identifier) = open(arguments)?;
    // No files is an answer, too, and another cluster's are not to be removed.
    place.confirm_archive(system_identifier)?;
    if let Some(name) = &wanted.clear {
        place.refuse_root_in_anothers()?;
        return clear(set_aside::clear(&place, name), name, wanted.json);
    }
    let data_directory = settings::data_directory(arguments, None);
    let state = system_identifier.and_then(|ours| State::of_running_server(&data_directory, ours));
    let refused = state.map(|state| state.refused).unwrap_or_default();
    let aside = set_aside::list(&place)?;
    let counts = (!refused.is_empty()).then(|| format!("refused: {}", refused.len()));
    let summary: Vec<String> = counts.into_iter().chain(set_aside::summary(&aside)).collect();
    let mut rows: Vec<Row> = refused.into_iter().map(|file| Row::of_refused(file, &data_directory)).collect();
    rows.extend(aside.into_iter().map(|file| Row::of_set_aside(file, &data_directory)));
    rows.sort_by(|a, b| (&a.since, &a.name).cmp(&(&b.since, &b.name)));

    let code = if rows.is_empty() { output::DONE } else { output::NO };
    end(code, |out| {
        if wanted.json {
            return write_json(out, &rows).and_then(|()| out.write_all(b"\n"));
        }
        for row in &rows {
            let (since, place) = (row.since.as_deref().unwrap_or("-"), if row.in_pg_wal { "pg_wal" } else { "-" });
            writeln!(out, "{:<40}  {:<15}  {since:<27}  {place:<6}  {}", row.name, row.reason, row.location)?;
            row.detail.iter().try_for_each(|detail| writeln!(out, "{:<40}  {detail}", ""))?;
        }
        summary.first().map_or(Ok(()), |_| writeln!(out, "{}", summary.join(", ")))
    })
}

fn clear(cleared: archiver_core::Result<String>, name: &str, is_json: bool) -> Result<u8, End> {
    let location = match cleared {
        Ok(location) => Some(location),
        Err(error) if error.kind() == Kind::NotFound => {
            tell(Report::of(&error));
            None
        }
        Err(error) => return Err(error.into()),
    };
    let code = if location.is_some() { output::DONE } else { output::NO };
    end(code, |out| match location {
        location if is_json => {
            let cleared = Cleared { name: name.to_string(), cleared: location.is_some(), location };
            write_json(out, &cleared).and_then(|()| out.write_all(b"\n"))
        }
        Some(location) => writeln!(out, "{location}"),
        None => Ok(()),
    })
}

/// Prints, and ends with that code: it is the answer, also where nobody reads the rest.
fn end(code: u8, write: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> io::Result<()>) -> Result<u8, End> {
    let mut out = output::standard_output();
    match write(&mut out).and_then(|()| out.flush()).map_err(End::from) {
        Ok(()) | Err(End::ReaderLeft) => Ok(code),
        Err(failed) => Err(failed),
    }
}
