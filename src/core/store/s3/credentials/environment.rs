//! The variables of the environment that tell of credentials, and the keys that stand there.

use super::{Credentials, Source};
use crate::error::{Error, Kind, Result};
use std::collections::HashMap;

const VARIABLES: [&str; 22] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_DEFAULT_PROFILE",
    "AWS_DEFAULT_REGION",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE",
    "AWS_ENDPOINT_URL_STS",
    "AWS_PROFILE",
    "AWS_REGION",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "HOME",
];

/// The variables as they were at the start: reading them later would race with a thread that sets one.
pub(super) struct Environment(HashMap<&'static str, String>);

impl Environment {
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let found = VARIABLES.into_iter().filter_map(|name| Some((name, lookup(name)?)));
        // As for botocore, an empty variable is none.
        Environment(found.filter(|(_, value)| !value.is_empty()).collect())
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        debug_assert!(VARIABLES.contains(&name), "{name} is not among those that are kept");
        self.0.get(name).map(String::as_str)
    }

    /// The first of `names` that is set.
    pub fn first(&self, names: &[&str]) -> Option<&str> {
        names.iter().find_map(|name| self.get(name))
    }

    /// The keys themselves. One without the other is an error, never a reason to look elsewhere.
    pub fn keys(&self) -> Result<Option<Credentials>> {
        const NAMES: [&str; 2] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
        let missing = match NAMES.map(|name| self.get(name)) {
            [None, None] => return Ok(None),
            [Some(access_key), Some(secret_key)] => {
                let token = self.first(&["AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"]);
                return Credentials::new(Source::Environment, access_key, secret_key, token, None).map(Some);
            }
            [None, _] => NAMES[0],
            [_, None] => NAMES[1],
        };
        let message = format!("could not get credentials from the environment: {missing} is not set");
        let hint = "Set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for the server, or neither.";
        Err(Error::new(Kind::Configuration, missing, message).hint(hint))
    }
}

#[cfg(test)]
impl Environment {
    pub fn of(variables: &[(&str, &str)]) -> Self {
        Environment::read(|name| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_keys_make_credentials_and_neither_makes_none() {
        let both = [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_SESSION_TOKEN", "t")];
        let found = Environment::of(&both).keys().unwrap().unwrap();
        assert_eq!((found.access_key.as_str(), found.secret_key.as_str()), ("AKIA", "s"));
        assert_eq!(
            (found.session_token.as_deref(), found.expires, found.source),
            (Some("t"), None, Source::Environment)
        );
        assert!(Environment::of(&[]).keys().unwrap().is_none());
        let empty = [("AWS_ACCESS_KEY_ID", ""), ("AWS_SECRET_ACCESS_KEY", "")];
        assert!(Environment::of(&empty).keys().unwrap().is_none());
    }

    #[test]
    fn one_key_alone_is_an_error_that_names_the_other() {
        for (set, missing) in
            [("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")]
        {
            let error = Environment::of(&[(set, "s3kr1t")]).keys().unwrap_err();
            let message = format!("could not get credentials from the environment: {missing} is not set");
            assert_eq!(error.to_string(), message);
            assert_eq!(error.kind(), Kind::Configuration);
            assert!(!error.is_worth_retrying() && !format!("{error:?}").contains("s3kr1t"));
        }
    }
}
