//! Files set aside: what could not be archived from an incoming directory and was moved out of the way, under Barman's
//! names `<name>.<UTC time>.<reason>`.

use crate::crypt::{self, Recipients, Seed};
use crate::error::{Error, Kind, Result};
use crate::place::Place;
use crate::regular_file::{self, Links};
use crate::stamp::Stamp;
use crate::store::{Attributes, Body, Put};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::SystemTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;
use time::{OffsetDateTime, PrimitiveDateTime};

/// A file in the archive's folder of errors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAside {
    /// The name it had.
    pub name: String,
    /// When it was set aside, in UTC: `20261121T101752Z`; empty where its name does not tell.
    pub since: String,
    /// Why: `duplicate`, `unknown`, or whatever stands at the end of its name.
    pub reason: String,
    /// Where it lies.
    pub location: String,
}

impl SetAside {
    /// When it was set aside, where its name tells.
    pub fn set_aside_at(&self) -> Option<SystemTime> {
        let time = PrimitiveDateTime::parse(self.since.get(..TIME_LENGTH)?, TIME).ok()?;
        Some(SystemTime::from(time.assume_utc()))
    }

    /// What a file's name tells. Barman's is read from its end, since the name in front may hold dots.
    fn of_file_name(file_name: &str, location: String) -> Self {
        let mut parts = file_name.rsplitn(3, '.');
        match (parts.next(), parts.next().filter(|time| is_utc_time(time)), parts.next()) {
            (Some(reason), Some(time), Some(name)) => {
                SetAside { name: name.into(), since: time.into(), reason: reason.into(), location }
            }
            _ => SetAside { name: file_name.into(), since: String::new(), reason: "unknown failure".into(), location },
        }
    }
}

/// `20261121T101752Z`; a number that makes it unique may follow.
fn is_utc_time(text: &str) -> bool {
    let parts = (text.get(..8), text.get(8..9), text.get(9..15), text.get(15..16));
    let (Some(day), Some("T"), Some(time), Some("Z")) = parts else { return false };
    let number =
        |digits: &str| digits.bytes().all(|it| it.is_ascii_digit()).then(|| digits.parse::<u32>().ok()).flatten();
    let [year, month, date] = [&day[..4], &day[4..6], &day[6..]].map(number);
    let clock = [&time[..2], &time[2..4], &time[4..]].map(number);
    let is_clock = clock.iter().zip([23, 59, 59]).all(|(part, most)| part.is_some_and(|part| part <= most));
    matches!((year, month, date), (Some(year), Some(month), Some(date)) if is_date(year, month, date)) && is_clock
}

/// Whether there was such a day.
fn is_date(year: u32, month: u32, day: u32) -> bool {
    let is_leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days = match month {
        2 => 28 + u32::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => 0,
    };
    year > 0 && (1..=days).contains(&day)
}

const TIME: &[BorrowedFormatItem] = format_description!("[year][month][day]T[hour][minute][second]Z");
const TIME_LENGTH: usize = "20261121T101752Z".len();
/// At most this many of one name are set aside for one reason in a second.
const MOST_AT_ONCE: usize = 100;
/// At most this many are told.
const MOST: usize = 10_000;
/// At most this many in one message.
const MOST_NAMED: usize = 10;

/// The files set aside in an archive, in order of their names; of very many the first ten thousand.
pub fn list(place: &Place) -> Result<Vec<SetAside>> {
    let page = place.store.list(&place.layout.errors_folder(), None, MOST)?;
    let of_key = |key: &str| {
        let file_name = key.rsplit('/').next().unwrap_or(key);
        SetAside::of_file_name(file_name, place.store.location(key))
    };
    Ok(page.iter().map(|listed| of_key(&listed.key)).collect())
}

/// Why a file is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The archive holds another one of its name.
    Duplicate,
    /// It is no WAL file.
    Unknown,
}

impl Reason {
    /// Barman's word for it.
    fn name(self) -> &'static str {
        match self {
            Reason::Duplicate => "duplicate",
            Reason::Unknown => "unknown",
        }
    }
}

/// What was just set aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Where it lies now.
    pub location: String,
    /// Which file that was: the one that may be removed.
    pub stamp: Stamp,
}

/// Copies the file at `path` into the archive's folder of errors, durably, beside all that lies there already; the source
/// stays. Where files are encrypted, to `recipients`, this one is.
pub fn put(place: &Place, recipients: Option<&Recipients>, path: &Path, reason: Reason) -> Result<Copied> {
    let failed = |action: &str, error: &io::Error| Error::io(action, path, error).of_kind(Kind::Source);
    let (file, meta) = regular_file::open(path, Links::Refused).map_err(|error| failed("open file", &error))?;
    let stamp = Stamp::of(&meta);
    let attributes = Attributes { modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH), content: None };
    let readers = recipients.map(|recipients| recipients.readers(SystemTime::now())).transpose()?;
    let seed = Seed::random();
    let mut stream = |out: &mut dyn Write| {
        (&file).rewind()?;
        let plain = Plain { file: &file, path }.take(stamp.size());
        match &readers {
            Some(readers) => crypt::encrypt(readers, &seed, plain, &mut *out)?,
            None => drop(io::copy(&mut { plain }, out)?),
        }
        let is_whole = (&file).stream_position()? == stamp.size() && Stamp::of(&file.metadata()?) == stamp;
        let changed = || {
            let message = format!("file \"{}\" changed while it was read", path.display());
            io::Error::other(Error::new(Kind::Source, path.display().to_string(), message).retry_if(true))
        };
        if is_whole { Ok(()) } else { Err(changed()) }
    };
    let time = OffsetDateTime::from(SystemTime::now()).format(TIME).map_err(io::Error::other);
    let time = time.map_err(|error| failed("tell when", &error))?;
    for number in 1..=MOST_AT_ONCE {
        let number = if number == 1 { String::new() } else { format!("-{number}") };
        let name = kept_name(path);
        let key = format!("{}/{name}.{time}{number}.{}", place.layout.errors_folder(), reason.name());
        match place.store.put_new(&key, Body::Stream(&mut stream), &attributes)? {
            Put::Created { .. } => return Ok(Copied { location: place.store.location(&key), stamp }),
            Put::AlreadyExists => {}
        }
    }
    let location = place.store.location(&place.layout.errors_folder());
    Err(Error::new(Kind::Storage, location.clone(), format!("too many files of one name lie in \"{location}\"")))
}

/// A file that is copied: its failures are its own, not those of the storage that it goes to.
struct Plain<'a> {
    file: &'a File,
    path: &'a Path,
}

impl Read for Plain<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut file = self.file;
        let failed = |error: &io::Error| Error::io("read file", self.path, error).of_kind(Kind::Source);
        file.read(buffer).map_err(|error| io::Error::other(failed(&error)))
    }
}

/// The name of a file that may be anybody's, as part of a key: what cannot be shown or listed is replaced, and it leaves
/// room for what stands behind it (255 bytes are a name at most).
fn kept_name(path: &Path) -> String {
    const MOST_BYTES: usize = 200;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let shown = |letter: char| if letter.is_control() || letter == char::REPLACEMENT_CHARACTER { '_' } else { letter };
    let mut kept: String = name.chars().map(shown).collect();
    kept.truncate(kept.floor_char_boundary(MOST_BYTES));
    kept
}

/// Removes one file that was set aside, by its exact name: the last part of its location. Answers where it lay.
pub fn clear(place: &Place, file_name: &str) -> Result<String> {
    let location = place.store.location(&place.layout.errors_folder());
    let absent = || {
        let message = format!("no file named \"{file_name}\" was set aside in \"{location}\"");
        Error::new(Kind::NotFound, file_name, message)
    };
    if file_name.is_empty() || file_name.contains(['/', '\0']) || matches!(file_name, "." | "..") {
        return Err(absent().hint("Give the name of the file itself, without its directory."));
    }
    let key = format!("{}/{file_name}", place.layout.errors_folder());
    if place.store.head(&key)?.is_some() && place.store.delete(&key)? {
        return Ok(place.store.location(&key));
    }
    // The name that a file had is not the one it has now, and several may have had it.
    let same: Vec<String> =
        list(place)?.into_iter().filter(|file| file.name == file_name).map(|it| it.location).collect();
    let names: Vec<&str> = same.iter().take(MOST_NAMED).filter_map(|location| location.rsplit('/').next()).collect();
    Err(match names[..] {
        [] => absent().hint(
            "Files that archiving refused lie in pg_wal, where they stay: they are settled by removing the cause.",
        ),
        _ => absent().hint(format!("Set aside under that name was: {}. Name one of these.", names.join(", "))),
    })
}

/// How many for which reason, in Barman's words: `duplicates: 2, unknown: 1`; nothing where there are none.
pub fn summary(files: &[SetAside]) -> Option<String> {
    let mut counts = BTreeMap::new();
    for file in files {
        let reason = match file.reason.as_str() {
            "duplicate" => "duplicates",
            "unknown" => "unknown",
            "error" => "not relevant",
            _ => "unknown failure",
        };
        *counts.entry(reason).or_insert(0) += 1;
    }
    let told: Vec<String> = counts.iter().map(|(reason, count)| format!("{reason}: {count}")).collect();
    (!told.is_empty()).then(|| told.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(file_name: &str) -> SetAside {
        SetAside::of_file_name(file_name, String::new())
    }

    #[test]
    fn a_name_tells_what_when_and_why() {
        let partial = of("000000010000000000000005.partial.20261121T101752Z.duplicate");
        assert_eq!(partial.name, "000000010000000000000005.partial");
        assert_eq!((partial.since.as_str(), partial.reason.as_str()), ("20261121T101752Z", "duplicate"));
        let since_epoch = partial.set_aside_at().unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(since_epoch.as_secs(), 1_795_256_272);
        assert_eq!(of("notes.txt").set_aside_at(), None);
        assert_eq!(of("notes.txt.20261121T101752Z.unknown").name, "notes.txt");
        for junk in [
            "",
            "notes.txt",
            "a.b.c",
            "x.20261121T101752.unknown",
            "x.20261399T250000Z.unknown",
            "x.20260229T000000Z.unknown",
        ] {
            assert_eq!((of(junk).name.as_str(), of(junk).reason.as_str()), (junk, "unknown failure"));
        }
    }

    #[test]
    fn the_summary_counts_by_reason_in_barmans_words() {
        assert_eq!(summary(&[]), None);
        let files = ["a.20261121T101752Z.unknown", "b.20261121T101752Z.duplicate", "c.20261121T101752Z.duplicate"];
        assert_eq!(summary(&files.map(of)).as_deref(), Some("duplicates: 2, unknown: 1"));
    }
}
