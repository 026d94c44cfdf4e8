//! Encrypted archives of real clusters: archived without a secret, recovered with it.

use crate::cluster::{Cluster, text, wait_until};
use crate::recovery::{CHECKSUM, insert, wait_for_end_of_recovery};
use archiver_tests::gpg::Gpg;
use std::fs;
use std::path::{Path, PathBuf};

/// A copy of that file which the server may read.
fn handed_to(cluster: &Cluster, keys: &Path, name: &str) -> PathBuf {
    let path = cluster.path(name);
    cluster.write_file(&path, &fs::read(keys).expect("read keys"));
    path
}

fn encrypting(gpg: &Gpg) -> Cluster {
    let cluster = Cluster::new(1);
    let keys = handed_to(&cluster, &gpg.public_keys(&["reader"], true), "readers.asc");
    cluster.with("archiver.encryption", "gpg").with("archiver.encryption_recipients", &keys.display().to_string())
}

#[test]
fn an_encrypted_archive_is_recovered_from_with_the_secret_key_and_not_without() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "open sesame", "never");
    let primary = encrypting(&gpg).started();
    primary.psql("CREATE EXTENSION archiver");
    insert(&primary, 1_000);
    let restored = Cluster::from_backup(&primary);
    insert(&primary, 10_000);
    primary.write_segments(12);
    primary.drain();
    let expected = primary.psql(CHECKSUM);

    // What the server says of it.
    assert_eq!(primary.psql("SELECT encryption FROM archiver.status"), "gpg");
    assert_eq!(primary.psql("SELECT DISTINCT compression, encryption FROM archiver.list_wal()"), "zstd|openpgp");
    let row = primary.psql("SELECT state, detail FROM archiver.check() WHERE name = 'encryption'");
    assert!(row.starts_with("warning|openpgp, to "), "Barman does not recognise Curve25519: {row}");
    for path in primary.stored().values() {
        let stored = fs::read(path).expect("read");
        assert!(stored[0] == 0x85 && !stored.windows(4).any(|window| window == [0x28, 0xB5, 0x2F, 0xFD]));
    }

    // Without the keys a recovery must not go on as if the archive had ended.
    restored.write_file(&restored.data().join("recovery.signal"), b"");
    restored.start_in_vain();
    assert!(restored.log().contains("archiver.decryption_keys"), "{}", restored.log());

    let keys = handed_to(&restored, &gpg.secret_keys(&["reader"], "open sesame"), "secret.asc");
    restored.set("archiver.decryption_keys", &keys.display().to_string());
    restored.set("archiver.decryption_passphrase_command", "echo open sesame");
    restored.start();
    wait_for_end_of_recovery(&restored);
    assert_eq!(restored.psql(CHECKSUM), expected);
}

#[test]
fn a_file_is_known_again_by_the_server_and_by_the_program() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let cluster = encrypting(&gpg).started();
    cluster.write_segments(3);
    cluster.drain();
    let before = cluster.stored();
    let contents: Vec<Vec<u8>> = before.values().map(|path| fs::read(path).expect("read")).collect();
    // By the program, which knows the cluster's secret from its control file.
    for name in before.keys() {
        let output = cluster.archiver_program().arg("archive").arg(format!("pg_wal/{name}")).output().expect("run");
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    // By the server, that is offered them once more.
    for name in before.keys() {
        let status = cluster.pg_wal("archive_status");
        fs::rename(status.join(format!("{name}.done")), status.join(format!("{name}.ready"))).expect("rename");
    }
    cluster.restart();
    cluster.write_segments(1);
    cluster.drain();
    let now: Vec<Vec<u8>> = before.values().map(|path| fs::read(path).expect("read")).collect();
    assert!(now == contents, "nothing was stored anew");
    cluster.assert_one_line_each();
    assert!(!cluster.log().contains("WARNING"), "{}", cluster.log());
}

#[test]
fn keys_that_cannot_be_used_keep_the_wal_and_mended_ones_are_taken_without_a_reload() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let cluster = encrypting(&gpg).started();
    cluster.psql("CREATE EXTENSION archiver");
    let keys = cluster.path("readers.asc");
    let good = fs::read(&keys).expect("read");
    cluster.write_file(&keys, b"");
    cluster.write_segments(2);
    wait_until("the failure is told", || cluster.log().contains("there is no public key in it"));
    assert!(cluster.log().contains("archiver.encryption_recipients"), "{}", cluster.log());
    assert_eq!(cluster.psql("SELECT state FROM archiver.check() WHERE name = 'encryption'"), "failed");
    assert!(cluster.stored().is_empty() && cluster.status_files("ready").len() >= 2);
    cluster.write_file(&keys, &good);
    // PostgreSQL asks again after a minute, or with the next segment.
    cluster.write_segments(1);
    cluster.drain();
    cluster.assert_one_line_each();
}
