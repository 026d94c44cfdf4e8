//! A store behind S3's protocol, Amazon's or any compatible one: one object a key, created by a conditional put.
//!
//! rust-s3 has the signatures, the encodings and the answers' shapes; the requests themselves are made here
//! ([`session`]), since the library's client can neither be told of further certificates nor tell the headers of a
//! refusal, sends no body of known length without holding all of it, and bounds no answer.

mod background;
pub mod credentials;
mod session;
mod signature;
mod trouble;

use super::{Attributes, Body, CredentialFacts, Facts, Listed, Meta, Object, Put, Store};
use crate::config::{Addressing, ChecksumChoice, CreateOnly, S3Url, ServerSideEncryption};
use crate::error::{Error, Kind, Result};
use crate::hash::{Hash, Noted, NotedHash};
use crate::pulse::Pulse;
use crate::single_flight::SingleFlight;
use background::Background;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use credentials::{Chain, Keeper};
use md5::Md5;
use once_cell::sync::OnceCell;
use reqwest::header::{
    CONTENT_LENGTH, CONTENT_TYPE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH, LAST_MODIFIED, RANGE,
};
use reqwest::{Method, Url};
use s3::Region;
use s3::serde_types::{DeleteObjectsResult, ListBucketResult};
use s3::signing::uri_encode;
use session::{Call, Outcome, Peer, Session, Streamed, error_of_caller};
use sha2::{Digest, Sha256};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::{Rfc2822, Rfc3339};
use trouble::{Class, Trouble};

/// Metadata of ours on every object: what tells its content without reading it, and one creation from another.
const META_BLAKE3: HeaderName = HeaderName::from_static("x-amz-meta-archiver-blake3");
/// The same for an encrypted object, by the cluster's key.
const META_BLAKE3_KEYED: HeaderName = HeaderName::from_static("x-amz-meta-archiver-blake3-keyed");
const META_SIZE: HeaderName = HeaderName::from_static("x-amz-meta-archiver-size");
const META_MODIFIED: HeaderName = HeaderName::from_static("x-amz-meta-archiver-modified");
const META_STORED_SIZE: HeaderName = HeaderName::from_static("x-amz-meta-archiver-stored-size");
const META_PUT: HeaderName = HeaderName::from_static("x-amz-meta-archiver-put");

/// What a HEAD tells of versions and locks.
const VERSION_ID: HeaderName = HeaderName::from_static("x-amz-version-id");
const LEGAL_HOLD: HeaderName = HeaderName::from_static("x-amz-object-lock-legal-hold");
const LOCK_MODE: HeaderName = HeaderName::from_static("x-amz-object-lock-mode");
const LOCKED_UNTIL: HeaderName = HeaderName::from_static("x-amz-object-lock-retain-until-date");

/// S3's own bound on a page and on one request to delete.
const MOST_KEYS: usize = 1000;
/// S3's own bound on an object that is put at once.
const LARGEST_OBJECT: u64 = 5 << 30;

/// How long requests may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// One request, without any progress.
    pub attempt: Duration,
    /// All attempts at one call.
    pub all: Duration,
}

/// Objects in a bucket, below a prefix.
pub struct S3Store {
    session: Arc<Session>,
    url: S3Url,
    /// The key by which the store shows that it heeds the condition.
    probe_key: String,
    /// Never waited for: what runs beside the requests looks at it.
    guard: OnceCell<Guard>,
    probing: SingleFlight<()>,
    checksum: Mutex<Checksum>,
}

/// How an object is kept from being overwritten, as found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    Condition,
    Look,
}

/// What goes with a body beside its signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checksum {
    Sha256,
    Crc32c,
    Md5,
    None,
}

impl Checksum {
    /// What is tried where the store did not take this one.
    fn fallback(self) -> Option<Self> {
        match self {
            Checksum::Sha256 => Some(Checksum::Md5),
            Checksum::Md5 => Some(Checksum::None),
            Checksum::Crc32c | Checksum::None => None,
        }
    }
}

/// What a body is known by on the wire.
struct Digests {
    length: u64,
    sha256: [u8; 32],
    crc32c: u32,
    md5: Option<[u8; 16]>,
}

/// Takes a body's digests while it is written.
struct Digesting {
    length: u64,
    sha256: Sha256,
    crc32c: u32,
    md5: Option<Md5>,
}

impl Digesting {
    fn new(checksum: Checksum) -> Self {
        let md5 = (checksum == Checksum::Md5).then(Md5::new);
        Digesting { length: 0, sha256: Sha256::new(), crc32c: 0, md5 }
    }

    fn finish(self) -> Digests {
        let md5 = self.md5.map(|md5| md5.finalize().into());
        Digests { length: self.length, sha256: self.sha256.finalize().into(), crc32c: self.crc32c, md5 }
    }
}

impl Write for Digesting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.length += bytes.len() as u64;
        self.sha256.update(bytes);
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        if let Some(md5) = &mut self.md5 {
            md5.update(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl S3Store {
    /// The store behind `url`; nothing is sent before the first call. `probe_key` is where a store that is to show that
    /// it heeds conditions is asked to; `environment` is where credentials and region are looked for.
    pub fn open(
        url: &S3Url,
        probe_key: &str,
        patience: Patience,
        environment: impl Fn(&str) -> Option<String>,
        pulse: Arc<Pulse>,
    ) -> Result<Self> {
        let chain = Chain::new(url.profile.as_deref(), url.credentials_file.as_deref(), environment);
        let (background, keeper) = (Background::start()?, Keeper::new(chain));
        let region = match &url.region {
            Some(region) => Some(region.clone()),
            None => {
                let keeper = keeper.clone();
                background.run(async move { keeper.chain().region().await })??
            }
        };
        let region = region.unwrap_or_else(|| "us-east-1".to_string());
        let endpoint = url.endpoint.clone().unwrap_or_else(|| {
            let top = if region.starts_with("cn-") { "amazonaws.com.cn" } else { "amazonaws.com" };
            format!("https://s3.{region}.{top}")
        });
        let base = match url.addressing {
            Addressing::Path => format!("{endpoint}/{}", url.bucket),
            Addressing::Virtual => endpoint.replacen("://", &format!("://{}.", url.bucket), 1),
        };
        let peer = Peer {
            base,
            region: Region::Custom { region, endpoint },
            ca_file: url.ca_file.clone(),
            attempt_timeout: patience.attempt,
            retry_timeout: patience.all,
        };
        let checksum = match url.checksum {
            ChecksumChoice::Auto | ChecksumChoice::Sha256 => Checksum::Sha256,
            ChecksumChoice::Crc32c => Checksum::Crc32c,
            ChecksumChoice::Md5 => Checksum::Md5,
            ChecksumChoice::None => Checksum::None,
        };
        let guard = match url.create_only {
            CreateOnly::Auto => OnceCell::new(),
            CreateOnly::Conditional => OnceCell::with_value(Guard::Condition),
            CreateOnly::Head => OnceCell::with_value(Guard::Look),
        };
        Ok(S3Store {
            session: Arc::new(Session::open(background, peer, keeper, pulse)?),
            url: url.clone(),
            probe_key: probe_key.to_string(),
            guard,
            probing: SingleFlight::default(),
            checksum: Mutex::new(checksum),
        })
    }

    fn below_bucket(&self, key: &str) -> String {
        match self.url.prefix.as_str() {
            "" => key.to_string(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    fn request_url(&self, path: &str, query: &[(&str, &str)]) -> Result<Url> {
        let mut text = format!("{}/{}", self.session.peer().base, uri_encode(path, false));
        for (number, (name, value)) in query.iter().enumerate() {
            text.push(if number == 0 { '?' } else { '&' });
            text += &format!("{name}={}", uri_encode(value, true));
        }
        Url::parse(&text).map_err(|error| {
            let cause = format!("could not make the URL of a request: {error}");
            Error::new(Kind::Internal, path, cause)
        })
    }

    fn object_call(&self, method: Method, key: &str) -> Result<Call> {
        Ok(Call::new(method, self.request_url(&self.below_bucket(key), &[])?))
    }

    /// How objects are kept from being overwritten; the first time, the store has to show that it heeds the condition.
    fn guard(&self) -> Result<Guard> {
        match self.guard.get() {
            Some(known) => Ok(*known),
            None => self.probing.with(|()| self.guard.get_or_try_init(|| self.find_guard()).copied()),
        }
    }

    fn find_guard(&self) -> Result<Guard> {
        let overwrites = |how: &str| {
            let location = self.location(&self.probe_key);
            Error::new(Kind::Configuration, location.clone(), "the store would overwrite archived files")
                .detail(format!("PUT {location} with If-None-Match: * {how}."))
                .hint(
                    "Use a store that knows conditional puts. Where only this one server writes to the archive, \
                     create_only=head in archiver.storage looks before each put instead, which is weaker.",
                )
        };
        // The object stays: from now on the first put is answer enough.
        for _ in 0..2 {
            let body = b"Shows that this store refuses to overwrite. It may be removed at any time.\n";
            let attributes = Attributes { modified: SystemTime::now(), content: None };
            match self.put_guarded(&self.probe_key, Body::Bytes(body), &attributes, Guard::Condition) {
                Ok(Put::Created { .. }) => {}
                Ok(Put::AlreadyExists) => return Ok(Guard::Condition),
                Err(PutFailure::Trouble(trouble)) if trouble.status == Some(501) => {
                    return Err(overwrites("is not implemented there"));
                }
                Err(failure) => return Err(failure.into()),
            }
        }
        Err(overwrites("replaced what stood there"))
    }

    fn put_guarded(
        &self,
        key: &str,
        mut body: Body<'_>,
        attributes: &Attributes,
        guard: Guard,
    ) -> std::result::Result<Put, PutFailure> {
        if guard == Guard::Look && self.head(key)?.is_some() {
            return Ok(Put::AlreadyExists);
        }
        let (mut first_refusal, mut checksum) = (None, *self.checksum.lock().unwrap_or_else(PoisonError::into_inner));
        loop {
            match self.put_with(key, &mut body, attributes, guard, checksum) {
                Err(PutFailure::Trouble(trouble))
                    if self.url.checksum == ChecksumChoice::Auto && may_be_about_checksum(&trouble) =>
                {
                    let refusal = first_refusal.get_or_insert(trouble);
                    let Some(next) = checksum.fallback() else {
                        // It was not about that, then.
                        return Err(PutFailure::Trouble(refusal.clone()));
                    };
                    checksum = next;
                }
                Ok(put) => {
                    if first_refusal.is_some() {
                        *self.checksum.lock().unwrap_or_else(PoisonError::into_inner) = checksum;
                    }
                    return Ok(put);
                }
                failed => return failed,
            }
        }
    }

    fn put_with(
        &self,
        key: &str,
        body: &mut Body<'_>,
        attributes: &Attributes,
        guard: Guard,
        checksum: Checksum,
    ) -> std::result::Result<Put, PutFailure> {
        let mut digesting = Digesting::new(checksum);
        let written = match body {
            Body::Bytes(bytes) => digesting.write_all(bytes),
            Body::Lent(bytes) => digesting.write_all((**bytes).as_ref()),
            Body::Shared(bytes) => digesting.write_all(bytes),
            Body::Stream(write) => write(&mut digesting),
        };
        written.map_err(|error| error_of_caller(&error))?;
        let digests = digesting.finish();
        if digests.length > LARGEST_OBJECT {
            let cause = format!("an object of {} bytes is too large for one put", digests.length);
            return Err(Error::new(Kind::Storage, self.location(key), cause).into());
        }
        let put_id = format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..));
        let mut call = self.object_call(Method::PUT, key)?;
        call.headers = self.put_headers(attributes, guard, checksum, &digests, &put_id)?;
        call.sha256 = hex::encode(digests.sha256);
        call.body = match body {
            Body::Bytes(bytes) => Bytes::copy_from_slice(bytes),
            Body::Lent(bytes) => Bytes::copy_from_slice((**bytes).as_ref()),
            Body::Shared(bytes) => bytes.clone(),
            Body::Stream(_) => Bytes::new(),
        };
        let answer = match body {
            Body::Stream(write) => {
                let mut streamed = Streamed { length: digests.length, crc32c: digests.crc32c, write: *write };
                self.session.call_streamed(&call, &mut streamed)
            }
            _ => self.session.call(&call),
        };
        match answer {
            Ok(answer) if answer.headers.contains_key(ETAG) => Ok(Put::Created { stored_size: digests.length }),
            // Whatever answered that, it was no store that says what it keeps.
            Ok(_) => Err(PutFailure::Trouble(Trouble::senseless("a put was answered without an ETag"))),
            Err(trouble) if trouble.class == Class::AlreadyThere => {
                // An attempt whose answer was lost may have created it.
                let is_ours = |headers: &HeaderMap| {
                    text_of(headers, &META_PUT) == Some(&*put_id) && meta_of(headers).stored_size == digests.length
                };
                let is_ours = trouble.may_be_done && self.head_headers(key)?.as_ref().is_some_and(is_ours);
                Ok(if is_ours { Put::Created { stored_size: digests.length } } else { Put::AlreadyExists })
            }
            Err(trouble) => Err(PutFailure::Trouble(trouble)),
        }
    }

    fn put_headers(
        &self,
        attributes: &Attributes,
        guard: Guard,
        checksum: Checksum,
        digests: &Digests,
        put_id: &str,
    ) -> Result<HeaderMap> {
        let mut headers = HeaderMap::new();
        let mut add = |name: HeaderName, value: &str| -> Result<()> {
            let value = HeaderValue::from_str(value).map_err(|_| {
                let cause = format!("a value for the header {name} holds characters that no header may");
                Error::new(Kind::Configuration, "archiver.storage", cause)
            })?;
            headers.insert(name, value);
            Ok(())
        };
        add(CONTENT_TYPE, "application/octet-stream")?;
        if guard == Guard::Condition {
            add(IF_NONE_MATCH, "*")?;
        }
        match checksum {
            Checksum::Sha256 => {
                add(HeaderName::from_static("x-amz-checksum-sha256"), &BASE64.encode(digests.sha256))?;
            }
            Checksum::Crc32c => {
                let sum = BASE64.encode(digests.crc32c.to_be_bytes());
                add(HeaderName::from_static("x-amz-checksum-crc32c"), &sum)?;
            }
            Checksum::Md5 => {
                add(HeaderName::from_static("content-md5"), &BASE64.encode(digests.md5.unwrap_or_default()))?;
            }
            Checksum::None => {}
        }
        if let Some(class) = &self.url.storage_class {
            add(HeaderName::from_static("x-amz-storage-class"), class)?;
        }
        match &self.url.encryption {
            None => {}
            Some(ServerSideEncryption::Aes256) => {
                add(HeaderName::from_static("x-amz-server-side-encryption"), "AES256")?;
            }
            Some(ServerSideEncryption::Kms { key_id }) => {
                add(HeaderName::from_static("x-amz-server-side-encryption"), "aws:kms")?;
                if let Some(id) = key_id {
                    add(HeaderName::from_static("x-amz-server-side-encryption-aws-kms-key-id"), id)?;
                }
            }
        }
        if !self.url.tags.is_empty() {
            let pair =
                |(name, value): &(String, String)| format!("{}={}", uri_encode(name, true), uri_encode(value, true));
            let tags: Vec<String> = self.url.tags.iter().map(pair).collect();
            add(HeaderName::from_static("x-amz-tagging"), &tags.join("&"))?;
        }
        let since_epoch = attributes.modified.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        add(META_MODIFIED, &format!("{}.{:09}", since_epoch.as_secs(), since_epoch.subsec_nanos()))?;
        add(META_PUT, put_id)?;
        if let Some(content) = &attributes.content {
            match content.hash {
                NotedHash::Open(hash) => add(META_BLAKE3, &hash.0.to_hex())?,
                NotedHash::Keyed(hash) => add(META_BLAKE3_KEYED, &hash.0.to_hex())?,
            }
            add(META_SIZE, &content.size.to_string())?;
            add(META_STORED_SIZE, &digests.length.to_string())?;
        }
        Ok(headers)
    }

    fn head_headers(&self, key: &str) -> Result<Option<HeaderMap>> {
        match self.session.call(&self.object_call(Method::HEAD, key)?) {
            Ok(answer) => Ok(Some(answer.headers)),
            Err(trouble) if trouble.class == Class::NotThere => Ok(None),
            Err(trouble) => Err(self.explained(key, trouble).into()),
        }
    }

    /// What the store says of a refused HEAD, whose answer has no body to say it in: by a GET of as little as can be.
    fn explained(&self, key: &str, trouble: Box<Trouble>) -> Box<Trouble> {
        let is_told = !trouble.code.is_empty() || !matches!(trouble.status, Some(400 | 401 | 403));
        let asked = self.object_call(Method::GET, key).map(|mut call| {
            call.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
            call
        });
        let Some(call) = asked.ok().filter(|_| !is_told) else { return trouble };
        match self.session.call(&call) {
            Err(told) if matches!(told.status, Some(400 | 401 | 403)) => told,
            _ => trouble,
        }
    }

    /// One page of keys below `prefix` and behind `after`; whether there are more.
    fn list_once(&self, prefix: &str, after: Option<&str>, most: usize) -> Result<(ListBucketResult, bool)> {
        let most = most.min(MOST_KEYS).to_string();
        let mut query = vec![("list-type", "2"), ("max-keys", &*most), ("prefix", prefix)];
        query.extend(after.map(|after| ("start-after", after)));
        // Signed in this order as well.
        query.sort_unstable();
        let answer = self.session.call(&Call::new(Method::GET, self.request_url("", &query)?)).map_err(Error::from)?;
        let page: ListBucketResult = read_xml(&answer.body)?;
        let is_truncated = page.is_truncated;
        Ok((page, is_truncated))
    }

    /// Fails for those of the objects that a retention or a legal hold protects. Only buckets that keep versions have such,
    /// and there a deletion would succeed and hide the object, whose bytes stay: neither is what was asked for.
    ///
    /// One request tells where there are no versions. What cannot be looked at is left to the store's own judgement.
    fn refuse_locked(&self, keys: &[String]) -> Vec<Result<()>> {
        let mut may_be_locked = true;
        let look = |key: &String| {
            let headers = if may_be_locked { self.head_headers(key).ok().flatten() } else { None };
            let Some(headers) = headers else { return Ok(()) };
            may_be_locked = text_of(&headers, &VERSION_ID).is_some_and(|version| version != "null");
            match protection(&headers) {
                Some(cause) => {
                    let location = self.location(key);
                    let message = format!("could not delete \"{location}\": {cause}");
                    Err(Error::new(Kind::Storage, location, message))
                }
                None => Ok(()),
            }
        };
        keys.iter().map(look).collect()
    }

    fn delete_batch(&self, keys: &[String]) -> Outcome<Vec<Result<()>>> {
        let objects: String = keys
            .iter()
            .map(|key| format!("<Object><Key>{}</Key></Object>", quick_xml::escape::escape(self.below_bucket(key))))
            .collect();
        let body =
            format!("<Delete xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><Quiet>false</Quiet>{objects}</Delete>");
        let mut call = Call::new(Method::POST, self.request_url("", &[("delete", "")]).map_err(Trouble::beside)?);
        call.sha256 = hex::encode(Sha256::digest(&body));
        // Asked for by S3 itself, and by those that know no newer checksum.
        let md5 = HeaderValue::from_str(&BASE64.encode(Md5::digest(&body)));
        md5.into_iter().for_each(|md5| drop(call.headers.insert(HeaderName::from_static("content-md5"), md5)));
        call.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/xml"));
        call.body = Bytes::from(body);
        let answer = self.session.call(&call)?;
        let result: DeleteObjectsResult = read_xml(&answer.body).map_err(Trouble::beside)?;
        let outcome = |key: &String| {
            let full = self.below_bucket(key);
            if let Some(refused) = result.errors.iter().find(|error| error.key == full) {
                let (code, said) = (refused.code.as_str(), refused.message.as_str());
                let message = format!("could not delete \"{}\": the store answered {code}", self.location(key));
                let detail = format!("The store said: {}.", said.trim_end_matches('.'));
                let error = Error::new(Kind::Storage, self.location(key), message).detail(detail);
                return Err(if code == "AccessDenied" {
                    error.hint("Allow these credentials to delete there, if that is intended.")
                } else {
                    error
                });
            }
            if result.deleted.iter().any(|deleted| deleted.key == full) {
                return Ok(());
            }
            let message =
                format!("could not delete \"{}\": the store did not say what became of it", self.location(key));
            Err(Error::new(Kind::Storage, self.location(key), message).retry_if(true))
        };
        Ok(keys.iter().map(outcome).collect())
    }
}

/// What keeps an object from being removed for good, by the headers of its HEAD.
fn protection(headers: &HeaderMap) -> Option<String> {
    if text_of(headers, &LEGAL_HOLD).is_some_and(|hold| hold.eq_ignore_ascii_case("on")) {
        return Some("it is under a legal hold".to_string());
    }
    let (mode, until) = (text_of(headers, &LOCK_MODE)?, text_of(headers, &LOCKED_UNTIL).unwrap_or("further notice"));
    let is_over =
        OffsetDateTime::parse(until, &Rfc3339).is_ok_and(|until| SystemTime::from(until) <= SystemTime::now());
    (!is_over).then(|| format!("it is locked until {until} ({mode})"))
}

/// Why a put failed: the store's answer, which may lead to another try, or anything else.
enum PutFailure {
    Trouble(Box<Trouble>),
    Error(Error),
}

impl From<Error> for PutFailure {
    fn from(error: Error) -> Self {
        PutFailure::Error(error)
    }
}

impl From<PutFailure> for Error {
    fn from(failure: PutFailure) -> Self {
        match failure {
            PutFailure::Trouble(trouble) => trouble.into(),
            PutFailure::Error(error) => error,
        }
    }
}

/// Several S3-compatibles turn a checksum header down that they do not know, in words of their own.
fn may_be_about_checksum(trouble: &Trouble) -> bool {
    const ABOUT_SOMETHING_ELSE: [&str; 8] = [
        "AuthorizationHeaderMalformed",
        "ExpiredToken",
        "InvalidToken",
        "InvalidStorageClass",
        "InvalidTag",
        "InvalidBucketName",
        "InvalidAccessKeyId",
        "EntityTooLarge",
    ];
    matches!(trouble.status, Some(400 | 501))
        && !ABOUT_SOMETHING_ELSE.contains(&trouble.code.as_str())
        && !trouble.is_passing()
}

fn read_xml<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T> {
    let senseless = |cause: String| Error::from(Trouble::senseless(&cause));
    let text = std::str::from_utf8(body).map_err(|error| senseless(error.to_string()))?;
    quick_xml::de::from_str(text).map_err(|error| senseless(error.to_string()))
}

fn text_of<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn meta_of(headers: &HeaderMap) -> Meta {
    let text = |name: &HeaderName| text_of(headers, name);
    let stored_at = text(&LAST_MODIFIED).and_then(|date| OffsetDateTime::parse(date, &Rfc2822).ok());
    let hash = |name: &HeaderName| text(name).and_then(Hash::from_hex);
    let open = hash(&META_BLAKE3).map(NotedHash::Open);
    let hash = open.or_else(|| hash(&META_BLAKE3_KEYED).map(NotedHash::Keyed));
    let content = text(&META_SIZE).and_then(|size| size.parse().ok()).zip(hash);
    let number = |name: &HeaderName| text(name).and_then(|number| number.parse::<u64>().ok());
    let stored_size = number(&CONTENT_LENGTH).unwrap_or_default();
    // What a faulty store kept of a torn body has the metadata of the whole one.
    let content = content.filter(|_| number(&META_STORED_SIZE).is_none_or(|size| size == stored_size));
    let part = |name| text(name).unwrap_or_default();
    Meta {
        stored_size,
        modified: text(&META_MODIFIED)
            .and_then(parse_modified)
            .or(stored_at.map(SystemTime::from))
            .unwrap_or(SystemTime::UNIX_EPOCH),
        content: content.map(|(size, hash)| Noted { size, hash }),
        version: format!("{} {} {}", part(&ETAG), part(&LAST_MODIFIED), part(&META_PUT)),
    }
}

fn parse_modified(text: &str) -> Option<SystemTime> {
    let (seconds, nanoseconds) = text.split_once('.')?;
    let nanoseconds = nanoseconds.parse().ok().filter(|&ns| ns < 1_000_000_000)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds.parse().ok()?, nanoseconds))
}

impl Store for S3Store {
    fn put_new(&self, key: &str, body: Body<'_>, attributes: &Attributes) -> Result<Put> {
        let guard = self.guard()?;
        Ok(self.put_guarded(key, body, attributes, guard)?)
    }

    fn get(&self, key: &str) -> Result<Option<Object>> {
        match self.session.open_object(&self.object_call(Method::GET, key)?) {
            Ok((headers, body)) => Ok(Some(Object { meta: meta_of(&headers), body: Box::new(body) })),
            Err(trouble) if trouble.class == Class::NotThere => Ok(None),
            Err(trouble) => Err(trouble.into()),
        }
    }

    fn head(&self, key: &str) -> Result<Option<Meta>> {
        Ok(self.head_headers(key)?.as_ref().map(meta_of))
    }

    fn list(&self, folder: &str, after: Option<&str>, most: usize) -> Result<Vec<Listed>> {
        let most = most.max(1);
        let prefix = self.below_bucket(&format!("{folder}/"));
        let above = self.below_bucket("");
        let mut after = after.map(|after| self.below_bucket(after));
        let mut found = Vec::new();
        loop {
            let (page, is_truncated) = self.list_once(&prefix, after.as_deref(), most - found.len())?;
            let last = page.contents.last().map(|object| object.key.clone());
            let senseless = |cause: &str| Err(Error::from(Trouble::senseless(cause)));
            // Whatever a listing leaves out would be taken for absent; one that does not go on would never end.
            if is_truncated && last.is_none() {
                return senseless("a page of a listing is empty and not the last one");
            }
            if page.contents.first().is_some_and(|first| after.as_ref().is_some_and(|after| first.key <= *after)) {
                return senseless("a listing does not begin where it was asked to");
            }
            for object in page.contents {
                let stored_at = OffsetDateTime::parse(&object.last_modified, &Rfc3339).map(SystemTime::from);
                let Some(key) = object.key.strip_prefix(&above).filter(|_| object.key.starts_with(&prefix)) else {
                    return senseless("a listing holds keys that were not asked for");
                };
                found.push(Listed {
                    key: key.to_string(),
                    stored_size: object.size,
                    stored_at: stored_at.unwrap_or(SystemTime::UNIX_EPOCH),
                });
            }
            if !is_truncated || found.len() >= most {
                found.truncate(most);
                return Ok(found);
            }
            after = last;
        }
    }

    fn delete(&self, key: &str) -> Result<bool> {
        if self.head(key)?.is_none() {
            return Ok(false);
        }
        match self.session.call(&self.object_call(Method::DELETE, key)?) {
            Ok(_) => Ok(true),
            Err(trouble) if trouble.class == Class::NotThere => Ok(false),
            Err(trouble) => Err(trouble.into()),
        }
    }

    fn delete_all(&self, keys: &[String]) -> Vec<Result<()>> {
        let delete = |key: &String| match self.session.call(&self.object_call(Method::DELETE, key)?) {
            Err(trouble) if trouble.class != Class::NotThere => Err(trouble.into()),
            _ => Ok(()),
        };
        let one_by_one = |keys: &[String]| -> Vec<Result<()>> { keys.iter().map(delete).collect() };
        let batch = |keys: &[String]| match self.delete_batch(keys) {
            Ok(outcomes) => outcomes,
            // Some stores know no batches, or want them signed in ways of their own.
            Err(trouble) if matches!(trouble.status, Some(400 | 403 | 404 | 405 | 411 | 501)) => one_by_one(keys),
            Err(trouble) => {
                let error = Error::from(trouble);
                keys.iter().map(|_| Err(error.clone())).collect()
            }
        };
        let unless_locked = |keys: &[String]| {
            let mut outcomes = self.refuse_locked(keys);
            let is_free = |outcome: &Result<()>| outcome.is_ok();
            let free: Vec<String> =
                keys.iter().zip(&outcomes).filter(|(_, it)| is_free(it)).map(|(key, _)| key.clone()).collect();
            let deleted = if free.is_empty() { Vec::new() } else { batch(&free) };
            outcomes.iter_mut().filter(|outcome| is_free(outcome)).zip(deleted).for_each(|(it, done)| *it = done);
            outcomes
        };
        keys.chunks(MOST_KEYS).flat_map(unless_locked).collect()
    }

    fn location(&self, key: &str) -> String {
        format!("{}/{}", self.session.peer().base, self.below_bucket(key))
    }

    fn lasting_location(&self, key: &str) -> String {
        let path = format!("s3://{}/{}", self.url.bucket, self.below_bucket(key));
        match &self.url.endpoint {
            Some(endpoint) => format!("{path} at {endpoint}"),
            None => path,
        }
    }

    fn facts(&self) -> Facts {
        let keeper = self.session.keeper();
        Facts {
            create_only: match self.guard.get() {
                Some(Guard::Look) => "head",
                Some(Guard::Condition) => "conditional",
                None => "not yet shown",
            },
            credentials: keeper
                .known()
                .map(|(source, expires)| CredentialFacts { source: source.to_string(), expires }),
            credential_failure: keeper.last_failure(),
            retries: self.session.retries(),
        }
    }

    fn confirm_access(&self) -> Result<()> {
        self.session.credentials().map(drop)
    }
}
