//! Storage: keys and bytes, created once and never overwritten. Nothing here knows of WAL names or codecs.
//!
//! Every store is held to the same battery of tests (`tests/storage`), which is the contract below in code.

mod local;
pub mod s3;

pub use local::LocalStore;
pub use s3::S3Store;

use crate::error::{Error, Result};
use crate::hash::Noted;
use bytes::Bytes;
use std::io::{self, Read, Write};
use std::time::SystemTime;

/// A place that holds objects under keys such as `main/wals/0000000100000000/000000010000000000000042`.
///
/// A key is made of parts separated by single slashes; no part is empty, `.` or `..`.
/// Every call is bounded in time by the store itself or by the operating system's own limits, and may be made
/// from several threads at once.
pub trait Store: Send + Sync {
    /// Creates the object `key`, unless one stands there.
    ///
    /// [`Put::Created`] and [`Put::AlreadyExists`] both promise that what stands under `key` is durable: it survives
    /// the loss of power right after the return. Of several callers at once exactly one is told `Created`.
    /// No reader ever sees a part of an object. Nothing is ever overwritten.
    fn put_new(&self, key: &str, body: Body<'_>, attributes: &Attributes) -> Result<Put>;

    /// The object's bytes, as stored; nothing where there is none.
    fn get(&self, key: &str) -> Result<Option<Object>>;

    /// What is known of the object without reading it; nothing where there is none.
    fn head(&self, key: &str) -> Result<Option<Meta>>;

    /// Whether there is one; if so it is durable, whoever made it, as [`Store::put_new`] has it.
    fn confirm(&self, key: &str) -> Result<bool> {
        Ok(self.head(key)?.is_some())
    }

    /// One page of the objects whose key starts with `folder` and a slash: the first `most` (at least 1) in order of
    /// their keys' bytes, beginning behind `after`. A page with fewer than `most` is the last one.
    fn list(&self, folder: &str, after: Option<&str>, most: usize) -> Result<Vec<Listed>>;

    /// Removes the object for good; answers whether there was one.
    fn delete(&self, key: &str) -> Result<bool>;

    /// Removes several objects for good; answers for each, in order. One that was not there is removed, too.
    fn delete_all(&self, keys: &[String]) -> Vec<Result<()>> {
        keys.iter().map(|key| self.delete(key).map(drop)).collect()
    }

    /// Where the object lies, for people: a path or a URL.
    fn location(&self, key: &str) -> String;

    /// The same by a name that stays when the way there changes: what a server remembers of its archive.
    fn lasting_location(&self, key: &str) -> String {
        self.location(key)
    }

    /// What is known of the store itself, without asking it anything.
    fn facts(&self) -> Facts {
        Facts { create_only: "conditional", credentials: None, credential_failure: None, retries: 0 }
    }

    /// Fails where it is known beforehand that no call can succeed: where there are no credentials.
    fn confirm_access(&self) -> Result<()> {
        Ok(())
    }
}

/// What is known of a store itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// How objects are kept from being overwritten: `conditional`, or `head`, which is weaker; `not yet shown` before
    /// the first put.
    pub create_only: &'static str,
    /// The credentials in use, where there are any.
    pub credentials: Option<CredentialFacts>,
    /// Why the last try to replace them failed, if it did.
    pub credential_failure: Option<Error>,
    /// How many requests were made anew.
    pub retries: u64,
}

/// Where credentials came from. Never what they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CredentialFacts {
    /// Such as `environment`, or a profile and its file.
    pub source: String,
    /// When they expire, if they do.
    pub expires: Option<SystemTime>,
}

/// What an object is made from.
pub enum Body<'a> {
    /// All of it, in memory.
    Bytes(&'a [u8]),
    /// The same in memory that others wait for: a store lets go of it as soon as it can.
    Lent(Box<dyn AsRef<[u8]> + 'a>),
    /// The same, which a store may keep beyond the caller's own use of it.
    Shared(Bytes),
    /// Written piece by piece; called again from the start where a store has to try again.
    /// An error of the caller's own travels as [`io::Error::other`] around a [`crate::Error`].
    Stream(&'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>),
}

/// What is kept beside an object's bytes.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Modification time of the file it was made from.
    pub modified: SystemTime,
    /// What is noted of the plain content that was encoded into it. Kept only by stores whose [`Meta`] tells it.
    pub content: Option<Noted>,
}

/// What [`Store::put_new`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// The object was created.
    Created {
        /// Its size in bytes.
        stored_size: u64,
    },
    /// One stood there already and still does.
    AlreadyExists,
}

/// What is known of an object without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Bytes stored.
    pub stored_size: u64,
    /// Modification time of the file it was made from.
    pub modified: SystemTime,
    /// What is noted of the plain content that was encoded into it, where the store kept it.
    pub content: Option<Noted>,
    /// Differs between two objects that ever stood under the same key.
    pub version: String,
}

/// An object being read.
pub struct Object {
    /// What is known of it.
    pub meta: Meta,
    /// Its bytes, as stored.
    pub body: Box<dyn Read + Send>,
}

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its whole key.
    pub key: String,
    /// Bytes stored.
    pub stored_size: u64,
    /// When it was put there, by the storage's clock.
    pub stored_at: SystemTime,
}
