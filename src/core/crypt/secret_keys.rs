//! The secret keys by which what was archived is read again. Whoever archives has no use for them.

use super::Encryption;
use crate::error::{Error, Kind, Result};
use crate::regular_file::{self, Links};
use once_cell::sync::OnceCell;
use pgp::composed::{DecryptionOptions, Message, PublicOrSecret, SignedSecretKey, TheRing};
use pgp::types::{Password, Seipdv1ReadMode};
use std::fmt::{self, Debug, Formatter};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Far beyond a file of keys with all that others have signed.
const MAX_FILE_BYTES: u64 = 16 << 20;
const MOST_KEYS: usize = 1000;

/// Answers the passphrase of locked keys, once asked.
pub type Passphrase = Box<dyn Fn() -> Result<Vec<u8>> + Send + Sync>;

/// A file of secret keys, old ones among them: each file is read by whichever fits. Nothing is read before the first
/// encrypted file.
pub struct SecretKeys {
    path: Option<PathBuf>,
    passphrase: Option<Passphrase>,
    unlocked: OnceCell<Vec<SignedSecretKey>>,
}

impl Debug for SecretKeys {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKeys").field("path", &self.path).finish_non_exhaustive()
    }
}

impl SecretKeys {
    /// The keys in the file at `path`, if there is one, unlocked by `passphrase`, if they are locked.
    pub fn new(path: Option<&Path>, passphrase: Option<Passphrase>) -> Self {
        SecretKeys { path: path.map(Path::to_path_buf), passphrase, unlocked: OnceCell::new() }
    }

    /// None at all: what is encrypted cannot be read.
    pub fn none() -> Self {
        SecretKeys::new(None, None)
    }

    /// Whether there are any to be had.
    pub fn are_named(&self) -> bool {
        self.path.is_some()
    }

    fn unusable(&self, cause: &str) -> Error {
        let path = self.path.as_deref().unwrap_or(Path::new("")).display().to_string();
        let message = format!("could not use the keys in \"{path}\": {cause}");
        Error::new(Kind::Configuration, path, message)
            .detail("The parameter archiver.decryption_keys names this file.")
            .hint("It takes OpenPGP secret keys, as \"gpg --export-secret-keys\" writes them.")
    }

    fn unlocked(&self) -> Result<&[SignedSecretKey]> {
        self.unlocked.get_or_try_init(|| self.read()).map(Vec::as_slice)
    }

    fn read(&self) -> Result<Vec<SignedSecretKey>> {
        let Some(path) = &self.path else {
            return Err(Error::new(
                Kind::Configuration,
                "archiver.decryption_keys",
                "the file is encrypted, and there are no keys to read it with",
            )
            .hint("Set archiver.decryption_keys to a file of OpenPGP secret keys."));
        };
        if path.is_relative() {
            return Err(self.unusable("the path is not absolute"));
        }
        let mut bytes = Vec::new();
        regular_file::open(path, Links::Followed)
            .and_then(|(file, _)| file.take(MAX_FILE_BYTES).read_to_end(&mut bytes))
            .map_err(|error| self.unusable(&crate::error::plain_cause(&error)))?;
        let mut keys = parse(&bytes).map_err(|cause| self.unusable(&cause))?;
        if keys.iter().any(is_locked) {
            let passphrase = self.passphrase.as_ref().ok_or_else(|| {
                self.unusable("they are protected by a passphrase")
                    .hint("Set archiver.decryption_passphrase_command to a command that prints it.")
            })?;
            let password = Password::from(passphrase()?.as_slice());
            keys.iter_mut().for_each(|key| unlock(key, &password));
            if keys.iter().all(is_locked) {
                return Err(self
                    .unusable("the passphrase does not fit")
                    .hint("Does archiver.decryption_passphrase_command print the passphrase of these keys?"));
            }
        }
        Ok(keys)
    }

    /// Reads a file that may be encrypted: its content, once decrypted, and whether it was.
    pub fn open<'a>(&self, stored: impl Read + Send + 'a) -> io::Result<(Encryption, Box<dyn Read + 'a>)> {
        let (first, whole) = peeked(stored)?;
        match Encryption::detect(&first) {
            Encryption::None => Ok((Encryption::None, Box::new(whole))),
            Encryption::OpenPgp => Ok((Encryption::OpenPgp, self.decrypt(whole)?)),
        }
    }

    /// The content of an encrypted file. Reading it to its end fails where it was modified; what was read before that end
    /// must not be relied on.
    fn decrypt<'a>(&self, encrypted: impl Read + Send + 'a) -> io::Result<Box<dyn Read + 'a>> {
        let keys = self.unlocked().map_err(io::Error::other)?;
        let unfit = |error: pgp::errors::Error| match error {
            pgp::errors::Error::MissingKey => io::Error::other(
                self.unusable("none of them fits the file")
                    .hint("Add the secret key that belongs to the public one it was encrypted to."),
            ),
            pgp::errors::Error::IO { source, .. } => source,
            other => io::Error::new(io::ErrorKind::InvalidData, other),
        };
        let message = Message::from_bytes(Opaque(BufReader::with_capacity(128 << 10, encrypted))).map_err(unfit)?;
        let ring = TheRing {
            secret_keys: keys.iter().collect(),
            // Whoever reads waits for the end before anything is put in place.
            decrypt_options: DecryptionOptions::new().set_seipdv1_read_mode(Seipdv1ReadMode::Streaming),
            ..TheRing::default()
        };
        let (mut message, _) = message.decrypt_the_ring(ring, true).map_err(unfit)?;
        // Others than we may compress here, too. Once: a file folded up in itself many times is a bomb.
        if message.is_compressed() {
            message = message.decompress().map_err(unfit)?;
        }
        if !message.is_literal() {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is an OpenPGP message of another kind"));
        }
        Ok(Box::new(message))
    }
}

/// The first byte, and all of it.
pub(super) fn peeked<'a>(mut stored: impl Read + Send + 'a) -> io::Result<(Vec<u8>, impl Read + Send + 'a)> {
    let mut first = Vec::with_capacity(1);
    (&mut stored).take(1).read_to_end(&mut first)?;
    let whole = io::Cursor::new(first.clone()).chain(stored);
    Ok((first, whole))
}

/// All secret keys of a file, binary or armored, one armored block behind another, too.
fn parse(bytes: &[u8]) -> std::result::Result<Vec<SignedSecretKey>, String> {
    let mut keys = Vec::new();
    for block in super::armored_blocks(bytes) {
        let (found, _) = PublicOrSecret::from_reader_many(block).map_err(|error| error.to_string())?;
        for key in found.take(MOST_KEYS) {
            // Public ones among them do no harm.
            if let PublicOrSecret::Secret(key) = key.map_err(|error| error.to_string())? {
                keys.push(key);
            }
        }
    }
    if keys.is_empty() { Err("there is no secret key in it".to_string()) } else { Ok(keys) }
}

fn is_locked(key: &SignedSecretKey) -> bool {
    let subkeys = key.secret_subkeys.iter().map(|subkey| subkey.key.secret_params());
    std::iter::once(key.primary_key.secret_params()).chain(subkeys).any(|params| params.is_encrypted())
}

/// Unlocks what the passphrase fits.
fn unlock(key: &mut SignedSecretKey, password: &Password) {
    if key.primary_key.secret_params().is_encrypted() {
        let _ = key.primary_key.remove_password(password);
    }
    for subkey in &mut key.secret_subkeys {
        if subkey.key.secret_params().is_encrypted() {
            let _ = subkey.key.remove_password(password);
        }
    }
}

/// What says nothing of itself: nothing of a file belongs into a message.
struct Opaque<R>(R);

impl<R> Debug for Opaque<R> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("an encrypted file")
    }
}

impl<R: Read> Read for Opaque<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: BufRead> BufRead for Opaque<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.0.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.0.consume(amount);
    }
}
