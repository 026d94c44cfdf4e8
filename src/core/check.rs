//! What can be judged of an archive from outside: the rows of `check()` that concern the storage.

use crate::codec::Compression;
use crate::config::{Compressor, Config, CreateOnly, Hook, Limits, StorageUrl};
use crate::crypt::{self, Recipients, Seed};
use crate::durable;
use crate::error::{Error, Result};
use crate::identity::{Marker, foreign_archive, vanished_archive};
use crate::owner::Owner;
use crate::place::{Place, Records};
use crate::process::find_program;
use crate::pulse::Pulse;
use crate::queue::{self, Summary};
use crate::set_aside;
use crate::state::State;
use crate::store::{Attributes, Body, CredentialFacts};
use nix::sys::statvfs::statvfs;
use nix::unistd::{AccessFlags, access};
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How a row turned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Good.
    Ok,
    /// Archiving goes on, and somebody should look.
    Warning,
    /// Archiving does not work, or not as intended.
    Failed,
}

impl Verdict {
    /// The word shown to users.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed => "failed",
        }
    }
}

/// One row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What was looked at.
    pub name: &'static str,
    /// How it turned out.
    pub verdict: Verdict,
    /// What was found.
    pub detail: String,
    /// What to do.
    pub hint: Option<String>,
}

impl Row {
    /// A row that is good.
    pub fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Row { name, verdict: Verdict::Ok, detail: detail.into(), hint: None }
    }

    /// A row that somebody should look at.
    pub fn warning(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Row { name, verdict: Verdict::Warning, detail: detail.into(), hint: Some(hint.into()) }
    }

    /// A row that failed.
    pub fn failed(name: &'static str, detail: impl Into<String>, hint: impl Into<String>) -> Self {
        Row { name, verdict: Verdict::Failed, detail: detail.into(), hint: Some(hint.into()) }
    }

    /// A row that could not be judged, or whose judgement is this error.
    pub fn of_error(name: &'static str, error: &Error) -> Self {
        let detail = match error.detail_text() {
            Some(sentence) => format!("{error}. {sentence}"),
            None => error.to_string(),
        };
        Row { name, verdict: Verdict::Failed, detail, hint: error.hint_text().map(str::to_string) }
    }

    /// What was judged, or why it could not be.
    pub fn of(name: &'static str, judged: Result<Row>) -> Self {
        judged.unwrap_or_else(|error| Row::of_error(name, &error))
    }
}

/// How long one thing that is looked at may take.
const ITEM_PATIENCE: Duration = Duration::from_secs(5);
/// Below this share of free space a file system is called nearly full.
const FEW_FREE_PERCENT: u64 = 5;

/// How files are compressed; says so where the level that was set changes nothing.
pub fn compression(config: &Config) -> Row {
    let (name, format) = ("compression", config.compression.name());
    match &config.compressor {
        Compressor::BuiltIn => {}
        Compressor::Pigz if find_program("pigz", &[], &std::env::var_os("PATH").unwrap_or_default()).is_none() => {
            let hint = "Install pigz, or set archiver.compression to gzip, which is the same format.";
            return Row::failed(name, "there is no program pigz in the PATH of this process", hint);
        }
        Compressor::Pigz => return Row::ok(name, format!("pigz, level {}, stored as gzip", config.level)),
        Compressor::Custom(filter) => {
            let unpacking = config.destination.custom.as_ref().map(|custom| &custom.filter);
            let texts = [Some(filter), unpacking].into_iter().flatten();
            let wrong = texts.flat_map(|filter| shell_text(name, filter.setting, &filter.text)).next();
            return wrong.unwrap_or_else(|| Row::ok(name, "custom, by programs that are not tried here"));
        }
    }
    Row::ok(
        name,
        match config.compression {
            Compression::None => format.to_string(),
            one if one.has_one_speed() => format!("{format}, which has one speed: compression_level changes nothing"),
            _ if config.backlog_level != config.level => {
                format!("{format}, level {}, and {} while files wait", config.level, config.backlog_level)
            }
            _ => format!("{format}, level {}", config.level),
        },
    )
}

/// How files are encrypted: whether the keys can be used, tried once, and who could not read what is encrypted to them.
pub fn encryption(config: &Config) -> Row {
    const SOON: Duration = Duration::from_secs(30 * 24 * 3600);
    let name = "encryption";
    let Some(path) = &config.encryption_recipients else { return Row::ok(name, "none") };
    let now = SystemTime::now();
    let readers = match Recipients::new(path).readers(now) {
        Ok(readers) => readers,
        Err(error) => return Row::of_error(name, &error),
    };
    if let Err(error) = crypt::encrypt(&readers, &Seed::random(), io::empty(), io::sink()) {
        let detail = format!("could not encrypt to the keys in \"{}\": {error}", path.display());
        return Row::failed(name, detail, "Use keys that gpg makes: RSA, or Curve25519.");
    }
    let ids: Vec<&str> = readers.iter().map(|reader| reader.id.as_str()).collect();
    let detail = format!("openpgp, to {}", ids.join(", "));
    let expires = readers.iter().filter_map(|reader| reader.expires).min();
    let left = expires.map(|expires| expires.duration_since(now).unwrap_or_default());
    match left {
        Some(left) if left < SOON => Row::warning(
            name,
            format!("{detail}; a key expires in {} days", left.as_secs() / 86_400),
            "Once it has expired nothing is archived: prolong it, and export it into the file again.",
        ),
        _ if matches!(config.destination.storage, StorageUrl::S3(_)) => Row::warning(
            name,
            detail,
            "Barman's cloud tools do not see encrypted objects: restore_command must be that of archiver.",
        ),
        _ if !readers.iter().any(|reader| reader.is_seen_by_barman) => Row::warning(
            name,
            detail,
            "Barman recognises only what is encrypted to an RSA key, of 2048, 3072, 4096 or 8192 bits; archiver and gpg read it all the same.",
        ),
        _ => Row::ok(name, detail),
    }
}

/// The hooks that are set: a row for each that cannot run or holds what every role may read, else one for all. None where
/// none is set.
pub fn hooks(config: &Config) -> Vec<Row> {
    let name = "hooks";
    let set: Vec<(Hook, &str)> = config.hooks.set().collect();
    let mut rows: Vec<Row> =
        set.iter().flat_map(|(hook, text)| shell_text(name, &format!("archiver.{}", hook.name()), text)).collect();
    if rows.is_empty() && !set.is_empty() {
        let names: Vec<&str> = set.iter().map(|(hook, _)| hook.name()).collect();
        let seconds = config.hooks.timeout.as_secs();
        rows.push(Row::ok(name, format!("{}; each is given {seconds} s", names.join(", "))));
    }
    rows
}

/// What is wrong with a text that the shell is to run, as far as can be seen without running it.
fn shell_text(name: &'static str, setting: &str, text: &str) -> Vec<Row> {
    let missing = plain_program(text).and_then(|program| {
        let path = Path::new(program);
        let cause = match access(path, AccessFlags::X_OK) {
            Err(errno) => errno.desc(),
            Ok(()) if path.is_dir() => "Is a directory",
            Ok(()) => return None,
        };
        let detail = format!("{setting} names \"{program}\", which cannot be run: {cause}");
        Some(Row::failed(
            name,
            detail,
            "Put an executable file there, or mend the setting and reload the configuration.",
        ))
    });
    let is_told_to_all = looks_like_credential(text).then(|| {
        let detail = format!("{setting} looks as if it held a credential, and every role can read it");
        Row::warning(name, detail, "Let the program read it from a file that only the server's user can read.")
    });
    missing.into_iter().chain(is_told_to_all).collect()
}

/// The program that a text begins with, where that is an absolute path which the shell takes as it is.
fn plain_program(text: &str) -> Option<&str> {
    let word = text.split_ascii_whitespace().next()?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@%,:".contains(c);
    (word.starts_with('/') && word.chars().all(is_plain)).then_some(word)
}

/// Whether something in it is called a secret and has a value that is no name of a file or variable, or has the shape of
/// one.
fn looks_like_credential(text: &str) -> bool {
    let holds_value = |value: &str| {
        let value = value.trim_start_matches(['"', '\'']);
        !value.is_empty() && !value.starts_with(['$', '/', '~', '`', '<', '.'])
    };
    let names_secret = |name: &str| {
        let name = name.to_ascii_lowercase();
        ["password", "passwd", "passphrase", "secret", "token", "apikey", "api_key", "access_key"]
            .iter()
            .any(|secret| name.contains(secret) && !name.ends_with("file"))
    };
    let mut words = text.split(|c: char| c.is_ascii_whitespace() || c == ';').peekable();
    while let Some(word) = words.next() {
        let (name, value) = match word.split_once(['=', ':']) {
            Some((name, value)) => (name, value),
            None if word.starts_with("--") => (word, words.peek().copied().unwrap_or_default()),
            None => (word, ""),
        };
        let holds_user = word.split_once("://").is_some_and(|(_, rest)| {
            rest.split('/').next().is_some_and(|host| host.split_once('@').is_some_and(|(user, _)| user.contains(':')))
        });
        let is_key_id = word
            .split(|c: char| !c.is_ascii_alphanumeric())
            .any(|part| part.len() == 20 && (part.starts_with("AKIA") || part.starts_with("ASIA")));
        if holds_user || is_key_id || names_secret(name) && holds_value(value) {
            return true;
        }
    }
    false
}

/// The files that wait in `pg_wal`, judged by the limit that was set, or by how long the oldest waits.
pub fn waiting(pg_wal: &Path, limits: &Limits) -> Row {
    let name = "waiting WAL";
    let queue = Summary::of(&queue::waiting(pg_wal));
    let age = queue.age_seconds().unwrap_or_default();
    let detail = format!("{} files, {} MiB, the oldest for {age:.0} s", queue.files, queue.bytes >> 20);
    let hint = "Archiving stands or lags: SELECT * FROM archiver.queue() and the server log say more.";
    match limits.max_incoming_wals_queue {
        Some(most) if queue.files > most => {
            Row::failed(name, format!("{detail}; archiver.max_incoming_wals_queue allows {most} files"), hint)
        }
        // A file waits for a moment at any time; one that waits for minutes means that archiving stands or lags.
        _ if age > 300.0 => Row::warning(name, detail, hint),
        _ => Row::ok(name, detail),
    }
}

/// What the archiver process of a running server tells of itself.
pub fn archiver_process(state: Option<&State>) -> Row {
    let name = "archiver process";
    match state {
        None => Row::ok(name, "none tells of itself: the server does not run, or has nothing archived yet"),
        Some(state) if state.failed_attempts > 0 => Row::failed(
            name,
            format!(
                "{} failed attempts in a row; {}",
                state.failed_attempts,
                state.last_error.as_deref().unwrap_or("-")
            ),
            state.last_error_hint.as_deref().unwrap_or("The server log says more."),
        ),
        Some(state) => Row::ok(name, format!("process {}", state.archiver_pid)),
    }
}

/// The files that the archiver process was refused, as far as its state is known.
pub fn refused(state: Option<&State>) -> Row {
    let name = "refused files";
    let refused = state.map(|state| state.refused.as_slice()).unwrap_or_default();
    match refused.first() {
        Some(first) => Row::failed(
            name,
            format!("{}, the first is \"{}\"", refused.len(), first.name),
            "The archive holds other files of these names; both hashes: SELECT * FROM archiver.errors()",
        ),
        None => Row::ok(name, "none"),
    }
}

/// Where a cluster lives.
#[derive(Clone, Debug)]
pub struct Home {
    /// The cluster.
    pub system_identifier: u64,
    /// Its data directory.
    pub data_directory: PathBuf,
    /// Whether it lives elsewhere, and that is another one's data directory, which remembers the archives begun from there.
    pub is_elsewhere: bool,
}

/// Judges the storage that `config` names, without writing to it, for the cluster that lives at `home`. Where that is not
/// known, whose archive it is can be told and not judged.
pub fn check_storage(config: &Config, home: Option<&Home>, pulse: &Arc<Pulse>) -> Vec<Row> {
    let place = match Place::open(&config.destination.within(ITEM_PATIENCE), pulse) {
        Ok(place) => place,
        Err(error) => return vec![Row::of_error("storage", &error)],
    };
    // Without credentials every other question would be answered by the same failure.
    if let Err(error) = place.store.confirm_access() {
        return vec![Row::ok("storage", place.location()), Row::of_error("credentials", &error)];
    }
    let mut rows = vec![Row::ok("storage", place.location())];
    rows.push(Row::of("identity", identity(&place, home)));
    if let Some(records) = &place.records {
        rows.push(writable(&place, records));
        rows.push(Row::of("free space", free_space(records)));
        if let Some(home) = home.filter(|home| !home.is_elsewhere) {
            rows.push(Row::of("separate device", separate_device(records, &home.data_directory)));
        }
        rows.push(Row::of("staged files", staging(records)));
        rows.push(Row::of("clock", clock(records)));
    } else {
        rows.push(credentials(&place));
        rows.push(create_only(config));
        if rows.iter().any(|row| row.verdict == Verdict::Failed) {
            // Every further question would wait as long, for the same answer.
            return rows;
        }
    }
    rows.push(Row::of("files set aside", files_set_aside(&place)));
    rows
}

/// Writes an object, reads it back and removes it. Not into another cluster's archive, nor where none was begun.
pub fn probe_storage(config: &Config, home: &Home, pulse: &Arc<Pulse>) -> Row {
    let name = "probe";
    let probed = || -> Result<Row> {
        let place = Place::open(&config.destination.within(ITEM_PATIENCE), pulse)?;
        let judged = identity(&place, Some(home))?;
        if judged.verdict != Verdict::Ok {
            return Ok(Row { name, ..judged });
        }
        let key = place.layout.probe_key(&Owner::current().unique_name());
        let content = format!("written by archiver.check(probe => true) for {}\n", home.system_identifier);
        let attributes = Attributes { modified: SystemTime::now(), content: None };
        place.store.put_new(&key, Body::Bytes(content.as_bytes()), &attributes)?;
        let mut read = String::new();
        if let Some(object) = place.store.get(&key)? {
            let location = place.store.location(&key);
            let mut body = object.body.take(content.len() as u64 + 1);
            body.read_to_string(&mut read).map_err(|error| Error::io("read file", Path::new(&location), &error))?;
        }
        if read != content {
            let hint = "The storage does not keep what it is given: do not archive to it.";
            return Ok(Row::failed(name, "what was written read back differently", hint));
        }
        Ok(match place.store.delete(&key) {
            Ok(_) => Row::ok(name, "written, read back and removed"),
            Err(error) => Row::warning(
                name,
                format!("written and read back; {error}"),
                "Is the storage append-only, as intended? Else allow the removal.",
            ),
        })
    };
    Row::of(name, probed())
}

fn identity(place: &Place, home: Option<&Home>) -> Result<Row> {
    let name = "identity";
    let marker = home.map(|home| Marker::of_data_directory(&home.data_directory));
    let is_remembered = match (home, &marker) {
        (Some(home), Some(marker)) => marker.remembers(home.system_identifier, &place.real_location())?,
        _ => false,
    };
    Ok(match (place.identity()?, home) {
        (Some((identity, _)), Some(home)) if !identity.names(home.system_identifier) => {
            let found = identity.system_identifier();
            Row::of_error(name, &foreign_archive(&place.location(), found, home.system_identifier))
        }
        (Some((identity, _)), _) => Row::ok(name, format!("system identifier {}", identity.system_identifier())),
        (None, _) if is_remembered => Row::of_error(
            name,
            &vanished_archive(&place.location(), place.absence_question(), marker.as_ref().map(Marker::path)),
        ),
        (None, _) => Row::warning(
            name,
            format!("no archive at \"{}\" yet", place.location()),
            format!("It is begun with the first WAL file. {}", place.absence_question()),
        ),
    })
}

/// Where the credentials come from and how long they last.
fn credentials(place: &Place) -> Row {
    let name = "credentials";
    let facts = place.store.facts();
    match (facts.credentials, facts.credential_failure) {
        (Some(known), Some(failure)) => Row::warning(
            name,
            format!("from {}, not renewed: {failure}", told(&known)),
            failure.hint_text().unwrap_or("Archiving goes on until these expire."),
        ),
        (Some(known), None) => Row::ok(name, format!("from {}", told(&known))),
        (None, Some(failure)) => Row::of_error(name, &failure),
        (None, None) => Row::warning(name, "none are held", "See that the server's environment or a profile has some."),
    }
}

fn told(known: &CredentialFacts) -> String {
    let left = known.expires.map(|expires| expires.duration_since(SystemTime::now()).unwrap_or_default().as_secs());
    match left {
        Some(seconds) => format!("{}, for another {seconds} s", known.source),
        None => known.source.clone(),
    }
}

/// How files in the bucket are kept from being overwritten, as set.
fn create_only(config: &Config) -> Row {
    let name = "create-only";
    match &config.destination.storage {
        StorageUrl::S3(url) if url.create_only == CreateOnly::Head => Row::warning(
            name,
            "head: a look before each put",
            "Two writers at the same instant are not told apart: see that only this server writes to the archive.",
        ),
        StorageUrl::S3(url) if url.create_only == CreateOnly::Conditional => {
            Row::ok(name, "conditional puts, which the store is trusted to heed")
        }
        _ => Row::ok(name, "conditional puts, once the store has shown that it heeds them"),
    }
}

fn writable(place: &Place, records: &Records) -> Row {
    let name = "storage writable";
    let server_folder = records.root().join(place.layout.server_folder());
    let folder = if server_folder.exists() { server_folder } else { records.root().clone() };
    match access(&folder, AccessFlags::W_OK | AccessFlags::X_OK) {
        Ok(()) => Row::ok(name, folder.display().to_string()),
        Err(errno) => Row::of_error(name, &Error::io("write to directory", &folder, &errno.into())),
    }
}

fn free_space(records: &Records) -> Result<Row> {
    let root = records.root();
    let stats = statvfs(root).map_err(|errno| Error::io("stat file system of", root, &errno.into()))?;
    let fragment = stats.fragment_size() as u64;
    let (free, all) = (stats.blocks_available() as u64 * fragment, stats.blocks() as u64 * fragment);
    let detail = format!("{} of {} MiB free", free >> 20, all >> 20);
    Ok(if free < all / 100 * FEW_FREE_PERCENT {
        Row::warning("free space", detail, "When the archive is full, WAL stays in pg_wal until that is full, too.")
    } else {
        Row::ok("free space", detail)
    })
}

fn separate_device(records: &Records, data_directory: &Path) -> Result<Row> {
    let device = |path: &Path| {
        fs::metadata(path).map(|meta| meta.dev()).map_err(|error| Error::io("stat directory", path, &error))
    };
    Ok(if device(records.root())? == device(data_directory)? {
        Row::warning(
            "separate device",
            "the archive lies on the same device as the data directory",
            "One failed disk takes both: put the archive on another one.",
        )
    } else {
        Row::ok("separate device", "the archive lies on another device than the data directory")
    })
}

fn staging(records: &Records) -> Result<Row> {
    let name = "staged files";
    let staged = fs::read_dir(records.staging()).map_or(0, |entries| entries.take(10_000).count());
    let left = durable::leftovers(records.staging(), "")?.len();
    Ok(if left > 0 {
        let hint = "They take room and do no harm: the archiver removes them when it starts.";
        Row::warning(name, format!("{left} of {staged} were left behind by processes that are dead"), hint)
    } else {
        Row::ok(name, format!("{staged} in the making"))
    })
}

/// A clock that went back, here or where the files lie, shows in a file that was written in the future.
fn clock(records: &Records) -> Result<Row> {
    const TOLERANCE: Duration = Duration::from_secs(60);
    let (name, catalogue) = ("clock", records.catalogue.path());
    let written = match fs::metadata(catalogue).and_then(|meta| meta.modified()) {
        Ok(written) => written,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Row::ok(name, "nothing to compare with yet"));
        }
        Err(error) => return Err(Error::io("stat file", catalogue, &error)),
    };
    let ahead = written.duration_since(SystemTime::now()).unwrap_or_default();
    Ok(if ahead > TOLERANCE {
        let detail = format!("the storage's last change lies {} s in the future", ahead.as_secs());
        Row::warning(name, detail, "Set the clocks of this server and of the storage by one time service.")
    } else {
        Row::ok(name, "this server and the storage agree")
    })
}

fn files_set_aside(place: &Place) -> Result<Row> {
    let name = "files set aside";
    Ok(match set_aside::summary(&set_aside::list(place)?) {
        Some(summary) => Row::failed(
            name,
            summary,
            format!(
                "Look into \"{}\"; what is not needed may be removed.",
                place.store.location(&place.layout.errors_folder())
            ),
        ),
        None => Row::ok(name, "none"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Setting, Settings};

    fn judged(text: &str) -> Vec<(Verdict, String)> {
        let mut settings = Settings::default();
        settings.set(Setting::Storage, "file:///srv/wal");
        settings.set(Setting::PostArchiveScript, text);
        let rows = hooks(&Config::parse(&settings).unwrap());
        rows.into_iter().map(|row| (row.verdict, row.detail)).collect()
    }

    #[test]
    fn a_hook_that_cannot_run_is_found_by_its_path() {
        assert_eq!(judged(""), []);
        for fine in ["/bin/sh -c true", "true", "no-path-to-look-at", "$HOME/x", "'/quoted'"] {
            let detail = "post_archive_script; each is given 300 s".to_string();
            assert_eq!(judged(fine), [(Verdict::Ok, detail)], "{fine}");
        }
        let directory = tempfile::tempdir().unwrap();
        let plain = directory.path().join("not-executable");
        fs::write(&plain, "").unwrap();
        for wrong in ["/no/such/file %f", "/tmp", &plain.display().to_string()] {
            let rows = judged(wrong);
            assert_eq!(rows[0].0, Verdict::Failed, "{wrong}");
            assert!(rows[0].1.starts_with("archiver.post_archive_script names \"/"), "{rows:?}");
        }
    }

    #[test]
    fn what_looks_like_a_credential_is_warned_of_and_not_repeated() {
        for text in [
            "curl -u x --data token=sesame https://host/",
            "PGPASSWORD=sesame psql",
            "tool --password sesame",
            "curl https://user:sesame@host/x",
            "AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE aws s3 ls",
            "notify --api_key='sesame'",
        ] {
            let rows = judged(text);
            assert_eq!(rows.len(), 1, "{text}");
            assert_eq!(rows[0].0, Verdict::Warning, "{text}");
            assert!(!rows[0].1.contains("sesame"), "{rows:?}");
        }
        for text in
            ["tool --password-file=/etc/x", "PGPASSWORD=$(cat /etc/x) psql", "tool --token /run/token", "echo token"]
        {
            assert_eq!(judged(text)[0].0, Verdict::Ok, "{text}");
        }
    }
}
