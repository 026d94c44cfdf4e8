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

/// What a cluster and its physical copies know, and an archive does not: by it the hash of an encrypted file can stand
/// beside it and tells nothing to others, who could try what the file may hold.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey([u8; 32]);

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey")
    }
}

impl HashKey {
    /// The key made from a cluster's secret.
    pub fn of_secret(secret: &[u8; 32]) -> Self {
        HashKey(blake3::derive_key("archiver 2026-11 hash of the content of an encrypted WAL file", secret))
    }

    fn keyed(&self, hash: &Hash) -> Hash {
        Hash(blake3::keyed_hash(&self.0, hash.0.as_bytes()))
    }
}

/// What is noted of a plain file beside the stored one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted {
    /// Its bytes.
    pub size: u64,
    /// Its hash, in one form or the other.
    pub hash: NotedHash,
}

/// The hash of a plain file as it may be shown.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum NotedHash {
    /// Itself.
    Open(Hash),
    /// Of a file that is encrypted: by a key.
    Keyed(Hash),
}

const KEYED: &str = "blake3-keyed:";

impl fmt::Display for NotedHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NotedHash::Open(hash) => hash.fmt(f),
            NotedHash::Keyed(hash) => write!(f, "{KEYED}{}", hash.0.to_hex()),
        }
    }
}

impl fmt::Debug for NotedHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl NotedHash {
    /// Reads what [`NotedHash`] displays.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix(KEYED) {
            Some(digits) => Hash::from_hex(digits).map(NotedHash::Keyed),
            None => Hash::parse(text).map(NotedHash::Open),
        }
    }
}

impl Noted {
    /// What is noted of that content.
    pub fn of(content: &Content) -> Self {
        Noted { size: content.size, hash: NotedHash::Open(content.hash) }
    }

    /// The same, for those who know the key.
    pub fn keyed(content: &Content, key: &HashKey) -> Self {
        Noted { size: content.size, hash: NotedHash::Keyed(key.keyed(&content.hash)) }
    }

    /// Whether that content is the noted one; nothing where it takes the key to tell.
    pub fn is_of(&self, content: &Content, key: Option<&HashKey>) -> Option<bool> {
        let is_equal = match self.hash {
            NotedHash::Open(hash) => hash == content.hash,
            NotedHash::Keyed(_) if self.size != content.size => false,
            NotedHash::Keyed(hash) => key?.keyed(&content.hash) == hash,
        };
        Some(is_equal && self.size == content.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_noted_hash_tells_its_own_content_and_a_keyed_one_only_by_its_key() {
        let content = |text: &str| Content { size: text.len() as u64, hash: Hash(blake3::hash(text.as_bytes())) };
        let (one, two, longer) = (content("one"), content("two"), content("longer"));
        let (key, other_key) = (HashKey::of_secret(&[1; 32]), HashKey::of_secret(&[2; 32]));
        let open = Noted::of(&one);
        assert_eq!([&one, &two, &longer].map(|other| open.is_of(other, None)), [Some(true), Some(false), Some(false)]);
        let keyed = Noted::keyed(&one, &key);
        assert_eq!([&one, &two, &longer].map(|other| keyed.is_of(other, None)), [None, None, Some(false)]);
        assert_eq!(keyed.is_of(&one, Some(&key)), Some(true));
        assert_eq!(keyed.is_of(&two, Some(&key)), Some(false));
        assert_eq!(keyed.is_of(&one, Some(&other_key)), Some(false));
        for noted in [open, keyed] {
            assert_eq!(NotedHash::parse(&noted.hash.to_string()), Some(noted.hash));
        }
        assert!(!keyed.hash.to_string().contains(&one.hash.0.to_hex().to_string()));
        assert_eq!(NotedHash::parse("blake3-keyed:00"), None);
        assert_eq!(format!("{key:?}"), "HashKey");
    }
}
