//! Compression by programs of the user's: what goes through them comes back, and what they do wrong stores nothing.

use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_core::listing::{Range, list_page};
use archiver_core::restore::{Request, restore};
use archiver_core::wal::WalName;
use archiver_tests::{Site, archive_file, compressed, tree, wal_name};
use std::fs;
use std::time::{Duration, Instant};

/// Compresses, and hides that from whoever looks for a known format.
const FILTER: &str = "gzip -c1 | tr '\\000-\\377' '\\200-\\377\\000-\\177'";
const BACK: &str = "tr '\\200-\\377\\000-\\177' '\\000-\\377' | gzip -dc";
const MAGIC: &str = "0x9f0b88";

fn custom(site: Site, magic: &str) -> Site {
    site.with(Setting::Compression, "custom")
        .with(Setting::CustomCompressionFilter, FILTER)
        .with(Setting::CustomDecompressionFilter, BACK)
        .with(Setting::CustomCompressionMagic, magic)
}

fn restored(site: &Site, name: &WalName) -> archiver_core::Result<Vec<u8>> {
    let destination = site.path("restored");
    let request = Request {
        name: *name,
        destination: &destination,
        or_partial: false,
        streaming_directory: None,
        system_identifier: Some(site.cluster.system_identifier),
        retry_timeout: Duration::from_secs(2),
    };
    restore(|| Ok(site.place()), &request).map(|_| fs::read(&destination).unwrap())
}

#[test]
fn what_a_filter_made_comes_back_and_is_recognised_as_the_same() {
    for magic in ["", MAGIC] {
        let site = custom(Site::new(), magic);
        let file = site.offer_segment(1);
        let label = site.offer(&wal_name("000000010000000000000001.00000028.backup"), b"START WAL LOCATION: 0/28\n");
        for file in [&file, &label] {
            let stored = archive_file(&site.archive(), file).unwrap();
            assert_eq!((stored.format.compression, stored.created), (Compression::Custom, true));
            assert!(fs::read(site.stored(&file.name)).unwrap().starts_with(&[0x9f, 0x0b, 0x88]));
            assert!(restored(&site, &file.name).unwrap() == fs::read(&file.path).unwrap());
            let again = archive_file(&site.archive(), file).unwrap();
            assert_eq!((again.format.compression, again.created), (Compression::Custom, false));
        }
        assert!(site.catalogue_lines().iter().all(|line| line.ends_with("\tcustom\tNone")));
        let (listed, _) = list_page(&site.place(), None, &Range::default(), 10).unwrap();
        assert!(listed.iter().all(|file| file.format.compression == Compression::Custom), "{listed:?}");
        let mut other = site.content(&file.name);
        other[9000] ^= 1;
        let error = archive_file(&site.archive(), &site.offer(&file.name, &other)).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error}");
        assert!(tree(&site.storage().join("main/.staging")).is_empty(), "no plain file lies about");
    }
}

#[test]
fn a_segment_too_large_for_memory_goes_through_a_filter_in_pieces() {
    let large = Site::with_segments_of(8 << 20).with(Setting::MemoryLimit, "24MB");
    let site = custom(large, "");
    let file = site.offer_segment(3);
    archive_file(&site.archive(), &file).unwrap();
    assert!(restored(&site, &file.name).unwrap() == site.content(&file.name));
    let site = site.with(Setting::CustomCompressionFilter, "gzip -c; exit 3");
    let second = site.offer_segment(4);
    let error = archive_file(&site.archive(), &second).unwrap_err();
    assert_eq!(error.subject(), "archiver.custom_compression_filter");
    assert!(!site.stored(&second.name).exists() && tree(&site.storage().join("main/.staging")).is_empty());
}

#[test]
fn beside_a_filter_without_a_magic_every_other_format_is_read_as_before() {
    let site = custom(Site::new(), "");
    for (number, format) in (1..).zip(Compression::ALL) {
        let name = site.name(number);
        site.store_as_barman(&name, &compressed(format, &site.content(&name)));
        assert!(restored(&site, &name).unwrap() == site.content(&name), "{}", format.name());
    }
}

#[test]
fn with_a_magic_what_a_filter_made_is_read_after_another_format_was_set() {
    let mut site = custom(Site::new(), MAGIC);
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    site.set(Setting::Compression, "zstd");
    assert!(restored(&site, &file.name).unwrap() == site.content(&file.name));
    assert!(!archive_file(&site.archive(), &file).unwrap().created);
    site.set(Setting::CustomDecompressionFilter, "");
    assert_eq!(restored(&site, &file.name).unwrap_err().kind(), Kind::Damaged, "nothing tells how to read it");
}

#[test]
fn a_filter_that_fails_hangs_or_writes_nothing_stores_nothing_and_is_named() {
    for (filter, cause) in [
        ("cat >/dev/null; exit 3", "ended with exit code 3"),
        ("cat >/dev/null", "wrote nothing"),
        ("head -c 1000", "ended before it had read all of its input"),
        ("exec sleep 60", "did nothing for 1 s and was killed"),
        ("kill -9 $$", "ended with signal SIGKILL"),
        ("cat; cat /dev/zero", "wrote more than"),
    ] {
        let site = custom(Site::new(), "").with(Setting::AttemptTimeout, "1s");
        let site = site.with(Setting::CustomCompressionFilter, filter);
        let file = site.offer_segment(1);
        let began = Instant::now();
        let error = archive_file(&site.archive(), &file).expect_err(filter);
        assert_eq!(error.subject(), "archiver.custom_compression_filter");
        assert!(error.to_string().contains(cause), "{filter}: {error}");
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(!site.stored(&file.name).exists() && site.catalogue().is_empty());
    }
}

#[test]
fn a_filter_that_does_not_unpack_never_puts_a_file_in_place() {
    let mut site = custom(Site::new(), MAGIC);
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    for (filter, kind) in [("exit 1", Kind::Storage), ("head -c 5000", Kind::Damaged), ("cat", Kind::Damaged)] {
        site.set(Setting::CustomDecompressionFilter, filter);
        let error = restored(&site, &file.name).expect_err(filter);
        assert_eq!(error.kind(), kind, "{filter}: {error}");
        assert!(!site.path("restored").exists());
    }
}

#[test]
fn pigz_stores_gzip_and_the_same_bytes_for_the_same_content() {
    let site = Site::new().with(Setting::Compression, "pigz").with(Setting::CompressionLevel, "9");
    let file = site.offer_segment(1);
    let stored = archive_file(&site.archive(), &file).unwrap();
    assert_eq!(stored.format.compression, Compression::Gzip);
    let bytes = fs::read(site.stored(&file.name)).unwrap();
    assert_eq!(bytes[3..8], [0; 5], "neither name nor time");
    assert!(restored(&site, &file.name).unwrap() == site.content(&file.name));
    assert!(site.catalogue_lines()[0].ends_with("\tgzip\tNone"));
    fs::remove_file(site.stored(&file.name)).unwrap();
    archive_file(&site.archive(), &file).unwrap();
    assert_eq!(fs::read(site.stored(&file.name)).unwrap(), bytes);
}
