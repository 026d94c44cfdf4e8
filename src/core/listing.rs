//! What lies in an archive: one file by its name, or all of a range, page by page.

use crate::codec::Compression;
use crate::crypt::Encryption;
use crate::error::{Error, Result};
use crate::layout::{Format, Layout};
use crate::place::Place;
use crate::store::Listed;
use crate::sums::Sum;
use crate::wal::{LongPageHeader, Timeline, WalName};
use std::collections::HashMap;
use std::io::{self, Read};
use std::path::Path;
use std::time::SystemTime;

/// An archived file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archived {
    /// Its name.
    pub name: WalName,
    /// Bytes of plain content; nothing where the records do not tell of what is stored now.
    pub plain_size: Option<u64>,
    /// Bytes as stored.
    pub stored_size: u64,
    /// When it was stored, by the storage's clock.
    pub stored_at: SystemTime,
    /// The format it is stored in.
    pub format: Format,
    /// Where it lies, for people.
    pub location: String,
}

/// Which files are wanted, both ends included, in [`WalName`]'s order: history files stand before all others.
#[derive(Clone, Copy, Debug, Default)]
pub struct Range {
    /// The first; all from the beginning where there is none.
    pub from: Option<WalName>,
    /// The last; all to the end where there is none.
    pub to: Option<WalName>,
}

/// A file, and what a listing tells of it.
pub type Named = (WalName, Listed);

/// One page of the archived files in `range`, in order of their keys (by timeline, its history first): looks at the
/// first `most` (at least 1) files behind the key `after`, and answers with them the key to go on from.
///
/// No such key means the end; until then a page may be short, and even empty. A file that vanishes meanwhile is left
/// out. Whoever takes an empty list for an answer sees to [`Place::confirm_archive`] first.
pub fn list_page(
    place: &Place,
    after: Option<&str>,
    range: &Range,
    most: usize,
) -> Result<(Vec<Archived>, Option<String>)> {
    let (page, next) = name_page(place, after, range, most)?;
    let (mut sums, mut recorded) = (PageSums::default(), None);
    let mut found = Vec::new();
    for (name, listed) in page {
        let told = place.layout.wal_name(&listed.key).and_then(|(_, format)| format);
        let format = match told {
            Some(format) => Some(format),
            None => stored_format(place, &name, &listed.key, &mut recorded)?,
        };
        let Some(format) = format else { continue };
        let sum = sums.find(place, &name)?.filter(|sum| sum.stored_size == listed.stored_size);
        found.push(Archived {
            name,
            plain_size: sum.map(|sum| sum.noted.size),
            stored_size: listed.stored_size,
            stored_at: listed.stored_at,
            format,
            location: place.store.location(&listed.key),
        });
    }
    Ok((found, next))
}

/// The same, of each file only what a listing tells: no file is opened.
pub fn name_page(
    place: &Place,
    after: Option<&str>,
    range: &Range,
    most: usize,
) -> Result<(Vec<Named>, Option<String>)> {
    let begin = range.begin(&place.layout);
    let mut page = place.list_wal(after.max(begin.as_deref()), most)?;
    let Some((last, listed)) = page.last() else { return Ok((Vec::new(), None)) };
    let next = range.go_on(&place.layout, last, &listed.key);
    page.retain(|(name, _)| range.contains(name));
    Ok((page, next))
}

/// Hands on every archived file in `range`, in order of their keys, until `each` fails.
pub fn each_name(place: &Place, range: &Range, mut each: impl FnMut(WalName, Listed) -> Result<()>) -> Result<()> {
    const PAGE: usize = 1000;
    let mut after = None;
    loop {
        let (page, next) = name_page(place, after.as_deref(), range, PAGE)?;
        page.into_iter().try_for_each(|(name, listed)| each(name, listed))?;
        match next {
            Some(next) => after = Some(next),
            None => return Ok(()),
        }
    }
}

/// Where that file lies; nothing only where the archive itself was seen, is that cluster's, and never held it.
pub fn locate(place: &Place, name: &WalName, system_identifier: Option<u64>) -> Result<Option<String>> {
    place.confirm_archive(system_identifier)?;
    if let Some(stored) = place.find(name)? {
        return Ok(Some(place.store.location(&stored.key)));
    }
    place.confirm_never_stored(name).map(|()| None)
}

impl Range {
    /// Whether the file is wanted.
    pub fn contains(&self, name: &WalName) -> bool {
        self.from.is_none_or(|from| from <= *name) && self.to.is_none_or(|to| *name <= to)
    }

    /// A key behind which all of the range lies. History files, which stand first, may lie behind any segment.
    fn begin(&self, layout: &Layout) -> Option<String> {
        let mut key = layout.wal_key(&WalName::Segment(self.from?.segment()?), Compression::None);
        // A key that is no file's: the first of the range itself must lie behind it.
        key.pop();
        Some(key)
    }

    /// The key to go on from behind the file `last`; nothing where no later one can hold a file of the range.
    fn go_on(&self, layout: &Layout, last: &WalName, key: &str) -> Option<String> {
        let Some(to) = self.to.filter(|to| to < last) else { return Some(key.to_string()) };
        let may_hold_histories = self.from.is_none_or(|from| from.segment().is_none());
        let has_passed_last_history = to.segment().is_none() && to.timeline() <= last.timeline();
        if !may_hold_histories || has_passed_last_history {
            return None;
        }
        // Of what is left only the histories of later timelines can be in the range.
        Some(layout.begin_of_timeline(Timeline(last.timeline().0.checked_add(1)?)))
    }
}

/// The sums of the hash directory that the listing has come to.
#[derive(Default)]
struct PageSums {
    directory: Option<String>,
    sums: HashMap<WalName, Sum>,
}

impl PageSums {
    fn find(&mut self, place: &Place, name: &WalName) -> Result<Option<Sum>> {
        let Some(records) = &place.records else { return Ok(None) };
        let directory = Some(name.hash_directory());
        if self.directory != directory {
            self.sums = records.find_neighbouring_sums(&place.layout, name)?;
            self.directory = directory;
        }
        Ok(self.sums.get(name).copied())
    }
}

/// What the catalogue says of the compression of all files.
pub(crate) type Recorded = HashMap<WalName, Compression>;

/// The format of a stored file, by its first bytes; nothing where it is gone. What lies below an encryption they do not
/// tell: then by the catalogue, read at most once.
pub(crate) fn stored_format(
    place: &Place,
    name: &WalName,
    key: &str,
    recorded: &mut Option<Recorded>,
) -> Result<Option<Format>> {
    let Some(object) = place.store.get(key)? else { return Ok(None) };
    let mut head = Vec::new();
    // As much as tells plain WAL from what a filter of the user's made.
    let read = object.body.take(LongPageHeader::LENGTH as u64).read_to_end(&mut head);
    read.map_err(|error: io::Error| Error::io("read file", Path::new(&place.store.location(key)), &error))?;
    let encryption = Encryption::detect(&head);
    if encryption == Encryption::None {
        return Ok(Some(place.format_of(&head).into()));
    }
    if let (None, Some(records)) = (&recorded, &place.records) {
        *recorded = Some(records.catalogue.compressions()?);
    }
    let compression = recorded.as_ref().and_then(|recorded| recorded.get(name).copied());
    Ok(Some(Format { compression: compression.unwrap_or(Compression::None), encryption }))
}
