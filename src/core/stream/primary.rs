//! What the server tells that WAL is received from, asked by psql: libpq's password files, services and certificates are
//! heeded as pg_receivewal heeds them.

use super::complaint::Complaint;
use super::tools::Tool;
use crate::config::{Conninfo, parse_bytes};
use crate::error::{Error, Kind, Result, plain_cause};
use crate::process::{Cut, Exit, Limit, Outcome, run};
use crate::pulse::Pulse;
use crate::wal::{Lsn, SegmentSize, Timeline};
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// For one question, connecting included.
const PATIENCE: Duration = Duration::from_secs(30);
/// For a connection, where libpq's environment says nothing else.
pub const CONNECT_SECONDS: &str = "10";
const HURRIED_CONNECT_SECONDS: &str = "4";
/// Between two columns: nothing that is asked for holds it.
const SEPARATOR: char = '|';

/// A server to receive WAL from.
pub struct Primary<'a> {
    psql: PathBuf,
    conninfo: &'a Conninfo,
    pulse: &'a Pulse,
    connect_seconds: &'static str,
}

/// Which server it is, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identified {
    /// Made by initdb.
    pub system_identifier: u64,
    /// The timeline it is on.
    pub timeline: Timeline,
    /// How far its WAL is flushed.
    pub position: Lsn,
    /// Its major version.
    pub major: u32,
    /// The size of its segments.
    pub segment_size: SegmentSize,
    /// `minimal`, `replica` or `logical`.
    pub wal_level: String,
}

/// A replication slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Where the server keeps WAL from; nothing before its first use.
    pub restart: Option<Lsn>,
    /// Whether somebody uses it, where that can be known.
    pub is_active: Option<bool>,
    /// `reserved`, `extended`, `unreserved` or `lost`, where that can be known.
    pub wal_status: Option<String>,
}

/// How it stands with a receiver, in so far as that may be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How far the server's WAL is flushed.
    pub position: Lsn,
    /// Whether commits wait for the receiver, by the server's setting.
    pub is_synchronous: Option<bool>,
    /// `sync`, `potential`, `quorum` or `async`.
    pub sync_state: Option<String>,
    /// How far the receiver has told the server that it wrote.
    pub told: Option<Lsn>,
    /// Whether its slot is in use.
    pub is_slot_active: Option<bool>,
    /// What the server says of the WAL it keeps for it.
    pub slot_wal_status: Option<String>,
}

type Row = Vec<Option<String>>;

impl<'a> Primary<'a> {
    /// The server that `conninfo` leads to; nothing is asked yet.
    pub fn new(conninfo: &'a Conninfo, psql: &Tool, pulse: &'a Pulse) -> Self {
        Primary { psql: psql.path.clone(), conninfo, pulse, connect_seconds: CONNECT_SECONDS }
    }

    /// The same for somebody who wants to know soon.
    pub fn hurried(self) -> Self {
        Primary { connect_seconds: HURRIED_CONNECT_SECONDS, ..self }
    }

    /// What it says of itself over a replication connection.
    pub fn identify(&self) -> Result<Identified> {
        const QUESTIONS: [&str; 4] =
            ["IDENTIFY_SYSTEM", "SHOW server_version_num", "SHOW wal_segment_size", "SHOW wal_level"];
        let lines = self.ask(true, &QUESTIONS)?;
        // Each is answered with one row.
        let answers = lines.last_chunk::<4>().map(|lines| lines.each_ref().map(|line| columns_of(line)));
        let identified = answers.as_ref().and_then(|[system, major, segment_size, wal_level]| {
            Some(Identified {
                system_identifier: text(system, 0)?.parse().ok()?,
                timeline: Timeline(text(system, 1)?.parse().ok()?),
                position: Lsn::parse(text(system, 2)?)?,
                major: text(major, 0)?.parse::<u32>().ok()? / 10_000,
                segment_size: SegmentSize::new(parse_bytes(text(segment_size, 0)?)?)?,
                wal_level: text(wal_level, 0)?.to_string(),
            })
        });
        identified.ok_or_else(|| {
            let message = format!("the server answered IDENTIFY_SYSTEM with \"{}\"", lines.join(" "));
            Error::new(Kind::Storage, "archiver.streaming_conninfo", message)
        })
    }

    /// The slot of that name; nothing where there is none.
    pub fn slot(&self, name: &str) -> Result<Option<Slot>> {
        // Any role may ask this, but not every one may connect to a database.
        let query = format!(
            "SELECT restart_lsn, active, wal_status FROM pg_catalog.pg_replication_slots WHERE slot_name = '{name}' AND slot_type = 'physical'"
        );
        let (rows, is_whole) = match self.rows(false, &query, 3) {
            Ok(rows) => (rows, true),
            // A row of NULLs stands for no slot here.
            Err(_) => (self.rows(true, &read_slot(name), 3)?, false),
        };
        let Some(row) = rows.last().filter(|row| is_whole || text(row, 0).is_some()) else { return Ok(None) };
        let restart = text(row, if is_whole { 0 } else { 1 }).and_then(Lsn::parse);
        let known = |column| text(row, column).filter(|_| is_whole);
        Ok(Some(Slot {
            restart,
            is_active: known(1).map(|active| active == "t"),
            wal_status: known(2).map(str::to_string),
        }))
    }

    /// The timeline of the WAL that the slot keeps from its restart point on; nothing where there is none.
    pub fn slot_timeline(&self, name: &str) -> Result<Option<Timeline>> {
        let rows = self.rows(true, &read_slot(name), 3)?;
        Ok(rows.last().and_then(|row| text(row, 2)?.parse().ok()).map(Timeline))
    }

    /// Makes that slot; WAL is kept for it from now on.
    pub fn create_slot(&self, name: &str) -> Result<()> {
        self.ask(true, &[&format!("CREATE_REPLICATION_SLOT \"{name}\" PHYSICAL RESERVE_WAL")]).map(drop)
    }

    /// Whether a commit waits for a receiver of that name: `synchronous_standby_names` holds the name, or a star (PostgreSQL
    /// manual, 20.6.2). Nothing where that cannot be known.
    pub fn is_synchronous(&self, name: &str) -> Option<bool> {
        let rows = self.rows(true, "SHOW synchronous_standby_names", 1).ok()?;
        Some(names_standby(text(rows.last()?, 0).unwrap_or_default(), name))
    }

    /// How it stands with the receiver of that name and its slot. Where the server lets the role connect for replication
    /// only, less is known.
    pub fn answer(&self, archiver_name: &str, slot: Option<&str>) -> Result<Answer> {
        // Of receivers only a role with pg_read_all_stats sees more than that they are there; of slots every role sees all. Another receiver may bear the same name: the slot tells which is
        // meant, and where there is none, and several, nobody does.
        let query = format!(
            "SELECT CASE WHEN pg_catalog.pg_is_in_recovery() THEN \
             greatest(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn()) ELSE pg_catalog.pg_current_wal_flush_lsn() END, r.sync_state, r.write_lsn, s.active, s.wal_status, \
             pg_catalog.current_setting('synchronous_standby_names') FROM (SELECT) AS one \
             LEFT JOIN pg_catalog.pg_replication_slots AS s ON s.slot_name = {} AND s.slot_type = 'physical' \
             LEFT JOIN (SELECT pid, sync_state, write_lsn, pg_catalog.count(*) OVER () AS receivers FROM \
             pg_catalog.pg_stat_replication WHERE application_name = {} AND state = 'streaming') AS r \
             ON CASE WHEN s.slot_name IS NULL THEN r.receivers = 1 ELSE r.pid = s.active_pid END",
            literal(slot.unwrap_or_default()),
            literal(archiver_name),
        );
        if let Ok(rows) = self.rows(false, &query, 6)
            && let Some(row) = rows.last()
            && let Some(position) = text(row, 0).and_then(Lsn::parse)
        {
            return Ok(Answer {
                position,
                sync_state: text(row, 1).map(str::to_string),
                told: text(row, 2).and_then(Lsn::parse),
                is_slot_active: text(row, 3).map(|active| active == "t"),
                slot_wal_status: text(row, 4).map(str::to_string),
                is_synchronous: text(row, 5).map(|names| names_standby(names, archiver_name)),
            });
        }
        Ok(Answer {
            position: self.identify()?.position,
            is_synchronous: self.is_synchronous(archiver_name),
            sync_state: None,
            told: None,
            is_slot_active: None,
            slot_wal_status: None,
        })
    }

    /// Fails where the role may not connect to a database, to ask what a replication connection does not tell.
    pub fn connect(&self) -> Result<()> {
        self.ask(false, &["SELECT 1"]).map(drop)
    }

    /// The rows of so many columns among the lines.
    fn rows(&self, is_replication: bool, command: &str, columns: usize) -> Result<Vec<Row>> {
        let lines = self.ask(is_replication, &[command])?;
        Ok(lines.iter().map(|line| columns_of(line)).filter(|row| row.len() == columns).collect())
    }

    /// The lines that psql prints of what the server answers to these, over a replication connection or a plain one. Warnings
    /// stand before them, and are none.
    fn ask(&self, is_replication: bool, commands: &[&str]) -> Result<Vec<String>> {
        let conninfo = match is_replication {
            true => self.conninfo.with("replication", "true"),
            false => self.conninfo.with("fallback_application_name", "archiver"),
        };
        let mut variables = vec![
            ("ARCHIVER_PSQL", self.psql.display().to_string()),
            ("ARCHIVER_CONNINFO", conninfo),
            ("LC_ALL", "C".to_string()),
        ];
        for (name, value) in [("PGCONNECT_TIMEOUT", self.connect_seconds), ("PGDATABASE", "postgres")] {
            if std::env::var_os(name).is_none() {
                variables.push((name, value.to_string()));
            }
        }
        let mut text =
            r#"exec "$ARCHIVER_PSQL" -X -q -A -t -w -F '|' -P null='\N' -v ON_ERROR_STOP=1 -d "$ARCHIVER_CONNINFO""#
                .to_string();
        for command in commands {
            text += &format!(" -c '{}'", command.replace('\'', r"'\''"));
        }
        let (is_cancelled, mut lines) = (AtomicBool::new(false), Vec::new());
        let limit = Limit::new(PATIENCE, self.pulse, &is_cancelled);
        let failed = |cause: String| {
            Error::new(
                Kind::Storage,
                "archiver.streaming_conninfo",
                format!("could not ask the server for its WAL: {cause}"),
            )
            .retry_if(true)
        };
        let ended = run(&text, &variables, &limit, &mut |line| lines.push(line.to_string()));
        match ended.map_err(|error| failed(format!("psql could not be run: {}", plain_cause(&error))))? {
            Outcome::Ended(Exit::Code(0)) => Ok(lines),
            Outcome::Ended(_) => Err(Complaint::of(&lines).error("could not ask the server for its WAL")),
            Outcome::Cut(Cut::TimedOut) => Err(failed(format!("it did not answer within {} s", PATIENCE.as_secs()))),
            Outcome::Cut(_) => Err(Error::new(Kind::Interrupted, "psql", "stopped before the server answered")),
        }
    }
}

/// Quoted: a name may begin with a digit.
fn read_slot(name: &str) -> String {
    format!("READ_REPLICATION_SLOT \"{name}\"")
}

/// A text in SQL, whatever `standard_conforming_strings` says.
fn literal(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}

/// Whether that list holds the name, without regard to case (syncrep.c, `SyncRepGetStandbyPriority`).
fn names_standby(list: &str, name: &str) -> bool {
    let list = list.trim();
    // FIRST 2 (a, b), ANY 2 (a, b), 2 (a, b), a, b
    let names = match list.split_once('(') {
        Some((_, names)) => names.trim_end().trim_end_matches(')'),
        None => list,
    };
    let mut letters = names.chars().peekable();
    let (mut found, mut one, mut is_quoted) = (Vec::new(), String::new(), false);
    while let Some(letter) = letters.next() {
        match letter {
            '"' if is_quoted && letters.next_if_eq(&'"').is_some() => one.push('"'),
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => found.push(std::mem::take(&mut one)),
            letter if letter.is_ascii_whitespace() && !is_quoted => {}
            letter => one.push(letter),
        }
    }
    found.push(one);
    found.iter().any(|it| it == "*" || it.eq_ignore_ascii_case(name))
}

fn columns_of(line: &str) -> Row {
    line.split(SEPARATOR).map(|column| Some(column).filter(|text| *text != "\\N").map(str::to_string)).collect()
}

fn text(row: &Row, column: usize) -> Option<&str> {
    row.get(column)?.as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_standbys_is_read_as_the_server_reads_it() {
        for list in [
            "*",
            "wal",
            "WAL",
            "a, wal",
            "FIRST 1 (a, wal)",
            "ANY 2 (wal,b)",
            "2(wal)",
            "\"wal\"",
            "first 1 ( \"wal\" , b )",
            "ANY 1 (*)",
        ] {
            assert!(names_standby(list, "wal"), "{list}");
        }
        for list in ["", "wal2", "a, b", "FIRST 1 (walx)", "\"a, wal\"", "\"w\"\"al\""] {
            assert!(!names_standby(list, "wal"), "{list}");
        }
    }

    #[test]
    fn nothing_is_told_from_an_empty_column() {
        assert_eq!(columns_of("0/3000000|t|\\N"), [Some("0/3000000".to_string()), Some("t".to_string()), None]);
        assert_eq!(columns_of(""), [Some(String::new())]);
    }
}
