//! A store that is overloaded, cuts, stalls, is slow or is gone: nothing is lost, and the server hardly notices.

use super::Site;
use crate::cluster::{Stop, figure, wait_at_most, wait_until};
use crate::stopping::assert_no_crash;
use archiver_tests::fault_proxy::{Fault, Rule};
use std::time::{Duration, Instant};

/// A fast stop takes no longer, whatever the store does.
const LONGEST_STOP: Duration = Duration::from_secs(15);

/// Once the trouble is over everything is archived, each file once, and by the process that began.
#[track_caller]
fn assert_survived(site: &Site, archiver: nix::unistd::Pid) {
    let cluster = &site.cluster;
    cluster.drain();
    assert!(site.assert_complete() > 0);
    assert_eq!(cluster.archiver(), Some(archiver));
    let row = format!("{archiver}|0");
    wait_until("the queue is empty", || cluster.psql("SELECT archiver_pid, queue_files FROM archiver.status") == row);
    assert_no_crash(cluster);
}

/// `ARCHIVER_TEST_S3_STORM=60` for the whole.
#[test]
fn a_storm_of_503_costs_time_and_nothing_else() {
    let lasting = Duration::from_secs(figure("ARCHIVER_TEST_S3_STORM", 5).into());
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    let archiver = cluster.running_archiver();
    proxy.forget();
    proxy.inject(Rule::slow_down());
    let began = Instant::now();
    cluster.write_backlog(20);
    wait_at_most(lasting * 2, "the storm is over", || began.elapsed() >= lasting && proxy.count_all() > 2);
    let turned_away = proxy.count_all();
    proxy.clear();
    let calm = Instant::now();
    assert_survived(&site, archiver);
    println!(
        "503 for {lasting:?}: {turned_away} requests turned away; all archived {:.1} s later",
        calm.elapsed().as_secs_f64()
    );
}

#[test]
fn connections_that_are_cut_in_mid_body_cost_nothing_but_time() {
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    let archiver = cluster.running_archiver();
    let segments = |fault: Fault| Rule::from(fault).method("PUT").target("/wals/");
    proxy.forget();
    for fault in [Fault::CutRequest(0), Fault::CutRequest(10_000), Fault::DropResponse] {
        proxy.inject(segments(fault).times(5));
    }
    cluster.write_backlog(20);
    cluster.drain();
    let puts = proxy.count("PUT");
    assert!(puts >= 35, "every fault was met: {puts}");
    println!("20 segments took {puts} puts, 15 of them cut");
    // The way back.
    proxy.forget();
    proxy.inject(Rule::from(Fault::CutResponse(10_000)).method("GET").target("/wals/").times(5));
    assert_survived(&site, archiver);
    assert!(proxy.heads().iter().any(|head| head.to_ascii_lowercase().contains("\r\nrange: bytes=")), "none went on");
}

#[test]
fn requests_that_stall_are_given_up_and_tried_again() {
    let site = Site::behind_proxy(1).with("archiver.attempt_timeout", "1s").archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    let archiver = cluster.running_archiver();
    for fault in [Fault::StallRequest(0), Fault::StallRequest(10_000), Fault::StallResponse(0)] {
        proxy.inject(Rule::from(fault).method("PUT").target("/wals/").times(2));
    }
    cluster.write_backlog(20);
    // What stalled reaches the store late, when it was done long ago.
    wait_until("all are archived", || cluster.status_files("ready").is_empty());
    proxy.clear();
    cluster.write_segments(2);
    assert_survived(&site, archiver);
}

/// Stops with a store in that state, sees that nothing waiting is lost, and that all of it is archived afterwards.
#[track_caller]
fn assert_stops_in_time(
    what: &str,
    site: &Site,
    begin: impl FnOnce(),
    has_begun: impl Fn() -> bool,
    end: impl FnOnce(),
) {
    let cluster = &site.cluster;
    begin();
    cluster.write_segments(5);
    wait_until(&format!("{what}: the archiver has noticed"), has_begun);
    let took = cluster.stop(Stop::Fast);
    println!("{what}: stopped in {took:?}");
    assert!(took < LONGEST_STOP, "{what}: {took:?}");
    assert!(cluster.status_files("ready").len() >= 5, "{what}: WAL that is not stored waits");
    assert_no_crash(cluster);
    end();
    cluster.start();
    cluster.drain();
    assert!(site.assert_complete() >= 6);
}

#[test]
fn a_store_that_refuses_connections_does_not_hold_up_a_stop() {
    let site = Site::behind_proxy(1).archiving();
    let proxy = site.proxy();
    let in_flight = || site.cluster.psql("SELECT in_flight > 0 FROM archiver.status") == "t";
    assert_stops_in_time("refused", &site, || proxy.refuse(true), in_flight, || proxy.refuse(false));
}

#[test]
fn a_store_that_stalls_for_ever_does_not_hold_up_a_stop() {
    let site = Site::behind_proxy(1).archiving();
    let proxy = site.proxy();
    let stall = || proxy.inject(Fault::StallRequest(0));
    assert_stops_in_time("stalled", &site, stall, || proxy.stalled() > 0, || proxy.clear());
    let stall = || proxy.inject(Fault::StallResponse(0));
    assert_stops_in_time("stalled answers", &site, stall, || proxy.stalled() > 0, || proxy.clear());
}

/// Nothing is known of the store yet: whether it overwrites, whose archive it holds, what lies in it.
#[test]
fn a_store_that_stalls_from_the_start_holds_up_neither_drop_database_nor_a_stop() {
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    cluster.psql("CREATE DATABASE d");
    cluster.stop(Stop::Fast);
    for target in ["/probe/", "/identity.json", "list-type=2"] {
        proxy.inject(Rule::from(Fault::StallRequest(0)).target(target));
        cluster.start();
        cluster.write_segments(3);
        wait_until(&format!("a request for {target} stalls"), || proxy.stalled() > 0);
        let began = Instant::now();
        cluster.psql("DROP DATABASE d");
        cluster.psql("CREATE DATABASE d");
        let dropped = began.elapsed();
        let stopped = cluster.stop(Stop::Fast);
        println!("{target} stalls from the start: DROP DATABASE in {dropped:?}, stopped in {stopped:?}");
        assert!(dropped < Duration::from_secs(3) && stopped < LONGEST_STOP, "{target}: {dropped:?}, {stopped:?}");
        assert_no_crash(cluster);
        proxy.clear();
    }
    cluster.start();
    cluster.drain();
    assert!(site.assert_complete() >= 9);
}

#[test]
fn a_store_that_answers_503_for_ever_does_not_hold_up_a_stop() {
    let site = Site::behind_proxy(1).archiving();
    let proxy = site.proxy();
    proxy.forget();
    let storm = || proxy.inject(Rule::slow_down());
    assert_stops_in_time("503", &site, storm, || proxy.count_all() > 1, || proxy.clear());
}

#[test]
fn a_slow_store_is_drained_by_a_stop() {
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    proxy.set_latency(Duration::from_millis(300));
    cluster.write_backlog(20);
    let waiting = cluster.status_files("ready").len();
    let took = cluster.stop(Stop::Fast);
    println!("300 ms a request: stopped in {took:?} with {waiting} files waiting");
    assert_eq!(cluster.status_files("ready").len(), 0);
    assert!(site.assert_complete() >= 20);
    assert_no_crash(cluster);
}

/// `ARCHIVER_TEST_S3_DROPS=20` for the whole.
#[test]
fn an_outage_does_not_hold_up_drop_database() {
    let drops = figure("ARCHIVER_TEST_S3_DROPS", 5);
    let site = Site::behind_proxy(1).archiving();
    let (cluster, proxy) = (&site.cluster, site.proxy());
    for number in 0..drops {
        cluster.psql(&format!("CREATE DATABASE d{number}"));
    }
    let mut longest = Duration::ZERO;
    for number in 0..drops {
        // By turns: no answer, no connection, nothing but 503.
        match number % 3 {
            0 => proxy.inject(Fault::StallRequest(0)),
            1 => proxy.refuse(true),
            _ => proxy.inject(Rule::slow_down()),
        }
        cluster.write_segments(1);
        wait_until("the archiver is at it", || cluster.psql("SELECT in_flight > 0 FROM archiver.status") == "t");
        let began = Instant::now();
        cluster.psql(&format!("DROP DATABASE d{number}"));
        longest = longest.max(began.elapsed());
        assert!(began.elapsed() < Duration::from_secs(3), "DROP DATABASE {number} took {:?}", began.elapsed());
        proxy.clear();
        proxy.refuse(false);
        // What is left of this outage must not meet the next one.
        cluster.drain();
    }
    println!("{drops} times DROP DATABASE during an outage: {longest:?} at most");
    cluster.drain();
    assert!(site.assert_complete() > drops as usize);
}
