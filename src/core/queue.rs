//! The files that wait in a server's pg_wal, in the order in which PostgreSQL will ask for them.

use crate::archive::ready_files;
use crate::wal::WalName;
use std::fs;
use std::path::Path;
use std::time::SystemTime;

/// One waiting file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Its name, which need not be a WAL file's: PostgreSQL offers whatever looks like one.
    pub name: String,
    /// Bytes; nothing where the file is gone, so that PostgreSQL will pass over it.
    pub size: Option<u64>,
    /// Since when it waits.
    pub ready_since: Option<SystemTime>,
}

impl Waiting {
    /// Its name, if it is a WAL file's.
    pub fn wal_name(&self) -> Option<WalName> {
        WalName::parse(&self.name).ok()
    }
}

/// The files that wait in `pg_wal` now. One that cannot be looked at, or is archived meanwhile, is left out or told
/// without size.
pub fn waiting(pg_wal: &Path) -> Vec<Waiting> {
    let status = pg_wal.join("archive_status");
    let mut files: Vec<Waiting> = ready_files(&status)
        .map(|name| Waiting {
            size: fs::metadata(pg_wal.join(&name)).ok().map(|meta| meta.len()),
            ready_since: fs::metadata(status.join(format!("{name}.ready"))).and_then(|meta| meta.modified()).ok(),
            name,
        })
        .collect();
    // History files first, then by the bytes of the name (pgarch.c, `ready_file_comparator`).
    files.sort_by(|a, b| {
        let key = |name: &str| (!name.ends_with(".history"), name.to_string());
        key(&a.name).cmp(&key(&b.name))
    });
    files
}

/// The waiting files together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Since when the oldest waits.
    pub oldest: Option<SystemTime>,
}

impl Summary {
    /// Of these files.
    pub fn of(files: &[Waiting]) -> Self {
        Summary {
            files: files.len() as u64,
            bytes: files.iter().filter_map(|file| file.size).sum(),
            oldest: files.iter().filter_map(|file| file.ready_since).min(),
        }
    }

    /// For how long the oldest has waited.
    pub fn age_seconds(&self) -> Option<f64> {
        self.oldest.map(|oldest| oldest.elapsed().unwrap_or_default().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_wait_in_postgresqls_order_and_one_that_is_gone_has_no_size() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("archive_status")).unwrap();
        for (name, size) in [
            ("000000010000000000000003", Some(5)),
            ("00000002.history", Some(3)),
            ("000000010000000000000002", None),
            ("0000000100000000000000AB.abc", Some(1)),
        ] {
            fs::write(directory.path().join(format!("archive_status/{name}.ready")), "").unwrap();
            if let Some(size) = size {
                fs::write(directory.path().join(name), vec![0; size]).unwrap();
            }
        }
        let files = waiting(directory.path());
        let told: Vec<_> = files.iter().map(|file| (file.name.as_str(), file.size)).collect();
        assert_eq!(
            told,
            [
                ("00000002.history", Some(3)),
                ("000000010000000000000002", None),
                ("000000010000000000000003", Some(5)),
                ("0000000100000000000000AB.abc", Some(1)),
            ]
        );
        assert_eq!(files[3].wal_name(), None);
        let summary = Summary::of(&files);
        assert_eq!((summary.files, summary.bytes), (4, 9));
        assert!(summary.age_seconds().unwrap() < 60.0);
    }
}
