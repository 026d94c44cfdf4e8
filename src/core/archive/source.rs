//! Reading the file to be archived: one pass that fills a buffer, hashes, and looks whether it is what its name says.

use crate::codec::{self, Compression};
use crate::error::{Error, Kind, Result};
use crate::hash::Hash;
use crate::identity::Cluster;
use crate::pulse::{Beating, Pulse};
use crate::wal::{LongPageHeader, WalName};
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A file to be archived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalFile {
    /// Its name.
    pub name: WalName,
    /// Where it lies; relative to the working directory, as PostgreSQL says it.
    pub path: PathBuf,
}

/// Which file it was: a file re-created under the same name has another stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
}

impl Stamp {
    /// The stamp of the file at `path` now.
    pub fn of_path(path: &Path) -> io::Result<Self> {
        path.metadata().map(|meta| Stamp::of(&meta))
    }

    /// The stamp of the file with that metadata.
    pub fn of(meta: &Metadata) -> Self {
        Stamp {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.len(),
            modified_ns: i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec()),
        }
    }
}

/// A source that was read and is what its name says.
pub struct Source {
    /// The open file, for a second pass.
    pub file: File,
    /// Which file it was.
    pub stamp: Stamp,
    /// Its modification time.
    pub modified: SystemTime,
    /// Bytes of plain content.
    pub plain_size: u64,
    /// Hash of the plain content.
    pub hash: Hash,
    /// Hash of the file as it is: the same unless it is compressed already.
    pub raw_hash: Hash,
    /// The format it is compressed in already; it is stored as it is then.
    pub compression: Compression,
    /// Whether the buffer holds the whole file.
    pub is_in_memory: bool,
}

impl Source {
    /// Whether the file is still the one that was read.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        self.file.metadata().map(|meta| Stamp::of(&meta) == self.stamp)
    }
}

/// Small enough for the processor's cache, so that a piece is hashed while it is warm.
const PIECE_BYTES: usize = 256 << 10;
/// Labels and histories are a few hundred bytes.
const MAX_TEXT_FILE_BYTES: u64 = 1 << 20;

/// Reads `file`. Up to `max_buffer_bytes` it is left in `buffer`; a larger one leaves nothing there and is to be read again.
pub fn read(
    file: &WalFile,
    cluster: &Cluster,
    max_buffer_bytes: u64,
    buffer: &mut Vec<u8>,
    pulse: &Pulse,
) -> Result<Source> {
    let failed = |action: &str, error: &io::Error| Error::io(action, &file.path, error).of_kind(Kind::Source);
    // Nothing else may take its place meanwhile: no link to another file, no pipe that nobody writes to.
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let mut opened = options.open(&file.path).map_err(|error| failed("open file", &error))?;
    let meta = opened.metadata().map_err(|error| failed("stat file", &error))?;
    if !meta.is_file() {
        return Err(unfit(file, "it is not a regular file"));
    }
    let stamp = Stamp::of(&meta);
    let limit = size_limit(&file.name, cluster);
    // It may be compressed already; a longer one is not worth reading.
    if meta.len() > codec::most_encoded_bytes(limit) {
        return Err(unfit(file, &format!("it is {} bytes long", meta.len())));
    }
    let is_in_memory = meta.len() <= max_buffer_bytes;

    // What it held before is written over, which costs less than clearing it.
    let room = if is_in_memory { usize::try_from(meta.len()).unwrap_or(usize::MAX) } else { 0 };
    buffer.try_reserve_exact(room.saturating_sub(buffer.len())).map_err(|_| out_of_memory(file, meta.len()))?;
    buffer.resize(room, 0);
    // A file that grows meanwhile is found out by its stamp.
    let as_it_is =
        if is_in_memory { scan_into(buffer, &mut opened, pulse) } else { scan((&mut opened).take(meta.len()), pulse) };
    let as_it_is = as_it_is.map_err(|error| failed("read file", &error))?;
    buffer.truncate(usize::try_from(as_it_is.size).unwrap_or(usize::MAX));

    let compression = Compression::detect(&as_it_is.head).unwrap_or(Compression::None);
    let raw_hash = as_it_is.hash;
    let plain = match compression {
        Compression::None => as_it_is,
        _ => {
            let unreadable = |error: io::Error| {
                let cause = crate::error::plain_cause(&error);
                unfit(file, &format!("it is compressed with {} and does not unpack: {cause}", compression.name()))
            };
            let mut again = &opened;
            again.rewind().map_err(|error| failed("read file", &error))?;
            let stored: Box<dyn Read + '_> = if is_in_memory { Box::new(buffer.as_slice()) } else { Box::new(again) };
            let decoder = codec::decode(stored, limit).map_err(unreadable)?;
            scan(decoder.plain, pulse).map_err(unreadable)?
        }
    };
    check_content(file, cluster, &plain)?;

    let source = Source {
        modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        file: opened,
        stamp,
        plain_size: plain.size,
        hash: plain.hash,
        raw_hash,
        compression,
        is_in_memory,
    };
    if !source.is_unchanged().map_err(|error| failed("stat file", &error))? {
        return Err(unfit(file, "it changed while it was read").retry_if(true));
    }
    Ok(source)
}

/// What one pass over a file's bytes tells.
struct Scanned {
    size: u64,
    hash: Hash,
    /// The first bytes, enough for a page header.
    head: Vec<u8>,
}

/// One pass, piece by piece.
#[derive(Default)]
struct Scan {
    size: u64,
    hasher: blake3::Hasher,
    head: Vec<u8>,
}

impl Scan {
    fn add(&mut self, piece: &[u8]) {
        let missing = LongPageHeader::LENGTH - self.head.len();
        self.head.extend_from_slice(&piece[..piece.len().min(missing)]);
        self.hasher.update(piece);
        self.size += piece.len() as u64;
    }

    fn end(self) -> Scanned {
        Scanned { size: self.size, hash: Hash(self.hasher.finalize()), head: self.head }
    }
}

/// Reads to the end and keeps nothing.
fn scan(reader: impl Read, pulse: &Pulse) -> io::Result<Scanned> {
    let mut reader = Beating::new(reader, pulse);
    let (mut scan, mut piece) = (Scan::default(), vec![0; PIECE_BYTES]);
    loop {
        match read_some(&mut reader, &mut piece)? {
            0 => return Ok(scan.end()),
            count => scan.add(&piece[..count]),
        }
    }
}

/// Reads to the end, or until `buffer` is full.
fn scan_into(buffer: &mut [u8], reader: impl Read, pulse: &Pulse) -> io::Result<Scanned> {
    let mut reader = Beating::new(reader, pulse);
    let (mut scan, mut rest) = (Scan::default(), buffer);
    loop {
        let most = rest.len().min(PIECE_BYTES);
        let count = read_some(&mut reader, &mut rest[..most])?;
        let (piece, behind) = rest.split_at_mut(count);
        scan.add(piece);
        rest = behind;
        if count == 0 {
            return Ok(scan.end());
        }
    }
}

fn read_some(reader: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    loop {
        match reader.read(piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// The most bytes a file of that name can have.
fn size_limit(name: &WalName, cluster: &Cluster) -> u64 {
    if name.is_wal() { cluster.segment_size.bytes() } else { MAX_TEXT_FILE_BYTES }
}

fn check_content(file: &WalFile, cluster: &Cluster, plain: &Scanned) -> Result<()> {
    let segment = match file.name.segment().filter(|_| file.name.is_wal()) {
        Some(segment) => segment,
        None if plain.size == 0 => return Err(unfit(file, "it is empty")),
        None if plain.size > MAX_TEXT_FILE_BYTES => {
            return Err(unfit(file, &format!("it is {} bytes long", plain.size)));
        }
        None => return Ok(()),
    };
    let segment_size = cluster.segment_size.bytes();
    if plain.size != segment_size {
        return Err(unfit(file, &format!("it is {} bytes long, not {segment_size}", plain.size)));
    }
    let checked = LongPageHeader::parse(&plain.head).and_then(|header| header.check(segment, &cluster.expected()));
    checked.map_err(|cause| unfit(file, &cause.to_string()))
}

fn unfit(file: &WalFile, cause: &str) -> Error {
    Error::new(Kind::Source, file.path.display().to_string(), format!("the file is not what its name says: {cause}"))
        .hint("Nothing was stored. Find out what put it there before you remove it.")
}

fn out_of_memory(file: &WalFile, bytes: u64) -> Error {
    Error::new(Kind::Storage, file.path.display().to_string(), format!("could not get {bytes} bytes of memory"))
        .hint("Lower archiver.workers or archiver.memory_limit, or give the server more memory.")
        .retry_if(true)
}
