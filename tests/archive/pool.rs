//! The pool of threads as PostgreSQL drives it: one file asked for at a time, others done ahead.

use archiver_core::archive::{Answer, Archive, Archiver, StoredFile, WalFile};
use archiver_core::codec::{Compression, Encoder};
use archiver_core::config::Setting;
use archiver_core::error::{Error, Kind};
use archiver_tests::{PATIENCE, Site, eventually, wal_name};
use std::fs::{self, File, FileTimes, OpenOptions};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

/// The main thread of an archiver process.
pub struct Process {
    pub archiver: Archiver,
    woken: Receiver<()>,
    /// Alive as long as the archiver or one of its threads.
    alive: Weak<()>,
}

impl Process {
    pub fn new(site: &Site) -> Self {
        Process::with(site, site.archive())
    }

    pub fn with(site: &Site, archive: Archive) -> Self {
        let (waker, woken) = channel();
        let life = Arc::new(());
        let alive = Arc::downgrade(&life);
        let wake = move || {
            let _life = &life;
            let _ = waker.send(());
        };
        let mut archiver = Archiver::new(Box::new(wake), Arc::clone(&site.pulse));
        archiver.use_archive(Some(Arc::new(archive)));
        Process { archiver, woken, alive }
    }

    /// Waits as the server does: for the waker, or until the archiver wants to be asked again.
    pub fn answer(&mut self, may_retry: bool) -> Result<StoredFile, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let again_at = match self.archiver.poll(may_retry) {
                Answer::Stored(file) => return Ok(file),
                Answer::Failed(error) => return Err(error),
                Answer::Waiting(at) => at.unwrap_or(deadline).min(deadline),
            };
            assert!(Instant::now() < deadline, "no answer");
            let waited = self.woken.recv_timeout(again_at.saturating_duration_since(Instant::now()));
            assert_ne!(waited, Err(RecvTimeoutError::Disconnected));
        }
    }

    pub fn archive(&mut self, file: &WalFile) -> Result<StoredFile, Error> {
        self.archiver.ask(file)?;
        self.answer(true)
    }

    /// Waits until so many files have their line and the threads have nothing more to tell.
    fn wait_for_lines(&self, site: &Site, count: usize) {
        eventually("read-ahead is done", || {
            let is_quiet = self.woken.recv_timeout(Duration::from_millis(100)).is_err();
            is_quiet && fs::read_to_string(site.catalogue_path()).is_ok_and(|text| text.lines().count() == count)
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.archiver.stop(Instant::now());
    }
}

pub fn offered(site: &Site, numbers: std::ops::Range<u32>) -> Vec<WalFile> {
    numbers.map(|number| site.offer_segment(number)).collect()
}

fn names(files: &[WalFile]) -> Vec<String> {
    files.iter().map(|file| file.name.to_string()).collect()
}

/// PostgreSQL's part once a file was archived.
pub fn done(site: &Site, file: &WalFile) {
    let status = site.pg_wal().join("archive_status");
    fs::rename(status.join(format!("{}.ready", file.name)), status.join(format!("{}.done", file.name))).unwrap();
}

fn every_file_is_archived_in_order(workers: &str, read_ahead: &str) {
    let site = Site::new().with(Setting::Workers, workers).with(Setting::ReadAhead, read_ahead);
    let files = offered(&site, 0..40);
    let mut process = Process::new(&site);
    for file in &files {
        let stored = process.archive(file).unwrap();
        assert_eq!(stored.name, file.name);
        assert!(site.stored(&file.name).is_file(), "durable when it is answered");
        assert!(site.catalogue().contains(&file.name.to_string()), "line and all");
        assert!(process.archiver.in_flight() <= read_ahead.parse().unwrap());
        done(&site, file);
    }
    assert_eq!(site.catalogue(), names(&files));
    let totals = process.archiver.totals();
    assert_eq!((totals.archived, totals.bytes_read, totals.retries), (40, 40 << 20, 0));
    assert!(totals.percentile_ms(50).unwrap() <= totals.percentile_ms(99).unwrap());
    if read_ahead == "0" {
        assert_eq!(totals.read_ahead_hits, 0);
    }
}

#[test]
fn an_adaptive_level_is_low_while_files_wait_and_medium_when_none_does() {
    let site = Site::new().with(Setting::Workers, "1").with(Setting::CompressionLevel, "adaptive");
    let size_at = |level: &str, file: &WalFile| {
        let (plain, mut encoded) = (fs::read(&file.path).unwrap(), Vec::new());
        let level = Compression::Zstd.level(level).unwrap();
        Encoder::new(Compression::Zstd, level).unwrap().encode(&plain, &mut encoded).unwrap();
        encoded.len() as u64
    };
    let files = offered(&site, 0..10);
    let mut process = Process::new(&site);
    assert_ne!(size_at("low", &files[1]), size_at("medium", &files[1]));
    for file in &files {
        let stored = process.archive(file).unwrap();
        done(&site, file);
        // The first may be begun before the others are seen.
        if file == &files[1] {
            assert_eq!(stored.stored_size, size_at("low", file), "eight wait");
        }
    }
    let last = site.offer_segment(10);
    assert_eq!(process.archive(&last).unwrap().stored_size, size_at("medium", &last), "none waits");
}

#[test]
fn one_worker_archives_in_postgresqls_order() {
    every_file_is_archived_in_order("1", "16");
}

#[test]
fn many_workers_archive_in_postgresqls_order() {
    every_file_is_archived_in_order("8", "16");
}

#[test]
fn without_reading_ahead_one_file_is_done_at_a_time() {
    every_file_is_archived_in_order("4", "0");
}

#[test]
fn reading_ahead_by_one_file_works() {
    every_file_is_archived_in_order("2", "1");
}

#[test]
fn without_reading_ahead_no_other_file_is_touched() {
    let site = Site::new().with(Setting::ReadAhead, "0");
    let files = offered(&site, 0..4);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    assert_eq!(site.catalogue(), names(&files[..1]));
    assert!(!site.stored(&files[1].name).exists());
    assert_eq!(process.archiver.in_flight(), 0);
}

#[test]
fn a_file_done_ahead_is_answered_at_once() {
    let site = Site::new().with(Setting::ReadAhead, "5");
    let files = offered(&site, 0..8);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    process.wait_for_lines(&site, 6);
    assert_eq!(process.archiver.in_flight(), 5);
    assert!(!site.stored(&files[6].name).exists(), "no further than it was told to");
    process.archiver.ask(&files[1]).unwrap();
    let Answer::Stored(stored) = process.archiver.poll(true) else { panic!("not at once") };
    assert_eq!(stored.name, files[1].name);
    assert_eq!(process.archiver.totals().read_ahead_hits, 1);
    assert_eq!(process.archiver.totals().archived, 2, "what was not asked for is not counted");
}

#[test]
fn a_history_file_that_appears_meanwhile_goes_first() {
    let site = Site::new();
    let files = offered(&site, 0..4);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    let history = site.offer(&wal_name("00000002.history"), b"1\t0/300000\tno recovery target specified\n");
    process.archive(&history).unwrap();
    for file in &files[1..] {
        process.archive(file).unwrap();
    }
    assert_eq!(site.catalogue().len(), 5);
}

#[test]
fn a_file_re_created_after_it_was_done_ahead_is_not_taken_for_the_old_one() {
    let site = Site::new().with(Setting::ReadAhead, "2");
    let files = offered(&site, 0..3);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    process.wait_for_lines(&site, 3);
    let mut other = site.content(&files[1].name);
    other[500_000] ^= 1;
    fs::remove_file(&files[1].path).unwrap();
    site.offer(&files[1].name, &other);
    assert_eq!(process.archive(&files[1]).unwrap_err().kind(), Kind::Conflict);
    fs::remove_file(&files[2].path).unwrap();
    assert_eq!(process.archive(&files[2]).unwrap_err().kind(), Kind::Source, "it is not there any more");
}

#[test]
fn a_file_re_created_with_the_same_content_is_success_but_no_hit() {
    let site = Site::new().with(Setting::ReadAhead, "1");
    let files = offered(&site, 0..2);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    process.wait_for_lines(&site, 2);
    fs::remove_file(&files[1].path).unwrap();
    site.offer_segment(1);
    assert!(!process.archive(&files[1]).unwrap().created);
    assert_eq!(process.archiver.totals().read_ahead_hits, 0);
    assert_eq!(site.catalogue(), names(&files));
}

#[test]
fn nothing_done_for_the_old_archive_is_answered_for_the_new_one() {
    let mut site = Site::new();
    let files = offered(&site, 0..6);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    process.wait_for_lines(&site, 6);
    // A file is asked for, and the configuration changes before the answer.
    process.archiver.ask(&files[1]).unwrap();
    fs::rename(site.storage(), site.path("old")).unwrap();
    fs::create_dir(site.storage()).unwrap();
    site.set(Setting::Storage, &format!("file://{}/", site.storage().display()));
    fs::remove_file(site.path("data/archiver.established")).unwrap();
    process.archiver.use_archive(Some(Arc::new(site.archive())));
    assert!(matches!(process.archiver.poll(true), Answer::Failed(_)), "the question is void");
    assert_eq!(process.archiver.in_flight(), 0);
    for file in &files[1..] {
        assert!(process.archive(file).unwrap().created);
    }
    assert_eq!(site.catalogue(), names(&files[1..]));
    assert!(files[1..].iter().all(|file| site.stored(&file.name).is_file()));
}

#[test]
fn changes_of_configuration_at_any_moment_lose_nothing() {
    let mut site = Site::new().with(Setting::Workers, "4");
    let files = offered(&site, 0..24);
    let mut process = Process::new(&site);
    for (number, file) in files.iter().enumerate() {
        for compression in ["none", "zstd"].repeat(1 + number % 3) {
            process.archiver.ask(file).unwrap();
            process.archiver.poll(true);
            site.set(Setting::Compression, compression);
            site.set(Setting::Workers, ["1", "4"][number % 2]);
            process.archiver.use_archive(Some(Arc::new(site.archive())));
        }
        process.archive(file).unwrap();
        done(&site, file);
    }
    let mut lines = site.catalogue();
    lines.sort();
    assert_eq!(lines, names(&files));
}

#[test]
fn a_bad_file_is_silent_until_it_is_asked_for() {
    let site = Site::new();
    let files = offered(&site, 0..6);
    OpenOptions::new().write(true).open(&files[3].path).unwrap().set_len(4711).unwrap();
    let mut process = Process::new(&site);
    for file in &files[..3] {
        process.archive(file).unwrap();
    }
    for _ in 0..3 {
        let error = process.archive(&files[3]).unwrap_err();
        assert_eq!(error.kind(), Kind::Source);
    }
    fs::remove_file(&files[3].path).unwrap();
    site.offer_segment(3);
    for file in &files[3..] {
        process.archive(file).unwrap();
    }
    let mut lines = site.catalogue();
    lines.sort();
    assert_eq!(lines, names(&files), "the worker survived, and nothing is missing");
}

#[test]
fn what_fails_for_a_file_done_ahead_is_not_told_of_the_one_asked_for() {
    // Which files share a group is the threads' business: some round has the good one together with the bad one.
    for round in 0..10 {
        let site = Site::new().with(Setting::Workers, "3");
        // The last segments of one directory, and the first of the next, whose sums cannot be written.
        let mut process = Process::new(&site);
        process.archive(&site.offer_segment(4093)).unwrap();
        let files = offered(&site, 4094..4097);
        fs::create_dir_all(site.storage().join("main/sums/0000000100000001")).unwrap();
        while process.woken.recv_timeout(Duration::from_millis(20)).is_ok() {}
        // While the lock is held, one thread waits for it, and the two others leave what they stored to it.
        let lock = File::open(site.storage().join(".main-xlogdb.lock")).unwrap();
        lock.lock().unwrap();
        process.archiver.ask(&files[0]).unwrap();
        for _ in 0..2 {
            process.woken.recv_timeout(PATIENCE).unwrap();
        }
        process.archiver.ask(&files[1]).unwrap();
        lock.unlock().unwrap();
        process.answer(true).unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert!(process.archive(&files[2]).is_err());
    }
}

#[test]
fn reading_ahead_goes_on_after_an_outage() {
    let site = Site::new().with(Setting::ReadAhead, "8");
    let files = offered(&site, 0..30);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    process.wait_for_lines(&site, 9);
    site.unmount();
    for file in &files[1..9] {
        process.archive(file).unwrap();
    }
    for _ in 0..3 {
        assert_eq!(process.archive(&files[9]).unwrap_err().kind(), Kind::Identity);
    }
    eventually("all that is ahead has failed", || process.archiver.in_flight() == 0);
    site.mount();
    // The one that PostgreSQL waits for gets through alone; the next brings the whole window again.
    process.archive(&files[9]).unwrap();
    process.archive(&files[10]).unwrap();
    process.wait_for_lines(&site, 19);
}

#[test]
fn a_failure_that_may_pass_is_tried_again_with_pauses() {
    let site = Site::with_segments_of(16 << 20).with(Setting::ReadAhead, "0");
    let file = site.offer_segment(1);
    let mut process = Process::new(&site);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Somebody keeps changing the file while it is read.
        scope.spawn(|| {
            let opened = OpenOptions::new().write(true).open(&file.path).unwrap();
            let mut nanoseconds = 0;
            while !is_over.load(Ordering::Relaxed) {
                nanoseconds += 1;
                let modified = SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
                opened.set_times(FileTimes::new().set_modified(modified)).unwrap();
            }
        });
        process.archiver.ask(&file).unwrap();
        eventually("it is tried again", || {
            let answer = process.archiver.poll(true);
            assert!(matches!(answer, Answer::Waiting(_)), "{answer:?}");
            process.archiver.totals().retries >= 2
        });
        is_over.store(true, Ordering::Relaxed);
        process.answer(true).unwrap();
    });
    assert_eq!(site.catalogue().len(), 1);
}

#[test]
fn where_no_retry_is_wanted_the_failure_is_told_at_once() {
    let site = Site::new();
    let file = site.offer_segment(1);
    fs::write(site.storage().join("main"), "in the way").unwrap();
    let mut process = Process::new(&site);
    process.archiver.ask(&file).unwrap();
    assert_eq!(process.answer(false).unwrap_err().kind(), Kind::Storage);
    assert_eq!(process.archiver.totals().retries, 0);
    fs::remove_file(site.storage().join("main")).unwrap();
    process.archive(&file).unwrap();
}

#[test]
fn an_archive_that_vanishes_and_comes_back_is_used_again() {
    let site = Site::new().with(Setting::ReadAhead, "0");
    let files = offered(&site, 0..3);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    site.unmount();
    assert_eq!(process.archive(&files[1]).unwrap_err().kind(), Kind::Identity);
    assert!(archiver_tests::tree(&site.storage()).is_empty());
    site.mount();
    process.archive(&files[1]).unwrap();
    process.archive(&files[2]).unwrap();
    assert_eq!(site.catalogue(), names(&files));
}

/// A named pipe that nobody writes to: whoever opens it hangs, as in a dead network file system.
struct Hang<'a>(&'a Path);

impl<'a> Hang<'a> {
    fn new(path: &'a Path) -> Self {
        nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        Hang(path)
    }
}

impl Drop for Hang<'_> {
    fn drop(&mut self) {
        // Lets go whoever hangs, and whoever comes later.
        let _ = OpenOptions::new().read(true).write(true).open(self.0).map(|pipe| {
            let _ = fs::remove_file(self.0);
            drop(pipe);
        });
    }
}

#[test]
fn a_worker_that_hangs_in_a_dead_archive_does_not_keep_the_next_one_waiting() {
    let mut site = Site::new().with(Setting::Workers, "1");
    let file = site.offer_segment(1);
    let pipe = site.stored(&file.name);
    fs::create_dir_all(pipe.parent().unwrap()).unwrap();
    let hang = Hang::new(&pipe);
    let mut process = Process::new(&site);
    process.archiver.ask(&file).unwrap();
    eventually("the worker is on its way", || site.storage().join("main/identity.json").exists());
    // The administrator gives another place.
    let other = site.path("other");
    fs::create_dir(&other).unwrap();
    site.set(Setting::Storage, &format!("file://{}", other.display()));
    process.archiver.use_archive(Some(Arc::new(site.archive())));
    process.archiver.ask(&file).unwrap();
    let deadline = Instant::now() + Duration::from_secs(3);
    let is_stored = loop {
        match process.archiver.poll(true) {
            Answer::Stored(_) => break true,
            Answer::Failed(error) => panic!("{error}"),
            Answer::Waiting(_) if Instant::now() > deadline => break false,
            Answer::Waiting(_) => drop(process.woken.recv_timeout(Duration::from_millis(20))),
        }
    };
    drop(hang);
    assert!(is_stored, "the only worker hangs in the old archive");
}

#[test]
fn a_stop_ends_all_threads_quickly_whatever_they_do() {
    let site = Site::with_segments_of(16 << 20).with(Setting::Workers, "4");
    let files = offered(&site, 0..8);
    let mut process = Process::new(&site);
    process.archiver.ask(&files[0]).unwrap();
    let alive = process.alive.clone();
    let started = Instant::now();
    assert!(process.archiver.stop(started + Duration::from_secs(10)), "all have ended");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    drop(process);
    eventually("no thread is left", || alive.strong_count() == 0);
    // What was begun is nowhere to be seen, or whole.
    for file in files.iter().filter(|file| site.stored(&file.name).exists()) {
        assert!(!archiver_tests::archive_file(&fresh(&site), file).unwrap().created);
    }
    assert_eq!(fs::read_dir(site.storage().join("main/.staging")).map_or(0, Iterator::count), 0);
}

/// The site's archive under a pulse that was not stopped.
fn fresh(site: &Site) -> Archive {
    Archive::new(site.config(), site.cluster, None, Arc::default()).unwrap()
}

#[test]
fn a_stop_does_not_wait_for_a_thread_that_hangs() {
    let site = Site::new().with(Setting::Workers, "1");
    let file = WalFile { name: site.name(1), path: site.pg_wal().join("pipe") };
    let hang = Hang::new(&file.path);
    let mut process = Process::new(&site);
    process.archiver.ask(&file).unwrap();
    eventually("the archive is begun", || site.storage().join("main/identity.json").exists());
    let started = Instant::now();
    process.archiver.stop(started + Duration::from_millis(200));
    assert!(started.elapsed() < Duration::from_secs(2));
    drop(hang);
}

#[test]
fn idle_threads_stop_at_once() {
    let site = Site::new().with(Setting::Workers, "8");
    let mut process = Process::new(&site);
    process.archive(&site.offer_segment(1)).unwrap();
    assert!(process.archiver.stop(Instant::now() + Duration::from_secs(5)));
}

#[test]
fn a_question_after_the_stop_is_answered_and_not_left_open() {
    let site = Site::new();
    let mut process = Process::new(&site);
    process.archive(&site.offer_segment(1)).unwrap();
    assert!(process.archiver.stop(Instant::now() + Duration::from_secs(5)));
    let asked = process.archiver.ask(&site.offer_segment(2));
    let is_answered = asked.is_err() || matches!(process.archiver.poll(true), Answer::Failed(_));
    assert!(is_answered, "nobody is there to do it, and nobody says so");
}

#[test]
fn fewer_workers_than_before_do_the_same_work() {
    let mut site = Site::new().with(Setting::Workers, "6");
    let files = offered(&site, 0..12);
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    site.set(Setting::Workers, "1");
    process.archiver.use_archive(Some(Arc::new(site.archive())));
    for file in &files[1..] {
        process.archive(file).unwrap();
    }
    assert_eq!(site.catalogue().len(), 12);
}

#[test]
fn threads_of_the_pool_block_every_signal() {
    let site = Site::new().with(Setting::Workers, "3");
    let mut process = Process::new(&site);
    process.archive(&site.offer_segment(1)).unwrap();
    let see_workers = || {
        let mut seen = 0;
        for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
            // One of another test may end meanwhile.
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { continue };
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim().to_string();
            if !field("Name:").starts_with("archiver ") {
                continue;
            }
            let blocked = u64::from_str_radix(&field("SigBlk:"), 16).unwrap();
            // All but SIGKILL, SIGSTOP and the two that the C library keeps for itself.
            let blockable = !(1_u64 << 8 | 1 << 18 | 0b11 << 31);
            assert_eq!(blocked & blockable, blockable, "{status}");
            seen += 1;
        }
        seen
    };
    // Each takes its name once it runs.
    eventually("three workers run", || see_workers() >= 3);
    let mine = fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(mine.contains("SigBlk:\t0000000000000000"), "the asking thread keeps its own mask: {mine}");
}

#[test]
fn a_question_without_an_archive_is_an_error() {
    let mut archiver = Archiver::new(Box::new(|| {}), Arc::default());
    let site = Site::new();
    assert_eq!(archiver.ask(&site.offer_segment(1)).unwrap_err().kind(), Kind::Internal);
    assert!(matches!(archiver.poll(true), Answer::Failed(_)));
}

#[test]
fn a_segment_left_over_from_the_old_timeline_is_archived_after_the_promotion() {
    let site = Site::new();
    let history = site.offer(&wal_name("00000002.history"), b"1\t0/300000\tno recovery target specified\n");
    let of_new_timeline: Vec<WalFile> = ["000000020000000000000003", "000000020000000000000004"]
        .map(wal_name)
        .iter()
        .map(|name| site.offer(name, &site.content(name)))
        .collect();
    let mut process = Process::new(&site);
    for file in std::iter::once(&history).chain(&of_new_timeline) {
        process.archive(file).unwrap();
        done(&site, file);
    }
    let left_over = site.offer_segment(2);
    let stored = process.archive(&left_over).unwrap();
    assert!(stored.created && site.stored(&left_over.name).is_file());
    assert!(site.catalogue().contains(&left_over.name.to_string()));
}

#[test]
fn a_hundred_thousand_waiting_files_do_not_make_a_call_slow() {
    const WAITING: u32 = 100_000;
    const ASKED: u32 = 400;
    let site = Site::new();
    let status = site.pg_wal().join("archive_status");
    for number in 0..WAITING {
        File::create(status.join(format!("{}.ready", site.name(number)))).unwrap();
    }
    let files = offered(&site, 0..ASKED);
    let mut process = Process::new(&site);
    let started = Instant::now();
    for file in &files {
        process.archive(file).unwrap();
        done(&site, file);
    }
    // To look through the directory once for each of them would take that long alone.
    let scan = Instant::now();
    assert_eq!(fs::read_dir(&status).unwrap().count(), WAITING as usize);
    let scan = scan.elapsed();
    println!("{ASKED} files took {:?}, one look through the directory {scan:?}", started.elapsed());
    assert!(started.elapsed() < PATIENCE.max(scan * ASKED / 4));
}
