//! What an archive lacks.

use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::{Error, Kind};
use archiver_core::gaps::{self, Findings};
use archiver_core::pulse::Pulse;
use archiver_core::wal::SegmentSize;
use archiver_tests::harm::{findings, remove};
use archiver_tests::{Site, archive_file, compressed, wal_name};
use std::fs;

/// `first..last: segments` for each gap.
fn shown(findings: &Findings) -> Vec<String> {
    findings.gaps.iter().map(|gap| format!("{}..{}: {}", gap.first, gap.last, gap.segments)).collect()
}

fn find(site: &Site, system_identifier: Option<u64>, size: Option<SegmentSize>) -> Result<Findings, Error> {
    gaps::find(&site.place(), system_identifier, size, &Pulse::new())
}

fn archived(site: &Site, numbers: impl IntoIterator<Item = u32>) {
    let archive = site.archive();
    numbers.into_iter().for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
}

#[test]
fn an_archive_without_gaps_has_none() {
    let site = Site::new();
    archived(&site, 4090..4100);
    archive_file(&site.archive(), &site.offer(&wal_name("00000002.history"), b"1\t1/300000\tx\n")).unwrap();
    let found = findings(&site.place());
    assert!(found.is_whole(), "{found:?}");
}

#[test]
fn removed_segments_are_gaps_also_at_both_ends_where_records_name_them() {
    let site = Site::new();
    archived(&site, 4090..4105);
    for number in [4090, 4095, 4096, 4104] {
        remove(&site.place(), &site.name(number));
    }
    let expected = [
        "000000010000000000000FFA..000000010000000000000FFA: 1",
        "000000010000000000000FFF..000000010000000100000000: 2",
        "000000010000000100000008..000000010000000100000008: 1",
    ];
    assert_eq!(shown(&findings(&site.place())), expected);
    // One record is enough.
    fs::remove_dir_all(site.storage().join("main/sums")).unwrap();
    assert_eq!(shown(&findings(&site.place())), expected);
    // What no record names may never have come, or have been deleted.
    fs::remove_file(site.catalogue_path()).unwrap();
    assert_eq!(shown(&findings(&site.place())), expected[1..2]);
}

#[test]
fn other_files_that_records_name_are_missed_one_by_one() {
    let site = Site::new();
    archived(&site, 1..3);
    let archive = site.archive();
    let names = ["000000010000000000000001.00000028.backup", "000000010000000000000003.partial", "00000002.history"];
    for name in names {
        let name = wal_name(name);
        let content = if name.is_wal() { site.content(&name) } else { b"1\t0/300028\tx\n".to_vec() };
        archive_file(&archive, &site.offer(&name, &content)).unwrap();
    }
    assert!(findings(&site.place()).is_whole());
    names.iter().for_each(|name| remove(&site.place(), &wal_name(name)));
    let [label, partial, history] = names.map(|name| format!("{name}..{name}: 0"));
    assert_eq!(shown(&findings(&site.place())), [label, partial, history]);
}

#[test]
fn an_archive_without_records_tells_its_segment_size_by_its_pages() {
    let site = Site::new();
    for number in [4094, 4097] {
        let name = site.name(number);
        site.store_as_barman(&name, &compressed(Compression::Gzip, &site.content(&name)));
    }
    assert_eq!(shown(&findings(&site.place())), ["000000010000000000000FFF..000000010000000100000000: 2"]);
    let site = Site::with_segments_of(16 << 20);
    for number in [254, 257] {
        let name = site.name(number);
        site.store_as_barman(&name, &compressed(Compression::Zstd, &site.content(&name)));
    }
    let expected = ["0000000100000000000000FF..000000010000000100000000: 2"];
    assert_eq!(shown(&findings(&site.place())), expected);
    // The cluster's own word counts, where it is there.
    let small = find(&site, None, SegmentSize::new(1 << 20)).unwrap();
    assert_eq!(shown(&small), ["0000000100000000000000FF..000000010000000100000000: 3842"]);
}

#[test]
fn where_nothing_tells_the_segment_size_that_is_said() {
    let site = Site::new();
    site.store_as_barman(&site.name(1), b"junk");
    site.store_as_barman(&site.name(3), b"junk");
    let error = find(&site, None, None).unwrap_err();
    assert!(error.message().starts_with("could not tell the size of the segments"), "{error}");
    assert_eq!(error.hint_text(), Some("Name the data directory with -D."));
    assert_eq!(find(&site, None, SegmentSize::new(1 << 20)).unwrap().gaps.len(), 1);
    // With histories alone there is nothing to count.
    let site = Site::new();
    site.store_as_barman(&wal_name("00000002.history"), b"1\t0/300028\tx\n");
    assert!(findings(&site.place()).is_whole());
}

#[test]
fn a_promotion_is_followed_by_the_archived_history() {
    let site = Site::new().with(Setting::Compression, "none");
    let archive = site.archive();
    let offer = |name: &str, content: &[u8]| {
        archive_file(&archive, &site.offer(&wal_name(name), content)).unwrap();
    };
    let segment = |name: &str| offer(name, &site.content(&wal_name(name)));
    for name in [
        "000000010000000000000001",
        "000000010000000000000002",
        "000000010000000000000004",
        "000000020000000000000007",
        "000000020000000000000008",
    ] {
        segment(name);
    }
    assert_eq!(shown(&findings(&site.place())), ["000000010000000000000003..000000010000000000000003: 1"]);
    offer("00000002.history", b"1\t0/600028\tno recovery target specified\n");
    let expected = [
        "000000010000000000000003..000000010000000000000003: 1",
        "000000010000000000000005..000000010000000000000005: 1",
        "000000020000000000000006..000000020000000000000006: 1",
    ];
    assert_eq!(shown(&findings(&site.place())), expected);
    segment("000000010000000000000006.partial");
    assert_eq!(shown(&findings(&site.place())), expected);
    for name in ["000000010000000000000003", "000000010000000000000005", "000000020000000000000006"] {
        segment(name);
    }
    assert!(findings(&site.place()).is_whole());
}

#[test]
fn a_broken_history_file_is_told_and_does_not_hide_the_rest() {
    let site = Site::new();
    archived(&site, [1, 3]);
    let broken = wal_name("00000002.history");
    site.store_as_barman(&broken, b"1\tnowhere\tx\n");
    let odd = wal_name("000000010000000000001000");
    site.store_as_barman(&odd, b"x");
    let found = findings(&site.place());
    assert_eq!(shown(&found), ["000000010000000000000002..000000010000000000000002: 1"]);
    let [history, name] = &found.doubts[..] else { panic!("{:?}", found.doubts) };
    assert!(history.message().contains("00000002.history\" is damaged: line 1"), "{history}");
    assert!(name.message().ends_with("000000010000000000001000\" is not called as a segment of 1MB is"), "{name}");
}

#[test]
fn no_archive_is_no_whole_archive() {
    let site = Site::new();
    let error = find(&site, None, None).unwrap_err();
    assert_eq!(error.kind(), Kind::Identity);
    archived(&site, [1]);
    assert!(find(&site, Some(site.cluster.system_identifier), None).unwrap().is_whole());
    assert_eq!(find(&site, Some(42), None).unwrap_err().kind(), Kind::Identity);
    site.unmount();
    assert_eq!(find(&site, None, None).unwrap_err().kind(), Kind::Identity);
}
