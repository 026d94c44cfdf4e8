//! Archiving from outside the server: files that are named, or those that lie in a directory, one after the other.
//!
//! A source is removed only after its stored copy and its line in the catalogue are durable, and only while it is still
//! the file that was read.

use crate::archive::{Archive, StoredFile, WalFile};
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::set_aside::{Copied, Reason};
use crate::stamp::Stamp;
use crate::wal::{Kind as WalKind, SegmentName, SegmentSize, Timeline, WalName};
use nix::unistd::{AccessFlags, access};
use std::fs::{self, FileType};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is to be archived, and what of a directory is not.
#[derive(Debug, Default)]
pub struct Queue {
    /// The files, in order.
    pub items: Vec<WalFile>,
    /// What is no file to archive, with the reason.
    pub refused: Vec<(PathBuf, Error)>,
    /// Files in the making, by their names.
    pub unfinished: Vec<PathBuf>,
    /// Whether no more are archived in one run, and how many.
    batch_size: Option<usize>,
    /// The directory that the files were found in, if they were.
    directory: Option<PathBuf>,
    /// Its device and inode.
    identity: Option<(u64, u64)>,
    keeps_sources: bool,
    /// Whether WAL is received there: of a segment in part it is known that nobody writes it any more.
    is_streaming: bool,
}

/// What became of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was archived now.
    Archived,
    /// It had been archived before, with the same content.
    AlreadyArchived,
    /// It was left alone, for that reason.
    Skipped(&'static str),
    /// It is not archived, and was moved out of the way.
    SetAside {
        /// Why it is not archived.
        cause: Error,
        /// Where it lies now.
        location: String,
    },
    /// It is not archived.
    Failed(Error),
    /// It is archived, and still there.
    NotRemoved(Error),
}

const IN_THE_MAKING: &str = "it is in the making";
/// What marks a directory that WAL is received in.
pub const RECEIVER_LOCK: &str = ".archiver-receive-wal.lock";
const GONE: &str = "it is gone";
const STILL_WRITTEN: &str =
    "its segment may still be being written: no later timeline's history file is here or in the archive";
/// A promotion takes the next timeline that is free; so many later ones are looked for.
const LATER_TIMELINES: u32 = 64;
const NOT_TRIED: &str = "it was not tried, because the archive fails";
/// Files that share a catalogue write: they cost one fsync of it together.
const GROUP: usize = 16;
const PAUSE: Duration = Duration::from_millis(250);

impl Queue {
    /// These files, in this order. Their sources stay.
    pub fn of_paths(paths: &[PathBuf]) -> Self {
        let mut queue = Queue::default();
        for path in paths {
            // What a link leads to is meant; by the time it is read, nothing else may stand there.
            let path = &path.canonicalize().ok().filter(|_| path.is_symlink()).unwrap_or_else(|| path.clone());
            let there = fs::metadata(path).map_err(|error| Error::io("open file", path, &error).of_kind(Kind::Source));
            match there.and_then(|meta| wal_file(path, meta.file_type())) {
                Ok(file) => queue.items.push(file),
                Err(cause) => queue.refused.push((path.clone(), cause)),
            }
        }
        queue
    }

    /// The files in `directory`, as in Barman's incoming directory: segments, partial ones, labels and histories, in the
    /// order in which PostgreSQL archives; hidden files are not seen and `*.tmp` are in the making. Everything else is
    /// refused. One name per file is held in memory.
    pub fn of_directory(directory: &Path) -> Result<Self> {
        confirm_may_be_emptied(directory)?;
        // The newest segment there tells the receiver where to go on.
        if directory.join(RECEIVER_LOCK).exists() {
            return Err(is_part_of_an_archive(directory));
        }
        Self::read(directory)
    }

    /// All that lies there.
    fn read(directory: &Path) -> Result<Self> {
        let unreadable = |error: &io::Error| Error::io("read directory", directory, error);
        let entries = fs::read_dir(directory).map_err(|error| unreadable(&error))?;
        let identity = Some(identity_of(directory).map_err(|error| unreadable(&error))?);
        let mut queue = Queue { directory: Some(directory.to_path_buf()), identity, ..Queue::default() };
        for entry in entries {
            let entry = entry.map_err(|error| unreadable(&error))?;
            let (name, path) = (entry.file_name(), entry.path());
            let name = name.to_string_lossy();
            if name.starts_with('.') {
                continue;
            }
            // A link is refused as such: removing it would leave the file, and it may lead anywhere.
            let file_type = entry.file_type().map_err(|error| unreadable(&error))?;
            if name.ends_with(".tmp") {
                queue.unfinished.push(path);
                continue;
            }
            match wal_file(&path, file_type) {
                Ok(file) => queue.items.push(file),
                Err(cause) => queue.refused.push((path, cause)),
            }
        }
        queue.items.sort_unstable_by(|a, b| (a.name, &a.path).cmp(&(b.name, &b.path)));
        queue.refused.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        queue.unfinished.sort_unstable();
        Ok(queue)
    }

    /// The files in `directory` that pg_receivewal has received whole, as Barman's streaming archiver takes them: but for the
    /// newest segment, whole or in part, which tells pg_receivewal where to go on. Older parts are what a timeline ended with.
    /// A whole one of another size than that, where it is known, tells it nothing (pg_receivewal.c, `FindStreamingStart`).
    pub fn of_streaming_directory(directory: &Path, segment_size: Option<SegmentSize>) -> Result<Self> {
        let mut queue = Queue { is_streaming: true, ..Self::read(directory)? };
        let is_heeded =
            |file: &&WalFile| file.name.is_wal() && is_heeded_by_receiver(&file.name, &file.path, segment_size);
        let newest = queue.items.iter().filter(is_heeded).max_by_key(|file| {
            (file.name.segment().map(SegmentName::streaming_order), file.name.kind() == WalKind::Segment)
        });
        if let Some(path) = newest.map(|file| file.path.clone()) {
            queue.items.retain(|file| file.path != path);
            queue.unfinished.push(path);
        }
        Ok(queue)
    }

    /// The same, with the sources left where they are.
    pub fn keep_sources(mut self) -> Self {
        self.keeps_sources = true;
        self
    }

    /// The same, with at most so many files archived in one run. What cannot be archived takes nobody's place.
    pub fn in_batches_of(mut self, files: Option<usize>) -> Self {
        self.batch_size = files;
        self
    }

    /// How many files were seen, those that are none to archive among them.
    pub fn total(&self) -> usize {
        self.items.len() + self.refused.len() + self.unfinished.len()
    }

    /// The directory that sources are removed from.
    fn removes_from(&self) -> Option<&Path> {
        self.directory.as_deref().filter(|_| !self.keeps_sources)
    }

    /// Whether there is anything that [`Queue::set_refused_aside`] would set aside.
    pub fn has_to_set_aside(&self) -> bool {
        self.removes_from().is_some() && self.refused.iter().any(|(path, _)| is_regular(path))
    }

    /// Whether the directory is the one that was read: not unmounted, say.
    fn is_there(&self) -> bool {
        let directory = self.directory.as_deref();
        self.identity.is_some() && directory.and_then(|directory| identity_of(directory).ok()) == self.identity
    }

    /// What is settled without an archive.
    pub fn tell_unfinished(&self, each: &mut dyn FnMut(&Path, Outcome)) {
        for path in &self.unfinished {
            each(path, Outcome::Skipped(IN_THE_MAKING));
        }
    }

    /// Moves the files of the directory that are none to archive out of the way of those that come, by `put`, which makes a
    /// durable copy; whatever else lies there, and all where `put` is not given, is told of and stays. After the first that
    /// cannot be moved no other is tried. Fails as [`Queue::archive`] does.
    pub fn set_refused_aside(&self, put: Option<PutAside>, each: &mut dyn FnMut(&Path, Outcome)) -> Result<()> {
        let (mut aside, mut has_moved) = (put.zip(self.removes_from()), false);
        for (path, cause) in &self.refused {
            let outcome = match aside {
                Some((put, directory)) if is_regular(path) => set_aside(put, directory, path, Reason::Unknown, cause),
                _ => Outcome::Failed(cause.clone()),
            };
            let is_moved = matches!(outcome, Outcome::SetAside { .. });
            has_moved |= is_moved;
            aside = aside.filter(|_| is_moved || !matches!(outcome, Outcome::Failed(_)) || !is_regular(path));
            each(path, outcome);
        }
        self.removes_from().filter(|_| has_moved).map_or(Ok(()), durable::sync_directory)
    }

    /// Archives the files and tells what became of each. One file's failure does not stop those behind it; one of the
    /// archive itself does.
    ///
    /// Failures that may pass are tried again until the configured time has gone by without any success. Fails only
    /// where it is unknown whether the removal of sources is durable: then they may come back, and are found archived.
    pub fn archive(&self, archive: &Archive, each: &mut dyn FnMut(&Path, Outcome)) -> Result<()> {
        let mut run = Run {
            archive,
            queue: self,
            removes_from: self.removes_from(),
            // Who receives comes again by himself, and has the receiver to look after meanwhile.
            patience: match self.is_streaming {
                true => Patience::new(Duration::ZERO),
                false => Patience::new(archive.config().destination.retry_timeout),
            },
            is_open: false,
            has_failed: false,
            has_moved: false,
            each,
        };
        let mut synced = Ok(());
        let group = if archive.works_in_turn() { 1 } else { GROUP };
        let (mut items, mut left) = (self.items.iter().peekable(), self.batch_size.unwrap_or(usize::MAX));
        while left > 0 && items.peek().is_some() {
            let stored = items.by_ref().filter_map(|file| Some((file, run.store(file)?)));
            let stored: Vec<_> = stored.take(group.min(left)).collect();
            left -= stored.len();
            synced = synced.and(run.settle(stored));
        }
        synced
    }
}

/// The files of a queue on their way into the archive.
struct Run<'a> {
    archive: &'a Archive,
    queue: &'a Queue,
    removes_from: Option<&'a Path>,
    patience: Patience,
    is_open: bool,
    /// Whether the archive itself has failed: what is left is not tried.
    has_failed: bool,
    /// Whether a file was moved out of the directory, which is not durable yet.
    has_moved: bool,
    each: &'a mut dyn FnMut(&Path, Outcome),
}

impl Run<'_> {
    fn open(&mut self) -> Result<()> {
        if !self.is_open {
            // Nothing tells an unmounted directory from a new archive: no source is removed for its sake.
            let must_be_begun = self.removes_from.is_some() && !self.archive.has_marker();
            let opened = self.patience.attempt(|| match must_be_begun {
                true => self.archive.confirm_begun().map_err(|error| {
                    error.hint(match self.queue.is_streaming {
                        true => "Is the file system mounted?",
                        false => "Name the cluster's data directory with -D, or give --keep, to begin an archive.",
                    })
                }),
                false => self.archive.open(),
            });
            self.is_open = opened.is_ok();
            self.has_failed = opened.is_err();
            return opened;
        }
        Ok(())
    }

    /// Stores one file; nothing where that came to an end here.
    fn store(&mut self, file: &WalFile) -> Option<StoredFile> {
        if self.has_failed {
            (self.each)(&file.path, Outcome::Skipped(NOT_TRIED));
            return None;
        }
        let stored = self.open().and_then(|()| {
            if self.is_still_written(file)? {
                return Ok(None);
            }
            self.attempt(file).map(Some)
        });
        match stored {
            Ok(Some(stored)) => Some(stored),
            Ok(None) => {
                (self.each)(&file.path, Outcome::Skipped(STILL_WRITTEN));
                None
            }
            // Somebody else took it, from a directory that is still there.
            Err(error) if error.kind() == Kind::Source && error.is_missing_file() && self.queue.is_there() => {
                (self.each)(&file.path, Outcome::Skipped(GONE));
                None
            }
            Err(error) => {
                self.has_failed |= error.kind() == Kind::Identity;
                let outcome = match self.removes_from.filter(|_| error.kind() == Kind::Conflict) {
                    Some(directory) => {
                        let put = |path: &Path, reason| self.archive.set_aside(path, reason);
                        set_aside(&put, directory, &file.path, Reason::Duplicate, &error)
                    }
                    None => Outcome::Failed(error),
                };
                self.has_moved |= matches!(outcome, Outcome::SetAside { .. });
                (self.each)(&file.path, outcome);
                None
            }
        }
    }

    /// Stores one file; where hooks run around it, its line is written before the last of them.
    fn attempt(&mut self, file: &WalFile) -> Result<StoredFile> {
        let (archive, patience, has_failed) = (self.archive, &mut self.patience, &mut self.has_failed);
        if !archive.works_in_turn() {
            return patience.attempt(|| archive.store(file));
        }
        archive.archive_in_turn(file, || {
            let stored = patience.attempt(|| archive.store(file))?;
            let recorded = patience.attempt(|| archive.record(std::slice::from_ref(&stored)));
            *has_failed |= recorded.is_err();
            recorded.map(|()| stored)
        })
    }

    /// Whether a partial segment may be the one that a receiver is writing now. One that PostgreSQL leaves at a promotion
    /// comes with the history of the new timeline.
    fn is_still_written(&self, file: &WalFile) -> Result<bool> {
        let WalName::Partial(segment) = file.name else { return Ok(false) };
        if self.queue.directory.is_none() || self.queue.is_streaming {
            return Ok(false);
        }
        let is_later = |name: &WalName| matches!(name, WalName::History(timeline) if *timeline > segment.timeline);
        if self.queue.items.iter().any(|file| is_later(&file.name)) {
            return Ok(false);
        }
        for later in (1..=LATER_TIMELINES).filter_map(|step| segment.timeline.0.checked_add(step)) {
            if self.archive.holds(&WalName::History(Timeline(later)))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Records the stored files and removes their sources; fails where that could not be made durable.
    fn settle(&mut self, stored: Vec<(&WalFile, StoredFile)>) -> Result<()> {
        let has_moved = std::mem::take(&mut self.has_moved);
        if stored.is_empty() {
            return self.removes_from.filter(|_| has_moved).map_or(Ok(()), durable::sync_directory);
        }
        let lines: Vec<StoredFile> = stored.iter().map(|(_, stored)| stored.clone()).collect();
        let recorded = match self.archive.works_in_turn() {
            true => Ok(()),
            false => self.patience.attempt(|| self.archive.record(&lines)),
        };
        self.has_failed |= recorded.is_err();
        for (file, stored) in &stored {
            let removed = || self.removes_from.map_or(Ok(()), |_| remove_source(self.archive, file, &stored.stamp));
            let outcome = match &recorded {
                Err(error) => Outcome::Failed(error.clone()),
                Ok(()) => match removed() {
                    Err(error) => Outcome::NotRemoved(error),
                    Ok(()) if stored.created => Outcome::Archived,
                    Ok(()) => Outcome::AlreadyArchived,
                },
            };
            (self.each)(&file.path, outcome);
        }
        match self.removes_from.filter(|_| recorded.is_ok() || has_moved) {
            Some(directory) => durable::sync_directory(directory),
            None => Ok(()),
        }
    }
}

/// Removes the source of an archived file, unless it is another one by now, or the archived file itself.
fn remove_source(archive: &Archive, file: &WalFile, archived: &Stamp) -> Result<()> {
    let path = &file.path;
    let kept = |cause: &str| Error::new(Kind::Source, path.display().to_string(), cause);
    let source = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("stat file", path, &error)),
    };
    if Stamp::of(&source) != *archived {
        return Err(kept("it has changed since it was read").hint("The next run compares it with what was archived."));
    }
    if archive.is_stored_file(&file.name, &source)? {
        return Err(kept("it is the archived file itself").hint("Name a directory that lies outside the archive."));
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove file", path, &error)),
        _ => Ok(()),
    }
}

/// Makes a durable copy of a file among those that were set aside.
pub type PutAside<'a> = &'a dyn Fn(&Path, Reason) -> Result<Copied>;

/// Moves a file out of the way, which was not archived for that cause. A copy is made only where the source can be removed:
/// each run would make another.
fn set_aside(put: PutAside, directory: &Path, path: &Path, reason: Reason, cause: &Error) -> Outcome {
    let removable = access(directory, AccessFlags::W_OK | AccessFlags::X_OK);
    let moved = removable.map_err(|errno| Error::io("remove files from directory", directory, &errno.into()));
    let moved = moved.and_then(|()| put(path, reason)).and_then(|copied| {
        let is_the_same = fs::symlink_metadata(path).is_ok_and(|meta| Stamp::of(&meta) == copied.stamp);
        let changed = || Error::new(Kind::Source, path.display().to_string(), "it has changed since it was read");
        if !is_the_same {
            return Err(changed());
        }
        fs::remove_file(path).map_err(|error| Error::io("remove file", path, &error))?;
        Ok(copied.location)
    });
    match moved {
        Ok(location) => Outcome::SetAside { cause: cause.clone(), location },
        Err(error) if error.is_missing_file() && error.subject() == path.display().to_string() => {
            Outcome::Skipped(GONE)
        }
        Err(error) => Outcome::Failed(cause.clone().hint(format!("It stays where it is: {error}."))),
    }
}

fn is_regular(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file())
}

fn identity_of(directory: &Path) -> io::Result<(u64, u64)> {
    fs::metadata(directory).map(|meta| (meta.dev(), meta.ino()))
}

/// Whether pg_receivewal goes by that file, a segment whole or in part, to find where to go on.
pub fn is_heeded_by_receiver(name: &WalName, path: &Path, segment_size: Option<SegmentSize>) -> bool {
    let Some(size) = segment_size.filter(|_| name.kind() == WalKind::Segment) else { return true };
    fs::metadata(path).is_ok_and(|meta| meta.len() == size.bytes())
}

/// Fails where the directory is a server's own, or part of an archive, by whatever path: what lies there is not to be removed.
pub fn confirm_may_be_emptied(directory: &Path) -> Result<()> {
    if directory.join("archive_status").is_dir() {
        let path = directory.display().to_string();
        return Err(Error::new(Kind::Source, path.clone(), format!("\"{path}\" is the WAL directory of a server"))
            .detail("Its newest segments are still being written, and the server removes the others by itself.")
            .hint("Let that server archive them, or name a directory of its own for what is brought or received."));
    }
    if directory.join("PG_VERSION").exists() || directory.join("global/pg_control").exists() {
        let path = directory.display().to_string();
        return Err(Error::new(Kind::Source, path.clone(), format!("\"{path}\" is the data directory of a server"))
            .hint("Name a directory of its own for what is brought or received."));
    }
    if directory.join("identity.json").exists() || directory.join("wals").is_dir() {
        return Err(is_part_of_an_archive(directory));
    }
    let Ok(real) = directory.canonicalize() else { return Ok(()) };
    let is_catalogue = |name: &str| name.ends_with("-xlog.db") || name == "xlog.db";
    let holds_catalogue = |wals: &Path| {
        let entries = fs::read_dir(wals).into_iter().flatten().flatten();
        entries.take(10_000).any(|entry| entry.file_name().to_str().is_some_and(is_catalogue))
    };
    let has_identity = |folder: &Path| folder.parent().is_some_and(|server| server.join("identity.json").exists());
    let is_beside_wals = real.file_name().is_some_and(|name| name == "errors" || name == "partial" || name == "sums");
    let mut wals = real.ancestors().take(3).filter(|path| path.file_name().is_some_and(|name| name == "wals"));
    if is_beside_wals && has_identity(&real) || wals.any(|wals| has_identity(wals) || holds_catalogue(wals)) {
        return Err(is_part_of_an_archive(directory));
    }
    Ok(())
}

fn is_part_of_an_archive(directory: &Path) -> Error {
    let path = directory.display().to_string();
    Error::new(Kind::Source, path.clone(), format!("\"{path}\" is part of an archive"))
        .hint("Name a directory of its own for what is brought or received.")
}

/// The file to be archived at `path`, by its name and type.
fn wal_file(path: &Path, file_type: FileType) -> Result<WalFile> {
    let refused = |cause: String| Error::new(Kind::Source, path.display().to_string(), cause);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = WalName::parse(&name).map_err(|bad| refused(bad.to_string()))?;
    if !file_type.is_file() {
        return Err(refused("it is not a regular file".to_string()));
    }
    Ok(WalFile { name, path: path.to_path_buf() })
}

/// How long failures that may pass are tried again: until the timeout has gone by without a success.
struct Patience {
    timeout: Duration,
    last_success: Instant,
}

impl Patience {
    fn new(timeout: Duration) -> Self {
        Patience { timeout, last_success: Instant::now() }
    }

    fn attempt<T>(&mut self, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        loop {
            match attempt() {
                // A source that changes meanwhile would keep the others waiting; it comes again with the next run.
                Err(error)
                    if error.is_worth_retrying()
                        && error.kind() != Kind::Source
                        && self.last_success.elapsed() + PAUSE < self.timeout =>
                {
                    std::thread::sleep(PAUSE);
                }
                Ok(done) => {
                    self.last_success = Instant::now();
                    return Ok(done);
                }
                other => return other,
            }
        }
    }
}
