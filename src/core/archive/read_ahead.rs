//! Which files PostgreSQL will ask for next: predicted by name, and looked up in archive_status where prediction ends.

use crate::wal::{SegmentSize, WalName};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often archive_status may be read whole; it holds an entry for every segment in pg_wal.
const SCAN_INTERVAL: Duration = Duration::from_secs(1);

/// Looks for waiting files beyond the one asked for. It only looks: `.ready` files are PostgreSQL's to rename.
#[derive(Debug, Default)]
pub struct ReadAhead {
    last_scan: Option<Instant>,
}

impl ReadAhead {
    /// Up to `most` waiting files after `asked` in the order PostgreSQL will ask for them.
    pub fn next_files(&mut self, pg_wal: &Path, asked: &WalName, size: SegmentSize, most: usize) -> Vec<WalName> {
        let status = pg_wal.join("archive_status");
        let mut found = Vec::new();
        if let WalName::Segment(segment) = asked {
            let following = std::iter::successors(segment.next(size), |name| name.next(size)).map(WalName::Segment);
            found.extend(following.take(most).take_while(|name| ready_path(&status, name).exists()));
        }
        let may_scan = self.last_scan.is_none_or(|at| at.elapsed() >= SCAN_INTERVAL);
        if found.len() < most.div_ceil(2) && may_scan {
            self.last_scan = Some(Instant::now());
            found = scan(&status, asked, most);
        }
        found
    }
}

fn ready_path(status: &Path, name: &WalName) -> PathBuf {
    status.join(format!("{name}.ready"))
}

/// The first `most` waiting files after `asked`. A directory that cannot be read has none: this is only a look ahead.
fn scan(status: &Path, asked: &WalName, most: usize) -> Vec<WalName> {
    let mut waiting: Vec<WalName> = waiting_files(status).filter(|name| name > asked).collect();
    waiting.sort_unstable();
    waiting.truncate(most);
    waiting
}

/// Every file that waits to be archived, in no order: those with a `.ready` in the archive_status directory `status`.
pub fn waiting_files(status: &Path) -> impl Iterator<Item = WalName> {
    ready_files(status).filter_map(|name| WalName::parse(&name).ok())
}

/// The names of all that PostgreSQL will offer, in no order, also those that are no WAL file's: it asks for whatever is as
/// long as one and made of the same characters (pgarch.c, `pgarch_readyXlog`).
pub fn ready_files(status: &Path) -> impl Iterator<Item = String> {
    std::fs::read_dir(status).into_iter().flatten().flatten().filter_map(|entry| {
        let file_name = entry.file_name();
        let name = file_name.to_str()?.strip_suffix(".ready")?;
        let is_offered = (16..=40).contains(&name.len())
            && name.chars().all(|c| "0123456789ABCDEF.history.backup.partial".contains(c));
        is_offered.then(|| name.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn pg_wal(ready: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let status = directory.path().join("archive_status");
        fs::create_dir(&status).unwrap();
        for name in ready {
            fs::write(status.join(format!("{name}.ready")), "").unwrap();
        }
        fs::write(status.join("000000010000000000000099.done"), "").unwrap();
        directory
    }

    fn next_files(ready: &[&str], asked: &str, most: usize) -> Vec<String> {
        let asked = WalName::parse(asked).unwrap();
        let directory = pg_wal(ready);
        let found = ReadAhead::default().next_files(directory.path(), &asked, SegmentSize::DEFAULT, most);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_following_segments_are_predicted_across_a_log_boundary() {
        let ready = ["0000000100000000000000FE", "0000000100000000000000FF", "000000010000000100000000"];
        assert_eq!(next_files(&ready, "0000000100000000000000FE", 2), &ready[1..]);
    }

    #[test]
    fn where_prediction_ends_the_directory_is_read_in_postgresqls_order() {
        let ready = [
            "000000020000000000000005",
            "000000010000000000000005.partial",
            "000000010000000000000004",
            "000000010000000000000003.00000028.backup",
            "not-a-wal-file",
            "0000000100000000000000AB.abc",
        ];
        assert_eq!(
            next_files(&ready, "000000010000000000000003", 16),
            [
                "000000010000000000000003.00000028.backup",
                "000000010000000000000004",
                "000000010000000000000005.partial",
                "000000020000000000000005",
            ]
        );
        assert_eq!(next_files(&ready, "00000002.history", 1), ["000000010000000000000003.00000028.backup"]);
    }

    #[test]
    fn the_directory_is_not_read_for_every_file() {
        let directory = pg_wal(&["000000010000000000000007"]);
        let asked = WalName::parse("000000010000000000000003").unwrap();
        let mut ahead = ReadAhead::default();
        assert_eq!(ahead.next_files(directory.path(), &asked, SegmentSize::DEFAULT, 16).len(), 1);
        assert_eq!(ahead.next_files(directory.path(), &asked, SegmentSize::DEFAULT, 16).len(), 0);
    }

    #[test]
    fn a_missing_directory_has_nothing_waiting() {
        let directory = tempfile::tempdir().unwrap();
        let asked = WalName::parse("000000010000000000000003").unwrap();
        let found = ReadAhead::default().next_files(directory.path(), &asked, SegmentSize::DEFAULT, 4);
        assert!(found.is_empty());
    }
}
