//! Hook scripts around the removal of each file.

use super::{Attendant, Facts};
use crate::error::{Error, Result};
use crate::hooks::{About, End, Hooks, Occasion};
use std::path::PathBuf;
use std::time::Instant;

/// Runs the hooks of a deletion; answers nothing where none is set, which saves a look at each file.
pub struct Attended<'a> {
    hooks: &'a Hooks,
    began: Instant,
}

impl<'a> Attended<'a> {
    /// By those hooks, if some are set for deletion.
    pub fn by(hooks: &'a Hooks) -> Option<Self> {
        hooks.are_set_for(Occasion::WalDelete).then(|| Attended { hooks, began: Instant::now() })
    }
}

fn about(file: &Facts, result: &'static str) -> About {
    About {
        name: file.name,
        file: PathBuf::from(&file.location),
        size: file.stored_size,
        modified: file.modified,
        format: file.format,
        location: file.location.clone(),
        result,
    }
}

impl Attendant for Attended<'_> {
    fn before(&mut self, file: &Facts) -> Result<()> {
        let answered = self.hooks.before(Occasion::WalDelete, &about(file, ""));
        self.began = Instant::now();
        answered
    }

    fn after(&mut self, file: &Facts, removed: &Result<()>) {
        let error = removed.as_ref().err().map(Error::to_string);
        let end = End { error, duration: Some(self.began.elapsed()) };
        self.hooks.after(Occasion::WalDelete, about(file, "deleted"), &end);
    }
}
