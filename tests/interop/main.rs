//! The real Barman on one side, the real paths of files through archiver on the other: each reads what the other wrote.
//! Run by `make test-interop`.

mod barman;
mod cloud;
mod programs;

use archiver_core::archive::{StoredFile, WalFile};
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::crypt::Encryption;
use archiver_core::deletion::{self, Bound, Deletion, Keep};
use archiver_core::pulse::Pulse;
use archiver_core::rebuild::rebuild;
use archiver_core::restore::{Request, restore};
use archiver_core::wal::{Kind, WalName};
use archiver_tests::gpg::Gpg;
use archiver_tests::{Site, archive_file, eventually, wal_name};
use barman::Barman;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

const LABEL: &[u8] = b"START WAL LOCATION: 0/500028 (file 000000010000000000000005)\n";
const HISTORY: &[u8] = b"1\t0/6000000\tno recovery target specified\n";

/// One file of each kind, with its content.
fn one_of_each_kind(site: &Site) -> Vec<(WalName, Vec<u8>)> {
    let (segment, partial) = (site.name(5), site.name(6));
    vec![
        (segment, site.content(&segment)),
        (wal_name(&format!("{partial}.partial")), site.content(&partial)),
        (wal_name(&format!("{segment}.00000028.backup")), LABEL.to_vec()),
        (wal_name("00000002.history"), HISTORY.to_vec()),
    ]
}

fn archive_all(site: &Site) -> Vec<StoredFile> {
    let archive = site.archive();
    let offered = one_of_each_kind(site);
    let files: Vec<WalFile> = offered.iter().map(|(name, content)| site.offer(name, content)).collect();
    files.iter().map(|file| archive_file(&archive, file).unwrap()).collect()
}

/// What our restore makes of that file.
fn restored(site: &Site, name: &WalName) -> Vec<u8> {
    restored_as(site, name, false)
}

/// The same where the partial of a segment would do.
fn restored_or_partial(site: &Site, name: &WalName) -> Vec<u8> {
    restored_as(site, name, true)
}

fn restored_as(site: &Site, name: &WalName, or_partial: bool) -> Vec<u8> {
    let destination = site.path("restored");
    let request = Request {
        name: *name,
        destination: &destination,
        or_partial,
        streaming_directory: None,
        system_identifier: Some(site.cluster.system_identifier),
        retry_timeout: Duration::from_secs(2),
    };
    restore(|| Ok(site.place()), &request).unwrap_or_else(|error| panic!("{name}: {error}"));
    fs::read(&destination).unwrap()
}

#[test]
fn barman_reads_what_we_store_in_every_format() {
    for compression in Compression::ALL {
        let site = Site::new().with(Setting::Compression, compression.name());
        let stored = archive_all(&site);
        let barman = Barman::of(&site);
        for ((name, content), file) in one_of_each_kind(&site).iter().zip(&stored) {
            assert_eq!(file.format.compression, compression);
            // Barman hands out a stored partial as it is.
            let expected =
                if name.kind() == Kind::Partial { fs::read(&file.location).unwrap() } else { content.clone() };
            assert!(barman.get_wal(name) == expected, "{name} in {}", compression.name());
            assert!(restored(&site, name) == *content, "{name} in {}", compression.name());
        }
    }
}

#[test]
fn barman_reads_a_segment_that_was_streamed_in_every_format() {
    for compression in Compression::ALL {
        let site = Site::with_segments_of(8 << 20)
            .with(Setting::Compression, compression.name())
            .with(Setting::MemoryLimit, "24MB");
        let file = site.offer_segment(3);
        archive_file(&site.archive(), &file).unwrap();
        let content = site.content(&file.name);
        assert!(Barman::of(&site).get_wal(&file.name) == content, "{}", compression.name());
        assert!(restored(&site, &file.name) == content, "{}", compression.name());
    }
}

#[test]
fn we_read_what_barman_stores_in_every_format() {
    for compression in Compression::ALL {
        let site = Site::new();
        let barman = Barman::of(&site).with_compression(compression);
        let offered = one_of_each_kind(&site);
        barman.archive(&offered);
        for (name, content) in &offered {
            let in_archive = fs::read(site.stored(name)).unwrap();
            let found = Compression::detect(&in_archive).unwrap_or(Compression::None);
            assert_eq!(found, compression, "{name}");
            assert!(restored(&site, name) == *content, "{name} in {}", compression.name());
        }
    }
}

#[test]
fn barman_reads_our_catalogue_as_it_reads_its_own() {
    for compression in Compression::ALL {
        let site = Site::new().with(Setting::Compression, compression.name());
        let stored = archive_all(&site);
        let barman = Barman::of(&site);
        let found = barman.read_catalogue();
        assert_eq!(found.len(), stored.len());
        for (line, file) in found.iter().zip(&stored) {
            let name = if compression == Compression::None { "None" } else { compression.name() };
            let meta = fs::metadata(&file.location).unwrap();
            let modified = meta.mtime() as f64 + 1e-9 * meta.mtime_nsec() as f64;
            let expected = format!("{} {} {modified:?} {name} None", file.name, meta.len());
            assert_eq!(*line, expected);
        }
        // Made anew by Barman, it says the same; partials it leaves out.
        let sorted = |barman: &Barman| {
            let mut lines = barman.read_catalogue();
            lines.retain(|line| !line.contains(".partial"));
            lines.sort();
            lines
        };
        let ours = sorted(&barman);
        barman.run(&["rebuild-xlogdb", "main"]);
        assert_eq!(sorted(&barman), ours, "{}", compression.name());
    }
}

#[test]
fn barman_reads_what_we_encrypt_to_an_rsa_key_and_we_what_barman_encrypts() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "default", "sesame", "never");
    let [public, secret] = [gpg.public_keys(&["reader"], true), gpg.secret_keys(&["reader"], "sesame")];
    let path = |path: &Path| path.to_str().expect("UTF-8").to_string();
    for compression in Compression::ALL {
        let site = Site::new()
            .with(Setting::Compression, compression.name())
            .with(Setting::Encryption, "gpg")
            .with(Setting::EncryptionRecipients, &path(&public))
            .with(Setting::DecryptionKeys, &path(&secret))
            .with(Setting::DecryptionPassphraseCommand, "echo sesame");
        let stored = archive_all(&site);
        let barman = Barman::of(&site).with_encryption(&gpg, "reader", "sesame");
        for ((name, content), file) in one_of_each_kind(&site).iter().zip(&stored) {
            // Barman hands out a stored partial as it is.
            let expected =
                if name.kind() == Kind::Partial { fs::read(&file.location).unwrap() } else { content.clone() };
            assert!(barman.get_wal(name) == expected, "{name} in {}", compression.name());
        }
        let in_catalogue = |line: &String| line.ends_with(" gpg");
        assert!(barman.read_catalogue().iter().all(in_catalogue), "{:?}", barman.read_catalogue());
        let name = site.name(9);
        barman.archive(&[(name, site.content(&name))]);
        assert_eq!(Encryption::detect(&fs::read(site.stored(&name)).unwrap()), Encryption::OpenPgp);
        assert!(restored(&site, &name) == site.content(&name), "what Barman encrypted");
    }
}

#[test]
fn barman_reads_on_and_writes_on_after_a_deletion() {
    let site = Site::new();
    let barman = Barman::of(&site).with_compression(Compression::Gzip);
    let theirs: Vec<_> = [1, 2].map(|number| (site.name(number), site.content(&site.name(number)))).to_vec();
    barman.archive(&theirs);
    let archive = site.archive();
    for number in 3..9 {
        archive_file(&archive, &site.offer_segment(number)).unwrap();
    }
    let before = barman.read_catalogue();
    let place = site.place();
    let request = deletion::Request {
        before: Bound::parse(&site.name(5).to_string()).unwrap(),
        keeps: vec![Keep::parse(&format!("{0}..{0}", site.name(2))).unwrap()],
        system_identifier: Some(site.cluster.system_identifier),
        segment_size: None,
    };
    let mut gone = Vec::new();
    let deletion = Deletion::plan(&place, &request).unwrap();
    deletion
        .carry_out(&Pulse::new(), None, &mut |file, outcome| gone.push((file.item.to_string(), outcome.is_ok())))
        .unwrap();
    assert_eq!(gone, [1, 3, 4].map(|number| (site.name(number).to_string(), true)));

    let kept = |line: &&String| !gone.iter().any(|(name, _)| line.starts_with(&name.to_string()));
    assert_eq!(barman.read_catalogue(), before.iter().filter(kept).cloned().collect::<Vec<_>>());
    for number in [2, 5, 6, 7, 8] {
        assert!(barman.get_wal(&site.name(number)) == site.content(&site.name(number)));
    }
    barman.archive(&[(site.name(9), site.content(&site.name(9)))]);
    archive_file(&archive, &site.offer_segment(10)).unwrap();
    let ours = barman.read_catalogue();
    assert_eq!(ours.len(), 7);
    barman.run(&["rebuild-xlogdb", "main"]);
    assert_eq!(barman.read_catalogue(), ours, "made anew by Barman, it says the same");
}

#[test]
fn both_write_into_one_archive_under_one_lock() {
    let site = Site::new();
    let barman = Barman::of(&site).with_compression(Compression::Gzip);
    let (first, second, third) = (site.name(1), site.name(2), site.name(3));
    // Barman began it: its segment tells whose it is.
    barman.archive(&[(first, site.content(&first))]);
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(2)).unwrap();

    let lock_path = site.storage().join(".main-xlogdb.lock");
    let lock = File::open(&lock_path).unwrap();
    lock.lock().unwrap();
    let mut waiting = barman.begin_to_archive(&[(third, site.content(&third))]);
    let inode = format!(":{} ", lock.metadata().unwrap().ino());
    let waits = |line: &str| line.contains("-> FLOCK") && line.contains(&inode);
    eventually("Barman waits for the lock", || fs::read_to_string("/proc/locks").unwrap().lines().any(waits));
    assert_eq!(site.catalogue(), [first, second].map(|name| name.to_string()));
    lock.unlock().unwrap();
    assert!(waiting.wait().unwrap().success());

    // The same file from both sides is stored once and has one line.
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    barman.archive(&[(second, site.content(&second))]);
    assert_eq!(site.catalogue(), [first, second, third].map(|name| name.to_string()));
    for name in [first, second, third] {
        assert!(barman.get_wal(&name) == site.content(&name));
        assert!(restored(&site, &name) == site.content(&name));
    }
}

#[test]
fn we_make_the_catalogue_anew_as_barman_does() {
    for compression in Compression::ALL {
        let site = Site::new().with(Setting::Compression, compression.name());
        archive_all(&site);
        let barman = Barman::of(&site);
        // Neither knows these.
        let wals = site.storage().join("main/wals");
        fs::write(wals.join("0000000100000000/000000010000000000000005.tmp"), "x").unwrap();
        fs::write(wals.join("00000009.tmp"), "x").unwrap();
        fs::remove_file(site.catalogue_path()).unwrap();
        barman.run(&["rebuild-xlogdb", "main"]);
        let theirs = site.catalogue_lines();
        assert_eq!(theirs.len(), 3, "{theirs:?}");
        fs::remove_file(site.catalogue_path()).unwrap();
        rebuild(&site.place(), None, &Pulse::new()).unwrap();
        let mut ours = site.catalogue_lines();
        // Partials, which it archives like the rest, it leaves out when it makes its catalogue anew.
        ours.retain(|line| !line.contains(".partial\t"));
        assert_eq!(ours, theirs, "{}", compression.name());
        let read = barman.read_catalogue();
        assert_eq!(read.len(), 4, "{read:?}");
    }
}
