//! Whether streaming works: the rows of `check()` that concern it. Nothing is changed, and no slot is made.

use super::complaint::GONE;
use super::{Identified, Primary, Seen, Tool, look};
use crate::check::Row;
use crate::config::Streaming;
use crate::error::{Error, Result};
use crate::pulse::Pulse;
use std::path::Path;

/// Whether somebody is to receive, and does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// WAL is to be received.
    Receiving,
    /// It is not: a slot that is there all the same keeps WAL for nobody.
    Nothing,
}

/// Whether anybody receives WAL into that directory, or was to when he was ended without a word.
pub fn is_used(directory: &Path) -> bool {
    directory.join(crate::incoming::RECEIVER_LOCK).exists()
}

/// Judges the receiver that `streaming` sets, and the server that it receives from.
pub fn check(streaming: &Streaming, expected: Expected, pulse: &Pulse) -> Vec<Row> {
    let psql = Tool::find("psql", &streaming.path_prefix);
    if expected == Expected::Nothing {
        let slot = streaming.slot_name.as_deref().zip(psql.ok());
        let left = slot.and_then(|(slot, psql)| left_slot(&Primary::new(&streaming.conninfo, &psql, pulse), slot));
        return left.into_iter().collect();
    }
    let receivewal = Tool::find("pg_receivewal", &streaming.path_prefix);
    let mut rows = vec![Row::of("pg_receivewal", receivewal.as_ref().map_err(Error::clone).map(found))];
    let seen = look(&streaming.directory);
    rows.push(running(&seen));
    rows.extend(seen.as_ref().ok().map(archiving));
    let psql = match psql {
        Ok(psql) => psql,
        Err(error) => {
            rows.push(Row::of_error("streaming connection", &error));
            return rows;
        }
    };
    let primary = Primary::new(&streaming.conninfo, &psql, pulse);
    match primary.identify() {
        Ok(server) => {
            rows.push(connection(&server));
            rows.extend(receivewal.ok().map(|tool| compatible(&tool, &server)));
            rows.push(Row::of("streaming wal_level", wal_level(&primary)));
            rows.push(privileges(&primary));
            let is_running = seen.is_ok_and(|seen| seen.is_running);
            rows.push(Row::of("replication slot", slot(streaming, &primary, is_running)));
        }
        // Every other question would be answered by the same failure.
        Err(error) => rows.push(Row::of_error("streaming connection", &error)),
    }
    rows
}

fn found(tool: &Tool) -> Row {
    Row::ok("pg_receivewal", format!("{}, version {}", tool.path.display(), tool.major))
}

fn connection(server: &Identified) -> Row {
    let Identified { system_identifier, timeline, position, .. } = server;
    let detail = format!("system identifier {system_identifier}, timeline {timeline}, WAL flushed to {position}");
    Row::ok("streaming connection", detail)
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
fn wal_level(primary: &Primary<'_>) -> Result<Row> {
    let level = primary.wal_level()?;
    Ok(match level.as_str() {
        "minimal" => Row::failed(
            "streaming wal_level",
            level,
            "Set wal_level = replica on the server that WAL is received from, and restart it.",
        ),
        _ => Row::ok("streaming wal_level", level),
    })
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

fn slot(streaming: &Streaming, primary: &Primary<'_>, is_running: bool) -> Result<Row> {
    let name = "replication slot";
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
            if is_running { "Does the receiver use another slot?" } else { "See that WAL is received." },
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

/// A server that cannot be asked is nobody's trouble where nothing is received.
fn left_slot(primary: &Primary<'_>, name: &str) -> Option<Row> {
    let slot = primary.slot(name).ok()??;
    Some(Row::warning(
        "replication slot",
        format!("\"{name}\" keeps WAL from {} on, and streaming is off", shown(slot.restart)),
        format!(
            "Drop it before it fills the server's disk: SELECT pg_drop_replication_slot('{name}'); or switch streaming on."
        ),
    ))
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
            "Start \"archiver receive-wal\", or switch archiver.streaming_archiver on; its log says more.",
        ),
    }
}

fn archiving(seen: &Seen) -> Row {
    let name = "received WAL";
    let detail = format!("{} files wait to be archived", seen.waiting_files);
    match seen.standing.as_ref().and_then(|standing| standing.archiving.as_ref()) {
        Some(trouble) => Row::failed(
            name,
            format!("{detail}: {}", trouble.error),
            trouble
                .hint
                .clone()
                .unwrap_or_else(|| "They are tried again by themselves; the log says more.".to_string()),
        ),
        None => Row::ok(name, detail),
    }
}
