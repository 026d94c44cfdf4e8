//! Where things lie below the storage URL: Barman's layouts, local and cloud, and what is ours beside them.

use crate::codec::Compression;
use crate::crypt::Encryption;
use crate::part::Part;
use crate::wal::{Timeline, WalName};
use std::fmt;

/// The name of a cluster below a URL: `[A-Za-z0-9._-]{1,63}`, not starting with a dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerName(String);

impl ServerName {
    /// Reads a name; refuses what could leave its directory, hide, or need quoting.
    pub fn parse(name: &str) -> Option<Self> {
        let fits = (1..=63).contains(&name.len())
            && !name.starts_with('.')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        fits.then(|| ServerName(name.to_string()))
    }
}

impl fmt::Display for ServerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What was made of a plain file: compressed first, then encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// How it was compressed.
    pub compression: Compression,
    /// How it was encrypted.
    pub encryption: Encryption,
}

impl From<Compression> for Format {
    /// Compressed and not encrypted.
    fn from(compression: Compression) -> Self {
        Format { compression, encryption: Encryption::None }
    }
}

/// What the names of stored WAL files look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// Local storage: the name alone, in whatever format the file is.
    Plain,
    /// Cloud storage: the name and its format's suffixes. One file may be there in several formats.
    Suffixed,
}

/// Keys of one cluster's archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    server_name: ServerName,
    naming: Naming,
}

impl Layout {
    /// The layout of that cluster's archive.
    pub fn new(server_name: ServerName, naming: Naming) -> Self {
        Layout { server_name, naming }
    }

    /// What the names of stored WAL files look like.
    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// The cluster's own folder.
    pub fn server_folder(&self) -> String {
        self.server_name.to_string()
    }

    /// The folder of all WAL files; it never holds a foreign name.
    pub fn wals_folder(&self) -> String {
        format!("{}/wals", self.server_name)
    }

    /// The folder that a WAL file lies in.
    pub fn wal_folder(&self, name: &WalName) -> String {
        match name.hash_directory() {
            directory if directory.is_empty() => self.wals_folder(),
            directory => format!("{}/wals/{directory}", self.server_name),
        }
    }

    /// The object of a WAL file that is stored in that format.
    pub fn wal_key(&self, name: &WalName, format: impl Into<Format>) -> String {
        format!("{}/{name}{}", self.wal_folder(name), self.suffix(format.into()))
    }

    /// The folder of parts of segments that are being received. Barman does not know it, and looks for no WAL there.
    pub fn parts_folder(&self) -> String {
        format!("{}/partial", self.server_name)
    }

    /// The object of a part that is stored in that format.
    pub fn part_key(&self, part: &Part, format: impl Into<Format>) -> String {
        format!("{}/{part}{}", self.parts_folder(), self.suffix(format.into()))
    }

    /// The part that an object is; nothing for any other object.
    pub fn part(&self, key: &str) -> Option<Part> {
        let (name, format) = self.split_format(key.rsplit('/').next()?);
        let part = Part::parse(name)?;
        (self.part_key(&part, format.unwrap_or(Compression::None.into())) == key).then_some(part)
    }

    fn suffix(&self, format: Format) -> String {
        match self.naming {
            Naming::Plain => String::new(),
            Naming::Suffixed => [format.compression.suffix(), format.encryption.suffix()].concat(),
        }
    }

    /// A name without the suffixes of its format, and that, where names tell.
    fn split_format<'a>(&self, name: &'a str) -> (&'a str, Option<Format>) {
        if self.naming == Naming::Plain {
            return (name, None);
        }
        let (rest, encryption) = match name.strip_suffix(Encryption::OpenPgp.suffix()) {
            Some(rest) => (rest, Encryption::OpenPgp),
            None => (name, Encryption::None),
        };
        let by_suffix = |compression: Compression| {
            let name = rest.strip_suffix(compression.suffix()).filter(|_| compression != Compression::None)?;
            Some((name, compression))
        };
        let (name, compression) = Compression::ALL.into_iter().find_map(by_suffix).unwrap_or((rest, Compression::None));
        (name, Some(Format { compression, encryption }))
    }

    /// The WAL file that an object is, with its format where names tell; nothing for any other object.
    pub fn wal_name(&self, key: &str) -> Option<(WalName, Option<Format>)> {
        let (name, format) = self.split_format(key.rsplit('/').next()?);
        let name = WalName::parse(name).ok()?;
        (self.wal_key(&name, format.unwrap_or(Compression::None.into())) == key).then_some((name, format))
    }

    /// Barman's identity file.
    pub fn identity_key(&self) -> String {
        format!("{}/identity.json", self.server_name)
    }

    /// Barman's catalogue of WAL files.
    pub fn catalogue_key(&self) -> String {
        format!("{0}/wals/{0}-xlog.db", self.server_name)
    }

    /// The lock of Barman's catalogue, beside the cluster's folder.
    pub fn catalogue_lock_key(&self) -> String {
        format!(".{}-xlogdb.lock", self.server_name)
    }

    /// A key behind which all files of that timeline lie, its history first.
    pub fn begin_of_timeline(&self, timeline: Timeline) -> String {
        format!("{}/wals/{:08X}", self.server_name, timeline.0)
    }

    /// The folder of our sums.
    pub fn sums_folder(&self) -> String {
        format!("{}/sums", self.server_name)
    }

    /// Our sums of the files of one hash directory; the history files, which have none, share `history`.
    pub fn sums_key(&self, name: &WalName) -> String {
        match name.hash_directory() {
            directory if directory.is_empty() => format!("{}/sums/history", self.server_name),
            directory => format!("{}/sums/{directory}", self.server_name),
        }
    }

    /// The object by which a store shows that it does not overwrite.
    pub fn create_only_key(&self) -> String {
        format!("{}/probe/create-only", self.server_name)
    }

    /// An object that a check writes and removes.
    pub fn probe_key(&self, unique_name: &str) -> String {
        format!("{}/probe/{unique_name}", self.server_name)
    }

    /// The folder of files set aside.
    pub fn errors_folder(&self) -> String {
        format!("{}/errors", self.server_name)
    }

    /// The folder of files in the making.
    pub fn staging_folder(&self) -> String {
        format!("{}/.staging", self.server_name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout::new(ServerName::parse("main").unwrap(), Naming::Plain)
    }

    #[test]
    fn keys_are_barmans() {
        let key =
            |name: &str, naming, format| Layout { naming, ..layout() }.wal_key(&WalName::parse(name).unwrap(), format);
        let segment = "main/wals/0000000100000002/000000010000000200000042";
        assert_eq!(key("000000010000000200000042", Naming::Plain, Compression::Zstd), segment);
        assert_eq!(key("000000010000000200000042", Naming::Suffixed, Compression::None), segment);
        assert_eq!(
            key("000000010000000200000042.00000028.backup", Naming::Suffixed, Compression::Gzip),
            "main/wals/0000000100000002/000000010000000200000042.00000028.backup.gz"
        );
        assert_eq!(
            key("0000000100000002000000ab.partial", Naming::Suffixed, Compression::Zstd),
            "main/wals/0000000100000002/0000000100000002000000AB.partial.zst"
        );
        assert_eq!(key("00000002.history", Naming::Suffixed, Compression::Xz), "main/wals/00000002.history.xz");
        assert_eq!(key("00000002.history", Naming::Plain, Compression::Xz), "main/wals/00000002.history");
        assert_eq!(layout().catalogue_key(), "main/wals/main-xlog.db");
        assert_eq!(layout().catalogue_lock_key(), ".main-xlogdb.lock");
    }

    #[test]
    fn an_object_is_a_wal_file_only_where_that_file_belongs() {
        for (key, name) in [
            ("main/wals/0000000100000002/000000010000000200000042", Some("000000010000000200000042")),
            ("main/wals/00000002.history", Some("00000002.history")),
            ("main/wals/0000000100000003/000000010000000200000042", None),
            ("main/wals/000000010000000200000042", None),
            ("main/wals/main-xlog.db", None),
            ("other/wals/00000002.history", None),
        ] {
            assert_eq!(layout().wal_name(key).map(|(found, _)| found.to_string()).as_deref(), name, "{key}");
        }
    }

    #[test]
    fn a_suffix_tells_the_format_in_cloud_storage_alone() {
        let cloud = Layout { naming: Naming::Suffixed, ..layout() };
        for compression in Compression::ALL {
            for encryption in [Encryption::None, Encryption::OpenPgp] {
                let format = Format { compression, encryption };
                let name = WalName::parse("000000010000000200000042.partial").unwrap();
                assert_eq!(cloud.wal_name(&cloud.wal_key(&name, format)), Some((name, Some(format))));
            }
        }
        let segment = "main/wals/0000000100000002/000000010000000200000042";
        let encrypted = Format { compression: Compression::Zstd, encryption: Encryption::OpenPgp };
        let name = WalName::parse("000000010000000200000042").unwrap();
        assert_eq!(cloud.wal_key(&name, encrypted), format!("{segment}.zst.gpg"));
        assert_eq!(layout().wal_key(&name, encrypted), segment);
        for foreign in [".gpg.zst", ".gpg.gpg", ".gz.gz", ".tmp", "."] {
            assert_eq!(cloud.wal_name(&format!("{segment}{foreign}")), None, "{foreign}");
        }
        assert_eq!(layout().wal_name(&format!("{segment}.zst")), None);
    }

    #[test]
    fn parts_lie_beside_the_wal_files_and_are_none() {
        let part = Part::parse("000000010000000200000042.8192").unwrap();
        for (naming, key) in [
            (Naming::Plain, "main/partial/000000010000000200000042.8192"),
            (Naming::Suffixed, "main/partial/000000010000000200000042.8192.zst"),
        ] {
            let layout = Layout { naming, ..layout() };
            assert_eq!(layout.part_key(&part, Compression::Zstd), key);
            assert_eq!(layout.part(key), Some(part));
            assert_eq!(layout.wal_name(key), None);
        }
        for other in [
            "main/partial/x",
            "main/wals/000000010000000200000042.8192",
            "main/partial/a/000000010000000200000042.8192",
        ] {
            assert_eq!(layout().part(other), None, "{other}");
        }
    }

    #[test]
    fn server_names_cannot_leave_their_directory() {
        for good in ["main", "pg-15_prod.eu", "9", &"x".repeat(63)] {
            assert!(ServerName::parse(good).is_some(), "{good}");
        }
        for bad in ["", ".", "..", ".main", "a/b", "a b", "ä", "a\n", &"x".repeat(64)] {
            assert!(ServerName::parse(bad).is_none(), "{bad:?}");
        }
    }
}
