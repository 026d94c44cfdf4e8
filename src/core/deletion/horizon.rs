//! Which WAL files lie before a bound: position against position, along the bound's own history and nowhere else.
//! Pure: names in, verdicts out.

use crate::wal::{BadName, History, Lsn, SegmentName, SegmentSize, Timeline, WalName};
use std::fmt;

/// Why a text bounds nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadBound {
    /// It is no WAL file's name.
    Name(BadName),
    /// It names a history file, which has no place in the WAL.
    History(String),
    /// It is not two names with `..` between them.
    Range(String),
    /// The two lie on different timelines.
    Timelines(String),
    /// The first lies behind the second.
    Backwards(String),
}

impl fmt::Display for BadBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadBound::Name(bad) => bad.fmt(f),
            BadBound::History(name) => {
                write!(f, "\"{name}\" is a history file: only a segment, a partial one or a backup label bounds WAL")
            }
            BadBound::Range(text) => write!(f, "\"{text}\" is not a range of WAL files, which is written FROM..TO"),
            BadBound::Timelines(text) => write!(f, "the ends of the range \"{text}\" lie on different timelines"),
            BadBound::Backwards(text) => write!(f, "the first end of the range \"{text}\" lies behind the second"),
        }
    }
}

impl std::error::Error for BadBound {}

/// The segment before which WAL may go: `%r` of an archive_cleanup_command, or the start of the oldest backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound(SegmentName);

impl Bound {
    /// Reads the name of a segment, a partial one, or a backup label, which stands for the segment that its backup
    /// starts in.
    pub fn parse(name: &str) -> Result<Self, BadBound> {
        match WalName::parse(name).map_err(BadBound::Name)?.segment() {
            Some(segment) => Ok(Bound(segment)),
            None => Err(BadBound::History(name.to_string())),
        }
    }

    /// The timeline it lies on.
    pub fn timeline(&self) -> Timeline {
        self.0.timeline
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Segments of one timeline that stay, both ends included, with their labels and partial ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    from: SegmentName,
    to: SegmentName,
}

impl Keep {
    /// Reads `FROM..TO`; each end is what [`Bound::parse`] reads.
    pub fn parse(text: &str) -> Result<Self, BadBound> {
        let (from, to) = text.split_once("..").ok_or_else(|| BadBound::Range(text.to_string()))?;
        let (Bound(from), Bound(to)) = (Bound::parse(from)?, Bound::parse(to)?);
        if from.timeline != to.timeline {
            return Err(BadBound::Timelines(text.to_string()));
        }
        if from > to {
            return Err(BadBound::Backwards(text.to_string()));
        }
        Ok(Keep { from, to })
    }

    fn holds(&self, segment: SegmentName) -> bool {
        (self.from..=self.to).contains(&segment)
    }
}

/// How far WAL may go on one timeline: up to `beyond`, which stays itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// The first segment that stays.
    pub beyond: SegmentName,
}

impl Reach {
    /// The timeline it speaks of.
    pub fn timeline(&self) -> Timeline {
        self.beyond.timeline
    }

    fn holds(&self, segment: SegmentName) -> bool {
        segment.timeline == self.timeline() && segment < self.beyond
    }
}

/// The segment of an ancestor in which the bound's history leaves it: one part is that history, the rest another branch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The segment under the ancestor's name.
    pub segment: SegmentName,
    offset: u64,
}

impl Fork {
    /// Whether that file is the label of a backup which starts in the segment behind the switch point. Then the other
    /// branch has a backup that needs the segment.
    pub fn is_needed_by(&self, name: &WalName) -> bool {
        matches!(name, WalName::Backup(segment, offset)
            if *segment == self.segment && u64::from(*offset) >= self.offset)
    }
}

/// All that lies before a bound.
///
/// On the bound's own timeline that is every segment before it; on those it came from, what its history took from them
/// before it. What such a timeline holds behind the switch point is another branch's and stays, and so does every
/// timeline that the history does not name: siblings, descendants, strangers.
#[derive(Clone, Debug)]
pub struct Horizon {
    reaches: Vec<Reach>,
    forks: Vec<Fork>,
    keeps: Vec<Keep>,
    size: SegmentSize,
}

impl Horizon {
    /// What lies before `bound`, but for `keeps`, where segments have that size and the bound's timeline has that history.
    /// Nothing where no segment of that size has the bound's name.
    pub fn new(bound: Bound, size: SegmentSize, history: &History, keeps: &[Keep]) -> Option<Self> {
        let Bound(own) = bound;
        let start = own.start(size)?;
        let mut horizon = Horizon { reaches: Vec::new(), forks: Vec::new(), keeps: keeps.to_vec(), size };
        for ancestor in &history.ancestors {
            let same_place = own.on_timeline(ancestor.timeline);
            // A switch point at the very start of a segment takes nothing from that segment.
            let Some(last) = ancestor.end.0.checked_sub(1) else { continue };
            let switch = SegmentName::containing(ancestor.timeline, Lsn(last), size);
            let beyond = switch.next(size).unwrap_or(switch).min(same_place);
            horizon.reaches.push(Reach { beyond });
            let offset = ancestor.end.0 % size.bytes();
            if offset > 0 && ancestor.end < start && switch < same_place {
                horizon.forks.push(Fork { segment: switch, offset });
            }
        }
        horizon.reaches.push(Reach { beyond: own });
        Some(horizon)
    }

    /// The timelines on which something may go, the oldest first.
    pub fn reaches(&self) -> &[Reach] {
        &self.reaches
    }

    /// The segments that may belong to two branches.
    pub fn forks(&self) -> &[Fork] {
        &self.forks
    }

    /// Keeps a segment that the other branch needs.
    pub fn spare(&mut self, fork: &Fork) {
        let reaches = self.reaches.iter_mut().filter(|reach| reach.holds(fork.segment));
        reaches.for_each(|reach| reach.beyond = fork.segment);
    }

    /// Whether that file may go. A history file never does, nor what no segment of this size is called.
    pub fn covers(&self, name: &WalName) -> bool {
        let Some(segment) = name.segment() else { return false };
        let is_before = self.reaches.iter().any(|reach| reach.holds(segment));
        is_before && segment.start(self.size).is_some() && !self.keeps.iter().any(|keep| keep.holds(segment))
    }

    /// Whether a file that may go can lie in the hash directory of that name.
    pub fn touches(&self, hash_directory: &str) -> bool {
        // The first segment that is filed there.
        let Ok(WalName::Segment(first)) = WalName::parse(&format!("{hash_directory}00000000")) else { return false };
        first.hash_directory() == hash_directory && self.reaches.iter().any(|reach| reach.holds(first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::Ancestor;
    use proptest::prelude::*;

    fn bound(name: &str) -> Bound {
        Bound::parse(name).unwrap()
    }

    fn history(ancestors: &[(u32, u64)]) -> History {
        let ancestor = |&(timeline, end)| Ancestor { timeline: Timeline(timeline), end: Lsn(end) };
        History { ancestors: ancestors.iter().map(ancestor).collect() }
    }

    fn megabytes(count: u64) -> SegmentSize {
        SegmentSize::new(count << 20).unwrap()
    }

    fn horizon(before: &str, size: SegmentSize, ancestors: &[(u32, u64)], keeps: &[&str]) -> Horizon {
        let keeps: Vec<Keep> = keeps.iter().map(|text| Keep::parse(text).unwrap()).collect();
        Horizon::new(bound(before), size, &history(ancestors), &keeps).unwrap()
    }

    #[track_caller]
    fn assert_goes(horizon: &Horizon, names: &[&str]) {
        names.iter().for_each(|name| assert!(horizon.covers(&WalName::parse(name).unwrap()), "{name} stays"));
    }

    #[track_caller]
    fn assert_stays(horizon: &Horizon, names: &[&str]) {
        names.iter().for_each(|name| assert!(!horizon.covers(&WalName::parse(name).unwrap()), "{name} goes"));
    }

    #[test]
    fn a_bound_is_a_segment_a_partial_one_or_a_label_and_nothing_else() {
        let plain = "00000001000000020000000A";
        for name in [plain, "00000001000000020000000A.partial", "00000001000000020000000a.00000028.backup"] {
            assert_eq!(bound(name).to_string(), plain);
        }
        assert!(matches!(Bound::parse("00000002.history"), Err(BadBound::History(_))));
        for junk in ["", "%r", "0000000100000002", "00000001000000020000000A.gz", "../00000001000000020000000A"] {
            assert!(matches!(Bound::parse(junk), Err(BadBound::Name(_))), "{junk}");
        }
        // A name that no segment of that size has bounds nothing.
        let beyond = bound("000000010000000200000100");
        assert!(Horizon::new(beyond, SegmentSize::DEFAULT, &History::default(), &[]).is_none());
        assert!(Horizon::new(beyond, megabytes(1), &History::default(), &[]).is_some());
    }

    #[test]
    fn a_range_has_two_ends_on_one_timeline() {
        let (two, five) = ("000000010000000000000002", "000000010000000000000005.00000028.backup");
        assert!(Keep::parse(&format!("{two}..{five}")).is_ok());
        assert!(Keep::parse(&format!("{two}..{two}")).is_ok());
        assert!(matches!(Keep::parse(two), Err(BadBound::Range(_))));
        assert!(matches!(Keep::parse(&format!("{five}..{two}")), Err(BadBound::Backwards(_))));
        assert!(matches!(Keep::parse(&format!("{two}..000000020000000000000005")), Err(BadBound::Timelines(_))));
        assert!(matches!(Keep::parse(&format!("{two}..")), Err(BadBound::Name(_))));
        assert!(matches!(Keep::parse(&format!("00000002.history..{two}")), Err(BadBound::History(_))));
    }

    #[test]
    fn on_its_own_timeline_goes_what_stands_before_the_bound() {
        let horizon = horizon("000000010000000200000010", SegmentSize::DEFAULT, &[], &[]);
        assert_goes(
            &horizon,
            &[
                "000000010000000000000001",
                "0000000100000001000000FF",
                "00000001000000020000000F",
                "00000001000000020000000F.00000028.backup",
                "00000001000000020000000F.partial",
            ],
        );
        assert_stays(
            &horizon,
            &[
                "000000010000000200000010",
                "000000010000000200000010.00000028.backup",
                "000000010000000200000010.partial",
                "000000010000000300000000",
                "00000001.history",
                "00000002.history",
                "000000020000000000000001",
                "000000000000000000000001",
                // No segment of 16 MB has this name: who knows what it is.
                "000000010000000000000100",
            ],
        );
    }

    #[test]
    fn of_ancestors_goes_what_the_bounds_history_took_from_them() {
        // Timeline 4 left 2 in segment 7, which left 1 in segment 5; 3 is a sibling.
        let ancestors = [(1, 0x500_0028), (2, 0x700_1000)];
        let horizon = horizon("000000040000000000000009", SegmentSize::DEFAULT, &ancestors, &[]);
        assert_goes(
            &horizon,
            &[
                "000000010000000000000004",
                "000000010000000000000005",
                "000000010000000000000005.partial",
                "000000020000000000000005",
                "000000020000000000000007",
                "000000020000000000000007.partial",
                "000000040000000000000007",
                "000000040000000000000008",
            ],
        );
        assert_stays(
            &horizon,
            &[
                "000000010000000000000006",
                "000000010000000000000008",
                "000000010000000000000006.00000028.backup",
                "000000020000000000000008",
                "000000030000000000000001",
                "000000030000000000000006",
                "000000040000000000000009",
                "000000050000000000000001",
                "00000001.history",
                "00000002.history",
                "00000004.history",
            ],
        );
    }

    #[test]
    fn a_bound_before_a_fork_takes_nothing_of_what_lies_behind_it() {
        let ancestors = [(1, 0x500_0028), (2, 0x700_1000)];
        let horizon = horizon("000000040000000000000003", SegmentSize::DEFAULT, &ancestors, &[]);
        assert_goes(&horizon, &["000000010000000000000002", "000000020000000000000002"]);
        assert_stays(&horizon, &["000000010000000000000003", "000000010000000000000005", "000000020000000000000005"]);
        assert!(horizon.forks().is_empty());
    }

    #[test]
    fn a_switch_at_the_start_of_a_segment_leaves_that_segment_to_the_other_branch() {
        let horizon = horizon("000000020000000000000009", SegmentSize::DEFAULT, &[(1, 0x500_0000)], &[]);
        assert_goes(&horizon, &["000000010000000000000004"]);
        assert_stays(&horizon, &["000000010000000000000005", "000000010000000000000005.00000028.backup"]);
        assert!(horizon.forks().is_empty());
    }

    #[test]
    fn a_backup_of_the_other_branch_keeps_the_segment_it_starts_in() {
        let mut horizon = horizon("000000020000000000000009", SegmentSize::DEFAULT, &[(1, 0x500_2000)], &[]);
        let [fork] = *horizon.forks() else { panic!("{horizon:?}") };
        let label = |text: &str| WalName::parse(text).unwrap();
        assert!(!fork.is_needed_by(&label("000000010000000000000005.00000028.backup")), "before the switch point");
        assert!(!fork.is_needed_by(&label("000000010000000000000005")));
        assert!(!fork.is_needed_by(&label("000000010000000000000004.00003028.backup")));
        assert!(fork.is_needed_by(&label("000000010000000000000005.00002000.backup")));
        horizon.spare(&fork);
        assert_stays(&horizon, &["000000010000000000000005", "000000010000000000000005.00002000.backup"]);
        assert_goes(&horizon, &["000000010000000000000004", "000000020000000000000005"]);
    }

    #[test]
    fn positions_count_with_the_real_segment_size() {
        // The same switch point, 1/00500028, lies in another segment at each size.
        let ancestors = [(1, 0x1_0050_0028)];
        for (size, last, next) in [
            (1, "000000010000000100000005", "000000010000000100000006"),
            (16, "000000010000000100000000", "000000010000000100000001"),
            (1024, "000000010000000100000000", "000000010000000100000001"),
        ] {
            let horizon = horizon("000000020000000200000000", megabytes(size), &ancestors, &[]);
            assert_goes(&horizon, &[last]);
            assert_stays(&horizon, &[next]);
        }
        let small = horizon("000000010000000100000000", megabytes(1), &[], &[]);
        assert_goes(&small, &["000000010000000000000FFF"]);
        assert_stays(&small, &["000000010000000000001000"]);
        let large = horizon("000000010000000100000000", megabytes(1024), &[], &[]);
        assert_goes(&large, &["000000010000000000000003"]);
        assert_stays(&large, &["000000010000000000000004"]);
    }

    #[test]
    fn kept_ranges_stay_with_their_labels_on_their_own_timeline() {
        let keeps = ["000000010000000000000002..000000010000000000000003.00000028.backup"];
        let horizon = horizon("000000020000000000000009", SegmentSize::DEFAULT, &[(1, 0x500_0028)], &keeps);
        assert_stays(
            &horizon,
            &[
                "000000010000000000000002",
                "000000010000000000000002.00000028.backup",
                "000000010000000000000003",
                "000000010000000000000003.partial",
            ],
        );
        assert_goes(&horizon, &["000000010000000000000001", "000000010000000000000004", "000000020000000000000003"]);
    }

    #[test]
    fn a_hash_directory_is_touched_only_where_something_in_it_may_go() {
        let horizon = horizon("000000020000000300000000", SegmentSize::DEFAULT, &[(1, 0x1_0500_0028)], &[]);
        for touched in ["0000000100000000", "0000000100000001", "0000000200000000", "0000000200000002"] {
            assert!(horizon.touches(touched), "{touched}");
        }
        for other in ["0000000100000002", "0000000200000003", "0000000300000000", "history", "00000002", ""] {
            assert!(!horizon.touches(other), "{other}");
        }
    }

    proptest! {
        #[test]
        fn nothing_at_or_behind_the_bounds_position_ever_goes(
            position in 0u64..1 << 40, other in 0u64..1 << 40, ends in proptest::collection::vec(0u64..1 << 40, 0..3),
            timeline in 1u32..6, shift in 20u32..=30,
        ) {
            let size = SegmentSize::new(1 << shift).unwrap();
            let ancestors: Vec<(u32, u64)> = (1..).zip(ends).collect();
            let own = Timeline(ancestors.len() as u32 + 1);
            let before = SegmentName::containing(own, Lsn(position), size);
            let horizon = Horizon::new(Bound(before), size, &history(&ancestors), &[]).unwrap();
            let segment = SegmentName::containing(Timeline(timeline), Lsn(other), size);
            let goes = horizon.covers(&WalName::Segment(segment));
            let is_before = segment.start(size) < before.start(size);
            let is_own_history = match ancestors.iter().find(|(of, _)| *of == timeline) {
                Some((_, end)) => segment.start(size).unwrap().0 < *end,
                None => Timeline(timeline) == own,
            };
            prop_assert_eq!(goes, is_before && is_own_history);
            prop_assert!(!goes || horizon.touches(&segment.hash_directory()));
        }
    }
}
