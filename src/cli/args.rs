//! What can be typed.

use archiver_core::config::Setting;
use archiver_core::deletion::{Bound, Keep};
use archiver_core::wal::WalName;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Archives WAL, fetches it back, and does what is done outside a server.
#[derive(Debug, Parser)]
#[command(
    name = "archiver",
    version,
    about = "WAL archive of a PostgreSQL cluster",
    after_help = "A setting comes from its flag, else from the environment (ARCHIVER_STORAGE, ARCHIVER_SERVER_NAME, …), \
                  else from the archiver.* lines of the server's configuration, which is found through the data \
                  directory.\n\n\
                  Exit codes: 0 done; 1 the answer is no; 2 usage; 3 configuration; 4 storage or anything else. \
                  Those of restore are its own.\n\n\
                  Examples:\n  \
                  archiver --storage file:///srv/wal list\n  \
                  archiver -D /var/lib/postgresql/15/main exists 000000010000000200000042"
)]
pub struct Arguments {
    /// URL of the archive, for example file:///srv/wal
    #[arg(long, value_name = "URL", global = true)]
    pub storage: Option<String>,

    /// Name of the cluster's directory below the URL
    #[arg(long, value_name = "NAME", global = true)]
    pub server_name: Option<String>,

    /// Data directory of the server [default: the one above the pg_wal in DEST or PATH, else the current one]
    #[arg(short = 'D', long = "data-directory", value_name = "DATADIR", global = true)]
    pub data_directory: Option<PathBuf>,

    /// File of the OpenPGP secret keys that encrypted files are read with
    #[arg(long, value_name = "FILE", global = true)]
    pub decryption_keys: Option<String>,

    /// Command that prints the passphrase of those keys, where they have one
    #[arg(long, value_name = "COMMAND", global = true)]
    pub decryption_passphrase_command: Option<String>,

    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// What was typed for a setting.
    pub fn flag(&self, setting: Setting) -> Option<String> {
        let given = match (setting, &self.command) {
            (Setting::Storage, _) => &self.storage,
            (Setting::ServerName, _) => &self.server_name,
            (Setting::Compression, Command::Archive(archive)) => &archive.compression,
            (Setting::CompressionLevel, Command::Archive(archive)) => &archive.compression_level,
            (Setting::Encryption, Command::Archive(archive)) => &archive.encryption,
            (Setting::EncryptionRecipients, Command::Archive(archive)) => &archive.encryption_recipients,
            (Setting::DecryptionKeys, _) => &self.decryption_keys,
            (Setting::DecryptionPassphraseCommand, _) => &self.decryption_passphrase_command,
            (Setting::ArchiverBatchSize, Command::Archive(archive)) => &archive.batch_size,
            (Setting::MemoryLimit, Command::Archive(archive)) => &archive.memory_limit,
            (Setting::RetryTimeout, Command::Archive(archive)) => &archive.retry_timeout,
            (Setting::RestorePrefetch, Command::Restore(restore)) => &restore.restore_prefetch,
            (Setting::StreamingConninfo, Command::ReceiveWal(receive)) => &receive.streaming_conninfo,
            (Setting::StreamingArchiverName, Command::ReceiveWal(receive)) => &receive.streaming_archiver_name,
            (Setting::SlotName, Command::ReceiveWal(receive)) => &receive.slot_name,
            (Setting::CreateSlot, Command::ReceiveWal(receive)) => &receive.create_slot,
            (Setting::StreamingWalsDirectory, Command::ReceiveWal(receive)) => &receive.streaming_wals_directory,
            (Setting::StreamingWalsDirectory, Command::Restore(restore)) => &restore.streaming_wals_directory,
            (Setting::StreamingArchiverBatchSize, Command::ReceiveWal(receive)) => {
                &receive.streaming_archiver_batch_size
            }
            (Setting::StreamingPartialInterval, Command::ReceiveWal(receive)) => &receive.streaming_partial_interval,
            (Setting::PathPrefix, Command::ReceiveWal(receive)) => &receive.path_prefix,
            _ => &None,
        };
        given.clone()
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Fetch one WAL file; the restore_command
    Restore(Restore),
    /// Archive WAL files; an archive_command
    Archive(Archive),
    /// List the archived files
    List(List),
    /// Say whether a file is in the archive, and where
    Exists(Exists),
    /// Read archived files back and judge whether they are what was archived
    Verify(Verify),
    /// Say which segments the archive lacks
    Gaps(Gaps),
    /// Make the records of a local archive anew
    Rebuild(Rebuild),
    /// Show how archiving stands
    Status(Status),
    /// Judge whether archiving works
    Check(Check),
    /// Show files that were refused or set aside, and remove one of the latter
    Errors(Errors),
    /// Delete WAL that nobody needs any more; an archive_cleanup_command
    Delete(Delete),
    /// Receive WAL while it is written, and archive it; needs pg_receivewal and psql
    ReceiveWal(ReceiveWal),
    /// Fetch ahead of a server in recovery; started by restore
    #[command(hide = true)]
    Prefetch,
}

#[derive(Args, Debug)]
#[command(
    after_help = "A file is archived once it and its line in the catalogue are durable. The same content again is \
    success, other content under the same name is refused, and an archive belongs to one cluster: that of the data \
    directory, else the one that wrote the first segment named.\n\n\
    DIR is read as Barman's incoming directory: segments, partial ones, backup labels and histories are archived in \
    PostgreSQL's order and then removed; hidden files and *.tmp are left alone, and so is a partial segment without \
    the history of a later timeline. Other files, and those of which the archive holds another one, are errors and are \
    moved to the archive's folder of errors. Bring files there under another name and rename them. A server's own pg_wal and an archive are refused.\n\n\
    The hook scripts that are set (archiver.pre_archive_script and so on, or ARCHIVER_PRE_ARCHIVE_SCRIPT) run around \
    each file; what they write goes to standard error.\n\n\
    Exit codes: 0 all of it is archived; 2 usage; 3 configuration; 4 storage or anything else, also where one file of \
    many was refused.\n\n\
    Examples:\n  \
    archive_command = 'archiver archive %p'\n  \
    archiver --storage file:///srv/wal archive /var/lib/incoming\n  \
    archiver -D /var/lib/postgresql/15/main archive --keep --verbose /mnt/rescued"
)]
pub struct Archive {
    /// WAL files (%p in archive_command), or one directory
    #[arg(value_name = "PATH", required = true)]
    pub paths: Vec<PathBuf>,

    /// Leave the files of the directory where they are
    #[arg(long)]
    pub keep: bool,

    /// One line a file
    #[arg(long)]
    pub verbose: bool,

    /// No summary of a directory
    #[arg(long, conflicts_with = "verbose")]
    pub quiet: bool,

    /// One JSON object: what became of each file, and the summary
    #[arg(long, conflicts_with_all = ["verbose", "quiet"])]
    pub json: bool,

    /// How the files are compressed: none, gzip, pigz, bzip2, xz, zstd, lz4, snappy or custom
    #[arg(long, value_name = "FORMAT")]
    pub compression: Option<String>,

    /// low, medium, high or a number
    #[arg(long, value_name = "LEVEL")]
    pub compression_level: Option<String>,

    /// How they are encrypted: none or openpgp
    #[arg(long, value_name = "NAME")]
    pub encryption: Option<String>,

    /// File of the OpenPGP public keys they are encrypted to
    #[arg(long, value_name = "FILE")]
    pub encryption_recipients: Option<String>,

    /// Files of the directory that are archived in one run; 0 means all
    #[arg(long, value_name = "NUMBER")]
    pub batch_size: Option<String>,

    /// Bound on the memory of all buffers, for example 64MB; a segment too large for it is streamed
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<String>,

    /// How long failures that may pass are tried again, for example 60s
    #[arg(long, value_name = "TIME")]
    pub retry_timeout: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Files come by timeline, each timeline's history first. A range goes by the order in which \
    PostgreSQL archives: history files stand before all others, so --from SEGMENT leaves them out. A size that the \
    archive's records do not tell (Barman keeps none) is shown as - and in JSON as null.\n\n\
    Exit codes: 0 listed; 2 usage; 3 configuration; 4 storage or anything else, also where no archive is to be seen, \
    or another cluster's.\n\n\
    Examples:\n  \
    archiver list\n  \
    archiver list --from 000000010000000200000000 --to 0000000100000002000000FF\n  \
    archiver --storage file:///srv/wal list --json | jq 'map(.stored_size) | add'")]
pub struct List {
    /// The first file wanted
    #[arg(long, value_name = "NAME", value_parser = WalName::parse)]
    pub from: Option<WalName>,

    /// The last file wanted
    #[arg(long, value_name = "NAME", value_parser = WalName::parse)]
    pub to: Option<WalName>,

    /// One JSON array of objects
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Exit codes: 0 it is there, its place is printed; 1 the archive was seen and holds no such file; \
    2 usage; 3 configuration; 4 storage or anything else: nobody knows whether it is there.\n\n\
    Example:\n  archiver exists 000000010000000200000042 && echo archived"
)]
pub struct Exists {
    /// The WAL file
    #[arg(value_parser = WalName::parse)]
    pub name: WalName,

    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Every file is fetched, decoded and compared with what was noted when it was archived; of a segment \
    every page is looked at, a history file and a backup label are read. Nothing is written.\n\n\
    ok          it is what was archived\n\
    unverified  all that it says of itself is right; no hash was noted when it was archived (Barman notes none)\n\
    damaged     it is not what was archived, or not what its name says\n\
    missing     the archive's records name it, and it is not there; a bucket has no records: see gaps\n\
    unreadable  it could not be read, so nobody knows\n\n\
    Exit codes: 0 nothing is damaged, missing or unreadable; 1 something is, or a range holds no file at all; 2 usage; \
    3 configuration; 4 storage or anything else, also where no archive is to be seen, or another cluster's.\n\n\
    Examples:\n  \
    archiver -D /var/lib/postgresql/15/main verify\n  \
    archiver verify --from 000000010000000200000000 --to 0000000100000002000000FF\n  \
    archiver verify --json | jq 'map(select(.state != \"ok\"))'"
)]
pub struct Verify {
    /// The first file wanted
    #[arg(long, value_name = "NAME", value_parser = WalName::parse)]
    pub from: Option<WalName>,

    /// The last file wanted
    #[arg(long, value_name = "NAME", value_parser = WalName::parse)]
    pub to: Option<WalName>,

    /// One JSON array of objects, of all files
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Gaps are runs of segments that are missing between others of their timeline, or between a \
    timeline and the one that it comes from, as the archived history files tell; and whatever the archive's own records \
    name and is not there (a bucket has no records). What lies before everything that is there was deleted, and what \
    lies behind it may be on its way: neither is a gap.\n\n\
    Exit codes: 0 no gaps; 1 a gap, or a history file that cannot be read and may hide one; 2 usage; 3 configuration; 4 \
    storage or anything else, also where no archive is to be seen, or another cluster's.\n\n\
    Examples:\n  \
    archiver -D /var/lib/postgresql/15/main gaps\n  \
    archiver gaps --json | jq 'map(.segments) | add'")]
pub struct Gaps {
    /// One JSON array of objects
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Catalogue and sums are made from what is stored: a file whose sum is missing is read back, a sum that fits \
    stays, lines keep their order, and lines of files that are not there go and are told. Archiving may go on meanwhile. \
    Nothing else is changed; a damaged file gets no new sum. A bucket has no records.\n\n\
    Exit codes: 0 done; 1 done, but for files that could not be read; 2 usage; 3 configuration, also where a bucket is \
    meant; 4 storage or anything else, also where no archive is to be seen, or another cluster's.\n\n\
    Example:\n  archiver --storage file:///srv/wal rebuild"
)]
pub struct Rebuild {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "What only a session can see (PostgreSQL's own counters) is in the view archiver.status. Of the \
    archiver process it is shown what that tells of itself, while it runs. What is not known is shown as - and in JSON as null.\n\n\
    Exit codes: 0 shown; 2 usage; 3 configuration; 4 anything else.\n\n\
    Examples:\n  \
    archiver -D /var/lib/postgresql/15/main status\n  \
    archiver status --json | jq .queue_files"
)]
pub struct Status {
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Nothing is written. What only a session can see is judged by archiver.check() in SQL.\n\n\
    Exit codes: 0 nothing failed (there may be warnings); 1 something failed; 2 usage; 4 anything else. With --nagios: \
    0 ok; 1 a warning; 2 something failed; 3 unknown.\n\n\
    Examples:\n  \
    archiver -D /var/lib/postgresql/15/main check\n  \
    archiver check --json | jq 'map(select(.state == \"failed\"))'\n  \
    archiver check --metrics > wal.prom.new; mv wal.prom.new /var/lib/node_exporter/wal.prom")]
pub struct Check {
    /// One JSON array of objects
    #[arg(long)]
    pub json: bool,

    /// One line, and the exit codes of Nagios plugins
    #[arg(long, conflicts_with = "json")]
    pub nagios: bool,

    /// Figures for a monitor, as OpenMetrics text
    #[arg(long, conflicts_with_all = ["json", "nagios"])]
    pub metrics: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Refused files lie in pg_wal, because the archive holds another of their name; what to do about \
    them is for people to decide, and nothing here touches them. Files that were set aside lie in the archive's folder of \
    errors, where --clear removes one.\n\n\
    Exit codes: 0 there are none, or the one named was removed; 1 there are some, or none of that name; 2 usage; \
    3 configuration; 4 storage or anything else.\n\n\
    Examples:\n  \
    archiver errors\n  \
    archiver errors --clear 000000010000000000000042.20261121T101752Z.duplicate"
)]
pub struct Errors {
    /// Remove the file of exactly this name: the last part of its location
    #[arg(long, value_name = "NAME")]
    pub clear: Option<String>,

    /// One JSON array of objects; of --clear one object
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(
    after_help = "What goes: segments, partial ones, backup labels and parts of segments that were being received, before \
    NAME, on the timeline of NAME and, up to where it left them, on those that its history file names. History files \
    stay, and so does every other timeline and what lies behind a switch point. Without that history file in the archive only the timeline of NAME counts.\n\n\
    NAME and the ends of a range are segments, partial ones or backup labels; a label stands for the segment that its \
    backup starts in. Files go first, their lines in the catalogue after them; a run that was killed is finished by the \
    next one with the same NAME.\n\n\
    Exit codes: 0 done, also where there was nothing to do; 2 usage; 3 configuration; 4 storage or anything else, also \
    where one file of many could not be deleted.\n\n\
    Examples:\n  \
    archiver delete --before 000000010000000200000042\n  \
    archiver delete --before 000000010000000200000042.00000028.backup --yes\n  \
    archiver delete --before 000000020000000500000000 --keep 000000010000000200000042..000000010000000200000044\n  \
    archive_cleanup_command = 'archiver delete --before %r --yes --quiet'  (an archive for this standby alone)"
)]
pub struct Delete {
    /// The first WAL file that is still needed; %r in archive_cleanup_command
    #[arg(long, value_name = "NAME", value_parser = Bound::parse)]
    pub before: Bound,

    /// Files that stay all the same, both ends included; may be given several times
    #[arg(long, value_name = "FROM..TO", value_parser = Keep::parse)]
    pub keep: Vec<Keep>,

    /// Delete; without it only show what would go
    #[arg(long)]
    pub yes: bool,

    /// Only what went wrong
    #[arg(long, conflicts_with = "json")]
    pub quiet: bool,

    /// One JSON object: each file, and the summary
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "In postgresql.conf:\n  restore_command = 'archiver restore %f %p'\n\n\
    Exit codes: 0 restored; 1 the archive was seen and holds no such file; 255 any other failure, so that PostgreSQL \
    stops rather than promotes early; 2 instead of 255 where the data directory holds standby.signal, so that the \
    standby keeps asking.\n\n\
    While a server recovers, the segments after the one it asks for are fetched ahead into pg_wal/archiver_prefetch by a \
    process that ends by itself. Only DEST pg_wal/RECOVERYXLOG, which the server's own recovery gives, starts it.")]
pub struct Restore {
    /// The WAL file wanted: %f in restore_command
    pub name: String,

    /// Where it goes: %p in restore_command
    pub dest: PathBuf,

    /// Take NAME.partial where the whole segment is neither in the archive nor where WAL is received
    #[arg(long)]
    pub partial: bool,

    /// What a standby does on a failure other than "not there": ask again, or stop the server
    #[arg(long, value_enum, default_value = "retry")]
    pub on_error: OnError,

    /// Directory on this machine that WAL is received in: what is not archived yet comes from there
    #[arg(long, value_name = "DIR")]
    pub streaming_wals_directory: Option<String>,

    /// Segments fetched ahead during recovery; 0 means none
    #[arg(long, value_name = "NUMBER")]
    pub restore_prefetch: Option<String>,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Runs until a signal ends it. PostgreSQL's own pg_receivewal receives into a directory of its own; each segment is \
    archived from there once it is whole, by the storage, formats, hooks and rules of every other archiving. What goes wrong is told on \
    standard error and tried again, at most a minute later.\n\n\
    The role needs the attribute REPLICATION, and a line for the database \"replication\" in pg_hba.conf. Passwords come from a password \
    file (PGPASSFILE, ~/.pgpass) or a service file. Without a slot the server may remove WAL that was not received yet.\n\n\
    Exit codes: 0 ended by a signal, or the reset is done; 2 usage; 3 configuration; 4 anything else.\n\n\
    Examples:\n  \
    archiver --storage file:///srv/wal --server-name db1 receive-wal --streaming-conninfo 'host=db1 user=streamer' --slot-name archiver --create-slot auto --begin\n  \
    archiver --storage file:///srv/wal --server-name db1 receive-wal --streaming-conninfo 'host=db1 user=streamer' --slot-name archiver --reset"
)]
pub struct ReceiveWal {
    /// Begin where the server or its slot is, though WAL before that was not received, and end; the archive keeps a gap
    #[arg(long)]
    pub reset: bool,

    /// Begin an archive where there is none; without it a directory that is not mounted is told
    #[arg(long)]
    pub begin: bool,

    /// Connection string of the server, without a password [default: what the environment says, as for psql]
    #[arg(long, value_name = "CONNINFO")]
    pub streaming_conninfo: Option<String>,

    /// Name the server knows the receiver by, as in synchronous_standby_names
    #[arg(long, value_name = "NAME")]
    pub streaming_archiver_name: Option<String>,

    /// Replication slot to receive through
    #[arg(long, value_name = "NAME")]
    pub slot_name: Option<String>,

    /// Whether that is made where it is missing: auto or manual
    #[arg(long, value_name = "HOW")]
    pub create_slot: Option<String>,

    /// Directory to receive in [default: streaming/ beside the archived WAL of a file: storage]
    #[arg(long, value_name = "DIR")]
    pub streaming_wals_directory: Option<String>,

    /// Received files that are archived in one run; 0 means all
    #[arg(long, value_name = "NUMBER")]
    pub streaming_archiver_batch_size: Option<String>,

    /// How often what was received of the current segment is put into the storage; 0 means never
    #[arg(long, value_name = "TIME")]
    pub streaming_partial_interval: Option<String>,

    /// Directories to look for pg_receivewal and psql in before those of PATH
    #[arg(long, value_name = "DIRS")]
    pub path_prefix: Option<String>,
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
