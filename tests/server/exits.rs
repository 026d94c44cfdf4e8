//! Exits of the archiver with files on their way: an exit status that PostgreSQL takes for a crash would cost every
//! session its connection.

use crate::cluster::{Cluster, Stop, catalogue, figure, paths, wait_at_most, wait_until};
use crate::gates::{Gate, Gates};
use crate::stopping::{archiving, assert_no_crash};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// After an exit, or after the death of its postmaster, no archiver is left for longer.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug)]
enum Cause {
    LibrarySwitched,
    FastStop,
    Terminated,
    PostmasterKilled,
}

const CAUSES: [Cause; 4] = [Cause::LibrarySwitched, Cause::FastStop, Cause::Terminated, Cause::PostmasterKilled];

fn staged(cluster: &Cluster) -> Vec<PathBuf> {
    paths(&cluster.archive().join("main/.staging"))
}

fn is_gone(cluster: &Cluster, archiver: Pid) -> bool {
    cluster.processes().iter().all(|(pid, _)| *pid != archiver)
}

/// Makes the archiver exit while several files are staged; by turns (`is_hung`) the one that PostgreSQL waits for goes
/// through, or none does. The server runs again afterwards, by itself where `by_itself` and possible.
fn exit(cluster: &Cluster, gates: &Gates, cause: Cause, is_hung: bool, by_itself: bool) -> i32 {
    gates.close(Gate::Durable);
    cluster.write_segments(4);
    wait_until("several files are on their way", || staged(cluster).len() >= 2);
    let archiver = cluster.running_archiver();
    gates.forget_exits();
    let asked_for = cluster.status_files("ready").into_iter().next().expect("a waiting file");
    let let_one_pass = || {
        if !is_hung {
            gates.let_pass(Gate::Durable, &asked_for);
        }
    };
    match cause {
        Cause::LibrarySwitched => {
            let mark = cluster.log_mark();
            cluster.set("archive_library", "");
            cluster.reload();
            wait_until("the postmaster reloads", || cluster.log_since(mark).contains("received SIGHUP"));
            let_one_pass();
        }
        Cause::FastStop => {
            if !is_hung {
                gates.delay(Gate::Durable, Duration::from_millis(300));
            }
            cluster.stop(Stop::Fast);
        }
        Cause::Terminated => {
            // Alone, the first makes it linger for a minute; the second is what ends it when the server stops.
            kill(archiver, Signal::SIGTERM).expect("terminate the archiver");
            kill(archiver, Signal::SIGUSR2).expect("tell the archiver to end");
            gates.let_pass(Gate::Durable, &asked_for);
        }
        Cause::PostmasterKilled => {
            let postmaster = cluster.postmaster();
            kill(postmaster, Signal::SIGKILL).expect("kill the postmaster");
            wait_at_most(ORPHAN_PATIENCE, "the orphan is gone", || is_gone(cluster, archiver));
            cluster.wait_for_the_end_of(postmaster);
        }
    }
    wait_until("the archiver has told its exit status", || {
        let has_told = gates.exit_status(archiver).is_some();
        assert!(has_told || !is_gone(cluster, archiver) || gates.exit_status(archiver).is_some(), "no exit by itself");
        has_told
    });
    wait_at_most(ORPHAN_PATIENCE, "the archiver is gone", || is_gone(cluster, archiver));
    // Only a stop that the storage keeps up with leaves nothing on its way.
    let is_drained = matches!(cause, Cause::FastStop) && !is_hung;
    assert_eq!(staged(cluster).is_empty(), is_drained, "{cause:?}: {:?}", staged(cluster));
    assert!(!is_drained || cluster.status_files("ready").is_empty());
    gates.open(Gate::Durable);
    match cause {
        Cause::LibrarySwitched => {
            cluster.set("archive_library", "archiver");
            if by_itself {
                cluster.reload();
                cluster.wait_for_another_archiver(archiver);
            } else {
                cluster.restart();
            }
        }
        Cause::Terminated => cluster.restart(),
        Cause::FastStop | Cause::PostmasterKilled => cluster.start(),
    }
    cluster.drain();
    gates.exit_status(archiver).expect("told")
}

/// `ARCHIVER_TEST_EXITS=100` for the whole.
#[test]
fn whatever_makes_the_archiver_exit_with_files_on_their_way_it_exits_with_0_or_1_and_leaves_no_orphan() {
    let exits = figure("ARCHIVER_TEST_EXITS", 8);
    let began = Instant::now();
    // With one thread per core there may be no second file on its way.
    let cluster = Cluster::new(1).with("archiver.workers", "3");
    let gates = Gates::of(&cluster);
    cluster.start();
    cluster.write_segments(1);
    cluster.drain();
    let mut statuses = Vec::new();
    for turn in 0..exits {
        let (cause, round) = (CAUSES[turn as usize % CAUSES.len()], turn as usize / CAUSES.len());
        let since = Instant::now();
        let status = exit(&cluster, &gates, cause, round % 2 == 1, round == 0);
        println!("exit {turn}: {cause:?}: status {status}, after {:.1} s", since.elapsed().as_secs_f64());
        assert!(status == 0 || status == 1, "exit {turn}: {cause:?}: {status}");
        statuses.push(status);
    }
    let zeros = statuses.iter().filter(|status| **status == 0).count();
    println!("{exits} exits in {:.0} s: {zeros} with 0, all others with 1", began.elapsed().as_secs_f64());
    assert_no_crash(&cluster);
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() as u32 >= exits * 4);
    assert_eq!(staged(&cluster), [] as [PathBuf; 0]);
}

#[test]
fn an_archiver_told_to_end_while_the_storage_hangs_ends_and_comes_back() {
    let cluster = archiving();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(3);
    cluster.wait_for_stall();
    let archiver = cluster.running_archiver();
    // As a service manager may: the archiver takes no more files, and ends.
    kill(archiver, Signal::SIGTERM).expect("terminate the archiver");
    drop(stall);
    cluster.write_segments(1);
    cluster.wait_for_another_archiver(archiver);
    cluster.drain();
    assert_no_crash(&cluster);
    let lines = catalogue(&cluster.archive());
    assert!(lines.len() >= 5, "{lines:?}");
    cluster.assert_one_line_each();
}
