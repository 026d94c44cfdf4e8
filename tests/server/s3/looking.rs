//! What SQL sees and does of an archive in S3, and that a store which stalls keeps no session.

use super::{ARCHIVE, Site};
use crate::cluster::{Cluster, text, wait_at_most, wait_until};
use crate::stopping::assert_no_crash;
use archiver_tests::fault_proxy::Fault;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// However it is ended, a call that waits for the store takes no longer to end.
const LONGEST_END: Duration = Duration::from_secs(1);

#[test]
fn sql_shows_what_lies_in_the_bucket_and_how_archiving_goes() {
    let site = Site::over_tls(1).archiving();
    let cluster = &site.cluster;
    cluster.write_segments(20);
    let now = cluster.psql("SELECT name, location FROM archiver.archive_now()");
    let (name, location) = now.split_once('|').expect("two fields");
    let key = site.stored()[name].clone();
    assert_eq!(location, format!("{}/{}/{key}", site.bucket.server.endpoint, site.bucket.name));
    assert!(key.starts_with(&format!("{ARCHIVE}wals/0000000100000000/")) && key.ends_with(".zst"), "{key}");

    cluster.drain();
    let stored = site.stored();
    let listed = "SELECT name, kind, timeline, size, stored_at > now() - interval '1 hour', compression, location \
                  FROM archiver.list_wal()";
    let endpoint = format!("{}/{}", site.bucket.server.endpoint, site.bucket.name);
    // A listing tells what is stored, and not what that was made of.
    let expected = |(name, key): (&String, &String)| format!("{name}|segment|1||t|zstd|{endpoint}/{key}");
    let rows = cluster.psql(listed);
    assert_eq!(rows.lines().map(str::to_string).collect::<Vec<_>>(), stored.iter().map(expected).collect::<Vec<_>>());
    let sizes = cluster.psql("SELECT name, stored_size FROM archiver.list_wal()");
    for line in sizes.lines() {
        let (name, size) = line.split_once('|').expect("two fields");
        assert_eq!(site.bucket.head(&stored[name]).header("content-length"), Some(size), "{name}");
    }
    let names: Vec<&String> = stored.keys().collect();
    let between = format!("SELECT name FROM archiver.list_wal('{}', '{}')", names[3], names[5]);
    assert_eq!(cluster.psql(&between).lines().collect::<Vec<_>>(), names[3..=5]);

    wait_until("the statistics are there", || {
        cluster.psql("SELECT queue_files = 0 AND archived_count >= 20 FROM archiver.status") == "t"
    });
    for (sql, expected) in [
        ("configured, in_recovery, compression, create_only", "t|f|zstd|conditional"),
        ("storage, server_name", &format!("{}|main", site.url())),
        ("archiver_pid", &cluster.running_archiver().to_string()),
        ("failed_count, last_error, in_flight", "0||0"),
        ("bytes_read = archived_count * 1048576 AND bytes_stored > 0 AND put_ms_p50 > 0", "t"),
        ("credential_source LIKE '%' || current_setting('data_directory') || '%' OR credential_source <> ''", "t"),
    ] {
        assert_eq!(cluster.psql(&format!("SELECT {sql} FROM archiver.status")), expected, "{sql}");
    }
    let rows = "SELECT name, state, detail, hint FROM archiver.check(probe => true)";
    let failed = format!("SELECT count(*) FROM ({rows}) AS rows WHERE state <> 'ok'");
    assert_eq!(cluster.psql(&failed), "0", "{}", cluster.psql(rows));
    let rows = cluster.psql(rows);
    for row in ["storage|ok|", "identity|ok|", "probe|ok|written, read back and removed", "create-only|ok|"] {
        assert!(rows.lines().any(|line| line.starts_with(row)), "{row}: {rows}");
    }
    assert!(!site.bucket.list(&format!("{ARCHIVE}probe/")).iter().any(|key| !key.ends_with("/create-only")));
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.queue()"), "0");
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.errors()"), "0");
}

#[test]
fn the_queue_of_a_store_that_stalls_shows_what_is_on_its_way() {
    let site = Site::behind_proxy(1).with("archiver.read_ahead", "4").archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    proxy.inject(Fault::StallRequest(0));
    cluster.write_backlog(20);
    wait_until("requests are in flight", || proxy.stalled() > 1);
    let states = "SELECT count(*), count(*) FILTER (WHERE state = 'in progress') BETWEEN 1 AND 5, \
                  count(*) FILTER (WHERE state = 'waiting') >= 15 FROM archiver.queue()";
    wait_until("the queue is told", || cluster.psql(states) == "20|t|t");
    proxy.clear();
    cluster.drain();
    assert!(site.assert_complete() >= 20);
}

fn spawn(cluster: &Cluster, sql: &str) -> Child {
    let mut psql = cluster.client("psql");
    psql.args(["-XAtq", "-d", "postgres", "-c", sql]).stdout(Stdio::null()).stderr(Stdio::piped());
    psql.spawn().expect("run psql")
}

#[test]
fn whoever_asks_a_store_that_stalls_can_be_cancelled_timed_out_and_terminated() {
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    let calls = [
        "SELECT * FROM archiver.check()",
        "SELECT * FROM archiver.check(probe => true)",
        "SELECT * FROM archiver.list_wal()",
        "SELECT * FROM archiver.verify()",
        "SELECT * FROM archiver.gaps()",
        "SELECT * FROM archiver.errors()",
        "SELECT * FROM archiver.archive_now()",
        "SELECT archiver.clear_error('notes.txt.20261121T101752Z.unknown')",
        "SELECT * FROM archiver.delete_wal('0000000100000000000000FF')",
        "SELECT * FROM archiver.delete_wal('000000010000000000000001', dry_run => false)",
    ];
    let mut longest = Duration::ZERO;
    for fault in [Fault::StallRequest(0), Fault::StallResponse(0)] {
        for call in calls {
            proxy.inject(fault.clone());
            let timed = format!("SET statement_timeout = '500ms'; {call}");
            let began = Instant::now();
            let error = cluster.psql_as("postgres", &timed).expect_err("timed out");
            assert!(error.contains("canceling statement due to statement timeout"), "{call}: {error}");
            let took = began.elapsed().saturating_sub(Duration::from_millis(500));
            assert!(took < LONGEST_END, "{call}: {took:?}");
            longest = longest.max(took);
            for (end, said) in
                [("pg_cancel_backend", "due to user request"), ("pg_terminate_backend", "due to administrator command")]
            {
                let before = proxy.stalled();
                let child = spawn(cluster, call);
                let query = call.replace('\'', "''");
                let pid = format!("SELECT pid FROM pg_stat_activity WHERE query = '{query}' AND state = 'active'");
                let is_waiting = || call.contains("archive_now") || proxy.stalled() > before;
                wait_until("the call waits", || !cluster.psql(&pid).is_empty() && is_waiting());
                let pid = cluster.psql(&pid);
                let began = Instant::now();
                assert_eq!(cluster.psql(&format!("SELECT {end}({pid})")), "t");
                let output = child.wait_with_output().expect("wait for psql");
                let error = text(&output.stderr);
                assert!(error.contains(said), "{call}: {error}");
                let is_gone = || !std::path::Path::new(&format!("/proc/{pid}")).exists();
                wait_at_most(LONGEST_END * 2, "the backend is gone", is_gone);
                assert!(began.elapsed() < LONGEST_END, "{call}: {end}: {:?}", began.elapsed());
                longest = longest.max(began.elapsed());
            }
            proxy.clear();
            cluster.drain();
        }
    }
    println!("calls that wait for a store end within {longest:?}");
    assert_no_crash(cluster);
}

#[test]
fn a_check_says_that_a_store_cannot_be_reached_and_why() {
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    proxy.refuse(true);
    let began = Instant::now();
    let rows = cluster.psql("SELECT name, state, detail FROM archiver.check()");
    println!("checked in {:?}", began.elapsed());
    assert!(rows.contains("could not connect to the store: Connection refused"), "{rows}");
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    proxy.refuse(false);
}
