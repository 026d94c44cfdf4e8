//! Snappy in its framing format: blocks of 64 kB, each with its checksum. It has one speed.

use snap::{read::FrameDecoder, write::FrameEncoder};
use std::io::{self, BufRead, Read, Write};

/// A block, the same compressed, and a table of 32 kB.
pub const ENCODER_MEMORY_BYTES: u64 = 256 << 10;

/// Writes one stream, of what `feed` writes.
pub fn encode(feed: super::Feed<'_>, encoded: &mut dyn Write) -> io::Result<()> {
    let mut encoder = FrameEncoder::new(encoded);
    feed(&mut encoder)?;
    encoder.into_inner().map(drop).map_err(|error| error.into_error())
}

/// Reads streams, one after another.
pub fn decoder(stored: impl BufRead) -> impl Read {
    FrameDecoder::new(stored)
}
