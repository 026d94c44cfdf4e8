//! The archiver process: its threads take no signals, and it grows by nothing.

use crate::cluster::started;
use nix::unistd::Pid;
use std::fs;

/// All 64 signals but SIGKILL and SIGSTOP, and the two that the C library keeps for itself.
pub const ALL_SIGNALS: u64 = !(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32);

/// Names of the process's threads with the signals each has blocked.
pub fn threads(pid: Pid) -> Vec<(String, u64)> {
    let of_task = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_string());
        Some((field("Name:")?, u64::from_str_radix(&field("SigBlk:")?, 16).ok()?))
    };
    fs::read_dir(format!("/proc/{pid}/task")).expect("read tasks").flatten().filter_map(of_task).collect()
}

fn descriptors(pid: Pid) -> Vec<String> {
    let target = |entry: fs::DirEntry| fs::read_link(entry.path()).ok().map(|path| path.display().to_string());
    let mut open: Vec<String> =
        fs::read_dir(format!("/proc/{pid}/fd")).expect("read descriptors").flatten().filter_map(target).collect();
    open.sort();
    open
}

#[test]
fn every_thread_has_all_signals_blocked() {
    let cluster = started();
    cluster.write_segments(4);
    cluster.drain();
    let pid = cluster.running_archiver();
    let (workers, main): (Vec<_>, Vec<_>) =
        threads(pid).into_iter().partition(|(name, _)| name.starts_with("archiver "));
    assert!(!workers.is_empty(), "{main:?}");
    assert_eq!(main.len(), 1, "{main:?}");
    for (name, blocked) in workers {
        assert_eq!(blocked & ALL_SIGNALS, ALL_SIGNALS, "{name}: {blocked:x}");
    }
    assert_eq!(main[0].1 & 1 << 14, 0, "SIGTERM reaches the main thread");
}

#[test]
fn descriptors_and_threads_stay_the_same_over_many_segments_and_reloads() {
    let cluster = started();
    cluster.write_segments(20);
    cluster.drain();
    let pid = cluster.running_archiver();
    let before = (threads(pid).len(), descriptors(pid));
    for level in ["1", "2", "3", "4"] {
        cluster.set("archiver.compression_level", level);
        cluster.reload();
        cluster.write_segments(30);
        cluster.drain();
    }
    assert_eq!((threads(pid).len(), descriptors(pid)), before);
    assert_eq!(cluster.archiver(), Some(pid));
}
