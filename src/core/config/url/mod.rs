//! The storage URL: one text that names strategy, place and parameters.

mod s3;

pub use s3::{Addressing, ChecksumChoice, CreateOnly, S3Url, ServerSideEncryption};

use crate::mode::Mode;
use std::fmt;
use std::path::PathBuf;
use url::Url;

/// Where WAL is stored. The scheme chooses the storage strategy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorageUrl {
    /// `file:///srv/wal?mode=0640`
    File {
        /// The directory, which must exist.
        path: PathBuf,
        /// Access rights of what is created below it.
        mode: Mode,
    },
    /// `s3://bucket/prefix?region=eu-west-1`
    S3(Box<S3Url>),
}

/// Why a URL is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadUrl {
    NotAUrl,
    Scheme(String),
    HoldsSecret,
    Host,
    Path,
    Fragment,
    Bucket,
    CapitalInHost,
    Parameter { name: String, known: &'static str },
    Value { parameter: String, value: String, rule: &'static str },
}

impl fmt::Display for BadUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadUrl::NotAUrl => write!(f, "It must be a URL such as file:///srv/wal"),
            BadUrl::Scheme(scheme) => write!(f, "The scheme {scheme} is not known; known are file and s3"),
            BadUrl::HoldsSecret => write!(f, "It holds a user name, a password or a key"),
            BadUrl::Host => write!(f, "A file URL takes no host: write three slashes, as in file:///srv/wal"),
            BadUrl::CapitalInHost => {
                write!(
                    f,
                    "A bucket with capital letters is no host name: write it in lower-case, or give addressing=path"
                )
            }
            BadUrl::Bucket => {
                write!(f, "The bucket must be letters, digits, dots, hyphens and underscores, as in s3://bucket/prefix")
            }
            BadUrl::Path => write!(f, "The path must be absolute and without .. parts or control characters"),
            BadUrl::Fragment => write!(f, "A # must be written as %23"),
            BadUrl::Parameter { name, known } => {
                write!(f, "The parameter {name} is not known, or given twice; known: {known}")
            }
            BadUrl::Value { parameter, value, rule } => write!(f, "The parameter {parameter} is {value}: {rule}"),
        }
    }
}

/// What such a text stands for; nothing where it is no UTF-8.
pub(super) fn percent_decoded(text: &str) -> Option<String> {
    // The query's own decoder takes a plus sign for a blank, which elsewhere means itself.
    let query = format!("k={}", text.replace('+', "%2B").replace('&', "%26"));
    let (_, value) = ::url::form_urlencoded::parse(query.as_bytes()).next()?;
    (!value.contains('\u{fffd}')).then(|| value.into_owned())
}

/// Names of parameters that would carry a secret.
fn names_a_secret(parameter: &str) -> bool {
    let parameter = parameter.to_ascii_lowercase();
    parameter != "sse_kms_key_id"
        && ["pass", "pwd", "secret", "token", "key"].iter().any(|word| parameter.contains(word))
}

impl StorageUrl {
    /// Reads a URL. An unknown parameter is an error, and so is a secret.
    pub fn parse(text: &str) -> Result<Self, BadUrl> {
        // Looked for in the text itself, so that a URL which is wrong in other ways is not repeated in a message either.
        let authority = text.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or(""));
        let query = text.split_once('?').map_or("", |(_, query)| query);
        let mut parameters = ::url::form_urlencoded::parse(query.as_bytes());
        let holds_secret = |name: &str, value: &str| names_a_secret(name) || name == "endpoint" && value.contains('@');
        if authority.contains('@') || parameters.any(|(name, value)| holds_secret(&name, &value)) {
            return Err(BadUrl::HoldsSecret);
        }
        // The URL standard would silently resolve these.
        let raw_path = text.split(['?', '#']).next().unwrap_or_default();
        if raw_path.split('/').any(|part| part == ".." || part.to_ascii_lowercase().replace("%2e", ".") == "..") {
            return Err(BadUrl::Path);
        }
        let url = Url::parse(text).map_err(|_| BadUrl::NotAUrl)?;
        match url.scheme() {
            "file" => Self::parse_file(&url),
            "s3" => Ok(StorageUrl::S3(Box::new(S3Url::parse(&url)?))),
            other => Err(BadUrl::Scheme(other.to_string())),
        }
    }

    fn parse_file(url: &Url) -> Result<Self, BadUrl> {
        if url.has_host() {
            return Err(BadUrl::Host);
        }
        if url.fragment().is_some() {
            return Err(BadUrl::Fragment);
        }
        let path = url.to_file_path().map_err(|()| BadUrl::Path)?;
        if path.to_string_lossy().chars().any(char::is_control) || path.to_str().is_none() {
            return Err(BadUrl::Path);
        }
        let mut mode = None;
        for (name, value) in url.query_pairs() {
            if name != "mode" || mode.is_some() {
                return Err(BadUrl::Parameter { name: name.into_owned(), known: "mode" });
            }
            let octal = u32::from_str_radix(&value, 8).ok().and_then(Mode::new);
            let rule = "it must be read and write rights, such as 0600 or 0640";
            let wrong = || BadUrl::Value { parameter: "mode".into(), value: value.to_string(), rule };
            mode = Some(octal.ok_or_else(wrong)?);
        }
        Ok(StorageUrl::File { path, mode: mode.unwrap_or(Mode::PRIVATE) })
    }
}

impl fmt::Display for StorageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StorageUrl::File { path, .. } => write!(f, "file://{}", path.display()),
            StorageUrl::S3(url) if url.prefix.is_empty() => write!(f, "s3://{}", url.bucket),
            StorageUrl::S3(url) => write!(f, "s3://{}/{}", url.bucket, url.prefix),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, mode: u32) -> Result<StorageUrl, BadUrl> {
        Ok(StorageUrl::File { path: path.into(), mode: Mode::new(mode).unwrap() })
    }

    #[test]
    fn a_file_url_names_a_directory_and_a_mode() {
        assert_eq!(StorageUrl::parse("file:///srv/wal"), file("/srv/wal", 0o600));
        assert_eq!(StorageUrl::parse("file:///srv/wal%20archive/?mode=0640"), file("/srv/wal archive/", 0o640));
    }

    fn s3(text: &str) -> Result<S3Url, BadUrl> {
        match StorageUrl::parse(text)? {
            StorageUrl::S3(url) => Ok(*url),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_s3_url_names_a_bucket_a_prefix_and_nothing_else_by_itself() {
        let url = s3("s3://bucket/some/prefix/").unwrap();
        assert_eq!((url.bucket.as_str(), url.prefix.as_str()), ("bucket", "some/prefix"));
        assert_eq!((url.addressing, url.region, url.endpoint), (Addressing::Virtual, None, None));
        assert_eq!((url.checksum, url.create_only), (ChecksumChoice::Auto, CreateOnly::Auto));
        assert_eq!(s3("s3://bucket").unwrap().prefix, "");
        assert_eq!(s3("s3://bucket/a%20b+c/d").unwrap().prefix, "a b+c/d");
        assert_eq!(StorageUrl::parse("s3://bucket/a%20b?region=x").unwrap().to_string(), "s3://bucket/a b");
    }

    #[test]
    fn every_parameter_of_s3_is_read() {
        let url = s3("s3://b/p?region=eu-west-1&endpoint=https://host:9000/&profile=wal&credentials_file=/etc/keys\
             &ca_file=/etc/ca.crt&storage_class=STANDARD_IA&sse=aws:kms&sse_kms_key_id=k1&tags=a=b,c=d\
             &checksum=crc32c&create_only=head")
        .unwrap();
        assert_eq!(url.region.as_deref(), Some("eu-west-1"));
        assert_eq!((url.endpoint.as_deref(), url.addressing), (Some("https://host:9000"), Addressing::Path));
        assert_eq!(url.profile.as_deref(), Some("wal"));
        assert_eq!(url.credentials_file, Some("/etc/keys".into()));
        assert_eq!(url.ca_file, Some("/etc/ca.crt".into()));
        assert_eq!(url.storage_class.as_deref(), Some("STANDARD_IA"));
        assert_eq!(url.encryption, Some(ServerSideEncryption::Kms { key_id: Some("k1".into()) }));
        assert_eq!(url.tags, [("a".into(), "b".into()), ("c".into(), "d".into())]);
        assert_eq!((url.checksum, url.create_only), (ChecksumChoice::Crc32c, CreateOnly::Head));
        assert_eq!(s3("s3://b?endpoint=http://h&addressing=virtual").unwrap().addressing, Addressing::Virtual);
    }

    #[test]
    fn a_wrong_s3_url_is_refused_with_its_cause() {
        for (text, part) in [
            ("s3:///x", "bucket"),
            ("s3://bucket:80/x", "bucket"),
            ("s3://buck%20et/x", ""),
            ("s3://Bucket/x", "lower-case"),
            ("s3://b/a//b", "path"),
            ("s3://b/a/%2e%2E/b", "path"),
            ("s3://b/x#y", "%23"),
            ("s3://b/x?regoin=y", "known: region, endpoint"),
            ("s3://b/x?region=a&region=b", "given twice"),
            ("s3://b/x?region=", "empty"),
            ("s3://b/x?endpoint=host:9000", "https://host:port"),
            ("s3://b/x?addressing=dns", "path and virtual"),
            ("s3://b/x?ca_file=ca.crt", "absolute"),
            ("s3://b/x?sse=rot13", "AES256 and aws:kms"),
            ("s3://b/x?sse_kms_key_id=k", "sse=aws:kms"),
            ("s3://b/x?sse=AES256&sse_kms_key_id=k", "sse=aws:kms"),
            ("s3://b/x?tags=a", "k=v,k2=v2"),
            ("s3://b/x?checksum=crc64nvme", "crc32c"),
            ("s3://b/x?create_only=no", "conditional"),
        ] {
            let cause = s3(text).expect_err(text).to_string();
            assert!(cause.contains(part), "{text}: {cause}");
        }
        assert_eq!(s3("s3://b/x?secret_key=y"), Err(BadUrl::HoldsSecret));
        assert_eq!(s3("s3://b/x?access_key_id=y"), Err(BadUrl::HoldsSecret));
        assert_eq!(s3("s3://b/x?endpoint=https://user:password@host"), Err(BadUrl::HoldsSecret));
        assert_eq!(s3("s3://b/x?endpoint=user:password@host:9000"), Err(BadUrl::HoldsSecret));
        assert_eq!(s3("s3://b/x?accesskey=y"), Err(BadUrl::HoldsSecret));
        assert_eq!(s3("s3://b/x?pwd=y"), Err(BadUrl::HoldsSecret));
    }

    #[test]
    fn every_other_text_is_refused_with_its_cause() {
        use BadUrl::*;
        let mode = |value: &str| Value {
            parameter: "mode".into(),
            value: value.into(),
            rule: "it must be read and write rights, such as 0600 or 0640",
        };
        for (text, cause) in [
            ("", NotAUrl),
            ("/srv/wal", NotAUrl),
            ("s4://bucket/x", Scheme("s4".into())),
            ("file://srv/wal", Host),
            ("file:///srv/../etc", Path),
            ("file:///srv/%2E./etc", Path),
            ("file:///srv/wal?mod=0640", Parameter { name: "mod".into(), known: "mode" }),
            ("file:///srv/wal?mode=0640&mode=0600", Parameter { name: "mode".into(), known: "mode" }),
            ("file:///srv/wal?mode=0777", mode("0777")),
            ("file:///srv/wal?mode=rw", mode("rw")),
            ("file:///srv/wal#1", Fragment),
            ("file:///srv/wal?password=x", HoldsSecret),
            ("s3://key:secret@bucket/x", HoldsSecret),
            ("s3://bucket/x?secret_access_key=x", HoldsSecret),
        ] {
            assert_eq!(StorageUrl::parse(text), Err(cause), "{text}");
        }
    }
}
