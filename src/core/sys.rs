//! System calls that neither the standard library nor nix wraps.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::process::Command;

/// Has the kernel send `signal` to the program that `command` starts once the thread that starts it has ended, be it by a
/// kill of its whole process (prctl(2), `PR_SET_PDEATHSIG`). The program gets an empty signal mask, which threads of ours have
/// not, that signal's own effect, and none of our descriptors.
#[cfg(target_os = "linux")]
pub fn end_with_this_thread(command: &mut Command, signal: libc::c_int) {
    use std::os::unix::process::CommandExt;
    let parent = std::process::id().cast_signed();
    let prepare = move || {
        let failed = || Err(io::Error::last_os_error());
        // SAFETY: calls into the kernel with plain numbers and a mask on this stack. Each is async-signal-safe and none
        // allocates, as it must be between fork and exec.
        unsafe {
            let mut none = std::mem::zeroed();
            if libc::sigemptyset(&raw mut none) != 0
                || libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) != 0
            {
                return failed();
            }
            // PostgreSQL 15 leaves some of its own open. An old kernel does not know the call; then they stay open.
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            // PostgreSQL's background workers ignore SIGINT, and what is ignored stays so.
            if libc::signal(signal, libc::SIG_DFL) == libc::SIG_ERR {
                return failed();
            }
            if libc::prctl(libc::PR_SET_PDEATHSIG, signal) != 0 {
                return failed();
            }
            // It may have ended before that.
            if libc::getppid() != parent {
                return Err(io::Error::from_raw_os_error(libc::ECHILD));
            }
        }
        Ok(())
    };
    // SAFETY: `prepare` keeps to what is allowed between fork and exec, as said there.
    unsafe { command.pre_exec(prepare) };
}

/// Nothing to do where the kernel has no such call.
#[cfg(not(target_os = "linux"))]
pub fn end_with_this_thread(_command: &mut Command, _signal: libc::c_int) {}

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
