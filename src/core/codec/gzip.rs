//! Gzip (RFC 1952), without name and time in its header: the same content gives the same bytes.

use flate2::{Compression, bufread::MultiGzDecoder, write::GzEncoder};
use std::io::{self, BufRead, Read, Write};

/// The tables of deflate take some 270 kB at any level (zlib's manual, "memory footprint").
pub const ENCODER_MEMORY_BYTES: u64 = 1 << 20;

/// Writes one member, of what `feed` writes.
pub fn encode(level: i32, feed: super::Feed<'_>, encoded: &mut dyn Write) -> io::Result<()> {
    let mut encoder = GzEncoder::new(encoded, Compression::new(level.unsigned_abs()));
    feed(&mut encoder)?;
    encoder.finish().map(drop)
}

/// Reads members, one after another.
pub fn decoder(stored: impl BufRead) -> impl Read {
    MultiGzDecoder::new(stored)
}
