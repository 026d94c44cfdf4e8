//! What SQL shows and does beside the status row: queue, errors, archive_now, and all that check() judges.

use crate::cluster::{Cluster, Stop, started, text, wait_until};
use std::fs;
use std::time::{Duration, Instant, SystemTime};

fn with_extension() -> Cluster {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster
}

#[test]
fn archive_now_answers_with_a_segment_that_stands_in_the_archive() {
    let cluster = with_extension();
    let mut names = Vec::new();
    // Also where nothing was written since the last one.
    for _ in 0..3 {
        let answer = cluster.psql("SELECT name, location, seconds > 0 AND seconds < 30 FROM archiver.archive_now()");
        let fields: Vec<&str> = answer.split('|').collect();
        assert_eq!(fields[2], "t", "{answer}");
        assert_eq!(
            fields[1],
            cluster.archive().join("main/wals/0000000100000000").join(fields[0]).display().to_string()
        );
        assert!(fs::metadata(fields[1]).is_ok(), "{answer}");
        names.push(fields[0].to_string());
    }
    names.dedup();
    assert_eq!(names.len(), 3, "each call archives another segment");
    cluster.assert_one_line_each();
    assert_eq!(cluster.assert_done_files_restore_equal(), cluster.stored().len());
}

#[test]
fn archive_now_raises_what_the_archiver_says_and_ends_in_time() {
    let cluster = with_extension();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    let stall = cluster.stall_catalogue();
    let began = Instant::now();
    let error = cluster.psql_as("postgres", "SELECT * FROM archiver.archive_now('500 ms')").unwrap_err();
    assert!(error.contains("was not archived within 0.5 s"), "{error}");
    assert!(error.contains("DETAIL:  0 files wait before it."), "{error}");
    let cancelled = "SET statement_timeout = '300ms'; SELECT * FROM archiver.archive_now()";
    assert!(cluster.psql_as("postgres", cancelled).unwrap_err().contains("statement timeout"));
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    drop(stall);
    cluster.drain();

    let archive = cluster.archive();
    let away = cluster.path("away");
    fs::rename(&archive, &away).unwrap();
    cluster.create_directory("archive");
    cluster.psql("CREATE ROLE plain LOGIN; GRANT USAGE ON SCHEMA archiver TO plain");
    cluster.psql("GRANT EXECUTE ON FUNCTION archiver.archive_now(interval) TO plain");
    let began = Instant::now();
    // Also to whom it was granted.
    let error = cluster.psql_as("plain", "SELECT * FROM archiver.archive_now()").unwrap_err();
    assert!(error.contains("is not archived") && error.contains("has vanished"), "{error}");
    assert!(error.contains("HINT:  "), "{error}");
    let program = cluster.archiver_program().arg("check").output().expect("run archiver");
    assert_eq!(program.status.code(), Some(1));
    let said = text(&program.stdout);
    assert!(said.lines().any(|line| line.starts_with("failed   archiver process ")), "{said}");
    assert!(began.elapsed() < Duration::from_secs(30), "it does not wait for its whole minute: {:?}", began.elapsed());
    fs::remove_dir(&archive).unwrap();
    fs::rename(&away, &archive).unwrap();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    cluster.drain();
    cluster.assert_one_line_each();

    cluster.set("archiver.compression", "zst");
    cluster.reload();
    let refused = || cluster.psql_as("postgres", "SELECT * FROM archiver.archive_now()").unwrap_err();
    wait_until("the setting is refused", || refused().contains("invalid value for parameter"));
}

#[test]
fn archive_now_says_why_nothing_can_be_archived() {
    let cluster = Cluster::new(1).with("archive_mode", "off").started();
    cluster.psql("CREATE EXTENSION archiver");
    let refused = || cluster.psql_as("postgres", "SELECT * FROM archiver.archive_now()").unwrap_err();
    assert!(refused().contains("ERROR:  archive_mode is off"), "{}", refused());
    cluster.set("archive_mode", "on");
    cluster.set("archive_library", "");
    cluster.restart();
    assert!(refused().contains("ERROR:  archive_library is not archiver"), "{}", refused());
}

#[test]
fn the_queue_shows_what_waits_in_order_and_how_far_it_is() {
    let cluster = with_extension();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.queue()"), "0");
    let stall = cluster.stall_catalogue();
    cluster.write_backlog(30);
    cluster.wait_for_stall();
    cluster.write_file(&cluster.pg_wal("archive_status/00000009.history.ready"), b"");
    let ready = "SELECT count(*) > 3 FROM archiver.queue() WHERE state = 'ready'";
    wait_until("files are stored ahead", || cluster.psql(ready) == "t");
    let order = "SELECT array_agg(name) = array_agg(name ORDER BY name NOT LIKE '%.history', name COLLATE \"C\") \
                 FROM archiver.queue()";
    assert_eq!(cluster.psql(order), "t");
    let first = cluster.psql("SELECT name, kind, size, state FROM archiver.queue() LIMIT 2");
    let lines: Vec<&str> = first.lines().collect();
    assert_eq!(lines[0], "00000009.history|history||skipped");
    assert!(lines[1].ends_with("|segment|1048576|ready"), "stored, and waiting for its line: {first}");
    let rows = "SELECT count(*), bool_and(ready_since > now() - interval '1 hour'), \
                count(*) FILTER (WHERE state = 'waiting') > 5 FROM archiver.queue() WHERE kind = 'segment'";
    assert_eq!(cluster.psql(rows), "30|t|t");
    drop(stall);
    cluster.drain();
}

#[test]
fn a_refused_file_is_shown_with_both_hashes_until_it_is_archived() {
    let cluster = with_extension();
    cluster.write_segments(2);
    cluster.drain();
    // Another server was faster.
    let next = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn() + 1)");
    let directory = cluster.archive().join("main/wals/0000000100000000");
    let other = fs::read_dir(&directory).unwrap().next().unwrap().unwrap().path();
    cluster.write_file(&directory.join(&next), &fs::read(&other).unwrap());
    cluster.write_segments(3);
    let query = "SELECT reason, in_pg_wal, since > now() - interval '1 hour', detail ~ 'blake3:.*blake3:' \
                 FROM archiver.errors() WHERE name = ";
    let row = || cluster.psql(&format!("{query}'{next}'"));
    wait_until("the refusal is told", || row() == "refused|t|t|t");
    assert_eq!(cluster.psql(&format!("SELECT state FROM archiver.queue() WHERE name = '{next}'")), "error");
    let check = "SELECT state, detail FROM archiver.check() WHERE name = 'refused files'";
    assert_eq!(cluster.psql(check), format!("failed|1, the first is \"{next}\""));
    fs::remove_file(directory.join(&next)).unwrap();
    cluster.write_segments(1);
    cluster.drain();
    assert_eq!(cluster.psql("SELECT count(*) FROM archiver.errors()"), "0");
    assert_eq!(cluster.psql(check), "ok|none");
}

#[test]
fn list_wal_tells_what_lies_in_the_archive_page_by_page() {
    let cluster = with_extension();
    // More than one page.
    cluster.write_segments(220);
    cluster.drain();
    let stored: Vec<String> = cluster.stored().into_keys().collect();
    assert_eq!(cluster.psql("SELECT name FROM archiver.list_wal()").lines().collect::<Vec<_>>(), stored);
    let row = "SELECT kind, timeline, size, stored_size, stored_at > now() - interval '1 hour', compression, encryption, \
               location FROM archiver.list_wal() LIMIT 1";
    let first = &cluster.stored()[&stored[0]];
    let stored_size = first.metadata().unwrap().len();
    let expected = format!("segment|1|1048576|{stored_size}|t|zstd|none|{}", first.display());
    assert_eq!(cluster.psql(row), expected);
    let between = format!("SELECT name FROM archiver.list_wal('{}', '{}')", stored[3], stored[5]);
    assert_eq!(cluster.psql(&between).lines().collect::<Vec<_>>(), stored[3..=5]);
    let error = cluster.psql_as("postgres", "SELECT * FROM archiver.list_wal('x')").unwrap_err();
    assert!(error.contains("ERROR:  \"x\" is not the name of a WAL file"), "{error}");
}

#[test]
fn files_set_aside_are_shown_and_fail_the_check() {
    let cluster = with_extension();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    let errors = cluster.create_directory("archive/main/errors");
    for name in ["notes.txt.20261121T101752Z.unknown", "000000010000000000000001.20261120T000000Z.duplicate"] {
        cluster.write_file(&errors.join(name), b"x");
    }
    let rows = cluster.psql("SELECT name, reason, since AT TIME ZONE 'UTC', location FROM archiver.errors()");
    let at = |name: &str| errors.join(name).display().to_string();
    let expected = [
        format!(
            "000000010000000000000001|duplicate|2026-11-20 00:00:00|{}",
            at("000000010000000000000001.20261120T000000Z.duplicate")
        ),
        format!("notes.txt|unknown|2026-11-21 10:17:52|{}", at("notes.txt.20261121T101752Z.unknown")),
    ];
    assert_eq!(rows.lines().collect::<Vec<_>>(), expected);
    let check = "SELECT state, detail FROM archiver.check() WHERE name = 'files set aside'";
    assert_eq!(cluster.psql(check), "failed|duplicates: 1, unknown: 1");
}

#[test]
fn check_judges_by_the_limits_that_were_set() {
    let cluster = with_extension();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    let row = |name: &str| cluster.psql(&format!("SELECT state FROM archiver.check() WHERE name = '{name}'"));
    assert_eq!([row("waiting WAL"), row("last archived WAL")], ["ok", "ok"]);
    let archiver = cluster.running_archiver();
    cluster.set("archiver.max_incoming_wals_queue", "many");
    cluster.reload();
    wait_until("the wrong limit is told", || row("settings") == "failed");
    // And WAL is archived all the same.
    cluster.psql("SELECT * FROM archiver.archive_now()");
    assert!(cluster.log().contains("LOG:  check() judges without a limit: invalid value for parameter"));
    assert_eq!(cluster.archiver(), Some(archiver));
    cluster.set("archiver.max_incoming_wals_queue", "3");
    cluster.set("archiver.last_wal_maximum_age", "0 minutes");
    cluster.reload();
    wait_until("the age is judged", || row("last archived WAL") == "failed");
    assert_eq!(row("waiting WAL"), "ok");
    let stall = cluster.stall_catalogue();
    cluster.write_backlog(5);
    assert_eq!(row("waiting WAL"), "failed");
    drop(stall);
    cluster.drain();
    assert_eq!(row("waiting WAL"), "ok");
}

#[test]
fn check_names_every_wrong_setting_leftovers_and_a_clock_that_is_off() {
    let cluster = with_extension();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    let row = |name: &str| cluster.psql(&format!("SELECT state, detail FROM archiver.check() WHERE name = '{name}'"));
    assert_eq!(row("staged files"), "ok|0 in the making");
    // As a process leaves it that was killed: no process has this PID.
    let host = fs::read_to_string("/proc/sys/kernel/hostname")
        .unwrap()
        .trim()
        .replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "_");
    let staged = cluster.archive().join("main/.staging").join(format!("{host}.2147483647.1.0"));
    cluster.write_file(&staged, b"x");
    assert_eq!(row("staged files"), "warning|1 of 1 were left behind by processes that are dead");
    assert_eq!(row("clock"), "ok|this server and the storage agree");
    let catalogue = fs::File::options().write(true).open(cluster.archive().join("main/wals/main-xlog.db")).unwrap();
    catalogue.set_modified(SystemTime::now() + Duration::from_secs(3600)).unwrap();
    assert!(row("clock").starts_with("warning|the storage's last change lies 3"), "{}", row("clock"));

    for (name, value) in
        [("archiver.workers", "two"), ("archiver.compresion", "none"), ("archiver.compression_level", "99")]
    {
        cluster.set(name, value);
    }
    cluster.reload();
    let count = "SELECT count(*) FROM archiver.check() WHERE name = 'settings' AND state = 'failed'";
    wait_until("all three are told", || cluster.psql(count) == "3");
    let rows = cluster.psql("SELECT detail FROM archiver.check() WHERE name = 'settings'");
    for name in ["archiver.workers", "archiver.compresion", "archiver.compression_level"] {
        assert!(rows.contains(name), "{rows}");
    }
}

#[test]
fn the_program_shows_and_judges_what_sql_does_while_the_server_runs_and_after() {
    let cluster = with_extension();
    cluster.psql("SELECT * FROM archiver.archive_now()");
    let run = |arguments: &[&str]| {
        let output = cluster.archiver_program().args(arguments).output().expect("run archiver");
        (output.status.code(), text(&output.stdout))
    };
    let json =
        |query: &str, input: &str| cluster.psql(&format!("SELECT {query} FROM (SELECT $${input}$$::jsonb) AS t(j)"));
    let (code, shown) = run(&["status", "--json"]);
    assert_eq!(code, Some(0));
    let sql = "SELECT storage, server_name, system_identifier, compression, encryption, archiver_pid, queue_files, \
               bytes_read, bytes_stored FROM archiver.status";
    let fields = "j->>'storage', j->>'server_name', j->>'system_identifier', j->>'compression', j->>'encryption', \
                  j->>'archiver_pid', j->>'queue_files', j->>'bytes_read', j->>'bytes_stored'";
    assert_eq!(json(fields, &shown), cluster.psql(sql));

    let (code, judged) = run(&["check", "--json"]);
    assert_eq!(code, Some(0), "{judged}");
    let ours = format!(
        "SELECT string_agg(concat(e->>'name', e->>'state', e->>'hint'), ',' ORDER BY e->>'name') \
         FROM jsonb_array_elements($${judged}$$::jsonb) AS e WHERE e->>'name' <> 'archiver process'"
    );
    // What only a session sees is left out, and what changes from one moment to the next.
    let theirs = "SELECT string_agg(concat(name, state, hint), ',' ORDER BY name) FROM archiver.check() \
                  WHERE name NOT IN ('archive_mode', 'archive_library', 'archive_command', 'continuous archiving', \
                                     'last archived WAL')";
    assert_eq!(cluster.psql(&ours), cluster.psql(theirs));

    cluster.stop(Stop::Fast);
    let (code, shown) = run(&["status"]);
    assert_eq!(code, Some(0));
    let field = |name: &str| shown.lines().find(|line| line.starts_with(name)).map(|line| line[25..].to_string());
    assert_eq!(field("archiver_pid").as_deref(), Some("-"), "an archiver that has ended tells nothing:\n{shown}");
    assert_eq!(field("queue_files").as_deref(), Some("0"));
    fs::rename(cluster.archive(), cluster.path("away")).unwrap();
    let (code, judged) = run(&["check"]);
    assert_eq!(code, Some(1));
    assert!(judged.lines().any(|line| line.starts_with("failed   storage ")), "{judged}");
}
