//! The long page header: the first forty bytes of every segment, which say whose it is and where it belongs.

use super::name::SegmentName;
use super::position::{Lsn, SegmentSize, Timeline};
use std::fmt;

/// The first page's header of a segment (PostgreSQL, xlog_internal.h, `XLogLongPageHeaderData`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongPageHeader {
    /// `XLOG_PAGE_MAGIC`, one per major version.
    pub magic: u16,
    /// The timeline of the first record on the page; the old one in the first segment after a promotion.
    pub timeline: Timeline,
    /// The position of the page.
    pub page_address: Lsn,
    /// The cluster that wrote it.
    pub system_identifier: u64,
    /// The size of its segments.
    pub segment_size: SegmentSize,
    /// The size of its pages, `XLOG_BLCKSZ`.
    pub page_bytes: u32,
}

/// What the header of a segment must say. `None`: unknown here, so not compared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    /// Major version of the server.
    pub major: Option<u32>,
    /// The cluster's system identifier.
    pub system_identifier: Option<u64>,
    /// The cluster's segment size.
    pub segment_size: Option<SegmentSize>,
}

/// Why a header is not the one that its file name calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadHeader {
    /// Fewer bytes than a header has.
    Short,
    /// Not the magic of a WAL page, or of another major version than expected.
    Magic {
        /// The value found.
        found: u16,
    },
    /// A WAL page, but not the first of a segment.
    NotFirstPage,
    /// A segment size that PostgreSQL does not know, or another than expected.
    SegmentSize {
        /// The value found, in bytes.
        found: u32,
    },
    /// Written by another cluster.
    SystemIdentifier {
        /// The value found.
        found: u64,
        /// The value called for.
        expected: u64,
    },
    /// The page belongs elsewhere in the WAL.
    PageAddress {
        /// The value found.
        found: Lsn,
    },
    /// Written on a later timeline than its name says.
    Timeline {
        /// The value found.
        found: Timeline,
    },
}

impl fmt::Display for BadHeader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadHeader::Short => write!(f, "it is too short to hold a page header"),
            BadHeader::Magic { found } => write!(f, "its page magic is {found:04X}"),
            BadHeader::NotFirstPage => write!(f, "it does not start with the first page of a segment"),
            BadHeader::SegmentSize { found } => write!(f, "its header says that segments are {found} bytes long"),
            BadHeader::SystemIdentifier { found, expected } => {
                write!(f, "it was written by the cluster with system identifier {found}, not {expected}")
            }
            BadHeader::PageAddress { found } => write!(f, "its header says that it starts at {found}"),
            BadHeader::Timeline { found } => write!(f, "its header says timeline {found}"),
        }
    }
}

/// `XLOG_PAGE_MAGIC` of a major version (PostgreSQL, xlog_internal.h); nothing for one that this release does not know.
pub fn magic_of_major(major: u32) -> Option<u16> {
    match major {
        15 => Some(0xD110),
        16 => Some(0xD113),
        17 => Some(0xD116),
        18 => Some(0xD118),
        _ => None,
    }
}

/// The major version whose WAL has that magic, of those that [`magic_of_major`] knows.
pub fn major_of_magic(magic: u16) -> Option<u32> {
    (15..=18).find(|&major| magic_of_major(major) == Some(magic))
}

/// `XLP_LONG_HEADER` and `XLP_ALL_FLAGS` of xlog_internal.h.
pub(super) const LONG_HEADER: u16 = 0x0002;
pub(super) const ALL_FLAGS: u16 = 0x000F;
/// Every magic of the last twenty years is 0xD0xx or 0xD1xx.
const MAGIC_FAMILY: std::ops::Range<u16> = 0xD000..0xD200;

impl LongPageHeader {
    /// Its length in bytes, alignment included.
    pub const LENGTH: usize = 40;

    /// Reads a header from the first bytes of a file, in this machine's byte order, as PostgreSQL writes it.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadHeader> {
        let bytes: &[u8; Self::LENGTH] =
            bytes.get(..Self::LENGTH).and_then(|head| head.try_into().ok()).ok_or(BadHeader::Short)?;
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(value)
        };
        let (magic, info) = (u16_at(0), u16_at(2));
        if !MAGIC_FAMILY.contains(&magic) {
            return Err(BadHeader::Magic { found: magic });
        }
        if info & LONG_HEADER == 0 || info & !ALL_FLAGS != 0 {
            return Err(BadHeader::NotFirstPage);
        }
        let found = u32_at(32);
        let segment_size = SegmentSize::new(u64::from(found)).ok_or(BadHeader::SegmentSize { found })?;
        Ok(LongPageHeader {
            magic,
            timeline: Timeline(u32_at(4)),
            page_address: Lsn(u64_at(8)),
            system_identifier: u64_at(24),
            segment_size,
            page_bytes: u32_at(36),
        })
    }

    /// Compares the header with what the file's name and the cluster call for.
    ///
    /// The timeline may be lower than the name's: the first segment after a promotion starts with a copy of the old
    /// timeline's pages.
    pub fn check(&self, name: SegmentName, expected: &Expected) -> Result<(), BadHeader> {
        if expected.major.and_then(magic_of_major).is_some_and(|magic| magic != self.magic) {
            return Err(BadHeader::Magic { found: self.magic });
        }
        if let Some(expected) = expected.system_identifier.filter(|&expected| expected != self.system_identifier) {
            return Err(BadHeader::SystemIdentifier { found: self.system_identifier, expected });
        }
        if expected.segment_size.is_some_and(|size| size != self.segment_size) {
            return Err(BadHeader::SegmentSize { found: self.segment_size.bytes() as u32 });
        }
        if name.start(self.segment_size) != Some(self.page_address) {
            return Err(BadHeader::PageAddress { found: self.page_address });
        }
        if self.timeline > name.timeline {
            return Err(BadHeader::Timeline { found: self.timeline });
        }
        Ok(())
    }

    /// The bytes of such a header; what tests build segments from.
    pub fn to_bytes(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0..2].copy_from_slice(&self.magic.to_ne_bytes());
        bytes[2..4].copy_from_slice(&LONG_HEADER.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.timeline.0.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.page_address.0.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.system_identifier.to_ne_bytes());
        bytes[32..36].copy_from_slice(&(self.segment_size.bytes() as u32).to_ne_bytes());
        bytes[36..40].copy_from_slice(&self.page_bytes.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::WalName;
    use super::*;

    const CLUSTER: Expected =
        Expected { major: Some(15), system_identifier: Some(7), segment_size: Some(SegmentSize::DEFAULT) };

    fn header() -> LongPageHeader {
        LongPageHeader {
            magic: 0xD110,
            timeline: Timeline(2),
            page_address: Lsn(0x2_4200_0000),
            system_identifier: 7,
            segment_size: SegmentSize::DEFAULT,
            page_bytes: 8192,
        }
    }

    fn check(header: LongPageHeader, name: &str) -> Result<(), BadHeader> {
        let WalName::Segment(name) = WalName::parse(name).unwrap() else { panic!("{name}") };
        LongPageHeader::parse(&header.to_bytes())?.check(name, &CLUSTER)
    }

    #[test]
    fn the_right_header_passes_on_its_own_and_on_a_later_timeline() {
        assert_eq!(check(header(), "000000020000000200000042"), Ok(()));
        assert_eq!(check(header(), "000000030000000200000042"), Ok(()));
    }

    #[test]
    fn every_wrong_field_is_named() {
        use BadHeader as Bad;
        let name = "000000020000000200000042";
        let with = |change: fn(&mut LongPageHeader)| {
            let mut header = header();
            change(&mut header);
            header
        };
        assert_eq!(check(header(), "000000010000000200000042"), Err(Bad::Timeline { found: Timeline(2) }));
        assert_eq!(check(header(), "000000020000000200000043"), Err(Bad::PageAddress { found: Lsn(0x2_4200_0000) }));
        assert_eq!(check(with(|h| h.magic = 0xD113), name), Err(Bad::Magic { found: 0xD113 }));
        assert_eq!(check(with(|h| h.magic = 0x8B1F), name), Err(Bad::Magic { found: 0x8B1F }));
        let foreign = with(|h| h.system_identifier = 8);
        assert_eq!(check(foreign, name), Err(Bad::SystemIdentifier { found: 8, expected: 7 }));
        let small = with(|h| h.segment_size = SegmentSize::new(1 << 20).unwrap());
        assert_eq!(check(small, name), Err(Bad::SegmentSize { found: 1 << 20 }));
    }

    #[test]
    fn junk_is_no_header() {
        assert_eq!(LongPageHeader::parse(&[]), Err(BadHeader::Short));
        assert_eq!(LongPageHeader::parse(&[0; 40]), Err(BadHeader::Magic { found: 0 }));
        let mut bytes = header().to_bytes();
        bytes[2] = 0;
        assert_eq!(LongPageHeader::parse(&bytes), Err(BadHeader::NotFirstPage));
        let mut bytes = header().to_bytes();
        bytes[32..36].copy_from_slice(&5_u32.to_ne_bytes());
        assert_eq!(LongPageHeader::parse(&bytes), Err(BadHeader::SegmentSize { found: 5 }));
    }
}
