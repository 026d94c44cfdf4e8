//! The way back: whole and right, or not at all; and "not found" only where the archive itself was seen.

use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::{Error, Kind};
use archiver_core::owner::Owner;
use archiver_core::place::Place;
use archiver_core::restore::{Request, Restored, restore};
use archiver_core::store::{Attributes, Body, Listed, Meta, Object, Put, Store};
use archiver_core::wal::WalName;
use archiver_tests::{Site, archive_file, compressed, tree, wal_like, wal_name};
use std::fs;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn destination(site: &Site) -> PathBuf {
    site.pg_wal().join("RECOVERYXLOG")
}

fn ask_place(site: &Site, place: &Place, name: &WalName, or_partial: bool) -> Result<Restored, Error> {
    let restored = restore_from(site, place, name, or_partial);
    let leftovers = tree(&site.pg_wal()).into_iter().filter(|path| path.starts_with("archiver.restore.")).count();
    assert_eq!(leftovers, 0);
    restored
}

fn restore_from(site: &Site, place: &Place, name: &WalName, or_partial: bool) -> Result<Restored, Error> {
    let request = Request {
        name: *name,
        destination: &destination(site),
        or_partial,
        streaming_directory: None,
        system_identifier: Some(site.cluster.system_identifier),
        retry_timeout: Duration::from_secs(2),
    };
    restore(|| Ok(place), &request)
}

fn ask(site: &Site, name: &WalName) -> Result<Restored, Error> {
    ask_place(site, &site.place(), name, false)
}

/// Asks where the destination holds a file already, which must stay as it is when the answer is a failure.
fn refused(site: &Site, name: &WalName) -> Error {
    fs::write(destination(site), "untouched").unwrap();
    let error = ask(site, name).unwrap_err();
    assert_eq!(fs::read_to_string(destination(site)).unwrap(), "untouched", "{error}");
    error
}

/// Archives and damages one segment, and answers why it is not restored.
fn refused_after(compression: &str, damage: impl FnOnce(&mut Vec<u8>)) -> Error {
    let site = Site::new().with(Setting::Compression, compression);
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let mut copy = fs::read(site.stored(&file.name)).unwrap();
    damage(&mut copy);
    fs::write(site.stored(&file.name), &copy).unwrap();
    refused(&site, &file.name)
}

#[test]
fn what_was_archived_comes_back_byte_for_byte() {
    for compression in ["none", "zstd"] {
        let site = Site::new().with(Setting::Compression, compression);
        let partial = wal_name("000000010000000000000003.partial");
        let files = [
            site.offer_segment(3),
            site.offer(&partial, &site.content(&partial)),
            site.offer(&wal_name("000000010000000000000003.00000028.backup"), b"START WAL LOCATION: 0/300028\n"),
            site.offer(&wal_name("00000002.history"), b"1\t0/300000\tno recovery target specified\n"),
        ];
        for file in &files {
            archive_file(&site.archive(), file).unwrap();
            let restored = ask(&site, &file.name).unwrap();
            assert_eq!(restored.name, file.name);
            let content = fs::read(&file.path).unwrap();
            assert_eq!(restored.size, content.len() as u64);
            assert!(fs::read(destination(&site)).unwrap() == content);
        }
    }
}

#[test]
fn what_is_not_archived_yet_comes_from_where_it_is_received() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let old = wal_name("000000010000000000000003.partial");
    let mut ended = site.content(&old);
    ended[200_000..].fill(0);
    archive_file(&site.archive(), &site.offer(&old, &ended)).unwrap();
    let streaming = site.path("streaming");
    fs::create_dir(&streaming).unwrap();
    let ask = |number: u32, or_partial| {
        let request = Request {
            name: site.name(number),
            destination: &destination(&site),
            or_partial,
            streaming_directory: Some((&streaming, true)),
            system_identifier: Some(site.cluster.system_identifier),
            retry_timeout: Duration::from_millis(100),
        };
        restore(|| Ok(site.place()), &request)
    };
    let receive = |name: &str, content: &[u8]| fs::write(streaming.join(name), content).unwrap();
    let [second, third, fourth] = [2, 3, 4].map(|number| site.name(number));
    // What is archived is taken from there, whatever else lies about.
    receive(&site.name(1).to_string(), b"junk");
    assert!(ask(1, false).unwrap().location.starts_with(site.storage().to_str().unwrap()));
    receive(&second.to_string(), &site.content(&second));
    assert_eq!(ask(2, false).unwrap().location, streaming.join(second.to_string()).display().to_string());
    assert!(fs::read(destination(&site)).unwrap() == site.content(&second));

    // A part only where it will do, and then before a shorter one that is archived.
    let mut part = site.content(&third);
    part[300_000..].fill(0);
    receive(&format!("{third}.partial"), &part);
    assert_eq!(ask(3, false).unwrap_err().kind(), Kind::NotFound);
    let restored = ask(3, true).unwrap();
    assert_eq!((restored.name, restored.location.starts_with(streaming.to_str().unwrap())), (old, true));
    assert!(fs::read(destination(&site)).unwrap() == part);

    // Nothing was received of these; of the third only what is archived.
    for nothing in [&b""[..], &[0; 1 << 20]] {
        receive(&format!("{fourth}.partial"), nothing);
        assert_eq!(ask(4, true).unwrap_err().kind(), Kind::NotFound);
        receive(&format!("{third}.partial"), nothing);
        assert!(ask(3, true).unwrap().location.starts_with(site.storage().to_str().unwrap()));
    }
    // Of another cluster, or cut short: no answer that ends a recovery.
    let mut other = Site::new();
    other.cluster.system_identifier = 42;
    receive(&fourth.to_string(), &other.content(&fourth));
    assert_eq!(ask(4, false).unwrap_err().kind(), Kind::Identity);
    receive(&fourth.to_string(), &site.content(&fourth)[..5000]);
    assert_eq!(ask(4, false).unwrap_err().kind(), Kind::Damaged);
    receive(&fourth.to_string(), &[0; 1 << 20]);
    assert_eq!(ask(4, false).unwrap_err().kind(), Kind::Damaged, "only a part may be empty");
    fs::rename(&streaming, site.path("away")).unwrap();
    assert_ne!(ask(5, false).unwrap_err().kind(), Kind::NotFound, "it is not mounted");
    fs::rename(site.path("away"), &streaming).unwrap();
    assert_eq!(ask(5, false).unwrap_err().kind(), Kind::NotFound);
    fs::remove_file(streaming.join(fourth.to_string())).unwrap();
    fs::create_dir(streaming.join(fourth.to_string())).unwrap();
    assert_ne!(ask(4, false).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn an_existing_destination_is_replaced() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    fs::write(destination(&site), wal_like(5 << 20, 1)).unwrap();
    ask(&site, &file.name).unwrap();
    assert!(fs::read(destination(&site)).unwrap() == site.content(&file.name));
}

#[test]
fn a_segment_of_another_size_than_the_default_comes_back_too() {
    let site = Site::with_segments_of(64 << 20).with(Setting::MemoryLimit, "16MB");
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    ask(&site, &file.name).unwrap();
    assert!(fs::read(destination(&site)).unwrap() == site.content(&file.name));
}

#[test]
fn what_barman_stored_comes_back() {
    for stored_as in Compression::ALL {
        let site = Site::new();
        let name = site.name(1);
        let content = site.content(&name);
        let stored = if stored_as == Compression::None { content.clone() } else { compressed(stored_as, &content) };
        site.store_as_barman(&name, &stored);
        ask(&site, &name).unwrap();
        assert!(fs::read(destination(&site)).unwrap() == content);
    }
}

#[test]
fn a_damaged_copy_is_never_put_in_place() {
    let other = Site::new();
    for (what, error) in [
        ("a flipped bit, compressed", refused_after("zstd", |copy| copy[5_000] ^= 1)),
        ("a flipped bit, plain", refused_after("none", |copy| copy[500_000] ^= 1)),
        ("cut, compressed", refused_after("zstd", |copy| copy.truncate(copy.len() / 2))),
        ("cut, plain", refused_after("none", |copy| copy.truncate(copy.len() / 2))),
        ("empty", refused_after("zstd", Vec::clear)),
        ("zeros", refused_after("none", |copy| copy.fill(0))),
        ("longer, plain", refused_after("none", |copy| copy.push(0))),
        ("a second frame", refused_after("zstd", |copy| copy.extend(compressed(Compression::Zstd, b"more")))),
        ("another segment", refused_after("none", |copy| *copy = other.content(&other.name(2)))),
        ("compressed twice", refused_after("zstd", |copy| *copy = compressed(Compression::Zstd, copy))),
        ("a bomb", refused_after("zstd", |copy| *copy = compressed(Compression::Zstd, &vec![0; 64 << 20]))),
    ] {
        assert_eq!(error.kind(), Kind::Damaged, "{what}: {error}");
        assert!(!error.is_worth_retrying(), "{what}");
    }
}

#[test]
fn a_damaged_history_is_never_put_in_place() {
    let name = wal_name("00000002.history");
    let history = b"1\t0/300000\tno recovery target specified\n";
    let damages: [fn(&mut Vec<u8>); 3] =
        [|copy| copy.truncate(3), |copy| copy[3] ^= 1, |copy| copy.extend_from_slice(b"and more\n")];
    for damage in damages {
        let site = Site::new().with(Setting::Compression, "none");
        archive_file(&site.archive(), &site.offer(&name, history)).unwrap();
        let mut copy = fs::read(site.stored(&name)).unwrap();
        damage(&mut copy);
        fs::write(site.stored(&name), &copy).unwrap();
        let error = refused(&site, &name);
        assert_eq!(error.kind(), Kind::Damaged, "{error}");
    }
}

#[test]
fn a_bomb_does_not_fill_the_data_directory_before_it_is_refused() {
    let bomb = compressed(Compression::Zstd, &vec![0; 300 << 20]);
    let site = Site::new();
    site.store_as_barman(&wal_name("00000002.history"), &bomb);
    let segment = site.name(1);
    site.store_as_barman(
        &segment,
        &compressed(Compression::Zstd, &{
            let mut content = site.content(&segment);
            content.resize(300 << 20, 0);
            content
        }),
    );
    for name in [wal_name("00000002.history"), segment] {
        let (is_over, mut largest) = (AtomicBool::new(false), 0);
        let outcome = std::thread::scope(|scope| {
            let restoring = scope.spawn(|| {
                let outcome = restore_from(&site, &site.place(), &name, false);
                is_over.store(true, Ordering::Relaxed);
                outcome
            });
            while !is_over.load(Ordering::Relaxed) {
                let files = fs::read_dir(site.pg_wal()).unwrap().flatten();
                let sizes = files.filter_map(|file| file.metadata().ok()).map(|meta| meta.len());
                largest = sizes.max().unwrap_or(0).max(largest);
            }
            restoring.join().unwrap()
        });
        let kind = outcome.map_err(|error| error.kind());
        assert_eq!(kind.map(|restored| restored.size), Err(Kind::Damaged), "{name}");
        assert!(largest <= 16 << 20, "{name}: {largest} bytes were written to pg_wal");
    }
}

#[test]
fn another_clusters_segment_is_never_put_in_place() {
    let site = Site::new();
    let name = site.name(1);
    let mut other = Site::new();
    other.cluster.system_identifier = 42;
    site.store_as_barman(&name, &other.content(&name));
    assert_eq!(refused(&site, &name).kind(), Kind::Identity);
}

#[test]
fn a_file_missing_in_an_archive_that_was_seen_is_not_found() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    for name in [site.name(2), wal_name("00000002.history"), wal_name("000000010000000000000001.00000028.backup")] {
        let error = refused(&site, &name);
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.message().contains(&name.to_string()), "{error}");
    }
}

#[test]
fn a_file_missing_in_an_archive_of_barmans_is_not_found() {
    let site = Site::new();
    site.store_as_barman(&site.name(1), &site.content(&site.name(1)));
    assert_eq!(refused(&site, &site.name(2)).kind(), Kind::NotFound);
}

#[test]
fn what_is_no_archive_is_never_answered_with_not_found() {
    type Change = fn(&Site);
    let changes: [(&str, Change); 9] = [
        ("an empty directory", |site| site.unmount()),
        ("a removed directory", |site| fs::remove_dir_all(site.storage()).unwrap()),
        ("an empty cluster folder", |site| {
            site.unmount();
            fs::create_dir_all(site.storage().join("main/wals/0000000100000000")).unwrap();
        }),
        ("a catalogue and no WAL", |site| {
            site.unmount();
            fs::create_dir_all(site.storage().join("main/wals")).unwrap();
            fs::write(site.catalogue_path(), "").unwrap();
        }),
        ("another server's archive beside", |site| {
            fs::rename(site.storage().join("main"), site.storage().join("other")).unwrap();
        }),
        ("a file where the cluster's folder should be", |site| {
            site.unmount();
            fs::write(site.storage().join("main"), "").unwrap();
        }),
        ("a file where wals should be", |site| {
            fs::remove_dir_all(site.storage().join("main/wals")).unwrap();
            fs::write(site.storage().join("main/wals"), "").unwrap();
        }),
        ("another cluster's identity", |site| {
            let identity = "{\"systemid\": \"42\", \"version\": \"15\"}";
            fs::write(site.storage().join("main/identity.json"), identity).unwrap();
        }),
        ("an identity that cannot be read", |site| {
            fs::write(site.storage().join("main/identity.json"), "").unwrap();
        }),
    ];
    for (what, change) in changes {
        let site = Site::new();
        archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
        change(&site);
        let kind = match Place::open(&site.config().destination, &site.pulse) {
            Ok(place) => ask_place(&site, &place, &site.name(2), true).unwrap_err().kind(),
            Err(error) => error.kind(),
        };
        assert!(matches!(kind, Kind::Identity | Kind::Storage), "{what}: {kind:?}");
    }
}

#[test]
fn wals_that_lead_nowhere_are_never_answered_with_not_found() {
    // wals/ on a file system of its own, linked to, which is not mounted.
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    fs::rename(site.storage().join("main/wals"), site.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(site.path("elsewhere"), site.storage().join("main/wals")).unwrap();
    ask(&site, &site.name(1)).unwrap();
    fs::rename(site.path("elsewhere"), site.path("unmounted")).unwrap();
    assert_ne!(refused(&site, &site.name(1)).kind(), Kind::NotFound);
}

#[test]
fn a_partial_file_does_where_the_whole_is_not_there() {
    let site = Site::new();
    let partial = wal_name("000000010000000000000003.partial");
    archive_file(&site.archive(), &site.offer(&partial, &site.content(&partial))).unwrap();
    let whole = site.name(3);
    assert_eq!(refused(&site, &whole).kind(), Kind::NotFound, "only where it was asked for");
    let restored = ask_place(&site, &site.place(), &whole, true).unwrap();
    assert_eq!(restored.name, partial);
    assert!(fs::read(destination(&site)).unwrap() == site.content(&partial));

    archive_file(&site.archive(), &site.offer_segment(3)).unwrap();
    assert_eq!(ask_place(&site, &site.place(), &whole, true).unwrap().name, whole, "the whole one wins");
    let history = wal_name("00000002.history");
    assert_eq!(ask_place(&site, &site.place(), &history, true).unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn a_damaged_segment_is_not_covered_up_by_its_partial() {
    let site = Site::new();
    let partial = wal_name("000000010000000000000003.partial");
    archive_file(&site.archive(), &site.offer(&partial, &site.content(&partial))).unwrap();
    archive_file(&site.archive(), &site.offer_segment(3)).unwrap();
    fs::write(site.stored(&site.name(3)), "damaged").unwrap();
    assert_eq!(ask_place(&site, &site.place(), &site.name(3), true).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn leftovers_of_killed_restores_are_swept() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let me = Owner::current().unique_name();
    let host = me.split('.').next().unwrap();
    let dead = site.pg_wal().join(format!("archiver.restore.{host}.4194305.1.0"));
    let foreign = site.pg_wal().join(format!("somebody.{host}.4194305.1.0"));
    for path in [&dead, &foreign] {
        fs::write(path, "x").unwrap();
    }
    ask(&site, &file.name).unwrap_or_else(|error| panic!("{error}"));
    assert!(!dead.exists());
    assert!(foreign.exists());
}

#[test]
fn a_destination_that_cannot_be_written_is_an_error_of_its_own() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    fs::create_dir(destination(&site)).unwrap();
    assert_eq!(ask(&site, &file.name).unwrap_err().kind(), Kind::Storage);
    let missing = site.path("missing/RECOVERYXLOG");
    let request = Request {
        name: file.name,
        destination: &missing,
        or_partial: false,
        streaming_directory: None,
        system_identifier: None,
        retry_timeout: Duration::ZERO,
    };
    assert_eq!(restore(|| Ok(site.place()), &request).unwrap_err().kind(), Kind::Storage);
}

#[test]
fn restoring_changes_nothing_in_the_archive() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let before = tree(&site.storage());
    ask(&site, &file.name).unwrap();
    ask(&site, &site.name(2)).unwrap_err();
    assert_eq!(tree(&site.storage()), before);
}

/// What goes wrong in a [`Faulty`] store.
#[derive(Clone, Copy)]
enum Fault {
    /// The first look at that key finds nothing: the file system is mounted right after it.
    AbsentAtFirst(&'static str),
    /// So many reads of an object break off with that error.
    BreaksOff(usize, i32),
}

/// A store in which something goes wrong.
struct Faulty {
    store: Box<dyn Store>,
    fault: Fault,
    gets: Mutex<usize>,
}

struct BreaksOff(i32, Box<dyn Read + Send>);

impl Read for BreaksOff {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(1000);
        match self.1.read(&mut buffer[..most])? {
            0 => Ok(0),
            _ if most == 1000 => Err(io::Error::from_raw_os_error(self.0)),
            count => Ok(count),
        }
    }
}

impl Store for Faulty {
    fn put_new(&self, key: &str, body: Body<'_>, attributes: &Attributes) -> archiver_core::Result<Put> {
        self.store.put_new(key, body, attributes)
    }

    fn get(&self, key: &str) -> archiver_core::Result<Option<Object>> {
        let found = self.store.get(key)?;
        let mut gets = self.gets.lock().unwrap();
        match self.fault {
            Fault::AbsentAtFirst(absent) if key.ends_with(absent) => {
                *gets += 1;
                Ok(found.filter(|_| *gets > 1))
            }
            Fault::BreaksOff(times, code) if key.contains("/wals/") && *gets < times => {
                *gets += 1;
                Ok(found.map(|it| Object { body: Box::new(BreaksOff(code, it.body)), ..it }))
            }
            _ => Ok(found),
        }
    }

    fn head(&self, key: &str) -> archiver_core::Result<Option<Meta>> {
        self.store.head(key)
    }

    fn list(&self, folder: &str, after: Option<&str>, most: usize) -> archiver_core::Result<Vec<Listed>> {
        self.store.list(folder, after, most)
    }

    fn delete(&self, key: &str) -> archiver_core::Result<bool> {
        self.store.delete(key)
    }

    fn location(&self, key: &str) -> String {
        self.store.location(key)
    }
}

fn faulty(site: &Site, fault: Fault) -> Place {
    let place = site.place();
    Place { store: Box::new(Faulty { store: place.store, fault, gets: Mutex::new(0) }), ..place }
}

#[test]
fn an_archive_mounted_between_two_looks_is_never_answered_with_not_found() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let place = faulty(&site, Fault::AbsentAtFirst("000000010000000000000001"));
    let outcome = ask_place(&site, &place, &file.name, false).map_err(|error| error.kind());
    assert_ne!(outcome, Err(Kind::NotFound), "the file is there, and so is the archive");
}

#[test]
fn a_failure_that_may_pass_is_tried_again() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let place = faulty(&site, Fault::BreaksOff(1, nix::errno::Errno::ESTALE as i32));
    ask_place(&site, &place, &file.name, false).unwrap();
    assert!(fs::read(destination(&site)).unwrap() == site.content(&file.name));
}

#[test]
fn a_failure_that_does_not_pass_ends_with_the_timeout_and_is_no_damage() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    for (code, is_passing) in [(nix::errno::Errno::ESTALE as i32, true), (nix::errno::Errno::EIO as i32, false)] {
        let started = Instant::now();
        let place = faulty(&site, Fault::BreaksOff(usize::MAX, code));
        let error = ask_place(&site, &place, &file.name, false).unwrap_err();
        assert_eq!(error.kind(), Kind::Storage, "{error}");
        assert_eq!(started.elapsed() > Duration::from_secs(1), is_passing, "{error}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
