//! The same WAL file in another format: in cloud storage the name tells the format, so a changed setting, or Barman, gives
//! the same file another key, where no conditional put would find it.

use crate::error::Result;
use crate::layout::Naming;
use crate::place::Place;
use crate::wal::WalName;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

/// What lay in a hash directory when its first file was stored: one listing, and none for the files after it. What is
/// stored since then has the key that a put would find.
#[derive(Default)]
pub struct Siblings {
    folders: Mutex<VecDeque<Folder>>,
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
        // Held during the listing: all who wait want the same one.
        let mut folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        if !folders.iter().any(|folder| folder.key == key) {
            folders.push_front(Folder { stored: list(place, &key)?, key: key.clone() });
            folders.truncate(MOST_FOLDERS);
        }
        let folder = folders.iter().find(|folder| folder.key == key);
        let stored = folder.and_then(|folder| folder.stored.get(name));
        Ok(stored.and_then(|keys| keys.iter().find(|key| *key != wanted)).cloned())
    }

    /// Lists anew from now on: what was listed has been removed meanwhile.
    pub fn forget(&self) {
        self.folders.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
