//! S3 on the servers that `scripts/with-s3.sh` starts. Run by `make test-s3`.

mod archiving;
#[path = "../storage/contract.rs"]
mod contract;
mod deletion;
mod servers;
mod store;
mod whole;

use archiver_tests::s3_server::Bucket;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// The shared credentials file of whoever asks for that bucket, and the CA's certificate beside it.
fn write_credentials(bucket: &Bucket, directory: &Path) -> PathBuf {
    let path = directory.join("credentials");
    let (key, secret) = (&bucket.server.key, &bucket.server.secret);
    let text = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n");
    fs::write(&path, text).expect("write credentials");
    path
}

/// The URL of a place in that bucket, as its user; `parameters` begin with `&`.
fn url(bucket: &Bucket, credentials: &Path, parameters: &str) -> String {
    let (endpoint, ca) = (&bucket.server.endpoint, bucket.server.ca.display());
    let (name, credentials) = (&bucket.name, credentials.display());
    format!("s3://{name}/some/place?endpoint={endpoint}&ca_file={ca}&credentials_file={credentials}{parameters}")
}

/// The same with a credentials file that lasts as long as the directory.
fn new_url(bucket: &Bucket, parameters: &str) -> (TempDir, String) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let url = url(bucket, &write_credentials(bucket, directory.path()), parameters);
    (directory, url)
}
