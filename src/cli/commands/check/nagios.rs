//! The one line that Nagios and its kin want, and their exit codes.

use super::Findings;
use crate::output::{self, End};
use archiver_core::Result;
use archiver_core::check::{Row, Verdict};
use std::io::Write;

const UNKNOWN: u8 = 3;

fn code_of(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Ok => 0,
        Verdict::Warning => 1,
        Verdict::Failed => 2,
    }
}

/// Prints the line and answers the exit code; what could not be judged at all is UNKNOWN.
pub fn run(judged: Result<Findings>) -> std::result::Result<u8, End> {
    let (line, code) = match judged {
        Ok(findings) => (line(&findings), code_of(findings.worst())),
        Err(error) => (format!("ARCHIVER UNKNOWN - {error}"), UNKNOWN),
    };
    let mut out = output::standard_output();
    // Who does not read it is told by the code.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    Ok(code)
}

/// `ARCHIVER WORD - what is wrong | figures`
fn line(findings: &Findings) -> String {
    let worst = findings.worst();
    let word = match worst {
        Verdict::Ok => "OK",
        Verdict::Warning => "WARNING",
        Verdict::Failed => "CRITICAL",
    };
    let is_told = |row: &&Row| row.verdict == worst;
    let told: Vec<String> = match worst {
        Verdict::Ok => vec![format!("{} checks passed", findings.rows.len())],
        _ => findings.rows.iter().filter(is_told).map(|row| format!("{}: {}", row.name, row.detail)).collect(),
    };
    // A bar begins the figures.
    let told = told.join("; ").replace('|', "/");
    let figures = findings.queue.map(|queue| {
        let age = queue.age_seconds().unwrap_or_default();
        format!(" | waiting_files={} waiting_bytes={}B oldest_seconds={age:.0}s", queue.files, queue.bytes)
    });
    format!("ARCHIVER {word} - {told}{}", figures.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use archiver_core::queue::Summary;

    #[test]
    fn the_line_tells_the_worst_and_the_figures() {
        let queue = Some(Summary { files: 3, bytes: 48, oldest: None });
        let mut findings = Findings { rows: vec![Row::ok("storage", "there")], queue, ..Findings::default() };
        assert_eq!(
            line(&findings),
            "ARCHIVER OK - 1 checks passed | waiting_files=3 waiting_bytes=48B oldest_seconds=0s"
        );
        findings.rows.push(Row::warning("free space", "1 of 100 MiB free", "Make room."));
        assert!(line(&findings).starts_with("ARCHIVER WARNING - free space: 1 of 100 MiB free | "));
        findings.rows.push(Row::failed("settings", "a | b", "Mend it."));
        findings.rows.push(Row::failed("identity", "another's", "Ask."));
        findings.queue = None;
        assert_eq!(line(&findings), "ARCHIVER CRITICAL - settings: a / b; identity: another's");
        assert_eq!([Verdict::Ok, Verdict::Warning, Verdict::Failed].map(code_of), [0, 1, 2]);
    }
}
