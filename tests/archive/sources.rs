//! The file offered: archived only where it is what its name says.

use archiver_core::archive::{WalFile, check_memory};
use archiver_core::codec::{self, Compression};
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_core::identity::Cluster;
use archiver_core::wal::WalName;
use archiver_tests::{Site, archive_file, compressed, tree, wal_like, wal_name};
use std::fs::{self, OpenOptions};
use std::io::Read;

fn plain(stored: &[u8]) -> (Compression, Vec<u8>) {
    let mut decoder = codec::decode(stored, 1 << 30).unwrap();
    let mut plain = Vec::new();
    decoder.plain.read_to_end(&mut plain).unwrap();
    (decoder.compression, plain)
}

#[test]
fn a_file_that_is_not_what_its_name_says_is_refused_and_nothing_stored() {
    assert_unfit_sources_are_refused("zstd");
}

#[test]
fn what_was_copied_of_a_file_that_is_not_what_its_name_says_is_thrown_away() {
    assert_unfit_sources_are_refused("none");
}

fn assert_unfit_sources_are_refused(compression: &str) {
    let site = Site::new().with(Setting::Compression, compression);
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let before = tree(&site.storage());
    let name = site.name(5);
    let good = site.content(&name);
    let with = |at: usize, byte: u8| {
        let mut content = good.clone();
        content[at] = byte;
        content
    };
    let mut other_site = Site::new();
    other_site.cluster = Cluster { system_identifier: 42, ..site.cluster };
    let long = [&good[..], b"x"].concat();
    let label = wal_name("000000010000000000000005.00000028.backup");
    let later = wal_name("000000020000000000000005");
    for (what, name, content) in [
        ("truncated", name, good[..good.len() - 1].to_vec()),
        ("empty", name, Vec::new()),
        ("too long", name, long),
        ("another cluster's", name, other_site.content(&name)),
        ("another segment", name, site.content(&site.name(6))),
        ("another version's", name, with(0, 0x13)),
        ("no WAL", name, wal_like(1 << 20, 1)),
        ("zeros", name, vec![0; 1 << 20]),
        ("of a later timeline", name, site.content(&later)),
        ("a truncated partial", wal_name("000000010000000000000005.partial"), good[..8192].to_vec()),
        ("an empty label", label, Vec::new()),
        ("an empty history", wal_name("00000002.history"), Vec::new()),
        ("a huge label", label, vec![b'x'; (1 << 20) + 1]),
        ("compressed and truncated", name, compressed(Compression::Zstd, &good)[..9000].to_vec()),
        ("compressed and too long", name, compressed(Compression::Zstd, &[good.clone(), good.clone()].concat())),
        ("compressed and too short", name, compressed(Compression::Zstd, &good[..9000])),
        ("a bomb", name, compressed(Compression::Zstd, &vec![0; 64 << 20])),
    ] {
        let refused = archive_file(&site.archive(), &site.offer(&name, &content)).unwrap_err();
        assert_eq!(refused.kind(), Kind::Source, "{what}: {refused}");
        assert!(!refused.is_worth_retrying(), "{what}");
        assert_eq!(tree(&site.storage()), before, "{what}");
    }
    archive_file(&site.archive(), &site.offer(&name, &good)).unwrap();
}

#[test]
fn a_missing_file_and_a_directory_are_refused() {
    let site = Site::new();
    let missing = WalFile { name: site.name(1), path: site.pg_wal().join("missing") };
    let directory = WalFile { name: site.name(1), path: site.pg_wal() };
    for file in [missing, directory] {
        let refused = archive_file(&site.archive(), &file).unwrap_err();
        assert_eq!(refused.kind(), Kind::Source, "{refused}");
        assert!(!site.stored(&file.name).exists());
    }
}

#[test]
fn a_file_far_too_long_is_refused_without_being_read_whole() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &site.offer_segment(2)).unwrap();
    OpenOptions::new().write(true).open(&file.path).unwrap().set_len(1 << 30).unwrap();
    let beats = site.pulse.beats();
    assert_eq!(archive_file(&site.archive(), &file).unwrap_err().kind(), Kind::Source);
    // A beat is a piece of a quarter megabyte: sixteen segments are more than enough to know.
    assert!(site.pulse.beats() - beats < 64, "{} beats", site.pulse.beats() - beats);
}

#[test]
fn the_first_segment_after_a_promotion_carries_the_old_timeline() {
    let site = Site::new();
    let WalName::Segment(old) = site.name(5) else { unreachable!() };
    let content = site.content(&WalName::Segment(old));
    let name = wal_name("000000020000000000000005");
    archive_file(&site.archive(), &site.offer(&name, &content)).unwrap();
    assert!(site.stored(&name).is_file());
}

#[test]
fn a_source_that_is_compressed_already_is_stored_as_it_is() {
    for (setting, memory_limit, segment_bytes) in [("zstd", "256MB", 1 << 20), ("none", "16MB", 16 << 20)] {
        let site = Site::with_segments_of(segment_bytes)
            .with(Setting::Compression, setting)
            .with(Setting::MemoryLimit, memory_limit);
        let name = site.name(1);
        let content = site.content(&name);
        let source = compressed(Compression::Zstd, &content);
        let stored = archive_file(&site.archive(), &site.offer(&name, &source)).unwrap();
        assert!(fs::read(site.stored(&name)).unwrap() == source);
        assert_eq!((stored.plain_size, stored.stored_size), (segment_bytes, source.len() as u64));
        assert_eq!(stored.hash.0, blake3::hash(&content));
        assert!(site.catalogue_lines()[0].ends_with("\tzstd\tNone"), "{:?}", site.catalogue_lines());
    }
}

#[test]
fn a_segment_beyond_a_quarter_of_the_memory_limit_is_streamed_and_identical() {
    for compression in ["none", "zstd"] {
        let site =
            Site::with_segments_of(16 << 20).with(Setting::MemoryLimit, "16MB").with(Setting::Compression, compression);
        let file = site.offer_segment(1);
        let content = site.content(&file.name);
        let archive = site.archive();
        let stored = archive.store(&file).unwrap();
        archive.record(std::slice::from_ref(&stored)).unwrap();
        let (format, read) = plain(&fs::read(site.stored(&file.name)).unwrap());
        assert_eq!(format.name(), compression);
        assert!(read == content);
        assert_eq!(stored.hash.0, blake3::hash(&content));
        // And a small file after it, with the same encoder; and the big one once more.
        let label = site.offer(&wal_name("000000010000000000000001.00000028.backup"), b"START WAL LOCATION\n");
        archive.store(&label).unwrap();
        assert_eq!(plain(&fs::read(site.stored(&label.name)).unwrap()).1, b"START WAL LOCATION\n");
        assert!(!archive.store(&file).unwrap().created);
    }
}

#[test]
fn a_source_cut_short_while_it_is_streamed_is_the_sources_fault_and_leaves_nothing() {
    let site = Site::with_segments_of(64 << 20).with(Setting::MemoryLimit, "16MB");
    let archive = site.archive();
    archive_file(&archive, &site.offer(&wal_name("00000002.history"), b"1\t0/1\tx\n")).unwrap();
    let staging = site.storage().join("main/.staging");
    for attempt in 0..20 {
        let file = site.offer_segment(attempt);
        let outcome = std::thread::scope(|scope| {
            let storing = scope.spawn(|| archive.store(&file));
            // The second pass has begun when something is staged.
            while !storing.is_finished() && fs::read_dir(&staging).unwrap().count() == 0 {}
            OpenOptions::new().write(true).open(&file.path).unwrap().set_len(1 << 20).unwrap();
            storing.join().unwrap()
        });
        let Err(error) = outcome else { continue };
        assert_eq!(error.kind(), Kind::Source, "{error:?}");
        assert!(error.is_worth_retrying());
        assert!(!site.stored(&file.name).exists());
        assert_eq!(fs::read_dir(&staging).unwrap().count(), 0);
        return;
    }
    println!("skipped: no attempt was fast enough to cut the file in time");
}

#[test]
fn memory_stays_within_the_limit_however_many_workers_are_wanted() {
    let site = Site::with_segments_of(16 << 20).with(Setting::Workers, "64").with(Setting::MemoryLimit, "256MB");
    let desks = site.archive().desks();
    assert!((1..=7).contains(&desks), "{desks}: each takes a segment and what it is encoded to");
    let site = Site::with_segments_of(1 << 30).with(Setting::Workers, "64").with(Setting::MemoryLimit, "64MB");
    assert!((1..=16).contains(&site.archive().desks()));
}

#[test]
fn a_level_that_does_not_fit_the_memory_limit_is_refused_by_name() {
    let site =
        Site::with_segments_of(16 << 20).with(Setting::MemoryLimit, "16MB").with(Setting::CompressionLevel, "19");
    let error = check_memory(&site.config(), &site.cluster).unwrap_err();
    assert_eq!(error.subject(), "archiver.memory_limit");
    assert!(error.detail_text().is_some_and(|detail| detail.contains("compression_level at 19")), "{error:?}");
    let site = site.with(Setting::CompressionLevel, "low");
    assert!(check_memory(&site.config(), &site.cluster).is_ok());
}
