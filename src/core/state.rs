//! What the archiver process tells of itself: a small file in the data directory that SQL functions read.
//!
//! It is read as hostile: bounded, and every field checked by its type. Whether it speaks of this very server is for
//! the reader to compare ([`State::system_identifier`], [`State::data_directory_inode`], [`State::server_started_us`]).

use crate::durable;
use crate::error::{Error, Kind, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Far beyond any state file.
const MAX_STATE_BYTES: u64 = 64 << 10;

/// Figures since the archiver process began, and its last failure. Times are microseconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The cluster.
    pub system_identifier: u64,
    /// The data directory.
    pub data_directory_inode: u64,
    /// The server's start.
    pub server_started_us: i64,
    /// The archiver process.
    pub archiver_pid: i32,
    /// When it began to count.
    pub stats_since_us: i64,
    /// Files in progress or stored ahead.
    pub in_flight: u64,
    /// Plain bytes of the files archived.
    pub bytes_read: u64,
    /// Bytes they took.
    pub bytes_stored: u64,
    /// Files that were stored before they were asked for.
    pub read_ahead_hits: u64,
    /// Attempts repeated inside one request.
    pub retries: u64,
    /// Median time to store one file.
    pub put_ms_p50: Option<f64>,
    /// The time that 99 of 100 stayed within.
    pub put_ms_p99: Option<f64>,
    /// The last failure's primary line.
    pub last_error: Option<String>,
    /// Since when files fail; nothing while all is well.
    pub failing_since_us: Option<i64>,
}

impl State {
    /// Puts the state where readers find it, whole or not at all. Not fsynced: it is worth nothing after a crash.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|error| Error::new(Kind::Internal, "state", format!("could not write the state: {error}")))?;
        durable::replace_file(path, &text, false)
    }

    /// The state at `path`; nothing where there is none that makes sense.
    pub fn read(path: &Path) -> Result<Option<State>> {
        let mut text = Vec::new();
        match File::open(path).and_then(|file| file.take(MAX_STATE_BYTES).read_to_end(&mut text)) {
            Ok(_) => Ok(serde_json::from_slice(&text).ok().filter(State::is_sane)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read file", path, &error)),
        }
    }

    /// Whether every field is one that SQL can show.
    fn is_sane(&self) -> bool {
        let counts = [self.in_flight, self.bytes_read, self.bytes_stored, self.read_ahead_hits, self.retries];
        // Up to the year 9999.
        let times = [Some(self.stats_since_us), Some(self.server_started_us), self.failing_since_us];
        counts.iter().all(|&count| i64::try_from(count).is_ok())
            && times.into_iter().flatten().all(|us| (0..253_402_300_800_000_000).contains(&us))
            && self.last_error.as_ref().is_none_or(|text| !text.contains('\0'))
            && [self.put_ms_p50, self.put_ms_p99].into_iter().flatten().all(f64::is_finite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_state_reads_back_and_junk_is_no_state() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("archiver.state");
        assert_eq!(State::read(&path).unwrap(), None);
        let state = State {
            system_identifier: u64::MAX,
            bytes_read: 3,
            put_ms_p50: Some(1.5),
            last_error: Some("could not\nsay".into()),
            ..State::default()
        };
        state.write(&path).unwrap();
        state.write(&path).unwrap();
        assert_eq!(State::read(&path).unwrap(), Some(state));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        for junk in ["", "{}", "[", "{\"system_identifier\": -1}", &"x".repeat(100_000)] {
            fs::write(&path, junk).unwrap();
            assert_eq!(State::read(&path).unwrap(), None);
        }
    }
}
