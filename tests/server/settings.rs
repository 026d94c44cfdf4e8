//! Settings: a wrong one stores nothing until it is mended, and every one takes effect by reload.

use crate::cluster::{Cluster, catalogue, major, started, tree, wait_until};

/// Settings with values that somebody could mistype, and what the log must name.
const MISTYPED: [(&str, &str); 8] = [
    ("archiver.compression", "zst"),
    ("archiver.compression_level", "99"),
    ("archiver.server_name", "../x"),
    ("archiver.storage", "/srv"),
    ("archiver.workers", "two"),
    ("archiver.memory_limit", "lots"),
    ("archiver.retry_timeout", "soon"),
    ("archiver.compresion", "none"),
];

/// Mistypes each setting in turn, makes it known by `make_known`, and mends it by reload.
fn stores_nothing_until_mended(cluster: &Cluster, make_known: impl Fn(&Cluster)) {
    for (name, value) in MISTYPED {
        let right = cluster.setting(name);
        let mark = cluster.log_mark();
        cluster.set(name, value);
        make_known(cluster);
        // PostgreSQL asks the library only while a file waits, and its processes reload one after the other.
        wait_until(&format!("the log names {name}"), || {
            if cluster.status_files("ready").is_empty() {
                cluster.write_segments(1);
            }
            cluster.log_since(mark).contains("WAL is not archived")
        });
        let before = tree(&cluster.archive());
        let archiver = cluster.running_archiver();
        cluster.write_segments(2);
        cluster.psql("SELECT pg_reload_conf()");
        cluster.write_segments(1);
        wait_until("PostgreSQL has asked and was told no", || {
            cluster.log_since(mark).contains("yet archiving is not configured")
        });
        assert_eq!(tree(&cluster.archive()), before, "{name} = '{value}'");
        assert!(cluster.status_files("ready").len() >= 3);
        let log = cluster.log_since(mark);
        let told: Vec<&str> = log.lines().filter(|line| line.contains("WAL is not archived")).collect();
        assert_eq!(told.len(), 1, "{log}");
        assert!(told[0].contains("LOG:  ") && told[0].contains(&format!("\"{name}\"")), "{}", told[0]);
        // Since 17 the server's own warning says it, too.
        let details = log.lines().skip_while(|line| !line.contains("yet archiving is not configured")).nth(1);
        let says_it = details.is_some_and(|line| line.contains("DETAIL:  ") && line.contains(&format!("\"{name}\"")));
        assert_eq!(says_it, major() >= 17, "{log}");

        match right {
            Some(right) => cluster.set(name, &right),
            None => cluster.unset(name),
        }
        cluster.reload();
        cluster.drain();
        assert_eq!(cluster.archiver(), Some(archiver), "the same process all the time");
    }
    cluster.assert_one_line_each();
}

#[test]
fn a_mistyped_setting_at_start_stores_nothing_until_it_is_mended() {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    stores_nothing_until_mended(&cluster, Cluster::restart);
}

#[test]
fn a_mistyped_setting_by_reload_stores_nothing_until_it_is_mended() {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    stores_nothing_until_mended(&cluster, Cluster::reload);
}

#[test]
fn a_mistyped_setting_in_a_preloaded_library_stores_nothing_until_it_is_mended() {
    let cluster = Cluster::new(1).with("shared_preload_libraries", "archiver").started();
    cluster.write_segments(1);
    cluster.drain();
    stores_nothing_until_mended(&cluster, Cluster::reload);
}

#[test]
fn a_cluster_without_storage_waits_and_says_which_setting_is_missing() {
    let cluster = Cluster::new(1);
    let storage = cluster.setting("archiver.storage").expect("set");
    cluster.unset("archiver.storage");
    cluster.start();
    cluster.write_segments(2);
    wait_until("the log says what is missing", || {
        cluster.log().contains("LOG:  WAL is not archived: parameter \"archiver.storage\" is not set")
    });
    cluster.set("archiver.storage", &storage);
    cluster.reload();
    cluster.drain();
    cluster.assert_one_line_each();
}

#[test]
fn every_setting_takes_effect_by_reload_while_files_are_read_ahead() {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    let archiver = cluster.running_archiver();
    for (name, value) in [
        ("archiver.compression", "none"),
        ("archiver.workers", "1"),
        ("archiver.read_ahead", "0"),
        ("archiver.compression", "gzip"),
        ("archiver.compression", "bzip2"),
        ("archiver.compression", "xz"),
        ("archiver.compression", "lz4"),
        ("archiver.compression", "snappy"),
        ("archiver.compression", "zstd"),
        ("archiver.compression_level", "high"),
        ("archiver.workers", "4"),
        ("archiver.read_ahead", "64"),
        ("archiver.memory_limit", "16MB"),
        ("archiver.retry_timeout", "5s"),
    ] {
        let stall = cluster.stall_catalogue();
        cluster.write_backlog(8);
        cluster.wait_for_stall();
        cluster.set(name, value);
        cluster.reload();
        drop(stall);
        cluster.drain();
        // All of those may have been answered for before the reload was heeded. An archive that is begun anew first waits for
        // the catalogue: that has happened before the next stall.
        cluster.write_segments(1);
        cluster.drain();
    }
    assert_eq!(cluster.archiver(), Some(archiver));
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 113);
    assert!(!cluster.log().contains("holds another file"));
}

#[test]
fn after_a_change_of_storage_nothing_is_answered_for_that_lies_in_the_old_place_only() {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    let old = cluster.archive();
    let done_before = cluster.status_files("done");
    let stall = cluster.stall_catalogue();
    cluster.write_backlog(30);
    wait_until("files are read ahead", || cluster.stored().len() > done_before.len() + 8);
    let new = cluster.create_directory("new");
    cluster.set("archiver.storage", &format!("file://{}", new.display()));
    cluster.reload();
    // One file may be asked for under the old configuration still, and it cannot be recorded there.
    cluster.drain();
    let in_new = cluster.stored_in(&new);
    let missing: Vec<String> = cluster
        .status_files("done")
        .difference(&done_before)
        .filter(|name| !in_new.contains_key(*name))
        .cloned()
        .collect();
    assert_eq!(missing, [] as [String; 0]);
    let mut lines = catalogue(&new);
    lines.sort();
    assert_eq!(lines, in_new.into_keys().collect::<Vec<_>>());
    // Whoever still waits for that catalogue may record there what it has stored there, once it can.
    assert_eq!(catalogue(&old).len(), done_before.len());
    drop(stall);
    assert!(cluster.status_files("done").len() >= 30);
}

#[test]
fn what_was_read_ahead_is_dropped_once_a_setting_is_wrong() {
    let cluster = started();
    cluster.write_segments(1);
    cluster.drain();
    let stall = cluster.stall_catalogue();
    cluster.write_backlog(40);
    cluster.wait_for_stall();
    let mark = cluster.log_mark();
    cluster.set("archiver.server_name", "../x");
    cluster.reload();
    wait_until("the log names the setting", || cluster.log_since(mark).contains("WAL is not archived"));
    let before = tree(&cluster.archive());
    let lines = catalogue(&cluster.archive()).len();
    let unrecorded = cluster.stored().len() - lines;
    drop(stall);
    // PostgreSQL asks again, and nothing may come of it: the old workers are given the time to go on.
    cluster.psql("SELECT pg_sleep(3)");
    assert_eq!(tree(&cluster.archive()), before, "more files are stored under a wrong configuration");
    // The lines that were being written are: one group, of the few files that were stored when the catalogue stalled.
    let more = catalogue(&cluster.archive()).len() - lines;
    assert!(more <= unrecorded / 2, "{more} of {unrecorded} files are recorded under a wrong configuration");
}
