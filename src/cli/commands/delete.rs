//! `archiver delete`: WAL that nobody needs any more; also the archive_cleanup_command.

use super::open;
use crate::args::{Arguments, Delete};
use crate::output::{self, End, Told, code_of, tell, write_json};
use crate::settings;
use crate::signals::stop_on_signals;
use archiver_core::config::{Destination, HookScripts, Settings};
use archiver_core::data_directory::segment_size;
use archiver_core::deletion::{Attendant, Attended, Deletion, Departing, Request, Settled};
use archiver_core::hooks::Hooks;
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use archiver_core::server_conf::ServerConf;
use archiver_core::{Error, Result};
use serde::Serialize;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// Deletes what was asked for, or shows it; 0 only where all of it is gone, or would be.
pub fn run(arguments: &Arguments, wanted: &Delete) -> std::result::Result<u8, End> {
    let (place, system_identifier) = open(arguments)?;
    if wanted.yes {
        place.refuse_root_in_anothers()?;
    }
    let data_directory = settings::data_directory(arguments, None);
    let settings = settings::read(arguments, &data_directory)?;
    let request = Request {
        before: wanted.before,
        keeps: wanted.keep.clone(),
        system_identifier,
        segment_size: system_identifier.and_then(|ours| segment_size(&data_directory, ours)),
    };
    let deletion = Deletion::plan(&place, &request)?;
    deletion.notices().iter().for_each(|notice| tell(Report::of(notice)));
    let mut account = Account::begin(wanted);
    let pulse = Arc::new(Pulse::new());
    let hooks = hooks(&settings, &data_directory, &pulse)?;
    let ended = match wanted.yes {
        true => {
            let mut attended = Attended::by(&hooks);
            if attended.is_some() {
                stop_on_signals(Arc::clone(&pulse));
            }
            let attendant = attended.as_mut().map(|attended| attended as &mut dyn Attendant);
            deletion.carry_out(&pulse, attendant, &mut |file, outcome| account.take(file, Some(outcome)))
        }
        false => {
            let listed = deletion.list(&Pulse::new(), &mut |file| account.take(&file, None));
            listed.map(|()| Settled::default())
        }
    };
    let code = match &ended {
        Ok(_) if account.failed > 0 => output::ANYTHING_ELSE,
        Ok(_) => output::DONE,
        Err(error) => code_of(error),
    };
    account.end(&ended);
    Ok(code)
}

/// The hooks around each file.
fn hooks(settings: &Settings, data_directory: &Path, pulse: &Arc<Pulse>) -> Result<Hooks> {
    let (scripts, destination) = (HookScripts::parse(settings)?, Destination::parse(settings)?);
    let hooks = Hooks::new(&scripts, &destination, Arc::clone(pulse));
    let configuration_file = ServerConf::file_of(data_directory);
    Ok(hooks.of_configuration_file(configuration_file.as_deref(), Arc::new(|note| tell(note.message))))
}

/// One file, for machines.
#[derive(Serialize)]
struct Line<'a> {
    name: String,
    kind: &'static str,
    timeline: u32,
    stored_size: u64,
    location: &'a str,
    state: &'static str,
    reason: Option<String>,
}

#[derive(Serialize)]
struct Summary {
    dry_run: bool,
    files: u64,
    bytes: u64,
    failed: u64,
    catalogue_lines: u64,
}

/// What has been told so far. That nobody listens any more keeps no file from being deleted.
struct Account<'a> {
    out: Told,
    wanted: &'a Delete,
    files: u64,
    bytes: u64,
    failed: u64,
}

impl<'a> Account<'a> {
    fn begin(wanted: &'a Delete) -> Self {
        let mut out = Told::begin();
        if wanted.json {
            out.print(|out| out.write_all(b"{\"files\":["));
        }
        Account { out, wanted, files: 0, bytes: 0, failed: 0 }
    }

    /// A file that would be deleted, or was to be, with how that went.
    fn take(&mut self, file: &Departing, outcome: Option<&Result<()>>) {
        let is_first = self.files + self.failed == 0;
        let (state, failure) = match outcome {
            None => ("would be deleted", None),
            Some(Ok(())) => ("deleted", None),
            Some(Err(error)) => ("not deleted", Some(error)),
        };
        match failure {
            None => (self.files, self.bytes) = (self.files + 1, self.bytes + file.stored_size),
            Some(error) => {
                self.failed += 1;
                tell(Report::of(error));
            }
        }
        let item = file.item;
        if self.wanted.json {
            let (kind, timeline, reason) = (item.word(), item.timeline().0, failure.map(Error::to_string));
            let (name, stored_size, location) = (item.to_string(), file.stored_size, file.location.as_str());
            self.out.print(|out| {
                out.write_all(if is_first { b"\n" } else { b",\n" })?;
                write_json(out, &Line { name, kind, timeline, stored_size, location, state, reason })
            });
        } else if !self.wanted.quiet && failure.is_none() {
            self.out.print(|out| writeln!(out, "{item}: {state}, {} bytes", file.stored_size));
        }
    }

    /// The last word.
    fn end(mut self, ended: &Result<Settled>) {
        let Account { files, bytes, failed, .. } = self;
        let is_dry = !self.wanted.yes;
        let settled = ended.clone().unwrap_or_default();
        if self.wanted.json {
            let summary = Summary { dry_run: is_dry, files, bytes, failed, catalogue_lines: settled.lines };
            self.out.print(|out| {
                out.write_all(b"\n],\"summary\":")?;
                write_json(out, &summary)?;
                out.write_all(b"}\n")
            });
        } else if is_dry && !self.wanted.quiet {
            let hint = if files > 0 { "; --yes deletes them" } else { "" };
            self.out.print(|out| writeln!(out, "would be deleted: {files}, bytes: {bytes}{hint}"));
        } else if !self.wanted.quiet && (files + failed + settled.lines > 0) {
            // Nothing to do, no word: a standby calls this again and again.
            let lines = settled.lines;
            let summary = format!("deleted: {files}, bytes: {bytes}, failed: {failed}, catalogue lines: {lines}");
            self.out.print(|out| writeln!(out, "{summary}"));
        }
        self.out.print(|out| out.flush());
        if let Some(broken) = settled.broken {
            tell(Report::of(&broken));
        }
        if let Err(error) = ended {
            tell(Report::of(error));
        }
    }
}
