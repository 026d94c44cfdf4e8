//! The archiver inside PostgreSQL.

mod ffi;
mod functions;
pub mod guc;
mod module;
mod off_thread;
mod report;
pub mod worker;
