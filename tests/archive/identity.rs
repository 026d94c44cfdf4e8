//! Whose archive it is: another cluster's is never touched, and one that has vanished is never begun anew.

use archiver_core::archive::Archive;
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_core::identity::{Cluster, Marker};
use archiver_tests::{Site, archive_file, compressed, tree, wal_name};
use std::fs;
use std::sync::Arc;

/// The site's archive as another cluster sees it.
fn foreign(site: &Site) -> Archive {
    let cluster = Cluster { system_identifier: 42, ..site.cluster };
    Archive::new(site.config(), cluster, None, Arc::clone(&site.pulse)).unwrap()
}

#[test]
fn an_archive_begins_with_barmans_identity_file() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let identity = fs::read_to_string(site.storage().join("main/identity.json")).unwrap();
    assert_eq!(identity, "{\n    \"systemid\": \"7300000000000000001\",\n    \"version\": \"15\"\n}\n");
}

#[test]
fn nothing_is_written_before_the_first_file() {
    let site = Site::new();
    let _archive = site.archive();
    assert!(tree(&site.storage()).is_empty());
}

#[test]
fn another_clusters_archive_is_refused_before_anything_is_written() {
    let site = Site::new();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let before = tree(&site.storage());
    let refused = foreign(&site).store(&file).unwrap_err();
    assert_eq!(refused.kind(), Kind::Identity);
    assert!(refused.detail_text().is_some_and(|it| it.contains("7300000000000000001") && it.contains("42")));
    assert_eq!(tree(&site.storage()), before);
}

#[test]
fn an_identity_file_with_more_keys_is_ours_and_kept_as_it_is() {
    let site = Site::new();
    fs::create_dir(site.storage().join("main")).unwrap();
    let path = site.storage().join("main/identity.json");
    let identity = "{\"more\": [1], \"systemid\": \"7300000000000000001\", \"version\": \"14\"}";
    fs::write(&path, identity).unwrap();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), identity);
}

#[test]
fn an_identity_file_that_cannot_be_read_is_no_permission() {
    for content in ["", "{}", "junk"] {
        let site = Site::new();
        fs::create_dir(site.storage().join("main")).unwrap();
        fs::write(site.storage().join("main/identity.json"), content).unwrap();
        let refused = archive_file(&site.archive(), &site.offer_segment(1)).unwrap_err();
        assert_eq!(refused.kind(), Kind::Identity, "{content:?}");
        assert_eq!(tree(&site.storage()), ["main", "main/identity.json"]);
    }
    let site = Site::new();
    fs::create_dir_all(site.storage().join("main/identity.json")).unwrap();
    let refused = archive_file(&site.archive(), &site.offer_segment(1)).unwrap_err();
    assert_eq!(refused.kind(), Kind::Identity);
    assert_eq!(tree(&site.storage()), ["main", "main/identity.json"]);
}

#[test]
fn the_page_header_decides_whose_archive_barman_began() {
    for stored_as in [Compression::None, Compression::Zstd] {
        let site = Site::new();
        let first = site.name(1);
        let content = site.content(&first);
        let content = if stored_as == Compression::None { content } else { compressed(stored_as, &content) };
        site.store_as_barman(&first, &content);
        let file = site.offer_segment(2);
        let before = tree(&site.storage());

        let refused = foreign(&site).store(&file).unwrap_err();
        assert_eq!(refused.kind(), Kind::Identity);
        assert!(refused.message().contains("another cluster"), "{refused}");
        assert_eq!(tree(&site.storage()), before, "{}", stored_as.name());

        archive_file(&site.archive(), &file).unwrap();
        assert!(site.storage().join("main/identity.json").is_file());
        assert!(foreign(&site).store(&file).is_err());
    }
}

#[test]
fn an_archive_of_barmans_with_a_long_history_is_taken_over() {
    let site = Site::new();
    // History files are kept for ever, and sort before the segments of the timeline in use.
    for timeline in 2..=80 {
        site.store_as_barman(&wal_name(&format!("{timeline:08X}.history")), b"1\t0/300000\tx\n");
    }
    let segment = wal_name("000000510000000000000007");
    site.store_as_barman(&segment, &site.content(&segment));
    archive_file(&site.archive(), &site.offer(&segment, &site.content(&segment))).unwrap();
}

#[test]
fn wal_that_nobody_can_read_is_no_archive_to_go_on_with() {
    let site = Site::new();
    site.store_as_barman(&site.name(1), b"no WAL at all");
    let before = tree(&site.storage());
    let refused = archive_file(&site.archive(), &site.offer_segment(2)).unwrap_err();
    assert_eq!(refused.kind(), Kind::Identity);
    assert_eq!(tree(&site.storage()), before);
}

#[test]
fn of_two_clusters_that_begin_at_once_one_gets_the_archive() {
    for _ in 0..10 {
        let site = Site::new();
        let file = site.offer_segment(1);
        let (ours, theirs) = (site.archive(), foreign(&site));
        let kinds = std::thread::scope(|scope| {
            // The file is ours alone: the other cluster would refuse it if it were the first.
            let ours = scope.spawn(|| ours.store(&file).map_err(|error| error.kind()));
            let theirs = scope.spawn(|| theirs.store(&file).map_err(|error| error.kind()));
            (ours.join().unwrap().err(), theirs.join().unwrap().err())
        });
        let identity = fs::read_to_string(site.storage().join("main/identity.json")).unwrap();
        let expected = if identity.contains("\"42\"") {
            (Some(Kind::Identity), Some(Kind::Source))
        } else {
            (None, Some(Kind::Identity))
        };
        assert_eq!(kinds, expected, "{identity}");
    }
}

#[test]
fn an_archive_that_vanished_is_refused_while_running_and_goes_on_when_it_is_back() {
    let site = Site::new();
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    site.unmount();
    let file = site.offer_segment(2);
    for _ in 0..2 {
        let refused = archive_file(&archive, &file).unwrap_err();
        assert_eq!(refused.kind(), Kind::Identity);
        assert!(refused.message().contains("has vanished"), "{refused}");
        assert!(refused.hint_text().is_some_and(|hint| hint.contains("mounted")));
    }
    assert!(tree(&site.storage()).is_empty());
    site.mount();
    archive_file(&archive, &file).unwrap();
    assert_eq!(site.catalogue().len(), 2);
}

#[test]
fn an_archive_that_vanished_is_refused_after_a_restart_too() {
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    site.unmount();
    let file = site.offer_segment(2);
    let refused = archive_file(&site.archive(), &file).unwrap_err();
    assert_eq!(refused.kind(), Kind::Identity);
    assert!(refused.hint_text().is_some_and(|hint| hint.contains("archiver.established")), "{refused:?}");
    assert!(tree(&site.storage()).is_empty());
    // As the hint says: removed on purpose.
    fs::remove_file(site.path("data/archiver.established")).unwrap();
    archive_file(&site.archive(), &file).unwrap();
}

#[test]
fn a_vanished_archive_is_remembered_when_another_was_used_in_between() {
    let mut site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let other = site.path("other");
    fs::create_dir(&other).unwrap();
    site.set(Setting::Storage, &format!("file://{}", other.display()));
    archive_file(&site.archive(), &site.offer_segment(2)).unwrap();
    site.set(Setting::Storage, &format!("file://{}", site.storage().display()));
    site.unmount();
    let refused = archive_file(&site.archive(), &site.offer_segment(3)).map_err(|error| error.kind());
    assert_eq!(refused.map(|stored| stored.location), Err(Kind::Identity));
    assert!(tree(&site.storage()).is_empty());
}

#[test]
fn a_missing_storage_directory_is_not_made() {
    let site = Site::new();
    fs::remove_dir(site.storage()).unwrap();
    let error = archive_file(&site.archive(), &site.offer_segment(1)).unwrap_err();
    assert_eq!(error.kind(), Kind::Storage);
    assert!(!site.storage().exists());
}

#[test]
fn an_archive_whose_identity_changed_hands_is_refused_while_running() {
    let site = Site::new();
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    let identity = "{\"systemid\": \"42\", \"version\": \"15\"}";
    fs::write(site.storage().join("main/identity.json"), identity).unwrap();
    let refused = archive_file(&archive, &site.offer_segment(2)).unwrap_err();
    assert_eq!(refused.kind(), Kind::Identity);
    assert!(!site.stored(&site.name(2)).exists());
}

#[test]
fn a_marker_of_another_cluster_is_not_ours() {
    // A clone of the data directory after pg_resetwal, say, which brings the marker along.
    let site = Site::new();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let marker = Marker::new(site.path("data/archiver.established"));
    let clone = Cluster { system_identifier: 42, ..site.cluster };
    assert!(marker.remembers(site.cluster.system_identifier, &site.place().location()).unwrap());
    assert!(!marker.remembers(clone.system_identifier, &site.place().location()).unwrap());
}
