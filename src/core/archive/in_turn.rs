//! Archiving with hooks: one file from its first hook to its last before another begins.

use super::{Archive, StoredFile, WalFile};
use crate::codec::Compression;
use crate::config::{Compressor, StorageUrl};
use crate::error::Result;
use crate::hooks::{About, Hooks, Occasion, Say};
use crate::layout::{Format, Layout, Naming};
use crate::regular_file::{self, Links};
use std::io::{self, Read};
use std::path::{Path, PathBuf, absolute};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

/// Pauses between attempts at one file: doubled from the first up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often a pause looks whether it is to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

impl Archive {
    /// The same with hooks that are told of that configuration file and heard by `say`.
    pub fn with_hooks_of(mut self, configuration_file: Option<&Path>, say: Say) -> Self {
        let (scripts, destination) = (&self.config.hooks, &self.config.destination);
        self.hooks =
            Hooks::new(scripts, destination, self.pulse.clone()).of_configuration_file(configuration_file, say);
        self
    }

    /// Whether files are archived one after the other, from the first hook to the last, in the order in which they are
    /// asked for.
    pub fn works_in_turn(&self) -> bool {
        self.hooks.are_set_for(Occasion::Archive)
    }

    /// Whether programs of the user's run for a file, around it or to compress it.
    pub fn runs_programs(&self) -> bool {
        self.works_in_turn() || self.config.compressor != Compressor::BuiltIn
    }

    /// Begins no more hooks, and ends the one that runs: the archive is of a configuration that is gone.
    pub fn retire(&self) {
        self.hooks.retire();
    }

    /// Archives one file by `work`, which stores and records it, with the hooks around it. A source that cannot be looked
    /// at is for `work` alone to complain about.
    pub fn archive_in_turn(&self, file: &WalFile, work: impl FnOnce() -> Result<StoredFile>) -> Result<StoredFile> {
        let Ok(before) = self.source(file) else { return work() };
        let after = |stored: Option<&StoredFile>| About {
            file: self.local_path(file).unwrap_or_else(|| before.file.clone()),
            size: stored.map_or(before.size, |stored| stored.stored_size),
            modified: stored.map_or(before.modified, |stored| stored.modified),
            format: stored.map_or(before.format, |stored| stored.format),
            location: stored.map_or_else(|| before.location.clone(), |stored| self.location_in(stored.format, file)),
            result: match stored {
                Some(stored) if stored.created => "archived",
                _ => "already archived",
            },
            ..before.clone()
        };
        self.hooks.around(Occasion::Archive, &before, work, after)
    }

    /// Stores and records one file with the hooks around it. What may pass by itself is tried again meanwhile, within the
    /// retry timeout; `retried` is called for each such attempt. A failure is final.
    pub(super) fn archive_whole(&self, file: &WalFile, level: i32, retried: impl Fn()) -> Result<StoredFile> {
        let attempt = || {
            let stored = self.store_at(file, level)?;
            self.record(std::slice::from_ref(&stored)).map(|()| stored)
        };
        let until = || Instant::now() + self.config.destination.retry_timeout;
        let done = self.archive_in_turn(file, || {
            let (until, mut pause) = (until(), FIRST_PAUSE);
            loop {
                match attempt() {
                    Err(error) if error.is_worth_retrying() && self.may_wait(until, pause) => {
                        pause = (pause * 2).min(LONGEST_PAUSE);
                        retried();
                    }
                    done => return done,
                }
            }
        });
        done.map_err(|error| error.retry_if(false))
    }

    /// Waits before another attempt, if there may be one.
    fn may_wait(&self, until: Instant, pause: Duration) -> bool {
        let waits_until = Instant::now() + pause;
        let may_go_on = || !(self.pulse.is_hurried() || self.pulse.is_stopped() || self.hooks.are_retired());
        while may_go_on() && waits_until < until {
            let left = waits_until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            sleep(left.min(LOOK_INTERVAL));
        }
        false
    }

    /// What hooks are told before the file is archived.
    fn source(&self, file: &WalFile) -> io::Result<About> {
        let (source, meta) = regular_file::open(&file.path, Links::Refused)?;
        let mut head = Vec::with_capacity(Compression::MAGIC_LENGTH);
        source.take(Compression::MAGIC_LENGTH as u64).read_to_end(&mut head)?;
        Ok(About {
            name: file.name,
            file: absolute(&file.path)?,
            size: meta.len(),
            modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
            format: Compression::detect(&head).unwrap_or(Compression::None).into(),
            location: self.location_in(self.config.destination.likely_format, file),
            result: "",
        })
    }

    /// Where the archived file lies, or would lie, in local storage.
    fn local_path(&self, file: &WalFile) -> Option<PathBuf> {
        let StorageUrl::File { path, .. } = &self.config.destination.storage else { return None };
        let layout = Layout::new(self.config.destination.server_name.clone(), Naming::Plain);
        Some(path.join(layout.wal_key(&file.name, self.config.compression)))
    }

    /// The path or URL of the archived file in that format.
    fn location_in(&self, format: Format, file: &WalFile) -> String {
        if let Some(path) = self.local_path(file) {
            return path.display().to_string();
        }
        let layout = Layout::new(self.config.destination.server_name.clone(), Naming::Suffixed);
        format!("{}/{}", self.config.destination.storage, layout.wal_key(&file.name, format))
    }
}
