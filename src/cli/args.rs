//! What can be typed.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Fetches archived WAL back, and does what is done outside a server.
#[derive(Debug, Parser)]
#[command(
    name = "archiver",
    version,
    about = "WAL archive of a PostgreSQL cluster",
    after_help = "A setting comes from its flag, else from the environment (ARCHIVER_STORAGE, ARCHIVER_SERVER_NAME, …), \
                  else from the archiver.* lines of the server's configuration, which is found through the data directory."
)]
pub struct Arguments {
    /// URL of the archive, for example file:///srv/wal
    #[arg(long, value_name = "URL", global = true)]
    pub storage: Option<String>,

    /// Name of the cluster's directory below the URL
    #[arg(long, value_name = "NAME", global = true)]
    pub server_name: Option<String>,

    /// Data directory of the server [default: the one above the pg_wal in DEST, else the current directory]
    #[arg(short = 'D', long = "data-directory", value_name = "DATADIR", global = true)]
    pub data_directory: Option<PathBuf>,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fetch one WAL file; the restore_command
    Restore(Restore),
}

#[derive(Args, Debug)]
#[command(after_help = "In postgresql.conf:\n  restore_command = 'archiver restore %f %p'\n\n\
    Exit codes: 0 restored; 1 the archive was seen and holds no such file; 255 any other failure, so that PostgreSQL \
    stops rather than promotes early; 2 instead of 255 where the data directory holds standby.signal, so that the \
    standby keeps asking.")]
pub struct Restore {
    /// The WAL file wanted: %f in restore_command
    pub name: String,

    /// Where it goes: %p in restore_command
    pub dest: PathBuf,

    /// Take NAME.partial where the whole segment is not there
    #[arg(long)]
    pub partial: bool,

    /// What a standby does on a failure other than "not there": ask again, or stop the server
    #[arg(long, value_enum, default_value = "retry")]
    pub on_error: OnError,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    Retry,
    Stop,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }
}
