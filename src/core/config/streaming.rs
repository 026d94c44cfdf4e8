//! Streaming, as it is set.

use super::url::percent_decoded;
use super::{Destination, Setting, Settings, StorageUrl};
use crate::error::{Error, Kind, Result};
use std::path::PathBuf;
use std::time::Duration;

/// What whoever receives WAL needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Streaming {
    /// How to reach the server; whatever is not said there comes from libpq's environment.
    pub conninfo: Conninfo,
    /// The name that the server knows the receiver by: what stands in `synchronous_standby_names`.
    pub archiver_name: String,
    /// The replication slot, where one is used.
    pub slot_name: Option<String>,
    /// Whether a slot that is missing is made.
    pub creates_slot: bool,
    /// Where WAL is received.
    pub directory: PathBuf,
    /// How many files are archived in one run, where there is a bound.
    pub batch_size: Option<usize>,
    /// How often what was received of the current segment is put into the storage, if it is.
    pub partial_interval: Option<Duration>,
    /// Directories to look for PostgreSQL's programs in, before those of PATH.
    pub path_prefix: Vec<PathBuf>,
}

/// A connection string of libpq's (PostgreSQL manual, 34.1.1), without secrets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conninfo(String);

/// Why a text is no connection string that may be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadConninfo {
    /// It holds what nobody may read.
    HoldsSecret,
    /// libpq would not understand it.
    Malformed,
}

const SECRETS: [&str; 5] = ["password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"];
const URI_SCHEMES: [&str; 2] = ["postgresql://", "postgres://"];

impl Conninfo {
    /// Takes a URI, or keywords with values, or nothing.
    pub fn parse(text: &str) -> std::result::Result<Self, BadConninfo> {
        let keywords = keywords(text)?;
        let is_secret = |keyword: &String| SECRETS.iter().any(|secret| keyword.eq_ignore_ascii_case(secret));
        if keywords.iter().any(is_secret) {
            return Err(BadConninfo::HoldsSecret);
        }
        Ok(Conninfo(text.to_string()))
    }

    /// The same with that keyword, whatever was said of it before: the last one counts.
    pub fn with(&self, keyword: &str, value: &str) -> String {
        if !URI_SCHEMES.iter().any(|scheme| self.0.starts_with(scheme)) {
            let value = value.replace('\\', "\\\\").replace('\'', "\\'");
            return format!("{} {keyword}='{value}'", self.0).trim_start().to_string();
        }
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~".contains(byte);
        let value: String = value
            .bytes()
            .map(|byte| if plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
            .collect();
        format!("{}{}{keyword}={value}", self.0, if self.0.contains('?') { '&' } else { '?' })
    }

    /// The same with that keyword, unless it says something of it, or names a service that may.
    pub fn with_default(&self, keyword: &str, value: &str) -> Self {
        let keywords = keywords(&self.0).unwrap_or_default();
        let says = |one: &str| keywords.iter().any(|said| said.eq_ignore_ascii_case(one));
        if says(keyword) || says("service") || std::env::var_os("PGSERVICE").is_some() {
            return self.clone();
        }
        Conninfo(self.with(keyword, value))
    }

    /// As it was set.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// The keywords of a connection string.
fn keywords(text: &str) -> std::result::Result<Vec<String>, BadConninfo> {
    match URI_SCHEMES.iter().find_map(|scheme| text.strip_prefix(scheme)) {
        Some(rest) => uri_keywords(rest),
        None => plain_keywords(text).ok_or(BadConninfo::Malformed),
    }
}

/// The keywords of a URI behind its scheme, as libpq reads it (fe-connect.c, `conninfo_uri_parse_options`).
fn uri_keywords(text: &str) -> std::result::Result<Vec<String>, BadConninfo> {
    // Who connects stands before the first @ that comes before any slash, whatever else it holds.
    let credentials = text.split_once('@').filter(|(before, _)| !before.contains('/'));
    let rest = credentials.map_or(text, |(_, rest)| rest);
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    // Another @, or a port that is none, is part of a password that should have been written otherwise: libpq would name it
    // in its complaint.
    let has_strange_port = |host: &str| {
        let behind = host.rsplit_once(']').map_or(host, |(_, behind)| behind);
        behind.rsplit_once(':').is_some_and(|(_, port)| !port.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let hosts = place.split('/').next().unwrap_or_default();
    if credentials.is_some_and(|(who, _)| who.contains(':'))
        || place.contains('@')
        || hosts.split(',').any(has_strange_port)
    {
        return Err(BadConninfo::HoldsSecret);
    }
    // libpq decodes keywords as well as values (`conninfo_uri_parse_params`).
    let keyword = |pair: &str| percent_decoded(pair.split('=').next().unwrap_or_default());
    query.split('&').map(keyword).collect::<Option<_>>().ok_or(BadConninfo::Malformed)
}

/// The keywords of a connection string that is no URI (libpq, fe-connect.c, `conninfo_parse`); nothing where it is none.
fn plain_keywords(text: &str) -> Option<Vec<String>> {
    let mut letters = text.chars().peekable();
    let mut found = Vec::new();
    loop {
        while letters.next_if(|letter| letter.is_ascii_whitespace()).is_some() {}
        if letters.peek().is_none() {
            return Some(found);
        }
        let mut keyword = String::new();
        while let Some(letter) = letters.next_if(|&letter| letter != '=' && !letter.is_ascii_whitespace()) {
            keyword.push(letter);
        }
        while letters.next_if(|letter| letter.is_ascii_whitespace()).is_some() {}
        if letters.next() != Some('=') || keyword.is_empty() {
            return None;
        }
        found.push(keyword);
        while letters.next_if(|letter| letter.is_ascii_whitespace()).is_some() {}
        let is_quoted = letters.next_if_eq(&'\'').is_some();
        loop {
            match letters.next() {
                Some('\\') => drop(letters.next()),
                Some('\'') if is_quoted => break,
                Some(letter) if !is_quoted && letter.is_ascii_whitespace() => break,
                Some(_) => {}
                None if is_quoted => return None,
                None => break,
            }
        }
    }
}

impl Streaming {
    /// Whether the server is to receive WAL itself; fails where that is neither on nor off.
    pub fn is_on(settings: &Settings) -> Result<bool> {
        settings.typed(Setting::StreamingArchiver).switch()
    }

    /// Where WAL would be received; nothing where that is not set, and storage no directory. Fails where it is wrong.
    pub fn directory(settings: &Settings, destination: &Destination) -> Result<Option<PathBuf>> {
        let typed = settings.typed(Setting::StreamingWalsDirectory).path()?;
        Ok(typed.or_else(|| match &destination.storage {
            StorageUrl::File { path, .. } => Some(path.join(destination.server_name.to_string()).join("streaming")),
            StorageUrl::S3(_) => None,
        }))
    }

    /// Reads the settings; fails with the first that is wrong.
    pub fn parse(settings: &Settings, destination: &Destination) -> Result<Self> {
        let typed = settings.typed(Setting::StreamingConninfo);
        let conninfo = Conninfo::parse(typed.text).map_err(|cause| match cause {
            BadConninfo::HoldsSecret => Error::new(
                Kind::Configuration,
                "archiver.streaming_conninfo",
                "invalid value for parameter \"archiver.streaming_conninfo\": it holds a password",
            )
            .hint("Every role can read settings: put it into a password file (PGPASSFILE) or a service file."),
            // Not shown: what cannot be read may hold one.
            BadConninfo::Malformed => Error::new(
                Kind::Configuration,
                "archiver.streaming_conninfo",
                "invalid value for parameter \"archiver.streaming_conninfo\"",
            )
            .detail("It must be keywords with values, as in host=db1 user=streamer, or a URI."),
        })?;
        let name = settings.typed(Setting::StreamingArchiverName);
        // PostgreSQL shows no more of it, and another one for other letters (check_application_name).
        let is_name =
            |text: &str| (1..64).contains(&text.len()) && text.bytes().all(|byte| (0x20..0x7F).contains(&byte));
        if !is_name(name.text) {
            return Err(name.wrong("It takes 1 to 63 printable ASCII letters"));
        }
        let slot = settings.typed(Setting::SlotName);
        // PostgreSQL, slot.c, ReplicationSlotValidateName.
        let is_slot_letter = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        if slot.text.len() > 63 || !slot.text.bytes().all(is_slot_letter) {
            return Err(slot.wrong("It takes at most 63 lower case letters, digits and underscores"));
        }
        let creates = settings.typed(Setting::CreateSlot);
        let creates_slot = match creates.text {
            "auto" => true,
            "manual" => false,
            _ => return Err(creates.wrong("Known are manual and auto")),
        };
        let directory = Self::directory(settings, destination)?.ok_or_else(|| {
            let typed = settings.typed(Setting::StreamingWalsDirectory);
            typed.wrong("With storage in a bucket it must name a directory of this machine")
        })?;
        let prefix = settings.typed(Setting::PathPrefix);
        let path_prefix: Vec<PathBuf> =
            prefix.text.split(':').filter(|path| !path.is_empty()).map(PathBuf::from).collect();
        if path_prefix.iter().any(|path| path.is_relative()) {
            return Err(prefix.wrong("It must be absolute paths, with colons between them"));
        }
        Ok(Streaming {
            conninfo,
            archiver_name: name.text.to_string(),
            slot_name: Some(slot.text.to_string()).filter(|name| !name.is_empty()),
            creates_slot,
            directory,
            batch_size: settings.batch_size(Setting::StreamingArchiverBatchSize)?,
            partial_interval: settings.typed(Setting::StreamingPartialInterval).interval()?,
            path_prefix,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_holds_no_secret() {
        for text in [
            "",
            "host=db1 user = 'a b' port=5432",
            "service=x",
            "postgresql://u@h:5432/db?sslmode=require",
            "postgresql://u@[::1]:5432,h,i:5433/db?options=a:b@c",
            "postgres:///db?host=/tmp",
            r"user=a\ b",
        ] {
            assert_eq!(Conninfo::parse(text).map(|it| it.0), Ok(text.to_string()));
        }
        for text in [
            "password=x",
            "host=h PASSWORD = 'x'",
            "sslpassword=x",
            "postgres://u:x@h/db",
            "postgresql://u@h/db?sslmode=a&password=x",
            "postgresql://u@h/db?p%61ssword=x",
            "postgresql://u:se?same@h/db",
            "postgresql://u:sesame/@h/db",
            "postgresql://u:123/sesame@h/db",
            "postgresql://u@:sesame@h/db",
        ] {
            assert_eq!(Conninfo::parse(text), Err(BadConninfo::HoldsSecret), "{text}");
        }
        for text in
            ["host", "=x", "host='x", "host=a b", "user='it''s' password=x", "Postgres://u:x@h", "postgres://h?%ff=x"]
        {
            assert_eq!(Conninfo::parse(text), Err(BadConninfo::Malformed), "{text}");
        }
    }

    #[test]
    fn what_is_added_to_a_connection_string_counts() {
        let with = |text| Conninfo::parse(text).unwrap().with("application_name", r"it's \ one");
        assert_eq!(with(""), r"application_name='it\'s \\ one'");
        assert_eq!(with("host=h"), r"host=h application_name='it\'s \\ one'");
        assert_eq!(with("postgres://h/db"), "postgres://h/db?application_name=it%27s%20%5C%20one");
        assert_eq!(with("postgres://h/db?a=b"), "postgres://h/db?a=b&application_name=it%27s%20%5C%20one");
    }

    #[test]
    fn a_default_is_given_where_nothing_is_said() {
        let with = |text| Conninfo::parse(text).unwrap().with_default("tcp_user_timeout", "60000").0;
        assert_eq!(with("host=h"), "host=h tcp_user_timeout='60000'");
        assert_eq!(with("postgres://h/db"), "postgres://h/db?tcp_user_timeout=60000");
        for text in ["host=h tcp_user_timeout=5", "service=x", "postgres://h?tcp%5fuser_timeout=5"] {
            assert_eq!(with(text), text);
        }
    }

    #[test]
    fn every_setting_of_streaming_is_judged() {
        let parse = |changes: &[(Setting, &str)]| {
            let mut settings = Settings::default();
            settings.set(Setting::Storage, "file:///srv/wal");
            changes.iter().for_each(|(setting, text)| settings.set(*setting, *text));
            Streaming::parse(&settings, &Destination::parse(&settings).unwrap())
        };
        let default = parse(&[]).unwrap();
        assert_eq!(default.directory, PathBuf::from("/srv/wal/main/streaming"));
        assert_eq!(
            (default.archiver_name.as_str(), default.slot_name, default.creates_slot),
            ("archiver_receive_wal", None, false)
        );
        assert_eq!(default.partial_interval, None);
        let interval = parse(&[(Setting::StreamingPartialInterval, "10s")]).unwrap().partial_interval;
        assert_eq!(interval, Some(Duration::from_secs(10)));
        let set = parse(&[(Setting::SlotName, "wal_1"), (Setting::CreateSlot, "auto"), (Setting::PathPrefix, "/a:/b")])
            .unwrap();
        assert_eq!((set.slot_name.as_deref(), set.creates_slot, set.path_prefix.len()), (Some("wal_1"), true, 2));
        for (setting, text) in [
            (Setting::StreamingConninfo, "password=sesame"),
            (Setting::StreamingConninfo, "sesame"),
            (Setting::StreamingArchiverName, ""),
            (Setting::StreamingArchiverName, "näme"),
            (Setting::SlotName, "Slot"),
            (Setting::CreateSlot, "yes"),
            (Setting::StreamingWalsDirectory, "streaming"),
            (Setting::StreamingArchiverBatchSize, "-1"),
            (Setting::StreamingPartialInterval, "999ms"),
            (Setting::StreamingPartialInterval, "-1"),
            (Setting::StreamingPartialInterval, "2d"),
            (Setting::PathPrefix, "bin"),
        ] {
            let error = parse(&[(setting, text)]).unwrap_err();
            assert_eq!(error.subject(), format!("archiver.{}", setting.name()));
            assert!(
                setting != Setting::StreamingConninfo
                    || text != "password=sesame"
                    || !format!("{error:?}").contains("sesame")
            );
        }
    }

    #[test]
    fn streaming_is_switched_as_postgresql_switches() {
        let is_on = |text: &str| {
            let mut settings = Settings::default();
            settings.set(Setting::StreamingArchiver, text);
            Streaming::is_on(&settings)
        };
        assert_eq!(Streaming::is_on(&Settings::default()), Ok(false));
        for text in ["on", "ON", "true", "t", "tru", "yes", "y", "1"] {
            assert_eq!(is_on(text), Ok(true), "{text}");
        }
        for text in ["off", "of", "false", "F", "no", "n", "0"] {
            assert_eq!(is_on(text), Ok(false), "{text}");
        }
        for text in ["", "o", "onn", "2", "enabled"] {
            assert_eq!(is_on(text).unwrap_err().subject(), "archiver.streaming_archiver", "{text}");
        }
    }
}
