//! Streaming: WAL is received while it is written, by PostgreSQL's own pg_receivewal, into a directory of its own, and each
//! segment archived from there once it is whole.
//!
//! pg_receivewal finds where to go on by what lies in its directory (PostgreSQL manual, pg_receivewal): the newest segment
//! stays there, archived or not, until there is a newer one.

mod complaint;
mod folder;
mod primary;
mod receiver;
mod tools;

pub use folder::{Folder, Newest, Reset};
pub use primary::{Identified, Primary, Slot};
pub use receiver::Hear;
pub use tools::Tool;

use crate::archive::{Archive, Episode};
use crate::config::{Config, StorageUrl, Streaming};
use crate::error::{Error, Kind, Result};
use crate::hash::HashKey;
use crate::hooks::Say;
use crate::identity::{Cluster, Marker};
use crate::incoming::{Outcome, Queue};
use crate::mode::Mode;
use crate::pulse::Pulse;
use crate::report::Report;
use crate::wal::SegmentName;
use receiver::Receiver;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often the directory is looked at for whole segments.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Before a receiver that ended is started again: doubled from the first up to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often the server is asked whether commits wait for the receiver: until it is started for that they wait for its
/// next report, which comes every 10 s (PostgreSQL manual, pg_receivewal, `--status-interval`).
const ASK_INTERVAL: Duration = Duration::from_secs(30);
/// One that ran so long had begun well.
const GOOD_RUN: Duration = Duration::from_secs(60);
/// Files that are archived before the receiver is looked after again.
const MOST_AT_ONCE: usize = 16;
const NO_ARCHIVE: &str = "Is the file system mounted? Give --begin where an archive is to begin.";
const SHORT_WAIT: Duration = Duration::from_millis(50);

/// Something that people should hear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// How things go.
    Log(String),
    /// What went wrong, and is tried again.
    Warning(Report),
}

/// Tells notes to whoever reads the log. Called from several threads.
pub type Tell = Arc<dyn Fn(Note) + Send + Sync>;

/// Receives and archives WAL until it is told to stop.
pub struct Streamer {
    config: Config,
    streaming: Streaming,
    folder: Folder,
    receivewal: Tool,
    psql: Tool,
    pulse: Arc<Pulse>,
    tell: Tell,
    /// Whether it is remembered which archives were begun from here, on a file system that is mounted.
    has_marker: bool,
    /// The secret of a cluster whose data directory is at hand, by its system identifier.
    hash_key: Option<(u64, HashKey)>,
    /// What hooks are told of as the server's configuration, where there is one.
    configuration_file: Option<PathBuf>,
}

impl Streamer {
    /// Takes the streaming directory and finds the programs; the server is not asked yet. Fails where a program is missing,
    /// or the directory another receiver's.
    ///
    /// Where it lies in the archive itself nothing tells an archive that is to begin from a file system that is not mounted:
    /// only with `begins` it is begun.
    pub fn new(config: Config, streaming: Streaming, begins: bool, pulse: Arc<Pulse>, tell: Tell) -> Result<Self> {
        let receivewal = Tool::find("pg_receivewal", &streaming.path_prefix)?;
        let psql = Tool::find("psql", &streaming.path_prefix)?;
        let (storage, mode) = match &config.destination.storage {
            StorageUrl::File { path, mode } => (Some(path.join(config.destination.server_name.to_string())), *mode),
            StorageUrl::S3(_) => (None, Mode::PRIVATE),
        };
        let storage = storage.filter(|archive| streaming.directory.starts_with(archive) && !begins);
        if let Some(archive) = storage.as_ref().filter(|archive| !archive.is_dir()) {
            let shown = archive.display().to_string();
            let message = format!("there is no archive at \"{shown}\"");
            return Err(Error::new(Kind::Identity, shown, message).hint(NO_ARCHIVE));
        }
        let folder = Folder::take(&streaming.directory, mode)?;
        let has_marker = storage.is_none();
        Ok(Streamer {
            config,
            streaming,
            folder,
            receivewal,
            psql,
            pulse,
            tell,
            has_marker,
            hash_key: None,
            configuration_file: None,
        })
    }

    /// The same with a data directory at hand, where one of the server's cluster is: without it nothing is encrypted.
    pub fn with_hash_key(mut self, system_identifier: Option<u64>, hash_key: Option<HashKey>) -> Self {
        self.hash_key = system_identifier.zip(hash_key);
        self
    }

    /// The same with hooks that are told of that configuration file.
    pub fn with_configuration_file(mut self, path: Option<PathBuf>) -> Self {
        self.configuration_file = path;
        self
    }

    fn primary(&self) -> Primary<'_> {
        Primary::new(&self.streaming.conninfo, &self.psql, &self.pulse)
    }

    /// Lets receiving begin where the server is, or its slot, as [`Folder::reset`] does.
    pub fn reset(&self) -> Result<Reset> {
        let (primary, server) = (self.primary(), self.primary().identify()?);
        let current = SegmentName::containing(server.timeline, server.position, server.segment_size);
        let slot =
            self.streaming.slot_name.as_deref().map(|name| self.confirm_slot(&primary, name, false)).transpose()?;
        let restart = slot.flatten().and_then(|slot| slot.restart);
        let restart = restart.map_or(current, |lsn| SegmentName::containing(server.timeline, lsn, server.segment_size));
        self.folder.reset(restart, current)
    }

    /// Receives until the pulse is told to stop. What goes wrong is told, and tried again.
    pub fn run(&self) {
        let (mut episode, mut pause) = (Episode::default(), FIRST_PAUSE);
        while !self.pulse.is_stopped() {
            let began = Instant::now();
            let Err(error) = self.receive() else { continue };
            if self.pulse.is_stopped() {
                return;
            }
            if began.elapsed() > GOOD_RUN {
                (episode, pause) = (Episode::default(), FIRST_PAUSE);
            }
            if let Some(failures) = episode.fail(&error, Instant::now()) {
                let report = Report::new("WAL is not being received", &error);
                let again = format!("It is tried again in {} s.", pause.as_secs());
                let count =
                    if failures > 1 { format!("It has failed {} times. {again}", episode.failures()) } else { again };
                (self.tell)(Note::Warning(report.add_detail(&count)));
            }
            self.wait(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn wait(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while !self.pulse.is_stopped() && Instant::now() < until {
            sleep(SHORT_WAIT);
        }
    }

    /// One run of pg_receivewal, archiving beside it. Ends well where it is to be started anew at once, and where the pulse was
    /// told to stop.
    fn receive(&self) -> Result<()> {
        let primary = self.primary();
        let server = primary.identify()?;
        // An older one does not know this server's protocol, a newer one knows older servers' (PostgreSQL, receivelog.c,
        // `CheckServerVersionForStreaming`).
        if self.receivewal.major < server.major {
            let (path, ours, theirs) = (self.receivewal.path.display(), self.receivewal.major, server.major);
            let message = format!("\"{path}\" is of version {ours}, and the server of version {theirs}");
            return Err(Error::new(Kind::Configuration, "pg_receivewal", message)
                .hint("It must not be older than the server: name a newer one's directory in archiver.path_prefix."));
        }
        if let Some(slot) = &self.streaming.slot_name {
            self.confirm_slot(&primary, slot, true)?;
        }
        self.folder.confirm_owner(server.system_identifier, server.segment_size)?;
        if let Some(mended) = self.folder.mend_partial(server.segment_size)? {
            (self.tell)(Note::Log(format!("\"{mended}\" was cut short by a crash and is received again")));
        }
        let cluster = Cluster {
            system_identifier: server.system_identifier,
            major: server.major,
            segment_size: server.segment_size,
            hash_key: self.hash_key.filter(|(cluster, _)| *cluster == server.system_identifier).map(|(_, key)| key),
        };
        let marker = self.has_marker.then(|| Marker::new(self.folder.marker_path()));
        let archive = Archive::new(self.config.clone(), cluster, marker, Arc::clone(&self.pulse))?;
        // A storage that does not answer keeps nobody from receiving.
        if let Err(error) = archive.confirm_begun()
            && error.kind() == Kind::Identity
        {
            match archive.has_identity()? {
                true => return Err(error),
                false if !self.has_marker => return Err(error.hint(NO_ARCHIVE)),
                false => {}
            }
        }
        archive.refuse_root_in_anothers()?;
        let tell = Arc::clone(&self.tell);
        let say: Say = Arc::new(move |note| {
            tell(match note.is_trouble {
                true => Note::Warning(Report { message: note.message, detail: None, hint: None }),
                false => Note::Log(note.message),
            });
        });
        let archive = archive.with_hooks_of(self.configuration_file.as_deref(), say);
        let tell = Arc::clone(&self.tell);
        let hear: Hear = Arc::new(move |line| tell(Note::Log(line.to_string())));
        let is_synchronous = primary.is_synchronous(&self.streaming.archiver_name).unwrap_or(false);
        let started = Receiver::start(&self.receivewal, &self.streaming, is_synchronous, hear);
        let mut receiver = started.map_err(|error| Error::io("run", &self.receivewal.path, &error))?;
        let mut archiving = Archiving { streamer: self, archive, episode: Episode::default(), next: Instant::now() };
        let mut asked = Instant::now();
        while !self.pulse.is_stopped() {
            if asked.elapsed() > ASK_INTERVAL {
                // Where it cannot be known nothing changes.
                let now = primary.is_synchronous(&self.streaming.archiver_name).unwrap_or(is_synchronous);
                if now != is_synchronous {
                    let what = if now { "wait" } else { "no longer wait" };
                    (self.tell)(Note::Log(format!("commits {what} for this receiver: it is started again")));
                    break;
                }
                asked = Instant::now();
            }
            if let Some(error) = receiver.ended() {
                // What it left whole waits for nobody.
                archiving.archive_now();
                return Err(error);
            }
            archiving.archive_when_due();
            sleep(SHORT_WAIT);
        }
        receiver.end();
        Ok(())
    }

    /// Sees that the slot can be used; made where it is missing and that is wanted.
    fn confirm_slot(&self, primary: &Primary<'_>, name: &str, is_to_be_used: bool) -> Result<Option<Slot>> {
        let refused = |message: String, hint: String| {
            Err(Error::new(Kind::Configuration, "archiver.slot_name", message).hint(hint).retry_if(true))
        };
        let Some(slot) = primary.slot(name)? else {
            if self.streaming.creates_slot && is_to_be_used {
                primary.create_slot(name)?;
                (self.tell)(Note::Log(format!("made the replication slot \"{name}\"")));
                return Ok(None);
            }
            return refused(
                format!("there is no physical replication slot \"{name}\""),
                format!(
                    "Make it: SELECT pg_create_physical_replication_slot('{name}', true); or set archiver.create_slot to auto."
                ),
            );
        };
        if slot.wal_status.as_deref() == Some("lost") {
            return refused(
                format!("the replication slot \"{name}\" has lost WAL that was not received"),
                format!(
                    "Take a new base backup; then SELECT pg_drop_replication_slot('{name}'), make it anew, and go on with \"archiver receive-wal --reset\"."
                ),
            );
        }
        if slot.is_active == Some(true) && is_to_be_used {
            return refused(
                format!("the replication slot \"{name}\" is in use"),
                "Another receiver or standby uses it: end it, or set another archiver.slot_name.".to_string(),
            );
        }
        Ok(Some(slot))
    }
}

/// The archive beside a receiver, and how archiving to it goes.
struct Archiving<'a> {
    streamer: &'a Streamer,
    archive: Archive,
    episode: Episode,
    next: Instant,
}

impl Archiving<'_> {
    fn archive_when_due(&mut self) {
        if Instant::now() >= self.next {
            self.archive_now();
            // From its end: an archive that fails slowly is not asked without a pause.
            self.next = Instant::now() + LOOK_INTERVAL;
        }
    }

    fn archive_now(&mut self) {
        let Streamer { folder, streaming, tell, .. } = self.streamer;
        let (mut failed, mut has_archived) = (None, false);
        let mut each = |path: &Path, outcome: Outcome| match outcome {
            Outcome::Archived | Outcome::AlreadyArchived => has_archived = true,
            Outcome::Skipped(_) => {}
            Outcome::SetAside { cause, location } => {
                let cause = cause.hint(format!("It lies at \"{location}\" now."));
                tell(Note::Warning(Report::new(&format!("could not archive file \"{}\"", path.display()), &cause)));
            }
            Outcome::Failed(error) | Outcome::NotRemoved(error) => {
                failed = failed.take().or(Some((path.to_path_buf(), error)))
            }
        };
        let run = Queue::of_streaming_directory(folder.path()).and_then(|queue| {
            let queue =
                queue.in_batches_of(Some(streaming.batch_size.map_or(MOST_AT_ONCE, |files| files.min(MOST_AT_ONCE))));
            let archived = queue.archive(&self.archive, &mut each);
            let put = |path: &Path, reason| self.archive.set_aside(path, reason);
            archived.and(queue.set_refused_aside(Some(&put), &mut each))
        });
        let now = Instant::now();
        let failed = failed.or_else(|| run.err().map(|error| (folder.path().to_path_buf(), error)));
        match failed {
            _ if self.streamer.pulse.is_stopped() => {}
            Some((path, error)) => {
                if let Some(failures) = self.episode.fail(&error, now) {
                    let report = Report::new(&format!("could not archive \"{}\"", path.display()), &error);
                    let again = if failures > 1 {
                        format!("{failures} attempts have failed since that was told last.")
                    } else {
                        String::new()
                    };
                    tell(Note::Warning(if again.is_empty() { report } else { report.add_detail(&again) }));
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
