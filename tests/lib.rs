//! What the tests have in common: a cluster, segments that are really its own, and a place to archive them.

pub mod credential_endpoint;
pub mod fault_proxy;
pub mod gpg;
pub mod harm;
pub mod s3_server;

use archiver_core::archive::{Archive, StoredFile, WalFile};
use archiver_core::codec::{Compression, Encoder};
use archiver_core::config::{Config, Setting, Settings};
use archiver_core::error::Result;
use archiver_core::hash::HashKey;
use archiver_core::identity::{Cluster, Identity, Marker};
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::wal::{LongPageHeader, Lsn, SegmentName, SegmentSize, Timeline, WalName, magic_of_major};
use gpg::Gpg;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// No wait of a test lasts longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The size of a WAL page, and of the header that all but a segment's first have; the flags in most of them.
pub const PAGE_BYTES: usize = 8192;
const SHORT_HEADER_BYTES: usize = 24;
const NO_FLAGS: [u8; 2] = [0; 2];

/// Waits until `condition` holds; `what` is said where it never does.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A WAL name that must be one.
pub fn wal_name(text: &str) -> WalName {
    WalName::parse(text).expect(text)
}

/// `length` bytes that look like WAL to a compressor, other ones for each `seed`.
pub fn wal_like(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = vec![0; length];
    for record in bytes.chunks_mut(64) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let random = state.to_ne_bytes();
        let count = record.len().min(random.len());
        record[..count].copy_from_slice(&random[..count]);
    }
    bytes
}

/// `plain` in that format, at its lowest level.
pub fn compressed(compression: Compression, plain: &[u8]) -> Vec<u8> {
    let mut encoded = Vec::new();
    let level = compression.level("low").expect("every format has a low level");
    Encoder::new(compression, level).and_then(|mut encoder| encoder.encode(plain, &mut encoded)).expect("encode");
    encoded
}

/// Every path below `directory`, sorted.
pub fn tree(directory: &Path) -> Vec<String> {
    let mut paths = Vec::new();
    let mut open = vec![directory.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).expect("read directory") {
            let entry = entry.expect("read directory");
            let path = entry.path();
            paths.push(path.strip_prefix(directory).expect("below").display().to_string());
            if entry.file_type().expect("file type").is_dir() {
                open.push(path);
            }
        }
    }
    paths.sort();
    paths
}

/// Stores and records one file, as the pool does.
pub fn archive_file(archive: &Archive, file: &WalFile) -> Result<StoredFile> {
    let stored = archive.store(file)?;
    archive.record(std::slice::from_ref(&stored))?;
    Ok(stored)
}

/// One cluster's data directory and its archive, side by side in a temporary directory.
pub struct Site {
    directory: TempDir,
    settings: Settings,
    /// The cluster.
    pub cluster: Cluster,
    /// What the work in its archives beats.
    pub pulse: Arc<Pulse>,
}

impl Default for Site {
    fn default() -> Self {
        Self::new()
    }
}

impl Site {
    /// A cluster with segments of 1 MB, whose archive is yet to begin.
    pub fn new() -> Self {
        Self::with_segments_of(1 << 20)
    }

    /// The same with segments of that size.
    pub fn with_segments_of(bytes: u64) -> Self {
        let segment_size = SegmentSize::new(bytes).expect("a segment size");
        let cluster = Cluster {
            system_identifier: 7_300_000_000_000_000_001,
            major: 15,
            segment_size,
            hash_key: Some(HashKey::of_secret(&[15; 32])),
        };
        let directory = tempfile::tempdir().expect("temporary directory");
        let site = Site { directory, settings: Settings::default(), cluster, pulse: Arc::default() };
        fs::create_dir_all(site.pg_wal().join("archive_status")).expect("create pg_wal");
        fs::create_dir(site.storage()).expect("create storage");
        site
    }

    /// The same with another setting.
    pub fn with(mut self, setting: Setting, value: &str) -> Self {
        self.set(setting, value);
        self
    }

    /// The same, encrypting to that key, which has no passphrase, and reading by it.
    pub fn encrypting(self, gpg: &Gpg, who: &str) -> Self {
        let [public, secret] = [gpg.public_keys(&[who], false), gpg.secret_keys(&[who], "")];
        self.with(Setting::Encryption, "openpgp")
            .with(Setting::EncryptionRecipients, public.to_str().expect("UTF-8"))
            .with(Setting::DecryptionKeys, secret.to_str().expect("UTF-8"))
    }

    /// Another setting from now on.
    pub fn set(&mut self, setting: Setting, value: &str) {
        self.settings.set(setting, value);
    }

    /// The storage directory.
    pub fn storage(&self) -> PathBuf {
        self.path("storage")
    }

    /// The cluster's WAL directory.
    pub fn pg_wal(&self) -> PathBuf {
        self.path("data/pg_wal")
    }

    /// A path in the temporary directory.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    /// The configuration; the storage is [`Site::storage`] where no other was set.
    pub fn config(&self) -> Config {
        let mut settings = self.settings.clone();
        if settings.get(Setting::Storage).is_empty() {
            settings.set(Setting::Storage, format!("file://{}", self.storage().display()));
        }
        Config::parse(&settings).expect("configuration")
    }

    /// The archive under that configuration, as after a start of the server.
    pub fn archive(&self) -> Archive {
        let marker = Marker::new(self.path("data/archiver.established"));
        Archive::new(self.config(), self.cluster, Some(marker), Arc::clone(&self.pulse)).unwrap()
    }

    /// The place under that configuration, as the program opens it.
    pub fn place(&self) -> Place {
        let place = Place::open(&self.config().destination, &self.pulse).expect("open place");
        place.known_to(self.cluster.hash_key)
    }

    /// The name of timeline 1's segment of that number.
    pub fn name(&self, number: u32) -> WalName {
        let size = self.cluster.segment_size;
        WalName::Segment(SegmentName::containing(Timeline(1), Lsn(u64::from(number) * size.bytes()), size))
    }

    /// What the cluster wrote into that segment.
    pub fn content(&self, name: &WalName) -> Vec<u8> {
        let header = self.header(name);
        let mut content = wal_like(header.segment_size.bytes() as usize, header.page_address.0 + 1);
        for (number, page) in content.chunks_mut(PAGE_BYTES).enumerate() {
            // A short header is the beginning of a long one, with another flag.
            let page_address = Lsn(header.page_address.0 + (number * PAGE_BYTES) as u64);
            let bytes = LongPageHeader { page_address, ..header }.to_bytes();
            page[..SHORT_HEADER_BYTES].copy_from_slice(&bytes[..SHORT_HEADER_BYTES]);
            page[2..4].copy_from_slice(&NO_FLAGS);
        }
        content[..LongPageHeader::LENGTH].copy_from_slice(&header.to_bytes());
        content
    }

    fn header(&self, name: &WalName) -> LongPageHeader {
        let segment = name.segment().expect("a segment");
        let size = self.cluster.segment_size;
        LongPageHeader {
            magic: magic_of_major(self.cluster.major).expect("a known major version"),
            timeline: segment.timeline,
            page_address: segment.start(size).expect("a segment of this size"),
            system_identifier: self.cluster.system_identifier,
            segment_size: size,
            page_bytes: PAGE_BYTES as u32,
        }
    }

    /// Puts a file into pg_wal, ready to be archived.
    pub fn offer(&self, name: &WalName, content: &[u8]) -> WalFile {
        let path = self.pg_wal().join(name.to_string());
        fs::write(&path, content).expect("write WAL file");
        fs::write(self.pg_wal().join(format!("archive_status/{name}.ready")), "").expect("write status file");
        WalFile { name: *name, path }
    }

    /// Puts timeline 1's segment of that number into pg_wal, ready to be archived.
    pub fn offer_segment(&self, number: u32) -> WalFile {
        let name = self.name(number);
        self.offer(&name, &self.content(&name))
    }

    /// Where a file lies, or would lie, in the archive.
    pub fn stored(&self, name: &WalName) -> PathBuf {
        self.storage().join("main/wals").join(name.hash_directory()).join(name.to_string())
    }

    /// Puts a file into the archive as Barman would: no identity, no records.
    pub fn store_as_barman(&self, name: &WalName, stored: &[u8]) {
        let path = self.stored(name);
        fs::create_dir_all(path.parent().expect("a directory")).expect("create directory");
        fs::write(path, stored).expect("write WAL file");
    }

    /// Makes an archive that holds these files, with identity, catalogue and sums, without archiving each: a segment is no
    /// more than its page header and its name.
    pub fn fill(&self, names: &[WalName]) {
        let folder = self.storage().join("main");
        for below in ["wals", "sums", ".staging"] {
            fs::create_dir_all(folder.join(below)).expect("create directory");
        }
        fs::write(folder.join("identity.json"), Identity::of(&self.cluster).to_json()).expect("write identity");
        let (mut lines, mut sums) = (String::new(), BTreeMap::<String, String>::new());
        for name in names {
            let stored = self.filled(name);
            self.store_as_barman(name, &stored);
            let (size, hash) = (self.cluster.segment_size.bytes(), blake3::hash(&stored).to_hex());
            lines += &format!("{name}\t{}\t1615159937.4639714\tNone\tNone\n", stored.len());
            let directory = Some(name.hash_directory()).filter(|it| !it.is_empty()).unwrap_or("history".into());
            *sums.entry(directory).or_default() += &format!("{name} {size} blake3:{hash} {}\n", stored.len());
        }
        let append = |path: PathBuf, text: &str| {
            let file = fs::OpenOptions::new().append(true).create(true).open(&path);
            file.and_then(|mut file| file.write_all(text.as_bytes())).expect("append lines");
        };
        append(self.catalogue_path(), &lines);
        sums.iter().for_each(|(directory, lines)| append(folder.join("sums").join(directory), lines));
    }

    /// What [`Site::fill`] stores under that name.
    pub fn filled(&self, name: &WalName) -> Vec<u8> {
        let mut content = match name.segment() {
            Some(_) if name.is_wal() => self.header(name).to_bytes().to_vec(),
            _ => Vec::new(),
        };
        content.extend_from_slice(name.to_string().as_bytes());
        content
    }

    /// The names of the stored WAL files, sorted. Sees that catalogue and sums name just these, once each, that no
    /// directory is empty, and that nothing is in the making.
    #[track_caller]
    pub fn assert_agreement(&self) -> Vec<String> {
        let wals = tree(&self.storage().join("main/wals"));
        let last = |path: &String| path.rsplit('/').next().expect("a name").to_string();
        let is_directory = |path: &&String| path.len() == 16 && !path.contains('.');
        let mut stored: Vec<String> = wals.iter().filter(|path| !is_directory(path)).map(last).collect();
        stored.retain(|name| name != "main-xlog.db");
        stored.sort();
        let directories: BTreeSet<&String> = wals.iter().filter(is_directory).collect();
        for directory in &directories {
            let begin = format!("{directory}/");
            assert!(wals.iter().any(|path| path.starts_with(&begin)), "{directory} is empty");
        }
        let mut lines = self.catalogue();
        lines.sort();
        assert_eq!(lines, stored, "lines of the catalogue (left) and files (right)");
        let sums = self.storage().join("main/sums");
        let mut noted = Vec::new();
        for file in tree(&sums) {
            assert!(file == "history" || directories.contains(&file), "sums of no directory: {file}");
            let text = fs::read_to_string(sums.join(file)).expect("read sums");
            noted.extend(text.lines().map(|line| line.split(' ').next().expect("a name").to_string()));
        }
        noted.sort();
        assert_eq!(noted, stored, "sums (left) and files (right)");
        assert_eq!(tree(&self.storage().join("main/.staging")), [] as [&str; 0]);
        stored
    }

    /// The names in the catalogue, line by line; none where there is no catalogue.
    pub fn catalogue(&self) -> Vec<String> {
        self.catalogue_lines().iter().map(|line| line.split('\t').next().expect("a name").to_string()).collect()
    }

    /// The lines of the catalogue, which all must be whole.
    pub fn catalogue_lines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.catalogue_path()).unwrap_or_default();
        assert!(text.is_empty() || text.ends_with('\n'), "the last line is torn: {text:?}");
        text.lines().map(str::to_string).collect()
    }

    /// Where the catalogue lies.
    pub fn catalogue_path(&self) -> PathBuf {
        self.storage().join("main/wals/main-xlog.db")
    }

    /// Takes the storage away, as an unmount does: what is left is an empty directory.
    pub fn unmount(&self) {
        fs::rename(self.storage(), self.path("unmounted")).expect("move storage away");
        fs::create_dir(self.storage()).expect("create mount point");
    }

    /// Brings it back.
    pub fn mount(&self) {
        fs::remove_dir(self.storage()).expect("the mount point is empty");
        fs::rename(self.path("unmounted"), self.storage()).expect("move storage back");
    }
}
