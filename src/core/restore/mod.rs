//! Fetching a WAL file back: found, decoded, compared with what was stored, and put in place whole or not at all.

pub mod prefetch;

use crate::durable::{self, StagedFile};
use crate::error::{Error, Kind, Result};
use crate::hash::{Content, Hash, Noted, NotedHash};
use crate::identity::foreign_archive;
use crate::part::{Part, hash_of_first, received_bytes};
use crate::place::Place;
use crate::pulse::Pulse;
use crate::regular_file::{self, Links};
use crate::store::{Meta, Object};
use crate::wal::{BadHeader, Expected, LongPageHeader, SegmentName, WalName};
use std::borrow::Borrow;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

/// Temporary files beside the destination start with this, followed by who makes them.
const TEMPORARY_PREFIX: &str = "archiver.restore.";
/// PostgreSQL's largest segment.
const LONGEST_SEGMENT: u64 = 1 << 30;
/// Labels and histories are a few hundred bytes.
const LONGEST_TEXT_FILE: u64 = 1 << 20;
const DAMAGE_HINT: &str = "Restore it from another copy of the archive; PostgreSQL must not go on without it.";
const PAUSE: Duration = Duration::from_millis(250);

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The file.
    pub name: WalName,
    /// Where it goes.
    pub destination: &'a Path,
    /// Whether `<name>.partial` does where the whole segment is not there.
    pub or_partial: bool,
    /// Where WAL is received on this machine, if it is: what is not in the archive yet may lie there. And whether that must be
    /// there: then one that is not mounted is no answer.
    pub streaming_directory: Option<(&'a Path, bool)>,
    /// The cluster that asks, where it is known.
    pub system_identifier: Option<u64>,
    /// How long failures that may pass are tried again.
    pub retry_timeout: Duration,
}

/// A file that was put in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The file it was made from; a partial one where the whole was nowhere.
    pub name: WalName,
    /// Where that lies.
    pub location: String,
    /// Bytes of plain content.
    pub size: u64,
}

/// Restores one file from the place that `open` opens.
///
/// Fails with [`Kind::NotFound`] only where the archive itself was seen and is this cluster's: whoever takes
/// the answer for the end of the WAL must be able to rely on it. Everything else that goes wrong is another failure,
/// and those that may pass are tried again until the timeout.
pub fn restore<P: Borrow<Place>>(open: impl Fn() -> Result<P>, request: &Request<'_>) -> Result<Restored> {
    let started = Instant::now();
    loop {
        match open().and_then(|place| restore_once(place.borrow(), request)) {
            Err(error) if error.is_worth_retrying() && started.elapsed() + PAUSE < request.retry_timeout => {
                std::thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}

fn restore_once(place: &Place, request: &Request<'_>) -> Result<Restored> {
    if let Some(restored) = look(place, request)? {
        return Ok(restored);
    }
    place.confirm_archive(request.system_identifier)?;
    // A file system mounted between the look and the confirmation would make the answer wrong.
    if let Some(restored) = look(place, request)? {
        return Ok(restored);
    }
    let longest = match request.name {
        WalName::Segment(segment) if request.or_partial => longest_beginning(place, request, segment),
        _ => Ok(None),
    };
    let never_stored = place.confirm_never_stored(&request.name);
    if request.or_partial || never_stored.is_err() {
        // It may have come meanwhile: recovery would end with what there was of it. From where WAL is received a file goes into
        // the archive, and never back: looked for there first, it is missed in neither.
        let received = find_received(request, &request.name)?;
        if let Some(restored) = look(place, request)? {
            return Ok(restored);
        }
        if let Some(received) = received {
            return from_streaming(place, request, request.name, received);
        }
    }
    never_stored?;
    if let Some(longest) = longest? {
        return longest.put(place, request);
    }
    Err(Error::new(
        Kind::NotFound,
        request.name.to_string(),
        format!("\"{}\" is not in the archive at \"{}\"", request.name, place.location()),
    ))
}

/// Restores the file; nothing where it is not there.
fn look(place: &Place, request: &Request<'_>) -> Result<Option<Restored>> {
    // What is archived was verified, and needs no streaming directory.
    if let Some((stored, object)) = place.open_wal(&request.name)? {
        let location = place.store.location(&stored.key);
        return from_archive(place, request, request.name, object, location).map(Some);
    }
    let received = find_received(request, &request.name)?;
    received.map(|received| from_streaming(place, request, request.name, received)).transpose()
}

/// What there is of a segment that is whole nowhere.
enum Beginning {
    Received(FoundReceived),
    Part(Part, Object, String),
    /// What a timeline ended with.
    Archived(Object, String),
}

impl Beginning {
    fn put(self, place: &Place, request: &Request<'_>) -> Result<Restored> {
        let partial = || request.name.segment().map_or(request.name, WalName::Partial);
        match self {
            Beginning::Received(received) => from_streaming(place, request, partial(), received),
            Beginning::Part(part, object, location) => from_part(place, request, &part, object, location),
            Beginning::Archived(object, location) => from_archive(place, request, partial(), object, location),
        }
    }
}

/// The longest of three: what lies where WAL is received, a part that was put into the storage meanwhile, and what a timeline
/// ended with, which was archived when that happened.
fn longest_beginning(place: &Place, request: &Request<'_>, segment: SegmentName) -> Result<Option<Beginning>> {
    let partial = WalName::Partial(segment);
    let received = find_received(request, &partial)?;
    let received_bytes = received.as_ref().map_or(0, |received| received.bytes);
    let part = place.parts(Some(segment))?.pop().filter(|part| part.bytes > received_bytes);
    let longest = part.unwrap_or(Part { segment, bytes: received_bytes });
    let hash_of_longest = || match part {
        Some(part) => place.hash_of_part(&part),
        None => hash_of_received(request, &partial, received_bytes),
    };
    // Which is not read to be measured where there is nothing to compare it with.
    if longest.bytes == 0 || place.partial_holds(&longest, hash_of_longest)? == Some(true) {
        let Some((stored, object)) = place.open_wal(&partial)? else { return Ok(None) };
        return Ok(Some(Beginning::Archived(object, place.store.location(&stored.key))));
    }
    let Some(part) = part else { return Ok(received.map(Beginning::Received)) };
    for key in place.part_keys(&part)? {
        // It goes once there is better: then that is found in the next look.
        let Some(object) = place.store.get(&key)? else { continue };
        return Ok(Some(Beginning::Part(part, object, place.store.location(&key))));
    }
    Err(Error::new(Kind::Storage, part.to_string(), format!("the part \"{part}\" was there and is gone"))
        .retry_if(true))
}

fn hash_of_received(request: &Request<'_>, partial: &WalName, bytes: u64) -> Result<Option<Hash>> {
    let Some(received) = find_received(request, partial)? else { return Ok(None) };
    let failed = |error: &io::Error| Error::io("read file", Path::new(&received.location), error);
    hash_of_first(received.object.body, bytes).map_err(|error| failed(&error))
}

fn from_archive(
    place: &Place,
    request: &Request<'_>,
    name: WalName,
    object: Object,
    location: String,
) -> Result<Restored> {
    confirm_owner(place, request, &name)?;
    let cluster = request.system_identifier;
    let size = put_in_place(request, |staged| receive_into(staged, place, &name, cluster, object, &location))?;
    Ok(Restored { name, location, size })
}

fn from_streaming(place: &Place, request: &Request<'_>, name: WalName, received: FoundReceived) -> Result<Restored> {
    confirm_owner(place, request, &name)?;
    let FoundReceived { object, location, .. } = received;
    let size = put_in_place(request, |staged| {
        // What is noted is what was archived, not what lies here.
        let mut write = |bytes: &[u8]| staged.write_all(bytes).map_err(|error| staged.failed("write", &error));
        let what = What { name: &name, system_identifier: request.system_identifier, part_bytes: None };
        Ok(receive_noted(place, &what, object, &location, None, &mut write)?.content.size)
    })?;
    Ok(Restored { name, location, size })
}

/// The rest of the segment is zeros, as where it is received.
fn from_part(place: &Place, request: &Request<'_>, part: &Part, object: Object, location: String) -> Result<Restored> {
    let name = WalName::Partial(part.segment);
    let size = put_in_place(request, |staged| {
        let mut write = |bytes: &[u8]| staged.write_all(bytes).map_err(|error| staged.failed("write", &error));
        let system_identifier = request.system_identifier;
        let what = What { name: &name, system_identifier, part_bytes: Some(part.bytes) };
        let received = receive_noted(place, &what, object, &location, None, &mut write)?;
        let zeros = vec![0; 256 << 10];
        let mut left = received.left_bytes;
        while left > 0 {
            let count = zeros.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            write(&zeros[..count])?;
            left -= count as u64;
        }
        Ok(received.content.size + received.left_bytes)
    })?;
    Ok(Restored { name, location, size })
}

/// A segment says itself whose it is; a history file or a label does not.
fn confirm_owner(place: &Place, request: &Request<'_>, name: &WalName) -> Result<()> {
    if name.is_wal() { Ok(()) } else { place.confirm_archive(request.system_identifier) }
}

/// A file where WAL is received.
struct FoundReceived {
    location: String,
    object: Object,
    /// How much of it was received, where it is a part.
    bytes: u64,
}

/// The file of that name where WAL is received; nothing where none lies there, or none of it was received yet:
/// pg_receivewal fills a new segment with zeros.
fn find_received(request: &Request<'_>, name: &WalName) -> Result<Option<FoundReceived>> {
    let Some((directory, is_required)) = request.streaming_directory else { return Ok(None) };
    let path = directory.join(name.to_string());
    let failed = |error: &io::Error| Error::io("read file", &path, error);
    let (file, meta) = match regular_file::open(&path, Links::Refused) {
        Ok(opened) => opened,
        // Where the directory must be there, only in it the file may be missing.
        Err(error) if error.kind() == io::ErrorKind::NotFound && (!is_required || directory.is_dir()) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(&error)),
    };
    let bytes = match name {
        WalName::Partial(_) => received_bytes(&file).map_err(|error| failed(&error))?,
        _ => 0,
    };
    if matches!(name, WalName::Partial(_)) && bytes == 0 {
        return Ok(None);
    }
    (&file).rewind().map_err(|error| failed(&error))?;
    let meta = Meta {
        stored_size: meta.len(),
        modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        content: None,
        version: String::new(),
    };
    let object = Object { meta, body: Box::new(file) };
    Ok(Some(FoundReceived { location: path.display().to_string(), object, bytes }))
}

/// Puts what `receive` writes where it is wanted; answers what that does, the size.
fn put_in_place(request: &Request<'_>, receive: impl FnOnce(&mut StagedFile<'_>) -> Result<u64>) -> Result<u64> {
    let destination = request.destination;
    let directory = durable::directory_of(destination);
    durable::sweep_leftovers(directory, TEMPORARY_PREFIX)?;

    let pulse = Pulse::new();
    let mut staged = StagedFile::create(directory, TEMPORARY_PREFIX, durable::mode_for_file_in(directory), &pulse)?;
    let size = receive(&mut staged)?;
    staged.replace(destination)?;
    Ok(size)
}

/// Writes the plain content of a stored file into `staged`, which may get another name only after that.
fn receive_into(
    staged: &mut StagedFile<'_>,
    place: &Place,
    name: &WalName,
    system_identifier: Option<u64>,
    object: Object,
    location: &str,
) -> Result<u64> {
    let mut write = |bytes: &[u8]| staged.write_all(bytes).map_err(|error| staged.failed("write", &error));
    receive(place, name, system_identifier, object, location, &mut write).map(|received| received.content.size)
}

/// A stored file that was read back as what it was.
pub(crate) struct Received {
    /// Its plain content.
    pub content: Content,
    /// Bytes as stored.
    pub stored_size: u64,
    /// Whether that was compared with what was noted when the file was stored; Barman notes nothing.
    pub is_compared: bool,
    /// How much of the segment lies behind it, where it is a part.
    left_bytes: u64,
}

/// What a stored file is to be.
struct What<'a> {
    name: &'a WalName,
    system_identifier: Option<u64>,
    /// How long, where it is a part of a segment.
    part_bytes: Option<u64>,
}

/// The failure to read a stored file as what it is.
pub(crate) fn damaged(location: &str, cause: impl std::fmt::Display) -> Error {
    Error::of_stored_copy(location, &io::Error::other(cause.to_string()), DAMAGE_HINT)
}

/// Hands the plain content of a stored file to `take`, piece by piece. Fails unless it is what was stored, and what its
/// name and the cluster call for: only then may what was taken be used.
pub(crate) fn receive(
    place: &Place,
    name: &WalName,
    system_identifier: Option<u64>,
    object: Object,
    location: &str,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Received> {
    let recorded = match &place.records {
        Some(records) => records.find_sum(&place.layout, name)?.map(|sum| sum.noted),
        None => None,
    };
    let what = What { name, system_identifier, part_bytes: None };
    receive_noted(place, &what, object, location, recorded, take)
}

/// The same of a file of which that was noted, if anything was.
fn receive_noted(
    place: &Place,
    what: &What<'_>,
    object: Object,
    location: &str,
    recorded: Option<Noted>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Received> {
    let What { name, system_identifier, part_bytes } = *what;
    let unfit = |cause: &io::Error| Error::of_stored_copy(location, cause, DAMAGE_HINT);
    let damaged = |cause: String| damaged(location, cause);
    let (expected, stored_size) = (object.meta.content, object.meta.stored_size);
    let mut decoder = place.decode(object.body, LONGEST_SEGMENT).map_err(|error| unfit(&error))?;
    let mut hasher = blake3::Hasher::new();
    let mut head = Vec::with_capacity(LongPageHeader::LENGTH);
    let mut piece = vec![0; 256 << 10];
    // Until a segment's first page says more.
    let mut most = if name.is_wal() { LONGEST_SEGMENT } else { LONGEST_TEXT_FILE };
    let mut size = 0;
    loop {
        let count = match decoder.plain.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unfit(&behind(size, error))),
        };
        let bytes = &piece[..count];
        head.extend_from_slice(&bytes[..count.min(LongPageHeader::LENGTH - head.len())]);
        if name.is_wal() && most == LONGEST_SEGMENT && head.len() == LongPageHeader::LENGTH {
            most = LongPageHeader::parse(&head).map_err(|cause| damaged(cause.to_string()))?.segment_size.bytes();
        }
        size += count as u64;
        if size > most {
            return Err(damaged(format!("it is longer than {most} bytes")));
        }
        hasher.update(bytes);
        take(bytes)?;
    }
    let hash = Hash(hasher.finalize());

    let mut left_bytes = 0;
    if name.is_wal() {
        let segment_size = check_segment(name, system_identifier, &head).map_err(|cause| match cause {
            BadHeader::SystemIdentifier { found, expected } => {
                foreign_archive(&place.location(), &found.to_string(), expected)
            }
            other => damaged(other.to_string()),
        })?;
        // PostgreSQL takes a wrong size for FATAL.
        let expected = part_bytes.map_or(segment_size, |bytes| bytes.min(segment_size));
        if size != expected {
            return Err(damaged(format!("it is {size} bytes long, not {expected}")));
        }
        left_bytes = segment_size - size;
    } else if size == 0 {
        return Err(damaged("it is empty".to_string()));
    }
    let content = Content { size, hash };
    let mut is_compared = false;
    for noted in expected.into_iter().chain(recorded) {
        match (noted.is_of(&content, place.hash_key.as_ref()), noted.hash) {
            // It takes the cluster's key to tell.
            (None, _) => {}
            (Some(true), _) => is_compared = true,
            (Some(false), NotedHash::Open(stored)) if stored != hash => {
                return Err(damaged(format!("it was stored as {stored}, and reads as {hash}")));
            }
            (Some(false), _) if noted.size != size => {
                return Err(damaged(format!("it was stored as {} bytes, and reads as {size}", noted.size)));
            }
            (Some(false), _) => return Err(damaged("it reads as another content than was stored".to_string())),
        }
    }
    Ok(Received { content, stored_size, is_compared, left_bytes })
}

/// The same failure to decode, with the place where it happened; the storage's own failures tell theirs.
fn behind(plain_bytes: u64, error: io::Error) -> io::Error {
    let is_storages = error.raw_os_error().is_some() || error.get_ref().is_some_and(|inner| inner.is::<Error>());
    if is_storages { error } else { io::Error::new(error.kind(), format!("{error}, behind byte {plain_bytes} of it")) }
}

/// Whether a segment is the one asked for, by its first page; answers the size it must have.
fn check_segment(name: &WalName, system_identifier: Option<u64>, head: &[u8]) -> std::result::Result<u64, BadHeader> {
    let header = LongPageHeader::parse(head)?;
    if let Some(segment) = name.segment() {
        header.check(segment, &Expected { system_identifier, ..Expected::default() })?;
    }
    Ok(header.segment_size.bytes())
}
