//! The public keys of those who may read what is archived.

use crate::error::{Error, Kind, Result};
use crate::regular_file::{self, Links};
use crate::stamp::Stamp;
use pgp::composed::{MessageBuilder, PublicOrSecret, RawSessionKey, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::sym::SymmetricKeyAlgorithm;
use pgp::packet::{PublicKeyEncryptedSessionKey, Signature, SignatureType};
use pgp::ser::Serialize;
use pgp::types::{EncryptionKey, KeyDetails, KeyVersion, PkeskBytes, Tag};
use rand::rngs::{OsRng, StdRng};
use rand::{RngCore, SeedableRng};
use std::fmt::{self, Debug, Formatter};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Far beyond a file of keys with all that others have signed.
const MAX_FILE_BYTES: u64 = 16 << 20;
/// More readers than anybody wants to write a session key for with each file.
const MOST_KEYS: usize = 100;
const SYMMETRIC: SymmetricKeyAlgorithm = SymmetricKeyAlgorithm::AES256;

/// A file of public keys, which is read again when it changes. Everything is encrypted to all of them.
pub struct Recipients {
    path: PathBuf,
    read: Mutex<Option<(Stamp, Arc<Vec<SignedPublicKey>>)>>,
}

impl Debug for Recipients {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recipients").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A key that something can be encrypted to: the newest of a recipient's that is meant for that.
pub struct Reader {
    key: Usable,
    /// Whether the real Barman recognises what begins with a session key for it: it asks file(1), which knows RSA keys of the
    /// usual sizes only.
    pub is_seen_by_barman: bool,
    /// When it expires, if it does.
    pub expires: Option<SystemTime>,
    /// Its identifier, as gpg shows it.
    pub id: String,
}

enum Usable {
    Primary(Box<SignedPublicKey>),
    Subkey(Box<SignedPublicSubKey>),
}

impl Recipients {
    /// The keys in that file; nothing is read yet.
    pub fn new(path: &Path) -> Self {
        Recipients { path: path.to_path_buf(), read: Mutex::default() }
    }

    /// What to encrypt to now, one key of each recipient; those that Barman sees come first, since file(1) looks at the first
    /// session key alone. Fails where there is none, where one is expired, revoked, no key for encryption, or a secret one.
    pub fn readers(&self, now: SystemTime) -> Result<Vec<Reader>> {
        let keys = self.keys()?;
        let readers = keys.iter().map(|key| reader(key, now).map_err(|cause| self.unusable(&cause)));
        let mut readers = readers.collect::<Result<Vec<_>>>()?;
        readers.sort_by_key(|reader| !reader.is_seen_by_barman);
        Ok(readers)
    }

    fn unusable(&self, cause: &str) -> Error {
        let path = self.path.display().to_string();
        let message = format!("could not encrypt to the keys in \"{path}\": {cause}");
        Error::new(Kind::Configuration, path, message)
            .detail("The parameter archiver.encryption_recipients names this file. Nothing is stored unencrypted instead.")
            .hint("Put valid OpenPGP public keys there, as \"gpg --export\" writes them; the file is read again by itself.")
    }

    fn keys(&self) -> Result<Arc<Vec<SignedPublicKey>>> {
        let failed = |error: &io::Error| self.unusable(&crate::error::plain_cause(error));
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        let (file, meta) = regular_file::open(&self.path, Links::Followed).map_err(|error| failed(&error))?;
        let stamp = Stamp::of(&meta);
        if let Some((known, keys)) = &*read
            && *known == stamp
        {
            return Ok(Arc::clone(keys));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(|error| failed(&error))?;
        let keys = Arc::new(parse(&bytes).map_err(|cause| self.unusable(&cause))?);
        *read = Some((stamp, Arc::clone(&keys)));
        Ok(keys)
    }
}

/// All keys of a file, binary or armored, one armored block behind another, too.
fn parse(bytes: &[u8]) -> std::result::Result<Vec<SignedPublicKey>, String> {
    let mut keys = Vec::new();
    for block in super::armored_blocks(bytes) {
        let (found, _) = PublicOrSecret::from_reader_many(block).map_err(|error| error.to_string())?;
        for key in found.take(MOST_KEYS + 1) {
            match key.map_err(|error| error.to_string())? {
                PublicOrSecret::Public(key) => keys.push(key),
                PublicOrSecret::Secret(key) => {
                    return Err(format!("key {} is a secret one, which does not belong here", id_of(&key.primary_key)));
                }
            }
        }
    }
    match keys.len() {
        0 => Err("there is no public key in it".to_string()),
        1..=MOST_KEYS => Ok(keys),
        _ => Err(format!("there are more than {MOST_KEYS} keys in it")),
    }
}

fn id_of(key: &impl KeyDetails) -> String {
    format!("{:X}", key.fingerprint())
}

/// The key of that recipient to encrypt to; or why there is none.
fn reader(recipient: &SignedPublicKey, now: SystemTime) -> std::result::Result<Reader, String> {
    let id = id_of(&recipient.primary_key);
    if recipient.primary_key.version() != KeyVersion::V4 {
        return Err(format!("key {id} is not of version 4"));
    }
    let revocations = &recipient.details.revocation_signatures;
    if revocations.iter().any(|signature| signature.verify_key(&recipient.primary_key).is_ok()) {
        return Err(format!("key {id} is revoked"));
    }
    let own = own_signatures(recipient);
    let newest =
        own.iter().max_by_key(|signature| created(signature)).ok_or(format!("key {id} is not signed by itself"))?;
    let primary_expires = expires(&recipient.primary_key, newest);
    if primary_expires.is_some_and(|at| at <= now) {
        return Err(format!("key {id} has expired"));
    }
    let subkeys = recipient.public_subkeys.iter();
    let mut subkeys: Vec<_> =
        subkeys.filter_map(|subkey| subkey_reader(recipient, subkey, primary_expires, now)).collect();
    subkeys.sort_by_key(|subkey| subkey.as_ref().ok().map(Reader::created));
    match subkeys.pop() {
        Some(Ok(reader)) => Ok(reader),
        // What is wrong with the only one.
        Some(Err(cause)) => Err(cause),
        None if newest.key_flags().encrypt_storage() || newest.key_flags().encrypt_comms() => Ok(Reader {
            is_seen_by_barman: is_known_to_file(&recipient.primary_key),
            key: Usable::Primary(Box::new(recipient.clone())),
            expires: primary_expires,
            id,
        }),
        None => Err(format!("key {id} is not meant for encryption, and has no subkey that is")),
    }
}

/// That subkey, if it is meant for encryption; or why it cannot be used.
fn subkey_reader(
    recipient: &SignedPublicKey,
    subkey: &SignedPublicSubKey,
    primary_expires: Option<SystemTime>,
    now: SystemTime,
) -> Option<std::result::Result<Reader, String>> {
    let is_valid =
        |signature: &&Signature| signature.verify_subkey_binding(&recipient.primary_key, &subkey.key).is_ok();
    let valid: Vec<&Signature> = subkey.signatures.iter().filter(is_valid).collect();
    let of_type = |typ| valid.iter().filter(move |signature| signature.typ() == Some(typ));
    let binding = of_type(SignatureType::SubkeyBinding).max_by_key(|signature| created(signature))?;
    let flags = binding.key_flags();
    if !flags.encrypt_storage() && !flags.encrypt_comms() {
        return None;
    }
    let id = id_of(&subkey.key);
    if of_type(SignatureType::SubkeyRevocation).next().is_some() {
        return Some(Err(format!("subkey {id} is revoked")));
    }
    let expires = [expires(&subkey.key, binding), primary_expires].into_iter().flatten().min();
    if expires.is_some_and(|at| at <= now) {
        return Some(Err(format!("subkey {id} has expired")));
    }
    let is_seen_by_barman = is_known_to_file(&subkey.key);
    Some(Ok(Reader { key: Usable::Subkey(Box::new(subkey.clone())), is_seen_by_barman, expires, id }))
}

/// What the key says of itself: its own signatures over it and over its names.
fn own_signatures(key: &SignedPublicKey) -> Vec<&Signature> {
    let primary = &key.primary_key;
    let direct = key.details.direct_signatures.iter().filter(|signature| signature.verify_key(primary).is_ok());
    let of_names = key.details.users.iter().flat_map(|user| {
        let is_own = |signature: &&Signature| {
            signature.is_certification() && signature.verify_certification(primary, Tag::UserId, &user.id).is_ok()
        };
        user.signatures.iter().filter(is_own)
    });
    direct.chain(of_names).collect()
}

fn created(signature: &Signature) -> u32 {
    signature.created().map_or(0, |at| at.as_secs())
}

fn expires(key: &impl KeyDetails, signature: &Signature) -> Option<SystemTime> {
    // Zero means never (RFC 4880, 5.2.3.6).
    let after = signature.key_expiration_time().map(|after| after.as_secs()).filter(|&seconds| seconds > 0)?;
    Some(UNIX_EPOCH + Duration::from_secs(u64::from(key.created_at().as_secs()) + u64::from(after)))
}

/// The bits of the modulus of an RSA key.
fn rsa_bits(key: &impl KeyDetails) -> Option<u16> {
    use pgp::crypto::public_key::PublicKeyAlgorithm::{RSA, RSAEncrypt};
    let is_rsa = matches!(key.algorithm(), RSA | RSAEncrypt);
    // The modulus is the first of its numbers, and begins with its length (RFC 4880, 3.2 and 5.5.2).
    let numbers = is_rsa.then(|| key.public_params().to_bytes().ok()).flatten()?;
    numbers.first_chunk().map(|&bits| u16::from_be_bytes(bits))
}

/// Whether file(1) recognises a session key for that key. (It knows 1,024 bits, too, but only with one byte of length.)
fn is_known_to_file(key: &impl KeyDetails) -> bool {
    matches!(rsa_bits(key), Some(2048 | 3072 | 4096 | 8192))
}

impl Reader {
    fn created(&self) -> u32 {
        match &self.key {
            Usable::Primary(key) => key.created_at().as_secs(),
            Usable::Subkey(key) => key.key.created_at().as_secs(),
        }
    }
}

/// What all that is random in one encrypted file comes from: whoever has to write the file twice writes the same bytes.
#[derive(Clone)]
pub struct Seed([u8; 32]);

impl Seed {
    /// Another one each time, from the kernel.
    pub fn random() -> Self {
        let mut seed = [0; 32];
        OsRng.fill_bytes(&mut seed);
        Seed(seed)
    }
}

/// Encrypts all of `plain` to each of `readers`. A seed serves one file.
pub fn encrypt(readers: &[Reader], seed: &Seed, plain: impl Read, mut encrypted: impl Write) -> io::Result<()> {
    let mut rng = StdRng::from_seed(seed.0);
    let message = MessageBuilder::from_reader("", plain).seipd_v1(&mut rng, SYMMETRIC);
    for reader in readers {
        let session_key = message.session_key();
        let packet = match &reader.key {
            Usable::Primary(key) => session_key_for(&**key, session_key, &mut rng),
            Usable::Subkey(key) => session_key_for(&**key, session_key, &mut rng),
        };
        let mut body = Vec::new();
        packet.and_then(|packet| packet.to_writer(&mut body)).map_err(io::Error::other)?;
        // In the old format, with two bytes of length, as gpg writes it: file(1) knows no other.
        const OLD_FORMAT_SESSION_KEY: u8 = 0x85;
        let length = u16::try_from(body.len()).map_err(io::Error::other)?.to_be_bytes();
        encrypted.write_all(&[OLD_FORMAT_SESSION_KEY, length[0], length[1]])?;
        encrypted.write_all(&body)?;
    }
    message.to_writer(&mut rng, &mut encrypted).map_err(plain_error)?;
    encrypted.flush()
}

/// The session key, encrypted. For an RSA key the number that comes out is as long as the modulus: one of 256 begins with a zero
/// byte, which is not written (RFC 4880, 3.2), and then file(1) does not recognise the packet by its length, and Barman takes
/// the encrypted file for the plain one. Such a number is not taken, another is made.
fn session_key_for(
    key: &impl EncryptionKey,
    session_key: &RawSessionKey,
    rng: &mut StdRng,
) -> pgp::errors::Result<PublicKeyEncryptedSessionKey> {
    /// More are short in a row in one of 2^128 files.
    const MOST_TRIES: usize = 16;
    let modulus_size = rsa_bits(key).map(|bits| usize::from(bits).div_ceil(8));
    let mut made = 0;
    loop {
        let packet = PublicKeyEncryptedSessionKey::from_session_key_v3(&mut *rng, session_key, SYMMETRIC, key)?;
        made += 1;
        let is_short = matches!(packet.values()?, PkeskBytes::Rsa { mpi } if Some(mpi.len()) < modulus_size);
        if !is_short || made == MOST_TRIES {
            return Ok(packet);
        }
    }
}

/// At most so many bytes are added to what is encrypted to so many readers: a session key for each, and headers.
pub fn most_added_bytes(readers: usize, plain_size: u64) -> u64 {
    const LARGEST_SESSION_KEY: u64 = 4 << 10;
    readers as u64 * LARGEST_SESSION_KEY + plain_size / 1024 + (4 << 10)
}

/// A failure of reading or writing comes back as it was.
fn plain_error(error: pgp::errors::Error) -> io::Error {
    match error {
        pgp::errors::Error::IO { source, .. } => source,
        other => io::Error::other(other),
    }
}
