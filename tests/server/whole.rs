//! Whether an archive is whole: gaps and damage, as SQL and the program see them in what real servers wrote.

use crate::cluster::{Cluster, Stop, started, text, wait_at_most, wait_until};
use crate::recovery::{insert, standby_of, wait_for_replay};
use archiver_core::codec;
use archiver_tests::PAGE_BYTES;
use archiver_tests::harm::flip_bit;
use std::fs::{self, File};
use std::io::Read;
use std::process::Stdio;
use std::time::{Duration, Instant};

const STATES: &str = "SELECT state, count(*) FROM archiver.verify() GROUP BY state ORDER BY state";

/// Neither SQL nor the program finds anything, and each file is compared with what was noted.
#[track_caller]
fn assert_whole(cluster: &Cluster, archive: &Cluster) {
    let files = cluster.stored_in(&archive.archive()).len();
    assert_eq!(cluster.psql("SELECT * FROM archiver.gaps()"), "");
    let bad = cluster.psql("SELECT * FROM archiver.verify() WHERE state <> 'ok'");
    assert_eq!(bad, "", "{files} files");
    assert_eq!(cluster.psql(STATES), format!("ok|{files}"));
    let verified = cluster.archiver_program().arg("verify").output().expect("run archiver");
    let summary = format!("total: {files}, ok: {files}, unverified: 0, damaged: 0, missing: 0, unreadable: 0\n");
    assert_eq!((verified.status.code(), text(&verified.stdout)), (Some(0), summary));
    let gaps = cluster.archiver_program().arg("gaps").output().expect("run archiver");
    assert_eq!((gaps.status.code(), text(&gaps.stdout).as_str()), (Some(0), "no gaps\n"));
}

#[test]
fn an_archive_with_switched_segments_labels_and_a_promotion_is_whole() {
    for compression in ["none", "zstd"] {
        let primary = started();
        primary.set("archiver.compression", compression);
        primary.reload();
        primary.psql("CREATE EXTENSION archiver");
        insert(&primary, 1_000);
        // Its base backup leaves a label.
        let standby = standby_of(&primary).with("archive_mode", "always").started();
        for _ in 0..3 {
            primary.write_segments(4);
            insert(&primary, 8_000);
            // Switched a few bytes after its beginning.
            primary.psql("SELECT pg_switch_wal()");
            primary.psql("CHECKPOINT");
            insert(&primary, 3_000);
        }
        wait_for_replay(&standby, &primary);
        primary.drain();
        standby.drain();
        primary.stop(Stop::Immediate);
        standby.promote();
        insert(&standby, 20_000);
        standby.write_segments(3);
        standby.drain();
        let stored = standby.stored_in(&primary.archive());
        for part in [".backup", ".history"] {
            assert!(stored.keys().any(|name| name.ends_with(part)), "{part}: {stored:?}");
        }
        assert!(stored.keys().any(|name| name.starts_with("00000002")), "{stored:?}");
        assert_whole(&standby, &primary);
        // Every page stands for itself where nothing was noted.
        fs::remove_dir_all(primary.archive().join("main/sums")).expect("remove the sums");
        assert_eq!(standby.psql(STATES), format!("unverified|{}", stored.len()));

        let first = stored.keys().find(|name| name.starts_with("00000002") && name.len() == 24).expect("a segment");
        fs::remove_file(&stored[first]).expect("remove");
        assert_eq!(standby.psql("SELECT * FROM archiver.gaps()"), format!("2|{first}|{first}|1"));
    }
}

#[test]
fn a_partial_segment_in_a_recycled_file_is_whole() {
    let primary = started();
    primary.psql("CREATE EXTENSION archiver");
    insert(&primary, 1_000);
    let standby = standby_of(&primary)
        .with("archive_mode", "on")
        .with("wal_keep_size", "0")
        .with("max_wal_size", "8MB")
        .with("min_wal_size", "8MB")
        .started();
    // Segments that are full to their ends, of which the standby's restart points make new ones.
    for _ in 0..4 {
        insert(&primary, 40_000);
        primary.psql("CHECKPOINT");
        wait_for_replay(&standby, &primary);
        standby.psql("CHECKPOINT");
    }
    primary.psql("SELECT pg_switch_wal()");
    insert(&primary, 500);
    wait_for_replay(&standby, &primary);
    primary.drain();
    primary.stop(Stop::Immediate);
    standby.promote();
    insert(&standby, 5_000);
    standby.write_segments(2);
    standby.drain();
    let stored = standby.stored_in(&primary.archive());
    let partial = stored.iter().find(|(name, _)| name.ends_with(".partial")).expect("a partial").1;
    let mut content = Vec::new();
    let decoder = codec::decode(File::open(partial).expect("open"), 1 << 20);
    decoder.expect("decode").plain.read_to_end(&mut content).expect("decode");
    let address = |page: &[u8]| u64::from_ne_bytes(page[8..16].try_into().expect("eight bytes"));
    let older = content.chunks(PAGE_BYTES).filter(|page| (1..address(&content)).contains(&address(page))).count();
    assert!(older > 0, "the file was none of an older segment");
    assert_whole(&standby, &primary);
}

#[test]
fn what_came_to_harm_is_named_by_sql() {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster.write_segments(12);
    cluster.drain();
    let names: Vec<String> = cluster.stored().into_keys().collect();
    let [first, removed, flipped, cut] = [0, 2, 5, 9].map(|at| names[at].as_str());
    fs::remove_file(&cluster.stored()[first]).expect("remove");
    fs::remove_file(&cluster.stored()[removed]).expect("remove");
    let change = |name: &str, change: fn(&mut Vec<u8>)| {
        let path = &cluster.stored()[name];
        let mut bytes = fs::read(path).expect("read");
        change(&mut bytes);
        cluster.write_file(path, &bytes);
    };
    change(flipped, |bytes| flip_bit(bytes, 12_345));
    change(cut, |bytes| bytes.truncate(bytes.len() - 100));
    let gaps = cluster.psql("SELECT * FROM archiver.gaps()");
    assert_eq!(gaps, format!("1|{first}|{first}|1\n1|{removed}|{removed}|1"));
    let bad = cluster.psql("SELECT name, state FROM archiver.verify() WHERE state <> 'ok'");
    assert_eq!(bad, format!("{first}|missing\n{removed}|missing\n{flipped}|damaged\n{cut}|damaged"));
    let range = format!("SELECT name, state, detail IS NULL FROM archiver.verify('{flipped}', '{}')", names[6]);
    assert_eq!(cluster.psql(&range), format!("{flipped}|damaged|f\n{}|ok|t", names[6]));
    for (call, said) in [
        ("archiver.verify('junk')", "\"junk\" is not the name of a WAL file"),
        ("archiver.verify(NULL, 'junk')", "\"junk\" is not the name of a WAL file"),
    ] {
        let error = cluster.psql_as("postgres", &format!("SELECT * FROM {call}")).expect_err(call);
        assert!(error.contains(said), "{error}");
    }
    // A broken history may hide gaps, and is said.
    fs::write(cluster.archive().join("main/wals/00000002.history"), "junk\n").expect("write");
    let rows = cluster.client("psql").args(["-XAtq", "-d", "postgres", "-c", "SELECT * FROM archiver.gaps()"]).output();
    let rows = rows.expect("run psql");
    assert_eq!(text(&rows.stdout).lines().count(), 2);
    assert!(text(&rows.stderr).contains("WARNING:  gaps may be hidden"), "{}", text(&rows.stderr));

    fs::rename(cluster.archive(), cluster.path("away")).expect("move the archive away");
    cluster.create_directory("archive");
    for call in ["archiver.verify()", "archiver.gaps()"] {
        let error = cluster.psql_as("postgres", &format!("SELECT * FROM {call}")).expect_err(call);
        assert!(error.contains("there is no archive at"), "{call}: {error}");
    }
}

#[test]
fn a_verification_that_is_cancelled_ends_within_a_second() {
    let cluster = Cluster::new(16).with("archiver.compression", "bzip2").started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster.write_segments(24);
    cluster.drain();
    let began = Instant::now();
    let error = cluster.psql_as("postgres", "SET statement_timeout = '200ms'; SELECT * FROM archiver.verify()");
    assert!(error.expect_err("timed out").contains("due to statement timeout"));
    assert!(began.elapsed() < Duration::from_millis(1200), "{:?}", began.elapsed());
    for (end, said) in
        [("pg_cancel_backend", "due to user request"), ("pg_terminate_backend", "due to administrator command")]
    {
        let call = "SELECT count(*) FROM archiver.verify()";
        let mut psql = cluster.client("psql");
        psql.args(["-XAtq", "-d", "postgres", "-c", call]).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = psql.spawn().expect("run psql");
        let pid = format!("SELECT pid FROM pg_stat_activity WHERE query = '{call}' AND state = 'active'");
        wait_until("it verifies", || !cluster.psql(&pid).is_empty());
        let pid = cluster.psql(&pid);
        let began = Instant::now();
        assert_eq!(cluster.psql(&format!("SELECT {end}({pid})")), "t");
        let output = child.wait_with_output().expect("wait for psql");
        assert!(text(&output.stderr).contains(said), "{}", text(&output.stderr));
        assert!(began.elapsed() < Duration::from_secs(1), "{end}: {:?}", began.elapsed());
    }
    // Whoever wants the first rows only leaves nobody behind, in the same session.
    let threads = "SELECT count(*) FROM pg_ls_dir('/proc/' || pg_backend_pid() || '/task')";
    let left =
        format!("BEGIN; DECLARE c CURSOR FOR SELECT archiver.verify(); FETCH 1 FROM c; CLOSE c; COMMIT; {threads}");
    let rows = cluster.psql(&left);
    assert!(rows.contains(",ok,"), "{rows}");
    wait_at_most(Duration::from_secs(5), "sessions end", || {
        cluster.psql("SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%verify%' AND pid <> pg_backend_pid()")
            == "0"
    });
}

#[test]
fn records_are_made_anew_while_the_archiver_works() {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster.write_segments(4);
    cluster.drain();
    let before = cluster.psql("SELECT * FROM archiver.rebuild_catalogue()");
    assert_eq!(before, format!("{}|0|0|0|0|0|0", cluster.stored().len()));
    for round in 0..5 {
        cluster.write_backlog(12);
        let done = cluster.psql("SELECT lines_dropped, sums_dropped, unread FROM archiver.rebuild_catalogue()");
        assert_eq!(done, "0|0|0", "round {round}");
    }
    cluster.drain();
    cluster.assert_one_line_each();
    assert_whole(&cluster, &cluster);
    // Without any record it makes them all, as the same user; what was lost is told.
    let names: Vec<String> = cluster.stored().into_keys().collect();
    fs::remove_file(&cluster.stored()[&names[1]]).expect("remove");
    fs::remove_dir_all(cluster.archive().join("main/sums")).expect("remove the sums");
    let mut psql = cluster.client("psql");
    let call = "SELECT files, lines_dropped, sums_made FROM archiver.rebuild_catalogue()";
    let output = psql.args(["-XAtq", "-d", "postgres", "-c", call]).output().expect("run psql");
    let left = names.len() - 1;
    assert_eq!(text(&output.stdout), format!("{left}|1|{left}\n"));
    let warning = format!("WARNING:  the catalogue named \"{}\"", names[1]);
    assert!(text(&output.stderr).contains(&warning), "{}", text(&output.stderr));
    cluster.assert_one_line_each();
    cluster.write_segments(2);
    cluster.drain();
    cluster.assert_one_line_each();
}
