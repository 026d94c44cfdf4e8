//! A store in a directory: one file an object, published by a link that cannot replace.

use super::{Attributes, Body, Listed, Meta, Object, Put, Store};
use crate::durable::{self, Published, StagedFile};
use crate::error::{Error, Kind, Result};
use crate::mode::Mode;
use crate::pulse::Pulse;
use crate::single_flight::SingleFlight;
use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Device and inode: a directory removed and made again by somebody else has others.
type DirectoryId = (u64, u64);

/// Objects as files below `root`.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    staging: PathBuf,
    mode: Mode,
    pulse: Arc<Pulse>,
    /// Directories whose entry in their parent this process has made durable. One that merely exists may have been
    /// made by a process that died before it synced the parent.
    durable_directories: Mutex<HashMap<PathBuf, DirectoryId>>,
    /// The directory that was synced last, and when that began.
    synced: SingleFlight<Option<(PathBuf, Instant)>>,
}

impl LocalStore {
    /// A store below the directory `root`, which must exist: a missing mount must not be made.
    /// `staging` is the folder, below `root`, of files in the making; the store makes it when it first needs it.
    pub fn open(root: &Path, staging: &str, mode: Mode, pulse: Arc<Pulse>) -> Result<Self> {
        let unfit = |cause: &io::Error| {
            Error::io("open storage directory", root, cause)
                .hint("The directory must exist: create it, or mount the file system that holds it.")
        };
        match fs::metadata(root) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(unfit(&io::Error::from_raw_os_error(libc::ENOTDIR))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unfit(&error)),
            Err(error) => return Err(Error::io("open storage directory", root, &error)),
        }
        Ok(LocalStore {
            root: root.to_path_buf(),
            staging: root.join(staging),
            mode,
            pulse,
            durable_directories: Mutex::default(),
            synced: SingleFlight::default(),
        })
    }

    /// The directory all keys lie below.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of files in the making.
    pub fn staging(&self) -> &Path {
        &self.staging
    }

    /// The file of an object.
    pub fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    /// Makes `directory` and what is missing above it, down from the root, each entry durable.
    fn make_durable_directory(&self, directory: &Path) -> Result<()> {
        let mut known = self.durable_directories.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = |known: &HashMap<PathBuf, DirectoryId>, path: &Path| {
            let meta = fs::metadata(path);
            meta.is_ok_and(|meta| known.get(path) == Some(&(meta.dev(), meta.ino())))
        };
        if is_known(&known, directory) {
            return Ok(());
        }
        let below = directory.strip_prefix(&self.root).map_err(|_| {
            Error::new(Kind::Internal, directory.display().to_string(), "a key leads out of the storage directory")
        })?;
        let mut path = self.root.clone();
        for part in below.components() {
            let parent = path.clone();
            path.push(part);
            if !is_known(&known, &path) {
                durable::create_directory(&path, self.mode)?;
                durable::sync_directory(&parent)?;
                let meta = fs::metadata(&path).map_err(|error| Error::io("stat directory", &path, &error))?;
                known.insert(path.clone(), (meta.dev(), meta.ino()));
            }
        }
        Ok(())
    }

    /// Creates an empty file in the making.
    fn stage(&self) -> Result<StagedFile<'_>> {
        self.make_durable_directory(&self.staging)?;
        StagedFile::create(&self.staging, "", self.mode, &self.pulse)
    }

    /// Makes the entries of `directory` durable. Threads that want that at the same time share one call: one that began
    /// after their entries were made.
    fn sync_directory(&self, directory: &Path) -> Result<()> {
        let asked = Instant::now();
        self.synced.with(|synced| {
            if synced.as_ref().is_some_and(|(path, began)| path == directory && *began > asked) {
                return Ok(());
            }
            let began = Instant::now();
            durable::sync_directory(directory)?;
            *synced = Some((directory.to_path_buf(), began));
            Ok(())
        })
    }

    /// Whoever made it may have died before it was durable.
    fn confirm_existing(&self, path: &Path, directory: &Path) -> Result<Put> {
        durable::sync_file(path)?;
        self.sync_directory(directory)?;
        Ok(Put::AlreadyExists)
    }

    fn stat(&self, key: &str) -> Result<Option<Metadata>> {
        let path = self.path(key);
        Ok(if_there(fs::metadata(&path), "stat file", &path)?.filter(Metadata::is_file))
    }

    /// Adds the files below `folder` whose key lies behind `after`, in order of their keys, until there are `most`.
    fn walk(&self, folder: &str, after: Option<&str>, most: usize, found: &mut Vec<Listed>) -> Result<()> {
        let path = self.path(folder);
        let unreadable = |error: &io::Error| Error::io("read directory", &path, error);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(unreadable(&error)),
        };
        let mut keys = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| unreadable(&error))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let file_type = entry.file_type().map_err(|error| unreadable(&error))?;
            // Links are followed, as reading follows them.
            let is_directory = file_type.is_dir() || file_type.is_symlink() && entry.path().is_dir();
            // With its slash a directory sorts among the files as its content does.
            keys.push(format!("{folder}/{name}{}", if is_directory { "/" } else { "" }));
        }
        keys.sort_unstable();
        for key in keys {
            if found.len() >= most {
                break;
            }
            if let Some(directory) = key.strip_suffix('/') {
                let lies_before = after.is_some_and(|after| key.as_str() < after && !after.starts_with(&key));
                if !lies_before {
                    self.walk(directory, after, most, found)?;
                }
            } else if after.is_none_or(|after| key.as_str() > after) {
                // Gone since the directory was read: not there.
                if let Some(meta) = self.stat(&key)? {
                    found.push(Listed { key, stored_size: meta.len(), stored_at: change_time(&meta) });
                }
            }
        }
        Ok(())
    }
}

fn modification_time(meta: &Metadata) -> SystemTime {
    meta.modified().unwrap_or(SystemTime::UNIX_EPOCH)
}

/// When the file got its name: nothing else touches an archived file, and its modification time is its source's.
fn change_time(meta: &Metadata) -> SystemTime {
    let (seconds, nanoseconds) = (meta.ctime().max(0) as u64, meta.ctime_nsec().clamp(0, 999_999_999) as u32);
    SystemTime::UNIX_EPOCH + Duration::new(seconds, nanoseconds)
}

fn meta_of(meta: &Metadata) -> Meta {
    Meta {
        stored_size: meta.len(),
        modified: modification_time(meta),
        content: None,
        version: format!("{}-{}-{}.{}", meta.dev(), meta.ino(), meta.ctime(), meta.ctime_nsec()),
    }
}

/// Somebody may remove an emptied directory at any time (a purge does), also the one just made anew.
fn despite_removals<T>(mut once: impl FnMut() -> Result<T>) -> Result<T> {
    const MOST_ATTEMPTS: usize = 4;
    let mut attempt = 1;
    loop {
        match once() {
            Err(error) if error.is_missing_file() && attempt < MOST_ATTEMPTS => attempt += 1,
            other => return other,
        }
    }
}

/// Writes the whole body, and lets go of it.
fn write(staged: &mut StagedFile<'_>, body: Body<'_>) -> Result<()> {
    let written = match body {
        Body::Bytes(bytes) => staged.write_all(bytes),
        Body::Lent(bytes) => staged.write_all((*bytes).as_ref()),
        Body::Shared(bytes) => staged.write_all(&bytes),
        Body::Stream(write) => write(staged),
    };
    written.map_err(|error| match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(callers) => callers.clone(),
        None => staged.failed("write", &error),
    })
}

/// A file that is not there, or whose directory is not, is an answer and no failure.
fn if_there<T>(result: io::Result<T>, action: &str, path: &Path) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(action, path, &error)),
    }
}

impl Store for LocalStore {
    fn put_new(&self, key: &str, body: Body<'_>, attributes: &Attributes) -> Result<Put> {
        let path = self.path(key);
        let directory = path.parent().unwrap_or(&self.root);
        let staged = despite_removals(|| {
            self.make_durable_directory(directory)?;
            match path.symlink_metadata() {
                Ok(_) => self.confirm_existing(&path, directory).map(|_| None),
                Err(_) => self.stage().map(Some),
            }
        });
        let Some(mut staged) = staged? else { return Ok(Put::AlreadyExists) };
        write(&mut staged, body)?;
        staged.sync(Some(attributes.modified))?;
        let stored_size = staged.written_bytes();
        despite_removals(|| {
            self.make_durable_directory(directory)?;
            match staged.publish(&path)? {
                Published::Created => {
                    // Where this fails the file stays: another server may have found it, and been told that it is stored.
                    self.sync_directory(directory)?;
                    self.pulse.beat();
                    Ok(Put::Created { stored_size })
                }
                Published::AlreadyExists => self.confirm_existing(&path, directory),
            }
        })
    }

    fn get(&self, key: &str) -> Result<Option<Object>> {
        let path = self.path(key);
        let Some(file) = if_there(File::open(&path), "open file", &path)? else { return Ok(None) };
        let meta = file.metadata().map_err(|error| Error::io("stat file", &path, &error))?;
        Ok(Some(Object { meta: meta_of(&meta), body: Box::new(file) }))
    }

    fn confirm(&self, key: &str) -> Result<bool> {
        if self.stat(key)?.is_none() {
            return Ok(false);
        }
        let path = self.path(key);
        self.confirm_existing(&path, durable::directory_of(&path)).map(|_| true)
    }

    fn head(&self, key: &str) -> Result<Option<Meta>> {
        Ok(self.stat(key)?.as_ref().map(meta_of))
    }

    fn list(&self, folder: &str, after: Option<&str>, most: usize) -> Result<Vec<Listed>> {
        let mut found = Vec::new();
        self.walk(folder, after, most.max(1), &mut found)?;
        Ok(found)
    }

    fn delete(&self, key: &str) -> Result<bool> {
        let path = self.path(key);
        let removed = if_there(fs::remove_file(&path), "remove file", &path)?.is_some();
        if let Some(directory) = path.parent().filter(|directory| removed && directory.is_dir()) {
            durable::sync_directory(directory)?;
        }
        Ok(removed)
    }

    fn delete_all(&self, keys: &[String]) -> Vec<Result<()>> {
        let remove = |key: &String| {
            let path = self.path(key);
            if_there(fs::remove_file(&path), "remove file", &path).map(drop)
        };
        let mut removed: Vec<Result<()>> = keys.iter().map(remove).collect();
        // One sync a directory, however many of its entries went. Also of those that were gone: whoever removed them may
        // have died before they were gone for good.
        let mut synced: HashMap<PathBuf, Result<()>> = HashMap::new();
        for (key, outcome) in keys.iter().zip(&mut removed).filter(|(_, outcome)| outcome.is_ok()) {
            let path = self.path(key);
            let directory = path.parent().unwrap_or(&self.root);
            let sync = || match durable::sync_directory(directory) {
                Err(error) if error.is_missing_file() => Ok(()),
                other => other,
            };
            *outcome = synced.entry(directory.to_path_buf()).or_insert_with(sync).clone();
        }
        removed
    }

    fn location(&self, key: &str) -> String {
        self.path(key).display().to_string()
    }
}
