//! Where a setting comes from: its flag, else the environment, else the server's configuration.

use crate::args::Arguments;
use archiver_core::config::{Setting, Settings};
use archiver_core::data_directory;
use archiver_core::server_conf::ServerConf;
use archiver_core::{Error, Kind, Result};
use std::env::VarError;
use std::path::{Path, PathBuf};

/// The server's data directory: named by flag, else the directory above the `pg_wal` in `wal_path`, else the current
/// one, where PostgreSQL runs its commands.
pub fn data_directory(arguments: &Arguments, wal_path: Option<&Path>) -> PathBuf {
    let above_pg_wal = || {
        let pg_wal = wal_path?.ancestors().find(|path| path.file_name().is_some_and(|name| name == "pg_wal"))?;
        pg_wal.parent().map(|parent| if parent == Path::new("") { PathBuf::from(".") } else { parent.to_path_buf() })
    };
    arguments.data_directory.clone().or_else(above_pg_wal).unwrap_or_else(|| PathBuf::from("."))
}

/// The cluster in the data directory; nothing where none lies there and nobody said that one does.
pub fn system_identifier(arguments: &Arguments, data_directory: &Path) -> Result<Option<u64>> {
    let found = data_directory::system_identifier(data_directory)?;
    if found.is_none() && arguments.data_directory.is_some() {
        let path = data_directory.display().to_string();
        let message = format!("\"{path}\" is no data directory");
        return Err(Error::new(Kind::Configuration, path, message).detail("There is no global/pg_control in it."));
    }
    Ok(found)
}

/// All settings, from wherever each comes. As in the server, a mistyped or unreadable one never means the default: it
/// could lead into another archive, which then does not hold the file.
pub fn read(arguments: &Arguments, data_directory: &Path) -> Result<Settings> {
    let mut settings = Settings::default();
    let mut given = Vec::new();
    for setting in Setting::ALL {
        if let Some(value) = arguments.flag(setting).map_or_else(|| from_environment(setting), |flag| Ok(Some(flag)))? {
            given.push((setting, value));
        }
    }
    let names_archive = [Setting::Storage, Setting::ServerName].iter().all(|it| given.iter().any(|(one, _)| one == it));
    match ServerConf::of_data_directory(data_directory) {
        Ok(Some(conf)) => match conf.unknown_settings().next() {
            Some(unknown) if !names_archive => return Err(unknown),
            _ => settings = conf.settings(),
        },
        Ok(None) => {}
        Err(_) if names_archive => {}
        Err(error) => return Err(error.hint("Make it readable, or give both --storage and --server-name.")),
    }
    for (setting, value) in given {
        settings.set(setting, value);
    }
    if settings.get(Setting::Storage).is_empty() {
        let place = data_directory.display();
        let message = format!("parameter \"archiver.storage\" is not set for the data directory \"{place}\"");
        return Err(Error::new(Kind::Configuration, "archiver.storage", message).hint(
            "Give --storage, or set ARCHIVER_STORAGE, or name with -D the data directory of a server whose \
             configuration sets archiver.storage.",
        ));
    }
    Ok(settings)
}

/// Whether whoever runs the program says so himself, and not the configuration of a server, which a copy carries elsewhere.
pub fn is_said(arguments: &Arguments, setting: Setting) -> bool {
    let said = arguments.flag(setting).or_else(|| from_environment(setting).ok().flatten());
    said.is_some_and(|value| !value.is_empty())
}

/// The name of a setting in the environment.
pub fn variable(setting: Setting) -> String {
    format!("ARCHIVER_{}", setting.name().to_ascii_uppercase())
}

fn from_environment(setting: Setting) -> Result<Option<String>> {
    let name = variable(setting);
    match std::env::var(&name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(_)) => {
            let message = format!("the environment variable {name} is not valid UTF-8");
            Err(Error::new(Kind::Configuration, name, message))
        }
    }
}
