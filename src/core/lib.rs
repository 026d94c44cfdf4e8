//! The WAL archiver without PostgreSQL.
//!
//! ```text
//! wal  part  codec  crypt  mode  hash  error    leaves: no I/O but the keys of crypt, no settings, no clock, no threads
//!   \     |       |
//!    layout     config       config knows only the enums of the leaves
//!        \       /
//!         store              keys and bytes; nothing of WAL names or codecs
//!           |
//!         place              a store with its layout and its records (catalogue, sums)
//!      /     |      \
//! archive  restore  listing  check   the only rooms that join the pieces
//!    |         |        |
//! incoming    verify   gaps  deletion    archiving from outside the server; whether all is there; what is not needed any more
//!    |
//!  stream                                WAL received while it is written, and archived from where it is received
//! ```
//! `process` runs programs of others; on it stand `hooks`, around a file, and `filter`, between two streams.
//! `lineage` tells what the history files of an archive say of its timelines, `rebuild` makes its records anew.
//! `queue`, `state` and `set_aside` tell what waits, how the archiver process stands, and what was set aside.
//! `data_directory` tells whose WAL it is where no server does, and whether one recovers there. `durable`, `file_lock`, `owner`, `regular_file`, `stamp` and `sys` are what the
//! file-system rooms stand on, `pulse`, `threads`, `in_order` and `single_flight` what works beside threads that wait. Nothing here knows pgrx.
#![deny(unsafe_code)]

pub mod archive;
pub mod catalogue;
pub mod check;
pub mod codec;
pub mod config;
pub mod crypt;
pub mod data_directory;
pub mod deletion;
pub mod durable;
pub mod error;
mod file_lock;
pub mod filter;
pub mod gaps;
pub mod hash;
pub mod hooks;
pub mod identity;
mod in_order;
pub mod incoming;
pub mod layout;
pub mod lineage;
pub mod listing;
pub mod mode;
pub mod owner;
pub mod part;
pub mod place;
pub mod process;
pub mod pulse;
pub mod queue;
pub mod rebuild;
mod regular_file;
pub mod report;
pub mod restore;
pub mod server_conf;
pub mod set_aside;
pub mod single_flight;
pub mod stamp;
pub mod state;
pub mod store;
pub mod stream;
pub mod sums;
mod sys;
pub mod threads;
pub mod verify;
pub mod wal;

pub use error::{Error, Kind, Result};
