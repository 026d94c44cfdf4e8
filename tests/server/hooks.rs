//! Hook scripts and programs that compress, run by the archiver process: it goes on to serve the server meanwhile.

use crate::cluster::{Cluster, Stop, catalogue, started, wait_at_most, wait_until};
use crate::stopping::assert_no_crash;
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

/// What the hooks of a cluster have written down.
fn transcript(cluster: &Cluster) -> Vec<String> {
    let text = fs::read_to_string(cluster.path("hooks/transcript")).unwrap_or_default();
    text.lines().map(str::to_string).collect()
}

/// A hook that writes down its name and its file.
fn telling(cluster: &Cluster, end: &str) -> String {
    format!("echo $ARCHIVER_HOOK_NAME $BARMAN_SEGMENT >>{}; {end}", cluster.path("hooks/transcript").display())
}

/// Running, with an archive that is begun, and with a place for transcripts.
fn archiving() -> Cluster {
    let cluster = started();
    cluster.create_directory("hooks");
    cluster.write_segments(1);
    cluster.drain();
    cluster
}

fn reload_with(cluster: &Cluster, setting: &str, value: &str) {
    cluster.set(setting, value);
    cluster.reload();
}

/// No process of a hook is left. They have the server's working directory.
fn assert_no_hook_runs(cluster: &Cluster) {
    let hooks = || cluster.processes().into_iter().filter(|(_, title)| title.contains("sleep 300")).count();
    wait_at_most(Duration::from_secs(5), "no hook runs", || hooks() == 0);
}

#[test]
fn hooks_run_once_for_each_file_of_a_backlog_in_order_and_are_heard_in_the_log() {
    let cluster = archiving();
    for hook in ["pre_archive_script", "post_archive_script"] {
        cluster.set(&format!("archiver.{hook}"), &telling(&cluster, "echo heard"));
    }
    let archiver = cluster.running_archiver();
    cluster.reload();
    let done = cluster.status_files("done");
    let mark = cluster.log_mark();
    cluster.write_backlog(30);
    cluster.drain();
    let files: BTreeSet<String> = cluster.status_files("done").difference(&done).cloned().collect();
    let first = transcript(&cluster).first().map(|line| line.split(' ').next_back().unwrap().to_string()).unwrap();
    // One file may have been archived before the reload was seen.
    let expected: Vec<String> = files
        .range(first..)
        .flat_map(|name| ["pre", "post"].map(|phase| format!("{phase}_archive_script {name}")))
        .collect();
    assert!(expected.len() >= 58, "{}", expected.len());
    assert_eq!(transcript(&cluster), expected);
    let log = cluster.log_since(mark);
    let last = files.last().unwrap();
    for phase in ["pre", "post"] {
        let line = format!("LOG:  hook {phase}_archive_script for WAL file \"{last}\": heard");
        assert!(log.contains(&line), "{line} in {log}");
    }
    assert_eq!(cluster.archiver(), Some(archiver));
    cluster.assert_one_line_each();
}

#[test]
fn a_hook_is_started_without_blocked_signals_and_with_three_descriptors() {
    let cluster = archiving();
    let report = cluster.path("hooks/report");
    let look = format!(
        "exec >{} 2>&1; while read -r name value; do case $name in SigBlk:|SigIgn:) echo $value;; esac; done \
         </proc/$$/status; for fd in /proc/$$/fd/*; do [ -e $fd ] && echo ${{fd##*/}}; done; pwd",
        report.display()
    );
    reload_with(&cluster, "archiver.pre_archive_script", &look);
    cluster.write_segments(2);
    cluster.drain();
    // The C library keeps the signals 32 and 33 for itself.
    let (none_blocked, none_ignored) = ("0000000000000000", "0000000180000000");
    let told = fs::read_to_string(&report).unwrap();
    assert_eq!(told, format!("{none_blocked}\n{none_ignored}\n0\n1\n2\n{}\n", cluster.data().display()));
}

#[test]
fn a_failing_hook_behind_a_file_leaves_it_archived() {
    let cluster = archiving();
    let mark = cluster.log_mark();
    cluster.set("archiver.post_archive_retry_script", "exit 63");
    reload_with(&cluster, "archiver.post_archive_script", "exit 5");
    cluster.write_segments(5);
    cluster.drain();
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 6);
    let log = cluster.log_since(mark);
    assert!(log.contains("WARNING:  hook post_archive_script for WAL file "), "{log}");
    assert!(log.contains("ended with exit code 5"), "{log}");
    assert!(log.contains("refuses it (exit code 63); it changes nothing"), "{log}");
    assert!(!log.contains("could not archive"), "{log}");
}

#[test]
fn a_hook_that_refuses_a_file_keeps_it_in_pg_wal_and_says_so() {
    let cluster = archiving();
    let mark = cluster.log_mark();
    reload_with(&cluster, "archiver.pre_archive_retry_script", &telling(&cluster, "exit 63"));
    let before = cluster.stored().len();
    cluster.write_segments(2);
    let message = "hook pre_archive_retry_script refuses it (exit code 63)";
    wait_until("it is told", || cluster.log_since(mark).contains(message));
    let log = cluster.log_since(mark);
    assert!(log.lines().any(|line| line.contains("WARNING:  could not archive WAL file") && line.ends_with(message)));
    assert!(!cluster.status_files("ready").is_empty());
    assert!(cluster.stored().len() <= before + 1, "one may have been begun before the reload");
    cluster.unset("archiver.pre_archive_retry_script");
    cluster.reload();
    cluster.drain();
    cluster.assert_one_line_each();
}

#[test]
fn a_hook_that_never_succeeds_is_reported_at_its_deadline_and_holds_up_neither_a_reload_nor_a_stop() {
    for end in ["exit 1", "exec sleep 300"] {
        let cluster = archiving();
        let mark = cluster.log_mark();
        cluster.set("archiver.hook_timeout", "4s");
        reload_with(&cluster, "archiver.pre_archive_retry_script", &telling(&cluster, end));
        cluster.write_segments(2);
        let late = "hook pre_archive_retry_script did not succeed within 4 s";
        wait_until("the deadline is reported", || cluster.log_since(mark).contains(late));

        // While it runs, other sessions do not wait for this process.
        cluster.set("archiver.hook_timeout", "10min");
        cluster.reload();
        let runs = transcript(&cluster).len();
        wait_until("it runs again", || transcript(&cluster).len() > runs);
        cluster.psql("CREATE DATABASE one");
        let began = Instant::now();
        cluster.psql("DROP DATABASE one");
        assert!(began.elapsed() < Duration::from_secs(3), "{end}: {:?}", began.elapsed());

        let began = Instant::now();
        cluster.unset("archiver.pre_archive_retry_script");
        cluster.reload();
        cluster.drain();
        let took = began.elapsed();
        println!("{end}: a reload without the hook took effect after {took:?}");
        assert!(took < Duration::from_secs(12), "{end}: {took:?}");
        assert_no_hook_runs(&cluster);

        reload_with(&cluster, "archiver.pre_archive_retry_script", &telling(&cluster, end));
        let runs = transcript(&cluster).len();
        cluster.write_segments(2);
        wait_until("it runs", || transcript(&cluster).len() > runs);
        let took = cluster.stop(Stop::Fast);
        println!("{end}: stopped after {took:?}");
        assert!(took < Duration::from_secs(15), "{end}: {took:?}");
        assert_no_hook_runs(&cluster);
        assert!(!cluster.status_files("ready").is_empty(), "nothing is answered for that was not archived");
        assert_no_crash(&cluster);

        cluster.unset("archiver.pre_archive_retry_script");
        cluster.start();
        cluster.drain();
        cluster.assert_one_line_each();
    }
}

#[test]
fn a_fast_stop_archives_all_that_waits_with_the_hooks_around_it() {
    let cluster = archiving();
    reload_with(&cluster, "archiver.post_archive_retry_script", &telling(&cluster, "true"));
    cluster.write_segments(1);
    cluster.drain();
    cluster.write_backlog(20);
    cluster.stop(Stop::Fast);
    assert_eq!(cluster.status_files("ready").len(), 0);
    let told: BTreeSet<String> =
        transcript(&cluster).iter().map(|line| line.split(' ').next_back().unwrap().to_string()).collect();
    let lines = catalogue(&cluster.archive());
    assert!(lines[2..].iter().all(|name| told.contains(name)), "{told:?} for {lines:?}");
    assert_no_crash(&cluster);
}

#[test]
fn check_names_a_hook_that_cannot_run() {
    let cluster = archiving();
    let row = || cluster.psql("SELECT state, detail FROM archiver.check() WHERE name = 'hooks'");
    cluster.psql("CREATE EXTENSION archiver");
    assert_eq!(row(), "");
    cluster.set("archiver.pre_archive_script", "/no/such/hook --now");
    cluster.reload();
    wait_until("the failure is seen", || row().starts_with("failed|"));
    assert!(row().contains("archiver.pre_archive_script names \"/no/such/hook\""), "{}", row());
}

#[test]
fn programs_compress_inside_the_archiver_process_and_one_that_fails_keeps_the_wal() {
    let cluster = archiving();
    cluster.set("archiver.compression", "custom");
    // Backslashes are doubled in postgresql.conf.
    let (plain, turned) = (r"'\\000-\\377'", r"'\\200-\\377\\000-\\177'");
    cluster.set("archiver.custom_compression_filter", &format!("gzip -c1 | tr {plain} {turned}"));
    cluster.set("archiver.custom_decompression_filter", &format!("tr {turned} {plain} | gzip -dc"));
    cluster.reload();
    cluster.write_segments(5);
    cluster.drain();
    assert!(cluster.assert_done_files_restore_equal() >= 6);
    cluster.assert_one_line_each();

    let mark = cluster.log_mark();
    reload_with(&cluster, "archiver.custom_compression_filter", "echo no luck >&2; exit 3");
    cluster.write_segments(1);
    let message = "the program that archiver.custom_compression_filter calls for ended with exit code 3";
    wait_until("it is told", || cluster.log_since(mark).contains(message));
    assert!(cluster.log_since(mark).contains("It said: no luck."));
    assert!(!cluster.status_files("ready").is_empty());
    let mark = cluster.log_mark();
    reload_with(&cluster, "archiver.custom_compression_filter", "exec sleep 300");
    wait_until("the reload is seen", || cluster.log_since(mark).contains("archiving WAL to"));
    let took = cluster.stop(Stop::Fast);
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_no_hook_runs(&cluster);
    assert_no_crash(&cluster);
}
