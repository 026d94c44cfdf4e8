//! WAL that a server's own background worker receives, from itself or from another server.

use crate::cluster::{Cluster, Stop, catalogue, has_equal_content, paths, text, wait_until};
use crate::process::has_thread;
use crate::streaming;
use archiver_tests::gpg::Gpg;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

/// A server that can receive: it does once that is switched on.
fn receiving() -> Cluster {
    Cluster::new(1)
        .with("shared_preload_libraries", "archiver")
        .with("archiver.path_prefix", &crate::cluster::bindir().display().to_string())
        .with("archiver.slot_name", "archiver")
        .with("archiver.create_slot", "auto")
}

fn switch(cluster: &Cluster, value: &str) {
    cluster.set("archiver.streaming_archiver", value);
    cluster.reload();
}

fn status(cluster: &Cluster, column: &str) -> String {
    cluster.psql(&format!("SELECT {column} FROM archiver.receive_wal_status()"))
}

#[track_caller]
fn wait_until_it_streams(cluster: &Cluster) {
    wait_until("it streams", || {
        cluster.psql("SELECT application_name, state FROM pg_stat_replication") == "archiver_receive_wal|streaming"
    });
}

fn receivers(cluster: &Cluster) -> Vec<Pid> {
    cluster
        .processes()
        .into_iter()
        .filter(|(_, command)| command.contains("pg_receivewal"))
        .map(|(pid, _)| pid)
        .collect()
}

fn streaming_folder(cluster: &Cluster) -> BTreeSet<String> {
    let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
    let all = paths(&cluster.archive().join("main/streaming")).into_iter().map(name);
    all.filter(|name| !name.starts_with('.')).collect()
}

#[test]
fn a_reload_switches_receiving_on_and_off_beside_archiving_by_file() {
    let cluster = receiving().started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster.write_segments(1);
    cluster.drain();
    assert_eq!(status(&cluster, "streaming_archiver, running, pid IS NULL"), "f|f|t");
    switch(&cluster, "on");
    wait_until_it_streams(&cluster);
    assert_eq!(receivers(&cluster).len(), 1);
    cluster.write_segments(5);
    cluster.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    cluster.drain();
    wait_until("what was received is archived", || streaming_folder(&cluster).len() == 1);
    let archived = catalogue(&cluster.archive());
    assert_eq!(archived.len(), archived.iter().collect::<BTreeSet<_>>().len(), "stored once: {archived:?}");
    wait_until("all is known of it", || {
        status(&cluster, "running, slot_name, slot_active, synchronous, sync_state, last_error")
            == "t|archiver|t|f|async|"
    });
    wait_until("it has it all", || status(&cluster, "lag_bytes = 0 AND lag_seconds = 0") == "t");
    let current = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    assert_eq!(status(&cluster, "current_file"), format!("{current}.partial"));

    switch(&cluster, "off");
    wait_until("nobody receives", || receivers(&cluster).is_empty());
    wait_until("its connection is gone", || cluster.psql("SELECT count(*) FROM pg_stat_replication") == "0");
    let off = "running, receiving_since IS NULL, sync_state IS NULL, last_error IS NULL";
    wait_until("it is told", || status(&cluster, off) == "f|t|t|t");
    let left = cluster.psql("SELECT state FROM archiver.check() WHERE name = 'replication slot'");
    assert_eq!(left, "warning", "it keeps WAL for nobody");
    switch(&cluster, "on");
    wait_until_it_streams(&cluster);
    cluster.write_segments(2);
    cluster.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    cluster.drain();
    wait_until("what was received is archived", || streaming_folder(&cluster).len() == 1);
    cluster.assert_one_line_each();
    assert!(paths(&cluster.archive().join("main/errors")).is_empty());
    assert!(!cluster.log().contains("could not archive"), "{}", cluster.log());

    // The tail of a planned stop is archived by file: PostgreSQL completes the segment, and the receiver is gone before.
    let last = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let took = cluster.stop(Stop::Fast);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(cluster.processes().is_empty());
    assert!(catalogue(&cluster.archive()).contains(&last), "{last}");
    cluster.start();
    wait_until_it_streams(&cluster);
    cluster.write_segments(1);
    cluster.drain();
    cluster.assert_done_files_restore_equal();
    assert!(cluster.psql("SELECT count(*) FROM archiver.gaps()") == "0");
}

#[test]
fn it_receives_where_archiving_by_file_is_off_and_ends_with_the_postmaster() {
    let cluster = receiving().with("archive_mode", "off").with("archive_library", "");
    let cluster =
        cluster.with("archiver.streaming_archiver", "on").with("archiver.streaming_partial_interval", "1s").started();
    wait_until_it_streams(&cluster);
    cluster.psql("CREATE EXTENSION archiver");
    let names = streaming::write(&cluster, 4);
    wait_until("what was received is archived", || {
        let archived = catalogue(&cluster.archive());
        names.iter().all(|name| archived.contains(name))
    });
    for name in &names {
        let copy = cluster.path("copy");
        let output = cluster.restore(name, &copy);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        assert!(has_equal_content(&copy, &cluster.pg_wal(name)), "{name}");
    }
    wait_until("a part is kept", || status(&cluster, "last_part IS NOT NULL") == "t");
    let before = receivers(&cluster);
    assert_eq!(before.len(), 1);
    // The worker is ended by mistake: PostgreSQL starts it again.
    let worker: i32 = status(&cluster, "pid").parse().unwrap();
    kill(Pid::from_raw(worker), Signal::SIGTERM).unwrap();
    wait_until("another one receives", || {
        let now = receivers(&cluster);
        now.len() == 1 && now != before
    });
    wait_until_it_streams(&cluster);
    kill(cluster.postmaster(), Signal::SIGKILL).unwrap();
    wait_until("all have ended", || cluster.processes().is_empty());
}

#[test]
fn a_wrong_setting_is_told_and_stops_receiving_alone() {
    let cluster = receiving().with("archiver.streaming_archiver", "on").started();
    cluster.psql("CREATE EXTENSION archiver");
    wait_until_it_streams(&cluster);
    for (setting, wrong, right) in [
        ("archiver.slot_name", "Not a Slot", "archiver"),
        ("archiver.streaming_archiver", "maybe", "on"),
        ("archiver.streaming_conninfo", "password=sesame", ""),
    ] {
        let mark = cluster.log().len();
        cluster.set(setting, wrong);
        cluster.reload();
        wait_until("it is told", || {
            cluster.log_since(mark).contains(&format!("WAL is not received: invalid value for parameter \"{setting}\""))
        });
        // PostgreSQL itself logs what a reload changes, whatever it is.
        let ours = |line: &&str| !line.contains("parameter \"archiver.streaming_conninfo\" changed to");
        assert!(!cluster.log_since(mark).lines().filter(ours).any(|line| line.contains("sesame")));
        wait_until("nobody receives", || receivers(&cluster).is_empty());
        let failed = cluster.psql("SELECT string_agg(detail, ' ') FROM archiver.check() WHERE state = 'failed'");
        assert!(failed.contains(setting), "{failed}");
        cluster.write_segments(1);
        cluster.drain();
        cluster.set(setting, right);
        cluster.reload();
        wait_until_it_streams(&cluster);
    }
    // A server that cannot be reached is asked again and again, and told of in check() and status.
    cluster.set("archiver.streaming_conninfo", "host=/nonexistent");
    cluster.reload();
    wait_until("status tells of it", || status(&cluster, "last_error").contains("No such file or directory"));
    assert_eq!(status(&cluster, "running, lag_bytes, failing_since IS NULL"), "f||f");
    let rows = "SELECT name FROM archiver.check() WHERE state = 'failed' AND hint IS NOT NULL ORDER BY name";
    assert_eq!(cluster.psql(rows), "receive-wal running\nstreaming connection");
    let old = cluster.create_directory("old");
    cluster.write_file(&old.join("pg_receivewal"), b"#!/bin/sh\necho 'pg_receivewal (PostgreSQL) 14.9'\n");
    fs::set_permissions(old.join("pg_receivewal"), fs::Permissions::from_mode(0o755)).unwrap();
    cluster.set("archiver.streaming_conninfo", "");
    cluster.set("archiver.path_prefix", &format!("{}:{}", old.display(), crate::cluster::bindir().display()));
    cluster.reload();
    wait_until("it is told", || status(&cluster, "last_error").contains("is of version 14"));
    assert!(cluster.psql(rows).contains("pg_receivewal compatible"));
    cluster.stop(Stop::Fast);
}

#[test]
fn an_archive_hosts_own_small_server_receives_and_its_planned_stop_loses_nothing() {
    let primary = streaming::primary();
    let host = receiving().with("archive_mode", "off").with("archive_library", "");
    let conninfo = format!("host={} user=postgres", primary.directory().display());
    let host = host.with("archiver.streaming_conninfo", &conninfo).with("archiver.streaming_archiver", "on").started();
    host.psql("CREATE EXTENSION archiver");
    wait_until_it_streams(&primary);
    let mut names = streaming::write(&primary, 3);
    wait_until("its lag is known", || status(&host, "lag_bytes = 0 AND server_lsn IS NOT NULL") == "t");
    // The slot keeps what is written while the receiver is away.
    host.stop(Stop::Fast);
    wait_until("the slot is free", || primary.psql("SELECT active FROM pg_replication_slots") == "f");
    names.extend(streaming::write(&primary, 3));
    host.start();
    wait_until("all is archived", || {
        let archived = catalogue(&host.archive());
        names.iter().all(|name| archived.contains(name))
    });
    let bad = "SELECT string_agg(name || ' ' || state || ' ' || detail, E'\\n') FROM archiver.check() WHERE state <> 'ok' AND name <> 'free space'";
    wait_until("check() is content", || host.psql(bad).is_empty());
    // It is asked about the WAL that it receives, not about its own.
    let mode = host.psql("SELECT detail FROM archiver.check() WHERE name = 'archive_mode'");
    assert_eq!(mode, "off: WAL is archived as it is received");
    let identity = host.psql("SELECT detail FROM archiver.check() WHERE name = 'identity'");
    let theirs = "SELECT 'system identifier ' || system_identifier FROM pg_control_system()";
    assert_eq!(identity, primary.psql(theirs));
    assert_ne!(identity, host.psql(theirs));
    assert_eq!(host.psql("SELECT state FROM archiver.check(probe => true) WHERE name = 'probe'"), "ok");
    let listed = host.psql("SELECT name FROM archiver.list_wal() ORDER BY name");
    assert_eq!(listed.lines().collect::<Vec<_>>(), names);
    assert_eq!(host.psql("SELECT count(*) FROM archiver.gaps()"), "0");
    assert_eq!(host.psql("SELECT count(*) FROM archiver.verify() WHERE state <> 'ok'"), "0");
    let gone = format!("SELECT name FROM archiver.delete_wal('{}', dry_run => false)", names[1]);
    assert_eq!(host.psql(&gone), names[0]);
    // A planned stop of the server that WAL comes from waits until the receiver has it all, the last record too.
    primary.stop(Stop::Fast);
    let end = primary.checkpoint_position();
    let received = || host.psql(&format!("SELECT received_lsn > '{end}' FROM archiver.receive_wal_status()"));
    wait_until("its last checkpoint was received", || received() == "t");
}

#[test]
fn nothing_is_received_into_the_empty_mount_point_of_an_archive() {
    let cluster = receiving().with("archive_mode", "off").with("archive_library", "");
    let cluster = cluster.with("archiver.streaming_archiver", "on").started();
    cluster.psql("CREATE EXTENSION archiver");
    wait_until_it_streams(&cluster);
    let names = streaming::write(&cluster, 2);
    wait_until("it is archived", || names.iter().all(|name| catalogue(&cluster.archive()).contains(name)));
    cluster.stop(Stop::Fast);
    fs::rename(cluster.archive(), cluster.path("unmounted")).unwrap();
    cluster.create_directory("archive");
    cluster.start();
    wait_until("it is told", || cluster.log().contains("has vanished"));
    assert!(cluster.log().contains("Is the file system mounted?"), "{}", cluster.log());
    cluster.write_segments(2);
    assert!(receivers(&cluster).is_empty());
    assert!(paths(&cluster.archive()).is_empty(), "{:?}", paths(&cluster.archive()));
    fs::remove_dir(cluster.archive()).unwrap();
    fs::rename(cluster.path("unmounted"), cluster.archive()).unwrap();
    wait_until_it_streams(&cluster);
    cluster.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    wait_until("what was received is archived", || streaming_folder(&cluster).len() == 1);
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.gaps()"), "0");
}

#[test]
fn a_standby_receives_its_own_wal_from_its_promotion_on() {
    let primary = receiving().started();
    primary.psql("CREATE EXTENSION archiver");
    switch(&primary, "on");
    wait_until_it_streams(&primary);
    let standby = Cluster::from_backup(&primary).with("archive_mode", "on").with("restore_command", "");
    let conninfo = format!("host={} user=postgres", primary.directory().display());
    let standby = standby.with("primary_conninfo", &conninfo).with("archiver.streaming_archiver", "on");
    standby.write_file(&standby.data().join("standby.signal"), b"");
    let standby = standby.started();
    let position = primary.psql("SELECT pg_current_wal_lsn()");
    wait_until("the standby has it all", || {
        standby.psql(&format!("SELECT pg_last_wal_replay_lsn() >= '{position}'")) == "t"
    });
    let row = || standby.psql("SELECT state, detail FROM archiver.check() WHERE name = 'receive-wal running'");
    assert_eq!(row(), "ok|this is a standby: its own WAL is received from its promotion on");
    assert!(receivers(&standby).is_empty());
    primary.stop(Stop::Fast);
    standby.promote();
    wait_until_it_streams(&standby);
    standby.write_segments(2);
    standby.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    standby.drain();
    wait_until("what was received is archived", || streaming_folder(&primary).len() == 1);
    assert_eq!(standby.psql("SELECT count(*) FROM archiver.gaps()"), "0");
    assert!(paths(&primary.archive().join("main/errors")).is_empty());
    wait_until("it receives", || row().starts_with("ok|process"));
}

#[test]
fn what_both_ways_bring_is_known_again_where_it_is_encrypted() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let cluster = receiving().with("archiver.streaming_partial_interval", "1s");
    let keys = cluster.path("readers.asc");
    cluster.write_file(&keys, &fs::read(gpg.public_keys(&["reader"], true)).unwrap());
    let cluster = cluster.with("archiver.encryption", "gpg");
    let cluster = cluster.with("archiver.encryption_recipients", &keys.display().to_string()).started();
    cluster.psql("CREATE EXTENSION archiver");
    switch(&cluster, "on");
    wait_until_it_streams(&cluster);
    cluster.write_segments(6);
    cluster.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    cluster.drain();
    wait_until("what was received is archived", || streaming_folder(&cluster).len() == 1);
    wait_until("a part is kept", || status(&cluster, "last_part IS NOT NULL") == "t");
    cluster.assert_one_line_each();
    assert!(paths(&cluster.archive().join("main/errors")).is_empty());
    assert!(!cluster.log().contains("could not"), "{}", cluster.log());
    // The shorter one goes once the longer is there.
    wait_until("one was read", || {
        let contents: Vec<_> =
            paths(&cluster.archive().join("main/partial")).into_iter().filter_map(|path| fs::read(path).ok()).collect();
        contents.iter().for_each(|content| assert_eq!(content[0], 0x85, "a part is as secret as the whole"));
        !contents.is_empty()
    });
}

#[test]
fn a_reset_begins_where_the_server_is_while_the_worker_waits() {
    let cluster = receiving().with("archive_mode", "off").with("archive_library", "").with("archiver.slot_name", "");
    let cluster = cluster.with("max_wal_size", "2MB").with("min_wal_size", "2MB");
    let cluster = cluster.with("archiver.streaming_archiver", "on").started();
    cluster.psql("CREATE EXTENSION archiver");
    wait_until_it_streams(&cluster);
    let refused = cluster.psql_as("postgres", "SELECT archiver.reset_receive_wal()").unwrap_err();
    assert!(refused.contains("another receiver works in"), "{refused}");
    let names = streaming::write(&cluster, 2);
    wait_until("it is archived", || names.iter().all(|name| catalogue(&cluster.archive()).contains(name)));
    switch(&cluster, "off");
    wait_until("nobody receives", || receivers(&cluster).is_empty());
    assert_eq!(cluster.psql("SELECT archiver.reset_receive_wal() IS NULL"), "t", "nothing to do");
    cluster.set("wal_keep_size", "0");
    cluster.reload();
    for _ in 0..2 {
        cluster.write_segments(6);
        cluster.psql("CHECKPOINT");
    }
    switch(&cluster, "on");
    wait_until("the gap is told", || status(&cluster, "last_error").contains("has already been removed"));
    // It waits before it tries again, and the directory is nobody's meanwhile.
    let reset = cluster.psql("SELECT archiver.reset_receive_wal()");
    assert_eq!(reset, cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn())"));
    wait_until_it_streams(&cluster);
    let names = streaming::write(&cluster, 1);
    wait_until("it is archived", || names.iter().all(|name| catalogue(&cluster.archive()).contains(name)));
    assert!(cluster.psql("SELECT count(*) FROM archiver.gaps()") != "0");
}

#[test]
fn a_copy_on_another_machine_is_not_asked_for_the_streaming_directory_of_its_configuration() {
    let cluster = Cluster::new(1).started();
    cluster.write_segments(1);
    cluster.drain();
    cluster.set("archiver.streaming_wals_directory", "/nonexistent/received");
    cluster.reload();
    let (missing, copy) = ("0000000100000000000000FF", cluster.path("copy"));
    let output = cluster.restore(missing, &copy);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    // Whoever names it himself means it.
    let mut command = cluster.archiver_program();
    command.args(["restore", missing, "copy", "--streaming-wals-directory", "/nonexistent/received"]);
    assert_eq!(command.output().unwrap().status.code(), Some(255));
}

/// Lets the worker receive into a directory that hangs, because of that file.
fn hang(cluster: &Cluster) -> PathBuf {
    // Whoever opens it waits for a reader, as on a file system that does not answer.
    let lock = cluster.create_directory("hangs").join(".archiver-receive-wal.archiving.lock");
    mkfifo(&lock, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    cluster.own(&lock);
    cluster.set("archiver.streaming_wals_directory", lock.parent().unwrap().to_str().unwrap());
    switch(cluster, "on");
    let worker = || cluster.processes().into_iter().find(|(_, command)| command.contains("archiver streaming"));
    wait_until("it hangs", || worker().is_some_and(|(pid, _)| has_thread(pid, "archiver recei")));
    lock
}

#[test]
fn a_streaming_directory_that_hangs_is_left_once_another_is_set() {
    let cluster = receiving().with("archive_mode", "off").with("archive_library", "").started();
    cluster.psql("CREATE EXTENSION archiver");
    hang(&cluster);
    cluster.set("archiver.streaming_wals_directory", cluster.path("received").to_str().unwrap());
    cluster.reload();
    wait_until_it_streams(&cluster);
    assert!(cluster.log().contains("does not end"), "{}", cluster.log());
    wait_until("it is told", || status(&cluster, "running, last_error IS NULL") == "t|t");
}

#[test]
fn receiving_that_hangs_is_left_also_where_it_is_switched_off_and_on_again() {
    let cluster = receiving().with("archive_mode", "off").with("archive_library", "").started();
    cluster.psql("CREATE EXTENSION archiver");
    let lock = hang(&cluster);
    switch(&cluster, "off");
    wait_until("it is to end", || cluster.log().contains("receiving WAL ends"));
    fs::remove_file(lock).unwrap();
    switch(&cluster, "on");
    wait_until_it_streams(&cluster);
    assert!(cluster.log().contains("does not end"), "{}", cluster.log());
}

#[test]
fn nothing_in_an_archive_is_changed_while_it_is_not_known_whose_wal_is_received() {
    let cluster = receiving().with("archive_mode", "off").with("archive_library", "");
    let cluster = cluster.with("archiver.streaming_conninfo", "host=/nonexistent");
    let cluster = cluster.with("archiver.streaming_archiver", "on").started();
    cluster.psql("CREATE EXTENSION archiver");
    for call in [
        "SELECT * FROM archiver.delete_wal('000000010000000000000002', dry_run => false)",
        "SELECT archiver.clear_error('notes.txt.20261121T101752Z.unknown')",
        "SELECT * FROM archiver.rebuild_catalogue()",
    ] {
        let error = cluster.psql_as("postgres", call).unwrap_err();
        assert!(error.contains("it is not known whose WAL is received here"), "{call}: {error}");
    }
    let probe = "SELECT state, detail FROM archiver.check(probe => true) WHERE name = 'probe'";
    assert_eq!(cluster.psql(probe), "failed|it is not known whose WAL is received");
}
