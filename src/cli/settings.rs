//! Where a setting comes from: its flag, else the environment, else the server's configuration.

use crate::args::Arguments;
use archiver_core::config::{Setting, Settings};
use archiver_core::server_conf::ServerConf;
use archiver_core::{Error, Result};
use std::path::{Path, PathBuf};

/// The server's data directory: named by flag, else the directory above the `pg_wal` in `destination`, else the current
/// one, where PostgreSQL runs its restore_command.
pub fn data_directory(arguments: &Arguments, destination: &Path) -> PathBuf {
    let above_pg_wal = || {
        let pg_wal = destination.ancestors().find(|path| path.file_name().is_some_and(|name| name == "pg_wal"))?;
        pg_wal.parent().map(|parent| if parent == Path::new("") { PathBuf::from(".") } else { parent.to_path_buf() })
    };
    arguments.data_directory.clone().or_else(above_pg_wal).unwrap_or_else(|| PathBuf::from("."))
}

/// All settings, from wherever each comes.
pub fn read(arguments: &Arguments, data_directory: &Path) -> Result<Settings> {
    let from_environment = |setting: Setting| std::env::var(environment_name(setting)).ok();
    let flags = [(Setting::Storage, &arguments.storage), (Setting::ServerName, &arguments.server_name)];
    let is_storage_given = arguments.storage.is_some() || from_environment(Setting::Storage).is_some();

    let mut settings = match ServerConf::of_data_directory(data_directory) {
        Ok(conf) => conf.settings(),
        // Then flags and environment must say it all.
        Err(_) if is_storage_given => Settings::default(),
        Err(error) => return Err(nowhere_configured(error)),
    };
    for setting in Setting::ALL {
        if let Some(value) = from_environment(setting) {
            settings.set(setting, value);
        }
    }
    for (setting, value) in flags {
        if let Some(value) = value {
            settings.set(setting, value.clone());
        }
    }
    if settings.get(Setting::Storage).is_empty() {
        let message = format!("parameter \"archiver.storage\" is not set for \"{}\"", data_directory.display());
        let kind = archiver_core::Kind::Configuration;
        return Err(nowhere_configured(Error::new(kind, "archiver.storage", message)));
    }
    Ok(settings)
}

fn environment_name(setting: Setting) -> String {
    format!("ARCHIVER_{}", setting.name().to_ascii_uppercase())
}

fn nowhere_configured(error: Error) -> Error {
    error.hint(
        "Give --storage, or set ARCHIVER_STORAGE, or name with -D the data directory of a server whose configuration \
         sets archiver.storage.",
    )
}
