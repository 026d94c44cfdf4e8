//! WAL vocabulary: what files are called, where they lie on the line of time, what their first page says.
//! Pure: no I/O, no settings, no clock.

mod history;
mod name;
mod page;
mod position;

pub use history::{Ancestor, BadHistory, History};
pub use name::{BadName, Kind, SegmentName, WalName};
pub use page::{BadHeader, Expected, LongPageHeader, magic_of_major, major_of_magic};
pub use position::{Lsn, SegmentSize, Timeline};
