//! Figures for a monitor that keeps them, as OpenMetrics text (openmetrics.io, version 1.0), which the textfile collector of
//! node_exporter reads.

use super::Findings;
use archiver_core::check::Verdict;
use std::io::{self, Write};

/// Writes all figures that are known.
pub fn write(out: &mut impl Write, findings: &Findings) -> io::Result<()> {
    let server = format!("server_name=\"{}\"", escaped(&findings.server_name));
    let mut page = Page { out, server };
    let checks = findings.rows.iter().map(|row| {
        let value = match row.verdict {
            Verdict::Ok => 0.0,
            Verdict::Warning => 1.0,
            Verdict::Failed => 2.0,
        };
        (format!("check=\"{}\"", escaped(row.name)), value)
    });
    page.family("archiver_check", "gauge", "What archiver check finds: 0 ok, 1 warning, 2 failed", checks)?;
    if let Some(queue) = &findings.queue {
        page.gauge("archiver_waiting_files", "WAL files that wait in pg_wal to be archived", queue.files as f64)?;
        page.gauge("archiver_waiting_bytes", "Bytes of them", queue.bytes as f64)?;
        let age = queue.age_seconds().unwrap_or_default();
        page.gauge("archiver_waiting_oldest_seconds", "For how long the oldest of them has waited", age)?;
    }
    if let Some(state) = &findings.state {
        let micros = |us: i64| us as f64 / 1e6;
        page.gauge("archiver_in_flight_files", "Files in progress or stored ahead", state.in_flight as f64)?;
        page.counter("archiver_read_bytes", "Plain bytes archived by this archiver process", state.bytes_read)?;
        page.counter("archiver_stored_bytes", "Bytes they took in the archive", state.bytes_stored)?;
        page.counter("archiver_read_ahead_hits", "Files stored before they were asked for", state.read_ahead_hits)?;
        page.counter("archiver_retries", "Attempts repeated within one request", state.retries)?;
        page.gauge("archiver_failed_attempts", "Attempts that have failed in a row", state.failed_attempts as f64)?;
        let failing_since = state.failing_since_us.map_or(0.0, micros);
        page.gauge(
            "archiver_failing_since_seconds",
            "Unix time since which files fail; 0 while all is well",
            failing_since,
        )?;
        page.gauge(
            "archiver_started_seconds",
            "Unix time of the archiver process's start",
            micros(state.stats_since_us),
        )?;
        let quantiles = [("0.5", state.put_ms_p50), ("0.99", state.put_ms_p99)];
        let quantiles =
            quantiles.into_iter().filter_map(|(quantile, ms)| Some((format!("quantile=\"{quantile}\""), ms? / 1e3)));
        page.family(
            "archiver_store_seconds",
            "gauge",
            "Time to read, compress and store one of the newest files",
            quantiles,
        )?;
        page.gauge(
            "archiver_refused_files",
            "Files of whose name the archive holds another",
            state.refused.len() as f64,
        )?;
    }
    if let Some(receiver) = &findings.receiver {
        if let Some(is_running) = receiver.running {
            let running = if is_running { 1.0 } else { 0.0 };
            page.gauge("archiver_receive_wal_running", "Whether WAL is being received", running)?;
        }
        let known = |figure: Option<f64>| figure.map(|value| (String::new(), value));
        let lag_bytes = known(receiver.lag_bytes.map(|bytes| bytes as f64));
        page.family("archiver_receive_wal_lag_bytes", "gauge", "Bytes of WAL that were not received yet", lag_bytes)?;
        let lag = known(receiver.lag_seconds);
        page.family("archiver_receive_wal_lag_seconds", "gauge", "For how long they wait to be received", lag)?;
        let waiting = known(receiver.waiting_files.map(|files| files as f64));
        page.family("archiver_receive_wal_waiting_files", "gauge", "Received files that wait to be archived", waiting)?;
    }
    page.out.write_all(b"# EOF\n")
}

struct Page<'a, W: Write> {
    out: &'a mut W,
    /// The label on every figure.
    server: String,
}

impl<W: Write> Page<'_, W> {
    fn family(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        figures: impl IntoIterator<Item = (String, f64)>,
    ) -> io::Result<()> {
        writeln!(self.out, "# TYPE {name} {kind}\n# HELP {name} {help}")?;
        for (label, value) in figures {
            let labels = if label.is_empty() { self.server.clone() } else { format!("{},{label}", self.server) };
            let suffix = if kind == "counter" { "_total" } else { "" };
            writeln!(self.out, "{name}{suffix}{{{labels}}} {value}")?;
        }
        Ok(())
    }

    fn gauge(&mut self, name: &str, help: &str, value: f64) -> io::Result<()> {
        self.family(name, "gauge", help, [(String::new(), value)])
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> io::Result<()> {
        self.family(name, "counter", help, [(String::new(), value as f64)])
    }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use archiver_core::check::Row;
    use archiver_core::queue::Summary;
    use archiver_core::state::State;
    use archiver_core::stream::Facts;

    fn page(findings: &Findings) -> String {
        let mut page = Vec::new();
        write(&mut page, findings).unwrap();
        String::from_utf8(page).unwrap()
    }

    #[test]
    fn each_figure_has_its_type_its_help_and_its_server() {
        let state = State { bytes_read: 5, put_ms_p50: Some(2.5), ..State::default() };
        let findings = Findings {
            rows: vec![Row::ok("storage", "there"), Row::failed("settings", "wrong", "Mend it.")],
            server_name: "main".into(),
            queue: Some(Summary { files: 3, bytes: 48, oldest: None }),
            state: Some(state),
            receiver: Some(Facts { running: Some(true), lag_bytes: Some(7), ..Facts::default() }),
        };
        let page = page(&findings);
        for line in [
            "# TYPE archiver_check gauge",
            "archiver_check{server_name=\"main\",check=\"storage\"} 0",
            "archiver_check{server_name=\"main\",check=\"settings\"} 2",
            "archiver_waiting_files{server_name=\"main\"} 3",
            "# TYPE archiver_read_bytes counter",
            "archiver_read_bytes_total{server_name=\"main\"} 5",
            "archiver_store_seconds{server_name=\"main\",quantile=\"0.5\"} 0.0025",
            "archiver_failing_since_seconds{server_name=\"main\"} 0",
            "archiver_receive_wal_running{server_name=\"main\"} 1",
            "archiver_receive_wal_lag_bytes{server_name=\"main\"} 7",
            "# TYPE archiver_receive_wal_lag_seconds gauge",
        ] {
            assert!(page.lines().any(|one| one == line), "{line}\n{page}");
        }
        assert!(page.ends_with("# EOF\n") && !page.contains("quantile=\"0.99\""));
        let named: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let mut once = named.clone();
        once.dedup();
        assert_eq!(named, once);
    }

    #[test]
    fn what_is_not_known_is_left_out() {
        let page = page(&Findings::default());
        assert!(!page.contains("archiver_waiting") && !page.contains("archiver_read"), "{page}");
    }
}
