//! Queues of files from outside the server: what becomes of a source that others touch meanwhile.

use archiver_core::config::Setting;
use archiver_core::crypt::Encryption;
use archiver_core::incoming::{Outcome, Queue};
use archiver_core::set_aside::{self, SetAside};
use archiver_tests::gpg::Gpg;
use archiver_tests::{Site, tree};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A directory with that many segments, from number 1 on.
fn incoming(site: &Site, count: u32) -> PathBuf {
    let directory = site.path("incoming");
    fs::create_dir(&directory).unwrap();
    for number in 1..=count {
        let name = site.name(number);
        fs::write(directory.join(name.to_string()), site.content(&name)).unwrap();
    }
    directory
}

fn outcomes(site: &Site, queue: &Queue, mut meanwhile: impl FnMut(&Path)) -> Vec<Outcome> {
    let mut all = Vec::new();
    let mut each = |path: &Path, outcome| {
        meanwhile(path);
        all.push(outcome);
    };
    queue.archive(&site.archive(), &mut each).unwrap();
    all
}

#[test]
fn a_file_that_somebody_else_took_is_skipped() {
    let site = Site::new();
    let directory = incoming(&site, 2);
    for queue in [Queue::of_directory(&directory).unwrap().keep_sources(), Queue::of_directory(&directory).unwrap()] {
        let _ = fs::remove_file(directory.join(site.name(1).to_string()));
        let all = outcomes(&site, &queue, |_| {});
        assert!(matches!(all[..], [Outcome::Skipped(_), Outcome::Archived | Outcome::AlreadyArchived]), "{all:?}");
    }
    assert!(tree(&directory).is_empty());
}

#[test]
fn files_of_a_directory_that_was_unmounted_are_not_taken_for_taken() {
    let site = Site::new();
    let directory = incoming(&site, 1);
    let queue = Queue::of_directory(&directory).unwrap();
    fs::rename(&directory, site.path("unmounted")).unwrap();
    fs::create_dir(&directory).unwrap();
    let all = outcomes(&site, &queue, |_| {});
    assert!(matches!(all[..], [Outcome::Failed(_)]), "{all:?}");
}

#[test]
fn a_link_and_a_pipe_in_place_of_a_file_are_not_opened() {
    let site = Site::new();
    let directory = incoming(&site, 2);
    let queue = Queue::of_directory(&directory).unwrap();
    let [first, second] = [1, 2].map(|number| directory.join(site.name(number).to_string()));
    fs::rename(&first, site.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(site.path("elsewhere"), &first).unwrap();
    fs::remove_file(&second).unwrap();
    nix::unistd::mkfifo(&second, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let all = outcomes(&site, &queue, |_| {});
    assert!(matches!(all[..], [Outcome::Failed(_), Outcome::Failed(_)]), "{all:?}");
    assert!(site.path("elsewhere").exists() && second.exists());
}

#[test]
fn a_source_that_was_replaced_meanwhile_stays() {
    let site = Site::new();
    let directory = incoming(&site, 2);
    let queue = Queue::of_directory(&directory).unwrap();
    let second = directory.join(site.name(2).to_string());
    // Both are read and stored before the first is told of and the second removed.
    let all = outcomes(&site, &queue, |path| {
        if *path != second {
            fs::remove_file(&second).unwrap();
            fs::write(&second, "another file").unwrap();
        }
    });
    assert!(matches!(all[..], [Outcome::Archived, Outcome::NotRemoved(_)]), "{all:?}");
    assert_eq!(fs::read(&second).unwrap(), b"another file");
    assert_eq!(site.catalogue().len(), 2);
}

/// What lies in the archive's folder of errors.
fn set_aside_files(site: &Site) -> Vec<SetAside> {
    set_aside::list(&site.place()).unwrap()
}

fn set_refused_aside(site: &Site, directory: &Path) -> Vec<Outcome> {
    let (archive, mut all) = (site.archive(), Vec::new());
    let put = |path: &Path, reason| archive.set_aside(path, reason);
    Queue::of_directory(directory).unwrap().set_refused_aside(Some(&put), &mut |_, outcome| all.push(outcome)).unwrap();
    all
}

#[test]
fn files_of_any_name_are_set_aside_and_none_replaces_another() {
    let site = Site::new();
    let directory = incoming(&site, 0);
    let long = "l".repeat(255);
    let names = ["dots.and spaces?", "line\nbreak", "\u{1b}[31m", &long, "é%2F", "#"].map(OsString::from).to_vec();
    let names = [names, vec![OsString::from_vec(vec![b'b', 0xFF])]].concat();
    for content in ["one", "two"] {
        names.iter().for_each(|name| fs::write(directory.join(name), content).unwrap());
        let all = set_refused_aside(&site, &directory);
        assert!(all.iter().all(|it| matches!(it, Outcome::SetAside { .. })), "{all:?}");
        assert!(tree(&directory).is_empty());
    }
    let files = set_aside_files(&site);
    assert_eq!(files.len(), 2 * names.len());
    let mut kept: Vec<&str> = files.iter().map(|file| file.name.as_str()).collect();
    kept.sort_unstable();
    kept.dedup();
    assert_eq!(kept, ["#", "_[31m", "b_", "dots.and spaces?", "line_break", &long[..200], "é%2F"]);
    for file in &files {
        assert!(file.reason == "unknown" && file.set_aside_at().is_some(), "{file:?}");
    }
    let contents: Vec<String> = files.iter().map(|file| fs::read_to_string(&file.location).unwrap()).collect();
    assert_eq!(contents.iter().filter(|content| *content == "one").count(), names.len());
    assert_eq!(set_aside::summary(&files).as_deref(), Some("unknown: 14"));
}

#[test]
fn what_is_set_aside_of_an_encrypted_archive_is_encrypted() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let keys = gpg.public_keys(&["reader"], true);
    let site = Site::new()
        .with(Setting::Encryption, "openpgp")
        .with(Setting::EncryptionRecipients, keys.to_str().expect("UTF-8"));
    let directory = incoming(&site, 1);
    assert_eq!(outcomes(&site, &Queue::of_directory(&directory).unwrap(), |_| {}), [Outcome::Archived]);
    let name = site.name(1);
    let mut other = site.content(&name);
    other[5000] ^= 1;
    fs::write(directory.join(name.to_string()), &other).unwrap();
    fs::write(directory.join("notes"), "secret notes").unwrap();
    let all = outcomes(&site, &Queue::of_directory(&directory).unwrap(), |_| {});
    assert!(matches!(all[..], [Outcome::SetAside { .. }]), "{all:?}");
    assert!(matches!(set_refused_aside(&site, &directory)[..], [Outcome::SetAside { .. }]));
    let files = set_aside_files(&site);
    let contents: Vec<Vec<u8>> = files.iter().map(|file| gpg.decrypt(Path::new(&file.location), "")).collect();
    assert_eq!(files.iter().map(|file| file.reason.as_str()).collect::<Vec<_>>(), ["duplicate", "unknown"]);
    assert!(contents[0] == other && contents[1] == b"secret notes");
    for file in &files {
        assert_eq!(Encryption::detect(&fs::read(&file.location).unwrap()), Encryption::OpenPgp);
    }
}

#[test]
fn what_was_replaced_while_it_was_set_aside_stays() {
    let site = Site::new();
    let directory = incoming(&site, 1);
    outcomes(&site, &Queue::of_directory(&directory).unwrap(), |_| {});
    let junk = directory.join("junk");
    fs::write(&junk, "x").unwrap();
    let archive = site.archive();
    let put = |path: &Path, reason| {
        let copied = archive.set_aside(path, reason)?;
        fs::remove_file(path).unwrap();
        fs::write(path, "another").unwrap();
        Ok(copied)
    };
    let mut all = Vec::new();
    let queue = Queue::of_directory(&directory).unwrap();
    queue.set_refused_aside(Some(&put), &mut |_, outcome| all.push(outcome)).unwrap();
    assert!(
        matches!(&all[..], [Outcome::Failed(error)] if error.hint_text().unwrap().contains("has changed")),
        "{all:?}"
    );
    assert_eq!(fs::read_to_string(&junk).unwrap(), "another");
}

#[test]
fn a_failure_that_passes_is_waited_out() {
    let site = Site::new().with(Setting::RetryTimeout, "20s");
    let directory = incoming(&site, 1);
    fs::rename(site.storage(), site.path("away")).unwrap();
    // A missing mount does not pass by itself: no waiting.
    let started = Instant::now();
    let queue = Queue::of_directory(&directory).unwrap();
    assert!(matches!(outcomes(&site, &queue, |_| {})[..], [Outcome::Failed(_)]));
    assert!(started.elapsed() < Duration::from_secs(10));
    fs::rename(site.path("away"), site.storage()).unwrap();

    let lock = File::create(site.storage().join(".main-xlogdb.lock")).unwrap();
    lock.lock().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            lock.unlock().unwrap();
        });
        assert_eq!(outcomes(&site, &queue, |_| {}), [Outcome::Archived]);
    });
    assert!(tree(&directory).is_empty());
}
