//! The endpoint that a container is given: ECS, EKS Pod Identity and what imitates them.
//!
//! Rules: AWS SDKs and Tools Reference Guide, "Container credential provider"; which hosts may be asked without TLS, and
//! that the token's file goes before the token: botocore 1.44.5, utils.py and credentials.py.

use super::environment::Environment;
use super::request::{Document, Manner, Refusal, ask, could_not, parse_time, plain_client};
use super::{Credentials, Reach, Source};
use crate::error::{Error, Kind, Result};
use reqwest::Url;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

/// The agents of ECS and of EKS, beside loopback: on these the keys do not leave the machine.
const ECS: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2));
const EKS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23))];

pub(super) struct Endpoint {
    url: Url,
    proof: Option<Proof>,
}

/// What the endpoint wants to see.
enum Proof {
    Token(String),
    File(PathBuf),
}

impl Endpoint {
    /// The endpoint that the environment names.
    pub fn configured(environment: &Environment) -> Result<Option<Self>> {
        let url = match (
            environment.get("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
            environment.get("AWS_CONTAINER_CREDENTIALS_FULL_URI"),
        ) {
            (Some(path), _) => of_path(path)?,
            (None, Some(url)) => of_url(url)?,
            (None, None) => return Ok(None),
        };
        let file = environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").map(|path| Proof::File(path.into()));
        let token =
            || environment.get("AWS_CONTAINER_AUTHORIZATION_TOKEN").map(|token| Proof::Token(token.to_string()));
        Ok(Some(Endpoint { url, proof: file.or_else(token) }))
    }

    /// Asks for keys. Over https the caller's client is used, which knows whom to trust; it may go through a proxy, which
    /// then sees nothing.
    pub async fn fetch(&self, reach: &Reach<'_>) -> Result<Credentials> {
        let source = Source::Container;
        let plain;
        let client = match self.url.scheme() {
            "https" => reach.http,
            _ => {
                plain = plain_client()?;
                &plain
            }
        };
        let proof = self.proof(reach).await?;
        let mut request = client.get(self.url.clone()).header(ACCEPT, "application/json");
        if let Some(proof) = &proof {
            let wrong = |_| could_not(&source, "the authorization token holds characters that no header may");
            let mut value = HeaderValue::from_str(proof).map_err(wrong)?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        let manner = Manner { patience: reach.patience.container, attempts: 3, deadline: reach.deadline };
        let answer = ask(&source, &request, manner).await?;
        let document = Document::parse(&answer);
        if !answer.status.is_success() {
            let refusal = document.map_or_else(Refusal::default, Document::refusal);
            return Err(refusal.of(&source, answer.status, &[proof.as_deref().unwrap_or_default()]));
        }
        let Some(Document { access_key: Some(access_key), secret_key: Some(secret_key), token, expiration, .. }) =
            document
        else {
            return Err(could_not(&source, "its answer holds no credentials"));
        };
        let expires = expiration.map(|text| parse_time(&source, &text)).transpose()?;
        Credentials::new(source, &access_key, &secret_key, token.as_deref(), expires)
    }

    async fn proof(&self, reach: &Reach<'_>) -> Result<Option<String>> {
        Ok(match &self.proof {
            None => None,
            Some(Proof::Token(token)) => Some(token.clone()),
            // Replaced while we run, so it is read each time.
            Some(Proof::File(path)) => {
                Some(reach.files.token("container authorization token file", path, reach.deadline).await?)
            }
        })
    }
}

fn wrong(variable: &str, rule: &str) -> Error {
    let message = format!("could not get credentials from container: {variable} {rule}");
    Error::new(Kind::Configuration, variable, message)
        .hint("The container's platform sets it; set none by hand unless you know the endpoint.")
}

fn of_path(path: &str) -> Result<Url> {
    let wrong = || wrong("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "must be a path that begins with a slash");
    // Without the slash the text could end the host's name, and name another.
    if !path.starts_with('/') {
        return Err(wrong());
    }
    Url::parse(&format!("http://{ECS}{path}")).map_err(|_| wrong())
}

fn of_url(text: &str) -> Result<Url> {
    let wrong = |rule| wrong("AWS_CONTAINER_CREDENTIALS_FULL_URI", rule);
    let url = Url::parse(text).map_err(|_| wrong("must be a URL"))?;
    let is_near = |address: IpAddr| address.is_loopback() || address == ECS || EKS.contains(&address);
    let host = url.host_str().unwrap_or_default();
    let is_near = host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(is_near);
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_near => Ok(url),
        "http" => Err(wrong("must be https, or name a loopback or link-local host of the platform")),
        _ => Err(wrong("must be an http or https URL")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Chain;
    use super::super::stand_in::{Reply, StandIn, block_on, client, keys};
    use super::*;
    use std::fs;
    use std::time::{Duration, SystemTime};

    fn in_an_hour() -> SystemTime {
        SystemTime::now() + Duration::from_secs(3600)
    }

    fn fetch(server: &StandIn, more: &[(&str, &str)]) -> Result<Credentials> {
        let url = server.url("/v1/credentials");
        let mut variables = vec![("HOME", "/nonexistent"), ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str())];
        variables.extend(more);
        block_on(Chain::in_environment(&variables).fetch(&client()))
    }

    #[test]
    fn the_keys_come_with_their_expiry() {
        let server = StandIn::new(|_, _| Reply::text(200, keys("ASIA1", in_an_hour())));
        let found = fetch(&server, &[("AWS_CONTAINER_AUTHORIZATION_TOKEN", "Basic s3kr1t")]).unwrap();
        assert_eq!((found.access_key.as_str(), found.session_token.as_deref()), ("ASIA1", Some("s3kr1t-token")));
        assert!(found.expires.unwrap() > SystemTime::now() && found.source == Source::Container);
        let request = &server.requests()[0];
        assert_eq!((request.path.as_str(), request.header("authorization")), ("/v1/credentials", Some("Basic s3kr1t")));
    }

    #[test]
    fn the_token_file_goes_before_the_token_and_is_read_each_time() {
        let server = StandIn::new(|_, _| Reply::text(200, keys("ASIA1", in_an_hour())));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("token");
        let (url, shown) = (server.url("/"), file.display().to_string());
        let chain = Chain::in_environment(&[
            ("HOME", "/nonexistent"),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &url),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN", "never"),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", &shown),
        ]);
        for token in ["first", "second"] {
            fs::write(&file, format!("{token}\n")).unwrap();
            block_on(chain.fetch(&client())).unwrap();
            assert_eq!(server.requests().last().unwrap().header("authorization"), Some(token));
        }
        fs::remove_file(&file).unwrap();
        let error = block_on(chain.fetch(&client())).unwrap_err();
        let file = "could not read container authorization token file";
        assert_eq!(error.to_string(), format!("{file} \"{shown}\": No such file or directory"));
    }

    #[test]
    fn a_refusal_is_an_error_and_no_reason_to_look_elsewhere() {
        let server = StandIn::new(|_, _| Reply::text(404, r#"{"code":"NotFound","message":"no such task"}"#));
        let metadata = StandIn::new(|_, _| Reply::Hang);
        let error = fetch(&server, &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata.url(""))]).unwrap_err();
        assert_eq!(error.to_string(), "could not get credentials from container: it answered 404 NotFound");
        assert_eq!(error.detail_text(), Some("It said: no such task."));
        assert_eq!(metadata.count(), 0);
    }

    #[test]
    fn keys_that_are_expired_on_arrival_are_refused() {
        let expired = SystemTime::now() - Duration::from_secs(10);
        let server = StandIn::new(move |_, _| Reply::text(200, keys("ASIA1", expired)));
        let error = fetch(&server, &[]).unwrap_err();
        let start = "could not get credentials from container: they expired at ";
        assert!(error.to_string().starts_with(start), "{error}");
        assert!(error.is_worth_retrying());
    }

    #[test]
    fn only_hosts_that_the_keys_may_come_from_are_asked() {
        let is_asked = |variable: &str, value: &str| {
            let endpoint = Endpoint::configured(&Environment::of(&[(variable, value)]));
            endpoint.map(|it| it.unwrap().url.to_string()).map_err(|error| error.kind())
        };
        let full = |value| is_asked("AWS_CONTAINER_CREDENTIALS_FULL_URI", value).is_ok();
        for near in [
            "http://127.0.0.1:1/x",
            "http://[::1]/x",
            "http://localhost/x",
            "http://169.254.170.2/x",
            "http://169.254.170.23/v1/credentials",
            "http://[fd00:ec2::23]/v1/credentials",
            "https://anywhere.example/x",
        ] {
            assert!(full(near), "{near}");
        }
        for far in [
            "http://anywhere.example/",
            "http://169.254.169.254/",
            "http://localhost.example/",
            "http://127.0.0.1@anywhere.example/",
            "http://127.0.0.1.example/",
            "file:///etc/passwd",
            "nonsense",
        ] {
            assert!(!full(far), "{far}");
        }
        let relative = |value| is_asked("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", value);
        assert_eq!(relative("/v2/credentials/1?a=b"), Ok("http://169.254.170.2/v2/credentials/1?a=b".into()));
        for wrong in ["@anywhere.example/", ".example/", ":80@x/", "v2"] {
            assert_eq!(relative(wrong), Err(Kind::Configuration), "{wrong}");
        }
    }
}
