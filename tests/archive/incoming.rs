//! Queues of files from outside the server: what becomes of a source that others touch meanwhile.

use archiver_core::config::Setting;
use archiver_core::incoming::{Outcome, Queue};
use archiver_tests::{Site, tree};
use std::fs::{self, File};
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
