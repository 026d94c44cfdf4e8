//! Parts of segments: what was received so far of the one that is being received, kept outside the archived files.

use crate::wal::{LongPageHeader, SegmentName, WalName};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

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

/// How many bytes of a segment were received into `file`, which pg_receivewal fills with zeros first and then from its
/// beginning to its end (receivelog.c, `open_walfile`): up to the last byte that is none. Every page begins with a magic that
/// is never 0, so the pages that were received are found by halving. 0 where not even a page header was.
pub fn received_bytes(file: &File) -> io::Result<u64> {
    let mut head = [0; LongPageHeader::LENGTH];
    if read_at(file, 0, &mut head)? < head.len() {
        return Ok(0);
    }
    let Ok(header) = LongPageHeader::parse(&head) else { return Ok(0) };
    let page_bytes = u64::from(header.page_bytes.clamp(1 << 10, 64 << 10));
    let length = file.metadata()?.len().min(header.segment_size.bytes());
    // How many pages were received: at least `low`, and no more than `high`.
    let (mut low, mut high) = (0, length.div_ceil(page_bytes));
    let mut page = vec![0; page_bytes as usize];
    let mut last_byte = |number: u64| -> io::Result<Option<u64>> {
        let count = read_at(file, number * page_bytes, &mut page)?;
        Ok(page[..count].iter().rposition(|&byte| byte != 0).map(|last| last as u64 + 1))
    };
    while low < high {
        let middle = low + (high - low) / 2;
        match last_byte(middle)? {
            Some(_) => low = middle + 1,
            None => high = middle,
        }
    }
    let Some(last) = low.checked_sub(1) else { return Ok(0) };
    Ok(last_byte(last)?.map_or(0, |end| last * page_bytes + end))
}

/// Fills `buffer` from there on, as far as the file reaches.
fn read_at(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut read = 0;
    while read < buffer.len() {
        match file.read_at(&mut buffer[read..], offset + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{Lsn, SegmentSize, Timeline};
    use std::fs;

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

    #[test]
    fn what_was_received_ends_with_the_last_byte_that_is_not_zero() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("segment");
        let received = |page_bytes: u32, pages: usize, more: &[u8]| {
            let header = LongPageHeader {
                magic: 0xD110,
                timeline: Timeline(1),
                page_address: Lsn(1 << 20),
                system_identifier: 7,
                segment_size: SegmentSize::new(1 << 20).unwrap(),
                page_bytes,
            };
            let mut bytes = vec![0; 1 << 20];
            for page in 0..pages {
                bytes[page * page_bytes as usize] = 0x10;
            }
            if pages > 0 {
                bytes[..LongPageHeader::LENGTH].copy_from_slice(&header.to_bytes());
            }
            let end = pages * page_bytes as usize;
            bytes[end..end + more.len()].copy_from_slice(more);
            fs::write(&path, &bytes).unwrap();
            received_bytes(&File::open(&path).unwrap()).unwrap()
        };
        for page_bytes in [8192, 65536] {
            let page = u64::from(page_bytes);
            assert_eq!(received(page_bytes, 0, &[]), 0);
            for pages in [2, 3, 7, 15] {
                assert_eq!(received(page_bytes, pages, &[]), (pages as u64 - 1) * page + 1, "{pages}");
                assert_eq!(received(page_bytes, pages, &[1, 0, 0, 4, 0]), pages as u64 * page + 4, "{pages}");
            }
        }
        assert_eq!(received(8192, 128, &[]), 127 * 8192 + 1);
        fs::write(&path, b"").unwrap();
        assert_eq!(received_bytes(&File::open(&path).unwrap()).unwrap(), 0);
    }
}
