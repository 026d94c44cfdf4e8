//! What was stored, by content: sizes and BLAKE3 hashes of the plain files, one text file a hash directory.
//!
//! Lines are `<name> <size> blake3:<hash of the plain file> <stored size>`. They are not fsynced by themselves: a missing
//! one is remade from the stored file. The last line of a name counts.
//!
//! An encrypted file has `blake3-keyed:` there, and a line before it is stored, durably, with a fifth field:
//! `blake3:<hash of the file as stored>`. From that alone nothing follows; but a stored file of that hash has that content,
//! which nobody could tell any more if the archiver died right after it stored the file.

use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::file_lock;
use crate::hash::{Hash, Noted, NotedHash};
use crate::mode::Mode;
use crate::wal::WalName;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What one line says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Size and hash of the plain file.
    pub noted: Noted,
    /// Bytes as stored.
    pub stored_size: u64,
}

/// Far beyond the 4,096 lines of a directory of 1 MB segments with labels.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// How long one call waits for another that makes the file anew.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// A file that is made anew more often meanwhile than this is no file to write to.
const MOST_ATTEMPTS: usize = 16;

/// Opens the sums file at `path`, for this caller alone: what is opened is what stands there, and nobody makes it anew
/// before it is closed. Nothing where `open` finds none.
fn hold(path: &Path, mut open: impl FnMut() -> io::Result<Option<File>>) -> Result<Option<File>> {
    let failed = |error: &io::Error| Error::io("open file", path, error);
    for _ in 0..MOST_ATTEMPTS {
        let Some(file) = open().map_err(|error| failed(&error))? else { return Ok(None) };
        if !file_lock::acquire(&file, LOCK_PATIENCE, || false).map_err(|error| Error::io("lock file", path, &error))? {
            break;
        }
        let ours = file.metadata().map_err(|error| failed(&error))?;
        match fs::symlink_metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => return Ok(Some(file)),
            // Replaced or removed while it was waited for.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    let shown = path.display().to_string();
    let message = format!("could not lock file \"{shown}\": another process holds it");
    Err(Error::new(Kind::Storage, shown, message).retry_if(true))
}

/// Appends a line to the sums file at `path`, making it and its directory where they are missing.
pub fn append(path: &Path, name: &WalName, sum: &Sum, mode: Mode) -> Result<()> {
    append_line(path, &line(name, sum), mode).map(drop)
}

/// Appends, durably, the line of a file that is about to be stored with that content.
pub fn announce(path: &Path, name: &WalName, sum: &Sum, stored: &Hash, mode: Mode) -> Result<()> {
    let file = append_line(path, &format!("{} {stored}", line(name, sum)), mode)?;
    file.sync_all().map_err(|error| Error::io("fsync file", path, &error))?;
    // Whoever made file and folder may not have come to that yet.
    let folder = durable::directory_of(path);
    durable::sync_directory(folder).and_then(|()| durable::sync_directory(durable::directory_of(folder)))
}

fn line(name: &WalName, sum: &Sum) -> String {
    format!("{name} {} {} {}", sum.noted.size, sum.noted.hash, sum.stored_size)
}

fn append_line(path: &Path, line: &str, mode: Mode) -> Result<File> {
    let failed = |error: &io::Error| Error::io("write file", path, error);
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(true).mode(mode.file()).custom_flags(libc::O_NOFOLLOW);
        options.open(path).map(Some)
    };
    let file = match hold(path, open) {
        Err(error) if error.is_missing_file() => {
            durable::create_directory(durable::directory_of(path), mode)?;
            hold(path, open)?
        }
        other => other?,
    };
    // It is made where it is missing.
    let mut file = file.ok_or_else(|| failed(&io::ErrorKind::NotFound.into()))?;
    let length = file.metadata().map_err(|error| failed(&error))?.len();
    let mut line = format!("{line}\n");
    let mut last = [b'\n'];
    if length == 0 {
        file.set_permissions(Permissions::from_mode(mode.file())).map_err(|error| failed(&error))?;
    } else {
        file.seek(SeekFrom::Start(length - 1)).and_then(|_| file.read(&mut last)).map_err(|error| failed(&error))?;
    }
    if last != [b'\n'] {
        // A line torn by a crash stays, unreadable, on a line of its own.
        line.insert(0, '\n');
    }
    file.write_all(line.as_bytes()).map_err(|error| failed(&error))?;
    Ok(file)
}

/// The sum of that file; nothing where no line tells it.
pub fn find(path: &Path, name: &WalName) -> Result<Option<Sum>> {
    let name = name.to_string();
    Ok(read(path)?.lines().rev().find_map(|line| parse_line(line, &name)))
}

/// What was announced of a file that is stored with that hash.
pub fn find_announced(path: &Path, name: &WalName, stored: &Hash) -> Result<Option<Sum>> {
    let (name, stored) = (name.to_string(), format!(" {stored}"));
    Ok(read(path)?.lines().rev().find_map(|line| parse_line(line.strip_suffix(&stored)?, &name)))
}

/// Whether anything was announced of that file.
pub fn is_announced(path: &Path, name: &WalName) -> Result<bool> {
    Ok(read(path)?.lines().any(|line| kind_of(line) == Some((*name, true))))
}

/// The sums of all files that the sums file at `path` tells of.
pub fn find_all(path: &Path) -> Result<HashMap<WalName, Sum>> {
    let parse = |line: &str| {
        let name = line.split(' ').next()?;
        Some((WalName::parse(name).ok()?, parse_line(line, name)?))
    };
    Ok(read(path)?.lines().filter_map(parse).collect())
}

/// The files that all sums files in `folder` tell of; none where there is no folder.
pub fn names(folder: &Path) -> Result<BTreeSet<WalName>> {
    let mut names = BTreeSet::new();
    for path in paths(folder)? {
        names.extend(find_all(&path)?.into_keys());
    }
    Ok(names)
}

/// The sums files in `folder`; none where there is no folder.
pub fn paths(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error: &io::Error| Error::io("read directory", folder, error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(&error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| unreadable(&error))?.path();
        if path.is_file() {
            paths.push(path);
        }
    }
    Ok(paths)
}

fn too_long(path: &Path) -> Error {
    let message = format!("file \"{}\" is longer than any file of sums", path.display());
    Error::new(Kind::Damaged, path.display().to_string(), message)
}

/// The text of a sums file; none where there is no file.
fn read(path: &Path) -> Result<String> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(MAX_FILE_BYTES).read_to_end(&mut text)) {
        // Its newest lines would be missed.
        Ok(_) if text.len() as u64 == MAX_FILE_BYTES => Err(too_long(path)),
        Ok(_) => Ok(String::from_utf8_lossy(&text).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(Error::io("read file", path, &error)),
    }
}

/// Leaves out every line of the sums file at `path` whose first field is the name of a file that `stays` does not want,
/// all in one step; answers whether a line went. Other lines stay as they are, also those that nobody can read. The file
/// itself goes where no line of a file is left and `is_needed` is not set; else the new one is made in `staging`. Who wants
/// to append to it meanwhile waits, and then appends to the new one.
pub fn retain(
    path: &Path,
    staging: &Path,
    is_needed: bool,
    mut stays: impl FnMut(&WalName) -> Result<bool>,
) -> Result<bool> {
    let failed = |action: &str, error: &io::Error| Error::io(action, path, error);
    let open = || match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    let Some(mut held) = hold(path, open)? else { return Ok(false) };
    let mut text = Vec::new();
    held.read_to_end(&mut text).map_err(|error| failed("read file", &error))?;
    let (mut kept, mut names, mut has_changed) = (Vec::with_capacity(text.len()), 0_u64, false);
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        match name_of(line) {
            Some(name) if !stays(&name)? => has_changed = true,
            name => {
                names += u64::from(name.is_some());
                kept.extend_from_slice(line);
            }
        }
    }
    if names == 0 && !is_needed {
        fs::remove_file(path).map_err(|error| failed("remove file", &error))?;
        return durable::sync_directory(durable::directory_of(path)).map(|()| has_changed);
    }
    if has_changed {
        durable::rewrite_file(path, staging, |out| out.write_all(&kept))?;
    }
    Ok(has_changed)
}

/// Makes the sums file at `path` anew in one step: the line that counts of each stored file stays as it is, unless `made`
/// has a new sum of it; other sums of `made` follow. What was announced stays, but for files that were stored and are not any more. Lines that a
/// later one outdates go, lines of files that `is_stored` does not know, and what nobody can read; answers how many of
/// the latter two. A file that is left empty goes, too.
///
/// Who wants to append to it meanwhile waits, and then appends to the new one.
pub fn rewrite(
    path: &Path,
    staging: &Path,
    mode: Mode,
    mut made: BTreeMap<WalName, Sum>,
    mut is_stored: impl FnMut(&WalName) -> Result<bool>,
) -> Result<u64> {
    let failed = |action: &str, error: &io::Error| Error::io(action, path, error);
    let may_be_made = !made.is_empty();
    if may_be_made {
        durable::create_directory(durable::directory_of(path), mode)?;
    }
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).append(true).create(may_be_made).mode(mode.file()).custom_flags(libc::O_NOFOLLOW);
        match options.open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    };
    let Some(held) = hold(path, open)? else { return Ok(0) };
    let mut old = Vec::new();
    (&held).take(MAX_FILE_BYTES).read_to_end(&mut old).map_err(|error| failed("read file", &error))?;
    if old.len() as u64 == MAX_FILE_BYTES {
        return Err(too_long(path));
    }
    if old.is_empty() {
        held.set_permissions(Permissions::from_mode(mode.file()))
            .map_err(|error| failed("set permissions of", &error))?;
    }
    let old = String::from_utf8_lossy(&old);
    let (mut text, mut dropped) = (String::with_capacity(old.len()), 0);
    let lines = Lines::of(&old);
    for (at, line) in old.lines().enumerate() {
        match lines.part(at, line) {
            Part::Sum(name) => match made.remove(&name) {
                Some(sum) => text.push_str(&self::line(&name, &sum)),
                None if is_stored(&name)? => text.push_str(line),
                None => {
                    dropped += 1;
                    continue;
                }
            },
            // Also beside the sum: nothing else tells, without the keys, whether an offered file is the stored one.
            Part::Announced(name) if lines.sums.contains_key(&name) && !is_stored(&name)? => continue,
            Part::Announced(_) => text.push_str(line),
            Part::Outdated => continue,
            Part::Unreadable => {
                dropped += u64::from(!line.is_empty());
                continue;
            }
        }
        text.push('\n');
    }
    made.iter().for_each(|(name, sum)| text.extend([line(name, sum).as_str(), "\n"]));
    if text.is_empty() {
        fs::remove_file(path).map_err(|error| failed("remove file", &error))?;
        durable::sync_directory(durable::directory_of(path))?;
    } else if text != old {
        durable::rewrite_file(path, staging, |out| out.write_all(text.as_bytes()))?;
    }
    Ok(dropped)
}

/// What a line is among the others of its file.
enum Part {
    /// The one that counts of that file.
    Sum(WalName),
    /// What was announced of a file.
    Announced(WalName),
    /// A later one counts.
    Outdated,
    Unreadable,
}

/// Where the lines that count stand.
struct Lines {
    sums: HashMap<WalName, usize>,
}

impl Lines {
    fn of(text: &str) -> Self {
        let mut lines = Lines { sums: HashMap::new() };
        for (at, line) in text.lines().enumerate() {
            match kind_of(line) {
                Some((name, false)) => lines.sums.insert(name, at),
                Some((_, true)) | None => None,
            };
        }
        lines
    }

    fn part(&self, at: usize, line: &str) -> Part {
        match kind_of(line) {
            Some((name, false)) if self.sums.get(&name) == Some(&at) => Part::Sum(name),
            // Of two archivers that announced one the later may not be the one that stored it.
            Some((name, true)) => Part::Announced(name),
            Some(_) => Part::Outdated,
            None => Part::Unreadable,
        }
    }
}

/// The file that a line tells of, and whether that was only announced: such a line has one field more.
fn kind_of(line: &str) -> Option<(WalName, bool)> {
    let name = line.split(' ').next()?;
    let known = WalName::parse(name).ok()?;
    if parse_line(line, name).is_some() {
        return Some((known, false));
    }
    let (sum, _) = line.rsplit_once(' ')?;
    parse_line(sum, name).map(|_| (known, true))
}

/// The name in front of a line.
fn name_of(line: &[u8]) -> Option<WalName> {
    let first = line.split(|&byte| byte == b' ' || byte == b'\n').next()?;
    WalName::parse(std::str::from_utf8(first).ok()?).ok()
}

fn parse_line(line: &str, name: &str) -> Option<Sum> {
    let mut fields = line.strip_prefix(name)?.strip_prefix(' ')?.split(' ');
    let noted = Noted { size: fields.next()?.parse().ok()?, hash: NotedHash::parse(fields.next()?)? };
    let sum = Sum { noted, stored_size: fields.next()?.parse().ok()? };
    fields.next().is_none().then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::{Content, HashKey};

    fn sum(content: &[u8]) -> Sum {
        let content = Content { size: content.len() as u64, hash: Hash(blake3::hash(content)) };
        Sum { noted: Noted::of(&content), stored_size: 3 }
    }

    #[test]
    fn a_sum_is_found_again_also_behind_a_torn_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sums/0000000100000002");
        let [one, two] =
            ["000000010000000200000042", "000000010000000200000042.partial"].map(|name| WalName::parse(name).unwrap());
        assert_eq!(find(&path, &one).unwrap(), None);
        append(&path, &one, &sum(b"one"), Mode::PRIVATE).unwrap();
        let mut torn = fs::read(&path).unwrap();
        torn.extend_from_slice(b"000000010000000200000042.partial 3 blake3:00");
        fs::write(&path, torn).unwrap();
        assert_eq!(find(&path, &two).unwrap(), None);
        append(&path, &two, &sum(b"two"), Mode::PRIVATE).unwrap();
        assert_eq!(find(&path, &one).unwrap(), Some(sum(b"one")));
        assert_eq!(find(&path, &two).unwrap(), Some(sum(b"two")));
        append(&path, &one, &sum(b"three"), Mode::PRIVATE).unwrap();
        assert_eq!(find(&path, &one).unwrap(), Some(sum(b"three")), "the last line counts");
        let all = find_all(&path).unwrap();
        assert_eq!(all, HashMap::from([(one, sum(b"three")), (two, sum(b"two"))]));
        assert!(find_all(&directory.path().join("missing")).unwrap().is_empty());
    }

    #[test]
    fn what_is_announced_counts_for_a_file_that_is_stored_just_so_and_for_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sums/0000000100000002");
        let name = WalName::parse("000000010000000200000042").unwrap();
        let [stored, other] = [b"stored", b"other!"].map(|bytes| Hash(blake3::hash(bytes)));
        let content = Content { size: 5, hash: Hash(blake3::hash(b"plain")) };
        let sum = Sum { noted: Noted::keyed(&content, &HashKey::of_secret(&[7; 32])), stored_size: 6 };
        announce(&path, &name, &sum, &stored, Mode::PRIVATE).unwrap();
        assert_eq!(find(&path, &name).unwrap(), None, "it may never have been stored");
        assert!(find_all(&path).unwrap().is_empty());
        assert_eq!(find_announced(&path, &name, &stored).unwrap(), Some(sum));
        assert_eq!(find_announced(&path, &name, &other).unwrap(), None);
        append(&path, &name, &sum, Mode::PRIVATE).unwrap();
        assert_eq!(find(&path, &name).unwrap(), Some(sum));
    }

    #[test]
    fn a_line_that_is_appended_while_the_file_is_made_anew_is_in_the_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0000000100000000");
        let name = |number: u32| WalName::parse(&format!("0000000100000000{number:08X}")).unwrap();
        append(&path, &name(0), &sum(b"0"), Mode::PRIVATE).unwrap();
        std::thread::scope(|scope| {
            let appending = scope.spawn(|| {
                (1..500).for_each(|number| append(&path, &name(number), &sum(b"x"), Mode::PRIVATE).unwrap());
            });
            while !appending.is_finished() {
                // Each with an even number goes; where none is left, the whole file.
                let is_odd = |name: &WalName| Ok(name.to_string().ends_with(['1', '3', '5', '7', '9', 'B', 'D', 'F']));
                retain(&path, directory.path(), false, is_odd).unwrap();
            }
        });
        let found = find_all(&path).unwrap();
        assert!((1..500).step_by(2).all(|number| found.contains_key(&name(number))), "{}", found.len());
    }

    #[test]
    fn lines_of_other_files_stay_as_they_are_also_longer_and_torn_ones() {
        let directory = tempfile::tempdir().unwrap();
        let staging = directory.path().join("staging");
        fs::create_dir(&staging).unwrap();
        let path = directory.path().join("0000000100000000");
        let [one, two, three] = [1, 2, 3].map(|number| format!("00000001000000000000000{number}"));
        let named = WalName::parse(&one).unwrap();
        let without_one = |is_needed| retain(&path, &staging, is_needed, |name| Ok(*name != named));
        assert!(!without_one(false).unwrap(), "there is no such file");

        let kept = format!("{two} 1 blake3:00 1 more\n{one}.partial 1 x\n0000000100\n\u{FFFD}\n{three} 1 x");
        fs::write(&path, format!("{one} 1 x 2\n{one} 3 x 2 more and more\n{kept}\n{one} 3")).unwrap();
        assert!(without_one(true).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{kept}\n"));
        assert!(!without_one(false).unwrap());

        fs::write(&path, format!("{one} 1 x 2\n{kept}")).unwrap();
        let failed = retain(&path, &staging, true, |_| Err(Error::new(Kind::Storage, "x", "unreadable")));
        assert_eq!(failed.unwrap_err().message(), "unreadable");
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{one} 1 x 2\n{kept}"));

        // The directory of its files is gone: so is it, and what nobody can read in it.
        fs::write(&path, format!("{one} 1 x 2\n000000\n")).unwrap();
        assert!(without_one(true).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "000000\n");
        assert!(!without_one(false).unwrap());
        assert!(!path.exists());
        assert_eq!(fs::read_dir(&staging).unwrap().count(), 0);
    }
}
