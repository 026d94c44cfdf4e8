//! The lock of a file (flock(2)), waited for with a bound.

use std::fs::{File, TryLockError};
use std::io;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(10);

/// Locks `file` for this caller alone, until it is closed; answers whether that came about before `patience` was over or
/// `is_stopped` said so.
pub fn acquire(file: &File, patience: Duration, is_stopped: impl Fn() -> bool) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if is_stopped() || Instant::now() >= deadline => return Ok(false),
            Err(TryLockError::WouldBlock) => std::thread::sleep(POLL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_lock_is_waited_for_until_it_is_free_or_patience_ends() {
        let directory = tempfile::tempdir().unwrap();
        let open = || File::create(directory.path().join("lock")).unwrap();
        let (first, second) = (open(), open());
        assert!(acquire(&first, Duration::ZERO, || false).unwrap());
        assert!(!acquire(&second, Duration::from_millis(30), || false).unwrap());
        assert!(!acquire(&second, Duration::from_secs(60), || true).unwrap());
        let first = Cell::new(Some(first));
        let is_stopped = || {
            drop(first.take());
            false
        };
        assert!(acquire(&second, Duration::from_secs(60), is_stopped).unwrap(), "it was given free meanwhile");
    }
}
