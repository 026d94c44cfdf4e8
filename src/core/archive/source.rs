//! Reading the file to be archived: one pass that fills a buffer, hashes, and looks whether it is what its name says.

use crate::codec::{self, Compression};
use crate::error::{Error, Kind, Result};
use crate::hash::{Content, Hash};
use crate::identity::Cluster;
use crate::pulse::{Beating, Pulse};
use crate::regular_file::{self, Links};
use crate::stamp::Stamp;
use crate::wal::{LongPageHeader, WalName};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;
use std::time::SystemTime;

/// A file to be archived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WalFile {
    /// Its name.
    pub name: WalName,
    /// Where it lies; relative to the working directory, as PostgreSQL says it.
    pub path: PathBuf,
}

/// A source that was read and is what its name says.
pub struct Source {
    /// The open file, for a second pass.
    pub file: File,
    /// Which file it was.
    pub stamp: Stamp,
    /// Its modification time.
    pub modified: SystemTime,
    /// The plain content.
    pub content: Content,
    /// Hash of the file as it is: the content's unless it is compressed already.
    pub raw_hash: Hash,
    /// The format it is compressed in already; it is stored as it is then.
    pub compression: Compression,
    /// Whether the buffer holds all of it.
    pub is_in_memory: bool,
    /// How much of the file it is.
    extent: Extent,
    /// In the file's own bytes.
    length: u64,
}

/// How much of a file is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    /// All of it.
    Whole,
    /// The first bytes, behind which it is still being written.
    First(u64),
}

impl Source {
    /// Whether the file is still the one that was read. One that is still being written is compared by its content alone.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        Ok(self.extent != Extent::Whole || Stamp::of(&self.file.metadata()?) == self.stamp)
    }

    /// Its bytes once more, from the beginning.
    pub fn again(&self) -> io::Result<impl Read + '_> {
        (&self.file).rewind()?;
        Ok((&self.file).take(self.length))
    }
}

/// Small enough for the processor's cache, so that a piece is hashed while it is warm.
const PIECE_BYTES: usize = 256 << 10;
/// Labels and histories are a few hundred bytes.
const MAX_TEXT_FILE_BYTES: u64 = 1 << 20;

/// A source that was opened; of its content only the first bytes were looked at.
pub struct Opened<'a> {
    wal: &'a WalFile,
    cluster: &'a Cluster,
    file: File,
    extent: Extent,
    length: u64,
    /// Which file it is.
    pub stamp: Stamp,
    /// Its modification time.
    pub modified: SystemTime,
    /// The format it is compressed in already; it is stored as it is then.
    pub compression: Compression,
}

/// Opens `wal`, a file of that cluster.
pub fn open<'a>(wal: &'a WalFile, cluster: &'a Cluster) -> Result<Opened<'a>> {
    // Nothing else may take its place meanwhile: no link to another file, no pipe that nobody writes to.
    let opened = regular_file::open(&wal.path, Links::Refused);
    let (file, meta) = opened.map_err(|error| failed(wal, "open file", &error))?;
    // It may be compressed already; a longer one is not worth reading.
    if meta.len() > codec::most_encoded_bytes(size_limit(&wal.name, cluster)) {
        return Err(unfit(wal, &format!("it is {} bytes long", meta.len())));
    }
    let mut head = Vec::with_capacity(Compression::MAGIC_LENGTH);
    let looked = (&file).take(Compression::MAGIC_LENGTH as u64).read_to_end(&mut head);
    looked.map_err(|error| failed(wal, "read file", &error))?;
    Ok(Opened {
        wal,
        cluster,
        file,
        extent: Extent::Whole,
        length: meta.len(),
        stamp: Stamp::of(&meta),
        modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        compression: Compression::detect(&head).unwrap_or(Compression::None),
    })
}

/// Opens the first bytes of `wal`, a segment of that cluster that is still being written behind them.
pub fn open_part<'a>(wal: &'a WalFile, cluster: &'a Cluster, bytes: u64) -> Result<Opened<'a>> {
    let opened = open(wal, cluster)?;
    Ok(Opened { extent: Extent::First(bytes), length: bytes, compression: Compression::None, ..opened })
}

impl Opened<'_> {
    /// Copies a file that is not compressed to `out`, piece by piece, each while it is in the processor's cache, and answers
    /// what it was. Whoever gets an error throws away what was written.
    ///
    /// A fault of the source travels as [`io::Error::other`] around a [`crate::Error`].
    pub fn copy(&self, piece: &mut Vec<u8>, out: &mut dyn Write, pulse: &Pulse) -> io::Result<Content> {
        piece.resize(PIECE_BYTES, 0);
        let reader = self.rewound().map_err(io::Error::other)?;
        let mut unwritten = None;
        let scanned = scan(reader.take(self.length), piece, pulse, |piece| {
            out.write_all(piece).map_err(|error| unwritten.insert(error).kind().into())
        });
        let scanned = match (scanned, unwritten) {
            (Ok(scanned), _) => scanned,
            (Err(_), Some(error)) => return Err(error),
            (Err(error), None) => return Err(io::Error::other(failed(self.wal, "read file", &error))),
        };
        let checked = self.check_content(&scanned).and_then(|()| self.confirm_unchanged());
        checked.map_err(io::Error::other)?;
        Ok(Content { size: scanned.size, hash: scanned.hash })
    }

    /// Reads it. Up to `max_buffer_bytes` it is left in `buffer`; a larger one leaves nothing there and is to be read again.
    pub fn read(self, max_buffer_bytes: u64, buffer: &mut Vec<u8>, pulse: &Pulse) -> Result<Source> {
        let failed = |error: io::Error| failed(self.wal, "read file", &error);
        let is_in_memory = self.length <= max_buffer_bytes;
        // What it held before is written over, which costs less than clearing it.
        let room = if is_in_memory { usize::try_from(self.length).unwrap_or(usize::MAX) } else { 0 };
        let more = room.saturating_sub(buffer.len());
        buffer.try_reserve_exact(more).map_err(|_| out_of_memory(self.wal, self.length))?;
        buffer.resize(room, 0);
        // A file that grows meanwhile is found out by its stamp.
        let file = self.rewound()?;
        let as_it_is = match is_in_memory {
            true => scan_into(buffer, file, pulse),
            false => scan(file.take(self.length), &mut vec![0; PIECE_BYTES], pulse, |_| Ok(())),
        };
        let as_it_is = as_it_is.map_err(failed)?;
        buffer.truncate(usize::try_from(as_it_is.size).unwrap_or(usize::MAX));

        let compression = Compression::detect(&as_it_is.head).unwrap_or(Compression::None);
        let raw_hash = as_it_is.hash;
        let plain = match compression {
            Compression::None => as_it_is,
            _ => {
                let unreadable = |error: io::Error| {
                    let cause = crate::error::plain_cause(&error);
                    let name = compression.name();
                    unfit(self.wal, &format!("it is compressed with {name} and does not unpack: {cause}"))
                };
                let file = self.rewound()?;
                let stored: Box<dyn Read + '_> =
                    if is_in_memory { Box::new(buffer.as_slice()) } else { Box::new(file) };
                let limit = size_limit(&self.wal.name, self.cluster);
                let decoder = codec::decode(stored, limit).map_err(unreadable)?;
                scan(decoder.plain, &mut vec![0; PIECE_BYTES], pulse, |_| Ok(())).map_err(unreadable)?
            }
        };
        self.check_content(&plain)?;
        self.confirm_unchanged()?;
        Ok(Source {
            content: Content { size: plain.size, hash: plain.hash },
            file: self.file,
            stamp: self.stamp,
            modified: self.modified,
            raw_hash,
            compression,
            is_in_memory,
            extent: self.extent,
            length: self.length,
        })
    }

    fn rewound(&self) -> Result<&File> {
        (&self.file).rewind().map_err(|error| failed(self.wal, "read file", &error))?;
        Ok(&self.file)
    }

    fn confirm_unchanged(&self) -> Result<()> {
        if self.extent != Extent::Whole {
            return Ok(());
        }
        let meta = self.file.metadata().map_err(|error| failed(self.wal, "stat file", &error))?;
        if Stamp::of(&meta) == self.stamp {
            return Ok(());
        }
        Err(unfit(self.wal, "it changed while it was read").retry_if(true))
    }

    fn check_content(&self, plain: &Scanned) -> Result<()> {
        let file = self.wal;
        let segment = match file.name.segment().filter(|_| file.name.is_wal()) {
            Some(segment) => segment,
            None if plain.size == 0 => return Err(unfit(file, "it is empty")),
            None if plain.size > MAX_TEXT_FILE_BYTES => {
                return Err(unfit(file, &format!("it is {} bytes long", plain.size)));
            }
            None => return Ok(()),
        };
        let expected = match self.extent {
            Extent::Whole => self.cluster.segment_size.bytes(),
            Extent::First(bytes) => bytes,
        };
        if plain.size != expected {
            return Err(unfit(file, &format!("it is {} bytes long, not {expected}", plain.size)));
        }
        let checked =
            LongPageHeader::parse(&plain.head).and_then(|header| header.check(segment, &self.cluster.expected()));
        checked.map_err(|cause| unfit(file, &cause.to_string()))
    }
}

fn failed(wal: &WalFile, action: &str, error: &io::Error) -> Error {
    Error::io(action, &wal.path, error).of_kind(Kind::Source)
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

/// Reads to the end, each piece into `piece`, and hands it on.
fn scan(
    reader: impl Read,
    piece: &mut [u8],
    pulse: &Pulse,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<Scanned> {
    let mut reader = Beating::new(reader, pulse);
    let mut scan = Scan::default();
    loop {
        match read_some(&mut reader, piece)? {
            0 => return Ok(scan.end()),
            count => {
                scan.add(&piece[..count]);
                each(&piece[..count])?;
            }
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

fn unfit(file: &WalFile, cause: &str) -> Error {
    Error::new(Kind::Source, file.path.display().to_string(), format!("the file is not what its name says: {cause}"))
        .hint("Nothing was stored. Find out what put it there before you remove it.")
}

fn out_of_memory(file: &WalFile, bytes: u64) -> Error {
    Error::new(Kind::Storage, file.path.display().to_string(), format!("could not get {bytes} bytes of memory"))
        .hint("Lower archiver.workers or archiver.memory_limit, or give the server more memory.")
        .retry_if(true)
}
