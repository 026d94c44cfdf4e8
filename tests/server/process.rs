//! The archiver process: its threads take no signals, and it grows by nothing.

use crate::cluster::started;
use nix::unistd::Pid;
use std::fs;

/// All 64 signals but SIGKILL and SIGSTOP, and the two that the C library keeps for itself.
const ALL_SIGNALS: u64 = !(1 << 8 | 1 << 18 | 1 << 31 | 1 << 32);

/// A thread of a process, as the kernel tells of it.
#[derive(Debug)]
pub struct Thread {
    id: i32,
    name: String,
    blocked: u64,
}

/// The process's threads; one that ends meanwhile may be missing.
pub fn threads(pid: Pid) -> Vec<Thread> {
    let of_task = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).ok()?;
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_string());
        Some(Thread {
            id: field("Pid:")?.parse().ok()?,
            name: field("Name:")?,
            blocked: u64::from_str_radix(&field("SigBlk:")?, 16).ok()?,
        })
    };
    fs::read_dir(format!("/proc/{pid}/task")).expect("read tasks").flatten().filter_map(of_task).collect()
}

/// Whether the process has a thread whose name begins so. A thread names itself once it runs.
pub fn has_thread(pid: Pid, name: &str) -> bool {
    threads(pid).iter().any(|thread| thread.name.starts_with(name))
}

/// Call it while the process waits: who makes a thread blocks signals meanwhile.
#[track_caller]
pub fn assert_only_main_thread_takes_signals(pid: Pid) {
    let (main, ours): (Vec<_>, Vec<_>) = threads(pid).into_iter().partition(|thread| thread.id == pid.as_raw());
    println!("threads beside the main one: {:?}", ours.iter().map(|thread| &thread.name).collect::<Vec<_>>());
    assert!(!ours.is_empty());
    assert_eq!(main.len(), 1, "{main:?}");
    assert_eq!(main[0].blocked & 1 << 14, 0, "SIGTERM reaches the main thread");
    for thread in ours {
        assert_eq!(thread.blocked & ALL_SIGNALS, ALL_SIGNALS, "{}: {:x}", thread.name, thread.blocked);
    }
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
    assert!(has_thread(pid, "archiver "));
    assert_only_main_thread_takes_signals(pid);
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
