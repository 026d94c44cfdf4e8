//! One request to an endpoint that hands out keys, and what may be told of its answer.

use super::deadline::Deadline;
use crate::error::{Error, Kind, Result, plain_cause};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use std::error::Error as _;
use std::fmt;
use std::io;
use std::time::{Duration, SystemTime};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// All that any of the endpoints has to say is a few hundred bytes.
const MOST_BYTES: usize = 64 << 10;
const PAUSE: Duration = Duration::from_millis(100);

/// How an endpoint is asked.
#[derive(Clone, Copy)]
pub(super) struct Manner {
    /// For one request.
    pub patience: Duration,
    /// Requests, where one found no answer, or one of 429 or 500 and above.
    pub attempts: u32,
    /// For all of it.
    pub deadline: Deadline,
}

/// What came back, whole. Holds keys, so it cannot be printed.
pub(super) struct Answer {
    pub status: StatusCode,
    pub body: Vec<u8>,
}

impl Answer {
    fn is_passing(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::TOO_MANY_REQUESTS
    }
}

/// Sends `request` until it is answered; `source` names the endpoint in errors.
///
/// Follows no redirect if its client follows none. Never waits beyond the deadline.
pub(super) async fn ask(source: &impl fmt::Display, request: &RequestBuilder, manner: Manner) -> Result<Answer> {
    let mut attempt = 1;
    loop {
        let answer = ask_once(source, request, manner).await;
        let may_pass = match &answer {
            Ok(answer) => answer.is_passing(),
            Err(error) => error.is_worth_retrying(),
        };
        if !may_pass || attempt >= manner.attempts || manner.deadline.has_passed() {
            return answer;
        }
        attempt += 1;
        tokio::time::sleep(PAUSE.mul_f64(0.5 + fastrand::f64())).await;
    }
}

async fn ask_once(source: &impl fmt::Display, request: &RequestBuilder, manner: Manner) -> Result<Answer> {
    let patience = manner.deadline.leaves(manner.patience);
    let late = || could_not(source, format!("no answer within {patience:.1?}")).retry_if(true);
    let Some(request) = request.try_clone() else { return Err(could_not(source, "the request cannot be repeated")) };
    let whole = async { read_whole(source, request.send().await.map_err(|error| unanswered(source, &error))?).await };
    tokio::time::timeout(patience, whole).await.unwrap_or_else(|_| Err(late()))
}

async fn read_whole(source: &impl fmt::Display, mut response: Response) -> Result<Answer> {
    let status = response.status();
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| unanswered(source, &error))? {
        if body.len() + piece.len() > MOST_BYTES {
            return Err(could_not(source, format!("its answer is longer than {MOST_BYTES} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(Answer { status, body })
}

/// The failure of a source.
pub(super) fn could_not(source: &impl fmt::Display, cause: impl fmt::Display) -> Error {
    Error::new(Kind::Storage, source.to_string(), format!("could not get credentials from {source}: {cause}"))
}

fn unanswered(source: &impl fmt::Display, error: &reqwest::Error) -> Error {
    let may_pass = !error.is_builder();
    if error.is_timeout() {
        return could_not(source, "no answer in time").retry_if(may_pass);
    }
    could_not(source, printable(&innermost_cause(error))).retry_if(may_pass)
}

/// The outer texts say nothing but the URL.
fn innermost_cause(error: &reqwest::Error) -> String {
    let mut text = "the request failed".to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        match cause.downcast_ref::<io::Error>() {
            Some(system) if system.raw_os_error().is_some() => return plain_cause(system),
            _ => text = cause.to_string(),
        }
        next = cause.source();
    }
    text
}

/// What an endpoint said that refused, as far as it may be told.
#[derive(Default)]
pub(super) struct Refusal {
    pub code: Option<String>,
    pub message: Option<String>,
}

impl Refusal {
    /// The error of an endpoint that answered with `status`: names the code, where it is one, and quotes the message,
    /// where it is sure to hold neither one of `secrets` nor another.
    pub fn of(self, source: &impl fmt::Display, status: StatusCode, secrets: &[&str]) -> Error {
        /// Those that AWS's SDKs try again, beside the statuses that say so themselves.
        const PASSING: [&str; 4] =
            ["IDPCommunicationError", "Throttling", "ThrottlingException", "RequestLimitExceeded"];
        let is_code = |code: &String| code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'.');
        let code = self.code.filter(is_code).filter(|code| !holds_secret(code, secrets)).unwrap_or_default();
        let may_pass = Answer { status, body: Vec::new() }.is_passing() || PASSING.contains(&code.as_str());
        let answered = format!("it answered {} {code}", status.as_u16());
        let error = could_not(source, answered.trim_end()).retry_if(may_pass);
        match self.message.filter(|message| !message.trim().is_empty() && !holds_secret(message, secrets)) {
            Some(message) => error.detail(format!("It said: {}.", printable(message.trim().trim_end_matches('.')))),
            None => error,
        }
    }
}

/// Whether `text` holds a part of one of `secrets`, or a word so long that it may be a key or a token.
fn holds_secret(text: &str, secrets: &[&str]) -> bool {
    const TELLING: usize = 12;
    /// A secret key has 40 characters; a session token has hundreds.
    const SUSPICIOUS: usize = 40;
    let parts = |secret: &str| -> bool {
        let bytes = secret.as_bytes();
        bytes
            .windows(TELLING.min(bytes.len()).max(1))
            .any(|part| text.as_bytes().windows(part.len()).any(|at| at == part))
    };
    let is_of_keys = |c: char| c.is_ascii_alphanumeric() || "+/=_-.%".contains(c);
    secrets.iter().any(|secret| parts(secret)) || text.split(|c| !is_of_keys(c)).any(|word| word.len() >= SUSPICIOUS)
}

/// One bounded line of `text`, without control characters.
fn printable(text: &str) -> String {
    const MOST_CHARACTERS: usize = 300;
    let line = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut short: String = line.clone().take(MOST_CHARACTERS).collect();
    if line.count() > MOST_CHARACTERS {
        short.push('…');
    }
    short
}

/// The keys, or the refusal, as container endpoints and instance metadata write them.
#[derive(Deserialize)]
pub(super) struct Document {
    #[serde(rename = "AccessKeyId")]
    pub access_key: Option<String>,
    #[serde(rename = "SecretAccessKey")]
    pub secret_key: Option<String>,
    #[serde(rename = "Token")]
    pub token: Option<String>,
    #[serde(rename = "Expiration")]
    pub expiration: Option<String>,
    #[serde(rename = "Code", alias = "code")]
    code: Option<String>,
    #[serde(rename = "Message", alias = "message")]
    message: Option<String>,
}

impl Document {
    pub fn parse(answer: &Answer) -> Option<Self> {
        serde_json::from_slice(&answer.body).ok()
    }

    pub fn refusal(self) -> Refusal {
        Refusal { code: self.code, message: self.message }
    }
}

/// A time as AWS writes it: RFC 3339.
pub(super) fn parse_time(source: &impl fmt::Display, text: &str) -> Result<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339)
        .map(SystemTime::from)
        .map_err(|_| could_not(source, "its answer has an expiry time that is none"))
}

/// A client for endpoints inside the machine: never through a proxy, which would be handed the keys, and with no trusted
/// certificates, which take time to load and prove nothing there.
pub(super) fn plain_client() -> Result<Client> {
    let client = Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .tls_built_in_root_certs(false)
        .pool_max_idle_per_host(0)
        .build();
    client.map_err(|_| Error::new(Kind::Internal, "http client", "could not make an HTTP client"))
}

#[cfg(test)]
mod tests {
    use super::super::stand_in::{Reply, StandIn, block_on};
    use super::*;
    use std::time::Instant;

    fn manner(attempts: u32) -> Manner {
        let deadline = Deadline::after(Duration::from_secs(5));
        Manner { patience: Duration::from_millis(50), attempts, deadline }
    }

    fn get(url: &str, attempts: u32) -> Result<Answer> {
        block_on(async { ask(&"container", &plain_client().unwrap().get(url), manner(attempts)).await })
    }

    #[test]
    fn a_hanging_endpoint_ends_at_the_deadline() {
        let server = StandIn::new(|_, _| Reply::Hang);
        let began = Instant::now();
        let error = get(&server.url("/"), 2).err().unwrap();
        assert_eq!(error.to_string(), "could not get credentials from container: no answer within 50.0ms");
        assert!(error.is_worth_retrying() && began.elapsed() < Duration::from_secs(2));
        assert_eq!(server.count(), 2);
    }

    #[test]
    fn a_passing_fault_is_tried_again_and_another_is_not() {
        let server = StandIn::new(|_, number| Reply::text(if number == 0 { 503 } else { 200 }, "ok"));
        assert_eq!(get(&server.url("/"), 2).ok().unwrap().status, 200);
        assert_eq!(server.count(), 2);
        let server = StandIn::new(|_, _| Reply::text(404, "no"));
        assert_eq!(get(&server.url("/"), 3).ok().unwrap().status, 404);
        assert_eq!(server.count(), 1);
    }

    #[test]
    fn a_refused_connection_says_so() {
        let error = get("http://127.0.0.1:1/", 1).err().unwrap();
        assert_eq!(error.to_string(), "could not get credentials from container: Connection refused");
        assert!(error.is_worth_retrying());
    }

    #[test]
    fn an_answer_is_bounded_and_no_redirect_is_followed() {
        let server = StandIn::new(|_, _| Reply::text(200, "x".repeat(MOST_BYTES + 1)));
        let error = get(&server.url("/"), 1).err().unwrap();
        assert!(error.to_string().ends_with("its answer is longer than 65536 bytes"), "{error}");
        let elsewhere = StandIn::new(|_, _| Reply::text(200, "keys"));
        let to = elsewhere.url("/");
        let server = StandIn::new(move |_, _| Reply::text(307, "").with_header("Location", &to));
        assert_eq!(get(&server.url("/"), 1).ok().unwrap().status, 307);
        assert_eq!(elsewhere.count(), 0);
    }

    #[test]
    fn a_refusal_is_told_unless_it_holds_a_secret() {
        let told = |code: &str, message: &str| {
            let refusal = Refusal { code: Some(code.into()), message: Some(message.into()) };
            refusal.of(&"container", StatusCode::FORBIDDEN, &["the-token-that-was-sent"])
        };
        let plain = told("AccessDenied", "Not authorized to perform sts:AssumeRoleWithWebIdentity.\r\nGo away.");
        assert_eq!(plain.to_string(), "could not get credentials from container: it answered 403 AccessDenied");
        let said = "It said: Not authorized to perform sts:AssumeRoleWithWebIdentity.  Go away.";
        assert_eq!(plain.detail_text(), Some(said));
        assert_eq!(told("A", "bad token: en-that-was-s").detail_text(), None, "a part of what was sent");
        assert_eq!(told("A", &format!("bad key {}", "k".repeat(40))).detail_text(), None, "as long as a key");
        assert_eq!(
            told("the-token-that-was-sent", "").to_string(),
            "could not get credentials from container: it answered 403"
        );
        assert!(told("A", &"many words ".repeat(100)).detail_text().unwrap().chars().count() < 320);
        assert!(told("Throttling", "").is_worth_retrying() && !told("AccessDenied", "").is_worth_retrying());
    }

    #[test]
    fn times_are_read_with_fractions_and_zones() {
        let seconds = |text| {
            let since = parse_time(&"container", text).map(|it| it.duration_since(SystemTime::UNIX_EPOCH).unwrap());
            since.map(|it| it.as_millis()).map_err(|error| error.to_string())
        };
        assert_eq!(seconds("2026-11-01T12:00:00Z"), Ok(1_793_534_400_000));
        assert_eq!(seconds("2026-11-01T14:00:00.250+02:00"), Ok(1_793_534_400_250));
        let message = "could not get credentials from container: its answer has an expiry time that is none";
        assert_eq!(seconds("tomorrow"), Err(message.to_string()));
    }
}
