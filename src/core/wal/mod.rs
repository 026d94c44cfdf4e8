//! WAL vocabulary: what files are called, where they lie on the line of time, what their pages say.
//! Pure: no I/O, no settings, no clock.

mod history;
mod label;
mod name;
mod page;
mod pages;
mod position;

pub use history::{Ancestor, BadHistory, History};
pub use label::{BadLabel, check_label};
pub use name::{BadName, Kind, SegmentName, WalName};
pub use page::{BadHeader, Expected, LongPageHeader, magic_of_major, major_of_magic};
pub use pages::{BadPage, Pages};
pub use position::{Lsn, SegmentSize, Timeline};
