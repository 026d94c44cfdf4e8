//! Fetching a WAL file back: found, decoded, compared with what was stored, and put in place whole or not at all.

pub mod prefetch;

use crate::durable::{self, StagedFile};
use crate::error::{Error, Kind, Result};
use crate::hash::{Content, Hash, Noted, NotedHash};
use crate::identity::foreign_archive;
use crate::place::Place;
use crate::pulse::Pulse;
use crate::regular_file::{self, Links};
use crate::store::{Meta, Object};
use crate::wal::{BadHeader, Expected, LongPageHeader, WalName};
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
    place.confirm_never_stored(&request.name)?;
    Err(Error::new(
        Kind::NotFound,
        request.name.to_string(),
        format!("\"{}\" is not in the archive at \"{}\"", request.name, place.location()),
    ))
}

/// Restores the file, or its partial where that will do; nothing where neither is there.
fn look(place: &Place, request: &Request<'_>) -> Result<Option<Restored>> {
    let partial = match request.name {
        WalName::Segment(segment) if request.or_partial => Some(WalName::Partial(segment)),
        _ => None,
    };
    let names = [Some(request.name), partial].into_iter().flatten();
    // What lies there in part was received after what an archived part holds: that ended a timeline.
    let places = names.flat_map(|name| match name {
        WalName::Partial(_) => [(name, false), (name, true)],
        _ => [(name, true), (name, false)],
    });
    for (name, is_archive) in places {
        let found = match is_archive {
            true => place.open_wal(&name)?.map(|(stored, object)| (place.store.location(&stored.key), object)),
            false => find_received(request, &name)?,
        };
        let Some((location, object)) = found else { continue };
        // A segment says itself whose it is; a history file or a label does not.
        if !name.is_wal() {
            place.confirm_archive(request.system_identifier)?;
        }
        let size = put_in_place(request, |staged| match is_archive {
            true => receive_into(staged, place, &name, request.system_identifier, object, &location),
            false => {
                // What is noted is what was archived, not what lies here.
                let mut write = |bytes: &[u8]| staged.write_all(bytes).map_err(|error| staged.failed("write", &error));
                let cluster = request.system_identifier;
                let received = receive_noted(place, &name, cluster, object, &location, None, &mut write)?;
                Ok(received.content)
            }
        })?;
        return Ok(Some(Restored { name, location, size }));
    }
    Ok(None)
}

/// The file of that name where WAL is received; nothing where none lies there, or none of it was received yet:
/// pg_receivewal fills a new segment with zeros.
fn find_received(request: &Request<'_>, name: &WalName) -> Result<Option<(String, Object)>> {
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
    let mut head = Vec::with_capacity(LongPageHeader::LENGTH);
    (&file).take(LongPageHeader::LENGTH as u64).read_to_end(&mut head).map_err(|error| failed(&error))?;
    if matches!(name, WalName::Partial(_)) && head.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    (&file).rewind().map_err(|error| failed(&error))?;
    let meta = Meta {
        stored_size: meta.len(),
        modified: meta.modified().unwrap_or(SystemTime::UNIX_EPOCH),
        content: None,
        version: String::new(),
    };
    Ok(Some((path.display().to_string(), Object { meta, body: Box::new(file) })))
}

fn put_in_place(request: &Request<'_>, receive: impl FnOnce(&mut StagedFile<'_>) -> Result<Content>) -> Result<u64> {
    let destination = request.destination;
    let directory = durable::directory_of(destination);
    durable::sweep_leftovers(directory, TEMPORARY_PREFIX)?;

    let pulse = Pulse::new();
    let mut staged = StagedFile::create(directory, TEMPORARY_PREFIX, durable::mode_for_file_in(directory), &pulse)?;
    let content = receive(&mut staged)?;
    staged.replace(destination)?;
    Ok(content.size)
}

/// Writes the plain content of a stored file into `staged`, which may get another name only after that.
fn receive_into(
    staged: &mut StagedFile<'_>,
    place: &Place,
    name: &WalName,
    system_identifier: Option<u64>,
    object: Object,
    location: &str,
) -> Result<Content> {
    let mut write = |bytes: &[u8]| staged.write_all(bytes).map_err(|error| staged.failed("write", &error));
    receive(place, name, system_identifier, object, location, &mut write).map(|received| received.content)
}

/// A stored file that was read back as what it was.
pub(crate) struct Received {
    /// Its plain content.
    pub content: Content,
    /// Bytes as stored.
    pub stored_size: u64,
    /// Whether that was compared with what was noted when the file was stored; Barman notes nothing.
    pub is_compared: bool,
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
    receive_noted(place, name, system_identifier, object, location, recorded, take)
}

/// The same of a file of which that was noted, if anything was.
fn receive_noted(
    place: &Place,
    name: &WalName,
    system_identifier: Option<u64>,
    object: Object,
    location: &str,
    recorded: Option<Noted>,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Received> {
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

    if name.is_wal() {
        let segment_size = check_segment(name, system_identifier, &head).map_err(|cause| match cause {
            BadHeader::SystemIdentifier { found, expected } => {
                foreign_archive(&place.location(), &found.to_string(), expected)
            }
            other => damaged(other.to_string()),
        })?;
        // PostgreSQL takes a wrong size for FATAL.
        if size != segment_size {
            return Err(damaged(format!("it is {size} bytes long, not {segment_size}")));
        }
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
    Ok(Received { content, stored_size, is_compared })
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
