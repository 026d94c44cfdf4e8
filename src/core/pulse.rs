//! A sign of life from work in progress, and the word to stop it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared by the thread that waits and the threads that work.
#[derive(Debug, Default)]
pub struct Pulse {
    beats: AtomicU64,
    stop: AtomicBool,
}

impl Pulse {
    /// A pulse that beats for nobody yet.
    pub const fn new() -> Self {
        Pulse { beats: AtomicU64::new(0), stop: AtomicBool::new(false) }
    }

    /// Says that some work was done: a piece moved, the storage answered.
    pub fn beat(&self) {
        self.beats.fetch_add(1, Ordering::Relaxed);
    }

    /// How often it has beaten. Two equal answers: nothing moved in between.
    pub fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// Asks all work to end at the next piece.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether work was asked to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
