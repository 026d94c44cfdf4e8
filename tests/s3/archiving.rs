//! Archives in a bucket: what is stored, what is refused, and the way back.

use crate::new_url;
use archiver_core::check::{Home, Verdict, check_storage, probe_storage};
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::{Error, Kind};
use archiver_core::listing::{Range, list_page, locate};
use archiver_core::part::Part;
use archiver_core::restore::{Request, Restored, restore};
use archiver_core::wal::WalName;
use archiver_tests::fault_proxy::FaultProxy;
use archiver_tests::gpg::Gpg;
use archiver_tests::s3_server::{Bucket, S3Server};
use archiver_tests::{Site, archive_file, compressed, wal_name};
use std::fs;
use std::sync::Barrier;
use std::time::Duration;
use tempfile::TempDir;

const HISTORY: &[u8] = b"1\t0/300000\tno recovery target specified\n";

/// A cluster whose archive is a place in that bucket.
pub fn site_in(bucket: &Bucket, parameters: &str) -> (TempDir, Site) {
    let (directory, url) = new_url(bucket, parameters);
    (directory, Site::new().with(Setting::Storage, &url))
}

/// A cluster that archives through a proxy.
fn site_behind_proxy() -> (Bucket, FaultProxy, TempDir, Site) {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let (directory, site) = site_in(&bucket.at(proxy.endpoint()), "");
    (bucket, proxy, directory, site)
}

fn fetch(site: &Site, name: &WalName, or_partial: bool) -> Result<(Restored, Vec<u8>), Error> {
    let destination = site.pg_wal().join("RECOVERYXLOG");
    let request = Request {
        name: *name,
        destination: &destination,
        or_partial,
        streaming_directory: None,
        system_identifier: Some(site.cluster.system_identifier),
        retry_timeout: Duration::from_secs(5),
    };
    let restored = restore(|| Ok(site.place()), &request)?;
    Ok((restored, fs::read(&destination).unwrap()))
}

fn wals(bucket: &Bucket) -> Vec<String> {
    let below = "some/place/main/wals/";
    bucket.list(below).iter().map(|key| key.strip_prefix(below).unwrap().to_string()).collect()
}

#[test]
fn parts_are_put_once_each_and_the_longest_is_restored() {
    let bucket = S3Server::ceph().new_bucket();
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    for (server_name, suffix) in [("plain", ".zst"), ("sealed", ".zst.gpg")] {
        let (_directory, site) = site_in(&bucket, "");
        let site = site.with(Setting::ServerName, server_name);
        let site = if server_name == "sealed" { site.encrypting(&gpg, "reader") } else { site };
        let name = site.name(3);
        let segment = name.segment().unwrap();
        let (archive, file) = (site.archive(), site.path("received"));
        let put = |bytes: usize, last: u8| {
            let mut content = site.content(&name);
            content[bytes - 1] = last;
            content[bytes..].fill(0);
            fs::write(&file, &content).unwrap();
            archive.put_part(&Part { segment, bytes: bytes as u64 }, &file).map(|()| content)
        };
        put(90_000, 1).unwrap();
        let longest = put(500_000, 1).unwrap();
        put(500_000, 1).unwrap();
        let error = put(500_000, 2).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict, "{error}");
        let below = format!("some/place/{server_name}/partial/");
        let keys =
            |bytes: &[u64]| bytes.iter().map(|bytes| format!("{below}{name}.{bytes}{suffix}")).collect::<Vec<_>>();
        assert_eq!(bucket.list(&below), keys(&[500_000, 90_000]));
        assert!(fetch(&site, &name, true).unwrap().1 == longest);
        assert_eq!(fetch(&site, &name, false).unwrap_err().kind(), Kind::NotFound);
        archive.remove_part(&Part { segment, bytes: 90_000 }).unwrap();
        assert_eq!(bucket.list(&below), keys(&[500_000]));
    }
}

#[test]
fn hooks_around_a_file_in_a_bucket_are_told_of_its_source_and_where_it_lies() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let transcript = site.path("transcript");
    let look = format!(
        "echo $BARMAN_PHASE $BARMAN_FILE $BARMAN_COMPRESSION $ARCHIVER_HOOK_LOCATION >>{}",
        transcript.display()
    );
    let site = site.with(Setting::PreArchiveScript, &look).with(Setting::PostArchiveScript, &look);
    let file = site.offer_segment(1);
    let archive = site.archive();
    archive.archive_in_turn(&file, || archive_file(&archive, &file)).unwrap();
    let (source, storage) = (file.path.display(), site.config().destination.storage);
    let location = format!("{storage}/main/wals/{}/{}.zst", file.name.hash_directory(), file.name);
    assert!(location.starts_with("s3://"), "{location}");
    let expected = format!("pre {source} {location}\npost {source} zstd {location}\n");
    assert_eq!(fs::read_to_string(&transcript).unwrap(), expected);
}

#[test]
fn every_kind_of_file_is_stored_under_barmans_key_and_comes_back() {
    for compression in Compression::ALL {
        let bucket = S3Server::ceph().new_bucket();
        let (_directory, site) = site_in(&bucket, "");
        let site = site.with(Setting::Compression, compression.name());
        let (segment, partial) = (site.name(1), wal_name("000000010000000000000003.partial"));
        let label = wal_name("000000010000000000000001.00000028.backup");
        let history = wal_name("00000002.history");
        let contents = [
            (segment, site.content(&segment)),
            (partial, site.content(&partial)),
            (label, b"START WAL LOCATION: 0/100028\n".to_vec()),
            (history, HISTORY.to_vec()),
        ];
        let archive = site.archive();
        for (name, content) in &contents {
            let stored = archive_file(&archive, &site.offer(name, content)).unwrap();
            assert!(stored.created);
            assert_eq!(stored.format.compression, compression);
        }
        let suffix = compression.suffix();
        let directory = "0000000100000000";
        let expected = [
            format!("{directory}/{segment}.00000028.backup{suffix}"),
            format!("{directory}/{segment}{suffix}"),
            format!("{directory}/{partial}{suffix}"),
            format!("00000002.history{suffix}"),
        ];
        let mut expected = expected.to_vec();
        expected.sort();
        assert_eq!(wals(&bucket), expected);
        let head = bucket.head(&format!("some/place/main/wals/00000002.history{suffix}"));
        assert_eq!(head.header("content-encoding"), None);
        for (name, content) in &contents {
            let (restored, bytes) = fetch(&site, name, false).unwrap();
            assert!(bytes == *content, "{name}");
            assert!(restored.location.ends_with(&format!("{name}{suffix}")), "{}", restored.location);
        }
        let identity = bucket.get("some/place/main/identity.json", &[]);
        assert!(identity.text().contains(&site.cluster.system_identifier.to_string()));
    }
}

#[test]
fn a_segment_costs_one_put_and_restoring_it_one_get() {
    let (_bucket, proxy, _directory, site) = site_behind_proxy();
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    proxy.forget();
    for number in 2..10 {
        archive_file(&archive, &site.offer_segment(number)).unwrap();
    }
    assert_eq!((proxy.count("PUT"), proxy.count_all()), (8, 8), "{:?}", proxy.requests());
    proxy.forget();
    let (_, bytes) = fetch(&site, &site.name(5), false).unwrap();
    assert!(bytes == site.content(&site.name(5)));
    assert_eq!((proxy.count("GET"), proxy.count_all()), (1, 1), "{:?}", proxy.requests());
}

#[test]
fn the_same_file_again_is_success_without_reading_it() {
    let (bucket, proxy, _directory, site) = site_behind_proxy();
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let before = bucket
        .head(&format!("some/place/main/wals/0000000100000000/{}.zst", file.name))
        .header("etag")
        .map(str::to_string);
    proxy.forget();
    let again = archive_file(&site.archive(), &file).unwrap();
    assert!(!again.created);
    let bodies =
        proxy.requests().iter().filter(|line| line.starts_with("GET") && line.contains("0000000100000000/")).count();
    assert_eq!(bodies, 0, "{:?}", proxy.requests());
    let after = bucket
        .head(&format!("some/place/main/wals/0000000100000000/{}.zst", file.name))
        .header("etag")
        .map(str::to_string);
    assert_eq!(after, before);
    assert_eq!(wals(&bucket).len(), 1);
}

#[test]
fn another_file_of_that_name_is_refused_with_both_hashes() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let name = site.name(1);
    let first = archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let mut other = site.content(&name);
    other[100_000] ^= 1;
    let error = archive_file(&site.archive(), &site.offer(&name, &other)).unwrap_err();
    assert_eq!(error.kind(), Kind::Conflict);
    let detail = error.detail_text().unwrap();
    assert!(detail.contains(&first.hash.to_string()) && detail.matches("blake3:").count() == 2, "{detail}");
    assert!(fetch(&site, &name, false).unwrap().1 == site.content(&name));
}

#[test]
fn the_same_file_in_another_format_is_known() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, mut site) = site_in(&bucket, "");
    let history = wal_name("00000002.history");
    for file in [site.offer_segment(1), site.offer(&history, HISTORY)] {
        site.set(Setting::Compression, "gzip");
        archive_file(&site.archive(), &file).unwrap();
        site.set(Setting::Compression, "lz4");
        let archive = site.archive();
        let again = archive_file(&archive, &file).unwrap();
        assert_eq!((again.created, again.format.compression), (false, Compression::Gzip));
        assert!(again.location.ends_with(".gz"), "{}", again.location);
        let mut other = fs::read(&file.path).unwrap();
        let last = other.len() - 2;
        other[last] ^= 1;
        let error = archive_file(&archive, &site.offer(&file.name, &other)).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
        // Also whoever asks by another format first finds it.
        assert!(fetch(&site, &file.name, false).unwrap().0.location.ends_with(".gz"));
    }
    assert_eq!(wals(&bucket).len(), 2);
}

#[test]
fn what_barman_stored_is_known_by_its_content() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let name = site.name(1);
    let key = format!("some/place/main/wals/0000000100000000/{name}.bz2");
    bucket.put(&key, &compressed(Compression::Bzip2, &site.content(&name)), &[]);
    let archive = site.archive();
    let same = archive_file(&archive, &site.offer_segment(1)).unwrap();
    assert_eq!((same.created, same.format.compression), (false, Compression::Bzip2));
    let mut other = site.content(&name);
    other[500_000] ^= 1;
    assert_eq!(archive_file(&archive, &site.offer(&name, &other)).unwrap_err().kind(), Kind::Conflict);
    assert!(fetch(&site, &name, false).unwrap().1 == site.content(&name));
    assert_eq!(bucket.get("some/place/main/identity.json", &[]).status, 200, "begun by the segment's own header");
}

#[test]
fn a_file_that_was_removed_under_another_format_is_stored_anew() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let name = site.name(1);
    let key = format!("some/place/main/wals/0000000100000000/{name}.bz2");
    bucket.put(&key, &compressed(Compression::Bzip2, &site.content(&name)), &[]);
    let archive = site.archive();
    archive_file(&archive, &site.offer_segment(1)).unwrap();
    bucket.delete(&key);
    let error = archive_file(&archive, &site.offer_segment(1)).unwrap_err();
    assert!(error.is_worth_retrying(), "{error:?}");
    assert!(archive_file(&archive, &site.offer_segment(1)).unwrap().created);
}

#[test]
fn the_whole_segment_comes_before_its_partial_in_every_format() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, mut site) = site_in(&bucket, "");
    let (name, partial) = (site.name(3), wal_name("000000010000000000000003.partial"));
    for compression in ["zstd", "none", "xz"] {
        site.set(Setting::Compression, compression);
        let server = format!("server-{compression}");
        site.set(Setting::ServerName, &server);
        let mut half = site.content(&partial);
        half[200_000..].fill(0);
        archive_file(&site.archive(), &site.offer(&partial, &half)).unwrap();
        assert!(fetch(&site, &name, true).unwrap().1 == half, "{compression}: nothing better is there");
        assert_eq!(fetch(&site, &name, false).map(|_| ()).unwrap_err().kind(), Kind::NotFound);
        archive_file(&site.archive(), &site.offer_segment(3)).unwrap();
        for asked in ["zstd", "none", "gzip"] {
            site.set(Setting::Compression, asked);
            assert!(fetch(&site, &name, true).unwrap().1 == site.content(&name), "{compression} as {asked}");
        }
    }
}

#[test]
fn not_found_is_said_only_where_the_archive_was_seen() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let name = site.name(7);
    let error = fetch(&site, &name, false).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Identity, "nothing is there: {error:?}");
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    assert_eq!(fetch(&site, &name, false).map(|_| ()).unwrap_err().kind(), Kind::NotFound);
    let missing = Bucket { name: "no-such-bucket".into(), ..bucket.clone() };
    for (other, kind) in [(missing, Kind::Storage), (bucket.as_user("OTHER"), Kind::Storage)] {
        let (_directory, elsewhere) = site_in(&other, "");
        let error = fetch(&elsewhere, &name, false).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), kind, "{error:?}");
    }
    let mut other_cluster = site_in(&bucket, "");
    other_cluster.1.cluster.system_identifier += 1;
    assert_eq!(fetch(&other_cluster.1, &name, false).map(|_| ()).unwrap_err().kind(), Kind::Identity);
}

#[test]
fn a_damaged_object_is_refused_by_its_hash() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let site = site.with(Setting::Compression, "none");
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let key = format!("some/place/main/wals/0000000100000000/{}", file.name);
    let head = bucket.head(&key);
    let kept = |name: &str| (name.to_string(), head.header(name).unwrap().to_string());
    let metadata = ["x-amz-meta-archiver-blake3", "x-amz-meta-archiver-size"].map(kept);
    let headers: Vec<(&str, &str)> = metadata.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut damaged = site.content(&file.name);
    damaged[700_000] ^= 4;
    bucket.put(&key, &damaged, &headers);
    let error = fetch(&site, &file.name, false).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged);
    assert!(error.message().contains("blake3:"), "{error:?}");
}

#[test]
fn a_torn_copy_is_not_taken_for_the_file_that_its_metadata_tells_of() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    let file = site.offer_segment(1);
    archive_file(&site.archive(), &file).unwrap();
    let key = format!("some/place/main/wals/0000000100000000/{}.zst", file.name);
    let whole = bucket.get(&key, &[]);
    let names = ["x-amz-meta-archiver-blake3", "x-amz-meta-archiver-size", "x-amz-meta-archiver-stored-size"];
    let told = names.map(|name| (name, whole.header(name).unwrap()));
    bucket.put(&key, &whole.body[..whole.body.len() / 2], &told);
    let error = archive_file(&site.archive(), &file).map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Damaged, "{error:?}");
    assert_eq!(fetch(&site, &file.name, false).map(|_| ()).unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn another_clusters_archive_is_refused_before_anything_is_stored() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let before = bucket.list("");
    let (_other_directory, mut other) = site_in(&bucket, "");
    other.cluster.system_identifier += 1;
    let error = archive_file(&other.archive(), &other.offer_segment(2)).unwrap_err();
    assert_eq!(error.kind(), Kind::Identity);
    assert_eq!(bucket.list(""), before);
}

#[test]
fn of_two_clusters_that_begin_at_once_one_owns_the_archive_and_the_other_stores_nothing() {
    for _ in 0..5 {
        let bucket = S3Server::ceph().new_bucket();
        let sites = [0, 1].map(|number| {
            let (directory, mut site) = site_in(&bucket, "");
            site.cluster.system_identifier += number;
            (directory, site)
        });
        let barrier = Barrier::new(2);
        let outcomes: Vec<Result<_, Error>> = std::thread::scope(|scope| {
            let running: Vec<_> = sites
                .iter()
                .map(|(_, site)| {
                    let barrier = &barrier;
                    scope.spawn(move || {
                        let (archive, file) =
                            (site.archive(), site.offer_segment(1 + (site.cluster.system_identifier % 2) as u32));
                        barrier.wait();
                        archive_file(&archive, &file)
                    })
                })
                .collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let winners = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
        assert_eq!(winners, 1, "{outcomes:?}");
        let loser = outcomes.iter().find_map(|outcome| outcome.as_ref().err()).unwrap();
        assert_eq!(loser.kind(), Kind::Identity, "{loser:?}");
        assert_eq!(wals(&bucket).len(), 1);
    }
}

#[test]
fn a_vanished_archive_is_refused_and_not_begun_anew() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, site) = site_in(&bucket, "");
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    for key in bucket.list("") {
        bucket.delete(&key);
    }
    let error = archive_file(&site.archive(), &site.offer_segment(2)).unwrap_err();
    assert_eq!(error.kind(), Kind::Identity);
    assert!(error.message().contains("has vanished"), "{error:?}");
    assert!(error.hint_text().unwrap().contains("bucket"), "{error:?}");
    assert!(wals(&bucket).is_empty());
}

#[test]
fn a_segment_too_large_for_memory_is_streamed_and_is_the_same() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, url) = new_url(&bucket, "");
    let site = Site::with_segments_of(64 << 20).with(Setting::Storage, &url);
    let mut site = site.with(Setting::MemoryLimit, "64MB");
    for (compression, number) in [("zstd", 1), ("none", 2)] {
        site.set(Setting::Compression, compression);
        let file = site.offer_segment(number);
        assert!(archive_file(&site.archive(), &file).unwrap().created);
        assert!(fetch(&site, &file.name, false).unwrap().1 == site.content(&file.name));
        assert!(!archive_file(&site.archive(), &file).unwrap().created);
    }
}

#[test]
fn listings_tell_format_size_and_place_without_reading_a_file() {
    let (_bucket, proxy, _directory, mut site) = site_behind_proxy();
    for (number, compression) in [(1, "zstd"), (2, "none"), (3, "gzip")] {
        site.set(Setting::Compression, compression);
        archive_file(&site.archive(), &site.offer_segment(number)).unwrap();
    }
    archive_file(&site.archive(), &site.offer(&wal_name("00000002.history"), HISTORY)).unwrap();
    proxy.forget();
    let place = site.place();
    let (files, next) = list_page(&place, None, &Range::default(), 1000).unwrap();
    assert_eq!(
        next.and_then(|next| list_page(&place, Some(&next), &Range::default(), 1000).unwrap().0.first().cloned()),
        None
    );
    let told: Vec<_> = files.iter().map(|file| (file.name.to_string(), file.format.compression.name())).collect();
    let expected = [
        (site.name(1), "zstd"),
        (site.name(2), "none"),
        (site.name(3), "gzip"),
        (wal_name("00000002.history"), "gzip"),
    ];
    assert_eq!(told, expected.map(|(name, format)| (name.to_string(), format)));
    assert!(files.iter().all(|file| file.stored_size > 0 && file.location.starts_with("http")));
    assert_eq!(proxy.count_all(), proxy.lists() as u64);
    let found = locate(&place, &site.name(3), Some(site.cluster.system_identifier)).unwrap();
    assert!(found.unwrap().ends_with(".gz"));
    assert_eq!(locate(&place, &site.name(9), Some(site.cluster.system_identifier)), Ok(None));
}

#[test]
fn check_tells_where_the_credentials_come_from_and_probes() {
    let bucket = S3Server::ceph().new_bucket();
    let (directory, site) = site_in(&bucket, "");
    let home = Home {
        system_identifier: site.cluster.system_identifier,
        data_directory: site.path("data"),
        is_elsewhere: false,
    };
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let rows = check_storage(&site.config(), Some(&home), &site.pulse);
    let row = |name: &str| rows.iter().find(|row| row.name == name).unwrap_or_else(|| panic!("{name}: {rows:?}"));
    assert!(rows.iter().all(|row| row.verdict == Verdict::Ok), "{rows:?}");
    let file = directory.path().join("credentials");
    assert!(row("credentials").detail.contains(&file.display().to_string()), "{rows:?}");
    assert!(!format!("{rows:?}").contains(&bucket.server.secret));
    assert_eq!(probe_storage(&site.config(), &home, &site.pulse).verdict, Verdict::Ok);
    assert_eq!(bucket.list("some/place/main/probe/"), ["some/place/main/probe/create-only"]);

    fs::write(&file, "").unwrap();
    let rows = check_storage(&site.config(), Some(&home), &site.pulse);
    let [failed] = &rows[..] else { panic!("{rows:?}") };
    assert_eq!(failed.verdict, Verdict::Failed);
    assert!(failed.detail.contains(&file.display().to_string()), "{rows:?}");
    let (_weaker, looking) = site_in(&bucket, "&create_only=head");
    let rows = check_storage(&looking.config(), None, &looking.pulse);
    let weaker = rows.iter().find(|row| row.name == "create-only").unwrap();
    assert_eq!(weaker.verdict, Verdict::Warning);
}

#[test]
fn a_probe_that_may_not_be_removed_is_a_warning() {
    let bucket = S3Server::moto().new_bucket();
    let (_directory, site) = site_in(&bucket.as_user("NO_DELETE"), "");
    let home = Home {
        system_identifier: site.cluster.system_identifier,
        data_directory: site.path("data"),
        is_elsewhere: false,
    };
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let row = probe_storage(&site.config(), &home, &site.pulse);
    assert_eq!(row.verdict, Verdict::Warning, "{row:?}");
    assert!(row.hint.unwrap().contains("append-only"));
}

#[test]
fn a_rotated_key_is_taken_without_a_restart() {
    let bucket = S3Server::moto().new_bucket();
    let (directory, site) = site_in(&bucket.as_user("NO_PUT"), "");
    let archive = site.archive();
    let error = archive_file(&archive, &site.offer_segment(1)).unwrap_err();
    assert!(error.message().starts_with("store answered 403"), "{error:?}");
    crate::write_credentials(&bucket, directory.path());
    assert!(archive_file(&archive, &site.offer_segment(1)).unwrap().created);
}

#[test]
fn an_encrypted_file_has_a_name_of_its_own_and_is_known_again_by_a_keyed_hash() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    let [public, secret] = [gpg.public_keys(&["reader"], false), gpg.secret_keys(&["reader"], "")];
    for server in [S3Server::ceph(), S3Server::moto()] {
        let bucket = server.new_bucket();
        let (_directory, site) = site_in(&bucket, "");
        let plain = site.offer_segment(1);
        archive_file(&site.archive(), &plain).unwrap();
        let site = site
            .with(Setting::Encryption, "openpgp")
            .with(Setting::EncryptionRecipients, public.to_str().unwrap())
            .with(Setting::DecryptionKeys, secret.to_str().unwrap());
        // Stored before encryption was turned on: the same file, and no second object.
        assert!(!archive_file(&site.archive(), &plain).unwrap().created);
        let file = site.offer_segment(2);
        assert!(archive_file(&site.archive(), &file).unwrap().created);
        assert!(!archive_file(&site.archive(), &file).unwrap().created, "after a restart");
        let directory = "0000000100000000";
        assert_eq!(
            wals(&bucket),
            [format!("{directory}/{}.zst", plain.name), format!("{directory}/{}.zst.gpg", file.name)]
        );
        let head = bucket.head(&format!("some/place/main/wals/{directory}/{}.zst.gpg", file.name));
        assert_eq!(head.header("x-amz-meta-archiver-blake3"), None);
        assert!(head.header("x-amz-meta-archiver-blake3-keyed").is_some());
        for file in [&plain, &file] {
            let (_, bytes) = fetch(&site, &file.name, false).unwrap();
            assert!(bytes == site.content(&file.name));
        }
        let mut other = site.content(&file.name);
        other[500_000] ^= 1;
        let error = archive_file(&site.archive(), &site.offer(&file.name, &other)).unwrap_err();
        assert_eq!(error.kind(), Kind::Conflict);
    }
}

#[test]
fn an_encrypted_segment_that_is_streamed_comes_out_the_same_each_time_it_is_made() {
    let gpg = Gpg::new();
    gpg.add_key("reader", "default", "", "never");
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, url) = new_url(&bucket, "");
    let site = Site::with_segments_of(16 << 20)
        .with(Setting::Storage, &url)
        .with(Setting::MemoryLimit, "24MB")
        .with(Setting::Encryption, "openpgp")
        .with(Setting::EncryptionRecipients, gpg.public_keys(&["reader"], false).to_str().unwrap())
        .with(Setting::DecryptionKeys, gpg.secret_keys(&["reader"], "").to_str().unwrap());
    let file = site.offer_segment(1);
    assert!(archive_file(&site.archive(), &file).unwrap().created);
    assert!(!archive_file(&site.archive(), &file).unwrap().created);
    assert!(fetch(&site, &file.name, false).unwrap().1 == site.content(&file.name));
    assert_eq!(wals(&bucket).len(), 1);
}
