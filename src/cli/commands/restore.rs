//! `archiver restore NAME DEST`: the restore_command.

use crate::args::{Arguments, OnError, Restore};
use crate::output::{DONE, tell};
use crate::settings;
use archiver_core::config::{Destination, Setting, Settings, Streaming};
use archiver_core::data_directory::{hash_key, system_identifier};
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use archiver_core::restore::prefetch::{Recovery, serve};
use archiver_core::restore::{Request, Restored, restore};
use archiver_core::wal::WalName;
use archiver_core::{Error, Kind, Result};
use std::io::IsTerminal;
use std::panic::catch_unwind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

/// PostgreSQL takes every exit code of a restore_command from 1 to 125 for "not in the archive", also that of a usage
/// error or of a panic; above, it stops rather than promotes.
pub const FAILED: u8 = 255;
/// PostgreSQL: end of the archive, or "timeline free".
const NOT_IN_ARCHIVE: u8 = 1;
/// PostgreSQL on a standby: asked again soon.
const STANDBY_ASKS_AGAIN: u8 = 2;

/// Restores one file and answers the exit code.
pub fn run(arguments: &Arguments, wanted: &Restore) -> u8 {
    let data_directory = settings::data_directory(arguments, Some(&wanted.dest));
    match restore_file(arguments, wanted, &data_directory) {
        Ok(_) => 0,
        Err(error) if error.kind() == Kind::NotFound => {
            // A standby asks for files that are not there every few seconds: no word in its log.
            if std::io::stderr().is_terminal() {
                tell(error);
            }
            NOT_IN_ARCHIVE
        }
        Err(error) => {
            let what = format!("could not restore WAL file \"{}\"", wanted.name);
            tell(Report::new(&what, &error));
            let is_standby = data_directory.join("standby.signal").exists();
            if is_standby && wanted.on_error == OnError::Retry { STANDBY_ASKS_AGAIN } else { FAILED }
        }
    }
}

fn restore_file(arguments: &Arguments, wanted: &Restore, data_directory: &Path) -> Result<Restored> {
    let name = WalName::parse(&wanted.name)
        .map_err(|bad| Error::new(Kind::Configuration, wanted.name.clone(), bad.to_string()))?;
    let settings = settings::read(arguments, data_directory)?;
    let destination = Destination::parse(&settings)?;
    let streaming_directory = Streaming::directory(&settings, &destination)?;
    let is_named = settings::is_said(arguments, Setting::StreamingWalsDirectory);
    let request = Request {
        name,
        destination: &wanted.dest,
        or_partial: wanted.partial,
        streaming_directory: streaming_directory.as_deref().map(|path| (path, is_named)),
        // One that cannot be read tells as little as none.
        system_identifier: system_identifier(data_directory).unwrap_or(None),
        retry_timeout: destination.retry_timeout,
    };
    let hash_key = hash_key(data_directory);
    let open = || Place::open(&destination, &Arc::new(Pulse::new())).map(|place| place.known_to(hash_key));
    match Recovery::of(&settings, data_directory, &request)? {
        Some(recovery) => recovery.restore(open, &request, || start_helper(&settings, data_directory)),
        None => restore(open, &request),
    }
}

/// Starts the process that fetches ahead, under the same settings. Where it does not start, nothing is fetched ahead.
fn start_helper(settings: &Settings, data_directory: &Path) {
    let Ok(program) = std::env::current_exe() else { return };
    let values = Setting::ALL.map(|setting| (settings::variable(setting), settings.get(setting)));
    let mut command = Command::new(program);
    // Absolute, so that it says in a list of processes whose helper it is.
    let data_directory = data_directory.canonicalize().unwrap_or_else(|_| data_directory.to_path_buf());
    command.arg("-D").arg(data_directory).arg("prefetch").envs(values);
    // PostgreSQL, or a shell, may wait for the end of its pipes.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _ = command.spawn();
}

/// Is that process. It always ends well: it falls to the init process, and where that is the postmaster of a container,
/// any other end is taken for the crash of a backend.
pub fn prefetch(arguments: &Arguments) -> u8 {
    let _ = catch_unwind(|| {
        let data_directory = settings::data_directory(arguments, None);
        settings::read(arguments, &data_directory).and_then(|settings| serve(&settings, &data_directory))
    });
    DONE
}
