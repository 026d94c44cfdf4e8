//! Whether what lies in an archive is what was archived.

use archiver_core::codec::{self, Compression};
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_core::listing::Range;
use archiver_core::pulse::Pulse;
use archiver_core::verify::{Request, State, Verified, verify};
use archiver_core::wal::{SegmentName, WalName};
use archiver_tests::gpg::Gpg;
use archiver_tests::harm::{self, Harm, change, flip_bit, judged, new_seed, remove, segments_in, verdicts};
use archiver_tests::{PAGE_BYTES, Site, archive_file, compressed, eventually, wal_name};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::ops::ControlFlow;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

const HISTORY: &[u8] = b"1\t0/300028\tno recovery target specified\n";

fn all(site: &Site) -> Vec<Verified> {
    verdicts(&site.place(), Range::default())
}

/// The one verdict on that file.
fn verdict(site: &Site, name: &WalName) -> (State, String) {
    let [verified] = &verdicts(&site.place(), Range { from: Some(*name), to: Some(*name) })[..] else {
        panic!("one verdict on {name}")
    };
    (verified.state, verified.detail.clone().unwrap_or_default())
}

#[track_caller]
fn assert_verdict(site: &Site, name: &WalName, state: State, cause: &str) {
    let (found, detail) = verdict(site, name);
    assert_eq!(found, state, "{name}: {detail}");
    assert!(detail.contains(cause), "{name}: {detail}");
}

/// Six of 2,000 segments come to harm.
fn six_are_named(site: &Site) {
    const SEGMENTS: u32 = 2000;
    let seed = new_seed();
    println!("seed {seed}");
    let archive = site.archive();
    let names: Vec<WalName> = (3000..3000 + SEGMENTS).map(|number| site.name(number)).collect();
    let stored = |number: u32| {
        let file = site.offer_segment(number);
        archive_file(&archive, &file).unwrap();
        fs::remove_file(&file.path).unwrap();
    };
    std::thread::scope(|scope| {
        for first in 0..4 {
            let stored = &stored;
            scope.spawn(move || (3000 + first..3000 + SEGMENTS).step_by(4).for_each(stored));
        }
    });
    let place = site.place();
    assert!(harm::findings(&place).is_whole());
    let began = Instant::now();
    let before = all(site);
    println!("{SEGMENTS} segments verified in {:.1} s", began.elapsed().as_secs_f64());
    assert_eq!(before.iter().map(|verified| verified.name).collect::<Vec<_>>(), names);
    assert_eq!(judged(&before, State::Ok).len(), names.len());

    let harm = Harm::to_six_of(&place, &names, seed);
    assert_eq!(segments_in(&harm::findings(&place), site.cluster.segment_size), harm.removed);
    let after = all(site);
    assert_eq!(after.iter().map(|verified| verified.name).collect::<Vec<_>>(), names);
    assert_eq!(judged(&after, State::Missing), harm.removed);
    assert_eq!(judged(&after, State::Damaged), harm.damaged, "{after:?}");
    assert_eq!(judged(&after, State::Ok).len(), names.len() - 6);
}

#[test]
fn of_two_thousand_plain_segments_the_six_that_came_to_harm_are_named() {
    six_are_named(&Site::new().with(Setting::Compression, "none"));
}

#[test]
fn of_two_thousand_compressed_segments_the_six_that_came_to_harm_are_named() {
    six_are_named(&Site::new().with(Setting::Compression, "zstd"));
}

#[test]
fn of_two_thousand_encrypted_segments_the_six_that_came_to_harm_are_named() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    six_are_named(&Site::new().encrypting(&gpg, "reader"));
}

#[test]
fn every_kind_of_file_is_verified_in_every_format() {
    for compression in Compression::ALL {
        let site = Site::new().with(Setting::Compression, compression.name());
        let archive = site.archive();
        let label = "000000010000000000000002.00000028.backup";
        let start = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\nLABEL: daily\n";
        for (name, content) in [
            (site.name(2), site.content(&site.name(2))),
            (wal_name(label), start.to_vec()),
            (wal_name("000000010000000000000003.partial"), site.content(&site.name(3))),
            (wal_name("00000002.history"), HISTORY.to_vec()),
        ] {
            archive_file(&archive, &site.offer(&name, &content)).unwrap();
        }
        let judged = all(&site);
        let names: Vec<String> = judged.iter().map(|verified| verified.name.to_string()).collect();
        let expected = ["000000010000000000000002", label, "000000010000000000000003.partial", "00000002.history"];
        assert_eq!(names, expected);
        assert!(judged.iter().all(|it| it.state == State::Ok && it.detail.is_none()), "{judged:?}");
        // As Barman leaves them: nothing was noted.
        fs::remove_dir_all(site.storage().join("main/sums")).unwrap();
        let judged = all(&site);
        assert!(judged.iter().all(|it| it.state == State::Unverified), "{}: {judged:?}", compression.name());
        assert!(!site.storage().join("main/sums").exists(), "nothing is written");
    }
}

#[test]
fn a_flipped_bit_is_damage_in_every_format() {
    for compression in Compression::ALL {
        let site = Site::new().with(Setting::Compression, compression.name());
        let file = site.offer_segment(1);
        archive_file(&site.archive(), &file).unwrap();
        let seed = new_seed();
        println!("seed {seed}, {}", compression.name());
        change(&site.place(), &file.name, |bytes| flip_bit(bytes, seed));
        // A few bits of some formats mean nothing: the time in a gzip header, what fills the last byte of bzip2.
        let (mut plain, stored) = (Vec::new(), File::open(site.stored(&file.name)).unwrap());
        let read = codec::decode(stored, 1 << 30).and_then(|mut decoder| decoder.plain.read_to_end(&mut plain));
        if compression != Compression::None && read.is_ok() && plain == site.content(&file.name) {
            assert_verdict(&site, &file.name, State::Ok, "");
            continue;
        }
        assert_verdict(&site, &file.name, State::Damaged, "is damaged: ");
        // Only what was noted tells of data that nothing protects.
        if compression == Compression::None {
            assert_verdict(&site, &file.name, State::Damaged, "it was stored as blake3:");
        }
    }
}

#[test]
fn a_shortened_file_is_damage_in_every_format_also_where_nothing_was_noted() {
    for compression in Compression::ALL {
        let site = Site::new();
        let name = site.name(1);
        let mut stored = compressed(compression, &site.content(&name));
        stored.truncate(stored.len() * 2 / 3);
        site.store_as_barman(&name, &stored);
        assert_verdict(&site, &name, State::Damaged, "is damaged: ");
    }
}

#[test]
fn a_damaged_page_header_is_found_where_nothing_was_noted() {
    for compression in [Compression::None, Compression::Zstd] {
        let site = Site::new();
        for (page, at, cause) in [
            (7, 0, "the page at offset 57344 has the magic D111"),
            (7, 2, "the page at offset 57344 has the flags 0001"),
            (7, 4, "the page at offset 57344 says timeline 0"),
            (7, 8, "the page at offset 57344 says that it lies at 0/10E001"),
            (7, 16, "the page at offset 57344 has the flags 0000"),
            (127, 9, "the page at offset 1040384 says that it lies at 0/1FE100"),
            (0, 0, "the page at offset 8192 has the magic D110"),
            (0, 1, "the page at offset 8192 has the magic D110"),
        ] {
            let name = site.name(1);
            let mut content = site.content(&name);
            content[page * PAGE_BYTES + at] ^= 1;
            site.store_as_barman(&name, &compressed(compression, &content));
            assert_verdict(&site, &name, State::Damaged, cause);
        }
    }
}

#[test]
fn a_switched_segment_is_blank_behind_its_last_page_and_nothing_else() {
    let site = Site::new();
    let name = site.name(1);
    let mut content = site.content(&name);
    content[5 * PAGE_BYTES..].fill(0);
    site.store_as_barman(&name, &compressed(Compression::Gzip, &content));
    assert_verdict(&site, &name, State::Unverified, "no hash was noted");
    content[9 * PAGE_BYTES + 77] = 1;
    site.store_as_barman(&name, &compressed(Compression::Gzip, &content));
    assert_verdict(&site, &name, State::Damaged, "is not blank at offset 73805");
}

#[test]
fn the_last_segment_of_a_timeline_may_end_in_a_recycled_one() {
    let site = Site::new();
    let segment = site.name(3);
    let mut content = site.content(&segment);
    let older = site.content(&site.name(1));
    content[64 * PAGE_BYTES..].copy_from_slice(&older[64 * PAGE_BYTES..]);
    let partial = wal_name("000000010000000000000003.partial");
    site.store_as_barman(&partial, &content);
    site.store_as_barman(&segment, &content);
    assert_verdict(&site, &partial, State::Unverified, "");
    assert_verdict(&site, &segment, State::Damaged, "the page at offset 524288 says that it lies at 0/180000");
    // A standby that archives always may file it under the whole segment's name.
    site.store_as_barman(&wal_name("00000002.history"), b"1\t0/350028\tx\n");
    assert_verdict(&site, &segment, State::Unverified, "");
}

#[test]
fn a_segment_under_anothers_name_and_one_of_another_cluster_are_damage() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    site.store_as_barman(&site.name(2), &site.content(&site.name(5)));
    assert_verdict(&site, &site.name(2), State::Damaged, "its header says that it starts at 0/500000");
    let mut foreign = Site::new();
    foreign.cluster.system_identifier = 42;
    site.store_as_barman(&site.name(3), &foreign.content(&site.name(3)));
    let cause = "it was written by the cluster with system identifier 42, not 7300000000000000001";
    assert_verdict(&site, &site.name(3), State::Damaged, cause);
    let later = site.content(&wal_name("000000020000000000000004"));
    site.store_as_barman(&site.name(4), &later);
    assert_verdict(&site, &site.name(4), State::Damaged, "its header says timeline 2");
    site.store_as_barman(&site.name(7), b"");
    assert_eq!(verdict(&site, &site.name(7)).0, State::Damaged);
}

#[test]
fn histories_and_labels_must_say_what_their_names_say() {
    let site = Site::new();
    site.store_as_barman(&site.name(1), &site.content(&site.name(1)));
    let (history, label) = (wal_name("00000003.history"), wal_name("000000010000000000000005.00000028.backup"));
    for (text, cause) in [
        ("1\t0/300028\tx\n", ""),
        ("1\t0/300028\tx\n2\there\tx\n", "line 2"),
        ("3\t0/300028\tx\n", "line 1"),
        ("\n", "tells of no timeline"),
        ("", "it is empty"),
    ] {
        site.store_as_barman(&history, text.as_bytes());
        let state = if cause.is_empty() { State::Unverified } else { State::Damaged };
        assert_verdict(&site, &history, state, cause);
    }
    for (text, cause) in [
        ("START WAL LOCATION: 0/500028 (file 000000010000000000000005)\n", ""),
        ("START WAL LOCATION: 0/600028 (file 000000010000000000000006)\n", "began at 0/600028"),
        ("LABEL: daily\n", "does not say where the backup began"),
    ] {
        site.store_as_barman(&label, &compressed(Compression::Gzip, text.as_bytes()));
        let state = if cause.is_empty() { State::Unverified } else { State::Damaged };
        assert_verdict(&site, &label, state, cause);
    }
}

#[test]
fn what_was_damaged_when_it_was_archived_is_told_so() {
    let site = Site::new();
    let name = site.name(1);
    let mut content = site.content(&name);
    content[3 * PAGE_BYTES] ^= 1;
    archive_file(&site.archive(), &site.offer(&name, &content)).unwrap();
    assert_verdict(&site, &name, State::Damaged, "the page at offset 24576");
    assert_verdict(&site, &name, State::Damaged, "as it was when it was archived");
}

#[test]
fn what_cannot_be_read_is_neither_good_nor_damaged() {
    let site = Site::new();
    for number in [1, 2] {
        archive_file(&site.archive(), &site.offer_segment(number)).unwrap();
    }
    // A file whose first byte nobody can read, not even root.
    let name = site.name(2);
    fs::remove_file(site.stored(&name)).unwrap();
    symlink("/proc/self/mem", site.stored(&name)).unwrap();
    assert_verdict(&site, &name, State::Unreadable, "I/O error");
    assert_eq!(judged(&all(&site), State::Ok), [site.name(1)].into());
}

#[test]
fn a_range_includes_both_ends_and_what_is_lost_at_them() {
    let site = Site::new();
    let archive = site.archive();
    (1..9).for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
    for number in [1, 3, 5, 8] {
        remove(&site.place(), &site.name(number));
    }
    let range = Range { from: Some(site.name(3)), to: Some(site.name(5)) };
    let found = verdicts(&site.place(), range);
    let states: Vec<(WalName, State)> = found.iter().map(|it| (it.name, it.state)).collect();
    assert_eq!(states, [(site.name(3), State::Missing), (site.name(4), State::Ok), (site.name(5), State::Missing)]);
    let missing: BTreeSet<WalName> = [1, 3, 5, 8].map(|number| site.name(number)).into();
    assert_eq!(judged(&all(&site), State::Missing), missing);
    let beyond = Some(WalName::Segment(SegmentName::numbered(site.name(1).timeline(), 99, site.cluster.segment_size)));
    assert!(verdicts(&site.place(), Range { from: beyond, to: None }).is_empty());
}

#[test]
fn no_archive_is_no_good_one() {
    let site = Site::new();
    let fail = |site: &Site, system_identifier| {
        let request = Request { range: Range::default(), system_identifier };
        verify(&site.place(), &request, &Pulse::new(), &mut |_| ControlFlow::Continue(())).unwrap_err().kind()
    };
    assert_eq!(fail(&site, None), Kind::Identity);
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    assert_eq!(fail(&site, Some(42)), Kind::Identity);
    site.unmount();
    assert_eq!(fail(&site, None), Kind::Identity);
}

#[test]
fn a_stop_ends_it_within_a_second() {
    let site = Site::with_segments_of(64 << 20).with(Setting::Compression, "bzip2");
    let name = site.name(1);
    let content = compressed(Compression::Bzip2, &site.content(&name));
    site.store_as_barman(&name, &content);
    let (place, pulse) = (site.place(), Pulse::new());
    std::thread::scope(|scope| {
        let request = Request::default();
        let (place, pulse) = (&place, &pulse);
        let verifying = scope.spawn(move || verify(place, &request, pulse, &mut |_| ControlFlow::Continue(())));
        eventually("it reads", || pulse.beats() > 10);
        let began = Instant::now();
        pulse.stop();
        let error = verifying.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), Kind::Interrupted, "{error}");
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    });
}
