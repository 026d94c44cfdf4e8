//! Segments fetched ahead of a server in recovery.
//!
//! PostgreSQL asks for one segment at a time and waits for it. While it replays one, a process of its own ([`serve`])
//! fetches and verifies the next ones into a folder below pg_wal, and the next call of the restore_command hands one over by a
//! rename. Each call leaves a note of what it gave the server, which moves the window of what is kept ahead; the helper
//! fetches as segments are taken, and ends by itself when nothing is taken any more or the recovery is over.
//!
//! What lies there is no more than a head start. Nothing in the folder is durable, and no name is believed: a segment is handed
//! over if it is the very file that was verified, not written to since, in this run of the machine; a torn, changed or foreign
//! one is fetched anew. That a segment is not there is never concluded from the folder.

mod folder;
mod helper;
mod plan;

pub use helper::serve;

use super::{Request, Restored, restore};
use crate::config::{Prefetch, Settings};
use crate::data_directory::recovering_server;
use crate::durable;
use crate::error::Result;
use crate::hash::Hash;
use crate::place::Place;
use crate::stamp::Stamp;
use crate::wal::{SegmentName, SegmentSize, WalName};
use folder::{Folder, Found, Note, Origin};
use plan::Position;
use std::borrow::Borrow;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// What PostgreSQL calls the segment that it restores for its own recovery (xlogarchive.c). pg_rewind, which restores into
/// pg_wal, too, and people want one file, and no others beside it.
const DESTINATION: &str = "RECOVERYXLOG";
/// How long a segment in progress may stand still before it is fetched beside the helper.
const LONGEST_STANDSTILL: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(1);

/// A server's own request in its recovery, for which segments are fetched ahead.
#[derive(Debug)]
pub struct Recovery {
    folder: Folder,
    origin: Origin,
    segment: SegmentName,
}

impl Recovery {
    /// The recovery of the server in `data_directory`, where it is that which asks and where it has segments fetched ahead.
    /// Where no server recovers, or none is to be fed, removes what was fetched for an earlier recovery.
    pub fn of(settings: &Settings, data_directory: &Path, request: &Request<'_>) -> Result<Option<Self>> {
        let folder = Folder::of_data_directory(data_directory);
        let is_in_pg_wal = is_in_pg_wal(request.destination, data_directory);
        let is_for_recovery = is_in_pg_wal && request.destination.file_name().is_some_and(|name| name == DESTINATION);
        if Prefetch::parse(settings)?.segments == 0 || recovering_server(data_directory).is_none() {
            // pg_rewind has listed the files in the data directory, and fails where it finds one gone (file_ops.c,
            // remove_target_file).
            if is_for_recovery || !is_in_pg_wal {
                folder.sweep();
            }
            return Ok(None);
        }
        let (WalName::Segment(segment), Some(system_identifier)) = (request.name, request.system_identifier) else {
            return Ok(None);
        };
        // Where that cannot be told, nothing is fetched ahead.
        let origin = Origin::new(settings, system_identifier).ok().filter(|_| is_for_recovery);
        Ok(origin.map(|origin| Recovery { folder, origin, segment }))
    }

    /// Does what [`restore`] does and promises, out of the folder where the segment lies there. Calls `start_helper` where
    /// none fetches the next ones. Trouble with the folder only means that nothing comes from there.
    pub fn restore<P: Borrow<Place>>(
        &self,
        open: impl Fn() -> Result<P>,
        request: &Request<'_>,
        start_helper: impl FnOnce(),
    ) -> Result<Restored> {
        let (restored, is_noted) = match self.hand_over(request) {
            Some(restored) => (restored, true),
            None => {
                let restored = restore(open, request)?;
                // A partial segment ends its timeline: nothing follows.
                let is_noted = restored.name == request.name && self.note(restored.size).is_some();
                (restored, is_noted)
            }
        };
        if is_noted && !self.folder.is_served() {
            start_helper();
        }
        Ok(restored)
    }

    /// Hands the segment over, where it was fetched ahead or is just about to be.
    fn hand_over(&self, request: &Request<'_>) -> Option<Restored> {
        let started = Instant::now();
        let (mut bytes, mut moved) = (0, started);
        loop {
            match self.folder.find(self.segment) {
                Found::Verified(path, seal) => return self.take(&path, seal, request.destination),
                Found::Nothing => return None,
                Found::InProgress(now) if now > bytes => (bytes, moved) = (now, Instant::now()),
                Found::InProgress(_) if moved.elapsed() > LONGEST_STANDSTILL => return None,
                Found::InProgress(_) if bytes == 0 && !self.folder.is_served() => return None,
                Found::InProgress(_) => {}
            }
            if started.elapsed() > request.retry_timeout {
                return None;
            }
            sleep(PAUSE);
        }
    }

    fn take(&self, path: &PathBuf, seal: Hash, destination: &Path) -> Option<Restored> {
        let stamp = Stamp::of_path(path).ok()?;
        if self.origin.seal(self.segment, &stamp) != seal {
            // Gone already: as well.
            let _ = fs::remove_file(path);
            return None;
        }
        // Before the segment is gone, or the helper takes that for a gap.
        self.note(stamp.size());
        durable::move_file(path, destination).ok()?;
        let location = path.display().to_string();
        Some(Restored { name: WalName::Segment(self.segment), location, size: stamp.size() })
    }

    /// Tells the helper, and the next one, where the server stands.
    fn note(&self, size: u64) -> Option<()> {
        let position = Position { segment: self.segment, segment_size: SegmentSize::new(size)? };
        self.folder.create().and_then(|()| self.folder.note(&Note { position, origin: self.origin })).ok()
    }
}

fn is_in_pg_wal(path: &Path, data_directory: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let directory = identity(durable::directory_of(path));
    directory.is_some() && directory == identity(&data_directory.join("pg_wal"))
}
