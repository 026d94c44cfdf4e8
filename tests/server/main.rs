//! The archiver on real clusters: the server's archiver process, the program, and what SQL sees. `make test-server`
//! says which PostgreSQL.

mod archiving;
mod cluster;
mod crashes;
mod deleting;
mod encryption;
mod exits;
mod gates;
mod hooks;
mod kills;
mod looking;
mod page_cache;
mod prefetching;
mod privileges;
mod process;
mod recovery;
mod refusals;
mod regress;
mod restoring;
mod s3;
mod settings;
mod stopping;
mod streaming;
mod whole;
mod worker;
