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

/// Tells the kernel that nobody is going to read the file again soon: its pages that are written back make room for
/// others. A hint: its failure means nothing.
pub fn release_cached_pages(file: &File) {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

/// From this size on, buffers are mapped from the kernel one by one, and go back to it at their end.
///
/// Left to itself the C library (mallopt(3), `M_MMAP_THRESHOLD`) raises that bound with each large buffer that is freed;
/// the next ones lie in an arena for each thread, which keeps what was freed in it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn map_buffers_from(bytes: i32) {
    // SAFETY: the call sets one number of the allocator's, under its lock, and touches no memory of ours.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, bytes) };
}

/// Nothing to do where the allocator is another one.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn map_buffers_from(_bytes: i32) {}
