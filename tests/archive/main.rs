//! Archiving and restoring without a server: one file at a time, the pool of threads, the way back, what lies there, and
//! whether that is whole.

mod deletion;
mod duplicates;
mod encryption;
mod filters;
mod gaps;
mod hooks;
mod identity;
mod incoming;
mod listing;
mod parts;
mod pool;
mod rebuild;
mod records;
mod restore;
mod sources;
mod verify;
