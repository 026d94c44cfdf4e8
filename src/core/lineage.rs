//! Which timeline left which other, and where: what the history files in an archive say together.

use crate::error::{Error, Kind, Result};
use crate::listing::{Range, each_name};
use crate::place::Place;
use crate::pulse::Pulse;
use crate::restore::{damaged, receive};
use crate::store::Object;
use crate::wal::{History, Lsn, Timeline, WalName};
use std::collections::BTreeMap;

/// Where a timeline left the one that it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Departure {
    /// The timeline it comes from, always an earlier one.
    pub parent: Timeline,
    /// Where the WAL of that ends for it, and its own begins.
    pub at: Lsn,
}

/// The timelines that history files tell of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    departures: BTreeMap<Timeline, Departure>,
}

impl Lineage {
    /// What all history files in the archive say, and those that do not read as history files, each with the reason.
    pub fn read(place: &Place, pulse: &Pulse) -> Result<(Self, Vec<(WalName, Error)>)> {
        let (mut lineage, mut broken) = (Lineage::default(), Vec::new());
        let histories = Range { from: None, to: Some(WalName::History(Timeline(u32::MAX))) };
        each_name(place, &histories, |name, listed| {
            pulse.go_on()?;
            match history_at(place, &name, &listed.key) {
                Ok(Some(history)) => lineage.add(name.timeline(), &history),
                Ok(None) => {}
                Err(error) if error.kind() == Kind::Damaged => broken.push((name, error)),
                Err(error) => return Err(error),
            }
            Ok(())
        })?;
        Ok((lineage, broken))
    }

    /// Takes what the history of `timeline` says of it and of those before it. What a timeline's own history says counts.
    pub fn add(&mut self, timeline: Timeline, history: &History) {
        let mut child = timeline;
        for ancestor in history.ancestors.iter().rev() {
            let departure = Departure { parent: ancestor.timeline, at: ancestor.end };
            if child == timeline {
                self.departures.insert(child, departure);
            } else {
                self.departures.entry(child).or_insert(departure);
            }
            child = ancestor.timeline;
        }
    }

    /// Where that timeline left another; nothing for the first one, and for one of which no history tells.
    pub fn departure(&self, timeline: Timeline) -> Option<Departure> {
        self.departures.get(&timeline).copied()
    }

    /// Every timeline that left another.
    pub fn departures(&self) -> impl Iterator<Item = (Timeline, Departure)> {
        self.departures.iter().map(|(timeline, departure)| (*timeline, *departure))
    }

    /// Where other timelines left that one: PostgreSQL may have ended to write it there.
    pub fn ends_of(&self, timeline: Timeline) -> Vec<Lsn> {
        self.departures.values().filter(|it| it.parent == timeline).map(|it| it.at).collect()
    }
}

/// The history of that timeline; nothing where the archive has none.
pub fn history(place: &Place, timeline: Timeline) -> Result<Option<History>> {
    let name = WalName::History(timeline);
    let Some((stored, object)) = place.open_wal(&name)? else { return Ok(None) };
    parse(place, &name, object, &place.store.location(&stored.key)).map(Some)
}

/// The history in that file; nothing where it is gone.
fn history_at(place: &Place, name: &WalName, key: &str) -> Result<Option<History>> {
    let Some(object) = place.store.get(key)? else { return Ok(None) };
    parse(place, name, object, &place.store.location(key)).map(Some)
}

fn parse(place: &Place, name: &WalName, object: Object, location: &str) -> Result<History> {
    let mut text = Vec::new();
    receive(place, name, None, object, location, &mut |bytes| {
        text.extend_from_slice(bytes);
        Ok(())
    })?;
    History::parse(&text, name.timeline()).map_err(|bad| damaged(location, bad))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(timeline: u32, text: &str) -> (Timeline, History) {
        (Timeline(timeline), History::parse(text.as_bytes(), Timeline(timeline)).unwrap())
    }

    #[test]
    fn histories_tell_of_each_other_and_a_timelines_own_counts() {
        let mut lineage = Lineage::default();
        for (timeline, history) in [history(3, "1\t0/500028\n2\t0/700000\n"), history(2, "1\t0/500030\n")] {
            lineage.add(timeline, &history);
        }
        let all: Vec<_> = lineage.departures().collect();
        let [second, third] =
            [(1, 0x50_0030), (2, 0x70_0000)].map(|(parent, at)| Departure { parent: Timeline(parent), at: Lsn(at) });
        assert_eq!(all, [(Timeline(2), second), (Timeline(3), third)]);
        assert_eq!(lineage.departure(Timeline(1)), None);
        let mut without = Lineage::default();
        let (timeline, history) = history(3, "1\t0/500028\n2\t0/700000\n");
        without.add(timeline, &history);
        assert_eq!(without.departure(Timeline(2)).map(|it| it.at), Some(Lsn(0x50_0028)));
    }

    #[test]
    fn a_timeline_ends_where_others_left_it() {
        let mut lineage = Lineage::default();
        for (timeline, history) in [history(2, "1\t0/500028\n"), history(3, "1\t0/700000\n")] {
            lineage.add(timeline, &history);
        }
        assert_eq!(lineage.ends_of(Timeline(1)), [Lsn(0x50_0028), Lsn(0x70_0000)]);
        assert!(lineage.ends_of(Timeline(2)).is_empty());
    }
}
