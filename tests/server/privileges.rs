//! Who may see what, and a state file that speaks of another server.

use crate::cluster::{Cluster, Stop, started, wait_until};

#[test]
fn only_monitors_see_the_status_and_only_superusers_probe() {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver; CREATE ROLE plain LOGIN; CREATE ROLE monitor LOGIN IN ROLE pg_monitor");
    cluster.write_segments(1);
    cluster.drain();
    let queries = [
        "SELECT configured FROM archiver.status",
        "SELECT configured FROM archiver.status()",
        "SELECT bool_and(state <> '') FROM archiver.check()",
        "SELECT archiver.facts(NULL) IS NOT NULL",
        "SELECT NOT running FROM archiver.receive_wal_status()",
    ];
    for query in queries {
        let refused = cluster.psql_as("plain", query).expect_err(query);
        assert!(refused.contains("permission denied for"), "{refused}");
        assert_eq!(cluster.psql_as("monitor", query).as_deref(), Ok("t"), "{query}");
    }
    // What reads every file of the archive, or writes there, is for those whom a superuser names.
    let reading = [
        "SELECT count(*) > 0 FROM archiver.verify()",
        "SELECT count(*) = 0 FROM archiver.gaps()",
        "SELECT files > 0 FROM archiver.rebuild_catalogue()",
    ];
    for query in reading {
        for role in ["plain", "monitor"] {
            let refused = cluster.psql_as(role, query).expect_err(query);
            assert!(refused.contains("permission denied for"), "{role}: {refused}");
        }
        assert_eq!(cluster.psql(query), "t", "{query}");
    }
    cluster.psql(
        "GRANT USAGE ON SCHEMA archiver TO plain; \
         GRANT EXECUTE ON FUNCTION archiver.verify(text, text), archiver.gaps(), archiver.rebuild_catalogue() \
         TO plain",
    );
    for query in reading {
        assert_eq!(cluster.psql_as("plain", query).as_deref(), Ok("t"), "{query}");
    }
    let probe = "SELECT state FROM archiver.check(probe => true) WHERE name = 'probe'";
    let refused = cluster.psql_as("monitor", probe).expect_err("only a superuser may probe");
    assert!(refused.contains("only a superuser may check with probe => true"), "{refused}");
    assert_eq!(cluster.psql(probe), "ok");
    // What deletes, or leaves a gap, is nobody's but whom a superuser names.
    let deletes = [
        "SELECT * FROM archiver.delete_wal('000000010000000000000001')",
        "SELECT archiver.clear_error('x')",
        "SELECT archiver.reset_receive_wal()",
    ];
    for (role, query) in ["plain", "monitor"].into_iter().flat_map(|role| deletes.map(|query| (role, query))) {
        let refused = cluster.psql_as(role, query).expect_err(query);
        assert!(refused.contains("permission denied for"), "{role}: {query}: {refused}");
    }
    cluster.psql("GRANT USAGE ON SCHEMA archiver TO plain; GRANT EXECUTE ON FUNCTION archiver.delete_wal TO plain");
    assert_eq!(cluster.psql_as("plain", deletes[0]).as_deref(), Ok(""));
    assert!(cluster.psql_as("plain", "CREATE EXTENSION archiver CASCADE").is_err());
    assert!(cluster.psql_as("plain", "LOAD 'archiver'").is_err());
}

#[test]
fn the_state_of_a_copied_data_directory_is_not_believed() {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver");
    cluster.write_segments(2);
    cluster.drain();
    assert_ne!(cluster.psql("SELECT archiver_pid FROM archiver.status"), "");
    cluster.stop(Stop::Fast);
    let copy = Cluster::from_copy(&cluster).started();
    assert!(copy.data().join("pg_stat_tmp/archiver.state").exists());
    assert_eq!(copy.psql("SELECT last_error, bytes_read, stats_since FROM archiver.status"), "||");
    // Nor is one of an earlier start.
    cluster.start();
    assert_eq!(cluster.psql("SELECT bytes_read FROM archiver.status WHERE archived_count = 0"), "");
}

#[test]
fn a_hostile_state_file_breaks_nothing() {
    let cluster = started();
    cluster.psql("CREATE EXTENSION archiver");
    let state = cluster.data().join("pg_stat_tmp/archiver.state");
    cluster.write_segments(1);
    cluster.drain();
    wait_until("the state is told", || state.exists());
    // A state of this very process, but for figures that SQL cannot show.
    let told = std::fs::read_to_string(&state).expect("read the state");
    let beyond = told.replace("\"retries\":0", "\"retries\":18446744073709551615");
    let nul = told.replace("\"last_error\":null", "\"last_error\":\"\\u0000\"");
    assert!(beyond != told && nul != told, "{told}");
    for junk in [&b""[..], b"{}", b"\xFF\xFE", b"[[[[[[", &[b'x'; 200_000], beyond.as_bytes(), nul.as_bytes()] {
        cluster.write_file(&cluster.data().join("pg_stat_tmp/archiver.state"), junk);
        assert_eq!(cluster.psql("SELECT configured, bytes_read FROM archiver.status"), "t|");
    }
    cluster.write_segments(1);
    cluster.drain();
    assert_ne!(cluster.psql("SELECT archiver_pid FROM archiver.status"), "");
}
