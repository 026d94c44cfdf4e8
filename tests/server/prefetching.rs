//! Segments fetched ahead of real servers in recovery, and what is left of that afterwards: nothing.

use crate::cluster::{Cluster, Stop, bindir, server_program, started, text, wait_at_most, wait_until};
use crate::recovery::{CHECKSUM, insert, wait_for_end_of_recovery};
use crate::s3::Site;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Nothing is left so long after the end of a recovery.
const SOON: Duration = Duration::from_secs(30);

fn folder(cluster: &Cluster) -> PathBuf {
    cluster.pg_wal("archiver_prefetch")
}

/// The process that fetches ahead.
fn helper(cluster: &Cluster) -> Option<Pid> {
    cluster.processes().into_iter().find(|(_, title)| title.trim_end().ends_with(" prefetch")).map(|(pid, _)| pid)
}

#[track_caller]
fn assert_nothing_left(cluster: &Cluster, within: Duration) {
    let gone = || helper(cluster).is_none() && !folder(cluster).exists();
    let took = wait_at_most(within, "helper and folder are gone", gone);
    println!("nothing was left after {:.1} s", took.as_secs_f64());
}

/// A restored backup that notes which segments lay ready when they were asked for.
fn noting(primary: &Cluster) -> Cluster {
    let restored = Cluster::from_backup(primary);
    let seen = restored.path("seen").display().to_string();
    let program = bindir().join("archiver").display().to_string();
    restored.with(
        "restore_command",
        &format!("ls pg_wal/archiver_prefetch/%f.* >> {seen} 2> /dev/null; {program} restore %f %p"),
    )
}

/// How many were ready, whole.
fn ready_when_asked_for(restored: &Cluster) -> usize {
    let seen = fs::read_to_string(restored.path("seen")).unwrap_or_default();
    seen.lines().filter(|line| line.rsplit('.').next().is_some_and(|seal| seal.len() == 64)).count()
}

/// Rows in many segments, all of them archived.
fn fill(primary: &Cluster, segments: u32) -> String {
    for _ in 0..segments.div_ceil(4) {
        insert(primary, 3_000);
        primary.write_segments(4);
    }
    primary.drain();
    primary.psql(CHECKSUM)
}

#[test]
fn a_recovery_is_fed_ahead_and_leaves_nothing_behind() {
    let primary = started();
    insert(&primary, 1_000);
    let restored = noting(&primary);
    let expected = fill(&primary, 40);
    restored.write_file(&restored.data().join("recovery.signal"), b"");
    restored.start();
    wait_for_end_of_recovery(&restored);
    assert_nothing_left(&restored, SOON);
    assert_eq!(restored.psql(CHECKSUM), expected);
    let ready = ready_when_asked_for(&restored);
    println!("{ready} of {} segments were ready when they were asked for", primary.stored().len());
    assert!(ready >= 5, "{}", restored.log());
}

#[test]
fn a_recovery_whose_helper_is_killed_again_and_again_comes_to_its_end() {
    let primary = started();
    insert(&primary, 1_000);
    let restored = noting(&primary);
    let expected = fill(&primary, 40);
    restored.write_file(&restored.data().join("recovery.signal"), b"");
    restored.start();
    let mut kills = 0;
    wait_until("recovery has ended", || {
        if let Some(helper) = helper(&restored) {
            // Gone since we looked: as well.
            kills += u32::from(kill(helper, Signal::SIGKILL).is_ok());
        }
        restored.psql_as("postgres", "SELECT NOT pg_is_in_recovery()").as_deref() == Ok("t")
    });
    println!("killed {kills} times");
    assert!(kills > 0);
    assert_eq!(restored.psql(CHECKSUM), expected);
    // What a killed one left goes with the next restore.
    let name = primary.stored().into_keys().next().expect("a stored segment");
    assert_eq!(restored.restore(&name, &restored.path("some")).status.code(), Some(0));
    assert_nothing_left(&restored, SOON);
}

#[test]
fn a_standby_that_follows_the_archive_is_promoted_and_nothing_is_left() {
    let primary = started();
    insert(&primary, 1_000);
    let standby = noting(&primary);
    standby.write_file(&standby.data().join("standby.signal"), b"");
    fill(&primary, 12);
    standby.start();
    let has_replayed = |expected: &str| standby.psql_as("postgres", CHECKSUM).as_deref() == Ok(expected);
    for _ in 0..2 {
        let expected = fill(&primary, 12);
        wait_until("the standby has replayed all", || has_replayed(&expected));
    }
    let expected = primary.psql(CHECKSUM);
    primary.stop(Stop::Immediate);
    standby.promote();
    assert_nothing_left(&standby, SOON);
    assert_eq!(standby.psql(CHECKSUM), expected);
    assert!(ready_when_asked_for(&standby) > 0, "{}", standby.log());
}

#[test]
fn a_standby_that_takes_nothing_is_served_by_nobody_until_it_does() {
    let primary = started();
    insert(&primary, 1_000);
    let standby = noting(&primary);
    standby.write_file(&standby.data().join("standby.signal"), b"");
    fill(&primary, 8);
    standby.start();
    wait_until("a helper works", || helper(&standby).is_some());
    assert_nothing_left(&standby, SOON);
    let expected = fill(&primary, 8);
    wait_until("a helper works again", || helper(&standby).is_some());
    wait_until("all is replayed", || standby.psql_as("postgres", CHECKSUM).as_deref() == Ok(&expected));
}

#[test]
fn a_stop_and_a_crash_of_the_server_end_the_helper() {
    let primary = started();
    insert(&primary, 1_000);
    let standby = noting(&primary);
    standby.write_file(&standby.data().join("standby.signal"), b"");
    type End = fn(&Cluster);
    let ends: [(&str, End); 3] = [
        ("a fast stop", |standby| assert!(standby.stop(Stop::Fast) < SOON)),
        ("an immediate stop", |standby| assert!(standby.stop(Stop::Immediate) < SOON)),
        ("the death of the postmaster", |standby| standby.kill_postmaster()),
    ];
    for (what, end) in ends {
        fill(&primary, 8);
        standby.start();
        wait_until("a helper works", || helper(&standby).is_some());
        let began = Instant::now();
        end(&standby);
        assert_nothing_left(&standby, Duration::from_secs(5));
        println!("{what}: {:.1} s in all", began.elapsed().as_secs_f64());
    }
    standby.start();
}

#[test]
fn a_primary_that_pg_rewind_turns_back_follows_its_successor_whatever_was_fetched_ahead() {
    let old = Cluster::new(1).with("wal_keep_size", "0").with("max_wal_size", "2MB").with("min_wal_size", "2MB");
    let old = old.with("wal_log_hints", "on").started();
    insert(&old, 1_000);
    let new = noting(&old).with("wal_keep_size", "8GB");
    new.write_file(&new.data().join("standby.signal"), b"");
    fill(&old, 8);
    new.start();
    let expected = fill(&old, 8);
    wait_until("the standby has replayed all", || new.psql_as("postgres", CHECKSUM).as_deref() == Ok(&expected));
    // What the old one writes from here on is lost, and the segment where the two part is in the archive only.
    new.promote();
    insert(&new, 500);
    fill(&old, 8);
    old.psql("CHECKPOINT");
    old.stop(Stop::Fast);
    let expected = new.psql(CHECKSUM);
    new.psql("CHECKPOINT");

    // Left behind by recoveries on both sides; none of it may get in the way, or be taken for WAL.
    let program = bindir().join("archiver").display().to_string();
    let asked_for = old.path("asked_for");
    old.set("restore_command", &format!("echo %f >> {}; {program} restore %f %p", asked_for.display()));
    let segments: Vec<String> = old.stored().into_keys().filter(|name| name.len() == 24).collect();
    for cluster in [&old, &new] {
        assert_nothing_left(cluster, SOON);
        cluster.create_directory("data/pg_wal/archiver_prefetch");
        for name in &segments {
            cluster.write_file(&folder(cluster).join(format!("{name}.{}", "0".repeat(64))), b"not WAL");
        }
    }
    let rewound = server_program("pg_rewind")
        .args(["-c", "--no-sync", "--source-server"])
        .arg(format!("host={} user=postgres dbname=postgres", new.directory().display()))
        .arg("-D")
        .arg(old.data())
        .output()
        .expect("run pg_rewind");
    assert!(rewound.status.success(), "{}", text(&rewound.stderr));
    let asked_for = fs::read_to_string(asked_for).expect("pg_rewind has needed nothing from the archive");
    println!("{}asked for: {asked_for:?}", text(&rewound.stderr));

    // The files of settings came from the new one.
    old.set("archive_mode", "off");
    old.set("primary_conninfo", &format!("host={} user=postgres", new.directory().display()));
    old.write_file(&old.data().join("standby.signal"), b"");
    old.start();
    wait_until("it has what its successor has", || old.psql_as("postgres", CHECKSUM).as_deref() == Ok(&expected));
    assert_nothing_left(&old, SOON);
}

#[test]
fn a_recovery_from_a_distant_bucket_does_not_wait_for_each_segment() {
    let site = Site::behind_proxy(1).archiving();
    let primary = &site.cluster;
    insert(primary, 1_000);
    let [ahead, one_by_one] = [noting(primary), noting(primary).with("archiver.restore_prefetch", "0")];
    let expected = fill(primary, 24);
    site.proxy().set_latency(Duration::from_millis(100));
    let took = [&ahead, &one_by_one].map(|restored| {
        restored.write_file(&restored.data().join("recovery.signal"), b"");
        let began = Instant::now();
        restored.start();
        wait_for_end_of_recovery(restored);
        assert_eq!(restored.psql(CHECKSUM), expected);
        began.elapsed()
    });
    println!(
        "recovered in {:.1} s with segments fetched ahead, in {:.1} s without",
        took[0].as_secs_f64(),
        took[1].as_secs_f64()
    );
    assert!(took[0] < took[1], "{took:?}");
    assert_nothing_left(&ahead, SOON);
    assert_eq!(ready_when_asked_for(&one_by_one), 0);
}
