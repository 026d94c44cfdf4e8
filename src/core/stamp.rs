//! Which file it was, as the kernel tells it.

use std::fmt::{self, Display, Formatter};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A file re-created under the same name, or written to since, has another stamp. A rename leaves it as it is.
/// While the machine runs: what a crash leaves of a file that was not synced may have the stamp of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
}

impl Stamp {
    /// The stamp of the file at `path` now.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        path.metadata().map(|meta| Stamp::of(&meta))
    }

    /// The stamp of the file with that metadata.
    pub fn of(meta: &Metadata) -> Self {
        Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        }
    }

    /// The size of the file, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

impl Display for Stamp {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Stamp { device, inode, size, modified_ns } = self;
        write!(f, "{device}-{inode}-{size}-{modified_ns}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, FileTimes};
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn a_renamed_file_keeps_its_stamp_and_a_copied_or_changed_one_does_not() {
        let directory = tempfile::tempdir().unwrap();
        let [path, renamed, copied] = ["a", "b", "c"].map(|name| directory.path().join(name));
        fs::write(&path, "content").unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let modified = FileTimes::new().set_modified(UNIX_EPOCH + Duration::new(1_000_000_000, 1));
        file.set_times(modified).unwrap();
        let stamp = Stamp::of_path(&path).unwrap();
        assert_eq!(stamp.size(), 7);
        fs::rename(&path, &renamed).unwrap();
        assert_eq!(Stamp::of_path(&renamed).unwrap(), stamp);
        fs::copy(&renamed, &copied).unwrap();
        fs::File::options().write(true).open(&copied).unwrap().set_times(modified).unwrap();
        assert_ne!(Stamp::of_path(&copied).unwrap(), stamp);
        fs::write(&renamed, "CONTENT").unwrap();
        assert_ne!(Stamp::of_path(&renamed).unwrap(), stamp);
        file.set_times(FileTimes::new().set_modified(UNIX_EPOCH + Duration::new(1_000_000_000, 2))).unwrap();
        assert_ne!(Stamp::of_path(&renamed).unwrap(), stamp);
        file.set_times(modified).unwrap();
        assert_eq!(Stamp::of_path(&renamed).unwrap(), stamp);
        file.set_len(3).unwrap();
        file.set_times(modified).unwrap();
        assert_ne!(Stamp::of_path(&renamed).unwrap(), stamp);
    }
}
