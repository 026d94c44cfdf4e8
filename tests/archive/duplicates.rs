//! A file offered again: the same content is success, any other is refused, and nothing is ever overwritten.

use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_tests::{Site, archive_file, compressed, tree, wal_name};
use std::fs::{self, FileTimes, OpenOptions};

#[test]
fn a_file_offered_twice_is_stored_once_and_has_one_line() {
    assert_stored_once(Site::new());
    assert_stored_once(Site::new().with(Setting::Compression, "none"));
}

fn assert_stored_once(site: Site) {
    let file = site.offer_segment(1);
    let archive = site.archive();
    let first = archive_file(&archive, &file).unwrap();
    let again = archive_file(&archive, &file).unwrap();
    let after_restart = archive_file(&site.archive(), &file).unwrap();
    assert!(first.created && !again.created && !after_restart.created);
    assert_eq!((again.stored_size, again.hash, again.modified), (first.stored_size, first.hash, first.modified));
    assert_eq!(site.catalogue(), [file.name.to_string()]);
    let sums = fs::read_to_string(site.storage().join("main/sums/0000000100000000")).unwrap();
    assert_eq!(sums.lines().count(), 1, "{sums}");
}

#[test]
fn every_kind_of_file_may_be_offered_twice() {
    let site = Site::new();
    let partial = wal_name("000000010000000000000003.partial");
    let files = [
        site.offer_segment(3),
        site.offer(&partial, &site.content(&partial)),
        site.offer(&wal_name("000000010000000000000003.00000028.backup"), b"START WAL LOCATION: 0/300028\n"),
        site.offer(&wal_name("00000002.history"), b"1\t0/300000\tno recovery target specified\n"),
    ];
    for archive in [site.archive(), site.archive()] {
        for file in &files {
            archive_file(&archive, file).unwrap();
            assert!(site.stored(&file.name).is_file());
        }
    }
    assert_eq!(site.catalogue(), files.each_ref().map(|file| file.name.to_string()));
}

#[test]
fn other_content_of_the_same_size_and_time_is_refused_with_both_hashes() {
    for compression in ["zstd", "none"] {
        let site = Site::new().with(Setting::Compression, compression);
        let file = site.offer_segment(1);
        let archive = site.archive();
        let stored = archive_file(&archive, &file).unwrap();
        let before = (fs::read(site.stored(&file.name)).unwrap(), tree(&site.storage()), site.catalogue_lines());

        let modified = fs::metadata(&file.path).unwrap().modified().unwrap();
        let mut other = site.content(&file.name);
        other[500_000] ^= 1;
        fs::write(&file.path, &other).unwrap();
        let times = FileTimes::new().set_modified(modified);
        OpenOptions::new().write(true).open(&file.path).unwrap().set_times(times).unwrap();

        for archive in [archive, site.archive()] {
            let refused = archive_file(&archive, &file).unwrap_err();
            assert_eq!(refused.kind(), Kind::Conflict);
            assert!(!refused.is_worth_retrying());
            let detail = refused.detail_text().unwrap();
            assert!(detail.contains(&stored.hash.to_string()), "{detail}");
            assert!(detail.contains(&format!("blake3:{}", blake3::hash(&other).to_hex())), "{detail}");
        }
        let after = (fs::read(site.stored(&file.name)).unwrap(), tree(&site.storage()), site.catalogue_lines());
        assert!(before == after, "nothing was changed");
        assert!(fs::read(&file.path).unwrap() == other, "a refused file stays in pg_wal");
    }
}

#[test]
fn a_longer_and_a_shorter_history_of_the_same_name_are_refused() {
    let site = Site::new();
    let name = wal_name("00000002.history");
    let archive = site.archive();
    archive_file(&archive, &site.offer(&name, b"1\t0/300000\tfirst\n")).unwrap();
    for other in [&b"1\t0/300000\tfirst\nand more\n"[..], b"1\t0/300000\t"] {
        let refused = archive_file(&archive, &site.offer(&name, other)).unwrap_err();
        assert_eq!(refused.kind(), Kind::Conflict, "{refused}");
    }
}

#[test]
fn the_same_content_stored_under_another_setting_is_success() {
    for (earlier, later) in [("none", "zstd"), ("zstd", "none")] {
        let mut site = Site::new().with(Setting::Compression, earlier);
        let file = site.offer_segment(1);
        let stored = archive_file(&site.archive(), &file).unwrap();
        let before = fs::read(site.stored(&file.name)).unwrap();
        site.set(Setting::Compression, later);
        let again = archive_file(&site.archive(), &file).unwrap();
        assert!(!again.created);
        assert_eq!(again.format.compression.name(), earlier, "what is stored, not what is set");
        assert_eq!(again.stored_size, stored.stored_size);
        assert!(fs::read(site.stored(&file.name)).unwrap() == before);
        assert_eq!(site.catalogue().len(), 1);
    }
}

#[test]
fn what_barman_stored_is_found_and_gets_its_line() {
    let site = Site::new();
    let file = site.offer_segment(1);
    site.store_as_barman(&file.name, &compressed(Compression::Zstd, &site.content(&file.name)));
    let stored = archive_file(&site.archive(), &file).unwrap();
    assert!(!stored.created);
    assert_eq!(site.catalogue(), [file.name.to_string()]);
}

#[test]
fn a_compressed_source_equals_its_plain_twin() {
    let site = Site::new();
    let name = site.name(1);
    let content = site.content(&name);
    archive_file(&site.archive(), &site.offer(&name, &content)).unwrap();
    let twin = site.offer(&name, &compressed(Compression::Zstd, &content));
    assert!(!archive_file(&site.archive(), &twin).unwrap().created);
    assert_eq!(site.catalogue().len(), 1);
}

/// Archives a segment, damages the archived copy, and offers the segment again.
fn offered_after_damage(compression: &str, damage: impl FnOnce(&mut Vec<u8>)) {
    let site = Site::new().with(Setting::Compression, compression);
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let mut copy = fs::read(site.stored(&file.name)).unwrap();
    damage(&mut copy);
    fs::write(site.stored(&file.name), &copy).unwrap();
    let error = site.archive().store(&file).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error:?}");
    assert!(!error.is_worth_retrying());
    assert!(fs::read(site.stored(&file.name)).unwrap() == copy, "it is left as it is");
}

#[test]
fn a_flipped_bit_in_a_compressed_copy_is_damage_and_no_conflict() {
    offered_after_damage("zstd", |copy| copy[5_000] ^= 1);
}

#[test]
fn a_cut_compressed_copy_is_damage_and_no_conflict() {
    offered_after_damage("zstd", |copy| copy.truncate(copy.len() / 2));
}

#[test]
fn a_compressed_copy_whose_first_bytes_were_lost_is_damage_and_no_conflict() {
    offered_after_damage("zstd", |copy| copy[..512].fill(0));
}

#[test]
fn a_copy_that_a_crash_left_empty_is_damage_and_no_conflict() {
    offered_after_damage("zstd", Vec::clear);
}

#[test]
fn a_flipped_bit_in_a_plain_copy_is_damage_and_no_conflict() {
    offered_after_damage("none", |copy| copy[500_000] ^= 1);
}

#[test]
fn a_cut_plain_copy_is_damage_and_no_conflict() {
    offered_after_damage("none", |copy| copy.truncate(copy.len() / 2));
}
