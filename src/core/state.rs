//! What the archiver process tells of itself: a small file in the data directory that SQL functions read.
//!
//! It is read as hostile: bounded, and every field checked by its type. Whether it speaks of this very server is for
//! the reader to compare ([`State::system_identifier`], [`State::data_directory_inode`], [`State::server_started_us`]).

use crate::archive::Progress;
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::wal::WalName;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

/// Below the data directory. pg_basebackup and pg_rewind leave pg_stat_tmp out.
pub const STATE_FILE: &str = "pg_stat_tmp/archiver.state";
/// Far beyond any state file.
const MAX_STATE_BYTES: u64 = 4 << 20;
/// At most so many files are told of, and at most so much of what is wrong with one.
const MOST_FILES: usize = 1100;
const MOST_TEXT_CHARACTERS: usize = 1000;

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
    /// What to do about it.
    pub last_error_hint: Option<String>,
    /// When it came.
    pub last_error_us: Option<i64>,
    /// How many attempts have failed in a row; none while all is well.
    pub failed_attempts: u64,
    /// Since when files fail; nothing while all is well.
    pub failing_since_us: Option<i64>,
    /// How the storage keeps files from being overwritten.
    #[serde(default)]
    pub create_only: Option<String>,
    /// Where its credentials come from.
    #[serde(default)]
    pub credential_source: Option<String>,
    /// How far the first files have come that are in progress, stored ahead or failed.
    pub files: Vec<FileState>,
    /// Files that were refused because the archive holds another of their name, oldest first.
    pub refused: Vec<Refused>,
}

/// How far one file has come.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FileState {
    /// Its name.
    pub name: String,
    /// Whether it is stored, and PostgreSQL has yet to ask for it.
    pub is_stored: bool,
    /// Why it failed.
    pub error: Option<String>,
}

/// A file that was refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// Its name.
    pub name: String,
    /// Since when, in microseconds since the Unix epoch.
    pub since_us: i64,
    /// What stands in its place, and what was offered: sizes and hashes.
    pub detail: String,
    /// Where the other one lies.
    pub location: String,
}

/// A time in microseconds since the Unix epoch.
pub fn unix_us(time: SystemTime) -> i64 {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_micros()).unwrap_or(i64::MAX)
}

/// Whether SQL can show that time: up to the year 9999.
pub(crate) fn is_time(us: i64) -> bool {
    (0..253_402_300_800_000_000).contains(&us)
}

/// The first part of a text that may be long.
pub(crate) fn bounded(text: &str) -> String {
    text.chars().filter(|c| *c != '\0').take(MOST_TEXT_CHARACTERS).collect()
}

impl State {
    /// Takes note of a failure of `name`, the attempt number `failed_attempts` in a row.
    pub fn take_failure(&mut self, name: &str, error: &Error, failed_attempts: u64, now_us: i64) {
        self.last_error = Some(bounded(&format!("{name}: {error}")));
        self.last_error_hint = error.hint_text().map(bounded);
        self.last_error_us = Some(now_us);
        self.failed_attempts = failed_attempts;
        self.failing_since_us.get_or_insert(now_us);
        self.take_refusal(name, error, now_us);
    }

    /// Takes note that `name` is archived.
    pub fn take_success(&mut self, name: &str) {
        self.failed_attempts = 0;
        self.failing_since_us = None;
        self.refused.retain(|refused| refused.name != name);
    }

    /// Takes note of how far files have come.
    pub fn take_progress(&mut self, progress: &[(WalName, Progress)], now_us: i64) {
        self.files.clear();
        for (name, progress) in progress.iter().take(MOST_FILES) {
            let name = name.to_string();
            let error = match progress {
                Progress::Failed(error) => {
                    self.take_refusal(&name, error, now_us);
                    Some(bounded(&error.to_string()))
                }
                _ => None,
            };
            self.files.push(FileState { name, is_stored: matches!(progress, Progress::Stored), error });
        }
    }

    /// Forgets refused files that do not wait any more: somebody has removed them.
    pub fn retain_refused(&mut self, is_waiting: impl Fn(&str) -> bool) {
        self.refused.retain(|refused| is_waiting(&refused.name));
    }

    fn take_refusal(&mut self, name: &str, error: &Error, now_us: i64) {
        let is_known = self.refused.iter().any(|refused| refused.name == name);
        if error.kind() == Kind::Conflict && !is_known && self.refused.len() < MOST_FILES {
            self.refused.push(Refused {
                name: name.to_string(),
                since_us: now_us,
                detail: bounded(error.detail_text().unwrap_or(error.message())),
                location: error.subject().to_string(),
            });
        }
    }

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

    /// The state that the archiver process of the server in `data_directory` tells now; nothing where none runs. It is
    /// recognised by what the server writes into postmaster.pid (its start in the third line) and by its process.
    pub fn of_running_server(data_directory: &Path, system_identifier: u64) -> Option<State> {
        const STARTUP_US: i64 = 600_000_000;
        let lines = fs::read_to_string(data_directory.join("postmaster.pid")).ok()?;
        let launched_us = lines.lines().nth(2)?.trim().parse::<i64>().ok()?.checked_mul(1_000_000)?;
        let state = State::read(&data_directory.join(STATE_FILE)).ok()??;
        let is_of_this_start = (launched_us..launched_us.saturating_add(STARTUP_US)).contains(&state.server_started_us);
        let inode = fs::metadata(data_directory).ok()?.ino();
        let is_alive = kill(Pid::from_raw(state.archiver_pid), None) != Err(Errno::ESRCH);
        let is_its = state.system_identifier == system_identifier && state.data_directory_inode == inode;
        (is_its && is_of_this_start && is_alive).then_some(state)
    }

    /// Whether every field is one that SQL can show.
    fn is_sane(&self) -> bool {
        let counts = [
            self.in_flight,
            self.bytes_read,
            self.bytes_stored,
            self.read_ahead_hits,
            self.retries,
            self.failed_attempts,
        ];
        let refused_since = self.refused.iter().map(|refused| Some(refused.since_us));
        let times =
            [Some(self.stats_since_us), Some(self.server_started_us), self.failing_since_us, self.last_error_us];
        let files = self.files.iter().flat_map(|file| [Some(&file.name), file.error.as_ref()]);
        let refused =
            self.refused.iter().flat_map(|refused| [&refused.name, &refused.detail, &refused.location].map(Some));
        let texts = [self.last_error.as_ref(), self.last_error_hint.as_ref()].into_iter().chain(files).chain(refused);
        counts.iter().all(|&count| i64::try_from(count).is_ok())
            && times.into_iter().chain(refused_since).flatten().all(is_time)
            && texts.flatten().all(|text| !text.contains('\0'))
            && [self.put_ms_p50, self.put_ms_p99].into_iter().flatten().all(f64::is_finite)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_file_is_told_until_it_is_archived() {
        let name = WalName::parse("000000010000000000000005").unwrap();
        let conflict = Error::new(Kind::Conflict, "/srv/x", "another file").detail("Two hashes.");
        let mut state = State::default();
        state.take_failure(&name.to_string(), &conflict, 1, 5);
        state.take_progress(&[(name, Progress::Failed(conflict.clone()))], 9);
        assert_eq!(state.refused.len(), 1, "once");
        assert_eq!((state.refused[0].since_us, state.refused[0].detail.as_str()), (5, "Two hashes."));
        assert_eq!(state.files[0].error.as_deref(), Some("another file"));
        state.take_failure("000000010000000000000006", &Error::new(Kind::Storage, "x", "full"), 2, 7);
        assert_eq!((state.refused.len(), state.failed_attempts, state.failing_since_us), (1, 2, Some(5)));
        state.take_success(&name.to_string());
        assert_eq!((state.refused.len(), state.failed_attempts, state.failing_since_us), (0, 0, None));
    }

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
        for junk in ["", "{}", "[", "{\"system_identifier\": -1}", &"x".repeat(5_000_000)] {
            fs::write(&path, junk).unwrap();
            assert_eq!(State::read(&path).unwrap(), None);
        }
    }
}
