//! The real binary, in fresh directories, without a server: what it says, what it leaves, and how it ends.

mod archiving;
mod deleting;
mod hooks;
mod listing;
mod prefetching;
mod rebuilding;
mod verifying;

use archiver_tests::Site;
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};

/// A site whose data directory says whose it is, as initdb leaves it.
fn site() -> Site {
    let site = Site::new();
    found_cluster(&site, site.cluster.system_identifier);
    site
}

/// Another cluster in the data directory.
fn found_cluster(site: &Site, system_identifier: u64) {
    fs::create_dir_all(site.path("data/global")).expect("create directory");
    let mut control = system_identifier.to_ne_bytes().to_vec();
    control.resize(8192, 0);
    fs::write(site.path("data/global/pg_control"), control).expect("write control file");
    fs::write(site.path("data/PG_VERSION"), format!("{}\n", site.cluster.major)).expect("write version file");
}

/// No cluster in the data directory: as on another machine.
fn leave_cluster(site: &Site) {
    fs::remove_dir_all(site.path("data/global")).expect("remove");
    fs::remove_file(site.path("data/PG_VERSION")).expect("remove");
}

/// The program in the data directory, as PostgreSQL runs it, with the site's storage.
fn program(site: &Site, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_archiver"));
    command.current_dir(site.path("data")).args(arguments);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ARCHIVER_")) {
        command.env_remove(name);
    }
    command.env("ARCHIVER_STORAGE", format!("file://{}", site.storage().display()));
    command
}

/// How a run ended.
struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Ended {
    fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }

    /// Sees that it ended so.
    #[track_caller]
    fn with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}", self.out))
    }
}

fn run(site: &Site, arguments: &[&str]) -> Ended {
    Ended::of(program(site, arguments).output().expect("run archiver"))
}
