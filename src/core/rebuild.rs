//! Catalogue and sums made anew from what is stored.
//!
//! Archiving goes on meanwhile, here and in other processes: what it stores and records is in the new files, too. Until
//! each new file stands in the place of the old one, that is whole.

use crate::catalogue::Entry;
use crate::crypt::Encryption;
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::hash::{Hash, Noted};
use crate::in_order::{file_threads, in_order};
use crate::layout::Format;
use crate::listing::{Range, Recorded, list_page, stored_format};
use crate::place::{Place, Records};
use crate::pulse::{Beating, Pulse};
use crate::store::Meta;
use crate::sums::{self, Sum};
use crate::verify::Inspector;
use crate::wal::WalName;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Rebuilt {
    /// Lines in the catalogue now, one for each stored file.
    pub files: u64,
    /// Lines that were missing.
    pub lines_added: u64,
    /// Lines that said something else.
    pub lines_changed: u64,
    /// Lines that went: of files that are not there, and those that nobody can read.
    pub lines_dropped: u64,
    /// Sums that were missing, or of what was stored before.
    pub sums_made: u64,
    /// Sums that went, as lines did.
    pub sums_dropped: u64,
    /// Files that have no new sum since they could not be read.
    pub unread: u64,
    /// What somebody should know of: each line that went, and each file that could not be read.
    pub notes: Vec<Error>,
}

/// Makes the records of a local archive anew. A sum that is there and fits is kept; where one is missing the file is read.
///
/// Fails as [`Place::confirm_archive`] does, and in cloud storage, which keeps no records.
pub fn rebuild(place: &Place, system_identifier: Option<u64>, pulse: &Pulse) -> Result<Rebuilt> {
    let Some(records) = &place.records else { return Err(no_records(place)) };
    place.refuse_root_in_anothers()?;
    let inspector = Inspector::of(place, system_identifier, pulse)?;
    records.sweep_staging()?;
    let staging = records.make_staging()?;
    let stored = stored_files(place, pulse)?;
    let mut rebuilt = Rebuilt::default();
    let made = make_sums(&inspector, records, &stored, &mut rebuilt)?;
    rewrite_sums(place, records, made, pulse, &mut rebuilt)?;

    // From here on nobody records: who has stored a file gives it its line after us, in the new catalogue.
    let mut catalogue = records.catalogue.hold()?;
    let mut recorded = None;
    let rewritten = catalogue.rewrite(staging, stored, |name| {
        pulse.go_on()?;
        entry_of(place, name, &mut recorded)
    })?;
    let path = records.catalogue.path().display().to_string();
    rebuilt.files = rewritten.lines;
    rebuilt.lines_added = rewritten.added;
    rebuilt.lines_changed = rewritten.changed;
    rebuilt.lines_dropped = (rewritten.dropped.len() + rewritten.broken.len()) as u64;
    let not_stored = |name: WalName| {
        let location = place.wal_location(&name);
        let message = format!("the catalogue named \"{name}\", and \"{location}\" is not there");
        Error::new(Kind::Damaged, location, message)
    };
    rebuilt.notes.extend(rewritten.dropped.into_iter().map(not_stored));
    let unreadable = |(number, text): (u64, String)| {
        let message = format!("line {number} of the catalogue \"{path}\" could not be read: \"{text}\"");
        Error::new(Kind::Damaged, path.clone(), message)
    };
    rebuilt.notes.extend(rewritten.broken.into_iter().map(unreadable));
    Ok(rebuilt)
}

fn no_records(place: &Place) -> Error {
    let location = place.location();
    Error::new(Kind::Configuration, location.clone(), format!("the archive at \"{location}\" keeps no catalogue"))
        .detail("A bucket is listed instead, and each object carries what was noted when it was archived.")
}

/// What the catalogue shall say, in order of the files' keys.
fn stored_files(place: &Place, pulse: &Pulse) -> Result<Vec<Entry>> {
    const PAGE: usize = 1000;
    let (mut stored, mut after) = (Vec::new(), None);
    loop {
        let (page, next) = list_page(place, after.as_deref(), &Range::default(), PAGE)?;
        for file in page {
            pulse.go_on()?;
            stored.extend(entry_in(place, &file.name, file.format)?);
        }
        match next {
            Some(next) => after = Some(next),
            None => return Ok(stored),
        }
    }
}

fn entry_in(place: &Place, name: &WalName, format: Format) -> Result<Option<Entry>> {
    let meta = place.store.head(&key_of(place, name))?;
    let of_meta = |meta: Meta| Entry { name: *name, stored_size: meta.stored_size, modified: meta.modified, format };
    Ok(meta.map(of_meta))
}

/// What the catalogue shall say of one file; nothing where it is not stored.
fn entry_of(place: &Place, name: &WalName, recorded: &mut Option<Recorded>) -> Result<Option<Entry>> {
    match stored_format(place, name, &key_of(place, name), recorded)? {
        Some(format) => entry_in(place, name, format),
        None => Ok(None),
    }
}

/// Where that file lies: local names do not tell formats.
fn key_of(place: &Place, name: &WalName) -> String {
    place.layout.wal_key(name, place.likely_format)
}

/// Reads every file whose sum is not there, or is of what was stored before.
fn make_sums(
    inspector: &Inspector<'_>,
    records: &Records,
    stored: &[Entry],
    rebuilt: &mut Rebuilt,
) -> Result<BTreeMap<WalName, Sum>> {
    let Inspector { place, pulse, .. } = inspector;
    let mut made = BTreeMap::new();
    in_order(
        file_threads(place.is_remote()),
        |give_out| {
            let mut known = (PathBuf::new(), HashMap::new());
            for entry in stored {
                let path = records.sums_path(&place.layout, &entry.name);
                if known.0 != path {
                    known = (path, records.find_neighbouring_sums(&place.layout, &entry.name)?);
                }
                if known.1.get(&entry.name).is_none_or(|sum| sum.stored_size != entry.stored_size) {
                    give_out((entry.name, entry.format.encryption))?;
                }
            }
            Ok(())
        },
        |(name, encryption): &(WalName, Encryption)| Ok((*name, sum_of(inspector, records, name, *encryption))),
        &mut |(name, sum)| {
            match sum {
                Ok(Some(sum)) => drop(made.insert(name, sum)),
                Ok(None) => {}
                Err(error) => {
                    rebuilt.unread += 1;
                    rebuilt.notes.push(error);
                }
            }
            if pulse.is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        },
    )?;
    pulse.go_on()?;
    Ok(made)
}

/// The sum of a stored file; nothing where it is gone. Fails where the file is not what it says of itself, or not what an
/// older sum says: that sum then stays, and goes on to say so.
fn sum_of(inspector: &Inspector<'_>, records: &Records, name: &WalName, encryption: Encryption) -> Result<Option<Sum>> {
    let place = inspector.place;
    let key = key_of(place, name);
    let stored = match encryption {
        Encryption::None => None,
        _ => match stored_hash(inspector, &key)? {
            None => return Ok(None),
            stored => stored,
        },
    };
    if let Some(stored) = &stored
        && let Some(announced) = records.find_announced_sum(&place.layout, name, stored)?
    {
        // Without any key: the archiver told beforehand what is in a file of that hash.
        return Ok(Some(announced));
    }
    let Some(received) = inspector.inspect(name, &key)? else { return Ok(None) };
    let noted = match (encryption, &place.hash_key) {
        (Encryption::None, _) => Noted::of(&received.content),
        (_, Some(hash_key)) => Noted::keyed(&received.content, hash_key),
        (_, None) => return Err(no_hash_key(&place.store.location(&key))),
    };
    let sum = Sum { noted, stored_size: received.stored_size };
    if let Some(stored) = &stored {
        // So that the archiver, which has no keys, knows the file again.
        records.announce_sum(&place.layout, name, &sum, stored)?;
    }
    Ok(Some(sum))
}

/// The hash of a file as it is stored; nothing where it is gone.
fn stored_hash(inspector: &Inspector<'_>, key: &str) -> Result<Option<Hash>> {
    let Some(object) = inspector.place.store.get(key)? else { return Ok(None) };
    let mut hasher = blake3::Hasher::new();
    let read = io::copy(&mut Beating::new(object.body, inspector.pulse), &mut hasher);
    inspector.pulse.go_on()?;
    read.map_err(|error| Error::io("read file", Path::new(&inspector.place.store.location(key)), &error))?;
    Ok(Some(Hash(hasher.finalize())))
}

fn no_hash_key(location: &str) -> Error {
    Error::new(
        Kind::Configuration,
        location,
        format!("of \"{location}\", which is encrypted, no hash can be noted here"),
    )
    .hint("Run this where the cluster's data directory is: it holds the key.")
}

/// Makes every file of sums anew.
fn rewrite_sums(
    place: &Place,
    records: &Records,
    made: BTreeMap<WalName, Sum>,
    pulse: &Pulse,
    rebuilt: &mut Rebuilt,
) -> Result<()> {
    rebuilt.sums_made = made.len() as u64;
    let mut made_in: BTreeMap<PathBuf, BTreeMap<WalName, Sum>> = BTreeMap::new();
    for (name, sum) in made {
        made_in.entry(records.sums_path(&place.layout, &name)).or_default().insert(name, sum);
    }
    let folder = records.root().join(place.layout.sums_folder());
    let mut paths: BTreeSet<PathBuf> = sums::paths(&folder)?.into_iter().collect();
    paths.extend(made_in.keys().cloned());
    for path in paths {
        pulse.go_on()?;
        let made = made_in.remove(&path).unwrap_or_default();
        let is_stored =
            |name: &WalName| Ok(place.store.head(&place.layout.wal_key(name, place.likely_format))?.is_some());
        rebuilt.sums_dropped += records.rewrite_sums(&path, made, is_stored)?;
    }
    match durable::sync_directory(&folder) {
        Err(error) if !error.is_missing_file() => Err(error),
        _ => Ok(()),
    }
}
