//! Every page of a segment: whether its header is the one that its place in the WAL calls for.
//!
//! Facts of PostgreSQL that this rests on:
//! - All pages of a complete segment are written, each under a header that tells its position; only the first has a long
//!   header (xlog_internal.h). Timelines never grow smaller from page to page (xlogreader.c, `XLogReaderValidatePageHeader`).
//! - A switch of segments leaves nothing but zeros on the pages behind its record, headers included (xlog.c,
//!   `CopyXLogRecordToWAL`): where a page is blank, so is the rest of the segment.
//! - The last segment of a timeline ends wherever the promotion happened. What lies behind that is blank, or, in the file
//!   of an older segment that was recycled, that one's pages at the same offsets.

use super::name::SegmentName;
use super::page::{ALL_FLAGS, BadHeader, Expected, LONG_HEADER, LongPageHeader};
use super::position::{Lsn, SegmentSize, Timeline};
use std::fmt;
use std::ops::RangeInclusive;

/// PostgreSQL's page sizes, `XLOG_BLCKSZ`, are the powers of two in this range (`./configure --with-wal-blocksize`).
const PAGE_BYTES: RangeInclusive<u64> = 1 << 10..=64 << 10;
/// `SizeOfXLogShortPHD`.
const SHORT_HEADER_BYTES: usize = 24;
/// `XLP_FIRST_IS_CONTRECORD`: set where `xlp_rem_len` is, and nowhere else (xlog.c, `CopyXLogRecordToWAL`).
const FIRST_IS_CONTRECORD: u16 = 0x0001;

/// A page that does not belong where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// Where it starts, or where its first byte that should be zero is.
    pub offset: u64,
    /// What is wrong with it.
    pub cause: BadPageCause,
}

/// What is wrong with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPageCause {
    /// The first page was written by another cluster.
    SystemIdentifier {
        /// The value found.
        found: u64,
        /// The value called for.
        expected: u64,
    },
    /// A page size that PostgreSQL does not know.
    PageSize(u32),
    /// Another magic than that of the first page.
    Magic(u16),
    /// Flags that PostgreSQL does not know, those of a segment's first page, or not those of its other fields.
    Flags(u16),
    /// The position of another page.
    Address(Lsn),
    /// An older timeline than that of the page before, or a later one than the segment's.
    Timeline(Timeline),
    /// Something on or behind a blank page.
    NotBlank,
}

impl fmt::Display for BadPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let offset = self.offset;
        match self.cause {
            BadPageCause::SystemIdentifier { found, expected } => {
                BadHeader::SystemIdentifier { found, expected }.fmt(f)
            }
            BadPageCause::PageSize(found) => write!(f, "its header says that pages are {found} bytes long"),
            BadPageCause::Magic(found) => write!(f, "the page at offset {offset} has the magic {found:04X}"),
            BadPageCause::Flags(found) => write!(f, "the page at offset {offset} has the flags {found:04X}"),
            BadPageCause::Address(found) => write!(f, "the page at offset {offset} says that it lies at {found}"),
            BadPageCause::Timeline(found) => write!(f, "the page at offset {offset} says timeline {found}"),
            BadPageCause::NotBlank => write!(f, "what follows the end of WAL in it is not blank at offset {offset}"),
        }
    }
}

/// Looks at the pages of one segment, which is handed to it piece by piece.
///
/// The first page is judged by [`LongPageHeader::check`] elsewhere: where it does not belong, nothing is found here.
pub struct Pages {
    name: SegmentName,
    /// Where its timeline ends; nothing where it may end anywhere.
    ends: Option<Vec<Lsn>>,
    offset: u64,
    head: Vec<u8>,
    frame: Option<Frame>,
    is_ended: bool,
    is_blank: bool,
    found: Option<BadPage>,
    is_elsewhere: bool,
}

/// What the first page says of all of them.
struct Frame {
    magic: u16,
    start: Lsn,
    page_bytes: u64,
    segment_size: SegmentSize,
    system_identifier: u64,
    /// Whether the timeline may end in it.
    ends_anywhere: bool,
    /// The timeline of the page before.
    timeline: Timeline,
}

/// A short page header.
struct PageHeader {
    magic: u16,
    info: u16,
    timeline: Timeline,
    address: Lsn,
    /// How many bytes of a record that began on an earlier page stand first on this one.
    remaining: u32,
}

impl PageHeader {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (magic, rest) = bytes.split_first_chunk()?;
        let (info, rest) = rest.split_first_chunk()?;
        let (timeline, rest) = rest.split_first_chunk()?;
        let (address, rest) = rest.split_first_chunk()?;
        let (remaining, _) = rest.split_first_chunk()?;
        Some(PageHeader {
            magic: u16::from_ne_bytes(*magic),
            info: u16::from_ne_bytes(*info),
            timeline: Timeline(u32::from_ne_bytes(*timeline)),
            address: Lsn(u64::from_ne_bytes(*address)),
            remaining: u32::from_ne_bytes(*remaining),
        })
    }

    /// Whether its flags are known, those of any page but the first, and at one with what it says of a record's rest.
    fn has_good_flags(&self) -> bool {
        let continues = self.info & FIRST_IS_CONTRECORD != 0;
        self.info & (LONG_HEADER | !ALL_FLAGS) == 0 && continues == (self.remaining > 0)
    }

    /// Why it is not the header of the page at `address`; nothing where it is.
    fn cause(&self, frame: &Frame, address: Lsn, last_timeline: Timeline) -> Option<BadPageCause> {
        if self.magic != frame.magic {
            Some(BadPageCause::Magic(self.magic))
        } else if !self.has_good_flags() {
            Some(BadPageCause::Flags(self.info))
        } else if self.address != address {
            Some(BadPageCause::Address(self.address))
        } else if !(frame.timeline..=last_timeline).contains(&self.timeline) {
            Some(BadPageCause::Timeline(self.timeline))
        } else {
            None
        }
    }

    /// Whether it is that of an older segment's page at the same place in the segment.
    fn is_of_recycled_segment(&self, frame: &Frame, address: Lsn) -> bool {
        self.magic == frame.magic
            && self.has_good_flags()
            && self.address < address
            && (address.0 - self.address.0).is_multiple_of(frame.segment_size.bytes())
    }
}

impl Pages {
    /// For the segment of that name, whose timeline was left at these `ends` by others: PostgreSQL may have ended to write
    /// it there, and reads no more of it than lies before.
    pub fn new(name: SegmentName, ends: Vec<Lsn>) -> Self {
        Self::ending(name, Some(ends))
    }

    /// For a partial segment: its timeline ended somewhere in it.
    pub fn of_partial(name: SegmentName) -> Self {
        Self::ending(name, None)
    }

    fn ending(name: SegmentName, ends: Option<Vec<Lsn>>) -> Self {
        Pages {
            name,
            ends,
            offset: 0,
            head: Vec::with_capacity(LongPageHeader::LENGTH),
            frame: None,
            is_ended: false,
            is_blank: false,
            found: None,
            is_elsewhere: false,
        }
    }

    /// Fails with what is wrong with the pages seen so far: the cluster, where it is known, or the first page that does
    /// not belong where it is.
    pub fn judge(&self, system_identifier: Option<u64>) -> Result<(), BadPage> {
        let found = self.frame.as_ref().map(|frame| frame.system_identifier);
        match (found, system_identifier) {
            (Some(found), Some(expected)) if found != expected => {
                Err(BadPage { offset: 0, cause: BadPageCause::SystemIdentifier { found, expected } })
            }
            _ => self.found.map_or(Ok(()), Err),
        }
    }

    /// Looks at the next bytes of the segment.
    pub fn look_at(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let page_bytes = self.frame.as_ref().map_or(*PAGE_BYTES.start(), |frame| frame.page_bytes);
            let at = self.offset % page_bytes;
            let most = usize::try_from(page_bytes - at).unwrap_or(usize::MAX).min(bytes.len());
            let (piece, rest) = bytes.split_at(most);
            if self.found.is_none() && !self.is_elsewhere {
                self.look_at_page(at as usize, piece);
            }
            self.offset += piece.len() as u64;
            bytes = rest;
        }
    }

    /// Looks at bytes of one page, which begin `at` bytes behind its start.
    fn look_at_page(&mut self, at: usize, piece: &[u8]) {
        let header_bytes = self.frame.as_ref().map_or(LongPageHeader::LENGTH, |_| SHORT_HEADER_BYTES);
        if at == 0 {
            self.head.clear();
            self.is_blank = false;
        }
        if at < header_bytes && self.head.len() < header_bytes {
            self.head.extend_from_slice(&piece[..piece.len().min(header_bytes - self.head.len())]);
            if self.head.len() == header_bytes {
                match self.frame {
                    None => self.begin(),
                    Some(_) => self.judge_page(self.offset - at as u64),
                }
            }
        }
        if self.is_blank
            && let Some(stain) = piece.iter().position(|byte| *byte != 0)
        {
            self.found = Some(BadPage { offset: self.offset + stain as u64, cause: BadPageCause::NotBlank });
        }
    }

    /// Takes from the first page what all others must agree with.
    fn begin(&mut self) {
        let header = LongPageHeader::parse(&self.head);
        let header = header.and_then(|header| header.check(self.name, &Expected::default()).map(|()| header));
        let Ok(header) = header else {
            self.is_elsewhere = true;
            return;
        };
        let start = header.page_address;
        let page_bytes = header.page_bytes;
        if !page_bytes.is_power_of_two() || !PAGE_BYTES.contains(&u64::from(page_bytes)) {
            self.found = Some(BadPage { offset: 0, cause: BadPageCause::PageSize(page_bytes) });
            return;
        }
        let segment = start.0..start.0 + header.segment_size.bytes();
        self.frame = Some(Frame {
            magic: header.magic,
            start,
            page_bytes: u64::from(page_bytes),
            segment_size: header.segment_size,
            system_identifier: header.system_identifier,
            ends_anywhere: self.ends.as_ref().is_none_or(|ends| ends.iter().any(|end| segment.contains(&end.0))),
            timeline: header.timeline,
        });
    }

    /// Judges the page at `offset`, whose header is complete.
    fn judge_page(&mut self, offset: u64) {
        let Some(frame) = &mut self.frame else { return };
        if self.head.iter().all(|byte| *byte == 0) {
            (self.is_ended, self.is_blank) = (true, true);
            return;
        }
        let address = Lsn(frame.start.0 + offset);
        let Some(header) = PageHeader::parse(&self.head) else { return };
        let bad = header.cause(frame, address, self.name.timeline);
        self.found = match bad {
            None if frame.ends_anywhere || !self.is_ended => {
                frame.timeline = header.timeline;
                None
            }
            None => Some(BadPage { offset, cause: BadPageCause::NotBlank }),
            Some(_) if frame.ends_anywhere && header.is_of_recycled_segment(frame, address) => {
                self.is_ended = true;
                None
            }
            Some(_) if self.is_ended && !frame.ends_anywhere => Some(BadPage { offset, cause: BadPageCause::NotBlank }),
            Some(cause) => Some(BadPage { offset, cause }),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::super::WalName;
    use super::*;

    const PAGE: usize = 8192;
    const PAGES: usize = 128;

    /// A segment of 1 MB on timeline 2, `0000000200000001000003A0`, every byte of its pages in use.
    struct Segment(Vec<u8>);

    impl Segment {
        const NAME: &str = "0000000200000001000003A0";
        const START: u64 = 0x1_3A00_0000;

        fn new() -> Self {
            let header = LongPageHeader {
                magic: 0xD110,
                timeline: Timeline(1),
                page_address: Lsn(Self::START),
                system_identifier: 7,
                segment_size: SegmentSize::new(1 << 20).unwrap(),
                page_bytes: PAGE as u32,
            };
            let mut segment = Segment(vec![0xAB; PAGE * PAGES]);
            segment.0[..LongPageHeader::LENGTH].copy_from_slice(&header.to_bytes());
            for page in 1..PAGES {
                segment.set(page, |_| ());
            }
            segment
        }

        /// Writes the header of a page, changed so.
        fn set(&mut self, page: usize, change: impl FnOnce(&mut PageHeader)) {
            let address = Lsn(Self::START + (page * PAGE) as u64);
            let mut header = PageHeader { magic: 0xD110, info: 5, timeline: Timeline(1), address, remaining: 99 };
            change(&mut header);
            let bytes = [
                &header.magic.to_ne_bytes()[..],
                &header.info.to_ne_bytes(),
                &header.timeline.0.to_ne_bytes(),
                &header.address.0.to_ne_bytes(),
                &header.remaining.to_ne_bytes(),
                &[0; 4],
            ];
            self.0[page * PAGE..page * PAGE + SHORT_HEADER_BYTES].copy_from_slice(&bytes.concat());
        }

        fn blank_from(&mut self, page: usize) {
            self.0[page * PAGE..].fill(0);
        }

        /// What is found, in pieces of any size.
        fn found(&self, ends_anywhere: bool) -> Option<BadPage> {
            let all: Vec<_> = [1, 23, 24, 25, 40, 1000, PAGE, PAGE + 7, 300_000, usize::MAX]
                .map(|piece| {
                    let name = WalName::parse(Self::NAME).unwrap().segment().unwrap();
                    let elsewhere = Lsn(Segment::START + (1 << 20));
                    let mut pages = match ends_anywhere {
                        true => Pages::of_partial(name),
                        false => Pages::new(name, vec![elsewhere]),
                    };
                    self.0.chunks(piece.min(self.0.len())).for_each(|piece| pages.look_at(piece));
                    pages.judge(Some(7)).err()
                })
                .to_vec();
            assert!(all.iter().all(|found| *found == all[0]), "{all:?}");
            all[0]
        }
    }

    fn with(page: usize, change: impl FnOnce(&mut PageHeader)) -> Segment {
        let mut segment = Segment::new();
        segment.set(page, change);
        segment
    }

    #[test]
    fn a_full_segment_passes_and_one_that_was_promoted_in() {
        assert_eq!(Segment::new().found(false), None);
        let mut promoted = Segment::new();
        (50..PAGES).for_each(|page| promoted.set(page, |header| header.timeline = Timeline(2)));
        assert_eq!(promoted.found(false), None);
    }

    #[test]
    fn every_wrong_field_is_named_with_its_offset() {
        use BadPageCause as Cause;
        let elsewhere = Lsn(Segment::START + (1 << 20));
        for (segment, cause) in [
            (with(9, |header| header.magic = 0xD113), Cause::Magic(0xD113)),
            (with(9, |header| header.info = 2), Cause::Flags(2)),
            (with(9, |header| header.info = 16), Cause::Flags(16)),
            (with(9, |header| header.info = 4), Cause::Flags(4)),
            (with(9, |header| header.remaining = 0), Cause::Flags(5)),
            (with(9, |header| header.address = elsewhere), Cause::Address(elsewhere)),
            (with(9, |header| header.timeline = Timeline(3)), Cause::Timeline(Timeline(3))),
            (with(9, |header| header.timeline = Timeline(0)), Cause::Timeline(Timeline(0))),
        ] {
            for ends_anywhere in [false, true] {
                assert_eq!(segment.found(ends_anywhere), Some(BadPage { offset: 9 * 8192, cause }));
            }
        }
        let mut backwards = Segment::new();
        backwards.set(9, |header| header.timeline = Timeline(2));
        assert_eq!(backwards.found(false), Some(BadPage { offset: 81_920, cause: Cause::Timeline(Timeline(1)) }));
        let mut odd = Segment::new();
        odd.0[36..40].copy_from_slice(&12_u32.to_ne_bytes());
        assert_eq!(odd.found(false), Some(BadPage { offset: 0, cause: Cause::PageSize(12) }));
    }

    #[test]
    fn behind_a_switch_everything_is_blank() {
        let mut switched = Segment::new();
        switched.blank_from(3);
        assert_eq!(switched.found(false), None);
        let mut stained = Segment::new();
        stained.blank_from(3);
        stained.0[5 * PAGE + 100] = 1;
        let stain = Some(BadPage { offset: 5 * 8192 + 100, cause: BadPageCause::NotBlank });
        assert_eq!(stained.found(false), stain);
        assert_eq!(stained.found(true), stain);
        let mut written = Segment::new();
        written.blank_from(3);
        written.set(7, |_| ());
        let page = Some(BadPage { offset: 7 * 8192, cause: BadPageCause::NotBlank });
        assert_eq!(written.found(false), page);
    }

    #[test]
    fn behind_the_end_of_a_timeline_lie_pages_of_a_recycled_segment() {
        let mut recycled = Segment::new();
        for page in 40..PAGES {
            recycled.set(page, |header| header.address = Lsn(header.address.0 - (30 << 20)));
        }
        recycled.blank_from(100);
        assert_eq!(recycled.found(true), None);
        assert!(matches!(recycled.found(false), Some(BadPage { offset: 0x5_0000, cause: BadPageCause::Address(_) })));
        for (address, page) in [(Segment::START + 41 * 8192 + 4096, 41), (Segment::START - (30 << 20), 41)] {
            let mut shifted = with(40, |header| header.address = Lsn(header.address.0 - (30 << 20)));
            shifted.set(page, |header| header.address = Lsn(address));
            assert_eq!(shifted.found(true).map(|bad| bad.offset), Some(41 * 8192));
        }
    }

    #[test]
    fn a_whole_segment_may_end_where_its_timeline_was_left() {
        let mut left = Segment::new();
        (40..PAGES).for_each(|page| left.set(page, |header| header.address = Lsn(header.address.0 - (30 << 20))));
        let name = WalName::parse(Segment::NAME).unwrap().segment().unwrap();
        for (end, is_good) in [(0, true), (5000, true), (-1, false), (1 << 20, false)] {
            let mut pages = Pages::new(name, vec![Lsn(Segment::START.wrapping_add_signed(end))]);
            pages.look_at(&left.0);
            assert_eq!(pages.judge(None).is_ok(), is_good, "left at offset {end}");
        }
    }

    #[test]
    fn another_clusters_segment_is_named_so() {
        let name = WalName::parse(Segment::NAME).unwrap().segment().unwrap();
        let mut pages = Pages::new(name, Vec::new());
        pages.look_at(&Segment::new().0);
        assert_eq!(pages.judge(None), Ok(()));
        let bad = pages.judge(Some(8)).unwrap_err().to_string();
        assert_eq!(bad, "it was written by the cluster with system identifier 7, not 8");
    }

    #[test]
    fn nothing_is_said_of_what_is_no_segment() {
        let name = WalName::parse(Segment::NAME).unwrap().segment().unwrap();
        let mut pages = Pages::new(name, Vec::new());
        pages.look_at(&[0; 100_000]);
        assert_eq!(pages.judge(Some(7)), Ok(()));
    }
}
