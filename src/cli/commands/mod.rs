//! One room for each command.

pub mod list;
pub mod restore;
pub mod status;
