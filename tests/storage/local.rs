//! The store in a directory: the battery, and what only a file system can do to it.

use super::contract::battery;
use archiver_core::error::Kind;
use archiver_core::mode::Mode;
use archiver_core::pulse::Pulse;
use archiver_core::store::{Attributes, Body, LocalStore, Put, Store};
use archiver_tests::{tree, wal_like};
use std::cell::Cell;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Barrier};
use std::time::SystemTime;
use tempfile::TempDir;

battery!({
    let directory = tempfile::tempdir().unwrap();
    let store: Box<dyn Store> = Box::new(open(directory.path()));
    (directory, store)
});

fn open(root: &Path) -> LocalStore {
    LocalStore::open(root, "main/.staging", Mode::PRIVATE, Arc::default()).unwrap()
}

fn fixture() -> (TempDir, LocalStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    (directory, store)
}

fn attributes() -> Attributes {
    Attributes { modified: SystemTime::now(), content: None }
}

fn put(store: &LocalStore, key: &str, content: &[u8]) -> archiver_core::Result<Put> {
    store.put_new(key, Body::Bytes(content), &attributes())
}

#[test]
fn a_missing_storage_directory_is_not_made() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("mount/point");
    let error = LocalStore::open(&missing, "main/.staging", Mode::PRIVATE, Arc::default()).unwrap_err();
    assert_eq!(error.kind(), Kind::Storage);
    assert!(error.hint_text().is_some_and(|hint| hint.contains("must exist")), "{error:?}");
    assert!(tree(directory.path()).is_empty());
    fs::write(directory.path().join("file"), "").unwrap();
    let file = directory.path().join("file");
    assert!(LocalStore::open(&file, "main/.staging", Mode::PRIVATE, Arc::default()).is_err());
}

/// Tells, when it is let go of, whether the object stands already.
struct Lent<'a> {
    object: &'a Path,
    stood: &'a Cell<Option<bool>>,
}

impl AsRef<[u8]> for Lent<'_> {
    fn as_ref(&self) -> &[u8] {
        b"content"
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.stood.set(Some(self.object.exists()));
    }
}

#[test]
fn a_lent_body_is_given_back_before_the_object_stands() {
    let (_directory, store) = fixture();
    let (object, stood) = (store.path("main/wals/x"), Cell::new(None));
    let put =
        |stood| store.put_new("main/wals/x", Body::Lent(Box::new(Lent { object: &object, stood })), &attributes());
    assert_eq!(put(&stood).unwrap(), Put::Created { stored_size: 7 });
    assert_eq!(stood.take(), Some(false));
    assert_eq!(put(&stood).unwrap(), Put::AlreadyExists);
    assert_eq!(stood.take(), Some(true));
    assert_eq!(fs::read(&object).unwrap(), b"content");
}

#[test]
fn opening_and_reading_change_nothing() {
    let (directory, store) = fixture();
    store.get("a/b").unwrap();
    store.head("a/b").unwrap();
    store.list("a", None, 10).unwrap();
    store.delete("a/b").unwrap();
    assert!(tree(directory.path()).is_empty());
}

#[test]
fn an_object_is_one_file_under_its_key_and_nothing_stays_staged() {
    let (directory, store) = fixture();
    put(&store, "main/wals/x", b"content").unwrap();
    put(&store, "main/wals/x", b"other").unwrap();
    let failing = &mut |_: &mut dyn Write| Err(std::io::Error::other("no more"));
    store.put_new("main/wals/y", Body::Stream(failing), &attributes()).unwrap_err();
    assert_eq!(tree(directory.path()), ["main", "main/.staging", "main/wals", "main/wals/x"]);
    assert_eq!(fs::metadata(store.path("main/wals/x")).unwrap().nlink(), 1);
}

#[test]
fn what_is_created_has_the_mode_whatever_the_umask() {
    // Stays for the whole process: PostgreSQL's own, and no test here needs another.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    let directory = tempfile::tempdir().unwrap();
    let mode = Mode::new(0o660).unwrap();
    let store = LocalStore::open(directory.path(), "main/.staging", mode, Arc::default()).unwrap();
    put(&store, "main/wals/0/x", b"content").unwrap();
    for (key, mode) in [
        ("main", 0o770),
        ("main/wals", 0o770),
        ("main/wals/0", 0o770),
        ("main/.staging", 0o770),
        ("main/wals/0/x", 0o660),
    ] {
        assert_eq!(fs::metadata(store.path(key)).unwrap().mode() & 0o777, mode, "{key}");
    }
}

#[test]
fn a_directory_that_somebody_removed_is_made_again() {
    let (_directory, store) = fixture();
    put(&store, "main/wals/0/x", b"x").unwrap();
    fs::remove_dir_all(store.path("main/wals/0")).unwrap();
    assert_eq!(put(&store, "main/wals/0/y", b"y").unwrap(), Put::Created { stored_size: 1 });
    fs::remove_dir_all(store.path("main/.staging")).unwrap();
    assert_eq!(put(&store, "main/wals/0/z", b"z").unwrap(), Put::Created { stored_size: 1 });
    fs::remove_dir_all(store.path("main")).unwrap();
    assert_eq!(put(&store, "main/wals/0/x", b"x").unwrap(), Put::Created { stored_size: 1 });
}

#[test]
fn a_directory_removed_while_the_body_is_written_is_made_again_for_what_was_written() {
    let (_directory, store) = fixture();
    put(&store, "main/wals/0/older", b"x").unwrap();
    let mut calls = 0;
    let body = &mut |out: &mut dyn Write| {
        calls += 1;
        fs::remove_dir_all(store.path("main/wals/0")).unwrap();
        out.write_all(b"body")
    };
    let put = store.put_new("main/wals/0/x", Body::Stream(body), &attributes()).unwrap();
    assert_eq!(put, Put::Created { stored_size: 4 });
    assert_eq!(fs::read(store.path("main/wals/0/x")).unwrap(), b"body");
    assert_eq!(calls, 1);
}

#[test]
fn a_directory_removed_under_many_writers_fails_none_of_them() {
    const WRITERS: usize = 8;
    let (_directory, store) = fixture();
    for round in 0..40 {
        put(&store, &format!("main/wals/0/{round}"), b"x").unwrap();
        let barrier = Barrier::new(WRITERS);
        std::thread::scope(|scope| {
            for number in 0..WRITERS {
                let (store, barrier) = (&store, &barrier);
                scope.spawn(move || {
                    // All have staged their body when the directory goes.
                    let body = &mut |out: &mut dyn Write| {
                        if barrier.wait().is_leader() {
                            fs::remove_dir_all(store.path("main/wals/0")).unwrap();
                        }
                        barrier.wait();
                        out.write_all(b"body")
                    };
                    let key = format!("main/wals/0/{round}-{number}");
                    let put = store.put_new(&key, Body::Stream(body), &attributes());
                    assert_eq!(put, Ok(Put::Created { stored_size: 4 }), "round {round}");
                });
            }
        });
    }
}

#[test]
fn a_file_where_a_directory_should_be_is_an_error_and_not_an_absence() {
    let (directory, store) = fixture();
    fs::write(directory.path().join("main"), "in the way").unwrap();
    assert_eq!(put(&store, "main/wals/x", b"x").unwrap_err().kind(), Kind::Storage);
    assert_eq!(store.get("main/wals/x").map(|found| found.is_some()).unwrap_err().kind(), Kind::Storage);
    assert_eq!(store.head("main/wals/x").unwrap_err().kind(), Kind::Storage);
    assert_eq!(store.list("main/wals", None, 10).unwrap_err().kind(), Kind::Storage);
    assert_eq!(tree(directory.path()), ["main"]);
}

#[test]
fn a_link_that_leads_nowhere_is_never_overwritten() {
    let (directory, store) = fixture();
    put(&store, "a/b", b"x").unwrap();
    symlink(directory.path().join("nowhere"), store.path("a/c")).unwrap();
    assert!(put(&store, "a/c", b"x").is_err());
    assert!(!directory.path().join("nowhere").exists());
    assert!(store.path("a/c").is_symlink());
}

#[test]
fn a_stop_ends_a_put_without_a_trace() {
    let directory = tempfile::tempdir().unwrap();
    let pulse = Arc::new(Pulse::new());
    let store = LocalStore::open(directory.path(), "main/.staging", Mode::PRIVATE, Arc::clone(&pulse)).unwrap();
    let body = &mut |out: &mut dyn Write| {
        out.write_all(b"begun")?;
        pulse.stop();
        out.write_all(b"and more")
    };
    store.put_new("a/b", Body::Stream(body), &attributes()).unwrap_err();
    assert_eq!(tree(directory.path()), ["a", "main", "main/.staging"]);
}

#[test]
fn a_put_beats_while_it_writes() {
    let directory = tempfile::tempdir().unwrap();
    let pulse = Arc::new(Pulse::new());
    let store = LocalStore::open(directory.path(), "main/.staging", Mode::PRIVATE, Arc::clone(&pulse)).unwrap();
    put(&store, "a/b", &wal_like(8 << 20, 1)).unwrap();
    assert!(pulse.beats() >= 8, "{}", pulse.beats());
}

#[test]
fn a_link_to_a_directory_is_followed_in_listings_as_it_is_in_reading() {
    let (directory, store) = fixture();
    put(&store, "main/wals/0/x", b"x").unwrap();
    // As an administrator does who moves old WAL to another disk.
    fs::rename(store.path("main/wals/0"), directory.path().join("elsewhere")).unwrap();
    symlink(directory.path().join("elsewhere"), store.path("main/wals/0")).unwrap();
    assert!(store.get("main/wals/0/x").unwrap().is_some());
    assert_eq!(store.list("main/wals", None, 10).unwrap().len(), 1);
}

/// A file system of one megabyte, for as long as this lives.
struct SmallDisk(TempDir);

impl SmallDisk {
    /// Nothing where mounting is not allowed.
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(directory.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(SmallDisk(directory)),
            other => {
                println!("skipped, no file system could be mounted: {other:?}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_told_and_leaves_no_trace() {
    let Some(disk) = SmallDisk::mount() else { return };
    let store = open(disk.0.path());
    let error = put(&store, "a/big", &wal_like(2 << 20, 1)).unwrap_err();
    assert_eq!(error.kind(), Kind::Storage);
    assert!(error.message().ends_with("No space left on device"), "{error}");
    assert_eq!(tree(disk.0.path()), ["a", "main", "main/.staging"]);
    assert_eq!(put(&store, "a/big", b"small").unwrap(), Put::Created { stored_size: 5 });
}
