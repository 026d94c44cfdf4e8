//! Compression by programs of the user's, as it is set.

use super::{Setting, Settings};
use crate::codec::Compression;
use crate::crypt::Encryption;
use crate::error::Result;
use crate::wal::LongPageHeader;

/// Who compresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compressor {
    /// This library.
    BuiltIn,
    /// The program pigz, which makes gzip.
    Pigz,
    /// `custom_compression_filter`.
    Custom(ShellFilter),
}

/// What the shell runs to make one stream of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShellFilter {
    /// The setting that calls for it, with prefix.
    pub setting: &'static str,
    /// The text for the shell.
    pub text: String,
}

/// How files are recognised and read back that `custom_compression_filter` made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CustomFormat {
    /// What unpacks them.
    pub filter: ShellFilter,
    /// What they begin with; empty where that is not known.
    magic: Vec<u8>,
}

pub(super) const PIGZ: &str = "pigz";
pub(super) const CUSTOM: &str = "custom";
/// A longer one tells no more.
const MOST_MAGIC_BYTES: usize = 16;

impl Compressor {
    /// What is set, with the format that it stores.
    pub(super) fn parse(settings: &Settings) -> Result<(Self, Compression)> {
        let compression = settings.typed(Setting::Compression);
        let needed = |setting: Setting| {
            let typed = settings.typed(setting);
            match typed.text {
                "" => Err(typed.wrong("It must be a shell command where archiver.compression is custom")),
                text => Ok(text.to_string()),
            }
        };
        Ok(match compression.text {
            PIGZ => (Compressor::Pigz, Compression::Gzip),
            CUSTOM => {
                let text = needed(Setting::CustomCompressionFilter)?;
                // What cannot be read back is not to be written.
                needed(Setting::CustomDecompressionFilter)?;
                let filter = ShellFilter { setting: "archiver.custom_compression_filter", text };
                (Compressor::Custom(filter), Compression::Custom)
            }
            text => match Compression::from_name(text) {
                Some(format) => (Compressor::BuiltIn, format),
                None => {
                    let known = Compression::names();
                    return Err(compression.wrong(format!("Known are {known}, {PIGZ} and {CUSTOM}")));
                }
            },
        })
    }

    /// The program that compresses at that level; nothing where none does.
    pub fn filter(&self, level: i32) -> Option<ShellFilter> {
        match self {
            Compressor::BuiltIn => None,
            // Without name and time in the header, so that the same content gives the same bytes.
            Compressor::Pigz => {
                Some(ShellFilter { setting: "archiver.compression", text: format!("exec {PIGZ} -n -c -{level}") })
            }
            Compressor::Custom(filter) => Some(filter.clone()),
        }
    }
}

impl CustomFormat {
    /// What is set; nothing where such files could not be told from others. With a magic they are also read while another
    /// format is set.
    pub(super) fn parse(settings: &Settings) -> Result<Option<Self>> {
        let typed = settings.typed(Setting::CustomCompressionMagic);
        let digits = typed.text.strip_prefix("0x").filter(|digits| digits.len() <= 2 * MOST_MAGIC_BYTES);
        let magic = match typed.text {
            "" => Vec::new(),
            _ => digits.and_then(|digits| hex::decode(digits).ok()).filter(|magic| !magic.is_empty()).ok_or_else(|| {
                typed.wrong(format!(
                    "It must be 0x and two hexadecimal digits for each of 1 to {MOST_MAGIC_BYTES} bytes, as in 0x28b52ffd"
                ))
            })?,
        };
        if Encryption::detect(&magic) != Encryption::None {
            return Err(typed.wrong("Encrypted files begin like that"));
        }
        let text = settings.typed(Setting::CustomDecompressionFilter).text.to_string();
        let is_assumed = settings.typed(Setting::Compression).text == CUSTOM;
        let is_set = !text.is_empty() && (is_assumed || !magic.is_empty());
        let filter = ShellFilter { setting: "archiver.custom_decompression_filter", text };
        Ok(is_set.then_some(CustomFormat { filter, magic }))
    }

    /// Whether a stored file that begins so and is in no known format was made by the filter. Without a magic that is
    /// assumed of all but plain WAL.
    pub fn claims(&self, first_bytes: &[u8]) -> bool {
        if self.magic.is_empty() {
            LongPageHeader::parse(first_bytes).is_err()
        } else {
            first_bytes.starts_with(&self.magic)
        }
    }
}
