//! Deleting from a local archive: what goes, what stays, and that files, catalogue and sums agree afterwards.

use archiver_core::config::Setting;
use archiver_core::deletion::{Attendant, Bound, Deletion, Departing, Facts, Keep, Request, Settled};
use archiver_core::error::{Error, Kind, Result};
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::restore;
use archiver_core::store::{Attributes, Body, Listed, Meta, Object, Put, Store};
use archiver_core::wal::WalName;
use archiver_tests::{Site, archive_file, tree, wal_name};
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MEGABYTE: u64 = 1 << 20;

/// An archive of that many segments, the first of them number 0.
fn filled(segment_bytes: u64, count: u32) -> Site {
    let site = Site::with_segments_of(segment_bytes);
    site.fill(&(0..count).map(|number| site.name(number)).collect::<Vec<_>>());
    site
}

fn request(site: &Site, before: &WalName, keeps: &[String]) -> Request {
    Request {
        before: Bound::parse(&before.to_string()).unwrap(),
        keeps: keeps.iter().map(|text| Keep::parse(text).unwrap()).collect(),
        system_identifier: Some(site.cluster.system_identifier),
        segment_size: None,
    }
}

/// The names that would go.
fn listed(place: &Place, request: &Request) -> Result<Vec<String>> {
    let mut names = Vec::new();
    Deletion::plan(place, request)?.list(&Pulse::new(), &mut |file| names.push(file.item.to_string()))?;
    Ok(names)
}

/// Deletes, and answers the names of what went and of what could not go, and what became of the records.
fn carry_out(place: &Place, request: &Request) -> Result<(Vec<String>, Vec<String>, Settled)> {
    let (mut gone, mut failed) = (Vec::new(), Vec::new());
    let mut each = |file: &Departing, outcome: &Result<()>| {
        if outcome.is_ok() { &mut gone } else { &mut failed }.push(file.item.to_string());
    };
    let settled = Deletion::plan(place, request)?.carry_out(&Pulse::new(), None, &mut each)?;
    Ok((gone, failed, settled))
}

/// Deletes everything before that file, and answers what went.
#[track_caller]
fn delete_before(site: &Site, before: &WalName) -> Vec<String> {
    let request = request(site, before, &[]);
    let (gone, failed, _) = carry_out(&site.place(), &request).unwrap();
    assert_eq!(failed, [] as [&str; 0]);
    gone
}

fn names(site: &Site, numbers: impl IntoIterator<Item = u32>) -> Vec<String> {
    numbers.into_iter().map(|number| site.name(number).to_string()).collect()
}

#[test]
fn deleting_300_of_4096_one_mb_segments_leaves_exactly_the_others() {
    let site = filled(MEGABYTE, 4096);
    let (place, request) = (site.place(), request(&site, &site.name(300), &[]));
    let before = tree(&site.storage());
    assert_eq!(listed(&place, &request).unwrap(), names(&site, 0..300));
    assert_eq!(tree(&site.storage()), before, "nothing is changed by looking");

    let (gone, failed, settled) = carry_out(&place, &request).unwrap();
    assert_eq!((gone, failed.len()), (names(&site, 0..300), 0));
    assert_eq!(settled, Settled { lines: 300, broken: None });
    assert_eq!(site.assert_agreement(), names(&site, 300..4096));
    for number in 300..4096 {
        let name = site.name(number);
        assert_eq!(fs::read(site.stored(&name)).unwrap(), site.filled(&name), "{name}");
    }
    // And again: nothing to do, nothing written.
    let written =
        |path: &str| fs::metadata(site.storage().join(path)).map(|meta| (meta.ino(), meta.mtime_nsec())).unwrap();
    let files = ["main/wals/main-xlog.db", "main/sums/0000000100000000"];
    let then = files.map(written);
    assert_eq!(carry_out(&place, &request).unwrap(), (vec![], vec![], Settled::default()));
    assert_eq!(files.map(written), then);
}

#[test]
fn deleting_250_segments_and_6_labels_of_256_segments_leaves_the_6_others() {
    let site = filled(16 * MEGABYTE, 256);
    let label = |number: u32| wal_name(&format!("{}.00000028.backup", site.name(number)));
    let [early, late] = [[0, 1, 50, 100, 248, 249], [250, 251, 252, 253, 254, 255]].map(|it| it.map(label));
    site.fill(&early);
    site.fill(&late);
    assert_eq!(delete_before(&site, &site.name(250)).len(), 256);
    let mut expected = [names(&site, 250..256), late.map(|name| name.to_string()).to_vec()].concat();
    expected.sort();
    assert_eq!(site.assert_agreement(), expected);
}

#[test]
fn an_emptied_hash_directory_goes_and_nothing_above_it() {
    let site = filled(16 * MEGABYTE, 256 * 3);
    let history = wal_name("00000002.history");
    site.fill(&[history]);
    delete_before(&site, &site.name(256 * 2));
    let expected = [names(&site, 512..768), vec![history.to_string()]].concat();
    assert_eq!(site.assert_agreement(), expected);
    // All of them.
    let unused = wal_name("000000010000000300000000");
    delete_before(&site, &unused);
    assert_eq!(site.assert_agreement(), [history.to_string()]);
    let left = ["main", "main/.staging", "main/identity.json", "main/sums", "main/sums/history", "main/wals"];
    let left = left.into_iter().chain(["main/wals/00000002.history", "main/wals/main-xlog.db"]);
    let found: BTreeSet<String> = tree(&site.storage()).into_iter().collect();
    assert!(left.map(str::to_string).all(|path| found.contains(&path)) && found.len() == 9, "{found:?}");
    // Archiving goes on where all is gone.
    archive_file(&site.archive(), &site.offer_segment(768)).unwrap();
    assert_eq!(site.assert_agreement().len(), 2);
}

#[test]
fn what_is_no_wal_file_keeps_its_directory() {
    let site = filled(MEGABYTE, 5);
    let foreign = site.stored(&site.name(1)).with_extension("gz");
    fs::write(&foreign, "somebody's").unwrap();
    let empty = site.storage().join("main/wals/0000000100000000/folder");
    fs::create_dir(&empty).unwrap();
    assert_eq!(delete_before(&site, &wal_name("000000010000000100000000")).len(), 5);
    assert!(foreign.exists() && empty.exists());
    assert!(site.catalogue().is_empty());
}

/// Timeline 3 left 2 in segment 7, which left 1 in segment 5; all have gone on since, and 4 is a sibling of 3.
fn forked() -> Site {
    let site = Site::new();
    let on = |timeline: u32, numbers: std::ops::Range<u32>| {
        numbers.map(move |number| wal_name(&format!("{timeline:08X}00000000{number:08X}")))
    };
    let mut files: Vec<WalName> =
        [on(1, 0..10), on(2, 5..12), on(3, 7..20), on(4, 6..9)].into_iter().flatten().collect();
    for more in [
        "000000010000000000000005.partial",
        "000000010000000000000004.00000028.backup",
        "000000010000000000000006.00000028.backup",
        "000000020000000000000006.00000028.backup",
        "000000020000000000000007.partial",
        "000000020000000000000009.00000028.backup",
        "000000030000000000000008.00000028.backup",
        "000000040000000000000006.00000028.backup",
        "00000005.history",
    ] {
        files.push(wal_name(more));
    }
    site.fill(&files);
    let histories = [
        ("00000002.history", "1\t0/500028\tno recovery target specified\n"),
        ("00000003.history", "1\t0/500028\tno recovery target specified\n\n2\t0/700100\tbefore transaction 7\n"),
        ("00000004.history", "1\t0/500028\tno recovery target specified\n2\t0/600100\tx\n"),
    ];
    let archive = site.archive();
    for (name, text) in histories {
        archive_file(&archive, &site.offer(&wal_name(name), text.as_bytes())).unwrap();
    }
    site
}

#[test]
fn a_fork_loses_nothing_but_what_the_bounds_own_history_took() {
    let site = forked();
    let all = site.assert_agreement();
    let gone: BTreeSet<String> = delete_before(&site, &wal_name("00000003000000000000000A")).into_iter().collect();
    let on = |timeline: u32, numbers: std::ops::Range<u32>| {
        numbers.map(move |number| format!("{timeline:08X}00000000{number:08X}"))
    };
    let mut expected: BTreeSet<String> = [on(1, 0..6), on(2, 5..8), on(3, 7..10)].into_iter().flatten().collect();
    for more in [
        "000000010000000000000005.partial",
        "000000010000000000000004.00000028.backup",
        "000000020000000000000006.00000028.backup",
        "000000020000000000000007.partial",
        "000000030000000000000008.00000028.backup",
    ] {
        expected.insert(more.to_string());
    }
    assert_eq!(gone, expected);
    let left = site.assert_agreement();
    assert_eq!(left, all.into_iter().filter(|name| !expected.contains(name)).collect::<Vec<_>>());
    assert_eq!(left.iter().filter(|name| name.ends_with(".history")).count(), 4);
}

#[test]
fn a_backup_that_the_abandoned_branch_began_in_the_forks_segment_keeps_it() {
    let site = forked();
    // Behind the switch point, which is 0x100 bytes into the segment.
    let label = wal_name("000000020000000000000007.00000180.backup");
    site.fill(&[label]);
    let gone = delete_before(&site, &wal_name("00000003000000000000000A"));
    let of_fork = |name: &&String| name.starts_with("000000020000000000000007");
    assert_eq!(gone.iter().filter(of_fork).count(), 0, "{gone:?}");
    assert_eq!(site.assert_agreement().iter().filter(of_fork).count(), 3);
    assert!(gone.contains(&"000000020000000000000006".to_string()));
}

#[test]
fn without_its_history_a_timeline_stands_alone_and_that_is_said() {
    let site = forked();
    let history = wal_name("00000003.history");
    fs::remove_file(site.stored(&history)).unwrap();
    let place = site.place();
    let request = request(&site, &wal_name("00000003000000000000000A"), &[]);
    let notices = Deletion::plan(&place, &request).unwrap().notices().to_vec();
    assert_eq!(notices.len(), 1);
    assert_eq!(notices[0].message(), "\"00000003.history\" is not in the archive: files of other timelines stay");
    let (gone, ..) = carry_out(&place, &request).unwrap();
    assert_eq!(gone.len(), 4);
    assert!(gone.iter().all(|name| name.starts_with("00000003")), "{gone:?}");
    // Where there is nothing older, there is nothing to say.
    let alone = Site::new();
    alone.fill(&[wal_name("000000030000000000000001"), wal_name("000000030000000000000002")]);
    let request = self::request(&alone, &wal_name("000000030000000000000002"), &[]);
    assert!(Deletion::plan(&alone.place(), &request).unwrap().notices().is_empty());
}

#[test]
fn a_history_that_cannot_be_understood_deletes_nothing() {
    let site = forked();
    let path = site.stored(&wal_name("00000003.history"));
    for text in [&b""[..], b"junk\n", b"3\t0/500028\tx\n", b"\x28\xB5\x2F\xFD torn"] {
        fs::write(&path, text).unwrap();
        let before = tree(&site.storage());
        let request = request(&site, &wal_name("00000003000000000000000A"), &[]);
        let error = carry_out(&site.place(), &request).unwrap_err();
        assert_eq!(error.kind(), Kind::Damaged, "{error:?}");
        assert!(error.message().contains("00000003.history"), "{error:?}");
        assert_eq!(tree(&site.storage()), before);
    }
}

#[test]
fn kept_ranges_stay() {
    let site = filled(MEGABYTE, 100);
    let keeps = [format!("{}..{}", site.name(10), site.name(12)), format!("{0}.00000028.backup..{0}", site.name(40))];
    let request = request(&site, &site.name(50), &keeps);
    let (gone, ..) = carry_out(&site.place(), &request).unwrap();
    assert_eq!(gone.len(), 46);
    let kept = names(&site, [10, 11, 12, 40].into_iter().chain(50..100));
    assert_eq!(site.assert_agreement(), kept);
}

#[test]
fn a_bound_that_no_segment_of_this_size_has_is_refused() {
    let site = filled(16 * MEGABYTE, 3);
    let error = listed(&site.place(), &request(&site, &wal_name("000000010000000000000100"), &[])).unwrap_err();
    assert_eq!(error.message(), "no WAL segment is named \"000000010000000000000100\" where segments have 16 MB");
}

#[test]
fn only_this_clusters_archive_is_touched_and_only_one_that_is_seen() {
    let mut site = filled(MEGABYTE, 3);
    let good = request(&site, &site.name(2), &[]);
    let foreign = Request { system_identifier: Some(42), ..good.clone() };
    assert_eq!(carry_out(&site.place(), &foreign).unwrap_err().kind(), Kind::Identity);
    site.unmount();
    assert_eq!(carry_out(&site.place(), &good).unwrap_err().kind(), Kind::Identity);
    site.mount();
    site.set(Setting::ServerName, "other");
    assert_eq!(carry_out(&site.place(), &good).unwrap_err().kind(), Kind::Identity);
    site.set(Setting::ServerName, "main");
    assert_eq!(site.assert_agreement().len(), 3);
}

#[test]
fn lines_that_nobody_can_read_stay_and_are_told_and_delete_nothing() {
    let site = filled(MEGABYTE, 20);
    let lines = site.catalogue_lines();
    let (one, two, fifteen) = (site.name(1), site.name(2), site.name(15));
    // Of three and four fields, as older Barmans wrote them; and broken ones, of files that go and of files that stay.
    let mut text: String = lines[..10].iter().map(|line| format!("{line}\n")).collect();
    let broken =
        format!("{one}\n\nnot a name\t1\t2.0\n{fifteen}\t1\t2.0\tNone\tNone\tmore\n00000001\t1\t2.0\tNone\tNone\n");
    text = text.replacen(&lines[2], &format!("{two}\t64\t1615159937.0"), 1) + &broken;
    text = text.replacen(&lines[3], &lines[3].replace("\tNone\tNone", "\tgzip"), 1);
    text += &lines[10..].iter().map(|line| format!("{line}\n")).collect::<String>();
    fs::write(site.catalogue_path(), &text).unwrap();

    let (gone, failed, settled) = carry_out(&site.place(), &request(&site, &site.name(10), &[])).unwrap();
    assert_eq!((gone, failed.len(), settled.lines), (names(&site, 0..10), 0, 10));
    let told = settled.broken.unwrap();
    assert!(told.message().starts_with("5 lines of the catalogue ") && told.message().ends_with("cannot be read"));
    assert!(told.detail_text().unwrap().starts_with(&format!("Line 11 is the first: \"{one}\".")), "{told:?}");
    let expected: String = broken + &lines[10..].iter().map(|line| format!("{line}\n")).collect::<String>();
    assert_eq!(fs::read_to_string(site.catalogue_path()).unwrap(), expected);
    for number in 10..20 {
        assert!(site.stored(&site.name(number)).exists());
    }
}

#[test]
fn a_run_that_was_killed_is_finished_by_the_next_and_loses_no_trace_of_what_was_lost() {
    let site = filled(MEGABYTE, 100);
    // Killed behind the removal of some files, and of all of them; and a file is lost that nobody deleted.
    for number in 0..7 {
        fs::remove_file(site.stored(&site.name(number))).unwrap();
    }
    fs::remove_file(site.stored(&site.name(80))).unwrap();
    let request = request(&site, &site.name(50), &[]);
    let (gone, _, settled) = carry_out(&site.place(), &request).unwrap();
    assert_eq!((gone.len(), settled.lines), (43, 50));
    let lines: BTreeSet<String> = site.catalogue().into_iter().collect();
    assert!(lines.contains(&site.name(80).to_string()) && lines.len() == 50);
    let sums = fs::read_to_string(site.storage().join("main/sums/0000000100000000")).unwrap();
    assert!(sums.contains(&site.name(80).to_string()) && sums.lines().count() == 50);

    let emptied = filled(MEGABYTE, 10);
    let request = self::request(&emptied, &emptied.name(10), &[]);
    let folder = emptied.storage().join("main/wals/0000000100000000");
    for number in 0..10 {
        fs::remove_file(emptied.stored(&emptied.name(number))).unwrap();
    }
    assert_eq!(carry_out(&emptied.place(), &request).unwrap().2.lines, 10);
    assert!(!folder.exists());
    assert!(emptied.assert_agreement().is_empty());
}

/// How a restore of that file ends.
fn restore_error(site: &Site, name: &WalName) -> Kind {
    let destination = site.path("restored");
    let system_identifier = Some(site.cluster.system_identifier);
    let retry_timeout = Duration::from_secs(1);
    let request = restore::Request {
        name: *name,
        destination: &destination,
        or_partial: false,
        streaming_directory: None,
        system_identifier,
        retry_timeout,
    };
    restore::restore(|| Ok(site.place()), &request).map(drop).unwrap_err().kind()
}

#[test]
fn while_a_deletion_is_unfinished_a_gap_is_no_end_of_the_archive() {
    let site = filled(MEGABYTE, 10);
    let file = site.name(3);
    fs::remove_file(site.stored(&file)).unwrap();
    assert_eq!(restore_error(&site, &file), Kind::Damaged);
    delete_before(&site, &site.name(5));
    assert_eq!(restore_error(&site, &file), Kind::NotFound);
}

#[test]
fn archiving_goes_on_while_lines_are_left_out() {
    let site = filled(MEGABYTE, 300);
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(300)).unwrap();
    let is_over = AtomicBool::new(false);
    let archived = std::thread::scope(|scope| {
        let archiving = scope.spawn(|| {
            let mut number = 301;
            while !is_over.load(Ordering::Relaxed) || number < 320 {
                archive_file(&archive, &site.offer_segment(number)).unwrap();
                number += 1;
            }
            number
        });
        for bound in (10..=290).step_by(10) {
            delete_before(&site, &site.name(bound));
        }
        is_over.store(true, Ordering::Relaxed);
        archiving.join().unwrap()
    });
    assert_eq!(site.assert_agreement(), names(&site, 290..archived));
    // A file that was deleted and is offered again is archived and recorded like any other.
    archive_file(&archive, &site.offer_segment(5)).unwrap();
    assert_eq!(site.assert_agreement().len() as u32, archived - 290 + 1);
}

/// Refuses to remove some objects.
struct Refusing {
    inner: Box<dyn Store>,
    refused: Vec<String>,
}

impl Store for Refusing {
    fn put_new(&self, key: &str, body: Body<'_>, attributes: &Attributes) -> Result<Put> {
        self.inner.put_new(key, body, attributes)
    }

    fn get(&self, key: &str) -> Result<Option<Object>> {
        self.inner.get(key)
    }

    fn head(&self, key: &str) -> Result<Option<Meta>> {
        self.inner.head(key)
    }

    fn list(&self, folder: &str, after: Option<&str>, most: usize) -> Result<Vec<Listed>> {
        self.inner.list(folder, after, most)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        match self.refused.iter().any(|name| key.ends_with(name)) {
            true => Err(Error::new(Kind::Storage, key, "could not remove file: Operation not permitted")),
            false => self.inner.delete(key),
        }
    }

    fn location(&self, key: &str) -> String {
        self.inner.location(key)
    }
}

#[test]
fn a_file_that_cannot_be_removed_keeps_its_lines_and_no_other_from_going() {
    let site = filled(MEGABYTE, 30);
    let refused = names(&site, [3, 7]);
    let mut place = site.place();
    let unopened = Box::new(Refusing { inner: site.place().store, refused: refused.clone() });
    place.store = unopened;
    let (gone, failed, settled) = carry_out(&place, &request(&site, &site.name(20), &[])).unwrap();
    assert_eq!((gone.len(), failed, settled.lines), (18, refused.clone(), 18));
    assert_eq!(site.assert_agreement(), [refused, names(&site, 20..30)].concat());
}

/// Notes who was called when, and refuses one file.
#[derive(Default)]
struct Notes {
    calls: Vec<(&'static str, Facts, bool)>,
    refuses: Option<WalName>,
}

impl Attendant for Notes {
    fn before(&mut self, file: &Facts) -> Result<()> {
        self.calls.push(("before", file.clone(), fs::exists(&file.location).unwrap()));
        match self.refuses == Some(file.name) {
            true => Err(Error::new(Kind::Interrupted, file.name.to_string(), "the script says no")),
            false => Ok(()),
        }
    }

    fn after(&mut self, file: &Facts, removed: &Result<()>) {
        assert!(removed.is_ok());
        self.calls.push(("after", file.clone(), fs::exists(&file.location).unwrap()));
    }
}

#[test]
fn an_attendant_is_called_around_each_file_and_may_end_it() {
    let site = filled(MEGABYTE, 10);
    let stored = archive_file(&site.archive(), &site.offer_segment(10)).unwrap();
    let place = site.place();
    let deletion = Deletion::plan(&place, &request(&site, &site.name(20), &[])).unwrap();
    let mut notes = Notes { refuses: Some(site.name(4)), ..Notes::default() };
    let mut gone = Vec::new();
    let mut each = |file: &Departing, outcome: &Result<()>| gone.push((file.item.to_string(), outcome.is_ok()));
    let error = deletion.carry_out(&Pulse::new(), Some(&mut notes), &mut each).unwrap_err();
    assert_eq!(error.message(), "the script says no");
    let told: Vec<_> = notes.calls.iter().map(|(call, file, is_there)| (*call, file.name, *is_there)).collect();
    let around = |number| [("before", site.name(number), true), ("after", site.name(number), false)];
    let mut expected: Vec<_> = (0..4).flat_map(around).collect();
    expected.push(("before", site.name(4), true));
    assert_eq!(told, expected);
    assert_eq!(gone, names(&site, 0..4).into_iter().map(|name| (name, true)).collect::<Vec<_>>());
    assert_eq!(site.assert_agreement().len(), 7);

    let mut notes = Notes::default();
    deletion.carry_out(&Pulse::new(), Some(&mut notes), &mut |_, _| ()).unwrap();
    let last = &notes.calls.last().unwrap().1;
    assert_eq!((last.name, last.stored_size, last.modified), (site.name(10), stored.stored_size, stored.modified));
    assert_eq!((last.format, last.location.clone()), (stored.format, stored.location));
    assert!(site.assert_agreement().is_empty());
}

#[test]
fn a_stop_ends_it_between_two_files_with_the_records_in_order() {
    let site = filled(MEGABYTE, 1500);
    let place = site.place();
    let deletion = Deletion::plan(&place, &request(&site, &site.name(1400), &[])).unwrap();
    let pulse = Pulse::new();
    let mut count = 0;
    let mut each = |_: &Departing, _: &Result<()>| {
        count += 1;
        if count == 130 {
            pulse.stop();
        }
    };
    let error = deletion.carry_out(&pulse, None, &mut each).unwrap_err();
    assert_eq!(error.kind(), Kind::Interrupted);
    assert!((130..1000).contains(&count), "{count}");
    assert_eq!(site.assert_agreement(), names(&site, count..1500));
    assert_eq!(delete_before(&site, &site.name(1400)).len() as u32, 1400 - count);
    assert_eq!(site.assert_agreement().len(), 100);
}

#[test]
fn an_archive_that_barman_wrote_is_deleted_from_as_well() {
    let site = Site::new();
    for number in 0..5 {
        site.store_as_barman(&site.name(number), &site.content(&site.name(number)));
    }
    let lines: String = (0..5).map(|number| format!("{}\t1048576\t1.0\tNone\tNone\n", site.name(number))).collect();
    fs::write(site.catalogue_path(), lines).unwrap();
    assert_eq!(delete_before(&site, &site.name(3)), names(&site, 0..3));
    assert_eq!(site.catalogue(), names(&site, 3..5));
    assert!(!site.storage().join("main/sums").exists());
}

#[test]
fn a_segment_tells_its_size_where_nobody_else_does_and_the_sums_where_it_cannot() {
    let site = filled(MEGABYTE, 20);
    site.fill(&[wal_name("00000001000000000000001E"), wal_name("000000020000000000000020")]);
    let history = site.stored(&wal_name("00000002.history"));
    fs::write(&history, "1\t0/1000028\tx\n").unwrap();
    let request = request(&site, &wal_name("000000020000000000000020"), &[]);
    // With segments of 16 MB the switch point would lie in segment 1.
    let expected = names(&site, 0..17);
    assert_eq!(listed(&site.place(), &request).unwrap(), expected);
    for number in 0..20 {
        fs::OpenOptions::new().write(true).open(site.stored(&site.name(number))).unwrap().write_all(b"sealed").unwrap();
    }
    assert_eq!(listed(&site.place(), &request).unwrap(), expected, "by the sums");
    fs::remove_dir_all(site.storage().join("main/sums")).unwrap();
    for name in ["00000001000000000000001E", "000000020000000000000020"] {
        fs::write(site.stored(&wal_name(name)), "sealed").unwrap();
    }
    let error = listed(&site.place(), &request).unwrap_err();
    assert!(error.hint_text().unwrap().contains("-D"), "{error:?}");
    let known = Request { segment_size: Some(site.cluster.segment_size), ..request };
    assert_eq!(listed(&site.place(), &known).unwrap(), expected);
}
