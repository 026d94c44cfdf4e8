//! `s3://bucket/prefix?parameter=value…`: any store that speaks S3.

use super::{BadUrl, percent_decoded};
use std::path::{Path, PathBuf};
use url::Url;

/// A bucket, what lies above the archive in it, and how to talk to the store. Holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Url {
    /// The bucket.
    pub bucket: String,
    /// What all keys begin with: parts separated by single slashes, none at either end; may be empty.
    pub prefix: String,
    /// `region`: where the bucket lies. Where it is not given, the environment says, else it is us-east-1.
    pub region: Option<String>,
    /// `endpoint`: scheme, host and port of the store, without a slash at the end. Amazon's where it is not given.
    pub endpoint: Option<String>,
    /// `addressing`: path where an endpoint is given, else virtual.
    pub addressing: Addressing,
    /// `profile`: the section of the credentials file.
    pub profile: Option<String>,
    /// `credentials_file`: instead of the one in the home directory.
    pub credentials_file: Option<PathBuf>,
    /// `ca_file`: certificates that are trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// `storage_class`
    pub storage_class: Option<String>,
    /// `sse` and `sse_kms_key_id`
    pub encryption: Option<ServerSideEncryption>,
    /// `tags`: names and values, in the order given.
    pub tags: Vec<(String, String)>,
    /// `checksum`
    pub checksum: ChecksumChoice,
    /// `create_only`
    pub create_only: CreateOnly,
}

/// How the bucket is named in a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// `https://host/bucket/key`
    Path,
    /// `https://bucket.host/key`
    Virtual,
}

/// How the store encrypts what it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerSideEncryption {
    /// `AES256`: with keys of the store's own.
    Aes256,
    /// `aws:kms`: with a key of the key service; its default one where none is named.
    Kms {
        /// The key.
        key_id: Option<String>,
    },
}

/// Which checksum goes with a body, beside the hash in its signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChecksumChoice {
    /// SHA-256 where the store takes it, else MD5, else none.
    Auto,
    /// `x-amz-checksum-crc32c`
    Crc32c,
    /// `x-amz-checksum-sha256`
    Sha256,
    /// `Content-MD5`
    Md5,
    /// None.
    None,
}

/// How an object is kept from being overwritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateOnly {
    /// Conditional puts, once the store has shown that it heeds the condition.
    Auto,
    /// Conditional puts, trusting the store.
    Conditional,
    /// A look before each put: weaker, two writers at the same instant are not told apart.
    Head,
}

const KNOWN: &str = "region, endpoint, addressing, profile, credentials_file, ca_file, storage_class, sse, sse_kms_key_id, \
     tags, checksum and create_only";
/// S3's own bound.
const MOST_TAGS: usize = 10;

impl S3Url {
    /// Reads the URL of a bucket.
    pub(super) fn parse(url: &Url) -> Result<Self, BadUrl> {
        let bucket = url.host_str().unwrap_or_default();
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=255).contains(&bucket.len())
            || bucket.starts_with('.')
            || !bucket.bytes().all(fits)
            || url.port().is_some()
        {
            return Err(BadUrl::Bucket);
        }
        if url.fragment().is_some() {
            return Err(BadUrl::Fragment);
        }
        let mut parsed = S3Url {
            bucket: bucket.to_string(),
            prefix: parse_prefix(url.path())?,
            region: None,
            endpoint: None,
            addressing: Addressing::Virtual,
            profile: None,
            credentials_file: None,
            ca_file: None,
            storage_class: None,
            encryption: None,
            tags: Vec::new(),
            checksum: ChecksumChoice::Auto,
            create_only: CreateOnly::Auto,
        };
        let (mut seen, mut addressing, mut key_id) = (Vec::new(), None, None);
        for (name, value) in url.query_pairs() {
            let wrong = |rule| BadUrl::Value { parameter: name.to_string(), value: value.to_string(), rule };
            if seen.contains(&name.to_string()) {
                return Err(BadUrl::Parameter { name: name.to_string(), known: KNOWN });
            }
            seen.push(name.to_string());
            if value.is_empty() || value.chars().any(char::is_control) {
                return Err(wrong("it must not be empty nor hold control characters"));
            }
            match &*name {
                "region" => {
                    let fits = value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
                    parsed.region = Some(
                        fits.then(|| value.to_string()).ok_or_else(|| wrong("it must be a name such as eu-west-1"))?,
                    );
                }
                "endpoint" => {
                    let rule = "it must be https://host or https://host:port (http only where written so)";
                    parsed.endpoint = Some(parse_endpoint(&value).ok_or_else(|| wrong(rule))?);
                }
                "addressing" => {
                    addressing = Some(match &*value {
                        "path" => Addressing::Path,
                        "virtual" => Addressing::Virtual,
                        _ => return Err(wrong("known are path and virtual")),
                    });
                }
                "profile" => parsed.profile = Some(value.to_string()),
                "credentials_file" | "ca_file" => {
                    let path = Path::new(&*value).is_absolute().then(|| PathBuf::from(&*value));
                    let path = Some(path.ok_or_else(|| wrong("it must be an absolute path"))?);
                    if name == "ca_file" { parsed.ca_file = path } else { parsed.credentials_file = path }
                }
                "storage_class" => {
                    let fits = value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
                    let class = fits.then(|| value.to_string());
                    parsed.storage_class = Some(class.ok_or_else(|| wrong("it must be a name such as STANDARD_IA"))?);
                }
                "sse" => {
                    parsed.encryption = Some(match &*value {
                        "AES256" => ServerSideEncryption::Aes256,
                        "aws:kms" => ServerSideEncryption::Kms { key_id: None },
                        _ => return Err(wrong("known are AES256 and aws:kms")),
                    });
                }
                "sse_kms_key_id" => key_id = Some(value.to_string()),
                "tags" => {
                    let rule = "it must be at most 10 names and values, as in k=v,k2=v2";
                    parsed.tags = parse_tags(&value).ok_or_else(|| wrong(rule))?;
                }
                "checksum" => {
                    parsed.checksum = match &*value {
                        "auto" => ChecksumChoice::Auto,
                        "crc32c" => ChecksumChoice::Crc32c,
                        "sha256" => ChecksumChoice::Sha256,
                        "md5" => ChecksumChoice::Md5,
                        "none" => ChecksumChoice::None,
                        _ => return Err(wrong("known are auto, crc32c, sha256, md5 and none")),
                    };
                }
                "create_only" => {
                    parsed.create_only = match &*value {
                        "auto" => CreateOnly::Auto,
                        "conditional" => CreateOnly::Conditional,
                        "head" => CreateOnly::Head,
                        _ => return Err(wrong("known are auto, conditional and head")),
                    };
                }
                _ => return Err(BadUrl::Parameter { name: name.to_string(), known: KNOWN }),
            }
        }
        if let Some(id) = key_id {
            match &mut parsed.encryption {
                Some(ServerSideEncryption::Kms { key_id }) => *key_id = Some(id),
                _ => {
                    let rule = "it needs sse=aws:kms beside it";
                    return Err(BadUrl::Value { parameter: "sse_kms_key_id".into(), value: id, rule });
                }
            }
        }
        let by_endpoint = if parsed.endpoint.is_some() { Addressing::Path } else { Addressing::Virtual };
        parsed.addressing = addressing.unwrap_or(by_endpoint);
        // A host name would lose them, and lead to another bucket.
        if parsed.addressing == Addressing::Virtual && parsed.bucket.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(BadUrl::CapitalInHost);
        }
        Ok(parsed)
    }
}

fn parse_prefix(path: &str) -> Result<String, BadUrl> {
    let path = percent_decoded(path).ok_or(BadUrl::Path)?;
    let prefix = path.trim_matches('/');
    let is_unfit = |part: &str| part.is_empty() || part == "." || part == ".." || part.chars().any(char::is_control);
    if !prefix.is_empty() && prefix.split('/').any(is_unfit) {
        return Err(BadUrl::Path);
    }
    Ok(prefix.to_string())
}

fn parse_endpoint(text: &str) -> Option<String> {
    let url = Url::parse(text).ok()?;
    let is_plain = url.has_host()
        && url.username().is_empty()
        && url.password().is_none()
        && url.query().is_none()
        && url.fragment().is_none();
    let is_web = matches!(url.scheme(), "http" | "https") && !text.ends_with("://");
    (is_plain && is_web).then(|| text.trim_end_matches('/').to_string())
}

fn parse_tags(text: &str) -> Option<Vec<(String, String)>> {
    let tags: Option<Vec<_>> = text
        .split(',')
        .map(|tag| tag.split_once('=').map(|(name, value)| (name.trim().to_string(), value.trim().to_string())))
        .collect();
    tags.filter(|tags| tags.len() <= MOST_TAGS && tags.iter().all(|(name, _)| !name.is_empty()))
}
