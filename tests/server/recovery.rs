//! Getting back: recovery to a point in time, promotion, and standbys that archive, too.

use crate::cluster::{Cluster, Stop, started, wait_until};
use std::path::Path;

/// A standby of `primary`, streaming from it.
fn standby_of(primary: &Cluster) -> Cluster {
    let standby = Cluster::from_backup(primary)
        .with("primary_conninfo", &format!("host={} user=postgres", primary.directory().display()));
    standby.write_file(&standby.data().join("standby.signal"), b"");
    standby
}

fn wait_for_replay(standby: &Cluster, primary: &Cluster) {
    let lsn = primary.psql("SELECT pg_current_wal_lsn()");
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'");
    wait_until("the standby has replayed all", || standby.psql_as("postgres", &replayed).as_deref() == Ok("t"));
}

fn wait_for_end_of_recovery(cluster: &Cluster) {
    wait_until("recovery has ended", || {
        cluster.psql_as("postgres", "SELECT NOT pg_is_in_recovery()").as_deref() == Ok("t")
    });
}

const CHECKSUM: &str = "SELECT count(*), md5(string_agg(t::text, ',' ORDER BY id)) FROM data AS t";

fn insert(cluster: &Cluster, rows: u32) {
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
    let segment = std::fs::read(standby.pg_wal(first)).expect("read segment");
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
    assert_eq!(std::fs::read(partial_of).expect("read").len(), 1 << 20);
    assert_eq!(third.restore(&whole, Path::new("whole")).status.code(), Some(1), "only its partial is there");
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
