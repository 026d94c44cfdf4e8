//! The program `archiver`: fetches WAL back for `restore_command`, and does what is done outside a server.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod output;
mod settings;
mod signals;

use archiver_core::report::Report;
use archiver_core::wal::WalName;
use args::{Arguments, Command};
use clap::{CommandFactory, Parser};
use output::{ANYTHING_ELSE, DONE, End, USAGE, code_of, tell};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let code = std::panic::catch_unwind(|| match Arguments::try_parse() {
        Ok(arguments) => run(&arguments),
        Err(usage) => {
            // Nobody is left to tell where even this fails.
            let _ = usage.print();
            match usage.use_stderr() {
                false => DONE,
                true if is_restore() => commands::restore::FAILED,
                true => USAGE,
            }
        }
    });
    ExitCode::from(code.unwrap_or_else(|_| if is_restore() { commands::restore::FAILED } else { ANYTHING_ELSE }))
}

fn run(arguments: &Arguments) -> u8 {
    let done = match &arguments.command {
        Command::Restore(restore) => return commands::restore::run(arguments, restore),
        Command::Prefetch => return commands::restore::prefetch(arguments),
        Command::Archive(archive) => commands::archive::run(arguments, archive),
        Command::Delete(delete) => commands::delete::run(arguments, delete),
        Command::Errors(errors) => commands::errors::run(arguments, errors),
        Command::ReceiveWal(receive) => commands::receive_wal::run(arguments, receive),
        Command::List(list) => commands::list::list(arguments, list),
        Command::Exists(exists) => commands::list::exists(arguments, exists),
        Command::Verify(verify) => commands::verify::run(arguments, verify),
        Command::Gaps(gaps) => commands::gaps::run(arguments, gaps),
        Command::Rebuild(rebuild) => commands::rebuild::run(arguments, rebuild),
        Command::Status(status) => commands::status::status(arguments, status),
        Command::Check(check) => commands::check::check(arguments, check),
    };
    match done {
        Ok(code) => code,
        Err(End::ReaderLeft) => DONE,
        Err(End::Failed(error)) => {
            tell(Report::of(&error));
            code_of(&error)
        }
    }
}

/// Whether PostgreSQL may be reading the exit code as that of a restore_command: `restore` was typed, or a WAL file was
/// named without any other command, behind something else that was meant for it.
fn is_restore() -> bool {
    let typed: Vec<OsString> = std::env::args_os().skip(1).collect();
    let is_wal_name = |text: &OsString| text.to_str().is_some_and(|text| WalName::parse(text).is_ok());
    typed.iter().any(|text| text == "restore") || typed.iter().any(is_wal_name) && !names_command(&typed)
}

/// Whether the first word that is neither a flag nor a flag's value is a command.
fn names_command(typed: &[OsString]) -> bool {
    let program = Arguments::command();
    let takes_value = |flag: &str| {
        program.get_arguments().filter(|known| known.get_action().takes_values()).any(|known| {
            let long = known.get_long().is_some_and(|long| flag.strip_prefix("--") == Some(long));
            long || known
                .get_short()
                .is_some_and(|short| flag.strip_prefix('-') == Some(short.encode_utf8(&mut [0; 4])))
        })
    };
    let mut words = typed.iter().map(|text| text.to_string_lossy());
    while let Some(word) = words.next() {
        if takes_value(&word) {
            words.next();
        } else if !word.starts_with('-') {
            return program.find_subcommand(word.as_ref()).is_some();
        }
    }
    false
}
