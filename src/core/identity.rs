//! Whose archive it is: Barman's identity.json at the storage, and our own memory of having seen it.

use crate::durable;
use crate::error::{Error, Kind, Result};
use crate::hash::HashKey;
use crate::wal::{Expected, SegmentSize};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What a cluster says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// Made by initdb, kept by every physical copy.
    pub system_identifier: u64,
    /// Major version of the server.
    pub major: u32,
    /// Size of its WAL segments.
    pub segment_size: SegmentSize,
    /// What the noted hashes of encrypted files are compared by, where it is known.
    pub hash_key: Option<HashKey>,
}

impl Cluster {
    /// What the page headers of its segments must say.
    pub fn expected(&self) -> Expected {
        Expected {
            major: Some(self.major),
            system_identifier: Some(self.system_identifier),
            segment_size: Some(self.segment_size),
        }
    }
}

/// The content of identity.json: both values are texts, compared as texts. Other keys may be there and are not touched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    systemid: String,
    #[serde(default)]
    version: String,
}

/// Far beyond any identity file.
pub const MAX_IDENTITY_BYTES: u64 = 64 << 10;

impl Identity {
    /// The identity of that cluster.
    pub fn of(cluster: &Cluster) -> Self {
        Identity { systemid: cluster.system_identifier.to_string(), version: cluster.major.to_string() }
    }

    /// Reads an identity file.
    pub fn parse(text: &[u8]) -> serde_json::Result<Self> {
        serde_json::from_slice(text)
    }

    /// As Barman writes it: keys sorted, four blanks of indentation, a final newline.
    pub fn to_json(&self) -> String {
        format!(
            "{{\n    \"systemid\": {},\n    \"version\": {}\n}}\n",
            serde_json::Value::from(self.systemid.as_str()),
            serde_json::Value::from(self.version.as_str())
        )
    }

    /// The system identifier, as text.
    pub fn system_identifier(&self) -> &str {
        &self.systemid
    }

    /// Whether it names that cluster.
    pub fn names(&self, system_identifier: u64) -> bool {
        self.systemid == system_identifier.to_string()
    }
}

/// The refusal to touch another cluster's archive.
pub fn foreign_archive(location: &str, found: &str, ours: u64) -> Error {
    Error::new(Kind::Identity, location, format!("the archive at \"{location}\" belongs to another cluster"))
        .detail(format!("It was made by the cluster with system identifier {found}; this one is {ours}."))
        .hint(
            "Set another archiver.server_name (after initdb or pg_upgrade), \
             or another archiver.storage (where two clusters have the same name).",
        )
}

/// The refusal to begin an archive anew where one has been; `question` asks for the likely cause.
pub fn vanished_archive(location: &str, question: &str, marker: Option<&Path>) -> Error {
    let on_purpose = marker.map(|marker| {
        format!(" If the archive was removed on purpose, remove the file \"{}\" as well.", marker.display())
    });
    Error::new(Kind::Identity, location, format!("the archive at \"{location}\" has vanished"))
        .detail("Its identity.json was there before and is not there now.")
        .hint(format!("{question}{}", on_purpose.unwrap_or_default()))
}

/// The memory, in the data directory, of archives this cluster has begun: without it an unmounted disk would look
/// like a new place after a restart.
#[derive(Clone, Debug)]
pub struct Marker {
    path: PathBuf,
}

/// More archives than this no server writes to in turns.
const MOST_REMEMBERED: usize = 64;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Established {
    system_identifier: String,
    archive: String,
}

impl Marker {
    /// The marker of the server with that data directory. Copies of the directory carry it: a promoted standby must
    /// not begin an archive anew either.
    pub fn of_data_directory(data_directory: &Path) -> Self {
        Marker::new(data_directory.join("archiver.established"))
    }

    /// The marker kept at `path`.
    pub fn new(path: PathBuf) -> Self {
        Marker { path }
    }

    /// Where it is kept.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether that cluster has begun an archive at that location. What cannot be read was not written by us.
    pub fn remembers(&self, system_identifier: u64, archive: &str) -> Result<bool> {
        Ok(self.read()?.contains(&Established::new(system_identifier, archive)))
    }

    /// Whether any cluster has begun an archive at that location.
    pub fn remembers_any(&self, archive: &str) -> Result<bool> {
        Ok(self.read()?.iter().any(|seen| seen.archive == archive))
    }

    /// Remembers it, durably, beside those remembered before.
    pub fn remember(&self, system_identifier: u64, archive: &str) -> Result<()> {
        let new = Established::new(system_identifier, archive);
        let mut all = self.read()?;
        all.retain(|seen| *seen != new);
        all.insert(0, new);
        all.truncate(MOST_REMEMBERED);
        let text = serde_json::to_string(&all)
            .map_err(|error| Error::new(Kind::Internal, archive, format!("could not write a marker: {error}")))?;
        durable::replace_file(&self.path, text.as_bytes(), true)
    }

    fn read(&self) -> Result<Vec<Established>> {
        match fs::read(&self.path) {
            Ok(text) => Ok(serde_json::from_slice(&text).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(Error::io("read file", &self.path, &error)),
        }
    }
}

impl Established {
    fn new(system_identifier: u64, archive: &str) -> Self {
        Established { system_identifier: system_identifier.to_string(), archive: archive.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: Cluster = Cluster {
        system_identifier: 7_300_000_000_000_000_001,
        major: 15,
        segment_size: SegmentSize::DEFAULT,
        hash_key: None,
    };

    #[test]
    fn the_identity_file_is_barmans_byte_for_byte() {
        let identity = Identity::of(&CLUSTER);
        let json = "{\n    \"systemid\": \"7300000000000000001\",\n    \"version\": \"15\"\n}\n";
        assert_eq!(identity.to_json(), json);
        assert_eq!(Identity::parse(json.as_bytes()).unwrap(), identity);
        assert!(identity.names(CLUSTER.system_identifier));
    }

    #[test]
    fn unknown_keys_are_fine_and_junk_is_not() {
        let more = Identity::parse(br#"{"systemid": "1", "version": "17", "more": [1]}"#).unwrap();
        assert!(more.names(1));
        assert!(Identity::parse(b"").is_err());
        assert!(Identity::parse(b"[]").is_err());
        assert!(Identity::parse(br#"{"version": "17"}"#).is_err());
    }

    #[test]
    fn the_marker_remembers_each_archive_of_one_cluster() {
        let directory = tempfile::tempdir().unwrap();
        let marker = Marker::new(directory.path().join("archiver.established"));
        assert!(!marker.remembers(CLUSTER.system_identifier, "/srv/wal/main").unwrap());
        marker.remember(CLUSTER.system_identifier, "/srv/wal/main").unwrap();
        assert!(marker.remembers(CLUSTER.system_identifier, "/srv/wal/main").unwrap());
        assert!(!marker.remembers(CLUSTER.system_identifier, "/srv/wal/other").unwrap());
        marker.remember(CLUSTER.system_identifier, "/srv/wal/other").unwrap();
        assert!(marker.remembers(CLUSTER.system_identifier, "/srv/wal/main").unwrap());
        assert!(!marker.remembers(8, "/srv/wal/main").unwrap());
        assert!(marker.remembers_any("/srv/wal/main").unwrap() && !marker.remembers_any("/srv").unwrap());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
