//! The folder below pg_wal that segments wait in, and what its names tell.
//!
//! ```text
//! 000000010000000200000042.<seal>     a segment that was verified; the seal says as what
//! 000000010000000200000043.<owner>    a segment that is being fetched
//! position                            what the server was given last
//! lock                                held by the one helper
//! ```
//! PostgreSQL looks at names of WAL directly in pg_wal only, and base backups leave out all that lies there. pg_rewind copies
//! and removes it as any file, which the seals and the lock bear: a copy is another file.

use super::plan::Position;
use crate::config::{Setting, Settings};
use crate::durable;
use crate::error::{Error, Result};
use crate::hash::Hash;
use crate::owner::Owner;
use crate::stamp::Stamp;
use crate::wal::{SegmentName, SegmentSize, WalName};
use std::fmt::Display;
use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const NAME: &str = "archiver_prefetch";
const POSITION: &str = "position";
const LOCK: &str = "lock";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Far more than we ever write.
const LONGEST_POSITION: u64 = 256;
const MOST_ENTRIES: usize = 10_000;

/// What a prefetched segment belongs to: the settings it was fetched under, those that name the archive among them, the
/// cluster it was fetched for, and this run of the machine, whose end may tear what was never synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin(Hash);

impl Origin {
    /// Where segments come from under these settings, for that cluster, now. Fails where the kernel does not tell one run
    /// from another (random(4), boot_id).
    pub fn new(settings: &Settings, system_identifier: u64) -> Result<Self> {
        let boot = fs::read_to_string(BOOT_ID).map_err(|error| Error::io("read file", Path::new(BOOT_ID), &error))?;
        Ok(Self::in_run(&boot, settings, system_identifier))
    }

    fn in_run(boot: &str, settings: &Settings, system_identifier: u64) -> Self {
        let values = Setting::ALL.map(|setting| settings.get(setting).to_string());
        let whose = system_identifier.to_string();
        Origin(hash_of(values.iter().map(String::as_str).chain([whose.as_str(), boot])))
    }

    /// What the name of a verified segment ends with. A file that was written to since, another one, or one from elsewhere
    /// has another seal than its name says.
    pub fn seal(&self, segment: SegmentName, stamp: &Stamp) -> Hash {
        hash_of([&self.0 as &dyn Display, &segment, stamp])
    }
}

fn hash_of(parts: impl IntoIterator<Item = impl Display>) -> Hash {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        let part = part.to_string();
        // No two lists of parts are hashed alike.
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    Hash(hasher.finalize())
}

/// What a name in the folder tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Verified(SegmentName, Hash),
    InProgress(SegmentName),
}

impl Entry {
    fn parse(name: &str) -> Option<Self> {
        let (segment, rest) = name.split_once('.')?;
        let WalName::Segment(segment) = WalName::parse(segment).ok()? else { return None };
        match Hash::from_hex(rest) {
            Some(seal) => Some(Entry::Verified(segment, seal)),
            None => Owner::of_name(rest).map(|_| Entry::InProgress(segment)),
        }
    }
}

/// What there is of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// All of it, under that name, with that seal in it.
    Verified(PathBuf, Hash),
    /// So many bytes until now.
    InProgress(u64),
    /// Nothing.
    Nothing,
}

/// What the server was given last, and from where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// Where the server stands.
    pub position: Position,
    /// Where that segment came from.
    pub origin: Origin,
}

impl Note {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.strip_suffix('\n')?.split(' ');
        let WalName::Segment(segment) = WalName::parse(words.next()?).ok()? else { return None };
        let segment_size = SegmentSize::new(words.next()?.parse().ok()?)?;
        let origin = Origin(Hash::parse(words.next()?)?);
        words.next().is_none().then_some(Note { position: Position { segment, segment_size }, origin })
    }

    fn text(&self) -> String {
        let Position { segment, segment_size } = self.position;
        format!("{segment} {} {}\n", segment_size.bytes(), self.origin.0)
    }
}

/// The folder of one data directory, which may not be there.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder of that data directory.
    pub fn of_data_directory(data_directory: &Path) -> Self {
        Folder { path: data_directory.join("pg_wal").join(NAME) }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, where it is not there.
    pub fn create(&self) -> Result<()> {
        durable::create_directory(&self.path, durable::mode_for_file_in(durable::directory_of(&self.path)))
    }

    fn entries(&self) -> impl Iterator<Item = (PathBuf, Entry)> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().take(MOST_ENTRIES).flatten();
        entries.filter_map(|entry| Some((entry.path(), Entry::parse(entry.file_name().to_str()?)?)))
    }

    /// What there is of that segment.
    pub fn find(&self, wanted: SegmentName) -> Found {
        let mut found = Found::Nothing;
        for (path, entry) in self.entries() {
            match entry {
                Entry::Verified(segment, seal) if segment == wanted => return Found::Verified(path, seal),
                Entry::InProgress(segment) if segment == wanted => {
                    found = Found::InProgress(fs::metadata(path).map_or(0, |meta| meta.len()));
                }
                _ => {}
            }
        }
        found
    }

    /// The name of a verified segment.
    pub fn verified_path(&self, segment: SegmentName, seal: &Hash) -> PathBuf {
        self.path.join(format!("{segment}.{}", seal.0.to_hex()))
    }

    /// Removes a verified segment. Whoever takes it at this moment has it.
    pub fn remove(&self, unwanted: SegmentName) {
        for (path, entry) in self.entries() {
            if matches!(entry, Entry::Verified(segment, _) if segment == unwanted) {
                // Taken just now: gone as well.
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Notes what the server is given.
    pub fn note(&self, note: &Note) -> Result<()> {
        durable::replace_file(&self.path.join(POSITION), note.text().as_bytes(), false)
    }

    /// What was noted last; it has another stamp each time.
    pub fn noted(&self) -> Option<(Note, Stamp)> {
        let mut file = File::open(self.path.join(POSITION)).ok()?;
        let mut text = String::new();
        file.by_ref().take(LONGEST_POSITION).read_to_string(&mut text).ok()?;
        Some((Note::parse(&text)?, Stamp::of(&file.metadata().ok()?)))
    }

    /// Whether a helper works here.
    pub fn is_served(&self) -> bool {
        let lock = File::open(self.path.join(LOCK));
        lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }

    /// Becomes the one that works here, unless there is one.
    pub fn lock(&self) -> Option<Lock> {
        let path = self.path.join(LOCK);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path).ok()?;
        file.try_lock().ok()?;
        let lock = Lock { file, path };
        lock.is_in_place().then_some(lock)
    }

    /// Removes all segments, those in progress, too. Only for the one that works here.
    pub fn clear(&self, _lock: &Lock) {
        for (path, _) in self.entries() {
            // Taken just now: gone as well.
            let _ = fs::remove_file(path);
        }
    }

    /// Removes the folder, unless somebody works there.
    pub fn sweep(&self) {
        // The lock is made where it is missing, but not the folder.
        if let Some(lock) = self.lock() {
            self.remove_all(&lock);
        }
    }

    /// Removes the folder with all that is in it. Only for the one that works here.
    pub fn remove_all(&self, lock: &Lock) {
        /// Somebody may note something meanwhile.
        const ATTEMPTS: usize = 3;
        if lock.is_in_place() {
            let _ = (0..ATTEMPTS).find(|_| fs::remove_dir_all(&self.path).is_ok());
        }
    }
}

/// Held by the one helper of a folder. The kernel takes it from whoever dies.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Whether it is the lock of the folder that stands there now: one that was removed guards nothing.
    pub fn is_in_place(&self) -> bool {
        let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let (held, standing) = (self.file.metadata().map(identity), fs::metadata(&self.path).map(identity));
        matches!((held, standing), (Ok(held), Ok(standing)) if held == standing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "000000010000000200000042";

    fn segment(text: &str) -> SegmentName {
        WalName::parse(text).unwrap().segment().unwrap()
    }

    fn settings(storage: &str) -> Settings {
        let mut settings = Settings::default();
        settings.set(Setting::Storage, storage);
        settings
    }

    fn folder() -> (tempfile::TempDir, Folder) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("pg_wal")).unwrap();
        let folder = Folder::of_data_directory(directory.path());
        folder.create().unwrap();
        (directory, folder)
    }

    #[test]
    fn a_seal_holds_for_one_file_as_one_segment_from_one_archive_for_one_cluster_in_one_run_of_the_machine() {
        let (_directory, folder) = folder();
        let stamp = |name: &str| {
            let path = folder.path().join(name);
            fs::write(&path, "x").unwrap();
            Stamp::of_path(&path).unwrap()
        };
        let (file, other_file) = (stamp("file"), stamp("other"));
        let sealed = |boot, storage, system_identifier, name, file| {
            Origin::in_run(boot, &settings(storage), system_identifier).seal(segment(name), file)
        };
        let seal = sealed("boot", "file:///srv/wal", 7, NAME, &file);
        assert_eq!(seal, sealed("boot", "file:///srv/wal", 7, NAME, &file));
        for (what, other) in [
            ("file", sealed("boot", "file:///srv/wal", 7, NAME, &other_file)),
            ("segment", sealed("boot", "file:///srv/wal", 7, "000000020000000200000042", &file)),
            ("cluster", sealed("boot", "file:///srv/wal", 8, NAME, &file)),
            ("archive", sealed("boot", "file:///srv/other", 7, NAME, &file)),
            ("run of the machine", sealed("reboot", "file:///srv/wal", 7, NAME, &file)),
        ] {
            assert_ne!(seal, other, "another {what}");
        }
    }

    #[test]
    fn names_tell_what_is_whole_and_what_is_in_progress() {
        let seal = Hash(blake3::hash(b"x"));
        let whole = format!("{NAME}.{}", seal.0.to_hex());
        assert_eq!(Entry::parse(&whole), Some(Entry::Verified(segment(NAME), seal)));
        let in_progress = format!("{NAME}.{}", Owner::current().unique_name());
        assert_eq!(Entry::parse(&in_progress), Some(Entry::InProgress(segment(NAME))));
        for other in [
            "lock".to_string(),
            "position".to_string(),
            format!("position.{}", Owner::current().unique_name()),
            NAME.to_string(),
            format!("{NAME}.partial"),
            whole[..whole.len() - 1].to_string(),
            format!("00000002.history.{}", seal.0.to_hex()),
        ] {
            assert_eq!(Entry::parse(&other), None, "{other}");
        }
    }

    #[test]
    fn a_note_reads_back_and_nothing_else_does() {
        let (_directory, folder) = folder();
        let position = Position { segment: segment(NAME), segment_size: SegmentSize::DEFAULT };
        let note = Note { position, origin: Origin::new(&settings("file:///srv/wal"), 7).unwrap() };
        assert_eq!(folder.noted(), None);
        folder.note(&note).unwrap();
        let (read, first) = folder.noted().unwrap();
        assert_eq!(read, note);
        folder.note(&note).unwrap();
        assert_ne!(folder.noted().unwrap().1, first, "the same again is news");
        let text = note.text();
        for wrong in ["", &text[..text.len() - 1], &text[..30], &format!("{NAME} 17 {}\n", note.origin.0)] {
            assert_eq!(Note::parse(wrong), None, "{wrong:?}");
        }
        fs::write(folder.path().join(POSITION), [0xFF; 300]).unwrap();
        assert_eq!(folder.noted(), None);
    }

    #[test]
    fn one_works_at_a_time_and_a_removed_lock_guards_nothing() {
        let (_directory, folder) = folder();
        assert!(!folder.is_served());
        let lock = folder.lock().unwrap();
        assert!(folder.is_served() && folder.lock().is_none() && lock.is_in_place());
        fs::remove_file(folder.path().join(LOCK)).unwrap();
        assert!(!folder.is_served() && !lock.is_in_place());
        folder.remove_all(&lock);
        assert!(folder.path().exists(), "it is another's now");
        let next = folder.lock().unwrap();
        folder.sweep();
        assert!(folder.path().exists(), "somebody works there");
        drop(next);
        folder.sweep();
        assert!(!folder.path().exists());
        assert!(folder.lock().is_none());
    }

    #[test]
    fn what_is_there_is_found_and_removed() {
        let (_directory, folder) = folder();
        let seal = Hash(blake3::hash(b"x"));
        let [whole, in_progress, absent] = [NAME, "000000010000000200000043", "000000010000000200000044"].map(segment);
        let path = folder.verified_path(whole, &seal);
        fs::write(&path, "x").unwrap();
        let staged = folder.path().join(format!("{in_progress}.{}", Owner::current().unique_name()));
        fs::write(&staged, "some").unwrap();
        assert_eq!(folder.find(whole), Found::Verified(path.clone(), seal));
        assert_eq!(folder.find(in_progress), Found::InProgress(4));
        assert_eq!(folder.find(absent), Found::Nothing);
        folder.remove(in_progress);
        assert!(staged.exists(), "whoever fetches it would publish nothing");
        folder.remove(whole);
        assert!(!path.exists());
        let lock = folder.lock().unwrap();
        folder.clear(&lock);
        assert!(!staged.exists() && lock.is_in_place());
    }
}
