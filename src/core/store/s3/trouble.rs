//! What can go wrong with a request, by who has to act.

use crate::error::{Error, Kind};
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use std::io;
use std::time::Duration;

/// What a failure means for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// No object stands under the key.
    NotThere,
    /// An object stands under the key that was to be created.
    AlreadyThere,
    /// The credentials, or what they permit.
    Refused,
    /// The store asks to come back later.
    Throttled,
    /// It may pass within seconds.
    Transient,
    /// It stays until somebody mends it.
    Permanent,
    /// The archiver was told to stop.
    Stopped,
}

/// One failed request.
#[derive(Clone, Debug)]
pub struct Trouble {
    /// What it means.
    pub class: Class,
    /// The status of the answer, where there was one.
    pub status: Option<u16>,
    /// The store's word for it; empty where it said none.
    pub code: String,
    /// Whether the request may have been done all the same.
    pub may_be_done: bool,
    /// Whether other credentials may help.
    pub concerns_credentials: bool,
    /// The primary line.
    message: String,
    /// What the store said beside its code.
    said: Option<String>,
    request_id: Option<String>,
    hint: Option<&'static str>,
    circumstances: Circumstances,
    /// A failure of something beside the request itself, complete.
    whole: Option<Error>,
}

/// What was asked, for the detail.
#[derive(Clone, Debug, Default)]
pub struct Circumstances {
    /// Method and URL, without a query.
    pub request: String,
    /// The source of the credentials.
    pub credentials: Option<String>,
    /// How many attempts were made.
    pub attempts: u32,
    /// In how much time.
    pub elapsed: Duration,
}

/// The body of an error answer.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ErrorBody {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    request_id: Option<String>,
}

/// Texts of the store's are cut here.
const LONGEST_TEXT: usize = 200;

/// A text of somebody else's, fit for a log line.
fn plain_text(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LONGEST_TEXT).collect::<String>().trim().to_string()
}

impl Trouble {
    /// An answer to `method` that is no success. `request_id` is the one in its headers.
    pub fn of_answer(method: &Method, status: StatusCode, body: &[u8], request_id: Option<&str>) -> Box<Self> {
        let body: Option<ErrorBody> =
            std::str::from_utf8(body).ok().and_then(|text| quick_xml::de::from_str(text).ok());
        let (code, said, id) = match body {
            Some(body) => (plain_text(&body.code), plain_text(&body.message), body.request_id),
            None => Default::default(),
        };
        let (mut class, hint) = classify(status.as_u16(), &code);
        // S3 gives every absence its name where an answer has a body; what does not is something else's, in between.
        if class == Class::NotThere && code.is_empty() && method != Method::HEAD {
            class = Class::Transient;
        }
        // An answer to HEAD has no word for it.
        let may_be_expired = method == Method::HEAD && status == StatusCode::BAD_REQUEST;
        Box::new(Trouble {
            class,
            status: Some(status.as_u16()),
            may_be_done: status.is_server_error(),
            concerns_credentials: class == Class::Refused || may_be_expired,
            message: format!("store answered {}{}{code}", status.as_u16(), if code.is_empty() { "" } else { " " }),
            code,
            said: (!said.is_empty()).then_some(said),
            request_id: request_id.map(plain_text).or(id.as_deref().map(plain_text)),
            hint,
            circumstances: Circumstances::default(),
            whole: None,
        })
    }

    /// A request that got no answer.
    pub fn of_transport(error: &reqwest::Error) -> Box<Self> {
        let mut deepest: &dyn std::error::Error = error;
        let mut io_cause = None;
        while let Some(source) = deepest.source() {
            deepest = source;
            if let Some(cause) = deepest.downcast_ref::<io::Error>().filter(|cause| cause.raw_os_error().is_some()) {
                io_cause = Some(crate::error::plain_cause(cause));
            }
        }
        let cause = io_cause.unwrap_or_else(|| plain_text(&deepest.to_string()));
        let is_certificate = cause.contains("certificate");
        let hint = if is_certificate {
            "The store's certificate must be signed by an authority that the system knows, or that ca_file in \
             archiver.storage names, and be made out to the host of the endpoint."
        } else {
            "See that the store runs and that endpoint and region in archiver.storage are right; where a proxy is \
             needed, the server's environment must name it (HTTPS_PROXY)."
        };
        Box::new(Trouble {
            class: if is_certificate { Class::Permanent } else { Class::Transient },
            may_be_done: !error.is_connect(),
            hint: Some(hint),
            ..Trouble::without_answer(if error.is_connect() || is_certificate {
                format!("could not connect to the store: {cause}")
            } else {
                format!("lost the connection to the store: {cause}")
            })
        })
    }

    /// A request in which nothing moved for that long.
    pub fn stalled(timeout: Duration) -> Box<Self> {
        let message = format!("the store did not answer for {} s", timeout.as_secs_f64().round().max(1.0));
        Box::new(Trouble { may_be_done: true, ..Trouble::without_answer(message) })
    }

    /// A request that was given up because the archiver stops.
    pub fn stopped() -> Box<Self> {
        let message = "stopped before the store had answered".to_string();
        Box::new(Trouble { class: Class::Stopped, may_be_done: true, ..Trouble::without_answer(message) })
    }

    /// An answer that makes no sense.
    pub fn senseless(cause: &str) -> Box<Self> {
        let message = format!("could not read the store's answer: {cause}");
        Box::new(Trouble { may_be_done: true, ..Trouble::without_answer(message) })
    }

    /// A failure of something beside the request.
    pub fn beside(error: Error) -> Box<Self> {
        Box::new(Trouble {
            class: if error.is_worth_retrying() { Class::Transient } else { Class::Permanent },
            whole: Some(error),
            ..Trouble::without_answer(String::new())
        })
    }

    /// A failure of the caller's own, which no other attempt would mend.
    pub fn of_caller(error: Error) -> Box<Self> {
        let class = Class::Permanent;
        Box::new(Trouble { class, whole: Some(error), ..Trouble::without_answer(String::new()) })
    }

    fn without_answer(message: String) -> Self {
        Trouble {
            class: Class::Transient,
            status: None,
            code: String::new(),
            may_be_done: false,
            concerns_credentials: false,
            message,
            said: None,
            request_id: None,
            hint: None,
            circumstances: Circumstances::default(),
            whole: None,
        }
    }

    /// The same failure, in these circumstances.
    pub fn in_circumstances(mut self: Box<Self>, circumstances: Circumstances) -> Box<Self> {
        self.circumstances = circumstances;
        self
    }

    /// Whether the same request may succeed within seconds.
    pub fn is_passing(&self) -> bool {
        matches!(self.class, Class::Throttled | Class::Transient)
    }

    /// Whether another connection may help.
    pub fn concerns_connection(&self) -> bool {
        self.status.is_none() && self.whole.is_none()
    }
}

fn classify(status: u16, code: &str) -> (Class, Option<&'static str>) {
    const REGION: &str = "Set region in archiver.storage to the one the bucket lies in.";
    match (status, code) {
        (404, "NoSuchBucket") => (Class::Permanent, Some("Create the bucket, or mend its name in archiver.storage.")),
        (404, "" | "NoSuchKey" | "NotFound") => (Class::NotThere, None),
        // Cloudflare's word for a key that a lock rule covers; who put it there is for the duplicate rule to say.
        (412, _) | (403, "ObjectLockedByBucketPolicy") => (Class::AlreadyThere, None),
        (409, "ConditionalRequestConflict" | "OperationAborted") => (Class::Transient, None),
        (301 | 307, _) | (400, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
            (Class::Permanent, Some(REGION))
        }
        (_, "RequestTimeTooSkewed") => {
            (Class::Permanent, Some("Set the clocks of this server and of the store right."))
        }
        (_, "QuotaExceeded") | (507, _) => {
            (Class::Permanent, Some("Free space in the store or raise its quota; the file is tried again by itself."))
        }
        (401 | 403, "InvalidAccessKeyId" | "SignatureDoesNotMatch") => (
            Class::Refused,
            Some(
                "Mend the key where these credentials come from; the file is tried again by itself, or at once after SELECT pg_reload_conf().",
            ),
        ),
        (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" | "ExpiredTokenException") => (
            Class::Refused,
            Some(
                "Renew the token where these credentials come from; the file is tried again by itself, or at once after SELECT pg_reload_conf().",
            ),
        ),
        (401 | 403, _) => (
            Class::Refused,
            Some("Allow these credentials this request: the documentation of the storage lists what is needed."),
        ),
        (429, _) | (503, _) | (400, "RequestRateLimitExceeded") => (Class::Throttled, None),
        (400, "RequestTimeout" | "BadDigest" | "XAmzContentSHA256Mismatch" | "IncompleteBody") => {
            (Class::Transient, None)
        }
        (408 | 425, _) => (Class::Transient, None),
        (501 | 505, _) => (Class::Permanent, None),
        // Also the numbers of their own that networks before a store answer with.
        (500..=599, _) => (Class::Transient, None),
        _ => (Class::Permanent, None),
    }
}

impl From<Box<Trouble>> for Error {
    fn from(trouble: Box<Trouble>) -> Self {
        let trouble = *trouble;
        let retry = trouble.is_passing();
        if let Some(error) = trouble.whole {
            return error;
        }
        let Circumstances { request, credentials, attempts, elapsed } = trouble.circumstances;
        let mut detail = request.clone();
        if let Some(id) = trouble.request_id.filter(|id| !id.is_empty()) {
            detail += &format!(", request id {id}");
        }
        if let Some(source) = credentials {
            detail += &format!(", credentials from {source}");
        }
        if attempts > 1 {
            detail += &format!(", attempt {attempts} in {} s", elapsed.as_secs().max(1));
        }
        detail += ".";
        if let Some(said) = trouble.said {
            detail += &format!(" The store said: {}.", said.trim_end_matches('.'));
        }
        let kind = if trouble.class == Class::Stopped { Kind::Interrupted } else { Kind::Storage };
        let error = Error::new(kind, request, trouble.message).detail(detail).retry_if(retry);
        match trouble.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_under_a_lock_says_nothing_against_the_keys() {
        let refused = |code: &str| {
            let body = format!("<Error><Code>{code}</Code></Error>");
            let trouble = Trouble::of_answer(&Method::PUT, StatusCode::FORBIDDEN, body.as_bytes(), None);
            (trouble.class, trouble.concerns_credentials)
        };
        assert_eq!(refused("ObjectLockedByBucketPolicy"), (Class::AlreadyThere, false));
        assert_eq!(refused("AccessDenied"), (Class::Refused, true));
    }
}
