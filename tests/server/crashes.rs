//! Kills with a backlog: every segment is archived afterwards, once, and nothing is left over.

use crate::cluster::{Cluster, Stop, catalogue, started, tree, wait_until};
use nix::sys::signal::{Signal, kill};

/// How many deaths the test of kills takes a cluster through.
const KILLS: u32 = 6;
const SEGMENTS_BEFORE_A_KILL: u32 = 12;

#[derive(Clone, Copy, Debug)]
enum Death {
    ImmediateStop,
    PostmasterKilled,
    ArchiverKilled,
}

const DEATHS: [Death; 3] = [Death::ImmediateStop, Death::PostmasterKilled, Death::ArchiverKilled];

impl Death {
    fn befall(self, cluster: &Cluster) {
        match self {
            Death::ImmediateStop => {
                cluster.stop(Stop::Immediate);
                cluster.start();
            }
            Death::PostmasterKilled => {
                cluster.kill_postmaster();
                cluster.start();
            }
            Death::ArchiverKilled => {
                let archiver = cluster.running_archiver();
                kill(archiver, Signal::SIGKILL).expect("kill the archiver");
                // The postmaster restarts the whole cluster.
                cluster.wait_for_another_archiver(archiver);
            }
        }
    }
}

#[test]
fn kills_with_a_backlog_lose_no_segment_and_record_none_twice() {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    let mut expected = cluster.status_files("done");
    for (turn, death) in (0..KILLS).zip(DEATHS.into_iter().cycle()) {
        cluster.write_segments(1);
        cluster.drain();
        // By turns it is killed while it records, and while it stores; each time a little further on.
        let stall = (turn % 2 == 0).then(|| cluster.stall_catalogue());
        cluster.write_backlog(SEGMENTS_BEFORE_A_KILL);
        if stall.is_some() {
            cluster.wait_for_stall();
        }
        expected.extend(cluster.status_files("ready"));
        expected.extend(cluster.status_files("done"));
        let lines = catalogue(&cluster.archive()).len();
        drop(stall);
        wait_until("the backlog shrinks", || {
            cluster.status_files("ready").is_empty() || catalogue(&cluster.archive()).len() >= lines + turn as usize / 2
        });
        death.befall(&cluster);
    }
    cluster.write_segments(1);
    cluster.drain();
    cluster.restart();
    cluster.write_segments(1);
    cluster.drain();

    let stored = cluster.stored();
    let missing: Vec<_> = expected.iter().filter(|name| !stored.contains_key(*name)).collect();
    assert_eq!(missing, [] as [&String; 0]);
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= expected.len());
    assert_eq!(tree(&cluster.archive().join("main/.staging")).len(), 0);
    let log = cluster.log();
    let refusals = log.lines().filter(|line| line.contains("could not archive WAL file"));
    // What an archiver says whose postmaster was killed under it is no refusal.
    assert_eq!(refusals.filter(|line| !line.contains("the postmaster died")).collect::<Vec<_>>(), [] as [&str; 0]);
}

#[test]
fn a_restart_goes_on_where_the_server_stopped() {
    let cluster = started();
    for _ in 0..3 {
        cluster.write_segments(5);
        cluster.restart();
    }
    cluster.drain();
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 15);
    assert!(!cluster.log().contains("could not archive WAL file"));
}

#[test]
fn a_torn_last_line_of_the_catalogue_is_mended_after_a_crash() {
    let cluster = started();
    cluster.write_segments(3);
    cluster.drain();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(3);
    cluster.wait_for_stall();
    cluster.kill_postmaster();
    let path = cluster.archive().join("main/wals/main-xlog.db");
    let mut text = std::fs::read(&path).expect("read the catalogue");
    text.extend_from_slice(b"00000001000000000000");
    std::fs::write(&path, text).expect("write the catalogue");
    drop(stall);
    cluster.start();
    cluster.drain();
    cluster.assert_one_line_each();
}
