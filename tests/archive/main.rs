//! Archiving and restoring without a server: one file at a time, the pool of threads, and the way back.

mod duplicates;
mod identity;
mod pool;
mod records;
mod restore;
mod sources;
