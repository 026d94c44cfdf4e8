//! OpenPGP (RFC 4880): files encrypted to the public keys of their readers, after compression.
//!
//! What is written is what gpg 2.2, and so Barman, reads: binary, for keys of version 4, with a modification detection code
//! (SEIPD version 1), and not compressed once more. What is read is whatever gpg writes for our keys.

mod passphrase;
mod recipients;
mod secret_keys;

pub use passphrase::of_command;
pub use recipients::{Reader, Recipients, Seed, encrypt, most_added_bytes};
pub use secret_keys::{Passphrase, SecretKeys};

use std::fmt;

/// Whether files are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// They are stored as they are.
    None,
    /// To OpenPGP public keys.
    OpenPgp,
}

impl Encryption {
    /// The names that users may write; `gpg` is Barman's.
    pub const NAMES: [&'static str; 3] = ["none", "openpgp", "gpg"];

    /// What that name stands for.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "none" => Some(Encryption::None),
            "openpgp" | "gpg" => Some(Encryption::OpenPgp),
            _ => None,
        }
    }

    /// The name that is shown.
    pub fn name(self) -> &'static str {
        match self {
            Encryption::None => "none",
            Encryption::OpenPgp => "openpgp",
        }
    }

    /// What names in cloud storage end with, behind the suffix of the compression.
    pub fn suffix(self) -> &'static str {
        match self {
            Encryption::None => "",
            Encryption::OpenPgp => ".gpg",
        }
    }

    /// Recognises a file by its first bytes: an encrypted one begins with a session key, for a public key (tag 1) or a
    /// passphrase (tag 3), in a packet header of the old or the new format (RFC 4880, 4.2). Neither WAL nor any
    /// compression format begins like that.
    pub fn detect(first_bytes: &[u8]) -> Self {
        const OLD_FORMAT: u8 = 0x80;
        const NEW_FORMAT: u8 = 0xC0;
        let tag = first_bytes.first().and_then(|&byte| match byte & NEW_FORMAT {
            OLD_FORMAT => Some(byte >> 2 & 0x0F),
            NEW_FORMAT => Some(byte & 0x3F),
            _ => None,
        });
        if matches!(tag, Some(1 | 3)) { Encryption::OpenPgp } else { Encryption::None }
    }
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A file of keys in parts that can be read one by one: each armored block, or all of a binary file.
fn armored_blocks(bytes: &[u8]) -> Vec<&[u8]> {
    const BEGIN: &[u8] = b"-----BEGIN PGP ";
    if bytes.trim_ascii().is_empty() {
        return Vec::new();
    }
    let starts = bytes.windows(BEGIN.len()).enumerate().filter(|(_, window)| *window == BEGIN).map(|(at, _)| at);
    let starts: Vec<usize> = starts.collect();
    let is_binary = bytes.first().is_some_and(|byte| byte & 0x80 != 0);
    if is_binary || starts.is_empty() {
        return vec![bytes];
    }
    let ends = starts.iter().skip(1).copied().chain([bytes.len()]);
    starts.iter().zip(ends).map(|(&start, end)| &bytes[start..end]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Compression;
    use crate::wal::magic_of_major;

    #[test]
    fn barmans_name_means_openpgp() {
        assert_eq!(Encryption::from_name("gpg"), Some(Encryption::OpenPgp));
        for name in ["gpgg", "", "None", "pgp"] {
            assert_eq!(Encryption::from_name(name), None, "{name}");
        }
        assert!(Encryption::NAMES.iter().all(|name| Encryption::from_name(name).is_some()));
    }

    #[test]
    fn no_plain_or_compressed_file_looks_encrypted() {
        for first in [0x84, 0x85, 0x86, 0x8C, 0xC1, 0xC3] {
            assert_eq!(Encryption::detect(&[first, 1, 2]), Encryption::OpenPgp, "{first:02X}");
        }
        assert_eq!(Encryption::detect(&[]), Encryption::None);
        let majors = (15..=18).map(|major| magic_of_major(major).expect("a known version").to_le_bytes());
        for wal in majors {
            assert_eq!(Encryption::detect(&wal), Encryption::None);
        }
        for text in ["1\t0/3000000\tno recovery target specified", "START WAL LOCATION"] {
            assert_eq!(Encryption::detect(text.as_bytes()), Encryption::None);
        }
        for compression in Compression::ALL {
            let mut encoded = Vec::new();
            let level = compression.level("low").expect("a level");
            let mut encoder = crate::codec::Encoder::new(compression, level).expect("an encoder");
            encoder.encode(&[0; 100], &mut encoded).expect("encode");
            assert_eq!(Encryption::detect(&encoded), Encryption::None, "{}", compression.name());
        }
    }
}
