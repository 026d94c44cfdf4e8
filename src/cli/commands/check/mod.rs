//! `archiver check`: whether archiving works, as far as it can be judged from outside the server.

mod metrics;
mod nagios;

use super::status::{look_at, look_at_receiver};
use crate::args::{Arguments, Check};
use crate::output::{self, End, write_json};
use crate::settings;
use archiver_core::Error;
use archiver_core::archive::check_memory;
use archiver_core::check::{self, Row, Verdict};
use archiver_core::config::{Config, Limits, Setting, Settings, Streaming};
use archiver_core::data_directory::{cluster, conninfo_of_server};
use archiver_core::pulse::Pulse;
use archiver_core::queue::{Summary, waiting};
use archiver_core::state::State;
use archiver_core::stream::{self, Facts};
use serde::Serialize;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

/// A row, as `archiver.check()` names its columns.
#[derive(Serialize)]
struct Judged {
    name: &'static str,
    state: &'static str,
    detail: String,
    hint: Option<String>,
}

/// What was found: the rows, and what the figures of a monitor are made from.
#[derive(Default)]
struct Findings {
    rows: Vec<Row>,
    server_name: String,
    queue: Option<Summary>,
    state: Option<State>,
    receiver: Option<Facts>,
}

impl Findings {
    fn worst(&self) -> Verdict {
        let of = |verdict| self.rows.iter().any(|row| row.verdict == verdict).then_some(verdict);
        of(Verdict::Failed).or_else(|| of(Verdict::Warning)).unwrap_or(Verdict::Ok)
    }
}

fn judge(arguments: &Arguments) -> archiver_core::Result<Findings> {
    let data_directory = settings::data_directory(arguments, None);
    let as_row = |error: &Error| Row::of_error("settings", error);
    let of_problems = |rows| Ok(Findings { rows, ..Findings::default() });
    let settings = match settings::read(arguments, &data_directory) {
        Ok(settings) => settings,
        Err(error) => return of_problems(vec![as_row(&error)]),
    };
    let config = match Config::parse(&settings) {
        Ok(config) => config,
        Err(_) => return of_problems(Config::problems(&settings).iter().map(as_row).collect()),
    };
    let (home, state) = look_at(arguments, &data_directory)?;
    let pg_wal = data_directory.join("pg_wal");
    let limits = Limits::parse(&settings);
    let mut rows = vec![match (cluster(&data_directory, &[]), &limits) {
        (_, Err(error)) => as_row(error),
        (Ok(Some((cluster, _))), _) => match check_memory(&config, &cluster) {
            Ok(()) => Row::ok("settings", "all known and valid"),
            Err(error) => as_row(&error),
        },
        // Without the segment size, or the right to look for it, that one is left to the server.
        _ => Row::ok("settings", "all known and valid"),
    }];
    let problems = Config::problems(&settings);
    if !problems.is_empty() && rows[0].verdict == Verdict::Ok {
        rows = problems.iter().map(as_row).collect();
    }
    rows.push(check::compression(&config));
    rows.push(check::encryption(&config));
    rows.extend(check::hooks(&config));
    if home.is_some() {
        rows.push(check::archiver_process(state.as_ref()));
        rows.push(check::waiting(&pg_wal, &limits.unwrap_or_default()));
        rows.push(check::refused(state.as_ref()));
    }
    rows.extend(check::check_storage(&config, home.as_ref(), &Arc::default()));
    rows.extend(streaming_rows(arguments, &settings, &config, &data_directory));
    let queue = home.map(|_| Summary::of(&waiting(&pg_wal)));
    let receiver = look_at_receiver(&settings, &config.destination);
    Ok(Findings { rows, server_name: config.destination.server_name.to_string(), queue, state, receiver })
}

/// Whether WAL is received, where it is to be: by the server's settings, by what whoever asks says himself, or because somebody
/// receives, or did until he was ended.
fn streaming_rows(arguments: &Arguments, settings: &Settings, config: &Config, data_directory: &Path) -> Vec<Row> {
    // What is wrong was told before.
    let is_on = Streaming::is_on(settings).unwrap_or(false);
    let is_said = [Setting::StreamingConninfo, Setting::SlotName].iter().any(|one| settings::is_said(arguments, *one));
    let mut settings = settings.clone();
    if is_on && settings.get(Setting::StreamingConninfo).trim().is_empty() {
        settings.set(Setting::StreamingConninfo, conninfo_of_server(data_directory).unwrap_or_default());
    }
    match Streaming::parse(&settings, &config.destination) {
        Ok(streaming) if is_on || is_said || stream::is_used(&streaming.directory) => {
            let mut rows = stream::check::receiver(&streaming);
            rows.extend(stream::check::server(&streaming, &Pulse::new()));
            rows
        }
        // Where nothing is received the directory need not be set.
        Err(error) if is_on && error.subject() == "archiver.streaming_wals_directory" => {
            vec![Row::of_error("settings", &error)]
        }
        _ => Vec::new(),
    }
}

/// Prints a row for each thing that could keep archiving from working; the exit code says whether one failed.
pub fn check(arguments: &Arguments, wanted: &Check) -> Result<u8, End> {
    if wanted.nagios {
        return nagios::run(judge(arguments));
    }
    let findings = judge(arguments)?;
    let code = if findings.worst() == Verdict::Failed { output::NO } else { output::DONE };
    let mut out = output::standard_output();
    let written = if wanted.json {
        write_as_json(&mut out, &findings.rows)
    } else if wanted.metrics {
        metrics::write(&mut out, &findings)
    } else {
        write_as_table(&mut out, &findings.rows)
    };
    match written.and_then(|()| out.flush()).map_err(End::from) {
        // The exit code is the answer.
        Ok(()) | Err(End::ReaderLeft) => Ok(code),
        Err(failed) => Err(failed),
    }
}

fn write_as_json(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    let judged = |row: &Row| Judged {
        name: row.name,
        state: row.verdict.word(),
        detail: row.detail.clone(),
        hint: row.hint.clone(),
    };
    let rows: Vec<Judged> = rows.iter().map(judged).collect();
    write_json(out, &rows).and_then(|()| out.write_all(b"\n"))
}

fn write_as_table(out: &mut impl Write, rows: &[Row]) -> io::Result<()> {
    rows.iter().try_for_each(|row| {
        writeln!(out, "{:<7}  {:<24}  {}", row.verdict.word(), row.name, row.detail)?;
        row.hint.iter().try_for_each(|hint| writeln!(out, "{:<33}  {hint}", ""))
    })
}
