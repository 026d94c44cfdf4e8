//! There and back again: segments over TLS, recovery from the bucket, and what the program answers.

use super::Site;
use crate::cluster::{Cluster, Stop, figure, has_equal_content, text};
use crate::recovery::{pgbench_checksums, pgbench_until_waiting, wait_for_end_of_recovery};
use nix::sys::signal::{Signal, kill};
use std::fs;
use std::time::{Duration, Instant};

const MISSING: &str = "0000000100000000000000FF";
const DESTINATION: &str = "pg_wal/RECOVERYXLOG";

/// `ARCHIVER_TEST_S3_SEGMENTS=64` for the whole, with segments of 16 MB.
#[test]
fn pgbenchs_backlog_goes_to_s3_over_tls_and_is_recovered_to_a_restore_point() {
    let segments = figure("ARCHIVER_TEST_S3_SEGMENTS", 8) as usize;
    let (segment_mb, scale) = if segments < 64 { (1, "1") } else { (16, "4") };
    let site = Site::over_tls(segment_mb).archiving();
    let primary = &site.cluster;
    let made = primary.client("pgbench").args(["-i", "-q", "-s", scale, "postgres"]).output().expect("run pgbench");
    assert!(made.status.success(), "pgbench: {}", text(&made.stderr));
    let restored =
        Cluster::from_backup(primary).with("recovery_target_name", "halfway").with("recovery_target_action", "promote");
    primary.drain();
    let archiver = primary.running_archiver();
    kill(archiver, Signal::SIGSTOP).expect("stop the archiver");
    pgbench_until_waiting(primary, segments / 2);
    let halfway = pgbench_checksums(primary);
    primary.psql("SELECT pg_create_restore_point('halfway')");
    let before = primary.status_files("ready").len();
    pgbench_until_waiting(primary, segments.max(before + 1));
    assert_ne!(pgbench_checksums(primary), halfway);
    let waiting = primary.status_files("ready");
    kill(archiver, Signal::SIGCONT).expect("let the archiver go on");
    let began = Instant::now();
    primary.drain();
    let drained = began.elapsed();

    let began = Instant::now();
    for name in &waiting {
        let output = restored.run_restore_command(name, DESTINATION);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
        assert!(has_equal_content(&restored.pg_wal("RECOVERYXLOG"), &primary.pg_wal(name)), "{name} differs");
    }
    let fetched = began.elapsed();
    let stored = site.stored();
    assert!(waiting.iter().all(|name| stored.contains_key(name)), "{waiting:?}: {stored:?}");

    let began = Instant::now();
    restored.write_file(&restored.data().join("recovery.signal"), b"");
    restored.start();
    wait_for_end_of_recovery(&restored);
    println!(
        "{} segments of {segment_mb} MB: drained to S3 in {:.1} s, restored one by one and compared in {:.1} s; \
         recovered in {:.1} s",
        waiting.len(),
        drained.as_secs_f64(),
        fetched.as_secs_f64(),
        began.elapsed().as_secs_f64()
    );
    assert!(restored.log().contains("recovery stopping at restore point \"halfway\""));
    assert_eq!(pgbench_checksums(&restored), halfway);
}

/// What the program answers, in a data directory whose RECOVERYXLOG it leaves alone where it restores nothing.
#[track_caller]
fn restore(cluster: &Cluster, flags: &[&str], name: &str) -> (Option<i32>, String) {
    let destination = cluster.data().join(DESTINATION);
    cluster.write_file(&destination, b"as it was");
    let mut command = cluster.archiver_program();
    let output = command.args(flags).args(["restore", name, DESTINATION]).output().expect("run archiver");
    if output.status.code() != Some(0) {
        assert_eq!(fs::read(destination).expect("read"), b"as it was");
    }
    (output.status.code(), text(&output.stderr))
}

#[test]
fn a_missing_object_is_told_only_where_the_archive_itself_was_seen() {
    let site = Site::over_tls(1).with("archiver.retry_timeout", "2s").archiving();
    let other = Site::over_tls(1).archiving();
    let cluster = &site.cluster;
    cluster.write_segments(2);
    cluster.drain();
    for cluster in [cluster, &other.cluster] {
        cluster.stop(Stop::Fast);
    }
    let name = site.stored().into_keys().next().expect("a stored segment");
    assert_eq!(restore(cluster, &[], &name).0, Some(0));
    for missing in [MISSING, "00000002.history"] {
        assert_eq!(restore(cluster, &[], missing), (Some(1), String::new()), "{missing}");
    }

    let bucket = &site.bucket.name;
    let (other_prefix, other_bucket) =
        (site.url_below(bucket, "other"), site.url_below("missing-bucket", "some/place"));
    let unreachable = site.url().replace(&site.bucket.server.endpoint, "https://127.0.0.1:1");
    let cases: [(&str, &[&str], &str); 5] = [
        ("other prefix", &["--storage", &other_prefix], "there is no archive at"),
        ("other server", &["--server-name", "other"], "there is no archive at"),
        ("missing bucket", &["--storage", &other_bucket], "store answered 404 NoSuchBucket"),
        ("unreachable", &["--storage", &unreachable], "could not connect to the store: Connection refused"),
        ("other cluster", &["--storage", &other.url()], "belongs to another cluster"),
    ];
    let standby_signal = cluster.data().join("standby.signal");
    for (standby, code) in [(false, 255), (true, 2)] {
        if standby {
            cluster.write_file(&standby_signal, b"");
        }
        for (what, flags, said) in cases {
            for name in [&name, MISSING, "00000002.history"] {
                let (found, told) = restore(cluster, flags, name);
                assert_eq!(found, Some(code), "{what}: {name}: {told}");
                assert!(told.contains(said), "{what}: {name}: {told}");
            }
        }
        site.write_credentials("wrong");
        for name in [&name, MISSING] {
            let (found, told) = restore(cluster, &[], name);
            assert_eq!(found, Some(code), "wrong secret: {name}: {told}");
            assert!(told.contains("store answered 403"), "{told}");
        }
        site.write_credentials(&site.bucket.server.secret);
        // What is there, and what is known not to be, is told to a standby all the same.
        assert_eq!(restore(cluster, &[], &name).0, Some(0));
        assert_eq!(restore(cluster, &[], MISSING).0, Some(1));
    }
}

/// `ARCHIVER_TEST_S3_DRAIN=64` for the whole.
#[test]
fn a_backlog_drains_through_a_network_with_latency() {
    let segments = figure("ARCHIVER_TEST_S3_DRAIN", 16);
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    for (latency_ms, read_ahead) in [(0, "16"), (40, "16"), (40, "0")] {
        cluster.set("archiver.read_ahead", read_ahead);
        cluster.restart();
        proxy.set_latency(Duration::ZERO);
        cluster.write_segments(1);
        cluster.drain();
        let archiver = cluster.running_archiver();
        kill(archiver, Signal::SIGSTOP).expect("stop the archiver");
        cluster.write_segments(segments);
        proxy.set_latency(Duration::from_millis(latency_ms));
        proxy.forget();
        kill(archiver, Signal::SIGCONT).expect("let the archiver go on");
        let began = Instant::now();
        cluster.drain();
        println!(
            "{segments} segments of 1 MB, {latency_ms} ms a request, read_ahead {read_ahead}: drained in {:.2} s, {} requests",
            began.elapsed().as_secs_f64(),
            proxy.count_all()
        );
    }
    assert!(site.assert_complete() >= 3 * segments as usize);
}
