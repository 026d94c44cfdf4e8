//! Barman's catalogue of a local archive: one line a file, exactly one, appended under Barman's own lock.
//!
//! A crash between storing a file and appending its line is healed when PostgreSQL offers the file again;
//! a line torn by a crash is cut before the next one is appended.

use crate::codec::Compression;
use crate::crypt::Encryption;
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::layout::Format;
use crate::mode::Mode;
use crate::pulse::Pulse;
use crate::wal::WalName;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions, Permissions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// One archived file, as its line tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// The file.
    pub name: WalName,
    /// Bytes as stored.
    pub stored_size: u64,
    /// Modification time of the source.
    pub modified: SystemTime,
    /// The format it is stored in.
    pub format: Format,
}

impl Entry {
    /// `name`, stored size, modification time, compression and encryption, parted by tabs; what there is not is `None`.
    fn line(&self) -> String {
        let compression = match self.format.compression {
            Compression::None => "None",
            other => other.name(),
        };
        let encryption = match self.format.encryption {
            Encryption::None => "None",
            Encryption::OpenPgp => "gpg",
        };
        let modified = python_float(self.modified);
        format!("{}\t{}\t{modified}\t{compression}\t{encryption}\n", self.name, self.stored_size)
    }
}

/// A time as Python prints `os.stat().st_mtime`: seconds as a double, in its shortest spelling.
pub fn python_float(time: SystemTime) -> String {
    let since_epoch = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let seconds = since_epoch.as_secs() as f64 + 1e-9 * f64::from(since_epoch.subsec_nanos());
    format!("{seconds:?}")
}

/// A file to be recorded.
#[derive(Clone, Debug)]
pub struct NewLine {
    /// Its line.
    pub entry: Entry,
    /// Whether this process has just created the stored file. If not, its line may stand anywhere in the catalogue.
    pub created: bool,
}

/// How many of the newest names are kept in memory.
const MOST_RECENT: usize = 8192;
/// How long one call waits for the lock before it gives up and is tried again.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(10);

/// The catalogue of one archive.
pub struct Catalogue {
    path: PathBuf,
    lock_path: PathBuf,
    mode: Mode,
    pulse: Arc<Pulse>,
    seen: Mutex<Seen>,
}

/// How far this process has read the catalogue, and the newest names before that.
#[derive(Default)]
struct Seen {
    file: Option<(u64, u64)>,
    /// Where the last whole line ended.
    length: u64,
    recent: HashSet<WalName>,
    order: VecDeque<WalName>,
}

impl Seen {
    fn add(&mut self, name: WalName) {
        if self.recent.insert(name) {
            self.order.push_back(name);
        }
        if self.order.len() > MOST_RECENT
            && let Some(oldest) = self.order.pop_front()
        {
            self.recent.remove(&oldest);
        }
    }
}

impl Catalogue {
    /// The catalogue at `path`, guarded by the lock file at `lock_path`. Nothing is opened yet.
    pub fn new(path: PathBuf, lock_path: PathBuf, mode: Mode, pulse: Arc<Pulse>) -> Self {
        Catalogue { path, lock_path, mode, pulse, seen: Mutex::default() }
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes note of what is in it now. To be called before the first file is stored: lines that others append after
    /// this are seen when ours are.
    pub fn catch_up(&self) -> Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let _lock = self.lock()?;
        match File::open(&self.path) {
            Ok(mut file) => self.read_on(&mut file, &mut seen).map(drop),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("open file", &self.path, &error)),
        }
    }

    /// How each file is compressed, as its line tells. Lines that tell of no known compression are left out.
    pub fn compressions(&self) -> Result<HashMap<WalName, Compression>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(HashMap::new()),
            Err(error) => return Err(self.failed("open file", &error)),
        };
        let mut compressions = HashMap::new();
        for line in BufReader::with_capacity(64 << 10, file).split(b'\n') {
            let line = line.map_err(|error| self.failed("read file", &error))?;
            let fields: Vec<&str> = std::str::from_utf8(&line).unwrap_or_default().split_whitespace().collect();
            let compression = fields.get(3).and_then(|name| Compression::from_name(&name.to_ascii_lowercase()));
            compressions.extend(name_of(&line).zip(compression));
        }
        Ok(compressions)
    }

    /// Sees to it that each of these files has its one line, durably. Several lines cost one write and one fsync.
    pub fn record(&self, lines: &[NewLine]) -> Result<()> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let _lock = self.lock()?;
        let mut file = self.open()?;
        let is_known_file = self.read_on(&mut file, &mut seen)?;
        let (mut text, mut names) = (String::new(), Vec::new());
        for line in lines {
            let name = line.entry.name;
            let may_be_older = !line.created || !is_known_file;
            let is_there = names.contains(&name) || seen.recent.contains(&name);
            if is_there || may_be_older && self.holds(&mut file, &name)? {
                continue;
            }
            text.push_str(&line.entry.line());
            names.push(name);
        }
        match self.append(&mut file, &text, seen.length) {
            Ok(length) => {
                seen.length = length;
                names.into_iter().for_each(|name| seen.add(name));
                Ok(())
            }
            Err(error) => {
                // Who knows what is in the file now: it is read anew.
                *seen = Seen::default();
                Err(error)
            }
        }
    }

    fn failed(&self, action: &str, error: &io::Error) -> Error {
        Error::io(action, &self.path, error)
    }

    fn lock(&self) -> Result<File> {
        let opened = open_or_create(&self.lock_path, self.mode).map(|(lock, _)| lock);
        let lock = opened.map_err(|error| {
            Error::io("open lock file", &self.lock_path, &error)
                .hint("Barman and PostgreSQL must both be allowed to open it: let them share a group and its mode.")
        })?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(lock),
                Err(TryLockError::Error(error)) => return Err(Error::io("lock file", &self.lock_path, &error)),
                Err(TryLockError::WouldBlock) if self.pulse.is_stopped() || Instant::now() >= deadline => {
                    let path = self.lock_path.display();
                    return Err(Error::new(
                        Kind::Storage,
                        path.to_string(),
                        format!("could not lock file \"{path}\": another process holds it"),
                    )
                    .hint("Barman holds it while it archives or deletes; the file is tried again by itself.")
                    .retry_if(true));
                }
                Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL),
            }
        }
    }

    fn open(&self) -> Result<File> {
        let (file, is_new) = open_or_create(&self.path, self.mode).map_err(|error| self.failed("open file", &error))?;
        if is_new {
            durable::sync_directory(durable::directory_of(&self.path))?;
        }
        Ok(file)
    }

    /// Reads the lines that were appended since the last look; answers whether the file is the one looked at before,
    /// grown. One that was replaced or shortened is read from its end, as far as memory of it reaches.
    fn read_on(&self, file: &mut File, seen: &mut Seen) -> Result<bool> {
        let meta = file.metadata().map_err(|error| self.failed("stat file", &error))?;
        let identity = Some((meta.dev(), meta.ino()));
        let is_known_file = seen.length == 0 && meta.len() == 0 || seen.file == identity && meta.len() >= seen.length;
        if !is_known_file {
            // The shortest line is some forty bytes: this much holds more lines than are remembered.
            *seen = Seen { length: meta.len().saturating_sub(MOST_RECENT as u64 * 96), ..Seen::default() };
        }
        let read = names_from(file, seen.length, |name| {
            seen.add(name);
            ControlFlow::Continue(())
        });
        read.map_err(|error| self.failed("read file", &error))?;
        seen.file = identity;
        // Not beyond the last whole line: another process may cut a torn one and append its own in its place.
        seen.length = end_of_last_line(file, meta.len()).map_err(|error| self.failed("read file", &error))?;
        Ok(is_known_file)
    }

    fn holds(&self, file: &mut File, name: &WalName) -> Result<bool> {
        let mut found = false;
        let searched = names_from(file, 0, |other| {
            found = other == *name;
            if found { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        searched.map_err(|error| self.failed("read file", &error))?;
        Ok(found)
    }

    /// Writes `text` at `end`, behind the last whole line, durably; answers the new end. A torn line there is cut.
    fn append(&self, file: &mut File, text: &str, end: u64) -> Result<u64> {
        let length = file.metadata().map_err(|error| self.failed("stat file", &error))?.len();
        if end < length {
            file.set_len(end).map_err(|error| self.failed("truncate file", &error))?;
        }
        let written = file.seek(SeekFrom::Start(end)).and_then(|_| file.write_all(text.as_bytes()));
        // Also where nothing was written: a line that was found may not be durable yet.
        let durable = written
            .map_err(|error| self.failed("write file", &error))
            .and_then(|()| file.sync_all().map_err(|error| self.failed("fsync file", &error)));
        if durable.is_err() {
            // Better no line than a torn one, or one that a later fsync only seems to make durable.
            let _ = file.set_len(end);
        }
        durable.map(|()| end + text.len() as u64)
    }
}

/// Opens a file for reading and writing, creating it with that mode, whatever the umask; answers whether it is new.
fn open_or_create(path: &Path, mode: Mode) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(mode.file()).custom_flags(libc::O_NOFOLLOW);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        other => return other.map(|file| (file, false)),
    }
    match options.create_new(true).open(path) {
        Ok(file) => {
            file.set_permissions(Permissions::from_mode(mode.file()))?;
            Ok((file, true))
        }
        // Another process was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            options.create_new(false).open(path).map(|file| (file, false))
        }
        Err(error) => Err(error),
    }
}

/// Where the last whole line of a file of `length` bytes ends. What lies behind it was torn by a crash, or filled with
/// zeros by one.
fn end_of_last_line(file: &mut File, length: u64) -> io::Result<u64> {
    const BLOCK_BYTES: u64 = 64 << 10;
    let mut end = length;
    while end > 0 {
        let start = end.saturating_sub(BLOCK_BYTES);
        let mut block = Vec::new();
        file.seek(SeekFrom::Start(start))?;
        (&*file).take(end - start).read_to_end(&mut block)?;
        if let Some(at) = block.iter().rposition(|&byte| byte == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// Hands on the name in every whole line from `start` on; a torn last line is no line.
fn names_from(file: &mut File, start: u64, mut each: impl FnMut(WalName) -> ControlFlow<()>) -> io::Result<()> {
    file.seek(SeekFrom::Start(start))?;
    let mut lines = BufReader::with_capacity(64 << 10, &*file);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let name = name_of(&line).filter(|_| line.ends_with(b"\n"));
        if name.is_some_and(|name| each(name).is_break()) {
            break;
        }
        line.clear();
    }
    Ok(())
}

fn name_of(line: &[u8]) -> Option<WalName> {
    let text = std::str::from_utf8(line).ok()?;
    WalName::parse(text.split_whitespace().next()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    struct Fixture {
        directory: tempfile::TempDir,
        pulse: Arc<Pulse>,
    }

    impl Fixture {
        fn new() -> Self {
            Fixture { directory: tempfile::tempdir().unwrap(), pulse: Arc::default() }
        }

        fn path(&self) -> PathBuf {
            self.directory.path().join("main-xlog.db")
        }

        fn open(&self) -> Catalogue {
            let lock = self.directory.path().join(".main-xlogdb.lock");
            Catalogue::new(self.path(), lock, Mode::PRIVATE, Arc::clone(&self.pulse))
        }

        fn names(&self) -> Vec<String> {
            let text = fs::read_to_string(self.path()).unwrap();
            assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
            text.lines().map(|line| line.split('\t').next().unwrap().to_string()).collect()
        }
    }

    fn line(number: u32, created: bool) -> NewLine {
        let name = WalName::parse(&format!("0000000100000000{number:08X}")).unwrap();
        let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_615_159_937_463_971_400);
        NewLine { entry: Entry { name, stored_size: 3_089_819, modified, format: Compression::Zstd.into() }, created }
    }

    #[test]
    fn a_line_is_barmans_byte_for_byte() {
        let fixture = Fixture::new();
        let plain = NewLine {
            entry: Entry {
                format: Compression::None.into(),
                modified: SystemTime::UNIX_EPOCH + Duration::from_secs(1_615_159_937),
                ..line(4, true).entry
            },
            created: true,
        };
        fixture.open().record(&[line(3, true), plain]).unwrap();
        assert_eq!(
            fs::read_to_string(fixture.path()).unwrap(),
            "000000010000000000000003\t3089819\t1615159937.4639714\tzstd\tNone\n\
             000000010000000000000004\t3089819\t1615159937.0\tNone\tNone\n"
        );
    }

    #[test]
    fn a_file_has_exactly_one_line_however_often_it_is_recorded() {
        let fixture = Fixture::new();
        let catalogue = fixture.open();
        catalogue.record(&[line(1, true)]).unwrap();
        catalogue.record(&[line(1, false), line(2, true)]).unwrap();
        let after_restart = fixture.open();
        after_restart.record(&[line(1, false), line(2, false), line(3, false)]).unwrap();
        assert_eq!(fixture.names().len(), 3);
    }

    #[test]
    fn a_line_that_another_process_appended_is_seen() {
        let fixture = Fixture::new();
        let (ours, theirs) = (fixture.open(), fixture.open());
        ours.catch_up().unwrap();
        theirs.catch_up().unwrap();
        // We created the file; they found it and recorded it before we did.
        theirs.record(&[line(1, false)]).unwrap();
        ours.record(&[line(1, true), line(2, true)]).unwrap();
        theirs.record(&[line(2, false)]).unwrap();
        assert_eq!(fixture.names().len(), 2);
    }

    #[test]
    fn a_line_older_than_memory_reaches_is_found() {
        let fixture = Fixture::new();
        let all: Vec<NewLine> = (0..MOST_RECENT as u32 + 2000).map(|number| line(number, true)).collect();
        fixture.open().record(&all).unwrap();
        let after_restart = fixture.open();
        after_restart.catch_up().unwrap();
        after_restart.record(&[line(5, false)]).unwrap();
        assert_eq!(fixture.names().len(), all.len());
    }

    #[test]
    fn a_torn_line_is_cut_before_the_next_is_appended() {
        let fixture = Fixture::new();
        fixture.open().record(&[line(1, true), line(2, true)]).unwrap();
        let whole = fs::read(fixture.path()).unwrap();
        for torn in [whole.len() - 1, whole.len() / 2 + 30, whole.len() / 2 + 1] {
            fs::write(fixture.path(), &whole[..torn]).unwrap();
            fixture.open().record(&[line(2, false), line(3, true)]).unwrap();
            assert_eq!(fixture.names().len(), 3, "torn at {torn}");
        }
        fs::write(fixture.path(), "0000000100").unwrap();
        fixture.open().record(&[line(7, false)]).unwrap();
        assert_eq!(fixture.names(), ["000000010000000000000007"]);
    }

    #[test]
    fn a_line_appended_where_another_process_cut_a_torn_one_is_seen() {
        let fixture = Fixture::new();
        fixture.open().record(&[line(1, true)]).unwrap();
        let mut torn = fs::read(fixture.path()).unwrap();
        torn.extend_from_slice(b"0000000100000000000000");
        fs::write(fixture.path(), torn).unwrap();
        let (ours, theirs) = (fixture.open(), fixture.open());
        ours.catch_up().unwrap();
        theirs.record(&[line(2, false)]).unwrap();
        ours.record(&[line(2, true)]).unwrap();
        assert_eq!(fixture.names().len(), 2);
    }

    #[test]
    fn a_catalogue_rewritten_meanwhile_is_read_anew() {
        let fixture = Fixture::new();
        let catalogue = fixture.open();
        catalogue.record(&[line(1, true), line(2, true), line(3, true)]).unwrap();
        let text = fs::read_to_string(fixture.path()).unwrap();
        // As a deletion does: shorter, first line gone.
        fs::write(fixture.path(), text.split_once('\n').unwrap().1).unwrap();
        catalogue.record(&[line(1, false), line(3, false), line(4, true)]).unwrap();
        assert_eq!(fixture.names().len(), 4);
        fs::remove_file(fixture.path()).unwrap();
        catalogue.record(&[line(4, false), line(5, true)]).unwrap();
        assert_eq!(fixture.names().len(), 2);
    }

    #[test]
    fn a_held_lock_is_waited_for_and_a_stop_ends_the_wait() {
        let fixture = Fixture::new();
        let catalogue = fixture.open();
        let held = catalogue.lock().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| catalogue.record(&[line(1, true)]));
            fixture.pulse.stop();
            let error = waiting.join().unwrap().unwrap_err();
            assert!(error.is_worth_retrying());
            assert!(error.message().starts_with("could not lock file"), "{error}");
        });
        drop(held);
        fixture.open().record(&[line(1, true)]).unwrap();
    }
}
