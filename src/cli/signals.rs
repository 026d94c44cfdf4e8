//! Signals that end the program, while it runs programs of the user's.

use archiver_core::pulse::Pulse;
use nix::sys::signal::{SigSet, Signal, raise};
use std::sync::Arc;

/// Lets a signal that would end this process end its work instead, and with it the program of the user's that runs: that
/// has a group of its own, which no terminal and no server signals. A second one ends this process, whatever it waits for.
pub fn stop_on_signals(pulse: Arc<Pulse>) {
    // What whoever started this wants ignored stays so.
    let ignored = ignored_signals();
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT];
    let signals = SigSet::from_iter(signals.into_iter().filter(|signal| ignored & 1 << (*signal as i32 - 1) == 0));
    // Also in the threads that are to come.
    if signals.thread_block().is_ok() {
        let wait = move || -> nix::Result<()> {
            signals.wait()?;
            pulse.stop();
            let second = signals.wait()?;
            SigSet::from(second).thread_unblock()?;
            raise(second)
        };
        // Without it signals would be lost: better they end this process at once.
        if std::thread::Builder::new().name("signals".into()).spawn(wait).is_err() {
            let _ = signals.thread_unblock();
        }
    }
}

/// One bit a signal, as far as the kernel tells.
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let bits = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    bits.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or_default()
}
