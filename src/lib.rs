//! archiver: the WAL archiver that lives inside PostgreSQL.
//!
//! Loaded by `archive_library = 'archiver'`. Inside the archiver process it compresses each WAL file in memory and stores
//! it exactly once. PostgreSQL is told that a file is archived after the last fsync of that very file and its line in
//! the catalogue, never before; no code path overwrites.
//!
//! ```text
//! src/core      what archiving is: names, codecs, storage, the pool, restoring. Knows no PostgreSQL (`archiver_core`).
//! src/pg        what PostgreSQL is: callbacks, settings, messages, SQL functions. The only room that uses pgrx.
//!   ffi         every declaration and call of C; with module and worker, which C calls, the only rooms with `unsafe`
//!   module      the archive module's callbacks and the wait for a file
//!   worker      the background worker that receives WAL
//!   guc         the settings of postgresql.conf, as texts
//!   report      messages in the server log
//!   off_thread  work that may hang, done beside a thread that can be cancelled
//!   functions   what SQL sees
//! src/cli       the program `archiver`; it uses src/core and never src/pg
//! ```

pgrx::pg_module_magic!();

mod pg;

#[cfg(any(test, feature = "pg_test"))]
#[path = "../pg_test/mod.rs"]
pub mod pg_test;

/// Called once in every process that loads the library. In the postmaster (shared_preload_libraries) nothing but
/// settings may be made: no thread, no socket, no file.
#[allow(non_snake_case)]
#[pgrx::pg_guard]
pub extern "C-unwind" fn _PG_init() {
    pg::guc::define();
    pg::worker::register();
}
