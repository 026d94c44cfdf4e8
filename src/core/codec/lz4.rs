//! LZ4 frames, with a checksum of their content. The encoder has one speed.

use lz4_flex::frame::{BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use std::io::{self, BufRead, Read, Write};

/// A block of plain bytes, one of compressed ones, and a table.
pub const ENCODER_MEMORY_BYTES: u64 = 3 << 20;

/// Writes one frame, of what `feed` writes: `plain_size` bytes.
pub fn encode(plain_size: u64, feed: super::Feed<'_>, encoded: &mut dyn Write) -> io::Result<()> {
    let info = FrameInfo::new().block_size(BlockSize::Max1MB).content_checksum(true).content_size(Some(plain_size));
    let mut encoder = FrameEncoder::with_frame_info(info, encoded);
    feed(&mut encoder)?;
    encoder.finish().map(drop).map_err(io::Error::from)
}

/// Reads frames, one after another.
pub fn decoder(stored: impl BufRead) -> impl Read {
    Frames { decoder: FrameDecoder::new(Watched { stored, has_ended: false }) }
}

/// The library's decoder stops after each frame, and takes a frame without its end for a whole one.
struct Frames<R: BufRead> {
    decoder: FrameDecoder<Watched<R>>,
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let count = self.decoder.read(buffer)?;
            let source = self.decoder.get_mut();
            if count > 0 {
                return Ok(count);
            }
            // A frame says where it ends: nobody reads beyond the last byte of a whole one.
            if source.has_ended {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the last LZ4 frame has no end"));
            }
            if source.stored.fill_buf()?.is_empty() {
                return Ok(0);
            }
        }
    }
}

/// Remembers whether somebody wanted more than there is.
struct Watched<R> {
    stored: R,
    has_ended: bool,
}

impl<R: BufRead> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stored.read(buffer)?;
        self.has_ended |= count == 0 && !buffer.is_empty();
        Ok(count)
    }
}
