//! The part of the current segment, put into the storage again and again: what a machine that is lost takes with it is then no
//! more than came since.

use super::Streamer;
use super::folder::Newest;
use crate::archive::{Archive, Episode};
use crate::error::{Error, Result};
use crate::part::{Part, received_bytes};
use crate::regular_file::{self, Links};
use crate::report::Report;
use crate::state::unix_us;
use crate::stream::Note;
use crate::wal::{LongPageHeader, SegmentName};
use std::collections::BTreeSet;
use std::io;
use std::time::{Duration, Instant, SystemTime};

/// The parts that one receiver keeps.
pub struct Parts {
    interval: Option<Duration>,
    next: Instant,
    /// What is there; not known before it was looked at.
    kept: Option<BTreeSet<Part>>,
    episode: Episode,
}

impl Parts {
    /// Puts one every `interval`, if that is given; what was put earlier is removed in any case.
    pub fn new(interval: Option<Duration>) -> Self {
        Parts { interval, next: Instant::now(), kept: None, episode: Episode::default() }
    }

    /// Puts a part where it is time for one, and removes those that there is better than.
    pub fn keep_when_due(&mut self, streamer: &Streamer, archive: &Archive) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        // From its beginning: what is put then was received by now.
        self.next = now + self.interval.unwrap_or(super::LONGEST_PAUSE);
        let kept = self.keep(streamer, archive);
        self.hear(streamer, "could not keep the part of a segment that was received", kept);
    }

    /// Removes the parts of a segment of which more was archived just now.
    pub fn let_go(&mut self, streamer: &Streamer, archive: &Archive, segments: &[SegmentName]) {
        let of_these = |part: &Part| segments.contains(&part.segment);
        let removed = self.remove(archive, of_these);
        self.hear(streamer, "could not remove the part of a segment that is archived", removed);
    }

    fn hear(&mut self, streamer: &Streamer, what: &str, done: Result<()>) {
        let now = Instant::now();
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
        let kept = match &mut self.kept {
            Some(kept) => kept,
            None => self.kept.insert(archive.parts()?.into_iter().collect()),
        };
        let newest = streamer.folder.newest()?;
        // Those of an earlier run, whose end nobody has seen.
        let earlier = kept.iter().map(|part| part.segment);
        let earlier: BTreeSet<SegmentName> =
            earlier.filter(|segment| newest.is_none_or(|newest| newest.segment != *segment)).collect();
        let mut archived = BTreeSet::new();
        for segment in earlier {
            if archive.holds_segment(segment)? {
                archived.insert(segment);
            }
        }
        if self.interval.is_some()
            && let Some(newest) = newest
            && let Some(part) = part_of(streamer, newest)?
            && !self.kept.as_ref().is_some_and(|kept| kept.contains(&part))
            && (newest.is_partial || !archive.holds_segment(part.segment)?)
        {
            match archive.put_part(&part, &streamer.folder.path().join(newest.name().to_string())) {
                Ok(()) => {}
                // It has become whole meanwhile, under another name.
                Err(error) if error.is_missing_file() => {
                    self.next = Instant::now();
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            self.kept.get_or_insert_default().insert(part);
            streamer.teller.note(|standing| {
                standing.last_part = Some(part.to_string());
                standing.last_part_us = Some(unix_us(SystemTime::now()));
            });
        }
        let longest = |part: &Part, kept: &BTreeSet<Part>| {
            let above = Part { segment: part.segment, bytes: u64::MAX };
            kept.range(..=above).next_back() == Some(part)
        };
        let all = self.kept.clone().unwrap_or_default();
        self.remove(archive, |part| archived.contains(&part.segment) || !longest(part, &all))
    }

    fn remove(&mut self, archive: &Archive, is_to_go: impl Fn(&Part) -> bool) -> Result<()> {
        let Some(kept) = &mut self.kept else { return Ok(()) };
        let (going, mut failed): (Vec<Part>, Option<Error>) = (kept.iter().copied().filter(is_to_go).collect(), None);
        for part in going {
            match archive.remove_part(&part) {
                Ok(()) => drop(kept.remove(&part)),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// What was received of that segment, where that is anything.
fn part_of(streamer: &Streamer, newest: Newest) -> Result<Option<Part>> {
    let path = streamer.folder.path().join(newest.name().to_string());
    let bytes = match regular_file::open(&path, Links::Refused).and_then(|(file, _)| received_bytes(&file)) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("read file", &path, &error)),
    };
    Ok((bytes >= LongPageHeader::LENGTH as u64).then_some(Part { segment: newest.segment, bytes }))
}
