//! Parts of a segment that is being received: put beside the archived files, once each, and restored where nothing better is.

use archiver_core::archive::{Archive, WalFile};
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::deletion::{self, Attendant, Bound, Deletion, Facts, Keep};
use archiver_core::error::{Error, Kind};
use archiver_core::part::Part;
use archiver_core::pulse::Pulse;
use archiver_core::restore::{Request, Restored, restore};
use archiver_core::store::{Attributes, Body, Listed, Meta, Object, Put, Store};
use archiver_core::wal::WalName;
use archiver_tests::gpg::Gpg;
use archiver_tests::{Site, archive_file, wal_name};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const PARTIAL: &str = "000000010000000000000003.partial";

/// A streaming directory in which so much of segment 3 was received.
fn receive(site: &Site, bytes: u64) -> PathBuf {
    let name = wal_name(PARTIAL);
    let mut content = site.content(&name);
    content[usize::try_from(bytes).unwrap()..].fill(0);
    // The last byte that was received is none of the zeros.
    content[usize::try_from(bytes).unwrap() - 1] = 7;
    let directory = site.path("streaming");
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join(PARTIAL);
    fs::write(&path, &content).unwrap();
    path
}

fn part(bytes: u64) -> Part {
    Part { segment: wal_name(PARTIAL).segment().unwrap(), bytes }
}

fn put(site: &Site, archive: &Archive, bytes: u64) -> Vec<u8> {
    let file = receive(site, bytes);
    archive.put_part(&part(bytes), &file).unwrap();
    fs::read(file).unwrap()
}

fn ask(site: &Site, or_partial: bool, streaming_directory: Option<&Path>) -> Result<(Restored, Vec<u8>), Error> {
    let destination = site.path("restored");
    let request = Request {
        name: WalName::Segment(part(0).segment),
        destination: &destination,
        or_partial,
        streaming_directory: streaming_directory.map(|path| (path, true)),
        system_identifier: Some(site.cluster.system_identifier),
        retry_timeout: Duration::from_millis(100),
    };
    restore(|| Ok(site.place()), &request).map(|restored| (restored, fs::read(&destination).unwrap()))
}

#[test]
fn the_longest_part_is_restored_and_the_rest_of_the_segment_is_zeros() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    // Segments of 16 MB do not fit into that memory: those are read twice.
    for (compression, segment_mb, is_encrypted) in [
        ("none", 1, false),
        ("zstd", 1, false),
        ("none", 16, false),
        ("gzip", 16, false),
        ("zstd", 1, true),
        ("none", 16, true),
    ] {
        let site = Site::with_segments_of(segment_mb << 20);
        let site = site.with(Setting::Compression, compression).with(Setting::MemoryLimit, "32MB");
        let site = if is_encrypted { site.encrypting(&gpg, "reader") } else { site };
        let archive = site.archive();
        put(&site, &archive, 5_000);
        let longest = put(&site, &archive, 700_001);
        put(&site, &archive, 100_000);
        assert_eq!(archive.parts(None).unwrap(), [part(5_000), part(100_000), part(700_001)]);
        assert_eq!(ask(&site, false, None).unwrap_err().kind(), Kind::NotFound);
        let (restored, content) = ask(&site, true, None).unwrap();
        assert!(content == longest, "{compression}");
        assert_eq!((restored.name.to_string(), restored.size), (PARTIAL.to_string(), content.len() as u64));
        assert!(restored.location.ends_with("main/partial/000000010000000000000003.700001"), "{}", restored.location);
        // Once, and never over anything.
        archive.put_part(&part(700_001), &receive(&site, 700_001)).unwrap();
        archive.remove_part(&part(5_000)).unwrap();
        archive.remove_part(&part(5_000)).unwrap();
        assert_eq!(archive.parts(None).unwrap(), [part(100_000), part(700_001)]);
        // The catalogue and the sums are of whole files.
        assert!(site.catalogue().is_empty());
        assert!(!site.storage().join("main/sums").exists());
    }
}

#[test]
fn what_is_better_than_a_part_comes_before_it() {
    let site = Site::new();
    let archive = site.archive();
    let kept = put(&site, &archive, 300_000);
    // What lies in the streaming directory counts where more of it was received.
    let received = fs::read(receive(&site, 400_000)).unwrap();
    let streaming = site.path("streaming");
    assert!(ask(&site, true, Some(&streaming)).unwrap().1 == received);
    receive(&site, 200_000);
    assert!(ask(&site, true, Some(&streaming)).unwrap().1 == kept);
    // One that a crash has cut short was received again from its beginning.
    fs::write(streaming.join(PARTIAL), b"").unwrap();
    assert!(ask(&site, true, Some(&streaming)).unwrap().1 == kept);
    // A whole one comes before all.
    let whole = site.offer_segment(3);
    archive_file(&archive, &whole).unwrap();
    let (restored, content) = ask(&site, true, Some(&streaming)).unwrap();
    assert!(content == fs::read(&whole.path).unwrap());
    assert_eq!(restored.name, whole.name);
}

#[test]
fn of_a_part_and_what_a_timeline_ended_with_the_longer_is_restored() {
    let site = Site::new();
    let archive = site.archive();
    let name = wal_name(PARTIAL);
    let mut content = fs::read(receive(&site, 200_000)).unwrap();
    // As PostgreSQL leaves it where the segment's file was another one's before: that one's pages behind the end.
    let (end, older) = (200_000_usize.next_multiple_of(8192), site.content(&site.name(1)));
    content[end..].copy_from_slice(&older[end..]);
    let ended = site.offer(&name, &content);
    archive_file(&archive, &ended).unwrap();
    assert!(ask(&site, true, None).unwrap().1 == content);
    assert_eq!([200_000, 200_001].map(|bytes| archive.covers(&part(bytes)).unwrap()), [Some(true), Some(false)]);
    put(&site, &archive, 100_000);
    assert!(ask(&site, true, None).unwrap().1 == content);
    let longer = put(&site, &archive, 300_000);
    assert!(ask(&site, true, None).unwrap().1 == longer);
    let streaming = site.path("streaming");
    receive(&site, 150_000);
    archive.remove_part(&part(300_000)).unwrap();
    assert!(ask(&site, true, Some(&streaming)).unwrap().1 == content);
}

/// A part of these contents, in the streaming directory and put.
fn put_first(site: &Site, archive: &Archive, content: &[u8], bytes: u64) -> Vec<u8> {
    let file = receive(site, bytes);
    let mut first = content.to_vec();
    first[usize::try_from(bytes).unwrap()..].fill(0);
    fs::write(&file, &first).unwrap();
    archive.put_part(&part(bytes), &file).unwrap();
    first
}

#[test]
fn what_a_server_left_on_the_last_page_of_a_timeline_is_not_taken_for_wal() {
    let site = Site::new();
    let archive = site.archive();
    let name = wal_name(PARTIAL);
    let (mut written, older) = (site.content(&name), site.content(&site.name(1)));
    for last in [198_999, 202_999] {
        written[last] = 7;
    }
    // It ended at 200,000, on a page that ends at 204,800.
    let mut ended = written.clone();
    ended[200_000..204_800].copy_from_slice(&older[200_000..204_800]);
    ended[204_800..].fill(0);
    ended[204_799] = 7;
    archive_file(&archive, &site.offer(&name, &ended)).unwrap();
    // Nothing else was put, so that the archive alone answers.
    assert_eq!(archive.covers(&part(150_000)).unwrap(), Some(true));
    assert_eq!(archive.covers(&part(204_801)).unwrap(), Some(false));
    for (bytes, is_covered) in [(199_000, true), (203_000, false)] {
        let first = put_first(&site, &archive, &written, bytes);
        assert_eq!(archive.covers(&part(bytes)).unwrap(), Some(is_covered), "{bytes}");
        let expected = if is_covered { &ended } else { &first };
        for streaming in [None, Some(site.path("streaming"))] {
            assert!(&ask(&site, true, streaming.as_deref()).unwrap().1 == expected, "{bytes}, {streaming:?}");
        }
    }
}

#[test]
fn another_part_of_the_same_name_is_refused_and_a_damaged_one_is_not_restored() {
    for compression in ["none", "zstd"] {
        let site = Site::new().with(Setting::Compression, compression);
        let archive = site.archive();
        put(&site, &archive, 300_000);
        let file = receive(&site, 300_000);
        let mut content = fs::read(&file).unwrap();
        content[200_000] ^= 1;
        fs::write(&file, content).unwrap();
        let error = archive.put_part(&part(300_000), &file).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error}");

        let path = site.storage().join("main/partial").join(part(300_000).to_string());
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let error = ask(&site, true, None).unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{compression}: {error}");
    }
}

#[test]
fn a_part_of_another_cluster_or_of_less_than_it_says_is_refused() {
    let site = Site::new();
    let archive = site.archive();
    let file = receive(&site, 300_000);
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(200_000).unwrap();
    let error = archive.put_part(&part(300_000), &file).unwrap_err();
    assert!(error.message().contains("it is 200000 bytes long, not 300000"), "{error}");
    let file = receive(&site, 300_000);
    let mut content = fs::read(&file).unwrap();
    content[24] ^= 1;
    fs::write(&file, content).unwrap();
    let error = archive.put_part(&part(300_000), &file).unwrap_err();
    assert!(error.message().contains("was written by the cluster with system identifier"), "{error}");
    assert!(archive.parts(None).unwrap().is_empty());
}

#[test]
fn parts_are_no_wal_to_whoever_looks_through_the_archive() {
    let site = Site::new().with(Setting::Compression, Compression::Zstd.name());
    let archive = site.archive();
    put(&site, &archive, 300_000);
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    archive_file(&archive, &site.offer_segment(2)).unwrap();
    assert_eq!(site.assert_agreement().len(), 2);
    let listed = site.place().list_wal(None, 10).unwrap();
    assert_eq!(listed.len(), 2);
    assert_eq!(site.place().list_wal(None, 1).unwrap().len(), 1);
}

/// Lets something happen when parts are looked for.
struct Meanwhile {
    inner: Box<dyn Store>,
    happens: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Store for Meanwhile {
    fn put_new(&self, key: &str, body: Body<'_>, attributes: &Attributes) -> Result<Put, Error> {
        self.inner.put_new(key, body, attributes)
    }

    fn get(&self, key: &str) -> Result<Option<Object>, Error> {
        self.inner.get(key)
    }

    fn head(&self, key: &str) -> Result<Option<Meta>, Error> {
        self.inner.head(key)
    }

    fn list(&self, folder: &str, after: Option<&str>, most: usize) -> Result<Vec<Listed>, Error> {
        if let Some(happens) = self.happens.lock().unwrap().take_if(|_| folder.ends_with("/partial")) {
            happens();
        }
        self.inner.list(folder, after, most)
    }

    fn delete(&self, key: &str) -> Result<bool, Error> {
        self.inner.delete(key)
    }

    fn location(&self, key: &str) -> String {
        self.inner.location(key)
    }
}

#[test]
fn a_segment_that_becomes_whole_while_its_parts_are_looked_for_is_restored_whole() {
    type Happens = fn(&Site, &Archive, &WalFile);
    let cases: [(&str, Happens); 3] = [
        ("archived, its part still there", |_, archive, whole| drop(archive_file(archive, whole).unwrap())),
        ("archived, its part gone", |_, archive, whole| {
            archive_file(archive, whole).unwrap();
            archive.remove_part(&part(300_000)).unwrap();
        }),
        ("received, not archived yet", |site, _, whole| {
            fs::remove_file(site.path("streaming").join(PARTIAL)).unwrap();
            fs::copy(&whole.path, site.path("streaming").join(whole.name.to_string())).unwrap();
        }),
    ];
    for (what, happens) in cases {
        let site = Arc::new(Site::new());
        let archive = site.archive();
        archive_file(&archive, &site.offer_segment(1)).unwrap();
        put(&site, &archive, 300_000);
        let whole = site.offer_segment(3);
        let (destination, streaming) = (site.path("restored"), site.path("streaming"));
        let (theirs, offered) = (Arc::clone(&site), whole.clone());
        let happens = Mutex::new(Some(move || happens(&theirs, &archive, &offered)));
        let open = || {
            let mut place = site.place();
            let happens = happens.lock().unwrap().take().map(|happens| Box::new(happens) as Box<dyn FnOnce() + Send>);
            place.store = Box::new(Meanwhile { inner: site.place().store, happens: Mutex::new(happens) });
            Ok(place)
        };
        let request = Request {
            name: whole.name,
            destination: &destination,
            or_partial: true,
            streaming_directory: what.starts_with("received").then_some((&streaming, true)),
            system_identifier: Some(site.cluster.system_identifier),
            retry_timeout: Duration::from_millis(100),
        };
        assert_eq!(restore(open, &request).unwrap().name, whole.name, "{what}");
        assert!(fs::read(&destination).unwrap() == fs::read(&whole.path).unwrap(), "{what}");
    }
}

/// Notes for which files it is called.
#[derive(Default)]
struct Names(Vec<String>);

impl Attendant for Names {
    fn before(&mut self, file: &Facts) -> Result<(), Error> {
        self.0.push(file.name.to_string());
        Ok(())
    }

    fn after(&mut self, _: &Facts, _: &Result<(), Error>) {}
}

#[test]
fn a_deletion_takes_the_parts_of_segments_that_it_would_take() {
    let site = Site::with_segments_of(1 << 20).with(Setting::Compression, "zstd");
    let archive = site.archive();
    for number in [1, 2, 5] {
        archive_file(&archive, &site.offer_segment(number)).unwrap();
    }
    put(&site, &archive, 5_000);
    put(&site, &archive, 300_000);
    let place = site.place();
    let plan = |before: u32, keeps: Vec<Keep>| {
        let before = Bound::parse(&site.name(before).to_string()).unwrap();
        let system_identifier = Some(site.cluster.system_identifier);
        let request = deletion::Request { before, keeps, system_identifier, segment_size: None };
        Deletion::plan(&place, &request).unwrap()
    };
    let listed = |deletion: Deletion<'_>| {
        let mut names = Vec::new();
        deletion.list(&Pulse::new(), &mut |file| names.push(file.item.to_string())).unwrap();
        names
    };
    let segments = [1, 2].map(|number| site.name(number).to_string());
    let kept = Keep::parse(&format!("{0}..{0}", site.name(3))).unwrap();
    assert_eq!(listed(plan(3, Vec::new())), segments);
    assert_eq!(listed(plan(5, vec![kept])), segments);
    let all: Vec<_> =
        segments.iter().cloned().chain([part(5_000), part(300_000)].map(|part| part.to_string())).collect();
    assert_eq!(listed(plan(5, Vec::new())), all);
    assert_eq!(archive.parts(None).unwrap().len(), 2, "nothing is changed by looking");

    // Whoever is called around archived files is not around these.
    let (mut called, mut gone) = (Names::default(), Vec::new());
    let mut each = |file: &deletion::Departing, outcome: &Result<(), Error>| {
        outcome.as_ref().unwrap();
        gone.push((file.item.to_string(), file.item.word()));
    };
    plan(5, Vec::new()).carry_out(&Pulse::new(), Some(&mut called), &mut each).unwrap();
    let words = ["segment", "segment", "part", "part"];
    assert_eq!(gone, all.into_iter().zip(words).collect::<Vec<_>>());
    assert_eq!(called.0, segments);
    assert!(archive.parts(None).unwrap().is_empty());
    assert_eq!(site.assert_agreement(), [site.name(5).to_string()]);
}
