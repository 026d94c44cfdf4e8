//! Backup labels: where a base backup began.

use super::name::SegmentName;
use super::position::Lsn;
use std::fmt;

/// Why a text is not the label that its name calls for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BadLabel {
    /// It does not say where the backup began.
    NoStart,
    /// The backup began elsewhere.
    Start {
        /// What it says.
        found: String,
    },
}

impl fmt::Display for BadLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BadLabel::NoStart => write!(f, "it does not say where the backup began"),
            BadLabel::Start { found } => write!(f, "it is of a backup that began at {found}"),
        }
    }
}

/// Whether `text` is the label of the backup that began `offset` bytes behind the start of `segment` (PostgreSQL,
/// xlogbackup.c, `build_backup_content`).
pub fn check_label(segment: SegmentName, offset: u32, text: &str) -> Result<(), BadLabel> {
    /// Positions in segments of any size agree in as many bits as those of the smallest.
    const COMMON_BITS: u64 = (1 << 20) - 1;
    let start = text.lines().find_map(|line| line.strip_prefix("START WAL LOCATION: ")).ok_or(BadLabel::NoStart)?;
    let parts = start.split_once(" (file ").and_then(|(lsn, file)| Some((Lsn::parse(lsn)?, file.strip_suffix(')')?)));
    let (lsn, file) = parts.ok_or(BadLabel::NoStart)?;
    match file == segment.to_string() && lsn.0 & COMMON_BITS == u64::from(offset) & COMMON_BITS {
        true => Ok(()),
        false => Err(BadLabel::Start { found: start.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::WalName;
    use super::*;

    #[test]
    fn a_label_says_where_its_name_says_that_the_backup_began() {
        let segment = WalName::parse("000000010000000000000005").unwrap().segment().unwrap();
        let start = "0/5000028 (file 000000010000000000000005)";
        let text = format!("START WAL LOCATION: {start}\nSTOP WAL LOCATION: 0/5000100 (file x)\nLABEL: daily\n");
        assert_eq!(check_label(segment, 0x28, &text), Ok(()));
        assert_eq!(check_label(segment, 0x30, &text), Err(BadLabel::Start { found: start.into() }));
        let other = WalName::parse("000000020000000000000005").unwrap().segment().unwrap();
        assert_eq!(check_label(other, 0x28, &text), Err(BadLabel::Start { found: start.into() }));
        for text in ["", "LABEL: daily\n", "START WAL LOCATION: here\n", "START WAL LOCATION: 0/5 (file x\n"] {
            assert_eq!(check_label(segment, 0x28, text), Err(BadLabel::NoStart), "{text:?}");
        }
    }
}
