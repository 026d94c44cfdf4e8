//! Settings in two stages: what was typed ([`Settings`], texts under names) and what the archiver needs ([`Config`]).
//!
//! Every setting is a text until it is parsed here, numbers too. PostgreSQL would answer a bad value of a library's
//! setting by quietly using the default; here it is an error that names setting, value and cause, in the server and
//! in the program alike.

mod compressor;
mod hooks;
mod streaming;
mod units;
mod url;

pub use compressor::{Compressor, CustomFormat, ShellFilter};
pub use hooks::{Hook, HookScripts};
pub use streaming::{BadConninfo, Conninfo, Streaming};
pub(crate) use units::parse_bytes;
pub use url::{Addressing, ChecksumChoice, CreateOnly, S3Url, ServerSideEncryption, StorageUrl};

use crate::codec::Compression;
use crate::crypt::Encryption;
use crate::error::{Error, Kind, Result};
use crate::layout::{Format, ServerName};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A setting, by name: `archiver.<name>` in the server, `ARCHIVER_<NAME>` in the program's environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Where WAL is stored.
    Storage,
    /// The cluster's folder there.
    ServerName,
    /// How files are compressed.
    Compression,
    /// How hard.
    CompressionLevel,
    /// What compresses where that is the user's own.
    CustomCompressionFilter,
    /// What unpacks it.
    CustomDecompressionFilter,
    /// What it begins with.
    CustomCompressionMagic,
    /// How files are encrypted.
    Encryption,
    /// The public keys of those who may read them.
    EncryptionRecipients,
    /// The secret keys to read them with.
    DecryptionKeys,
    /// What prints the passphrase of those.
    DecryptionPassphraseCommand,
    /// How many threads work.
    Workers,
    /// How far they look ahead.
    ReadAhead,
    /// How many files of a directory are archived in one run.
    ArchiverBatchSize,
    /// How much memory they take.
    MemoryLimit,
    /// How long one request is tried.
    AttemptTimeout,
    /// How long one file is tried.
    RetryTimeout,
    /// How many segments are fetched ahead.
    RestorePrefetch,
    /// What runs before a file is archived.
    PreArchiveScript,
    /// The same, until it succeeds.
    PreArchiveRetryScript,
    /// What runs after a file was archived, until it succeeds.
    PostArchiveRetryScript,
    /// The same, once.
    PostArchiveScript,
    /// What runs before an archived file is deleted.
    PreWalDeleteScript,
    /// The same, until it succeeds.
    PreWalDeleteRetryScript,
    /// What runs after an archived file was deleted, until it succeeds.
    PostWalDeleteRetryScript,
    /// The same, once.
    PostWalDeleteScript,
    /// How long one of these may take.
    HookTimeout,
    /// From which age of the newest archived file check() fails.
    LastWalMaximumAge,
    /// From how many waiting files check() fails.
    MaxIncomingWalsQueue,
    /// Whether the server receives WAL itself.
    StreamingArchiver,
    /// How the server is reached that WAL is streamed from; libpq's environment says the rest.
    StreamingConninfo,
    /// The name the server knows the receiver by.
    StreamingArchiverName,
    /// The replication slot it uses.
    SlotName,
    /// Whether that is made where it is missing.
    CreateSlot,
    /// Where WAL is received.
    StreamingWalsDirectory,
    /// How many files of it are archived in one run.
    StreamingArchiverBatchSize,
    /// How often the part that was received is put into the storage.
    StreamingPartialInterval,
    /// Where PostgreSQL's client programs are looked for first.
    PathPrefix,
}

impl Setting {
    /// All of them, in the order of the documentation.
    pub const ALL: [Setting; 38] = [
        Setting::Storage,
        Setting::ServerName,
        Setting::Compression,
        Setting::CompressionLevel,
        Setting::CustomCompressionFilter,
        Setting::CustomDecompressionFilter,
        Setting::CustomCompressionMagic,
        Setting::Encryption,
        Setting::EncryptionRecipients,
        Setting::DecryptionKeys,
        Setting::DecryptionPassphraseCommand,
        Setting::Workers,
        Setting::ReadAhead,
        Setting::ArchiverBatchSize,
        Setting::MemoryLimit,
        Setting::AttemptTimeout,
        Setting::RetryTimeout,
        Setting::RestorePrefetch,
        Setting::PreArchiveScript,
        Setting::PreArchiveRetryScript,
        Setting::PostArchiveRetryScript,
        Setting::PostArchiveScript,
        Setting::PreWalDeleteScript,
        Setting::PreWalDeleteRetryScript,
        Setting::PostWalDeleteRetryScript,
        Setting::PostWalDeleteScript,
        Setting::HookTimeout,
        Setting::LastWalMaximumAge,
        Setting::MaxIncomingWalsQueue,
        Setting::StreamingArchiver,
        Setting::StreamingConninfo,
        Setting::StreamingArchiverName,
        Setting::SlotName,
        Setting::CreateSlot,
        Setting::StreamingWalsDirectory,
        Setting::StreamingArchiverBatchSize,
        Setting::StreamingPartialInterval,
        Setting::PathPrefix,
    ];

    /// Its name without the prefix `archiver.`.
    pub const fn name(self) -> &'static str {
        match self {
            Setting::Storage => "storage",
            Setting::ServerName => "server_name",
            Setting::Compression => "compression",
            Setting::CompressionLevel => "compression_level",
            Setting::CustomCompressionFilter => "custom_compression_filter",
            Setting::CustomDecompressionFilter => "custom_decompression_filter",
            Setting::CustomCompressionMagic => "custom_compression_magic",
            Setting::Encryption => "encryption",
            Setting::EncryptionRecipients => "encryption_recipients",
            Setting::DecryptionKeys => "decryption_keys",
            Setting::DecryptionPassphraseCommand => "decryption_passphrase_command",
            Setting::Workers => "workers",
            Setting::ReadAhead => "read_ahead",
            Setting::ArchiverBatchSize => "archiver_batch_size",
            Setting::MemoryLimit => "memory_limit",
            Setting::AttemptTimeout => "attempt_timeout",
            Setting::RetryTimeout => "retry_timeout",
            Setting::RestorePrefetch => "restore_prefetch",
            Setting::PreArchiveScript => "pre_archive_script",
            Setting::PreArchiveRetryScript => "pre_archive_retry_script",
            Setting::PostArchiveRetryScript => "post_archive_retry_script",
            Setting::PostArchiveScript => "post_archive_script",
            Setting::PreWalDeleteScript => "pre_wal_delete_script",
            Setting::PreWalDeleteRetryScript => "pre_wal_delete_retry_script",
            Setting::PostWalDeleteRetryScript => "post_wal_delete_retry_script",
            Setting::PostWalDeleteScript => "post_wal_delete_script",
            Setting::HookTimeout => "hook_timeout",
            Setting::LastWalMaximumAge => "last_wal_maximum_age",
            Setting::MaxIncomingWalsQueue => "max_incoming_wals_queue",
            Setting::StreamingArchiver => "streaming_archiver",
            Setting::StreamingConninfo => "streaming_conninfo",
            Setting::StreamingArchiverName => "streaming_archiver_name",
            Setting::SlotName => "slot_name",
            Setting::CreateSlot => "create_slot",
            Setting::StreamingWalsDirectory => "streaming_wals_directory",
            Setting::StreamingArchiverBatchSize => "streaming_archiver_batch_size",
            Setting::StreamingPartialInterval => "streaming_partial_interval",
            Setting::PathPrefix => "path_prefix",
        }
    }

    /// What it is where nobody says otherwise.
    pub const fn default_value(self) -> &'static str {
        match self {
            Setting::Storage | Setting::LastWalMaximumAge | Setting::MaxIncomingWalsQueue => "",
            Setting::CustomCompressionFilter | Setting::CustomDecompressionFilter | Setting::CustomCompressionMagic => {
                ""
            }
            Setting::EncryptionRecipients | Setting::DecryptionKeys | Setting::DecryptionPassphraseCommand => "",
            Setting::PreArchiveScript
            | Setting::PreArchiveRetryScript
            | Setting::PostArchiveRetryScript
            | Setting::PostArchiveScript
            | Setting::PreWalDeleteScript
            | Setting::PreWalDeleteRetryScript
            | Setting::PostWalDeleteRetryScript
            | Setting::PostWalDeleteScript => "",
            Setting::StreamingConninfo | Setting::SlotName | Setting::StreamingWalsDirectory | Setting::PathPrefix => {
                ""
            }
            Setting::StreamingArchiver => "off",
            Setting::StreamingPartialInterval => "0",
            Setting::StreamingArchiverName => "archiver_receive_wal",
            Setting::CreateSlot => "manual",
            Setting::Encryption => "none",
            Setting::ServerName => "main",
            Setting::Compression => "zstd",
            Setting::CompressionLevel => "low",
            Setting::Workers | Setting::ArchiverBatchSize | Setting::StreamingArchiverBatchSize => "0",
            Setting::ReadAhead => "16",
            Setting::MemoryLimit => "256MB",
            Setting::AttemptTimeout => "30s",
            Setting::RetryTimeout => "60s",
            Setting::RestorePrefetch => "8",
            Setting::HookTimeout => "5min",
        }
    }

    /// One line for pg_settings and `--help`.
    pub const fn description(self) -> &'static str {
        match self {
            Setting::Storage => "URL of the storage WAL files are archived to; empty means not configured.",
            Setting::ServerName => "Name of this cluster's directory below the storage URL.",
            Setting::Compression => {
                "Compression of archived files: none, gzip, pigz, bzip2, xz, zstd, lz4, snappy or custom."
            }
            Setting::CompressionLevel => {
                "Compression level: low, medium, high, a number in the format's range, or adaptive."
            }
            Setting::CustomCompressionFilter => "Shell command that compresses where compression is custom.",
            Setting::CustomDecompressionFilter => "Shell command that unpacks what the custom filter has compressed.",
            Setting::CustomCompressionMagic => {
                "First bytes of what the custom filter makes, as 0x and hexadecimal digits; empty means unknown."
            }
            Setting::Encryption => "Encryption of archived files: none or openpgp (also spelled gpg).",
            Setting::EncryptionRecipients => "File of the OpenPGP public keys that archived files are encrypted to.",
            Setting::DecryptionKeys => "File of OpenPGP secret keys; only for reading encrypted files back.",
            Setting::DecryptionPassphraseCommand => {
                "Command that prints the passphrase of the secret keys, where they have one."
            }
            Setting::Workers => "Threads that read, compress and store WAL files; 0 means one per core, at most 8.",
            Setting::ReadAhead => "WAL files in progress beyond the one PostgreSQL asks for; 0 means one at a time.",
            Setting::ArchiverBatchSize => {
                "Files that \"archiver archive\" takes from a directory in one run; 0 means all."
            }
            Setting::MemoryLimit => "Bound on the memory of all buffers; a segment too large for it is streamed.",
            Setting::AttemptTimeout => "How long one request to a store may go without any progress; S3 only.",
            Setting::RetryTimeout => {
                "How long one file is tried, without any progress, before PostgreSQL is told that it failed."
            }
            Setting::RestorePrefetch => {
                "Segments that \"archiver restore\" fetches ahead during recovery; 0 means none."
            }
            Setting::PreArchiveScript => "Shell command that is run before each WAL file is archived.",
            Setting::PreArchiveRetryScript => {
                "Shell command that is run before each WAL file is archived, until it succeeds."
            }
            Setting::PostArchiveRetryScript => {
                "Shell command that is run after each WAL file was archived or was not, until it succeeds."
            }
            Setting::PostArchiveScript => "Shell command that is run after each WAL file was archived or was not.",
            Setting::PreWalDeleteScript => "Shell command that is run before each archived WAL file is deleted.",
            Setting::PreWalDeleteRetryScript => {
                "Shell command that is run before each archived WAL file is deleted, until it succeeds."
            }
            Setting::PostWalDeleteRetryScript => {
                "Shell command that is run after each archived WAL file was deleted, until it succeeds."
            }
            Setting::PostWalDeleteScript => "Shell command that is run after each archived WAL file was deleted.",
            Setting::HookTimeout => "How long one hook script may take, with all its attempts.",
            Setting::LastWalMaximumAge => "check() fails when the last archived WAL is older; empty means no limit.",
            Setting::MaxIncomingWalsQueue => "check() fails when more WAL files wait; empty means no limit.",
            Setting::StreamingArchiver => {
                "Whether this server receives WAL while it is written and archives it; needs shared_preload_libraries."
            }
            Setting::StreamingConninfo => {
                "Connection string of the server that WAL is received from; empty means what libpq's environment says."
            }
            Setting::StreamingArchiverName => "Application name of the receiver, as in synchronous_standby_names.",
            Setting::SlotName => "Physical replication slot that WAL is received through; empty means none.",
            Setting::CreateSlot => "Whether a missing replication slot is made: auto, or manual for not.",
            Setting::StreamingWalsDirectory => {
                "Directory that WAL is received in; empty means streaming/ beside the archived WAL of a file: storage."
            }
            Setting::StreamingArchiverBatchSize => "Received files that are archived in one run; 0 means all.",
            Setting::StreamingPartialInterval => {
                "How often what was received of the current segment is put into the storage; 0 means never."
            }
            Setting::PathPrefix => "Directories to look for pg_receivewal and psql in before those of PATH.",
        }
    }

    /// The setting of that name (without prefix).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|setting| setting.name() == name)
    }
}

/// What was typed, a text for every setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings([String; Setting::ALL.len()]);

impl Default for Settings {
    fn default() -> Self {
        Settings(Setting::ALL.map(|setting| setting.default_value().to_string()))
    }
}

impl Settings {
    /// What was typed for `setting`, or its default.
    pub fn get(&self, setting: Setting) -> &str {
        &self.0[setting as usize]
    }

    /// Takes what was typed for `setting`.
    pub fn set(&mut self, setting: Setting, value: impl Into<String>) {
        self.0[setting as usize] = value.into();
    }
}

/// Which archive: all that whoever only reads needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Where WAL is stored.
    pub storage: StorageUrl,
    /// The cluster's folder there.
    pub server_name: ServerName,
    /// How long one request to a store may go without any progress.
    pub attempt_timeout: Duration,
    /// How long one file is tried.
    pub retry_timeout: Duration,
    /// The format that files are most likely stored in: the one that is set.
    pub likely_format: Format,
    /// What the user's own filter made, where that can be read back.
    pub custom: Option<CustomFormat>,
    /// The secret keys to read encrypted files with.
    pub decryption_keys: Option<PathBuf>,
    /// What prints the passphrase of those.
    pub decryption_passphrase_command: Option<String>,
}

/// The level that is medium as long as the archiver keeps up, and low while files wait.
const ADAPTIVE: &str = "adaptive";

/// What the archiver needs to know to do its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Which archive.
    pub destination: Destination,
    /// The format that files are stored in.
    pub compression: Compression,
    /// Who makes it.
    pub compressor: Compressor,
    /// The number of the level, as the format counts them.
    pub level: i32,
    /// The same while files wait: another one where the level is adaptive.
    pub backlog_level: i32,
    /// The public keys that files are encrypted to, where they are.
    pub encryption_recipients: Option<PathBuf>,
    /// Threads, at least one.
    pub workers: usize,
    /// Files in progress beyond the one asked for.
    pub read_ahead: usize,
    /// Bound on the memory of all buffers.
    pub memory_limit_bytes: u64,
    /// The programs that run around a file.
    pub hooks: HookScripts,
}

/// What a check judges by; where there is none, it only tells. A wrong one is told and stops no archiving: WAL that piles
/// up for the sake of a threshold would help nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// The age of the newest archived file.
    pub last_wal_maximum_age: Option<Duration>,
    /// The number of waiting files.
    pub max_incoming_wals_queue: Option<u64>,
}

/// What fetching ahead during recovery needs to know. A wrong one stops no archiving, which has no use for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefetch {
    /// Segments kept ahead.
    pub segments: usize,
    /// Bound on the memory of all buffers.
    pub memory_limit_bytes: u64,
}

/// 0 workers means one per core, and no more than this.
const MOST_AUTOMATIC_WORKERS: usize = 8;
const WORKERS: RangeInclusive<u64> = 0..=64;
const READ_AHEAD: RangeInclusive<u64> = 0..=1024;
const RESTORE_PREFETCH: RangeInclusive<u64> = 0..=1000;
const MEMORY_LIMIT_BYTES: RangeInclusive<u64> = (16 << 20)..=(64 << 30);
const BATCH_FILES: RangeInclusive<u64> = 0..=1_000_000_000;
const WAITING_FILES: RangeInclusive<u64> = 0..=1_000_000_000;
const TIMEOUT_MS: RangeInclusive<u64> = 1_000..=3_600_000;
const INTERVAL_MS: RangeInclusive<u64> = 1_000..=86_400_000;

/// What was typed for one setting, on its way to what it means.
struct Typed<'a> {
    setting: Setting,
    text: &'a str,
}

impl Settings {
    /// How many files of a directory are archived in one run, where there is a bound; fails where that is wrong. The server,
    /// which has no use for it, goes on archiving then.
    pub fn batch_size(&self, setting: Setting) -> Result<Option<usize>> {
        let typed = self.typed(setting).number(&BATCH_FILES)?;
        Ok(Some(typed).filter(|&files| files > 0))
    }

    fn typed(&self, setting: Setting) -> Typed<'_> {
        Typed { setting, text: self.get(setting).trim() }
    }
}

impl Typed<'_> {
    /// The refusal of what was typed.
    fn wrong(&self, cause: impl std::fmt::Display) -> Error {
        Error::setting(self.setting.name(), self.text, cause)
    }

    fn timeout(&self) -> Result<Duration> {
        let ms = units::parse_milliseconds(self.text).filter(|ms| TIMEOUT_MS.contains(ms)).ok_or_else(|| {
            self.wrong("It must be a time from 1s to 1h; units are us, ms, s, min, h and d, and ms where none is given")
        })?;
        Ok(Duration::from_millis(ms))
    }

    /// A time between two of something; nothing for 0, which means never.
    fn interval(&self) -> Result<Option<Duration>> {
        match units::parse_milliseconds(self.text) {
            Some(0) => Ok(None),
            Some(ms) if INTERVAL_MS.contains(&ms) => Ok(Some(Duration::from_millis(ms))),
            _ => Err(self.wrong(
                "It must be 0 or a time from 1s to 1d; units are us, ms, s, min, h and d, and ms where none is given",
            )),
        }
    }

    /// As PostgreSQL reads it (`parse_bool`), case and unique beginnings included.
    fn switch(&self) -> Result<bool> {
        let text = self.text.to_ascii_lowercase();
        let begins = |word: &str, least| text.len() >= least && word.starts_with(&text);
        if begins("true", 1) || begins("yes", 1) || begins("on", 2) || text == "1" {
            return Ok(true);
        }
        if begins("false", 1) || begins("no", 1) || begins("off", 2) || text == "0" {
            return Ok(false);
        }
        Err(self.wrong("It must be on or off"))
    }

    fn memory_bytes(&self) -> Result<u64> {
        parse_bytes(self.text).filter(|bytes| MEMORY_LIMIT_BYTES.contains(bytes)).ok_or_else(|| {
            self.wrong(
                "It must be a size from 16MB to 64GB; units are B, kB, MB, GB and TB, and kB where none is given",
            )
        })
    }

    /// The path of a file, where there is one.
    fn path(&self) -> Result<Option<PathBuf>> {
        match self.unless_empty().map(Path::new) {
            // The server and the program work in other directories.
            Some(path) if path.is_relative() => Err(self.wrong("It must be an absolute path")),
            path => Ok(path.map(Path::to_path_buf)),
        }
    }

    fn unless_empty(&self) -> Option<&str> {
        Some(self.text).filter(|text| !text.is_empty())
    }

    fn number(&self, range: &RangeInclusive<u64>) -> Result<usize> {
        match self.text.parse() {
            Ok(number) if range.contains(&number) => Ok(number as usize),
            _ => Err(self.wrong(format!("It must be a whole number from {} to {}", range.start(), range.end()))),
        }
    }
}

impl Destination {
    /// Reads the settings that say where the archive is; fails with the first that is missing or wrong.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let storage = settings.typed(Setting::Storage);
        if storage.text.is_empty() {
            let message = "parameter \"archiver.storage\" is not set";
            return Err(Error::new(Kind::Configuration, "archiver.storage", message)
                .hint("Set it to the URL of the archive, for example file:///srv/wal, and reload the configuration."));
        }
        let storage = StorageUrl::parse(storage.text).map_err(|cause| match cause {
            url::BadUrl::HoldsSecret => Error::new(
                Kind::Configuration,
                "archiver.storage",
                "invalid value for parameter \"archiver.storage\": it holds a user name, a password or a key",
            )
            .hint("Every role can read settings: take the credentials out of the URL."),
            other => storage.wrong(other),
        })?;
        let name = settings.typed(Setting::ServerName);
        let server_name = ServerName::parse(name.text).ok_or_else(|| {
            name.wrong("It takes 1 to 63 letters, digits, dots, underscores and hyphens, and no dot in front")
        })?;
        Ok(Destination {
            storage,
            server_name,
            attempt_timeout: settings.typed(Setting::AttemptTimeout).timeout()?,
            retry_timeout: settings.typed(Setting::RetryTimeout).timeout()?,
            // A wrong one is told by whoever is to compress.
            likely_format: Format {
                compression: Compression::from_name(settings.typed(Setting::Compression).text)
                    .unwrap_or(Compression::Zstd),
                encryption: Encryption::from_name(settings.typed(Setting::Encryption).text).unwrap_or(Encryption::None),
            },
            custom: CustomFormat::parse(settings)?,
            // Wrong or not, archiving goes on without them.
            decryption_keys: settings.typed(Setting::DecryptionKeys).unless_empty().map(PathBuf::from),
            decryption_passphrase_command: settings
                .typed(Setting::DecryptionPassphraseCommand)
                .unless_empty()
                .map(str::to_string),
        })
    }
}

impl Destination {
    /// The same, for somebody who waits no longer than that for one answer.
    pub fn within(&self, patience: Duration) -> Self {
        let most = patience.mul_f64(0.6);
        Destination {
            attempt_timeout: self.attempt_timeout.min(most),
            retry_timeout: self.retry_timeout.min(most),
            ..self.clone()
        }
    }
}

impl Config {
    /// Reads all settings; fails with the first that is missing or wrong.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let destination = Destination::parse(settings)?;
        let (compressor, compression) = Compressor::parse(settings)?;
        if let (StorageUrl::S3(_), false) = (&destination.storage, compressor == Compressor::BuiltIn) {
            let typed = settings.typed(Setting::Compression);
            return Err(
                typed.wrong("It is for file: storage only, as in Barman: names in a bucket must tell the format")
            );
        }
        let level = settings.typed(Setting::CompressionLevel);
        let (calm, busy) = if level.text == ADAPTIVE { ("medium", "low") } else { (level.text, level.text) };
        let number = |name| compression.level(name).map_err(|cause| level.wrong(format!("{cause}, or {ADAPTIVE}")));
        let (level, backlog_level) = (number(calm)?, number(busy)?);
        let encryption = settings.typed(Setting::Encryption);
        let recipients = settings.typed(Setting::EncryptionRecipients);
        let encryption_recipients = match Encryption::from_name(encryption.text) {
            None => return Err(encryption.wrong(format!("Known are {}", Encryption::NAMES.join(", ")))),
            // A wrong path is told also while it is not used.
            Some(Encryption::None) => recipients.path()?.and(None),
            Some(Encryption::OpenPgp) => match recipients.path()? {
                Some(path) => Some(path),
                None => return Err(recipients.wrong("With archiver.encryption it must name a file of public keys")),
            },
        };
        let workers = match settings.typed(Setting::Workers).number(&WORKERS)? {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MOST_AUTOMATIC_WORKERS),
            workers => workers,
        };
        let read_ahead = settings.typed(Setting::ReadAhead).number(&READ_AHEAD)?;
        let memory_limit_bytes = settings.typed(Setting::MemoryLimit).memory_bytes()?;
        let hooks = HookScripts::parse(settings)?;
        Ok(Config {
            destination,
            compression,
            compressor,
            level,
            backlog_level,
            encryption_recipients,
            workers,
            read_ahead,
            memory_limit_bytes,
            hooks,
        })
    }

    /// Everything that is missing or wrong, one error for each setting.
    pub fn problems(settings: &Settings) -> Vec<Error> {
        let wrong = |setting: Setting| {
            let mut alone = Settings::default();
            alone.set(Setting::Storage, "file:///");
            // A storage that is wrong itself says nothing of the others.
            let says_something = |other: &&Setting| **other != Setting::Storage || Destination::parse(settings).is_ok();
            let others = Self::judged_with(setting).iter().filter(says_something);
            others.chain([&setting]).for_each(|typed| alone.set(*typed, settings.get(*typed)));
            let error = Config::parse(&alone).err();
            let error = error.or_else(|| Limits::parse(&alone).err()).or_else(|| Prefetch::parse(&alone).err());
            let error = error.or_else(|| alone.batch_size(Setting::ArchiverBatchSize).err());
            let error = error.or_else(|| Streaming::is_on(&alone).err());
            let error = error.or_else(|| Streaming::parse(&alone, &Destination::parse(&alone).ok()?).err())?;
            (error.subject() == format!("archiver.{}", setting.name())).then_some(error)
        };
        Setting::ALL.into_iter().filter_map(wrong).collect()
    }

    /// The settings that say what another one may be.
    fn judged_with(setting: Setting) -> &'static [Setting] {
        match setting {
            Setting::CompressionLevel | Setting::CustomCompressionFilter | Setting::CustomCompressionMagic => {
                &[Setting::Compression, Setting::CustomCompressionFilter, Setting::CustomDecompressionFilter]
            }
            Setting::CustomDecompressionFilter => &[Setting::Compression, Setting::CustomCompressionFilter],
            Setting::EncryptionRecipients => &[Setting::Encryption],
            Setting::Compression => {
                &[Setting::Storage, Setting::CustomCompressionFilter, Setting::CustomDecompressionFilter]
            }
            _ => &[],
        }
    }
}

impl HookScripts {
    /// Reads the settings; fails with the first that is wrong. Hooks themselves may be any text.
    pub fn parse(settings: &Settings) -> Result<Self> {
        Ok(HookScripts {
            texts: Hook::ALL.map(|hook| settings.typed(hook.setting()).text.to_string()),
            timeout: settings.typed(Setting::HookTimeout).timeout()?,
        })
    }
}

impl Prefetch {
    /// Reads the settings; fails with the first that is wrong.
    pub fn parse(settings: &Settings) -> Result<Self> {
        Ok(Prefetch {
            segments: settings.typed(Setting::RestorePrefetch).number(&RESTORE_PREFETCH)?,
            memory_limit_bytes: settings.typed(Setting::MemoryLimit).memory_bytes()?,
        })
    }
}

impl Limits {
    /// Reads the two settings; fails with the first that is wrong.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let age = settings.typed(Setting::LastWalMaximumAge);
        let last_wal_maximum_age = match age.text {
            "" => None,
            text => Some(units::parse_age(text).ok_or_else(|| {
                age.wrong("It must be a number of minutes, hours, days, weeks or months, such as 2 hours")
            })?),
        };
        let queue = settings.typed(Setting::MaxIncomingWalsQueue);
        let max_incoming_wals_queue = match queue.text {
            "" => None,
            _ => Some(queue.number(&WAITING_FILES)? as u64),
        };
        Ok(Limits { last_wal_maximum_age, max_incoming_wals_queue })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(changes: &[(Setting, &str)]) -> Result<Config> {
        let mut settings = Settings::default();
        settings.set(Setting::Storage, "file:///srv/wal");
        for (setting, value) in changes {
            settings.set(*setting, *value);
        }
        Config::parse(&settings)
    }

    #[test]
    fn a_magic_of_ones_own_that_encrypted_files_begin_with_is_refused() {
        let mut settings = Settings::default();
        settings.set(Setting::Storage, "file:///srv/wal");
        settings.set(Setting::CustomCompressionMagic, "0x8501");
        let error = Config::parse(&settings).unwrap_err();
        assert_eq!(error.subject(), "archiver.custom_compression_magic");
        assert_eq!(Config::problems(&settings), [error]);
        settings.set(Setting::CustomCompressionMagic, "0x2801");
        assert_eq!(Config::problems(&settings), []);
    }

    #[test]
    fn the_defaults_need_only_a_storage() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.destination.server_name.to_string(), "main");
        assert_eq!((config.compression, config.level), (Compression::Zstd, 1));
        assert!((1..=8).contains(&config.workers));
        assert_eq!(config.read_ahead, 16);
        assert_eq!(config.memory_limit_bytes, 256 << 20);
        assert_eq!(config.destination.retry_timeout, Duration::from_secs(60));
        let unset = Config::parse(&Settings::default()).unwrap_err();
        assert_eq!(unset.to_string(), "parameter \"archiver.storage\" is not set");
    }

    #[test]
    fn a_wrong_value_never_means_the_default() {
        for (setting, value) in [
            (Setting::Storage, "/srv/wal"),
            (Setting::Storage, "ftp://host/x"),
            (Setting::ServerName, "../main"),
            (Setting::ServerName, ""),
            (Setting::Compression, "zst"),
            (Setting::Compression, ""),
            (Setting::CompressionLevel, "23"),
            (Setting::CompressionLevel, ""),
            (Setting::Encryption, "gpgg"),
            (Setting::Encryption, ""),
            (Setting::EncryptionRecipients, "keys.asc"),
            (Setting::Workers, "-1"),
            (Setting::Workers, "two"),
            (Setting::Workers, "65"),
            (Setting::ReadAhead, "1025"),
            (Setting::MemoryLimit, "15MB"),
            (Setting::MemoryLimit, "256mb"),
            (Setting::MemoryLimit, "-1"),
            (Setting::AttemptTimeout, "500"),
            (Setting::RetryTimeout, "0"),
            (Setting::RetryTimeout, "60 parsecs"),
            (Setting::HookTimeout, "0"),
            (Setting::HookTimeout, "2h"),
        ] {
            let error = parse(&[(setting, value)]).expect_err(value);
            assert_eq!(error.kind(), Kind::Configuration);
            assert_eq!(error.subject(), format!("archiver.{}", setting.name()));
            assert!(error.message().contains(&format!("\"{value}\"")), "{error}");
            assert!(error.detail_text().is_some_and(|detail| detail.ends_with('.')), "{error:?}");
        }
    }

    #[test]
    fn encryption_needs_somebody_to_encrypt_to() {
        let unset = parse(&[(Setting::Encryption, "openpgp")]).unwrap_err();
        assert_eq!(unset.subject(), "archiver.encryption_recipients");
        let recipients = (Setting::EncryptionRecipients, "/etc/wal.asc");
        let config = parse(&[(Setting::Encryption, "gpg"), recipients]).unwrap();
        assert_eq!(config.encryption_recipients.as_deref(), Some(Path::new("/etc/wal.asc")));
        assert_eq!(config.destination.likely_format.encryption, Encryption::OpenPgp);
        assert_eq!(parse(&[recipients]).unwrap().encryption_recipients, None);
        let mut settings = Settings::default();
        settings.set(Setting::Storage, "file:///srv/wal");
        settings.set(Setting::Encryption, "openpgp");
        let problems = Config::problems(&settings);
        assert_eq!(problems.iter().map(Error::subject).collect::<Vec<_>>(), ["archiver.encryption_recipients"]);
    }

    #[test]
    fn an_adaptive_level_is_lower_while_files_wait() {
        let levels = |compression: &str, level: &str| {
            parse(&[(Setting::Compression, compression), (Setting::CompressionLevel, level)])
                .map(|config| (config.level, config.backlog_level))
        };
        assert_eq!(levels("zstd", "adaptive"), Ok((4, 1)));
        assert_eq!(levels("gzip", "adaptive"), Ok((6, 1)));
        assert_eq!(levels("none", "adaptive"), Ok((0, 0)));
        assert_eq!(levels("zstd", "7"), Ok((7, 7)));
        let wrong = levels("zstd", "adaptable").unwrap_err();
        assert!(wrong.detail_text().is_some_and(|detail| detail.contains("or adaptive")), "{wrong:?}");
    }

    #[test]
    fn every_wrong_setting_is_told_at_once_and_only_those() {
        let mut settings = Settings::default();
        assert_eq!(Config::problems(&settings).len(), 1, "storage is missing");
        settings.set(Setting::Storage, "file:///srv/wal");
        settings.set(Setting::Compression, "gzip");
        assert_eq!(Config::problems(&settings), []);
        settings.set(Setting::CompressionLevel, "12");
        settings.set(Setting::Workers, "two");
        settings.set(Setting::MaxIncomingWalsQueue, "10");
        let subjects: Vec<_> = Config::problems(&settings).iter().map(|error| error.subject().to_string()).collect();
        assert_eq!(subjects, ["archiver.compression_level", "archiver.workers"]);
    }

    #[test]
    fn limits_are_barmans_and_may_be_missing() {
        let mut settings = Settings::default();
        assert_eq!(Limits::parse(&settings), Ok(Limits::default()));
        settings.set(Setting::LastWalMaximumAge, "2 HOURS");
        settings.set(Setting::MaxIncomingWalsQueue, "100");
        let limits = Limits::parse(&settings).unwrap();
        assert_eq!(limits.last_wal_maximum_age, Some(Duration::from_secs(7200)));
        assert_eq!(limits.max_incoming_wals_queue, Some(100));
        for (setting, value) in [
            (Setting::LastWalMaximumAge, "soon"),
            (Setting::LastWalMaximumAge, "2"),
            (Setting::MaxIncomingWalsQueue, "-1"),
            (Setting::MaxIncomingWalsQueue, "many"),
        ] {
            let mut settings = settings.clone();
            settings.set(setting, value);
            assert_eq!(Limits::parse(&settings).unwrap_err().subject(), format!("archiver.{}", setting.name()));
            settings.set(Setting::Storage, "file:///srv/wal");
            assert!(Config::parse(&settings).is_ok(), "it stops no archiving");
            assert_eq!(Config::problems(&settings).len(), 1);
        }
    }

    #[test]
    fn a_wrong_prefetch_stops_no_archiving() {
        let mut settings = Settings::default();
        settings.set(Setting::Storage, "file:///srv/wal");
        let expected = Prefetch { segments: 8, memory_limit_bytes: 256 << 20 };
        assert_eq!(Prefetch::parse(&settings), Ok(expected));
        for wrong in ["", "-1", "many", "1001"] {
            settings.set(Setting::RestorePrefetch, wrong);
            assert_eq!(Prefetch::parse(&settings).unwrap_err().subject(), "archiver.restore_prefetch", "{wrong}");
            assert!(Config::parse(&settings).is_ok());
            assert_eq!(Config::problems(&settings).len(), 1);
        }
    }

    #[test]
    fn programs_compress_only_where_all_that_they_need_is_set_and_only_for_files() {
        use Setting::*;
        let pigz = parse(&[(Compression, "pigz"), (CompressionLevel, "high")]).unwrap();
        assert_eq!((pigz.compression, pigz.level), (super::Compression::Gzip, 9));
        assert_eq!(pigz.compressor.filter(9).map(|filter| filter.text).as_deref(), Some("exec pigz -n -c -9"));
        assert_eq!(parse(&[]).unwrap().compressor.filter(1), None);
        let whole = [(Compression, "custom"), (CustomCompressionFilter, "rot13"), (CustomDecompressionFilter, "rot13")];
        let custom = parse(&whole).unwrap();
        assert_eq!(
            (custom.compression, custom.destination.likely_format),
            (super::Compression::Custom, super::Compression::Zstd.into())
        );
        assert!(custom.destination.custom.is_some_and(|custom| custom.claims(b"anything")));
        for (changes, subject) in [
            (&whole[..2], "custom_decompression_filter"),
            (&[whole[0], whole[2]], "custom_compression_filter"),
            (&[(Compression, "pigz"), (CompressionLevel, "10")], "compression_level"),
            (&[(CustomCompressionMagic, "28b5")], "custom_compression_magic"),
            (&[(CustomCompressionMagic, "0x2")], "custom_compression_magic"),
            (&[(CustomCompressionMagic, "0x")], "custom_compression_magic"),
            (&[(Compression, "pigz"), (Storage, "s3://bucket/x")], "compression"),
        ] {
            assert_eq!(parse(changes).expect_err(subject).subject(), format!("archiver.{subject}"));
            let mut settings = Settings::default();
            settings.set(Storage, "file:///srv/wal");
            changes.iter().for_each(|(setting, value)| settings.set(*setting, *value));
            let problems = Config::problems(&settings);
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!(problems[0].subject(), format!("archiver.{subject}"));
        }
        let magic = [(CustomDecompressionFilter, "rot13"), (CustomCompressionMagic, "0x0102")];
        let custom = parse(&magic).unwrap().destination.custom.expect("read while another format is set");
        assert!(custom.claims(&[1, 2, 3]) && !custom.claims(&[1, 3]));
        assert_eq!(parse(&magic[..1]).unwrap().destination.custom, None, "nothing tells its files");
    }

    #[test]
    fn hooks_are_any_texts_and_none_where_none_is_typed() {
        let hooks = parse(&[]).unwrap().hooks;
        assert_eq!((hooks.set().count(), hooks.timeout), (0, Duration::from_secs(300)));
        let hooks = parse(&[(Setting::PostArchiveScript, " echo '$x' "), (Setting::HookTimeout, "90s")]).unwrap().hooks;
        assert_eq!(hooks.set().collect::<Vec<_>>(), [(Hook::PostArchive, "echo '$x'")]);
        assert_eq!(hooks.timeout, Duration::from_secs(90));
        let facts = Hook::ALL.map(|hook| (hook.is_before(), hook.is_retry()));
        let order = [(true, false), (true, true), (false, true), (false, false)];
        assert_eq!(facts, [order, order].concat()[..]);
    }

    #[test]
    fn a_secret_in_the_url_is_not_repeated_in_the_message() {
        let error = parse(&[(Setting::Storage, "file://user:sesame@host/srv/wal")]).unwrap_err();
        assert!(!format!("{error:?}").contains("sesame"));
    }

    #[test]
    fn every_setting_is_found_by_its_name() {
        for setting in Setting::ALL {
            assert_eq!(Setting::from_name(setting.name()), Some(setting));
            assert_eq!(Settings::default().get(setting), setting.default_value());
        }
        assert_eq!(Setting::from_name("compresion"), None);
    }
}
