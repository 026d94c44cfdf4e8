//! Keys that sign requests: where they come from, and keeping them fresh.
//!
//! ```text
//! keeper                        the current ones, shared, replaced before they expire
//!   |
//! Chain                         the first source that is configured
//!   |
//! environment  profile  web_identity  container  instance      the sources
//!   |             |
//!   |        shared_file        the format of AWS's files
//!   |
//! request  file  deadline       how endpoints and files are asked, in bounded time
//! ```
//! Everything here runs on the caller's runtime, which needs its clock and its I/O enabled. Files and host names are read
//! in threads of that runtime: whoever ends it does so without waiting for them (`shutdown_background`).

mod container;
mod deadline;
mod environment;
mod file;
mod instance;
mod keeper;
mod profile;
mod request;
mod shared_file;
#[cfg(test)]
mod stand_in;
mod web_identity;

pub use keeper::Keeper;

use crate::error::{Error, Kind, Result};
use crate::report::Report;
use deadline::{Deadline, Patience};
use environment::Environment;
use file::{Files, Stamp};
use profile::{Profile, Selection};
use request::could_not;
use reqwest::Client;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Keys that sign requests. What is printed of them is where they are from and when they expire, never a key.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The key's name, which every request tells.
    pub access_key: String,
    /// The key itself, which no request tells.
    pub secret_key: String,
    /// What proves that temporary keys are valid.
    pub session_token: Option<String>,
    /// When they end, if ever.
    pub expires: Option<SystemTime>,
    /// Where they are from.
    pub source: Source,
}

impl Credentials {
    /// Keys that may stand in a request's headers; others are refused, unprinted.
    fn new(
        source: Source,
        access_key: &str,
        secret_key: &str,
        session_token: Option<&str>,
        expires: Option<SystemTime>,
    ) -> Result<Self> {
        // An empty token is none: some endpoints write one beside keys that do not expire.
        let session_token = session_token.filter(|token| !token.is_empty());
        let is_plain = |key: &str| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        if ![access_key, secret_key].into_iter().chain(session_token).all(is_plain) {
            return Err(could_not(&source, "a key there is empty or holds characters that no key has")
                .of_kind(Kind::Configuration));
        }
        let session_token = session_token.map(str::to_string);
        Ok(Credentials { access_key: access_key.into(), secret_key: secret_key.into(), session_token, expires, source })
    }

    fn is_expired(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }

    /// Whether they are the same keys, wherever they are from.
    pub(super) fn has_keys_of(&self, other: &Self) -> bool {
        let keys =
            |it: &Self| [it.access_key.clone(), it.secret_key.clone(), it.session_token.clone().unwrap_or_default()];
        keys(self) == keys(other)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Credentials");
        shown.field("source", &self.source).field("expires", &self.expires).finish_non_exhaustive()
    }
}

/// Where credentials are from. Printed for people; holds no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The server's environment.
    Environment,
    /// A section of a file.
    Profile {
        /// The section.
        name: String,
        /// The file it stands in.
        file: PathBuf,
    },
    /// A role, assumed with a token from a file.
    WebIdentity {
        /// The role's ARN.
        role: String,
    },
    /// The endpoint that the container was given.
    Container,
    /// The virtual machine's role.
    InstanceMetadata {
        /// The role's name.
        role: String,
    },
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Environment => write!(f, "environment"),
            Source::Profile { name, file } => write!(f, "profile \"{name}\" in \"{}\"", file.display()),
            Source::WebIdentity { role } => write!(f, "web identity role {role}"),
            Source::Container => write!(f, "container"),
            Source::InstanceMetadata { role } => write!(f, "instance metadata role {role}"),
        }
    }
}

/// Where to look for credentials, and in which order.
///
/// A profile or a credentials file in the URL is the only source. Else the order is that of botocore 1.44.5
/// (`create_credential_resolver` and `ProfileProviderBuilder` in credentials.py), which Barman's cloud tools use:
/// environment, web identity, profile, container, instance metadata. The first source that is configured counts; that
/// it fails is an error and no reason to use the next, with whose keys one would write elsewhere, or as somebody else.
pub struct Chain {
    environment: Environment,
    selection: Selection,
    files: Files,
    patience: Patience,
}

/// What a source needs to reach what it asks.
struct Reach<'a> {
    http: &'a Client,
    files: &'a Files,
    patience: Patience,
    deadline: Deadline,
}

/// Credentials with the files that were looked at, found or not: a change of one may mean others.
struct Found {
    credentials: Credentials,
    files: Vec<Stamp>,
}

impl Chain {
    /// The sources that `profile` and `credentials_file` of the URL and the environment configure. `environment` is
    /// asked here and never again.
    pub fn new(
        profile: Option<&str>,
        credentials_file: Option<&Path>,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let environment = Environment::read(environment);
        let selection = Selection::new(profile, credentials_file, &environment);
        Chain::with_patience(environment, selection, Patience::default())
    }

    fn with_patience(environment: Environment, selection: Selection, patience: Patience) -> Self {
        Chain { environment, selection, files: Files::new(patience.file), patience }
    }

    /// Credentials that are valid now, read anew, in at most 10 seconds.
    ///
    /// `http` asks the token service, and a container's endpoint over https. It must follow no redirect, which would hand
    /// a token on. Endpoints inside the machine are asked without it, never through a proxy.
    pub async fn fetch(&self, http: &Client) -> Result<Credentials> {
        self.find(http).await.map(|found| found.credentials)
    }

    /// The region that the environment or the profile tells, where the URL tells none.
    pub async fn region(&self) -> Result<Option<String>> {
        match self.environment_region() {
            Some(region) => Ok(Some(region.to_string())),
            None => {
                let deadline = Deadline::after(self.patience.whole);
                let profile = self.selection.read(&self.files, deadline).await?;
                Ok(profile.value("region").map(str::to_string))
            }
        }
    }

    fn environment_region(&self) -> Option<&str> {
        self.environment.first(&["AWS_REGION", "AWS_DEFAULT_REGION"])
    }

    async fn find(&self, http: &Client) -> Result<Found> {
        if !self.selection.is_by_url()
            && let Some(credentials) = self.environment.keys()?
        {
            return Ok(Found { credentials, files: Vec::new() });
        }
        let deadline = Deadline::after(self.patience.whole);
        let reach = Reach { http, files: &self.files, patience: self.patience, deadline };
        let profile = self.selection.read(&self.files, deadline).await?;
        let credentials = self.find_beyond_environment(&reach, &profile).await?;
        match credentials.expires {
            Some(expires) if credentials.is_expired(SystemTime::now()) => Err(expired(&credentials.source, expires)),
            _ => Ok(Found { credentials, files: profile.stamps }),
        }
    }

    async fn find_beyond_environment(&self, reach: &Reach<'_>, profile: &Profile) -> Result<Credentials> {
        let is_by_url = self.selection.is_by_url();
        profile.refuse_role()?;
        let environment = (!is_by_url).then_some(&self.environment);
        if let Some(identity) = web_identity::WebIdentity::configured(environment, profile)? {
            let region = self.environment_region().or_else(|| profile.value("region"));
            return identity.assume(reach, &web_identity::endpoint(&self.environment, region)?).await;
        }
        if let Some(credentials) = profile.keys()? {
            return Ok(credentials);
        }
        if is_by_url {
            return Err(profile.holds_none());
        }
        if let Some(endpoint) = container::Endpoint::configured(&self.environment)? {
            return endpoint.fetch(reach).await;
        }
        let Some(metadata) = instance::Metadata::configured(&self.environment) else {
            return Err(nothing_found(profile, "instance metadata (disabled)", None));
        };
        match metadata.fetch(reach).await? {
            instance::Found::Credentials(credentials) => Ok(credentials),
            instance::Found::Nothing(cause) => Err(nothing_found(profile, "instance metadata", Some(&cause))),
        }
    }

    /// Whether one of `files` is another one now. One that cannot be looked at in time counts as unchanged.
    async fn have_changed(&self, files: Vec<Stamp>) -> bool {
        let look = move || files.iter().any(Stamp::is_outdated);
        let deadline = Deadline::after(self.patience.file);
        self.files.beside("the credentials file", deadline, look).await.unwrap_or(false)
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("selection", &self.selection).finish_non_exhaustive()
    }
}

fn expired(source: &Source, expires: SystemTime) -> Error {
    let at = OffsetDateTime::from(expires).format(&Rfc3339).unwrap_or_default();
    could_not(source, format!("they expired at {at}"))
        .hint("Compare the clock of this machine with the source's.")
        .retry_if(true)
}

/// The error of a machine with no source at all. An instance whose metadata does not answer for a moment looks the same.
fn nothing_found(profile: &Profile, metadata: &str, cause: Option<&Error>) -> Error {
    let looked_at = format!("the environment, {} and {metadata}", profile.looked_at);
    let error = Error::new(Kind::Configuration, "credentials", format!("no credentials found: looked at {looked_at}"))
        .hint("Name a profile or a credentials_file in the storage URL, or give this machine a role.");
    let Some(cause) = cause else { return error };
    error.detail(Report::of(cause).sentences()).retry_if(cause.is_worth_retrying())
}

#[cfg(test)]
impl Chain {
    fn of(profile: Option<&str>, credentials_file: Option<&Path>, variables: &[(&str, &str)]) -> Self {
        Chain::new(profile, credentials_file, |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        })
    }

    fn in_environment(variables: &[(&str, &str)]) -> Self {
        Chain::of(None, None, variables)
    }
}

#[cfg(test)]
mod tests {
    use super::stand_in::{Reply, StandIn, block_on, client, keys};
    use super::*;
    use std::fs;
    use std::time::{Duration, Instant};

    const SECRETS: [&str; 2] = ["s3kr1t", "S3KR1T"];
    const NO_METADATA: (&str, &str) = ("AWS_EC2_METADATA_DISABLED", "true");
    const IN_ENVIRONMENT: [(&str, &str); 3] =
        [("AWS_ACCESS_KEY_ID", "AKIA1"), ("AWS_SECRET_ACCESS_KEY", "s3kr1t"), ("AWS_SESSION_TOKEN", "s3kr1t")];

    fn in_an_hour() -> SystemTime {
        SystemTime::now() + Duration::from_secs(3600)
    }

    /// The source that is found with `variables`.
    fn source(profile: Option<&str>, variables: &[(&str, &str)]) -> std::result::Result<String, String> {
        let found = block_on(Chain::of(profile, None, variables).fetch(&client()));
        found.map(|found| found.source.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_first_source_that_is_configured_counts() {
        let sts = StandIn::new(|_, _| {
            Reply::text(
                200,
                "<R><AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>a</AccessKeyId>\
                 <SecretAccessKey>b</SecretAccessKey><SessionToken>c</SessionToken>\
                 <Expiration>2999-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleWithWebIdentityResult></R>",
            )
        });
        let container = StandIn::new(|_, _| Reply::text(200, keys("ASIA1", in_an_hour())));
        let metadata = StandIn::new(|request, _| match request.path.as_str() {
            "/latest/api/token" | "/latest/meta-data/iam/security-credentials/" => Reply::text(200, "wal"),
            _ => Reply::text(200, keys("ASIA2", in_an_hour())),
        });
        let home = tempfile::tempdir().unwrap();
        let path = |name: &str| home.path().join(name).display().to_string();
        fs::create_dir(path(".aws")).unwrap();
        let file = path(".aws/credentials");
        fs::write(&file, "[default]\naws_access_key_id=a\naws_secret_access_key=b\n[wal]\n").unwrap();
        fs::write(path("token"), "t").unwrap();
        let own = [
            ("HOME", path("")),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url("")),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.url("/")),
            ("AWS_ENDPOINT_URL_STS", sts.url("/")),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", path("token")),
            ("AWS_ROLE_ARN", "arn:x".to_string()),
        ];
        let mut variables: Vec<_> = own.iter().map(|(name, value)| (*name, value.as_str())).collect();
        variables.extend(IN_ENVIRONMENT);
        assert_eq!(source(None, &variables), Ok("environment".into()));
        let explicit = source(Some("wal"), &variables).unwrap_err();
        assert!(explicit.ends_with(" holds no credentials"), "nothing but the profile of the URL counts: {explicit}");
        assert_eq!(source(Some("default"), &variables), Ok(format!("profile \"default\" in \"{file}\"")));
        variables.truncate(6);
        assert_eq!(source(None, &variables), Ok("web identity role arn:x".into()));
        variables.truncate(4);
        assert_eq!(source(None, &variables), Ok(format!("profile \"default\" in \"{file}\"")));
        fs::write(&file, "[default]\nregion = eu-west-1\n").unwrap();
        assert_eq!(source(None, &variables), Ok("container".into()), "a profile may be without keys");
        variables.truncate(2);
        assert_eq!(source(None, &variables), Ok("instance metadata role wal".into()));
    }

    #[test]
    fn nothing_configured_is_told_with_all_that_was_looked_at() {
        let looked_at = "no credentials found: looked at the environment, profile \"default\" in \
                         \"/nonexistent/.aws/credentials\" and \"/nonexistent/.aws/config\" and instance metadata (disabled)";
        assert_eq!(source(None, &[("HOME", "/nonexistent"), NO_METADATA]), Err(looked_at.into()));
        let chain = Chain::in_environment(&[("HOME", "/nonexistent"), NO_METADATA]);
        let error = block_on(chain.fetch(&client())).unwrap_err();
        assert_eq!((error.kind(), error.is_worth_retrying()), (Kind::Configuration, false));
        let unanswered = could_not(&"instance metadata", "Connection refused").retry_if(true);
        let profile = block_on(chain.selection.read(&chain.files, Deadline::after(Duration::from_secs(5)))).unwrap();
        let error = nothing_found(&profile, "instance metadata", Some(&unanswered));
        let detail = "Could not get credentials from instance metadata: Connection refused.";
        assert_eq!((error.detail_text(), error.is_worth_retrying()), (Some(detail), true));
    }

    #[test]
    fn a_source_that_hangs_ends_at_the_deadline_of_the_whole() {
        let server = StandIn::new(|_, _| Reply::Hang);
        let url = server.url("/");
        let environment = Environment::of(&[("HOME", "/nonexistent"), ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &url)]);
        let selection = Selection::new(None, None, &environment);
        let patience = Patience { whole: Duration::from_millis(150), ..Patience::default() };
        let began = Instant::now();
        let error = block_on(Chain::with_patience(environment, selection, patience).fetch(&client())).unwrap_err();
        assert!(
            error.to_string().starts_with("could not get credentials from container: no answer within "),
            "{error}"
        );
        assert!(error.is_worth_retrying() && began.elapsed() < Duration::from_secs(1));
    }

    #[test]
    fn the_region_is_the_environments_else_the_profiles() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("credentials");
        fs::write(&file, "[default]\nregion = eu-north-1\n").unwrap();
        let region = |variables: &[(&str, &str)]| block_on(Chain::of(None, Some(&file), variables).region()).unwrap();
        assert_eq!(region(&[]), Some("eu-north-1".into()));
        assert_eq!(region(&[("AWS_DEFAULT_REGION", "b")]), Some("b".into()));
        assert_eq!(region(&[("AWS_DEFAULT_REGION", "b"), ("AWS_REGION", "a")]), Some("a".into()));
    }

    #[test]
    fn keys_that_no_header_may_hold_are_refused_and_not_shown() {
        for key in ["", "s3kr1t\n", "s3k r1t", "s3kr1t\u{e9}"] {
            let error = Credentials::new(Source::Container, "AKIA", key, None, None).unwrap_err();
            let message = "could not get credentials from container: a key there is empty or holds characters that no \
                           key has";
            assert_eq!((error.to_string().as_str(), error.kind()), (message, Kind::Configuration));
        }
        assert_eq!(Credentials::new(Source::Container, "a", "b", Some(""), None).unwrap().session_token, None);
    }

    #[test]
    fn nothing_that_is_printed_shows_a_secret() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("credentials");
        fs::write(&file, "[default]\naws_access_key_id=S3KR1T\naws_secret_access_key=s3kr1t\n").unwrap();
        let mut variables = IN_ENVIRONMENT.to_vec();
        variables.push(("AWS_CONTAINER_AUTHORIZATION_TOKEN", "s3kr1t"));
        for chain in [Chain::of(None, Some(&file), &variables), Chain::of(None, None, &variables)] {
            let mut shown = format!("{chain:?}");
            let keeper = Keeper::new(chain);
            let found = block_on(keeper.current(&client())).unwrap();
            assert!(SECRETS.contains(&found.secret_key.as_str()));
            shown +=
                &format!("{keeper:?} {found:?} {found:#?} {} {:?} {:?}", found.source, found.source, keeper.known());
            assert!(!SECRETS.iter().any(|secret| shown.contains(secret)), "{shown}");
        }
    }
}
