//! The one duplicate rule: the same plain content is success, any other is refused.

use crate::crypt::Encryption;
use crate::error::{Error, Kind, Result};
use crate::hash::{Content, Hash, Noted, NotedHash};
use crate::layout::Format;
use crate::place::Place;
use crate::pulse::{Beating, Pulse};
use crate::store::Meta;
use crate::wal::{LongPageHeader, WalName};
use std::io::{self, Read};

/// A stored file that holds what was offered.
pub struct Same {
    /// What the store knows of it.
    pub meta: Meta,
    /// The format it is stored in, which an earlier setting may have chosen.
    pub format: Format,
}

const DAMAGE_HINT: &str = "It is left as it is. Move it out of the archive, so that the file can be stored again.";

/// Compares the stored file of that name with the offered one, by plain content: sizes and times prove nothing,
/// and noted sums say nothing about a copy that was damaged since.
///
/// A copy that was once noted as just what is offered now, or that is no segment at all, is damaged rather than another.
///
/// A store that keeps what it was told of the content is believed: it checks what it keeps. An encrypted file is compared
/// by what was noted of it, by the cluster's key; where nothing was, by what the keys for reading tell, if there are any.
pub fn compare(place: &Place, name: &WalName, key: &str, offered: &Content, pulse: &Pulse) -> Result<Same> {
    let Content { size, hash } = *offered;
    let location = place.store.location(key);
    let gone =
        || Error::new(Kind::Storage, location.clone(), format!("\"{location}\" was there and is gone")).retry_if(true);
    let format = place.layout.wal_name(key).and_then(|(_, format)| format);
    if let Some(format) = format {
        let meta = place.store.head(key)?.ok_or_else(gone)?;
        match meta.content.map(|noted| (noted, noted.is_of(offered, place.hash_key.as_ref()))) {
            Some((_, Some(true))) => return Ok(Same { meta, format }),
            Some((other, Some(false))) => return Err(conflict(name, &location, &Other::noted(&other), offered)),
            // Barman's, which tells nothing; or another cluster's secret.
            Some((_, None)) | None => {}
        }
    }
    if let Some(same) = compare_announced(place, name, key, offered, pulse)? {
        return Ok(same);
    }
    let object = place.store.get(key)?.ok_or_else(gone)?;
    let unfit = |cause: &io::Error| Error::of_stored_copy(&location, cause, DAMAGE_HINT);
    let damaged = |cause: String| unfit(&io::Error::other(cause));
    let meta = object.meta;
    // One byte more than offered is enough to know that it is another file.
    let stored = read_plain(place, object.body, size + 1, pulse).map_err(|error| unfit(&error))?;
    if (stored.size, stored.hash) == (size, hash) {
        return Ok(Same { meta, format: stored.format });
    }
    if was_noted(place, name, offered)? {
        return Err(damaged(match stored.format.encryption {
            Encryption::None => format!("it was stored as {hash}, and reads as {}", stored.hash),
            // The hash of what is encrypted belongs into no log.
            Encryption::OpenPgp => "it reads as another content than was stored".to_string(),
        }));
    }
    if name.is_wal()
        && let Err(cause) = LongPageHeader::parse(&stored.head)
    {
        return Err(damaged(cause.to_string()));
    }
    let stored_size = if stored.size > size { format!("more than {size}") } else { stored.size.to_string() };
    let is_encrypted = stored.format.encryption != Encryption::None;
    let other = Other { size: stored_size, hash: (!is_encrypted).then_some(stored.hash) };
    Err(conflict(name, &location, &other, offered))
}

/// Whether the records say that just this content was stored under that name.
fn was_noted(place: &Place, name: &WalName, offered: &Content) -> Result<bool> {
    let Some(records) = &place.records else { return Ok(false) };
    let sum = records.find_sum(&place.layout, name)?;
    Ok(sum.is_some_and(|sum| sum.noted.is_of(offered, place.hash_key.as_ref()) == Some(true)))
}

/// Compares an encrypted local file by what was announced of the very bytes that stand there. Nothing where it is not
/// encrypted, or where only its content can tell and there are keys to read it.
fn compare_announced(
    place: &Place,
    name: &WalName,
    key: &str,
    offered: &Content,
    pulse: &Pulse,
) -> Result<Option<Same>> {
    let Some(records) = &place.records else { return Ok(None) };
    let Some(object) = place.store.get(key)? else { return Ok(None) };
    let location = place.store.location(key);
    let unfit = |error: &io::Error| Error::of_stored_copy(&location, error, DAMAGE_HINT);
    let mut body = Beating::new(object.body, pulse);
    let mut first = [0; 1];
    let count = body.read(&mut first).map_err(|error| unfit(&error))?;
    if Encryption::detect(&first[..count]) == Encryption::None {
        return Ok(None);
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&first[..count]);
    io::copy(&mut body, &mut hasher).map_err(|error| unfit(&error))?;
    let announced = records.find_announced_sum(&place.layout, name, &Hash(hasher.finalize()))?;
    match announced.map(|sum| (sum.noted, sum.noted.is_of(offered, place.hash_key.as_ref()))) {
        Some((_, Some(true))) => {
            // What lies below the encryption nobody here can see; what is set now was set then, most likely.
            let format = Format { compression: place.likely_format.compression, encryption: Encryption::OpenPgp };
            Ok(Some(Same { meta: object.meta, format }))
        }
        Some((other, Some(false))) => Err(conflict(name, &location, &Other::noted(&other), offered)),
        _ if place.secret_keys.are_named() => Ok(None),
        _ if was_noted(place, name, offered)? && records.is_announced(&place.layout, name)? => {
            Err(unfit(&io::Error::other("its bytes are not those that were stored")))
        }
        _ => Err(unknowable(name, &location)),
    }
}

/// An encrypted file of which nothing was noted, and no key to read it with.
fn unknowable(name: &WalName, location: &str) -> Error {
    Error::new(Kind::Conflict, location, format!("the archive already holds an encrypted file named \"{name}\""))
        .detail(format!("Whether \"{location}\" is the same file cannot be told: nothing was noted when it was stored. Nothing was overwritten."))
        .hint("Set archiver.decryption_keys, so that it can be read; or move it out of the archive.")
}

/// What is known of another file that stands there.
struct Other {
    size: String,
    /// Not where it is encrypted.
    hash: Option<Hash>,
}

impl Other {
    fn noted(noted: &Noted) -> Self {
        let hash = match noted.hash {
            NotedHash::Open(hash) => Some(hash),
            NotedHash::Keyed(_) => None,
        };
        Other { size: noted.size.to_string(), hash }
    }
}

fn conflict(name: &WalName, location: &str, other: &Other, offered: &Content) -> Error {
    let stored_size = &other.size;
    let (stored, hash) = match other.hash {
        Some(stored) => (stored.to_string(), offered.hash.to_string()),
        // The hash of one is that of the other, often but for a few bytes: neither belongs into a log.
        None => ("encrypted".to_string(), "of another content".to_string()),
    };
    let size = offered.size;
    Error::new(Kind::Conflict, location, format!("the archive already holds another file named \"{name}\""))
        .detail(format!(
            "Archived at \"{location}\": {stored_size} bytes, {stored}; offered: {size} bytes, {hash}. \
             Nothing was overwritten."
        ))
        .hint(
            "Two servers write to one archive, or this one went back in time (a restored copy, a snapshot): \
             give one of them another archiver.server_name.",
        )
}

/// A stored file's plain content, of which at most a limit of bytes counts: a longer one answers that size and the hash
/// of its first part.
struct Plain {
    format: Format,
    size: u64,
    hash: Hash,
    head: Vec<u8>,
}

fn read_plain(place: &Place, stored: impl Read + Send, limit: u64, pulse: &Pulse) -> io::Result<Plain> {
    let decoded = place.decode(Beating::new(stored, pulse), u64::MAX)?;
    let mut plain = decoded.plain.take(limit);
    let mut head = Vec::new();
    (&mut plain).take(LongPageHeader::LENGTH as u64).read_to_end(&mut head)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head);
    let size = head.len() as u64 + io::copy(&mut plain, &mut hasher)?;
    Ok(Plain { format: decoded.format, size, hash: Hash(hasher.finalize()), head })
}
