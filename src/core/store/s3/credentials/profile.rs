//! A profile in the files that AWS's tools share.

use super::environment::Environment;
use super::file::{Files, Stamp, read_text};
use super::shared_file::{Flavour, Section, parse};
use super::{Credentials, Deadline, Source};
use crate::error::{Error, Kind, Result, plain_cause};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

const MOST_BYTES: u64 = 1 << 20;

/// Which profile, in which files.
#[derive(Clone, Debug)]
pub(super) struct Selection {
    name: String,
    named_by: NamedBy,
    credentials_file: Place,
    config_file: Option<Place>,
    /// HOME, which a server's environment often lacks.
    home: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamedBy {
    Url,
    Environment,
    Nobody,
}

#[derive(Clone, Debug)]
enum Place {
    /// Below the home directory.
    InHome(PathBuf),
    At(PathBuf),
}

impl Place {
    fn of_variable(environment: &Environment, variable: &str, usual: &str) -> Self {
        match environment.get(variable) {
            Some(path) => {
                path.strip_prefix("~/").map_or_else(|| Place::At(path.into()), |path| Place::InHome(path.into()))
            }
            None => Place::InHome(usual.into()),
        }
    }

    fn path(&self, home: Option<&Path>) -> PathBuf {
        match self {
            Place::At(path) => path.clone(),
            Place::InHome(path) => home.unwrap_or(Path::new("~")).join(path),
        }
    }
}

/// One of the files, as it was found.
struct Found {
    path: PathBuf,
    flavour: Flavour,
    stamp: Stamp,
    /// The cause where there is no text; none where the file is just not there.
    text: std::result::Result<String, Option<io::Error>>,
    /// It lies below a directory that is closed to this user, so nobody can tell whether it is there.
    is_out_of_sight: bool,
}

impl Found {
    fn read(path: PathBuf, flavour: Flavour) -> Self {
        let (stamp, text) = match read_text(&path, MOST_BYTES) {
            Ok((text, stamp)) => (stamp, Ok(text)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                (Stamp::absent(&path), Err(None))
            }
            Err(error) => (Stamp::absent(&path), Err(Some(error))),
        };
        let is_closed = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let is_denied = matches!(&text, Err(Some(error)) if is_closed(error));
        let is_out_of_sight = is_denied && std::fs::metadata(&path).is_err_and(|error| is_closed(&error));
        Found { path, flavour, stamp, text, is_out_of_sight }
    }

    /// As it goes into the list of what was looked at.
    fn shown(&self) -> String {
        match &self.text {
            Err(Some(error)) => format!("\"{}\" ({})", self.path.display(), plain_cause(error)),
            _ => format!("\"{}\"", self.path.display()),
        }
    }
}

impl Selection {
    /// The profile that the URL names, or the one that the environment means.
    ///
    /// A credentials file in the URL is the only file that is looked at. A profile in the URL without one is looked for
    /// where all are.
    pub fn new(profile: Option<&str>, credentials_file: Option<&Path>, environment: &Environment) -> Self {
        // In botocore's order.
        let by_environment = environment.first(&["AWS_DEFAULT_PROFILE", "AWS_PROFILE"]);
        let (name, named_by) = match (profile, credentials_file, by_environment) {
            (Some(name), _, _) => (name, NamedBy::Url),
            (None, Some(_), _) => ("default", NamedBy::Url),
            (None, None, Some(name)) => (name, NamedBy::Environment),
            (None, None, None) => ("default", NamedBy::Nobody),
        };
        let (credentials_file, config_file) = match credentials_file {
            Some(path) => (Place::At(path.to_path_buf()), None),
            None => (
                Place::of_variable(environment, "AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials"),
                Some(Place::of_variable(environment, "AWS_CONFIG_FILE", ".aws/config")),
            ),
        };
        let home = environment.get("HOME").map(PathBuf::from);
        Selection { name: name.to_string(), named_by, credentials_file, config_file, home }
    }

    /// Whether the URL says that it is this profile and nothing else.
    pub fn is_by_url(&self) -> bool {
        self.named_by == NamedBy::Url
    }

    /// Reads the profile. One that somebody named must be there; `default` may be absent.
    pub async fn read(&self, files: &Files, deadline: Deadline) -> Result<Profile> {
        let selection = self.clone();
        let path = self.credentials_file.path(self.home.as_deref());
        let subject = format!("credentials file \"{}\"", path.display());
        let found = files.beside(&subject, deadline, move || selection.read_files()).await?;
        for file in &found {
            if let Some(error) = self.failure(file) {
                return Err(error);
            }
        }
        self.profile_in(found)
    }

    /// May hang, on a dead mount or on a directory service that knows the home directory.
    fn read_files(&self) -> Vec<Found> {
        let home = self.home.clone().or_else(home_of_user);
        let read = |place: &Place, flavour| Found::read(place.path(home.as_deref()), flavour);
        let config = self.config_file.as_ref().map(|place| read(place, Flavour::Config));
        [read(&self.credentials_file, Flavour::Credentials)].into_iter().chain(config).collect()
    }

    /// A file that is there and cannot be read is an error: what it says might be meant. One that is out of sight, as in
    /// another user's home, is nobody's answer, unless the URL names it.
    fn failure(&self, file: &Found) -> Option<Error> {
        let is_of_url = self.is_by_url() && self.config_file.is_none();
        let missing = io::Error::from_raw_os_error(libc::ENOENT);
        let error = match &file.text {
            Err(Some(error)) => error,
            Err(None) if is_of_url => &missing,
            _ => return None,
        };
        if file.is_out_of_sight && !is_of_url {
            return None;
        }
        let what = if file.flavour == Flavour::Config { "read config file" } else { "read credentials file" };
        let error = Error::io(what, &file.path, error);
        Some(if error.is_worth_retrying() { error } else { error.of_kind(Kind::Configuration) })
    }

    fn profile_in(&self, found: Vec<Found>) -> Result<Profile> {
        let mut sections = Vec::new();
        let mut others = Vec::new();
        for file in &found {
            let Ok(text) = &file.text else { continue };
            let mut profiles: BTreeMap<String, Section> = parse(text, file.flavour);
            if let Some(mut section) = profiles.remove(&self.name) {
                section.retain(|_, value| !value.is_empty());
                sections.push(Part { file: file.path.clone(), flavour: file.flavour, section });
            }
            others.extend(profiles.into_keys());
        }
        if sections.is_empty() && self.named_by != NamedBy::Nobody {
            return Err(self.missing(&found, &others));
        }
        let places: Vec<_> = found.iter().map(Found::shown).collect();
        let looked_at = format!("profile \"{}\" in {}", self.name, places.join(" and "));
        let stamps = found.into_iter().map(|file| file.stamp).collect();
        Ok(Profile { name: self.name.clone(), parts: sections, looked_at, stamps })
    }

    fn missing(&self, found: &[Found], others: &[String]) -> Error {
        const MOST_SHOWN: usize = 10;
        let name = &self.name;
        let places: Vec<_> = found.iter().map(Found::shown).collect();
        let message = match &places[..] {
            [one] => format!("profile \"{name}\" is not in {one}"),
            _ => format!("profile \"{name}\" is neither in {}", places.join(" nor in ")),
        };
        let by = match self.named_by {
            NamedBy::Url => "the storage URL",
            _ => "the environment variable AWS_PROFILE",
        };
        let fits = |name: &&String| name.len() <= 64 && !name.chars().any(char::is_control);
        let known: Vec<_> = others.iter().filter(fits).take(MOST_SHOWN).map(String::as_str).collect();
        let known = if known.is_empty() { "no other".to_string() } else { known.join(", ") };
        Error::new(Kind::Configuration, format!("profile \"{name}\""), message)
            .detail(format!("It is meant by {by}. Found there: {known}."))
            .hint(format!("Add the section [{name}] to the credentials file, or name another profile."))
    }
}

fn home_of_user() -> Option<PathBuf> {
    Some(nix::unistd::User::from_uid(nix::unistd::geteuid()).ok()??.dir)
}

/// What the files say of the profile. Holds keys, so it cannot be printed.
pub(super) struct Profile {
    pub name: String,
    /// The credentials file's before the config file's.
    parts: Vec<Part>,
    /// For people: which profile in which files.
    pub looked_at: String,
    /// The files, found or not.
    pub stamps: Vec<Stamp>,
}

struct Part {
    file: PathBuf,
    flavour: Flavour,
    section: Section,
}

impl Profile {
    /// What the profile says of `key`; the credentials file is asked first.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.parts.iter().find_map(|part| part.section.get(key)).map(String::as_str)
    }

    /// An error where the profile wants a role assumed with other keys: its own would be the wrong ones.
    pub fn refuse_role(&self) -> Result<()> {
        match (self.value("role_arn"), self.value("web_identity_token_file")) {
            (Some(_), None) => Err(self.unsupported("role_arn without web_identity_token_file")),
            _ => Ok(()),
        }
    }

    /// The keys that stand in the profile. What stands beside them and is not supported is an error where botocore would
    /// look at it first.
    pub fn keys(&self) -> Result<Option<Credentials>> {
        self.refuse("sso_account_id")?;
        self.refuse("sso_role_name")?;
        if let Some(credentials) = self.keys_in(Flavour::Credentials)? {
            return Ok(Some(credentials));
        }
        self.refuse("login_session")?;
        self.refuse("credential_process")?;
        self.keys_in(Flavour::Config)
    }

    fn keys_in(&self, flavour: Flavour) -> Result<Option<Credentials>> {
        const NAMES: [&str; 2] = ["aws_access_key_id", "aws_secret_access_key"];
        let Some(part) = self.parts.iter().find(|part| part.flavour == flavour) else { return Ok(None) };
        let value = |name: &str| part.section.get(name).map(String::as_str);
        let source = Source::Profile { name: self.name.clone(), file: part.file.clone() };
        let missing = match NAMES.map(value) {
            [None, None] => return Ok(None),
            [Some(access_key), Some(secret_key)] => {
                let token = value("aws_session_token").or_else(|| value("aws_security_token"));
                return Credentials::new(source, access_key, secret_key, token, None).map(Some);
            }
            [None, _] => NAMES[0],
            [_, None] => NAMES[1],
        };
        let message = format!("could not get credentials from {source}: it has no {missing}");
        Err(Error::new(Kind::Configuration, source.to_string(), message)
            .hint(format!("Add {missing} to that section; the two belong together.")))
    }

    /// The error of a profile without credentials, where it is the only source.
    pub fn holds_none(&self) -> Error {
        let message = format!("{} holds no credentials", self.looked_at);
        Error::new(Kind::Configuration, self.looked_at.clone(), message)
            .hint("Add aws_access_key_id and aws_secret_access_key to that section.")
    }

    fn refuse(&self, key: &str) -> Result<()> {
        self.value(key).map_or(Ok(()), |_| Err(self.unsupported(key)))
    }

    fn unsupported(&self, what: &str) -> Error {
        let name = &self.name;
        Error::new(
            Kind::Configuration,
            self.looked_at.clone(),
            format!("{what} in profile \"{name}\" is not supported"),
        )
        .detail(format!("Looked at {}.", self.looked_at))
        .hint("Use a profile with keys or with web_identity_token_file, or the role of a container or an instance.")
    }
}

#[cfg(test)]
mod tests {
    use super::super::stand_in::block_on;
    use super::*;
    use std::fs;
    use std::time::Duration;

    /// A home directory with the two files.
    struct Home(tempfile::TempDir);

    impl Home {
        fn new(credentials: &str, config: &str) -> Self {
            let home = tempfile::tempdir().unwrap();
            fs::create_dir(home.path().join(".aws")).unwrap();
            for (name, text) in [("credentials", credentials), ("config", config)] {
                fs::write(home.path().join(".aws").join(name), text).unwrap();
            }
            Home(home)
        }

        fn path(&self, name: &str) -> String {
            self.0.path().join(name).display().to_string()
        }

        fn environment(&self, more: &[(&str, &str)]) -> Environment {
            let home = self.path("");
            let mut variables = vec![("HOME", home.as_str())];
            variables.extend(more);
            Environment::of(&variables)
        }

        fn read(&self, profile: Option<&str>) -> Result<Profile> {
            read(Selection::new(profile, None, &self.environment(&[])))
        }
    }

    fn read(selection: Selection) -> Result<Profile> {
        block_on(async {
            let files = Files::new(Duration::from_secs(5));
            selection.read(&files, Deadline::after(Duration::from_secs(5))).await
        })
    }

    fn access_key(profile: &Profile) -> Option<String> {
        profile.keys().unwrap().map(|credentials| credentials.access_key)
    }

    const KEYS: &str = "aws_access_key_id = AKIA1\naws_secret_access_key = s3kr1t\n";

    #[test]
    fn the_credentials_file_is_asked_before_the_config_file() {
        let config = "[default]\nregion = eu-north-1\naws_access_key_id = AKIA2\naws_secret_access_key = b\n\
                      [profile only]\naws_access_key_id = AKIA3\naws_secret_access_key = c\n";
        let home = Home::new(&format!("[default]\n{KEYS}aws_session_token = t\n"), config);
        let profile = home.read(None).unwrap();
        let credentials = profile.keys().unwrap().unwrap();
        assert_eq!((credentials.access_key.as_str(), credentials.session_token.as_deref()), ("AKIA1", Some("t")));
        let file = home.path(".aws/credentials");
        assert_eq!(credentials.source.to_string(), format!("profile \"default\" in \"{file}\""));
        assert_eq!(profile.value("region"), Some("eu-north-1"));
        assert_eq!(access_key(&home.read(Some("only")).unwrap()), Some("AKIA3".into()));
    }

    #[test]
    fn a_missing_profile_is_told_with_the_files_and_what_they_hold() {
        let home = Home::new(&format!("[default]\n{KEYS}[old]\n"), "[profile dev]\n");
        let error = home.read(Some("wal")).err().unwrap();
        let (credentials, config) = (home.path(".aws/credentials"), home.path(".aws/config"));
        let message = format!("profile \"wal\" is neither in \"{credentials}\" nor in \"{config}\"");
        assert_eq!(error.to_string(), message);
        let detail = "It is meant by the storage URL. Found there: default, old, dev.";
        assert_eq!(error.detail_text(), Some(detail));
        let hint = "Add the section [wal] to the credentials file, or name another profile.";
        assert_eq!(error.hint_text(), Some(hint));
        assert_eq!((error.kind(), error.is_worth_retrying()), (Kind::Configuration, false));
        let by_variable = Selection::new(None, None, &home.environment(&[("AWS_PROFILE", "wal")]));
        let error = read(by_variable).err().unwrap();
        let detail = "It is meant by the environment variable AWS_PROFILE. Found there: default, old, dev.";
        assert_eq!(error.detail_text(), Some(detail));
    }

    #[test]
    fn a_file_in_the_url_is_the_only_one_and_must_be_there() {
        let home = Home::new("[wal]\nrole_arn = x\n", "[default]\nsso_role_name = x\n");
        let path = PathBuf::from(home.path("keys"));
        let selection = || Selection::new(None, Some(&path), &home.environment(&[("AWS_PROFILE", "wal")]));
        let error = read(selection()).err().unwrap();
        let shown = path.display();
        assert_eq!(
            error.to_string(),
            format!("could not read credentials file \"{shown}\": No such file or directory")
        );
        assert_eq!(error.kind(), Kind::Configuration);
        fs::write(&path, format!("[default]\n{KEYS}")).unwrap();
        assert_eq!(access_key(&read(selection()).unwrap()), Some("AKIA1".into()), "AWS_PROFILE says nothing of it");
        fs::write(&path, "[other]\n").unwrap();
        assert_eq!(read(selection()).err().unwrap().to_string(), format!("profile \"default\" is not in \"{shown}\""));
    }

    #[test]
    fn no_files_and_no_home_are_no_error_where_nobody_named_a_profile() {
        let none = read(Selection::new(None, None, &Environment::of(&[("HOME", "/nonexistent")]))).unwrap();
        assert_eq!(access_key(&none), None);
        let looked_at = "profile \"default\" in \"/nonexistent/.aws/credentials\" and \"/nonexistent/.aws/config\"";
        assert_eq!(none.looked_at, looked_at);
        let of_user = Selection::new(None, None, &Environment::of(&[])).read_files();
        let home = home_of_user().unwrap();
        assert_eq!(of_user[0].path, home.join(".aws/credentials"), "as the system knows the user");
    }

    #[test]
    fn the_environment_names_other_files() {
        let home = Home::new("", "");
        fs::write(home.path("keys"), format!("[default]\n{KEYS}")).unwrap();
        let environment =
            home.environment(&[("AWS_SHARED_CREDENTIALS_FILE", "~/keys"), ("AWS_CONFIG_FILE", "/nonexistent")]);
        let profile = read(Selection::new(None, None, &environment)).unwrap();
        assert_eq!(access_key(&profile), Some("AKIA1".into()));
        assert!(profile.looked_at.ends_with("keys\" and \"/nonexistent\""), "{}", profile.looked_at);
    }

    #[test]
    fn a_file_that_is_there_and_cannot_be_read_is_an_error() {
        let home = Home::new("", "");
        fs::remove_file(home.path(".aws/credentials")).unwrap();
        fs::create_dir(home.path(".aws/credentials")).unwrap();
        let error = home.read(None).err().unwrap();
        let file = home.path(".aws/credentials");
        assert_eq!(error.to_string(), format!("could not read credentials file \"{file}\": it is not a regular file"));
        assert_eq!(error.kind(), Kind::Configuration);
    }

    #[test]
    fn a_file_out_of_sight_is_no_error_unless_the_url_names_it() {
        let path = PathBuf::from("/root/.aws/credentials");
        let hidden = Found {
            stamp: Stamp::absent(&path),
            text: Err(Some(io::Error::from_raw_os_error(libc::EACCES))),
            flavour: Flavour::Credentials,
            is_out_of_sight: true,
            path: path.clone(),
        };
        let usual = Selection::new(None, None, &Environment::of(&[]));
        assert_eq!(usual.failure(&hidden), None);
        assert_eq!(hidden.shown(), "\"/root/.aws/credentials\" (Permission denied)");
        let error = Selection::new(None, Some(&path), &Environment::of(&[])).failure(&hidden).unwrap();
        let message = "could not read credentials file \"/root/.aws/credentials\": Permission denied";
        assert_eq!(error.to_string(), message);
        let closed = Found { is_out_of_sight: false, ..hidden };
        assert_eq!(usual.failure(&closed).unwrap().to_string(), message, "it is there, and cannot be read");
    }

    #[test]
    fn half_a_pair_of_keys_is_an_error() {
        let home = Home::new("[default]\naws_secret_access_key = s3kr1t\n", "");
        let error = home.read(None).unwrap().keys().err().unwrap();
        let file = home.path(".aws/credentials");
        let message =
            format!("could not get credentials from profile \"default\" in \"{file}\": it has no aws_access_key_id");
        assert_eq!(error.to_string(), message);
        assert!(!format!("{error:?}").contains("s3kr1t"));
    }

    #[test]
    fn what_is_not_supported_is_an_error_and_not_ignored() {
        for (key, expected) in [
            ("credential_process", "credential_process in profile \"wal\" is not supported"),
            ("sso_account_id", "sso_account_id in profile \"wal\" is not supported"),
            ("sso_role_name", "sso_role_name in profile \"wal\" is not supported"),
            ("login_session", "login_session in profile \"wal\" is not supported"),
            ("role_arn", "role_arn without web_identity_token_file in profile \"wal\" is not supported"),
        ] {
            let home = Home::new("", &format!("[profile wal]\n{key} = s3kr1t\n{KEYS}"));
            let profile = home.read(Some("wal")).unwrap();
            let error = profile.refuse_role().and_then(|()| profile.keys()).err().unwrap();
            assert_eq!(error.to_string(), expected);
            assert!(error.hint_text().is_some() && !format!("{error:?}").contains("s3kr1t"));
        }
        let home = Home::new(&format!("[wal]\n{KEYS}"), "[profile wal]\ncredential_process = x\n");
        assert_eq!(access_key(&home.read(Some("wal")).unwrap()), Some("AKIA1".into()), "botocore runs no process then");
    }
}
