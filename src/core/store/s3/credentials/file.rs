//! Files read beside the runtime: one on a dead mount must not stop it.

use super::deadline::Deadline;
use crate::error::{Error, Kind, Result, plain_cause};
use crate::regular_file::{self, Links};
use std::fs::Metadata;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// Threads that may hang on a dead mount at a time; a further read waits for one of them, up to its deadline.
const MOST_READS: usize = 4;

/// Reads files in threads of the runtime, in bounded time.
pub(super) struct Files {
    permits: Arc<Semaphore>,
    patience: Duration,
}

impl Files {
    pub fn new(patience: Duration) -> Self {
        Files { permits: Arc::new(Semaphore::new(MOST_READS)), patience }
    }

    /// Does `work` in a thread that may hang. `subject` is what the error is about, where it does.
    pub async fn beside<T, W>(&self, subject: &str, deadline: Deadline, work: W) -> Result<T>
    where
        T: Send + 'static,
        W: FnOnce() -> T + Send + 'static,
    {
        let permits = Arc::clone(&self.permits);
        let done = async {
            // Held until the work ends, not until it is given up.
            let permit = permits.acquire_owned().await.ok()?;
            let work = move || {
                let done = work();
                drop(permit);
                done
            };
            tokio::task::spawn_blocking(work).await.ok()
        };
        let patience = deadline.leaves(self.patience);
        match tokio::time::timeout(patience, done).await {
            Ok(Some(done)) => Ok(done),
            Ok(None) => Err(Error::new(Kind::Internal, subject, format!("reading {subject} ended without an answer"))),
            Err(_) => {
                let message = format!("could not read {subject}: no answer within {patience:.1?}");
                let hint = "The file system it lies on may hang.";
                Err(Error::new(Kind::Storage, subject, message).hint(hint).retry_if(true))
            }
        }
    }

    /// What a file that holds one token holds, without the white space around it.
    pub async fn token(&self, what: &str, path: &Path, deadline: Deadline) -> Result<String> {
        const MOST_BYTES: u64 = 64 << 10;
        let subject = format!("{what} \"{}\"", path.display());
        let path = path.to_path_buf();
        let read = self.beside(&subject, deadline, move || read_text(&path, MOST_BYTES)).await?;
        let cannot = |cause: &str, kind| Error::new(kind, &subject, format!("could not read {subject}: {cause}"));
        let (text, _) = read.map_err(|error| cannot(&plain_cause(&error), Kind::Configuration))?;
        let token = text.trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ') {
            return Err(cannot("it holds no token", Kind::Configuration));
        }
        Ok(token.to_string())
    }
}

/// Tells whether the file at a path is still the one that was read. One that was absent has a stamp, too: it may appear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    path: PathBuf,
    /// Device, inode, size, and the times of its last change, both in seconds and nanoseconds.
    found: Option<[i128; 5]>,
}

impl Stamp {
    pub fn absent(path: &Path) -> Self {
        Stamp { path: path.to_path_buf(), found: None }
    }

    fn of(path: &Path, metadata: &Metadata) -> Self {
        let nanoseconds =
            |seconds: i64, nanoseconds: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        let found = [
            metadata.dev().into(),
            metadata.ino().into(),
            metadata.len().into(),
            nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
            nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        ];
        Stamp { path: path.to_path_buf(), found: Some(found) }
    }

    /// Whether another file stands there now, or the same one with other contents. May hang on a dead mount.
    pub fn is_outdated(&self) -> bool {
        match std::fs::metadata(&self.path) {
            Ok(metadata) => Stamp::of(&self.path, &metadata) != *self,
            Err(_) => self.found.is_some(),
        }
    }
}

/// All of a text file of at most `most` bytes. May hang on a dead mount.
pub(super) fn read_text(path: &Path, most: u64) -> io::Result<(String, Stamp)> {
    let (file, metadata) = regular_file::open(path, Links::Followed)?;
    let mut bytes = Vec::new();
    (&file).take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::other(format!("it is larger than {most} bytes")));
    }
    let text = String::from_utf8(bytes).map_err(|_| io::Error::other("it is not UTF-8 text"))?;
    Ok((text, Stamp::of(path, &metadata)))
}

#[cfg(test)]
mod tests {
    use super::super::stand_in::block_on;
    use super::*;
    use nix::sys::stat::Mode;
    use std::fs;

    fn files() -> Files {
        Files::new(Duration::from_millis(50))
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(5))
    }

    #[test]
    fn a_file_that_hangs_is_given_up_and_threads_do_not_pile_up() {
        let started = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let (release, hold) = std::sync::mpsc::channel::<()>();
        let hold = Arc::new(std::sync::Mutex::new(hold));
        block_on(async {
            let files = files();
            for _ in 0..MOST_READS + 2 {
                let (started, hold) = (Arc::clone(&started), Arc::clone(&hold));
                let hang = move || {
                    started.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    let _ = hold.lock().unwrap().recv();
                };
                let error = files.beside("file \"/mnt/x\"", soon(), hang).await.unwrap_err();
                assert_eq!(error.to_string(), "could not read file \"/mnt/x\": no answer within 50.0ms");
                assert!(error.is_worth_retrying());
            }
            drop(release);
        });
        assert_eq!(started.load(std::sync::atomic::Ordering::SeqCst), MOST_READS);
    }

    #[test]
    fn a_token_is_read_without_the_line_end_and_never_from_a_pipe() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        fs::write(&path, "ey.J0\n").unwrap();
        let read = |path: &Path| block_on(files().token("token file", path, soon()));
        assert_eq!(read(&path).unwrap(), "ey.J0");
        fs::write(&path, "two\nlines").unwrap();
        let shown = path.display();
        assert_eq!(
            read(&path).unwrap_err().to_string(),
            format!("could not read token file \"{shown}\": it holds no token")
        );
        fs::write(&path, vec![b'x'; 70_000]).unwrap();
        assert!(read(&path).unwrap_err().to_string().ends_with(": it is larger than 65536 bytes"));
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        assert!(read(&pipe).unwrap_err().to_string().ends_with(": it is not a regular file"));
    }

    #[test]
    fn a_stamp_tells_a_replaced_and_an_appeared_and_a_vanished_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("credentials");
        let absent = Stamp::absent(&path);
        assert!(!absent.is_outdated());
        fs::write(&path, "a").unwrap();
        assert!(absent.is_outdated());
        let (_, stamp) = read_text(&path, 10).unwrap();
        assert!(!stamp.is_outdated());
        let other = directory.path().join("other");
        fs::write(&other, "b").unwrap();
        fs::rename(&other, &path).unwrap();
        assert!(stamp.is_outdated());
        fs::remove_file(&path).unwrap();
        assert!(stamp.is_outdated());
    }
}
