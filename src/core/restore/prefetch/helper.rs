//! The process that fetches ahead: one for each data directory in recovery, detached from whoever started it.

use super::folder::{Folder, Lock, Origin};
use super::plan::{Missing, Plan, Position, plan, reach, space};
use crate::config::{Destination, Prefetch, Settings};
use crate::data_directory::{hash_key, recovering_server, system_identifier};
use crate::durable::{self, StagedFile};
use crate::error::Result;
use crate::owner::Owner;
use crate::place::Place;
use crate::pulse::Pulse;
use crate::stamp::Stamp;
use crate::wal::{SegmentName, WalName};
use nix::sys::statvfs::statvfs;
use nix::unistd::{close, setsid};
use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, available_parallelism, sleep};
use std::time::{Duration, Instant};

/// Who starts a helper has noted where the server stands.
const PATIENCE_FOR_NOTE: Duration = Duration::from_secs(1);
/// How often it is looked whether the server still recovers.
const LOOK_AT_SERVER: Duration = Duration::from_millis(250);
/// After how long a segment that was not there is looked for again: as often as a standby asks by default
/// (`wal_retrieve_retry_interval`).
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// News are looked for as often as they have been coming lately, within these bounds.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// A segment is read once more and renamed within this time after its note; later it is fetched anew, if that was all.
const LONGEST_HAND_OVER: Duration = Duration::from_secs(5);
/// Somebody may look just now whether the lock is free.
const PATIENCE_FOR_LOCK: Duration = Duration::from_secs(1);
/// Where a network lies before the archive, most of a fetch is waiting.
const MOST_REMOTE_FETCHERS: usize = 8;
/// Elsewhere it is decoding, and the server needs a processor, too.
const MOST_LOCAL_FETCHERS: usize = 4;
/// Buffers and decoder of one fetcher, with room to spare at every level that we write.
const MEMORY_OF_FETCHER_BYTES: u64 = 16 << 20;

/// Fetches ahead of the server that recovers `data_directory` for as long as that takes segments, then removes the folder.
/// Ends at once where there is another helper, or no such server.
///
/// Called first thing in a process of its own: it leaves its session, and closes what it inherited but for the standard
/// streams. Nobody hears of a failure: `archiver restore` meets its cause by itself.
pub fn serve(settings: &Settings, data_directory: &Path) -> Result<()> {
    leave_caller();
    let Some(server) = recovering_server(data_directory) else { return Ok(()) };
    let folder = Folder::of_data_directory(data_directory);
    let started = Instant::now();
    let lock = loop {
        match folder.lock() {
            Some(lock) => break lock,
            None if started.elapsed() > PATIENCE_FOR_LOCK => return Ok(()),
            None => sleep(SHORTEST_PAUSE),
        }
    };
    // What a killed one left.
    folder.clear(&lock);
    let pulse = Arc::new(Pulse::new());
    let served = Helper::new(settings, data_directory, &folder, &lock, &pulse).map(|mut helper| helper.run(&server));
    pulse.stop();
    folder.remove_all(&lock);
    served
}

/// Lets go of the caller's terminal, process group, pipes and files, which PostgreSQL 15 does not keep from its commands.
fn leave_caller() {
    // It leads its session already.
    let _ = setsid();
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    let open: Vec<i32> = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten().filter_map(number).collect();
    for descriptor in open.into_iter().filter(|&descriptor| descriptor > 2) {
        // The one that this list was read through is closed.
        let _ = close(descriptor);
    }
}

/// What the threads that fetch have in common.
struct Fetcher {
    place: Place,
    folder: Folder,
    origin: Origin,
    system_identifier: u64,
    pulse: Arc<Pulse>,
}

impl Fetcher {
    /// Fetches a segment into the folder; answers whether it is there now. The file in progress stands there before the
    /// archive is asked, so that a restore can tell that it is worth waiting for.
    fn fetch(&self, segment: SegmentName) -> Result<bool> {
        let mode = durable::mode_for_file_in(self.folder.path());
        let mut staged = StagedFile::create(self.folder.path(), &format!("{segment}."), mode, &self.pulse)?;
        let name = WalName::Segment(segment);
        let Some((stored, object)) = self.place.open_wal(&name)? else { return Ok(false) };
        let location = self.place.store.location(&stored.key);
        let cluster = Some(self.system_identifier);
        super::super::receive_into(&mut staged, &self.place, &name, cluster, object, &location)?;
        let seal = self.origin.seal(segment, &staged.stamp()?);
        staged.replace(&self.folder.verified_path(segment, &seal))?;
        Ok(true)
    }
}

/// A segment, and whether it is there now.
type Fetched = (SegmentName, bool);

struct Helper<'a> {
    fetcher: Arc<Fetcher>,
    data_directory: &'a Path,
    lock: &'a Lock,
    most_segments: usize,
    most_fetchers: usize,
    position: Option<Position>,
    /// How many segments the server has taken one after the other.
    taken: u32,
    /// Where the archive seems to end, and when that was seen.
    missing: Option<(SegmentName, Instant)>,
    verified: BTreeSet<SegmentName>,
    in_progress: BTreeSet<SegmentName>,
    results: (Sender<Fetched>, Receiver<Fetched>),
    heard_last: Option<Stamp>,
    heard_at: Instant,
}

impl<'a> Helper<'a> {
    fn new(
        settings: &Settings,
        data_directory: &'a Path,
        folder: &Folder,
        lock: &'a Lock,
        pulse: &Arc<Pulse>,
    ) -> Result<Self> {
        let prefetch = Prefetch::parse(settings)?;
        let place = Place::open(&Destination::parse(settings)?, pulse)?.known_to(hash_key(data_directory));
        let system_identifier = system_identifier(data_directory)?.unwrap_or_default();
        let most_fetchers = match place.is_remote() {
            true => MOST_REMOTE_FETCHERS,
            false => available_parallelism().map_or(1, usize::from).min(MOST_LOCAL_FETCHERS),
        };
        let within_memory = (prefetch.memory_limit_bytes / MEMORY_OF_FETCHER_BYTES) as usize;
        let origin = Origin::new(settings, system_identifier)?;
        let pulse = Arc::clone(pulse);
        Ok(Helper {
            fetcher: Arc::new(Fetcher { place, folder: folder.clone(), origin, system_identifier, pulse }),
            data_directory,
            lock,
            most_segments: prefetch.segments,
            most_fetchers: most_fetchers.min(within_memory).max(1),
            position: None,
            taken: 0,
            missing: None,
            verified: BTreeSet::new(),
            in_progress: BTreeSet::new(),
            results: channel(),
            heard_last: None,
            heard_at: Instant::now(),
        })
    }

    /// Until the server recovers no more, takes nothing, or wants it from elsewhere.
    fn run(&mut self, server: &Owner) {
        let mut looked_at_server = Instant::now();
        let patience = |position: Option<Position>| position.map_or(PATIENCE_FOR_NOTE, |it| it.patience());
        while self.heard_at.elapsed() < patience(self.position) && self.lock.is_in_place() {
            if looked_at_server.elapsed() > LOOK_AT_SERVER {
                if recovering_server(self.data_directory).as_ref() != Some(server) {
                    return;
                }
                looked_at_server = Instant::now();
            }
            if let Some((note, stamp)) = self.fetcher.folder.noted()
                && self.heard_last != Some(stamp)
            {
                if note.origin != self.fetcher.origin {
                    return;
                }
                self.follow(note.position);
                (self.heard_last, self.heard_at) = (Some(stamp), Instant::now());
            }
            self.act();
            let pause = (self.heard_at.elapsed() / 20).clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
            if let Ok(fetched) = self.results.1.recv_timeout(pause) {
                self.settle(fetched);
            }
        }
    }

    fn follow(&mut self, position: Position) {
        let is_ahead = |from: Position| from.ahead().take(self.most_segments).any(|it| it == position.segment);
        if self.position.is_some_and(is_ahead) {
            self.taken = self.taken.saturating_add(1);
        } else {
            (self.taken, self.missing) = (0, None);
        }
        self.position = Some(position);
    }

    fn act(&mut self) {
        let Some(position) = self.position else { return };
        let present: BTreeSet<SegmentName> = self.verified.union(&self.in_progress).copied().collect();
        let free_bytes =
            statvfs(self.fetcher.folder.path()).map_or(0, |free| free.blocks_available() * free.fragment_size());
        let space = space(free_bytes, position.segment_size, present.len());
        let reach = reach(self.taken, self.most_segments).min(space);
        let missing = self.missing.map(|(segment, seen)| Missing { segment, is_due: seen.elapsed() > LOOK_AGAIN });
        let may_take = self.heard_at.elapsed() < LONGEST_HAND_OVER;
        let Plan { fetch, drop } = plan(&position, may_take, reach, &present, missing);
        for segment in drop {
            if self.verified.remove(&segment) {
                self.fetcher.folder.remove(segment);
            }
        }
        for segment in fetch {
            if self.in_progress.len() >= self.most_fetchers || !self.start(segment) {
                break;
            }
        }
    }

    fn start(&mut self, segment: SegmentName) -> bool {
        let (fetcher, results) = (Arc::clone(&self.fetcher), self.results.0.clone());
        let fetch = move || {
            let fetched = catch_unwind(AssertUnwindSafe(|| fetcher.fetch(segment)));
            // Nobody listens: the process ends.
            let _ = results.send((segment, matches!(fetched, Ok(Ok(true)))));
        };
        let is_started = Builder::new().name("archiver fetch".into()).spawn(fetch).is_ok();
        if is_started {
            self.in_progress.insert(segment);
        }
        is_started
    }

    fn settle(&mut self, (segment, is_there): Fetched) {
        self.in_progress.remove(&segment);
        if is_there {
            self.verified.insert(segment);
            self.missing = self.missing.filter(|(missing, _)| *missing != segment);
        } else if self.missing.is_none_or(|(missing, _)| segment <= missing) {
            self.missing = Some((segment, Instant::now()));
        }
    }
}
