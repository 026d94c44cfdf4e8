//! The storage URL: one text that names strategy, place and parameters.

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
    Parameter(String),
    Mode(String),
}

impl fmt::Display for BadUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadUrl::NotAUrl => write!(f, "It must be a URL such as file:///srv/wal"),
            BadUrl::Scheme(scheme) => write!(f, "The scheme {scheme} is not known; known is file"),
            BadUrl::HoldsSecret => write!(f, "It holds a user name, a password or a key"),
            BadUrl::Host => write!(f, "A file URL takes no host: write three slashes, as in file:///srv/wal"),
            BadUrl::Path => write!(f, "The path must be absolute and without .. parts or control characters"),
            BadUrl::Fragment => write!(f, "A # must be written as %23"),
            BadUrl::Parameter(name) => write!(f, "The parameter {name} is not known, or given twice; known is mode"),
            BadUrl::Mode(mode) => {
                write!(f, "The mode {mode} is none of read and write rights, such as 0600 or 0640")
            }
        }
    }
}

/// Names of parameters that would carry a secret.
fn names_a_secret(parameter: &str) -> bool {
    let parameter = parameter.to_ascii_lowercase();
    ["password", "secret", "token", "access_key", "passphrase"].iter().any(|word| parameter.contains(word))
}

impl StorageUrl {
    /// Reads a URL. An unknown parameter is an error, and so is a secret.
    pub fn parse(text: &str) -> Result<Self, BadUrl> {
        // Looked for in the text itself, so that a URL which is wrong in other ways is not repeated in a message either.
        let authority = text.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or(""));
        let query = text.split_once('?').map_or("", |(_, query)| query);
        let mut parameters = ::url::form_urlencoded::parse(query.as_bytes());
        if authority.contains('@') || parameters.any(|(name, _)| names_a_secret(&name)) {
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
                return Err(BadUrl::Parameter(name.into_owned()));
            }
            let octal = u32::from_str_radix(&value, 8).ok().and_then(Mode::new);
            mode = Some(octal.ok_or_else(|| BadUrl::Mode(value.into_owned()))?);
        }
        Ok(StorageUrl::File { path, mode: mode.unwrap_or(Mode::PRIVATE) })
    }
}

impl fmt::Display for StorageUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StorageUrl::File { path, .. } => write!(f, "file://{}", path.display()),
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

    #[test]
    fn every_other_text_is_refused_with_its_cause() {
        use BadUrl::*;
        for (text, cause) in [
            ("", NotAUrl),
            ("/srv/wal", NotAUrl),
            ("s4://bucket/x", Scheme("s4".into())),
            ("file://srv/wal", Host),
            ("file:///srv/../etc", Path),
            ("file:///srv/%2E./etc", Path),
            ("file:///srv/wal?mod=0640", Parameter("mod".into())),
            ("file:///srv/wal?mode=0640&mode=0600", Parameter("mode".into())),
            ("file:///srv/wal?mode=0777", Mode("0777".into())),
            ("file:///srv/wal?mode=rw", Mode("rw".into())),
            ("file:///srv/wal#1", Fragment),
            ("file:///srv/wal?password=x", HoldsSecret),
            ("s3://key:secret@bucket/x", HoldsSecret),
            ("s3://bucket/x?secret_access_key=x", HoldsSecret),
        ] {
            assert_eq!(StorageUrl::parse(text), Err(cause), "{text}");
        }
    }
}
