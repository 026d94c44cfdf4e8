//! Getting back: recovery to a point in time, promotion, and standbys that archive, too.

use crate::cluster::{Cluster, Stop, figure, has_equal_content, started, text, wait_until};
use nix::sys::signal::{Signal, kill};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

/// A standby of `primary`, streaming from it.
pub fn standby_of(primary: &Cluster) -> Cluster {
    let standby = Cluster::from_backup(primary)
        .with("primary_conninfo", &format!("host={} user=postgres", primary.directory().display()));
    standby.write_file(&standby.data().join("standby.signal"), b"");
    standby
}

pub fn wait_for_replay(standby: &Cluster, primary: &Cluster) {
    let lsn = primary.psql("SELECT pg_current_wal_lsn()");
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'");
    wait_until("the standby has replayed all", || standby.psql_as("postgres", &replayed).as_deref() == Ok("t"));
}

pub fn wait_for_end_of_recovery(cluster: &Cluster) {
    wait_until("recovery has ended", || {
        cluster.psql_as("postgres", "SELECT NOT pg_is_in_recovery()").as_deref() == Ok("t")
    });
}

pub const CHECKSUM: &str = "SELECT count(*), md5(string_agg(t::text, ',' ORDER BY id)) FROM data AS t";

pub fn insert(cluster: &Cluster, rows: u32) {
    cluster.psql(&format!(
        "CREATE TABLE IF NOT EXISTS data (id bigint GENERATED ALWAYS AS IDENTITY, word text); \
         INSERT INTO data (word) SELECT md5(random()::text) FROM generate_series(1, {rows})"
    ));
}

#[test]
fn a_dropped_table_comes_back_by_recovery_to_a_restore_point() {
    let primary = started();
    insert(&primary, 20_000);
    let restored = Cluster::from_backup(&primary)
        .with("recovery_target_name", "before_accident")
        .with("recovery_target_action", "promote");
    insert(&primary, 50_000);
    let before = primary.psql(CHECKSUM);
    primary.psql("SELECT pg_create_restore_point('before_accident')");
    primary.psql("DROP TABLE data");
    primary.write_segments(2);
    primary.drain();

    restored.write_file(&restored.data().join("recovery.signal"), b"");
    restored.start();
    wait_for_end_of_recovery(&restored);
    assert!(restored.log().contains("recovery stopping at restore point \"before_accident\""));
    assert_eq!(restored.psql(CHECKSUM), before);
}

/// Runs pgbench until that many segments wait. A page's first change after a checkpoint is logged with the whole page.
pub fn pgbench_until_waiting(cluster: &Cluster, segments: usize) {
    while cluster.status_files("ready").len() < segments {
        cluster.psql("CHECKPOINT");
        let mut pgbench = cluster.client("pgbench");
        let output = pgbench.args(["-n", "-c", "4", "-j", "2", "-t", "500", "postgres"]).output().expect("run pgbench");
        assert!(output.status.success(), "pgbench: {}", text(&output.stderr));
    }
}

pub fn pgbench_checksums(cluster: &Cluster) -> String {
    let of_table = |table: &str| {
        format!("SELECT '{table}', count(*), sum(hashtextextended(t::text, 0)::numeric) FROM pgbench_{table} AS t")
    };
    cluster.psql(&["accounts", "branches", "history", "tellers"].map(of_table).join(" UNION ALL "))
}

/// `ARCHIVER_TEST_SEGMENTS=64` for the whole.
#[test]
fn pgbenchs_backlog_is_drained_restored_one_by_one_and_recovered_to_a_restore_point() {
    let segments = figure("ARCHIVER_TEST_SEGMENTS", 8) as usize;
    let primary = Cluster::new(16).started();
    let mut pgbench = primary.client("pgbench");
    let made = pgbench.args(["-i", "-q", "-s", "4", "postgres"]).output().expect("run pgbench");
    assert!(made.status.success(), "pgbench: {}", text(&made.stderr));
    let restored = Cluster::from_backup(&primary)
        .with("recovery_target_name", "halfway")
        .with("recovery_target_action", "promote");
    primary.drain();
    let archiver = primary.running_archiver();
    kill(archiver, Signal::SIGSTOP).expect("stop the archiver");
    pgbench_until_waiting(&primary, segments / 2);
    let halfway = pgbench_checksums(&primary);
    primary.psql("SELECT pg_create_restore_point('halfway')");
    pgbench_until_waiting(&primary, segments);
    assert_ne!(pgbench_checksums(&primary), halfway);
    let waiting = primary.status_files("ready");
    kill(archiver, Signal::SIGCONT).expect("let the archiver go on");
    let began = Instant::now();
    primary.drain();
    let drained = began.elapsed();

    let began = Instant::now();
    for name in &waiting {
        let output = restored.run_restore_command(name, "pg_wal/RECOVERYXLOG");
        assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
        assert!(has_equal_content(&restored.pg_wal("RECOVERYXLOG"), &primary.pg_wal(name)), "{name} differs");
    }
    let fetched = began.elapsed();
    primary.assert_one_line_each();

    let began = Instant::now();
    restored.write_file(&restored.data().join("recovery.signal"), b"");
    restored.start();
    wait_for_end_of_recovery(&restored);
    println!(
        "{} segments of pgbench: drained in {:.1} s, restored one by one and compared in {:.1} s; recovered in {:.1} s",
        waiting.len(),
        drained.as_secs_f64(),
        fetched.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    assert!(restored.log().contains("recovery stopping at restore point \"halfway\""));
    assert_eq!(pgbench_checksums(&restored), halfway);
}

#[test]
fn a_recovery_that_cannot_see_its_archive_ends_and_never_promotes() {
    let (primary, other) = (started(), started());
    insert(&primary, 1_000);
    let restored = Cluster::from_backup(&primary);
    insert(&primary, 5_000);
    let expected = primary.psql(CHECKSUM);
    for cluster in [&primary, &other] {
        cluster.write_segments(2);
        cluster.drain();
    }
    restored.write_file(&restored.data().join("recovery.signal"), b"");
    let ends_without_promotion = |what: &str| {
        restored.start_in_vain();
        let log = restored.log();
        assert!(log.contains("child process exited with exit code 255"), "{what}: {log}");
        for word in ["selected new timeline", "archive recovery complete", "ready to accept"] {
            assert!(!log.contains(word), "{what}: {word:?} in the log:\n{log}");
        }
        assert!(restored.data().join("recovery.signal").exists(), "{what}");
    };

    let (archive, away) = (primary.archive(), primary.path("away"));
    fs::rename(&archive, &away).expect("move the archive away");
    primary.create_directory("archive");
    ends_without_promotion("an empty mount point");
    fs::remove_dir(&archive).expect("remove the mount point");
    fs::rename(&away, &archive).expect("put the archive back");

    let storage = restored.setting("archiver.storage").expect("set");
    restored.set("archiver.storage", &other.setting("archiver.storage").expect("set"));
    ends_without_promotion("another cluster's archive");
    restored.set("archiver.storage", &storage);

    fs::set_permissions(&archive, fs::Permissions::from_mode(0o000)).expect("chmod");
    ends_without_promotion("an archive without permission");
    fs::set_permissions(&archive, fs::Permissions::from_mode(0o700)).expect("chmod");

    restored.start();
    wait_for_end_of_recovery(&restored);
    assert_eq!(restored.psql(CHECKSUM), expected);
}

#[test]
fn a_promotion_in_mid_segment_archives_partial_history_and_the_new_timelines_first_segment() {
    let primary = started();
    insert(&primary, 1_000);
    let standby = standby_of(&primary).with("archive_mode", "on");
    let third = Cluster::from_backup(&primary);
    standby.start();
    primary.write_segments(3);
    insert(&primary, 3_000);
    wait_for_replay(&standby, &primary);
    primary.drain();
    primary.stop(Stop::Immediate);
    standby.promote();
    insert(&standby, 20_000);
    standby.write_segments(2);
    standby.drain();
    let expected = standby.psql(CHECKSUM);

    let stored: Vec<String> = standby.stored_in(&primary.archive()).into_keys().collect();
    assert!(stored.iter().any(|name| name.ends_with(".partial")), "{stored:?}");
    assert!(stored.contains(&"00000002.history".to_string()), "{stored:?}");
    let first = stored.iter().find(|name| name.starts_with("00000002") && name.len() == 24).expect("a new segment");
    let partial = stored.iter().find(|name| name.ends_with(".partial")).expect("a partial");
    assert_eq!(first[8..], partial[8..24], "the new timeline begins in mid-segment");
    // The page header keeps the timeline it was written under.
    let segment = fs::read(standby.pg_wal(first)).expect("read segment");
    assert_eq!(segment[4..8], 1_u32.to_ne_bytes());
    assert!(standby.assert_done_files_restore_equal() >= 3);
    primary.assert_one_line_each();
    assert!(!standby.log().contains("could not archive"), "{}", standby.log());

    third.write_file(&third.data().join("recovery.signal"), b"");
    third.start();
    wait_for_end_of_recovery(&third);
    assert_eq!(third.psql(CHECKSUM), expected);
    assert_eq!(third.psql("SELECT timeline_id FROM pg_control_checkpoint()"), "3");
    // The data directory that asks tells which cluster's archive it must be.
    let partial_of = third.path("partial");
    let (timeline, position) = partial.split_at(8);
    let whole = format!("{timeline}{}", &position[..16]);
    let mut command = third.archiver_program();
    let output = command.args(["restore", "--partial", &whole]).arg(&partial_of).output().expect("run archiver");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(fs::read(partial_of).expect("read").len(), 1 << 20);
    assert_eq!(third.restore(&whole, Path::new("whole")).status.code(), Some(1), "only its partial is there");
}

#[test]
fn a_promotion_at_a_segment_boundary_archives_history_and_the_new_timeline_without_a_partial() {
    let primary = started();
    insert(&primary, 1_000);
    let standby = standby_of(&primary).with("archive_mode", "on");
    let third = Cluster::from_backup(&primary);
    standby.start();
    insert(&primary, 3_000);
    // Now and then the primary notes its running transactions by itself: then once more.
    let is_at_boundary = || {
        primary.write_segments(1);
        wait_for_replay(&standby, &primary);
        standby.psql("SELECT (pg_last_wal_replay_lsn() - '0/0') % 1048576 = 0") == "t"
    };
    wait_until("the standby stands at a segment's end", is_at_boundary);
    primary.drain();
    primary.stop(Stop::Immediate);
    let boundary = standby.psql("SELECT pg_last_wal_replay_lsn() - '0/0'").parse::<u64>().expect("a number");
    standby.promote();
    insert(&standby, 20_000);
    standby.write_segments(2);
    standby.drain();
    let expected = standby.psql(CHECKSUM);

    let stored: Vec<String> = standby.stored_in(&primary.archive()).into_keys().collect();
    assert!(!stored.iter().any(|name| name.ends_with(".partial")), "{stored:?}");
    assert!(stored.contains(&"00000002.history".to_string()), "{stored:?}");
    let first = format!("0000000200000000{:08X}", boundary >> 20);
    assert_eq!(stored.iter().find(|name| name.starts_with("00000002") && name.len() == 24), Some(&first));
    let segment = fs::read(standby.pg_wal(&first)).expect("read segment");
    assert_eq!(segment[4..8], 2_u32.to_ne_bytes(), "the new timeline begins with its own page header");
    assert!(standby.assert_done_files_restore_equal() >= 3);
    primary.assert_one_line_each();

    third.write_file(&third.data().join("recovery.signal"), b"");
    third.start();
    wait_for_end_of_recovery(&third);
    assert_eq!(third.psql(CHECKSUM), expected);
}

#[test]
fn a_standby_that_always_archives_shares_the_archive_with_its_primary() {
    let primary = started();
    insert(&primary, 1_000);
    let standby = standby_of(&primary).with("archive_mode", "always").started();
    for _ in 0..4 {
        primary.write_segments(8);
        insert(&primary, 5_000);
    }
    wait_for_replay(&standby, &primary);
    primary.drain();
    standby.drain();
    assert!(standby.status_files("done").len() >= 30);
    primary.assert_one_line_each();
    assert!(standby.assert_done_files_restore_equal() >= 30);
    for cluster in [&primary, &standby] {
        assert!(!cluster.log().contains("could not archive"), "{}", cluster.log());
    }
    assert_eq!(standby.psql("SELECT failed_count FROM pg_stat_archiver"), "0");
    // The extension is not there yet, and comes from the primary.
    primary.psql("CREATE EXTENSION archiver");
    wait_for_replay(&standby, &primary);
    assert_eq!(standby.psql("SELECT in_recovery, configured, queue_files, lag_bytes FROM archiver.status"), "t|t|0|");
    let check = "SELECT count(*) FROM archiver.check() WHERE state = 'failed'";
    assert_eq!(standby.psql(check), "0", "{}", standby.psql("SELECT * FROM archiver.check()"));
}

#[test]
fn a_standby_that_archives_from_promotion_on_is_told_so() {
    let primary = started();
    primary.psql("CREATE EXTENSION archiver");
    let standby = standby_of(&primary).with("archive_mode", "on").started();
    wait_for_replay(&standby, &primary);
    let row = standby.psql("SELECT state, detail FROM archiver.check() WHERE name = 'archive_mode'");
    assert_eq!(row, "ok|on; this is a standby: archiving starts at promotion");
    // Nothing archived yet is as it should be, and a switch of WAL is not to be had here.
    let rows = "SELECT DISTINCT state, detail FROM archiver.check() \
                WHERE name IN ('continuous archiving', 'last archived WAL')";
    assert_eq!(standby.psql(rows), "ok|archiving starts at promotion");
}
