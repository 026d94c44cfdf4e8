//! What to fetch next and what to drop, by names and numbers alone.

use crate::wal::{SegmentName, SegmentSize};
use std::collections::BTreeSet;
use std::time::Duration;

/// A server that takes nothing for so long streams, or has all there is, or replays so little that it can wait.
const LONGEST_IDLE: Duration = Duration::from_secs(20);
/// The same for large segments: slower than this is no replay.
const SLOWEST_REPLAY_BYTES_PER_SECOND: u64 = 4 << 20;
/// So much free space, in segments, is left to the server.
const SPARED_SEGMENTS: u64 = 8;

/// Where the server stands in the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The segment that it was given last.
    pub segment: SegmentName,
    /// The size of its segments.
    pub segment_size: SegmentSize,
}

impl Position {
    /// How long to wait for it to take the next segment.
    pub fn patience(&self) -> Duration {
        LONGEST_IDLE.max(Duration::from_secs(self.segment_size.bytes() / SLOWEST_REPLAY_BYTES_PER_SECOND))
    }

    /// The segments that it asks for next, nearest first, if its timeline goes on.
    pub fn ahead(&self) -> impl Iterator<Item = SegmentName> + '_ {
        std::iter::successors(self.segment.next(self.segment_size), |segment| segment.next(self.segment_size))
    }
}

/// How many segments to keep ahead of a server that has taken so many of them, one after the other: two, and twice as many
/// after each, up to `most`. Whoever asks for a single segment, or too rarely for any of this to last, costs the archive
/// little.
pub fn reach(taken: u32, most: usize) -> usize {
    2_usize.checked_shl(taken).filter(|&reach| reach > 1).unwrap_or(usize::MAX).min(most)
}

/// How many segments there is space for, those included that lie there already.
pub fn space(free_bytes: u64, segment_size: SegmentSize, present: usize) -> usize {
    let segments = free_bytes / segment_size.bytes() + present as u64;
    segments.saturating_sub(SPARED_SEGMENTS) as usize
}

/// A segment that was not there when it was looked for: where the archive seems to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Its name.
    pub segment: SegmentName,
    /// Whether it is time to look for it again.
    pub is_due: bool,
}

/// What to do now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Segments to fetch, the nearest first.
    pub fetch: Vec<SegmentName>,
    /// Segments that nobody is going to ask for, or that there is no space for.
    pub drop: Vec<SegmentName>,
}

/// What to do for a server at `position` to keep `reach` segments ahead of it. `present` are those that lie there or are
/// being fetched; beyond a `missing` one nothing is looked for, and for that itself only when it is due.
///
/// The segment at the position itself stays for as long as the server `may_take` it; what it got from the archive, because
/// it asked just before that was there, is of no use any more.
pub fn plan(
    position: &Position,
    may_take: bool,
    reach: usize,
    present: &BTreeSet<SegmentName>,
    missing: Option<Missing>,
) -> Plan {
    let wanted: Vec<SegmentName> = position.ahead().take(reach).collect();
    let end = missing.and_then(|missing| {
        let index = wanted.iter().position(|segment| *segment == missing.segment)?;
        Some(index + usize::from(missing.is_due))
    });
    let lacking = wanted[..end.unwrap_or(wanted.len())].iter().filter(|segment| !present.contains(segment));
    let is_of_use =
        |segment: &SegmentName| may_take && *segment == position.segment || wanted.binary_search(segment).is_ok();
    Plan {
        fetch: lacking.copied().collect(),
        drop: present.iter().filter(|segment| !is_of_use(segment)).copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::WalName;

    fn segment(text: &str) -> SegmentName {
        WalName::parse(text).unwrap().segment().unwrap()
    }

    fn segments<const N: usize>(texts: [&str; N]) -> Vec<SegmentName> {
        texts.map(segment).to_vec()
    }

    /// A server that has the segment FE, two before the end of a log id.
    fn position() -> Position {
        Position { segment: segment("0000000100000002000000FE"), segment_size: SegmentSize::DEFAULT }
    }

    fn planned(reach: usize, present: &[SegmentName], missing: Option<Missing>) -> Plan {
        plan(&position(), true, reach, &present.iter().copied().collect(), missing)
    }

    #[test]
    fn the_next_segments_are_fetched_nearest_first_over_the_end_of_a_log_id() {
        let next = ["0000000100000002000000FF", "000000010000000300000000", "000000010000000300000001"];
        assert_eq!(planned(3, &[], None), Plan { fetch: segments(next), drop: Vec::new() });
        let lacking = segments([next[0], next[2]]);
        assert_eq!(planned(3, &segments([next[1]]), None), Plan { fetch: lacking, drop: Vec::new() });
        assert_eq!(planned(3, &segments(next), None), Plan::default());
        assert_eq!(planned(0, &[], None), Plan::default());
    }

    #[test]
    fn nothing_is_looked_for_beyond_a_missing_segment() {
        let next = segments(["0000000100000002000000FF", "000000010000000300000000", "000000010000000300000001"]);
        let fetched =
            |missing: &str, is_due| planned(3, &[], Some(Missing { segment: segment(missing), is_due })).fetch;
        assert_eq!(fetched("000000010000000300000000", false), next[..1]);
        assert_eq!(fetched("000000010000000300000000", true), next[..2], "only it itself is looked for again");
        assert_eq!(fetched("0000000100000002000000FF", false), []);
        // The server has passed it by: found by itself, or on another timeline.
        for passed in ["0000000100000002000000FD", "0000000200000002000000FF"] {
            assert_eq!(fetched(passed, false), next);
        }
    }

    #[test]
    fn what_lies_behind_too_far_ahead_or_on_another_timeline_is_dropped() {
        let kept = segments(["0000000100000002000000FE", "0000000100000002000000FF", "000000010000000300000000"]);
        let dropped = segments(["0000000100000002000000FD", "000000010000000300000001", "0000000200000002000000FF"]);
        let present = [kept, dropped.clone()].concat();
        assert_eq!(planned(2, &present, None), Plan { fetch: Vec::new(), drop: dropped });
    }

    #[test]
    fn the_segment_at_the_position_stays_while_the_server_may_take_it() {
        let present: BTreeSet<SegmentName> = [position().segment].into();
        assert_eq!(plan(&position(), true, 0, &present, None), Plan::default());
        let dropped = vec![position().segment];
        assert_eq!(plan(&position(), false, 0, &present, None), Plan { fetch: Vec::new(), drop: dropped });
    }

    #[test]
    fn the_end_of_the_number_space_ends_the_plan() {
        let last = Position { segment: segment("00000001FFFFFFFF000000FE"), ..position() };
        assert_eq!(plan(&last, true, 8, &BTreeSet::new(), None).fetch, segments(["00000001FFFFFFFF000000FF"]));
    }

    #[test]
    fn the_reach_doubles_with_each_segment_taken() {
        let reaches: Vec<usize> = [0, 1, 2, 3, 4].map(|taken| reach(taken, 12)).to_vec();
        assert_eq!(reaches, [2, 4, 8, 12, 12]);
        for taken in [40, 63, 64, u32::MAX] {
            assert_eq!(reach(taken, 1000), 1000, "{taken}");
        }
        assert_eq!(reach(5, 1), 1);
    }

    #[test]
    fn large_segments_are_waited_for_longer() {
        let patience = |mb: u64| {
            let segment_size = SegmentSize::new(mb << 20).unwrap();
            Position { segment_size, ..position() }.patience().as_secs()
        };
        assert_eq!([1, 16, 64, 1024].map(patience), [20, 20, 20, 256]);
    }

    #[test]
    fn space_that_the_server_needs_is_left_to_it() {
        let size = SegmentSize::DEFAULT;
        assert_eq!(space(100 * size.bytes(), size, 4), 96);
        assert_eq!(space(6 * size.bytes(), size, 4), 2, "some of those that lie there must go");
        assert_eq!(space(size.bytes(), size, 4), 0);
        assert_eq!(space(0, size, 0), 0);
    }
}
