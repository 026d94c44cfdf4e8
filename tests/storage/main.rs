//! The contract of a store (`src/core/store/mod.rs`), sentence by sentence, for every store there is.

mod contract;
mod local;
