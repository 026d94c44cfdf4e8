//! What the program says, and how it ends.

use archiver_core::error::plain_cause;
use archiver_core::{Error, Kind};
use jiff::Timestamp;
use serde::Serialize;
use std::fmt::Display;
use std::io::{self, BufWriter, StdoutLock, Write};
use std::time::SystemTime;

/// Exit codes; those of `restore` stand with it.
pub const DONE: u8 = 0;
/// Asked and answered: no.
pub const NO: u8 = 1;
pub const USAGE: u8 = 2;
pub const CONFIGURATION: u8 = 3;
pub const ANYTHING_ELSE: u8 = 4;

/// Why a command ended before it was done.
pub enum End {
    Failed(Box<Error>),
    /// Whoever read the output has seen enough, as in `archiver list | head`.
    ReaderLeft,
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        End::Failed(Box::new(error))
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => End::ReaderLeft,
            _ => {
                let message = format!("could not write to standard output: {}", plain_cause(&error));
                Error::new(Kind::Storage, "standard output", message).into()
            }
        }
    }
}

/// The exit code of that failure.
pub fn code_of(error: &Error) -> u8 {
    match error.kind() {
        Kind::Configuration => CONFIGURATION,
        _ => ANYTHING_ELSE,
    }
}

/// On a full disk, say, nobody can be told: the exit code must be right all the same.
pub fn tell(message: impl Display) {
    let _ = writeln!(io::stderr(), "archiver: {message}");
}

/// Standard output, in large pieces.
pub fn standard_output() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(64 << 10, io::stdout().lock())
}

/// Standard output of a command whose work goes on when nobody reads it any more.
pub struct Told(Option<BufWriter<StdoutLock<'static>>>);

impl Told {
    pub fn begin() -> Self {
        Told(Some(standard_output()))
    }

    pub fn print(&mut self, write: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> io::Result<()>) {
        let Some(out) = &mut self.0 else { return };
        if let Err(error) = write(out) {
            if let End::Failed(error) = error.into() {
                tell(error);
            }
            // What is left in the buffer is not worth another try when it is dropped.
            self.0.take().map(BufWriter::into_parts);
        }
    }
}

/// Writes one JSON value.
pub fn write_json(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(out, value).map_err(io::Error::from)
}

/// A time as RFC 3339 has it, in UTC, with that many digits behind the seconds; empty for one beyond the year 9999.
pub fn rfc3339(time: SystemTime, digits: usize) -> String {
    Timestamp::try_from(time).map_or_else(|_| String::new(), |time| format!("{time:.digits$}"))
}
