//! The one duplicate rule: the same plain content is success, any other is refused.

use crate::codec::{self, Compression};
use crate::error::{Error, Kind, Result};
use crate::hash::{Content, Hash};
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
    pub compression: Compression,
}

const DAMAGE_HINT: &str = "It is left as it is. Move it out of the archive, so that the file can be stored again.";

/// Compares the stored file of that name with the offered one, by plain content: sizes and times prove nothing,
/// and noted sums say nothing about a copy that was damaged since.
///
/// A copy that was once noted as just what is offered now, or that is no segment at all, is damaged rather than another.
///
/// A store that keeps what it was told of the content is believed: it checks what it keeps.
pub fn compare(place: &Place, name: &WalName, key: &str, offered: &Content, pulse: &Pulse) -> Result<Same> {
    let Content { size, hash } = *offered;
    let location = place.store.location(key);
    let gone =
        || Error::new(Kind::Storage, location.clone(), format!("\"{location}\" was there and is gone")).retry_if(true);
    let format = place.layout.wal_name(key).and_then(|(_, format)| format);
    if let Some(format) = format {
        let meta = place.store.head(key)?.ok_or_else(gone)?;
        match meta.content {
            Some(content) if content == *offered => return Ok(Same { meta, compression: format }),
            Some(other) => return Err(conflict(name, &location, &other.size.to_string(), &other.hash, offered)),
            // Barman's, which tells nothing.
            None => {}
        }
    }
    let object = place.store.get(key)?.ok_or_else(gone)?;
    let unfit = |cause: &io::Error| Error::of_stored_copy(&location, cause, DAMAGE_HINT);
    let damaged = |cause: String| unfit(&io::Error::other(cause));
    let meta = object.meta;
    // One byte more than offered is enough to know that it is another file.
    let stored = read_plain(object.body, size + 1, pulse).map_err(|error| unfit(&error))?;
    if (stored.size, stored.hash) == (size, hash) {
        return Ok(Same { meta, compression: stored.compression });
    }
    if let Some(records) = &place.records
        && records.find_sum(&place.layout, name)?.is_some_and(|sum| (sum.size, sum.hash) == (size, hash))
    {
        return Err(damaged(format!("it was stored as {hash}, and reads as {}", stored.hash)));
    }
    if name.is_wal()
        && let Err(cause) = LongPageHeader::parse(&stored.head)
    {
        return Err(damaged(cause.to_string()));
    }
    let stored_size = if stored.size > size { format!("more than {size}") } else { stored.size.to_string() };
    Err(conflict(name, &location, &stored_size, &stored.hash, offered))
}

fn conflict(name: &WalName, location: &str, stored_size: &str, stored: &Hash, offered: &Content) -> Error {
    let Content { size, hash } = offered;
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
    compression: Compression,
    size: u64,
    hash: Hash,
    head: Vec<u8>,
}

fn read_plain(stored: impl Read, limit: u64, pulse: &Pulse) -> io::Result<Plain> {
    let decoder = codec::decode(Beating::new(stored, pulse), u64::MAX)?;
    let mut plain = decoder.plain.take(limit);
    let mut head = Vec::new();
    (&mut plain).take(LongPageHeader::LENGTH as u64).read_to_end(&mut head)?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head);
    let size = head.len() as u64 + io::copy(&mut plain, &mut hasher)?;
    Ok(Plain { compression: decoder.compression, size, hash: Hash(hasher.finalize()), head })
}
