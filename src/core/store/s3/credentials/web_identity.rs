//! A role assumed with a token that somebody else puts into a file, as Kubernetes does.
//!
//! API: AWS Security Token Service API Reference, AssumeRoleWithWebIdentity.

use super::environment::Environment;
use super::profile::Profile;
use super::request::{Answer, Manner, Refusal, ask, could_not, parse_time};
use super::{Credentials, Reach, Source};
use crate::error::{Error, Kind, Result};
use serde::Deserialize;
use std::path::PathBuf;

/// The role and what it takes to assume it.
pub(super) struct WebIdentity {
    role: String,
    session_name: String,
    token_file: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Assumed {
    assume_role_with_web_identity_result: AssumedResult,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AssumedResult {
    credentials: AssumedCredentials,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct AssumedCredentials {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
    expiration: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Refused {
    error: RefusedError,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RefusedError {
    code: Option<String>,
    message: Option<String>,
}

impl WebIdentity {
    /// The role that is configured. As for botocore, it is the token's file that says so, and each variable of the
    /// environment, where it counts, goes before the profile's key.
    pub fn configured(environment: Option<&Environment>, profile: &Profile) -> Result<Option<Self>> {
        let value = |variable, key| environment.and_then(|it| it.get(variable)).or_else(|| profile.value(key));
        let Some(token_file) = value("AWS_WEB_IDENTITY_TOKEN_FILE", "web_identity_token_file") else { return Ok(None) };
        let Some(role) = value("AWS_ROLE_ARN", "role_arn") else {
            let message = "could not get credentials from web identity: there is a token file but no role";
            let hint = "Set AWS_ROLE_ARN beside AWS_WEB_IDENTITY_TOKEN_FILE, or role_arn in the profile.";
            return Err(Error::new(Kind::Configuration, "AWS_ROLE_ARN", message).hint(hint));
        };
        let session_name = value("AWS_ROLE_SESSION_NAME", "role_session_name").unwrap_or("archiver").to_string();
        Ok(Some(WebIdentity { role: role.to_string(), session_name, token_file: token_file.into() }))
    }

    /// Assumes the role. The token is read each time: it is replaced well before it expires.
    pub async fn assume(&self, reach: &Reach<'_>, endpoint: &str) -> Result<Credentials> {
        let source = Source::WebIdentity { role: self.role.clone() };
        let token = reach.files.token("web identity token file", &self.token_file, reach.deadline).await?;
        // In the body, because URLs end up in logs.
        let form = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("Action", "AssumeRoleWithWebIdentity")
            .append_pair("Version", "2011-06-15")
            .append_pair("RoleArn", &self.role)
            .append_pair("RoleSessionName", &self.session_name)
            .append_pair("WebIdentityToken", &token)
            .finish();
        let request = reach
            .http
            .post(endpoint)
            .header("Content-Type", "application/x-www-form-urlencoded")
            .header("Accept", "text/xml")
            .body(form);
        let manner = Manner { patience: reach.patience.token_service, attempts: 2, deadline: reach.deadline };
        let answer = ask(&source, &request, manner).await?;
        if !answer.status.is_success() {
            return Err(refusal(&answer).of(&source, answer.status, &[&token]));
        }
        // The parser's own words may quote what it read.
        let Some(Assumed { assume_role_with_web_identity_result: AssumedResult { credentials: found } }) = xml(&answer)
        else {
            return Err(could_not(&source, "its answer holds no credentials"));
        };
        let expires = parse_time(&source, &found.expiration)?;
        let token = Some(found.session_token.as_str());
        Credentials::new(source, &found.access_key_id, &found.secret_access_key, token, Some(expires))
    }
}

fn xml<'a, T: Deserialize<'a>>(answer: &'a Answer) -> Option<T> {
    quick_xml::de::from_str(std::str::from_utf8(&answer.body).ok()?).ok()
}

fn refusal(answer: &Answer) -> Refusal {
    let refused: Option<Refused> = xml(answer);
    refused.map(|it| Refusal { code: it.error.code, message: it.error.message }).unwrap_or_default()
}

/// Where the token service listens: where the environment says, else in the region, else at the global address.
pub(super) fn endpoint(environment: &Environment, region: Option<&str>) -> Result<String> {
    if let Some(url) = environment.get("AWS_ENDPOINT_URL_STS") {
        let is_web = url.starts_with("https://") || url.starts_with("http://");
        let wrong = || {
            let message = "could not get credentials from web identity: AWS_ENDPOINT_URL_STS is no URL";
            let hint = "Write it as https://host or https://host:port.";
            Error::new(Kind::Configuration, "AWS_ENDPOINT_URL_STS", message).hint(hint)
        };
        return (is_web && reqwest::Url::parse(url).is_ok()).then(|| url.to_string()).ok_or_else(wrong);
    }
    // What is in no region's name must not become part of a host's.
    let is_region = |it: &&str| it.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    Ok(match region.filter(is_region) {
        Some(region) if region.starts_with("cn-") => format!("https://sts.{region}.amazonaws.com.cn"),
        Some(region) => format!("https://sts.{region}.amazonaws.com"),
        None => "https://sts.amazonaws.com".to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Chain;
    use super::super::stand_in::{Reply, StandIn, block_on, client};
    use super::*;
    use std::fs;
    use std::time::SystemTime;

    const ARN: &str = "arn:aws:iam::123456789012:role/wal";
    const TOKEN: &str = "eyJhbGciOi.s3kr1t-web-token";

    fn answer(expires: &str) -> String {
        format!(
            r#"<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
            <AssumeRoleWithWebIdentityResult><Audience>sts</Audience><Credentials><SessionToken>s3kr1t&lt;t</SessionToken>
            <SecretAccessKey>s3kr1t-key</SecretAccessKey><Expiration>{expires}</Expiration><AccessKeyId>ASIA1</AccessKeyId>
            </Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"#
        )
    }

    fn fetch(server: &StandIn, more: &[(&str, &str)]) -> Result<Credentials> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        fs::write(&file, format!("{TOKEN}\n")).unwrap();
        let (url, file) = (server.url("/"), file.display().to_string());
        let mut variables = vec![
            ("HOME", "/nonexistent"),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", file.as_str()),
            ("AWS_ENDPOINT_URL_STS", url.as_str()),
        ];
        variables.extend(more);
        block_on(Chain::in_environment(&variables).fetch(&client()))
    }

    #[test]
    fn the_role_is_assumed_with_the_token_in_the_body() {
        let server = StandIn::new(|_, _| Reply::text(200, answer("2999-01-01T00:00:00Z")));
        let found = fetch(&server, &[("AWS_ROLE_ARN", ARN)]).unwrap();
        assert_eq!((found.access_key.as_str(), found.secret_key.as_str()), ("ASIA1", "s3kr1t-key"));
        assert_eq!(found.session_token.as_deref(), Some("s3kr1t<t"));
        assert!(found.expires.unwrap() > SystemTime::now());
        assert_eq!(found.source.to_string(), format!("web identity role {ARN}"));
        let request = &server.requests()[0];
        assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/"));
        let sent = "Action=AssumeRoleWithWebIdentity&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A123456789012%3Arole%2Fwal\
                    &RoleSessionName=archiver&WebIdentityToken=eyJhbGciOi.s3kr1t-web-token";
        assert_eq!(request.body, sent);
    }

    #[test]
    fn a_refusal_names_the_role_and_the_code_and_never_the_token() {
        let server = StandIn::new(|_, _| {
            let body = "<ErrorResponse><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code>\
                        <Message>Couldn't retrieve the key</Message></Error></ErrorResponse>";
            Reply::text(400, body)
        });
        let error = fetch(&server, &[("AWS_ROLE_ARN", ARN)]).unwrap_err();
        let message =
            format!("could not get credentials from web identity role {ARN}: it answered 400 InvalidIdentityToken");
        assert_eq!(error.to_string(), message);
        assert_eq!(error.detail_text(), Some("It said: Couldn't retrieve the key."));
        assert_eq!((error.kind(), error.is_worth_retrying()), (Kind::Storage, false));
        let server = StandIn::new(|_, _| {
            let body =
                format!("<ErrorResponse><Error><Code>X</Code><Message>Bad {TOKEN}</Message></Error></ErrorResponse>");
            Reply::text(500, body)
        });
        let error = fetch(&server, &[("AWS_ROLE_ARN", ARN)]).unwrap_err();
        assert!(error.is_worth_retrying() && !format!("{error:?}").contains("s3kr1t"));
        assert_eq!(server.count(), 2, "500 may pass");
    }

    #[test]
    fn an_answer_that_is_none_is_not_quoted() {
        let server = StandIn::new(|_, _| Reply::text(200, "<a><SecretAccessKey>s3kr1t</b>"));
        let error = fetch(&server, &[("AWS_ROLE_ARN", ARN)]).unwrap_err();
        assert!(error.to_string().ends_with(": its answer holds no credentials"));
        assert!(!format!("{error:?}").contains("s3kr1t"));
    }

    #[test]
    fn a_token_without_a_role_is_an_error() {
        let server = StandIn::new(|_, _| Reply::Hang);
        let message = "could not get credentials from web identity: there is a token file but no role";
        assert_eq!(fetch(&server, &[]).unwrap_err().to_string(), message);
        assert_eq!(server.count(), 0);
    }

    #[test]
    fn a_profile_in_the_url_may_have_a_role_of_its_own() {
        let server = StandIn::new(|_, _| Reply::text(200, answer("2999-01-01T00:00:00Z")));
        let directory = tempfile::tempdir().unwrap();
        let [token, config] = ["token", "config"].map(|name| directory.path().join(name));
        fs::write(&token, TOKEN).unwrap();
        let text = format!("[profile wal]\nweb_identity_token_file={}\nrole_arn={ARN}\n", token.display());
        fs::write(&config, text).unwrap();
        let (url, config) = (server.url("/"), config.display().to_string());
        let variables = [
            ("HOME", "/nonexistent"),
            ("AWS_CONFIG_FILE", config.as_str()),
            ("AWS_ENDPOINT_URL_STS", url.as_str()),
            ("AWS_ROLE_ARN", "arn:of:the:environment"),
            ("AWS_ACCESS_KEY_ID", "of the environment"),
        ];
        let chain = Chain::of(Some("wal"), None, &variables);
        let found = block_on(chain.fetch(&client())).unwrap();
        assert_eq!(found.source.to_string(), format!("web identity role {ARN}"));
    }

    #[test]
    fn the_token_service_of_the_region_is_asked() {
        let at = |variables, region| endpoint(&Environment::of(variables), region).map_err(|error| error.to_string());
        assert_eq!(at(&[], None), Ok("https://sts.amazonaws.com".into()));
        assert_eq!(at(&[], Some("eu-west-1")), Ok("https://sts.eu-west-1.amazonaws.com".into()));
        assert_eq!(at(&[], Some("cn-north-1")), Ok("https://sts.cn-north-1.amazonaws.com.cn".into()));
        assert_eq!(at(&[], Some("evil.example/")), Ok("https://sts.amazonaws.com".into()));
        assert_eq!(at(&[("AWS_ENDPOINT_URL_STS", "http://sts:1")], Some("x")), Ok("http://sts:1".into()));
        assert!(at(&[("AWS_ENDPOINT_URL_STS", "sts")], None).is_err());
    }
}
