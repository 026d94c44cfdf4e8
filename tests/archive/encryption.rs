//! Files encrypted to the keys of their readers: gpg reads them, we do, and nobody else; the same file is still known.

use archiver_core::codec;
use archiver_core::config::Setting;
use archiver_core::crypt::{self, Encryption, Recipients, Seed};
use archiver_core::error::{Error, Kind};
use archiver_core::hash::HashKey;
use archiver_core::restore::{Request, restore};
use archiver_core::wal::WalName;
use archiver_tests::gpg::Gpg;
use archiver_tests::{Site, archive_file, wal_name};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

const SEALED: [(&str, &str); 2] = [("RSA", "default"), ("Curve25519", "future-default")];

fn encrypting_to(site: Site, keys: &Path) -> Site {
    site.with(Setting::Encryption, "openpgp").with(Setting::EncryptionRecipients, keys.to_str().expect("UTF-8"))
}

fn reading_with(site: Site, keys: &Path) -> Site {
    site.with(Setting::DecryptionKeys, keys.to_str().expect("UTF-8"))
}

fn restored(site: &Site, name: &WalName) -> Result<Vec<u8>, Error> {
    let destination = site.path("restored");
    let request = Request {
        name: *name,
        destination: &destination,
        or_partial: false,
        streaming_directory: None,
        system_identifier: Some(site.cluster.system_identifier),
        retry_timeout: Duration::from_millis(100),
    };
    restore(|| Ok(site.place()), &request).map(|_| fs::read(&destination).expect("read"))
}

fn decoded(compressed: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    codec::decode(compressed, 1 << 30).expect("decode").plain.read_to_end(&mut plain).expect("decode");
    plain
}

#[test]
fn gpg_and_our_restore_read_what_was_encrypted_to_keys_of_both_kinds() {
    for (kind, algorithm) in SEALED {
        let gpg = Gpg::new();
        gpg.add_key("reader", algorithm, "", "never");
        for compression in ["none", "zstd", "gzip"] {
            let site = encrypting_to(Site::new(), &gpg.public_keys(&["reader"], compression == "none"));
            let site = reading_with(site, &gpg.secret_keys(&["reader"], "")).with(Setting::Compression, compression);
            let archive = site.archive();
            let files = [
                site.offer_segment(1),
                site.offer(&wal_name("000000010000000000000001.00000028.backup"), b"START WAL LOCATION: 0/100028\n"),
                site.offer(&wal_name("00000002.history"), b"1\t0/300000\tno recovery target specified\n"),
            ];
            for file in &files {
                let plain = fs::read(&file.path).unwrap();
                let stored = archive_file(&archive, file).unwrap();
                assert_eq!(stored.format.encryption, Encryption::OpenPgp);
                let path = site.stored(&file.name);
                assert!(decoded(&gpg.decrypt(&path, "")) == plain, "{kind}, {compression}: gpg");
                assert!(restored(&site, &file.name).unwrap() == plain, "{kind}, {compression}: restore");
                assert_eq!(stored.stored_size, fs::metadata(path).unwrap().len());
            }
            let lines = site.catalogue_lines();
            let compression = if compression == "none" { "None" } else { compression };
            assert!(lines.iter().all(|line| line.ends_with(&format!("\t{compression}\tgpg"))), "{lines:?}");
        }
    }
}

#[test]
fn file_recognises_what_is_encrypted_to_an_rsa_key_among_others_every_time() {
    let gpg = Gpg::new();
    gpg.add_key("first", "future-default", "", "never");
    gpg.add_key("second", "default", "", "never");
    let keys = gpg.public_keys(&["first", "second"], false);
    let readers = Recipients::new(&keys).readers(SystemTime::now()).unwrap();
    let path = gpg.home().join("encrypted");
    // Left to chance, four of so many would begin with a number that is a byte shorter.
    for number in 0..1024 {
        let mut encrypted = Vec::new();
        crypt::encrypt(&readers, &Seed::random(), &b"x"[..], &mut encrypted).unwrap();
        assert_eq!(encrypted[..4], [0x85, 0x01, 0x8C, 0x03], "file {number}");
        if number == 0 {
            fs::write(&path, encrypted).unwrap();
        }
    }
    let file = Command::new("file").arg("--brief").arg(&path).output().unwrap();
    let said = String::from_utf8(file.stdout).unwrap();
    assert!(said.contains("PGP") && said.contains("encrypted"), "{said}");
    assert_eq!(gpg.decrypt(&path, ""), b"x");
}

#[test]
fn nothing_beside_an_encrypted_file_tells_what_is_in_it() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let site = encrypting_to(Site::new(), &gpg.public_keys(&["reader"], false));
    let file = site.offer_segment(1);
    let hash = archive_file(&site.archive(), &file).unwrap().hash.to_string();
    for path in archiver_tests::tree(&site.storage()) {
        let path = site.storage().join(path);
        if path.is_file() {
            let content = fs::read(&path).unwrap();
            assert!(!String::from_utf8_lossy(&content).contains(&hash), "{}", path.display());
        }
    }
}

#[test]
fn the_same_file_is_known_again_and_another_is_refused_also_right_after_a_crash() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let site = encrypting_to(Site::new(), &gpg.public_keys(&["reader"], false));
    let file = site.offer_segment(1);
    // Died before it took note of what it had stored.
    assert!(site.archive().store(&file).unwrap().created);
    assert_eq!(site.catalogue(), [] as [String; 0]);
    let before = fs::read(site.stored(&file.name)).unwrap();
    for _ in 0..2 {
        assert!(!archive_file(&site.archive(), &file).unwrap().created);
        assert_eq!(site.catalogue(), [file.name.to_string()]);
    }
    let mut other = site.content(&file.name);
    other[500_000] ^= 1;
    let error = archive_file(&site.archive(), &site.offer(&file.name, &other)).unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict, "{error:?}");
    assert_eq!(fs::read(site.stored(&file.name)).unwrap(), before);
    // The setting was changed since: the stored file is the same all the same.
    let mut plain = site;
    plain.set(Setting::Encryption, "none");
    plain.offer_segment(1);
    assert!(!archive_file(&plain.archive(), &file).unwrap().created);
}

#[test]
fn a_plain_file_is_known_again_when_encryption_is_turned_on() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let site = Site::new();
    let file = site.offer_segment(1);
    assert!(archive_file(&site.archive(), &file).unwrap().created);
    let site = encrypting_to(site, &gpg.public_keys(&["reader"], false));
    assert!(!archive_file(&site.archive(), &file).unwrap().created);
    let second = site.offer_segment(2);
    assert_eq!(archive_file(&site.archive(), &second).unwrap().format.encryption, Encryption::OpenPgp);
}

#[test]
fn of_what_others_encrypted_only_the_keys_tell_whether_it_is_the_same() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "default", "", "never");
    let site = encrypting_to(Site::new(), &gpg.public_keys(&["reader"], false));
    let (file, name) = (site.offer_segment(1), site.name(1));
    archive_file(&site.archive(), &site.offer_segment(2)).unwrap();
    fs::create_dir_all(site.stored(&name).parent().unwrap()).unwrap();
    gpg.encrypt("reader", &file.path, &site.stored(&name));
    let error = archive_file(&site.archive(), &file).unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    assert!(error.hint_text().is_some_and(|hint| hint.contains("archiver.decryption_keys")), "{error:?}");
    let site = reading_with(site, &gpg.secret_keys(&["reader"], ""));
    assert!(!archive_file(&site.archive(), &file).unwrap().created);
    assert!(restored(&site, &name).unwrap() == site.content(&name));
}

#[test]
fn a_segment_that_is_streamed_is_encrypted_too() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "default", "", "never");
    let site = Site::with_segments_of(16 << 20).with(Setting::MemoryLimit, "16MB");
    let site = encrypting_to(site, &gpg.public_keys(&["reader"], false));
    for compression in ["zstd", "none"] {
        let site = reading_with(
            encrypting_to(Site::with_segments_of(16 << 20), &gpg.public_keys(&["reader"], false)),
            &gpg.secret_keys(&["reader"], ""),
        );
        let site = site.with(Setting::MemoryLimit, "16MB").with(Setting::Compression, compression);
        let file = site.offer_segment(1);
        archive_file(&site.archive(), &file).unwrap();
        assert!(restored(&site, &file.name).unwrap() == site.content(&file.name), "{compression}");
        assert!(!archive_file(&site.archive(), &file).unwrap().created);
    }
    drop(site);
}

#[test]
fn each_of_several_recipients_reads_and_old_keys_go_on_reading_after_a_rotation() {
    let (old, new) = (Gpg::new(), Gpg::new());
    old.add_key("old", "future-default", "", "never");
    new.add_key("new", "default", "", "never");
    let keys = |rings: &[(&Gpg, &str)], is_secret: bool| {
        let path = old.home().join(format!("keys-{}-{is_secret}", rings.len()));
        let parts = rings
            .iter()
            .map(|(gpg, who)| if is_secret { gpg.secret_keys(&[who], "") } else { gpg.public_keys(&[who], true) });
        fs::write(&path, parts.flat_map(|part| fs::read(part).unwrap()).collect::<Vec<u8>>()).unwrap();
        path
    };
    let both = [(&old, "old"), (&new, "new")];
    let site = encrypting_to(Site::new(), &keys(&both, false));
    let shared = site.offer_segment(1);
    archive_file(&site.archive(), &shared).unwrap();
    for (gpg, who) in both {
        assert!(decoded(&gpg.decrypt(&site.stored(&shared.name), "")) == site.content(&shared.name), "{who}");
    }
    let site = encrypting_to(site, &old.public_keys(&["old"], true));
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(2)).unwrap();
    // The file is replaced under a running archiver.
    fs::copy(new.public_keys(&["new"], true), site.config().encryption_recipients.unwrap()).unwrap();
    archive_file(&archive, &site.offer_segment(3)).unwrap();
    let site = reading_with(site, &keys(&both, true));
    for number in 1..=3 {
        assert!(restored(&site, &site.name(number)).unwrap() == site.content(&site.name(number)), "{number}");
    }
    let site = reading_with(site, &new.secret_keys(&["new"], ""));
    let error = restored(&site, &site.name(2)).unwrap_err();
    assert_eq!(error.kind(), Kind::Configuration, "{error:?}");
    assert!(error.message().contains("none of them fits the file"), "{error}");
}

#[test]
fn locked_keys_are_unlocked_by_what_the_command_prints() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "default", "open sesame", "never");
    let site = encrypting_to(Site::new(), &gpg.public_keys(&["reader"], false));
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let mut site = reading_with(site, &gpg.secret_keys(&["reader"], "open sesame"));
    for (command, cause) in [
        ("", "they are protected by a passphrase"),
        ("echo wrong", "the passphrase does not fit"),
        ("exit 3", "the command failed: exit code 3"),
        ("true", "the command printed nothing"),
    ] {
        site.set(Setting::DecryptionPassphraseCommand, command);
        let error = restored(&site, &file.name).unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration, "{error:?}");
        assert!(error.message().ends_with(cause), "{error}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("passphrase")), "{error:?}");
    }
    site.set(Setting::DecryptionPassphraseCommand, "echo 'open sesame'");
    assert!(restored(&site, &file.name).unwrap() == site.content(&file.name));
}

#[test]
fn a_modified_file_is_never_restored() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    for compression in ["zstd", "none"] {
        let site =
            encrypting_to(Site::new(), &gpg.public_keys(&["reader"], false)).with(Setting::Compression, compression);
        let site = reading_with(site, &gpg.secret_keys(&["reader"], ""));
        let file = site.offer_segment(1);
        archive_file(&site.archive(), &file).unwrap();
        let whole = fs::read(site.stored(&file.name)).unwrap();
        // No hash to compare with: the encryption alone must tell.
        fs::remove_dir_all(site.storage().join("main/sums")).unwrap();
        let mut site = site;
        site.cluster.hash_key = Some(HashKey::of_secret(&[1; 32]));
        for at in [0, 3, 100, 200, whole.len() / 2, whole.len() - 30, whole.len() - 1] {
            let mut modified = whole.clone();
            modified[at] ^= 1;
            fs::write(site.stored(&file.name), &modified).unwrap();
            assert!(restored(&site, &file.name).is_err(), "{compression}: byte {at} of {}", whole.len());
        }
        for length in [1, 50, whole.len() / 2, whole.len() - 1, whole.len() - 22] {
            fs::write(site.stored(&file.name), &whole[..length]).unwrap();
            assert!(restored(&site, &file.name).is_err(), "{compression}: {length} bytes of {}", whole.len());
        }
        fs::write(site.stored(&file.name), &whole).unwrap();
        assert!(restored(&site, &file.name).unwrap() == site.content(&file.name));
    }
}

#[test]
fn keys_that_cannot_be_used_are_told_by_file_and_setting_and_nothing_is_stored() {
    let gpg = Gpg::new();
    gpg.add_key("good", "future-default", "", "never");
    gpg.add_key("revoked", "future-default", "", "never");
    gpg.revoke("revoked");
    gpg.add_key("signer", "ed25519", "", "never");
    gpg.run(&[
        "--passphrase",
        "",
        "--faked-system-time",
        "20200101T000000",
        "--quick-gen-key",
        "expired",
        "future-default",
        "default",
        "2d",
    ]);
    let file = |name: &str, content: &[u8]| {
        let path = gpg.home().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    for (what, keys, cause) in [
        ("missing", gpg.home().join("nowhere"), "No such file or directory"),
        ("empty", file("empty", b""), "there is no public key in it"),
        ("no keys", file("text", b"not a key at all\n"), ""),
        ("secret", gpg.secret_keys(&["good"], ""), "is a secret one"),
        ("revoked", gpg.public_keys(&["revoked"], true), "is revoked"),
        ("expired", gpg.public_keys(&["expired"], true), "has expired"),
        ("for signing", gpg.public_keys(&["signer"], false), "is not meant for encryption"),
        ("one of two expired", gpg.public_keys(&["good", "expired"], true), "has expired"),
    ] {
        let site = encrypting_to(Site::new(), &keys);
        let offered = site.offer_segment(1);
        let error = archive_file(&site.archive(), &offered).expect_err(what);
        assert_eq!(error.kind(), Kind::Configuration, "{what}: {error:?}");
        assert!(error.message().contains(keys.to_str().unwrap()) && error.message().contains(cause), "{what}: {error}");
        assert!(error.detail_text().is_some_and(|detail| detail.contains("archiver.encryption_recipients")));
        assert!(!error.is_worth_retrying(), "{what}: it is told at once");
        assert!(!site.stored(&offered.name).exists() && site.catalogue().is_empty());
    }
}

#[test]
fn without_the_clusters_secret_nothing_is_encrypted() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let mut site = encrypting_to(Site::new(), &gpg.public_keys(&["reader"], false));
    site.cluster.hash_key = None;
    let made = archiver_core::archive::Archive::new(site.config(), site.cluster, None, site.pulse.clone());
    assert_eq!(made.err().map(|error| error.subject().to_string()).as_deref(), Some("archiver.encryption"));
}
