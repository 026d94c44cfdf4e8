//! pg_receivewal, as a child that ends with us.

use super::complaint::Complaint;
use super::primary::CONNECT_SECONDS;
use super::tools::Tool;
use crate::config::Streaming;
use crate::error::{Error, Kind};
use crate::process::{Exit, shown};
use crate::sys;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant};

/// How long it may take to write what it has and end.
const END_PATIENCE: Duration = Duration::from_secs(5);
const KILL_PATIENCE: Duration = Duration::from_secs(2);
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Of what it says so many lines are kept, to tell why it ended.
const KEPT_LINES: usize = 20;
const MOST_LINE_BYTES: u64 = 2000;

/// It tells the server every 10 s how far it is: a network that answers that with nothing for so long is gone. The kernel alone
/// would try for a quarter of an hour.
const UNANSWERED_MS: &str = "60000";

/// Hears what it says, line by line.
pub type Hear = Arc<dyn Fn(&str) + Send + Sync>;

/// A running pg_receivewal.
#[derive(Debug)]
pub struct Receiver {
    child: Child,
    reader: Option<JoinHandle<()>>,
    said: Arc<Mutex<VecDeque<String>>>,
}

impl Receiver {
    /// Starts it. The kernel ends it when the thread that calls this ends, be it by a kill of the whole process.
    pub fn start(tool: &Tool, streaming: &Streaming, is_synchronous: bool, hear: Hear) -> io::Result<Self> {
        let (output, theirs) = io::pipe()?;
        let mut command = Command::new(&tool.path);
        let conninfo = streaming.conninfo.with_default("tcp_user_timeout", UNANSWERED_MS);
        command
            .arg(format!("--dbname={}", conninfo.with("application_name", &streaming.archiver_name)))
            .arg(format!("--directory={}", streaming.directory.display()))
            .args(["--verbose", "--no-loop", "--no-password"])
            .args(streaming.slot_name.iter().map(|slot| format!("--slot={slot}")))
            .args(is_synchronous.then_some("--synchronous"))
            .env("LC_ALL", "C")
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(theirs.try_clone()?)
            .stderr(theirs);
        if std::env::var_os("PGCONNECT_TIMEOUT").is_none() {
            command.env("PGCONNECT_TIMEOUT", CONNECT_SECONDS);
        }
        sys::end_with_this_thread(&mut command, libc::SIGINT);
        let child = command.spawn()?;
        // Its ends of the pipe: without them the reader sees the end.
        drop(command);
        let said: Arc<Mutex<VecDeque<String>>> = Arc::default();
        let kept = Arc::clone(&said);
        let read = move || {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            while matches!(output.by_ref().take(MOST_LINE_BYTES).read_until(b'\n', &mut line), Ok(count) if count > 0) {
                let text = shown(&line);
                line.clear();
                hear(&text);
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.push_back(text);
                if kept.len() > KEPT_LINES {
                    kept.pop_front();
                }
            }
        };
        let mut receiver = Receiver { child, reader: None, said };
        // Where there is no thread it ends, too, when this is dropped.
        receiver.reader = Some(Builder::new().name("pg_receivewal output".into()).spawn(read)?);
        Ok(receiver)
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Why it ended, once it has.
    pub fn ended(&mut self) -> Option<Error> {
        // Its end was taken by somebody else where there is an error: it has ended.
        let status = self.child.try_wait().unwrap_or_else(|_| Some(ExitStatus::from_raw(0)))?;
        // All that it said, before that is judged.
        let deadline = Instant::now() + Duration::from_millis(500);
        while self.reader.as_ref().is_some_and(|reader| !reader.is_finished()) && Instant::now() < deadline {
            sleep(LOOK_INTERVAL);
        }
        let lines: Vec<String> = self.said.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        let what = match exit_of(status) {
            Exit::Code(0) => {
                return Some(
                    Error::new(Kind::Storage, "pg_receivewal", "pg_receivewal ended by itself").retry_if(true),
                );
            }
            exit => format!("pg_receivewal ended with {exit}"),
        };
        Some(Complaint::of(&lines).error(&what))
    }

    /// Asks it to end, and after a while sees to it.
    pub fn end(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let pid = Pid::from_raw(self.pid());
        let has_ended = |child: &mut Child| child.try_wait().map_or(true, |status| status.is_some());
        let deadline = Instant::now() + END_PATIENCE;
        // Not reaped yet, so that the number is its own.
        if !has_ended(&mut self.child) {
            let _ = kill(pid, Signal::SIGINT);
        }
        while !has_ended(&mut self.child) && Instant::now() < deadline {
            sleep(LOOK_INTERVAL);
        }
        if !has_ended(&mut self.child) {
            let _ = self.child.kill();
        }
        // One that hangs in the kernel dies when that lets it.
        let deadline = Instant::now() + KILL_PATIENCE;
        while !has_ended(&mut self.child) && Instant::now() < deadline {
            sleep(LOOK_INTERVAL);
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    let signal = || status.signal().and_then(|number| Signal::try_from(number).ok());
    status.code().map(Exit::Code).or_else(|| signal().map(Exit::Signal)).unwrap_or(Exit::Unknown)
}
