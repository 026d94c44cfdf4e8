//! A sign of life from work in progress, and the word to stop it.

use crate::error::{Error, Kind, Result};
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared by the thread that waits and the threads that work.
#[derive(Debug, Default)]
pub struct Pulse {
    beats: AtomicU64,
    hurry: AtomicBool,
    stop: AtomicBool,
}

impl Pulse {
    /// A pulse that beats for nobody yet.
    pub const fn new() -> Self {
        Pulse { beats: AtomicU64::new(0), hurry: AtomicBool::new(false), stop: AtomicBool::new(false) }
    }

    /// Says that some work was done: a piece moved, the storage answered.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has beaten. Two equal answers: nothing moved in between.
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Says whether time is short: what fails is better told soon than tried again for long.
    pub fn hurry(&self, is_short_of_time: bool) {
        self.hurry.store(is_short_of_time, Ordering::Relaxed);
    }

    /// Whether time is short.
    pub fn is_hurried(&self) -> bool {
        self.hurry.load(Ordering::Relaxed)
    }

    /// Asks all work to end at the next piece.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether work was asked to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Beats, between two pieces of work; fails once it was told to stop.
    pub fn go_on(&self) -> Result<()> {
        self.beat();
        match self.is_stopped() {
            false => Ok(()),
            true => Err(Error::new(Kind::Interrupted, "work", "stopped before it was done")),
        }
    }
}

/// Hands on what `inner` reads, and beats; fails once the pulse was told to stop.
pub struct Beating<'a, R> {
    inner: R,
    pulse: &'a Pulse,
}

impl<'a, R: Read> Beating<'a, R> {
    /// Reads from `inner`.
    pub fn new(inner: R, pulse: &'a Pulse) -> Self {
        Beating { inner, pulse }
    }
}

impl<R: Read> Read for Beating<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.pulse.is_stopped() {
            // Not ErrorKind::Interrupted, which the standard library answers by trying again.
            return Err(io::Error::other("stopped before the file was read"));
        }
        let count = self.inner.read(buffer)?;
        self.pulse.beat();
        Ok(count)
    }
}
