//! WAL that is received while it is written, by `archiver receive-wal` from a real primary.

use crate::cluster::{Cluster, Stop, bindir, catalogue, has_equal_content, paths, text, wait_at_most, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

/// A server that WAL is received from; it archives nothing itself.
pub fn primary() -> Cluster {
    Cluster::new(1).with("archive_mode", "off").with("archive_library", "").with("max_replication_slots", "4").started()
}

/// An archive host: storage and streaming directory of its own.
pub struct Host {
    directory: TempDir,
    storage: String,
    flags: Vec<String>,
}

/// A running `archiver receive-wal`.
pub struct Running {
    child: Child,
    heard: PathBuf,
    /// How much had been heard before.
    mark: usize,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("ah").tempdir().unwrap();
        fs::create_dir(directory.path().join("archive")).unwrap();
        let storage = format!("file://{}", directory.path().join("archive").display());
        Host { directory, storage, flags: vec!["--begin".to_string()] }
    }

    /// One that receives beside its archive.
    pub fn receiving_elsewhere() -> Self {
        let host = Self::new();
        fs::create_dir(host.path("received")).unwrap();
        let received = host.path("received").display().to_string();
        host.with(&["--streaming-wals-directory", &received])
    }

    /// The same with its archive elsewhere.
    pub fn archiving_to(self, url: &str) -> Self {
        Host { storage: url.to_string(), ..self }
    }

    pub fn with(mut self, flags: &[&str]) -> Self {
        self.flags.extend(flags.iter().map(ToString::to_string));
        self
    }

    fn with_slot() -> Self {
        Self::new().with(&["--slot-name", "archiver", "--create-slot", "auto"])
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.directory.path().join(relative)
    }

    fn streaming(&self) -> PathBuf {
        self.path("archive/main/streaming")
    }

    fn program(&self, primary: &Cluster) -> Command {
        let mut command = primary.client("archiver");
        let prefix = std::env::join_paths([bindir(), Path::new("/usr/bin"), Path::new("/bin")]).unwrap();
        command.env("PATH", prefix).env("PGAPPNAME", "other").current_dir(self.directory.path());
        command.arg("--storage").arg(&self.storage);
        command
    }

    fn command(&self, primary: &Cluster) -> Command {
        let mut command = self.program(primary);
        command.arg("receive-wal").args(&self.flags);
        command
    }

    fn start(&self, primary: &Cluster) -> Running {
        self.spawn(self.command(primary))
    }

    fn spawn(&self, mut command: Command) -> Running {
        let heard = self.path("heard");
        let log = File::options().append(true).create(true).open(&heard).unwrap();
        let mark = fs::read(&heard).unwrap().len();
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        Running { child, heard, mark }
    }

    /// The same by the user that runs the server, who may use what is there then.
    pub fn start_as_the_servers_user(&self, primary: &Cluster) -> Running {
        let owner = fs::metadata(primary.data()).unwrap();
        for folder in ["archive", "received"].map(|folder| self.path(folder)).iter().filter(|folder| folder.exists()) {
            chown(folder, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
        fs::set_permissions(self.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut command = primary.archiver_program();
        // Not one of the server's processes.
        command.current_dir(self.path("archive"));
        command.env("PGHOST", primary.directory()).env("PGUSER", "postgres").arg("--storage").arg(&self.storage);
        command.arg("receive-wal").args(&self.flags).arg("--path-prefix").arg(bindir());
        self.spawn(command)
    }

    fn reset(&self, primary: &Cluster) -> Output {
        self.command(primary).arg("--reset").output().unwrap()
    }

    fn archived(&self) -> Vec<String> {
        catalogue(&self.path("archive"))
    }

    fn wait_for(&self, names: &[String]) {
        wait_until("what was received is archived", || {
            let archived: BTreeSet<String> = self.archived().into_iter().collect();
            names.iter().all(|name| archived.contains(name))
        });
    }

    /// Every archived segment is the one in the primary's pg_wal, and has one line.
    fn assert_equal_to(&self, primary: &Cluster) -> usize {
        let lines = self.archived();
        assert_eq!(lines.len(), lines.iter().collect::<BTreeSet<_>>().len(), "{lines:?}");
        let copy = self.path("restored");
        let mut compared = 0;
        for name in lines.iter().filter(|name| name.len() == 24) {
            let restored = self.program(primary).arg("restore").arg(name).arg(&copy).output().unwrap();
            assert_eq!(restored.status.code(), Some(0), "{name}: {}", text(&restored.stderr));
            assert!(has_equal_content(&primary.pg_wal(name), &copy), "{name}");
            compared += 1;
        }
        compared
    }

    /// What lies in the streaming directory, without what is hidden.
    fn received(&self) -> Vec<String> {
        self.names_in("archive/main/streaming")
    }

    fn names_in(&self, folder: &str) -> Vec<String> {
        let name = |path: PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
        let folder = self.path(folder);
        let all = if folder.exists() { paths(&folder) } else { Vec::new() };
        let mut names: Vec<String> = all.into_iter().map(name).filter(|name| !name.starts_with('.')).collect();
        names.sort();
        names
    }
}

impl Running {
    fn heard(&self) -> String {
        let mut text = String::new();
        File::open(&self.heard).unwrap().read_to_string(&mut text).unwrap();
        text
    }

    #[track_caller]
    fn wait_to_hear(&self, part: &str) {
        self.wait(&format!("{part:?} is heard"), || self.heard().contains(part));
    }

    /// Waits while it runs.
    #[track_caller]
    fn wait(&self, what: &str, mut condition: impl FnMut() -> bool) {
        wait_until(what, || {
            let is_met = condition();
            assert!(is_met || !is_gone(self.pid()), "receive-wal has ended before {what}");
            is_met
        });
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    fn receivewal(&self) -> Option<Pid> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).ok()?;
        let of_name = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "pg_receivewal")
        };
        children.split_whitespace().find(of_name).map(|pid| Pid::from_raw(pid.parse().unwrap()))
    }

    fn wait_for_receivewal(&self) -> Pid {
        // Where it begins is settled by then.
        let has_begun = || self.heard()[self.mark..].contains("starting log streaming");
        self.wait("pg_receivewal runs", || has_begun() && self.receivewal().is_some());
        self.receivewal().unwrap()
    }

    /// Ends it where another program of another user stands before it.
    fn end_all(&mut self, signal: Signal) {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap_or_default();
        for pid in children.split_whitespace().map(|pid| Pid::from_raw(pid.parse().unwrap())).chain([self.pid()]) {
            let _ = kill(pid, signal);
        }
        self.child.wait().unwrap();
    }

    fn stop(mut self) -> i32 {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        self.child.wait().unwrap().code().expect("an exit code")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("== heard of receive-wal\n{}", self.heard());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_gone(pid: Pid) -> bool {
    // A process that has ended and was not reaped yet is gone as well.
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

/// The names of the segments that the primary has completed from now on.
pub fn write(primary: &Cluster, segments: u32) -> Vec<String> {
    let current = || primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let first = current();
    primary.write_segments(segments);
    // The newest segment is kept back: there is a newer one.
    primary.psql("SELECT pg_logical_emit_message(true, 'test', 'more')");
    let names: BTreeSet<String> =
        paths(&primary.pg_wal("")).iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_string()).collect();
    let last = current();
    names.into_iter().filter(|name| name.len() == 24 && *name >= first && *name < last).collect()
}

#[test]
fn wal_is_received_and_archived_while_it_is_written_and_a_restart_goes_on() {
    let (primary, host) = (primary(), Host::with_slot());
    let running = host.start(&primary);
    running.wait_for_receivewal();
    running.wait_to_hear("made the replication slot \"archiver\"");
    let state = || primary.psql("SELECT application_name, state FROM pg_stat_replication");
    running.wait("it streams", || state() == "archiver_receive_wal|streaming");
    // What there is of the first segment can be restored before any is whole.
    primary.psql("SELECT pg_logical_emit_message(true, 'test', 'first')");
    let (first, copy) = (primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())"), host.path("copy"));
    running.wait("a part is restored", || {
        let mut command = host.program(&primary);
        let output = command.arg("restore").arg("--partial").arg(&first).arg(&copy).output().unwrap();
        output.status.success() && fs::read(&copy).unwrap().windows(5).any(|bytes| bytes == b"first")
    });
    assert_eq!(host.received(), [format!("{first}.partial")]);
    let mut names = write(&primary, 5);
    host.wait_for(&names);
    running.wait("only what is being received stays", || host.received().len() == 1);
    let receivewal = running.wait_for_receivewal();
    assert_eq!(running.stop(), 0);
    assert!(is_gone(receivewal));
    // The slot keeps what is written meanwhile.
    names.extend(write(&primary, 3));
    let running = host.start(&primary);
    host.wait_for(&names);
    assert_eq!(running.stop(), 0);
    assert_eq!(host.assert_equal_to(&primary), names.len());
}

#[test]
fn the_receiver_ends_with_a_parent_that_is_killed_and_serves_one_directory() {
    let (primary, host) = (primary(), Host::with_slot());
    let mut running = host.start(&primary);
    let receivewal = running.wait_for_receivewal();
    let second = host.command(&primary).output().unwrap();
    assert_eq!(second.status.code(), Some(3), "{}", text(&second.stderr));
    assert!(text(&second.stderr).contains("another receiver works in"), "{}", text(&second.stderr));
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    wait_until("pg_receivewal has ended", || is_gone(receivewal));
}

#[test]
fn killed_at_any_moment_it_loses_nothing_and_stores_nothing_twice() {
    let kills = crate::cluster::figure("ARCHIVER_TEST_KILLS", 8);
    let (primary, host) = (primary(), Host::with_slot());
    let mut running = host.start(&primary);
    running.wait_for_receivewal();
    let mut names = Vec::new();
    for number in 0..kills {
        names.extend(write(&primary, 3));
        // Now the program and with it the receiver, now the receiver alone; at moments that its progress sets.
        if number % 3 == 0 {
            kill(running.wait_for_receivewal(), Signal::SIGKILL).unwrap();
        } else {
            let before = host.archived().len();
            if number % 3 == 1 {
                wait_until("something was archived since", || host.archived().len() > before);
            }
            running.child.kill().unwrap();
            running.child.wait().unwrap();
            running = host.start(&primary);
        }
    }
    names.extend(write(&primary, 2));
    host.wait_for(&names);
    let heard = running.heard();
    assert_eq!(running.stop(), 0);
    assert!(!heard.contains("another file"), "{heard}");
    assert!(host.assert_equal_to(&primary) >= names.len());
    assert!(paths(&host.path("archive/main/errors")).is_empty());
}

#[test]
fn what_both_ways_bring_is_stored_once() {
    let (cluster, host) = (Cluster::new(1).started(), Host::with_slot());
    cluster.set("archiver.storage", &host.storage);
    cluster.reload();
    let mut running = host.start_as_the_servers_user(&cluster);
    cluster.write_segments(1);
    cluster.drain();
    running.wait("it streams", || cluster.psql("SELECT count(*) FROM pg_stat_replication") == "1");
    let names = write(&cluster, 10);
    cluster.drain();
    host.wait_for(&names);
    running.wait("what was received is archived", || host.received().len() == 1);
    let archived = host.archived();
    assert_eq!(archived.len(), archived.iter().collect::<BTreeSet<_>>().len(), "{archived:?}");
    assert!(paths(&host.path("archive/main/errors")).is_empty());
    assert!(!running.heard().contains("could not"), "{}", running.heard());
    assert!(!cluster.log().contains("could not archive"), "{}", cluster.log());
    running.end_all(Signal::SIGTERM);
}

#[test]
fn a_streaming_directory_that_cannot_be_made_is_told() {
    let (primary, host) = (primary(), Host::with_slot());
    let host = host.with(&["--streaming-wals-directory", "/proc/streaming"]);
    let output = host.command(&primary).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(
        text(&output.stderr).contains("could not create directory \"/proc/streaming\""),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_batch_of_one_archives_everything_and_takes_no_foreign_file_for_wal() {
    let primary = primary();
    let host = Host::with_slot().with(&["--streaming-archiver-batch-size", "1"]);
    fs::create_dir_all(host.streaming()).unwrap();
    fs::write(host.streaming().join("#notes"), "x").unwrap();
    let running = host.start(&primary);
    running.wait_for_receivewal();
    let names = write(&primary, 4);
    host.wait_for(&names);
    running.wait_to_hear("\"#notes\" is not the name of a WAL file");
    wait_until("it is set aside", || paths(&host.path("archive/main/errors")).len() == 1);
    assert!(!host.streaming().join("#notes").exists());
    assert_eq!(running.stop(), 0);
}

#[test]
fn what_a_crash_cut_short_is_received_again() {
    let (primary, host) = (primary(), Host::with_slot());
    let running = host.start(&primary);
    running.wait_for_receivewal();
    let mut names = write(&primary, 2);
    host.wait_for(&names);
    assert_eq!(running.stop(), 0);
    let partial = host.received().pop().unwrap();
    assert!(partial.ends_with(".partial"), "{partial}");
    File::options().write(true).open(host.streaming().join(&partial)).unwrap().set_len(12_345).unwrap();
    names.extend(write(&primary, 2));
    let running = host.start(&primary);
    running.wait_to_hear(&format!("\"{partial}\" was cut short by a crash and is received again"));
    host.wait_for(&names);
    assert_eq!(running.stop(), 0);
    assert_eq!(host.assert_equal_to(&primary), names.len());
}

#[test]
fn a_reset_leaves_a_gap_and_never_goes_back() {
    let primary = primary();
    let host = Host::new().with(&["--streaming-partial-interval", "1s"]);
    let reset = |expected: &str| {
        let output = host.reset(&primary);
        assert_eq!(
            (output.status.code(), text(&output.stdout).trim()),
            (Some(0), expected),
            "{}",
            text(&output.stderr)
        );
    };
    reset("nothing to do");
    let running = host.start(&primary);
    running.wait_for_receivewal();
    let names = write(&primary, 2);
    host.wait_for(&names);
    let left = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let kept = || host.names_in("archive/main/partial");
    let is_kept = |segment: &str| kept().iter().any(|name| name.starts_with(segment));
    running.wait("a part is kept", || is_kept(&left));
    assert_eq!(running.stop(), 0);
    reset("nothing to do");
    write(&primary, 3);
    let current = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    reset(&format!("receiving begins with {current}"));
    assert_eq!(host.received().pop(), Some(format!("{current}.partial")));
    assert_eq!(fs::metadata(host.streaming().join(format!("{current}.partial"))).unwrap().len(), 0);
    let running = host.start(&primary);
    running.wait_for_receivewal();
    host.wait_for(&write(&primary, 2));
    // What there was of the segment that was left is archived as such, and no shorter part of it is kept.
    host.wait_for(&[format!("{left}.partial")]);
    running.wait("the part is removed", || !is_kept(&left));
    assert_eq!(running.stop(), 0);
    let gaps = host.program(&primary).arg("gaps").output().unwrap();
    assert_eq!(gaps.status.code(), Some(1), "{}", text(&gaps.stdout));

    // What lies there is newer than the server's: nothing is touched.
    let newer = host.streaming().join("0000000100000001000000FF.partial");
    fs::write(&newer, "").unwrap();
    let before = host.received();
    let output = host.reset(&primary);
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("is newer than that of the server"), "{}", text(&output.stderr));
    assert_eq!(host.received(), before);
}

#[test]
fn a_commit_waits_for_a_synchronous_receiver_only() {
    let (primary, host) = (primary(), Host::with_slot());
    primary.psql("CREATE TABLE t (n int)");
    primary.set("synchronous_standby_names", "FIRST 1 (archiver_receive_wal)");
    primary.reload();
    wait_until("the setting is heeded", || primary.psql("SHOW synchronous_standby_names").contains("receive"));
    let running = host.start(&primary);
    wait_until("it is synchronous", || primary.psql("SELECT sync_state FROM pg_stat_replication") == "sync");
    // Flushed by the receiver before the commit was answered: its record ends behind what was inserted before.
    let inserted = "INSERT INTO t SELECT generate_series(1, 100); SELECT pg_current_wal_insert_lsn(); COMMIT";
    let inserted = primary.psql(&format!("BEGIN; {inserted}"));
    assert_eq!(primary.psql(&format!("SELECT flush_lsn > '{inserted}' FROM pg_stat_replication")), "t");
    assert_eq!(running.stop(), 0);
    let mut waiting =
        primary.client("psql").args(["-Xqd", "postgres", "-c", "INSERT INTO t VALUES (0)"]).spawn().unwrap();
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    wait_until("the commit waits", || primary.psql(waits) == "1");
    assert!(waiting.try_wait().unwrap().is_none());
    let running = host.start(&primary);
    wait_until("it is answered", || waiting.try_wait().unwrap().is_some());
    assert_eq!(running.stop(), 0);
    primary.unset("synchronous_standby_names");
    primary.reload();
}

#[test]
fn what_keeps_wal_from_being_received_is_told_with_what_mends_it_and_tried_again() {
    let primary = primary();
    primary.psql("CREATE ROLE plain LOGIN; CREATE ROLE streamer LOGIN REPLICATION PASSWORD 'sesame'");
    let hba = fs::read_to_string(primary.data().join("pg_hba.conf")).unwrap();
    primary.write_file(
        &primary.data().join("pg_hba.conf"),
        format!("local replication streamer scram-sha-256\n{hba}").as_bytes(),
    );
    primary.reload();
    primary.psql("SELECT pg_create_physical_replication_slot('used', true)");
    let using = Host::new().with(&["--slot-name", "used"]);
    let user = using.start(&primary);
    user.wait_for_receivewal();
    wait_until("the slot is in use", || primary.psql("SELECT active FROM pg_replication_slots") == "t");

    for (flags, message, hint) in [
        (&["--streaming-conninfo", "host=/nonexistent"][..], "No such file or directory", "Is the server running"),
        (&["--streaming-conninfo", "user=plain"], "WAL is not being received", "ALTER ROLE"),
        (&["--streaming-conninfo", "user=streamer"], "no password supplied", "PGPASSFILE"),
        (
            &["--slot-name", "absent"],
            "there is no physical replication slot \"absent\"",
            "pg_create_physical_replication_slot('absent', true)",
        ),
        (&["--slot-name", "used"], "the replication slot \"used\" is in use", "set another archiver.slot_name"),
    ] {
        let host = Host::new().with(flags);
        let running = host.start(&primary);
        running.wait_to_hear(message);
        running.wait_to_hear(hint);
        running.wait_to_hear("It is tried again in 1 s.");
        assert!(host.archived().is_empty());
        assert_eq!(running.stop(), 0, "{flags:?}");
    }
    for (flags, code, message) in [
        (&["--streaming-conninfo", "password=sesame"][..], 3, "it holds a password"),
        (&["--streaming-conninfo", "nonsense"], 3, "archiver.streaming_conninfo"),
        (&["--path-prefix", "relative"], 3, "archiver.path_prefix"),
    ] {
        let output = Host::new().with(flags).command(&primary).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert!(
            text(&output.stderr).contains(message) && !text(&output.stderr).contains("sesame"),
            "{}",
            text(&output.stderr)
        );
    }

    // A password from its file is enough.
    let host = Host::new().with(&["--streaming-conninfo", "user=streamer"]);
    fs::write(host.path("pgpass"), "*:*:*:streamer:sesame\n").unwrap();
    fs::set_permissions(host.path("pgpass"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = host.command(&primary);
    command.env("PGPASSFILE", host.path("pgpass"));
    let running = host.spawn(command);
    running.wait_for_receivewal();
    host.wait_for(&write(&primary, 2));
    assert_eq!(running.stop(), 0);
    assert_eq!(user.stop(), 0);
}

#[test]
fn a_server_that_writes_too_little_wal_is_told_and_a_foreign_file_stands_in_nobodys_way() {
    let primary = Cluster::new(1).with("archive_mode", "off").with("archive_library", "");
    let primary = primary.with("wal_level", "minimal").with("max_wal_senders", "0").started();
    let host = Host::new();
    fs::create_dir_all(host.streaming()).unwrap();
    fs::create_dir(host.streaming().join("lost+found")).unwrap();
    fs::write(host.streaming().join("000000010000000000000001.gz"), "foreign").unwrap();
    let running = host.start(&primary);
    running.wait_to_hear("WAL is not being received");
    running.wait_to_hear("Set wal_level to replica and max_wal_senders above");
    assert!(host.archived().is_empty());
    primary.set("wal_level", "replica");
    primary.set("max_wal_senders", "4");
    primary.restart();
    running.wait_for_receivewal();
    host.wait_for(&write(&primary, 2));
    assert_eq!(running.stop(), 0);
}

#[test]
fn a_full_file_system_is_told_and_nothing_incomplete_is_archived() {
    let (primary, host) = (primary(), Host::with_slot());
    // A write that comes short is what a full file system answers with; some versions tell it as such, and some as what it is.
    let mut command = Command::new("/bin/sh");
    let program = host.command(&primary);
    command.arg("-c").arg("ulimit -f 1000; trap '' XFSZ; exec \"$@\"").arg("sh").arg(program.get_program());
    command.args(program.get_args()).current_dir(host.path(""));
    command.envs(program.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let running = host.spawn(command);
    running.wait_to_hear("could not open write-ahead log file");
    let hints = ["Make room on the file system of archiver.streaming_wals_directory.", "(ulimit -f)"];
    running.wait("what mends it is heard", || hints.iter().any(|hint| running.heard().contains(hint)));
    assert!(host.archived().is_empty());
    assert_eq!(running.stop(), 0);
    let names = write(&primary, 2);
    let running = host.start(&primary);
    host.wait_for(&names);
    assert_eq!(running.stop(), 0);
    assert_eq!(host.assert_equal_to(&primary), names.len());
}

#[test]
fn an_old_or_missing_pg_receivewal_is_refused() {
    let primary = primary();
    let host = Host::new();
    let old = host.path("old");
    fs::create_dir(&old).unwrap();
    fs::write(old.join("pg_receivewal"), "#!/bin/sh\necho 'pg_receivewal (PostgreSQL) 14.9'\n").unwrap();
    fs::set_permissions(old.join("pg_receivewal"), fs::Permissions::from_mode(0o755)).unwrap();
    let host = host.with(&["--path-prefix", old.to_str().unwrap()]);
    let running = host.start(&primary);
    running.wait_to_hear("is of version 14, and the server of version");
    assert_eq!(running.stop(), 0);
    let mut command = host.program(&primary);
    let output = command.env("PATH", "/nonexistent").arg("receive-wal").output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("could not find the program pg_receivewal"), "{}", text(&output.stderr));
}

#[test]
fn wal_that_the_server_has_removed_is_told_and_received_again_after_a_reset() {
    let primary = Cluster::new(1)
        .with("archive_mode", "off")
        .with("archive_library", "")
        .with("max_wal_size", "2MB")
        .with("min_wal_size", "2MB")
        .started();
    let host = Host::new();
    let running = host.start(&primary);
    running.wait_for_receivewal();
    host.wait_for(&write(&primary, 2));
    assert_eq!(running.stop(), 0);
    let before = host.archived();
    primary.set("wal_keep_size", "0");
    primary.reload();
    for _ in 0..2 {
        primary.write_segments(6);
        primary.psql("CHECKPOINT");
    }
    let running = host.start(&primary);
    running.wait_to_hear("has already been removed");
    running.wait_to_hear("receive-wal --reset");
    assert_eq!(host.archived(), before);
    assert_eq!(running.stop(), 0);
    assert_eq!(host.reset(&primary).status.code(), Some(0));
    let running = host.start(&primary);
    running.wait_for_receivewal();
    host.wait_for(&write(&primary, 1));
    assert_eq!(running.stop(), 0);
}

#[test]
fn after_a_failover_both_timelines_and_the_history_are_in_the_archive() {
    let old = primary();
    let host = Host::new();
    let running = host.start(&old);
    running.wait_for_receivewal();
    let standby = standby_of(&old);
    let mut names = write(&old, 3);
    host.wait_for(&names);
    wait_until_it_has_all(&standby, &old);
    old.stop(Stop::Fast);
    standby.promote();
    running.wait_to_hear("WAL is not being received");
    assert_eq!(running.stop(), 0);

    let running = host.start(&standby);
    running.wait_for_receivewal();
    names = write(&standby, 3);
    names.push("00000002.history".to_string());
    host.wait_for(&names);
    let gaps = host.program(&standby).arg("gaps").output().unwrap();
    assert_eq!(gaps.status.code(), Some(0), "{}{}", text(&gaps.stdout), text(&gaps.stderr));
    assert_eq!(running.stop(), 0);
    let timelines: BTreeSet<String> =
        host.archived().iter().filter(|name| name.len() == 24).map(|name| name[..8].to_string()).collect();
    assert_eq!(timelines, ["00000001", "00000002"].map(String::from).into());
}

/// A standby of that server, which streams.
fn standby_of(primary: &Cluster) -> Cluster {
    let standby = Cluster::from_backup(primary);
    let conninfo = format!("host={} user=postgres", primary.directory().display());
    let standby = standby.with("primary_conninfo", &conninfo).with("restore_command", "");
    standby.write_file(&standby.data().join("standby.signal"), b"");
    standby.started()
}

#[track_caller]
fn wait_until_it_has_all(standby: &Cluster, primary: &Cluster) {
    let position = primary.psql("SELECT pg_current_wal_lsn()");
    wait_until("the standby has it all", || {
        standby.psql(&format!("SELECT pg_last_wal_replay_lsn() >= '{position}'")) == "t"
    });
}

#[test]
fn a_reset_after_a_failover_begins_on_the_timeline_that_the_slot_keeps() {
    let (old, host) = (primary(), Host::with_slot());
    let running = host.start(&old);
    running.wait_for_receivewal();
    host.wait_for(&write(&old, 2));
    assert_eq!(running.stop(), 0);
    let standby = standby_of(&old);
    write(&old, 3);
    old.psql("CHECKPOINT");
    wait_until_it_has_all(&standby, &old);
    standby.psql("CHECKPOINT");
    let kept = standby.psql("SELECT lsn FROM pg_create_physical_replication_slot('archiver', true)");
    let kept = old.psql(&format!("SELECT pg_walfile_name('{kept}')"));
    old.stop(Stop::Fast);
    standby.promote();
    let output = host.reset(&standby);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains(&format!("receiving begins with {kept}")), "{}", text(&output.stdout));
    let running = host.start(&standby);
    running.wait_for_receivewal();
    let names = write(&standby, 2);
    assert!(kept.starts_with("00000001") && names[0].starts_with("00000002"));
    host.wait_for(&names);
    assert_eq!(running.stop(), 0);
}

#[test]
fn where_more_was_received_than_a_promoted_server_has_receiving_goes_on_as_the_documentation_tells() {
    let (old, host) = (primary(), Host::new());
    let standby = standby_of(&old);
    let running = host.start(&old);
    running.wait_for_receivewal();
    write(&old, 2);
    wait_until_it_has_all(&standby, &old);
    standby.set("primary_conninfo", "");
    standby.reload();
    wait_until("it receives no more", || standby.psql("SELECT count(*) FROM pg_stat_wal_receiver") == "0");
    host.wait_for(&write(&old, 3));
    assert_eq!(running.stop(), 0);
    old.stop(Stop::Immediate);
    standby.promote();
    let running = host.start(&standby);
    running.wait_to_hear("is not in this server's history");
    running.wait_to_hear("docs/streaming.md");
    assert_eq!(running.stop(), 0);
    for name in host.received() {
        fs::rename(host.streaming().join(&name), host.path(&name)).unwrap();
    }
    // Where the timelines part.
    let history = fs::read_to_string(standby.pg_wal("00000002.history")).unwrap();
    let switch = history.lines().last().unwrap().split_whitespace().nth(1).unwrap().to_string();
    let first = standby.psql(&format!("SELECT pg_walfile_name('{switch}'::pg_lsn + 1)"));
    assert!(first.starts_with("00000002"));
    fs::write(host.streaming().join(format!("{first}.partial")), "").unwrap();
    let running = host.start(&standby);
    running.wait_for_receivewal();
    let mut names = write(&standby, 2);
    names.extend([first, "00000002.history".to_string()]);
    host.wait_for(&names);
    assert_eq!(running.stop(), 0);
    let gaps = host.program(&standby).arg("gaps").output().unwrap();
    assert_eq!(gaps.status.code(), Some(0), "{}{}", text(&gaps.stdout), text(&gaps.stderr));
}

/// A server under load of which WAL is received, and a base backup of it.
pub struct Loaded {
    primary: Cluster,
    restored: Cluster,
    running: Running,
    load: Child,
    began: Instant,
}

/// What is left when the server is gone.
pub struct Lost {
    restored: Cluster,
    running: Running,
    /// How many transactions pgbench was told of.
    acknowledged: u64,
    /// When the server died, in seconds since the Unix epoch.
    at_s: f64,
}

/// Seconds since the Unix epoch.
fn now_s() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
}

impl Loaded {
    /// Begins; commits wait for the receiver where `is_synchronous`. `ARCHIVER_TEST_SECONDS=120` for the whole.
    pub fn begin(host: &Host, is_synchronous: bool) -> Self {
        let seconds = crate::cluster::figure("ARCHIVER_TEST_SECONDS", 5);
        let primary = Cluster::new(16).with("archive_mode", "off").with("archive_library", "").started();
        let pgbench = |arguments: &[&str]| {
            let mut command = primary.client("pgbench");
            command.arg("-n").args(arguments).arg("postgres").stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        assert!(pgbench(&["-i", "-q", "-s", "2"]).wait().unwrap().success());
        if is_synchronous {
            primary.set("synchronous_standby_names", "archiver_receive_wal");
            primary.reload();
            wait_until("the setting is heeded", || !primary.psql("SHOW synchronous_standby_names").is_empty());
        }
        let running = host.start_as_the_servers_user(&primary);
        let state = if is_synchronous { "sync" } else { "async" };
        running.wait("it receives", || primary.psql("SELECT sync_state FROM pg_stat_replication") == state);
        let restored = Cluster::from_backup(&primary);
        let load = pgbench(&["-c", "4", "-j", "2", "-T", &(seconds + 60).to_string()]);
        let began = Instant::now();
        let position = || primary.psql("SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')").parse::<f64>().unwrap();
        let from = position();
        wait_at_most(Duration::from_secs(u64::from(seconds) + 55), "so much was written", || {
            position() - from > 20e6 && began.elapsed() > Duration::from_secs(seconds.into())
        });
        Loaded { primary, restored, running, load, began }
    }

    /// As when the machine is gone.
    pub fn lose_the_machine(self) -> Lost {
        let at_s = now_s();
        self.lose_the_machine_at(at_s)
    }

    fn lose_the_machine_at(mut self, at_s: f64) -> Lost {
        wait_until("all of it is dead", || {
            for (pid, _) in self.primary.processes() {
                let _ = kill(pid, Signal::SIGKILL);
            }
            self.primary.processes().is_empty()
        });
        let mut said = String::new();
        self.load.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        self.load.wait().unwrap();
        let acknowledged =
            said.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
        let acknowledged: u64 =
            acknowledged.unwrap_or_else(|| panic!("{said}")).split('/').next().unwrap().parse().unwrap();
        self.primary.free_shared_memory();
        fs::remove_dir_all(self.primary.data()).unwrap();
        println!("{acknowledged} transactions acknowledged in {:?}", self.began.elapsed());
        assert!(acknowledged > 100);
        Lost { restored: self.restored, running: self.running, acknowledged, at_s }
    }

    /// As when the machine that receives is gone at the same time: what it has received, too.
    pub fn lose_both_machines(mut self, host: &Host) -> Lost {
        let at_s = now_s();
        self.running.end_all(Signal::SIGKILL);
        let lost = self.lose_the_machine_at(at_s);
        fs::remove_dir_all(host.path("received")).unwrap();
        lost
    }
}

impl Lost {
    /// Recovers from the archive, with what there is of the last segment; answers how many transactions were found, and how
    /// many seconds before the end the last of them was begun.
    pub fn recover(&mut self, flags: &str) -> (u64, f64) {
        let Lost { restored, at_s, .. } = self;
        let program = bindir().join("archiver");
        restored.set("restore_command", &format!("{} {flags} restore --partial %f %p", program.display()));
        restored.unset("synchronous_standby_names");
        restored.write_file(&restored.data().join("recovery.signal"), b"");
        restored.start();
        wait_until("recovery has ended", || restored.psql("SELECT pg_is_in_recovery()") == "f");
        let found: u64 = restored.psql("SELECT count(*) FROM pgbench_history").parse().unwrap();
        let branches =
            restored.psql("SELECT sum(bbalance) = (SELECT sum(delta) FROM pgbench_history) FROM pgbench_branches");
        assert_eq!(branches, "t", "what was restored is consistent");
        let last_s: f64 =
            restored.psql("SELECT extract(epoch FROM max(mtime)::timestamptz) FROM pgbench_history").parse().unwrap();
        println!("{found} transactions restored, the last one begun {:.2} s before the end", *at_s - last_s);
        // Those in flight at the end, one a client, may be there or not.
        assert!(found <= self.acknowledged + 4, "{found} of {}", self.acknowledged);
        (found, *at_s - last_s)
    }
}

#[test]
fn no_acknowledged_transaction_is_lost_with_the_primary() {
    let host = Host::with_slot();
    let mut lost = Loaded::begin(&host, true).lose_the_machine();
    lost.running.wait_to_hear("WAL is not being received");
    lost.running.end_all(Signal::SIGTERM);
    let (found, _) = lost.recover(&format!("--storage {}", host.storage));
    assert!(found >= lost.acknowledged, "{found} of {}", lost.acknowledged);
}

/// How much more than the interval may pass until a part is put: looking, encoding and storing.
pub const PUT_S: f64 = 1.5;

#[test]
fn no_more_than_an_interval_is_lost_with_both_machines() {
    let host = Host::receiving_elsewhere().with(&["--streaming-partial-interval", "2s"]);
    let mut lost = Loaded::begin(&host, false).lose_both_machines(&host);
    let (_, seconds) = lost.recover(&format!("--storage {}", host.storage));
    assert!(seconds < 2.0 + PUT_S, "{seconds} s");
}

#[test]
fn the_part_that_was_received_is_kept_in_the_storage_until_there_is_better() {
    let (primary, host) = (primary(), Host::with_slot());
    let start = |interval: &str| {
        let mut command = host.command(&primary);
        command.env("ARCHIVER_STREAMING_PARTIAL_INTERVAL", interval);
        host.spawn(command)
    };
    let mut running = start("1s");
    running.wait_for_receivewal();
    let kept = || host.names_in("archive/main/partial");
    let current = || primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let bytes = |names: &[String]| names[0].rsplit('.').next().unwrap().parse::<u64>().unwrap();
    // Flushed with the transaction.
    let write_some = || primary.psql("SELECT pg_logical_emit_message(true, 'test', repeat('x', 1000))");
    primary.psql("SELECT pg_switch_wal()");
    write_some();
    let segment = current();
    let is_of = |names: &[String], segment: &str| names.len() == 1 && names[0].starts_with(&format!("{segment}."));
    running.wait("a part is kept", || is_of(&kept(), &segment));
    let first = bytes(&kept());
    write_some();
    running.wait("a longer one is in its place", || is_of(&kept(), &segment) && bytes(&kept()) > first);
    write(&primary, 2);
    host.wait_for(std::slice::from_ref(&segment));
    running.wait("that of the next segment is there alone", || is_of(&kept(), &current()));
    // Behind the last byte nothing is lost: a switch leaves a whole segment, which is kept back in the streaming directory,
    // until the server writes again, as it does by itself now and then.
    let (mut whole, mut tried) = (None, Instant::now());
    primary.psql("SELECT pg_switch_wal()");
    running.wait("its part is there", || {
        if tried.elapsed() > Duration::from_secs(5) {
            primary.psql("SELECT pg_switch_wal()");
            tried = Instant::now();
        }
        whole = host.received().pop().filter(|name| is_of(&kept(), name));
        whole.is_some()
    });
    let whole = whole.unwrap();
    let copy = host.path("copy");
    let restore = |streaming: &str| {
        let mut command = host.program(&primary);
        command.arg("restore").arg("--partial").arg(&whole).arg(&copy);
        command.args(["--streaming-wals-directory", streaming]).output().unwrap()
    };
    let elsewhere = host.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    wait_until("the part is all that there is of it", || {
        let output = restore(elsewhere.to_str().unwrap());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        has_equal_content(&copy, &primary.pg_wal(&whole))
    });
    // Killed and started anew, without the setting: what there is better than is removed all the same.
    running.child.kill().unwrap();
    running.child.wait().unwrap();
    let running = start("0");
    write(&primary, 2);
    host.wait_for(std::slice::from_ref(&whole));
    running.wait("no part is kept", || kept().is_empty());
    assert_eq!(running.stop(), 0);
}

#[test]
fn a_missing_archive_and_another_servers_wal_are_refused_before_anything_is_received() {
    let (first, second, host) = (primary(), primary(), Host::new());
    let running = host.start(&first);
    running.wait_for_receivewal();
    host.wait_for(&write(&first, 2));
    assert_eq!(running.stop(), 0);
    let before = host.received();
    let newest = fs::read(host.streaming().join(before.last().unwrap())).unwrap();
    let running = host.start(&second);
    running.wait_to_hear("is another cluster's");
    assert_eq!(running.stop(), 0);
    assert_eq!(host.received(), before);
    assert!(fs::read(host.streaming().join(before.last().unwrap())).unwrap() == newest);

    let mut host = host;
    host.flags.retain(|flag| flag != "--begin");
    let running = host.start(&first);
    running.wait_for_receivewal();
    host.wait_for(&write(&first, 1));
    assert_eq!(running.stop(), 0);
    fs::rename(host.path("archive"), host.path("unmounted")).unwrap();
    fs::create_dir(host.path("archive")).unwrap();
    let output = host.command(&first).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
    assert!(text(&output.stderr).contains("there is no archive at"), "{}", text(&output.stderr));
    assert!(paths(&host.path("archive")).is_empty());
}

#[test]
fn the_program_shows_and_judges_how_receiving_stands() {
    let (primary, host) = (primary(), Host::with_slot());
    let ask = |command: &str, variables: &[(&str, &str)]| {
        let mut asked = host.program(&primary);
        let output = asked.args([command, "--json"]).envs(variables.iter().copied()).output().unwrap();
        (output.status.code(), text(&output.stdout))
    };
    let json = |command: &str| ask(command, &[("ARCHIVER_SLOT_NAME", "archiver")]);
    let value =
        |query: &str, input: &str| primary.psql(&format!("SELECT {query} FROM (SELECT $${input}$$::jsonb) AS t(j)"));
    let shown =
        "j->>'receive_wal_running', j->>'receive_wal_file', j->>'receive_wal_lag_bytes', j->>'receive_wal_sync_state'";
    let rows = "(SELECT string_agg(concat(e->>'name', ' ', e->>'state'), ', ' ORDER BY e->>'name') \
                FROM jsonb_array_elements(j) AS e WHERE e->>'name' ~ 'receive|stream|slot|received')";
    // Whoever receives nothing is not bothered with it.
    assert_eq!(value(shown, &json("status").1), "|||");
    assert_eq!(value(rows, &ask("check", &[]).1), "");
    let running = host.start(&primary);
    running.wait_for_receivewal();
    host.wait_for(&write(&primary, 2));
    let current = primary.psql("SELECT pg_walfile_name(pg_current_wal_lsn())");
    let good = format!("true|{current}.partial|0|async");
    running.wait("all is known of it", || value(shown, &json("status").1) == good);
    let all = "pg_receivewal compatible ok, pg_receivewal ok, receive-wal running ok, received WAL ok, \
               replication slot ok, streaming connection ok, streaming privileges ok, streaming wal_level ok";
    let (_, judged) = json("check");
    let sorted = |text: &str| text.split(", ").map(str::to_string).collect::<BTreeSet<_>>();
    assert_eq!(sorted(&value(rows, &judged)), sorted(all));
    let mut metrics = host.program(&primary);
    let metrics = text(&metrics.args(["check", "--metrics"]).output().unwrap().stdout);
    assert!(metrics.contains("archiver_receive_wal_running{server_name=\"main\"} 1\n"), "{metrics}");
    assert!(metrics.contains("archiver_receive_wal_lag_bytes{server_name=\"main\"} 0\n"), "{metrics}");
    assert!(value(rows, &ask("check", &[]).1).contains("receive-wal running ok"));
    assert_eq!(running.stop(), 0);
    // An end that was wanted is nobody's trouble, but of those who say that they receive.
    assert_eq!(value(rows, &ask("check", &[]).1), "");
    let (code, judged) = json("check");
    assert_eq!(code, Some(1));
    let failed = value(rows, &judged);
    for part in ["receive-wal running failed", "replication slot failed", "streaming connection ok"] {
        assert!(failed.contains(part), "{failed}");
    }
}

#[test]
fn hooks_run_around_what_was_received_and_are_heard() {
    let (primary, host) = (primary(), Host::with_slot());
    let mut command = host.command(&primary);
    command.env("ARCHIVER_POST_ARCHIVE_SCRIPT", "echo seen $BARMAN_SEGMENT");
    let running = host.spawn(command);
    running.wait_for_receivewal();
    let names = write(&primary, 2);
    host.wait_for(&names);
    running.wait_to_hear(&format!("seen {}", names[0]));
    assert_eq!(running.stop(), 0);
}
