//! `archiver status`: how archiving stands, seen from outside the server.

use crate::args::{Arguments, Status};
use crate::output::{self, End, rfc3339, write_json};
use crate::settings;
use archiver_core::check::Home;
use archiver_core::config::{Config, Destination, Settings, Streaming};
use archiver_core::queue::{Summary, waiting};
use archiver_core::state::{State, unix_us};
use archiver_core::stream::{self, Facts};
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The cluster that lives in the data directory, if one does, and what its archiver process tells.
pub fn look_at(arguments: &Arguments, data_directory: &Path) -> archiver_core::Result<(Option<Home>, Option<State>)> {
    let home = settings::system_identifier(arguments, data_directory)?.map(|system_identifier| Home {
        system_identifier,
        data_directory: data_directory.to_path_buf(),
        is_elsewhere: false,
    });
    let state = home.as_ref().and_then(|home| State::of_running_server(data_directory, home.system_identifier));
    Ok((home, state))
}

/// How receiving WAL stands; nothing where nobody has received here, or that cannot be looked at.
pub fn look_at_receiver(settings: &Settings, destination: &Destination) -> Option<Facts> {
    let directory = Streaming::directory(settings, destination).ok()??;
    let seen = stream::is_used(&directory).then(|| stream::look(&directory).ok())??;
    Some(seen.facts(None, unix_us(SystemTime::now())))
}

/// What is shown, in this order, as the columns of `archiver.status` are called.
struct Shown(Vec<(&'static str, Value)>);

impl Serialize for Shown {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

fn time(us: i64) -> Option<String> {
    let since_epoch = Duration::from_micros(u64::try_from(us).ok()?);
    Some(rfc3339(UNIX_EPOCH + since_epoch, 6))
}

fn in_tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

impl Shown {
    fn of(config: &Config, home: Option<&Home>, state: Option<State>, receiver: Option<&Facts>) -> Self {
        let queue = home.map(|home| Summary::of(&waiting(&home.data_directory.join("pg_wal"))));
        let ratio = state.as_ref().filter(|state| state.bytes_stored > 0);
        let ratio = ratio.map(|state| in_tenths(state.bytes_read as f64 / state.bytes_stored as f64));
        let state = state.as_ref();
        Shown(vec![
            ("storage", json!(config.destination.storage.to_string())),
            ("server_name", json!(config.destination.server_name.to_string())),
            ("system_identifier", json!(home.map(|home| home.system_identifier.to_string()))),
            ("compression", json!(config.compression.name())),
            ("encryption", json!(config.destination.likely_format.encryption.name())),
            ("archiver_pid", json!(state.map(|state| state.archiver_pid))),
            ("queue_files", json!(queue.map(|queue| queue.files))),
            ("queue_bytes", json!(queue.map(|queue| queue.bytes))),
            ("oldest_ready_seconds", json!(queue.and_then(|queue| queue.age_seconds()).map(in_tenths))),
            ("in_flight", json!(state.map(|state| state.in_flight))),
            ("last_error", json!(state.and_then(|state| state.last_error.as_ref()))),
            ("failing_since", json!(state.and_then(|state| state.failing_since_us).and_then(time))),
            ("bytes_read", json!(state.map(|state| state.bytes_read))),
            ("bytes_stored", json!(state.map(|state| state.bytes_stored))),
            ("compression_ratio", json!(ratio)),
            ("read_ahead_hits", json!(state.map(|state| state.read_ahead_hits))),
            ("retries", json!(state.map(|state| state.retries))),
            ("put_ms_p50", json!(state.and_then(|state| state.put_ms_p50).map(in_tenths))),
            ("put_ms_p99", json!(state.and_then(|state| state.put_ms_p99).map(in_tenths))),
            ("create_only", json!(state.and_then(|state| state.create_only.as_ref()))),
            ("credential_source", json!(state.and_then(|state| state.credential_source.as_ref()))),
            ("stats_since", json!(state.and_then(|state| time(state.stats_since_us)))),
            ("receive_wal_running", json!(receiver.and_then(|receiver| receiver.running))),
            ("receive_wal_file", json!(receiver.and_then(|receiver| receiver.current_file.as_ref()))),
            ("receive_wal_lsn", json!(receiver.and_then(|receiver| receiver.received_lsn.as_ref()))),
            ("receive_wal_lag_bytes", json!(receiver.and_then(|receiver| receiver.lag_bytes))),
            ("receive_wal_lag_seconds", json!(receiver.and_then(|receiver| receiver.lag_seconds).map(in_tenths))),
            ("receive_wal_sync_state", json!(receiver.and_then(|receiver| receiver.sync_state.as_ref()))),
            ("receive_wal_error", json!(receiver.and_then(|receiver| receiver.last_error.as_ref()))),
        ])
    }

    /// One field a line.
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.0.iter().try_for_each(|(name, value)| {
            let text = match value {
                Value::Null => "-".to_string(),
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            writeln!(out, "{name:<23}  {text}")
        })
    }
}

/// Prints how archiving stands.
pub fn status(arguments: &Arguments, wanted: &Status) -> Result<u8, End> {
    let data_directory = settings::data_directory(arguments, None);
    let settings = settings::read(arguments, &data_directory)?;
    let config = Config::parse(&settings)?;
    let (home, state) = look_at(arguments, &data_directory)?;
    let receiver = look_at_receiver(&settings, &config.destination);
    let shown = Shown::of(&config, home.as_ref(), state, receiver.as_ref());
    let mut out = output::standard_output();
    if wanted.json {
        write_json(&mut out, &shown)?;
        out.write_all(b"\n")?;
    } else {
        shown.write(&mut out)?;
    }
    out.flush()?;
    Ok(output::DONE)
}
