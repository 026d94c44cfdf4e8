//! Barman's programs for cloud storage and our archive in one bucket of the gateway that `scripts/with-s3.sh` starts.

use crate::barman::{program, succeeded};
use crate::{archive_all, one_of_each_kind, restored, restored_or_partial};
use archiver_core::archive::Archive;
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_core::identity::Cluster;
use archiver_core::listing::{Range, list_page, locate};
use archiver_core::wal::{Kind as WalKind, WalName};
use archiver_tests::s3_server::{Bucket, REGION, S3Server};
use archiver_tests::{Site, archive_file, wal_name};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

/// A site that archives into a bucket of its own, and Barman's programs at the same place.
struct Cloud {
    site: Site,
    bucket: Bucket,
}

impl Cloud {
    fn of(site: Site, compression: Compression) -> Self {
        let bucket = S3Server::ceph().new_bucket();
        let S3Server { endpoint, key, secret, ca, .. } = &bucket.server;
        let credentials = site.path("credentials");
        let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n");
        fs::write(&credentials, text).expect("write credentials");
        let url = format!(
            "s3://{}/some/place?endpoint={endpoint}&ca_file={}&credentials_file={}",
            bucket.name,
            ca.display(),
            credentials.display()
        );
        let site = site.with(Setting::Storage, &url).with(Setting::Compression, compression.name());
        Cloud { site, bucket }
    }

    /// A bucket in which Barman has stored files of these kinds, one of each, in that format.
    fn begun_by_barman(compression: Compression, kinds: &[WalKind]) -> Self {
        let cloud = Cloud::of(Site::new(), compression);
        for (name, content) in one_of_each_kind(&cloud.site) {
            if kinds.contains(&name.kind()) {
                cloud.archive_with_barman(compression, &name, &content);
            }
        }
        cloud
    }

    /// One of Barman's programs, with what all of them need to find the bucket.
    fn barman(&self, name: &str, options: &[&str]) -> Command {
        let server = &self.bucket.server;
        let mut command = program(name);
        command
            .args(["--endpoint-url", &server.endpoint])
            .args(options)
            .arg(format!("s3://{}/some/place", self.bucket.name))
            .arg("main")
            .current_dir(self.site.path("data"))
            .env_remove("AWS_PROFILE")
            .env_remove("AWS_SESSION_TOKEN")
            .env("AWS_CONFIG_FILE", "/dev/null")
            .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
            .env("AWS_ACCESS_KEY_ID", &server.key)
            .env("AWS_SECRET_ACCESS_KEY", &server.secret)
            .env("AWS_CA_BUNDLE", &server.ca)
            .env("AWS_DEFAULT_REGION", REGION)
            .env("NO_PROXY", "*")
            // As shipped, boto3 sends checksums in a trailer, which no gateway of this age takes.
            .env("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
            .env("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required");
        command
    }

    /// Lets Barman store a file in that format.
    #[track_caller]
    fn archive_with_barman(&self, compression: Compression, name: &WalName, content: &[u8]) {
        let file = self.site.offer(name, content);
        let format = format!("--{}", compression.name());
        let options = if compression == Compression::None { vec![] } else { vec![format.as_str()] };
        let mut command = self.barman("barman-cloud-wal-archive", &options);
        succeeded(command.arg(&file.path).output().expect("run barman-cloud-wal-archive"));
    }

    /// Where Barman keeps what it has fetched ahead.
    fn spool(&self) -> PathBuf {
        self.site.path("spool")
    }

    /// What Barman makes of a stored file; nothing where it says that there is none.
    #[track_caller]
    fn restore_with_barman(&self, options: &[&str], name: &WalName) -> Option<Vec<u8>> {
        let (destination, spool) = (self.site.path("restored-by-barman"), self.spool());
        let _ = fs::remove_file(&destination);
        let spool = spool.to_str().expect("UTF-8");
        let mut command = self.barman("barman-cloud-wal-restore", &[options, &["--spool-dir", spool]].concat());
        let output = command.arg(name.to_string()).arg(&destination).output().expect("run barman-cloud-wal-restore");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() == Some(1) && said.contains("does not exist") {
            assert!(!destination.exists());
            return None;
        }
        succeeded(output);
        Some(fs::read(&destination).expect("read what Barman restored"))
    }

    /// The answer of Barman to who wants to archive here, from that timeline on.
    fn check(&self, timeline: Option<u32>) -> Output {
        let timeline = timeline.map(|timeline| timeline.to_string());
        let options = timeline.as_ref().map_or(vec![], |timeline| vec!["--timeline", timeline]);
        let mut command = self.barman("barman-cloud-check-wal-archive", &options);
        command.output().expect("run barman-cloud-check-wal-archive")
    }

    /// Every object in the bucket.
    fn objects(&self) -> Vec<String> {
        self.bucket.list("")
    }

    /// The same archive as another cluster sees it.
    fn foreign(&self) -> Archive {
        let cluster = Cluster { system_identifier: 42, ..self.site.cluster };
        Archive::new(self.site.config(), cluster, None, Arc::clone(&self.site.pulse)).unwrap()
    }
}

const ALL_KINDS: [WalKind; 4] = [WalKind::Segment, WalKind::Partial, WalKind::Backup, WalKind::History];

/// Another file of the same size.
fn other_than(content: &[u8]) -> Vec<u8> {
    let mut other = content.to_vec();
    *other.last_mut().unwrap() ^= 1;
    other
}

#[test]
fn barman_cloud_reads_what_we_store_in_every_format() {
    for compression in Compression::ALL {
        let cloud = Cloud::of(Site::new(), compression);
        archive_all(&cloud.site);
        for (name, content) in one_of_each_kind(&cloud.site) {
            let what = format!("{name} in {}", compression.name());
            let found = |options: &[&str]| cloud.restore_with_barman(options, &name);
            match name.kind() {
                // Barman stores labels and hands none out.
                WalKind::Backup => assert_eq!(found(&[]), None, "{what}"),
                WalKind::Partial => {
                    assert!(found(&[]).unwrap() == content, "{what}");
                    assert_eq!(found(&["--no-partial"]), None, "{what}");
                }
                WalKind::Segment => {
                    assert!(found(&[]).unwrap() == content, "{what}");
                    assert!(found(&["--no-partial"]).unwrap() == content, "{what}");
                }
                WalKind::History => assert!(found(&[]).unwrap() == content, "{what}"),
            }
            assert!(restored(&cloud.site, &name) == content, "{what}");
        }
    }
}

#[test]
fn barman_cloud_reads_a_segment_that_was_streamed_in_every_format() {
    for compression in Compression::ALL {
        let site = Site::with_segments_of(8 << 20).with(Setting::MemoryLimit, "24MB");
        let cloud = Cloud::of(site, compression);
        let file = cloud.site.offer_segment(3);
        archive_file(&cloud.site.archive(), &file).unwrap();
        let content = cloud.site.content(&file.name);
        assert!(cloud.restore_with_barman(&[], &file.name).unwrap() == content, "{}", compression.name());
        assert!(restored(&cloud.site, &file.name) == content, "{}", compression.name());
    }
}

#[test]
fn barman_cloud_fetches_ahead_what_we_store_in_every_format() {
    for compression in Compression::ALL {
        let cloud = Cloud::of(Site::new(), compression);
        archive_all(&cloud.site); // the label of the first segment is none of the four
        let archive = cloud.site.archive();
        for number in 6..10 {
            archive_file(&archive, &cloud.site.offer_segment(number)).unwrap();
        }
        let ahead = |number| cloud.restore_with_barman(&["-p", "4", "--no-partial"], &cloud.site.name(number)).unwrap();
        let content = |number| cloud.site.content(&cloud.site.name(number));
        assert!(ahead(5) == content(5), "{}", compression.name());
        for number in 6..9 {
            let spooled = fs::read(cloud.spool().join(cloud.site.name(number).to_string())).unwrap();
            assert!(spooled == content(number), "{number} in {}", compression.name());
        }
        assert!(!cloud.spool().join(cloud.site.name(9).to_string()).exists());
        assert!(ahead(6) == content(6), "{}", compression.name());
        assert_eq!(fs::read_dir(cloud.spool()).unwrap().count(), 2, "{}", compression.name());
    }
}

#[test]
fn barman_cloud_finds_in_our_archive_what_it_would_find_in_its_own() {
    let codes = |cloud: &Cloud| [None, Some(1), Some(2), Some(3)].map(|timeline| cloud.check(timeline).status.code());
    let ours = Cloud::of(Site::new(), Compression::Zstd);
    succeeded(ours.check(None));
    archive_all(&ours.site);
    let theirs = Cloud::begun_by_barman(Compression::Zstd, &ALL_KINDS);
    // The history file is of timeline 2.
    assert_eq!(codes(&ours), [Some(1), Some(1), Some(1), Some(0)]);
    assert_eq!(codes(&theirs), codes(&ours));
    let said = String::from_utf8(ours.check(Some(1)).stderr).unwrap();
    assert!(said.contains("Found 4 files in WAL archive equal to or newer than timeline 1"), "{said}");

    // What lies beside the WAL is no backup to it.
    let backups = ours.barman("barman-cloud-backup-list", &["--format", "json"]).output().unwrap();
    let backups = String::from_utf8(succeeded(backups)).unwrap();
    assert!(backups.replace(' ', "").contains("\"backups_list\":[]"), "{backups}");
}

#[test]
fn we_read_and_list_what_barman_cloud_stores_in_every_format() {
    for compression in Compression::ALL {
        let cloud = Cloud::begun_by_barman(compression, &ALL_KINDS);
        let place = cloud.site.place();
        let mut offered = one_of_each_kind(&cloud.site);
        offered.sort_by_key(|(name, _)| *name);
        let (mut listed, next) = list_page(&place, None, &Range::default(), 100).unwrap();
        listed.sort_by_key(|archived| archived.name);
        assert!(next.is_none_or(|key| list_page(&place, Some(&key), &Range::default(), 100).unwrap().0.is_empty()));
        assert_eq!(listed.len(), offered.len(), "{listed:?}");
        for ((name, content), archived) in offered.iter().zip(&listed) {
            let what = format!("{name} in {}", compression.name());
            assert!(restored(&cloud.site, name) == *content, "{what}");
            assert_eq!((archived.name, archived.format.compression, archived.plain_size), (*name, compression, None));
            assert!(archived.location.ends_with(&format!("/{name}{}", compression.suffix())), "{archived:?}");
            let key = archived.location.split_once(&format!("/{}/", cloud.bucket.name)).unwrap().1;
            assert_eq!(cloud.bucket.get(key, &[]).body.len() as u64, archived.stored_size, "{what}");
            let system_identifier = Some(cloud.site.cluster.system_identifier);
            assert_eq!(locate(&place, name, system_identifier).unwrap().as_ref(), Some(&archived.location), "{what}");
        }
        assert_eq!(locate(&place, &cloud.site.name(7), None).unwrap(), None);
    }
}

#[test]
fn what_barman_cloud_stored_is_a_duplicate_whatever_format_we_are_set_to() {
    let following = Compression::ALL.into_iter().cycle().skip(1);
    for (compression, ours) in Compression::ALL.into_iter().zip(following) {
        // The names of segments and histories are looked for in two ways.
        let kinds = [WalKind::Segment, WalKind::History];
        let mut cloud = Cloud::begun_by_barman(compression, &kinds);
        let mut offered = one_of_each_kind(&cloud.site);
        offered.retain(|(name, _)| kinds.contains(&name.kind()));
        let before = cloud.bucket.list("some/place/main/wals/");
        for configured in [ours, compression] {
            cloud.site.set(Setting::Compression, configured.name());
            let what = format!("{} where we are set to {}", compression.name(), configured.name());
            let archive = cloud.site.archive();
            for (name, content) in &offered {
                let stored = archive_file(&archive, &cloud.site.offer(name, content)).unwrap();
                assert_eq!((stored.created, stored.format.compression), (false, compression), "{name} in {what}");
                assert!(stored.location.ends_with(&format!("/{name}{}", compression.suffix())), "{stored:?}");
                let other = cloud.site.offer(name, &other_than(content));
                let refused = archive.store(&other).unwrap_err();
                assert_eq!(refused.kind(), Kind::Conflict, "{name} in {what}: {refused}");
                assert!(restored(&cloud.site, name) == *content, "{name} in {what}");
            }
            assert_eq!(cloud.bucket.list("some/place/main/wals/"), before, "{what}");
        }
    }
}

#[test]
fn what_barman_cloud_has_put_over_our_file_is_compared_with_what_is_offered() {
    let cloud = Cloud::of(Site::new(), Compression::Zstd);
    let file = cloud.site.offer_segment(1);
    let content = cloud.site.content(&file.name);
    let archive = cloud.site.archive();
    assert!(archive_file(&archive, &file).unwrap().created);
    cloud.archive_with_barman(Compression::Zstd, &file.name, &content);
    assert!(!archive_file(&archive, &file).unwrap().created);
    // It asks nobody and looks at nothing before it overwrites.
    cloud.archive_with_barman(Compression::Zstd, &file.name, &other_than(&content));
    cloud.site.offer(&file.name, &content);
    assert_eq!(archive_file(&archive, &file).unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn a_bucket_that_barman_cloud_began_belongs_to_the_cluster_of_its_segments() {
    for compression in [Compression::None, Compression::Gzip] {
        let cloud = Cloud::begun_by_barman(compression, &[WalKind::Segment]);
        let before = cloud.objects();
        let file = cloud.site.offer_segment(7);
        let refused = cloud.foreign().store(&file).unwrap_err();
        assert_eq!(refused.kind(), Kind::Identity);
        assert!(refused.message().contains("another cluster"), "{refused}");
        assert_eq!(cloud.objects(), before);

        assert!(archive_file(&cloud.site.archive(), &file).unwrap().created);
        let identity = cloud.bucket.get("some/place/main/identity.json", &[]).text();
        assert_eq!(identity, "{\n    \"systemid\": \"7300000000000000001\",\n    \"version\": \"15\"\n}\n");
        let refused = cloud.foreign().store(&file).unwrap_err();
        assert_eq!(refused.kind(), Kind::Identity);
    }
}

#[test]
fn a_segment_comes_before_its_partial_also_where_barman_cloud_takes_the_partial() {
    for stored_by_barman in [false, true] {
        let cloud = Cloud::of(Site::new(), Compression::Zstd);
        let segment = cloud.site.name(5);
        let partial = wal_name(&format!("{segment}.partial"));
        let whole = cloud.site.content(&segment);
        let mut part = whole.clone();
        part[600_000..].fill(0);
        for (name, content) in [(partial, &part), (segment, &whole)] {
            if stored_by_barman {
                cloud.archive_with_barman(Compression::Zstd, &name, content);
            } else {
                archive_file(&cloud.site.archive(), &cloud.site.offer(&name, content)).unwrap();
            }
        }
        assert!(cloud.restore_with_barman(&[], &segment).unwrap() == part, "the reason for this test is gone");
        fs::remove_dir_all(cloud.spool()).unwrap();
        assert!(cloud.restore_with_barman(&["--no-partial"], &segment).unwrap() == whole);
        assert!(restored(&cloud.site, &partial) == part);
        assert!(restored(&cloud.site, &segment) == whole);
        assert!(restored_or_partial(&cloud.site, &segment) == whole);
    }
}
