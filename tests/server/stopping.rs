//! Stopping, and a storage that hangs: the server never waits long for the archiver.

use crate::cluster::{Cluster, Stop, catalogue, major, paths, started, wait_at_most, wait_until};
use crate::gates::{Gate, Gates};
use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use std::fs;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Words in the server log of an archiver that died otherwise than by exit: the whole cluster restarts then.
const CRASH_WORDS: [&str; 4] =
    ["was terminated by signal", "terminating any other active", "PANIC", "exited with exit code 2"];

pub fn assert_no_crash(cluster: &Cluster) {
    let log = cluster.log();
    for word in CRASH_WORDS {
        assert!(!log.contains(word), "{word:?} in the log:\n{log}");
    }
}

/// A cluster whose archive is begun and whose catalogue the caller can hold.
pub fn archiving() -> Cluster {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    cluster
}

#[test]
fn a_fast_stop_archives_all_that_waits() {
    let cluster = archiving();
    let stall = cluster.stall_catalogue();
    cluster.write_backlog(100);
    cluster.wait_for_stall();
    assert!(cluster.status_files("ready").len() >= 100);
    drop(stall);
    let took = cluster.stop(Stop::Fast);
    println!("stopped in {took:?} with 100 files waiting");
    assert_eq!(cluster.status_files("ready").len(), 0);
    assert!(took < Duration::from_secs(10), "{took:?}");
    cluster.assert_one_line_each();
    assert_no_crash(&cluster);
}

#[test]
fn twenty_fast_stops_with_a_slow_storage_are_short_and_leave_nothing_waiting() {
    let cluster = Cluster::new(1);
    let gates = Gates::of(&cluster);
    cluster.start();
    cluster.write_segments(1);
    cluster.drain();
    let mut longest = Duration::ZERO;
    for turn in 0..20 {
        gates.delay(Gate::Written, Duration::from_millis(300));
        cluster.write_segments(1);
        // The stop itself completes a segment in which there is something.
        cluster.psql("SELECT pg_logical_emit_message(false, 'test', 'the rest')");
        let took = cluster.stop(Stop::Fast);
        assert!(gates.has_held(Gate::Written));
        assert_eq!(cluster.status_files("ready").len(), 0, "stop {turn}");
        assert!(took < Duration::from_secs(3), "stop {turn}: {took:?}");
        longest = longest.max(took);
        cluster.start();
    }
    println!("20 stops with a storage that takes 300 ms per file: {longest:?} at most");
    cluster.drain();
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 40);
    assert_no_crash(&cluster);
}

#[test]
fn a_hung_storage_does_not_hold_up_a_stop() {
    let cluster = archiving();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(5);
    cluster.wait_for_stall();
    let took = cluster.stop(Stop::Fast);
    println!("stopped in {took:?} with a hung storage");
    assert!(took < Duration::from_secs(25), "{took:?}");
    assert!(!cluster.status_files("ready").is_empty(), "nothing is answered for that is not recorded");
    assert_no_crash(&cluster);

    drop(stall);
    cluster.start();
    cluster.drain();
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 6);
}

#[test]
fn a_stop_that_comes_during_a_callback_is_seen_right_after_it() {
    let cluster = archiving();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(1);
    cluster.wait_for_stall();
    cluster.ask_to_stop(Stop::Fast);
    // The archiver is asked to stop after the last checkpoint. Up to 17 only it and the postmaster are left then.
    wait_until("the last checkpoint is done", || cluster.log().contains("checkpoint complete: "));
    wait_until("nobody else is left", || {
        let stays = |title: &str| major() >= 18 && (title.contains(": checkpointer") || title.contains(": io worker"));
        cluster.processes().iter().filter(|(_, title)| !stays(title)).count() <= 2
    });
    drop(stall);
    let took = wait_at_most(Duration::from_secs(8), "the server has stopped", || cluster.processes().is_empty());
    println!("stopped {took:?} after the storage answered");
    assert_eq!(cluster.status_files("ready").len(), 0, "a storage that answers is drained");
    assert_no_crash(&cluster);
}

#[test]
fn a_hung_storage_does_not_hold_up_other_sessions() {
    let cluster = archiving();
    cluster.psql("CREATE DATABASE one");
    cluster.psql("CREATE DATABASE two");
    let _stall = cluster.stall_catalogue();
    cluster.write_segments(3);
    cluster.wait_for_stall();
    for database in ["one", "two"] {
        let began = Instant::now();
        cluster.psql(&format!("DROP DATABASE {database}"));
        assert!(began.elapsed() < Duration::from_secs(3), "DROP DATABASE took {:?}", began.elapsed());
    }
    let began = Instant::now();
    cluster.psql("SELECT * FROM pg_stat_archiver");
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn a_killed_postmaster_leaves_no_archiver_behind() {
    let cluster = archiving();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(5);
    cluster.wait_for_stall();
    let archiver = cluster.running_archiver();
    let postmaster = cluster.postmaster();
    kill(postmaster, Signal::SIGKILL).expect("kill the postmaster");
    let gone = || cluster.processes().iter().all(|(pid, _)| *pid != archiver);
    let took = wait_at_most(Duration::from_secs(4), "the archiver is gone", gone);
    println!("the archiver ended {took:?} after its postmaster");
    assert!(took < Duration::from_secs(2), "{took:?}");
    cluster.wait_for_the_end_of(postmaster);
    drop(stall);
    cluster.start();
    cluster.drain();
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 6);
}

/// A storage in which every thread that looks at it hangs in the kernel, as on a dead network file system: a FIFO stands
/// in place of the identity file. Dropped, it comes back.
struct HungStorage {
    identity: PathBuf,
    away: PathBuf,
}

impl HungStorage {
    fn of(cluster: &Cluster) -> Self {
        let identity = cluster.archive().join("main/identity.json");
        let away = cluster.path("identity.json");
        fs::rename(&identity, &away).expect("move the identity file away");
        mkfifo(&identity, Mode::from_bits_truncate(0o666)).expect("make a FIFO");
        fs::set_permissions(&identity, fs::Permissions::from_mode(0o666)).expect("chmod");
        HungStorage { identity, away }
    }
}

impl Drop for HungStorage {
    fn drop(&mut self) {
        let fifo = self.away.with_extension("fifo");
        let _ = fs::rename(&self.identity, &fifo).and_then(|()| fs::rename(&self.away, &self.identity));
        // Opened for writing without waiting: whoever hangs in it goes on.
        let _ = fs::OpenOptions::new().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&fifo);
    }
}

/// Makes the archiver's threads hang in the storage.
fn hang(cluster: &Cluster) -> HungStorage {
    let hung = HungStorage::of(cluster);
    cluster.write_segments(5);
    let archiver = cluster.running_archiver();
    wait_until("a thread hangs in the FIFO", || {
        paths(Path::new(&format!("/proc/{archiver}/task"))).iter().any(|task| {
            let waits_in = fs::read_to_string(task.join("syscall")).unwrap_or_default();
            let is_worker = fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("archiver "));
            // openat(2) on both architectures that PostgreSQL is commonly run on.
            is_worker && (waits_in.starts_with("257 ") || waits_in.starts_with("56 "))
        })
    });
    hung
}

#[test]
fn threads_that_hang_in_the_kernel_hold_up_no_stop() {
    let cluster = archiving();
    let hung = hang(&cluster);
    let took = cluster.stop(Stop::Fast);
    println!("stopped in {took:?} with hanging threads");
    assert!(took < Duration::from_secs(25), "{took:?}");
    assert_no_crash(&cluster);
    drop(hung);
    cluster.start();
    cluster.drain();
    cluster.assert_one_line_each();
}

#[test]
fn threads_that_hang_in_the_kernel_do_not_keep_another_storage_from_being_used() {
    let cluster = archiving();
    let _hung = hang(&cluster);
    let other = cluster.create_directory("other");
    cluster.set("archiver.storage", &format!("file://{}", other.display()));
    cluster.reload();
    cluster.write_segments(1);
    cluster.drain();
    assert!(catalogue(&other).len() >= 6);
    assert_no_crash(&cluster);
}

#[test]
fn a_hung_storage_comes_back_by_itself() {
    let cluster = archiving();
    let hung = hang(&cluster);
    drop(hung);
    cluster.write_segments(1);
    cluster.drain();
    cluster.assert_one_line_each();
}

#[test]
fn a_check_of_a_hung_storage_ends_and_can_be_cancelled() {
    let cluster = archiving();
    cluster.psql("CREATE EXTENSION archiver");
    let _hung = HungStorage::of(&cluster);
    let began = Instant::now();
    let row = cluster.psql("SELECT name, state, detail FROM archiver.check() WHERE name = 'storage'");
    assert_eq!(row, "storage|failed|the storage did not answer for 5 s");
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.status"), "1");

    let began = Instant::now();
    let cancelled = cluster.psql_as("postgres", "SET statement_timeout = '300ms'; SELECT * FROM archiver.check()");
    assert!(cancelled.expect_err("cancelled").contains("canceling statement due to statement timeout"));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // Sessions that left a thread behind end all the same.
    let began = Instant::now();
    cluster.stop(Stop::Fast);
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_no_crash(&cluster);
}
