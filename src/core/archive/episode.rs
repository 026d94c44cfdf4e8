//! When to speak of failures: once when the cause changes, then at most once a minute; and once when it is over.

use crate::error::Error;
use std::time::{Duration, Instant};

const REPEAT_INTERVAL: Duration = Duration::from_secs(60);

/// A stretch of failures, and what was said of it.
#[derive(Debug, Default)]
pub struct Episode {
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    since: Instant,
    /// Primary line of what was said last.
    said: String,
    said_at: Instant,
    /// Failures since then, the last one included.
    unsaid: u64,
    failures: u64,
}

/// An episode that is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// From the first failure to the success.
    pub lasted: Duration,
    /// How many attempts failed.
    pub failures: u64,
}

impl Episode {
    /// Counts a failure; answers the number of failures to be told now, or nothing where it was told already.
    pub fn fail(&mut self, error: &Error, now: Instant) -> Option<u64> {
        let cause = error.message();
        let Some(open) = &mut self.open else {
            self.open = Some(Open { since: now, said: cause.to_string(), said_at: now, unsaid: 0, failures: 1 });
            return Some(1);
        };
        open.failures += 1;
        open.unsaid += 1;
        if open.said == cause && now.duration_since(open.said_at) < REPEAT_INTERVAL {
            return None;
        }
        open.said = cause.to_string();
        open.said_at = now;
        Some(std::mem::take(&mut open.unsaid))
    }

    /// How many attempts have failed in a row.
    pub fn failures(&self) -> u64 {
        self.open.as_ref().map_or(0, |open| open.failures)
    }

    /// Counts a success; answers the episode that it ends.
    pub fn succeed(&mut self, now: Instant) -> Option<Recovered> {
        let open = self.open.take()?;
        Some(Recovered { lasted: now.duration_since(open.since), failures: open.failures })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn error(message: &str) -> Error {
        Error::new(Kind::Storage, "x", message)
    }

    #[test]
    fn a_cause_is_told_once_then_once_a_minute_with_its_count() {
        let mut episode = Episode::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(episode.fail(&error("full"), at(0)), Some(1));
        assert_eq!(episode.fail(&error("full"), at(1)), None);
        assert_eq!(episode.fail(&error("full"), at(59)), None);
        assert_eq!(episode.fail(&error("full"), at(60)), Some(3));
        assert_eq!(episode.fail(&error("full"), at(61)), None);
        assert_eq!(episode.fail(&error("gone"), at(62)), Some(2), "another cause is told at once");
        assert_eq!(episode.failures(), 6);
        let recovered = Recovered { lasted: Duration::from_secs(70), failures: 6 };
        assert_eq!(episode.succeed(at(70)), Some(recovered));
        assert_eq!(episode.succeed(at(71)), None);
        assert_eq!(episode.fail(&error("full"), at(72)), Some(1));
    }
}
