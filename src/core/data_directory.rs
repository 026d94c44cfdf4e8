//! Whose WAL it is, without a server: told by the data directory, else by the WAL itself.

use crate::archive::WalFile;
use crate::codec;
use crate::error::{Error, Kind, Result};
use crate::hash::HashKey;
use crate::identity::{Cluster, Marker};
use crate::owner::Owner;
use crate::wal::{LongPageHeader, SegmentSize, WalName, major_of_magic};
use nix::unistd::geteuid;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The cluster in `data_directory`: the first eight bytes of its control file (PostgreSQL, pg_control.h,
/// `ControlFileData`), in the byte order of the machine that runs it. Nothing where no cluster lies there.
pub fn system_identifier(data_directory: &Path) -> Result<Option<u64>> {
    let path = data_directory.join("global/pg_control");
    let mut bytes = [0; 8];
    match File::open(&path).and_then(|mut file| file.read_exact(&mut bytes)) {
        Ok(()) => Ok(Some(u64::from_ne_bytes(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read control file", &path, &error)),
    }
}

/// What the noted hashes of encrypted files are compared by: made from the secret that initdb gave the cluster in
/// `data_directory`, and every physical copy has (pg_control.h, `mock_authentication_nonce`). Nothing where no cluster of
/// PostgreSQL 15 to 18 lies there.
pub fn hash_key(data_directory: &Path) -> Option<HashKey> {
    const MOST: u64 = 8192;
    let mut bytes = Vec::new();
    File::open(data_directory.join("global/pg_control")).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
    let number = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    // Where it lies, and the checksum of all before that, by `pg_control_version`, the second field.
    let (secret, checksum) = match number(8)? {
        1300 | 1700 => (256, 288),
        1800 => (257, 292),
        _ => return None,
    };
    if crc32c::crc32c(&bytes[..checksum]) != number(checksum)? {
        return None;
    }
    Some(HashKey::of_secret(bytes[secret..secret + 32].try_into().ok()?))
}

/// The server that recovers `data_directory` from an archive; nothing where none does, or another user's.
///
/// One of the two files that ask for it lies there until recovery has ended (PostgreSQL, xlogrecovery.c,
/// `readRecoverySignalFile`), and the first line of postmaster.pid tells the postmaster.
pub fn recovering_server(data_directory: &Path) -> Option<Owner> {
    let has = |name: &str| data_directory.join(name).exists();
    let is_ours = || fs::metadata(data_directory).is_ok_and(|meta| meta.uid() == geteuid().as_raw());
    if !(has("recovery.signal") || has("standby.signal")) || !is_ours() {
        return None;
    }
    let lock_file = fs::read_to_string(data_directory.join("postmaster.pid")).ok()?;
    Owner::of_process(lock_file.lines().next()?.trim().parse().ok()?)
}

/// The cluster in `data_directory`, with its memory of the archives it has begun; nothing where no cluster lies there.
/// `files` are some of its WAL.
///
/// Refuses, as PostgreSQL does, to work in the data directory of another operating system user: what is written there
/// and in the archive would be out of the server's reach.
pub fn cluster(data_directory: &Path, files: &[WalFile]) -> Result<Option<(Cluster, Marker)>> {
    let Some(system_identifier) = system_identifier(data_directory)? else { return Ok(None) };
    // Absolute, so that it reads well in the server's log.
    let real = data_directory.canonicalize().and_then(|path| Ok((fs::metadata(&path)?.uid(), path)));
    let (owner, path) = real.map_err(|error| Error::io("stat data directory", data_directory, &error))?;
    if owner != geteuid().as_raw() {
        let shown = path.display().to_string();
        let message = format!("data directory \"{shown}\" belongs to another operating system user");
        return Err(Error::new(Kind::Configuration, shown, message)
            .hint("Run this as the user that runs the server there, or in a directory that is no data directory."));
    }
    let major = major(&path)?;
    let is_ours = |header: &LongPageHeader| header.system_identifier == system_identifier;
    let offered = || files.iter().filter(|file| file.name.is_wal()).filter_map(|file| header_of(&file.path));
    let header =
        offered().find(is_ours).or_else(|| header_in(&path.join("pg_wal"), is_ours)).or_else(|| offered().next());
    // WAL without any header is refused for that; other files have no size to keep to.
    let segment_size = header.map_or(SegmentSize::DEFAULT, |header| header.segment_size);
    let hash_key = hash_key(&path);
    Ok(Some((Cluster { system_identifier, major, segment_size, hash_key }, Marker::of_data_directory(&path))))
}

/// The cluster that wrote the first of `files` that says so: a segment, whole or partial.
pub fn writer(files: &[WalFile]) -> Result<Cluster> {
    let header = files.iter().filter(|file| file.name.is_wal()).find_map(|file| header_of(&file.path));
    let Some(header) = header else {
        let subject = files.first().map(|file| file.path.display().to_string()).unwrap_or_default();
        return Err(Error::new(Kind::Configuration, subject, "could not tell which cluster the files belong to")
            .detail("None of them is a readable WAL segment, and there is no data directory to go by.")
            .hint("Name the data directory with -D."));
    };
    let magic = header.magic;
    let major = major_of_magic(magic).ok_or_else(|| {
        let message = format!("WAL with page magic {magic:04X} is of no known PostgreSQL version");
        Error::new(Kind::Source, format!("{magic:04X}"), message).hint("PostgreSQL 15 to 18 are known.")
    })?;
    let (system_identifier, segment_size) = (header.system_identifier, header.segment_size);
    Ok(Cluster { system_identifier, major, segment_size, hash_key: None })
}

/// A connection string that leads to the server that runs in that directory: by its first socket directory, where it has
/// one. As the server says in `postmaster.pid` (pidfile.h); nothing where none runs.
pub fn conninfo_of_server(data_directory: &Path) -> Option<String> {
    const PORT: usize = 3;
    const SOCKET_DIRECTORY: usize = 4;
    let lines = fs::read_to_string(data_directory.join("postmaster.pid")).ok()?;
    let line = |number| lines.lines().nth(number).map(str::trim).filter(|text| !text.is_empty());
    let port: u16 = line(PORT)?.parse().ok()?;
    let host = line(SOCKET_DIRECTORY).unwrap_or("localhost");
    Some(format!("host='{}' port={port}", host.replace('\\', "\\\\").replace('\'', "\\'")))
}

/// The size of that cluster's WAL segments, as the first says that is found in its `pg_wal`; nothing where none does.
pub fn segment_size(data_directory: &Path, system_identifier: u64) -> Option<SegmentSize> {
    let is_ours = |header: &LongPageHeader| header.system_identifier == system_identifier;
    header_in(&data_directory.join("pg_wal"), is_ours).map(|header| header.segment_size)
}

fn major(data_directory: &Path) -> Result<u32> {
    let path = data_directory.join("PG_VERSION");
    let text = fs::read_to_string(&path).map_err(|error| Error::io("read file", &path, &error))?;
    text.trim().parse().map_err(|_| {
        let message = format!("could not read a version in \"{}\"", path.display());
        Error::new(Kind::Configuration, path.display().to_string(), message)
    })
}

/// The first page of the segment at `path`, compressed or not; nothing where it cannot be read.
fn header_of(path: &Path) -> Option<LongPageHeader> {
    let mut head = [0; LongPageHeader::LENGTH];
    let mut decoder = codec::decode(File::open(path).ok()?, u64::MAX).ok()?;
    decoder.plain.read_exact(&mut head).ok()?;
    LongPageHeader::parse(&head).ok()
}

/// The first page of any segment in `directory` that is wanted. Segments made ahead have none, recycled ones an old one.
fn header_in(directory: &Path, is_wanted: impl Fn(&LongPageHeader) -> bool) -> Option<LongPageHeader> {
    const MOST_SEGMENTS: usize = 64;
    let is_segment =
        |name: &std::ffi::OsStr| name.to_str().is_some_and(|name| WalName::parse(name).is_ok_and(|it| it.is_wal()));
    let segments = fs::read_dir(directory).ok()?.flatten().filter(|entry| is_segment(&entry.file_name()));
    segments.take(MOST_SEGMENTS).filter_map(|entry| header_of(&entry.path())).find(is_wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::{Lsn, Timeline};

    const NAME: &str = "000000010000000000000003";

    fn header(system_identifier: u64, bytes: u64) -> LongPageHeader {
        LongPageHeader {
            magic: 0xD113,
            timeline: Timeline(1),
            page_address: Lsn(3 * bytes),
            system_identifier,
            segment_size: SegmentSize::new(bytes).unwrap(),
            page_bytes: 8192,
        }
    }

    /// A data directory of cluster 7 and PostgreSQL 16 with segments of 1 MB, beside WAL of others in its pg_wal.
    fn data_directory() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for folder in ["global", "pg_wal"] {
            fs::create_dir(directory.path().join(folder)).unwrap();
        }
        fs::write(directory.path().join("global/pg_control"), 7_u64.to_ne_bytes()).unwrap();
        fs::write(directory.path().join("PG_VERSION"), "16\n").unwrap();
        let pg_wal = directory.path().join("pg_wal");
        fs::write(pg_wal.join("000000010000000000000001"), header(8, 16 << 20).to_bytes()).unwrap();
        fs::write(pg_wal.join("000000010000000000000002"), [0; 40]).unwrap();
        fs::write(pg_wal.join(NAME), header(7, 1 << 20).to_bytes()).unwrap();
        directory
    }

    #[test]
    fn a_server_says_how_it_is_reached() {
        let directory = tempfile::tempdir().unwrap();
        let said = |text: &str| {
            fs::write(directory.path().join("postmaster.pid"), text).unwrap();
            conninfo_of_server(directory.path())
        };
        assert_eq!(conninfo_of_server(directory.path()), None);
        let all = "4711\n/data\n1700000000\n5433\n/run/it's\nlocalhost\n 123 456\nready   \n";
        assert_eq!(said(all).as_deref(), Some(r"host='/run/it\'s' port=5433"));
        assert_eq!(said("4711\n/data\n1700000000\n5433\n\n*\n").as_deref(), Some("host='localhost' port=5433"));
        assert_eq!(said("4711\n/data\n"), None);
    }

    fn file(path: &Path) -> WalFile {
        let name = path.file_name().unwrap().to_str().unwrap();
        WalFile { name: WalName::parse(name).unwrap(), path: path.to_path_buf() }
    }

    #[test]
    fn a_data_directory_tells_its_cluster() {
        let directory = data_directory();
        let segment_size = SegmentSize::new(1 << 20).unwrap();
        let expected = Cluster { system_identifier: 7, major: 16, segment_size, hash_key: None };
        let (found, marker) = cluster(directory.path(), &[]).unwrap().unwrap();
        assert_eq!(found, expected);
        assert_eq!(
            (super::segment_size(directory.path(), 7), super::segment_size(directory.path(), 9)),
            (Some(segment_size), None)
        );
        assert!(marker.path().is_absolute() && marker.path().ends_with("archiver.established"), "{marker:?}");
        fs::remove_file(directory.path().join("pg_wal").join(NAME)).unwrap();
        assert_eq!(cluster(directory.path(), &[]).unwrap().unwrap().0.segment_size, SegmentSize::DEFAULT);
        let offered = directory.path().join(NAME);
        fs::write(&offered, header(7, 1 << 20).to_bytes()).unwrap();
        assert_eq!(cluster(directory.path(), &[file(&offered)]).unwrap().unwrap().0, expected);
    }

    #[test]
    fn a_server_recovers_while_it_lives_and_the_signal_file_is_there() {
        let directory = data_directory();
        let path = |name: &str| directory.path().join(name);
        let myself = std::process::id();
        fs::write(path("postmaster.pid"), format!("{myself}\n/data\n")).unwrap();
        assert_eq!(recovering_server(directory.path()), None, "no signal file");
        for signal in ["recovery.signal", "standby.signal"] {
            fs::write(path(signal), "").unwrap();
            assert_eq!(recovering_server(directory.path()), Some(Owner::current()));
            fs::remove_file(path(signal)).unwrap();
        }
        fs::write(path("standby.signal"), "").unwrap();
        for other in [format!("-{myself}\n"), "4194305\n".to_string(), String::new()] {
            fs::write(path("postmaster.pid"), &other).unwrap();
            assert_eq!(recovering_server(directory.path()), None, "single-user, dead, unreadable: {other:?}");
        }
        fs::remove_file(path("postmaster.pid")).unwrap();
        assert_eq!(recovering_server(directory.path()), None);
    }

    #[test]
    fn a_half_cluster_is_an_error_and_none_is_none() {
        let directory = data_directory();
        fs::remove_file(directory.path().join("PG_VERSION")).unwrap();
        assert!(cluster(directory.path(), &[]).is_err());
        fs::write(directory.path().join("global/pg_control"), "short").unwrap();
        assert!(system_identifier(directory.path()).is_err());
        fs::remove_file(directory.path().join("global/pg_control")).unwrap();
        assert!(cluster(directory.path(), &[]).unwrap().is_none());
    }

    #[test]
    fn a_segment_tells_who_wrote_it() {
        let directory = data_directory();
        let [blank, written] =
            ["000000010000000000000002", NAME].map(|name| file(&directory.path().join("pg_wal").join(name)));
        let found = writer(&[blank.clone(), written]).unwrap();
        assert_eq!((found.system_identifier, found.major, found.segment_size.bytes()), (7, 16, 1 << 20));
        assert_eq!(writer(&[blank]).unwrap_err().kind(), Kind::Configuration);
    }
}
