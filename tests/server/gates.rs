//! A storage that can be held up at will: gates before the system calls by which a file is archived (`gates.c`).

use crate::cluster::{Cluster, text, wait_until};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Longer than any test waits.
const FOR_EVER_MS: u128 = 600_000;

/// Where a file can be held on its way into the archive, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Gate {
    /// The staged file is open, and empty.
    Opened,
    /// The staged file is whole, and not durable yet.
    Written,
    /// The staged file is durable, and not published yet.
    Durable,
    /// It stands under its name, not durably yet, and has no line.
    Published,
    /// Its line is written, and not durable yet.
    Recorded,
}

impl Gate {
    pub const ALL: [Gate; 5] = [Gate::Opened, Gate::Written, Gate::Durable, Gate::Published, Gate::Recorded];

    fn name(self) -> &'static str {
        match self {
            Gate::Opened => "opened",
            Gate::Written => "written",
            Gate::Durable => "durable",
            Gate::Published => "published",
            Gate::Recorded => "recorded",
        }
    }
}

/// The gates of one cluster's archive. All are open at first.
pub struct Gates {
    directory: PathBuf,
}

impl Gates {
    /// Builds the gates into a cluster that does not run yet.
    pub fn of(cluster: &Cluster) -> Self {
        let directory = cluster.create_directory("gates");
        let library = cluster.path("gates.so");
        let built = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&library)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/server/gates.c"))
            .arg("-ldl")
            .output()
            .expect("run cc");
        assert!(built.status.success(), "cc: {}", text(&built.stderr));
        let gates = Gates { directory };
        cluster.write_file(&gates.path("exits"), b"");
        cluster.set_environment("LD_PRELOAD", &library);
        cluster.set_environment("ARCHIVE_WITH_GATES", &cluster.archive());
        cluster.set_environment("GATES", &gates.directory);
        gates
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn write(&self, gate: Gate, content: &str) {
        // In one step: whoever waits there reads it again and again.
        let new = self.path("new");
        fs::write(&new, content).expect("write gate");
        fs::set_permissions(&new, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("chmod");
        fs::rename(&new, self.path(gate.name())).expect("put gate in place");
    }

    /// Lets nothing pass.
    pub fn close(&self, gate: Gate) {
        let _ = fs::remove_file(self.held(gate));
        self.write(gate, &FOR_EVER_MS.to_string());
    }

    /// Lets pass what has waited so long.
    pub fn delay(&self, gate: Gate, delay: Duration) {
        let _ = fs::remove_file(self.held(gate));
        self.write(gate, &delay.as_millis().to_string());
    }

    /// Lets only this WAL file pass a closed gate: [`Gate::Durable`] or [`Gate::Published`], which know names.
    pub fn let_pass(&self, gate: Gate, name: &str) {
        self.write(gate, &format!("{FOR_EVER_MS} {name}"));
    }

    /// Lets everything pass again.
    pub fn open(&self, gate: Gate) {
        let _ = fs::remove_file(self.path(gate.name()));
    }

    fn held(&self, gate: Gate) -> PathBuf {
        self.path(&format!("held.{}", gate.name()))
    }

    /// Whether a file came to a gate and had to wait, since that was closed.
    pub fn has_held(&self, gate: Gate) -> bool {
        self.held(gate).exists()
    }

    /// Waits for that.
    #[track_caller]
    pub fn wait_for(&self, gate: Gate) {
        wait_until(&format!("a file waits at the gate {gate:?}"), || self.has_held(gate));
    }

    /// Forgets who has exited until now: PIDs come again.
    pub fn forget_exits(&self) {
        File::options().write(true).truncate(true).open(self.path("exits")).expect("truncate exits");
    }

    /// The status a process has exited with: told by itself, at the very end. None while it runs, and for one that
    /// ended in another way.
    pub fn exit_status(&self, pid: Pid) -> Option<i32> {
        let lines = fs::read_to_string(self.path("exits")).expect("read exits");
        let (_, status) =
            lines.lines().filter_map(|line| line.split_once(' ')).rfind(|(of, _)| *of == pid.to_string())?;
        status.parse().ok()
    }
}
