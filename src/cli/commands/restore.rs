//! `archiver restore NAME DEST`: the restore_command.

use crate::RESTORE_FAILED;
use crate::args::{Arguments, OnError, Restore};
use crate::settings;
use archiver_core::config::Destination;
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::report::Report;
use archiver_core::restore::{Request, Restored, restore};
use archiver_core::wal::WalName;
use archiver_core::{Error, Kind, Result};
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::Path;
use std::sync::Arc;

/// PostgreSQL: end of the archive, or "timeline free".
const NOT_IN_ARCHIVE: u8 = 1;
/// PostgreSQL on a standby: asked again soon.
const STANDBY_ASKS_AGAIN: u8 = 2;

/// Restores one file and answers the exit code.
pub fn run(arguments: &Arguments, wanted: &Restore) -> u8 {
    let data_directory = settings::data_directory(arguments, &wanted.dest);
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
            if is_standby && wanted.on_error == OnError::Retry { STANDBY_ASKS_AGAIN } else { RESTORE_FAILED }
        }
    }
}

/// On a full disk, say, nobody can be told: the exit code must be right all the same.
fn tell(message: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "archiver: {message}");
}

fn restore_file(arguments: &Arguments, wanted: &Restore, data_directory: &Path) -> Result<Restored> {
    let name = WalName::parse(&wanted.name)
        .map_err(|bad| Error::new(Kind::Configuration, wanted.name.clone(), bad.to_string()))?;
    let destination = Destination::parse(&settings::read(arguments, data_directory)?)?;
    let request = Request {
        name,
        destination: &wanted.dest,
        or_partial: wanted.partial,
        system_identifier: system_identifier(data_directory),
        retry_timeout: destination.retry_timeout,
    };
    restore(|| Place::open(&destination, &Arc::new(Pulse::new())), &request)
}

/// The cluster in the data directory: the first eight bytes of its control file (PostgreSQL, pg_control.h,
/// `ControlFileData`), in the byte order of the machine that runs it. Nothing where no cluster lies there.
fn system_identifier(data_directory: &Path) -> Option<u64> {
    let mut bytes = [0; 8];
    File::open(data_directory.join("global/pg_control")).ok()?.read_exact(&mut bytes).ok()?;
    Some(u64::from_ne_bytes(bytes))
}
