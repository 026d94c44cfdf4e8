//! `archiver verify`: whether what the archive holds is what was archived.

use super::{open, range};
use crate::args::{Arguments, Verify};
use crate::output::{self, End, tell, write_json};
use archiver_core::Result;
use archiver_core::listing::Range;
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::verify::{Request, State, Verified, count, verify};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use std::ops::ControlFlow;
use std::time::Duration;

/// How often what is still waited for shows that the program lives.
const TICK: Duration = Duration::from_millis(200);

/// A verdict, as `archiver.verify` names its columns.
#[derive(Serialize)]
struct Row {
    name: String,
    state: &'static str,
    detail: Option<String>,
}

/// Judges every file of the range; the exit code says whether one is bad.
pub fn run(arguments: &Arguments, wanted: &Verify) -> std::result::Result<u8, End> {
    let Some(range) = range(wanted.from, wanted.to) else { return Ok(output::USAGE) };
    let (place, system_identifier) = open(arguments)?;
    let pulse = Pulse::new();
    let mut told = Told::begin(wanted.json, progress_bar(&place, &range, &pulse)?);
    let request = Request { range, system_identifier };
    let verified = verify(&place, &request, &pulse, &mut |verified| {
        told.take(verified);
        ControlFlow::Continue(())
    });
    told.progress.finish_and_clear();
    verified?;
    told.end(wanted.from.is_some() || wanted.to.is_some())
}

/// A bar on standard error; where that is no terminal it shows nothing, and nothing is counted for it.
fn progress_bar(place: &Place, range: &Range, pulse: &Pulse) -> Result<ProgressBar> {
    if !io::stderr().is_terminal() {
        return Ok(ProgressBar::hidden());
    }
    let files = count(place, range, pulse)?;
    let progress = ProgressBar::with_draw_target(Some(files), ProgressDrawTarget::stderr());
    let template = "{wide_bar} {pos}/{len} files, {per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        progress.set_style(style);
    }
    progress.enable_steady_tick(TICK);
    Ok(progress)
}

/// What has been told so far. That nobody listens any more ends nothing: the exit code is the answer.
struct Told {
    out: Option<BufWriter<StdoutLock<'static>>>,
    failure: Option<End>,
    progress: ProgressBar,
    is_json: bool,
    counts: [u64; STATES.len()],
}

/// In the order of the summary.
const STATES: [State; 5] = [State::Ok, State::Unverified, State::Damaged, State::Missing, State::Unreadable];

impl Told {
    fn begin(is_json: bool, progress: ProgressBar) -> Self {
        let out = Some(output::standard_output());
        let mut told = Told { out, failure: None, progress, is_json, counts: [0; STATES.len()] };
        if is_json {
            told.print(|out| out.write_all(b"["));
        }
        told
    }

    fn print(&mut self, write: impl FnOnce(&mut BufWriter<StdoutLock<'static>>) -> io::Result<()>) {
        let Some(out) = &mut self.out else { return };
        // Above the bar.
        if let Err(error) = self.progress.suspend(|| write(out)) {
            self.failure = Some(error.into());
            // What is left in the buffer is not worth another try when it is dropped.
            self.out.take().map(BufWriter::into_parts);
        }
    }

    fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    fn take(&mut self, verified: Verified) {
        let Verified { name, state, detail } = verified;
        let (name, word, is_first) = (name.to_string(), state.word(), self.total() == 0);
        for (known, count) in STATES.iter().zip(&mut self.counts) {
            *count += u64::from(*known == state);
        }
        self.progress.inc(1);
        if self.is_json {
            self.print(|out| {
                out.write_all(if is_first { b"\n" } else { b",\n" })?;
                write_json(out, &Row { name, state: word, detail })
            });
        } else if state.is_bad() {
            // At once: the rest may take hours.
            self.print(|out| {
                writeln!(out, "{name:<40}  {word:<10}  {}", detail.unwrap_or_default())?;
                out.flush()
            });
        }
    }

    /// The last word; answers the exit code.
    fn end(mut self, is_range: bool) -> std::result::Result<u8, End> {
        let total = self.total();
        let counts: Vec<(State, u64)> = STATES.into_iter().zip(self.counts).collect();
        if self.is_json {
            self.print(|out| out.write_all(b"\n]\n"));
        } else {
            let words: String = counts.iter().map(|(state, count)| format!(", {}: {count}", state.word())).collect();
            self.print(|out| writeln!(out, "total: {total}{words}"));
        }
        self.print(|out| out.flush());
        if let Some(End::Failed(error)) = self.failure {
            return Err(End::Failed(error));
        }
        if total == 0 && is_range {
            // Nobody asks for a range of nothing.
            tell("no file of the archive lies in that range");
            return Ok(output::NO);
        }
        let is_bad = counts.iter().any(|(state, count)| state.is_bad() && *count > 0);
        Ok(if is_bad { output::NO } else { output::DONE })
    }
}
