//! The `archiver.*` lines of a server's configuration files, found and read as PostgreSQL finds and reads them
//! (PostgreSQL manual, "Setting Parameters"; guc-file.l), also while no server runs.

use crate::config::{Setting, Settings};
use crate::error::{Error, Kind, Result};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// As PostgreSQL: includes deeper than this are taken for a loop (guc-file.l, `CONF_FILE_MAX_DEPTH`).
const MAX_DEPTH: usize = 10;
const MAX_FILE_BYTES: u64 = 16 << 20;
const PREFIX: &str = "archiver.";

/// One assignment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Assignment {
    /// The name without the prefix `archiver.`, in lower case.
    pub name: String,
    /// The value, unquoted.
    pub value: String,
    /// Where it stands, for people: file and line, or the command line.
    pub place: String,
}

/// All `archiver.*` assignments in force order: a later one of the same name wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerConf {
    /// The assignments.
    pub assignments: Vec<Assignment>,
}

impl ServerConf {
    /// The configuration file of the server whose data directory that is; nothing where there is none.
    pub fn file_of(data_directory: &Path) -> Option<PathBuf> {
        let main = Options::of_data_directory(data_directory).config_file(data_directory);
        main.canonicalize().ok()
    }

    /// Reads the configuration of the server whose data directory is `data_directory`; nothing where there is none.
    /// `postmaster.opts` there, written at each start, names the configuration file where it lies elsewhere.
    pub fn of_data_directory(data_directory: &Path) -> Result<Option<Self>> {
        let main = Options::of_data_directory(data_directory).config_file(data_directory);
        if main.exists() { Self::of_server(&main, data_directory).map(Some) } else { Ok(None) }
    }

    /// Reads the configuration file `main`, what it includes, `postgresql.auto.conf` in the data directory, and the command
    /// line that the server was last started with.
    pub fn of_server(main: &Path, data_directory: &Path) -> Result<Self> {
        let mut conf = Self::of_files(main, data_directory)?;
        conf.assignments.extend(Options::of_data_directory(data_directory).assignments);
        Ok(conf)
    }

    fn of_files(main: &Path, data_directory: &Path) -> Result<Self> {
        let mut conf = ServerConf::default();
        conf.read_file(main, 0)?;
        let automatic = data_directory.join("postgresql.auto.conf");
        if automatic.exists() {
            conf.read_file(&automatic, 0)?;
        }
        Ok(conf)
    }

    /// What the assignments amount to, on top of the defaults.
    pub fn settings(&self) -> Settings {
        let mut settings = Settings::default();
        for assignment in &self.assignments {
            if let Some(setting) = Setting::from_name(&assignment.name) {
                settings.set(setting, assignment.value.clone());
            }
        }
        settings
    }

    /// The assignments of settings that do not exist: mistyped, most likely.
    pub fn unknown_settings(&self) -> impl Iterator<Item = Error> + '_ {
        let unknown = self.assignments.iter().filter(|it| Setting::from_name(&it.name).is_none());
        unknown.map(|unknown| {
            let name = format!("{PREFIX}{}", unknown.name);
            let known: Vec<&str> = Setting::ALL.iter().map(|setting| setting.name()).collect();
            Error::new(Kind::Configuration, name.clone(), format!("unrecognized configuration parameter \"{name}\""))
                .detail(format!("It stands in {}. Known are {}.", unknown.place, known.join(", ")))
                .hint("Mend or remove it and reload the configuration: a mistyped setting must not mean the default.")
        })
    }

    fn read_file(&mut self, path: &Path, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            let text = format!("could not open configuration file \"{}\": included too deep", path.display());
            return Err(Error::new(Kind::Configuration, path.display().to_string(), text));
        }
        let failed = |error: &io::Error| Error::io("read configuration file", path, error).of_kind(Kind::Configuration);
        let size = fs::metadata(path).map_err(|error| failed(&error))?.len();
        if size > MAX_FILE_BYTES {
            return Err(failed(&io::ErrorKind::FileTooLarge.into()));
        }
        let text = String::from_utf8_lossy(&fs::read(path).map_err(|error| failed(&error))?).into_owned();
        let relative_to = path.parent().unwrap_or(Path::new("."));
        for (number, line) in text.lines().enumerate() {
            // A line that PostgreSQL cannot read is PostgreSQL's to complain about.
            let Some((name, value)) = parse_line(line) else { continue };
            match name.as_str() {
                "include" => self.read_file(&relative_to.join(value), depth + 1)?,
                "include_if_exists" => {
                    let included = relative_to.join(value);
                    if included.exists() {
                        self.read_file(&included, depth + 1)?;
                    }
                }
                "include_dir" => self.read_directory(&relative_to.join(value), depth)?,
                name => self.take(name, value, || format!("\"{}\" line {}", path.display(), number + 1)),
            }
        }
        Ok(())
    }

    /// Files that end in `.conf` and do not start with a dot, in order of their names' bytes.
    fn read_directory(&mut self, path: &Path, depth: usize) -> Result<()> {
        let entries = fs::read_dir(path)
            .map_err(|error| Error::io("read configuration directory", path, &error).of_kind(Kind::Configuration))?;
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.retain(|file| {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            name.ends_with(".conf") && !name.starts_with('.') && file.is_file()
        });
        files.sort_unstable();
        files.iter().try_for_each(|file| self.read_file(file, depth + 1))
    }

    fn take(&mut self, name: &str, value: String, place: impl FnOnce() -> String) {
        if let Some(name) = name.strip_prefix(PREFIX) {
            self.assignments.push(Assignment { name: name.to_string(), value, place: place() });
        }
    }
}

/// `name = value`, `name value`, value quoted or not; nothing for an empty line, a comment, or what is no assignment.
fn parse_line(line: &str) -> Option<(String, String)> {
    let line = line.trim_start();
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.' || c == '$' || !c.is_ascii();
    let end = line.find(|c| !is_name(c)).unwrap_or(line.len());
    let (name, rest) = line.split_at(end);
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    if name.is_empty() || rest.is_empty() || rest.starts_with('#') {
        return None;
    }
    let value = match rest.strip_prefix('\'') {
        Some(quoted) => unquote(quoted)?,
        None => rest.split(|c: char| c.is_whitespace() || c == '#').next()?.to_string(),
    };
    Some((name.to_ascii_lowercase(), value))
}

/// The text up to the closing quote; `''` and `\'` stand for a quote (guc-file.l, `DeescapeQuotedString`).
fn unquote(quoted: &str) -> Option<String> {
    let mut value = String::new();
    let mut characters = quoted.chars().peekable();
    loop {
        match characters.next()? {
            '\'' if characters.peek() == Some(&'\'') => {
                characters.next();
                value.push('\'');
            }
            '\'' => return Some(value),
            '\\' => match characters.next()? {
                'b' => value.push('\u{8}'),
                'f' => value.push('\u{c}'),
                'n' => value.push('\n'),
                'r' => value.push('\r'),
                't' => value.push('\t'),
                digit @ '0'..='7' => {
                    let mut code = digit.to_digit(8)?;
                    for _ in 0..2 {
                        let Some(next) = characters.peek().and_then(|c| c.to_digit(8)) else { break };
                        code = code * 8 + next;
                        characters.next();
                    }
                    value.push(char::from((code & 0xFF) as u8));
                }
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
}

/// The arguments in postmaster.opts, each in double quotes, behind the program (postmaster.c, `CreateOptsFile`).
fn parse_command_line(text: &str) -> Vec<String> {
    text.trim_end()
        .split(" \"")
        .skip(1)
        .map(|argument| argument.strip_suffix('"').unwrap_or(argument).to_string())
        .collect()
}

#[derive(Debug, Default)]
struct Options {
    directory: Option<PathBuf>,
    config_file: Option<PathBuf>,
    assignments: Vec<Assignment>,
}

impl Options {
    fn of_data_directory(data_directory: &Path) -> Self {
        let text = fs::read_to_string(data_directory.join("postmaster.opts"));
        text.map_or_else(|_| Options::default(), |text| Options::parse(&parse_command_line(&text)))
    }

    fn parse(arguments: &[String]) -> Self {
        let mut options = Options::default();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == "-D" {
                options.directory = arguments.next().map(PathBuf::from);
            } else if argument == "-c" {
                if let Some(assignment) = arguments.next() {
                    options.assign(assignment);
                }
            } else if let Some(directory) = argument.strip_prefix("-D") {
                options.directory = Some(directory.into());
            } else if let Some(assignment) = argument.strip_prefix("--").or_else(|| argument.strip_prefix("-c")) {
                options.assign(assignment);
            }
        }
        options
    }

    fn assign(&mut self, assignment: &str) {
        let Some((name, value)) = assignment.split_once('=') else { return };
        // On the command line a hyphen may stand for an underscore (guc.c, `ParseLongOption`).
        let name = name.trim().replace('-', "_").to_ascii_lowercase();
        if name == "config_file" {
            self.config_file = Some(value.into());
        } else if let Some(name) = name.strip_prefix(PREFIX) {
            let place = "the server's command line".to_string();
            self.assignments.push(Assignment { name: name.to_string(), value: value.to_string(), place });
        }
    }

    /// A relative path was relative to where the server was started, which nobody knows now: then the file in the data
    /// directory it is.
    fn config_file(&self, data_directory: &Path) -> PathBuf {
        let named = self.config_file.clone().filter(|path| path.is_absolute());
        let in_directory = || {
            self.directory
                .as_ref()
                .map(|directory| directory.join("postgresql.conf"))
                .filter(|path| path.is_absolute() && path.exists())
        };
        named.or_else(in_directory).unwrap_or_else(|| data_directory.join("postgresql.conf"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text.replace("@", directory.path().to_str().unwrap())).unwrap();
        }
        directory
    }

    fn get(conf: &ServerConf, name: &str) -> String {
        conf.settings().get(Setting::from_name(name).unwrap()).to_string()
    }

    #[test]
    fn lines_read_as_postgresql_reads_them() {
        for (line, expected) in [
            ("archiver.storage = 'file:///srv/wal' # here", Some(("archiver.storage", "file:///srv/wal"))),
            ("  Archiver.Workers=4", Some(("archiver.workers", "4"))),
            ("archiver.workers 4# four", Some(("archiver.workers", "4"))),
            ("archiver.storage = 'it''s \\'so\\' \\101'", Some(("archiver.storage", "it's 'so' A"))),
            ("archiver.storage = ''", Some(("archiver.storage", ""))),
            ("# archiver.workers = 4", None),
            ("", None),
            ("archiver.storage =", None),
            ("archiver.storage = 'open", None),
        ] {
            let expected = expected.map(|(name, value)| (name.to_string(), value.to_string()));
            assert_eq!(parse_line(line), expected, "{line}");
        }
    }

    #[test]
    fn includes_are_followed_and_the_last_assignment_wins() {
        let data = directory(&[
            (
                "postgresql.conf",
                "archiver.workers = 1\narchiver.read_ahead = 1\ninclude_dir 'conf.d'\n\
                 include_if_exists 'missing.conf'\ninclude = 'more.conf'\n",
            ),
            ("conf.d/20.conf", "archiver.workers = 3\n"),
            ("conf.d/10.conf", "archiver.workers = 2\narchiver.read_ahead = 2\n"),
            ("conf.d/.hidden.conf", "archiver.workers = 9\n"),
            ("conf.d/README", "archiver.workers = 9\n"),
            ("more.conf", "archiver.server_name = 'more'\n"),
            ("postgresql.auto.conf", "archiver.server_name = 'auto'\n"),
        ]);
        let conf = ServerConf::of_data_directory(data.path()).unwrap().unwrap();
        assert_eq!(get(&conf, "workers"), "3");
        assert_eq!(get(&conf, "read_ahead"), "2");
        assert_eq!(get(&conf, "server_name"), "auto");
        assert_eq!(get(&conf, "compression"), "zstd");
    }

    #[test]
    fn debians_configuration_directory_is_found_through_postmaster_opts() {
        let elsewhere = directory(&[("postgresql.conf", "archiver.storage = 'file:///etc-says'\n")]);
        let config_file = elsewhere.path().join("postgresql.conf");
        let opts = format!(
            "/usr/lib/postgresql/15/bin/postgres \"-D\" \"/data\" \"-c\" \"config_file={}\" \"--archiver.workers=7\"\n",
            config_file.display()
        );
        let data = directory(&[("postmaster.opts", &opts), ("postgresql.auto.conf", "archiver.workers = 5\n")]);
        let conf = ServerConf::of_data_directory(data.path()).unwrap().unwrap();
        assert_eq!(get(&conf, "storage"), "file:///etc-says");
        assert_eq!(get(&conf, "workers"), "7", "the command line wins");
        assert_eq!(conf.unknown_settings().next(), None);
    }

    #[test]
    fn a_mistyped_name_is_found_with_its_place() {
        let data = directory(&[("postgresql.conf", "\narchiver.compresion = 'zstd'\n")]);
        let conf = ServerConf::of_data_directory(data.path()).unwrap().unwrap();
        let error = conf.unknown_settings().next().unwrap();
        assert_eq!(error.to_string(), "unrecognized configuration parameter \"archiver.compresion\"");
        assert!(error.detail_text().unwrap().contains("postgresql.conf\" line 2."), "{error:?}");
    }

    #[test]
    fn a_loop_of_includes_and_a_missing_file_are_errors() {
        let data = directory(&[("postgresql.conf", "include 'postgresql.conf'\n")]);
        assert!(ServerConf::of_data_directory(data.path()).unwrap_err().message().contains("too deep"));
        let data = directory(&[("postgresql.conf", "include 'missing.conf'\n")]);
        assert_eq!(ServerConf::of_data_directory(data.path()).unwrap_err().kind(), Kind::Configuration);
        let empty = directory(&[]);
        assert_eq!(ServerConf::of_data_directory(empty.path()).unwrap(), None);
    }
}
