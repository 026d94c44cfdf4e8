//! An opened archive: the store behind the URL, the layout below it, and the records that a local one keeps.

use crate::catalogue::Catalogue;
use crate::codec::{self, Compression};
use crate::config::{CustomFormat, Destination, StorageUrl};
use crate::crypt::{self, SecretKeys};
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::filter::Filter;
use crate::hash::{Hash, HashKey};
use crate::identity::{Identity, MAX_IDENTITY_BYTES, foreign_archive};
use crate::layout::{Format, Layout, Naming};
use crate::mode::Mode;
use crate::part::{Part, extent, hash_of_first};
use crate::pulse::Pulse;
use crate::store::s3::{Patience, S3Store};
use crate::store::{Listed, LocalStore, Meta, Object, Store};
use crate::sums::{self, Sum};
use crate::wal::{LongPageHeader, SegmentName, SegmentSize, WalName};
use nix::unistd::geteuid;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How many names are asked for at once where there are foreign ones.
const FOREIGN_NAMES: usize = 1000;

/// Where one cluster's WAL lies. Opening one changes nothing there.
pub struct Place {
    /// Keys and bytes.
    pub store: Box<dyn Store>,
    /// The keys of this cluster.
    pub layout: Layout,
    /// Catalogue and sums, which only local storage has.
    pub records: Option<Records>,
    /// The format that files are most likely stored in.
    pub likely_format: Format,
    /// How files are read back that the user's own filter made.
    pub custom: Option<CustomReader>,
    /// What encrypted files are read with.
    pub secret_keys: SecretKeys,
    /// What the noted hashes of encrypted files are compared by, where the cluster is at hand that knows it.
    pub hash_key: Option<HashKey>,
}

/// A stored file being read back.
pub struct Decoded<'a> {
    /// The format it is in.
    pub format: Format,
    /// Its plain content.
    pub plain: Box<dyn Read + 'a>,
}

/// What reads back files that the user's own filter made.
pub struct CustomReader {
    format: CustomFormat,
    patience: Duration,
    pulse: Arc<Pulse>,
}

/// A stored WAL file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its key.
    pub key: String,
    /// Its format, where the key tells.
    pub format: Option<Format>,
}

/// The files in which a local archive says what it holds.
pub struct Records {
    /// Barman's catalogue.
    pub catalogue: Catalogue,
    root: PathBuf,
    staging: PathBuf,
    mode: Mode,
}

impl Records {
    /// Notes the sum of a stored file.
    pub fn add_sum(&self, layout: &Layout, name: &WalName, sum: &Sum) -> Result<()> {
        sums::append(&self.root.join(layout.sums_key(name)), name, sum, self.mode)
    }

    /// Notes, durably, what is about to be stored in encrypted form: bytes of that hash.
    pub fn announce_sum(&self, layout: &Layout, name: &WalName, sum: &Sum, stored: &Hash) -> Result<()> {
        sums::announce(&self.root.join(layout.sums_key(name)), name, sum, stored, self.mode)
    }

    /// What was announced of a file that is stored as bytes of that hash.
    pub fn find_announced_sum(&self, layout: &Layout, name: &WalName, stored: &Hash) -> Result<Option<Sum>> {
        sums::find_announced(&self.root.join(layout.sums_key(name)), name, stored)
    }

    /// Whether anything was announced of that file.
    pub fn is_announced(&self, layout: &Layout, name: &WalName) -> Result<bool> {
        sums::is_announced(&self.root.join(layout.sums_key(name)), name)
    }

    /// The noted sum of a stored file.
    pub fn find_sum(&self, layout: &Layout, name: &WalName) -> Result<Option<Sum>> {
        sums::find(&self.root.join(layout.sums_key(name)), name)
    }

    /// The noted sums of all files that share a hash directory with this one.
    pub fn find_neighbouring_sums(&self, layout: &Layout, name: &WalName) -> Result<HashMap<WalName, Sum>> {
        sums::find_all(&self.root.join(layout.sums_key(name)))
    }

    /// Where the sum of a stored file is noted.
    pub fn sums_path(&self, layout: &Layout, name: &WalName) -> PathBuf {
        self.root.join(layout.sums_key(name))
    }

    /// Makes one file of sums anew, as [`sums::rewrite`] does; answers how many lines went.
    pub fn rewrite_sums(
        &self,
        path: &Path,
        made: BTreeMap<WalName, Sum>,
        is_stored: impl FnMut(&WalName) -> Result<bool>,
    ) -> Result<u64> {
        sums::rewrite(path, self.make_staging()?, self.mode, made, is_stored)
    }

    /// The files that sums or catalogue name.
    pub fn names(&self, layout: &Layout) -> Result<BTreeSet<WalName>> {
        let folder = self.root.join(layout.sums_folder());
        let mut names = sums::names(&folder)?;
        self.catalogue.names(|name| {
            names.insert(name);
        })?;
        Ok(names)
    }

    /// Removes what dead processes left in the staging folder; answers how many files.
    pub fn sweep_staging(&self) -> Result<u64> {
        durable::sweep_leftovers(&self.staging, "")
    }

    /// The storage directory.
    pub fn root(&self) -> &PathBuf {
        &self.root
    }

    /// The staging folder.
    pub fn staging(&self) -> &PathBuf {
        &self.staging
    }

    /// The same, made where only Barman has written here before.
    pub fn make_staging(&self) -> Result<&PathBuf> {
        durable::create_directory(&self.staging, self.mode).map(|()| &self.staging)
    }
}

impl Place {
    /// Opens the place that `destination` names. Work in it beats `pulse`.
    pub fn open(destination: &Destination, pulse: &Arc<Pulse>) -> Result<Self> {
        let likely_format = destination.likely_format;
        let secret_keys = {
            let passphrase = destination.decryption_passphrase_command.as_deref().map(crypt::of_command);
            SecretKeys::new(destination.decryption_keys.as_deref(), passphrase)
        };
        let custom = destination.custom.clone().map(|format| CustomReader {
            format,
            patience: destination.attempt_timeout,
            pulse: Arc::clone(pulse),
        });
        match &destination.storage {
            StorageUrl::File { path, mode } => {
                let layout = Layout::new(destination.server_name.clone(), Naming::Plain);
                let store = LocalStore::open(path, &layout.staging_folder(), *mode, Arc::clone(pulse))?;
                let records = Records {
                    catalogue: Catalogue::new(
                        store.path(&layout.catalogue_key()),
                        store.path(&layout.catalogue_lock_key()),
                        *mode,
                        Arc::clone(pulse),
                    ),
                    root: path.clone(),
                    staging: store.staging().to_path_buf(),
                    mode: *mode,
                };
                let (store, records, hash_key) = (Box::new(store), Some(records), None);
                Ok(Place { store, layout, records, likely_format, custom, secret_keys, hash_key })
            }
            StorageUrl::S3(url) => {
                let layout = Layout::new(destination.server_name.clone(), Naming::Suffixed);
                let patience = Patience { attempt: destination.attempt_timeout, all: destination.retry_timeout };
                let environment = |name: &str| std::env::var(name).ok();
                let probe_key = layout.create_only_key();
                let store = S3Store::open(url, &probe_key, patience, environment, Arc::clone(pulse))?;
                let (store, records, hash_key) = (Box::new(store), None, None);
                Ok(Place { store, layout, records, likely_format, custom: None, secret_keys, hash_key })
            }
        }
    }

    /// The same, at the hand of a cluster that knows the key of noted hashes.
    pub fn known_to(mut self, hash_key: Option<HashKey>) -> Self {
        self.hash_key = hash_key;
        self
    }

    /// Reads a stored file back, whatever it was encrypted and compressed with, the user's own filter included. More than
    /// `max_plain_size` bytes are an error. What was read counts once its end was reached: only there an encrypted file
    /// shows that nobody changed it.
    pub fn decode<'a>(&'a self, stored: impl Read + Send + 'a, max_plain_size: u64) -> io::Result<Decoded<'a>> {
        let (encryption, compressed) = self.secret_keys.open(stored)?;
        let decoder = codec::decode_or(compressed, max_plain_size, |head, whole| match &self.custom {
            Some(custom) if custom.format.claims(head) => {
                let filter = Filter::new(&custom.format.filter, whole, custom.patience, &custom.pulse)?;
                Ok((Compression::Custom, Box::new(filter)))
            }
            _ => Ok((Compression::None, whole)),
        })?;
        Ok(Decoded { format: Format { compression: decoder.compression, encryption }, plain: decoder.plain })
    }

    /// How a stored file that begins so is compressed.
    pub fn format_of(&self, first_bytes: &[u8]) -> Compression {
        let is_custom = || self.custom.as_ref().is_some_and(|custom| custom.format.claims(first_bytes));
        Compression::detect(first_bytes)
            .unwrap_or_else(|| if is_custom() { Compression::Custom } else { Compression::None })
    }

    /// The archive as a whole, for people.
    pub fn location(&self) -> String {
        self.store.location(&self.layout.server_folder())
    }

    /// The archive as a whole, by a name that does not depend on how the URL spells it.
    pub fn real_location(&self) -> String {
        let folder = self.layout.server_folder();
        let real = self.records.as_ref().and_then(|records| records.root.canonicalize().ok());
        real.map_or_else(|| self.store.lasting_location(&folder), |root| root.join(&folder).display().to_string())
    }

    /// Fails where root would write into another user's archive: what it makes there would be out of that user's reach.
    pub fn refuse_root_in_anothers(&self) -> Result<()> {
        let Some(records) = self.records.as_ref().filter(|_| geteuid().is_root()) else { return Ok(()) };
        let folders = [records.root.join(self.layout.server_folder()), records.root.clone()];
        match folders.iter().find_map(|folder| fs::metadata(folder).ok()).map(|meta| meta.uid()) {
            Some(owner) if owner != 0 => {
                let location = self.location();
                let message =
                    format!("the archive at \"{location}\" belongs to the operating system user with ID {owner}");
                Err(Error::new(Kind::Configuration, location, message).hint("Run this as that user, not as root."))
            }
            _ => Ok(()),
        }
    }

    /// Where a WAL file would lie in its likely format, for people.
    pub fn wal_location(&self, name: &WalName) -> String {
        self.store.location(&self.layout.wal_key(name, self.likely_format))
    }

    /// Whether a network lies before it.
    pub fn is_remote(&self) -> bool {
        self.records.is_none()
    }

    /// What to ask whoever finds no archive here.
    pub fn absence_question(&self) -> &'static str {
        match self.records {
            Some(_) => "Is the file system mounted?",
            None => "Are bucket, prefix and endpoint the right ones?",
        }
    }

    /// The stored WAL file of that name; nothing where there is none. In cloud storage, where it may be there in several
    /// formats, the first one listed.
    pub fn find(&self, name: &WalName) -> Result<Option<Stored>> {
        match self.layout.naming() {
            Naming::Plain => {
                let key = self.layout.wal_key(name, self.likely_format);
                Ok(self.store.head(&key)?.map(|_| Stored { key, format: None }))
            }
            Naming::Suffixed => Ok(self.formats_of(name)?.into_iter().next()),
        }
    }

    /// Opens the stored WAL file of that name, at once where it is stored in the likely format.
    pub fn open_wal(&self, name: &WalName) -> Result<Option<(Stored, Object)>> {
        let key = self.layout.wal_key(name, self.likely_format);
        if let Some(object) = self.store.get(&key)? {
            let format = (self.layout.naming() == Naming::Suffixed).then_some(self.likely_format);
            return Ok(Some((Stored { key, format }, object)));
        }
        if self.layout.naming() == Naming::Plain {
            return Ok(None);
        }
        let listed = self.formats_of(name)?;
        for stored in &listed {
            if let Some(object) = self.store.get(&stored.key)? {
                return Ok(Some((stored.clone(), object)));
            }
        }
        match listed.first() {
            None => Ok(None),
            // Removed just now, or a store that is not at one with itself: no reason to say that it was never there.
            Some(stored) => {
                let location = self.store.location(&stored.key);
                let message = format!("\"{location}\" is listed and cannot be read");
                Err(Error::new(Kind::Storage, location, message).retry_if(true))
            }
        }
    }

    /// What the first page of a stored segment says; nothing where the file is gone or does not begin with one.
    pub fn page_header(&self, key: &str) -> Result<Option<LongPageHeader>> {
        let Some(object) = self.store.get(key)? else { return Ok(None) };
        let mut head = [0; LongPageHeader::LENGTH];
        let read = self.decode(object.body, u64::MAX).and_then(|mut decoder| decoder.plain.read_exact(&mut head));
        Ok(read.ok().and_then(|()| LongPageHeader::parse(&head).ok()))
    }

    /// The size of segments as a stored one tells it, or what is noted of that; nothing where neither does. What the storage
    /// fails with is an error: another segment would tell no more.
    pub fn size_of_segment(&self, name: &WalName, key: &str) -> Result<Option<SegmentSize>> {
        let Some(object) = self.store.get(key)? else { return Ok(None) };
        if let Some(content) = object.meta.content {
            return Ok(SegmentSize::new(content.size));
        }
        let mut head = [0; LongPageHeader::LENGTH];
        let read = self.decode(object.body, u64::MAX).and_then(|mut decoder| decoder.plain.read_exact(&mut head));
        match read {
            Ok(()) => {
                if let Ok(header) = LongPageHeader::parse(&head) {
                    return Ok(Some(header.segment_size));
                }
            }
            Err(error) if error.raw_os_error().is_some() => {
                return Err(Error::io("read file", Path::new(&self.store.location(key)), &error));
            }
            Err(_) => {}
        }
        let Some(records) = &self.records else { return Ok(None) };
        Ok(records.find_sum(&self.layout, name)?.and_then(|sum| SegmentSize::new(sum.noted.size)))
    }

    /// Whether what is archived of a segment in part goes as far as that part does, whose hash `hash` tells (nothing where it
    /// went meanwhile: then there is better). Nothing where none is archived.
    pub fn partial_holds(&self, part: &Part, hash: impl FnOnce() -> Result<Option<Hash>>) -> Result<Option<bool>> {
        let name = WalName::Partial(part.segment);
        let Some(extent) = self.read_wal(&name, |plain| extent(plain))? else { return Ok(None) };
        if extent.bytes < part.bytes || part.bytes <= extent.last_page {
            return Ok(Some(part.bytes <= extent.bytes));
        }
        // What a server's timeline ended with may hold, to the end of that page, what its file held before.
        let Some(hash) = hash()? else { return Ok(Some(true)) };
        let archived = self.read_wal(&name, |plain| hash_of_first(plain, part.bytes))?;
        Ok(archived.map(|archived| archived == Some(hash)))
    }

    fn read_wal<T>(&self, name: &WalName, read: impl FnOnce(Box<dyn Read + '_>) -> io::Result<T>) -> Result<Option<T>> {
        let Some((stored, object)) = self.open_wal(name)? else { return Ok(None) };
        let done = self.decode(object.body, u64::MAX).and_then(|decoded| read(decoded.plain));
        done.map(Some).map_err(|error| self.unfit(&stored.key, &error))
    }

    /// The hash of that part's content; nothing where it went.
    pub fn hash_of_part(&self, part: &Part) -> Result<Option<Hash>> {
        for key in self.part_keys(part)? {
            let Some(object) = self.store.get(&key)? else { continue };
            let hash = self.decode(object.body, u64::MAX).and_then(|decoded| hash_of_first(decoded.plain, part.bytes));
            return hash.map_err(|error| self.unfit(&key, &error));
        }
        Ok(None)
    }

    fn unfit(&self, key: &str, error: &io::Error) -> Error {
        Error::of_stored_copy(&self.store.location(key), error, "Restore it from another copy of the archive.")
    }

    /// The parts of that segment, or of any, that are kept: in order.
    pub fn parts(&self, of: Option<SegmentName>) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = self.part_objects(of)?.into_iter().map(|(part, _)| part).collect();
        parts.dedup();
        Ok(parts)
    }

    /// The objects of that part, in whatever formats.
    pub fn part_keys(&self, part: &Part) -> Result<Vec<String>> {
        let objects = self.part_objects(Some(part.segment))?;
        Ok(objects.into_iter().filter(|(one, _)| one == part).map(|(_, listed)| listed.key).collect())
    }

    /// The same with their objects: one part may stand there in several formats.
    pub fn part_objects(&self, of: Option<SegmentName>) -> Result<Vec<(Part, Listed)>> {
        const PAGE: usize = 1000;
        let folder = self.layout.parts_folder();
        // All keys that begin with the name lie behind this one.
        let mut after = of.map(|segment| format!("{folder}/{segment}"));
        let mut found = Vec::new();
        loop {
            let page = self.store.list(&folder, after.as_deref(), PAGE)?;
            let is_last = page.len() < PAGE;
            after = page.last().map(|listed| listed.key.clone());
            let parts = page.into_iter().filter_map(|listed| Some((self.layout.part(&listed.key)?, listed)));
            let mut has_passed = false;
            for (part, listed) in parts {
                match of {
                    Some(segment) if part.segment != segment => has_passed = true,
                    _ => found.push((part, listed)),
                }
            }
            if is_last || has_passed {
                found.sort_by_key(|(part, _)| *part);
                return Ok(found);
            }
        }
    }

    /// Every object of that name in cloud storage.
    fn formats_of(&self, name: &WalName) -> Result<Vec<Stored>> {
        /// More than there is, most often, of a file and of those neighbours whose names differ in the last digit.
        const PAGE: usize = 64;
        let bare = self.layout.wal_key(name, Compression::None);
        // All keys that begin with the name lie behind this one, and right behind each other.
        let mut after = bare[..bare.len() - 1].to_string();
        let mut found = Vec::new();
        loop {
            let page = self.store.list(&self.layout.wal_folder(name), Some(&after), PAGE)?;
            let has_passed = |key: &str| *key > *bare && !key.starts_with(&bare);
            let is_last = page.len() < PAGE || page.last().is_some_and(|listed| has_passed(&listed.key));
            for listed in page {
                match self.layout.wal_name(&listed.key) {
                    Some((one, format)) if one == *name => found.push(Stored { key: listed.key.clone(), format }),
                    _ => {}
                }
                after = listed.key;
            }
            if is_last {
                return Ok(found);
            }
        }
    }

    /// Whose archive it says it is, with what tells one identity file from the next; nothing where it does not say.
    pub fn identity(&self) -> Result<Option<(Identity, Meta)>> {
        let key = self.layout.identity_key();
        let Some(object) = self.store.get(&key)? else { return Ok(None) };
        let unreadable = |cause: String| {
            let location = self.store.location(&key);
            Error::new(
                Kind::Identity,
                location.clone(),
                format!("could not read the identity file \"{location}\": {cause}"),
            )
        };
        let mut text = Vec::new();
        object
            .body
            .take(MAX_IDENTITY_BYTES)
            .read_to_end(&mut text)
            .map_err(|error| unreadable(crate::error::plain_cause(&error)))?;
        let identity = Identity::parse(&text).map_err(|error| unreadable(error.to_string()))?;
        Ok(Some((identity, object.meta)))
    }

    /// Fails unless there is an archive at all, and the right one: its identity file was read, or, where Barman keeps
    /// none, at least one WAL file was seen. Only then does a file that is not found mean that the archive lacks it.
    pub fn confirm_archive(&self, system_identifier: Option<u64>) -> Result<()> {
        let location = self.location();
        match (self.identity()?, system_identifier) {
            (Some((identity, _)), Some(ours)) if !identity.names(ours) => {
                Err(foreign_archive(&location, identity.system_identifier(), ours))
            }
            (Some(_), _) => Ok(()),
            (None, _) if !self.list_wal(None, 1)?.is_empty() => Ok(()),
            (None, _) => Err(Error::new(
                Kind::Identity,
                location.clone(),
                format!("there is no archive at \"{location}\""),
            )
            .detail("Neither an identity.json nor any WAL file is there, so it cannot be told that a file is missing.")
            .hint(format!(
                "{} Are archiver.storage and archiver.server_name those of the server that archived?",
                self.absence_question()
            ))),
        }
    }

    /// Fails where our own records say that this file, which is not there, is in the archive.
    pub fn confirm_never_stored(&self, name: &WalName) -> Result<()> {
        let Some(records) = &self.records else { return Ok(()) };
        if records.find_sum(&self.layout, name)?.is_none() {
            return Ok(());
        }
        let location = self.wal_location(name);
        Err(Error::new(Kind::Damaged, location.clone(), format!("\"{location}\" was archived and is not there"))
            .detail("The archive's own records name it.")
            .hint("Is a file system below the archive not mounted? PostgreSQL must not go on without this file."))
    }

    /// The first WAL files in it, in order of their keys, beginning behind `after`: one page of at most `most`.
    pub fn list_wal(&self, after: Option<&str>, most: usize) -> Result<Vec<(WalName, Listed)>> {
        let mut after = after.map(str::to_string);
        let mut asked = most;
        loop {
            let page = self.store.list(&self.layout.wals_folder(), after.as_deref(), asked)?;
            let is_last = page.len() < asked;
            after = page.last().map(|listed| listed.key.clone());
            let wal: Vec<_> = page
                .into_iter()
                .filter_map(|listed| self.layout.wal_name(&listed.key).map(|(name, _)| (name, listed)))
                .take(most)
                .collect();
            if is_last || !wal.is_empty() {
                return Ok(wal);
            }
            // A page of nothing but foreign names: there may be many more, so whoever wants few does not ask for few.
            asked = most.max(FOREIGN_NAMES);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::ServerName;
    use crate::store::{Attributes, Body};
    use std::time::SystemTime;

    /// A place that is named as in cloud storage.
    fn cloud(root: &Path) -> Place {
        let layout = Layout::new(ServerName::parse("main").unwrap(), Naming::Suffixed);
        let store = LocalStore::open(root, &layout.staging_folder(), Mode::PRIVATE, Arc::default()).unwrap();
        let (likely_format, secret_keys, hash_key) = (Compression::Gzip.into(), SecretKeys::none(), None);
        let store = Box::new(store);
        Place { store, layout, records: None, likely_format, custom: None, secret_keys, hash_key }
    }

    #[test]
    fn a_file_is_found_behind_any_number_of_objects_of_its_neighbours() {
        let directory = tempfile::tempdir().unwrap();
        let place = cloud(directory.path());
        let put = |name: &WalName, format| {
            let attributes = Attributes { modified: SystemTime::now(), content: None };
            let key = place.layout.wal_key(name, format);
            place.store.put_new(&key, Body::Bytes(b"x"), &attributes).unwrap();
            key
        };
        for label in 0..200 {
            put(&WalName::parse(&format!("00000001000000000000001E.{label:08X}.backup")).unwrap(), Compression::Zstd);
        }
        let name = WalName::parse("00000001000000000000001F").unwrap();
        assert_eq!(place.find(&name).unwrap(), None);
        let key = put(&name, Compression::Zstd);
        put(&WalName::parse("00000001000000000000001F.partial").unwrap(), Compression::Zstd);
        put(&WalName::parse("000000010000000000000020").unwrap(), Compression::Zstd);
        let stored = Stored { key, format: Some(Compression::Zstd.into()) };
        assert_eq!(place.find(&name).unwrap().as_ref(), Some(&stored));
        assert_eq!(place.open_wal(&name).unwrap().map(|(found, _)| found), Some(stored));
    }
}
