//! The one error type: what kind of trouble, whether another try is worth it, what it is about, and what to do.
//!
//! Texts follow PostgreSQL's message style guide: the primary line starts in lower case and has no full stop;
//! detail and hint are whole sentences. No text ever carries a secret.

use std::fmt;
use std::io;
use std::path::Path;

/// A result whose error is [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, by who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A setting is missing or wrong: mend the configuration.
    Configuration,
    /// The storage refuses or does not answer.
    Storage,
    /// The archive is another cluster's, or the one that was there has vanished.
    Identity,
    /// The archive holds another file under the same name.
    Conflict,
    /// The file offered for archiving is not what its name says.
    Source,
    /// A hook script refuses it, or does not succeed.
    Hook,
    /// A stored file cannot be read back as what it was.
    Damaged,
    /// The archive was seen, and holds no such file.
    NotFound,
    /// Told to stop before it was done.
    Interrupted,
    /// A fault of this program.
    Internal,
}

/// One failure, complete enough to act on at night.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: Kind,
    retry_is_worthwhile: bool,
    is_missing_file: bool,
    subject: String,
    message: String,
    detail: Option<String>,
    hint: Option<String>,
}

impl Error {
    /// A permanent failure about `subject` (a file, an object, a setting); `message` is the primary line.
    pub fn new(kind: Kind, subject: impl Into<String>, message: impl Into<String>) -> Self {
        Error {
            kind,
            retry_is_worthwhile: false,
            is_missing_file: false,
            subject: subject.into(),
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    /// A failed system call on a file: `action` as in `could not {action} "{path}": {cause}`.
    pub fn io(action: &str, path: &Path, cause: &io::Error) -> Self {
        let subject = path.display().to_string();
        let message = format!("could not {action} \"{subject}\": {}", plain_cause(cause));
        let mut error = Error::new(Kind::Storage, subject, message).retry_if(is_passing(cause));
        error.is_missing_file = cause.kind() == io::ErrorKind::NotFound;
        match hint_for(cause) {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    /// A stored copy that could not be read back: the storage's trouble, or damage, for which
    /// `hint` says what to do.
    pub fn of_stored_copy(location: &str, cause: &io::Error, hint: &str) -> Self {
        if let Some(own) = cause.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            return own.clone();
        }
        if cause.raw_os_error().is_some() {
            return Error::io("read file", Path::new(location), cause);
        }
        Error::new(Kind::Damaged, location, format!("the archived copy \"{location}\" is damaged: {cause}")).hint(hint)
    }

    /// A wrong value of the setting `name`, without its `archiver.` prefix.
    pub fn setting(name: &str, value: &str, cause: impl fmt::Display) -> Self {
        Error::new(
            Kind::Configuration,
            format!("archiver.{name}"),
            format!("invalid value for parameter \"archiver.{name}\": \"{value}\""),
        )
        .detail(format!("{cause}."))
    }

    /// The same failure, of another kind.
    pub fn of_kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// The same failure, with a sentence on the circumstances.
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// The same failure, with a sentence on what to do.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same failure, marked as one that may pass by itself within seconds.
    pub fn retry_if(mut self, worthwhile: bool) -> Self {
        self.retry_is_worthwhile = worthwhile;
        self
    }

    /// What went wrong, by who has to act.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether trying again within seconds may help. PostgreSQL tries again for ever either way.
    pub fn is_worth_retrying(&self) -> bool {
        self.retry_is_worthwhile
    }

    /// Whether a file or directory that was to be there was not.
    pub fn is_missing_file(&self) -> bool {
        self.is_missing_file
    }

    /// The file, object or setting it is about.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// The primary line.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// A sentence on the circumstances.
    pub fn detail_text(&self) -> Option<&str> {
        self.detail.as_deref()
    }

    /// A sentence on what to do.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

/// The primary line alone.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// The text of an I/O error as PostgreSQL would print it: without Rust's "(os error 28)".
pub fn plain_cause(cause: &io::Error) -> String {
    match cause.raw_os_error() {
        Some(code) => nix::errno::Errno::from_raw(code).desc().to_string(),
        None => cause.to_string(),
    }
}

fn is_passing(cause: &io::Error) -> bool {
    use nix::errno::Errno::*;
    let passing = [EAGAIN, EINTR, ETIMEDOUT, ESTALE, ENOMEM, EMFILE, ENFILE, EBUSY];
    cause.raw_os_error().is_some_and(|code| passing.contains(&nix::errno::Errno::from_raw(code)))
}

fn hint_for(cause: &io::Error) -> Option<&'static str> {
    use nix::errno::Errno::*;
    Some(match nix::errno::Errno::from_raw(cause.raw_os_error()?) {
        ENOSPC => "Free space on that file system; the file is tried again by itself.",
        EDQUOT => "Raise the disk quota or free space; the file is tried again by itself.",
        EACCES | EPERM => "The operating system user that runs PostgreSQL needs permission there.",
        EROFS => "The file system is mounted read-only: mount it for writing.",
        ESTALE => "The network file system lost this file: mount it again if it does not recover.",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_io_error_reads_like_postgresql() {
        let full = Error::io("write file", Path::new("/srv/wal/x"), &io::Error::from_raw_os_error(libc::ENOSPC));
        assert_eq!(full.to_string(), "could not write file \"/srv/wal/x\": No space left on device");
        assert_eq!(full.hint_text(), Some("Free space on that file system; the file is tried again by itself."));
        assert!(!full.is_worth_retrying());
        let stale = Error::io("open file", Path::new("/n"), &io::Error::from_raw_os_error(libc::ESTALE));
        assert!(stale.is_worth_retrying());
    }

    #[test]
    fn a_wrong_setting_names_itself_its_value_and_the_cause() {
        let error = Error::setting("compression", "zst", "Known are none, zstd");
        assert_eq!(error.to_string(), "invalid value for parameter \"archiver.compression\": \"zst\"");
        assert_eq!(error.detail_text(), Some("Known are none, zstd."));
        assert_eq!(error.subject(), "archiver.compression");
        assert_eq!(error.kind(), Kind::Configuration);
    }
}
