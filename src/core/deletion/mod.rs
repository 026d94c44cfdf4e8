//! Deleting WAL that nobody needs any more: everything before a bound, along the bound's own history.
//!
//! Only files that were named one by one go, never a tree; a hash directory goes once it is empty. History files stay.
//! Parts of a segment that was being received go where the segment would: a failover can leave one that nobody replaces.
//!
//! **Order.** First the files, durably; then their lines, in catalogue and sums. What the sums name and the archive lacks
//! is told as lost rather than never there ([`Place::confirm_never_stored`]): while a deletion is unfinished no restore
//! takes a gap for the end of the archive. A line goes by one rule, whoever removed its file and whenever: it lies in the
//! range, and its file is not there. So a run that was killed is finished by the next one with the same bound, and a file
//! that could not be removed keeps its lines.

mod attended;
mod horizon;
mod settle;

pub use attended::Attended;
pub use horizon::{BadBound, Bound, Fork, Horizon, Keep, Reach};
pub use settle::Settled;

use crate::codec::Compression;
use crate::error::{Error, Kind, Result};
use crate::layout::Format;
use crate::lineage;
use crate::listing::{Recorded, stored_format};
use crate::part::Part;
use crate::place::Place;
use crate::pulse::Pulse;
use crate::store::Listed;
use crate::wal::{History, SegmentName, SegmentSize, Timeline, WalName};
use std::fmt;
use std::time::SystemTime;

/// Files named at once: what a store takes in one request.
const PAGE: usize = 1000;
/// More segments than this in a row that tell nothing are not worth looking on.
const MOST_SEGMENTS: usize = 64;

/// What is to go.
#[derive(Clone, Debug)]
pub struct Request {
    /// WAL before this.
    pub before: Bound,
    /// But for these.
    pub keeps: Vec<Keep>,
    /// The cluster that asks, where it is known: another one's archive is refused.
    pub system_identifier: Option<u64>,
    /// The size of its segments, where that is known; else the archive tells.
    pub segment_size: Option<SegmentSize>,
}

/// What a file holds that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A segment, a partial one, or a backup label.
    Wal(WalName),
    /// The first bytes of a segment.
    Part(Part),
}

impl Item {
    /// What it is, for people.
    pub fn word(&self) -> &'static str {
        match self {
            Item::Wal(name) => name.kind().word(),
            Item::Part(_) => "part",
        }
    }

    /// The timeline it is of.
    pub fn timeline(&self) -> Timeline {
        match self {
            Item::Wal(name) => name.timeline(),
            Item::Part(part) => part.segment.timeline,
        }
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Item::Wal(name) => name.fmt(f),
            Item::Part(part) => part.fmt(f),
        }
    }
}

/// A file that goes, or would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departing {
    /// What it holds.
    pub item: Item,
    /// Its key in the store.
    pub key: String,
    /// Bytes as stored.
    pub stored_size: u64,
    /// Where it lies, for people.
    pub location: String,
}

/// What is known of a file that is about to go, for whoever wants to be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub name: WalName,
    /// Where it lies: a whole path, or a URL.
    pub location: String,
    /// Bytes as stored.
    pub stored_size: u64,
    /// Modification time of the file it was made from.
    pub modified: SystemTime,
    /// The format it is stored in.
    pub format: Format,
}

/// Somebody who is called around the removal of each file that was archived, such as hook scripts. Nobody was called when a
/// part was put, and nobody is when it goes.
///
/// In local storage the calls come file by file: before, removal, after. In cloud storage, which removes many at once,
/// those before come for a whole page of files (at most 1,000), then the removals, then those after.
pub trait Attendant {
    /// Comes before the file goes. An error keeps this file and all behind it, and the deletion ends with that error; files
    /// for which this was answered well go all the same.
    fn before(&mut self, file: &Facts) -> Result<()>;

    /// Comes after, for each file that `before` was answered well for, with how the removal went.
    fn after(&mut self, file: &Facts, removed: &Result<()>);
}

/// A deletion that was thought through: nothing is changed yet.
pub struct Deletion<'a> {
    place: &'a Place,
    horizon: Option<Horizon>,
    notices: Vec<Error>,
}

impl<'a> Deletion<'a> {
    /// Sees whose archive it is and what lies before the bound there. Writes nothing.
    pub fn plan(place: &'a Place, request: &Request) -> Result<Self> {
        place.confirm_archive(request.system_identifier)?;
        let mut deletion = Deletion { place, horizon: None, notices: Vec::new() };
        let size = request.segment_size.map_or_else(|| segment_size(place), |size| Ok(Some(size)))?;
        // Without any segment there is nothing before the bound either.
        let Some(size) = size else { return Ok(deletion) };
        let history = deletion.history(request.before.timeline())?;
        let horizon = Horizon::new(request.before, size, &history, &request.keeps);
        let mut horizon = horizon.ok_or_else(|| no_such_segment(&request.before, size))?;
        for fork in horizon.forks().to_vec() {
            if names_in_segment(place, fork.segment)?.iter().any(|name| fork.is_needed_by(name)) {
                horizon.spare(&fork);
            }
        }
        deletion.horizon = Some(horizon);
        Ok(deletion)
    }

    /// What should be known before it is carried out: things that keep files from going, though nothing failed.
    pub fn notices(&self) -> &[Error] {
        &self.notices
    }

    /// Names every file that would go: by timeline and in order of their keys, then the parts.
    pub fn list(&self, pulse: &Pulse, each: &mut dyn FnMut(Departing)) -> Result<()> {
        self.each_page(pulse, &mut |page| {
            page.into_iter().for_each(|(_, file)| each(file));
            Ok(())
        })?;
        self.parts()?.into_iter().for_each(each);
        Ok(())
    }

    /// Removes those files, and tells of each how that went; then the lines of all that are gone. A stop of the pulse
    /// ends it between two files, with lines and files in agreement; removing the lines takes as long as it takes.
    ///
    /// One file that cannot be removed keeps no other from going. Fails where it came to an early end, also then with
    /// the lines in order, or where those could not be removed: the next run with the same bound finishes it.
    pub fn carry_out(
        &self,
        pulse: &Pulse,
        mut attendant: Option<&mut dyn Attendant>,
        each: &mut dyn FnMut(&Departing, &Result<()>),
    ) -> Result<Settled> {
        let Some(horizon) = &self.horizon else { return Ok(Settled::default()) };
        let removed = self.each_page(pulse, &mut |page| match &mut attendant {
            Some(attendant) => self.remove_attended(pulse, &page, &mut **attendant, each),
            None => self.remove_unattended(pulse, &page.into_iter().map(|(_, file)| file).collect::<Vec<_>>(), each),
        });
        let removed = removed.and_then(|()| self.remove_unattended(pulse, &self.parts()?, each));
        let settled = settle::settle(self.place, horizon);
        removed.and(settled)
    }

    /// How many files go between two looks at the pulse.
    fn group(&self) -> usize {
        if self.place.is_remote() { PAGE } else { 100 }
    }

    fn remove(&self, pulse: &Pulse, files: &[Departing]) -> Vec<Result<()>> {
        let keys: Vec<String> = files.iter().map(|file| file.key.clone()).collect();
        let outcomes = self.place.store.delete_all(&keys);
        pulse.beat();
        outcomes
    }

    fn remove_unattended(
        &self,
        pulse: &Pulse,
        files: &[Departing],
        each: &mut dyn FnMut(&Departing, &Result<()>),
    ) -> Result<()> {
        files.chunks(self.group()).try_for_each(|group| {
            see_that_it_goes_on(pulse)?;
            self.remove(pulse, group).iter().zip(group).for_each(|(outcome, file)| each(file, outcome));
            Ok(())
        })
    }

    fn remove_attended(
        &self,
        pulse: &Pulse,
        files: &[(WalName, Departing)],
        attendant: &mut dyn Attendant,
        each: &mut dyn FnMut(&Departing, &Result<()>),
    ) -> Result<()> {
        let mut recorded = None;
        for group in files.chunks(if self.place.is_remote() { PAGE } else { 1 }) {
            let (mut going, mut refusal) = (Vec::new(), Ok(()));
            for (name, file) in group {
                let answered = see_that_it_goes_on(pulse).and_then(|()| {
                    let Some(facts) = self.facts(name, file, &mut recorded)? else { return Ok(()) };
                    attendant.before(&facts)?;
                    going.push((file.clone(), facts));
                    Ok(())
                });
                if answered.is_err() {
                    refusal = answered;
                    break;
                }
            }
            let (files, facts): (Vec<Departing>, Vec<Facts>) = going.into_iter().unzip();
            let outcomes = self.remove(pulse, &files);
            for ((file, facts), outcome) in files.iter().zip(&facts).zip(&outcomes) {
                attendant.after(facts, outcome);
                each(file, outcome);
            }
            refusal?;
        }
        Ok(())
    }

    /// What is known of a file; nothing where it is gone already.
    fn facts(&self, name: &WalName, file: &Departing, recorded: &mut Option<Recorded>) -> Result<Option<Facts>> {
        let Some(meta) = self.place.store.head(&file.key)? else { return Ok(None) };
        let format = match self.place.layout.wal_name(&file.key).and_then(|(_, format)| format) {
            Some(format) => Some(format),
            None => stored_format(self.place, name, &file.key, recorded)?,
        };
        let Some(format) = format else { return Ok(None) };
        let location = file.location.clone();
        Ok(Some(Facts { name: *name, location, stored_size: meta.stored_size, modified: meta.modified, format }))
    }

    /// Hands on the files that may go, timeline by timeline, page by page.
    fn each_page(&self, pulse: &Pulse, take: &mut dyn FnMut(Vec<(WalName, Departing)>) -> Result<()>) -> Result<()> {
        let Some(horizon) = &self.horizon else { return Ok(()) };
        for reach in horizon.reaches() {
            let mut after = self.place.layout.begin_of_timeline(reach.timeline());
            loop {
                see_that_it_goes_on(pulse)?;
                let page = self.place.list_wal(Some(&after), PAGE)?;
                pulse.beat();
                let Some((_, last)) = page.last() else { break };
                after = last.key.clone();
                let has_passed = page.iter().any(|(name, _)| is_beyond(name, reach));
                let here = page.into_iter().filter(|(name, _)| name.timeline() == reach.timeline());
                let going: Vec<_> = here.filter(|(name, _)| horizon.covers(name)).collect();
                if !going.is_empty() {
                    let departing = |(name, listed)| (name, self.departing(Item::Wal(name), listed));
                    take(going.into_iter().map(departing).collect())?;
                }
                if has_passed {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The parts of segments that may go: of a timeline's end one at most, where all is as it should be.
    fn parts(&self) -> Result<Vec<Departing>> {
        let Some(horizon) = &self.horizon else { return Ok(Vec::new()) };
        let may_go = |part: &Part| horizon.covers(&WalName::Segment(part.segment));
        let parts = self.place.part_objects(None)?.into_iter().filter(|(part, _)| may_go(part));
        Ok(parts.map(|(part, listed)| self.departing(Item::Part(part), listed)).collect())
    }

    fn departing(&self, item: Item, listed: Listed) -> Departing {
        let location = self.place.store.location(&listed.key);
        Departing { item, key: listed.key, stored_size: listed.stored_size, location }
    }

    /// The history of that timeline. Where the archive has none the timeline stands alone, and that is noticed if there
    /// are older ones.
    fn history(&mut self, timeline: Timeline) -> Result<History> {
        if timeline.0 <= 1 {
            return Ok(History::default());
        }
        let stored = lineage::history(self.place, timeline).map_err(|error| match error.kind() {
            Kind::Damaged => {
                error.hint("Nothing was deleted: which timelines belong together cannot be told without it.")
            }
            _ => error,
        })?;
        if let Some(history) = stored {
            return Ok(history);
        }
        let is_older = |name: &WalName| name.segment().is_some_and(|segment| segment.timeline < timeline);
        if self.place.list_wal(None, PAGE)?.iter().any(|(name, _)| is_older(name)) {
            let name = WalName::History(timeline);
            let message = format!("\"{name}\" is not in the archive: files of other timelines stay");
            let notice = Error::new(Kind::NotFound, name.to_string(), message);
            self.notices
                .push(notice.detail("Nothing else tells which of them the timeline came from, and from where."));
        }
        Ok(History::default())
    }
}

fn see_that_it_goes_on(pulse: &Pulse) -> Result<()> {
    match pulse.is_stopped() {
        true => Err(Error::new(Kind::Interrupted, "deletion", "stopped before all files were removed")),
        false => Ok(()),
    }
}

/// Whether that file, in the order of keys, lies behind all that may go on that timeline.
fn is_beyond(name: &WalName, reach: &Reach) -> bool {
    name.timeline() > reach.timeline() || name.segment().is_some_and(|segment| segment >= reach.beyond)
}

fn no_such_segment(bound: &Bound, size: SegmentSize) -> Error {
    let megabytes = size.bytes() >> 20;
    let message = format!("no WAL segment is named \"{bound}\" where segments have {megabytes} MB");
    Error::new(Kind::Configuration, bound.to_string(), message)
}

/// The stored files that belong to one segment.
fn names_in_segment(place: &Place, segment: SegmentName) -> Result<Vec<WalName>> {
    let mut after = place.layout.wal_key(&WalName::Segment(segment), Compression::None);
    // A key that is no file's: the segment itself must lie behind it.
    after.pop();
    let mut names = Vec::new();
    loop {
        let page = place.list_wal(Some(&after), PAGE)?;
        let Some((_, last)) = page.last() else { return Ok(names) };
        after = last.key.clone();
        let has_passed = page.iter().any(|(name, _)| name.segment().is_some_and(|other| other > segment));
        names.extend(page.into_iter().map(|(name, _)| name).filter(|name| name.segment() == Some(segment)));
        if has_passed {
            return Ok(names);
        }
    }
}

/// The size of the archive's segments, as the first tells that can be asked; nothing where it holds none.
fn segment_size(place: &Place) -> Result<Option<SegmentSize>> {
    let (mut after, mut asked) = (None, 0);
    loop {
        let page = place.list_wal(after.as_deref(), PAGE)?;
        let Some((_, last)) = page.last() else { break };
        after = Some(last.key.clone());
        for (name, listed) in page.iter().filter(|(name, _)| matches!(name, WalName::Segment(_))) {
            if let Some(size) = place.size_of_segment(name, &listed.key)? {
                return Ok(Some(size));
            }
            asked += 1;
            if asked == MOST_SEGMENTS {
                break;
            }
        }
        if asked == MOST_SEGMENTS {
            break;
        }
    }
    // All may have been removed by a run that was killed before their lines were.
    let noted = settle::noted_segment_size(place)?;
    if noted.is_none() && asked > 0 {
        let location = place.location();
        let message = format!("could not tell how large the segments in the archive at \"{location}\" are");
        return Err(Error::new(Kind::Damaged, location, message)
            .detail(format!("Neither they nor the archive's records say so; {asked} were asked."))
            .hint("Name the data directory of their cluster with -D."));
    }
    Ok(noted)
}
