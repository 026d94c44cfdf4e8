//! Deleting WAL beside servers that archive and recover: from SQL, and as a standby's archive_cleanup_command.

use crate::cluster::{Cluster, bindir, started, text, wait_at_most, wait_until};
use crate::recovery::{CHECKSUM, insert};
use std::time::{Duration, Instant};

fn with_segments(count: u32) -> Cluster {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster.write_segments(count);
    cluster.drain();
    cluster
}

fn stored(cluster: &Cluster) -> Vec<String> {
    cluster.stored().into_keys().collect()
}

#[test]
fn delete_wal_shows_what_would_go_and_deletes_when_told_to() {
    let cluster = with_segments(20);
    let before = stored(&cluster);
    let size = |name: &String| cluster.stored()[name].metadata().expect("stat").len();
    let expected: Vec<String> =
        before[..8].iter().map(|name| format!("{name}|{}|{}", size(name), cluster.stored()[name].display())).collect();
    let call = format!("SELECT * FROM archiver.delete_wal('{}'", before[8]);
    assert_eq!(cluster.psql(&format!("{call})")).lines().collect::<Vec<_>>(), expected);
    assert_eq!(stored(&cluster), before, "a dry run is the default");
    assert_eq!(cluster.psql(&format!("{call}, NULL)")), "", "and NULL deletes nothing");
    assert_eq!(stored(&cluster), before);
    assert_eq!(cluster.psql(&format!("{call}, dry_run => false)")).lines().collect::<Vec<_>>(), expected);
    assert_eq!(stored(&cluster), before[8..]);
    cluster.assert_one_line_each();
    assert_eq!(cluster.psql(&format!("{call}, false)")), "");

    // The archiver process, which knew the old catalogue, goes on with the new one.
    let archiver = cluster.running_archiver();
    cluster.write_segments(5);
    cluster.drain();
    assert_eq!(cluster.running_archiver(), archiver);
    cluster.assert_one_line_each();
    assert!(stored(&cluster).len() >= before.len() - 8 + 5);
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.check() WHERE state = 'failed'"), "0");
}

#[test]
fn a_deletion_that_is_ended_ends_soon_and_the_next_one_finishes_it() {
    let cluster = with_segments(12);
    let names = stored(&cluster);
    let bound =
        |number: usize| format!("SELECT count(*) FROM archiver.delete_wal('{}', dry_run => false)", names[number]);
    // Files go; for their lines the catalogue is waited for.
    let lock = cluster.stall_catalogue();
    let began = Instant::now();
    let error = cluster.psql_as("postgres", &format!("SET statement_timeout = '500ms'; {}", bound(4))).unwrap_err();
    assert!(error.contains("canceling statement due to statement timeout"), "{error}");
    assert!(began.elapsed() < Duration::from_millis(1500), "{:?}", began.elapsed());
    let mut psql = cluster.client("psql");
    let child = psql.args(["-XAtq", "-d", "postgres", "-c", &bound(8)]).stderr(std::process::Stdio::piped()).spawn();
    let child = child.expect("run psql");
    wait_until("its files are gone", || stored(&cluster).len() == names.len() - 8);
    let pid =
        cluster.psql("SELECT pid FROM pg_stat_activity WHERE query LIKE '%delete_wal%' AND pid <> pg_backend_pid()");
    let began = Instant::now();
    assert_eq!(cluster.psql(&format!("SELECT pg_terminate_backend({pid})")), "t");
    let error = text(&child.wait_with_output().expect("wait for psql").stderr);
    assert!(error.contains("due to administrator command"), "{error}");
    let is_gone = || !std::path::Path::new(&format!("/proc/{pid}")).exists();
    wait_at_most(Duration::from_secs(2), "the backend is gone", is_gone);
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    drop(lock);
    assert_eq!(cluster.psql(&bound(8)), "0");
    assert_eq!(stored(&cluster), names[8..]);
    cluster.assert_one_line_each();
    cluster.write_segments(2);
    cluster.drain();
    cluster.assert_one_line_each();
}

#[test]
fn clear_error_removes_one_file_that_was_set_aside() {
    let cluster = with_segments(1);
    let errors = cluster.create_directory("archive/main/errors");
    let names = ["notes.txt.20261121T101752Z.unknown", "000000010000000000000001.20261120T000000Z.duplicate"];
    for name in names {
        cluster.write_file(&errors.join(name), b"x");
    }
    let clear = |name: &str| cluster.psql_as("postgres", &format!("SELECT archiver.clear_error('{name}')"));
    let refused = clear("notes.txt").unwrap_err();
    assert!(refused.contains("no file named \"notes.txt\" was set aside") && refused.contains(names[0]), "{refused}");
    // What lies in pg_wal is no matter of this function.
    let in_pg_wal = cluster.status_files("done").into_iter().next().expect("an archived segment");
    assert!(clear(&in_pg_wal).is_err() && clear(&format!("../../data/pg_wal/{in_pg_wal}")).is_err());
    assert!(cluster.pg_wal(&in_pg_wal).exists());
    assert_eq!(clear(names[0]), Ok(errors.join(names[0]).display().to_string()));
    assert_eq!(cluster.psql("SELECT name, reason FROM archiver.errors()"), "000000010000000000000001|duplicate");
}

#[test]
fn an_archive_cleanup_command_removes_what_its_standby_has_replayed() {
    let primary = started();
    insert(&primary, 1_000);
    let cleanup = format!("{} delete --before %r --yes --quiet", bindir().join("archiver").display());
    let standby = Cluster::from_backup(&primary).with("archive_cleanup_command", &cleanup);
    standby.write_file(&standby.data().join("standby.signal"), b"");
    standby.start();
    let all = {
        for _ in 0..3 {
            insert(&primary, 3_000);
            primary.write_segments(4);
        }
        primary.psql("CHECKPOINT");
        primary.write_segments(2);
        primary.drain();
        stored(&primary)
    };
    let replayed = || {
        let lsn = primary.psql("SELECT redo_lsn FROM pg_control_checkpoint()");
        standby.psql_as("postgres", &format!("SELECT pg_last_wal_replay_lsn() > '{lsn}'")).as_deref() == Ok("t")
    };
    wait_until("the standby has replayed the checkpoint", replayed);
    standby.psql("CHECKPOINT");
    let needed = standby.psql("SELECT redo_wal_file FROM pg_control_checkpoint()");
    wait_until("the archive begins where the standby does", || stored(&primary).first() == Some(&needed));
    let expected: Vec<String> = all.into_iter().filter(|name| *name >= needed).collect();
    assert!(stored(&primary).starts_with(&expected), "{:?}", stored(&primary));
    primary.assert_one_line_each();
    assert!(!standby.log().contains("archive_cleanup_command"), "{}", standby.log());

    // Primary and standby go on, and nothing to do is no trouble.
    standby.psql("CHECKPOINT");
    insert(&primary, 3_000);
    let expected = primary.psql(CHECKSUM);
    primary.write_segments(3);
    primary.drain();
    standby.restart();
    wait_until("the standby has it all", || standby.psql_as("postgres", CHECKSUM).as_deref() == Ok(expected.as_str()));
    primary.assert_one_line_each();
    assert!(!primary.log().contains("could not archive"), "{}", primary.log());
    assert!(!standby.log().contains("archiver: "), "{}", standby.log());
}
