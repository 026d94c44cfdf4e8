//! Archiving: the one straight line that every file takes, and the pool of threads that walks it.

mod desk;
mod duplicate;
mod episode;
mod in_turn;
mod parts;
mod pool;
mod read_ahead;
mod siblings;
mod source;

pub use episode::{Episode, Recovered};
pub use pool::{Answer, Archiver, Progress, Totals};
pub use read_ahead::{ready_files, waiting_files};
pub use source::WalFile;

use crate::catalogue::{Entry, NewLine};
use crate::codec::{self, Compression};
use crate::config::{Config, ShellFilter, StorageUrl};
use crate::crypt::{self, Encryption, Reader, Recipients, Seed};
use crate::error::{Error, Kind, Result, plain_cause};
use crate::filter;
use crate::hash::{Content, Hash, Noted};
use crate::hooks::Hooks;
use crate::identity::{Cluster, Identity, Marker, foreign_archive, vanished_archive};
use crate::layout::Format;
use crate::place::Place;
use crate::pulse::{Beating, Pulse};
use crate::set_aside::{self, Copied, Reason};
use crate::single_flight::SingleFlight;
use crate::stamp::Stamp;
use crate::store::{Attributes, Body, Facts, Put};
use crate::sums::Sum;
use crate::wal::WalName;
use desk::{Desks, TakenDesk};
use once_cell::sync::OnceCell;
use siblings::Siblings;
use source::{Opened, Source};
use std::fs::{self, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// An archive to write to: one place, for one cluster, under one configuration.
pub struct Archive {
    /// Opened by the first thread that needs it: looking at a dead network file system can take for ever.
    place: OnceCell<Place>,
    config: Config,
    cluster: Cluster,
    marker: Option<Marker>,
    pulse: Arc<Pulse>,
    confirmed_identity: SingleFlight<Option<Confirmed>>,
    siblings: Siblings,
    desks: Desks,
    /// Those who may read it, where it is encrypted.
    recipients: Option<Recipients>,
    hooks: Hooks,
}

/// No more files are on their way to a store at once.
const MOST_PUTS: usize = 64;
/// Threads for local storage at most, where more processors do not ask for more: files that wait for the disk share what it
/// writes, and a few of them are enough for that.
const MOST_SYNCS: usize = 8;

/// How often the identity file in cloud storage is looked at.
const CONFIRM_INTERVAL: Duration = Duration::from_secs(60);

/// An identity file that was read and found to be ours.
struct Confirmed {
    at: Instant,
    /// Its version: while that stands, it need not be read again.
    version: String,
    /// Whether the marker tells of it. Where it could not be written (a full data disk must not keep WAL from being
    /// archived), it is tried again with the next file.
    is_remembered: bool,
}

fn encoding_failed(compression: Compression, error: &io::Error) -> Error {
    if let Some(own) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        return own.clone();
    }
    let cause = plain_cause(error);
    Error::new(Kind::Storage, compression.name(), format!("could not compress with {}: {cause}", compression.name()))
        .retry_if(error.kind() == io::ErrorKind::OutOfMemory)
}

/// A file that is stored: durable at its place, its line in the catalogue still to come.
#[derive(Clone, Debug)]
pub struct StoredFile {
    /// The file.
    pub name: WalName,
    /// Which source it was made from.
    pub stamp: Stamp,
    /// Where it lies.
    pub location: String,
    /// Bytes of plain content.
    pub plain_size: u64,
    /// Bytes as stored.
    pub stored_size: u64,
    /// Hash of the plain content.
    pub hash: Hash,
    /// The format it is stored in.
    pub format: Format,
    /// Modification time of the source.
    pub modified: SystemTime,
    /// Whether it was stored now; else it stood there already, with the same content.
    pub created: bool,
    /// How long reading, compressing and storing took.
    pub took: Duration,
}

impl Archive {
    /// The archive that `config` names for `cluster`. Nothing is opened, written or looked at before the first file.
    /// `marker` remembers the archive across restarts. Work beats `pulse`. Fails as [`check_memory`] does.
    pub fn new(config: Config, cluster: Cluster, marker: Option<Marker>, pulse: Arc<Pulse>) -> Result<Self> {
        check_memory(&config, &cluster)?;
        let recipients = config.encryption_recipients.as_deref().map(Recipients::new);
        if recipients.is_some() && cluster.hash_key.is_none() {
            let message = "files cannot be encrypted where no data directory is at hand";
            return Err(Error::new(Kind::Configuration, "archiver.encryption", message)
                .detail("Without it nothing could tell whether an encrypted file is the same as another one.")
                .hint("Name the data directory with -D."));
        }
        let desks = desks_in_memory(&config, &cluster);
        let at_desks = desks as u64 * desk_bytes(&config, &cluster);
        let desks = Desks::new(desks, config.memory_limit_bytes.saturating_sub(at_desks));
        Ok(Archive {
            desks,
            hooks: Hooks::new(&config.hooks, &config.destination, Arc::clone(&pulse)),
            place: OnceCell::new(),
            config,
            cluster,
            marker,
            pulse,
            confirmed_identity: SingleFlight::default(),
            siblings: Siblings::default(),
            recipients,
        })
    }

    fn place(&self) -> Result<&Place> {
        let open = || Place::open(&self.config.destination, &self.pulse);
        self.place.get_or_try_init(|| open().map(|place| place.known_to(self.cluster.hash_key)))
    }

    /// Opens the storage, unless that was done before. Nothing is written.
    pub fn open(&self) -> Result<()> {
        self.place().map(drop)
    }

    /// What is known of the storage, once it was opened.
    pub fn store_facts(&self) -> Option<Facts> {
        self.place.get().map(|place| place.store.facts())
    }

    /// Whether its cluster's memory of the archives it has begun is at hand: else nothing tells an unmounted directory
    /// from a new archive.
    pub fn has_marker(&self) -> bool {
        self.marker.is_some()
    }

    /// Fails as [`Place::confirm_archive`] does: where no archive of this cluster is to be seen.
    pub fn confirm_begun(&self) -> Result<()> {
        self.place()?.confirm_archive(Some(self.cluster.system_identifier))
    }

    /// Begins the archive where it is new, and fails where it is another cluster's or has vanished, as the first file does. What
    /// nothing remembers is not begun.
    pub fn confirm_or_begin(&self) -> Result<()> {
        match self.has_marker() {
            true => self.confirm_identity(self.place()?),
            false => self.confirm_begun(),
        }
    }

    /// Whether a file of that name is stored.
    pub fn holds(&self, name: &WalName) -> Result<bool> {
        Ok(self.place()?.find(name)?.is_some())
    }

    /// Fails as [`Place::refuse_root_in_anothers`] does. A storage that cannot be looked at is told of file by file.
    pub fn refuse_root_in_anothers(&self) -> Result<()> {
        self.place().map_or(Ok(()), Place::refuse_root_in_anothers)
    }

    /// Whether the file with that metadata is the very one that is stored under `name`.
    pub fn is_stored_file(&self, name: &WalName, file: &Metadata) -> Result<bool> {
        let place = self.place()?;
        let Some(records) = &place.records else { return Ok(false) };
        let path = records.root().join(place.layout.wal_key(name, Compression::None));
        let stored = fs::metadata(&path).map_err(|error| Error::io("stat file", &path, &error))?;
        Ok((stored.dev(), stored.ino()) == (file.dev(), file.ino()))
    }

    /// Copies a file that cannot be archived to those that were set aside, as [`set_aside::put`] does.
    pub fn set_aside(&self, path: &Path, reason: Reason) -> Result<Copied> {
        let place = self.place()?;
        self.confirm_identity(place)?;
        set_aside::put(place, self.recipients.as_ref(), path, reason)
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The cluster it was made for.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Stores one file: read and hash it, see that it is what its name says, compress it, put it where no file is.
    ///
    /// When this returns, the file is durable at its place; it is archived once [`Archive::record`] has returned, too.
    /// An equal file that stands there already is success, any other is refused and never replaced.
    pub fn store(&self, file: &WalFile) -> Result<StoredFile> {
        self.store_at(file, self.config.level)
    }

    /// The same at another level.
    fn store_at(&self, file: &WalFile, level: i32) -> Result<StoredFile> {
        let place = self.place()?;
        self.confirm_identity(place)?;
        let mut desk = self.desks.take(&self.pulse)?;
        let started = Instant::now();
        let opened = source::open(file, &self.cluster)?;
        let (stamp, modified) = (opened.stamp, opened.modified);
        // A source that is compressed already goes as it is.
        let compression = match opened.compression {
            Compression::None => self.config.compression,
            already => already,
        };
        let format = Format { compression, encryption: self.encryption() };
        let is_copied = format == Compression::None.into() && !place.is_remote();
        let mut key = place.layout.wal_key(&file.name, format);
        let (put, content) = match self.siblings.find(place, &file.name, &key)? {
            Some(other) => {
                key = other;
                (Put::AlreadyExists, opened.read(0, &mut desk.plain, &self.pulse)?.content)
            }
            None if is_copied => self.copy(place, &key, opened, desk)?,
            // Not encrypted and announced for nothing, again and again.
            None if self.recipients.is_some() && !place.is_remote() && place.store.confirm(&key)? => {
                (Put::AlreadyExists, opened.read(0, &mut desk.plain, &self.pulse)?.content)
            }
            None => {
                let source = opened.read(max_buffer_bytes(&self.config), &mut desk.plain, &self.pulse)?;
                let noted = self.noted(&source.content, format.encryption);
                // In a bucket metadata tells what the object holds.
                let announce = |stored: Hash, stored_size| match (&place.records, noted) {
                    (Some(records), Some(noted)) => {
                        records.announce_sum(&place.layout, &file.name, &Sum { noted, stored_size }, &stored)
                    }
                    _ => Ok(()),
                };
                (self.put(place, &key, file, &source, level, desk, &announce)?, source.content)
            }
        };
        let (stored_size, format, modified, created) = match put {
            Put::Created { stored_size } => {
                self.siblings.add(place, &file.name, &key);
                (stored_size, format, modified, true)
            }
            Put::AlreadyExists => {
                let compared = duplicate::compare(place, &file.name, &key, &content, &self.pulse);
                let same = compared.inspect_err(|_| self.siblings.forget())?;
                (same.meta.stored_size, same.format, same.meta.modified, false)
            }
        };
        // The file system may have been unmounted since: what was stored then lies in the empty mount point.
        self.confirm_identity(place)?;
        Ok(StoredFile {
            name: file.name,
            stamp,
            location: place.store.location(&key),
            plain_size: content.size,
            stored_size,
            hash: content.hash,
            format,
            modified,
            created,
            took: started.elapsed(),
        })
    }

    /// Records stored files in the order given, each exactly once, durably. Several cost little more than one.
    pub fn record(&self, files: &[StoredFile]) -> Result<()> {
        let place = self.place()?;
        let Some(records) = &place.records else { return Ok(()) };
        for file in files {
            let content = Content { size: file.plain_size, hash: file.hash };
            let Some(noted) = self.noted(&content, file.format.encryption) else { continue };
            let sum = Sum { noted, stored_size: file.stored_size };
            if file.created || records.find_sum(&place.layout, &file.name)? != Some(sum) {
                records.add_sum(&place.layout, &file.name, &sum)?;
            }
        }
        let lines: Vec<NewLine> = files
            .iter()
            .map(|file| NewLine {
                entry: Entry {
                    name: file.name,
                    stored_size: file.stored_size,
                    modified: file.modified,
                    format: file.format,
                },
                created: file.created,
            })
            .collect();
        records.catalogue.record(&lines)
    }

    /// How files are encrypted.
    fn encryption(&self) -> Encryption {
        if self.recipients.is_some() { Encryption::OpenPgp } else { Encryption::None }
    }

    /// What may be noted of that content beside a file stored so. Nothing of an encrypted one without the key.
    fn noted(&self, content: &Content, encryption: Encryption) -> Option<Noted> {
        match encryption {
            Encryption::None => Some(Noted::of(content)),
            Encryption::OpenPgp => self.cluster.hash_key.map(|key| Noted::keyed(content, &key)),
        }
    }

    /// How many files are read and encoded at once: as many as shall work, as far as memory reaches.
    pub fn desks(&self) -> usize {
        desks_in_memory(&self.config, &self.cluster)
    }

    /// The level for a file when so many, with it, are not stored yet.
    fn level(&self, unfinished: usize) -> i32 {
        if unfinished > 2 * self.desks() { self.config.backlog_level } else { self.config.level }
    }

    /// How many threads it can use: one where hooks run around each file; else more than there are desks, since a file that waits for the disk or the network is at
    /// none.
    pub fn threads(&self) -> usize {
        if self.works_in_turn() {
            return 1;
        }
        let desks = self.desks();
        let waiting = match self.config.destination.storage {
            StorageUrl::File { .. } => MOST_SYNCS,
            StorageUrl::S3(_) => MOST_PUTS,
        };
        (self.config.read_ahead + 1).clamp(desks, waiting.max(desks))
    }

    /// Stores a file as it is, which is read and hashed while it is written.
    fn copy(&self, place: &Place, key: &str, source: Opened<'_>, desk: TakenDesk<'_>) -> Result<(Put, Content)> {
        let attributes = Attributes { modified: source.modified, content: None };
        let (mut desk, mut copied) = (Some(desk), None);
        let mut stream = |out: &mut dyn Write| {
            let mut desk = desk.take().map_or_else(|| self.desks.take(&self.pulse), Ok).map_err(io::Error::other)?;
            copied = Some(source.copy(&mut desk.plain, out, &self.pulse)?);
            Ok(())
        };
        let put = place.store.put_new(key, Body::Stream(&mut stream), &attributes)?;
        match copied {
            Some(content) => Ok((put, content)),
            // One stands there already, with which it is to be compared.
            None => Ok((put, source.read(0, &mut Vec::new(), &self.pulse)?.content)),
        }
    }

    /// Encodes what was read and puts it there. `announce` is told, before that, of what is stored in encrypted form.
    #[expect(clippy::too_many_arguments, reason = "what is put, where, and how")]
    fn put(
        &self,
        place: &Place,
        key: &str,
        file: &WalFile,
        source: &Source,
        level: i32,
        mut desk: TakenDesk<'_>,
        announce: &dyn Fn(Hash, u64) -> Result<()>,
    ) -> Result<Put> {
        let content = self.noted(&source.content, self.encryption());
        let attributes = Attributes { modified: source.modified, content };
        let readers = self.recipients.as_ref().map(|recipients| recipients.readers(SystemTime::now())).transpose()?;
        let compression = match source.compression {
            Compression::None => self.config.compression,
            _ => Compression::None,
        };
        let filter = self.config.compressor.filter(level).filter(|_| compression != Compression::None);
        let (encoder, plain, encoded) = desk.encoder(compression, level)?;
        if source.is_in_memory {
            let is_encoded = compression != Compression::None;
            if is_encoded {
                match &filter {
                    Some(filter) => self.pipe(filter, plain, plain.len() as u64, encoded),
                    None => encoder.encode(plain, encoded),
                }
                .map_err(|error| encoding_failed(compression, &error))?;
                self.pulse.beat();
            }
            let mut made = if is_encoded { Made::Encoded } else { Made::Read };
            if let Some(readers) = &readers {
                desk.encrypt(readers, is_encoded).map_err(|error| encryption_failed(&error))?;
                self.pulse.beat();
                announce(Hash(blake3::hash(&desk.encrypted)), desk.encrypted.len() as u64)?;
                made = Made::Encrypted;
            }
            let body = DeskBody { desk, made };
            if place.is_remote() {
                let kept = self.desks.keep(body.as_ref(), &self.pulse)?;
                drop(body);
                return place.store.put_new(key, Body::Shared(kept.body.clone()), &attributes);
            }
            return place.store.put_new(key, Body::Lent(Box::new(body)), &attributes);
        }
        let seed = Seed::random();
        let mut stream = |out: &mut dyn Write| {
            let mut hashed =
                Hashed { inner: Beating::new(source.again()?, &self.pulse), hasher: blake3::Hasher::new() };
            let size = source.content.size;
            let mut encode = |out: &mut dyn Write| match &filter {
                Some(filter) => filter::encode(
                    filter,
                    &mut hashed,
                    out,
                    codec::most_encoded_bytes(size),
                    self.config.destination.attempt_timeout,
                    &self.pulse,
                ),
                None => encoder.encode_stream(&mut hashed, size, out),
            };
            let encoded = match &readers {
                None => encode(out),
                Some(readers) => {
                    let mut stored = Hashed { inner: out, hasher: blake3::Hasher::new() };
                    encrypt_stream(readers, &seed, &mut stored, encode)
                        .and_then(|()| announce(stored.hash(), stored.hasher.count()).map_err(io::Error::other))
                }
            };
            // The encoder, too, fails for a file that was cut short meanwhile.
            let is_unchanged = source.is_unchanged()? && (encoded.is_err() || hashed.hash() == source.raw_hash);
            if is_unchanged { encoded } else { Err(io::Error::other(changed_between_passes(file))) }
        };
        place.store.put_new(key, Body::Stream(&mut stream), &attributes)
    }

    /// Compresses by a program of the user's, within the memory of a desk.
    fn pipe(&self, filter: &ShellFilter, plain: &[u8], size: u64, encoded: &mut Vec<u8>) -> io::Result<()> {
        let most = codec::most_encoded_bytes(size);
        encoded.clear();
        encoded.try_reserve_exact(usize::try_from(most).map_err(|_| io::ErrorKind::OutOfMemory)?)?;
        filter::encode(filter, plain, encoded, most, self.config.destination.attempt_timeout, &self.pulse)
    }

    /// Makes sure that the archive is this cluster's, and still there: one look at the identity file where nothing
    /// changed. The first time it is made where there is none and the place is new.
    fn confirm_identity(&self, place: &Place) -> Result<()> {
        self.confirmed_identity.with(|confirmed| self.confirm_identity_once(place, confirmed))
    }

    fn confirm_identity_once(&self, place: &Place, confirmed: &mut Option<Confirmed>) -> Result<()> {
        // A directory may be unmounted between two files; a bucket that is gone says so with the next put.
        if let (Some(known), None) = (confirmed.as_ref(), &place.records)
            && known.at.elapsed() < CONFIRM_INTERVAL
        {
            return Ok(());
        }
        let key = place.layout.identity_key();
        let standing = place.store.head(&key)?;
        if let (Some(meta), Some(known)) = (&standing, confirmed.as_mut())
            && meta.version == known.version
        {
            known.at = Instant::now();
            known.is_remembered = known.is_remembered || self.remember(place);
            return Ok(());
        }
        let location = place.location();
        let is_remembered = match &self.marker {
            Some(marker) => marker.remembers(self.cluster.system_identifier, &place.real_location())?,
            None => true,
        };
        if place.identity()?.is_none() {
            if confirmed.is_some() || self.marker.is_some() && is_remembered {
                return Err(vanished_archive(
                    &location,
                    place.absence_question(),
                    self.marker.as_ref().map(Marker::path),
                ));
            }
            self.begin(place, &key, &location)?;
        }
        // Also after beginning it: another cluster may have been faster.
        let Some((identity, meta)) = place.identity()? else {
            return Err(vanished_archive(&location, place.absence_question(), None).retry_if(true));
        };
        if !identity.names(self.cluster.system_identifier) {
            return Err(foreign_archive(&location, identity.system_identifier(), self.cluster.system_identifier));
        }
        if let Some(records) = &place.records {
            records.sweep_staging()?;
            records.catalogue.catch_up()?;
        }
        let is_remembered = is_remembered || self.remember(place);
        *confirmed = Some(Confirmed { at: Instant::now(), version: meta.version, is_remembered });
        Ok(())
    }

    fn remember(&self, place: &Place) -> bool {
        self.marker
            .as_ref()
            .is_none_or(|marker| marker.remember(self.cluster.system_identifier, &place.real_location()).is_ok())
    }

    /// Makes the identity file of an archive that has none: it is new, or Barman began it and its WAL is this cluster's.
    fn begin(&self, place: &Place, key: &str, location: &str) -> Result<()> {
        if let Some(found) = Self::owner_of_stored_wal(place)?
            && found != self.cluster.system_identifier
        {
            return Err(foreign_archive(location, &found.to_string(), self.cluster.system_identifier));
        }
        let identity = Identity::of(&self.cluster).to_json();
        let attributes = Attributes { modified: SystemTime::now(), content: None };
        place.store.put_new(key, Body::Bytes(identity.as_bytes()), &attributes).map(drop)
    }

    /// The system identifier in the first stored segment that can be read; nothing where no WAL is stored.
    fn owner_of_stored_wal(place: &Place) -> Result<Option<u64>> {
        /// More damaged segments than this in a row are no archive to go on with.
        const MOST_SEGMENTS: usize = 64;
        const PAGE: usize = 1000;
        let (mut after, mut has_wal, mut segments) = (None, false, 0);
        loop {
            let page = place.list_wal(after.as_deref(), PAGE)?;
            let Some((_, last)) = page.last() else { break };
            (after, has_wal) = (Some(last.key.clone()), true);
            for (_, listed) in page.iter().filter(|(name, _)| name.is_wal()) {
                if let Some(header) = place.page_header(&listed.key)? {
                    return Ok(Some(header.system_identifier));
                }
                segments += 1;
                if segments == MOST_SEGMENTS {
                    return Err(nobodys_archive(place));
                }
            }
        }
        if has_wal { Err(nobodys_archive(place)) } else { Ok(None) }
    }
}

fn nobodys_archive(place: &Place) -> Error {
    let location = place.location();
    Error::new(
        Kind::Identity,
        location.clone(),
        format!("the archive at \"{location}\" holds WAL files but does not say whose they are"),
    )
    .detail("It has no identity.json, and none of its first segments can be read.")
    .hint("Set another archiver.server_name, so that a new archive is begun beside it.")
}

/// Fails where the memory limit is too low for one file at the configured level and the cluster's segment size.
pub fn check_memory(config: &Config, cluster: &Cluster) -> Result<()> {
    let (needed, limit) = (desk_bytes(config, cluster) + body_bytes(config, cluster), config.memory_limit_bytes);
    if needed <= limit {
        return Ok(());
    }
    let cause = format!(
        "With archiver.compression_level at {} one thread needs {}MB for segments of {}MB",
        config.level,
        needed.div_ceil(1 << 20),
        cluster.segment_size.bytes() >> 20
    );
    Err(Error::setting("memory_limit", &format!("{}MB", limit >> 20), cause)
        .hint("Raise archiver.memory_limit or lower the level."))
}

/// How many desks fit into memory beside one body on its way.
fn desks_in_memory(config: &Config, cluster: &Cluster) -> usize {
    let left = config.memory_limit_bytes.saturating_sub(body_bytes(config, cluster));
    config.workers.min((left / desk_bytes(config, cluster)) as usize)
}

/// Memory of one desk: a source, a result and an encoder; for a streamed segment a few pieces instead of the first two.
fn desk_bytes(config: &Config, cluster: &Cluster) -> u64 {
    const PIECES: u64 = 1 << 20;
    let segment = cluster.segment_size.bytes();
    let is_streamed = segment > max_buffer_bytes(config);
    let encoder_at = |level| config.compression.encoder_memory_bytes(level, segment, is_streamed);
    let encoder = encoder_at(config.level).max(encoder_at(config.backlog_level));
    let encoded = codec::most_encoded_bytes(segment);
    let buffers = if is_streamed { PIECES } else { segment + encoded + PIECES };
    let encrypted = match config.encryption_recipients {
        Some(_) if is_streamed => PIECES,
        Some(_) => encoded + crypt::most_added_bytes(1, encoded),
        None => 0,
    };
    buffers + encoder + encrypted
}

/// Memory of the largest body that can be on its way to a store beside its desk: local storage writes from the desk.
fn body_bytes(config: &Config, cluster: &Cluster) -> u64 {
    let segment = cluster.segment_size.bytes();
    match config.destination.storage {
        StorageUrl::S3(_) if segment <= max_buffer_bytes(config) => codec::most_encoded_bytes(segment),
        _ => 0,
    }
}

/// A segment above a quarter of the limit is streamed: source and result of two would not fit otherwise. An encrypted one
/// has a second result.
fn max_buffer_bytes(config: &Config) -> u64 {
    config.memory_limit_bytes / if config.encryption_recipients.is_some() { 6 } else { 4 }
}

fn changed_between_passes(file: &WalFile) -> Error {
    let path = file.path.display();
    Error::new(Kind::Source, path.to_string(), format!("file \"{path}\" changed while it was read")).retry_if(true)
}

fn encryption_failed(error: &io::Error) -> Error {
    let message = format!("could not encrypt: {}", plain_cause(error));
    Error::new(Kind::Storage, "archiver.encryption", message).retry_if(error.kind() == io::ErrorKind::OutOfMemory)
}

/// Encrypts into `out` what `encode` writes, which it does on a thread of its own meanwhile.
fn encrypt_stream(
    readers: &[Reader],
    seed: &Seed,
    out: impl Write,
    encode: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
) -> io::Result<()> {
    let (encoded, mut sink) = io::pipe()?;
    // The pipe belongs to the inside: a panic there must close it, or the encoder would wait for ever.
    thread::scope(move |scope| {
        // It inherits that all signals are blocked.
        let encoding =
            thread::Builder::new().name("archiver encode".into()).spawn_scoped(scope, move || encode(&mut sink))?;
        let encrypted = crypt::encrypt(readers, seed, &encoded, out);
        // Nobody writes into a pipe that nobody reads any more.
        let rest = io::copy(&mut &encoded, &mut io::sink());
        let made = encoding.join().unwrap_or_else(|_| Err(io::Error::other("the encoder panicked")));
        made.and(encrypted).and(rest.map(drop))
    })
}

/// What is to be stored, at the desk where it was made: who is done with it leaves the desk to others.
struct DeskBody<'a> {
    desk: TakenDesk<'a>,
    made: Made,
}

/// How far a file has come at its desk.
enum Made {
    Read,
    Encoded,
    Encrypted,
}

impl AsRef<[u8]> for DeskBody<'_> {
    fn as_ref(&self) -> &[u8] {
        match self.made {
            Made::Read => &self.desk.plain,
            Made::Encoded => &self.desk.encoded,
            Made::Encrypted => &self.desk.encrypted,
        }
    }
}

/// Hashes what passes through.
struct Hashed<R> {
    inner: R,
    hasher: blake3::Hasher,
}

impl<R> Hashed<R> {
    fn hash(&self) -> Hash {
        Hash(self.hasher.finalize())
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
