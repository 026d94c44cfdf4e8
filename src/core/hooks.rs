//! Hook scripts: programs of the user's around each file, in Barman's order, with Barman's variables and exit codes.
//!
//! ```text
//! pre_…_script   pre_…_retry_script   what they are about   post_…_retry_script   post_…_script
//! ```
//! Those behind it run also after a failure, be it that of a hook before it. What Barman repeats for ever ends here after
//! `hook_timeout`, and where the server stops or its configuration is read anew.

use crate::catalogue::python_float;
use crate::codec::Compression;
use crate::config::{Destination, Hook, HookScripts};
use crate::error::{Error, Kind, Result};
use crate::layout::Format;
use crate::process::{self, Cut, Exit, Limit, Outcome};
use crate::pulse::Pulse;
use crate::wal::WalName;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// A retry hook's word that it shall not be run again and everything go on.
const ABORT_AND_CONTINUE: i32 = 62;
/// The same, and nothing go on.
const ABORT_AND_STOP: i32 = 63;

/// Something that a hook wrote, or that became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Whether it is about a failure; else it is a line of a hook's output.
    pub is_trouble: bool,
    /// One line, which names hook and file.
    pub message: String,
}

/// Who listens to notes; called from whichever thread runs a hook.
pub type Say = Arc<dyn Fn(Note) + Send + Sync>;

/// What hooks run around.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// A file is archived.
    Archive,
    /// An archived file is deleted.
    WalDelete,
}

impl Occasion {
    /// Its hooks, in the order in which they run.
    fn hooks(self) -> [Hook; 4] {
        match self {
            Occasion::Archive => [Hook::PreArchive, Hook::PreArchiveRetry, Hook::PostArchiveRetry, Hook::PostArchive],
            Occasion::WalDelete => {
                [Hook::PreWalDelete, Hook::PreWalDeleteRetry, Hook::PostWalDeleteRetry, Hook::PostWalDelete]
            }
        }
    }
}

/// What hooks are told of a file, before or after.
#[derive(Clone, Debug)]
pub struct About {
    /// The file.
    pub name: WalName,
    /// Before archiving: its source. Else: where the archived file lies locally, even if it does not; for cloud storage
    /// the source still.
    pub file: PathBuf,
    /// Bytes of that file.
    pub size: u64,
    /// Modification time of the source.
    pub modified: SystemTime,
    /// The format of that file.
    pub format: Format,
    /// Where the archived file lies, or would lie, by its path or URL.
    pub location: String,
    /// What became of it; nothing yet before.
    pub result: &'static str,
}

/// The hooks of one configuration.
pub struct Hooks {
    scripts: HookScripts,
    server_name: String,
    storage: String,
    configuration_file: String,
    say: Say,
    pulse: Arc<Pulse>,
    is_retired: AtomicBool,
}

impl Hooks {
    /// The hooks around what is done with that archive. They beat `pulse`; nobody listens to them yet.
    pub fn new(scripts: &HookScripts, destination: &Destination, pulse: Arc<Pulse>) -> Self {
        Hooks {
            scripts: scripts.clone(),
            server_name: destination.server_name.to_string(),
            storage: destination.storage.to_string(),
            configuration_file: String::new(),
            say: Arc::new(drop),
            pulse,
            is_retired: AtomicBool::new(false),
        }
    }

    /// The same for that configuration file, with somebody who listens.
    pub fn of_configuration_file(self, path: Option<&Path>, say: Say) -> Self {
        let configuration_file = path.map(|path| path.display().to_string()).unwrap_or_default();
        Hooks { configuration_file, say, ..self }
    }

    /// Whether any is set for that occasion.
    pub fn are_set_for(&self, occasion: Occasion) -> bool {
        occasion.hooks().into_iter().any(|hook| self.scripts.text(hook).is_some())
    }

    /// From now on none is begun, and the one that runs is ended.
    pub fn retire(&self) {
        self.is_retired.store(true, Ordering::Relaxed);
    }

    /// Whether they are not to be run any more.
    pub fn are_retired(&self) -> bool {
        self.is_retired.load(Ordering::Relaxed)
    }

    /// Does `work` with the hooks around it; `after` says what there is to tell once it is done.
    ///
    /// Fails without working where a retry hook before it says so or does not succeed in time, and as the work does. What
    /// comes of the hooks behind it changes nothing but the notes.
    pub fn around<T>(
        &self,
        occasion: Occasion,
        before: &About,
        work: impl FnOnce() -> Result<T>,
        after: impl FnOnce(Option<&T>) -> About,
    ) -> Result<T> {
        let mut duration = None;
        let done = self.before(occasion, before).and_then(|()| {
            let began = Instant::now();
            let worked = work();
            duration = Some(began.elapsed());
            worked
        });
        let end = End { error: done.as_ref().err().map(Error::to_string), duration };
        self.after(occasion, after(done.as_ref().ok()), &end);
        done
    }

    /// Runs the hooks before something. Fails where a retry hook says so, or does not succeed in time.
    pub fn before(&self, occasion: Occasion, about: &About) -> Result<()> {
        let not_yet = End { error: None, duration: None };
        let mut hooks = occasion.hooks().into_iter().filter(|hook| hook.is_before());
        hooks.try_for_each(|hook| self.run_if_set(hook, about, &not_yet))
    }

    /// Runs the hooks behind something that ended so. What comes of them changes nothing but the notes.
    pub fn after(&self, occasion: Occasion, about: About, end: &End) {
        let about = if end.error.is_some() { About { result: "failed", ..about } } else { about };
        for hook in occasion.hooks().into_iter().filter(|hook| !hook.is_before()) {
            if let Err(error) = self.run_if_set(hook, &about, end)
                && error.kind() != Kind::Interrupted
            {
                self.note(true, format!("{}: {error}; it changes nothing", title(hook, &about.name)));
            }
        }
    }

    fn run_if_set(&self, hook: Hook, about: &About, end: &End) -> Result<()> {
        self.scripts.text(hook).map_or(Ok(()), |text| self.run(hook, text, about, end))
    }

    fn note(&self, is_trouble: bool, message: String) {
        (self.say)(Note { is_trouble, message });
    }

    /// Runs one hook: once, or until it says how to go on.
    fn run(&self, hook: Hook, text: &str, about: &About, end: &End) -> Result<()> {
        let title = title(hook, &about.name);
        let variables = self.variables(hook, about, end);
        let limit = Limit::new(self.scripts.timeout, &self.pulse, &self.is_retired);
        let mut failures = 0;
        loop {
            if limit.cut() == Some(Cut::Stopped) {
                return Err(interrupted(hook));
            }
            let mut each_line = |line: &str| self.note(false, format!("{title}: {line}"));
            let outcome = process::run(text, &variables, &limit, &mut each_line);
            let failure = match outcome {
                Ok(Outcome::Ended(Exit::Code(0))) => return Ok(()),
                Ok(Outcome::Cut(cut)) => return self.give_up(hook, cut, &title, failures),
                Ok(Outcome::Ended(Exit::Code(ABORT_AND_CONTINUE))) if hook.is_retry() => {
                    self.note(true, format!("{title} ended with exit code {ABORT_AND_CONTINUE}: archiving goes on"));
                    return Ok(());
                }
                Ok(Outcome::Ended(Exit::Code(ABORT_AND_STOP))) if hook.is_retry() => return Err(refused(hook)),
                Ok(Outcome::Ended(exit)) => format!("{title} ended with {exit}"),
                Err(error) => format!("{title} could not be started: {}", crate::error::plain_cause(&error)),
            };
            if !hook.is_retry() {
                self.note(true, failure);
                return Ok(());
            }
            failures += 1;
            let pause = pause_after(failures);
            self.note(true, format!("{failure}; attempt {failures}"));
            if let Some(cut) = limit.pause(pause) {
                return self.give_up(hook, cut, &title, failures);
            }
        }
    }

    /// What it means that a hook was ended, or is not tried again.
    fn give_up(&self, hook: Hook, cut: Cut, title: &str, failures: u32) -> Result<()> {
        if cut == Cut::Stopped {
            return Err(interrupted(hook));
        }
        let error = match cut {
            Cut::TimedOut => self.too_late(hook, failures),
            _ => hurried(hook),
        };
        if hook.is_retry() {
            return Err(error);
        }
        self.note(true, format!("{title} was ended: {error}"));
        Ok(())
    }

    fn too_late(&self, hook: Hook, failures: u32) -> Error {
        let seconds = self.scripts.timeout.as_secs();
        let message = format!("hook {} did not succeed within {seconds} s", hook.name());
        let error = Error::new(Kind::Hook, setting(hook), message);
        let error = match failures {
            0 => error.detail("It was still running and was killed."),
            _ => error.detail(format!("It failed {failures} times; the log has what it wrote.")),
        };
        error.hint("Mend the hook, or raise archiver.hook_timeout; the file is tried again by itself.")
    }

    fn variables(&self, hook: Hook, about: &About, end: &End) -> Vec<(&'static str, String)> {
        let phase = if hook.is_before() { "pre" } else { "post" };
        let compression = match about.format.compression {
            Compression::None => "",
            other => other.name(),
        };
        // Barman's, in its order, then ours.
        vec![
            ("BARMAN_VERSION", env!("CARGO_PKG_VERSION").to_string()),
            ("BARMAN_SERVER", self.server_name.clone()),
            ("BARMAN_CONFIGURATION", self.configuration_file.clone()),
            ("BARMAN_HOOK", hook.name()[phase.len() + 1..].to_string()),
            ("BARMAN_RETRY", i32::from(hook.is_retry()).to_string()),
            ("BARMAN_PHASE", phase.to_string()),
            ("BARMAN_SEGMENT", about.name.to_string()),
            ("BARMAN_FILE", about.file.display().to_string()),
            ("BARMAN_SIZE", about.size.to_string()),
            ("BARMAN_TIMESTAMP", python_float(about.modified)),
            ("BARMAN_COMPRESSION", compression.to_string()),
            ("BARMAN_ERROR", end.error.clone().unwrap_or_default()),
            ("ARCHIVER_HOOK_NAME", hook.name().to_string()),
            ("ARCHIVER_HOOK_STORAGE", self.storage.clone()),
            ("ARCHIVER_HOOK_LOCATION", about.location.clone()),
            ("ARCHIVER_HOOK_ENCRYPTION", about.format.encryption.name().to_string()),
            ("ARCHIVER_HOOK_RESULT", about.result.to_string()),
            (
                "ARCHIVER_HOOK_DURATION",
                end.duration.map(|took| format!("{:.3}", took.as_secs_f64())).unwrap_or_default(),
            ),
        ]
    }
}

/// How that ended which hooks run around.
pub struct End {
    /// What went wrong, if something did.
    pub error: Option<String>,
    /// How long it took, if it was begun.
    pub duration: Option<Duration>,
}

/// Barman's pauses between the attempts at a retry hook, after so many failures: three seconds five times, then a minute,
/// then anew.
pub fn pause_after(failures: u32) -> Duration {
    Duration::from_secs(if failures > 0 && failures.is_multiple_of(6) { 60 } else { 3 })
}

fn title(hook: Hook, name: &WalName) -> String {
    format!("hook {} for WAL file \"{name}\"", hook.name())
}

fn setting(hook: Hook) -> String {
    format!("archiver.{}", hook.name())
}

fn refused(hook: Hook) -> Error {
    let message = format!("hook {} refuses it (exit code {ABORT_AND_STOP})", hook.name());
    Error::new(Kind::Hook, setting(hook), message)
        .hint("The file is offered to the hook again; the log has what it wrote.")
}

fn hurried(hook: Hook) -> Error {
    let message = format!("hook {} was given up for a stop of the server or a reload", hook.name());
    Error::new(Kind::Hook, setting(hook), message).hint("The file is tried again by itself.")
}

fn interrupted(hook: Hook) -> Error {
    Error::new(Kind::Interrupted, setting(hook), format!("stopped before hook {} was done", hook.name()))
}

/// Notes on their way from the threads that run hooks to the one that may log; of too many, the first.
#[derive(Default)]
pub struct Notes {
    kept: Mutex<(VecDeque<Note>, u64)>,
}

impl Notes {
    const MOST: usize = 1000;

    /// Takes one in.
    pub fn push(&self, note: Note) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.0.len() < Self::MOST {
            kept.0.push_back(note);
        } else {
            kept.1 += 1;
        }
    }

    /// Hands out all that have come, in order.
    pub fn take(&self) -> Vec<Note> {
        let (notes, lost) = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        let message = format!("{lost} more lines about hooks were not kept");
        let rest = (lost > 0).then_some(Note { is_trouble: true, message });
        notes.into_iter().chain(rest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pauses_between_attempts_are_barmans() {
        let seconds: Vec<u64> = (1..=13).map(|failures| pause_after(failures).as_secs()).collect();
        assert_eq!(seconds, [3, 3, 3, 3, 3, 60, 3, 3, 3, 3, 3, 60, 3]);
    }

    #[test]
    fn of_too_many_notes_the_first_are_kept_and_the_others_counted() {
        let notes = Notes::default();
        for number in 0..Notes::MOST + 5 {
            notes.push(Note { is_trouble: false, message: number.to_string() });
        }
        let taken = notes.take();
        assert_eq!(taken.len(), Notes::MOST + 1);
        assert_eq!(taken[Notes::MOST].message, "5 more lines about hooks were not kept");
        assert_eq!(notes.take(), []);
    }
}
