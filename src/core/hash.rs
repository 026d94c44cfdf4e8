//! What a file's content is known by.

use std::fmt;

/// The BLAKE3 hash of a plain file.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hash(pub blake3::Hash);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", self.0.to_hex())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Hash {
    /// Reads what [`Hash`] displays.
    pub fn parse(text: &str) -> Option<Self> {
        Self::from_hex(text.strip_prefix("blake3:")?)
    }

    /// Reads the 64 hexadecimal digits.
    pub fn from_hex(digits: &str) -> Option<Self> {
        blake3::Hash::from_hex(digits).ok().map(Hash)
    }
}

/// A plain file's content: two files that agree in it are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Its bytes.
    pub size: u64,
    /// Its hash.
    pub hash: Hash,
}
