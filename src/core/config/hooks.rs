//! The hook scripts, as they are set.

use super::Setting;
use std::time::Duration;

/// A place where a program of the user's runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Before a file is archived.
    PreArchive,
    /// Right before, until it succeeds.
    PreArchiveRetry,
    /// Right after, until it succeeds.
    PostArchiveRetry,
    /// After that.
    PostArchive,
    /// Before an archived file is deleted.
    PreWalDelete,
    /// Right before, until it succeeds.
    PreWalDeleteRetry,
    /// Right after, until it succeeds.
    PostWalDeleteRetry,
    /// After that.
    PostWalDelete,
}

impl Hook {
    /// All of them, those of one occasion in the order in which they run.
    pub const ALL: [Hook; 8] = [
        Hook::PreArchive,
        Hook::PreArchiveRetry,
        Hook::PostArchiveRetry,
        Hook::PostArchive,
        Hook::PreWalDelete,
        Hook::PreWalDeleteRetry,
        Hook::PostWalDeleteRetry,
        Hook::PostWalDelete,
    ];

    /// The setting that holds its text.
    pub const fn setting(self) -> Setting {
        match self {
            Hook::PreArchive => Setting::PreArchiveScript,
            Hook::PreArchiveRetry => Setting::PreArchiveRetryScript,
            Hook::PostArchiveRetry => Setting::PostArchiveRetryScript,
            Hook::PostArchive => Setting::PostArchiveScript,
            Hook::PreWalDelete => Setting::PreWalDeleteScript,
            Hook::PreWalDeleteRetry => Setting::PreWalDeleteRetryScript,
            Hook::PostWalDeleteRetry => Setting::PostWalDeleteRetryScript,
            Hook::PostWalDelete => Setting::PostWalDeleteScript,
        }
    }

    /// Its name: that of its setting, and Barman's.
    pub const fn name(self) -> &'static str {
        self.setting().name()
    }

    /// Whether it is run until it succeeds.
    pub fn is_retry(self) -> bool {
        self.name().ends_with("_retry_script")
    }

    /// Whether it runs before what it is about.
    pub fn is_before(self) -> bool {
        self.name().starts_with("pre_")
    }
}

/// What was typed for each hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookScripts {
    pub(super) texts: [String; Hook::ALL.len()],
    /// How long one hook may take, with all its attempts.
    pub timeout: Duration,
}

impl HookScripts {
    /// What the shell is to run; nothing where no such hook is set.
    pub fn text(&self, hook: Hook) -> Option<&str> {
        Some(self.texts[hook as usize].as_str()).filter(|text| !text.is_empty())
    }

    /// The hooks that are set.
    pub fn set(&self) -> impl Iterator<Item = (Hook, &str)> {
        Hook::ALL.into_iter().filter_map(|hook| Some((hook, self.text(hook)?)))
    }
}
