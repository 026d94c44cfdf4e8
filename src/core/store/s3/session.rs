//! Talking to a store: signed requests over connections that are kept alive, each attempt and all of them bounded.

use super::background::Background;
use super::credentials::{Credentials, Keeper};
use super::signature::sign;
use super::trouble::{Circumstances, Class, Trouble};
use crate::error::{Error, Kind, Result};
use crate::pulse::Pulse;
use bytes::Bytes;
use futures_util::future::{Either, select};
use futures_util::stream;
use reqwest::header::{CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue, IF_MATCH, RANGE};
use reqwest::{Body, Certificate, Client, Method, Request, Response, Url, redirect};
use s3::Region;
use sha2::{Digest, Sha256};
use std::future::Future;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use time::OffsetDateTime;
use tokio::sync::mpsc;

/// Pauses between attempts: doubled from the first up to the last, each cut at random to between a half and the whole,
/// so that many who were turned away together do not come back together.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long one call may try while time is short, since the server stops or a reload waits.
const HURRIED_RETRY_TIMEOUT: Duration = Duration::from_secs(1);
/// No attempt is cut shorter for lack of time.
const SHORTEST_ATTEMPT: Duration = Duration::from_secs(1);
/// How often a wait looks whether it is to end.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// A page of a listing, with room to spare; every other answer is far smaller.
const LONGEST_ANSWER: usize = 8 << 20;
const LONGEST_ERROR_ANSWER: usize = 64 << 10;
/// How a body moves: small enough to see it move, large enough to cost nothing.
const PIECE_BYTES: usize = 128 << 10;
/// Pieces that wait between two threads.
const PIECES_IN_CHANNEL: usize = 4;
/// Idle connections are closed before most stores do it themselves.
const IDLE_CONNECTION: Duration = Duration::from_secs(50);
const LONGEST_CONNECT: Duration = Duration::from_secs(10);

const REQUEST_ID: HeaderName = HeaderName::from_static("x-amz-request-id");

/// Whom to talk to, and for how long.
pub struct Peer {
    /// Scheme, host, and with path addressing the bucket; no slash at the end.
    pub base: String,
    /// The region requests are signed for.
    pub region: Region,
    /// Certificates that are trusted beside the system's.
    pub ca_file: Option<PathBuf>,
    /// How long one request may go without any progress.
    pub attempt_timeout: Duration,
    /// How long one call may try.
    pub retry_timeout: Duration,
}

/// What a request came to.
pub type Outcome<T> = std::result::Result<T, Box<Trouble>>;

/// A store, talked to by any number of threads at once.
pub struct Session {
    background: Background,
    peer: Peer,
    keeper: Keeper,
    pulse: Arc<Pulse>,
    client: Mutex<NumberedClient>,
    retries: AtomicU64,
}

/// A client and its connections; a failed connection makes way for a new one.
#[derive(Clone)]
struct NumberedClient {
    number: u64,
    client: Client,
}

/// One request, as often as it takes.
#[derive(Clone)]
pub struct Call {
    /// What to do.
    pub method: Method,
    /// With what.
    pub url: Url,
    /// All headers but those of the signature.
    pub headers: HeaderMap,
    /// The body; empty where there is none.
    pub body: Bytes,
    /// Its SHA-256, in hexadecimal digits.
    pub sha256: String,
}

impl Call {
    /// A request without headers or body.
    pub fn new(method: Method, url: Url) -> Self {
        Call { method, url, headers: HeaderMap::new(), body: Bytes::new(), sha256: hex::encode(Sha256::digest([])) }
    }
}

/// A success, read whole.
pub struct Answer {
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
}

/// A body that is written piece by piece, each time the same.
pub struct Streamed<'a> {
    /// Its length in bytes.
    pub length: u64,
    /// Its CRC-32C: a body that turns out another is never completed.
    pub crc32c: u32,
    /// Writes it.
    pub write: &'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
}

/// What one attempt came to, and with which credentials.
struct Failure {
    trouble: Box<Trouble>,
    credentials: Option<Box<Credentials>>,
}

impl From<Box<Trouble>> for Failure {
    fn from(trouble: Box<Trouble>) -> Self {
        Failure { trouble, credentials: None }
    }
}

/// Sees to it that a request ends: when nothing has moved for too long, or when the archiver stops.
#[derive(Clone)]
struct Watch {
    pulse: Arc<Pulse>,
    moved: Arc<AtomicU64>,
    timeout: Duration,
}

impl Watch {
    fn beat(&self) {
        self.moved.fetch_add(1, Ordering::Relaxed);
        self.pulse.beat();
    }

    async fn over(&self) -> Box<Trouble> {
        let (mut seen, mut since) = (self.moved.load(Ordering::Relaxed), Instant::now());
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            if self.pulse.is_stopped() {
                return Trouble::stopped();
            }
            match self.moved.load(Ordering::Relaxed) {
                moved if moved != seen => (seen, since) = (moved, Instant::now()),
                _ if since.elapsed() >= self.timeout => return Trouble::stalled(self.timeout),
                _ => {}
            }
        }
    }

    async fn guard<T>(&self, work: impl Future<Output = Outcome<T>>) -> Outcome<T> {
        match select(pin!(work), pin!(self.over())).await {
            Either::Left((done, _)) => done,
            Either::Right((trouble, _)) => Err(trouble),
        }
    }
}

impl Session {
    /// A session with that store. Nothing is sent yet.
    pub fn open(background: Background, peer: Peer, keeper: Keeper, pulse: Arc<Pulse>) -> Result<Self> {
        let client = NumberedClient { number: 0, client: make_client(&peer)? };
        Ok(Session { background, peer, keeper, pulse, client: Mutex::new(client), retries: AtomicU64::new(0) })
    }

    /// Whom it talks to.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Where the credentials come from.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// How many requests were made anew.
    pub fn retries(&self) -> u64 {
        self.retries.load(Ordering::Relaxed)
    }

    /// Fetches credentials, unless there are any; a stop ends the wait for them.
    pub fn credentials(&self) -> Result<Credentials> {
        let (keeper, client) = (self.keeper.clone(), self.client().client);
        // The keeper bounds itself.
        let watch = self.watch(Duration::MAX);
        let fetched =
            async move { watch.guard(async { keeper.current(&client).await.map_err(Trouble::beside) }).await };
        Ok(self.background.run(fetched)??)
    }

    /// Sends a request until it is answered, and reads the answer.
    pub fn call(&self, call: &Call) -> Outcome<Answer> {
        self.retrying(call, |timeout| {
            let (attempt, watch) = self.attempt(call, Content::Whole(call.body.clone()), timeout);
            self.run(async move {
                let response = attempt.send().await?;
                let headers = response.headers().clone();
                let body = watch.guard(read_whole(response, LONGEST_ANSWER, &watch)).await?;
                Ok(Answer { headers, body })
            })
        })
    }

    /// Sends a request whose body is written meanwhile.
    pub fn call_streamed(&self, call: &Call, body: &mut Streamed<'_>) -> Outcome<Answer> {
        self.retrying(call, |timeout| {
            let (sender, receiver) = mpsc::channel(PIECES_IN_CHANNEL);
            let (attempt, watch) = self.attempt(call, Content::Pieces { length: body.length, receiver }, timeout);
            let (done, outcome) = std::sync::mpsc::channel();
            let mut out = PieceWriter::new(sender, watch.clone());
            self.background.spawn(async move {
                let sent = async {
                    let response = attempt.send().await?;
                    let headers = response.headers().clone();
                    let body = watch.guard(read_whole(response, LONGEST_ANSWER, &watch)).await?;
                    Ok(Answer { headers, body })
                };
                // The writing thread waits for it.
                let _ = done.send(sent.await);
            });
            let written = (body.write)(&mut out).and_then(|()| out.finish(body.length, body.crc32c));
            if let Err(error) = &written {
                out.give_up();
                // Where the request ended first, writing failed for that reason.
                if !out.is_cut_off {
                    return Err(Trouble::of_caller(error_of_caller(error)).into());
                }
            }
            drop(out);
            outcome.recv().unwrap_or_else(|_| Err(Trouble::senseless("the request ended without an answer").into()))
        })
    }

    /// Opens an object for reading. Its body survives lost connections.
    pub fn open_object(self: &Arc<Self>, call: &Call) -> Outcome<(HeaderMap, ObjectReader)> {
        let (headers, receiver) = self.retrying(call, |timeout| self.open_once(call, timeout))?;
        let reader = ObjectReader {
            session: Arc::clone(self),
            call: call.clone(),
            etag: headers.get(reqwest::header::ETAG).cloned(),
            receiver,
            piece: Bytes::new(),
            offset: 0,
            is_over: false,
            losses: 0,
        };
        Ok((headers, reader))
    }

    fn open_once(&self, call: &Call, timeout: Duration) -> std::result::Result<(HeaderMap, Pieces), Failure> {
        let (attempt, watch) = self.attempt(call, Content::Whole(Bytes::new()), timeout);
        let (sender, receiver) = mpsc::channel(PIECES_IN_CHANNEL);
        let response = self.run(attempt.send())?;
        let headers = response.headers().clone();
        self.background.spawn(pump(response, sender, watch));
        Ok((headers, receiver))
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = std::result::Result<T, Failure>> + Send + 'static,
    ) -> std::result::Result<T, Failure> {
        self.background.run(work).unwrap_or_else(|error| Err(Trouble::beside(error).into()))
    }

    fn client(&self) -> NumberedClient {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes way for new connections: another address of the same name, other certificates.
    fn renew_client(&self, failed: u64) {
        let mut current = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if current.number == failed
            && let Ok(client) = make_client(&self.peer)
        {
            *current = NumberedClient { number: failed + 1, client };
        }
    }

    fn watch(&self, timeout: Duration) -> Watch {
        Watch { pulse: Arc::clone(&self.pulse), moved: Arc::default(), timeout }
    }

    fn attempt(&self, call: &Call, content: Content, timeout: Duration) -> (Attempt, Watch) {
        let watch = self.watch(timeout);
        let attempt = Attempt {
            client: self.client().client,
            keeper: self.keeper.clone(),
            region: self.peer.region.clone(),
            call: call.clone(),
            content,
            watch: watch.clone(),
        };
        (attempt, watch)
    }

    /// Tries `once` until it succeeds, fails for good, or the time is over.
    fn retrying<T>(
        &self,
        call: &Call,
        mut once: impl FnMut(Duration) -> std::result::Result<T, Failure>,
    ) -> Outcome<T> {
        let (started, mut pause, mut attempts) = (Instant::now(), FIRST_PAUSE, 1);
        let (mut may_be_done, mut had_other_credentials) = (false, false);
        loop {
            let number = self.client().number;
            // The last attempt ends with the time that is left, and with a message of its own.
            let left = self.retry_timeout().saturating_sub(started.elapsed());
            let timeout = self.peer.attempt_timeout.min(left.max(SHORTEST_ATTEMPT));
            if attempts > 1 {
                self.retries.fetch_add(1, Ordering::Relaxed);
            }
            let Failure { mut trouble, credentials } = match once(timeout) {
                Ok(done) => return Ok(done),
                Err(failure) => failure,
            };
            let elapsed = started.elapsed();
            if trouble.class == Class::AlreadyThere {
                trouble.may_be_done = may_be_done;
            }
            may_be_done |= trouble.may_be_done;
            let source = credentials.as_ref().map(|credentials| credentials.source.to_string());
            // Those that expire are renewed in time by themselves: what they may not do, the next ones may not either.
            let may_be_stale = |held: &Credentials| held.expires.is_none() || trouble.code != "AccessDenied";
            if trouble.concerns_credentials
                && !had_other_credentials
                && let Some(refused) = credentials.as_deref().filter(|held| may_be_stale(held))
            {
                self.keeper.distrust(refused);
                // Keys that were replaced in the meantime are worth a try at once.
                let renewed = self.credentials().is_ok_and(|now| !now.has_keys_of(refused));
                had_other_credentials = true;
                if renewed {
                    attempts += 1;
                    continue;
                }
            }
            if trouble.concerns_connection() {
                self.renew_client(number);
            }
            if !trouble.is_passing() || elapsed + pause >= self.retry_timeout() || self.pulse.is_stopped() {
                let request = format!("{} {}", call.method, plain_url(&call.url));
                let circumstances = Circumstances { request, credentials: source, attempts, elapsed };
                return Err(trouble.in_circumstances(circumstances));
            }
            self.sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0));
            pause = (pause * 2).min(LONGEST_PAUSE);
            attempts += 1;
        }
    }

    fn retry_timeout(&self) -> Duration {
        let all = self.peer.retry_timeout;
        if self.pulse.is_hurried() { all.min(HURRIED_RETRY_TIMEOUT) } else { all }
    }

    /// Ends early when the archiver stops, and a long one when time gets short.
    fn sleep(&self, pause: Duration) {
        let end = Instant::now() + pause;
        while !self.pulse.is_stopped() && pause < self.retry_timeout() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(LOOK_INTERVAL));
        }
    }
}

/// The URL without its query, for people.
fn plain_url(url: &Url) -> String {
    url.as_str().split('?').next().unwrap_or_default().to_string()
}

fn make_client(peer: &Peer) -> Result<Client> {
    let mut builder = Client::builder()
        .http1_only()
        .redirect(redirect::Policy::none())
        .connect_timeout(peer.attempt_timeout.min(LONGEST_CONNECT))
        .pool_idle_timeout(IDLE_CONNECTION)
        .tcp_keepalive(Duration::from_secs(30))
        // What was sent and is not acknowledged is given up by the kernel as well: nothing waits for a full socket.
        .tcp_user_timeout(peer.attempt_timeout)
        .tcp_nodelay(true);
    if let Some(path) = &peer.ca_file {
        let text = std::fs::read(path)
            .map_err(|error| Error::io("read certificates from", path, &error).of_kind(Kind::Configuration))?;
        let unfit = |cause: String| {
            let message = format!("could not read certificates from \"{}\": {cause}", path.display());
            Error::new(Kind::Configuration, path.display().to_string(), message)
        };
        let certificates = Certificate::from_pem_bundle(&text).map_err(|error| unfit(error.to_string()))?;
        if certificates.is_empty() {
            return Err(unfit("it holds none".to_string()));
        }
        builder =
            certificates.into_iter().fold(builder, |builder, certificate| builder.add_root_certificate(certificate));
    }
    builder.build().map_err(|error| {
        let cause = Trouble::of_transport(&error);
        Error::new(Kind::Internal, "client", format!("could not make an HTTP client: {}", Error::from(cause)))
    })
}

/// The body of one attempt.
enum Content {
    Whole(Bytes),
    Pieces { length: u64, receiver: mpsc::Receiver<io::Result<Bytes>> },
}

/// One attempt at a request.
struct Attempt {
    client: Client,
    keeper: Keeper,
    region: Region,
    call: Call,
    content: Content,
    watch: Watch,
}

impl Attempt {
    /// Sends it and waits for the head of a success; a failure is read whole.
    async fn send(self) -> std::result::Result<Response, Failure> {
        let Attempt { client, keeper, region, call, content, watch } = self;
        let method = call.method.clone();
        let fetched = watch.guard(async { keeper.current(&client).await.map_err(Trouble::beside) }).await;
        let credentials = fetched?;
        let sent = async {
            let request = make_request(call, content, &credentials, &region, &watch).map_err(Trouble::beside)?;
            let response = client.execute(request).await.map_err(|error| Trouble::of_transport(&error))?;
            watch.beat();
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let id = response.headers().get(REQUEST_ID).and_then(|id| id.to_str().ok()).map(str::to_string);
            let body = read_whole(response, LONGEST_ERROR_ANSWER, &watch).await.unwrap_or_default();
            Err(Trouble::of_answer(&method, status, &body, id.as_deref()))
        };
        watch.guard(sent).await.map_err(|trouble| Failure { trouble, credentials: Some(Box::new(credentials.clone())) })
    }
}

fn make_request(
    call: Call,
    content: Content,
    credentials: &Credentials,
    region: &Region,
    watch: &Watch,
) -> Result<Request> {
    let mut request = Request::new(call.method, call.url);
    *request.headers_mut() = call.headers;
    sign(&mut request, &call.sha256, credentials, region, OffsetDateTime::now_utc())?;
    let watch = watch.clone();
    let (length, body) = match content {
        Content::Whole(bytes) if bytes.is_empty() => (0, Body::from(bytes)),
        Content::Whole(bytes) => {
            let length = bytes.len() as u64;
            let pieces = stream::unfold(bytes, move |mut rest| {
                watch.beat();
                let piece = rest.split_to(rest.len().min(PIECE_BYTES));
                std::future::ready((!piece.is_empty()).then_some((io::Result::Ok(piece), rest)))
            });
            (length, Body::wrap_stream(pieces))
        }
        Content::Pieces { length, receiver } => {
            let pieces = stream::unfold(receiver, move |mut receiver| {
                let watch = watch.clone();
                async move {
                    let piece = receiver.recv().await?;
                    watch.beat();
                    Some((piece, receiver))
                }
            });
            (length, Body::wrap_stream(pieces))
        }
    };
    if request.method() == Method::PUT || length > 0 {
        request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    if length > 0 {
        *request.body_mut() = Some(body);
    }
    Ok(request)
}

async fn read_whole(mut response: Response, most: usize, watch: &Watch) -> Outcome<Bytes> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| Trouble::of_transport(&error))? {
        watch.beat();
        if body.len() + piece.len() > most {
            return Err(Trouble::senseless(&format!("it is longer than {most} bytes")));
        }
        body.extend_from_slice(&piece);
    }
    Ok(body.into())
}

/// Pieces of an object; nothing is its end, which a lost connection is not.
type Pieces = mpsc::Receiver<Outcome<Option<Bytes>>>;

async fn pump(mut response: Response, sender: mpsc::Sender<Outcome<Option<Bytes>>>, watch: Watch) {
    loop {
        let read = async { response.chunk().await.map_err(|error| Trouble::of_transport(&error)) };
        let piece = watch.guard(read).await;
        watch.beat();
        let is_last = !matches!(piece, Ok(Some(_)));
        if sender.send(piece).await.is_err() || is_last {
            return;
        }
    }
}

/// An object's bytes. Where the connection is lost, another one goes on from there.
pub struct ObjectReader {
    session: Arc<Session>,
    call: Call,
    etag: Option<HeaderValue>,
    receiver: Pieces,
    piece: Bytes,
    offset: u64,
    is_over: bool,
    /// How often in a row the connection was lost without a single byte.
    losses: u32,
}

/// A body that breaks off this often without a single byte in between is given up.
const MOST_LOSSES: u32 = 5;

impl ObjectReader {
    fn go_on(&mut self, trouble: Box<Trouble>) -> io::Result<()> {
        let failed = |trouble: Box<Trouble>| io::Error::other(Error::from(trouble));
        let may_go_on = trouble.is_passing() && self.losses < MOST_LOSSES;
        let Some(etag) = self.etag.clone().filter(|_| may_go_on) else { return Err(failed(trouble)) };
        self.losses += 1;
        let mut call = self.call.clone();
        let range = HeaderValue::from_str(&format!("bytes={}-", self.offset)).map_err(io::Error::other)?;
        call.headers.insert(RANGE, range);
        call.headers.insert(IF_MATCH, etag);
        let session = &self.session;
        session.sleep(FIRST_PAUSE);
        let opened = session.retrying(&call, |timeout| session.open_once(&call, timeout)).map_err(failed)?;
        let (headers, receiver) = opened;
        if self.offset > 0 && !headers.contains_key(reqwest::header::CONTENT_RANGE) {
            return Err(failed(Trouble::senseless("it gave the whole object where a part was asked for")));
        }
        self.receiver = receiver;
        Ok(())
    }
}

impl Read for ObjectReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.is_over && !buffer.is_empty() {
            let lost = || Err(Trouble::senseless("the object's body broke off"));
            match self.receiver.blocking_recv().unwrap_or_else(lost) {
                Ok(Some(piece)) => (self.piece, self.losses) = (piece, 0),
                Ok(None) => self.is_over = true,
                Err(trouble) => self.go_on(trouble)?,
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        self.offset += count as u64;
        Ok(count)
    }
}

/// Hands a body to the request piece by piece, and keeps the last one back until all of it is known to be right.
struct PieceWriter {
    sender: Option<mpsc::Sender<io::Result<Bytes>>>,
    piece: Vec<u8>,
    held: Option<Bytes>,
    written: u64,
    crc32c: u32,
    /// Whether the request ended before the body did.
    is_cut_off: bool,
    watch: Watch,
}

impl PieceWriter {
    fn new(sender: mpsc::Sender<io::Result<Bytes>>, watch: Watch) -> Self {
        PieceWriter {
            sender: Some(sender),
            piece: Vec::new(),
            held: None,
            written: 0,
            crc32c: 0,
            is_cut_off: false,
            watch,
        }
    }

    fn send(&mut self, piece: io::Result<Bytes>) -> io::Result<()> {
        self.watch.beat();
        let sent = self.sender.as_ref().is_some_and(|sender| sender.blocking_send(piece).is_ok());
        if !sent {
            self.is_cut_off = true;
            return Err(io::Error::other("the request ended before its body"));
        }
        Ok(())
    }

    fn hand_on(&mut self) -> io::Result<()> {
        let next = Bytes::from(std::mem::take(&mut self.piece));
        match self.held.replace(next) {
            Some(piece) => self.send(Ok(piece)),
            None => Ok(()),
        }
    }

    /// Sends what was kept back, if the body is the one that was announced.
    fn finish(&mut self, length: u64, crc32c: u32) -> io::Result<()> {
        if (self.written, self.crc32c) != (length, crc32c) {
            let message = "internal error: a body was not the same when it was written again";
            return Err(io::Error::other(Error::new(Kind::Internal, "body", message).retry_if(true)));
        }
        self.hand_on()?;
        match self.held.take() {
            Some(piece) => self.send(Ok(piece)),
            None => Ok(()),
        }
    }

    /// Breaks the request off.
    fn give_up(&mut self) {
        if let Some(sender) = self.sender.take() {
            // Nobody may be there any more; nor does anybody wait for more than this.
            let _ = sender.blocking_send(Err(io::Error::other("given up")));
        }
    }
}

impl Write for PieceWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE_BYTES - self.piece.len();
        let bytes = &bytes[..bytes.len().min(room)];
        self.piece.extend_from_slice(bytes);
        self.written += bytes.len() as u64;
        self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
        if self.piece.len() == PIECE_BYTES {
            self.hand_on()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The caller's own error, or the text of another one.
pub fn error_of_caller(error: &io::Error) -> Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(own) => own.clone(),
        None => {
            let cause = crate::error::plain_cause(error);
            Error::new(Kind::Storage, "body", format!("could not make the body of a request: {cause}"))
        }
    }
}
