//! A program of the user's between two streams: what is read from one goes through it, piece by piece, without a file.

use crate::config::ShellFilter;
use crate::error::{Error, Kind, plain_cause};
use crate::process::{Child, Cut, Exit, Limit, is_readable};
use crate::pulse::Pulse;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::thread::sleep;
use std::time::Duration;

/// How often a wait looks at the pulse.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
const PIECE_BYTES: usize = 64 << 10;
/// Of what a program complains this much is told.
const MOST_COMPLAINT_BYTES: usize = 500;
const GRACE: Duration = Duration::from_millis(500);

static NEVER: AtomicBool = AtomicBool::new(false);

/// Hands on what a program makes of `input`. The end comes only once the program has read all of its input and ended
/// well; else, also where nothing has moved for too long, reading fails with an [`Error`] that names its setting. A
/// filter that is dropped before its end is ended.
pub struct Filter<'a, R> {
    program: &'a ShellFilter,
    child: Child,
    limit: Limit<'a>,
    pulse: &'a Pulse,
    patience: Duration,
    input: R,
    piece: Vec<u8>,
    unwritten: std::ops::Range<usize>,
    writer: Option<OwnedFd>,
    output: Option<OwnedFd>,
    complaints: Option<OwnedFd>,
    complaint: Vec<u8>,
    has_read_all: bool,
    is_over: bool,
}

impl<'a, R: Read> Filter<'a, R> {
    /// Starts the program, which may do nothing for as long as `patience`. What moves beats `pulse`.
    pub fn new(program: &'a ShellFilter, input: R, patience: Duration, pulse: &'a Pulse) -> io::Result<Self> {
        let failed =
            |error: io::Error| io::Error::other(failure(program, "could not be started", &plain_cause(&error)));
        let (child, [writer, output, complaints]) = Child::spawn_as_filter(&program.text).map_err(failed)?;
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| failed(errno.into()))?;
        Ok(Filter {
            program,
            child,
            limit: Limit::new(patience, pulse, &NEVER),
            pulse,
            patience,
            input,
            piece: vec![0; PIECE_BYTES],
            unwritten: 0..0,
            writer: Some(writer),
            output: Some(output),
            complaints: Some(complaints),
            complaint: Vec::new(),
            has_read_all: false,
            is_over: false,
        })
    }

    fn moved(&self) {
        self.pulse.beat();
        self.limit.extend(self.patience);
    }

    fn failed(&self, what: &str) -> io::Error {
        let said = String::from_utf8_lossy(&self.complaint);
        io::Error::other(failure(self.program, what, said.trim()))
    }

    /// Ends the program where its time is over.
    fn confirm_time(&mut self) -> io::Result<()> {
        let Some(cut) = self.limit.cut() else { return Ok(()) };
        self.child.end(GRACE);
        self.is_over = true;
        let seconds = self.patience.as_secs();
        Err(match cut {
            Cut::TimedOut => self.failed(&format!("did nothing for {seconds} s and was killed")),
            Cut::Hurried => {
                self.failed("did nothing while the server stops or reads its configuration, and was killed")
            }
            Cut::Stopped => io::Error::other(Error::new(
                Kind::Interrupted,
                self.program.setting,
                "stopped before the file was compressed or unpacked",
            )),
        })
    }

    /// Sees to it that there is something to write, until the input ends.
    fn fill(&mut self) -> io::Result<()> {
        if !self.unwritten.is_empty() || self.has_read_all {
            return Ok(());
        }
        let count = loop {
            match self.input.read(&mut self.piece) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        self.unwritten = 0..count;
        if count == 0 {
            self.has_read_all = true;
            // Which the program sees as the end of its input.
            self.writer = None;
        }
        Ok(())
    }

    fn write_some(&mut self) -> io::Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        match write(writer, &self.piece[self.unwritten.clone()]) {
            Ok(count) => {
                self.unwritten.start += count;
                self.moved();
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // It has ended, or reads no more: its end says which.
            Err(Errno::EPIPE) => self.writer = None,
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    fn hear_complaints(&mut self) -> io::Result<()> {
        let Some(pipe) = &self.complaints else { return Ok(()) };
        let mut piece = [0; 4096];
        match read(pipe, &mut piece) {
            Ok(0) => self.complaints = None,
            Ok(count) => {
                let room = MOST_COMPLAINT_BYTES.saturating_sub(self.complaint.len());
                self.complaint.extend_from_slice(&piece[..count.min(room)]);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// Waits until something can be written or read; answers whether output can.
    fn wait(&mut self) -> io::Result<bool> {
        let ends = [(&self.output, PollFlags::POLLIN), (&self.complaints, PollFlags::POLLIN)];
        let writer = (&self.writer, PollFlags::POLLOUT);
        let mut polled = Vec::with_capacity(3);
        for (end, events) in ends.into_iter().chain([writer]) {
            polled.extend(end.as_ref().map(|end| PollFd::new(end.as_fd(), events)));
        }
        match poll(&mut polled, PollTimeout::try_from(LOOK_INTERVAL).unwrap_or(PollTimeout::ZERO)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = polled.iter().map(|end| end.any().unwrap_or(false));
        let can_read = self.output.is_some() && ready.next() == Some(true);
        let complains = self.complaints.is_some() && ready.next() == Some(true);
        let can_write = self.writer.is_some() && ready.next() == Some(true);
        drop(polled);
        if complains {
            self.hear_complaints()?;
        }
        if can_write {
            self.write_some()?;
        }
        Ok(can_read)
    }

    /// Waits for the end of a program that writes no more.
    fn finish(&mut self) -> io::Result<()> {
        while !self.child.has_ended() {
            self.confirm_time()?;
            let complains = self.complaints.as_ref().map(|pipe| is_readable(pipe, Duration::from_millis(2)));
            match complains.transpose()? {
                Some(true) => self.hear_complaints()?,
                Some(false) => {}
                None => sleep(Duration::from_millis(2)),
            }
        }
        while let Some(pipe) = &self.complaints
            && is_readable(pipe, Duration::ZERO)?
            && self.complaint.len() < MOST_COMPLAINT_BYTES
        {
            self.hear_complaints()?;
        }
        self.is_over = true;
        match self.child.reap() {
            Exit::Code(0) if self.has_read_all && self.unwritten.is_empty() => Ok(()),
            Exit::Code(0) => Err(self.failed("ended before it had read all of its input")),
            exit => Err(self.failed(&format!("ended with {exit}"))),
        }
    }
}

impl<R: Read> Read for Filter<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_over || buffer.is_empty() {
            return Ok(0);
        }
        loop {
            self.confirm_time()?;
            self.fill()?;
            if !self.wait()? {
                continue;
            }
            let Some(output) = &self.output else { return Ok(0) };
            match read(output, buffer) {
                Ok(0) => {
                    self.output = None;
                    // What it did not take until now it never will.
                    self.writer = None;
                    self.finish()?;
                    return Ok(0);
                }
                Ok(count) => {
                    self.moved();
                    return Ok(count);
                }
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Compresses all of `plain` into `encoded`; more than `most` bytes, or none at all, are an error.
pub fn encode(
    program: &ShellFilter,
    plain: impl Read,
    encoded: &mut dyn Write,
    most: u64,
    patience: Duration,
    pulse: &Pulse,
) -> io::Result<()> {
    let mut filter = Filter::new(program, plain, patience, pulse)?;
    let count = io::copy(&mut (&mut filter).take(most + 1), encoded)?;
    match count {
        0 => Err(filter.failed("wrote nothing")),
        count if count > most => Err(filter.failed(&format!("wrote more than {most} bytes"))),
        _ => Ok(()),
    }
}

fn failure(program: &ShellFilter, what: &str, said: &str) -> Error {
    let ShellFilter { setting, text } = program;
    let error = Error::new(Kind::Storage, *setting, format!("the program that {setting} calls for {what}"));
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let error = if said.is_empty() { error } else { error.detail(format!("It said: {said}.")) };
    error.hint(format!("See that this works for the user that runs PostgreSQL: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn program(text: &str) -> ShellFilter {
        ShellFilter { setting: "archiver.custom_compression_filter", text: text.into() }
    }

    fn encoded(text: &str, plain: &[u8], most: u64, patience: Duration) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        let done = encode(&program(text), plain, &mut out, most, patience, &Pulse::new());
        let own =
            |error: io::Error| error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).expect("ours").clone();
        done.map(|()| out).map_err(own)
    }

    #[test]
    fn megabytes_pass_through_whole_and_beat_the_pulse() {
        let plain: Vec<u8> = (0..5_000_000u32).map(|at| (at * 31 % 251) as u8).collect();
        assert!(encoded("cat", &plain, 5_000_000, PATIENCE).unwrap() == plain);
        let there = encoded("gzip -c", &plain, 5_000_000, PATIENCE).unwrap();
        let (unpack, pulse) = (program("gzip -dc"), Pulse::new());
        let mut back = Vec::new();
        Filter::new(&unpack, &there[..], PATIENCE, &pulse).unwrap().read_to_end(&mut back).unwrap();
        assert!(back == plain && pulse.beats() > 10);
    }

    #[test]
    fn a_program_that_fails_is_told_of_with_its_setting_and_its_words() {
        for (text, what) in [
            ("cat >/dev/null; echo no luck >&2; exit 3", "ended with exit code 3"),
            ("cat; kill -9 $$", "ended with signal SIGKILL"),
            ("cat >/dev/null", "wrote nothing"),
            ("head -c 10", "ended before it had read all of its input"),
            ("no-such-program", "ended with exit code 127"),
            ("cat; cat /dev/zero", "wrote more than 2000000 bytes"),
        ] {
            let error = encoded(text, &[7; 1_000_000], 2_000_000, PATIENCE).expect_err(text);
            let expected = format!("the program that archiver.custom_compression_filter calls for {what}");
            assert_eq!(error.to_string(), expected, "{text}");
            assert!(error.hint_text().is_some_and(|hint| hint.ends_with(text)));
        }
        let error = encoded("cat >/dev/null; echo no luck >&2; exit 3", b"x", 100, PATIENCE).unwrap_err();
        assert_eq!(error.detail_text(), Some("It said: no luck."));
    }

    #[test]
    fn a_program_that_hangs_is_killed_when_nothing_has_moved_for_long() {
        for text in ["sleep 60", "cat; sleep 60", "exec cat /dev/null <&- >&- & sleep 60"] {
            let began = Instant::now();
            let error = encoded(text, &[7; 1_000_000], 2_000_000, Duration::from_secs(1)).expect_err(text);
            assert!(error.to_string().ends_with("did nothing for 1 s and was killed"), "{text}: {error}");
            assert!(began.elapsed() < Duration::from_secs(5), "{text}");
        }
    }

    #[test]
    fn a_flood_of_complaints_blocks_nobody() {
        let text = "head -c 3000000 /dev/zero | tr '\\0' x >&2; cat";
        assert_eq!(encoded(text, b"content", 100, PATIENCE).unwrap(), b"content");
    }

    #[test]
    fn a_stop_ends_it() {
        let pulse = Pulse::new();
        let sleeping = program("exec sleep 60");
        let mut filter = Filter::new(&sleeping, io::empty(), PATIENCE, &pulse).unwrap();
        pulse.stop();
        let began = Instant::now();
        assert!(filter.read(&mut [0; 10]).is_err());
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}
