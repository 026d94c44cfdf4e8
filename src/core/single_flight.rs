//! One question to the storage that many threads have at once.

use crate::error::{Error, Result};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Something that one thread at a time works on, so that those who wait find it done. A failure is theirs as well: each
/// of them would try for as long again, one behind the other.
#[derive(Debug, Default)]
pub struct SingleFlight<T> {
    state: Mutex<State<T>>,
}

#[derive(Debug, Default)]
struct State<T> {
    held: T,
    failed: Option<(Instant, Error)>,
}

impl<T> SingleFlight<T> {
    /// Works on it. Fails without having worked where somebody failed while this thread waited.
    pub fn with<R>(&self, work: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let began_to_wait = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, error)) = &state.failed
            && *at >= began_to_wait
        {
            return Err(error.clone());
        }
        let done = work(&mut state.held);
        if let Err(error) = &done {
            state.failed = Some((Instant::now(), error.clone()));
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use std::sync::Barrier;
    use std::time::Duration;

    #[test]
    fn those_who_waited_share_the_failure_and_who_comes_later_tries_anew() {
        let flight = SingleFlight::<u32>::default();
        let barrier = Barrier::new(2);
        let fail = |count: &mut u32| {
            *count += 1;
            Err::<(), _>(Error::new(Kind::Storage, "x", "gone"))
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                flight.with(|count| {
                    barrier.wait();
                    // Until the other one waits.
                    std::thread::sleep(Duration::from_millis(100));
                    fail(count)
                })
            });
            barrier.wait();
            assert_eq!(flight.with(fail).unwrap_err().message(), "gone");
        });
        assert_eq!(flight.with(|count| Ok(*count)), Ok(1), "the one who waited did not work");
        assert!(flight.with(fail).is_err());
        assert_eq!(flight.with(|count| Ok(*count)), Ok(2));
    }
}
