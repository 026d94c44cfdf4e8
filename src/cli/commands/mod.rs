//! One room for each command.

pub mod archive;
pub mod check;
pub mod delete;
pub mod errors;
pub mod list;
pub mod restore;
pub mod status;
