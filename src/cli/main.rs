//! The program `archiver`: fetches WAL back for `restore_command`, and does what is done outside a server.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod settings;

use archiver_core::wal::WalName;
use args::{Arguments, Command};
use clap::Parser;
use std::process::ExitCode;

/// Exit codes, those of `restore` apart.
const USAGE: u8 = 2;
const ANYTHING_ELSE: u8 = 4;
/// PostgreSQL takes every exit code of a restore_command from 1 to 125 for "not in the archive", also that of a usage
/// error or of a panic; above, it stops rather than promotes.
const RESTORE_FAILED: u8 = 255;

fn main() -> ExitCode {
    let code = std::panic::catch_unwind(|| match Arguments::try_parse() {
        Ok(arguments) => match &arguments.command {
            Command::Restore(restore) => commands::restore::run(&arguments, restore),
        },
        Err(usage) => {
            // Nobody is left to tell where even this fails.
            let _ = usage.print();
            match usage.use_stderr() {
                false => 0,
                true if is_restore() => RESTORE_FAILED,
                true => USAGE,
            }
        }
    });
    ExitCode::from(code.unwrap_or_else(|_| if is_restore() { RESTORE_FAILED } else { ANYTHING_ELSE }))
}

/// Whether PostgreSQL may be reading the exit code: `restore` was typed, or a WAL file was named behind something else
/// that was meant for it.
fn is_restore() -> bool {
    std::env::args_os().skip(1).any(|argument| {
        argument == "restore" || argument.to_str().is_some_and(|argument| WalName::parse(argument).is_ok())
    })
}
