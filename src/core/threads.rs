//! Threads inside somebody else's process.

use nix::sys::signal::{SigSet, SigmaskHow};

/// Runs `spawn` while every signal is blocked, so that the new thread never runs a handler of the process and never
/// takes a signal that was meant for its main thread.
pub fn with_signals_blocked<T>(spawn: impl FnOnce() -> T) -> T {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK);
    let result = spawn();
    if let Ok(before) = before {
        // It can only fail for a mask that the kernel did not hand out.
        let _ = before.thread_set_mask();
    }
    result
}
