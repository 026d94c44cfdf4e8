//! Whether what an archive holds is what was archived: every file read back, decoded, compared, and every page of a
//! segment looked at. Nothing is written.

use crate::error::{Kind, Result};
use crate::in_order::{file_threads, in_order};
use crate::lineage::Lineage;
use crate::listing::{Range, each_name};
use crate::place::Place;
use crate::pulse::Pulse;
use crate::restore::{Received, damaged, receive};
use crate::wal::{History, Pages, WalName, check_label};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Duration;

/// What became of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is what was archived.
    Ok,
    /// Everything that it says of itself is right; what was archived was not noted.
    Unverified,
    /// It is not what was archived, or not what its name says.
    Damaged,
    /// The archive's records name it, or its listing just did, and it is not there.
    Missing,
    /// It could not be read, so nobody knows.
    Unreadable,
}

impl State {
    /// The word shown to users.
    pub fn word(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Unverified => "unverified",
            State::Damaged => "damaged",
            State::Missing => "missing",
            State::Unreadable => "unreadable",
        }
    }

    /// Whether somebody must act.
    pub fn is_bad(self) -> bool {
        matches!(self, State::Damaged | State::Missing | State::Unreadable)
    }
}

/// The verdict on one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The file.
    pub name: WalName,
    /// What became of it.
    pub state: State,
    /// Why, unless it is ok: one line without a full stop.
    pub detail: Option<String>,
}

/// Which files, and whose they are where that is known; else the archive itself tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// The files wanted.
    pub range: Range,
    /// The cluster's system identifier.
    pub system_identifier: Option<u64>,
}

/// How often a local file is read anew after a failure that may pass, and the pause before.
const MOST_ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(250);

/// How many files there are to be verified.
pub fn count(place: &Place, range: &Range, pulse: &Pulse) -> Result<u64> {
    let mut found = 0;
    each_name(place, range, |_, _| {
        found += 1;
        pulse.go_on()
    })?;
    Ok(found)
}

/// Verifies the files of a range on several threads and hands on a verdict for each, in order of their keys, until
/// `each` has heard enough. Ends within a second of the pulse's stop.
///
/// Fails as [`Place::confirm_archive`] does: no archive is no good one.
pub fn verify(
    place: &Place,
    request: &Request,
    pulse: &Pulse,
    each: &mut dyn FnMut(Verified) -> ControlFlow<()>,
) -> Result<()> {
    let inspector = Inspector::of(place, request.system_identifier, pulse)?;
    // Before the listing: what is recorded later was stored later.
    let recorded = match &place.records {
        Some(records) => {
            records.names(&place.layout)?.into_iter().filter(|name| request.range.contains(name)).collect()
        }
        None => BTreeSet::new(),
    };
    in_order(
        file_threads(place.is_remote()),
        |hand_out| each_file(place, &request.range, recorded, hand_out),
        |file: &File| inspector.verify(file),
        each,
    )
}

/// A file to be verified.
struct File {
    name: WalName,
    key: String,
}

/// Hands on what is stored and what is recorded, each file once, by timeline and within one by position.
fn each_file(
    place: &Place,
    range: &Range,
    recorded: BTreeSet<WalName>,
    hand_out: &mut dyn FnMut(File) -> Result<()>,
) -> Result<()> {
    let mut recorded: Vec<WalName> = recorded.into_iter().collect();
    // As the keys of a local archive come; the last one first, to be taken from the end.
    recorded.sort_by_key(|name| std::cmp::Reverse((name.timeline(), *name)));
    let file_of = |name: WalName| File { name, key: place.layout.wal_key(&name, place.likely_format) };
    each_name(place, range, |name, listed| {
        while let Some(next) = recorded.pop_if(|next| (next.timeline(), *next) <= (name.timeline(), name)) {
            if next != name {
                hand_out(file_of(next))?;
            }
        }
        hand_out(File { name, key: listed.key })
    })?;
    recorded.into_iter().rev().try_for_each(|name| hand_out(file_of(name)))
}

/// Reads one file after another back, and judges it.
pub(crate) struct Inspector<'a> {
    /// The archive.
    pub place: &'a Place,
    /// What the work beats, and what stops it.
    pub pulse: &'a Pulse,
    /// Whose WAL it is, where that is known.
    system_identifier: Option<u64>,
    /// Where its timelines end.
    lineage: Lineage,
}

impl<'a> Inspector<'a> {
    /// For an archive that is to be seen, and that cluster's where it is known.
    pub fn of(place: &'a Place, system_identifier: Option<u64>, pulse: &'a Pulse) -> Result<Self> {
        place.confirm_archive(system_identifier)?;
        let system_identifier = match system_identifier {
            Some(known) => Some(known),
            None => place.identity()?.and_then(|(identity, _)| identity.system_identifier().parse().ok()),
        };
        // A broken history file is told of when its turn comes.
        let (lineage, _) = Lineage::read(place, pulse)?;
        Ok(Inspector { place, pulse, system_identifier, lineage })
    }

    fn verify(&self, file: &File) -> Result<Verified> {
        let name = file.name;
        let verdict = |state, detail| Ok(Verified { name, state, detail });
        // A store has its own way of trying again.
        let most_attempts = if self.place.is_remote() { 1 } else { MOST_ATTEMPTS };
        let mut attempt = 1;
        loop {
            let inspected = self.inspect(&file.name, &file.key);
            // Whatever failed, it may have been because of that.
            self.pulse.go_on()?;
            return match inspected {
                Ok(Some(received)) if received.is_compared => verdict(State::Ok, None),
                Ok(Some(_)) => verdict(State::Unverified, Some("no hash was noted when it was archived".into())),
                Ok(None) => {
                    let location = self.place.store.location(&file.key);
                    verdict(State::Missing, Some(format!("\"{location}\" is not there")))
                }
                Err(error) if error.is_worth_retrying() && attempt < most_attempts => {
                    attempt += 1;
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(error) => {
                    let is_damage = error.kind() == Kind::Damaged;
                    let state = if is_damage { State::Damaged } else { State::Unreadable };
                    verdict(state, Some(error.message().to_string()))
                }
            };
        }
    }

    /// Reads a file back; nothing where there is none. Fails unless it is what its name says, and what was noted of it.
    pub fn inspect(&self, name: &WalName, key: &str) -> Result<Option<Received>> {
        let Some(object) = self.place.store.get(key)? else { return Ok(None) };
        let location = self.place.store.location(key);
        let mut reader = Reader::of(name, &self.lineage);
        // Whose it is, is judged below: here it is the file that is wrong, not the archive.
        let received = receive(self.place, name, None, object, &location, &mut |bytes| {
            self.pulse.go_on()?;
            reader.take(bytes);
            Ok(())
        });
        let judged = reader.judge(name, self.system_identifier);
        match (received, judged) {
            (Err(error), _) if error.kind() != Kind::Damaged => Err(error),
            (Ok(received), Ok(())) => Ok(Some(received)),
            (Ok(received), Err(cause)) if received.is_compared => {
                Err(damaged(&location, format!("{cause}, as it was when it was archived")))
            }
            (Ok(_), Err(cause)) => Err(damaged(&location, cause)),
            // It says where, which a comparison of hashes cannot.
            (Err(_), Err(cause)) if name.is_wal() => Err(damaged(&location, cause)),
            (Err(error), _) => Err(error),
        }
    }
}

/// What is looked at of a file's plain content while it comes.
enum Reader {
    Segment(Pages),
    Text(Vec<u8>),
}

impl Reader {
    fn of(name: &WalName, lineage: &Lineage) -> Self {
        match name {
            WalName::Segment(segment) => Reader::Segment(Pages::new(*segment, lineage.ends_of(segment.timeline))),
            WalName::Partial(segment) => Reader::Segment(Pages::of_partial(*segment)),
            WalName::Backup(..) | WalName::History(_) => Reader::Text(Vec::new()),
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        match self {
            Reader::Segment(pages) => pages.look_at(bytes),
            Reader::Text(text) => text.extend_from_slice(bytes),
        }
    }

    /// What is wrong with what was read so far.
    fn judge(&self, name: &WalName, system_identifier: Option<u64>) -> std::result::Result<(), String> {
        match (self, name) {
            (Reader::Segment(pages), _) => pages.judge(system_identifier).map_err(|bad| bad.to_string()),
            (Reader::Text(text), WalName::Backup(segment, offset)) => {
                check_label(*segment, *offset, &String::from_utf8_lossy(text)).map_err(|bad| bad.to_string())
            }
            (Reader::Text(text), _) => History::parse(text, name.timeline()).map(drop).map_err(|bad| bad.to_string()),
        }
    }
}
