//! The directory that WAL is received in: whose turn it is to work there, and what pg_receivewal is to find.

use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::file_lock;
use crate::incoming::RECEIVER_LOCK;
use crate::mode::Mode;
use crate::part::received_bytes;
use crate::wal::{LongPageHeader, Lsn, SegmentName, SegmentSize, WalName};
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

    /// The same, which is made where it is missing.
    pub fn make(path: &Path, mode: Mode) -> Result<Self> {
        // One above it, too: beside an archive that is still to begin. Never what storage is mounted on.
        durable::create_directory(durable::directory_of(path), mode)?;
        durable::create_directory(path, mode)?;
        Ok(Folder::at(path))
    }

    /// Takes that right. Fails where another receiver has it.
    pub fn take(&self, right: Right) -> Result<Held> {
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
        let taken = file_lock::acquire(&lock, LOCK_PATIENCE, || false);
        if !taken.map_err(|error| Error::io("lock file", &lock_path, &error))? {
            let shown = self.path.display().to_string();
            return Err(Error::new(
                Kind::Configuration,
                shown.clone(),
                format!("another receiver works in \"{shown}\""),
            )
            .hint("One receiver serves one directory: set another archiver.streaming_wals_directory."));
        }
        Ok(Held(lock))
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

    /// The newest segment, whole or in part: where pg_receivewal goes on.
    pub fn newest(&self) -> Result<Option<Newest>> {
        let newest = self.names()?.into_iter().filter_map(|name| match name {
            WalName::Segment(segment) => Some((segment, false)),
            WalName::Partial(segment) => Some((segment, true)),
            _ => None,
        });
        // Of both the whole one: pg_receivewal takes it for the last.
        let newest = newest.max_by_key(|(segment, is_partial)| (segment.streaming_order(), !is_partial));
        Ok(newest.map(|(segment, is_partial)| Newest { segment, is_partial }))
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

    /// Fails where the newest segment there is another cluster's: what that server sends would be written over it.
    pub fn confirm_owner(&self, system_identifier: u64, segment_size: SegmentSize) -> Result<()> {
        let Some(newest) = self.newest()? else { return Ok(()) };
        let path = self.path.join(newest.name().to_string());
        let mut head = Vec::with_capacity(LongPageHeader::LENGTH);
        let file = File::open(&path).map_err(|error| Error::io("open file", &path, &error))?;
        let read = file.take(LongPageHeader::LENGTH as u64).read_to_end(&mut head);
        read.map_err(|error| Error::io("read file", &path, &error))?;
        // Of one that was just begun nothing is there yet.
        let Ok(header) = LongPageHeader::parse(&head) else { return Ok(()) };
        if header.system_identifier == system_identifier && header.segment_size == segment_size {
            return Ok(());
        }
        let shown = path.display().to_string();
        let message = format!("the WAL in \"{}\" is another cluster's", self.path.display());
        Err(Error::new(Kind::Identity, shown.clone(), message)
            .detail(format!(
                "\"{shown}\" was written by the cluster with system identifier {}; the server is {system_identifier}. Nothing was changed.",
                header.system_identifier
            ))
            .hint("Does archiver.streaming_conninfo lead to the right server? Another one gets a directory of its own."))
    }

    /// Lets receiving begin with `restart`, though the WAL before it was never received: `current` is where the server writes.
    /// Barman's rules: nothing is done where nothing lies there yet, or `restart` or newer does; refused where newer WAL than the
    /// server's does. Other than there the part that was received last stays: it is archived as what it is.
    pub fn reset(&self, restart: SegmentName, current: SegmentName) -> Result<Reset> {
        let Some(newest) = self.newest()? else { return Ok(Reset::NothingToDo) };
        let (there, is_same_timeline) = (newest.segment.streaming_order(), newest.segment.timeline == restart.timeline);
        let is_ahead = there > current.streaming_order();
        if !is_ahead && is_same_timeline && there >= restart.streaming_order() {
            return Ok(Reset::NothingToDo);
        }
        if is_ahead || there >= restart.streaming_order() {
            let (path, newest) = (self.path.display(), newest.segment);
            let message = format!("the newest WAL in \"{path}\", {newest}, lies behind that of the server, {current}");
            return Err(Error::new(Kind::Conflict, path.to_string(), message).detail("Nothing was changed.").hint(
                "Is it the right server? One that was restored to an earlier time gets a directory of its own.",
            ));
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
    fn a_reset_follows_barmans_rules() {
        let reset = |files: &[(&str, u64)], restart, current| {
            let (_directory, folder) = folder_with(files);
            let done = folder.reset(segment(restart), segment(current));
            (done, names(&folder))
        };
        assert_eq!(reset(&[], 9, 9).0.unwrap(), Reset::NothingToDo);
        assert_eq!(reset(&[(FIFTH, 1)], 5, 9).0.unwrap(), Reset::NothingToDo);
        assert_eq!(reset(&[(FIFTH, 1), (SIXTH_PARTIAL, 1)], 6, 9).0.unwrap(), Reset::NothingToDo);
        let (refused, left) = reset(&[(FIFTH, 1), (SIXTH_PARTIAL, 1)], 4, 4);
        assert!(refused.unwrap_err().message().contains("lies behind that of the server"));
        assert_eq!(left, [FIFTH, SIXTH_PARTIAL]);
        assert_eq!(reset(&[(FIFTH, 1), (SIXTH_PARTIAL, 1)], 5, 9).0.unwrap(), Reset::NothingToDo, "a slot lags");
        let ninth = format!("{}.partial", segment(9));
        let (done, left) = reset(&[(FIFTH, 1), (SIXTH_PARTIAL, 1)], 9, 10);
        // Nothing but zeros, of whatever length, is nothing received.
        assert_eq!((done.unwrap(), left), (Reset::To(segment(9)), vec![FIFTH.into(), ninth.clone()]));
        let (_directory, folder) = folder_with(&[(FIFTH, 1), (SIXTH_PARTIAL, 0)]);
        fs::write(folder.path().join(SIXTH_PARTIAL), header_of(segment(6))).unwrap();
        assert_eq!(folder.reset(segment(9), segment(10)).unwrap(), Reset::To(segment(9)));
        assert_eq!(names(&folder), [FIFTH.into(), SIXTH_PARTIAL.into(), ninth]);
        let (done, left) = reset(&[(FIFTH, 1)], 9, 10);
        assert_eq!((done.unwrap(), left.len()), (Reset::To(segment(9)), 2));
    }
}
