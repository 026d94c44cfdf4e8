//! Work that may hang (a dead network file system), done on a thread of its own while the main thread stays awake.

use super::ffi;
use archiver_core::error::plain_cause;
use archiver_core::pulse::Pulse;
use archiver_core::threads::with_signals_blocked;
use archiver_core::{Error, Kind, Result};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Two connected sockets: the first becomes readable when [`wake`] was called on the second.
pub fn wake_up_pair() -> Result<(UnixStream, UnixStream)> {
    let pair = UnixStream::pair().and_then(|(reader, writer)| {
        reader.set_nonblocking(true)?;
        writer.set_nonblocking(true)?;
        Ok((reader, writer))
    });
    pair.map_err(|error| {
        Error::new(Kind::Internal, "socket", format!("could not make a pair of sockets: {}", plain_cause(&error)))
    })
}

/// Wakes the main thread. Any thread may; it never blocks. A full socket is as good as a written one.
pub fn wake(mut writer: &UnixStream) {
    let _ = writer.write(&[1]);
}

/// Takes all wake-ups that have come.
pub fn drain(mut reader: &UnixStream) {
    let mut bytes = [0; 64];
    loop {
        match reader.read(&mut bytes) {
            Ok(count) if count == bytes.len() => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

/// The inode of a file, or 0.
pub fn inode_of(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |meta| meta.ino())
}

/// How many threads a session may leave behind in a storage that hangs.
const MOST_CALLS: usize = 2;
static CALLS: AtomicUsize = AtomicUsize::new(0);

/// The permission to run one of those threads; it goes with the thread and ends with its work.
struct Permit;

impl Permit {
    fn take() -> Option<Self> {
        let counted =
            CALLS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |calls| (calls < MOST_CALLS).then_some(calls + 1));
        counted.is_ok().then_some(Permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        CALLS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells work that nobody waits for any more to end, and gives it some time for that; also where the wait ends by raising.
struct Waiting<T> {
    pulse: Arc<Pulse>,
    receiver: mpsc::Receiver<T>,
    end: Duration,
}

impl<T> Drop for Waiting<T> {
    fn drop(&mut self) {
        self.pulse.stop();
        if !self.end.is_zero() {
            // What it answers is of no use any more, nor is that it ended without an answer.
            let _ = self.receiver.recv_timeout(self.end);
        }
    }
}

/// Runs `work` on a thread, with every signal blocked, and waits for it until `patience` is over. A cancel, a
/// statement_timeout or a termination ends the wait by raising. Work that beats the pulse then ends by itself; a thread
/// that hangs in the kernel is left behind and touches nothing of PostgreSQL's.
pub fn run<T: Send + 'static>(patience: Duration, work: impl FnOnce(&Arc<Pulse>) -> T + Send + 'static) -> Result<T> {
    run_within(Patience { quiet: patience, all: patience, end: Duration::ZERO }, work)
}

/// The same for work that changes things and may take long: it may go `patience` without a beat of the pulse. A cancel or a
/// statement_timeout gives it half a second to come to an end of its own before it is raised; a termination does not.
pub fn run_to_an_end<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce(&Arc<Pulse>) -> T + Send + 'static,
) -> Result<T> {
    run_within(Patience { quiet: patience, all: Duration::MAX, end: Duration::from_millis(500) }, work)
}

/// How long work is waited for.
struct Patience {
    /// Without a beat.
    quiet: Duration,
    /// In all.
    all: Duration,
    /// Once it was told to stop.
    end: Duration,
}

fn run_within<T: Send + 'static>(
    patience: Patience,
    work: impl FnOnce(&Arc<Pulse>) -> T + Send + 'static,
) -> Result<T> {
    let Some(permit) = Permit::take() else {
        return Err(Error::new(Kind::Storage, "storage", "earlier calls of this session still hang in the storage"));
    };
    let (wake_up, waker) = wake_up_pair()?;
    let (sender, receiver) = mpsc::channel();
    let mut waiting = Waiting { pulse: Arc::default(), receiver, end: Duration::ZERO };
    let pulse = Arc::clone(&waiting.pulse);
    let spawned = with_signals_blocked(|| {
        std::thread::Builder::new().name("archiver call".into()).spawn(move || {
            let result = work(&pulse);
            drop(permit);
            // The caller may have given up.
            let _ = sender.send(result);
            wake(&waker);
        })
    });
    spawned.map_err(|error| {
        Error::new(Kind::Internal, "thread", format!("could not start a thread: {}", plain_cause(&error)))
    })?;
    waiting.end = patience.end;
    let (began, mut beats, mut moved) = (Instant::now(), waiting.pulse.beats(), Instant::now());
    loop {
        match waiting.receiver.try_recv() {
            Ok(result) => {
                waiting.end = Duration::ZERO;
                return Ok(result);
            }
            Err(mpsc::TryRecvError::Disconnected) => {
                waiting.end = Duration::ZERO;
                return Err(Error::new(
                    Kind::Internal,
                    "thread",
                    "internal error in a thread; the server log has more",
                ));
            }
            Err(mpsc::TryRecvError::Empty) => {}
        }
        if waiting.pulse.beats() != beats {
            (beats, moved) = (waiting.pulse.beats(), Instant::now());
        }
        let left = patience.quiet.saturating_sub(moved.elapsed()).min(patience.all.saturating_sub(began.elapsed()));
        if left.is_zero() {
            let seconds = patience.quiet.as_secs();
            return Err(Error::new(Kind::Storage, "storage", format!("the storage did not answer for {seconds} s")));
        }
        let woken = ffi::wait(wake_up.as_fd(), left);
        if woken.by_postmaster_death {
            return Err(Error::new(Kind::Interrupted, "postmaster", "the postmaster died"));
        }
        if woken.by_latch {
            ffi::reset_latch();
        }
        ffi::check_for_interrupts();
        drain(&wake_up);
    }
}
