//! Work that may hang (a dead network file system), done on a thread of its own while the main thread stays awake.

use super::ffi;
use archiver_core::error::plain_cause;
use archiver_core::pulse::Pulse;
use archiver_core::threads::with_signals_blocked;
use archiver_core::{Error, Kind, Result};
use std::io::{ErrorKind, Read, Write};
use std::ops::ControlFlow;
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

fn run_within<T: Send + 'static>(
    patience: Patience,
    work: impl FnOnce(&Arc<Pulse>) -> T + Send + 'static,
) -> Result<T> {
    let mut call = Call::start(patience, move |pulse, _| work(pulse))?;
    let last = call.next();
    call.is_over = last.is_ok();
    last?.ok_or_else(panicked)
}

/// The same for work that hands over one thing after the other; it may go `patience` without a beat of the pulse while one
/// is waited for. `work` ends where what it hands over is not wanted any more, which the answer tells.
pub fn stream<T: Send + 'static>(
    patience: Duration,
    work: impl FnOnce(&Arc<Pulse>, HandOver<'_, T>) -> Result<()> + Send + 'static,
) -> Result<Stream<T>> {
    let work = move |pulse: &_, hand_over: HandOver<'_, _>| {
        let ended = work(pulse, &mut |thing| hand_over(Some(Ok(thing))));
        ended.err().map(Err)
    };
    let patience = Patience { quiet: patience, all: Duration::MAX, end: Duration::ZERO };
    Ok(Stream(Call::start(patience, work)?))
}

/// What comes from work on a thread. Whoever drops it ends the work.
pub struct Stream<T>(Call<Option<Result<T>>>);

impl<T> Stream<T> {
    /// The next thing; nothing once all have come.
    pub fn next(&mut self) -> Result<Option<T>> {
        self.0.next()?.ok_or_else(panicked)?.transpose()
    }
}

fn panicked() -> Error {
    Error::new(Kind::Internal, "thread", "internal error in a thread; the server log has more")
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

/// How much a thread may hand over before it is taken.
const MOST_WAITING: usize = 64;
/// How often a wait looks whether the work still moves.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Hands over one thing from a thread; the answer tells whether more is wanted.
type HandOver<'a, T> = &'a mut dyn FnMut(T) -> ControlFlow<()>;

/// Work on a thread, and the way it hands things over. Dropped, also where a wait ends by raising, it tells the work to
/// end, and gives it the time that is due for that.
struct Call<T> {
    wake_up: UnixStream,
    receiver: mpsc::Receiver<T>,
    pulse: Arc<Pulse>,
    patience: Patience,
    is_over: bool,
}

impl<T: Send + 'static> Call<T> {
    /// `work` may hand things over before it answers with the last one.
    fn start(
        patience: Patience,
        work: impl FnOnce(&Arc<Pulse>, HandOver<'_, T>) -> T + Send + 'static,
    ) -> Result<Self> {
        let Some(permit) = Permit::take() else {
            let message = "earlier calls of this session still hang in the storage";
            return Err(Error::new(Kind::Storage, "storage", message));
        };
        let (wake_up, waker) = wake_up_pair()?;
        let (sender, receiver) = mpsc::sync_channel(MOST_WAITING);
        let pulse: Arc<Pulse> = Arc::default();
        let beaten = Arc::clone(&pulse);
        let spawned = with_signals_blocked(|| {
            std::thread::Builder::new().name("archiver call".into()).spawn(move || {
                let mut hand_over = |thing| {
                    // The caller may have given up.
                    let sent = sender.send(thing);
                    wake(&waker);
                    if sent.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                };
                let last = work(&beaten, &mut hand_over);
                // Before the caller can know, and call again.
                drop(permit);
                let _ = hand_over(last);
            })
        });
        spawned.map_err(|error| {
            Error::new(Kind::Internal, "thread", format!("could not start a thread: {}", plain_cause(&error)))
        })?;
        Ok(Call { wake_up, receiver, pulse, patience, is_over: false })
    }
}

impl<T> Call<T> {
    /// The next thing; nothing where the thread has ended.
    fn next(&mut self) -> Result<Option<T>> {
        let Patience { quiet, all, .. } = self.patience;
        let (began, mut beats, mut moved) = (Instant::now(), self.pulse.beats(), Instant::now());
        loop {
            match self.receiver.try_recv() {
                Ok(thing) => return Ok(Some(thing)),
                Err(mpsc::TryRecvError::Disconnected) => {
                    self.is_over = true;
                    return Ok(None);
                }
                Err(mpsc::TryRecvError::Empty) => {}
            }
            if self.pulse.beats() != beats {
                (beats, moved) = (self.pulse.beats(), Instant::now());
            }
            let left = quiet.saturating_sub(moved.elapsed()).min(all.saturating_sub(began.elapsed()));
            if left.is_zero() {
                let message = format!("the storage did not answer for {} s", quiet.as_secs());
                return Err(Error::new(Kind::Storage, "storage", message));
            }
            let woken = ffi::wait(self.wake_up.as_fd(), left.min(LOOK_INTERVAL));
            if woken.by_postmaster_death {
                return Err(Error::new(Kind::Interrupted, "postmaster", "the postmaster died"));
            }
            if woken.by_latch {
                ffi::reset_latch();
            }
            ffi::check_for_interrupts();
            drain(&self.wake_up);
        }
    }
}

impl<T> Drop for Call<T> {
    fn drop(&mut self) {
        self.pulse.stop();
        if !self.is_over && !self.patience.end.is_zero() {
            // What it answers is of no use any more, nor is that it ended without an answer.
            let _ = self.receiver.recv_timeout(self.patience.end);
        }
    }
}
