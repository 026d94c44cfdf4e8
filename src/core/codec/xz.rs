//! Xz, with a CRC64 of the content as the program `xz` writes it.

use liblzma::bufread::XzDecoder;
use liblzma::stream::{CONCATENATED, Check, Stream};
use liblzma::write::XzEncoder;
use std::io::{self, BufRead, Read, Write};

/// A stored file that wants more to be read is refused. Level 9, the highest there is, wants half of it.
const MAX_DECODER_MEMORY_BYTES: u64 = 128 << 20;

/// What the manual of xz says under "Compression preset level options", rounded up.
pub fn encoder_memory_bytes(level: i32) -> u64 {
    const MIB_BY_LEVEL: [u64; 10] = [4, 10, 18, 33, 49, 95, 95, 187, 371, 675];
    MIB_BY_LEVEL[level.clamp(0, 9) as usize] << 20
}

/// Writes one stream, of what `feed` writes.
pub fn encode(level: i32, feed: super::Feed<'_>, encoded: &mut dyn Write) -> io::Result<()> {
    let stream = Stream::new_easy_encoder(level.unsigned_abs(), Check::Crc64)?;
    let mut encoder = XzEncoder::new_stream(encoded, stream);
    feed(&mut encoder)?;
    encoder.finish().map(drop)
}

/// Reads streams, one after another.
pub fn decoder(stored: impl BufRead) -> io::Result<impl Read> {
    let stream = Stream::new_stream_decoder(MAX_DECODER_MEMORY_BYTES, CONCATENATED)?;
    Ok(XzDecoder::new_stream(stored, stream))
}
