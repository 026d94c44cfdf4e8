//! Records of a local archive brought into agreement with its files, within what a deletion may touch.

use super::horizon::Horizon;
use crate::catalogue::Retained;
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::layout::Layout;
use crate::place::{Place, Records};
use crate::sums;
use crate::wal::{SegmentSize, WalName};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What was done to the records.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settled {
    /// Lines of the catalogue that went.
    pub lines: u64,
    /// Lines of the catalogue that nobody can read, and that stay.
    pub broken: Option<Error>,
}

/// Removes hash directories that are empty, and the lines of files that are not there; both only where the deletion may.
pub fn settle(place: &Place, horizon: &Horizon) -> Result<Settled> {
    let Some(records) = &place.records else { return Ok(Settled::default()) };
    let layout = &place.layout;
    let wals = records.root().join(layout.wals_folder());
    let mut has_removed = false;
    for directory in touched(&wals, horizon)? {
        has_removed |= durable::remove_empty_directory(&directory)?;
    }
    if has_removed {
        durable::sync_directory(&wals)?;
    }
    let staging = records.make_staging()?;
    records.sweep_staging()?;
    let sums = touched(&records.root().join(layout.sums_folder()), horizon)?;

    let stays = |files: &mut Files<'_>, name: &WalName| Ok(!horizon.covers(name) || files.holds(name)?);
    let files = || Files { records, layout, folders: HashMap::new() };
    let retained = {
        // From here on nobody records: a file that is not there is not about to get a line.
        let mut catalogue = records.catalogue.hold_to_finish()?;
        let mut there = files();
        catalogue.retain(staging, |name| stays(&mut there, name))?
    };
    for path in sums {
        // Before the first file of a new directory has its sum, the directory is there.
        let is_needed = path.file_name().is_some_and(|name| wals.join(name).exists());
        // Looked at again: while the file of sums is held nothing is noted in it.
        let mut there = files();
        sums::retain(&path, staging, is_needed, |name| stays(&mut there, name))?;
    }
    Ok(Settled {
        lines: retained.removed,
        broken: broken_lines(&records.catalogue.path().display().to_string(), retained),
    })
}

/// The entries of a folder that are named as a hash directory which the deletion may touch.
fn touched(folder: &Path, horizon: &Horizon) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in entries(folder)? {
        let name = entry.map_err(|error| Error::io("read directory", folder, &error))?.file_name();
        if name.to_str().is_some_and(|name| horizon.touches(name)) {
            found.push(folder.join(name));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// What lies in a folder; nothing where there is none.
fn entries(folder: &Path) -> Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(Some(entries).into_iter().flatten()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        Err(error) => Err(Error::io("read directory", folder, &error)),
    }
}

/// Which files are there, each hash directory read once.
struct Files<'a> {
    records: &'a Records,
    layout: &'a Layout,
    folders: HashMap<String, HashSet<WalName>>,
}

impl Files<'_> {
    fn holds(&mut self, name: &WalName) -> Result<bool> {
        let key = name.hash_directory();
        if !self.folders.contains_key(&key) {
            let folder = self.records.root().join(self.layout.wal_folder(name));
            let mut names = HashSet::new();
            for entry in entries(&folder)? {
                let entry = entry.map_err(|error| Error::io("read directory", &folder, &error))?;
                names.extend(entry.file_name().to_str().and_then(|name| WalName::parse(name).ok()));
            }
            self.folders.insert(key.clone(), names);
        }
        Ok(self.folders.get(&key).is_some_and(|names| names.contains(name)))
    }
}

fn broken_lines(catalogue: &str, retained: Retained) -> Option<Error> {
    let (number, text) = retained.first_broken?;
    let count = retained.broken;
    let lines = if count == 1 { "1 line".to_string() } else { format!("{count} lines") };
    let message = format!("{lines} of the catalogue \"{catalogue}\" cannot be read");
    Some(
        Error::new(Kind::Damaged, catalogue, message).detail(format!(
            "Line {number} is the first: \"{text}\". Nothing was deleted because of them, and they stay."
        )),
    )
}

/// The size of segments as the sums tell it; nothing where they name none.
pub fn noted_segment_size(place: &Place) -> Result<Option<SegmentSize>> {
    let Some(records) = &place.records else { return Ok(None) };
    let folder = records.root().join(place.layout.sums_folder());
    for entry in entries(&folder)? {
        let entry = entry.map_err(|error| Error::io("read directory", &folder, &error))?;
        let sums = sums::find_all(&entry.path())?;
        let size = sums.iter().find(|(name, _)| matches!(name, WalName::Segment(_))).map(|(_, sum)| sum.noted.size);
        if let Some(size) = size.and_then(SegmentSize::new) {
            return Ok(Some(size));
        }
    }
    Ok(None)
}
