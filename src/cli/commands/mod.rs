//! One room for each command.

pub mod restore;
