//! Which segments an archive lacks between those that it holds.
//!
//! What is not there at the end of a timeline is not missing: it may be on its way. Nor is what lies before everything
//! that is there: it was deleted. But where older WAL that leads to a timeline is there, the timeline must begin where it
//! left the one it comes from, and that one must reach so far. Beyond that, local storage lacks whatever its own records
//! name.

use crate::error::{Error, Kind, Result};
use crate::lineage::Lineage;
use crate::listing::{Range, each_name};
use crate::place::Place;
use crate::pulse::Pulse;
use crate::wal::{SegmentName, SegmentSize, Timeline, WalName};
use std::collections::{BTreeMap, BTreeSet};
use std::ops;

/// Files that are missing one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The timeline they belong to.
    pub timeline: Timeline,
    /// The first of them.
    pub first: WalName,
    /// The last of them.
    pub last: WalName,
    /// How many segments they are; 0 for a single file of another kind.
    pub segments: u64,
}

/// What was found out about an archive.
#[derive(Clone, Debug, Default)]
pub struct Findings {
    /// By timeline; segments before other files.
    pub gaps: Vec<Gap>,
    /// What could not be taken into account: history files that cannot be read as such, names that no segment has.
    pub doubts: Vec<Error>,
}

impl Findings {
    /// Whether the archive was understood, and nothing is missing.
    pub fn is_whole(&self) -> bool {
        self.gaps.is_empty() && self.doubts.is_empty()
    }
}

/// Looks for gaps. `segment_size` is the cluster's where it is known, else the archive's own segments tell.
///
/// Fails as [`Place::confirm_archive`] does: no archive is no whole one.
pub fn find(
    place: &Place,
    system_identifier: Option<u64>,
    segment_size: Option<SegmentSize>,
    pulse: &Pulse,
) -> Result<Findings> {
    place.confirm_archive(system_identifier)?;
    let (lineage, broken) = Lineage::read(place, pulse)?;
    // Before the listing: what is recorded later was stored later.
    let recorded = recorded(place)?;
    let mut stored = BTreeSet::new();
    let mut samples = Vec::new();
    each_name(place, &Range::default(), |name, listed| {
        pulse.go_on()?;
        if name.is_wal() && samples.len() < MOST_SAMPLES {
            samples.push((name, listed.key));
        }
        stored.insert(name);
        Ok(())
    })?;
    let mut lost: BTreeSet<WalName> = recorded.difference(&stored).copied().collect();
    if !lost.is_empty() {
        // Deleted meanwhile, and no longer recorded: not lost.
        let recorded = self::recorded(place)?;
        lost.retain(|name| recorded.contains(name));
    }
    let mut findings = Findings { gaps: Vec::new(), doubts: broken.into_iter().map(|(_, error)| error).collect() };
    if stored.iter().chain(&lost).any(WalName::is_wal) {
        let size = match segment_size {
            Some(size) => size,
            None => segment_size_of(place, &samples, &lost)?,
        };
        let mut holdings = Holdings::default();
        let of_wal = |names: &BTreeSet<WalName>| names.iter().copied().filter(WalName::is_wal).collect::<Vec<_>>();
        for name in of_wal(&stored).into_iter().chain(of_wal(&lost)) {
            if !holdings.add(&name, size, stored.contains(&name)) {
                findings.doubts.push(odd_name(place, &name, size));
            }
        }
        holdings.add_lineage(&lineage, size);
        findings.gaps = holdings.gaps(size);
    }
    let other_files = lost.iter().filter(|name| !matches!(name, WalName::Segment(_)));
    findings.gaps.extend(other_files.map(|&name| Gap {
        timeline: name.timeline(),
        first: name,
        last: name,
        segments: 0,
    }));
    findings.gaps.sort_by_key(|gap| (gap.timeline, gap.segments == 0, gap.first));
    Ok(findings)
}

fn recorded(place: &Place) -> Result<BTreeSet<WalName>> {
    place.records.as_ref().map_or(Ok(BTreeSet::new()), |records| records.names(&place.layout))
}

/// More damaged segments than this are no archive to tell anything by.
const MOST_SAMPLES: usize = 64;

/// The size of the archive's segments, as one of `samples` tells it, or what is noted of one that is lost.
fn segment_size_of(place: &Place, samples: &[(WalName, String)], lost: &BTreeSet<WalName>) -> Result<SegmentSize> {
    for (name, key) in samples {
        if let Some(size) = place.size_of_segment(name, key)? {
            return Ok(size);
        }
    }
    if let Some(records) = &place.records {
        for name in lost.iter().filter(|name| name.is_wal()).take(MOST_SAMPLES) {
            let sum = records.find_sum(&place.layout, name)?;
            if let Some(size) = sum.and_then(|sum| SegmentSize::new(sum.noted.size)) {
                return Ok(size);
            }
        }
    }
    let location = place.location();
    let message = format!("could not tell the size of the segments in the archive at \"{location}\"");
    Err(Error::new(Kind::Damaged, location, message)
        .detail("None of its first segments can be read, and no data directory tells.")
        .hint("Name the data directory with -D."))
}

fn odd_name(place: &Place, name: &WalName, size: SegmentSize) -> Error {
    let location = place.wal_location(name);
    let message = format!("\"{location}\" is not called as a segment of {}MB is", size.bytes() >> 20);
    Error::new(Kind::Damaged, location, message)
}

/// Segments by number: how many of their size lie before each in the WAL.
#[derive(Debug, Default)]
struct Holdings {
    timelines: BTreeMap<Timeline, Held>,
}

/// What is known of one timeline.
#[derive(Debug, Default)]
struct Held {
    whole: BTreeSet<u64>,
    partial: BTreeSet<u64>,
    lost: BTreeSet<u64>,
    /// The timeline it comes from, and the first segment that is its own.
    departure: Option<(Timeline, u64)>,
    /// The first segments of the timelines that come from it.
    children: BTreeSet<u64>,
}

impl Held {
    fn first(&self) -> Option<u64> {
        self.whole.first().into_iter().chain(self.partial.first()).min().copied()
    }

    /// The segment before which all must be there.
    fn end(&self) -> u64 {
        // A partial segment shows how far its timeline came, and is not asked to be whole.
        let ends =
            [self.whole.last().map(|last| last + 1), self.partial.last().copied(), self.children.last().copied()];
        ends.into_iter().flatten().max().unwrap_or(0)
    }

    /// The runs of numbers in `required` that are not there, and what is lost elsewhere; in order, none touching the next.
    fn missing(&self, required: ops::Range<u64>) -> Vec<ops::Range<u64>> {
        let mut runs = Vec::new();
        let mut next = required.start;
        if required.start < required.end {
            for &number in self.whole.range(required.clone()) {
                runs.push(next..number);
                next = number + 1;
            }
            runs.push(next..required.end);
        }
        runs.extend(self.lost.iter().map(|&number| number..number + 1));
        runs.retain(|run| run.start < run.end);
        runs.sort_by_key(|run| run.start);
        let mut joined: Vec<ops::Range<u64>> = Vec::new();
        for run in runs {
            match joined.last_mut().filter(|last| run.start <= last.end) {
                Some(last) => last.end = last.end.max(run.end),
                None => joined.push(run),
            }
        }
        joined
    }
}

impl Holdings {
    /// Takes note of a segment, whole or partial, that is stored or lost; answers whether one of that size has such a name.
    fn add(&mut self, name: &WalName, size: SegmentSize, is_stored: bool) -> bool {
        let Some(segment) = name.segment() else { return false };
        let Some(number) = segment.number(size) else { return false };
        let held = self.timelines.entry(segment.timeline).or_default();
        match (name, is_stored) {
            (WalName::Segment(_), true) => held.whole.insert(number),
            (WalName::Segment(_), false) => held.lost.insert(number),
            (_, true) => held.partial.insert(number),
            (_, false) => false,
        };
        true
    }

    fn add_lineage(&mut self, lineage: &Lineage, size: SegmentSize) {
        for (child, departure) in lineage.departures() {
            let number = departure.at.0 / size.bytes();
            self.timelines.entry(child).or_default().departure = Some((departure.parent, number));
            self.timelines.entry(departure.parent).or_default().children.insert(number);
        }
    }

    /// Whether WAL is there that leads to that timeline: some of one it comes from, up to where it left that.
    fn leads_to(&self, timeline: Timeline) -> bool {
        let mut held = self.timelines.get(&timeline);
        // It ends: a parent is always an earlier timeline.
        while let Some((parent, number)) = held.and_then(|held| held.departure) {
            held = self.timelines.get(&parent);
            if held.and_then(Held::first).is_some_and(|first| first <= number) {
                return true;
            }
        }
        false
    }

    /// The numbers of the segments that must be there.
    fn required(&self, timeline: Timeline, held: &Held) -> ops::Range<u64> {
        let begin = match held.departure {
            Some((_, number)) if self.leads_to(timeline) => Some(number),
            _ => held.first(),
        };
        begin.map_or(0..0, |begin| begin..held.end())
    }

    fn gaps(&self, size: SegmentSize) -> Vec<Gap> {
        let of_timeline = |(&timeline, held): (&Timeline, &Held)| {
            let named = move |number| WalName::Segment(SegmentName::numbered(timeline, number, size));
            let gap = move |run: ops::Range<u64>| Gap {
                timeline,
                first: named(run.start),
                last: named(run.end - 1),
                segments: run.end - run.start,
            };
            held.missing(self.required(timeline, held)).into_iter().map(gap).collect::<Vec<_>>()
        };
        self.timelines.iter().flat_map(of_timeline).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::History;

    fn megabytes(count: u64) -> SegmentSize {
        SegmentSize::new(count << 20).unwrap()
    }

    /// Gaps as `first..last: segments`, for what is stored, lost (`-` in front), and told by histories.
    fn gaps(size: SegmentSize, names: &[&str], histories: &[(u32, &str)]) -> Vec<String> {
        let mut holdings = Holdings::default();
        for text in names {
            let name = WalName::parse(text.trim_start_matches('-')).unwrap();
            assert!(holdings.add(&name, size, !text.starts_with('-')), "{text}");
        }
        let mut lineage = Lineage::default();
        for (timeline, text) in histories {
            let timeline = Timeline(*timeline);
            lineage.add(timeline, &History::parse(text.as_bytes(), timeline).unwrap());
        }
        holdings.add_lineage(&lineage, size);
        let shown = |gap: &Gap| {
            assert_eq!(gap.first.timeline(), gap.timeline);
            format!("{}..{}: {}", gap.first, gap.last, gap.segments)
        };
        holdings.gaps(size).iter().map(shown).collect()
    }

    #[test]
    fn neither_the_beginning_nor_the_end_of_a_timeline_is_a_gap() {
        let size = SegmentSize::DEFAULT;
        assert!(gaps(size, &[], &[]).is_empty());
        assert!(gaps(size, &["000000010000000300000007"], &[]).is_empty());
        assert!(gaps(size, &["0000000100000003000000FF", "000000010000000400000000"], &[]).is_empty());
    }

    #[test]
    fn gaps_are_counted_across_log_boundaries_at_every_segment_size() {
        for (megabyte, before, first, last, behind) in [
            (
                1,
                "000000010000000000000FFD",
                "000000010000000000000FFE",
                "000000010000000100000001",
                "000000010000000100000002",
            ),
            (
                16,
                "0000000100000000000000FD",
                "0000000100000000000000FE",
                "000000010000000100000001",
                "000000010000000100000002",
            ),
            (
                64,
                "00000001000000000000003D",
                "00000001000000000000003E",
                "000000010000000100000001",
                "000000010000000100000002",
            ),
            (
                1024,
                "000000010000000000000001",
                "000000010000000000000002",
                "000000010000000100000001",
                "000000010000000100000002",
            ),
        ] {
            let found = gaps(megabytes(megabyte), &[before, behind], &[]);
            assert_eq!(found, [format!("{first}..{last}: 4")], "{megabyte} MB");
            assert!(gaps(megabytes(megabyte), &[last, behind], &[]).is_empty(), "{megabyte} MB");
        }
    }

    #[test]
    fn a_gap_of_any_width_is_found_at_once() {
        let found = gaps(megabytes(1), &["000000010000000000000000", "00000001FFFFFFFF00000FFF"], &[]);
        assert_eq!(found, ["000000010000000000000001..00000001FFFFFFFF00000FFE: 17592186044414"]);
    }

    #[test]
    fn a_promotion_inside_a_segment_leaves_no_gap() {
        let stored = [
            "000000010000000000000003",
            "000000010000000000000004",
            "000000010000000000000005.partial",
            "000000020000000000000005",
            "000000020000000000000006",
        ];
        let history = [(2, "1\t0/5000028\tno recovery target specified\n")];
        assert!(gaps(SegmentSize::DEFAULT, &stored, &history).is_empty());
        // Also without the partial one, and where the promotion happened at the end of a segment.
        let at_boundary = [(2, "1\t0/5000000\tno recovery target specified\n")];
        let without = [&stored[..2], &stored[3..]].concat();
        assert!(gaps(SegmentSize::DEFAULT, &without, &history).is_empty());
        assert!(gaps(SegmentSize::DEFAULT, &without, &at_boundary).is_empty());
        // And where the old primary went on for a while.
        let went_on = [&stored[..], &["000000010000000000000005", "000000010000000000000006"]].concat();
        assert!(gaps(SegmentSize::DEFAULT, &went_on, &history).is_empty());
    }

    #[test]
    fn around_a_promotion_both_timelines_must_reach_it() {
        let history = [(2, "1\t0/5000028\tno recovery target specified\n")];
        let found = gaps(SegmentSize::DEFAULT, &["000000010000000000000002", "000000020000000000000007"], &history);
        assert_eq!(
            found,
            [
                "000000010000000000000003..000000010000000000000004: 2",
                "000000020000000000000005..000000020000000000000006: 2"
            ]
        );
        // The partial segment alone shows how far the timeline came.
        let found = gaps(SegmentSize::DEFAULT, &["000000010000000000000002", "000000010000000000000004.partial"], &[]);
        assert_eq!(found, ["000000010000000000000003..000000010000000000000003: 1"]);
        // A history without any WAL of its timeline: the promotion has just happened.
        assert!(gaps(SegmentSize::DEFAULT, &["000000010000000000000004"], &history).is_empty());
    }

    #[test]
    fn a_timeline_between_two_others_may_be_missing_as_a_whole() {
        let histories = [(3, "1\t0/3000028\n2\t0/6000028\n")];
        let found = gaps(SegmentSize::DEFAULT, &["000000010000000000000002", "000000030000000000000006"], &histories);
        assert_eq!(found, ["000000020000000000000003..000000020000000000000005: 3"]);
    }

    #[test]
    fn what_was_deleted_is_not_missing() {
        let histories = [(2, "1\t0/3000028\n"), (3, "1\t0/3000028\n2\t0/6000028\n")];
        let stored = ["000000020000000000000005", "000000030000000000000006"];
        assert!(gaps(SegmentSize::DEFAULT, &stored, &histories).is_empty());
        assert!(gaps(SegmentSize::DEFAULT, &["000000030000000000000009"], &histories).is_empty());
        // The old primary's later WAL is another branch's and leads nowhere.
        let other_branch = ["000000010000000000000004", "000000020000000000000005", "000000030000000000000006"];
        assert!(gaps(SegmentSize::DEFAULT, &other_branch, &histories).is_empty());
    }

    #[test]
    fn what_the_records_name_is_missing_at_the_ends_too() {
        let names = [
            "-000000010000000000000001",
            "-000000010000000000000002",
            "000000010000000000000003",
            "000000010000000000000005",
            "-000000010000000000000006",
            "-000000040000000000000001",
        ];
        let found = gaps(SegmentSize::DEFAULT, &names, &[]);
        assert_eq!(
            found,
            [
                "000000010000000000000001..000000010000000000000002: 2",
                "000000010000000000000004..000000010000000000000004: 1",
                "000000010000000000000006..000000010000000000000006: 1",
                "000000040000000000000001..000000040000000000000001: 1"
            ]
        );
    }

    #[test]
    fn a_name_that_no_segment_of_the_size_has_is_none() {
        let name = WalName::parse("000000010000000000000100").unwrap();
        assert!(!Holdings::default().add(&name, SegmentSize::DEFAULT, true));
        assert!(Holdings::default().add(&name, megabytes(1), true));
    }
}
