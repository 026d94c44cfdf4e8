//! Whether streaming works: the rows of `check()` that concern it. Nothing is changed, and no slot is made.

use super::complaint::GONE;
use super::{Identified, Primary, Seen, Tool, Trouble, look};
use crate::check::Row;
use crate::config::Streaming;
use crate::error::Result;
use crate::pulse::Pulse;
use crate::state::unix_us;
use std::time::SystemTime;

/// Judges the receiver that `streaming` sets, as it stands here: nobody else is asked.
pub fn receiver(streaming: &Streaming) -> Vec<Row> {
    let tool = Tool::find("pg_receivewal", &streaming.path_prefix);
    let seen = look(&streaming.directory);
    let mut rows = vec![Row::of("pg_receivewal", tool.map(|tool| found(&tool))), running(&seen)];
    rows.extend(seen.as_ref().ok().map(archiving));
    rows
}

/// Judges the server that `streaming` names: whether WAL can be received from it.
pub fn server(streaming: &Streaming, pulse: &Pulse) -> Vec<Row> {
    let psql = match Tool::find("psql", &streaming.path_prefix) {
        Ok(psql) => psql,
        Err(error) => return vec![Row::of_error(CONNECTION, &error)],
    };
    let primary = Primary::new(&streaming.conninfo, &psql, pulse).hurried();
    match primary.identify() {
        Ok(server) => {
            let mut rows = vec![connection(&server)];
            let tool = Tool::find("pg_receivewal", &streaming.path_prefix);
            rows.extend(tool.ok().map(|tool| compatible(&tool, &server)));
            rows.push(wal_level(&server));
            rows.push(privileges(&primary));
            rows.push(Row::of(SLOT, slot(streaming, &primary)));
            rows
        }
        // Every other question would be answered by the same failure.
        Err(error) => vec![Row::of_error(CONNECTION, &error)],
    }
}

/// Whether a slot is left that nobody uses, where nothing is to be received. A server that cannot be asked is nobody's
/// trouble then.
pub fn left_slot(streaming: &Streaming, pulse: &Pulse) -> Option<Row> {
    let name = streaming.slot_name.as_deref()?;
    let psql = Tool::find("psql", &streaming.path_prefix).ok()?;
    let slot = Primary::new(&streaming.conninfo, &psql, pulse).hurried().slot(name).ok()??;
    (slot.is_active != Some(true)).then(|| {
        let detail = format!("\"{name}\" keeps WAL from {} on, and streaming is off", shown(slot.restart));
        let drop = format!("SELECT pg_drop_replication_slot('{name}')");
        Row::warning(
            SLOT,
            detail,
            format!("Drop it before it fills the server's disk: {drop}; or switch streaming on."),
        )
    })
}

/// What a row on the connection is called.
pub const CONNECTION: &str = "streaming connection";
const SLOT: &str = "replication slot";
/// More files than these do not wait where archiving keeps up.
const MANY_FILES: u64 = 16;
const LONG_AGO_US: i64 = 300_000_000;

fn found(tool: &Tool) -> Row {
    Row::ok("pg_receivewal", format!("{}, version {}", tool.path.display(), tool.major))
}

fn connection(server: &Identified) -> Row {
    let Identified { system_identifier, timeline, position, .. } = server;
    let detail = format!("system identifier {system_identifier}, timeline {timeline}, WAL flushed to {position}");
    Row::ok(CONNECTION, detail)
}

fn compatible(tool: &Tool, server: &Identified) -> Row {
    let name = "pg_receivewal compatible";
    let detail = format!("version {}, the server is of version {}", tool.major, server.major);
    match tool.major >= server.major {
        true => Row::ok(name, detail),
        false => Row::failed(
            name,
            detail,
            "It must not be older than the server: name a newer one's directory in archiver.path_prefix.",
        ),
    }
}

/// A server with `minimal` takes no replication connections: this is told where it does all the same.
fn wal_level(server: &Identified) -> Row {
    let (name, level) = ("streaming wal_level", server.wal_level.as_str());
    match level {
        "minimal" => {
            Row::failed(name, level, "Set wal_level = replica on the server that WAL is received from, and restart it.")
        }
        _ => Row::ok(name, level),
    }
}

fn privileges(primary: &Primary<'_>) -> Row {
    let name = "streaming privileges";
    match primary.connect() {
        Ok(()) => Row::ok(name, "the role may connect for replication, and to a database"),
        Err(error) => Row::warning(
            name,
            format!("the role may connect for replication only: {error}"),
            "Archiving goes on, and less is known of slot and lag. Allow it to connect to the database postgres.",
        ),
    }
}

fn slot(streaming: &Streaming, primary: &Primary<'_>) -> Result<Row> {
    let name = SLOT;
    let Some(slot_name) = streaming.slot_name.as_deref() else {
        let hint = "Set archiver.slot_name, unless the same WAL is archived by file, too.";
        return Ok(Row::warning(name, "none: the server may remove WAL that was not received", hint));
    };
    Ok(match primary.slot(slot_name)? {
        None if streaming.creates_slot => {
            Row::warning(name, format!("\"{slot_name}\" does not exist yet"), "It is made when WAL is received.")
        }
        None => Row::failed(
            name,
            format!("\"{slot_name}\" does not exist"),
            format!(
                "SELECT pg_create_physical_replication_slot('{slot_name}', true); or set archiver.create_slot to auto."
            ),
        ),
        Some(slot) if slot.wal_status.as_deref() == Some("lost") => {
            Row::failed(name, format!("\"{slot_name}\" has lost WAL that was not received"), GONE)
        }
        Some(slot) if slot.restart.is_none() => Row::failed(
            name,
            format!("\"{slot_name}\" is not initialised: no WAL is kept for it"),
            "It is with the first receiver. Is one running?",
        ),
        Some(slot) if slot.is_active == Some(false) => Row::failed(
            name,
            format!("\"{slot_name}\" is not in use: the server keeps WAL from {} on", shown(slot.restart)),
            "See that WAL is received, and through this slot.",
        ),
        Some(slot) if matches!(slot.wal_status.as_deref(), Some("unreserved")) => Row::failed(
            name,
            format!("\"{slot_name}\" is about to lose WAL"),
            "The receiver is too far behind: raise max_slot_wal_keep_size on the server, now.",
        ),
        Some(slot) => {
            let used = match slot.is_active {
                Some(_) => ", in use",
                None => "",
            };
            Row::ok(name, format!("\"{slot_name}\"{used}, WAL is kept from {} on", shown(slot.restart)))
        }
    })
}

fn shown(position: Option<crate::wal::Lsn>) -> String {
    position.map_or_else(|| "an unknown position".to_string(), |position| position.to_string())
}

fn running(seen: &Result<Seen>) -> Row {
    let name = "receive-wal running";
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => return Row::of_error(name, error),
    };
    let standing = seen.standing.as_ref();
    match standing.and_then(|standing| standing.receiving.as_ref()) {
        Some(trouble) => Row::failed(
            name,
            trouble.error.clone(),
            trouble.hint.clone().unwrap_or_else(|| "It is tried again by itself; the log says more.".to_string()),
        ),
        None if seen.is_running => {
            let current = seen.newest.map_or_else(|| "nothing yet".to_string(), |newest| newest.name().to_string());
            Row::ok(name, format!("process {}, {current}", standing.map_or(0, |standing| standing.pid)))
        }
        None => Row::failed(
            name,
            "nobody receives WAL",
            "Does \"archiver receive-wal\" run, or is archiver.streaming_archiver on and a worker process free for it (max_worker_processes)? The log says more.",
        ),
    }
}

fn archiving(seen: &Seen) -> Row {
    let name = "received WAL";
    let detail = format!("{} files wait to be archived", seen.waiting_files);
    let Some(standing) = &seen.standing else { return Row::ok(name, detail) };
    let hint = |trouble: &Trouble, other: &str| trouble.hint.clone().unwrap_or_else(|| other.to_string());
    let ago_us = |then: Option<i64>| unix_us(SystemTime::now()) - then.unwrap_or_default();
    if let Some(trouble) = &standing.archiving {
        let detail = format!("{detail}: {}", trouble.error);
        return Row::failed(name, detail, hint(trouble, "They are tried again by themselves; the log says more."));
    }
    if seen.waiting_files > MANY_FILES && ago_us(standing.last_archived_us) > LONG_AGO_US {
        return Row::warning(name, detail, "Archiving stands or lags. Does the storage answer? The log says more.");
    }
    if let Some(trouble) = &standing.parts {
        let detail = format!("{detail}; parts: {}", trouble.error);
        return Row::warning(name, detail, hint(trouble, "It is tried again by itself; the log says more."));
    }
    Row::ok(name, detail)
}
