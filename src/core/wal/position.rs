//! Timelines, log sequence numbers and segment sizes.

use std::fmt;

/// A timeline identifier. 0 is no timeline of PostgreSQL's, yet a legal spelling in a file name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timeline(pub u32);

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A log sequence number: a byte position in the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Reads what [`Lsn`] displays.
    pub fn parse(text: &str) -> Option<Self> {
        let (high, low) = text.split_once('/')?;
        // from_str_radix alone would take a sign.
        let half = |digits: &str| {
            let hex = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            hex.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
        };
        Some(Lsn(half(high)? << 32 | half(low)?))
    }
}

impl fmt::Display for Lsn {
    /// As PostgreSQL's `%X/%X`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

/// The size of a WAL segment: a power of two from 1 MB to 1 GB (PostgreSQL, xlog_internal.h, `IsValidWalSegSize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentSize(u32);

impl SegmentSize {
    /// PostgreSQL's default, 16 MB.
    pub const DEFAULT: SegmentSize = SegmentSize(16 << 20);

    /// `bytes` as a segment size, or nothing where PostgreSQL would refuse it.
    pub fn new(bytes: u64) -> Option<Self> {
        let valid = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        valid.then_some(SegmentSize(bytes as u32))
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// How many segments share one log id, the middle eight digits of a name
    /// (PostgreSQL, xlog_internal.h, `XLogSegmentsPerXLogId`).
    pub fn segments_per_log(self) -> u32 {
        (0x1_0000_0000_u64 / self.bytes()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segment_sizes_are_postgresqls() {
        assert_eq!(SegmentSize::new(1 << 20).map(SegmentSize::segments_per_log), Some(4096));
        assert_eq!(SegmentSize::new(16 << 20), Some(SegmentSize::DEFAULT));
        assert_eq!(SegmentSize::DEFAULT.segments_per_log(), 256);
        assert_eq!(SegmentSize::new(1 << 30).map(SegmentSize::segments_per_log), Some(4));
        for wrong in [0, 1, 1 << 19, 3 << 20, 1 << 31] {
            assert_eq!(SegmentSize::new(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_lsn_prints_as_postgresql_prints_it() {
        assert_eq!(Lsn(0x2_0000_00A8).to_string(), "2/A8");
    }

    #[test]
    fn an_lsn_reads_back() {
        for lsn in [0, 0xA8, 0x2_0000_00A8, u64::MAX] {
            assert_eq!(Lsn::parse(&Lsn(lsn).to_string()), Some(Lsn(lsn)));
        }
        for text in ["", "/", "1/", "/1", "1", "1/2/3", "1/+2", "1/123456789", "G/0", " 1/2"] {
            assert_eq!(Lsn::parse(text), None, "{text:?}");
        }
    }
}
