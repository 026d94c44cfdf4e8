//! What psql and pg_receivewal complain of: the line that tells the cause, and what to do.

use crate::error::{Error, Kind};

/// The complaint of a client program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    cause: String,
    hint: Option<String>,
}

/// Parts of messages of libpq, of the server and of the client programs (PostgreSQL 15 to 18), with what mends them.
const KNOWN: [(&str, &str); 20] = [
    ("no password supplied", PASSWORD),
    ("password authentication failed", PASSWORD),
    (
        "no pg_hba.conf entry",
        "Add a line for database \"replication\" and this role to the server's pg_hba.conf, and reload it.",
    ),
    ("must be superuser or replication role", PRIVILEGE),
    ("permission denied to start WAL sender", PRIVILEGE),
    ("permission denied to use replication slots", PRIVILEGE),
    (
        "max_wal_senders",
        "Set wal_level to replica and max_wal_senders above the number of standbys and receivers, and restart the server.",
    ),
    ("requested WAL segment", GONE),
    ("can no longer get changes", GONE),
    ("can no longer access replication slot", GONE),
    ("has been invalidated", GONE),
    (
        "is not in this server's history",
        "More was received than this server has: it was promoted without the last of it. How receiving goes on with the new timeline is told in docs/streaming.md, After a failover.",
    ),
    ("is active for PID", "Another receiver or standby uses the slot: end it, or set another archiver.slot_name."),
    (
        "root certificate file",
        "Put the certificate of who signed the server's into ~/.postgresql/root.crt of the user that runs this, or name it by sslrootcert.",
    ),
    (
        "does not exist",
        "Is it the right server, role and slot? A slot is made by archiver.create_slot = auto, or by SELECT pg_create_physical_replication_slot(name, true).",
    ),
    ("all replication slots are in use", "Raise max_replication_slots, or drop slots that nobody uses."),
    ("No space left on device", "Make room on the file system of archiver.streaming_wals_directory."),
    (
        "File too large",
        "Whoever receives must be allowed to write files of a segment's size: raise that limit (ulimit -f).",
    ),
    ("Read-only file system", "The file system of archiver.streaming_wals_directory must be mounted for writing."),
    ("could not connect", "Is the server running, and does archiver.streaming_conninfo lead to it?"),
];
const PASSWORD: &str = "Put the password into a password file (PGPASSFILE, ~/.pgpass) of the user that runs this.";
const PRIVILEGE: &str = "On the server: ALTER ROLE … REPLICATION.";
pub const GONE: &str = "The server has removed WAL that was not received: there is a gap. Go on with \"archiver receive-wal --reset\", see that WAL is received, and then take a new base backup.";

impl Complaint {
    /// What the last lines of its output say. (What comes before them it did before.)
    pub fn of(lines: &[String]) -> Self {
        let said = |line: &&String| !line.trim().is_empty();
        let is_error =
            |line: &&String| line.contains("error: ") || line.contains("FATAL: ") || line.contains("ERROR: ");
        let tells = |line: &&String| is_error(line) && !line.ends_with("disconnected");
        let line = lines.iter().rev().find(tells).or_else(|| lines.iter().rev().find(said));
        let line = line.map_or("it said nothing", |line| line.trim());
        // `psql: error: connection to server … failed: FATAL:  …`
        let cause = ["psql: error: ", "pg_receivewal: error: ", "ERROR:  "]
            .iter()
            .fold(line, |text, prefix| text.trim_start_matches(prefix));
        let hint = KNOWN.iter().find(|(part, _)| lines.iter().any(|line| line.contains(part))).map(|(_, hint)| *hint);
        let refused =
            lines.iter().any(|line| line.contains("connection to server")).then_some(KNOWN[KNOWN.len() - 1].1);
        Complaint { cause: cause.to_string(), hint: hint.or(refused).map(str::to_string) }
    }

    /// `what` could not be done for that cause. It may pass by itself.
    pub fn error(self, what: &str) -> Error {
        let error =
            Error::new(Kind::Storage, "archiver.streaming_conninfo", format!("{what}: {}", self.cause)).retry_if(true);
        match self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_tells_the_cause_is_taken_and_gets_its_hint() {
        for (lines, cause, hint) in [
            (
                &[
                    "psql: error: connection to server at \"db1\" (10.0.0.1), port 5432 failed: FATAL:  password authentication failed for user \"streamer\"",
                ][..],
                "connection to server at \"db1\" (10.0.0.1), port 5432 failed: FATAL:  password authentication failed for user \"streamer\"",
                "PGPASSFILE",
            ),
            (
                &[
                    "pg_receivewal: starting log streaming at 0/3000000 (timeline 1)",
                    "pg_receivewal: error: could not send replication command \"START_REPLICATION\": ERROR:  requested WAL segment 000000010000000000000003 has already been removed",
                    "pg_receivewal: error: disconnected",
                ][..],
                "could not send replication command \"START_REPLICATION\": ERROR:  requested WAL segment 000000010000000000000003 has already been removed",
                "--reset",
            ),
            (
                &[
                    "psql: error: connection to server on socket \"/x/.s.PGSQL.5432\" failed: No such file or directory",
                    "\tIs the server running locally?",
                ][..],
                "connection to server on socket \"/x/.s.PGSQL.5432\" failed: No such file or directory",
                "Is the server running",
            ),
            (&[][..], "it said nothing", ""),
        ] {
            let lines: Vec<String> = lines.iter().map(|line| (*line).to_string()).collect();
            let complaint = Complaint::of(&lines);
            assert_eq!(complaint.cause, cause);
            assert!(complaint.hint.unwrap_or_default().contains(hint), "{cause}");
        }
    }
}
