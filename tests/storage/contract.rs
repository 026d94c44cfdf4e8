//! What every store promises, one check a sentence. A store's own file calls [`battery`] with a way to open an empty one.

use archiver_core::error::{Error, Kind, Result};
use archiver_core::store::{Attributes, Body, Put, Store};
use archiver_tests::wal_like;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

/// Makes a test of every check; `$open` gives a store, and what must outlive it.
macro_rules! battery {
    ($open:expr) => {
        $crate::contract::battery! { $open =>
            what_was_put_is_read_back_with_its_size_and_time
            a_streamed_object_is_the_same_as_one_from_memory
            an_empty_object_is_an_object
            an_absent_object_is_an_answer_and_no_error
            an_existing_object_is_never_overwritten
            an_object_of_the_same_content_already_exists_as_well
            of_many_creators_exactly_one_is_told_created
            creators_of_neighbours_do_not_disturb_each_other
            no_part_of_an_object_is_ever_seen
            readers_see_the_whole_object_or_none
            a_body_that_fails_leaves_nothing_behind
            an_error_of_the_callers_own_comes_back_as_it_was
            a_deleted_object_is_gone_and_can_be_created_again
            two_objects_under_one_key_have_different_versions
            the_version_of_an_untouched_object_stays
            a_page_holds_the_first_keys_in_order_of_their_bytes
            directories_and_files_interleave_in_key_order
            a_page_may_begin_behind_a_key_that_is_not_there
            a_folder_is_not_a_prefix_of_names
            a_listing_knows_sizes_and_times
            pages_of_any_size_amount_to_the_whole_listing
            a_location_tells_one_object_from_another
        }
    };
    ($open:expr => $($check:ident)*) => {
        $(#[test]
        fn $check() {
            let (_keeper, store) = $open;
            $crate::contract::$check(&*store);
        })*
    };
}
pub(crate) use battery;

fn time(nanoseconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(1_615_159_937_000_000_000 + nanoseconds)
}

fn attributes(nanoseconds: u64) -> Attributes {
    Attributes { modified: time(nanoseconds), content: None }
}

fn put(store: &dyn Store, key: &str, content: &[u8]) -> Put {
    store.put_new(key, Body::Bytes(content), &attributes(463_971_234)).expect(key)
}

fn put_stream(store: &dyn Store, key: &str, mut write: impl FnMut(&mut dyn Write) -> io::Result<()>) -> Result<Put> {
    store.put_new(key, Body::Stream(&mut write), &attributes(0))
}

fn read(store: &dyn Store, key: &str) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    store.get(key).expect(key)?.body.read_to_end(&mut content).expect(key);
    Some(content)
}

fn created(content: &[u8]) -> Put {
    Put::Created { stored_size: content.len() as u64 }
}

fn keys(store: &dyn Store, folder: &str, after: Option<&str>, most: usize) -> Vec<String> {
    store.list(folder, after, most).expect(folder).into_iter().map(|listed| listed.key).collect()
}

pub fn what_was_put_is_read_back_with_its_size_and_time(store: &dyn Store) {
    let content = wal_like(300_000, 1);
    assert_eq!(put(store, "main/wals/0000000100000002/x", &content), created(&content));
    let object = store.get("main/wals/0000000100000002/x").unwrap().unwrap();
    assert_eq!(object.meta.stored_size, content.len() as u64);
    assert_eq!(object.meta.modified, time(463_971_234));
    assert_eq!(store.head("main/wals/0000000100000002/x").unwrap(), Some(object.meta));
    assert!(read(store, "main/wals/0000000100000002/x").unwrap() == content);
}

pub fn a_streamed_object_is_the_same_as_one_from_memory(store: &dyn Store) {
    let content = wal_like(3_000_000, 2);
    let done = put_stream(store, "a/b", |out| content.chunks(70_001).try_for_each(|piece| out.write_all(piece)));
    assert_eq!(done.unwrap(), created(&content));
    assert!(read(store, "a/b").unwrap() == content);
}

pub fn an_empty_object_is_an_object(store: &dyn Store) {
    assert_eq!(put(store, "a/empty", b""), created(b""));
    assert_eq!(read(store, "a/empty"), Some(Vec::new()));
    assert_eq!(put(store, "a/empty", b"more"), Put::AlreadyExists);
}

pub fn an_absent_object_is_an_answer_and_no_error(store: &dyn Store) {
    put(store, "a/there", b"x");
    for key in ["a/absent", "no/such/folder", "absent"] {
        assert!(store.get(key).unwrap().is_none(), "{key}");
        assert_eq!(store.head(key).unwrap(), None, "{key}");
        assert!(!store.delete(key).unwrap(), "{key}");
    }
    assert!(store.list("no/such/folder", None, 10).unwrap().is_empty());
}

pub fn an_existing_object_is_never_overwritten(store: &dyn Store) {
    put(store, "a/b", b"older");
    let before = store.head("a/b").unwrap();
    assert_eq!(put(store, "a/b", b"newer content"), Put::AlreadyExists);
    assert_eq!(put_stream(store, "a/b", |out| out.write_all(b"streamed")).unwrap(), Put::AlreadyExists);
    assert_eq!(read(store, "a/b").unwrap(), b"older");
    assert_eq!(store.head("a/b").unwrap(), before, "size, time and version stay");
}

pub fn an_object_of_the_same_content_already_exists_as_well(store: &dyn Store) {
    put(store, "a/b", b"same");
    assert_eq!(put(store, "a/b", b"same"), Put::AlreadyExists);
}

pub fn of_many_creators_exactly_one_is_told_created(store: &dyn Store) {
    const CREATORS: usize = 8;
    for round in 0..12 {
        let key = format!("main/wals/{round:016X}/x");
        let barrier = Barrier::new(CREATORS);
        let answers: Vec<Put> = std::thread::scope(|scope| {
            let race = |number: usize| {
                let (key, barrier) = (&key, &barrier);
                // Each has a content of its own length.
                let content = wal_like(20_000 + number, number as u64);
                scope.spawn(move || {
                    barrier.wait();
                    if number < CREATORS / 2 {
                        put(store, key, &content)
                    } else {
                        put_stream(store, key, |out| out.write_all(&content)).unwrap()
                    }
                })
            };
            let racers: Vec<_> = (0..CREATORS).map(race).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let winners: Vec<usize> = (0..CREATORS).filter(|&number| answers[number] != Put::AlreadyExists).collect();
        let [winner] = winners[..] else { panic!("created by {winners:?}") };
        let content = wal_like(20_000 + winner, winner as u64);
        assert_eq!(answers[winner], created(&content));
        assert!(read(store, &key).unwrap() == content, "the winner's content stands");
    }
}

pub fn creators_of_neighbours_do_not_disturb_each_other(store: &dyn Store) {
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for number in 0..8 {
            let barrier = &barrier;
            scope.spawn(move || {
                barrier.wait();
                for round in 0..4 {
                    assert_eq!(put(store, &format!("a/{round}/{number}"), b"x"), created(b"x"));
                }
            });
        }
    });
    assert_eq!(keys(store, "a", None, 100).len(), 32);
}

pub fn no_part_of_an_object_is_ever_seen(store: &dyn Store) {
    let content = wal_like(2_500_000, 3);
    let done = put_stream(store, "a/b/c", |out| {
        for piece in content.chunks(500_000) {
            out.write_all(piece)?;
            assert!(store.get("a/b/c").unwrap().is_none());
            assert_eq!(store.head("a/b/c").unwrap(), None);
            assert!(keys(store, "a", None, 10).is_empty());
        }
        Ok(())
    });
    assert_eq!(done.unwrap(), created(&content));
    assert_eq!(keys(store, "a", None, 10), ["a/b/c"]);
}

pub fn readers_see_the_whole_object_or_none(store: &dyn Store) {
    let content = wal_like(400_000, 4);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for number in 0..20 {
                    let seen = read(store, &format!("a/{number}"));
                    assert!(seen.is_none_or(|seen| seen == content));
                }
                for listed in store.list("a", None, 100).unwrap() {
                    assert_eq!(listed.stored_size, content.len() as u64, "{}", listed.key);
                }
            }
        });
        for number in 0..20 {
            put(store, &format!("a/{number}"), &content);
        }
        is_over.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
}

pub fn a_body_that_fails_leaves_nothing_behind(store: &dyn Store) {
    let failed = put_stream(store, "a/b", |out| {
        out.write_all(&wal_like(1_500_000, 5))?;
        Err(io::Error::other("no more"))
    });
    assert_eq!(failed.unwrap_err().kind(), Kind::Storage);
    assert!(store.get("a/b").unwrap().is_none());
    assert!(keys(store, "a", None, 10).is_empty());
    assert_eq!(put(store, "a/b", b"whole"), created(b"whole"));
    assert_eq!(read(store, "a/b").unwrap(), b"whole");
}

pub fn an_error_of_the_callers_own_comes_back_as_it_was(store: &dyn Store) {
    let own = Error::new(Kind::Source, "x", "it changed").detail("While it was read.").retry_if(true);
    let failed = put_stream(store, "a/b", |_| Err(io::Error::other(own.clone())));
    assert_eq!(failed.unwrap_err(), own);
}

pub fn a_deleted_object_is_gone_and_can_be_created_again(store: &dyn Store) {
    put(store, "a/b", b"first");
    put(store, "a/c", b"other");
    assert!(store.delete("a/b").unwrap());
    assert!(!store.delete("a/b").unwrap());
    assert!(store.get("a/b").unwrap().is_none());
    assert_eq!(keys(store, "a", None, 10), ["a/c"]);
    assert_eq!(put(store, "a/b", b"second"), created(b"second"));
    assert_eq!(read(store, "a/b").unwrap(), b"second");
}

pub fn two_objects_under_one_key_have_different_versions(store: &dyn Store) {
    let mut versions = BTreeSet::new();
    for round in 0_u8..50 {
        put(store, "a/b", &[round]);
        assert!(versions.insert(store.head("a/b").unwrap().unwrap().version), "round {round}: {versions:?}");
        store.delete("a/b").unwrap();
    }
}

pub fn the_version_of_an_untouched_object_stays(store: &dyn Store) {
    put(store, "a/b", b"content");
    let before = store.head("a/b").unwrap();
    read(store, "a/b");
    put(store, "a/c", b"a neighbour");
    assert_eq!(put(store, "a/b", b"another"), Put::AlreadyExists);
    assert_eq!(store.head("a/b").unwrap(), before);
}

pub fn a_page_holds_the_first_keys_in_order_of_their_bytes(store: &dyn Store) {
    for key in ["w/b", "w/B", "w/a", "w/_", "w/0", "w/a.b", "w/a-b"] {
        put(store, key, b"x");
    }
    let all = ["w/0", "w/B", "w/_", "w/a", "w/a-b", "w/a.b", "w/b"];
    assert_eq!(keys(store, "w", None, 100), all);
    assert_eq!(keys(store, "w", None, 7), all, "a full page");
    assert_eq!(keys(store, "w", None, 3), all[..3]);
    assert_eq!(keys(store, "w", Some("w/_"), 3), all[3..6]);
    assert_eq!(keys(store, "w", Some("w/a.b"), 3), all[6..]);
    assert!(keys(store, "w", Some("w/b"), 3).is_empty());
}

pub fn directories_and_files_interleave_in_key_order(store: &dyn Store) {
    // As Barman's layout has it: '.' and '-' sort before the slash of a directory, digits behind it.
    let all = [
        "m/wals/00000001.history",
        "m/wals/0000000100000000-x",
        "m/wals/0000000100000000.x",
        "m/wals/0000000100000000/000000010000000000000001",
        "m/wals/0000000100000000/000000010000000000000001.00000028.backup",
        "m/wals/0000000100000000/000000010000000000000002",
        "m/wals/00000001000000000",
        "m/wals/0000000100000001/000000010000000100000000",
        "m/wals/00000002.history",
        "m/wals/0000000200000001/deep/er",
        "m/wals/0000000200000001/deeper",
        "m/wals/m-xlog.db",
    ];
    for key in all.iter().rev() {
        put(store, key, b"x");
    }
    assert_eq!(keys(store, "m/wals", None, 100), all);
    for most in 1..5 {
        for (at, after) in all.iter().enumerate() {
            let rest = &all[at + 1..];
            assert_eq!(keys(store, "m/wals", Some(after), most), rest[..rest.len().min(most)], "{after}");
        }
    }
}

pub fn a_page_may_begin_behind_a_key_that_is_not_there(store: &dyn Store) {
    for key in ["w/a/1", "w/a/3", "w/b", "w/c/1"] {
        put(store, key, b"x");
    }
    for (after, first) in [
        ("w/", "w/a/1"),
        ("w/a", "w/a/1"),
        ("w/a/", "w/a/1"),
        ("w/a/2", "w/a/3"),
        ("w/a/3/x", "w/b"),
        ("w/a0", "w/b"),
        ("w/b/x", "w/c/1"),
        ("w/c", "w/c/1"),
        ("a", "w/a/1"),
    ] {
        assert_eq!(keys(store, "w", Some(after), 1), [first], "{after}");
    }
    assert!(keys(store, "w", Some("x"), 1).is_empty());
}

pub fn a_folder_is_not_a_prefix_of_names(store: &dyn Store) {
    for key in ["w/a", "w2/a", "w.x", "v/w/a"] {
        put(store, key, b"x");
    }
    assert_eq!(keys(store, "w", None, 10), ["w/a"]);
}

pub fn a_listing_knows_sizes_and_times(store: &dyn Store) {
    // A storage's clock may stand a little apart from ours, and count in coarser steps.
    let before = SystemTime::now() - Duration::from_secs(60);
    put(store, "w/a", b"four");
    let [listed] = &store.list("w", None, 10).unwrap()[..] else { panic!("one object") };
    assert_eq!(listed.stored_size, 4);
    assert!(before < listed.stored_at && listed.stored_at < SystemTime::now() + Duration::from_secs(60));
}

pub fn pages_of_any_size_amount_to_the_whole_listing(store: &dyn Store) {
    let part = prop::sample::select(vec!["a", "a-", "a.", "a0", "b", "A", "_"]);
    let key = prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"));
    let cases = (prop::collection::btree_set(key, 0..12), 1_usize..6);
    let number = AtomicUsize::new(0);
    TestRunner::new(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })
        .run(&cases, |(names, most)| {
            let folder = format!("case{}", number.fetch_add(1, Ordering::Relaxed));
            // A file system has either a file or a directory of one name.
            let is_folder_of_other = |name: &String| names.iter().any(|other| other.starts_with(&format!("{name}/")));
            let expected: Vec<String> = names.iter().filter(|name| !is_folder_of_other(name)).cloned().collect();
            let expected: BTreeSet<String> = expected.iter().map(|name| format!("{folder}/{name}")).collect();
            for key in &expected {
                put(store, key, b"x");
            }
            let mut listed: Vec<String> = Vec::new();
            loop {
                let page = keys(store, &folder, listed.last().map(String::as_str), most);
                let is_last = page.len() < most;
                listed.extend(page);
                if is_last {
                    break;
                }
            }
            prop_assert_eq!(listed, expected.into_iter().collect::<Vec<_>>());
            Ok(())
        })
        .unwrap();
}

pub fn a_location_tells_one_object_from_another(store: &dyn Store) {
    assert!(store.location("main/wals/x").ends_with("main/wals/x"));
    assert_ne!(store.location("a"), store.location("b"));
}
