//! The current credentials, shared by all requests of a store.

use super::file::Stamp;
use super::{Chain, Credentials, Found, Source};
use crate::error::{Error, Kind, Result};
use reqwest::Client;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::watch;

/// How often things are done again.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Temporary keys are replaced when that much of their lifetime, or a quarter of it, remains.
    margin: Duration,
    /// Between two looks at the files: a rotated key is noticed that soon.
    look: Duration,
    /// After a failed fetch, give or take a third: machines that were started together must not ask together.
    pause: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Pace { margin: Duration::from_secs(300), look: Duration::from_secs(10), pause: Duration::from_secs(3) }
    }
}

impl Pace {
    /// When keys that were fetched at `now` are to be replaced.
    fn refresh_at(self, expires: SystemTime, now: SystemTime) -> SystemTime {
        let lifetime = expires.duration_since(now).unwrap_or_default();
        expires - self.margin.min(lifetime / 4)
    }

    fn retry_at(self) -> Instant {
        Instant::now() + self.pause.mul_f64(2.0 / 3.0 + fastrand::f64() * 2.0 / 3.0)
    }
}

/// Keeps the current credentials, and replaces them before they expire.
///
/// May be asked from many tasks at once; one fetch at a time goes on, in a task of its own, so that a request which is
/// given up takes no fetch with it.
#[derive(Clone)]
pub struct Keeper {
    shared: Arc<Shared>,
}

struct Shared {
    chain: Chain,
    pace: Pace,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    held: Option<Held>,
    /// Temporary ones that the store did not accept, until there are others.
    distrusted: Option<Credentials>,
    /// The fetch that goes on. One that is not this one any more lands nowhere.
    flight: Option<Flight>,
    flights: u64,
    /// The last fetch, where it failed, and when to try again.
    failure: Option<(Error, Instant)>,
}

struct Held {
    credentials: Credentials,
    refresh_at: Option<SystemTime>,
    files: Vec<Stamp>,
    look_at: Instant,
}

struct Flight {
    number: u64,
    /// Closed at the end.
    end: watch::Receiver<()>,
}

/// What a flight is for.
enum Errand {
    Fetch,
    /// Fetch, if one of these files has changed.
    Look(Vec<Stamp>),
}

impl Keeper {
    /// Keeps what `chain` finds. Nothing is read before the first question.
    pub fn new(chain: Chain) -> Self {
        Keeper::with_pace(chain, Pace::default())
    }

    fn with_pace(chain: Chain, pace: Pace) -> Self {
        Keeper { shared: Arc::new(Shared { chain, pace, state: Mutex::default() }) }
    }

    /// Credentials that are valid now.
    ///
    /// Temporary ones are replaced before they expire, those of a file when it changes. While that goes on or fails, the
    /// old ones are answered as long as they are valid. Where there are none the answer takes one fetch; for a few seconds
    /// after a failed one its error is the answer. `http` is as for [`Chain::fetch`].
    pub async fn current(&self, http: &Client) -> Result<Credentials> {
        /// A fetch may end in credentials that were distrusted or have expired before this task runs again.
        const MOST_FLIGHTS: usize = 3;
        for _ in 0..MOST_FLIGHTS {
            let mut end = match self.answer_or_flight(http)? {
                Answer::Now(credentials) => return Ok(credentials),
                Answer::AfterFlight(end) => end,
            };
            // An error is the end.
            while end.changed().await.is_ok() {}
        }
        match self.answer_or_flight(http)? {
            Answer::Now(credentials) => Ok(credentials),
            Answer::AfterFlight(_) => {
                let message = "could not get credentials: none that were found stayed valid";
                Err(Error::new(Kind::Storage, "credentials", message).retry_if(true))
            }
        }
    }

    /// Forgets `refused`, which the store did not accept, unless others have taken their place: the next question reads
    /// files and asks endpoints anew.
    ///
    /// A store may have refused what was asked and not who asked: temporary ones go on until they expire where the
    /// endpoint has no others. Those of a file are mended there, so what is wrong with the file is the better answer.
    pub fn distrust(&self, refused: &Credentials) {
        let mut state = self.shared.state();
        if let Some(held) = state.held.take_if(|held| held.credentials.has_keys_of(refused)) {
            let distrusted = Some(held.credentials).filter(|credentials| credentials.expires.is_some());
            // A fetch that goes on may have read the same ones.
            *state = State { distrusted, flights: state.flights, ..State::default() };
        }
    }

    /// Source and expiry of the credentials that are held, without asking for any.
    pub fn known(&self) -> Option<(Source, Option<SystemTime>)> {
        let state = self.shared.state();
        let held = state.held.as_ref().map(|held| &held.credentials);
        let known = held.or(state.failure.as_ref().and(state.distrusted.as_ref()))?;
        Some((known.source.clone(), known.expires))
    }

    /// Why the last fetch failed, if it did: told even while older credentials still serve.
    pub fn last_failure(&self) -> Option<Error> {
        self.shared.state().failure.as_ref().map(|(error, _)| error.clone())
    }

    /// Where to look, as given.
    pub fn chain(&self) -> &Chain {
        &self.shared.chain
    }

    fn answer_or_flight(&self, http: &Client) -> Result<Answer> {
        let mut state = self.shared.state();
        if state.flight.is_none()
            && let Some(errand) = state.errand(SystemTime::now(), Instant::now())
        {
            self.take_off(&mut state, errand, http.clone());
        }
        if let Some(held) = state.held.as_ref().filter(|held| !held.credentials.is_expired(SystemTime::now())) {
            return Ok(Answer::Now(held.credentials.clone()));
        }
        match (&state.flight, &state.failure) {
            (Some(flight), _) => Ok(Answer::AfterFlight(flight.end.clone())),
            (None, Some((error, _))) => match &state.distrusted {
                Some(distrusted) if !distrusted.is_expired(SystemTime::now()) => Ok(Answer::Now(distrusted.clone())),
                _ => Err(error.clone()),
            },
            (None, None) => Err(Error::new(Kind::Internal, "credentials", "no fetch of credentials was begun")),
        }
    }

    fn take_off(&self, state: &mut State, errand: Errand, http: Client) {
        let (sender, end) = watch::channel(());
        state.flights += 1;
        let number = state.flights;
        state.flight = Some(Flight { number, end });
        let flight = Landing { shared: Arc::clone(&self.shared), number, _end: sender };
        tokio::spawn(flight.fly(errand, http));
    }
}

enum Answer {
    Now(Credentials),
    AfterFlight(watch::Receiver<()>),
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper").field("chain", self.chain()).field("known", &self.known()).finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is changed by halves under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// What there is to do now, if nothing goes on.
    fn errand(&mut self, now: SystemTime, tick: Instant) -> Option<Errand> {
        let has_to_wait = self.failure.as_ref().is_some_and(|(_, retry_at)| tick < *retry_at);
        let Some(held) = &mut self.held else { return (!has_to_wait).then_some(Errand::Fetch) };
        if held.refresh_at.is_some_and(|at| at <= now) && !has_to_wait {
            return Some(Errand::Fetch);
        }
        if held.files.is_empty() || tick < held.look_at {
            return None;
        }
        Some(Errand::Look(held.files.clone()))
    }
}

/// A fetch under way. However it ends, those who wait for it are told.
struct Landing {
    shared: Arc<Shared>,
    number: u64,
    _end: watch::Sender<()>,
}

impl Landing {
    async fn fly(self, errand: Errand, http: Client) {
        if let Errand::Look(files) = errand {
            let has_changed = self.shared.chain.have_changed(files).await;
            self.land(|state, pace| {
                if let Some(held) = &mut state.held {
                    held.look_at = Instant::now() + pace.look;
                }
            });
            if !has_changed {
                return;
            }
        }
        let outcome = self.shared.chain.find(&http).await;
        self.land(|state, pace| match outcome {
            Ok(found) => {
                state.held = Some(Held::new(found, pace));
                (state.distrusted, state.failure) = (None, None);
            }
            Err(error) => state.failure = Some((error, pace.retry_at())),
        });
    }

    /// Changes the state, unless another flight counts by now.
    fn land(&self, change: impl FnOnce(&mut State, Pace)) {
        let mut state = self.shared.state();
        if state.flight.as_ref().is_some_and(|flight| flight.number == self.number) {
            change(&mut state, self.shared.pace);
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.land(|state, _| state.flight = None);
    }
}

impl Held {
    fn new(found: Found, pace: Pace) -> Self {
        let Found { credentials, files } = found;
        let refresh_at = credentials.expires.map(|expires| pace.refresh_at(expires, SystemTime::now()));
        Held { credentials, refresh_at, files, look_at: Instant::now() + pace.look }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stand_in::{Reply, StandIn, block_on, client, keys};
    use super::*;
    use std::fs;
    use std::future::poll_fn;
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;
    use std::task::Poll;

    const QUICK: Pace =
        Pace { margin: Duration::from_secs(300), look: Duration::ZERO, pause: Duration::from_millis(30) };
    const NEVER: Pace = Pace { look: Duration::from_secs(3600), pause: Duration::from_secs(3600), ..QUICK };

    /// Keys with numbers for names, which live for `lifetime`.
    fn endpoint(lifetime: Duration) -> StandIn {
        StandIn::new(move |_, number| Reply::text(200, keys(&number.to_string(), SystemTime::now() + lifetime)))
    }

    fn keeper_of(server: &StandIn, pace: Pace) -> Keeper {
        let url = server.url("/");
        let variables = [("HOME", "/nonexistent"), ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url.as_str())];
        Keeper::with_pace(Chain::in_environment(&variables), pace)
    }

    fn keeper_of_file(path: &Path, pace: Pace) -> Keeper {
        Keeper::with_pace(Chain::of(None, Some(path), &[]), pace)
    }

    fn write_keys(path: &Path, access_key: &str) {
        let next = path.with_extension("next");
        let text = format!("[default]\naws_access_key_id={access_key}\naws_secret_access_key=s3kr1t\n");
        fs::write(&next, text).unwrap();
        fs::rename(&next, path).unwrap();
    }

    async fn name_of(keeper: &Keeper) -> Result<String> {
        keeper.current(&client()).await.map(|credentials| credentials.access_key)
    }

    /// Asks until it is so; the answers must be credentials all the time.
    async fn until(keeper: &Keeper, is_so: impl Fn(&str) -> bool) {
        while !is_so(&name_of(keeper).await.unwrap()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    #[test]
    fn many_questions_at_once_take_one_fetch() {
        let server = endpoint(Duration::from_secs(3600));
        let keeper = keeper_of(&server, NEVER);
        assert_eq!(keeper.known(), None);
        block_on(async {
            let tasks: Vec<_> = (0..50)
                .map(|_| {
                    let keeper = keeper.clone();
                    tokio::spawn(async move { name_of(&keeper).await })
                })
                .collect();
            for task in tasks {
                assert_eq!(task.await.unwrap().unwrap(), "0");
            }
        });
        assert_eq!(server.count(), 1);
        let (source, expires) = keeper.known().unwrap();
        assert!(source == Source::Container && expires.unwrap() > SystemTime::now());
    }

    #[test]
    fn keys_are_replaced_before_they_expire_and_expired_ones_are_never_answered() {
        let server = endpoint(Duration::from_millis(300));
        let keeper = keeper_of(&server, QUICK);
        let end = Instant::now() + Duration::from_millis(900);
        block_on(async {
            let tasks: Vec<_> = (0..50)
                .map(|_| {
                    let keeper = keeper.clone();
                    tokio::spawn(async move {
                        let http = client();
                        while Instant::now() < end {
                            let asked = SystemTime::now();
                            let answered = keeper.current(&http).await.unwrap();
                            assert!(answered.expires.unwrap() > asked);
                            tokio::time::sleep(Duration::from_millis(2)).await;
                        }
                    })
                })
                .collect();
            for task in tasks {
                task.await.unwrap();
            }
        });
        let count = server.count();
        assert!((2..=12).contains(&count), "{count} fetches");
    }

    #[test]
    fn the_old_ones_are_answered_while_new_ones_are_fetched() {
        let server = StandIn::new(|_, number| match number {
            0 => Reply::text(200, keys("old", SystemTime::now() + Duration::from_secs(60))),
            _ => Reply::Hang,
        });
        // The margin is a quarter of the lifetime: a fetch is due at once where the lifetime is nearly over.
        let keeper = keeper_of(&server, QUICK);
        block_on(async {
            assert_eq!(name_of(&keeper).await.unwrap(), "old");
            make_due(&keeper);
            let began = Instant::now();
            for _ in 0..10 {
                assert_eq!(name_of(&keeper).await.unwrap(), "old");
                tokio::task::yield_now().await;
            }
            assert!(began.elapsed() < Duration::from_secs(1), "nobody waits for the hanging endpoint");
        });
    }

    fn make_due(keeper: &Keeper) {
        keeper.shared.state().held.as_mut().unwrap().refresh_at = Some(SystemTime::now());
    }

    fn make_expired(keeper: &Keeper) {
        let mut state = keeper.shared.state();
        let held = state.held.as_mut().unwrap();
        held.credentials.expires = Some(SystemTime::now());
        held.refresh_at = held.credentials.expires;
    }

    #[test]
    fn a_failing_fetch_keeps_the_old_ones_until_they_expire_and_is_paced() {
        let server = StandIn::new(|_, number| match number {
            0 => Reply::text(200, keys("old", SystemTime::now() + Duration::from_secs(60))),
            _ => Reply::text(403, r#"{"code":"Denied"}"#),
        });
        let keeper = keeper_of(&server, NEVER);
        block_on(async {
            assert_eq!(name_of(&keeper).await.unwrap(), "old");
            make_due(&keeper);
            while keeper.last_failure().is_none() {
                assert_eq!(name_of(&keeper).await.unwrap(), "old");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            make_expired(&keeper);
            for _ in 0..5 {
                let error = name_of(&keeper).await.unwrap_err();
                assert_eq!(error.to_string(), "could not get credentials from container: it answered 403 Denied");
            }
        });
        assert_eq!(server.count(), 2, "no further fetch before its time");
    }

    #[test]
    fn a_fetch_that_failed_is_tried_again_after_a_pause() {
        let is_well = Arc::new(AtomicBool::new(false));
        let is_well_there = Arc::clone(&is_well);
        let server = StandIn::new(move |_, _| match is_well_there.load(Ordering::SeqCst) {
            true => Reply::text(200, keys("new", SystemTime::now() + Duration::from_secs(60))),
            false => Reply::text(404, ""),
        });
        let keeper = keeper_of(&server, QUICK);
        block_on(async {
            assert!(name_of(&keeper).await.is_err());
            is_well.store(true, Ordering::SeqCst);
            while name_of(&keeper).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        assert!(keeper.last_failure().is_none() && server.count() == 2);
    }

    #[test]
    fn distrusted_ones_are_read_anew_unless_they_were_replaced() {
        let server = endpoint(Duration::from_secs(3600));
        let keeper = keeper_of(&server, NEVER);
        block_on(async {
            let first = keeper.current(&client()).await.unwrap();
            keeper.distrust(&first);
            assert_eq!(keeper.known(), None);
            assert_eq!(name_of(&keeper).await.unwrap(), "1");
            keeper.distrust(&first);
            assert_eq!(name_of(&keeper).await.unwrap(), "1", "these are others");
        });
        assert_eq!(server.count(), 2);
    }

    #[test]
    fn distrusted_temporary_ones_serve_until_they_expire_where_there_are_no_others() {
        let server = StandIn::new(|_, number| match number {
            0 => Reply::text(200, keys("old", SystemTime::now() + Duration::from_secs(60))),
            _ => Reply::text(403, ""),
        });
        let keeper = keeper_of(&server, NEVER);
        block_on(async {
            let refused = keeper.current(&client()).await.unwrap();
            for _ in 0..3 {
                keeper.distrust(&refused);
                assert_eq!(name_of(&keeper).await.unwrap(), "old");
            }
            assert!(keeper.known().is_some() && keeper.last_failure().is_some());
            keeper.shared.state().distrusted.as_mut().unwrap().expires = Some(SystemTime::now());
            let error = name_of(&keeper).await.unwrap_err();
            assert_eq!(error.to_string(), "could not get credentials from container: it answered 403");
        });
        assert_eq!(server.count(), 2, "no further fetch before its time");
    }

    #[test]
    fn a_fetch_from_before_the_distrust_does_not_count() {
        let ((release_early, early), (release_late, late)) = (mpsc::channel::<()>(), mpsc::channel::<()>());
        let holds = [early, late].map(Mutex::new);
        let server = StandIn::new(move |_, number| {
            if let 1 | 2 = number {
                let _ = holds[number - 1].lock().unwrap().recv();
            }
            Reply::text(200, keys(&number.to_string(), SystemTime::now() + Duration::from_secs(60)))
        });
        let keeper = keeper_of(&server, NEVER);
        let until_asked = async |count| {
            while server.count() < count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        block_on(async {
            let first = keeper.current(&client()).await.unwrap();
            make_due(&keeper);
            assert_eq!(name_of(&keeper).await.unwrap(), "0");
            until_asked(2).await;
            keeper.distrust(&first);
            let began = Instant::now();
            let asking = keeper.clone();
            let question = tokio::spawn(async move { name_of(&asking).await });
            until_asked(3).await;
            assert!(began.elapsed() < Duration::from_secs(1), "a new fetch, not another try of the old one");
            drop(release_early);
            for _ in 0..10 {
                tokio::time::sleep(Duration::from_millis(2)).await;
                assert_eq!(keeper.known(), None, "what comes late changes nothing");
            }
            drop(release_late);
            assert_eq!(question.await.unwrap().unwrap(), "2");
        });
    }

    #[test]
    fn a_question_that_is_given_up_takes_no_fetch_with_it() {
        let server = endpoint(Duration::from_secs(3600));
        let keeper = keeper_of(&server, NEVER);
        block_on(async {
            let http = client();
            let mut question = Box::pin(keeper.current(&http));
            let is_waiting = poll_fn(|context| Poll::Ready(question.as_mut().poll(context).is_pending())).await;
            assert!(is_waiting);
            drop(question);
            assert_eq!(name_of(&keeper).await.unwrap(), "0");
        });
        assert_eq!(server.count(), 1);
    }

    #[test]
    fn a_rotated_file_is_noticed_and_a_broken_one_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("credentials");
        write_keys(&path, "AKIA1");
        let keeper = keeper_of_file(&path, QUICK);
        block_on(async {
            assert_eq!(name_of(&keeper).await.unwrap(), "AKIA1");
            write_keys(&path, "AKIA2");
            until(&keeper, |name| name == "AKIA2").await;
            fs::write(&path, "[default]\naws_access_key_id = half\n").unwrap();
            while keeper.last_failure().is_none() {
                assert_eq!(name_of(&keeper).await.unwrap(), "AKIA2");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            write_keys(&path, "AKIA3");
            until(&keeper, |name| name == "AKIA3").await;
        });
        assert!(keeper.last_failure().is_none());
    }

    #[test]
    fn files_are_looked_at_no_more_often_than_said_and_at_once_after_a_distrust() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("credentials");
        write_keys(&path, "AKIA1");
        let keeper = keeper_of_file(&path, NEVER);
        block_on(async {
            let first = keeper.current(&client()).await.unwrap();
            write_keys(&path, "AKIA2");
            for _ in 0..5 {
                assert_eq!(name_of(&keeper).await.unwrap(), "AKIA1");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            keeper.distrust(&first);
            assert_eq!(name_of(&keeper).await.unwrap(), "AKIA2");
        });
    }

    #[test]
    fn the_margin_is_a_quarter_of_the_lifetime_and_at_most_five_minutes() {
        let now = SystemTime::now();
        let margin = |lifetime| {
            let expires = now + Duration::from_secs(lifetime);
            expires.duration_since(Pace::default().refresh_at(expires, now)).unwrap().as_secs()
        };
        assert_eq!([60, 600, 1200, 3600, 21_600].map(margin), [15, 150, 300, 300, 300]);
    }
}
