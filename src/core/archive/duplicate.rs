//! The one duplicate rule: the same plain content is success, any other is refused.

use crate::codec::{self, Compression};
use crate::error::{Error, Kind, Result, plain_cause};
use crate::store::{Meta, Store};
use crate::sums::Hash;
use crate::wal::WalName;
use std::io::{self, Read};

/// A stored file that holds what was offered.
pub struct Same {
    /// What the store knows of it.
    pub meta: Meta,
    /// The format it is stored in, which an earlier setting may have chosen.
    pub compression: Compression,
}

/// Compares what stands under `key` with the offered file, by plain content: sizes and times prove nothing,
/// and noted sums say nothing about a copy that was damaged since.
pub fn compare(store: &dyn Store, key: &str, name: &WalName, size: u64, hash: &Hash) -> Result<Same> {
    let location = store.location(key);
    let object = store.get(key)?.ok_or_else(|| {
        Error::new(Kind::Storage, location.clone(), format!("\"{location}\" was there and is gone")).retry_if(true)
    })?;
    let meta = object.meta;
    // One byte more than offered is enough to know that it is another file.
    let (compression, stored_size, stored_hash) = hash_plain(object.body, size + 1).map_err(|error| {
        Error::new(
            Kind::Damaged,
            location.clone(),
            format!("the archived copy \"{location}\" cannot be read: {}", plain_cause(&error)),
        )
        .hint("It is left as it is. Move it out of the archive, so that the file can be stored again.")
    })?;
    if stored_size == size && stored_hash == *hash {
        return Ok(Same { meta, compression });
    }
    Err(Error::new(
        Kind::Conflict,
        location.clone(),
        format!("the archive already holds another file named \"{name}\""),
    )
    .detail(format!(
        "Archived at \"{location}\": {stored_hash}; offered: {size} bytes, {hash}. Nothing was overwritten."
    ))
    .hint(
        "Two servers write to one archive, or this one went back in time (a restored copy, a snapshot): \
         give one of them another archiver.server_name.",
    ))
}

/// Format, size and hash of a stored file's plain content, of which at most `limit` bytes count: a longer one
/// answers that size and the hash of its first part.
fn hash_plain(stored: impl Read, limit: u64) -> io::Result<(Compression, u64, Hash)> {
    let decoder = codec::decode(stored, u64::MAX)?;
    let mut hasher = blake3::Hasher::new();
    let size = io::copy(&mut decoder.plain.take(limit), &mut hasher)?;
    Ok((decoder.compression, size, Hash(hasher.finalize())))
}
