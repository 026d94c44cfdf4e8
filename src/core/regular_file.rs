//! Opening a file that somebody else names. Whatever else stands there is told, and never waited for.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What becomes of a symbolic link in place of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// What it leads to is meant.
    Followed,
    /// It is an error.
    Refused,
}

/// Opens the regular file at `path` for reading. A pipe that nobody writes to, a device, a directory are errors at once.
pub fn open(path: &Path, links: Links) -> io::Result<(File, Metadata)> {
    let no_follow = if links == Links::Refused { libc::O_NOFOLLOW } else { 0 };
    // Without waiting (open(2), O_NONBLOCK), which does nothing to a regular file.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | no_follow).open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() { Ok((file, meta)) } else { Err(io::Error::other("it is not a regular file")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_a_regular_file_is_opened_and_a_link_only_where_it_is_meant() {
        let directory = tempfile::tempdir().unwrap();
        let [file, pipe, link] = ["file", "pipe", "link"].map(|name| directory.path().join(name));
        fs::write(&file, "text").unwrap();
        nix::unistd::mkfifo(&pipe, Mode::from_bits_truncate(0o600)).unwrap();
        symlink(&file, &link).unwrap();
        for links in [Links::Followed, Links::Refused] {
            assert_eq!(open(&file, links).unwrap().1.len(), 4);
            for other in [pipe.as_path(), directory.path(), Path::new("/dev/zero")] {
                assert_eq!(open(other, links).unwrap_err().to_string(), "it is not a regular file");
            }
        }
        assert_eq!(open(&link, Links::Followed).unwrap().1.len(), 4);
        assert_eq!(open(&link, Links::Refused).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    }
}
