//! Archiving as it should be: real WAL, every segment identical when it is fetched back, and what SQL says of it.

use crate::cluster::{Cluster, text, wait_until};
use std::fs;

/// Archives pgbench's WAL with segments of that size, compares everything, and answers the archiver's peak of memory.
fn archive_pgbench(segment_mb: u32, settings: &[(&str, &str)], least_segments: usize) -> (Cluster, u64) {
    let cluster = Cluster::new(segment_mb);
    for (name, value) in settings {
        cluster.set(name, value);
    }
    cluster.start();
    cluster.psql("CREATE EXTENSION archiver");
    let pgbench = |arguments: &[&str]| {
        let output = cluster.client("pgbench").args(arguments).arg("postgres").output().expect("run pgbench");
        assert!(output.status.success(), "pgbench: {}", text(&output.stderr));
    };
    pgbench(&["-i", "-q", "-s", "2"]);
    while cluster.status_files("done").len() < least_segments {
        pgbench(&["-n", "-c", "4", "-j", "2", "-t", "300"]);
        cluster.psql("CHECKPOINT");
        cluster.psql("SELECT pg_switch_wal()");
        cluster.drain();
    }
    assert!(cluster.assert_done_files_restore_equal() >= least_segments);
    cluster.assert_one_line_each();
    let peak = peak_memory_kb(&cluster);
    println!("segments of {segment_mb} MB, {settings:?}: the archiver's VmHWM is {} MiB", peak >> 10);
    (cluster, peak)
}

fn peak_memory_kb(cluster: &Cluster) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", cluster.running_archiver())).expect("read status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn pgbenchs_wal_is_archived_identical_and_sql_says_so() {
    let (cluster, _) = archive_pgbench(16, &[], 6);
    wait_until("the statistics are there", || {
        cluster.psql("SELECT queue_files = 0 AND archived_count >= 6 FROM archiver.status") == "t"
    });
    let archiver = cluster.running_archiver().to_string();
    let stored: u64 = cluster.stored().values().map(|path| path.metadata().expect("stat").len()).sum();
    for (sql, expected) in [
        ("configured, in_recovery, compression, encryption", "t|f|zstd|none"),
        ("archive_mode, server_name, config_error, failed_count", "on|main||0"),
        ("archiver_pid", archiver.as_str()),
        ("last_error, failing_since, next_retry_at", "||"),
        ("queue_bytes, oldest_ready_seconds, in_flight", "0||0"),
        ("last_archived_wal = (SELECT last_archived_wal FROM pg_stat_archiver)", "t"),
        ("current_wal = pg_walfile_name(pg_current_wal_lsn())", "t"),
        ("lag_bytes BETWEEN 0 AND 16777216", "t"),
        ("bytes_read = archived_count * 16777216", "t"),
        ("compression_ratio > 1 AND put_ms_p50 > 0 AND put_ms_p99 >= put_ms_p50", "t"),
        ("bytes_stored", stored.to_string().as_str()),
        ("stats_since > pg_postmaster_start_time() AND stats_since <= now()", "t"),
    ] {
        assert_eq!(cluster.psql(&format!("SELECT {sql} FROM archiver.status")), expected, "{sql}");
    }
    // The disk under the tests may be nearly full.
    let rows = "SELECT name, state FROM archiver.check(probe => true) WHERE name <> 'free space'";
    let rows = cluster.psql(&format!("{rows} ORDER BY name COLLATE \"C\""));
    let expected = "archive_command|ok\narchive_library|ok\narchive_mode|ok\nclock|ok\ncompression|ok\ncontinuous archiving|ok\nencryption|ok\nfiles set aside|ok\n\
                    identity|ok\nlast archived WAL|ok\nprobe|ok\nrefused files|ok\nseparate device|warning\nsettings|ok\n\
                    staged files|ok\nstorage|ok\nstorage writable|ok\nwaiting WAL|ok";
    assert_eq!(rows, expected, "{}", cluster.psql("SELECT * FROM archiver.check()"));
}

#[test]
fn a_preloaded_library_leaves_the_postmaster_with_one_thread() {
    let (cluster, _) = archive_pgbench(1, &[("shared_preload_libraries", "archiver")], 20);
    let tasks = |pid| fs::read_dir(format!("/proc/{pid}/task")).expect("read tasks").count();
    assert_eq!(tasks(cluster.postmaster()), 1);
    assert!(tasks(cluster.running_archiver()) > 1);
}

#[test]
fn segments_of_1_mb_are_archived_in_little_memory() {
    let (_cluster, peak_kb) = archive_pgbench(1, &[("archiver.memory_limit", "16MB")], 20);
    assert!(peak_kb < 64 << 10, "{peak_kb} kB");
}

#[test]
fn segments_of_64_mb_are_streamed_in_little_memory() {
    let (_cluster, peak_kb) = archive_pgbench(64, &[("archiver.memory_limit", "16MB")], 3);
    assert!(peak_kb < 64 << 10, "{peak_kb} kB");
}

#[test]
fn segments_of_1_gb_are_streamed_in_little_memory() {
    // The rest of a switched segment is a hole then, and costs no disk.
    let settings = [("archiver.memory_limit", "16MB"), ("wal_init_zero", "off"), ("wal_recycle", "off")];
    let (cluster, _) = archive_pgbench(1024, &settings, 1);
    // And one that is full: 1100 times one megabyte that no compression makes much of by itself.
    cluster.psql(
        "SELECT count(pg_logical_emit_message(false, 'test', word)) FROM generate_series(1, 1100), \
         (SELECT string_agg(md5(random()::text), '') AS word FROM generate_series(1, 32000)) AS words",
    );
    cluster.drain();
    assert!(cluster.assert_done_files_restore_equal() >= 2);
    let peak_kb = peak_memory_kb(&cluster);
    println!("full segments of 1024 MB: the archiver's VmHWM is {} MiB", peak_kb >> 10);
    assert!(peak_kb < 64 << 10, "{peak_kb} kB");
}
