//! Barman's catalogue of a local archive: one line a file, exactly one, appended under Barman's own lock.
//!
//! A crash between storing a file and appending its line is healed when PostgreSQL offers the file again;
//! a line torn by a crash is cut before the next one is appended. Deleting leaves lines out: that makes the file anew, and
//! an archiver that knew the old one notices.

use crate::codec::Compression;
use crate::crypt::Encryption;
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::file_lock;
use crate::layout::Format;
use crate::mode::Mode;
use crate::pulse::Pulse;
use crate::wal::WalName;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

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

/// How much of the end of what was read is compared to know the file again: more than a line.
const MOST_COMPARED: usize = 128;
/// How many of the newest names are kept in memory.
const MOST_RECENT: usize = 8192;
/// How long one call waits for the lock before it gives up and is tried again.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

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
    /// That line: another file may have taken the number of one that was replaced, and Barman rewrites its own in place.
    last_line: Vec<u8>,
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
        let mut held = self.hold()?;
        match held.open_existing()? {
            Some(mut file) => self.read_on(&mut file, &mut held.seen).map(drop),
            None => Ok(()),
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

    /// Hands on every name in it, in the order of its lines.
    pub fn names(&self, mut each: impl FnMut(WalName)) -> Result<()> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(self.failed("open file", &error)),
        };
        let read = names_from(&mut file, 0, |name| {
            each(name);
            ControlFlow::Continue(())
        });
        read.map_err(|error| self.failed("read file", &error))
    }

    /// Takes it for this caller alone. Waits a few seconds for whoever holds it, less where the
    /// pulse was told to stop.
    pub fn hold(&self) -> Result<Held<'_>> {
        self.hold_until(&self.pulse)
    }

    /// The same, to bring to an end what was begun: only its own bound ends the wait.
    pub fn hold_to_finish(&self) -> Result<Held<'_>> {
        self.hold_until(&Pulse::new())
    }

    fn hold_until(&self, pulse: &Pulse) -> Result<Held<'_>> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Held { catalogue: self, seen, _lock: self.lock(pulse)? })
    }

    /// Sees to it that each of these files has its one line, durably. Several lines cost one write and one fsync.
    pub fn record(&self, lines: &[NewLine]) -> Result<()> {
        self.hold()?.record(lines)
    }

    fn failed(&self, action: &str, error: &io::Error) -> Error {
        Error::io(action, &self.path, error)
    }

    fn lock(&self, pulse: &Pulse) -> Result<File> {
        let opened = open_or_create(&self.lock_path, self.mode).map(|(lock, _)| lock);
        let lock = opened.map_err(|error| {
            Error::io("open lock file", &self.lock_path, &error)
                .hint("Barman and PostgreSQL must both be allowed to open it: let them share a group and its mode.")
        })?;
        match file_lock::acquire(&lock, LOCK_PATIENCE, || pulse.is_stopped()) {
            Ok(true) => Ok(lock),
            Ok(false) => {
                let path = self.lock_path.display();
                let message = format!("could not lock file \"{path}\": another process holds it");
                Err(Error::new(Kind::Storage, path.to_string(), message)
                    .hint("Barman holds it while it archives or deletes; the file is tried again by itself.")
                    .retry_if(true))
            }
            Err(error) => Err(Error::io("lock file", &self.lock_path, &error)),
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
        let has_grown = seen.file == identity && meta.len() >= seen.length;
        let is_known_file = seen.length == 0 && meta.len() == 0
            || has_grown && self.line_before(file, seen.length, seen.last_line.len())? == seen.last_line;
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
        seen.last_line = self.line_before(file, seen.length, MOST_COMPARED)?;
        Ok(is_known_file)
    }

    /// The bytes before `end`, at most so many of them.
    fn line_before(&self, file: &mut File, end: u64, most: usize) -> Result<Vec<u8>> {
        let start = end.saturating_sub(most as u64);
        let mut line = Vec::new();
        let read = file.seek(SeekFrom::Start(start)).and_then(|_| (&*file).take(end - start).read_to_end(&mut line));
        read.map_err(|error| self.failed("read file", &error))?;
        Ok(line)
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

    /// Hands on every line, a torn last one too.
    fn each_line(&self, file: &mut File, mut each: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let failed = |error: io::Error| self.failed("read file", &error);
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        let mut lines = BufReader::with_capacity(64 << 10, &*file);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).map_err(failed)? > 0 {
            each(&line)?;
            line.clear();
        }
        Ok(())
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

/// The catalogue while nobody else writes to it: archiving and Barman wait for whoever has this.
pub struct Held<'a> {
    catalogue: &'a Catalogue,
    seen: MutexGuard<'a, Seen>,
    _lock: File,
}

/// What [`Held::retain`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retained {
    /// How many lines went.
    pub removed: u64,
    /// How many lines are none of Barman's: they stay as they are.
    pub broken: u64,
    /// The first of those: its number, from 1, and its text.
    pub first_broken: Option<(u64, String)>,
}

/// What [`Held::rewrite`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewritten {
    /// Lines in it now.
    pub lines: u64,
    /// Those that were missing.
    pub added: u64,
    /// Those that said something else, or stood there twice.
    pub changed: u64,
    /// Files that had a line and are not there.
    pub dropped: Vec<WalName>,
    /// Lines that nobody can read: number, from 1, and text.
    pub broken: Vec<(u64, String)>,
}

impl Rewritten {
    /// Goes through the old lines, and writes what takes the place of each.
    fn take_lines(
        &mut self,
        catalogue: &Catalogue,
        old: &mut File,
        stored: &mut HashMap<WalName, Entry>,
        find: &mut impl FnMut(&WalName) -> Result<Option<Entry>>,
        write: &mut impl FnMut(&Entry) -> Result<String>,
    ) -> Result<()> {
        let (mut number, mut seen) = (0, HashSet::new());
        catalogue.each_line(old, |line| {
            number += 1;
            let Some(name) = entry_name(line) else {
                self.broken.push((number, shown(line)));
                return Ok(());
            };
            if !seen.insert(name) {
                self.changed += 1;
                return Ok(());
            }
            let listed = stored.remove(&name);
            let Some(entry) = listed.map_or_else(|| find(&name), |entry| Ok(Some(entry)))? else {
                self.dropped.push(name);
                return Ok(());
            };
            let new = write(&entry)?;
            self.lines += 1;
            self.changed += u64::from(new.as_bytes() != line);
            Ok(())
        })
    }
}

impl Held<'_> {
    /// Sees to it that each of these files has its one line, durably.
    pub fn record(&mut self, lines: &[NewLine]) -> Result<()> {
        let (catalogue, seen) = (self.catalogue, &mut *self.seen);
        let mut file = catalogue.open()?;
        let is_known_file = catalogue.read_on(&mut file, seen)?;
        let (mut text, mut names) = (String::new(), Vec::new());
        for line in lines {
            let name = line.entry.name;
            let may_be_older = !line.created || !is_known_file;
            let is_there = names.contains(&name) || seen.recent.contains(&name);
            if is_there || may_be_older && catalogue.holds(&mut file, &name)? {
                continue;
            }
            text.push_str(&line.entry.line());
            names.push(name);
        }
        match catalogue.append(&mut file, &text, seen.length) {
            Ok(length) => {
                seen.length = length;
                seen.last_line.extend_from_slice(text.as_bytes());
                let surplus = seen.last_line.len().saturating_sub(MOST_COMPARED);
                seen.last_line.drain(..surplus);
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

    /// Leaves out the lines of files that `stays` does not want, all in one step: whoever reads sees the old catalogue or
    /// the new. Lines that are none of Barman's, and a torn end, stay as they are. The new file is made in `staging`.
    ///
    /// Where there is no catalogue, or nothing to leave out, nothing is written.
    pub fn retain(&mut self, staging: &Path, mut stays: impl FnMut(&WalName) -> Result<bool>) -> Result<Retained> {
        let catalogue = self.catalogue;
        let Some(mut file) = self.open_existing()? else { return Ok(Retained::default()) };
        let (mut retained, mut left_out, mut number) = (Retained::default(), HashSet::new(), 0);
        catalogue.each_line(&mut file, |line| {
            number += 1;
            match entry_name(line) {
                Some(name) if stays(&name)? => {}
                Some(name) => {
                    retained.removed += 1;
                    left_out.insert(name);
                }
                // What a crash tore: the next line that is appended takes its place.
                None if !line.ends_with(b"\n") => {}
                None => {
                    retained.broken += 1;
                    retained.first_broken.get_or_insert_with(|| (number, shown(line)));
                }
            }
            Ok(())
        })?;
        if left_out.is_empty() {
            return Ok(retained);
        }
        let mut failure = None;
        let rewritten = durable::rewrite_file(&catalogue.path, staging, |out| {
            let mut out = io::BufWriter::with_capacity(64 << 10, out);
            let written = catalogue.each_line(&mut file, |line| match entry_name(line) {
                Some(name) if left_out.contains(&name) => Ok(()),
                _ => out.write_all(line).map_err(|error| catalogue.failed("rewrite file", &error)),
            });
            failure = written.err();
            if failure.is_some() { Err(io::Error::other("could not be copied")) } else { out.flush() }
        });
        *self.seen = Seen::default();
        match failure {
            Some(error) => Err(error),
            None => rewritten.map(|()| retained),
        }
    }

    /// Makes the catalogue anew in one step, one line for each of `stored`, which are as they were listed; `find` is asked
    /// for files that were stored or deleted since. Files that had a line keep their place, the others follow in the order
    /// given. Lines of files that are not there go, and so do those that nobody can read. The new file is made in `staging`.
    pub fn rewrite(
        &mut self,
        staging: &Path,
        stored: Vec<Entry>,
        mut find: impl FnMut(&WalName) -> Result<Option<Entry>>,
    ) -> Result<Rewritten> {
        let catalogue = self.catalogue;
        let old = self.open_existing()?;
        let order: Vec<WalName> = stored.iter().map(|entry| entry.name).collect();
        let mut stored: HashMap<WalName, Entry> = stored.into_iter().map(|entry| (entry.name, entry)).collect();
        let (mut rewritten, mut failure) = (Rewritten::default(), None);
        let written = durable::make_or_rewrite_file(&catalogue.path, staging, catalogue.mode, |out| {
            let mut out = io::BufWriter::with_capacity(64 << 10, out);
            let mut write = |entry: &Entry| {
                let line = entry.line();
                out.write_all(line.as_bytes()).map_err(|error| catalogue.failed("rewrite file", &error))?;
                Ok(line)
            };
            let done = (|| {
                if let Some(mut old) = old {
                    rewritten.take_lines(catalogue, &mut old, &mut stored, &mut find, &mut write)?;
                }
                for name in order {
                    // Not one that was deleted since, and whose line is gone with it.
                    if stored.remove(&name).is_some()
                        && let Some(entry) = find(&name)?
                    {
                        write(&entry)?;
                        rewritten.lines += 1;
                        rewritten.added += 1;
                    }
                }
                Ok(())
            })();
            failure = done.err();
            if failure.is_some() { Err(io::Error::other("could not be made anew")) } else { out.flush() }
        });
        *self.seen = Seen::default();
        match failure {
            Some(error) => Err(error),
            None => written.map(|()| rewritten),
        }
    }

    fn open_existing(&self) -> Result<Option<File>> {
        match File::open(&self.catalogue.path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.catalogue.failed("open file", &error)),
        }
    }
}

/// The name in a whole line of Barman's, which has three fields, in newer versions four or five.
fn entry_name(line: &[u8]) -> Option<WalName> {
    let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let fields: Vec<&str> = text.split_whitespace().take(6).collect();
    let name = WalName::parse(fields.first()?).ok().filter(|name| name.to_string() == fields[0])?;
    (3..=5).contains(&fields.len()).then_some(name)
}

/// A broken line as it is told to people.
fn shown(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end().chars().take(80).flat_map(char::escape_debug).collect()
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
    fn a_catalogue_rewritten_in_place_and_grown_again_is_read_anew() {
        let fixture = Fixture::new();
        let (ours, theirs) = (fixture.open(), fixture.open());
        ours.record(&[line(1, true), line(2, true)]).unwrap();
        let text = fs::read_to_string(fixture.path()).unwrap();
        // As Barman deletes: the same file, without its first line …
        fs::write(fixture.path(), text.split_once('\n').unwrap().1).unwrap();
        // … and then as long as before, or longer.
        theirs.record(&[line(3, true), line(4, true)]).unwrap();
        ours.record(&[line(1, false), line(4, false), line(5, true)]).unwrap();
        let mut names = fixture.names();
        names.sort();
        assert_eq!(names, (1..=5).map(|number| line(number, true).entry.name.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn lines_left_out_are_gone_and_all_others_stay_as_they_were() {
        let fixture = Fixture::new();
        let staging = fixture.directory.path().join("staging");
        fs::create_dir(&staging).unwrap();
        let catalogue = fixture.open();
        let retain = |names: &[u32]| {
            let names: Vec<WalName> = names.iter().map(|&number| line(number, true).entry.name).collect();
            catalogue.hold().unwrap().retain(&staging, |name| Ok(!names.contains(name)))
        };
        assert_eq!(retain(&[1]).unwrap(), Retained::default(), "there is no catalogue");
        assert!(!fixture.path().exists());
        let [one, two, three, four] = [1, 2, 3, 4].map(|number| line(number, true).entry.name);
        let kept = format!(
            "{two}\t3089819\t1615159937.0\n\njunk\n{one}\t5\n{two}\t1\t2\t3\t4\t5\n00000002.history\t41\t1.5\tNone\tNone\n\
             {three}  77 1615159937.5\tgzip\n{four}\t1"
        );
        // Of three, four and five fields, and one file twice.
        let gone = format!("{one}\t1\t2.0\n{one}\t1\t2.0\tgzip\n{one}\t1\t2.0\tgzip\tgpg\n");
        fs::write(fixture.path(), format!("{gone}{kept}")).unwrap();
        let retained = retain(&[1]).unwrap();
        assert_eq!((retained.removed, retained.broken), (3, 4));
        assert_eq!(retained.first_broken, Some((5, String::new())));
        assert_eq!(fs::read_to_string(fixture.path()).unwrap(), kept);
        let before = fs::metadata(fixture.path()).unwrap().ino();
        assert_eq!(retain(&[1, 4]).unwrap().removed, 0);
        assert_eq!(fs::metadata(fixture.path()).unwrap().ino(), before, "nothing to leave out, nothing written");
        assert_eq!(fs::read_dir(&staging).unwrap().count(), 0);
        let failed = catalogue.hold().unwrap().retain(&staging, |_| Err(Error::new(Kind::Storage, "x", "unreadable")));
        assert_eq!(failed.unwrap_err().message(), "unreadable");
        assert_eq!(fs::read_to_string(fixture.path()).unwrap(), kept);
    }

    #[test]
    fn archiving_goes_on_after_another_process_left_lines_out() {
        let fixture = Fixture::new();
        let (archiver, deletion) = (fixture.open(), fixture.open());
        archiver.record(&[line(1, true), line(2, true), line(3, true)]).unwrap();
        let staging = fixture.directory.path().to_path_buf();
        for round in 0..3 {
            // Each rewrite may get the number of the file before the last one.
            let gone = line(1 + round, true).entry.name;
            deletion.hold().unwrap().retain(&staging, |name| Ok(*name != gone)).unwrap();
            archiver.record(&[line(4 + round, true), line(3 + round, false)]).unwrap();
            assert_eq!(fixture.names().len(), 3);
        }
        // What was left out is recorded anew when it is archived again.
        archiver.record(&[line(1, false)]).unwrap();
        let expected = [4, 5, 6, 1].map(|number| line(number, true).entry.name.to_string());
        assert_eq!(fixture.names(), expected);
    }

    #[test]
    fn a_held_lock_is_waited_for_and_a_stop_ends_the_wait() {
        let fixture = Fixture::new();
        let catalogue = fixture.open();
        let held = catalogue.lock(&fixture.pulse).unwrap();
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
