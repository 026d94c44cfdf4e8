//! What S3 costs a process: threads that take no signals and go again, and memory within its limit.

use super::Site;
use crate::cluster::{Cluster, PATIENCE, figure, text, wait_at_most, wait_until};
use crate::process::{assert_only_main_thread_takes_signals, has_thread};
use archiver_tests::fault_proxy::Fault;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, Read};
use std::time::Duration;

/// Beside the limit on buffers: what the process itself, its threads and connections take.
const BESIDE_MIB: u64 = 48;

/// Names are resolved on threads of their own.
fn by_name(site: Site) -> Site {
    let url = site.url().replace("//127.0.0.1:", "//localhost:");
    site.with("archiver.storage", &url)
}

#[test]
fn every_thread_of_the_archiver_and_of_a_check_has_all_signals_blocked() {
    let site = by_name(Site::behind_proxy(1)).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    proxy.cut_connections();
    proxy.inject(Fault::StallRequest(0));
    cluster.write_segments(5);
    wait_until("requests are in flight", || proxy.stalled() >= 3);
    let archiver = cluster.running_archiver();
    assert!(has_thread(archiver, "archiver s3"));
    assert_only_main_thread_takes_signals(archiver);

    let mut check = cluster.client("psql").args(["-c", "SELECT * FROM archiver.check()"]).spawn().expect("run psql");
    let backend = "SELECT pid FROM pg_stat_activity WHERE query = 'SELECT * FROM archiver.check()'";
    wait_until("the check runs", || !cluster.psql(backend).is_empty());
    let backend = Pid::from_raw(cluster.psql(backend).parse().expect("a PID"));
    // Requests of the archiver come and go meanwhile, so that the proxy cannot tell.
    let waits = format!("SELECT wait_event FROM pg_stat_activity WHERE pid = {backend}");
    wait_until("the check waits for the store", || {
        has_thread(backend, "archiver s3") && cluster.psql(&waits) == "Extension"
    });
    assert_only_main_thread_takes_signals(backend);
    proxy.clear();
    assert!(check.wait().expect("wait for psql").success());
    cluster.drain();
}

#[test]
fn the_postmaster_has_no_thread_of_ours_and_a_backend_only_during_a_call() {
    let site = by_name(Site::over_tls(1)).with("shared_preload_libraries", "archiver").archiving();
    let cluster = &site.cluster;
    assert_eq!(fs::read_dir(format!("/proc/{}/task", cluster.postmaster())).expect("read tasks").count(), 1);
    // A thread that has told its result may take a moment to end.
    let calls = "DO $$ BEGIN \
                   FOR i IN 1..20 LOOP \
                     PERFORM archiver.check(); PERFORM archiver.list_wal(); PERFORM archiver.check(probe => true); \
                   END LOOP; \
                   FOR i IN 1..100 LOOP \
                     EXIT WHEN (SELECT count(*) FROM pg_ls_dir('/proc/self/task')) = 1; PERFORM pg_sleep(0.05); \
                   END LOOP; \
                 END $$; SELECT count(*) FROM pg_ls_dir('/proc/self/task')";
    assert_eq!(cluster.psql(calls), "1");
    assert_eq!(fs::read_dir(format!("/proc/{}/task", cluster.postmaster())).expect("read tasks").count(), 1);
}

#[test]
fn a_call_that_was_cancelled_leaves_no_thread_behind() {
    let site = by_name(Site::behind_proxy(1)).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    for fault in [Fault::StallRequest(0), Fault::StallResponse(0)] {
        proxy.inject(fault);
        // In statements of their own, so that the timeout counts for one.
        let calls = [
            "SET statement_timeout = '300ms'",
            "DO $$ BEGIN PERFORM archiver.check(); EXCEPTION WHEN query_canceled THEN NULL; END $$",
            "SET statement_timeout = 0",
            "DO $$ BEGIN FOR i IN 1..40 LOOP \
               EXIT WHEN (SELECT count(*) FROM pg_ls_dir('/proc/self/task')) = 1; PERFORM pg_sleep(0.05); \
             END LOOP; END $$",
            "SELECT count(*) FROM pg_ls_dir('/proc/self/task')",
        ];
        let mut psql = cluster.client("psql");
        let output = psql.args(["-XAtq", "-d", "postgres"]).args(calls.iter().flat_map(|sql| ["-c", sql])).output();
        let output = output.expect("run psql");
        let said = text(&output.stdout);
        assert_eq!(said.trim_end(), "1", "{}", text(&output.stderr));
        proxy.clear();
    }
}

fn anonymous_memory_kb(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("read status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Completes that many segments with content that nothing compresses.
fn fill_segments(cluster: &Cluster, count: u32, segment_mb: u32) {
    const RANDOM_MB: u32 = 64;
    let path = cluster.path("random");
    if !path.exists() {
        let mut random = File::open("/dev/urandom").expect("open urandom").take(u64::from(RANDOM_MB) << 20);
        io::copy(&mut random, &mut File::create(&path).expect("create file")).expect("write file");
    }
    cluster.psql(&format!(
        "SELECT count(pg_logical_emit_message(false, 'test', \
                pg_read_binary_file('{}', (i % {RANDOM_MB}) * 1048576, 1048576))) \
         FROM generate_series(1, {}) AS i",
        path.display(),
        count * segment_mb
    ));
    cluster.psql("SELECT pg_switch_wal()");
}

/// Archives so many segments from a standstill and sees how much memory that takes.
fn assert_memory(segment_mb: u32, count: u32, limit: Option<&str>, limit_mib: u64) {
    let site = Site::behind_proxy(segment_mb).with("archiver.workers", "8").with("wal_init_zero", "off");
    let site = site.with("max_wal_size", "20GB");
    if let Some(limit) = limit {
        site.cluster.set("archiver.memory_limit", limit);
    }
    let site = site.archiving();
    let cluster = &site.cluster;
    let archiver = cluster.running_archiver();
    // As many bodies as can be are on their way at once.
    site.proxy().set_latency(Duration::from_millis(200));
    kill(archiver, Signal::SIGSTOP).expect("stop the archiver");
    fill_segments(cluster, count, segment_mb);
    let waiting = cluster.status_files("ready").len();
    kill(archiver, Signal::SIGCONT).expect("let the archiver go on");
    let mut peak = 0;
    let took = wait_at_most(PATIENCE * 5, "all is archived", || {
        peak = peak.max(anonymous_memory_kb(archiver));
        cluster.status_files("ready").is_empty()
    });
    println!(
        "{waiting} segments of {segment_mb} MB within {limit_mib} MiB: RssAnon is {} MiB at most, drained in {:.1} s",
        peak >> 10,
        took.as_secs_f64()
    );
    assert!(waiting >= count as usize);
    assert!(peak >> 10 < limit_mib + BESIDE_MIB, "{peak} kB");
    site.proxy().set_latency(Duration::ZERO);
    assert!(site.assert_complete() >= count as usize);
}

#[test]
fn segments_of_16_mb_go_to_s3_within_64_mb() {
    assert_memory(16, 8, Some("64MB"), 64);
}

#[test]
fn segments_of_16_mb_go_to_s3_within_the_default_limit() {
    assert_memory(16, 16, None, 256);
}

/// `ARCHIVER_TEST_S3_LARGE=1` for segments of 64 MB and 1 GB.
#[test]
fn large_segments_are_streamed_to_s3_in_little_memory() {
    if figure("ARCHIVER_TEST_S3_LARGE", 0) == 0 {
        println!("skipped: ARCHIVER_TEST_S3_LARGE is not set");
        return;
    }
    for (limit, limit_mib) in [(Some("64MB"), 64), (None, 256)] {
        assert_memory(64, 8, limit, limit_mib);
        assert_memory(1024, 2, limit, limit_mib);
    }
}
