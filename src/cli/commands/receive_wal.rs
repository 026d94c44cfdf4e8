//! `archiver receive-wal`: the streaming archiver, on a host without a server or beside one.

use crate::args::{Arguments as Typed, ReceiveWal as Arguments};
use crate::output::{self, End, tell};
use crate::settings;
use crate::signals::stop_on_signals;
use archiver_core::config::{Config, Streaming};
use archiver_core::data_directory::hash_key;
use archiver_core::pulse::Pulse;
use archiver_core::server_conf::ServerConf;
use archiver_core::stream::{Beginning, Note, Reset, Streamer};
use std::io::Write;
use std::sync::Arc;

/// Receives until a signal ends it; or resets where receiving begins.
pub fn run(typed: &Typed, wanted: &Arguments) -> Result<u8, End> {
    let data_directory = settings::data_directory(typed, None);
    let settings = settings::read(typed, &data_directory)?;
    let config = Config::parse(&settings)?;
    let streaming = Streaming::parse(&settings, &config.destination)?;
    let pulse = Arc::new(Pulse::new());
    let system_identifier = settings::system_identifier(typed, &data_directory)?;
    let beginning = if wanted.begin { Beginning::Wanted } else { Beginning::Remembered };
    let streamer = Streamer::new(config, streaming, beginning, Arc::clone(&pulse), Arc::new(tell_note))?
        .with_hash_key(system_identifier, hash_key(&data_directory))
        .with_configuration_file(ServerConf::file_of(&data_directory));
    stop_on_signals(pulse);
    if wanted.reset {
        let mut out = output::standard_output();
        match streamer.reset()? {
            Reset::NothingToDo => writeln!(out, "nothing to do")?,
            Reset::To(segment) => writeln!(out, "receiving begins with {segment}")?,
        }
        out.flush()?;
        return Ok(output::DONE);
    }
    Arc::new(streamer).run()?;
    Ok(output::DONE)
}

fn tell_note(note: Note) {
    match note {
        Note::Progress(text) | Note::Log(text) => tell(text),
        Note::Warning(report) => tell(report),
    }
}
