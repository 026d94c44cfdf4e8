//! Requests signed as S3 wants them (AWS Signature Version 4), with the pieces of rust-s3.

use super::credentials::Credentials;
use crate::error::{Error, Kind, Result};
use hmac::Mac;
use reqwest::Request;
use reqwest::header::{AUTHORIZATION, HOST, HeaderName, HeaderValue};
use s3::{Region, signing};
use time::OffsetDateTime;
use time::macros::format_description;

const AMZ_DATE: HeaderName = HeaderName::from_static("x-amz-date");
const AMZ_CONTENT_SHA256: HeaderName = HeaderName::from_static("x-amz-content-sha256");
const AMZ_SECURITY_TOKEN: HeaderName = HeaderName::from_static("x-amz-security-token");

/// Signs `request`, all its headers included; they must be final but for Content-Length. `payload_sha256` is the hash
/// of its body in hexadecimal digits, which the store compares with what it gets.
pub fn sign(
    request: &mut Request,
    payload_sha256: &str,
    credentials: &Credentials,
    region: &Region,
    now: OffsetDateTime,
) -> Result<()> {
    let failed = |cause: &dyn std::fmt::Display| {
        Error::new(Kind::Internal, "request", format!("could not sign a request to the store: {cause}"))
    };
    let value = |text: &str| HeaderValue::from_str(text).map_err(|error| failed(&error));

    let date = now
        .format(format_description!("[year][month][day]T[hour][minute][second]Z"))
        .map_err(|error| failed(&error))?;
    let host = match (request.url().host_str().unwrap_or_default(), request.url().port()) {
        (host, Some(port)) => format!("{host}:{port}"),
        (host, None) => host.to_string(),
    };
    let headers = request.headers_mut();
    headers.insert(HOST, value(&host)?);
    headers.insert(AMZ_DATE, value(&date)?);
    headers.insert(AMZ_CONTENT_SHA256, value(payload_sha256)?);
    if let Some(token) = &credentials.session_token {
        let mut token = value(token)?;
        token.set_sensitive(true);
        headers.insert(AMZ_SECURITY_TOKEN, token);
    }

    let (canonical, signed) = canonical_request(request, payload_sha256).map_err(|error| failed(&error))?;
    let to_sign = signing::string_to_sign(&now, region, &canonical).map_err(|error| failed(&error))?;
    let key = signing::signing_key(&now, &credentials.secret_key, region, "s3").map_err(|error| failed(&error))?;
    let mut mac = signing::HmacSha256::new_from_slice(&key).map_err(|error| failed(&error))?;
    mac.update(to_sign.as_bytes());
    let signature = hex::encode(mac.finalize().into_bytes());
    let authorization = signing::authorization_header(&credentials.access_key, &now, region, &signed, &signature);
    let mut authorization = value(&authorization.map_err(|error| failed(&error))?)?;
    authorization.set_sensitive(true);
    request.headers_mut().insert(AUTHORIZATION, authorization);
    Ok(())
}

/// The canonical request, and the names of the headers in it.
///
/// rust-s3's own puts `x-amz-server-side-encryption-aws-kms-key-id:` before `x-amz-server-side-encryption:`, since it
/// sorts names with their colons (0.38); stores refuse that.
fn canonical_request(
    request: &Request,
    payload_sha256: &str,
) -> std::result::Result<(String, String), reqwest::header::ToStrError> {
    let mut headers = Vec::new();
    for (name, value) in request.headers() {
        headers.push((name.as_str(), value.to_str()?.trim()));
    }
    headers.sort_unstable();
    let names = headers.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(";");
    let lines: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
    let (method, url) = (request.method(), request.url());
    let (path, query) = (signing::canonical_uri_string(url), signing::canonical_query_string(url));
    Ok((format!("{method}\n{path}\n{query}\n{lines}\n{names}\n{payload_sha256}"), names))
}

#[cfg(test)]
mod tests {
    use super::super::credentials::Source;
    use super::*;
    use reqwest::{Method, Url};
    use time::macros::datetime;

    /// The published example of a signed PUT ("Signature Calculations for the Authorization Header", Amazon S3 API
    /// reference), which has all but a query.
    #[test]
    fn the_published_example_is_signed_alike() {
        let url = Url::parse("https://examplebucket.s3.amazonaws.com/test%24file.text").unwrap();
        let mut request = Request::new(Method::PUT, url);
        let headers = request.headers_mut();
        headers.insert("date", HeaderValue::from_static("Fri, 24 May 2013 00:00:00 GMT"));
        headers.insert("x-amz-storage-class", HeaderValue::from_static("REDUCED_REDUNDANCY"));
        let credentials = Credentials {
            access_key: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            session_token: None,
            expires: None,
            source: Source::Environment,
        };
        let payload = "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072";
        sign(&mut request, payload, &credentials, &Region::UsEast1, datetime!(2013-05-24 0:00 UTC)).unwrap();
        let authorization = request.headers()[AUTHORIZATION].to_str().unwrap();
        let expected = "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd";
        assert!(authorization.ends_with(expected), "{authorization}");
        assert!(!format!("{request:?}").contains(expected));
    }

    #[test]
    fn headers_are_signed_in_the_order_of_their_names() {
        let url = Url::parse("https://host/bucket/key").unwrap();
        let mut request = Request::new(Method::PUT, url);
        for name in ["x-amz-server-side-encryption-aws-kms-key-id", "x-amz-server-side-encryption", "x-amz-meta-a-b"] {
            request.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static("v"));
        }
        let (canonical, names) = canonical_request(&request, "hash").unwrap();
        let expected = "x-amz-meta-a-b;x-amz-server-side-encryption;x-amz-server-side-encryption-aws-kms-key-id";
        assert_eq!(names, expected);
        assert!(
            canonical.contains("\nx-amz-server-side-encryption:v\nx-amz-server-side-encryption-aws-kms-key-id:v\n")
        );
    }
}
