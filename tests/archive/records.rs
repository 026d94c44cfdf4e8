//! The catalogue and the sums: exactly one line a file, whatever happens in between.

use archiver_core::catalogue::{Catalogue, Entry, NewLine};
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::durable;
use archiver_core::mode::Mode;
use archiver_core::owner::Owner;
use archiver_core::pulse::Pulse;
use archiver_tests::{Site, archive_file, eventually};
use std::fs::{self, File, FileTimes, OpenOptions};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

#[test]
fn a_line_is_what_barman_would_have_written() {
    for (compression, word) in [("zstd", "zstd"), ("none", "None")] {
        let site = Site::new().with(Setting::Compression, compression);
        let file = site.offer_segment(7);
        let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_615_159_937_463_971_400);
        File::open(&file.path).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
        let stored = archive_file(&site.archive(), &file).unwrap();
        let expected = format!("{}\t{}\t1615159937.4639714\t{word}\tNone", file.name, stored.stored_size);
        assert_eq!(site.catalogue_lines(), [expected]);
        let copy = fs::metadata(site.stored(&file.name)).unwrap();
        assert_eq!((copy.len(), copy.modified().unwrap()), (stored.stored_size, modified));
    }
}

#[test]
fn a_sum_tells_the_plain_content() {
    let site = Site::new();
    let file = site.offer_segment(7);
    let stored = archive_file(&site.archive(), &file).unwrap();
    let hash = blake3::hash(&site.content(&file.name)).to_hex();
    let expected = format!("{} 1048576 blake3:{hash} {}\n", file.name, stored.stored_size);
    assert_eq!(fs::read_to_string(site.storage().join("main/sums/0000000100000000")).unwrap(), expected);
}

#[test]
fn a_crash_between_storing_and_recording_is_healed() {
    let site = Site::new();
    let files = [1, 2].map(|number| site.offer_segment(number));
    for file in &files {
        site.archive().store(file).unwrap();
    }
    assert!(site.catalogue().is_empty());
    let archive = site.archive();
    for file in &files {
        assert!(!archive_file(&archive, file).unwrap().created);
    }
    archive_file(&site.archive(), &files[0]).unwrap();
    assert_eq!(site.catalogue(), files.each_ref().map(|file| file.name.to_string()));
    let sums = fs::read_to_string(site.storage().join("main/sums/0000000100000000")).unwrap();
    assert_eq!(sums.lines().count(), 2, "{sums}");
}

#[test]
fn a_file_recorded_twice_has_one_line() {
    let site = Site::new();
    let archive = site.archive();
    let stored = archive.store(&site.offer_segment(1)).unwrap();
    archive.record(&[stored.clone(), stored.clone()]).unwrap();
    archive.record(&[stored]).unwrap();
    assert_eq!(site.catalogue().len(), 1);
}

#[test]
fn two_archivers_of_one_archive_write_one_line_a_file() {
    let site = Site::new();
    let files: Vec<_> = (0..20).map(|number| site.offer_segment(number)).collect();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let archive = site.archive();
                files.iter().for_each(|file| drop(archive_file(&archive, file).unwrap()));
            });
        }
    });
    let mut names = site.catalogue();
    names.sort();
    assert_eq!(names, files.iter().map(|file| file.name.to_string()).collect::<Vec<_>>());
}

#[test]
fn a_line_torn_by_a_crash_is_cut_and_written_again() {
    let site = Site::new();
    let files = [1, 2, 3].map(|number| site.offer_segment(number));
    files[..2].iter().for_each(|file| drop(archive_file(&site.archive(), file).unwrap()));
    let whole = fs::read(site.catalogue_path()).unwrap();
    fs::write(site.catalogue_path(), &whole[..whole.len() - 9]).unwrap();
    let archive = site.archive();
    archive_file(&archive, &files[2]).unwrap();
    archive_file(&archive, &files[1]).unwrap();
    let mut names = site.catalogue();
    names.sort();
    assert_eq!(names, files.each_ref().map(|file| file.name.to_string()));
}

#[test]
fn a_catalogue_whose_end_a_power_loss_filled_with_zeros_is_mended() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    // A group of lines whose length became durable before their bytes did.
    OpenOptions::new().append(true).open(site.catalogue_path()).unwrap().write_all(&[0; 8192]).unwrap();
    archive_file(&site.archive(), &site.offer_segment(2)).unwrap();
    assert_eq!(site.catalogue(), [1, 2].map(|number| site.name(number).to_string()));
}

#[test]
fn a_line_that_could_not_be_written_is_not_believed_to_be_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("main-xlog.db");
    let lock = directory.path().join(".main-xlogdb.lock");
    let catalogue = Catalogue::new(path.clone(), lock, Mode::PRIVATE, Arc::new(Pulse::new()));
    let site = Site::new();
    let line = |number, created| {
        let modified = SystemTime::UNIX_EPOCH;
        let entry = Entry { name: site.name(number), stored_size: 1, modified, format: Compression::None.into() };
        NewLine { entry, created }
    };
    catalogue.record(&[line(1, true)]).unwrap();
    // An end that makes appending fail (whatever else may: a passing I/O error) …
    fs::write(&path, [fs::read(&path).unwrap(), vec![b'x'; 8192]].concat()).unwrap();
    if catalogue.record(&[line(2, true)]).is_err() {
        // … until somebody mends it.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"\n").unwrap();
        catalogue.record(&[line(2, false)]).unwrap();
    }
    let text = fs::read_to_string(&path).unwrap();
    let lines = text.lines().filter(|text| text.starts_with(&site.name(2).to_string())).count();
    assert_eq!(lines, 1, "{} bytes", text.len());
}

#[test]
fn a_lock_held_by_barman_delays_the_line_and_loses_none() {
    let site = Site::new();
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    let lock = File::open(site.storage().join(".main-xlogdb.lock")).unwrap();
    lock.lock().unwrap();
    let file = site.offer_segment(2);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| archive_file(&archive, &file));
        eventually("the file is stored", || site.stored(&file.name).exists());
        // Its sum does not wait: it tells what was stored, should there never be a line.
        let sums = site.storage().join("main/sums/0000000100000000");
        eventually("its sum is noted", || fs::read_to_string(&sums).unwrap().lines().count() == 2);
        assert!(!waiting.is_finished());
        assert_eq!(site.catalogue().len(), 1);
        lock.unlock().unwrap();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(site.catalogue().len(), 2);
}

#[test]
fn everything_created_has_the_mode_of_the_url_whatever_the_umask() {
    // Stays for the whole process: PostgreSQL's own, and no test here needs another.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let mut site = Site::new();
    site.set(Setting::Storage, &format!("file://{}?mode=0660", site.storage().display()));
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let is_odd = |path: &String| {
        let meta = fs::metadata(site.storage().join(path)).unwrap();
        meta.mode() & 0o777 != if meta.is_dir() { 0o770 } else { 0o660 }
    };
    let paths = fs::read_dir(site.storage()).unwrap().count();
    assert_eq!(paths, 2, "the cluster's folder and the lock");
    let odd: Vec<String> = archiver_tests::tree(&site.storage()).into_iter().filter(is_odd).collect();
    assert!(odd.is_empty(), "{odd:?}");
}

#[test]
fn leftovers_of_dead_archivers_are_swept_when_an_archive_is_opened() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let me = Owner::current().unique_name();
    let host = me.split('.').next().unwrap();
    let staging = site.storage().join("main/.staging");
    let dead = staging.join(format!("{host}.4194305.1.0"));
    for path in [&dead, &staging.join(&me)] {
        fs::write(path, "x").unwrap();
    }
    archive_file(&site.archive(), &site.offer_segment(2)).unwrap();
    assert!(!dead.exists());
    assert!(staging.join(&me).exists(), "the living are left alone");
}

#[test]
fn another_hosts_file_in_the_making_is_left_alone_however_old_its_wal_is() {
    let directory = tempfile::tempdir().unwrap();
    // A staged file carries the time of the WAL file it is made from: here two days, in a backlog.
    let staged = directory.path().join("elsewhere.1.1.1");
    fs::write(&staged, "x").unwrap();
    let modified = SystemTime::now() - Duration::from_secs(2 * 86_400);
    File::open(&staged).unwrap().set_times(FileTimes::new().set_modified(modified)).unwrap();
    durable::sweep_leftovers(directory.path(), "").unwrap();
    assert!(staged.exists());
}
