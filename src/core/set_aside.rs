//! Files set aside: what could not be archived from an incoming directory and was moved out of the way, under Barman's
//! names `<name>.<UTC time>.<reason>`.

use crate::error::{Error, Kind, Result};
use crate::place::Place;
use std::collections::BTreeMap;
use std::time::SystemTime;
use time::PrimitiveDateTime;
use time::macros::format_description;

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
        let format = format_description!("[year][month][day]T[hour][minute][second]");
        let time = PrimitiveDateTime::parse(self.since.get(..15)?, format).ok()?;
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
