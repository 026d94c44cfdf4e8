//! Deleting from a bucket: in whatever format a file is stored, more of them than one request takes, and what is refused.

use crate::archiving::site_in;
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::deletion::{Bound, Deletion, Departing, Request};
use archiver_core::error::{Error, Result};
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::set_aside;
use archiver_core::store::{Attributes, Body};
use archiver_core::wal::WalName;
use archiver_tests::fault_proxy::FaultProxy;
use archiver_tests::s3_server::{Bucket, S3Server};
use archiver_tests::{Site, archive_file, wal_name};
use std::collections::BTreeSet;
use std::time::SystemTime;

const WALS: &str = "some/place/main/wals/";

fn request(site: &Site, before: &str) -> Request {
    Request {
        before: Bound::parse(before).unwrap(),
        keeps: Vec::new(),
        system_identifier: Some(site.cluster.system_identifier),
        segment_size: None,
    }
}

/// Deletes, and answers the keys that went and those that did not, with the reason.
fn delete_before(place: &Place, request: &Request) -> (BTreeSet<String>, Vec<(String, Error)>) {
    let (mut gone, mut failed) = (BTreeSet::new(), Vec::new());
    let mut each = |file: &Departing, outcome: &Result<()>| match outcome {
        Ok(()) => drop(gone.insert(file.key.clone())),
        Err(error) => failed.push((file.key.clone(), error.clone())),
    };
    Deletion::plan(place, request).unwrap().carry_out(&Pulse::new(), None, &mut each).unwrap();
    (gone, failed)
}

/// Stores something under each of these names, several at once.
fn put_all(place: &Place, files: &[(WalName, Compression)]) -> BTreeSet<String> {
    let attributes = Attributes { modified: SystemTime::now(), content: None };
    let put = |(name, format): &(WalName, Compression)| {
        let key = place.layout.wal_key(name, *format);
        place.store.put_new(&key, Body::Bytes(b"x"), &attributes).unwrap();
        key
    };
    std::thread::scope(|scope| {
        let parts: Vec<_> = files.chunks(files.len().div_ceil(8).max(1)).collect();
        let running: Vec<_> =
            parts.into_iter().map(|part| scope.spawn(move || part.iter().map(put).collect::<Vec<_>>())).collect();
        running.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

fn keys(bucket: &Bucket) -> BTreeSet<String> {
    bucket.list(WALS).iter().map(|key| key.replacen("some/place/", "", 1)).collect()
}

#[test]
fn more_than_a_thousand_keys_in_every_format_go_and_no_other() {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let (_directory, site) = site_in(&bucket.at(proxy.endpoint()), "");
    archive_file(&site.archive(), &site.offer_segment(0)).unwrap();
    let history = wal_name("00000002.history");
    archive_file(&site.archive(), &site.offer(&history, b"1\t0/45D00028\tno recovery target specified\n")).unwrap();
    let place = site.place();
    let mut files: Vec<(WalName, Compression)> = Vec::new();
    for number in 1..1_200u32 {
        let name = site.name(number);
        files.push((name, Compression::ALL[number as usize % Compression::ALL.len()]));
        if number % 100 == 0 {
            // Barman stores one file in two formats where the setting was changed in between.
            files.push((name, Compression::ALL[(number as usize + 1) % Compression::ALL.len()]));
            files.push((wal_name(&format!("{name}.00000028.backup")), Compression::Gzip));
            files.push((wal_name(&format!("{name}.partial")), Compression::Zstd));
        }
    }
    for timeline_2 in ["00000002000000000000045D", "000000020000000000000460", "000000020000000000000500"] {
        files.push((wal_name(timeline_2), Compression::Lz4));
    }
    files.push((wal_name("000000030000000000000001"), Compression::Zstd));
    let mut all = put_all(&place, &files);
    all.extend([
        place.layout.wal_key(&site.name(0), Compression::Zstd),
        place.layout.wal_key(&history, Compression::Zstd),
    ]);
    assert_eq!(keys(&bucket), all);
    let foreign = format!("{WALS}0000000100000000/000000010000000000000003.zst.tmp");
    assert_eq!(bucket.put(&foreign, b"x", &[]).status, 200);

    // Timeline 2 left 1 in segment 0x45D of 1 MB.
    let request = request(&site, "000000020000000000000480");
    let (mut listed, deletion) = (BTreeSet::new(), Deletion::plan(&place, &request).unwrap());
    deletion.list(&Pulse::new(), &mut |file| assert!(listed.insert(file.key))).unwrap();
    let goes = |key: &&String| {
        let (name, _) = place.layout.wal_name(key).unwrap();
        let segment = |text: &str| wal_name(text).segment().unwrap();
        name.segment().is_some_and(|own| match own.timeline.0 {
            1 => own <= segment("00000001000000000000045D"),
            2 => own < segment("000000020000000000000480"),
            _ => false,
        })
    };
    let expected: BTreeSet<String> = all.iter().filter(goes).cloned().collect();
    assert!(expected.len() > 1_100);
    assert_eq!(listed, expected);
    proxy.forget();
    let (gone, failed) = delete_before(&place, &request);
    assert_eq!((gone, failed.len()), (expected.clone(), 0));
    assert!(proxy.count("DELETE") == 0 && proxy.count("POST") <= 4, "{} requests", proxy.count_all());
    let mut left: BTreeSet<String> = all.difference(&expected).cloned().collect();
    left.insert(foreign.replacen("some/place/", "", 1));
    assert_eq!(keys(&bucket), left);
    proxy.forget();
    // Nothing that is left tells how large it is.
    let known = Request { segment_size: Some(site.cluster.segment_size), ..request };
    assert!(delete_before(&place, &known).0.is_empty());
    assert!(proxy.count_all() < 12, "{} requests where nothing is to be done", proxy.count_all());
}

/// What a store wants to see with a lock: the digest of the body "x".
const DIGEST: (&str, &str) = ("content-md5", "ndTkYSaMgDT1yFZOFVxnpg==");
/// Until a time that no test sees.
const RETENTION: [(&str, &str); 3] =
    [("x-amz-object-lock-mode", "GOVERNANCE"), ("x-amz-object-lock-retain-until-date", "2037-01-01T00:00:00Z"), DIGEST];
const LEGAL_HOLD: [(&str, &str); 2] = [("x-amz-object-lock-legal-hold", "ON"), DIGEST];

#[test]
fn locked_objects_are_told_by_name_and_stay_and_the_others_go() {
    for server in [S3Server::moto(), S3Server::ceph()] {
        let bucket = server.new_locking_bucket();
        // Of objects that have versions this gateway knows no conditions.
        let (_directory, site) = site_in(&bucket, "&create_only=head");
        archive_file(&site.archive(), &site.offer_segment(0)).unwrap();
        let place = site.place();
        let all: Vec<_> = (1..20).map(|number| (site.name(number), Compression::Zstd)).collect();
        let mut keys_there = put_all(&place, &all);
        keys_there.insert(place.layout.wal_key(&site.name(0), Compression::Zstd));
        let mut locked = Vec::new();
        for (number, headers) in [(30, &RETENTION[..]), (31, &LEGAL_HOLD)] {
            let key = place.layout.wal_key(&site.name(number), Compression::Zstd);
            let answer = bucket.put(&format!("some/place/{key}"), b"x", headers);
            assert_eq!(answer.status, 200, "{}", answer.text());
            locked.push(key);
        }
        let (gone, failed) = delete_before(&place, &request(&site, "000000010000000000000040"));
        assert_eq!(gone, keys_there);
        assert_eq!(failed.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>(), locked);
        assert!(failed[0].1.message().contains(&locked[0]), "{failed:?}");
        assert!(failed[0].1.message().contains("it is locked until 2037-01-01T00:00:00"), "{failed:?}");
        assert!(failed[1].1.message().ends_with("it is under a legal hold"), "{failed:?}");
        assert_eq!(keys(&bucket).into_iter().collect::<Vec<_>>(), locked);
        // They are as they were: not hidden behind a mark of deletion.
        assert_eq!(bucket.get(&format!("some/place/{}", locked[0]), &[]).body, b"x");
    }
}

#[test]
fn keys_that_the_store_refuses_to_delete_are_told_by_name_and_stay() {
    let bucket = S3Server::moto().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    for number in 0..3 {
        archive_file(&site.archive(), &site.offer_segment(number)).unwrap();
    }
    let before = keys(&bucket);
    let (_powerless, weaker) = site_in(&bucket.as_user("NO_DELETE"), "");
    let (gone, failed) = delete_before(&weaker.place(), &request(&site, "000000010000000000000002"));
    assert!(gone.is_empty());
    let told: Vec<&String> = failed.iter().map(|(key, _)| key).collect();
    assert_eq!(told, before.iter().take(2).collect::<Vec<_>>());
    for (key, error) in &failed {
        assert!(error.subject().ends_with(key) || error.message().contains("403"), "{error:?}");
    }
    assert_eq!(keys(&bucket), before);
}

#[test]
fn the_size_of_segments_is_read_from_what_is_kept_beside_an_object() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, mut site) = site_in(&bucket, "");
    for (number, compression) in [(3, "zstd"), (17, "gzip"), (18, "none")] {
        site.set(Setting::Compression, compression);
        archive_file(&site.archive(), &site.offer_segment(number)).unwrap();
    }
    let history = wal_name("00000002.history");
    archive_file(&site.archive(), &site.offer(&history, b"1\t0/1100028\tx\n")).unwrap();
    let (gone, _) = delete_before(&site.place(), &request(&site, "000000020000000000000020"));
    // With segments of 16 MB the switch point would lie in segment 1.
    assert_eq!(gone.len(), 2);
    assert_eq!(keys(&bucket).len(), 2);
}

#[test]
fn files_of_any_name_are_set_aside_in_a_bucket_and_found_there() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    let names = ["a b?c&d+e%2F#", "\u{1}\u{1b}[31m<xml>", "é", "plain"];
    for _ in 0..2 {
        for name in names {
            let path = site.path(name);
            std::fs::write(&path, name).unwrap();
            let copied = archive.set_aside(&path, set_aside::Reason::Unknown).unwrap();
            assert!(copied.location.ends_with(".unknown"), "{}", copied.location);
        }
    }
    let place = site.place();
    let files = set_aside::list(&place).unwrap();
    assert_eq!(files.len(), 8);
    let count = |name: &str| files.iter().filter(|file| file.name == name).count();
    assert_eq!(["a b?c&d+e%2F#", "__[31m<xml>", "é", "plain"].map(count), [2; 4]);
    for file in &files {
        set_aside::clear(&place, file.location.rsplit('/').next().unwrap()).unwrap();
    }
    assert!(set_aside::list(&place).unwrap().is_empty());
}

#[test]
fn a_file_set_aside_is_cleared_by_its_exact_key() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let name = "notes.txt.20261121T101752Z.unknown";
    for name in [name, "notes.txt.20261121T101752Z.unknown2"] {
        assert_eq!(bucket.put(&format!("some/place/main/errors/{name}"), b"x", &[]).status, 200);
    }
    let place = site.place();
    assert!(set_aside::clear(&place, "notes.txt").unwrap_err().hint_text().unwrap().contains(name));
    assert!(set_aside::clear(&place, name).unwrap().ends_with(name));
    assert!(set_aside::clear(&place, name).is_err());
    assert_eq!(bucket.list("some/place/main/errors/").len(), 1);
}
