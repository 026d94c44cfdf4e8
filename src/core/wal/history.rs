//! What a timeline history file says: which timelines another one came from, and where each of them was left.

use super::position::{Lsn, Timeline};
use std::fmt;

/// A timeline that another one came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ancestor {
    /// Which.
    pub timeline: Timeline,
    /// Where it was left. Its WAL from here on is another branch's.
    pub end: Lsn,
}

/// The content of a history file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// All that the timeline came from, the oldest first.
    pub ancestors: Vec<Ancestor>,
}

/// A text that is no history of that timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadHistory {
    /// A line does not begin with a timeline and a position; its number, from 1.
    Line(usize),
    /// The timelines do not grow up to that whose history it is; the number of the line, from 1.
    Order(usize),
    /// No line tells of a timeline.
    Empty,
}

impl fmt::Display for BadHistory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadHistory::Line(number) => write!(f, "line {number} does not begin with a timeline and a WAL position"),
            BadHistory::Order(number) => write!(f, "the timeline in line {number} is not a later one, or too late"),
            BadHistory::Empty => write!(f, "it tells of no timeline"),
        }
    }
}

impl std::error::Error for BadHistory {}

impl History {
    /// Reads the history file of `timeline` as PostgreSQL does (timeline.c, `readTimeLineHistory`): timeline, switch point
    /// and reason in a line; blank lines and those that begin with `#` count for nothing.
    pub fn parse(text: &[u8], timeline: Timeline) -> Result<Self, BadHistory> {
        let mut history = History::default();
        for (number, line) in String::from_utf8_lossy(text).lines().enumerate() {
            let line = line.trim_start();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let ancestor = parse_line(line).ok_or(BadHistory::Line(number + 1))?;
            let is_later = history.ancestors.last().is_none_or(|last| last.timeline < ancestor.timeline);
            if !is_later || ancestor.timeline >= timeline {
                return Err(BadHistory::Order(number + 1));
            }
            history.ancestors.push(ancestor);
        }
        if history.ancestors.is_empty() { Err(BadHistory::Empty) } else { Ok(history) }
    }
}

fn parse_line(line: &str) -> Option<Ancestor> {
    let mut fields = line.split_whitespace();
    let timeline = Timeline(fields.next()?.parse().ok()?);
    let (high, low) = fields.next()?.split_once('/')?;
    let hex = |digits: &str| {
        // from_str_radix alone would take a sign.
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
    };
    Some(Ancestor { timeline, end: Lsn(u64::from(hex(high)?) << 32 | u64::from(hex(low)?)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_history_tells_every_ancestor_and_where_it_was_left() {
        let text =
            b"1\t0/5000028\tno recovery target specified\n\n# a remark\n  3\tA/FF000000\tbefore 2026-11-21 \xFF\n";
        let told = [(1, 0x500_0028), (3, 0xA_FF00_0000)];
        let ancestors = told.map(|(timeline, end)| Ancestor { timeline: Timeline(timeline), end: Lsn(end) });
        assert_eq!(History::parse(text, Timeline(4)).unwrap().ancestors, ancestors);
    }

    #[test]
    fn what_is_no_history_of_that_timeline_is_refused_with_its_line() {
        for (text, expected) in [
            ("", BadHistory::Empty),
            ("# nothing\n\n", BadHistory::Empty),
            ("1\t0/5000028\tx\njunk\n", BadHistory::Line(2)),
            ("1\n", BadHistory::Line(1)),
            ("1\t05000028\n", BadHistory::Line(1)),
            ("1\t0/+5\n", BadHistory::Line(1)),
            ("1\t0/100000000\n", BadHistory::Line(1)),
            ("-1\t0/5\n", BadHistory::Line(1)),
            ("2\t0/5\n1\t0/6\n", BadHistory::Order(2)),
            ("1\t0/5\n1\t0/6\n", BadHistory::Order(2)),
            ("4\t0/5\n", BadHistory::Order(1)),
        ] {
            assert_eq!(History::parse(text.as_bytes(), Timeline(4)), Err(expected), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text: Vec<u8>) {
            let _ = History::parse(&text, Timeline(7));
        }
    }
}
