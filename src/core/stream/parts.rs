//! The part of the current segment, put into the storage again and again: what a machine that is lost takes with it is then no
//! more than came since.

use super::standing::Trouble;
use super::{Newest, Note, Streamer};
use crate::archive::{Archive, Episode};
use crate::error::{Error, Result};
use crate::part::{Part, received_bytes};
use crate::regular_file::{self, Links};
use crate::report::Report;
use crate::state::unix_us;
use crate::wal::{LongPageHeader, SegmentName};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant, SystemTime};

/// Where none are put, those of an earlier run are looked after this often.
const IDLE_INTERVAL: Duration = Duration::from_secs(60);
/// Somebody else may remove parts: a rule of the store's, say.
const LOOK_INTERVAL: Duration = Duration::from_secs(3600);
/// Before it is tried again to remove what could not be removed.
const REMOVAL_PAUSE: Duration = Duration::from_secs(600);
/// More are not remembered; those beyond are found again by the next start.
const MOST_KEPT: usize = 1000;

/// The parts that one receiver keeps.
pub struct Parts {
    interval: Option<Duration>,
    next: Instant,
    /// What is there; not known before it was looked at.
    kept: Option<BTreeSet<Part>>,
    looked_at: Instant,
    /// Of segments before the current one: whether what is archived goes as far, where anything is.
    covered: BTreeMap<Part, bool>,
    /// What lay there when this run began. A crash of the machine may have left holes in it, and what is received is written
    /// from the beginning of the segment again: only what goes beyond was.
    found: Option<Option<Part>>,
    removes_again_at: Option<Instant>,
    episode: Episode,
}

impl Parts {
    /// Puts one every `interval`, if that is given; what was put earlier is removed in any case.
    pub fn new(interval: Option<Duration>) -> Self {
        Parts {
            interval,
            next: Instant::now(),
            kept: None,
            looked_at: Instant::now(),
            covered: BTreeMap::new(),
            found: None,
            removes_again_at: None,
            episode: Episode::default(),
        }
    }

    /// Puts a part where it is time for one, and removes those that there is better than.
    pub fn keep_when_due(&mut self, streamer: &Streamer, archive: &Archive) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        // From its beginning: what is put then was received by now.
        self.next = now + self.interval.unwrap_or(IDLE_INTERVAL);
        let kept = self.keep(streamer, archive);
        self.hear(streamer, "could not keep the part of a segment that was received", kept);
    }

    /// Removes the parts of segments that were archived whole just now.
    pub fn let_go(&mut self, streamer: &Streamer, archive: &Archive, segments: &[SegmentName]) {
        let removed = self.remove(archive, |part| segments.contains(&part.segment));
        // That one segment's are gone says nothing of those that are to come.
        if removed.is_err() {
            self.hear(streamer, "could not remove the part of a segment that is archived", removed);
        }
    }

    fn hear(&mut self, streamer: &Streamer, what: &str, done: Result<()>) {
        let now = Instant::now();
        streamer.teller.note(|standing| {
            standing.parts = match &done {
                Err(error) => Some(Trouble::after(standing.parts.take(), error)),
                // Also while it is not tried to remove what cannot be removed.
                Ok(()) => standing.parts.take().filter(|_| self.removes_again_at.is_some()),
            };
        });
        match done {
            _ if streamer.pulse.is_stopped() => {}
            Ok(()) => drop(self.episode.succeed(now)),
            Err(error) => {
                if self.episode.fail(&error, now).is_some() {
                    (streamer.tell)(Note::Warning(Report::new(what, &error)));
                }
            }
        }
    }

    fn keep(&mut self, streamer: &Streamer, archive: &Archive) -> Result<()> {
        let newest = streamer.folder.newest(Some(archive.cluster().segment_size))?;
        self.look(archive, newest)?;
        if self.interval.is_some()
            && let Some(newest) = newest
        {
            self.put(streamer, archive, newest)?;
        }
        self.settle_earlier(archive, newest)?;
        let kept = self.kept.clone().unwrap_or_default();
        let is_longest = |part: &Part| {
            let above = Part { segment: part.segment, bytes: u64::MAX };
            kept.range(..=above).next_back() == Some(part)
        };
        let covered = std::mem::take(&mut self.covered);
        let removed = self.remove(archive, |part| covered.get(part) == Some(&true) || !is_longest(part));
        self.covered = covered;
        removed
    }

    /// Looks at what there is: at all of it once, at that of the current segment now and then.
    fn look(&mut self, archive: &Archive, newest: Option<Newest>) -> Result<()> {
        match &mut self.kept {
            None => self.kept = Some(archive.parts(None)?.into_iter().collect()),
            Some(kept) if self.looked_at.elapsed() > LOOK_INTERVAL => {
                let Some(newest) = newest else { return Ok(()) };
                let there = archive.parts(Some(newest.segment))?;
                kept.retain(|part| part.segment != newest.segment);
                kept.extend(there);
            }
            Some(_) => return Ok(()),
        }
        self.looked_at = Instant::now();
        Ok(())
    }

    /// Finds out what is archived of the segments before the current one: those of an earlier run, whose end nobody has seen,
    /// and those that a timeline ended in.
    fn settle_earlier(&mut self, archive: &Archive, newest: Option<Newest>) -> Result<()> {
        let is_earlier = |part: &&Part| newest.is_none_or(|newest| newest.segment != part.segment);
        let earlier: BTreeSet<Part> = self.kept.iter().flatten().filter(is_earlier).copied().collect();
        self.covered.retain(|part, _| earlier.contains(part));
        for part in earlier {
            if self.covered.contains_key(&part) {
                continue;
            }
            let is_covered = match archive.covers(&part) {
                // Damaged, or encrypted to keys that are not here: then it is not for us to say that the part is no longer.
                Err(error) if !error.is_worth_retrying() => Some(false),
                is_covered => is_covered?,
            };
            self.covered.extend(is_covered.map(|is_covered| (part, is_covered)));
        }
        Ok(())
    }

    fn put(&mut self, streamer: &Streamer, archive: &Archive, newest: Newest) -> Result<()> {
        let part = part_of(streamer, newest)?;
        let found = *self.found.get_or_insert(part);
        let Some(part) = part else { return Ok(()) };
        let kept = self.kept.get_or_insert_default();
        if kept.contains(&part) || !newest.is_partial && archive.covers(&part)? == Some(true) {
            return Ok(());
        }
        if found == Some(part) && !streamer.has_told_of(&part) {
            return Ok(());
        }
        match archive.put_part(&part, &streamer.folder.path().join(newest.name().to_string())) {
            Ok(()) => {}
            // It has become whole meanwhile, under another name.
            Err(error) if error.is_missing_file() => {
                self.next = Instant::now();
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        kept.insert(part);
        while kept.len() > MOST_KEPT {
            kept.pop_first();
        }
        streamer.teller.note(|standing| {
            standing.last_part = Some(part.to_string());
            standing.last_part_us = Some(unix_us(SystemTime::now()));
        });
        Ok(())
    }

    /// Removes parts until one cannot be removed. Then none is for a while: there may be many, and a store that lets nobody
    /// remove anything.
    fn remove(&mut self, archive: &Archive, is_to_go: impl Fn(&Part) -> bool) -> Result<()> {
        if self.removes_again_at.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        self.removes_again_at = None;
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let going: Vec<Part> = kept.iter().copied().filter(is_to_go).collect();
        for part in going {
            if let Err(error) = archive.remove_part(&part) {
                self.removes_again_at = Some(Instant::now() + REMOVAL_PAUSE);
                return Err(error.hint("It does no harm where it lies: the longest part is restored."));
            }
            kept.remove(&part);
        }
        Ok(())
    }
}

/// What was received of that segment, where that is anything.
fn part_of(streamer: &Streamer, newest: Newest) -> Result<Option<Part>> {
    let path = streamer.folder.path().join(newest.name().to_string());
    let bytes = match regular_file::open(&path, Links::Refused).and_then(|(file, _)| received_bytes(file)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read file", &path, &error)),
    };
    Ok((bytes >= LongPageHeader::LENGTH as u64).then_some(Part { segment: newest.segment, bytes }))
}
