//! `archiver archive PATH…` and `archiver archive DIR`: the archive_command, and Barman's incoming directory.

use crate::args::{Archive as Arguments, Arguments as Typed};
use crate::output::{self, End, Told, tell, write_json};
use crate::settings;
use crate::signals::stop_on_signals;
use archiver_core::archive::Archive;
use archiver_core::config::{Config, Setting};
use archiver_core::crypt::Recipients;
use archiver_core::data_directory::{cluster, writer};
use archiver_core::incoming::{Outcome, Queue};
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use archiver_core::server_conf::ServerConf;
use archiver_core::set_aside::put;
use archiver_core::{Error, Result};
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// Archives what was named; 0 only where all of it is.
pub fn run(typed: &Typed, wanted: &Arguments) -> std::result::Result<u8, End> {
    let directory = wanted.paths.iter().find(|path| path.is_dir());
    if let Some(directory) = directory.filter(|_| wanted.paths.len() > 1) {
        tell(format_args!("\"{}\" is a directory and must be named alone", directory.display()));
        return Ok(output::USAGE);
    }
    let data_directory = settings::data_directory(typed, wanted.paths.first().map(|path| path.as_path()));
    let settings = settings::read(typed, &data_directory)?;
    let config = Config::parse(&settings)?;
    let queue = match directory {
        Some(directory) => {
            Queue::of_directory(directory)?.in_batches_of(settings.batch_size(Setting::ArchiverBatchSize)?)
        }
        None => Queue::of_paths(&wanted.paths),
    };
    let queue = if wanted.keep { queue.keep_sources() } else { queue };
    // Where nothing is to be archived nobody need know whose it would be.
    let archive = match queue.items.is_empty() {
        true => None,
        false => Some(open(typed, config.clone(), &data_directory, &queue)?),
    };

    let mut told = Account::begin(wanted, directory.is_some(), queue.total());
    let mut each = |path: &Path, outcome| told.take(path, &outcome);
    queue.tell_unfinished(&mut each);
    let archived = archive.as_ref().map_or(Ok(()), |archive| queue.archive(archive, &mut each));
    let moved = match &archive {
        Some(archive) => queue.set_refused_aside(Some(&|path, reason| archive.set_aside(path, reason)), &mut each),
        None if queue.has_to_set_aside() => match begun(typed, &config, &data_directory) {
            Ok((place, keys)) => {
                queue.set_refused_aside(Some(&|path, reason| put(&place, keys.as_ref(), path, reason)), &mut each)
            }
            Err(error) => {
                tell(Report::of(&error));
                queue.set_refused_aside(None, &mut each)
            }
        },
        None => queue.set_refused_aside(None, &mut each),
    };
    let faults: Vec<Error> = [archived, moved].into_iter().filter_map(Result::err).collect();
    faults.iter().for_each(|error| tell(Report::of(error)));
    let is_whole = told.end() && faults.is_empty();
    Ok(if is_whole { output::DONE } else { output::ANYTHING_ELSE })
}

/// The place of an archive that was begun, and who may read what is put there: files that are none to archive do not tell
/// whose they are.
fn begun(typed: &Typed, config: &Config, data_directory: &Path) -> Result<(Place, Option<Recipients>)> {
    let place = Place::open(&config.destination, &Arc::new(Pulse::new()))?;
    place.refuse_root_in_anothers()?;
    place.confirm_archive(settings::system_identifier(typed, data_directory)?)?;
    Ok((place, config.encryption_recipients.as_deref().map(Recipients::new)))
}

/// The archive of the cluster in the data directory, else of the one that wrote the files.
fn open(typed: &Typed, config: Config, data_directory: &Path, queue: &Queue) -> Result<Archive> {
    let (cluster, marker) = match cluster(data_directory, &queue.items)? {
        Some((cluster, marker)) => (cluster, Some(marker)),
        None => {
            settings::system_identifier(typed, data_directory)?;
            (writer(&queue.items)?, None)
        }
    };
    let pulse = Arc::new(Pulse::new());
    let archive = Archive::new(config, cluster, marker, Arc::clone(&pulse))?;
    if archive.runs_programs() {
        stop_on_signals(pulse);
    }
    let configuration_file = ServerConf::file_of(data_directory);
    let archive = archive.with_hooks_of(configuration_file.as_deref(), Arc::new(|note| tell(note.message)));
    archive.refuse_root_in_anothers()?;
    Ok(archive)
}

/// One file, for machines.
#[derive(Serialize)]
struct Line<'a> {
    file: &'a str,
    state: &'static str,
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<&'a str>,
}

/// What has been told so far. That nobody listens any more keeps no file from being archived.
struct Account {
    out: Told,
    has_summary: bool,
    is_verbose: bool,
    is_json: bool,
    total: usize,
    run: u64,
    skipped: u64,
    errors: u64,
}

#[derive(Serialize)]
struct Summary {
    total: usize,
    run: u64,
    skipped: u64,
    errors: u64,
}

impl Account {
    fn begin(wanted: &Arguments, is_directory: bool, total: usize) -> Self {
        let mut told = Account {
            out: Told::begin(),
            has_summary: is_directory && !wanted.quiet,
            is_verbose: wanted.verbose,
            is_json: wanted.json,
            total,
            run: 0,
            skipped: 0,
            errors: 0,
        };
        if told.is_json {
            told.out.print(|out| out.write_all(b"{\"files\":["));
        }
        told
    }

    fn take(&mut self, path: &Path, outcome: &Outcome) {
        let is_first = self.run + self.skipped + self.errors == 0;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let (state, reason) = match outcome {
            Outcome::Archived => ("archived", None),
            Outcome::AlreadyArchived => ("already archived", None),
            Outcome::Skipped(reason) => ("skipped", Some((*reason).to_string())),
            Outcome::SetAside { cause, location } => {
                let cause = cause.clone().hint(format!(
                    "It lies at \"{location}\" now. Once you know where it belongs, remove it with \"archiver errors --clear\"."
                ));
                tell(Report::new(&format!("could not archive file \"{name}\""), &cause));
                ("set aside", Some(cause.to_string()))
            }
            Outcome::Failed(error) => {
                tell(Report::new(&format!("could not archive file \"{name}\""), error));
                ("failed", Some(error.to_string()))
            }
            Outcome::NotRemoved(error) => {
                tell(Report::new(&format!("file \"{name}\" was archived but not removed"), error));
                ("not removed", Some(error.to_string()))
            }
        };
        match outcome {
            Outcome::Archived | Outcome::AlreadyArchived => self.run += 1,
            Outcome::Skipped(_) => self.skipped += 1,
            Outcome::SetAside { .. } | Outcome::Failed(_) | Outcome::NotRemoved(_) => self.errors += 1,
        }
        let location = match outcome {
            Outcome::SetAside { location, .. } => Some(location.as_str()),
            _ => None,
        };
        if self.is_json {
            self.out.print(|out| {
                out.write_all(if is_first { b"\n" } else { b",\n" })?;
                write_json(out, &Line { file: &name, state, reason, location })
            });
        } else if self.is_verbose {
            let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
            self.out.print(|out| writeln!(out, "{name}: {state}{reason}"));
        }
    }

    /// The last word; answers whether every file is archived that was to be.
    fn end(mut self) -> bool {
        let Account { total, run, skipped, errors, .. } = self;
        if self.is_json {
            self.out.print(|out| {
                out.write_all(b"\n],\"summary\":")?;
                write_json(out, &Summary { total, run, skipped, errors })?;
                out.write_all(b"}\n")
            });
        } else if self.has_summary {
            self.out.print(|out| writeln!(out, "total: {total}, run: {run}, skipped: {skipped}, errors: {errors}"));
        }
        self.out.print(|out| out.flush());
        errors == 0
    }
}
