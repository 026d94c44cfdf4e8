//! Compression in memory: the formats, their levels as Barman numbers them, and how to recognise them.

mod bounded;
mod zstd;

use std::fmt;
use std::io::{self, BufReader, Read, Write};

/// A compression format. Names and magic numbers are Barman's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Stored as it is.
    None,
    /// Zstandard frames (RFC 8878).
    Zstd,
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
    /// Every format this build has.
    pub const ALL: [Compression; 2] = [Compression::None, Compression::Zstd];

    /// How many first bytes [`Compression::detect`] wants to see.
    pub const MAGIC_LENGTH: usize = 10;

    /// The name users write, and the catalogue shows.
    pub fn name(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Zstd => "zstd",
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
            Compression::None => &[],
            Compression::Zstd => &[0x28, 0xB5, 0x2F, 0xFD],
        }
    }

    fn levels(self) -> Option<Levels> {
        match self {
            Compression::None => None,
            Compression::Zstd => Some(Levels { min: -22, max: 22, low: 1, medium: 4, high: 9 }),
        }
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
            Compression::None => 0,
            Compression::Zstd => zstd::encoder_memory_bytes(level, plain_size, is_streamed),
        }
    }
}

/// Compresses one file after another at one level, keeping its memory between files.
pub enum Encoder {
    /// Copies.
    None,
    /// Zstandard with a kept context.
    Zstd(zstd::Encoder),
}

impl Encoder {
    /// An encoder for that format; `level` is what [`Compression::level`] answered.
    pub fn new(compression: Compression, level: i32) -> io::Result<Self> {
        match compression {
            Compression::None => Ok(Encoder::None),
            Compression::Zstd => zstd::Encoder::new(level).map(Encoder::Zstd),
        }
    }

    /// Compresses `plain` whole into `encoded`, whose old content is dropped and whose memory is reused.
    /// Fails where memory is refused, never aborts.
    pub fn encode(&mut self, plain: &[u8], encoded: &mut Vec<u8>) -> io::Result<()> {
        encoded.clear();
        match self {
            Encoder::None => {
                encoded.try_reserve_exact(plain.len())?;
                encoded.extend_from_slice(plain);
                Ok(())
            }
            Encoder::Zstd(encoder) => encoder.encode(plain, encoded),
        }
    }

    /// Compresses all of `plain` (`plain_size` bytes) into `encoded`, piece by piece.
    pub fn encode_stream(&mut self, plain: &mut dyn Read, plain_size: u64, encoded: &mut dyn Write) -> io::Result<()> {
        match self {
            Encoder::None => io::copy(plain, encoded).map(drop),
            Encoder::Zstd(encoder) => encoder.encode_stream(plain, plain_size, encoded),
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

/// Formats that Barman may have stored and this build does not have: files in them are whole, and not ours to judge.
const UNREADABLE: [(&str, &[u8]); 5] = [
    ("gzip", &[0x1F, 0x8B, 0x08]),
    ("bzip2", &[0x42, 0x5A, 0x68]),
    ("xz", &[0xFD, 0x37, 0x7A, 0x58, 0x5A, 0x00]),
    ("lz4", &[0x04, 0x22, 0x4D, 0x18]),
    ("snappy", &[0xFF, 0x06, 0x00, 0x00, 0x73, 0x4E, 0x61, 0x50, 0x70, 0x59]),
];

/// Reads `stored` back, recognising the format by its magic. Concatenated frames read as one file.
/// More than `max_plain_size` bytes of plain content are an error: a few kilobytes can unfold to terabytes. A format that
/// this build does not have fails with [`io::ErrorKind::Unsupported`].
pub fn decode<'a>(mut stored: impl Read + 'a, max_plain_size: u64) -> io::Result<Decoder<'a>> {
    let mut first_bytes = Vec::with_capacity(Compression::MAGIC_LENGTH);
    (&mut stored).take(Compression::MAGIC_LENGTH as u64).read_to_end(&mut first_bytes)?;
    if let Some((name, _)) = UNREADABLE.iter().find(|(_, magic)| first_bytes.starts_with(magic)) {
        let cause = format!("it is compressed with {name}, which this build cannot read");
        return Err(io::Error::new(io::ErrorKind::Unsupported, cause));
    }
    let compression = Compression::detect(&first_bytes).unwrap_or(Compression::None);
    let whole = io::Cursor::new(first_bytes).chain(stored);
    let plain: Box<dyn Read + 'a> = match compression {
        Compression::None => Box::new(whole),
        Compression::Zstd => Box::new(zstd::decoder(BufReader::with_capacity(128 << 10, whole))?),
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
    fn a_format_that_this_build_lacks_is_named_and_not_taken_for_plain() {
        let error = decoded(&[0x1F, 0x8B, 0x08, 0, 0, 0, 0, 0], 100).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
        assert_eq!(error.to_string(), "it is compressed with gzip, which this build cannot read");
    }

    #[test]
    fn a_damaged_zstd_file_is_found_by_its_checksum() {
        let mut stored = encoded(Compression::Zstd, 1, &wal_like(1 << 20));
        let last = stored.len() - 1;
        stored[last] ^= 1;
        assert!(decoded(&stored, 1 << 20).is_err());
        stored.truncate(last - 1000);
        assert!(decoded(&stored, 1 << 20).is_err());
    }

    #[test]
    fn levels_are_barmans_and_a_wrong_one_names_the_range() {
        let zstd = Compression::Zstd;
        assert_eq!([zstd.level("low"), zstd.level("medium"), zstd.level("high")], [Ok(1), Ok(4), Ok(9)]);
        assert_eq!([zstd.level("-22"), zstd.level("22")], [Ok(-22), Ok(22)]);
        for wrong in ["23", "-23", "fast", "", "1.5"] {
            let message = zstd.level(wrong).unwrap_err().to_string();
            assert_eq!(message, "The levels of zstd are low, medium, high and the numbers from -22 to 22");
        }
        assert_eq!(Compression::None.level("low"), Ok(0));
        assert!(Compression::None.level("3").is_err());
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
        fn no_stored_file_makes_the_decoder_panic(mut stored in proptest::collection::vec(any::<u8>(), 0..600), zstd: bool) {
            if zstd && stored.len() > 4 {
                stored[..4].copy_from_slice(Compression::Zstd.magic());
            }
            let _ = decoded(&stored, 1 << 20);
        }
    }
}
