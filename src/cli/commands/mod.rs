//! One room for each command.

pub mod archive;
pub mod check;
pub mod delete;
pub mod errors;
pub mod gaps;
pub mod list;
pub mod rebuild;
pub mod receive_wal;
pub mod restore;
pub mod status;
pub mod verify;

use crate::args::Arguments;
use crate::output::tell;
use crate::settings;
use archiver_core::Result;
use archiver_core::config::Destination;
use archiver_core::data_directory::hash_key;
use archiver_core::listing::Range;
use archiver_core::place::Place;
use archiver_core::pulse::Pulse;
use archiver_core::wal::WalName;
use std::sync::Arc;

/// The archive that the arguments name, and the cluster that asks where it is known.
fn open(arguments: &Arguments) -> Result<(Place, Option<u64>)> {
    let data_directory = settings::data_directory(arguments, None);
    let destination = Destination::parse(&settings::read(arguments, &data_directory)?)?;
    let place = Place::open(&destination, &Arc::new(Pulse::new()))?.known_to(hash_key(&data_directory));
    Ok((place, settings::system_identifier(arguments, &data_directory)?))
}

/// The files that were typed as a range; tells of one that ends before it begins, which is none.
fn range(from: Option<WalName>, to: Option<WalName>) -> Option<Range> {
    match (from, to) {
        (Some(from), Some(to)) if from > to => {
            tell(format_args!("\"{from}\" (--from) stands behind \"{to}\" (--to)"));
            None
        }
        _ => Some(Range { from, to }),
    }
}
