//! Where files are read and encoded: as many desks as processors shall work, whoever waits for the storage besides.

use super::encoding_failed;
use crate::codec::{Compression, Encoder};
use crate::crypt::{self, Reader, Seed};
use crate::error::{Error, Kind, Result};
use crate::pulse::Pulse;
use bytes::Bytes;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a wait looks whether the archiver stops.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// Buffers and an encoder, which are kept between files.
#[derive(Default)]
pub struct Desk {
    /// The source as it was read.
    pub plain: Vec<u8>,
    /// What became of it, compressed.
    pub encoded: Vec<u8>,
    /// And encrypted.
    pub encrypted: Vec<u8>,
    encoder: Option<(Compression, i32, Encoder)>,
}

impl Desk {
    /// Encrypts what was encoded last, or else the source as it was read.
    pub fn encrypt(&mut self, readers: &[Reader], is_encoded: bool) -> io::Result<()> {
        let clear = if is_encoded { &self.encoded } else { &self.plain };
        self.encrypted.clear();
        let most = clear.len() as u64 + crypt::most_added_bytes(readers.len(), clear.len() as u64);
        self.encrypted.try_reserve_exact(usize::try_from(most).map_err(|_| io::ErrorKind::OutOfMemory)?)?;
        crypt::encrypt(readers, &Seed::random(), clear.as_slice(), &mut self.encrypted)
    }

    /// The encoder for that format and level, and the two buffers.
    pub fn encoder(&mut self, compression: Compression, level: i32) -> Result<(&mut Encoder, &[u8], &mut Vec<u8>)> {
        if !matches!(&self.encoder, Some((kept, at, _)) if (*kept, *at) == (compression, level)) {
            self.encoder = None;
        }
        let encoder = match self.encoder.take() {
            Some(kept) => kept,
            None => {
                let made = Encoder::new(compression, level).map_err(|error| encoding_failed(compression, &error))?;
                (compression, level, made)
            }
        };
        let (_, _, encoder) = self.encoder.insert(encoder);
        Ok((encoder, &self.plain, &mut self.encoded))
    }
}

/// All desks of an archive, and the room for bodies that are on their way to a store.
pub struct Desks {
    desks: usize,
    room_bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    idle: Vec<Desk>,
    taken: usize,
    tickets: u64,
    served: u64,
    bodies_bytes: u64,
}

impl Desks {
    /// So many desks, at least one, and so much room for bodies; a single one may be larger.
    pub fn new(desks: usize, room_bytes: u64) -> Self {
        Desks { desks: desks.max(1), room_bytes, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Waits for a desk; the wait ends when the archiver stops.
    pub fn take(&self, pulse: &Pulse) -> Result<TakenDesk<'_>> {
        // Whoever came first: the file that PostgreSQL asks for is handed out before those behind it.
        let ticket = {
            let mut state = self.lock();
            state.tickets += 1;
            state.tickets - 1
        };
        let mut state = self.wait(pulse, |state| state.served != ticket || state.taken >= self.desks)?;
        state.served += 1;
        state.taken += 1;
        self.changed.notify_all();
        let desk = state.idle.pop().unwrap_or_default();
        Ok(TakenDesk { desks: self, desk })
    }

    /// Copies a body, once there is room for it, so that its desk is free for the next file.
    pub fn keep(&self, body: &[u8], pulse: &Pulse) -> Result<KeptBody<'_>> {
        let bytes = body.len() as u64;
        let is_full = |state: &State| state.bodies_bytes > 0 && state.bodies_bytes + bytes > self.room_bytes;
        self.wait(pulse, is_full)?.bodies_bytes += bytes;
        let mut kept = KeptBody { desks: self, body: Bytes::new(), bytes };
        let mut copy = Vec::new();
        // Memory that is refused must not end the process.
        copy.try_reserve_exact(body.len()).map_err(|_| {
            let message = format!("could not get {bytes} bytes of memory");
            Error::new(Kind::Storage, "memory", message)
                .hint("Lower archiver.read_ahead or archiver.memory_limit, or give the server more memory.")
                .retry_if(true)
        })?;
        copy.extend_from_slice(body);
        kept.body = Bytes::from(copy);
        Ok(kept)
    }

    fn wait(&self, pulse: &Pulse, is_to_wait: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        while is_to_wait(&state) {
            if pulse.is_stopped() {
                return Err(Error::new(Kind::Interrupted, "memory", "stopped before there was room for the file"));
            }
            state = self.changed.wait_timeout(state, LOOK_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A desk at which one file is worked on.
pub struct TakenDesk<'a> {
    desks: &'a Desks,
    desk: Desk,
}

impl Deref for TakenDesk<'_> {
    type Target = Desk;

    fn deref(&self) -> &Desk {
        &self.desk
    }
}

impl DerefMut for TakenDesk<'_> {
    fn deref_mut(&mut self) -> &mut Desk {
        &mut self.desk
    }
}

impl Drop for TakenDesk<'_> {
    fn drop(&mut self) {
        let mut state = self.desks.lock();
        state.taken -= 1;
        // What a panic left on a desk is nobody's to use.
        if !std::thread::panicking() {
            state.idle.push(std::mem::take(&mut self.desk));
        }
        drop(state);
        self.desks.changed.notify_all();
    }
}

/// A body on its way, and the room it takes.
pub struct KeptBody<'a> {
    desks: &'a Desks,
    /// The body.
    pub body: Bytes,
    bytes: u64,
}

impl Drop for KeptBody<'_> {
    fn drop(&mut self) {
        self.desks.lock().bodies_bytes -= self.bytes;
        self.desks.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_more_files_are_worked_on_than_there_are_desks() {
        let (desks, pulse) = (Desks::new(2, 0), Pulse::new());
        let (one, _two) = (desks.take(&pulse).unwrap(), desks.take(&pulse).unwrap());
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let (desks, pulse) = (&desks, &pulse);
            scope.spawn(move || sender.send(desks.take(pulse).is_ok()));
            assert!(receiver.recv_timeout(Duration::from_millis(150)).is_err());
            drop(one);
            assert_eq!(receiver.recv(), Ok(true));
        });
    }

    #[test]
    fn bodies_wait_for_room_and_a_single_one_never() {
        let (desks, pulse) = (Desks::new(1, 100), Pulse::new());
        let large = desks.keep(&[1; 300], &pulse).unwrap();
        assert_eq!(large.body.len(), 300);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            let (desks, pulse) = (&desks, &pulse);
            scope.spawn(move || sender.send(desks.keep(&[1; 60], pulse).map(|kept| kept.body.len()).ok()));
            assert!(receiver.recv_timeout(Duration::from_millis(150)).is_err());
            drop(large);
            assert_eq!(receiver.recv(), Ok(Some(60)));
        });
        let (_a, _b) = (desks.keep(&[1; 60], &pulse).unwrap(), desks.keep(&[1; 40], &pulse).unwrap());
    }

    #[test]
    fn a_stop_ends_the_wait_for_a_desk() {
        let (desks, pulse) = (Desks::new(1, 0), Pulse::new());
        let _taken = desks.take(&pulse).unwrap();
        pulse.stop();
        assert_eq!(desks.take(&pulse).err().map(|error| error.kind()), Some(Kind::Interrupted));
    }

    #[test]
    fn buffers_are_used_again_and_those_of_a_panic_are_not() {
        let (desks, pulse) = (Desks::new(1, 0), Pulse::new());
        desks.take(&pulse).unwrap().plain.extend_from_slice(b"content");
        assert_eq!(desks.take(&pulse).unwrap().plain, b"content");
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _desk = desks.take(&pulse).unwrap();
            panic!("at the desk");
        }));
        assert!(panicked.is_err());
        assert!(desks.take(&pulse).unwrap().plain.is_empty());
    }
}
