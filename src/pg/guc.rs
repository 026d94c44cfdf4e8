//! The settings of postgresql.conf: texts without check hooks, parsed by the core at each reload.
//!
//! A check hook would make PostgreSQL go on with the default where a value is wrong; see `archiver_core::config`.

use super::ffi;
use archiver_core::archive::check_memory;
use archiver_core::config::{Config, Limits, Setting, Settings, Streaming};
use archiver_core::data_directory::conninfo_of_server;
use archiver_core::server_conf::ServerConf;
use archiver_core::{Error, Result};
use pgrx::guc::GucSetting;
use std::ffi::{CStr, CString};
use std::path::Path;

static VALUES: [GucSetting<Option<CString>>; Setting::ALL.len()] =
    [const { GucSetting::<Option<CString>>::new(None) }; Setting::ALL.len()];

/// A text that PostgreSQL keeps a pointer to, for ever.
fn forever(text: &str) -> &'static CStr {
    Box::leak(CString::new(text).unwrap_or_default().into_boxed_c_str())
}

/// Defines every setting and reserves the prefix, so that PostgreSQL warns of unknown names when it loads the library.
pub fn define() {
    for (setting, value) in Setting::ALL.into_iter().zip(&VALUES) {
        ffi::define_text_setting(
            forever(&format!("archiver.{}", setting.name())),
            forever(setting.description()),
            forever(setting.default_value()),
            value,
        );
    }
    ffi::reserve_setting_prefix(c"archiver");
}

/// What is typed in the configuration now.
pub fn settings() -> Settings {
    let mut settings = Settings::default();
    for (setting, value) in Setting::ALL.into_iter().zip(&VALUES) {
        if let Some(text) = value.get() {
            settings.set(setting, text.to_string_lossy());
        }
    }
    settings
}

/// Everything that is wrong with the configuration, one error for each setting.
pub fn problems(data_directory: &Path) -> Vec<Error> {
    let unknown = server_conf(data_directory).map(|conf| conf.unknown_settings().collect()).unwrap_or_default();
    let mut problems: Vec<Error> = unknown;
    problems.extend(Config::problems(&settings()));
    if problems.is_empty() {
        problems.extend(config(data_directory).err().or_else(|| streaming(data_directory).err()));
    }
    problems
}

/// What check() judges by.
pub fn limits() -> Result<Limits> {
    Limits::parse(&settings())
}

/// What the configuration amounts to, or what is wrong with it. The files are looked through for names that do not
/// exist, since PostgreSQL passes over those; `data_directory` is where the server lies.
pub fn config(data_directory: &Path) -> Result<Config> {
    if let Some(unknown) = server_conf(data_directory).and_then(|conf| conf.unknown_settings().next()) {
        return Err(unknown);
    }
    let config = Config::parse(&settings())?;
    check_memory(&config, &ffi::cluster())?;
    Ok(config)
}

/// What is to be received, if anything is, or what is wrong with that.
pub fn streaming(data_directory: &Path) -> Result<Option<(Config, Streaming)>> {
    match Streaming::is_on(&settings())? {
        true => receiver(data_directory).map(Some),
        false => Ok(None),
    }
}

/// Whether it would be this server's own WAL that is received: no other server is named.
pub fn receives_own_wal() -> bool {
    settings().get(Setting::StreamingConninfo).trim().is_empty()
}

/// Whether WAL is to be received.
pub fn receives_wal() -> bool {
    Streaming::is_on(&settings()).unwrap_or(false)
}

/// How WAL would be received, whether it is or not: where no server is named, this one's.
pub fn receiver(data_directory: &Path) -> Result<(Config, Streaming)> {
    let mut settings = settings();
    if receives_own_wal() {
        settings.set(Setting::StreamingConninfo, conninfo_of_server(data_directory).unwrap_or_default());
    }
    let config = config(data_directory)?;
    let streaming = Streaming::parse(&settings, &config.destination)?;
    Ok((config, streaming))
}

/// What stands in the files. Those that cannot be read are PostgreSQL's to complain about: values come from it.
fn server_conf(data_directory: &Path) -> Option<ServerConf> {
    ServerConf::of_server(&ffi::config_file()?, data_directory).ok()
}
