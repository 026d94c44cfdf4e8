//! Any store that speaks S3.

pub mod credentials;
