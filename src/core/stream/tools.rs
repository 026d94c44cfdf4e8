//! PostgreSQL's own client programs: where they are, and of which version.

use crate::error::{Error, Kind, Result, plain_cause};
use crate::process::{Limit, find_program, run};
use crate::pulse::Pulse;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// For an answer that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// A program that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// Where it lies.
    pub path: PathBuf,
    /// Its major version.
    pub major: u32,
}

impl Tool {
    /// Finds the program `name`, in the directories of `prefix` before those of PATH, and asks for its version.
    pub fn find(name: &str, prefix: &[PathBuf]) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = find_program(name, prefix, &path).ok_or_else(|| {
            Error::new(Kind::Configuration, name, format!("could not find the program {name}"))
                .detail(format!(
                    "It is in none of the directories of archiver.path_prefix and PATH: {}.",
                    shown(prefix, &path)
                ))
                .hint("Install PostgreSQL's client programs, and name their directory in archiver.path_prefix.")
        })?;
        let failed = |cause: &str| {
            let message = format!("could not ask \"{}\" for its version: {cause}", path.display());
            Error::new(Kind::Configuration, path.display().to_string(), message)
        };
        let (pulse, is_cancelled, mut said) = (Pulse::new(), AtomicBool::new(false), Vec::new());
        let variables = [("ARCHIVER_TOOL", path.display().to_string())];
        let ended = run(
            r#"exec "$ARCHIVER_TOOL" --version"#,
            &variables,
            &Limit::new(PATIENCE, &pulse, &is_cancelled),
            &mut |line| said.push(line.to_string()),
        );
        ended.map_err(|error| failed(&plain_cause(&error)))?;
        let major = said.iter().find_map(|line| major_of(line));
        let major = major.ok_or_else(|| failed(&format!("it says \"{}\"", said.join(" "))))?;
        Ok(Tool { path, major })
    }
}

fn shown(prefix: &[PathBuf], path: &OsStr) -> String {
    let directories = prefix.iter().cloned().chain(std::env::split_paths(path));
    directories.map(|path: PathBuf| Path::new(&path).display().to_string()).collect::<Vec<_>>().join(", ")
}

/// `pg_receivewal (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)`, `… 18beta1`.
fn major_of(version: &str) -> Option<u32> {
    let (_, number) = version.split_once("(PostgreSQL) ")?;
    let digits: String = number.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn versions_are_read_as_the_programs_tell_them() {
        assert_eq!(major_of("pg_receivewal (PostgreSQL) 15.20 (Debian 15.20-0+deb12u1)\n"), Some(15));
        assert_eq!(major_of("psql (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major_of("pg_receivewal (PostgreSQL) "), None);
        assert_eq!(major_of("sh: 15"), None);
    }

    #[test]
    fn the_prefix_comes_before_path_and_only_programs_count() {
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = ["first", "second"].map(|name| directory.path().join(name));
        for (folder, mode) in [(&first, 0o644), (&second, 0o755)] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("pg_receivewal"), "#!/bin/sh\necho 'pg_receivewal (PostgreSQL) 9.6.1'\n").unwrap();
            fs::set_permissions(folder.join("pg_receivewal"), Permissions::from_mode(mode)).unwrap();
        }
        let prefix = [first.clone(), second.clone()];
        assert_eq!(
            Tool::find("pg_receivewal", &prefix).unwrap(),
            Tool { path: second.join("pg_receivewal"), major: 9 }
        );
        assert_eq!(find_program("pg_receivewal", &[], first.as_os_str()), None);
        let error = Tool::find("no-such-program", &prefix).unwrap_err();
        assert_eq!(error.message(), "could not find the program no-such-program");
    }
}
