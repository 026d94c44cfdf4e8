//! The directory that WAL is received in: whose turn it is to work there, and what pg_receivewal is to find.

use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::file_lock;
use crate::incoming::{RECEIVER_LOCK, confirm_may_be_emptied, is_heeded_by_receiver};
use crate::mode::Mode;
use crate::part::received_bytes;
use crate::wal::{LongPageHeader, Lsn, SegmentName, SegmentSize, WalName};
use std::cmp::Reverse;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A hidden name is no WAL to anybody who reads the directory.
const MARKER: &str = ".archiver.established";

/// A streaming directory.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

/// A right that one has at a time; it ends when this is dropped.
#[derive(Debug)]
pub struct Held(#[expect(dead_code, reason = "its lock ends with it")] File);

/// What one may do in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Archive what is there, and remove it: as long as one works there.
    Archive,
    /// Receive: given free while one waits to try again, so that somebody can reset.
    Receive,
}

impl Right {
    fn lock(self) -> &'static str {
        match self {
            Right::Archive => ARCHIVING_LOCK,
            Right::Receive => RECEIVER_LOCK,
        }
    }
}

const ARCHIVING_LOCK: &str = ".archiver-receive-wal.archiving.lock";
/// Who only looks whether somebody has it holds the lock for a moment.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);
/// For an attempt to receive that is about to fail again.
const ATTEMPT_PATIENCE: Duration = Duration::from_secs(10);

/// The newest segment that lies there, whole or in part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newest {
    /// Its name.
    pub segment: SegmentName,
    /// Whether only a part of it was received.
    pub is_partial: bool,
}

/// What a reset did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reset {
    /// Receiving goes on where it is.
    NothingToDo,
    /// It begins with this segment, of which an empty part lies there now.
    To(SegmentName),
}

impl Folder {
    /// The directory at `path`, as it is.
    pub fn at(path: &Path) -> Self {
        Folder { path: path.to_path_buf() }
    }

    /// The same, which is made where it is missing. Fails where it is a server's own, or part of an archive.
    pub fn make(path: &Path, mode: Mode) -> Result<Self> {
        confirm_may_be_emptied(path).map_err(|error| error.of_kind(Kind::Configuration))?;
        // One above it, too: beside an archive that is still to begin. Never what storage is mounted on.
        durable::create_directory(durable::directory_of(path), mode)?;
        durable::create_directory(path, mode)?;
        Ok(Folder::at(path))
    }

    /// Takes that right. Fails where another receiver has it.
    pub fn take(&self, right: Right) -> Result<Held> {
        self.take_within(LOCK_PATIENCE, right)?.ok_or_else(|| {
            self.is_in_use("One receiver serves one directory: set another archiver.streaming_wals_directory.")
        })
    }

    /// Takes the right to receive from a receiver that waits to try again, or is about to. Fails where it goes on.
    pub fn take_over(&self, is_receiving: bool) -> Result<Held> {
        let patience = if is_receiving { LOCK_PATIENCE } else { ATTEMPT_PATIENCE };
        self.take_within(patience, Right::Receive)?.ok_or_else(|| {
            self.is_in_use("End it first: switch archiver.streaming_archiver off, or stop \"archiver receive-wal\".")
        })
    }

    fn is_in_use(&self, hint: &str) -> Error {
        let shown = self.path.display().to_string();
        Error::new(Kind::Configuration, shown.clone(), format!("another receiver works in \"{shown}\"")).hint(hint)
    }

    fn take_within(&self, patience: Duration, right: Right) -> Result<Option<Held>> {
        let lock_path = self.path.join(right.lock());
        let open = || {
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&lock_path)
        };
        let lock = open().map_err(|error| Error::io("open lock file", &lock_path, &error))?;
        let taken = file_lock::acquire(&lock, patience, || false);
        let is_taken = taken.map_err(|error| Error::io("lock file", &lock_path, &error))?;
        Ok(is_taken.then_some(Held(lock)))
    }

    /// Whether somebody receives into the directory at `path`.
    pub fn is_taken(path: &Path) -> Result<bool> {
        let lock_path = path.join(RECEIVER_LOCK);
        let lock = match OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(&lock_path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io("open lock file", &lock_path, &error)),
        };
        let is_free = file_lock::acquire(&lock, Duration::ZERO, || false);
        is_free.map(|is_free| !is_free).map_err(|error| Error::io("lock file", &lock_path, &error))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is remembered which archives were begun from here.
    pub fn marker_path(&self) -> PathBuf {
        self.path.join(MARKER)
    }

    fn failed(&self, action: &str, error: &io::Error) -> Error {
        Error::io(action, &self.path, error)
    }

    /// The WAL files that lie there.
    fn names(&self) -> Result<Vec<WalName>> {
        let entries = fs::read_dir(&self.path).map_err(|error| self.failed("read directory", &error))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| self.failed("read directory", &error))?;
            if let Some(Ok(name)) = entry.file_name().to_str().map(WalName::parse) {
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The segments that pg_receivewal goes by, whole or in part, the newest first. Where the size of whole ones is known,
    /// others are none.
    fn segments(&self, segment_size: Option<SegmentSize>) -> Result<Vec<Newest>> {
        let names = self.names()?.into_iter();
        let is_heeded = |name: &WalName| is_heeded_by_receiver(name, &self.path.join(name.to_string()), segment_size);
        let mut segments: Vec<Newest> = names
            .filter_map(|name| match name {
                WalName::Segment(segment) if is_heeded(&name) => Some(Newest { segment, is_partial: false }),
                WalName::Partial(segment) => Some(Newest { segment, is_partial: true }),
                _ => None,
            })
            .collect();
        // Of both the whole one: pg_receivewal takes it for the last.
        segments.sort_unstable_by_key(|one| Reverse((one.segment.streaming_order(), !one.is_partial)));
        Ok(segments)
    }

    /// The newest segment, whole or in part: where pg_receivewal goes on.
    pub fn newest(&self, segment_size: Option<SegmentSize>) -> Result<Option<Newest>> {
        Ok(self.segments(segment_size)?.first().copied())
    }

    /// How far WAL was received; nothing where not even the beginning of that segment was.
    pub fn received(&self, newest: &Newest, segment_size: SegmentSize) -> Result<Option<Lsn>> {
        let path = self.path.join(newest.name().to_string());
        let bytes = match File::open(&path).and_then(received_bytes) {
            // What the last pages of a whole one lack are zeros.
            Ok(_) if !newest.is_partial => segment_size.bytes(),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(Error::io("read file", &path, &error)),
        };
        let start = newest.segment.start(segment_size).filter(|_| bytes > 0);
        Ok(start.map(|start| Lsn(start.0 + bytes)))
    }

    /// Mends the newest partial segment where a crash left it shorter than pg_receivewal makes it: emptied, it is received
    /// again from its beginning; as it is, pg_receivewal would refuse to start (receivelog.c, `open_walfile`). Answers its name
    /// where that was done.
    pub fn mend_partial(&self, segment_size: SegmentSize) -> Result<Option<WalName>> {
        let partial = self.names()?.into_iter().filter_map(|name| match name {
            WalName::Partial(segment) => Some(segment),
            _ => None,
        });
        let partial = partial.max_by_key(|segment| segment.streaming_order()).map(WalName::Partial);
        let Some(partial) = partial else { return Ok(None) };
        let path = self.path.join(partial.to_string());
        let length = fs::metadata(&path).map_err(|error| Error::io("stat file", &path, &error))?.len();
        if length == 0 || length == segment_size.bytes() {
            return Ok(None);
        }
        let file = File::options().write(true).open(&path).map_err(|error| Error::io("open file", &path, &error))?;
        file.set_len(0).and_then(|()| file.sync_all()).map_err(|error| Error::io("truncate file", &path, &error))?;
        Ok(Some(partial))
    }

    /// Fails where the newest segment there that says so is another cluster's: what that server sends would be written over
    /// it, or behind it.
    pub fn confirm_owner(&self, system_identifier: u64, segment_size: SegmentSize) -> Result<()> {
        let header_at = |path: &Path| {
            let mut head = Vec::with_capacity(LongPageHeader::LENGTH);
            let file = File::open(path).map_err(|error| Error::io("open file", path, &error))?;
            let read = file.take(LongPageHeader::LENGTH as u64).read_to_end(&mut head);
            read.map_err(|error| Error::io("read file", path, &error))?;
            Ok::<_, Error>(LongPageHeader::parse(&head).ok())
        };
        for segment in self.segments(None)? {
            let path = self.path.join(segment.name().to_string());
            let header = match header_at(&path) {
                // Of one that was just begun nothing is there yet.
                Ok(None) => continue,
                // Whoever archives has removed it.
                Err(error) if error.is_missing_file() => continue,
                Ok(Some(header)) => header,
                Err(error) => return Err(error),
            };
            if header.system_identifier == system_identifier && header.segment_size == segment_size {
                return Ok(());
            }
            let shown = path.display().to_string();
            let message = format!("the WAL in \"{}\" is another cluster's", self.path.display());
            return Err(Error::new(Kind::Identity, shown.clone(), message)
                .detail(format!(
                    "\"{shown}\" was written by the cluster with system identifier {}; the server is {system_identifier}. Nothing was changed.",
                    header.system_identifier
                ))
                .hint("Does archiver.streaming_conninfo lead to the right server? Another one gets a directory of its own."));
        }
        Ok(())
    }

    /// Lets receiving begin with `restart`, though the WAL before it was never received: `current` is where the server writes.
    /// Barman's rules: nothing is done where nothing lies there yet, or `restart` or newer does; refused where newer WAL than the
    /// server's does. Other than there the part that was received last stays: it is archived as what it is.
    pub fn reset(&self, restart: SegmentName, current: SegmentName, segment_size: SegmentSize) -> Result<Reset> {
        let Some(newest) = self.newest(Some(segment_size))? else { return Ok(Reset::NothingToDo) };
        let (there, is_same_timeline) = (newest.segment.streaming_order(), newest.segment.timeline == restart.timeline);
        let refused = |what: String, hint: &str| {
            let path = self.path.display();
            let message = format!("the newest WAL in \"{path}\", {}, {what}", newest.segment);
            Err(Error::new(Kind::Conflict, path.to_string(), message).detail("Nothing was changed.").hint(hint))
        };
        if there > current.streaming_order() {
            return refused(
                format!("is newer than that of the server, {current}"),
                "Is it the right server? One that was restored to an earlier time gets a directory of its own.",
            );
        }
        if there >= restart.streaming_order() {
            return match is_same_timeline {
                true => Ok(Reset::NothingToDo),
                false => refused(
                    format!("is of another timeline than what the server keeps, from {restart} on"),
                    "Without a reset receiving goes on there, where the server's history has it; else keep that file elsewhere.",
                ),
            };
        }
        let empty = self.path.join(WalName::Partial(restart).to_string());
        let made =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&empty).and_then(|file| file.sync_all());
        made.map_err(|error| Error::io("create file", &empty, &error))?;
        let before = self.path.join(newest.name().to_string());
        // Also one that a crash of the machine has left as zeros.
        let is_empty = || File::open(&before).and_then(received_bytes).is_ok_and(|bytes| bytes == 0);
        if newest.is_partial && is_empty() {
            fs::remove_file(&before).map_err(|error| Error::io("remove file", &before, &error))?;
        }
        durable::sync_directory(&self.path)?;
        Ok(Reset::To(restart))
    }
}

impl Newest {
    /// The name of its file.
    pub fn name(&self) -> WalName {
        if self.is_partial { WalName::Partial(self.segment) } else { WalName::Segment(self.segment) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::incoming::Queue;
    use crate::wal::Timeline;

    fn folder_with(files: &[(&str, u64)]) -> (tempfile::TempDir, Folder) {
        let directory = tempfile::tempdir().unwrap();
        let folder = Folder::make(&directory.path().join("streaming"), Mode::PRIVATE).unwrap();
        for (name, size) in files {
            File::create(folder.path().join(name)).unwrap().set_len(*size).unwrap();
        }
        (directory, folder)
    }

    fn segment(number: u64) -> SegmentName {
        SegmentName::numbered(Timeline(1), number, SegmentSize::DEFAULT)
    }

    fn header_of(segment: SegmentName) -> [u8; LongPageHeader::LENGTH] {
        let header = LongPageHeader {
            magic: 0xD110,
            timeline: segment.timeline,
            page_address: segment.start(SegmentSize::DEFAULT).unwrap(),
            system_identifier: 7,
            segment_size: SegmentSize::DEFAULT,
            page_bytes: 8192,
        };
        header.to_bytes()
    }

    fn names(folder: &Folder) -> Vec<String> {
        let mut names: Vec<String> = folder.names().unwrap().iter().map(WalName::to_string).collect();
        names.sort();
        names
    }

    const FIFTH: &str = "000000010000000000000005";
    const SIXTH_PARTIAL: &str = "000000010000000000000006.partial";
    const WHOLE: u64 = 16 << 20;

    #[test]
    fn a_directory_has_one_receiver() {
        let (_directory, folder) = folder_with(&[]);
        assert!(!Folder::is_taken(folder.path()).unwrap());
        let _other = folder.take(Right::Archive).unwrap();
        let turn = folder.take(Right::Receive).unwrap();
        let error = folder.take(Right::Receive).unwrap_err();
        assert!(error.message().starts_with("another receiver works in"), "{error}");
        assert!(Folder::is_taken(folder.path()).unwrap());
        drop(turn);
        assert!(!Folder::is_taken(folder.path()).unwrap());
        folder.take(Right::Receive).unwrap();
        assert!(folder.take(Right::Archive).is_err());
    }

    #[test]
    fn only_the_newest_partial_segment_and_only_one_of_a_wrong_size_is_emptied() {
        let whole = SegmentSize::DEFAULT.bytes();
        for (size, after) in [(0, 0), (whole, whole), (4096, 0), (whole + 1, 0)] {
            let (_directory, folder) =
                folder_with(&[("000000010000000000000004.partial", 7), (SIXTH_PARTIAL, size), (FIFTH, 9)]);
            let mended = folder.mend_partial(SegmentSize::DEFAULT).unwrap();
            assert_eq!(mended.map(|name| name.to_string()), (size != after).then(|| SIXTH_PARTIAL.to_string()));
            let length = |name: &str| fs::metadata(folder.path().join(name)).unwrap().len();
            assert_eq!(
                (length(SIXTH_PARTIAL), length("000000010000000000000004.partial"), length(FIFTH)),
                (after, 7, 9)
            );
        }
        assert_eq!(folder_with(&[(FIFTH, 9)]).1.mend_partial(SegmentSize::DEFAULT).unwrap(), None);
    }

    #[test]
    fn a_directory_of_a_server_or_of_an_archive_is_none_to_receive_into() {
        let directory = tempfile::tempdir().unwrap();
        for below in ["pg_wal/archive_status", "archive/main/wals/0000000100000000", "archive/main/partial"] {
            fs::create_dir_all(directory.path().join(below)).unwrap();
        }
        fs::write(directory.path().join("archive/main/identity.json"), "{}").unwrap();
        let made = |path: &str| Folder::make(&directory.path().join(path), Mode::PRIVATE);
        fs::create_dir_all(directory.path().join("data/global")).unwrap();
        fs::write(directory.path().join("data/PG_VERSION"), "18").unwrap();
        let refused = [
            "pg_wal",
            "data",
            "archive/main",
            "archive/main/wals",
            "archive/main/wals/0000000100000000",
            "archive/main/partial",
        ];
        for path in refused {
            assert_eq!(made(path).unwrap_err().kind(), Kind::Configuration, "{path}");
        }
        made("archive/main/streaming").unwrap().take(Right::Receive).unwrap();
        made("archive/main/streaming").unwrap();
    }

    #[test]
    fn what_pg_receivewal_does_not_go_by_is_not_the_newest() {
        let (seventh, size) = ("000000010000000000000007", Some(SegmentSize::DEFAULT));
        let (_directory, folder) = folder_with(&[(FIFTH, WHOLE), (SIXTH_PARTIAL, WHOLE), (seventh, 9)]);
        let newest = |size| folder.newest(size).unwrap().unwrap().name().to_string();
        assert_eq!((newest(size), newest(None)), (SIXTH_PARTIAL.to_string(), seventh.to_string()));
        // So nobody archives, and removes, what is being received.
        let queue = Queue::of_streaming_directory(folder.path(), size).unwrap();
        let items: Vec<_> = queue.items.iter().map(|file| file.name.to_string()).collect();
        assert_eq!(items, [FIFTH, seventh]);
    }

    #[test]
    fn whose_wal_lies_there_the_newest_tells_that_can() {
        let (_directory, folder) = folder_with(&[(SIXTH_PARTIAL, WHOLE)]);
        folder.confirm_owner(8, SegmentSize::DEFAULT).unwrap();
        fs::write(folder.path().join(FIFTH), header_of(segment(5))).unwrap();
        folder.confirm_owner(7, SegmentSize::DEFAULT).unwrap();
        let error = folder.confirm_owner(8, SegmentSize::DEFAULT).unwrap_err();
        assert_eq!(error.kind(), Kind::Identity, "{error}");
    }

    #[test]
    fn a_reset_follows_barmans_rules() {
        let reset = |files: &[(&str, u64)], restart, current| {
            let (_directory, folder) = folder_with(files);
            let done = folder.reset(segment(restart), segment(current), SegmentSize::DEFAULT);
            (done, names(&folder))
        };
        assert_eq!(reset(&[], 9, 9).0.unwrap(), Reset::NothingToDo);
        assert_eq!(reset(&[(FIFTH, WHOLE)], 5, 9).0.unwrap(), Reset::NothingToDo);
        assert_eq!(reset(&[(FIFTH, WHOLE), (SIXTH_PARTIAL, 1)], 6, 9).0.unwrap(), Reset::NothingToDo);
        let (refused, left) = reset(&[(FIFTH, WHOLE), (SIXTH_PARTIAL, 1)], 4, 4);
        assert!(refused.unwrap_err().message().contains("is newer than that of the server"));
        assert_eq!(left, [FIFTH, SIXTH_PARTIAL]);
        assert_eq!(reset(&[(FIFTH, WHOLE), (SIXTH_PARTIAL, 1)], 5, 9).0.unwrap(), Reset::NothingToDo, "a slot lags");
        let ninth = format!("{}.partial", segment(9));
        let (done, left) = reset(&[(FIFTH, WHOLE), (SIXTH_PARTIAL, 1)], 9, 10);
        // Nothing but zeros, of whatever length, is nothing received.
        assert_eq!((done.unwrap(), left), (Reset::To(segment(9)), vec![FIFTH.into(), ninth.clone()]));
        let (_directory, folder) = folder_with(&[(FIFTH, WHOLE), (SIXTH_PARTIAL, 0)]);
        fs::write(folder.path().join(SIXTH_PARTIAL), header_of(segment(6))).unwrap();
        assert_eq!(folder.reset(segment(9), segment(10), SegmentSize::DEFAULT).unwrap(), Reset::To(segment(9)));
        assert_eq!(names(&folder), [FIFTH.into(), SIXTH_PARTIAL.into(), ninth]);
        let (done, left) = reset(&[(FIFTH, WHOLE)], 9, 10);
        assert_eq!((done.unwrap(), left.len()), (Reset::To(segment(9)), 2));
    }
}
