//! Streaming: WAL is received while it is written, by PostgreSQL's own pg_receivewal, into a directory of its own, and each
//! segment archived from there once it is whole.
//!
//! pg_receivewal finds where to go on by what lies in its directory (PostgreSQL manual, pg_receivewal): the newest segment
//! stays there, archived or not, until there is a newer one.

mod archiving;
pub mod check;
mod complaint;
mod folder;
mod parts;
mod primary;
mod receiver;
mod standing;
mod tools;

pub use folder::{Folder, Newest, Reset, Right};
pub use primary::{Answer, Identified, Primary, Slot};
pub use receiver::Hear;
pub use standing::{Facts, Heard, Seen, Standing, Trouble, is_used, look, told};
pub use tools::Tool;

use crate::archive::{Archive, Episode};
use crate::config::{Config, StorageUrl, Streaming};
use crate::error::{Error, Kind, Result};
use crate::hash::HashKey;
use crate::hooks::Say;
use crate::identity::{Cluster, Marker, vanished_archive};
use crate::mode::Mode;
use crate::part::Part;
use crate::place::Place;
use crate::pulse::Pulse;
use crate::report::Report;
use crate::state::unix_us;
use crate::threads::with_signals_blocked;
use crate::wal::{SegmentName, SegmentSize};
use archiving::Target;
use receiver::Receiver;
use standing::Teller;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant, SystemTime};

/// Before a receiver that ended is started again: doubled from the first up to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often the server is asked where it stands, and whether commits wait for the receiver: until it is started for that
/// they wait for its next report, which comes every 10 s (PostgreSQL manual, pg_receivewal, `--status-interval`).
const ASK_INTERVAL: Duration = Duration::from_secs(10);
/// One that ran so long had begun well.
const GOOD_RUN: Duration = Duration::from_secs(60);
const NO_ARCHIVE: &str = "Is the file system mounted? Give --begin where an archive is to begin.";
const SHORT_WAIT: Duration = Duration::from_millis(50);
/// How long the end waits for a file on its way into the storage.
const ARCHIVING_PATIENCE: Duration = Duration::from_secs(5);
/// How long a storage is asked whose archive it holds, before WAL is received without that answer.
const STORAGE_PATIENCE: Duration = Duration::from_secs(10);

/// How an archive that is not there is told from one that is to begin.
#[derive(Clone, Debug)]
pub enum Beginning {
    /// By a file in the streaming directory. Where that lies in the archive itself nothing tells: none is begun then.
    Remembered,
    /// The same, but one is begun in any case.
    Wanted,
    /// By what a data directory remembers.
    RememberedBy(Marker),
}

/// Something that people should hear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// That another segment was received.
    Progress(String),
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
    teller: Teller,
    /// Whether WAL is received inside the archive.
    is_inside: bool,
    /// Remembers which archives were begun from here, on a file system that is mounted.
    marker: Option<Marker>,
    /// The secret of a cluster whose data directory is at hand, by its system identifier.
    hash_key: Option<(u64, HashKey)>,
    /// What hooks are told of as the server's configuration, where there is one.
    configuration_file: Option<PathBuf>,
}

impl Streamer {
    /// Makes the streaming directory and finds the programs; the server is not asked yet. Fails where a program is missing.
    pub fn new(
        config: Config,
        streaming: Streaming,
        beginning: Beginning,
        pulse: Arc<Pulse>,
        tell: Tell,
    ) -> Result<Self> {
        let receivewal = Tool::find("pg_receivewal", &streaming.path_prefix)?;
        let psql = Tool::find("psql", &streaming.path_prefix)?;
        let (storage, mode) = match &config.destination.storage {
            StorageUrl::File { path, mode } => (Some(path.join(config.destination.server_name.to_string())), *mode),
            StorageUrl::S3(_) => (None, Mode::PRIVATE),
        };
        let around = storage.filter(|archive| streaming.directory.starts_with(archive));
        let is_inside = around.is_some();
        let own_marker = Marker::new(Folder::at(&streaming.directory).marker_path());
        let marker = match (beginning, &around) {
            (Beginning::RememberedBy(marker), _) => Some(marker),
            (Beginning::Remembered, Some(_)) => None,
            (Beginning::Remembered, None) | (Beginning::Wanted, _) => Some(own_marker),
        };
        if let Some(archive) = around.filter(|archive| marker.is_none() && !archive.is_dir()) {
            let shown = archive.display().to_string();
            let message = format!("there is no archive at \"{shown}\"");
            return Err(Error::new(Kind::Identity, shown, message).hint(NO_ARCHIVE));
        }
        if is_inside && let Some(marker) = &marker {
            confirm_mounted(&config, marker, &pulse)?;
        }
        let folder = Folder::make(&streaming.directory, mode)?;
        let standing = Standing {
            pid: std::process::id().cast_signed(),
            archiver_name: streaming.archiver_name.clone(),
            slot_name: streaming.slot_name.clone(),
            ..Standing::default()
        };
        let teller = Teller::new(folder.path(), standing);
        Ok(Streamer {
            config,
            streaming,
            folder,
            receivewal,
            psql,
            pulse,
            tell,
            teller,
            is_inside,
            marker,
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

    /// Lets receiving begin where the server is, or its slot, as [`Folder::reset`] does. While another process receives, that
    /// is refused.
    pub fn reset(&self) -> Result<Reset> {
        let is_receiving = look(self.folder.path()).is_ok_and(|seen| seen.is_running);
        let _turn = self.folder.take_over(is_receiving)?;
        let primary = self.primary();
        let server = primary.identify()?;
        self.folder.confirm_owner(server.system_identifier, server.segment_size)?;
        let current = SegmentName::containing(server.timeline, server.position, server.segment_size);
        let slot = match self.streaming.slot_name.as_deref() {
            Some(name) => {
                self.confirm_slot(&primary, name, false)?.and_then(|slot| slot.restart.map(|lsn| (name, lsn)))
            }
            None => None,
        };
        let restart = match slot {
            // After a promotion it may keep WAL of an older timeline than the server is on now.
            Some((name, lsn)) => {
                let timeline = primary.slot_timeline(name)?.unwrap_or(server.timeline);
                SegmentName::containing(timeline, lsn, server.segment_size)
            }
            None => current,
        };
        self.folder.reset(restart, current, server.segment_size)
    }

    /// Receives, and archives what was received, until the pulse is told to stop. What goes wrong is told, and tried again;
    /// meanwhile nobody receives there, so that somebody can reset it. Fails where the directory is another receiver's, and
    /// where the thread that archives comes to an end that was not wanted.
    ///
    /// The kernel ends pg_receivewal when the thread that calls this ends. A storage that hangs is left behind, with the
    /// thread that hangs in it.
    pub fn run(self: &Arc<Self>) -> Result<()> {
        let _right = self.folder.take(Right::Archive)?;
        let target: Arc<Target> = Arc::default();
        let (streamer, aimed_at) = (Arc::clone(self), Arc::clone(&target));
        let spawned = with_signals_blocked(|| {
            let archive = move || archiving::archive_what_comes(&streamer, &aimed_at);
            thread::Builder::new().name("archiver received".into()).spawn(archive)
        });
        let archiving = spawned.map_err(|error| Error::io("start a thread of", self.folder.path(), &error))?;
        self.receive_again_and_again(&target, &archiving);
        let until = Instant::now() + ARCHIVING_PATIENCE;
        while !archiving.is_finished() && Instant::now() < until {
            sleep(SHORT_WAIT);
        }
        if self.pulse.is_stopped() {
            self.teller.end();
            return Ok(());
        }
        self.teller.note(Standing::forget_connection);
        self.teller.tell(true);
        Err(Error::new(Kind::Internal, "thread", "internal error in the thread that archives what was received"))
    }

    fn receive_again_and_again(&self, target: &Target, archiving: &JoinHandle<()>) {
        let (mut episode, mut pause) = (Episode::default(), FIRST_PAUSE);
        while !self.pulse.is_stopped() && !archiving.is_finished() {
            let began = Instant::now();
            let received = self.receive(target, archiving);
            self.teller.note(Standing::forget_connection);
            let Err(error) = received else { continue };
            if self.pulse.is_stopped() {
                return;
            }
            if began.elapsed() > GOOD_RUN {
                (episode, pause) = (Episode::default(), FIRST_PAUSE);
            }
            self.teller.note(|standing| {
                standing.receiving = Some(Trouble::after(standing.receiving.take(), &error));
            });
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
            self.teller.tell(false);
            sleep(SHORT_WAIT);
        }
    }

    /// One run of pg_receivewal. Ends well where it is to be started anew at once, and where the pulse was told to stop.
    fn receive(&self, target: &Target, archiving: &JoinHandle<()>) -> Result<()> {
        let _turn = self.folder.take(Right::Receive)?;
        let primary = self.primary();
        let server = primary.identify()?;
        self.teller.note(|standing| {
            standing.system_identifier = Some(server.system_identifier);
            standing.segment_bytes = Some(server.segment_size.bytes());
        });
        self.confirm_version(&server)?;
        if let Some(slot) = &self.streaming.slot_name {
            self.confirm_slot(&primary, slot, true)?;
        }
        self.folder.confirm_owner(server.system_identifier, server.segment_size)?;
        if let Some(mended) = self.folder.mend_partial(server.segment_size)? {
            (self.tell)(Note::Log(format!("\"{mended}\" was cut short by a crash and is received again")));
        }
        self.aim(target, &server)?;
        let tell = Arc::clone(&self.tell);
        let hear: Hear = Arc::new(move |line| {
            let is_progress = line.contains(": finished segment at ");
            tell(if is_progress { Note::Progress(line.to_string()) } else { Note::Log(line.to_string()) });
        });
        let is_synchronous = primary.is_synchronous(&self.streaming.archiver_name).unwrap_or(false);
        let started = Receiver::start(&self.receivewal, &self.streaming, is_synchronous, hear);
        let mut receiver = started.map_err(|error| Error::io("run", &self.receivewal.path, &error))?;
        self.teller.note(|standing| {
            standing.receivewal_pid = Some(receiver.pid());
            standing.receiving_since_us = Some(unix_us(SystemTime::now()));
        });
        self.teller.tell(true);
        let (began, mut asked, mut unanswered) = (Instant::now(), None::<Instant>, Episode::default());
        while !self.pulse.is_stopped() && !archiving.is_finished() {
            if let Some(error) = receiver.ended() {
                return Err(error);
            }
            // Once it has begun, the server can say so.
            let is_due = asked.map_or(began.elapsed() > FIRST_PAUSE, |asked| asked.elapsed() > ASK_INTERVAL);
            if is_due {
                // It is connected, or would have ended.
                self.teller.note(|standing| standing.receiving = None);
                let answered = self.ask(&primary);
                match &answered {
                    Ok(_) => drop(unanswered.succeed(Instant::now())),
                    Err(error) if !self.pulse.is_stopped() && unanswered.fail(error, Instant::now()).is_some() => {
                        (self.tell)(Note::Warning(Report::new("it is not known how far receiving lags", error)));
                    }
                    Err(_) => {}
                }
                // Where it cannot be known nothing changes.
                let now = answered.ok().flatten().unwrap_or(is_synchronous);
                if now != is_synchronous {
                    let what = if now { "wait" } else { "no longer wait" };
                    (self.tell)(Note::Log(format!("commits {what} for this receiver: it is started again")));
                    break;
                }
                asked = Some(Instant::now());
            }
            self.teller.tell(false);
            sleep(SHORT_WAIT);
        }
        receiver.end();
        Ok(())
    }

    /// Asks the server where it stands, takes note of that, and answers whether commits wait for the receiver.
    fn ask(&self, primary: &Primary<'_>) -> Result<Option<bool>> {
        let streaming = &self.streaming;
        let answer = primary.answer(&streaming.archiver_name, streaming.slot_name.as_deref())?;
        let at_us = unix_us(SystemTime::now());
        let seen = look(self.folder.path()).ok().and_then(|seen| seen.received);
        self.teller.note(|standing| {
            standing.told = answer.told.map(|lsn| lsn.0);
            standing.is_synchronous = answer.is_synchronous;
            standing.sync_state = answer.sync_state;
            standing.is_slot_active = answer.is_slot_active;
            standing.slot_wal_status = answer.slot_wal_status;
            standing.hear(Heard { at_us, position: answer.position.0 }, seen.max(answer.told));
        });
        Ok(answer.is_synchronous)
    }

    /// An older one does not know this server's protocol, a newer one knows older servers' (PostgreSQL, receivelog.c,
    /// `CheckServerVersionForStreaming`).
    fn confirm_version(&self, server: &Identified) -> Result<()> {
        if self.receivewal.major >= server.major {
            return Ok(());
        }
        let (path, ours, theirs) = (self.receivewal.path.display(), self.receivewal.major, server.major);
        let message = format!("\"{path}\" is of version {ours}, and the server of version {theirs}");
        Err(Error::new(Kind::Configuration, "pg_receivewal", message)
            .hint("It must not be older than the server: name a newer one's directory in archiver.path_prefix."))
    }

    /// Sees that what that server sends may be archived, and to which archive.
    fn aim(&self, target: &Target, server: &Identified) -> Result<()> {
        let cluster = Cluster {
            system_identifier: server.system_identifier,
            major: server.major,
            segment_size: server.segment_size,
            hash_key: self.hash_key.filter(|(cluster, _)| *cluster == server.system_identifier).map(|(_, key)| key),
        };
        let is_known = target.get().is_some_and(|archive| *archive.cluster() == cluster);
        // A storage that hangs keeps nobody from receiving, unless it is where WAL is received.
        if !is_known || self.is_inside {
            self.confirm_archive(&cluster)?;
        }
        if is_known {
            return Ok(());
        }
        let archive = Archive::new(self.config.clone(), cluster, self.marker.clone(), Arc::clone(&self.pulse))?;
        let tell = Arc::clone(&self.tell);
        let say: Say = Arc::new(move |note| {
            tell(match note.is_trouble {
                true => Note::Warning(Report { message: note.message, detail: None, hint: None }),
                false => Note::Log(note.message),
            });
        });
        target.set(Arc::new(archive.with_hooks_of(self.configuration_file.as_deref(), say)));
        Ok(())
    }

    /// Fails where the archive is another cluster's, or is not there and should be. One that does not answer is not waited
    /// for: whoever archives will tell.
    fn confirm_archive(&self, cluster: &Cluster) -> Result<()> {
        let Ok(place) = Place::open(&self.config.destination.within(STORAGE_PATIENCE), &self.pulse) else {
            return Ok(());
        };
        if let Err(error) = place.confirm_archive(Some(cluster.system_identifier))
            && error.kind() == Kind::Identity
        {
            let is_remembered = |marker: &Marker| marker.remembers(cluster.system_identifier, &place.real_location());
            match (place.identity()?, &self.marker) {
                (Some(_), _) => return Err(error),
                (None, None) => return Err(error.hint(NO_ARCHIVE)),
                // What is received into an empty mount point is out of reach once something is mounted there.
                (None, Some(marker)) if self.is_inside && is_remembered(marker)? => {
                    return Err(vanished_archive(&place.location(), place.absence_question(), Some(marker.path())));
                }
                (None, Some(_)) => {}
            }
        }
        place.refuse_root_in_anothers()
    }

    /// Whether the receiver has told the server, since it was started, that it wrote so much.
    fn has_told_of(&self, part: &Part) -> bool {
        let mut told = false;
        self.teller.note(|standing| {
            let size = standing.segment_bytes.and_then(SegmentSize::new);
            let end = size.and_then(|size| part.segment.start(size)).map(|start| start.0 + part.bytes);
            told = standing.told.zip(end).is_some_and(|(told, end)| told >= end);
        });
        told
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
                    "SELECT pg_drop_replication_slot('{name}'), make it anew, go on with \"archiver receive-wal --reset\", see that WAL is received, and then take a new base backup."
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

/// Fails where no archive lies in local storage in which one was begun from here: it is not mounted, most likely. Nothing is
/// made there then.
fn confirm_mounted(config: &Config, marker: &Marker, pulse: &Arc<Pulse>) -> Result<()> {
    let place = Place::open(&config.destination, pulse)?;
    if place.identity()?.is_none() && marker.remembers_any(&place.real_location())? {
        return Err(vanished_archive(&place.location(), place.absence_question(), Some(marker.path())));
    }
    Ok(())
}
