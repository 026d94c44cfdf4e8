//! Bzip2. Its level is the size of a block in units of 100 kB.

use bzip2::{Compression, bufread::MultiBzDecoder, write::BzEncoder};
use std::io::{self, BufRead, Read, Write};

/// 400 kB and eight times the block (bzip2's manual, "memory management").
pub fn encoder_memory_bytes(level: i32) -> u64 {
    400_000 + 8 * 100_000 * u64::from(level.unsigned_abs())
}

/// Writes one stream, of what `feed` writes.
pub fn encode(level: i32, feed: super::Feed<'_>, encoded: &mut dyn Write) -> io::Result<()> {
    let mut encoder = BzEncoder::new(encoded, Compression::new(level.unsigned_abs()));
    feed(&mut encoder)?;
    encoder.finish().map(drop)
}

/// Reads streams, one after another.
pub fn decoder(stored: impl BufRead) -> impl Read {
    MultiBzDecoder::new(stored)
}
