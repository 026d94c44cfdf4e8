//! An opened archive: the store behind the URL, the layout below it, and the records that a local one keeps.

use crate::catalogue::Catalogue;
use crate::config::{Destination, StorageUrl};
use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::identity::{Identity, MAX_IDENTITY_BYTES, foreign_archive};
use crate::layout::Layout;
use crate::mode::Mode;
use crate::pulse::Pulse;
use crate::store::{Listed, LocalStore, Meta, Store};
use crate::sums::{self, Sum};
use crate::wal::WalName;
use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

/// Where one cluster's WAL lies. Opening one changes nothing there.
pub struct Place {
    /// Keys and bytes.
    pub store: Box<dyn Store>,
    /// The keys of this cluster.
    pub layout: Layout,
    /// Catalogue and sums, which only local storage has.
    pub records: Option<Records>,
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

    /// The noted sum of a stored file.
    pub fn find_sum(&self, layout: &Layout, name: &WalName) -> Result<Option<Sum>> {
        sums::find(&self.root.join(layout.sums_key(name)), name)
    }

    /// The noted sums of all files that share a hash directory with this one.
    pub fn find_neighbouring_sums(&self, layout: &Layout, name: &WalName) -> Result<HashMap<WalName, Sum>> {
        sums::find_all(&self.root.join(layout.sums_key(name)))
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
}

impl Place {
    /// Opens the place that `destination` names. Work in it beats `pulse`.
    pub fn open(destination: &Destination, pulse: &Arc<Pulse>) -> Result<Self> {
        let layout = Layout::new(destination.server_name.clone());
        match &destination.storage {
            StorageUrl::File { path, mode } => {
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
                Ok(Place { store: Box::new(store), layout, records: Some(records) })
            }
            StorageUrl::S3(_) => todo!(),
        }
    }

    /// The archive as a whole, for people.
    pub fn location(&self) -> String {
        self.store.location(&self.layout.server_folder())
    }

    /// The archive as a whole, by a name that does not depend on how the URL spells it.
    pub fn real_location(&self) -> String {
        let real = self.records.as_ref().and_then(|records| records.root.canonicalize().ok());
        real.map_or_else(|| self.location(), |root| root.join(self.layout.server_folder()).display().to_string())
    }

    /// Where a WAL file lies, for people.
    pub fn wal_location(&self, name: &WalName) -> String {
        self.store.location(&self.layout.wal_key(name, ""))
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
            .hint("Is the file system mounted? Are archiver.storage and archiver.server_name those of the server that archived?")),
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
        loop {
            let page = self.store.list(&self.layout.wals_folder(), after.as_deref(), most)?;
            let is_last = page.len() < most;
            after = page.last().map(|listed| listed.key.clone());
            let wal: Vec<_> = page
                .into_iter()
                .filter_map(|listed| self.layout.wal_name(&listed.key).map(|name| (name, listed)))
                .collect();
            // A page may hold nothing but foreign names.
            if is_last || !wal.is_empty() {
                return Ok(wal);
            }
        }
    }
}
