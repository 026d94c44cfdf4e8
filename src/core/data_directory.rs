//! What a data directory says of the cluster in it, also while no server runs.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// The cluster in `data_directory`: the first eight bytes of its control file (PostgreSQL, pg_control.h,
/// `ControlFileData`), in the byte order of the machine that runs it. Nothing where no cluster lies there.
pub fn system_identifier(data_directory: &Path) -> Result<Option<u64>> {
    let path = data_directory.join("global/pg_control");
    let mut bytes = [0; 8];
    match File::open(&path).and_then(|mut file| file.read_exact(&mut bytes)) {
        Ok(()) => Ok(Some(u64::from_ne_bytes(bytes))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read control file", &path, &error)),
    }
}
