//! What an archive holds: ranges, pages of any size, and what is said of each file.

use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::{Kind, Result};
use archiver_core::listing::{Archived, Range, list_page, locate};
use archiver_core::wal::WalName;
use archiver_tests::{Site, archive_file, wal_name};
use std::fs::{self, File, FileTimes};
use std::time::{Duration, SystemTime};

/// The whole listing of a range, and how many pages it took.
fn list(site: &Site, range: &Range, most: usize) -> (Vec<Archived>, usize) {
    let place = site.place();
    let (mut all, mut after, mut pages) = (Vec::new(), None::<String>, 0);
    loop {
        let (page, next) = list_page(&place, after.as_deref(), range, most).unwrap();
        assert!(page.len() <= most, "a page of {} where {most} was the most", page.len());
        assert!(next.is_none() || next > after, "{next:?} does not go on from {after:?}");
        all.extend(page);
        pages += 1;
        match next {
            Some(next) => after = Some(next),
            None => return (all, pages),
        }
    }
}

fn names(archived: &[Archived]) -> Vec<String> {
    archived.iter().map(|file| file.name.to_string()).collect()
}

/// Every kind of file on three timelines, in order of their keys, beside what does not belong there.
const ALL: [&str; 10] = [
    "000000010000000000000001",
    "000000010000000000000002",
    "000000010000000000000002.00000028.backup",
    "0000000100000001000000FF",
    "0000000100000001000000FF.partial",
    "00000002.history",
    "0000000200000001000000FF",
    "00000003.history",
    "000000030000000200000000",
    "00000004.history",
];

fn with_every_kind() -> Site {
    let site = Site::with_segments_of(16 << 20);
    for name in ALL {
        site.store_as_barman(&wal_name(name), name.as_bytes());
    }
    let wals = site.storage().join("main/wals");
    fs::write(wals.join("main-xlog.db"), "").unwrap();
    fs::write(wals.join("0000000100000000/.hidden"), "").unwrap();
    fs::write(wals.join("0000000100000000/000000010000000000000003.bad"), "").unwrap();
    // Filed wrongly: restoring would not find it.
    fs::write(wals.join("0000000100000000/000000010000000500000003"), "").unwrap();
    site
}

#[test]
fn every_range_is_listed_whatever_the_size_of_a_page() {
    let site = with_every_kind();
    let bounds: Vec<Option<WalName>> = std::iter::once(None)
        .chain(ALL.map(|name| Some(wal_name(name))))
        .chain(
            ["000000010000000100000000", "00000001.history", "0000000A.history", "0000000A0000000000000000"]
                .map(|name| Some(wal_name(name))),
        )
        .collect();
    for from in &bounds {
        for to in &bounds {
            let range = Range { from: *from, to: *to };
            let is_in = |name: &WalName| from.is_none_or(|from| from <= *name) && to.is_none_or(|to| *name <= to);
            let expected: Vec<&str> = ALL.into_iter().filter(|name| is_in(&wal_name(name))).collect();
            for most in [1, 2, 3, 100] {
                assert_eq!(names(&list(&site, &range, most).0), expected, "{range:?} in pages of {most}");
            }
        }
    }
}

#[test]
fn directories_that_cannot_hold_the_range_are_not_walked_through() {
    let site = Site::with_segments_of(16 << 20);
    for number in 0..40 {
        site.store_as_barman(&site.name(number), b"x");
    }
    site.store_as_barman(&wal_name("00000002.history"), b"x");
    let one = Some(site.name(30));
    let (found, pages) = list(&site, &Range { from: one, to: one }, 2);
    assert_eq!(names(&found), [site.name(30).to_string()]);
    assert!(pages <= 9, "{pages} pages for one file");
    let (found, pages) = list(&site, &Range { from: None, to: Some(site.name(0)) }, 2);
    assert_eq!(names(&found), [site.name(0).to_string(), "00000002.history".to_string()]);
    assert!(pages <= 3, "{pages} pages for two files");
}

#[test]
fn a_listing_tells_sizes_format_time_and_place() {
    let site = Site::new();
    let file = site.offer_segment(1);
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(1_615_159_937);
    File::open(&file.path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
    let before = SystemTime::now() - Duration::from_secs(1);
    let stored = archive_file(&site.archive(), &file).unwrap();
    // Barman keeps no sums.
    site.store_as_barman(&site.name(2), &site.content(&site.name(2)));

    let (found, _) = list(&site, &Range::default(), 10);
    let [ours, barmans] = &found[..] else { panic!("{found:?}") };
    assert_eq!(
        *ours,
        Archived {
            name: file.name,
            plain_size: Some(1 << 20),
            stored_size: stored.stored_size,
            stored_at: ours.stored_at,
            format: Compression::Zstd.into(),
            location: site.stored(&file.name).display().to_string(),
        }
    );
    assert!(before < ours.stored_at && ours.stored_at <= SystemTime::now(), "{:?}", ours.stored_at);
    assert_eq!((barmans.plain_size, barmans.format.compression), (None, Compression::None));
    assert_eq!(barmans.stored_size, 1 << 20);
}

#[test]
fn a_sum_of_what_is_no_longer_stored_tells_no_size() {
    let site = Site::new().with(Setting::Compression, "none");
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    fs::write(site.stored(&file.name), b"short").unwrap();
    let (found, _) = list(&site, &Range::default(), 10);
    assert_eq!((found[0].plain_size, found[0].stored_size), (None, 5));
}

#[test]
fn an_absent_file_is_an_answer_only_where_the_archive_was_seen() {
    let site = Site::new();
    let ours = Some(site.cluster.system_identifier);
    let locate_on = |site: &Site, number: u32, cluster: Option<u64>| -> Result<Option<String>> {
        locate(&site.place(), &site.name(number), cluster)
    };
    assert_eq!(locate_on(&site, 1, ours).unwrap_err().kind(), Kind::Identity);
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    assert_eq!(locate_on(&site, 1, ours).unwrap(), Some(site.stored(&file.name).display().to_string()));
    assert_eq!(locate_on(&site, 1, None).unwrap().is_some(), locate_on(&site, 2, ours).unwrap().is_none());
    assert_eq!(locate_on(&site, 1, Some(42)).unwrap_err().kind(), Kind::Identity);
    assert_eq!(locate_on(&site, 2, Some(42)).unwrap_err().kind(), Kind::Identity);
    site.unmount();
    assert_eq!(locate_on(&site, 2, ours).unwrap_err().kind(), Kind::Identity);
    site.mount();
    // Its own records name it: something below the archive is missing.
    fs::remove_file(site.stored(&file.name)).unwrap();
    assert_eq!(locate_on(&site, 1, ours).unwrap_err().kind(), Kind::Damaged);
}
