//! Two servers and one archive: each name is one server's, and the other one is told.

use super::{ARCHIVE, Site};
use crate::cluster::{Cluster, Stop, figure, wait_until};
use crate::stopping::assert_no_crash;
use archiver_tests::s3_server::Bucket;
use nix::sys::signal::{Signal, kill};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Instant;

/// Names that are raced for at once: no more than the archivers read ahead.
const HEAT: usize = 10;

/// A copy of the files of `stopped` that is started as a standby and promoted: to timeline 2, each of them.
fn promoted_copy(stopped: &Cluster) -> Cluster {
    let copy = Cluster::from_copy(stopped).with("archive_mode", "on").with("archiver.workers", "2");
    copy.write_file(&copy.data().join("standby.signal"), b"");
    copy.start();
    copy.promote();
    copy.drain();
    copy
}

/// Notes what is new in the bucket, and sees that nothing else has changed.
fn look(bucket: &Bucket, seen: &mut BTreeMap<String, String>) {
    for (key, etag) in bucket.etags(ARCHIVE) {
        let first = seen.entry(key.clone()).or_insert_with(|| etag.clone());
        assert_eq!(*first, etag, "{key} was overwritten");
    }
}

/// The names that `cluster` was refused, with both hashes.
fn refused(cluster: &Cluster) -> BTreeSet<String> {
    let rows = cluster.psql("SELECT name, detail ~ 'blake3:.*blake3:', in_pg_wal FROM archiver.errors()");
    let name =
        |row: &str| row.strip_suffix("|t|t").unwrap_or_else(|| panic!("a row without both hashes: {row}")).into();
    rows.lines().map(name).collect()
}

/// Takes the files that `server` was refused for archived, once it has told of the one that PostgreSQL asks for: nothing
/// behind that is offered else. Answers their names.
fn let_go(server: &Cluster, mark: usize) -> BTreeSet<String> {
    let Some(asked) = server.status_files("ready").into_iter().next() else { return BTreeSet::new() };
    let told = format!("the archive already holds another file named \"{asked}\"");
    let log = server.log_since(mark);
    let refused = refused(server);
    if !log.contains(&told) || !refused.contains(&asked) {
        return BTreeSet::new();
    }
    assert!(log.contains("blake3:") && log.contains("Nothing was overwritten."), "{log}");
    for name in &refused {
        let status = |suffix| server.pg_wal(&format!("archive_status/{name}.{suffix}"));
        fs::rename(status("ready"), status("done")).expect("take the file for archived");
    }
    server.reload();
    refused
}

/// Both have other content under the same names. Answers how many each has won.
fn race(site: &Site, servers: [&Cluster; 2], seen: &mut BTreeMap<String, String>) -> [usize; 2] {
    let marks = servers.map(Cluster::log_mark);
    for server in servers {
        kill(server.running_archiver(), Signal::SIGSTOP).expect("stop the archiver");
        server.write_segments(HEAT as u32);
    }
    let names = servers[0].status_files("ready");
    assert_eq!(names, servers[1].status_files("ready"));
    assert_eq!(names.len(), HEAT);
    for server in servers {
        kill(server.running_archiver(), Signal::SIGCONT).expect("let the archiver go on");
    }
    let mut lost = [BTreeSet::new(), BTreeSet::new()];
    wait_until("each has archived or was refused every file", || {
        look(&site.bucket, seen);
        for number in [0, 1] {
            lost[number].extend(let_go(servers[number], marks[number]));
        }
        servers.iter().all(|server| server.status_files("ready").is_empty())
    });
    assert_eq!(lost[0].intersection(&lost[1]).count(), 0, "{lost:?}");
    for name in &names {
        let holds = servers.map(|server| site.holds_file_of(server, name));
        assert_eq!(holds, [!lost[0].contains(name), !lost[1].contains(name)], "{name}");
        assert!(holds[0] != holds[1], "{name} is nobody's");
    }
    lost.map(|lost| HEAT - lost.len())
}

/// `ARCHIVER_TEST_S3_RACES=200` for the whole.
#[test]
fn of_two_servers_on_one_timeline_each_name_is_won_by_one_and_nothing_is_overwritten() {
    let names = figure("ARCHIVER_TEST_S3_RACES", 20) as usize;
    let site = Site::over_tls(1).archiving();
    site.cluster.stop(Stop::Fast);
    let (one, other) = (promoted_copy(&site.cluster), promoted_copy(&site.cluster));
    let system_identifier = "SELECT system_identifier, timeline_id FROM pg_control_system(), pg_control_checkpoint()";
    assert_eq!(one.psql(system_identifier), other.psql(system_identifier));
    let (began, mut seen, mut won) = (Instant::now(), BTreeMap::new(), [0, 0]);
    look(&site.bucket, &mut seen);
    while won[0] + won[1] < names {
        let now = race(&site, [&one, &other], &mut seen);
        won = [won[0] + now[0], won[1] + now[1]];
    }
    look(&site.bucket, &mut seen);
    println!("{} names: {won:?} won, in {:.0} s", won[0] + won[1], began.elapsed().as_secs_f64());
    for server in [&one, &other] {
        assert_no_crash(server);
    }
}

/// `ARCHIVER_TEST_S3_BEGINNINGS=50` for the whole.
#[test]
fn of_two_clusters_that_begin_one_archive_at_the_same_instant_one_owns_it_and_the_other_stores_nothing() {
    let rounds = figure("ARCHIVER_TEST_S3_BEGINNINGS", 5);
    let site = Site::over_tls(1).with("archiver.storage", "");
    let other = Cluster::new(1).with("archiver.storage", "");
    let clusters = [&site.cluster, &other];
    for cluster in clusters {
        cluster.start();
        cluster.psql("CREATE EXTENSION archiver");
    }
    let mut owned = [0, 0];
    for round in 0..rounds {
        let place = format!("begun/{round}");
        let url = site.url_below(&site.bucket.name, &place);
        for cluster in clusters {
            cluster.write_segments(3);
            cluster.set("archiver.storage", &url);
        }
        let waiting = clusters.map(|cluster| cluster.status_files("ready"));
        let postmasters = clusters.map(Cluster::postmaster);
        for postmaster in postmasters {
            kill(postmaster, Signal::SIGHUP).expect("reload");
        }
        wait_until("one has archived all, and the other is refused", || {
            let left = clusters.map(|cluster| cluster.status_files("ready").is_empty());
            let told = clusters.map(|cluster| {
                let error = cluster.psql("SELECT last_error FROM archiver.status");
                error.contains("belongs to another cluster") && error.contains(&place)
            });
            left[0] && told[1] || left[1] && told[0]
        });
        let owner = usize::from(!clusters[0].status_files("ready").is_empty());
        owned[owner] += 1;
        assert_eq!(clusters[1 - owner].status_files("ready"), waiting[1 - owner]);
        let systems = clusters.map(|cluster| cluster.psql("SELECT system_identifier FROM pg_control_system()"));
        let identity = site.bucket.get(&format!("{place}/main/identity.json"), &[]).text();
        assert!(identity.contains(&systems[owner]), "{identity}");
        let keys = site.bucket.list(&format!("{place}/"));
        let (wal, else_there): (Vec<_>, Vec<_>) = keys.iter().partition(|key| key.contains("/wals/"));
        let expected = ["identity.json", "probe/create-only"].map(|key| format!("{place}/main/{key}"));
        assert_eq!(else_there, expected.iter().collect::<Vec<_>>());
        assert_eq!(wal.len(), waiting[owner].len(), "{wal:?}");
        for name in &waiting[owner] {
            assert!(site.holds_file_of(clusters[owner], name), "{name}");
        }
        for cluster in clusters {
            cluster.set("archiver.storage", "");
            cluster.reload();
            let configured = "SELECT configured FROM archiver.status";
            wait_until("the setting is gone", || cluster.psql(configured) == "f");
        }
    }
    println!("{rounds} archives begun at the same instant: {owned:?} owned");
}
