//! Catalogue and sums made anew from what is stored.

use archiver_core::archive::Archive;
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::{Error, Kind};
use archiver_core::hash::Hash;
use archiver_core::listing::Range;
use archiver_core::pulse::Pulse;
use archiver_core::rebuild::{Rebuilt, rebuild};
use archiver_core::verify::State;
use archiver_core::wal::WalName;
use archiver_tests::gpg::Gpg;
use archiver_tests::harm::{change, flip_bit, judged, remove, verdicts};
use archiver_tests::{Site, archive_file, compressed, eventually, tree, wal_name};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

fn rebuilt(site: &Site) -> Rebuilt {
    rebuild(&site.place(), Some(site.cluster.system_identifier), &Pulse::new())
        .unwrap_or_else(|error| panic!("{error}"))
}

fn refused(site: &Site, system_identifier: Option<u64>) -> Error {
    rebuild(&site.place(), system_identifier, &Pulse::new()).unwrap_err()
}

fn sums_path(site: &Site) -> PathBuf {
    site.storage().join("main/sums/0000000100000000")
}

fn sums(site: &Site) -> Vec<String> {
    fs::read_to_string(sums_path(site)).unwrap().lines().map(str::to_string).collect()
}

fn archived(compression: &str, files: u32) -> Site {
    let site = Site::new().with(Setting::Compression, compression);
    let archive = site.archive();
    (1..=files).for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
    site
}

#[test]
fn records_that_are_right_stay_as_they_are() {
    let site = archived("zstd", 5);
    let before = (site.catalogue_lines(), sums(&site));
    let done = rebuilt(&site);
    assert_eq!((done.files, done.notes.len()), (5, 0));
    let changes =
        [done.lines_added, done.lines_changed, done.lines_dropped, done.sums_made, done.sums_dropped, done.unread];
    assert_eq!(changes, [0; 6]);
    assert_eq!((site.catalogue_lines(), sums(&site)), before);
    assert_eq!(fs::metadata(site.catalogue_path()).unwrap().mode() & 0o777, 0o600);
    let left: Vec<String> = tree(&site.storage()).into_iter().filter(|path| path.contains(".staging/")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn without_any_record_all_of_them_come_back() {
    for compression in Compression::ALL {
        let site = archived(compression.name(), 3);
        let archive = site.archive();
        for (name, content) in [
            (
                wal_name("000000010000000000000002.00000028.backup"),
                b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\n".to_vec(),
            ),
            (wal_name("000000010000000000000004.partial"), site.content(&site.name(4))),
            (wal_name("00000002.history"), b"1\t0/400028\tx\n".to_vec()),
        ] {
            archive_file(&archive, &site.offer(&name, &content)).unwrap();
        }
        let (mut lines, mut before) = (site.catalogue_lines(), sums(&site));
        fs::remove_file(site.catalogue_path()).unwrap();
        fs::remove_dir_all(site.storage().join("main/sums")).unwrap();
        let done = rebuilt(&site);
        assert_eq!((done.files, done.lines_added, done.sums_made, done.unread), (6, 6, 6, 0), "{:?}", done.notes);
        let mut after = sums(&site);
        for lines in [&mut lines, &mut before, &mut after] {
            lines.sort();
        }
        assert_eq!(after, before);
        // In order of their keys, where no older order is known.
        assert_eq!(site.catalogue_lines(), lines, "{}", compression.name());
        assert_eq!(judged(&verdicts(&site.place(), Range::default()), State::Ok).len(), 6);
    }
}

#[test]
fn what_barman_archived_gets_sums_and_lines() {
    let site = Site::new();
    for number in 1..4 {
        let name = site.name(number);
        site.store_as_barman(&name, &compressed(Compression::Gzip, &site.content(&name)));
    }
    let done = rebuilt(&site);
    assert_eq!((done.files, done.lines_added, done.sums_made), (3, 3, 3));
    assert!(site.catalogue_lines().iter().all(|line| line.ends_with("\tgzip\tNone")));
    assert_eq!(judged(&verdicts(&site.place(), Range::default()), State::Ok).len(), 3);
}

#[test]
fn lines_keep_their_order_and_what_is_wrong_with_them_is_told() {
    let site = archived("zstd", 6);
    let lines = site.catalogue_lines();
    let older = lines[1].rsplit_once('\t').unwrap().0;
    let wrong = lines[3].replace("\tzstd\t", "\tgzip\t");
    let lost = lines[2].replace(&site.name(3).to_string(), &site.name(33).to_string());
    let text = [&lines[4], "junk", &lines[0], &lost, older, &lines[4], &wrong, "0000000100"].join("\n");
    fs::write(site.catalogue_path(), text).unwrap();
    let done = rebuilt(&site);
    let expected = [4, 0, 1, 3, 2, 5].map(|at| lines[at].clone());
    assert_eq!(site.catalogue_lines(), expected);
    assert_eq!((done.files, done.lines_added, done.lines_changed, done.lines_dropped), (6, 2, 3, 3));
    let notes: Vec<&str> = done.notes.iter().map(Error::message).collect();
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(notes[0].starts_with(&format!("the catalogue named \"{}\", and ", site.name(33))), "{notes:?}");
    assert!(notes[1].starts_with("line 2 of the catalogue ") && notes[1].ends_with(": \"junk\""), "{notes:?}");
    assert!(notes[2].starts_with("line 8 of the catalogue "), "{notes:?}");
}

#[test]
fn sums_that_fit_stay_and_others_are_made_anew() {
    let site = archived("none", 6);
    let lines = sums(&site);
    // Of a file that is yet to be stored; right; of what was stored before; twice, the last of which counts; torn; of
    // nothing.
    let announced = format!(
        "{} {}",
        lines[0].replace(&site.name(1).to_string(), &site.name(77).to_string()),
        Hash(blake3::hash(b"x"))
    );
    let stale = format!("{}7", lines[1]);
    let outdated = lines[2].replace(" 1048576 blake3:", " 1048577 blake3:");
    let lost = lines[5].replace(&site.name(6).to_string(), &site.name(66).to_string());
    let text = [&announced, &lines[0], &stale, &outdated, &lines[2], &lines[3][..40], &lost, &lines[4]];
    fs::write(sums_path(&site), text.join("\n") + "\n").unwrap();
    let done = rebuilt(&site);
    let expected = [&announced, &lines[0], &lines[1], &lines[2], &lines[4], &lines[3], &lines[5]].map(String::clone);
    assert_eq!(sums(&site), expected);
    assert_eq!((done.sums_made, done.sums_dropped, done.unread), (3, 2, 0));
}

#[test]
fn what_is_encrypted_gets_its_sum_by_what_was_announced_or_by_the_keys() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let site = Site::new().encrypting(&gpg, "reader");
    let archive = site.archive();
    (1..=3).for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
    let (catalogue, lines) = (site.catalogue_lines(), sums(&site));
    assert_eq!(lines.len(), 6, "each announced before and noted after: {lines:?}");
    let noted = |lines: Vec<String>| {
        let mut noted: Vec<String> = lines.into_iter().filter(|line| line.split(' ').count() == 4).collect();
        noted.sort();
        noted
    };
    let announced: String =
        lines.iter().filter(|line| line.split(' ').count() == 5).map(|line| format!("{line}\n")).collect();
    fs::write(sums_path(&site), announced).unwrap();
    let done = rebuilt(&site);
    assert_eq!((done.sums_made, done.unread, done.lines_changed), (3, 0, 0), "{:?}", done.notes);
    assert_eq!((noted(sums(&site)), site.catalogue_lines()), (noted(lines.clone()), catalogue.clone()));
    let is_known_again = || {
        // As a server has it: without the keys.
        let mut server = site.archive().config().clone();
        server.destination.decryption_keys = None;
        let archive = Archive::new(server, site.cluster, None, Arc::clone(&site.pulse)).unwrap();
        (1..=3).all(|number| !archive_file(&archive, &site.offer_segment(number)).unwrap().created)
    };
    assert!(is_known_again());
    // Without that it takes the keys.
    fs::remove_file(sums_path(&site)).unwrap();
    let done = rebuilt(&site);
    assert_eq!((done.sums_made, done.unread), (3, 0), "{:?}", done.notes);
    assert_eq!(noted(sums(&site)), noted(lines));
    assert!(is_known_again());
    assert_eq!(judged(&verdicts(&site.place(), Range::default()), State::Ok).len(), 3);
}

#[test]
fn damage_never_gets_a_sum_that_says_it_is_good() {
    let site = archived("none", 5);
    let [flipped, cut, odd] = [2, 3, 4].map(|number| site.name(number));
    change(&site.place(), &flipped, |bytes| flip_bit(bytes, 7));
    change(&site.place(), &cut, |bytes| bytes.truncate(5000));
    change(&site.place(), &odd, |bytes| bytes[8192] ^= 1);
    let lines = sums(&site);
    // Nothing is known of the last any more.
    fs::write(sums_path(&site), [&lines[0], &lines[1], &lines[2], &lines[4]].map(|line| format!("{line}\n")).concat())
        .unwrap();
    let done = rebuilt(&site);
    assert_eq!((done.unread, done.sums_made, done.files), (2, 0, 5), "{:?}", done.notes);
    assert!(done.notes.iter().any(|note| note.message().contains(&cut.to_string())), "{:?}", done.notes);
    let found = verdicts(&site.place(), Range::default());
    assert_eq!(judged(&found, State::Damaged), [flipped, cut, odd].into());
}

#[test]
fn an_archiver_at_work_goes_on_and_loses_no_line() {
    const FILES: u32 = 200;
    let site = archived("none", 3);
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(4)).unwrap();
    let is_over = AtomicBool::new(false);
    let rebuilds = std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 5..=FILES {
                archive_file(&archive, &site.offer_segment(number)).unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
        });
        let mut rebuilds = 0;
        while !is_over.load(Ordering::Relaxed) {
            let done = rebuilt(&site);
            assert_eq!((done.lines_dropped, done.sums_dropped, done.unread), (0, 0, 0), "{:?}", done.notes);
            rebuilds += 1;
        }
        rebuilds
    });
    println!("{rebuilds} times made anew meanwhile");
    let names = || (1..=FILES).map(|number| site.name(number)).collect::<Vec<WalName>>();
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let expected: Vec<String> = names().iter().map(ToString::to_string).collect();
    assert_eq!(sorted(site.catalogue()), expected);
    let noted = |line: &String| line.split(' ').next().unwrap().to_string();
    assert_eq!(sorted(sums(&site).iter().map(noted).collect()), expected);
    // What is offered again has its line already.
    archive_file(&archive, &site.offer_segment(7)).unwrap();
    assert_eq!(site.catalogue().len(), FILES as usize);
}

#[test]
fn a_lock_held_by_barman_delays_it_and_a_stop_ends_it() {
    let site = archived("zstd", 2);
    let before = fs::read(site.catalogue_path()).unwrap();
    let lock = File::open(site.storage().join(".main-xlogdb.lock")).unwrap();
    lock.lock().unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| rebuild(&site.place(), None, &site.pulse));
        eventually("it works", || site.pulse.beats() > 3);
        site.pulse.stop();
        assert!(waiting.join().unwrap().is_err());
    });
    assert_eq!(fs::read(site.catalogue_path()).unwrap(), before);
}

#[test]
fn no_archive_is_not_made_one() {
    let site = Site::new();
    assert_eq!(refused(&site, None).kind(), Kind::Identity);
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    assert_eq!(refused(&site, Some(42)).kind(), Kind::Identity);
    site.unmount();
    assert_eq!(refused(&site, None).kind(), Kind::Identity);
    assert!(tree(&site.storage()).is_empty());
    site.mount();
    let lost = site.name(1);
    remove(&site.place(), &lost);
    let done = rebuilt(&site);
    assert_eq!((done.files, done.lines_dropped, done.sums_dropped), (0, 1, 1));
    assert!(site.catalogue().is_empty() && !sums_path(&site).exists());
}
