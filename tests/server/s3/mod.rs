//! Real clusters that archive to S3. `scripts/with-s3.sh ceph` runs the gateway beside them.

mod archiving;
mod credentials;
mod looking;
mod outages;
mod process;
mod races;
mod settings;
mod streaming;

use crate::cluster::{Cluster, has_equal_content, text};
use archiver_tests::fault_proxy::FaultProxy;
use archiver_tests::s3_server::{Bucket, S3Server};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// What every key of a cluster's archive begins with.
const ARCHIVE: &str = "some/place/main/";

/// A cluster with a bucket of its own to archive to, and the proxy between them where there is one. Not running yet.
pub struct Site {
    pub cluster: Cluster,
    pub bucket: Bucket,
    proxy: Option<FaultProxy>,
}

impl Site {
    /// The gateway is talked to over TLS.
    pub fn over_tls(segment_mb: u32) -> Self {
        Self::of(Cluster::new(segment_mb), S3Server::ceph().new_bucket(), None)
    }

    /// The gateway is talked to through a proxy that can be told to go wrong.
    pub fn behind_proxy(segment_mb: u32) -> Self {
        let server = S3Server::ceph_without_tls();
        let proxy = FaultProxy::before(&server.endpoint);
        Self::of(Cluster::new(segment_mb), server.new_bucket(), Some(proxy))
    }

    fn of(cluster: Cluster, bucket: Bucket, proxy: Option<FaultProxy>) -> Self {
        let site = Site { cluster, bucket, proxy };
        site.write_credentials(&site.bucket.server.secret);
        site.cluster.set("archiver.storage", &site.url());
        site
    }

    pub fn with(self, name: &str, value: &str) -> Self {
        self.cluster.set(name, value);
        self
    }

    /// The same, running, with the extension and an archive that was begun.
    pub fn archiving(self) -> Self {
        self.cluster.start();
        self.cluster.psql("CREATE EXTENSION archiver");
        self.cluster.write_segments(1);
        self.cluster.drain();
        self
    }

    pub fn proxy(&self) -> &FaultProxy {
        self.proxy.as_ref().expect("a site behind a proxy")
    }

    /// The file with the keys of the bucket's owner.
    pub fn credentials(&self) -> PathBuf {
        self.cluster.path("credentials")
    }

    /// Writes that file anew, with that secret.
    pub fn write_credentials(&self, secret: &str) {
        let key = &self.bucket.server.key;
        self.write_profiles(&format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"));
    }

    /// Writes that file anew in one step, as whoever rotates keys does it.
    pub fn write_profiles(&self, text: &str) {
        let new = self.cluster.path("credentials.new");
        self.cluster.write_file(&new, text.as_bytes());
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("chmod");
        fs::rename(&new, self.credentials()).expect("put credentials in place");
    }

    /// The URL of its archive.
    pub fn url(&self) -> String {
        self.url_below(&self.bucket.name, "some/place")
    }

    /// The URL of another place in the same store.
    pub fn url_below(&self, bucket: &str, prefix: &str) -> String {
        format!("{}&credentials_file={}", self.url_without_keys(bucket, prefix), self.credentials().display())
    }

    /// The same where the environment says whose keys are used.
    pub fn url_without_keys(&self, bucket: &str, prefix: &str) -> String {
        let server = &self.bucket.server;
        let endpoint = self.proxy.as_ref().map_or(server.endpoint.clone(), FaultProxy::endpoint);
        format!("s3://{bucket}/{prefix}?endpoint={endpoint}&ca_file={}", server.ca.display())
    }

    /// The keys of the stored WAL files by name, of which there is one each.
    #[track_caller]
    pub fn stored(&self) -> BTreeMap<String, String> {
        let mut stored = BTreeMap::new();
        for key in self.bucket.list(&format!("{ARCHIVE}wals/")) {
            let last = key.rsplit('/').next().expect("a name");
            let name = last.strip_suffix(".zst").unwrap_or(last).to_string();
            assert!(name.len() >= 16, "a foreign name: {key}");
            if let Some(other) = stored.insert(name, key.clone()) {
                panic!("stored twice: {other} and {key}");
            }
        }
        stored
    }

    /// Everything that PostgreSQL was told is archived is in the bucket, once, and comes back as it was; answers how
    /// many files were compared.
    #[track_caller]
    pub fn assert_complete(&self) -> usize {
        let (stored, done) = (self.stored(), self.cluster.status_files("done"));
        for name in &done {
            assert!(stored.contains_key(name), "{name} is not stored");
        }
        self.cluster.assert_done_files_restore_equal()
    }

    /// Whether the stored file of that name is that cluster's own.
    #[track_caller]
    pub fn holds_file_of(&self, cluster: &Cluster, name: &str) -> bool {
        let copy = cluster.path("compared");
        let output = cluster.restore(name, &copy);
        assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
        has_equal_content(&copy, &cluster.pg_wal(name))
    }
}
