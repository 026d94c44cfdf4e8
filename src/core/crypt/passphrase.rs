//! The passphrase of secret keys, from a command that prints it.

use super::Passphrase;
use crate::error::{Error, Kind, Result, plain_cause};
use crate::process::{Cut, Exit, Limit, Outcome, run};
use crate::pulse::Pulse;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A person is not asked: nobody sits there.
const PATIENCE: Duration = Duration::from_secs(30);

/// The first line that the shell command `text` prints. A failure is answered again for as long as a command is waited for:
/// whoever reads many files does not wait for each.
pub fn of_command(text: &str) -> Passphrase {
    let text = text.to_string();
    let failure: Mutex<Option<(Instant, Error)>> = Mutex::default();
    Box::new(move || {
        let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
        match &*failure {
            Some((at, error)) if at.elapsed() < PATIENCE => Err(error.clone()),
            _ => first_line_of(&text).inspect_err(|error| *failure = Some((Instant::now(), error.clone()))),
        }
    })
}

/// Never says what was printed.
fn failed(cause: &str) -> Error {
    let message = format!("could not get the passphrase of the secret keys: {cause}");
    Error::new(Kind::Configuration, "archiver.decryption_passphrase_command", message)
        .hint("archiver.decryption_passphrase_command must print the passphrase on a line, and end with status 0.")
}

fn first_line_of(text: &str) -> Result<Vec<u8>> {
    let (pulse, is_cancelled) = (Pulse::new(), AtomicBool::new(false));
    let mut printed = None;
    // What it complains of is not what it prints.
    let text = format!("{{ {text}\n}} 2>/dev/null");
    let ended = run(&text, &[], &Limit::new(PATIENCE, &pulse, &is_cancelled), &mut |line| {
        printed.get_or_insert_with(|| line.as_bytes().to_vec());
    });
    match ended.map_err(|error| failed(&format!("the command could not be run: {}", plain_cause(&error))))? {
        Outcome::Ended(Exit::Code(0)) => {
            printed.filter(|line| !line.is_empty()).ok_or_else(|| failed("the command printed nothing"))
        }
        Outcome::Ended(exit) => Err(failed(&format!("the command failed: {exit}"))),
        Outcome::Cut(Cut::TimedOut) => Err(failed(&format!("the command did not end within {} s", PATIENCE.as_secs()))),
        Outcome::Cut(_) => Err(failed("the command was not waited for")),
    }
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
    fn a_command_that_failed_is_not_run_again_for_the_next_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runs");
        let passphrase = of_command(&format!("echo run >> {}; exit 3", path.display()));
        assert_eq!(passphrase().unwrap_err(), passphrase().unwrap_err());
        assert_eq!(std::fs::read_to_string(path).unwrap(), "run\n");
    }

    #[test]
    fn a_command_that_fails_or_prints_nothing_is_told_and_what_it_printed_is_not() {
        for (text, cause) in [
            ("echo sesame; exit 3", "the command failed: exit code 3"),
            ("true", "the command printed nothing"),
            ("/nonexistent/program", "the command failed: exit code 127"),
        ] {
            let error = of_command(text)().unwrap_err();
            assert!(error.message().ends_with(cause), "{error}");
            assert!(!format!("{error:?}").contains("sesame"));
        }
    }
}
