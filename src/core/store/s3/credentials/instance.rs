//! The role of the virtual machine, from its metadata service, version 2.
//!
//! Protocol: Amazon EC2 User Guide, "Use the Instance Metadata Service to access instance metadata". Version 1 is never
//! used: it answers whoever makes this machine send a plain request.

use super::environment::Environment;
use super::request::{Answer, Document, Manner, Refusal, ask, could_not, parse_time, plain_client};
use super::{Credentials, Reach, Source};
use crate::error::{Error, Result};
use reqwest::header::HeaderValue;
use reqwest::{Client, StatusCode};

const NAME: &str = "instance metadata";
const TOKEN_TTL_SECONDS: &str = "21600";

/// What the metadata service has.
pub(super) enum Found {
    Credentials(Credentials),
    /// No service, or no role: this machine is not meant to have credentials from here. The cause, for people.
    Nothing(Error),
}

pub(super) struct Metadata {
    endpoint: String,
    /// Somebody said where the service is: that it does not answer is an error.
    is_promised: bool,
}

impl Metadata {
    /// The service that the environment means; nothing where it is switched off.
    pub fn configured(environment: &Environment) -> Option<Self> {
        let is_true = |value: &str| value.eq_ignore_ascii_case("true");
        if environment.get("AWS_EC2_METADATA_DISABLED").is_some_and(is_true) {
            return None;
        }
        let promised = environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT");
        let is_ipv6 = |mode: &str| mode.eq_ignore_ascii_case("ipv6");
        let usual = match environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE") {
            Some(mode) if is_ipv6(mode) => "http://[fd00:ec2::254]",
            _ => "http://169.254.169.254",
        };
        let endpoint = promised.unwrap_or(usual).trim_end_matches('/').to_string();
        Some(Metadata { endpoint, is_promised: promised.is_some() })
    }

    /// Asks for the keys of the instance's role. A machine without the service knows within two or three seconds.
    pub async fn fetch(&self, reach: &Reach<'_>) -> Result<Found> {
        let client = plain_client()?;
        let session = match self.session(&client, reach).await {
            Ok(session) => session,
            Err(error) if self.is_promised => return Err(error),
            Err(error) => return Ok(Found::Nothing(error)),
        };
        match self.role(&session, reach).await? {
            Some(role) => self.keys(&session, &role, reach).await.map(Found::Credentials),
            None => Ok(Found::Nothing(could_not(&NAME, "this instance has no role"))),
        }
    }

    async fn session<'a>(&self, client: &'a Client, reach: &Reach<'_>) -> Result<Session<'a>> {
        let request = client
            .put(format!("{}/latest/api/token", self.endpoint))
            .header("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_TTL_SECONDS);
        let answer = ask(&NAME, &request, manner(reach)).await?;
        if answer.status != StatusCode::OK {
            return Err(Refusal::default().of(&NAME, answer.status, &[]));
        }
        let token = HeaderValue::from_bytes(answer.body.trim_ascii());
        let mut token = token.map_err(|_| could_not(&NAME, "its session token is none"))?;
        token.set_sensitive(true);
        Ok(Session { client, token })
    }

    /// The name of the role; nothing where the instance has none.
    async fn role(&self, session: &Session<'_>, reach: &Reach<'_>) -> Result<Option<String>> {
        let answer = self.get(session, NAME, "", reach).await?;
        if answer.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if answer.status != StatusCode::OK {
            return Err(Refusal::default().of(&NAME, answer.status, &[]));
        }
        let text = String::from_utf8_lossy(&answer.body);
        let Some(role) = text.lines().map(str::trim).find(|line| !line.is_empty()) else { return Ok(None) };
        // It becomes a part of a path, and of messages. IAM allows these characters.
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"_+=,.@-".contains(&b);
        if role.len() > 128 || !role.bytes().all(fits) || role.bytes().all(|b| b == b'.') {
            return Err(could_not(&NAME, "the name of its role is none"));
        }
        Ok(Some(role.to_string()))
    }

    async fn keys(&self, session: &Session<'_>, role: &str, reach: &Reach<'_>) -> Result<Credentials> {
        let source = Source::InstanceMetadata { role: role.to_string() };
        let answer = self.get(session, &source, role, reach).await?;
        let status = answer.status;
        match Document::parse(&answer) {
            Some(Document {
                access_key: Some(access_key),
                secret_key: Some(secret_key),
                token: Some(token),
                expiration: Some(expiration),
                ..
            }) if status == StatusCode::OK => {
                let expires = parse_time(&source, &expiration)?;
                Credentials::new(source, &access_key, &secret_key, Some(&token), Some(expires))
            }
            // A role that may not be assumed is told with status 200.
            document => Err(document.map_or_else(Refusal::default, Document::refusal).of(&source, status, &[])),
        }
    }

    async fn get(
        &self,
        session: &Session<'_>,
        source: impl std::fmt::Display,
        role: &str,
        reach: &Reach<'_>,
    ) -> Result<Answer> {
        let url = format!("{}/latest/meta-data/iam/security-credentials/{role}", self.endpoint);
        let request = session.client.get(url).header("x-aws-ec2-metadata-token", session.token.clone());
        ask(&source, &request, manner(reach)).await
    }
}

struct Session<'a> {
    client: &'a Client,
    token: HeaderValue,
}

fn manner(reach: &Reach<'_>) -> Manner {
    Manner { patience: reach.patience.metadata, attempts: 2, deadline: reach.deadline }
}

#[cfg(test)]
mod tests {
    use super::super::Chain;
    use super::super::stand_in::{Reply, Request, StandIn, block_on, client, keys};
    use super::*;
    use std::time::{Duration, SystemTime};

    const LIST: &str = "/latest/meta-data/iam/security-credentials/";

    /// A service that demands version 2; `answer` says what stands under the list and under the role.
    fn service(answer: impl Fn(&str) -> Reply + Send + Sync + 'static) -> StandIn {
        StandIn::new(move |request: &Request, _| match (request.method.as_str(), request.path.as_str()) {
            ("PUT", "/latest/api/token") if request.header("x-aws-ec2-metadata-token-ttl-seconds") == Some("21600") => {
                Reply::text(200, "session-1")
            }
            ("GET", path) if request.header("x-aws-ec2-metadata-token") == Some("session-1") => answer(path),
            _ => Reply::text(401, ""),
        })
    }

    fn fetch(server: &StandIn) -> Result<Credentials> {
        let url = server.url("/");
        let variables = [("HOME", "/nonexistent"), ("AWS_EC2_METADATA_SERVICE_ENDPOINT", url.as_str())];
        block_on(Chain::in_environment(&variables).fetch(&client()))
    }

    #[test]
    fn a_session_then_the_role_then_its_keys() {
        let server = service(|path| match path {
            LIST => Reply::text(200, "wal-role\n"),
            "/latest/meta-data/iam/security-credentials/wal-role" => {
                Reply::text(200, keys("ASIA1", SystemTime::now() + Duration::from_secs(60)))
            }
            _ => Reply::text(404, ""),
        });
        let found = fetch(&server).unwrap();
        assert_eq!((found.access_key.as_str(), found.secret_key.as_str()), ("ASIA1", "s3kr1t-key"));
        assert_eq!(found.source.to_string(), "instance metadata role wal-role");
        assert_eq!(server.count(), 3);
    }

    #[test]
    fn version_1_is_never_asked() {
        let server = StandIn::new(|request, _| Reply::text(if request.method == "PUT" { 403 } else { 200 }, "role"));
        let error = fetch(&server).unwrap_err();
        assert_eq!(error.to_string(), "could not get credentials from instance metadata: it answered 403");
        assert_eq!(server.count(), 1);
    }

    #[test]
    fn a_role_that_may_not_be_assumed_is_told() {
        let server = service(|path| match path {
            LIST => Reply::text(200, "wal-role"),
            _ => Reply::text(200, r#"{"Code":"AssumeRoleUnauthorizedAccess","Message":"EC2 cannot assume the role."}"#),
        });
        let error = fetch(&server).unwrap_err();
        let message = "could not get credentials from instance metadata role wal-role: it answered 200 \
                       AssumeRoleUnauthorizedAccess";
        assert_eq!(error.to_string(), message);
        assert_eq!(error.detail_text(), Some("It said: EC2 cannot assume the role."));
    }

    #[test]
    fn an_instance_without_a_role_has_no_credentials() {
        let server = service(|_| Reply::text(404, ""));
        let error = fetch(&server).unwrap_err();
        assert!(error.to_string().starts_with("no credentials found: looked at "), "{error}");
        let cause = "Could not get credentials from instance metadata: this instance has no role.";
        assert_eq!(error.detail_text(), Some(cause));
    }

    #[test]
    fn the_name_of_a_role_cannot_lead_elsewhere() {
        for name in ["../../user-data", "a b", "..", "r\u{e9}"] {
            let server = service(move |_| Reply::text(200, name));
            let error = fetch(&server).unwrap_err();
            let message = "could not get credentials from instance metadata: the name of its role is none";
            assert_eq!((error.to_string().as_str(), server.count()), (message, 2), "{name}");
        }
    }

    #[test]
    fn the_environment_says_where_and_whether() {
        let endpoint = |variables| Metadata::configured(&Environment::of(variables)).map(|it| it.endpoint);
        assert_eq!(endpoint(&[]), Some("http://169.254.169.254".into()));
        assert_eq!(
            endpoint(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6")]),
            Some("http://[fd00:ec2::254]".into())
        );
        assert_eq!(endpoint(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://x:1/")]), Some("http://x:1".into()));
        assert_eq!(endpoint(&[("AWS_EC2_METADATA_DISABLED", "TRUE")]), None);
        assert_eq!(endpoint(&[("AWS_EC2_METADATA_DISABLED", "1")]), Some("http://169.254.169.254".into()));
    }
}
