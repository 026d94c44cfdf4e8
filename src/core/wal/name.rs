//! Names of the files PostgreSQL archives: segments, partial segments, backup labels, timeline histories.

use super::position::{Lsn, SegmentSize, Timeline};
use std::cmp::Ordering;
use std::fmt;

/// What a WAL file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A whole segment: 24 hexadecimal digits.
    Segment,
    /// The last segment of a timeline that ended inside it: `<segment>.partial`.
    Partial,
    /// A backup's label: `<segment>.<offset>.backup`.
    Backup,
    /// The history of a timeline: `<timeline>.history`.
    History,
}

impl Kind {
    /// The word shown to users.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Segment => "segment",
            Kind::Partial => "partial",
            Kind::Backup => "backup label",
            Kind::History => "history",
        }
    }
}

/// The name of a segment: timeline, log id and segment number within it, eight digits each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline it is filed under.
    pub timeline: Timeline,
    log: u32,
    segment: u32,
}

impl SegmentName {
    /// What pg_receivewal goes on behind where it finds several: the position first, then the timeline (PostgreSQL,
    /// pg_receivewal.c, `FindStreamingStart`).
    pub fn streaming_order(self) -> (u32, u32, Timeline) {
        (self.log, self.segment, self.timeline)
    }

    /// The segment of `timeline` that holds `lsn`.
    pub fn containing(timeline: Timeline, lsn: Lsn, size: SegmentSize) -> Self {
        let number = lsn.0 / size.bytes();
        let per_log = u64::from(size.segments_per_log());
        SegmentName { timeline, log: (number / per_log) as u32, segment: (number % per_log) as u32 }
    }

    /// The position of its first byte, or nothing where no segment of this size has this name.
    pub fn start(self, size: SegmentSize) -> Option<Lsn> {
        (self.segment < size.segments_per_log())
            .then(|| Lsn((u64::from(self.log) << 32) + u64::from(self.segment) * size.bytes()))
    }

    /// The segment after it on the same timeline; nothing at the very end of the number space.
    pub fn next(self, size: SegmentSize) -> Option<Self> {
        match self.segment.checked_add(1)? {
            segment if segment < size.segments_per_log() => Some(SegmentName { segment, ..self }),
            _ => Some(SegmentName { log: self.log.checked_add(1)?, segment: 0, ..self }),
        }
    }

    /// How many segments of that size lie before it in the WAL, or nothing where no segment of this size has this name.
    pub fn number(self, size: SegmentSize) -> Option<u64> {
        self.start(size).map(|start| start.0 / size.bytes())
    }

    /// The segment of `timeline` before which so many lie.
    pub fn numbered(timeline: Timeline, number: u64, size: SegmentSize) -> Self {
        SegmentName::containing(timeline, Lsn(number.saturating_mul(size.bytes())), size)
    }

    /// The same stretch of WAL on another timeline: where a promotion goes on.
    pub fn on_timeline(self, timeline: Timeline) -> Self {
        SegmentName { timeline, ..self }
    }

    /// The directory that Barman files it under: timeline and log id, 16 digits.
    pub fn hash_directory(self) -> String {
        format!("{:08X}{:08X}", self.timeline.0, self.log)
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.log, self.segment)
    }
}

/// The name of any file that PostgreSQL archives. Read case-insensitively, always written in upper case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WalName {
    /// `000000010000000200000042`
    Segment(SegmentName),
    /// `000000010000000200000042.partial`
    Partial(SegmentName),
    /// `000000010000000200000042.00000028.backup`: the label of the backup that starts at that offset.
    Backup(SegmentName, u32),
    /// `00000002.history`
    History(Timeline),
}

/// A text that is no WAL file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadName(String);

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\" is not the name of a WAL file", self.0)
    }
}

impl std::error::Error for BadName {}

fn hex8(digits: &str) -> Option<u32> {
    // from_str_radix alone would take a sign.
    let hex = digits.len() == 8 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

fn parse_segment(digits: &str) -> Option<SegmentName> {
    if digits.len() != 24 || !digits.is_ascii() {
        return None;
    }
    Some(SegmentName {
        timeline: Timeline(hex8(&digits[..8])?),
        log: hex8(&digits[8..16])?,
        segment: hex8(&digits[16..])?,
    })
}

impl WalName {
    /// Reads a bare file name (no directory).
    pub fn parse(name: &str) -> Result<Self, BadName> {
        Self::parse_parts(name).ok_or_else(|| BadName(name.chars().take(80).collect()))
    }

    fn parse_parts(name: &str) -> Option<Self> {
        let Some((stem, rest)) = name.split_once('.') else {
            return parse_segment(name).map(WalName::Segment);
        };
        match rest {
            "history" => hex8(stem).map(|timeline| WalName::History(Timeline(timeline))),
            "partial" => parse_segment(stem).map(WalName::Partial),
            _ => {
                let offset = hex8(rest.strip_suffix(".backup")?)?;
                parse_segment(stem).map(|segment| WalName::Backup(segment, offset))
            }
        }
    }

    /// What kind of file it names.
    pub fn kind(&self) -> Kind {
        match self {
            WalName::Segment(_) => Kind::Segment,
            WalName::Partial(_) => Kind::Partial,
            WalName::Backup(..) => Kind::Backup,
            WalName::History(_) => Kind::History,
        }
    }

    /// The segment it is, or belongs to; nothing for a history file.
    pub fn segment(&self) -> Option<SegmentName> {
        match self {
            WalName::Segment(segment) | WalName::Partial(segment) | WalName::Backup(segment, _) => Some(*segment),
            WalName::History(_) => None,
        }
    }

    /// Whether it is a stretch of WAL itself (whole or partial) and so starts with a long page header.
    pub fn is_wal(&self) -> bool {
        matches!(self, WalName::Segment(_) | WalName::Partial(_))
    }

    /// The timeline in the name.
    pub fn timeline(&self) -> Timeline {
        match self {
            WalName::History(timeline) => *timeline,
            _ => self.segment().map_or(Timeline(0), |segment| segment.timeline),
        }
    }

    /// The directory below `wals/` it is filed under, as Barman does; empty for a history file.
    pub fn hash_directory(&self) -> String {
        self.segment().map(SegmentName::hash_directory).unwrap_or_default()
    }
}

/// The order in which PostgreSQL offers files: history files first, then by name (pgarch.c, `ready_file_comparator`).
impl Ord for WalName {
    fn cmp(&self, other: &Self) -> Ordering {
        // Upper-case hexadecimal digits of one width sort as their numbers do, and '.' sorts before all of them.
        let key = |name: &WalName| {
            let suffix = match name {
                WalName::History(_) | WalName::Segment(_) => (0, 0),
                WalName::Backup(_, offset) => (1, *offset),
                WalName::Partial(_) => (2, 0),
            };
            (name.segment().is_some(), name.timeline(), name.segment(), suffix)
        };
        key(self).cmp(&key(other))
    }
}

impl PartialOrd for WalName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for WalName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WalName::Segment(segment) => write!(f, "{segment}"),
            WalName::Partial(segment) => write!(f, "{segment}.partial"),
            WalName::Backup(segment, offset) => write!(f, "{segment}.{offset:08X}.backup"),
            WalName::History(timeline) => write!(f, "{:08X}.history", timeline.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> WalName {
        WalName::parse(text).expect(text)
    }

    fn segment(text: &str) -> SegmentName {
        name(text).segment().expect(text)
    }

    #[test]
    fn reads_every_kind_of_name_and_writes_it_in_upper_case() {
        for (text, kind, directory) in [
            ("000000010000000200000042", Kind::Segment, "0000000100000002"),
            ("000000010000000200000042.partial", Kind::Partial, "0000000100000002"),
            ("000000010000000200000042.00000028.backup", Kind::Backup, "0000000100000002"),
            ("0000000a.history", Kind::History, ""),
            ("00000001000000ab000000ff", Kind::Segment, "00000001000000AB"),
        ] {
            let parsed = name(text);
            assert_eq!(parsed.kind(), kind);
            assert_eq!(parsed.hash_directory(), directory);
            let (stem, suffix) = text.split_once('.').map_or((text, String::new()), |(a, b)| (a, format!(".{b}")));
            assert_eq!(parsed.to_string(), format!("{}{suffix}", stem.to_uppercase()));
        }
    }

    #[test]
    fn refuses_what_is_no_wal_name() {
        for text in [
            "",
            "0000000100000002000000",
            "0000000100000002000000421",
            "00000001000000020000004G",
            "+00000010000000200000042",
            "000000010000000200000042.",
            "000000010000000200000042.gz",
            "000000010000000200000042.partial.gz",
            "000000010000000200000042.0000028.backup",
            "000000010000000200000042.+0000028.backup",
            "0000002.history",
            "00000002.HISTORY",
            "archive_status",
            "../00000001000000020000",
            "0000000100000002000000é",
        ] {
            assert!(WalName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_next_name_crosses_a_log_boundary_at_every_segment_size() {
        let next = |text: &str, bytes| segment(text).next(SegmentSize::new(bytes).unwrap()).unwrap().to_string();
        assert_eq!(next("0000000100000002000000FE", 16 << 20), "0000000100000002000000FF");
        assert_eq!(next("0000000100000002000000FF", 16 << 20), "000000010000000300000000");
        assert_eq!(next("000000010000000200000FFF", 1 << 20), "000000010000000300000000");
        assert_eq!(next("000000010000000200000FFE", 1 << 20), "000000010000000200000FFF");
        assert_eq!(next("000000010000000200000003", 1 << 30), "000000010000000300000000");
        assert_eq!(segment("00000001FFFFFFFF000000FF").next(SegmentSize::DEFAULT), None);
        assert_eq!(segment("0000000100000000FFFFFFFF").next(SegmentSize::DEFAULT), None);
    }

    #[test]
    fn a_promotion_goes_on_with_the_same_stretch_on_another_timeline() {
        let promoted = segment("000000010000000200000042").on_timeline(Timeline(2));
        assert_eq!(promoted.to_string(), "000000020000000200000042");
    }

    #[test]
    fn a_name_that_no_segment_of_that_size_has_starts_nowhere() {
        assert_eq!(segment("000000010000000200000100").start(SegmentSize::DEFAULT), None);
        assert_eq!(segment("000000010000000200000001").start(SegmentSize::DEFAULT), Some(Lsn(0x2_0100_0000)));
    }

    #[test]
    fn names_sort_as_postgresql_offers_them() {
        let mut names: Vec<WalName> = [
            "000000020000000000000004",
            "000000010000000000000004.partial",
            "000000010000000000000003.00000028.backup",
            "000000010000000000000004",
            "00000003.history",
            "000000010000000000000003",
            "00000002.history",
        ]
        .map(name)
        .to_vec();
        names.sort();
        let sorted: Vec<String> = names.iter().map(ToString::to_string).collect();
        assert_eq!(
            sorted,
            [
                "00000002.history",
                "00000003.history",
                "000000010000000000000003",
                "000000010000000000000003.00000028.backup",
                "000000010000000000000004",
                "000000010000000000000004.partial",
                "000000020000000000000004",
            ]
        );
    }

    fn any_name() -> impl Strategy<Value = WalName> {
        let segment = (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(tli, log, segment)| SegmentName {
            timeline: Timeline(tli),
            log,
            segment,
        });
        prop_oneof![
            segment.clone().prop_map(WalName::Segment),
            segment.clone().prop_map(WalName::Partial),
            (segment, any::<u32>()).prop_map(|(segment, offset)| WalName::Backup(segment, offset)),
            any::<u32>().prop_map(|tli| WalName::History(Timeline(tli))),
        ]
    }

    proptest! {
        #[test]
        fn every_name_reads_back_and_sorts_as_its_text_does(a in any_name(), b in any_name()) {
            prop_assert_eq!(WalName::parse(&a.to_string()), Ok(a));
            let history_first = |name: &WalName| (name.kind() != Kind::History, name.to_string());
            prop_assert_eq!(a.cmp(&b), history_first(&a).cmp(&history_first(&b)));
        }

        #[test]
        fn every_position_lies_in_the_segment_named_for_it(tli in 1u32.., lsn: u64, shift in 20u32..=30) {
            let size = SegmentSize::new(1 << shift).unwrap();
            let found = SegmentName::containing(Timeline(tli), Lsn(lsn), size);
            let start = found.start(size).unwrap();
            prop_assert!(start.0 <= lsn && lsn - start.0 < size.bytes());
            prop_assert_eq!(WalName::parse(&found.to_string()), Ok(WalName::Segment(found)));
            let number = found.number(size).unwrap();
            prop_assert_eq!(SegmentName::numbered(Timeline(tli), number, size), found);
            if let Some(next) = found.next(size) {
                prop_assert_eq!(next.number(size), Some(number + 1));
                prop_assert_eq!(next.start(size).unwrap().0, start.0 + size.bytes());
                prop_assert!(WalName::Segment(found) < WalName::Segment(next));
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,50}") {
            let _ = WalName::parse(&text);
        }
    }
}
