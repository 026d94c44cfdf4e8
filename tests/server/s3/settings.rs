//! Wrong settings of a running server: WAL stays, the log and check() say what to mend, and no secret is told.

use super::Site;
use crate::cluster::{Cluster, Stop, wait_until};

const WRONG_SECRET: &str = "a-secret-that-is-wrong-9f27";

/// What is logged from `mark` on of a failure of that cause, label by label: message, detail, hint.
fn logged(cluster: &Cluster, mark: usize, cause: &str) -> Vec<String> {
    wait_until(&format!("the log says {cause:?}"), || {
        let log = cluster.log_since(mark);
        log.find(cause).is_some_and(|at| log[at..].contains("HINT:  "))
    });
    let log = cluster.log_since(mark);
    let lines: Vec<&str> = log.lines().collect();
    let first = lines.iter().position(|line| line.contains(cause)).expect("the line");
    lines[first..lines.len().min(first + 3)].iter().map(|line| line.to_string()).collect()
}

fn check_says(cluster: &Cluster, words: &[&str]) {
    let rows = cluster.psql("SELECT name, state, detail, hint FROM archiver.check() WHERE state = 'failed'");
    for word in words {
        assert!(rows.contains(word), "{word:?} is not in: {rows}");
    }
}

/// Neither the log nor anything that SQL shows holds a secret.
#[track_caller]
fn assert_no_secret(site: &Site) {
    let everything = "SELECT t::text FROM archiver.status AS t UNION ALL SELECT t::text FROM archiver.status() AS t \
                      UNION ALL SELECT t::text FROM archiver.check() AS t UNION ALL SELECT t::text FROM archiver.queue() AS t \
                      UNION ALL SELECT t::text FROM archiver.errors() AS t UNION ALL SELECT t::text FROM pg_settings AS t \
                      UNION ALL SELECT t::text FROM pg_file_settings AS t UNION ALL SELECT t::text FROM pg_stat_archiver AS t";
    let shown = site.cluster.psql(everything) + &site.cluster.log();
    for secret in [WRONG_SECRET, &site.bucket.server.secret] {
        assert!(!shown.contains(secret), "{secret} is shown");
    }
}

/// WAL waits, and nothing more is stored.
#[track_caller]
fn assert_waits(site: &Site, stored: usize) {
    assert!(site.cluster.status_files("ready").len() >= 2);
    assert_eq!(site.stored().len(), stored);
    assert_no_secret(site);
}

#[test]
fn an_unknown_parameter_and_a_missing_bucket_are_told_with_what_to_mend() {
    let site = Site::over_tls(1).archiving();
    let cluster = &site.cluster;
    let stored = site.stored().len();
    let reload_with = |url: &str| {
        let mark = cluster.log_mark();
        cluster.set("archiver.storage", url);
        cluster.reload();
        mark
    };
    let mark = reload_with(&format!("{}&regoin=eu-west-1", site.url()));
    let failed = "SELECT count(*) FROM archiver.check() WHERE name = 'settings' AND state = 'failed'";
    wait_until("the parameter is refused", || cluster.psql(failed) == "1");
    cluster.write_segments(2);
    wait_until("the log says so", || cluster.log_since(mark).contains("LOG:  WAL is not archived: "));
    let log = cluster.log_since(mark);
    for words in ["regoin", "region, endpoint, addressing"] {
        assert!(log.contains(words), "{words}: {log}");
        check_says(cluster, &[words]);
    }
    assert_waits(&site, stored);
    assert!(cluster.psql("SELECT config_error FROM archiver.status").contains("archiver.storage"));

    let mark = reload_with(&site.url_below("missing-bucket", "some/place"));
    let told = logged(cluster, mark, "store answered 404 NoSuchBucket");
    println!("{}", told.join("\n"));
    assert!(told[0].contains("WARNING:  could not archive WAL file \""), "{told:?}");
    assert!(told[1].contains("DETAIL:  ") && told[1].contains("/missing-bucket/some/place/main/"), "{told:?}");
    assert!(told[1].contains(", request id ") && told[1].contains(", credentials from "), "{told:?}");
    assert!(told[2].contains("HINT:  Create the bucket, or mend its name in archiver.storage."), "{told:?}");
    check_says(cluster, &["store answered 404 NoSuchBucket", "Create the bucket"]);
    assert_waits(&site, stored);

    reload_with(&site.url());
    cluster.drain();
    assert!(site.assert_complete() > stored);
    assert_no_secret(&site);
}

const WRONG_SECRET_HINT: &str = "HINT:  Mend the key where these credentials come from; the file is tried again by itself, \
                                 or at once after SELECT pg_reload_conf().";

#[test]
fn a_wrong_secret_is_told_and_mended_in_its_file_alone() {
    let site = Site::over_tls(1).archiving();
    let cluster = &site.cluster;
    let archiver = cluster.running_archiver();
    for (reload, word) in [(false, "by itself"), (true, "by a reload")] {
        let stored = site.stored().len();
        let mark = cluster.log_mark();
        site.write_credentials(WRONG_SECRET);
        cluster.reload();
        // Keys in use are looked at every few seconds.
        let refused = "could not archive WAL file \"";
        wait_until("the wrong secret is in use", || {
            cluster.write_segments(1);
            cluster.log_since(mark).contains(refused)
        });
        let told = logged(cluster, mark, refused);
        println!("{}", told.join("\n"));
        assert!(told[0].contains("store answered 403"), "{told:?}");
        assert!(told[1].contains("DETAIL:  ") && told[1].contains(", request id "), "{told:?}");
        assert!(told[1].contains(", credentials from "), "{told:?}");
        assert!(told[1].contains(&site.credentials().display().to_string()), "{told:?}");
        assert!(told[2].contains(WRONG_SECRET_HINT), "{told:?}");
        check_says(cluster, &["store answered 403 SignatureDoesNotMatch", "Mend the key"]);
        cluster.write_segments(1);
        assert!(site.stored().len() > stored || !reload);
        assert!(cluster.status_files("ready").len() >= 2);
        assert_no_secret(&site);

        site.write_credentials(&site.bucket.server.secret);
        let began = std::time::Instant::now();
        if reload {
            cluster.reload();
        }
        cluster.drain();
        println!("mended {word} within {:.1} s", began.elapsed().as_secs_f64());
    }
    assert_eq!(cluster.archiver(), Some(archiver));
    assert!(site.assert_complete() > 3);
    assert_no_secret(&site);
}

#[test]
fn a_secret_that_is_wrong_at_the_start_is_told_as_such() {
    let site = Site::over_tls(1).archiving();
    let cluster = &site.cluster;
    cluster.stop(Stop::Fast);
    site.write_credentials(WRONG_SECRET);
    let mark = cluster.log_mark();
    cluster.start();
    cluster.write_segments(2);
    let told = logged(cluster, mark, "could not archive WAL file \"");
    println!("{}", told.join("\n"));
    assert!(told[0].contains("store answered 403"), "{told:?}");
    assert!(told[2].contains(WRONG_SECRET_HINT), "{told:?}");
    assert_no_secret(&site);
    site.write_credentials(&site.bucket.server.secret);
    cluster.reload();
    cluster.drain();
}
