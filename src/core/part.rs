//! Parts of segments: what was received so far of the one that is being received, kept outside the archived files.

use crate::hash::Hash;
use crate::wal::{LongPageHeader, SegmentName, WalName};
use std::fmt;
use std::io::{self, Read};

/// The first bytes of a segment; the rest is yet to be received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    /// The segment.
    pub segment: SegmentName,
    /// How many bytes of it.
    pub bytes: u64,
}

impl Part {
    /// Reads a name as it is displayed: the segment's, a dot and the number of bytes, without leading zeros.
    pub fn parse(name: &str) -> Option<Self> {
        let (segment, bytes) = name.split_once('.')?;
        let WalName::Segment(segment) = WalName::parse(segment).ok()? else { return None };
        let part = Part { segment, bytes: bytes.parse().ok()? };
        (part.to_string() == name).then_some(part)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.segment, self.bytes)
    }
}

/// How much there is of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// How many bytes; 0 where not even a page header is there.
    pub bytes: u64,
    /// Where the last page begins.
    pub last_page: u64,
}

/// How many bytes of a segment there are in what `segment` reads, as [`extent`] tells it.
pub fn received_bytes(segment: impl Read) -> io::Result<u64> {
    extent(segment).map(|extent| extent.bytes)
}

/// How much of a segment there is in what `segment` reads: up to the last byte that is none of zero, on the last of the pages
/// from the first that are each where they belong. A file that WAL is received into is filled with zeros first (receivelog.c,
/// `open_walfile`); one that a server's timeline ended in may hold, behind that end, the rest of a page, and pages, of the older
/// segment that it was; and a crash of the machine may leave holes.
pub fn extent(mut segment: impl Read) -> io::Result<Extent> {
    let mut page = vec![0; LongPageHeader::LENGTH];
    if fill(&mut segment, &mut page)? < page.len() {
        return Ok(Extent::default());
    }
    let Ok(header) = LongPageHeader::parse(&page) else { return Ok(Extent::default()) };
    let page_bytes = header.page_bytes.clamp(1 << 10, 64 << 10) as usize;
    page.resize(page_bytes, 0);
    let (mut start, mut found, mut filled) = (0_u64, Extent::default(), LongPageHeader::LENGTH);
    while start < header.segment_size.bytes() {
        let count = filled + fill(&mut segment, &mut page[filled..])?;
        let address = header.page_address.0 + start;
        // Every page begins with a magic, and tells its address in the second eight bytes (`XLogPageHeaderData`).
        let is_there = count >= 16 && page[..2] != [0, 0] && page[8..16] == address.to_ne_bytes();
        let last = page[..count].iter().rposition(|&byte| byte != 0);
        let Some(last) = last.filter(|_| is_there) else { break };
        found = Extent { bytes: start + last as u64 + 1, last_page: start };
        (start, filled) = (start + page_bytes as u64, 0);
        if count < page_bytes {
            break;
        }
    }
    Ok(found)
}

/// The hash of the first `bytes` bytes; nothing where there are fewer.
pub fn hash_of_first(reader: impl Read, bytes: u64) -> io::Result<Option<Hash>> {
    let mut hasher = blake3::Hasher::new();
    let count = io::copy(&mut reader.take(bytes), &mut hasher)?;
    Ok((count == bytes).then(|| Hash(hasher.finalize())))
}

/// Reads until `buffer` is full, or there is no more.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{Lsn, SegmentSize, Timeline};

    #[test]
    fn a_name_reads_back_and_nothing_else_is_one() {
        let name = "00000001000000000000002A.123456";
        assert_eq!(Part::parse(name).unwrap().to_string(), name);
        for other in [
            "00000001000000000000002A",
            "00000001000000000000002A.",
            "00000001000000000000002A.partial",
            "00000001000000000000002A.0123",
            "00000001000000000000002A.+1",
            "00000001000000000000002A.00000028.backup",
            "00000002.1",
        ] {
            assert_eq!(Part::parse(other), None, "{other}");
        }
    }

    /// A segment of 1 MB of which so many pages were received, and so much of the next.
    fn segment(page_bytes: u32, pages: usize, more: usize) -> Vec<u8> {
        let header = LongPageHeader {
            magic: 0xD110,
            timeline: Timeline(1),
            page_address: Lsn(1 << 20),
            system_identifier: 7,
            segment_size: SegmentSize::new(1 << 20).unwrap(),
            page_bytes,
        };
        let mut bytes = vec![0; 1 << 20];
        let all = pages * page_bytes as usize + more;
        bytes[..all].fill(0xEE);
        for (number, page) in bytes[..all].chunks_mut(page_bytes as usize).enumerate() {
            let page_address = Lsn(header.page_address.0 + (number * page_bytes as usize) as u64);
            let header = LongPageHeader { page_address, ..header }.to_bytes();
            let count = page.len().min(header.len());
            page[..count].copy_from_slice(&header[..count]);
        }
        bytes
    }

    fn received(bytes: &[u8]) -> u64 {
        received_bytes(bytes).unwrap()
    }

    #[test]
    fn what_was_received_ends_with_the_last_byte_that_is_not_zero() {
        for page_bytes in [8192, 65536] {
            assert_eq!(received(&segment(page_bytes, 0, 0)), 0);
            for pages in [0, 1, 2, 7, 15] {
                for more in [100, 1000] {
                    let bytes = segment(page_bytes, pages, more);
                    assert_eq!(received(&bytes), (pages * page_bytes as usize + more) as u64);
                    assert_eq!(
                        received(&bytes[..pages * page_bytes as usize + 90]),
                        (pages * page_bytes as usize + 90) as u64
                    );
                }
            }
        }
        assert_eq!(received(&segment(8192, 128, 0)), 1 << 20);
        assert_eq!((received(b""), received(&[0; 100]), received(&[7; 100])), (0, 0, 0));
    }

    #[test]
    fn what_lies_behind_a_hole_or_is_another_segments_does_not_count() {
        let mut holed = segment(8192, 100, 0);
        holed[50 * 8192..60 * 8192].fill(0);
        assert_eq!(received(&holed), 50 * 8192);
        let mut recycled = segment(8192, 100, 0);
        recycled[30 * 8192 + 10] ^= 1;
        assert_eq!(received(&recycled), 30 * 8192);
    }
}
