//! System calls that neither the standard library nor nix wraps.
#![allow(unsafe_code)]

use std::fs::File;

/// Asks the kernel to start writing that range back now, without waiting, so that the fsync at the end finds little
/// left to do (as PostgreSQL's pg_flush_data does). A hint: its failure means nothing.
#[cfg(target_os = "linux")]
pub fn start_writeback(file: &File, offset: u64, length: u64) {
    use std::os::fd::AsRawFd;
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else { return };
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and the call touches no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Nothing to do where the kernel has no such call.
#[cfg(not(target_os = "linux"))]
pub fn start_writeback(_file: &File, _offset: u64, _length: u64) {}
