//! How long a source may take, and how much it may say.

use std::time::{Duration, Instant};

/// How long the steps may take. A hanging endpoint or a dead mount costs a refresh, never the runtime.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// One whole fetch, whatever it asks.
    pub whole: Duration,
    /// Reading files: shorter than the whole, so that the error names the file.
    pub file: Duration,
    /// One request to instance metadata: a machine without it answers nothing, and each try is waited out.
    pub metadata: Duration,
    /// One request to a container's endpoint.
    pub container: Duration,
    /// One request to the token service, which is far away.
    pub token_service: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Patience {
            whole: Duration::from_secs(10),
            file: Duration::from_secs(4),
            metadata: Duration::from_secs(1),
            container: Duration::from_secs(2),
            token_service: Duration::from_secs(4),
        }
    }
}

/// When one fetch must have ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Instant);

impl Deadline {
    pub fn after(whole: Duration) -> Self {
        Deadline(Instant::now() + whole)
    }

    /// What a step may take that would like `most`: no more than is left.
    pub fn leaves(self, most: Duration) -> Duration {
        most.min(self.0.saturating_duration_since(Instant::now()))
    }

    pub fn has_passed(self) -> bool {
        Instant::now() >= self.0
    }
}
