//! The same WAL file in another format: in cloud storage the name tells the format, so a changed setting, or Barman, gives
//! the same file another key, where no conditional put would find it.

use crate::error::Result;
use crate::layout::Naming;
use crate::place::Place;
use crate::single_flight::SingleFlight;
use crate::wal::WalName;
use std::collections::{HashMap, VecDeque};

/// What lay in a hash directory when its first file was stored: one listing, and none for the files after it. What
/// this archive stores since then is added; what somebody else stores meanwhile in another format is not seen.
#[derive(Default)]
pub struct Siblings {
    folders: SingleFlight<VecDeque<Folder>>,
}

struct Folder {
    key: String,
    /// Keys by name.
    stored: HashMap<WalName, Vec<String>>,
}

/// Read-ahead works in two at most, and a promotion adds another.
const MOST_FOLDERS: usize = 4;
const PAGE: usize = 1000;

impl Siblings {
    /// A key that holds that file, and is not `wanted`.
    pub fn find(&self, place: &Place, name: &WalName, wanted: &str) -> Result<Option<String>> {
        let directory = name.hash_directory();
        if place.layout.naming() == Naming::Plain {
            return Ok(None);
        }
        if directory.is_empty() {
            // Histories lie among all hash directories, and are few: each is looked for by itself.
            return Ok(place.find(name)?.map(|stored| stored.key).filter(|key| key != wanted));
        }
        let key = place.layout.wal_folder(name);
        self.folders.with(|folders| {
            if !folders.iter().any(|folder| folder.key == key) {
                folders.push_front(Folder { stored: list(place, &key)?, key: key.clone() });
                folders.truncate(MOST_FOLDERS);
            }
            let folder = folders.iter().find(|folder| folder.key == key);
            let stored = folder.and_then(|folder| folder.stored.get(name));
            Ok(stored.and_then(|keys| keys.iter().find(|key| *key != wanted)).cloned())
        })
    }

    /// Takes notice of a file that was stored since.
    pub fn add(&self, place: &Place, name: &WalName, key: &str) {
        let folder_key = place.layout.wal_folder(name);
        let added = self.folders.with(|folders| {
            if let Some(folder) = folders.iter_mut().find(|folder| folder.key == folder_key) {
                folder.stored.entry(*name).or_default().push(key.to_string());
            }
            Ok(())
        });
        // A failure would be one of listing, after which the folder is not known anyway.
        drop(added);
    }

    /// Lists anew from now on: what was listed has been removed meanwhile.
    pub fn forget(&self) {
        drop(self.folders.with(|folders| {
            folders.clear();
            Ok(())
        }));
    }
}

fn list(place: &Place, folder: &str) -> Result<HashMap<WalName, Vec<String>>> {
    let mut stored: HashMap<WalName, Vec<String>> = HashMap::new();
    let mut after: Option<String> = None;
    loop {
        let page = place.store.list(folder, after.as_deref(), PAGE)?;
        let is_last = page.len() < PAGE;
        after = page.last().map(|listed| listed.key.clone());
        for listed in page {
            if let Some((name, _)) = place.layout.wal_name(&listed.key) {
                stored.entry(name).or_default().push(listed.key);
            }
        }
        if is_last {
            return Ok(stored);
        }
    }
}
