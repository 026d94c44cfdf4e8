//! Zstandard, with a context that is kept between files and a checksum in every frame.

use std::io::{self, BufRead, Read, Write};
use zstd::zstd_safe::{CCtx, CParameter, ResetDirective, compress_bound, get_error_name};

/// Windows larger than this are refused when reading: they are memory that a stored file makes us spend.
/// 128 MiB is what zstd itself writes at its highest level.
const MAX_WINDOW_LOG: u32 = 27;

/// A compression context, reused.
pub struct Encoder {
    context: CCtx<'static>,
}

fn failed(code: usize) -> io::Error {
    io::Error::other(format!("zstd: {}", get_error_name(code)))
}

impl Encoder {
    pub fn new(level: i32) -> io::Result<Self> {
        let mut context = CCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        context.set_parameter(CParameter::CompressionLevel(level)).map_err(failed)?;
        context.set_parameter(CParameter::ChecksumFlag(true)).map_err(failed)?;
        Ok(Encoder { context })
    }

    /// Fills `encoded`, which must be empty, with one frame.
    pub fn encode(&mut self, plain: &[u8], encoded: &mut Vec<u8>) -> io::Result<()> {
        encoded.try_reserve_exact(compress_bound(plain.len()))?;
        self.context.compress2(encoded, plain).map(drop).map_err(failed)
    }

    /// Writes one frame, which carries the size of its content as [`Encoder::encode`] does.
    pub fn encode_stream(&mut self, plain: &mut dyn Read, plain_size: u64, encoded: &mut dyn Write) -> io::Result<()> {
        self.context.reset(ResetDirective::SessionOnly).map_err(failed)?;
        let mut stream = zstd::stream::write::Encoder::with_context(encoded, &mut self.context);
        let result = stream
            .set_pledged_src_size(Some(plain_size))
            .and_then(|()| io::copy(plain, &mut stream))
            .and_then(|_| stream.do_finish());
        drop(stream);
        if result.is_err() {
            // A frame given up half-way must not leak into the next file.
            self.context.reset(ResetDirective::SessionOnly).map_err(failed)?;
        }
        result
    }

    #[cfg(test)]
    pub fn memory_bytes(&self) -> u64 {
        self.context.sizeof() as u64
    }
}

/// Reads frames, one after another.
pub fn decoder<'a>(stored: impl BufRead + 'a) -> io::Result<impl Read + 'a> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(stored)?;
    decoder.window_log_max(MAX_WINDOW_LOG)?;
    Ok(decoder)
}

/// An upper bound of a context's size, from measurements of zstd 1.5.7 on files of 1 to 64 MiB (a test holds it): tables
/// by level, which are smaller for a small file, and for a stream its window and two pieces more.
pub fn encoder_memory_bytes(level: i32, plain_size: u64, is_streamed: bool) -> u64 {
    const MIB: u64 = 1 << 20;
    let (tables_mib, window_log) = match level {
        ..=2 => (1, 20),
        3..=8 => (6, 21),
        9 => (11, 22),
        10..=12 => (41, 22),
        13..=15 => (65, 22),
        16..=18 => (50, 23),
        19 => (82, 23),
        20 => (162, 25),
        21 => (322, 26),
        _ => (706, MAX_WINDOW_LOG),
    };
    let size = plain_size.next_power_of_two().max(MIB);
    let tables = (tables_mib * MIB).min(2 * MIB + 17 * size);
    if is_streamed { tables + MIB + size.min(1 << window_log) } else { tables }
}
