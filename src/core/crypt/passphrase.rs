//! The passphrase of secret keys, from a command that prints it.

use super::Passphrase;
use crate::error::{Error, Kind, Result};
use crate::threads::with_signals_blocked;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread::Builder;
use std::time::{Duration, Instant};

/// A person is not asked: nobody sits there.
const PATIENCE: Duration = Duration::from_secs(30);
const LONGEST_PASSPHRASE: u64 = 4 << 10;
const POLL: Duration = Duration::from_millis(10);

/// The first line that the shell command `text` prints.
pub fn of_command(text: &str) -> Passphrase {
    let text = text.to_string();
    Box::new(move || first_line_of(&text))
}

/// Never says what was printed.
fn failed(cause: &str) -> Error {
    let message = format!("could not get the passphrase of the secret keys: {cause}");
    Error::new(Kind::Configuration, "archiver.decryption_passphrase_command", message)
        .hint("archiver.decryption_passphrase_command must print the passphrase on a line, and end with status 0.")
}

fn first_line_of(text: &str) -> Result<Vec<u8>> {
    let could_not_run =
        |error: &io::Error| failed(&format!("the command could not be run: {}", crate::error::plain_cause(error)));
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(text).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|error| could_not_run(&error))?;
    let (sender, receiver) = channel();
    if let Some(output) = child.stdout.take() {
        // What it prints is read beside the wait: whoever keeps the pipe open keeps nobody here.
        let read = move || {
            let mut bytes = Vec::new();
            let read = output.take(LONGEST_PASSPHRASE).read_to_end(&mut bytes);
            let _ = sender.send(read.map(|_| bytes));
        };
        with_signals_blocked(|| Builder::new().name("archiver passphrase".into()).spawn(read))
            .map_err(|error| could_not_run(&error))?;
    }
    let started = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|error| could_not_run(&error))? {
            Some(status) => break status,
            None if started.elapsed() > PATIENCE => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(&format!("the command did not end within {} s", PATIENCE.as_secs())));
            }
            None => std::thread::sleep(POLL),
        }
    };
    if !status.success() {
        return Err(failed(&format!("the command failed: {status}")));
    }
    let printed = receiver.recv_timeout(PATIENCE).map_err(|_| failed("what the command printed has no end"))?;
    let printed = printed.map_err(|error| could_not_run(&error))?;
    let line = printed.split(|&byte| byte == b'\n').next().unwrap_or_default();
    if line.is_empty() { Err(failed("the command printed nothing")) } else { Ok(line.to_vec()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_passphrase_is_the_first_line_that_the_command_prints() {
        assert_eq!(of_command("printf 'open sesame\\nand more\\n'")().unwrap(), b"open sesame");
        assert_eq!(of_command("printf secret")().unwrap(), b"secret");
    }

    #[test]
    fn a_command_that_fails_or_prints_nothing_is_told_and_what_it_printed_is_not() {
        for (text, cause) in [
            ("echo sesame; exit 3", "the command failed: exit status: 3"),
            ("true", "the command printed nothing"),
            ("/nonexistent/program", "the command failed: exit status: 127"),
        ] {
            let error = of_command(text)().unwrap_err();
            assert!(error.message().ends_with(cause), "{error}");
            assert!(!format!("{error:?}").contains("sesame"));
        }
    }
}
