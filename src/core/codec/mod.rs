//! Compression in memory: the formats, their levels as Barman numbers them, and how to recognise them.

mod bounded;
mod bzip2;
mod gzip;
mod lz4;
mod snappy;
mod xz;
mod zstd;

use std::fmt;
use std::io::{self, BufReader, Read, Write};

/// A compression format. Names and magic numbers are Barman's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Stored as it is.
    None,
    /// Gzip members (RFC 1952).
    Gzip,
    /// Bzip2 streams.
    Bzip2,
    /// Xz streams.
    Xz,
    /// Zstandard frames (RFC 8878).
    Zstd,
    /// LZ4 frames.
    Lz4,
    /// Snappy in its framing format.
    Snappy,
    /// Made by a filter of the user's, which this room knows nothing of.
    Custom,
}

/// Why a compression level is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLevel {
    compression: Compression,
}

impl fmt::Display for BadLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.compression.levels() {
            Some(levels) => write!(
                f,
                "The levels of {} are low, medium, high and the numbers from {} to {}",
                self.compression.name(),
                levels.min,
                levels.max
            ),
            None => write!(f, "{} has no levels: low, medium and high are accepted", self.compression.name()),
        }
    }
}

/// What a format's three names of a level stand for, and the range of its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Levels {
    min: i32,
    max: i32,
    low: i32,
    medium: i32,
    high: i32,
}

impl Compression {
    /// Every format that is made and read here.
    pub const ALL: [Compression; 7] = [
        Compression::None,
        Compression::Gzip,
        Compression::Bzip2,
        Compression::Xz,
        Compression::Zstd,
        Compression::Lz4,
        Compression::Snappy,
    ];

    /// How many first bytes [`Compression::detect`] wants to see.
    pub const MAGIC_LENGTH: usize = 10;

    /// The name users write, and the catalogue shows.
    pub fn name(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Xz => "xz",
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
            Compression::Snappy => "snappy",
            Compression::Custom => "custom",
        }
    }

    /// What names in cloud storage end with, Barman's cloud layout: nothing for `none`.
    pub fn suffix(self) -> &'static str {
        match self {
            Compression::None | Compression::Custom => "",
            Compression::Gzip => ".gz",
            Compression::Bzip2 => ".bz2",
            Compression::Xz => ".xz",
            Compression::Zstd => ".zst",
            Compression::Lz4 => ".lz4",
            Compression::Snappy => ".snappy",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|compression| compression.name() == name)
    }

    /// The names of all formats, for messages.
    pub fn names() -> String {
        Self::ALL.map(Compression::name).join(", ")
    }

    fn magic(self) -> &'static [u8] {
        match self {
            Compression::None | Compression::Custom => &[],
            Compression::Gzip => &[0x1F, 0x8B, 0x08],
            Compression::Bzip2 => b"BZh",
            Compression::Xz => b"\xFD7zXZ\0",
            Compression::Zstd => &[0x28, 0xB5, 0x2F, 0xFD],
            Compression::Lz4 => &[0x04, 0x22, 0x4D, 0x18],
            Compression::Snappy => b"\xFF\x06\0\0sNaPpY",
        }
    }

    fn levels(self) -> Option<Levels> {
        let (min, max, [low, medium, high]) = match self {
            Compression::None | Compression::Snappy | Compression::Custom => return None,
            Compression::Gzip => (1, 9, [1, 6, 9]),
            Compression::Bzip2 => (1, 9, [1, 5, 9]),
            Compression::Xz => (1, 9, [1, 3, 5]),
            Compression::Zstd => (-22, 22, [1, 4, 9]),
            Compression::Lz4 => (0, 16, [0, 6, 10]),
        };
        Some(Levels { min, max, low, medium, high })
    }

    /// Whether the level changes nothing: it is accepted as Barman accepts it, and the encoder has one speed.
    pub fn has_one_speed(self) -> bool {
        matches!(self, Compression::None | Compression::Lz4 | Compression::Snappy | Compression::Custom)
    }

    /// Recognises a compressed file by its first bytes; `None` means none of the formats above.
    pub fn detect(first_bytes: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|compression| {
            let magic = compression.magic();
            !magic.is_empty() && first_bytes.starts_with(magic)
        })
    }

    /// The number that `level` (low, medium, high or a number) stands for in this format.
    /// A format with one speed accepts the three names only.
    pub fn level(self, level: &str) -> Result<i32, BadLevel> {
        let refused = BadLevel { compression: self };
        let Some(levels) = self.levels() else {
            return if ["low", "medium", "high"].contains(&level) { Ok(0) } else { Err(refused) };
        };
        match level {
            "low" => Ok(levels.low),
            "medium" => Ok(levels.medium),
            "high" => Ok(levels.high),
            number => match number.parse() {
                Ok(number) if (levels.min..=levels.max).contains(&number) => Ok(number),
                _ => Err(refused),
            },
        }
    }

    /// At most how many bytes of memory an encoder holds at that level, for files of `plain_size` bytes that are encoded
    /// whole in memory or, `is_streamed`, piece by piece.
    pub fn encoder_memory_bytes(self, level: i32, plain_size: u64, is_streamed: bool) -> u64 {
        match self {
            Compression::None | Compression::Custom => 0,
            Compression::Gzip => gzip::ENCODER_MEMORY_BYTES,
            Compression::Bzip2 => bzip2::encoder_memory_bytes(level),
            Compression::Xz => xz::encoder_memory_bytes(level),
            Compression::Lz4 => lz4::ENCODER_MEMORY_BYTES,
            Compression::Snappy => snappy::ENCODER_MEMORY_BYTES,
            Compression::Zstd => zstd::encoder_memory_bytes(level, plain_size, is_streamed),
        }
    }
}

/// The most bytes that compressing `plain_size` bytes gives, in any format: what cannot be compressed grows, by at most
/// an eighth (gzip at level 1 codes each byte in eight or nine bits, whatever it meets), and has headers.
pub fn most_encoded_bytes(plain_size: u64) -> u64 {
    plain_size + plain_size / 8 + (64 << 10)
}

/// Writes all plain bytes into an encoder.
type Feed<'a> = &'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>;

/// Compresses one file after another at one level.
pub struct Encoder {
    compression: Compression,
    level: i32,
    /// Zstandard's memory, kept between files; the others get theirs anew for each.
    zstd: Option<zstd::Encoder>,
}

impl Encoder {
    /// An encoder for that format; `level` is what [`Compression::level`] answered.
    pub fn new(compression: Compression, level: i32) -> io::Result<Self> {
        let zstd = (compression == Compression::Zstd).then(|| zstd::Encoder::new(level)).transpose()?;
        Ok(Encoder { compression, level, zstd })
    }

    /// Compresses `plain` whole into `encoded`, whose old content is dropped and whose memory is reused.
    /// Fails where memory for the result is refused, never aborts.
    pub fn encode(&mut self, plain: &[u8], encoded: &mut Vec<u8>) -> io::Result<()> {
        encoded.clear();
        if let Some(zstd) = &mut self.zstd {
            return zstd.encode(plain, encoded);
        }
        let most = usize::try_from(most_encoded_bytes(plain.len() as u64)).map_err(|_| io::ErrorKind::OutOfMemory)?;
        encoded.try_reserve_exact(most)?;
        self.encode_fed(plain.len() as u64, &mut |encoder| encoder.write_all(plain), encoded)
    }

    /// Compresses all of `plain` (`plain_size` bytes) into `encoded`, piece by piece.
    pub fn encode_stream(&mut self, plain: &mut dyn Read, plain_size: u64, encoded: &mut dyn Write) -> io::Result<()> {
        match &mut self.zstd {
            Some(zstd) => zstd.encode_stream(plain, plain_size, encoded),
            None => self.encode_fed(plain_size, &mut |encoder| io::copy(plain, encoder).map(drop), encoded),
        }
    }

    fn encode_fed(&mut self, plain_size: u64, feed: Feed<'_>, encoded: &mut dyn Write) -> io::Result<()> {
        match self.compression {
            Compression::None | Compression::Custom | Compression::Zstd => feed(encoded),
            Compression::Gzip => gzip::encode(self.level, feed, encoded),
            Compression::Bzip2 => bzip2::encode(self.level, feed, encoded),
            Compression::Xz => xz::encode(self.level, feed, encoded),
            Compression::Lz4 => lz4::encode(plain_size, feed, encoded),
            Compression::Snappy => snappy::encode(feed, encoded),
        }
    }
}

/// A stored file being read back: its format and its plain bytes.
pub struct Decoder<'a> {
    /// The format found by its magic.
    pub compression: Compression,
    /// The plain bytes; reading past the bound given to [`decode`] fails.
    pub plain: Box<dyn Read + 'a>,
}

/// Reads `stored` back, recognising the format by its magic. Concatenated frames read as one file.
/// More than `max_plain_size` bytes of plain content are an error: a few kilobytes can unfold to terabytes.
pub fn decode<'a>(stored: impl Read + 'a, max_plain_size: u64) -> io::Result<Decoder<'a>> {
    decode_or(stored, max_plain_size, |_, whole| Ok((Compression::None, whole)))
}

/// The same; what is in no format of this room is read by `otherwise`, which sees the first bytes.
pub fn decode_or<'a>(
    mut stored: impl Read + 'a,
    max_plain_size: u64,
    otherwise: impl FnOnce(&[u8], Box<dyn Read + 'a>) -> io::Result<(Compression, Box<dyn Read + 'a>)>,
) -> io::Result<Decoder<'a>> {
    /// Enough for any magic, and for the header of a WAL page.
    const HEAD_BYTES: usize = 64;
    let mut first_bytes = Vec::with_capacity(HEAD_BYTES);
    (&mut stored).take(HEAD_BYTES as u64).read_to_end(&mut first_bytes)?;
    let detected = Compression::detect(&first_bytes);
    let head = first_bytes.clone();
    let whole = BufReader::with_capacity(128 << 10, io::Cursor::new(first_bytes).chain(stored));
    let Some(compression) = detected else {
        let (compression, plain) = otherwise(&head, Box::new(whole))?;
        return Ok(Decoder { compression, plain: Box::new(bounded::Bounded::new(plain, max_plain_size)) });
    };
    let plain: Box<dyn Read + 'a> = match compression {
        Compression::None | Compression::Custom => Box::new(whole),
        Compression::Gzip => Box::new(gzip::decoder(whole)),
        Compression::Bzip2 => Box::new(bzip2::decoder(whole)),
        Compression::Xz => Box::new(xz::decoder(whole)?),
        Compression::Zstd => Box::new(zstd::decoder(whole)?),
        Compression::Lz4 => Box::new(lz4::decoder(whole)),
        Compression::Snappy => Box::new(snappy::decoder(whole)),
    };
    Ok(Decoder { compression, plain: Box::new(bounded::Bounded::new(plain, max_plain_size)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(compression: Compression, level: i32, plain: &[u8]) -> Vec<u8> {
        let mut encoded = Vec::new();
        Encoder::new(compression, level).unwrap().encode(plain, &mut encoded).unwrap();
        encoded
    }

    fn decoded(stored: &[u8], bound: u64) -> io::Result<(Compression, Vec<u8>)> {
        let mut decoder = decode(stored, bound)?;
        let mut plain = Vec::new();
        decoder.plain.read_to_end(&mut plain)?;
        Ok((decoder.compression, plain))
    }

    fn wal_like(length: usize) -> Vec<u8> {
        (0..length).map(|at| if at % 97 < 60 { (at / 97) as u8 } else { (at * 31 % 251) as u8 }).collect()
    }

    #[test]
    fn every_format_gives_back_what_it_took_in_memory_and_streamed() {
        let plain = wal_like(3 << 20);
        for compression in Compression::ALL {
            let mut encoder = Encoder::new(compression, compression.level("low").unwrap()).unwrap();
            for round in 0..3 {
                let plain = &plain[round..];
                let (mut whole, mut streamed) = (Vec::new(), Vec::new());
                encoder.encode(plain, &mut whole).unwrap();
                encoder.encode_stream(&mut &plain[..], plain.len() as u64, &mut streamed).unwrap();
                for stored in [whole, streamed] {
                    let (found, read) = decoded(&stored, plain.len() as u64).unwrap();
                    assert_eq!(found, compression);
                    assert!(read == plain, "{} round {round}", compression.name());
                }
            }
        }
    }

    #[test]
    fn concatenated_frames_read_as_one_file() {
        let (one, two) = (wal_like(70_000), wal_like(40_000));
        for compression in Compression::ALL {
            let level = compression.level("medium").unwrap();
            let stored = [encoded(compression, level, &one), encoded(compression, level, &two)].concat();
            let (_, read) = decoded(&stored, 110_000).unwrap();
            assert!(read == [one.clone(), two.clone()].concat(), "{}", compression.name());
        }
    }

    #[test]
    fn a_bomb_ends_in_an_error() {
        let zeros = vec![0; 8 << 20];
        for compression in Compression::ALL {
            let level = compression.level("low").unwrap();
            let error = decoded(&encoded(compression, level, &zeros), 1 << 20).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{}", compression.name());
        }
    }

    #[test]
    fn a_damaged_or_shortened_file_is_found_in_every_format() {
        let plain = wal_like(1 << 20);
        for compression in Compression::ALL.into_iter().filter(|compression| *compression != Compression::None) {
            let stored = encoded(compression, compression.level("low").unwrap(), &plain);
            for at in [stored.len() / 3, stored.len() / 2, stored.len() - 9] {
                let mut damaged = stored.clone();
                damaged[at] ^= 1;
                assert!(decoded(&damaged, 1 << 20).is_err(), "{} damaged at {at}", compression.name());
            }
            // Snappy has no mark at its end: there the size, which is known of a segment, tells.
            let ends = if compression == Compression::Snappy { 0..0 } else { 1..12 };
            for missing in ends.chain([stored.len() / 2, stored.len() - 12]) {
                let found = decoded(&stored[..stored.len() - missing], 1 << 20);
                assert!(found.is_err(), "{} without its last {missing} bytes", compression.name());
            }
        }
    }

    #[test]
    fn what_cannot_be_compressed_grows_by_little_in_every_format() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..2 << 20)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 56) as u8
            })
            .collect();
        for compression in Compression::ALL {
            for plain in [&noise[..], &noise[..1], &[]] {
                let stored = encoded(compression, compression.level("low").unwrap(), plain);
                assert!(stored.len() as u64 <= most_encoded_bytes(plain.len() as u64), "{}", compression.name());
                assert!(decoded(&stored, 2 << 20).unwrap().1 == plain, "{}", compression.name());
            }
        }
    }

    #[test]
    fn the_same_content_gives_the_same_bytes() {
        let plain = wal_like(100_000);
        for compression in Compression::ALL {
            assert!(encoded(compression, 1, &plain) == encoded(compression, 1, &plain), "{}", compression.name());
        }
    }

    #[test]
    fn levels_are_barmans_and_a_wrong_one_names_the_range() {
        for (compression, named, [least, most]) in [
            (Compression::Gzip, [1, 6, 9], [1, 9]),
            (Compression::Bzip2, [1, 5, 9], [1, 9]),
            (Compression::Xz, [1, 3, 5], [1, 9]),
            (Compression::Zstd, [1, 4, 9], [-22, 22]),
            (Compression::Lz4, [0, 6, 10], [0, 16]),
        ] {
            assert_eq!(["low", "medium", "high"].map(|name| compression.level(name).unwrap()), named);
            assert_eq!([least, most].map(|level| compression.level(&level.to_string()).unwrap()), [least, most]);
            for wrong in [&(least - 1).to_string(), &(most + 1).to_string(), "fast", "", "1.5"] {
                let message = compression.level(wrong).unwrap_err().to_string();
                let name = compression.name();
                let rule = format!("The levels of {name} are low, medium, high and the numbers from {least} to {most}");
                assert_eq!(message, rule);
            }
        }
        for compression in [Compression::None, Compression::Snappy] {
            assert_eq!(compression.level("low"), Ok(0));
            assert!(compression.level("3").is_err());
        }
    }

    #[test]
    fn the_memory_of_an_encoder_is_neither_underestimated_nor_doubled() {
        const SLACK: u64 = 6 << 20;
        for size in [1 << 20, 4 << 20] {
            // What an encoder holds does not depend on what is in the file.
            let plain = vec![7; size];
            for level in [-7, 1, 2, 3, 8, 9, 12, 15, 18, 19, 20, 22] {
                let [mut whole, mut streamed] = [0, 1].map(|_| zstd::Encoder::new(level).unwrap());
                whole.encode(&plain, &mut Vec::new()).unwrap();
                streamed.encode_stream(&mut &plain[..], size as u64, &mut Vec::new()).unwrap();
                for (held, is_streamed) in [(whole.memory_bytes(), false), (streamed.memory_bytes(), true)] {
                    let told = Compression::Zstd.encoder_memory_bytes(level, size as u64, is_streamed);
                    assert!(
                        held <= told && told <= 2 * held + SLACK,
                        "level {level}, {size}: told {told}, holds {held}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_streamed_zstd_frame_says_how_long_its_content_is() {
        let plain = wal_like(300_000);
        let mut stored = Vec::new();
        let mut encoder = Encoder::new(Compression::Zstd, 1).unwrap();
        encoder.encode_stream(&mut &plain[..], 300_000, &mut stored).unwrap();
        assert_eq!(::zstd::zstd_safe::get_frame_content_size(&stored).ok(), Some(Some(300_000)));
    }

    proptest! {
        #[test]
        fn no_stored_file_makes_the_decoder_panic(
            stored in proptest::collection::vec(any::<u8>(), 0..600),
            format in 0..Compression::ALL.len(),
        ) {
            let _ = decoded(&[Compression::ALL[format].magic(), &stored].concat(), 1 << 20);
        }

        #[test]
        fn no_damage_makes_the_decoder_panic(
            damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            format in 0..Compression::ALL.len(),
        ) {
            let mut stored = encoded(Compression::ALL[format], 1, &wal_like(5_000));
            for (at, byte) in damage {
                let at = at.index(stored.len());
                stored[at] = byte;
            }
            let _ = decoded(&stored, 1 << 20);
        }
    }
}
