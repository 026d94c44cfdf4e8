//! Programs of others: a text that the shell runs, from a process with threads and signals of its own.
//!
//! A child is started by posix_spawn, never by a fork of ours. It gets an empty signal mask (threads of ours block every
//! signal, and `std::process` would hand that on), every signal at its default, a process group of its own, and no
//! descriptor beyond the first three. Only that very child is waited for: others of this process are their makers'.

use crate::pulse::Pulse;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{AccessFlags, Pid, access, pipe2, read};
use std::cell::Cell;
use std::ffi::{CString, OsStr};
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

const SHELL: &str = "/bin/sh";
/// How often a wait looks at what no event tells: the pulse, and a child that closed its output and lives on.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// How long a child may go on while a stop of the server or a reload waits for it. The main thread waits a second longer.
const HURRIED_PATIENCE: Duration = Duration::from_secs(3);
/// Between the request to end and the end.
const GRACE: Duration = Duration::from_secs(1);
/// The same where this process itself is about to end.
const SHORT_GRACE: Duration = Duration::from_millis(200);
/// How long a killed child is waited for: one that hangs in the kernel dies when that lets it.
const REAP_PATIENCE: Duration = Duration::from_secs(1);
/// How long what others write is read after the child has ended: a grandchild may keep the pipe open for ever.
const DRAIN_PATIENCE: Duration = Duration::from_millis(300);
const PIECE_BYTES: usize = 64 << 10;
/// Of one run no more lines than this are told, and no more of each line.
const MOST_LINES: usize = 200;
const MOST_LINE_BYTES: usize = 1000;

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// By itself.
    Code(i32),
    /// By a signal.
    Signal(Signal),
    /// Somebody else took its end, or this process ignores the ends of its children.
    Unknown,
}

impl Display for Exit {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(signal) => write!(f, "signal {signal}"),
            Exit::Unknown => write!(f, "an exit code that was lost"),
        }
    }
}

/// Why a program was not waited for any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Its time was over.
    TimedOut,
    /// A stop of the server or a reload waits.
    Hurried,
    /// All work was told to end, or what it was part of is no longer wanted.
    Stopped,
}

/// What came of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended.
    Ended(Exit),
    /// It was ended, with its whole group.
    Cut(Cut),
}

/// Until when programs may run, and what ends them before.
pub struct Limit<'a> {
    deadline: Cell<Instant>,
    pulse: &'a Pulse,
    is_cancelled: &'a AtomicBool,
    hurried_since: Cell<Option<Instant>>,
}

impl<'a> Limit<'a> {
    /// So long from now, unless the pulse is told to stop or to hurry, or `is_cancelled` comes true.
    pub fn new(patience: Duration, pulse: &'a Pulse, is_cancelled: &'a AtomicBool) -> Self {
        let deadline = Cell::new(Instant::now() + patience);
        Limit { deadline, pulse, is_cancelled, hurried_since: Cell::new(None) }
    }

    /// Begins anew: something moved.
    pub fn extend(&self, patience: Duration) {
        self.deadline.set(Instant::now() + patience);
        self.hurried_since.set(None);
    }

    /// Why to end now, if there is a reason.
    pub fn cut(&self) -> Option<Cut> {
        let now = Instant::now();
        if self.pulse.is_stopped() || self.is_cancelled.load(Ordering::Relaxed) {
            return Some(Cut::Stopped);
        }
        if now >= self.deadline.get() {
            return Some(Cut::TimedOut);
        }
        if !self.pulse.is_hurried() {
            self.hurried_since.set(None);
            return None;
        }
        let since = self.hurried_since.get().unwrap_or(now);
        self.hurried_since.set(Some(since));
        (now - since >= HURRIED_PATIENCE).then_some(Cut::Hurried)
    }

    /// Waits before another attempt, beating the pulse. Nobody waits who is in a hurry, nor where no time would be left
    /// afterwards.
    pub fn pause(&self, pause: Duration) -> Option<Cut> {
        let until = Instant::now() + pause;
        if until >= self.deadline.get() {
            return Some(Cut::TimedOut);
        }
        loop {
            if let Some(cut) = self.cut() {
                return Some(cut);
            }
            if self.pulse.is_hurried() {
                return Some(Cut::Hurried);
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.pulse.beat();
            sleep(left.min(LOOK_INTERVAL));
        }
    }
}

/// The program of that name in the first of `directories`, or of those of `path` (as PATH is written), that has one.
pub fn find_program(name: &str, directories: &[PathBuf], path: &OsStr) -> Option<PathBuf> {
    // A relative directory of PATH means another one in each process.
    let of_path = std::env::split_paths(path).filter(|directory| directory.is_absolute());
    let is_program = |path: &PathBuf| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    directories.iter().cloned().chain(of_path).map(|directory| directory.join(name)).find(is_program)
}

/// Runs `text` by the shell, with `variables` on top of this process's environment, without input. Each line that it
/// writes, on either output, is handed on; of many lines and of long ones only the beginning. It beats the pulse.
///
/// Fails where it could not be started. What it leaves running in the background goes on, unheard.
pub fn run(
    text: &str,
    variables: &[(&str, String)],
    limit: &Limit<'_>,
    each_line: &mut dyn FnMut(&str),
) -> io::Result<Outcome> {
    let (mut child, output) = Child::spawn_for_lines(text, variables)?;
    let mut output = Some(output);
    let mut lines = Lines::new(each_line);
    let mut pause = Duration::from_millis(1);
    let cut = loop {
        if let Some(cut) = limit.cut() {
            child.end(if cut == Cut::Stopped { SHORT_GRACE } else { GRACE });
            break Some(cut);
        }
        limit.pulse.beat();
        match &output {
            Some(pipe) if is_readable(pipe, LOOK_INTERVAL)? => {
                if !lines.take_from(pipe)? {
                    output = None;
                }
            }
            Some(_) => {}
            // It may live on without an output.
            None => {
                sleep(pause);
                pause = (pause * 2).min(LOOK_INTERVAL);
            }
        }
        if child.has_ended() {
            break None;
        }
    };
    let drained_at = Instant::now() + DRAIN_PATIENCE;
    while let Some(pipe) = &output
        && Instant::now() < drained_at
        && is_readable(pipe, Duration::from_millis(10))?
        && lines.take_from(pipe)?
    {}
    lines.end();
    Ok(cut.map_or_else(|| Outcome::Ended(child.reap()), Outcome::Cut))
}

/// A program that runs, with its group; ended when it is dropped before its end.
pub struct Child {
    pid: Pid,
    is_reaped: bool,
}

/// Children that were killed and had not died yet.
static ABANDONED: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

impl Child {
    /// Starts it without input; what it writes on either output comes from one pipe.
    fn spawn_for_lines(text: &str, variables: &[(&str, String)]) -> io::Result<(Self, OwnedFd)> {
        let (output, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        let nothing = File::open("/dev/null")?;
        let mut actions = PosixSpawnFileActions::init()?;
        actions.add_dup2(nothing.as_raw_fd(), 0)?;
        actions.add_dup2(theirs.as_raw_fd(), 1)?;
        actions.add_dup2(theirs.as_raw_fd(), 2)?;
        Ok((Child::spawn(text, variables, actions)?, output))
    }

    /// Starts it with a pipe for its input and one for each output.
    pub fn spawn_as_filter(text: &str) -> io::Result<(Self, [OwnedFd; 3])> {
        let (their_input, input) = pipe2(OFlag::O_CLOEXEC)?;
        let (output, their_output) = pipe2(OFlag::O_CLOEXEC)?;
        let (complaints, their_complaints) = pipe2(OFlag::O_CLOEXEC)?;
        let mut actions = PosixSpawnFileActions::init()?;
        actions.add_dup2(their_input.as_raw_fd(), 0)?;
        actions.add_dup2(their_output.as_raw_fd(), 1)?;
        actions.add_dup2(their_complaints.as_raw_fd(), 2)?;
        Ok((Child::spawn(text, &[], actions)?, [input, output, complaints]))
    }

    fn spawn(text: &str, variables: &[(&str, String)], mut actions: PosixSpawnFileActions) -> io::Result<Self> {
        reap_abandoned();
        // In the child alone; one that was closed meanwhile is no failure there.
        for descriptor in open_descriptors().filter(|descriptor| *descriptor > 2) {
            actions.add_close(descriptor)?;
        }
        let mut attributes = PosixSpawnAttr::init()?;
        attributes.set_flags(
            PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK
                | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
                | PosixSpawnFlags::POSIX_SPAWN_SETPGROUP,
        )?;
        attributes.set_sigmask(&SigSet::empty())?;
        let mut settable = SigSet::all();
        settable.remove(Signal::SIGKILL);
        settable.remove(Signal::SIGSTOP);
        attributes.set_sigdefault(&settable)?;
        attributes.set_pgroup(Pid::from_raw(0))?;
        let arguments = [CString::from(c"sh"), CString::from(c"-c"), CString::new(text)?];
        let environment = environment(variables)?;
        let pid = posix_spawn(SHELL, &actions, &attributes, &arguments, &environment)?;
        Ok(Child { pid, is_reaped: false })
    }

    /// Whether it has ended; its number stays its own until it is reaped.
    pub fn has_ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        !matches!(waitid(Id::Pid(self.pid), flags), Ok(WaitStatus::StillAlive) | Err(Errno::EINTR))
    }

    /// How it ended, once it has.
    pub fn reap(&mut self) -> Exit {
        self.is_reaped = true;
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => Exit::Code(code),
            Ok(WaitStatus::Signaled(_, signal, _)) => Exit::Signal(signal),
            _ => Exit::Unknown,
        }
    }

    /// Ends it and its group: asks, and after `grace` kills whoever is left.
    pub fn end(&mut self, grace: Duration) {
        let wait = |patience| {
            let until = Instant::now() + patience;
            while !self.has_ended() && Instant::now() < until {
                sleep(Duration::from_millis(5));
            }
        };
        let _ = killpg(self.pid, Signal::SIGTERM);
        wait(grace);
        // Before it is reaped: until then the number of the group cannot be another's.
        let _ = killpg(self.pid, Signal::SIGKILL);
        wait(REAP_PATIENCE);
        if self.has_ended() {
            self.reap();
        } else {
            self.is_reaped = true;
            ABANDONED.lock().unwrap_or_else(PoisonError::into_inner).push(self.pid);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.is_reaped {
            self.end(SHORT_GRACE);
        }
    }
}

fn reap_abandoned() {
    let is_left = |pid: &Pid| matches!(waitpid(*pid, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive));
    ABANDONED.lock().unwrap_or_else(PoisonError::into_inner).retain(is_left);
}

/// The descriptors of this process, as far as the kernel tells: PostgreSQL 15 leaves some of its own open in children.
fn open_descriptors() -> impl Iterator<Item = RawFd> {
    let entries = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// This process's environment with `variables` in place of those of the same names.
fn environment(variables: &[(&str, String)]) -> io::Result<Vec<CString>> {
    let is_replaced = |name: &OsStr| variables.iter().any(|(replacing, _)| name == *replacing);
    let inherited = std::env::vars_os().filter(|(name, _)| !is_replaced(name)).map(|(name, value)| {
        let mut line = name.into_vec();
        line.push(b'=');
        line.extend_from_slice(value.as_bytes());
        line
    });
    let ours = variables.iter().map(|(name, value)| format!("{name}={value}").into_bytes());
    inherited.chain(ours).map(|line| CString::new(line).map_err(io::Error::from)).collect()
}

/// Whether a read would not wait, now or within `timeout`.
pub fn is_readable(pipe: &OwnedFd, timeout: Duration) -> io::Result<bool> {
    let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    match poll(&mut polled, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO)) {
        Ok(count) => Ok(count > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// A line that a program wrote, fit for a log.
pub fn shown(line: &[u8]) -> String {
    let shown = |letter: char| if letter.is_control() { ' ' } else { letter };
    String::from_utf8_lossy(line).trim_end().chars().map(shown).collect()
}

/// Parts what a program writes into lines fit for a log.
struct Lines<'a> {
    each: &'a mut dyn FnMut(&str),
    piece: Vec<u8>,
    line: Vec<u8>,
    is_cut: bool,
    told: usize,
    untold: u64,
}

impl<'a> Lines<'a> {
    fn new(each: &'a mut dyn FnMut(&str)) -> Self {
        Lines { each, piece: vec![0; PIECE_BYTES], line: Vec::new(), is_cut: false, told: 0, untold: 0 }
    }

    /// Takes what is there; answers whether more may come.
    fn take_from(&mut self, pipe: &OwnedFd) -> io::Result<bool> {
        let mut piece = std::mem::take(&mut self.piece);
        let count = match read(pipe, &mut piece) {
            Err(Errno::EINTR | Errno::EAGAIN) => None,
            other => Some(other?),
        };
        piece[..count.unwrap_or(0)].split_inclusive(|byte| *byte == b'\n').for_each(|part| self.take(part));
        self.piece = piece;
        Ok(count != Some(0))
    }

    /// Takes a part of one line.
    fn take(&mut self, part: &[u8]) {
        let (text, is_whole) = part.strip_suffix(b"\n").map_or((part, false), |text| (text, true));
        let room = MOST_LINE_BYTES - self.line.len();
        self.line.extend_from_slice(&text[..text.len().min(room)]);
        self.is_cut |= text.len() > room;
        if is_whole {
            self.tell();
        }
    }

    fn tell(&mut self) {
        if self.told == MOST_LINES {
            self.untold += 1;
        } else {
            self.told += 1;
            let mut text = shown(&self.line);
            if self.is_cut {
                text.push('…');
            }
            (self.each)(&text);
        }
        self.line.clear();
        self.is_cut = false;
    }

    fn end(mut self) {
        if !self.line.is_empty() {
            self.tell();
        }
        if self.untold > 0 {
            (self.each)(&format!("… and {} more lines", self.untold));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::with_signals_blocked;
    use std::fs;
    use std::path::Path;

    static NOT_CANCELLED: AtomicBool = AtomicBool::new(false);

    fn run_within(patience: Duration, text: &str) -> (Outcome, Vec<String>) {
        let pulse = Pulse::new();
        let mut lines = Vec::new();
        let limit = Limit::new(patience, &pulse, &NOT_CANCELLED);
        let outcome = run(text, &[("GIVEN", "ours".into())], &limit, &mut |line| lines.push(line.to_string())).unwrap();
        (outcome, lines)
    }

    fn run_long(text: &str) -> (Outcome, Vec<String>) {
        run_within(Duration::from_secs(30), text)
    }

    fn is_alive(pid_file: &Path) -> bool {
        let pid = fs::read_to_string(pid_file).unwrap();
        // A zombie that nobody reaps has ended as well.
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    }

    #[test]
    fn lines_of_both_outputs_come_in_order_and_the_code_is_told() {
        let (outcome, lines) = run_long("echo one; echo two >&2; printf 'thr\\tee'; exit 7");
        assert_eq!(outcome, Outcome::Ended(Exit::Code(7)));
        assert_eq!(lines, ["one", "two", "thr ee"]);
        let (outcome, lines) = run_long("kill -9 $$");
        assert_eq!((outcome, lines.len()), (Outcome::Ended(Exit::Signal(Signal::SIGKILL)), 0));
        assert_eq!(run_long("no-such-program").0, Outcome::Ended(Exit::Code(127)));
    }

    #[test]
    fn it_has_this_processs_environment_and_what_it_is_given_on_top_and_no_input() {
        let (_, lines) = run_long("echo $GIVEN; [ -n \"$PATH\" ] && echo path; cat; echo end");
        assert_eq!(lines, ["ours", "path", "end"]);
    }

    #[test]
    fn from_a_thread_that_blocks_every_signal_it_is_started_with_none_blocked_and_none_ignored() {
        let look =
            "while read -r name value; do case $name in SigBlk:|SigIgn:) echo $value;; esac; done </proc/$$/status";
        let (_, lines) = with_signals_blocked(|| run_long(look));
        // The C library keeps the signals 32 and 33 for itself.
        assert_eq!(lines, ["0000000000000000", "0000000180000000"]);
        let (_, lines) = with_signals_blocked(|| run_long("ps -o pgid= -p $$ | tr -d ' '; echo $$"));
        assert_eq!(lines[0], lines[1], "a group of its own");
    }

    #[test]
    fn it_has_no_descriptor_of_this_process_also_none_that_would_be_inherited() {
        let file = File::open("/dev/zero").unwrap();
        let inherited = nix::unistd::dup(&file).unwrap();
        assert!(inherited.as_raw_fd() > 2);
        let (_, lines) = run_long("for fd in /proc/$$/fd/*; do [ -e $fd ] && echo ${fd##*/}; done");
        assert_eq!(lines, ["0", "1", "2"]);
        drop(inherited);
    }

    #[test]
    fn many_runs_leave_no_descriptor_and_no_child() {
        let count = || open_descriptors().count();
        run_long("true");
        let before = count();
        let (mut outcomes, mut most) = (Vec::new(), 0);
        for _ in 0..40 {
            outcomes.push(run_long("echo x").0);
            most = most.max(count());
        }
        assert_eq!(outcomes, [Outcome::Ended(Exit::Code(0)); 40]);
        // Tests beside this one have some for a while.
        assert!(most < before + 30, "{before}, then {most}");
        let zombies = fs::read_to_string("/proc/self/task/self/children").unwrap_or_default();
        assert!(zombies.split_whitespace().count() < 40, "{zombies}");
    }

    #[test]
    fn one_that_hangs_is_killed_with_its_whole_group_also_where_it_does_not_want_to_end() {
        let directory = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| directory.path().join(name));
        let began = Instant::now();
        let text = format!(
            "trap '' TERM; (trap '' TERM; echo $$ >{}; while :; do sleep 1; done) & echo $! >{}; echo begun; wait; wait",
            one.display(),
            other.display()
        );
        let (outcome, lines) = run_within(Duration::from_millis(500), &text);
        assert_eq!((outcome, lines), (Outcome::Cut(Cut::TimedOut), vec!["begun".to_string()]));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(!is_alive(&one));
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_alive(&other) {
            assert!(Instant::now() < deadline, "the grandchild lives on");
            sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_flood_is_bounded_in_lines_in_their_length_and_in_time() {
        let (outcome, lines) = run_long("head -c 5000000 /dev/zero | tr '\\0' x; echo; yes line | head -n 300000");
        assert_eq!(outcome, Outcome::Ended(Exit::Code(0)));
        assert_eq!(lines.len(), MOST_LINES + 1);
        assert_eq!(lines[0].chars().count(), MOST_LINE_BYTES + 1);
        assert_eq!(lines[MOST_LINES], format!("… and {} more lines", 300_001 - MOST_LINES));
        let began = Instant::now();
        assert_eq!(run_within(Duration::from_millis(300), "yes").0, Outcome::Cut(Cut::TimedOut));
        assert!(began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_grandchild_that_keeps_the_output_open_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let pid_file = directory.path().join("pid");
        let began = Instant::now();
        let (outcome, lines) = run_long(&format!("sleep 60 & echo $! >{}; echo done", pid_file.display()));
        assert_eq!((outcome, lines), (Outcome::Ended(Exit::Code(0)), vec!["done".to_string()]));
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        assert!(is_alive(&pid_file), "what was left in the background on purpose goes on");
        let pid = fs::read_to_string(pid_file).unwrap().trim().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    }

    #[test]
    fn another_child_of_this_process_is_left_to_whoever_waits_for_it() {
        let mut others = std::process::Command::new("true").spawn().unwrap();
        sleep(Duration::from_millis(50));
        assert_eq!(run_long("exit 3").0, Outcome::Ended(Exit::Code(3)));
        assert!(others.wait().unwrap().success());
    }

    #[test]
    fn it_beats_the_pulse_and_a_stop_ends_it_at_once_and_a_hurry_soon() {
        let pulse = Pulse::new();
        let end_after = |tell: fn(&Pulse), patience| {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while pulse.beats() < 3 {
                        sleep(Duration::from_millis(1));
                    }
                    tell(&pulse);
                });
                let began = Instant::now();
                let limit = Limit::new(Duration::from_secs(60), &pulse, &NOT_CANCELLED);
                let outcome = run("exec sleep 60", &[], &limit, &mut |_| {}).unwrap();
                assert!(began.elapsed() < patience, "{:?}", began.elapsed());
                outcome
            })
        };
        let hurried = end_after(|pulse| pulse.hurry(true), HURRIED_PATIENCE + Duration::from_secs(2));
        assert_eq!(hurried, Outcome::Cut(Cut::Hurried));
        let limit = Limit::new(Duration::from_secs(60), &pulse, &NOT_CANCELLED);
        assert_eq!(limit.pause(Duration::from_secs(3)), Some(Cut::Hurried), "nobody waits to try again");
        pulse.hurry(false);
        assert_eq!(end_after(Pulse::stop, Duration::from_secs(2)), Outcome::Cut(Cut::Stopped));
    }

    #[test]
    fn a_pause_that_would_outlast_the_deadline_is_not_begun() {
        let pulse = Pulse::new();
        let limit = Limit::new(Duration::from_secs(2), &pulse, &NOT_CANCELLED);
        let began = Instant::now();
        assert_eq!(limit.pause(Duration::from_secs(3)), Some(Cut::TimedOut));
        assert_eq!(limit.pause(Duration::from_millis(20)), None);
        assert!(began.elapsed() < Duration::from_secs(1));
    }
}
