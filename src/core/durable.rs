//! Files that survive: staged under a name of ours, made durable, then published under their own.
//!
//! The only room that calls fsync, link and rename. Nothing here overwrites: [`StagedFile::publish`] fails where
//! a file stands, and only [`StagedFile::replace`], for files that have one writer at a time, puts a new one there.

use crate::error::{Error, Result};
use crate::mode::Mode;
use crate::owner::Owner;
use crate::pulse::Pulse;
use crate::stamp::Stamp;
use crate::sys;
use nix::unistd::geteuid;
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// After how many bytes the kernel is asked to start writing them back.
const WRITEBACK_BYTES: u64 = 1 << 20;

/// Makes the entries of a directory durable. File systems that cannot sync a directory (EINVAL) are taken at their word.
pub fn sync_directory(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|directory| match directory.sync_all() {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    });
    synced.map_err(|error| Error::io("fsync directory", path, &error))
}

/// Makes the content of an existing file durable.
pub fn sync_file(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| Error::io("fsync file", path, &error))
}

/// Access rights for a file that goes into `directory`: private, and readable for its group where the directory is.
pub fn mode_for_file_in(directory: &Path) -> Mode {
    let group = fs::metadata(directory).map_or(0, |meta| meta.mode() & 0o040);
    Mode::new(0o600 | group).unwrap_or(Mode::PRIVATE)
}

/// Makes one directory; its parent must exist. A directory that is there already is fine and left as it is.
/// The new entry is not durable until the parent is synced.
pub fn create_directory(path: &Path, mode: Mode) -> Result<()> {
    let made = fs::DirBuilder::new().mode(mode.directory()).create(path);
    match made {
        Ok(()) => {
            // The umask may have taken bits away; the setgid bit inherited from the parent must stay.
            let inherited = fs::metadata(path).map(|meta| meta.mode() & 0o2000);
            inherited
                .and_then(|setgid| fs::set_permissions(path, Permissions::from_mode(mode.directory() | setgid)))
                .map_err(|error| Error::io("set permissions of directory", path, &error))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(Error::io("create directory", path, &error)),
    }
}

/// What became of a file offered for publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It stands under its name now.
    Created,
    /// Another file stood there, and still does.
    AlreadyExists,
}

/// A file being written under a name of ours; it is removed when dropped unless it was published by a rename.
pub struct StagedFile<'a> {
    path: PathBuf,
    file: File,
    written: u64,
    handed_to_kernel: u64,
    pulse: &'a Pulse,
    gone: bool,
}

impl<'a> StagedFile<'a> {
    /// Creates an empty one in `directory`. Its name tells its maker ([`Owner`]), behind `prefix`.
    /// Writing beats `pulse`, and fails once that was told to stop.
    pub fn create(directory: &Path, prefix: &str, mode: Mode, pulse: &'a Pulse) -> Result<Self> {
        let path = directory.join(format!("{prefix}{}", Owner::current().unique_name()));
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .custom_flags(libc::O_NOFOLLOW)
            .mode(mode.file())
            .open(&path);
        let file = opened.map_err(|error| Error::io("create file in", directory, &error))?;
        let staged = StagedFile { path, file, written: 0, handed_to_kernel: 0, pulse, gone: false };
        staged
            .file
            .set_permissions(Permissions::from_mode(mode.file()))
            .map_err(|error| staged.failed("set permissions of", &error))?;
        Ok(staged)
    }

    /// Its path while it is staged.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes were written to it.
    pub fn written_bytes(&self) -> u64 {
        self.written
    }

    /// Which file it is, with what was written to it until now. It keeps its stamp when it is renamed.
    pub fn stamp(&self) -> Result<Stamp> {
        self.file.metadata().map(|meta| Stamp::of(&meta)).map_err(|error| self.failed("stat", &error))
    }

    /// A failure of writing it. It names the directory, since the name of the file is another one at each attempt.
    pub fn failed(&self, action: &str, error: &io::Error) -> Error {
        Error::io(&format!("{action} file in"), directory_of(&self.path), error)
    }

    /// Makes the content and the modification time durable.
    pub fn sync(&mut self, modified: Option<SystemTime>) -> Result<()> {
        if let Some(modified) = modified {
            self.file
                .set_times(FileTimes::new().set_modified(modified))
                .map_err(|error| self.failed("set times of", &error))?;
        }
        self.file.sync_all().map_err(|error| self.failed("fsync", &error))
    }

    fn set_mode(&self, mode: Mode) -> Result<()> {
        self.file
            .set_permissions(Permissions::from_mode(mode.file()))
            .map_err(|error| self.failed("set permissions of", &error))
    }

    /// Gives it owner, group and access rights of another file, whose other users must be able to use this one, too.
    pub fn take_rights_of(&self, other: &fs::Metadata) -> Result<()> {
        let ours = self.file.metadata().map_err(|error| self.failed("stat", &error))?;
        let differing = |theirs: u32, ours: u32| (theirs != ours).then_some(theirs);
        let (owner, group) = (differing(other.uid(), ours.uid()), differing(other.gid(), ours.gid()));
        if owner.is_some() && geteuid().is_root() || group.is_some() {
            // Only root gives files away; for whoever else may write to that one, its group's rights do.
            let owner = owner.filter(|_| geteuid().is_root());
            fchown(&self.file, owner, group).map_err(|error| self.failed("change owner of", &error))?;
        }
        // After the owner: a change of that takes bits away.
        self.file
            .set_permissions(Permissions::from_mode(other.mode() & 0o7777))
            .map_err(|error| self.failed("set permissions of", &error))
    }

    /// Gives the file the name `target` on the same file system, never replacing what stands there.
    /// The entry is durable once its directory is synced.
    pub fn publish(&mut self, target: &Path) -> Result<Published> {
        let linked = fs::hard_link(&self.path, target).or_else(|error| match error.raw_os_error() {
            // No hard links here (some network and FUSE file systems): a rename that must not replace does as well.
            Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS | libc::EMLINK) => {
                rename_without_replacing(&self.path, target).inspect(|()| self.gone = true)
            }
            _ => Err(error),
        });
        match linked {
            Ok(()) => Ok(Published::Created),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Published::AlreadyExists),
            Err(error) => Err(Error::io("create file", target, &error)),
        }
    }

    /// Renames the file to `target`, replacing what stands there.
    pub fn replace(mut self, target: &Path) -> Result<()> {
        move_file(&self.path, target)?;
        self.gone = true;
        Ok(())
    }
}

fn rename_without_replacing(from: &Path, to: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    Ok(renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE)?)
}

impl Write for StagedFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.pulse.is_stopped() {
            // Not ErrorKind::Interrupted, which the standard library answers by trying again.
            return Err(io::Error::other("stopped before the file was complete"));
        }
        let piece = &bytes[..bytes.len().min(WRITEBACK_BYTES as usize)];
        let count = self.file.write(piece)?;
        self.written += count as u64;
        self.pulse.beat();
        if self.written - self.handed_to_kernel >= WRITEBACK_BYTES {
            sys::start_writeback(&self.file, self.handed_to_kernel, self.written - self.handed_to_kernel);
            self.handed_to_kernel = self.written;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for StagedFile<'_> {
    fn drop(&mut self) {
        if !self.gone {
            // What stays behind is swept by whoever opens the archive next.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Gives a whole file another name on the same file system, replacing what stands there.
pub fn move_file(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|error| Error::io("rename file to", to, &error))
}

/// The directory that a file lies in; of a bare name the current one.
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
}

/// Puts a small file of our own, which has one writer, at `path`: readers see the old content or the new, never a part.
/// With `is_durable` it survives the loss of power; without, it may be gone after one.
pub fn replace_file(path: &Path, content: &[u8], is_durable: bool) -> Result<()> {
    let directory = directory_of(path);
    let prefix = path.file_name().map(|name| format!("{}.", name.to_string_lossy())).unwrap_or_default();
    sweep_leftovers(directory, &prefix)?;
    let pulse = Pulse::new();
    let mut staged = StagedFile::create(directory, &prefix, Mode::PRIVATE, &pulse)?;
    staged.write_all(content).map_err(|error| staged.failed("write", &error))?;
    if is_durable {
        staged.sync(None)?;
    }
    staged.replace(path)?;
    if is_durable { sync_directory(directory) } else { Ok(()) }
}

/// Puts another content, which `write` writes, at `path`, where a file stands that several users write under one lock, which
/// the caller holds: readers see the old content or the new, never a part, also after the loss of power. Owner, group and
/// access rights stay. The new file is made in `staging`, on the same file system.
pub fn rewrite_file(path: &Path, staging: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<()> {
    let rights = fs::metadata(path).map_err(|error| Error::io("stat file", path, &error))?;
    write_anew(path, staging, write, |staged| staged.take_rights_of(&rights))
}

/// The same where no file may stand yet: a new one has that mode.
pub fn make_or_rewrite_file(
    path: &Path,
    staging: &Path,
    mode: Mode,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    match fs::metadata(path) {
        Ok(rights) => write_anew(path, staging, write, |staged| staged.take_rights_of(&rights)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            write_anew(path, staging, write, |staged| staged.set_mode(mode))
        }
        Err(error) => Err(Error::io("stat file", path, &error)),
    }
}

fn write_anew(
    path: &Path,
    staging: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    set_rights: impl FnOnce(&StagedFile<'_>) -> Result<()>,
) -> Result<()> {
    let pulse = Pulse::new();
    let mut staged = StagedFile::create(staging, "", Mode::PRIVATE, &pulse)?;
    write(&mut staged).map_err(|error| staged.failed("write", &error))?;
    set_rights(&staged)?;
    staged.sync(None)?;
    staged.replace(path)?;
    sync_directory(directory_of(path))
}

/// Removes a directory if it is empty; answers whether it was there and is gone. Its entry in the parent is not durably
/// gone until that is synced.
pub fn remove_empty_directory(path: &Path) -> Result<bool> {
    match fs::remove_dir(path) {
        Ok(()) => Ok(true),
        // A link to a directory is somebody's arrangement.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTEMPTY | libc::EEXIST | libc::ENOTDIR)) => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove directory", path, &error)),
    }
}

/// Removes temporary files in `directory` whose name starts with `prefix` and whose maker is gone; answers how many.
/// A directory that is not there holds none. At most a few thousand are looked at in one call.
pub fn sweep_leftovers(directory: &Path, prefix: &str) -> Result<u64> {
    // Another process may sweep at the same time.
    Ok(leftovers(directory, prefix)?.iter().filter(|path| fs::remove_file(path).is_ok()).count() as u64)
}

/// The temporary files that [`sweep_leftovers`] would remove.
pub fn leftovers(directory: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    const MOST: usize = 10_000;
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read directory", directory, &error)),
    };
    let mut found = Vec::new();
    for entry in entries.take(MOST).flatten() {
        let name = entry.file_name();
        let Some(owner) = name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(Owner::of_name) else {
            continue;
        };
        // By its change time: its modification time is that of the WAL in it.
        let changed = entry.metadata().map(|meta| UNIX_EPOCH + Duration::from_secs(meta.ctime().max(0) as u64));
        if changed.is_ok_and(|changed| owner.has_left(changed)) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn staged<'a>(directory: &Path, pulse: &'a Pulse) -> StagedFile<'a> {
        let mut file = StagedFile::create(directory, "", Mode::new(0o640).unwrap(), pulse).unwrap();
        file.write_all(b"content").unwrap();
        file
    }

    fn names(directory: &Path) -> Vec<String> {
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_published_file_stands_alone_with_its_mode_and_time() {
        let directory = tempfile::tempdir().unwrap();
        let pulse = Pulse::new();
        let mut file = staged(directory.path(), &pulse);
        let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_615_159_937_463_971_234);
        file.sync(Some(modified)).unwrap();
        assert_eq!(file.publish(&directory.path().join("wal")).unwrap(), Published::Created);
        drop(file);
        assert_eq!(names(directory.path()), ["wal"]);
        let meta = fs::metadata(directory.path().join("wal")).unwrap();
        assert_eq!(meta.mode() & 0o7777, 0o640);
        assert_eq!(meta.modified().unwrap(), modified);
    }

    #[test]
    fn publishing_never_replaces() {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("wal");
        fs::write(&target, "older").unwrap();
        let pulse = Pulse::new();
        assert_eq!(staged(directory.path(), &pulse).publish(&target).unwrap(), Published::AlreadyExists);
        assert_eq!(fs::read_to_string(&target).unwrap(), "older");
        assert_eq!(names(directory.path()), ["wal"]);
    }

    #[test]
    fn renaming_instead_of_linking_never_replaces_either() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        fs::write(&from, "new").unwrap();
        fs::write(&to, "older").unwrap();
        let error = rename_without_replacing(&from, &to).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        fs::remove_file(&to).unwrap();
        rename_without_replacing(&from, &to).unwrap();
        assert_eq!(names(directory.path()), ["to"]);
    }

    #[test]
    fn a_stopped_pulse_ends_a_write() {
        let directory = tempfile::tempdir().unwrap();
        let pulse = Pulse::new();
        let mut file = staged(directory.path(), &pulse);
        let beats = pulse.beats();
        file.write_all(b"more").unwrap();
        assert!(pulse.beats() > beats);
        pulse.stop();
        assert!(file.write_all(b"more").is_err());
        drop(file);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn only_leftovers_of_the_dead_are_swept() {
        let directory = tempfile::tempdir().unwrap();
        let alive = Owner::current().unique_name();
        let host = alive.split('.').next().unwrap();
        let dead = format!("{host}.4194305.1.0");
        for name in [&alive, &dead, "foreign.file", "elsewhere.1.1.1"] {
            fs::write(directory.path().join(name), "x").unwrap();
        }
        assert_eq!(sweep_leftovers(directory.path(), "").unwrap(), 1);
        assert!(!directory.path().join(dead).exists());
        assert_eq!(names(directory.path()).len(), 3);
        assert_eq!(sweep_leftovers(&directory.path().join("missing"), "").unwrap(), 0);
    }

    #[test]
    fn a_rewritten_file_keeps_its_rights_and_leaves_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let [staging, wals] = ["staging", "wals"].map(|name| directory.path().join(name));
        [&staging, &wals].iter().for_each(|path| fs::create_dir(path).unwrap());
        let path = wals.join("main-xlog.db");
        fs::write(&path, "older").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o660)).unwrap();
        let before = fs::metadata(&path).unwrap();
        rewrite_file(&path, &staging, |out| out.write_all(b"newer")).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "newer");
        let after = fs::metadata(&path).unwrap();
        assert_eq!((after.mode(), after.uid(), after.gid()), (before.mode(), before.uid(), before.gid()));
        let failed = rewrite_file(&path, &staging, |_| Err(io::Error::other("torn"))).unwrap_err();
        assert!(failed.message().contains("torn"), "{failed}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "newer");
        assert!(names(&staging).is_empty() && names(&wals).len() == 1);
    }

    #[test]
    fn a_directory_goes_only_where_it_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("folder");
        assert!(!remove_empty_directory(&path).unwrap());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), "x").unwrap();
        assert!(!remove_empty_directory(&path).unwrap());
        assert!(!remove_empty_directory(&path.join("file")).unwrap());
        fs::remove_file(path.join("file")).unwrap();
        assert!(remove_empty_directory(&path).unwrap());
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn a_created_directory_keeps_the_setgid_bit_of_its_parent() {
        let parent = tempfile::tempdir().unwrap();
        fs::set_permissions(parent.path(), Permissions::from_mode(0o2755)).unwrap();
        let made = parent.path().join("wals");
        create_directory(&made, Mode::new(0o640).unwrap()).unwrap();
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o7777, 0o2750);
        create_directory(&made, Mode::PRIVATE).unwrap();
    }
}
