//! A PostgreSQL cluster in a directory of its own, with its archive beside it. It ends and goes when it is dropped.

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid, User};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// No wait of a test lasts longer. PostgreSQL starts an archiver anew after ten seconds, and may notice after sixty.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// What initdb wants, and what a test likes: little memory, no waiting for disks, no WAL removed.
const BASE_SETTINGS: [(&str, &str); 11] = [
    ("archive_library", "archiver"),
    ("archive_mode", "on"),
    ("autovacuum", "off"),
    // Below the data directory, with which it goes.
    ("dynamic_shared_memory_type", "mmap"),
    ("fsync", "off"),
    ("listen_addresses", ""),
    ("log_line_prefix", "%m [%p] "),
    ("max_connections", "20"),
    ("shared_buffers", "16MB"),
    ("wal_keep_size", "8GB"),
    ("wal_level", "replica"),
];

/// Where the programs of the PostgreSQL under test are, and `archiver` among them.
pub fn bindir() -> &'static Path {
    static BINDIR: OnceLock<PathBuf> = OnceLock::new();
    BINDIR.get_or_init(|| match std::env::var_os("ARCHIVER_TEST_BINDIR") {
        Some(bindir) => PathBuf::from(bindir),
        None => panic!("ARCHIVER_TEST_BINDIR is not set: run these tests with `make test-server`"),
    })
}

/// Its major version.
pub fn major() -> u32 {
    let output = server_program("pg_config").arg("--version").output().expect("run pg_config");
    let version = text(&output.stdout);
    let digits: String = version.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().expect("a major version")
}

/// A figure that the environment can raise (or lower) for one run: the whole of what a requirement asks for takes
/// longer than a test that runs at every change may.
pub fn figure(variable: &str, default: u32) -> u32 {
    match std::env::var(variable) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{variable} must be a number: {value:?}")),
        Err(_) => default,
    }
}

/// Waits until `condition` holds; `what` is said where it never does.
#[track_caller]
pub fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    wait_at_most(PATIENCE, what, condition);
}

/// The same with a deadline of its own; answers how long it took.
#[track_caller]
pub fn wait_at_most(patience: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < patience, "waited {patience:?} in vain until {what}");
        sleep(Duration::from_millis(20));
    }
    started.elapsed()
}

/// How `pg_ctl stop` stops.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    Fast,
    Immediate,
}

impl Stop {
    fn word(self) -> &'static str {
        match self {
            Stop::Fast => "fast",
            Stop::Immediate => "immediate",
        }
    }
}

/// A cluster, running or not.
pub struct Cluster {
    directory: TempDir,
    settings: RefCell<BTreeMap<String, String>>,
    environment: RefCell<BTreeMap<&'static str, PathBuf>>,
}

/// Started, with segments of 1 MB: the cheapest cluster that archives.
pub fn started() -> Cluster {
    Cluster::new(1).started()
}

impl Cluster {
    /// A cluster made by initdb, with segments of that size; not running yet.
    pub fn new(segment_mb: u32) -> Self {
        let cluster = Self::empty();
        let made = server_program("initdb")
            .args(["-k", "--no-sync", "-A", "trust", "-U", "postgres", "--no-locale", "-E", "UTF8", "-D"])
            .arg(cluster.data())
            .arg(format!("--wal-segsize={segment_mb}"))
            .output();
        succeeded("initdb", &made.expect("run initdb"));
        cluster.create_directory("archive");
        cluster.include_settings();
        for (name, value) in BASE_SETTINGS {
            cluster.set(name, value);
        }
        let storage = format!("file://{}", cluster.archive().display());
        cluster.with("archiver.storage", &storage).in_place()
    }

    /// A base backup of `primary`, without WAL, with its settings; not running yet. Archiving goes where the
    /// primary's goes, once somebody turns it on.
    pub fn from_backup(primary: &Cluster) -> Self {
        let cluster = Self::empty();
        let made = server_program("pg_basebackup")
            .args(["-X", "none", "-c", "fast", "--no-sync", "-U", "postgres", "-h"])
            .arg(primary.directory())
            .arg("-D")
            .arg(cluster.data())
            .output();
        succeeded("pg_basebackup", &made.expect("run pg_basebackup"));
        cluster.settings.replace(primary.settings.borrow().clone());
        let restore = format!("{} restore %f %p", bindir().join("archiver").display());
        cluster.with("archive_mode", "off").with("restore_command", &restore).in_place()
    }

    /// A copy of the files of `stopped`, as a careless administrator makes one; with its settings, archiving off.
    pub fn from_copy(stopped: &Cluster) -> Self {
        let cluster = Self::empty();
        let copied = Command::new("cp").arg("-a").arg(stopped.data()).arg(cluster.data()).output().expect("run cp");
        succeeded("cp", &copied);
        cluster.settings.replace(stopped.settings.borrow().clone());
        cluster.with("archive_mode", "off").in_place()
    }

    fn empty() -> Self {
        let directory = tempfile::Builder::new().prefix("ar").tempdir().expect("temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        let cluster = Cluster { directory, settings: RefCell::default(), environment: RefCell::default() };
        cluster.own(cluster.directory());
        cluster
    }

    fn in_place(self) -> Self {
        let directory = self.directory().display().to_string();
        self.with("unix_socket_directories", &directory)
    }

    fn include_settings(&self) {
        let conf = self.data().join("postgresql.conf");
        let text = fs::read_to_string(&conf).expect("read postgresql.conf");
        fs::write(&conf, format!("{text}\ninclude 'test.conf'\n")).expect("write postgresql.conf");
    }

    /// The same with another setting.
    pub fn with(self, name: &str, value: &str) -> Self {
        self.set(name, value);
        self
    }

    /// The same, running.
    pub fn started(self) -> Self {
        self.start();
        self
    }

    /// Another value in the configuration file; [`Cluster::reload`] makes it known.
    pub fn set(&self, name: &str, value: &str) {
        self.settings.borrow_mut().insert(name.into(), value.into());
        self.write_settings();
    }

    /// Takes a setting out of the configuration file.
    pub fn unset(&self, name: &str) {
        self.settings.borrow_mut().remove(name);
        self.write_settings();
    }

    /// What is in the configuration file.
    pub fn setting(&self, name: &str) -> Option<String> {
        self.settings.borrow().get(name).cloned()
    }

    fn write_settings(&self) {
        let quoted = |(name, value): (&String, &String)| format!("{name} = '{}'\n", value.replace('\'', "''"));
        let text: String = self.settings.borrow().iter().map(quoted).collect();
        self.write_file(&self.data().join("test.conf"), text.as_bytes());
    }

    /// A variable in the environment of the server from its next start on.
    pub fn set_environment(&self, name: &'static str, value: &Path) {
        self.environment.borrow_mut().insert(name, value.to_path_buf());
    }

    /// Makes the server read its configuration files. Its processes do so one after the other.
    pub fn reload(&self) {
        assert_eq!(self.psql("SELECT pg_reload_conf()"), "t");
    }

    /// The temporary directory, which holds the socket, too.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path in it.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory().join(relative)
    }

    /// The data directory.
    pub fn data(&self) -> PathBuf {
        self.path("data")
    }

    /// A path in the WAL directory.
    pub fn pg_wal(&self, relative: &str) -> PathBuf {
        self.path("data/pg_wal").join(relative)
    }

    /// The storage directory that it was made with.
    pub fn archive(&self) -> PathBuf {
        self.path("archive")
    }

    /// Makes a directory that belongs to the server's user.
    pub fn create_directory(&self, relative: &str) -> PathBuf {
        let path = self.path(relative);
        fs::create_dir(&path).expect("create directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("chmod");
        self.own(&path);
        path
    }

    /// Writes a file that belongs to the server's user.
    pub fn write_file(&self, path: &Path, content: &[u8]) {
        fs::write(path, content).expect("write file");
        self.own(path);
    }

    /// Gives a file to the server's user.
    pub fn own(&self, path: &Path) {
        if let Some(user) = server_user() {
            chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).expect("chown");
        }
    }

    /// Starts the server and waits until it accepts connections.
    pub fn start(&self) {
        let started = self.pg_ctl(&["start", "-w", "-t", "60"]);
        assert!(started.status.success(), "pg_ctl start: {}\n{}", text(&started.stderr), self.log_tail());
    }

    /// Starts the server and sees that it ends by itself before it accepts connections.
    #[track_caller]
    pub fn start_in_vain(&self) {
        let started = self.pg_ctl(&["start", "-w", "-t", "60"]);
        assert!(!started.status.success(), "the server has started\n{}", self.log_tail());
        wait_until("the server has ended", || self.processes().is_empty());
    }

    /// Stops the server; answers how long that took.
    pub fn stop(&self, mode: Stop) -> Duration {
        let began = Instant::now();
        let stopped = self.pg_ctl(&["stop", "-w", "-t", "90", "-m", mode.word()]);
        assert!(stopped.status.success(), "pg_ctl stop: {}\n{}", text(&stopped.stderr), self.log_tail());
        began.elapsed()
    }

    /// Asks the server to stop, and does not wait.
    pub fn ask_to_stop(&self, mode: Stop) {
        succeeded("pg_ctl stop", &self.pg_ctl(&["stop", "-W", "-m", mode.word()]));
    }

    /// Stops and starts it.
    pub fn restart(&self) {
        self.stop(Stop::Fast);
        self.start();
    }

    /// Makes a standby the primary.
    pub fn promote(&self) {
        succeeded("pg_ctl promote", &self.pg_ctl(&["promote", "-w", "-t", "60"]));
    }

    fn pg_ctl(&self, arguments: &[&str]) -> Output {
        let mut command = server_program("pg_ctl");
        command.envs(self.environment.borrow().iter());
        command.arg("-D").arg(self.data()).arg("-l").arg(self.path("log")).args(arguments);
        command.output().expect("run pg_ctl")
    }

    /// What a superuser's query answers: rows by line, columns parted by `|`.
    #[track_caller]
    pub fn psql(&self, sql: &str) -> String {
        self.psql_as("postgres", sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// The same for any role; a failure is its message.
    pub fn psql_as(&self, role: &str, sql: &str) -> Result<String, String> {
        let mut command = self.client("psql");
        let output = command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-U", role, "-d", "postgres", "-c", sql]).output();
        let output = output.expect("run psql");
        match output.status.success() {
            true => Ok(text(&output.stdout).trim_end().to_string()),
            false => Err(text(&output.stderr)),
        }
    }

    /// A client program that connects to this server.
    pub fn client(&self, program: &str) -> Command {
        let mut command = Command::new(bindir().join(program));
        command.env_clear().envs(plain_environment()).env("PGHOST", self.directory()).env("PGUSER", "postgres");
        command.current_dir(self.directory());
        command
    }

    /// Completes that many segments, with something in each.
    pub fn write_segments(&self, count: u32) {
        self.psql(&format!(
            "DO $$ BEGIN FOR i IN 1..{count} LOOP \
               PERFORM pg_logical_emit_message(false, 'test', string_agg(md5(random()::text), '')) \
               FROM generate_series(1, 4000); \
               PERFORM pg_switch_wal(); END LOOP; END $$"
        ));
    }

    /// The same while the archiver stands still: it finds them all waiting at once.
    pub fn write_backlog(&self, count: u32) {
        let archiver = self.running_archiver();
        kill(archiver, Signal::SIGSTOP).expect("stop the archiver");
        self.write_segments(count);
        kill(archiver, Signal::SIGCONT).expect("let the archiver go on");
    }

    /// The names in archive_status with that suffix (`ready` or `done`).
    pub fn status_files(&self, suffix: &str) -> BTreeSet<String> {
        let name =
            |path: PathBuf| Some(path.file_name()?.to_str()?.strip_suffix(suffix)?.strip_suffix('.')?.to_string());
        paths(&self.pg_wal("archive_status")).into_iter().filter_map(name).collect()
    }

    /// Waits until nothing waits to be archived.
    #[track_caller]
    pub fn drain(&self) {
        let started = Instant::now();
        while !self.status_files("ready").is_empty() {
            assert!(
                started.elapsed() < PATIENCE,
                "still waiting: {:?}\n{}",
                self.status_files("ready"),
                self.log_tail()
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// The WAL files in the archive below `storage`, by name; `wals/` holds them and its catalogue only.
    pub fn stored_in(&self, storage: &Path) -> BTreeMap<String, PathBuf> {
        let mut stored = BTreeMap::new();
        let wals = storage.join("main/wals");
        for path in paths(&wals).into_iter().flat_map(|path| if path.is_dir() { paths(&path) } else { vec![path] }) {
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_string();
            if name != "main-xlog.db" {
                stored.insert(name, path);
            }
        }
        stored
    }

    /// The WAL files in the archive, by name.
    pub fn stored(&self) -> BTreeMap<String, PathBuf> {
        self.stored_in(&self.archive())
    }

    /// Holds the catalogue's lock: until it is dropped, files can be stored and none can be recorded.
    pub fn stall_catalogue(&self) -> File {
        let lock = File::open(self.archive().join(".main-xlogdb.lock")).expect("open the catalogue's lock");
        lock.lock().expect("lock the catalogue");
        lock
    }

    /// Waits until the archiver waits for the catalogue of a stalled archive: a stored file that has no line.
    pub fn wait_for_stall(&self) {
        let stalled = || self.stored().len() > catalogue(&self.archive()).len();
        wait_until("a file is stored and waits for its line", stalled);
    }

    /// Each file marked `.done` and still in pg_wal, restored by the program and compared; answers how many.
    #[track_caller]
    pub fn assert_done_files_restore_equal(&self) -> usize {
        let mut compared = 0;
        for name in self.status_files("done") {
            let (original, copy) = (self.pg_wal(&name), self.path("restored-file"));
            if !original.exists() {
                continue;
            }
            let output = self.restore(&name, &copy);
            assert_eq!(output.status.code(), Some(0), "{name}: {}", text(&output.stderr));
            assert!(has_equal_content(&original, &copy), "{name} differs from its archived copy");
            compared += 1;
        }
        compared
    }

    /// Every archived file has exactly one line in the catalogue, and every line its file.
    #[track_caller]
    pub fn assert_one_line_each(&self) {
        let lines = catalogue(&self.archive());
        let stored: Vec<String> = self.stored().into_keys().collect();
        let mut sorted = lines.clone();
        sorted.sort();
        assert_eq!(sorted, stored, "catalogue lines (left) and stored files (right)");
    }

    /// `archiver restore NAME DEST`, as the server's user, in the data directory as PostgreSQL runs it.
    pub fn restore(&self, name: &str, destination: &Path) -> Output {
        let mut command = self.archiver_program();
        command.arg("restore").arg(name).arg(destination).output().expect("run archiver")
    }

    /// Runs the cluster's restore_command as PostgreSQL does; `destination` is relative to the data directory.
    pub fn run_restore_command(&self, name: &str, destination: &str) -> Output {
        let command = self.setting("restore_command").expect("a restore_command");
        let command = command.replace("%f", name).replace("%p", destination);
        let mut shell = server_program("/bin/sh");
        shell.arg("-c").arg(command).current_dir(self.data()).output().expect("run the restore_command")
    }

    /// The program `archiver`, to be run by the server's user in the data directory.
    pub fn archiver_program(&self) -> Command {
        let mut command = server_program("archiver");
        command.current_dir(self.data());
        command
    }

    /// The whole server log.
    pub fn log(&self) -> String {
        fs::read(self.path("log")).map(|log| text(&log)).unwrap_or_default()
    }

    /// What the server logged after it had written `mark` bytes.
    pub fn log_since(&self, mark: usize) -> String {
        self.log().get(mark..).unwrap_or_default().to_string()
    }

    /// How much it has logged.
    pub fn log_mark(&self) -> usize {
        self.log().len()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// The server's processes with their titles, also those whose postmaster is dead.
    pub fn processes(&self) -> Vec<(Pid, String)> {
        let data = self.data();
        let of_entry = |path: PathBuf| {
            let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
            if fs::read_link(path.join("cwd")).ok()? != data {
                return None;
            }
            let title = text(&fs::read(path.join("cmdline")).ok()?).replace('\0', " ");
            Some((Pid::from_raw(pid), title))
        };
        paths(Path::new("/proc")).into_iter().filter_map(of_entry).collect()
    }

    /// The archiver process.
    pub fn archiver(&self) -> Option<Pid> {
        self.processes().into_iter().find(|(_, title)| title.starts_with("postgres: archiver")).map(|(pid, _)| pid)
    }

    /// The archiver process, waited for.
    pub fn running_archiver(&self) -> Pid {
        wait_until("an archiver runs", || self.archiver().is_some());
        self.archiver().expect("an archiver")
    }

    /// Waits until PostgreSQL has started another archiver. A connection wakes the postmaster, which else looks once a
    /// minute.
    pub fn wait_for_another_archiver(&self, before: Pid) {
        wait_until("another archiver runs", || {
            self.psql_as("postgres", "SELECT 1").is_ok() && self.archiver().is_some_and(|pid| pid != before)
        });
    }

    /// The postmaster.
    pub fn postmaster(&self) -> Pid {
        let lines = fs::read_to_string(self.data().join("postmaster.pid")).expect("read postmaster.pid");
        Pid::from_raw(lines.lines().next().and_then(|pid| pid.parse().ok()).expect("a PID"))
    }

    fn postmaster_line(&self, number: usize) -> Option<String> {
        fs::read_to_string(self.data().join("postmaster.pid")).ok()?.lines().nth(number).map(str::to_string)
    }

    /// Frees what a postmaster that was killed has left to the machine, once all its processes are gone; one that ends frees
    /// it by itself.
    pub fn free_shared_memory(&self) {
        // The seventh line: its key and its number (pidfile.h, `LOCK_FILE_LINE_SHMEM_KEY`).
        let line = self.postmaster_line(6);
        if let Some(number) = line.as_deref().and_then(|line| line.split_whitespace().nth(1)) {
            let _ = Command::new("ipcrm").args(["-m", number]).output();
        }
    }

    /// Where the last checkpoint of the stopped server begins.
    pub fn checkpoint_position(&self) -> String {
        let output = server_program("pg_controldata").arg("-D").arg(self.data()).env("LC_ALL", "C").output();
        let said = text(&output.expect("run pg_controldata").stdout);
        let position = said.lines().find_map(|line| line.strip_prefix("Latest checkpoint location:"));
        position.unwrap_or_else(|| panic!("{said}")).trim().to_string()
    }

    /// Kills the postmaster, and waits until its children have noticed.
    pub fn kill_postmaster(&self) {
        let postmaster = self.postmaster();
        kill(postmaster, Signal::SIGKILL).expect("kill the postmaster");
        self.wait_for_the_end_of(postmaster);
    }
}

impl Cluster {
    /// Waits until a killed postmaster is gone, all its children, too. Until init has reaped it, the next one takes it
    /// for alive.
    pub fn wait_for_the_end_of(&self, postmaster: Pid) {
        wait_until("all processes of a killed postmaster are gone", || {
            self.processes().is_empty() && kill(postmaster, None).is_err()
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("== server log of {}\n{}", self.directory().display(), self.log_tail());
        }
        // A postmaster that is killed leaves its shared memory to the machine, of which that has so many pieces only.
        let is_its = |pid: &Pid| self.processes().iter().any(|(process, _)| process == pid);
        let first = self.postmaster_line(0).and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
        if let Some(postmaster) = first.filter(is_its) {
            let _ = kill(postmaster, Signal::SIGQUIT);
            let deadline = Instant::now() + Duration::from_secs(2);
            while !self.processes().is_empty() && Instant::now() < deadline {
                sleep(Duration::from_millis(10));
            }
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            for (pid, _) in processes {
                // Gone since we looked: as well.
                let _ = kill(pid, Signal::SIGKILL);
            }
            sleep(Duration::from_millis(20));
        }
        self.free_shared_memory();
    }
}

/// The names in the catalogue of the archive below `storage`, line by line.
pub fn catalogue(storage: &Path) -> Vec<String> {
    let text = fs::read_to_string(storage.join("main/wals/main-xlog.db")).unwrap_or_default();
    text.lines().map(|line| line.split('\t').next().unwrap_or_default().to_string()).collect()
}

/// Whether two files hold the same bytes; they may be large.
pub fn has_equal_content(one: &Path, other: &Path) -> bool {
    let open = |path: &Path| BufReader::with_capacity(1 << 20, File::open(path).expect("open file"));
    let (mut one, mut other) = (open(one), open(other));
    loop {
        let (left, right) = (one.fill_buf().expect("read file"), other.fill_buf().expect("read file"));
        let length = left.len().min(right.len());
        if length == 0 {
            return left.is_empty() && right.is_empty();
        }
        if left[..length] != right[..length] {
            return false;
        }
        one.consume(length);
        other.consume(length);
    }
}

/// The paths in a directory; none where it is not there.
pub fn paths(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Every path below a directory.
pub fn tree(directory: &Path) -> BTreeSet<PathBuf> {
    let below = |path: PathBuf| if path.is_dir() { tree(&path) } else { BTreeSet::new() }.into_iter().chain([path]);
    paths(directory).into_iter().flat_map(below).collect()
}

/// What a program wrote.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn succeeded(what: &str, output: &Output) {
    assert!(output.status.success(), "{what}: {}{}", text(&output.stdout), text(&output.stderr));
}

/// The user that the server runs as, where that is not the user of the tests: PostgreSQL never runs as root.
fn server_user() -> Option<User> {
    Uid::effective().is_root().then(|| User::from_name("postgres").ok().flatten().expect("the OS user postgres"))
}

/// A program of the server's, run by its user.
pub fn server_program(program: &str) -> Command {
    let program = bindir().join(program);
    let mut command = match server_user() {
        Some(user) => {
            let mut command = Command::new("runuser");
            command.args(["-u", &user.name, "--"]).arg(program);
            command
        }
        None => Command::new(program),
    };
    command.env_clear().envs(plain_environment()).current_dir("/");
    command
}

/// The environment without what would lead a client or the program elsewhere.
fn plain_environment() -> impl Iterator<Item = (String, String)> {
    let leads = |name: &str| ["PG", "ARCHIVER_", "AWS_"].iter().any(|prefix| name.starts_with(prefix));
    std::env::vars().filter(move |(name, _)| !leads(name))
}
