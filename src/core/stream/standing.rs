//! What a receiver tells of itself: a small hidden file in the streaming directory, for those who ask how streaming stands.
//!
//! It is read as hostile: bounded, and every field checked by its type.

use super::folder::{Folder, Newest};
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::incoming::Queue;
use crate::state::{bounded, is_time, unix_us};
use crate::wal::{Lsn, SegmentSize};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A hidden name is no WAL to anybody who reads the directory.
const STATE_FILE: &str = ".archiver-receive-wal.state";
const MAX_STATE_BYTES: u64 = 1 << 20;
/// At most this often it is written.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);
/// So many positions that were not received yet are remembered: hours of them.
const MOST_HEARD: usize = 1000;
/// What was heard of the server counts for so long.
const FRESH_US: i64 = 60_000_000;
/// Records end with so many zeros at most, their padding included, but for those whose data does: what is received is
/// measured by its last byte that is none.
const MOST_ZEROS: u64 = 64;

/// How a receiver stands. Times are microseconds since the Unix epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Standing {
    /// The process.
    pub pid: i32,
    /// pg_receivewal, while it runs.
    pub receivewal_pid: Option<i32>,
    /// Since when that runs.
    pub receiving_since_us: Option<i64>,
    /// The cluster that WAL is received from.
    pub system_identifier: Option<u64>,
    /// The size of its segments.
    pub segment_bytes: Option<u64>,
    /// The name the server knows the receiver by.
    pub archiver_name: String,
    /// The replication slot.
    pub slot_name: Option<String>,
    /// Whether it is in use.
    pub is_slot_active: Option<bool>,
    /// What the server says of the WAL it keeps for it.
    pub slot_wal_status: Option<String>,
    /// Whether commits wait for the receiver, by the server's setting.
    pub is_synchronous: Option<bool>,
    /// `sync`, `potential`, `quorum` or `async`.
    pub sync_state: Option<String>,
    /// How far the receiver has told the server that it wrote.
    pub told: Option<u64>,
    /// Positions of the server: those that were not received yet when they were heard of, oldest first, and the last.
    pub heard: Vec<Heard>,
    /// The last file that was archived.
    pub last_archived_wal: Option<String>,
    /// When.
    pub last_archived_us: Option<i64>,
    /// The last part that was put into the storage.
    pub last_part: Option<String>,
    /// When.
    pub last_part_us: Option<i64>,
    /// What keeps WAL from being received.
    pub receiving: Option<Trouble>,
    /// What keeps what was received from being archived.
    pub archiving: Option<Trouble>,
    /// What keeps parts from being put into the storage, or from being removed there.
    pub parts: Option<Trouble>,
}

/// Where the server stood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// When it was asked.
    pub at_us: i64,
    /// How far its WAL was flushed.
    pub position: u64,
}

/// What goes wrong, again and again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// The last failure's primary line.
    pub error: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Since when.
    pub since_us: i64,
}

impl Trouble {
    /// The trouble that `before` has become by failing once more.
    pub fn after(before: Option<Trouble>, error: &Error) -> Self {
        Trouble {
            error: bounded(&error.to_string()),
            hint: error.hint_text().map(bounded),
            since_us: before.map_or_else(|| unix_us(SystemTime::now()), |before| before.since_us),
        }
    }
}

impl Standing {
    /// Takes note that nothing is received any more: what the server said while it was says nothing.
    pub fn forget_connection(&mut self) {
        (self.receivewal_pid, self.receiving_since_us) = (None, None);
        (self.is_slot_active, self.slot_wal_status, self.sync_state) = (None, None, None);
        // The next server may stand elsewhere.
        self.told = None;
    }

    /// Takes note of where the server stands now, and of how far it was received.
    pub fn hear(&mut self, heard: Heard, received: Option<Lsn>) {
        self.heard.retain(|before| !is_received(before.position, received));
        if self.heard.len() == MOST_HEARD {
            self.heard.pop();
        }
        self.heard.push(heard);
    }

    /// Where the server stood last, as long as that says something.
    pub fn server(&self, now_us: i64) -> Option<Heard> {
        self.heard.last().copied().filter(|heard| now_us - heard.at_us < FRESH_US)
    }

    /// Since how many seconds something waits to be received.
    pub fn lag_seconds(&self, received: Option<Lsn>, now_us: i64) -> Option<f64> {
        self.server(now_us)?;
        let waiting = self.heard.iter().find(|heard| !is_received(heard.position, received));
        Some(waiting.map_or(0.0, |heard| (now_us - heard.at_us).max(0) as f64 / 1e6))
    }

    fn is_sane(&self) -> bool {
        let heard = self.heard.iter().map(|heard| Some(heard.at_us));
        let troubles = [&self.receiving, &self.archiving, &self.parts]
            .map(|trouble| trouble.as_ref().map(|trouble| trouble.since_us));
        // SQL counts bytes in a bigint.
        let positions = self.heard.iter().map(|heard| heard.position).chain(self.told);
        let times = [self.receiving_since_us, self.last_archived_us, self.last_part_us];
        self.pid > 0
            && self.receivewal_pid.is_none_or(|pid| pid > 0)
            && positions.into_iter().all(|position| i64::try_from(position).is_ok())
            && times.into_iter().chain(troubles).chain(heard).flatten().all(is_time)
            && !serde_json::to_string(self).is_ok_and(|text| text.contains("\\u0000"))
    }
}

/// How many bytes lie between what was received and that position, zeros at the end of a record not counted.
fn lag_bytes(position: u64, received: Lsn) -> u64 {
    Some(position.saturating_sub(received.0)).filter(|&bytes| bytes > MOST_ZEROS).unwrap_or(0)
}

fn is_received(position: u64, received: Option<Lsn>) -> bool {
    received.is_some_and(|received| lag_bytes(position, received) == 0)
}

/// Where a receiver tells how it stands. For several threads.
pub struct Teller {
    path: PathBuf,
    state: Mutex<(Standing, Option<Instant>)>,
}

impl Teller {
    /// Tells it in that directory; nothing is written yet.
    pub fn new(directory: &Path, standing: Standing) -> Self {
        Teller { path: directory.join(STATE_FILE), state: Mutex::new((standing, None)) }
    }

    /// Changes what is told with the next [`Teller::tell`].
    pub fn note(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).0);
    }

    /// Tells nothing any more: it came to an end that was wanted.
    pub fn end(&self) {
        let _state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // A file that is left speaks of a process that is gone.
        let _ = fs::remove_file(&self.path);
    }

    /// Writes it, at once or unless it was written just now. That it cannot be written keeps nobody from receiving.
    pub fn tell(&self, is_now: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_now && state.1.is_some_and(|written| written.elapsed() < WRITE_INTERVAL) {
            return;
        }
        state.1 = Some(Instant::now());
        let text = serde_json::to_vec(&state.0)
            .map_err(|error| Error::new(Kind::Internal, "state", format!("could not write the state: {error}")));
        let _ = text.and_then(|text| durable::replace_file(&self.path, &text, false));
    }
}

/// Whether somebody receives WAL into that directory, or did until an end that was not wanted.
pub fn is_used(directory: &Path) -> bool {
    directory.join(STATE_FILE).exists()
}

fn is_alive(pid: i32) -> bool {
    kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

/// What the process says that works in that directory; nothing where none does.
pub fn told(directory: &Path) -> Result<Option<Standing>> {
    Ok(read(&directory.join(STATE_FILE))?.filter(|standing| is_alive(standing.pid)))
}

/// How streaming stands in a directory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// What the process says that works there; nothing where none does.
    pub standing: Option<Standing>,
    /// Whether WAL is being received.
    pub is_running: bool,
    /// The newest segment that lies there.
    pub newest: Option<Newest>,
    /// How far WAL was received.
    pub received: Option<Lsn>,
    /// Files that wait to be archived.
    pub waiting_files: u64,
}

/// Looks at a streaming directory. It is fine where there is none.
pub fn look(directory: &Path) -> Result<Seen> {
    if !directory.is_dir() {
        return Ok(Seen::default());
    }
    let standing = told(directory)?;
    let is_running = Folder::is_taken(directory)?
        && standing.as_ref().and_then(|standing| standing.receivewal_pid).is_some_and(is_alive);
    let folder = Folder::at(directory);
    let size = standing.as_ref().and_then(|standing| SegmentSize::new(standing.segment_bytes?));
    let newest = folder.newest(size)?;
    let received = match (&newest, size) {
        (Some(newest), Some(size)) => folder.received(newest, size)?,
        _ => None,
    };
    let told = standing.as_ref().and_then(|standing| standing.told).map(Lsn);
    let waiting_files = Queue::of_streaming_directory(directory, size)?.items.len() as u64;
    Ok(Seen { standing, is_running, newest, received: received.max(told), waiting_files })
}

/// How streaming stands, for people and for monitors. Nothing where a thing is not known.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Facts {
    /// Whether WAL is being received.
    pub running: Option<bool>,
    /// The process that sees to that.
    pub pid: Option<i32>,
    /// Since when pg_receivewal runs.
    pub receiving_since_us: Option<i64>,
    /// The newest file, whole or in part.
    pub current_file: Option<String>,
    /// How far WAL was received.
    pub received_lsn: Option<String>,
    /// How far the server's WAL was flushed.
    pub server_lsn: Option<String>,
    /// When that was known.
    pub server_lsn_us: Option<i64>,
    /// Bytes between the two.
    pub lag_bytes: Option<u64>,
    /// Since when they wait to be received.
    pub lag_seconds: Option<f64>,
    /// The name the server knows the receiver by.
    pub archiver_name: Option<String>,
    /// The replication slot.
    pub slot_name: Option<String>,
    /// Whether it is in use.
    pub slot_active: Option<bool>,
    /// What the server says of the WAL it keeps for it.
    pub slot_wal_status: Option<String>,
    /// Whether commits wait for the receiver, by the server's setting.
    pub synchronous: Option<bool>,
    /// `sync`, `potential`, `quorum` or `async`.
    pub sync_state: Option<String>,
    /// Files that wait to be archived.
    pub waiting_files: Option<u64>,
    /// The last file that was archived.
    pub last_archived_wal: Option<String>,
    /// When.
    pub last_archived_us: Option<i64>,
    /// The last part that was put into the storage.
    pub last_part: Option<String>,
    /// When.
    pub last_part_us: Option<i64>,
    /// What goes wrong now.
    pub last_error: Option<String>,
    /// Since when.
    pub failing_since_us: Option<i64>,
}

impl Seen {
    /// What goes wrong now: with receiving, else with archiving, else with parts.
    pub fn trouble(&self) -> Option<&Trouble> {
        let standing = self.standing.as_ref()?;
        standing.receiving.as_ref().or(standing.archiving.as_ref()).or(standing.parts.as_ref())
    }

    /// The facts; `server` is where the server stands now, where that is known better than the receiver knows it.
    pub fn facts(&self, server: Option<Heard>, now_us: i64) -> Facts {
        let standing = self.standing.as_ref();
        let heard = server.or_else(|| standing?.server(now_us));
        let lag = heard.zip(self.received).map(|(heard, received)| lag_bytes(heard.position, received));
        let lag_seconds = match lag {
            Some(0) => Some(0.0),
            _ => standing.and_then(|standing| standing.lag_seconds(self.received, now_us)),
        };
        let lsn = |position: u64| Lsn(position).to_string();
        let trouble = self.trouble();
        Facts {
            running: Some(self.is_running),
            pid: standing.map(|standing| standing.pid),
            receiving_since_us: standing.and_then(|standing| standing.receiving_since_us).filter(|_| self.is_running),
            current_file: self.newest.map(|newest| newest.name().to_string()),
            received_lsn: self.received.map(|received| received.to_string()),
            server_lsn: heard.map(|heard| lsn(heard.position)),
            server_lsn_us: heard.map(|heard| heard.at_us),
            lag_bytes: lag,
            lag_seconds,
            archiver_name: standing.map(|standing| standing.archiver_name.clone()),
            slot_name: standing.and_then(|standing| standing.slot_name.clone()),
            slot_active: standing.and_then(|standing| standing.is_slot_active),
            slot_wal_status: standing.and_then(|standing| standing.slot_wal_status.clone()),
            synchronous: standing.and_then(|standing| standing.is_synchronous),
            sync_state: standing.and_then(|standing| standing.sync_state.clone()),
            waiting_files: standing.map(|_| self.waiting_files),
            last_archived_wal: standing.and_then(|standing| standing.last_archived_wal.clone()),
            last_archived_us: standing.and_then(|standing| standing.last_archived_us),
            last_part: standing.and_then(|standing| standing.last_part.clone()),
            last_part_us: standing.and_then(|standing| standing.last_part_us),
            last_error: trouble.map(|trouble| trouble.error.clone()),
            failing_since_us: trouble.map(|trouble| trouble.since_us),
        }
    }
}

fn read(path: &Path) -> Result<Option<Standing>> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(MAX_STATE_BYTES).read_to_end(&mut text)) {
        Ok(_) => Ok(serde_json::from_slice(&text).ok().filter(Standing::is_sane)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read file", path, &error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lag_is_the_age_of_the_oldest_position_that_was_not_received() {
        let mut standing = Standing::default();
        assert_eq!(standing.lag_seconds(None, 0), None);
        for (at_s, position, received) in [(100, 1000, 1000), (110, 5000, 1000), (120, 9000, 1000)] {
            standing.hear(Heard { at_us: at_s * 1_000_000, position }, Some(Lsn(received)));
        }
        let lag =
            |standing: &Standing, received, now_s: i64| standing.lag_seconds(Some(Lsn(received)), now_s * 1_000_000);
        assert_eq!(lag(&standing, 1000, 125), Some(15.0));
        assert_eq!(lag(&standing, 5000, 125), Some(5.0));
        assert_eq!(lag(&standing, 8992, 125), Some(0.0), "a record ends with a few zeros");
        assert_eq!(lag(&standing, 1000, 181), None, "nothing was heard for a minute");
        standing.hear(Heard { at_us: 130_000_000, position: 9000 }, Some(Lsn(9000)));
        assert_eq!((standing.heard.len(), lag(&standing, 9000, 131)), (1, Some(0.0)));
        for at_us in 0..5000 {
            standing.hear(Heard { at_us, position: 1 << 40 }, Some(Lsn(9000)));
        }
        assert_eq!((standing.heard.len(), standing.heard[0].at_us), (MOST_HEARD, 0));
        assert_eq!(lag_bytes(500, Lsn(100)), 400);
        assert_eq!(lag_bytes(500, Lsn(900)), 0);
    }

    #[test]
    fn what_is_told_reads_back_and_junk_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(look(&directory.path().join("absent")).unwrap(), Seen::default());
        assert_eq!(look(directory.path()).unwrap(), Seen::default());
        let standing = Standing { pid: std::process::id().cast_signed(), told: Some(7), ..Standing::default() };
        Teller::new(directory.path(), standing.clone()).tell(true);
        let seen = look(directory.path()).unwrap();
        assert_eq!((seen.standing, seen.is_running, seen.received), (Some(standing.clone()), false, Some(Lsn(7))));
        let trouble = |since_us| Some(Trouble { error: "x".into(), hint: None, since_us });
        for wrong in [
            Standing { receiving: trouble(i64::MAX), ..standing.clone() },
            Standing { archiving: trouble(-1), ..standing.clone() },
            Standing { parts: trouble(i64::MAX), ..standing.clone() },
        ] {
            assert!(!wrong.is_sane(), "{wrong:?}");
        }
        let [beyond, nul] =
            [("\"told\":7", "\"told\":18446744073709551615"), ("\"sync_state\":null", "\"sync_state\":\"\\u0000\"")]
                .map(|(now, then)| serde_json::to_string(&standing).unwrap().replace(now, then));
        let dead = Standing { pid: i32::MAX, ..standing };
        Teller::new(directory.path(), dead).tell(true);
        assert_eq!(look(directory.path()).unwrap().standing, None);
        for junk in ["", "{}", "[", "{\"pid\": -1, \"archiver_name\": \"\", \"heard\": []}", &beyond, &nul] {
            fs::write(directory.path().join(STATE_FILE), junk).unwrap();
            assert_eq!(look(directory.path()).unwrap().standing, None, "{junk}");
        }
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "looking makes nothing");
    }
}
