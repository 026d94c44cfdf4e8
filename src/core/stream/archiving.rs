//! Archiving beside a receiver, on a thread of its own: a storage that hangs keeps nobody from receiving.

use super::parts::Parts;
use super::standing::Trouble;
use super::{Note, Streamer};
use crate::archive::{Archive, Episode};
use crate::error::{Error, Result};
use crate::incoming::{Outcome, Queue};
use crate::report::Report;
use crate::state::unix_us;
use crate::wal::WalName;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

/// How often the directory is looked at for whole segments.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
const SHORT_WAIT: Duration = Duration::from_millis(50);
/// Files that are archived before it is time to look at the part behind them.
const MOST_AT_ONCE: usize = 16;

/// The archive to archive to, once it is known whose WAL is received.
#[derive(Default)]
pub struct Target(Mutex<Option<Arc<Archive>>>);

impl Target {
    /// The one that is set.
    pub fn get(&self) -> Option<Arc<Archive>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From now on this one.
    pub fn set(&self, archive: Arc<Archive>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(archive);
    }
}

/// How archiving goes.
struct Archiving<'a> {
    streamer: &'a Streamer,
    /// The one that is known to be there, and this cluster's.
    begun: Option<Arc<Archive>>,
    episode: Episode,
    parts: Parts,
}

/// Archives what is received until the pulse is told to stop. Whoever receives waits for nothing here.
pub fn archive_what_comes(streamer: &Streamer, target: &Target) {
    let parts = Parts::new(streamer.streaming.partial_interval);
    let mut archiving = Archiving { streamer, begun: None, episode: Episode::default(), parts };
    let mut next = Instant::now();
    while !streamer.pulse.is_stopped() {
        if let Some(archive) = target.get() {
            if Instant::now() >= next {
                archiving.archive(&archive);
                // From its end: an archive that fails slowly is not asked without a pause.
                next = Instant::now() + LOOK_INTERVAL;
            }
            // Of use only behind the whole ones.
            archiving.parts.keep_when_due(streamer, &archive);
        }
        sleep(SHORT_WAIT);
    }
}

impl Archiving<'_> {
    /// Sees that the archive is there, before anything is whole: a restore takes what is being received only where the archive
    /// says whose that is.
    fn begin(&mut self, archive: &Arc<Archive>) -> Result<()> {
        if !self.begun.as_ref().is_some_and(|begun| Arc::ptr_eq(begun, archive)) {
            archive.confirm_or_begin()?;
            self.begun = Some(Arc::clone(archive));
        }
        Ok(())
    }

    fn archive(&mut self, archive: &Arc<Archive>) {
        if let Err(error) = self.begin(archive) {
            let path = self.streamer.folder.path();
            return self.hear(Some((path, &error)), false);
        }
        let Streamer { folder, streaming, tell, .. } = self.streamer;
        let (mut failed, mut archived) = (None, Vec::new());
        let mut each = |path: &Path, outcome: Outcome| match outcome {
            Outcome::Archived | Outcome::AlreadyArchived => {
                archived.extend(path.file_name().and_then(|name| WalName::parse(name.to_str()?).ok()));
            }
            Outcome::Skipped(_) => {}
            Outcome::SetAside { cause, location } => {
                let cause = cause.hint(format!("It lies at \"{location}\" now."));
                tell(Note::Warning(Report::new(&format!("could not archive file \"{}\"", path.display()), &cause)));
            }
            Outcome::Failed(error) | Outcome::NotRemoved(error) => {
                failed = failed.take().or(Some((path.to_path_buf(), error)))
            }
        };
        let run =
            Queue::of_streaming_directory(folder.path(), Some(archive.cluster().segment_size)).and_then(|queue| {
                let queue = queue
                    .in_batches_of(Some(streaming.batch_size.map_or(MOST_AT_ONCE, |files| files.min(MOST_AT_ONCE))));
                let archived = queue.archive(archive, &mut each);
                let put = |path: &Path, reason| archive.set_aside(path, reason);
                archived.and(queue.set_refused_aside(Some(&put), &mut each))
            });
        let failed = failed.or_else(|| run.err().map(|error| (folder.path().to_path_buf(), error)));
        if let Some(last) = archived.last() {
            self.streamer.teller.note(|standing| {
                standing.last_archived_wal = Some(last.to_string());
                standing.last_archived_us = Some(unix_us(SystemTime::now()));
            });
            let whole = archived.iter().filter(|name| matches!(name, WalName::Segment(_)));
            let segments: Vec<_> = whole.filter_map(WalName::segment).collect();
            self.parts.let_go(self.streamer, archive, &segments);
        }
        self.hear(failed.as_ref().map(|(path, error)| (path.as_path(), error)), !archived.is_empty());
    }

    fn hear(&mut self, failed: Option<(&Path, &Error)>, has_archived: bool) {
        if self.streamer.pulse.is_stopped() {
            return;
        }
        let (now, tell) = (Instant::now(), &self.streamer.tell);
        self.streamer.teller.note(|standing| {
            standing.archiving = match failed {
                Some((_, error)) => Some(Trouble::after(standing.archiving.take(), error)),
                None => None,
            };
        });
        match failed {
            Some((path, error)) => {
                if let Some(failures) = self.episode.fail(error, now) {
                    let report = Report::new(&format!("could not archive \"{}\"", path.display()), error);
                    let report = match failures {
                        1 => report,
                        _ => report.add_detail(&format!("{failures} attempts have failed since that was told last.")),
                    };
                    tell(Note::Warning(report));
                }
            }
            None if has_archived => {
                if let Some(recovered) = self.episode.succeed(now) {
                    tell(Note::Log(format!("received WAL is archived again, after {} s", recovered.lasted.as_secs())));
                }
            }
            None => {}
        }
    }
}
