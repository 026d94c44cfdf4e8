//! An HTTP proxy that goes wrong as it is told to. It passes bytes as they are, so that signatures hold, and knows of HTTP/1.1
//! only where requests and responses begin and end. For tests of what a store does when its server or network fails.

use socket2::{Domain, SockRef, Socket, Type};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a thread waits for the network before it looks whether it is still wanted.
const TICK: Duration = Duration::from_millis(10);
/// How long a client may go on sending after it was answered early.
const GRACE: Duration = Duration::from_secs(2);
/// Of so many requests the heads are kept; all are counted.
const KEPT: usize = 10_000;
/// No head is longer.
const LONGEST_HEAD: usize = 64 << 10;

/// What goes wrong with a request. Lengths count bytes of the body; what is shorter ends at its end.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The proxy answers itself, with that status and body, once it has read the request; nothing is passed on.
    Answer {
        /// The status.
        status: u16,
        /// The body.
        body: String,
    },
    /// The request is passed on up to that length of its body, then the client's connection is reset.
    CutRequest(u64),
    /// The head of the response is passed back and that much of its body, then the client's connection is reset.
    CutResponse(u64),
    /// The request is passed on up to that length of its body, with 0 not even its head, and the rest once
    /// [`FaultProxy::clear`] is called.
    StallRequest(u64),
    /// The response is passed back up to that length of its body, with 0 not even its head, and the rest once
    /// [`FaultProxy::clear`] is called.
    StallResponse(u64),
    /// The request is passed on and the whole response awaited, then the client's connection is reset: it was done, and
    /// the client never learns.
    DropResponse,
}

/// A fault, and the requests it befalls.
#[derive(Clone, Debug)]
pub struct Rule {
    fault: Fault,
    method: Option<String>,
    target: Option<String>,
    header: Option<String>,
    skip: u64,
    left: u64,
}

impl From<Fault> for Rule {
    fn from(fault: Fault) -> Self {
        Rule { fault, method: None, target: None, header: None, skip: 0, left: u64::MAX }
    }
}

impl Rule {
    /// What S3 answers when it is asked too much.
    pub fn slow_down() -> Self {
        Self::s3_error(503, "SlowDown", "Please reduce your request rate.")
    }

    /// An answer in S3's form.
    pub fn s3_error(status: u16, code: &str, message: &str) -> Self {
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{message}</Message>\
             <RequestId>proxy</RequestId></Error>"
        );
        Fault::Answer { status, body }.into()
    }

    /// Only requests of that method.
    pub fn method(self, method: &str) -> Self {
        Rule { method: Some(method.to_string()), ..self }
    }

    /// Only requests whose path and query contain that.
    pub fn target(self, part: &str) -> Self {
        Rule { target: Some(part.to_string()), ..self }
    }

    /// Only requests with a header whose name begins so.
    pub fn header(self, prefix: &str) -> Self {
        Rule { header: Some(prefix.to_ascii_lowercase()), ..self }
    }

    /// Not the first so many of these requests.
    pub fn skip(self, count: u64) -> Self {
        Rule { skip: count, ..self }
    }

    /// Only so many of these requests; else all.
    pub fn times(self, count: u64) -> Self {
        Rule { left: count, ..self }
    }

    /// The fault, if it befalls that request; counts it.
    fn befalls(&mut self, head: &Head) -> Option<Fault> {
        let header = |prefix: &String| head.headers().any(|(name, _)| name.starts_with(prefix.as_str()));
        if self.left == 0
            || self.method.as_ref().is_some_and(|method| *method != head.method())
            || self.target.as_ref().is_some_and(|part| !head.target().contains(part))
            || !self.header.as_ref().is_none_or(header)
        {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        self.left -= 1;
        Some(self.fault.clone())
    }
}

/// A proxy on a port of its own; it ends when it is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
    /// Never listens: it keeps the port while the proxy refuses connections.
    _reserved: Socket,
}

impl FaultProxy {
    /// A proxy before the server at that endpoint, `http://ADDRESS:PORT`.
    pub fn before(endpoint: &str) -> Self {
        let upstream = endpoint.strip_prefix("http://").and_then(|address| address.parse().ok());
        let upstream = upstream.unwrap_or_else(|| panic!("not http://ADDRESS:PORT: {endpoint}"));
        let reserved = bound(0).expect("bind a port");
        let address = reserved.local_addr().ok().and_then(|address| address.as_socket()).expect("the port");
        let shared = Arc::new(Shared { upstream, state: Mutex::default(), changed: Condvar::new() });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept(address.port())
        });
        let proxy = FaultProxy { address, shared, acceptor: Some(acceptor), _reserved: reserved };
        proxy.refuse(false);
        proxy
    }

    /// `http://127.0.0.1:PORT` of the proxy.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on, this befalls each request that it is meant for and that no earlier rule takes.
    pub fn inject(&self, rule: impl Into<Rule>) {
        self.shared.lock().rules.push(rule.into());
    }

    /// Ends all rules; what stalls goes on, also where the client has given up: the server may get it late.
    pub fn clear(&self) {
        let mut state = self.shared.lock();
        state.rules.clear();
        state.clearings += 1;
        self.shared.changed.notify_all();
    }

    /// Each request waits so long before anything else.
    pub fn set_latency(&self, latency: Duration) {
        self.shared.lock().latency = latency;
    }

    /// Refuses connections, and cuts those that there are, until told not to. When it returns, that holds.
    pub fn refuse(&self, refuse: bool) {
        let mut state = self.shared.lock();
        state.refuse = refuse;
        state.cuts += u64::from(refuse);
        self.shared.changed.notify_all();
        while state.listens == refuse {
            state = self.shared.wait(state, TICK);
        }
    }

    /// Cuts all connections.
    pub fn cut_connections(&self) {
        self.shared.lock().cuts += 1;
        self.shared.changed.notify_all();
    }

    /// How many requests and responses stand still.
    pub fn stalled(&self) -> usize {
        self.shared.lock().stalled
    }

    /// How many connections were made.
    pub fn connections(&self) -> u64 {
        self.shared.lock().connections
    }

    /// How many requests of that method came.
    pub fn count(&self, method: &str) -> u64 {
        self.shared.lock().counts.get(method).copied().unwrap_or_default()
    }

    /// How many requests came.
    pub fn count_all(&self) -> u64 {
        self.shared.lock().counts.values().sum()
    }

    /// How many asked for a list of objects.
    pub fn lists(&self) -> usize {
        let list = |line: &&String| {
            line.starts_with("GET ")
                && ["?list-type=", "&list-type=", "?prefix=", "&prefix="].iter().any(|part| line.contains(part))
        };
        self.requests().iter().filter(list).count()
    }

    /// The first lines of the requests, as `GET /bucket/key HTTP/1.1`, in the order they came.
    pub fn requests(&self) -> Vec<String> {
        self.heads().iter().map(|head| head.lines().next().unwrap_or_default().to_string()).collect()
    }

    /// The requests without their bodies.
    pub fn heads(&self) -> Vec<String> {
        self.shared.lock().heads.clone()
    }

    /// Counts anew.
    pub fn forget(&self) {
        let mut state = self.shared.lock();
        state.heads.clear();
        state.counts.clear();
        state.connections = 0;
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// A socket at that port of loopback, of which there may be several.
fn bound(port: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)).into())?;
    Ok(socket)
}

fn listening(port: u16) -> io::Result<TcpListener> {
    let socket = bound(port)?;
    socket.listen(128)?;
    socket.set_read_timeout(Some(TICK))?; // also that of accept(2)
    Ok(socket.into())
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    latency: Duration,
    refuse: bool,
    listens: bool,
    ended: bool,
    cuts: u64,
    clearings: u64,
    stalled: usize,
    connections: u64,
    counts: BTreeMap<String, u64>,
    heads: Vec<String>,
}

struct Shared {
    upstream: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, at_most: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, at_most).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Records a request and lets it wait; the fault that befalls it.
    fn arrived(&self, head: &Head, cuts: u64) -> Option<Fault> {
        let mut state = self.lock();
        *state.counts.entry(head.method().to_string()).or_default() += 1;
        if state.heads.len() < KEPT {
            state.heads.push(head.text.clone());
        }
        let fault = state.rules.iter_mut().find_map(|rule| rule.befalls(head));
        let (since, latency) = (Instant::now(), state.latency);
        while !state.ended && state.cuts == cuts {
            let Some(left) = latency.checked_sub(since.elapsed()).filter(|left| !left.is_zero()) else { break };
            state = self.wait(state, left);
        }
        fault
    }

    fn accept(self: Arc<Self>, port: u16) {
        let mut listener = None;
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        loop {
            let mut state = self.lock();
            if state.ended {
                break;
            }
            if state.refuse {
                listener = None;
            } else if listener.is_none() {
                listener = Some(listening(port).expect("listen"));
            }
            state.listens = listener.is_some();
            self.changed.notify_all();
            let Some(listener) = &listener else {
                drop(self.wait(state, TICK));
                continue;
            };
            drop(state);
            if let Ok((client, _)) = listener.accept() {
                let mut state = self.lock();
                state.connections += 1;
                let connection = Connection { shared: Arc::clone(&self), cuts: state.cuts };
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread::spawn(move || {
                    let _ = connection.serve(client);
                }));
            }
        }
        drop(listener);
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// One client's connection.
struct Connection {
    shared: Arc<Shared>,
    /// How often connections had been cut when it came.
    cuts: u64,
}

/// What becomes of a connection after a request.
#[derive(Clone, Copy, PartialEq)]
enum After {
    Next,
    Close,
    Reset,
}

impl Connection {
    fn is_over(&self) -> bool {
        let state = self.shared.lock();
        state.ended || state.cuts != self.cuts
    }

    fn serve(&self, client: TcpStream) -> io::Result<()> {
        let mut client = Wire::new(client)?;
        let mut server = None;
        let mut after = After::Next;
        while after == After::Next {
            after = match client.read_head(&|| self.is_over()) {
                Ok(Some(head)) => self.answer(&head, &mut client, &mut server).unwrap_or(After::Reset),
                Ok(None) => After::Close,
                Err(_) => After::Reset,
            };
        }
        drop(server);
        if after == After::Reset {
            SockRef::from(&client.socket).set_linger(Some(Duration::ZERO))?; // close(2) then sends RST
        }
        Ok(())
    }

    fn answer(&self, head: &Head, client: &mut Wire, server: &mut Option<Wire>) -> io::Result<After> {
        match self.shared.arrived(head, self.cuts) {
            Some(Fault::Answer { status, body }) => self.answer_itself(head, client, status, &body),
            fault => {
                // A connection that the server has closed meanwhile is of no use.
                if server.as_ref().is_some_and(|server| !server.is_idle()) {
                    *server = None;
                }
                let server = match server {
                    Some(server) => server,
                    None => server.insert(Wire::new(TcpStream::connect(self.shared.upstream)?)?),
                };
                Exchange { connection: self, head, fault, answered: OnceLock::new(), given_up: AtomicBool::new(false) }
                    .run(client, server)
            }
        }
    }

    fn answer_itself(&self, head: &Head, client: &mut Wire, status: u16, body: &str) -> io::Result<After> {
        let over = || self.is_over();
        // Who waits to be told to go on sends no body.
        let waits = head.header("expect").is_some();
        let mut framing = if waits { Framing::Length(0) } else { head.framing_of_request() };
        while !framing.is_complete() {
            client.read_piece(&mut framing, u64::MAX, &over)?;
        }
        let connection = if waits { "close" } else { "keep-alive" };
        let length = body.len();
        let body = if head.method() == "HEAD" { "" } else { body };
        let response = format!(
            "HTTP/1.1 {status} Fault\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n\
             Connection: {connection}\r\n\r\n{body}"
        );
        write_all(&client.socket, response.as_bytes(), &over)?;
        Ok(if waits || head.closes() { After::Close } else { After::Next })
    }

    /// Stands still until rules are cleared, or the connection is over.
    fn stall(&self) {
        let mut state = self.shared.lock();
        let clearings = state.clearings;
        state.stalled += 1;
        while state.clearings == clearings && !state.ended && state.cuts == self.cuts {
            state = self.shared.wait(state, TICK);
        }
        state.stalled -= 1;
    }
}

/// One request and its response, which are passed on at the same time: a server may answer early.
struct Exchange<'a> {
    connection: &'a Connection,
    head: &'a Head,
    fault: Option<Fault>,
    /// When the whole response had been passed back.
    answered: OnceLock<Instant>,
    /// Nothing more is to be read or passed, either way.
    given_up: AtomicBool,
}

impl Exchange<'_> {
    fn run(self, client: &mut Wire, server: &mut Wire) -> io::Result<After> {
        let (to_client, to_server) = (client.socket.try_clone()?, server.socket.try_clone()?);
        let (request, response) = thread::scope(|scope| {
            let response = scope.spawn(|| {
                let after = self.pass_response(server, &to_client);
                match after {
                    Ok(After::Next | After::Close) => drop(self.answered.set(Instant::now())),
                    _ => self.given_up.store(true, Ordering::Release),
                }
                after
            });
            let request = self.pass_request(client, &to_server);
            if !matches!(request, Ok(After::Next)) && self.answered.get().is_none() {
                self.given_up.store(true, Ordering::Release);
            }
            (request, response.join().expect("the response's thread"))
        });
        match (request?, response?) {
            (After::Next, after) => Ok(after),
            (after, _) => Ok(after),
        }
    }

    fn is_over(&self) -> bool {
        self.given_up.load(Ordering::Acquire) || self.connection.is_over()
    }

    fn pass_request(&self, client: &mut Wire, to_server: &TcpStream) -> io::Result<After> {
        // Who was answered early may send the rest, but not for ever.
        let over = || self.is_over() || self.answered.get().is_some_and(|at| at.elapsed() > GRACE);
        let (cut_at, stall_at) = match self.fault {
            Some(Fault::CutRequest(at)) => (Some(at), None),
            Some(Fault::StallRequest(at)) => (None, Some(at)),
            _ => (None, None),
        };
        if stall_at == Some(0) {
            self.connection.stall();
        }
        // A server that has answered need not listen any more; the client is heard to its end.
        let mut passing = write_all(to_server, &self.head.bytes, &over);
        let pass = |piece: &[u8]| {
            if passing.is_ok() {
                passing = write_all(to_server, piece, &over);
            }
            Ok(())
        };
        self.pass_body(client, self.head.framing_of_request(), (cut_at, stall_at), pass, &over)?;
        Ok(if cut_at.is_some() { After::Reset } else { After::Next })
    }

    fn pass_response(&self, server: &mut Wire, to_client: &TcpStream) -> io::Result<After> {
        let over = || self.is_over();
        let (cut_at, stall_at) = match self.fault {
            Some(Fault::CutResponse(at)) => (Some(at), None),
            Some(Fault::StallResponse(at)) => (None, Some(at)),
            _ => (None, None),
        };
        let dropped = matches!(self.fault, Some(Fault::DropResponse | Fault::CutRequest(_)));
        let pass = |bytes: &[u8]| if dropped { Ok(()) } else { write_all(to_client, bytes, &over) };
        let response = loop {
            let Some(response) = server.read_head(&over)? else { return Ok(After::Reset) };
            if response.status() >= 200 {
                break response;
            }
            write_all(to_client, &response.bytes, &over)?; // it says only that the body is awaited
        };
        if stall_at == Some(0) {
            self.connection.stall();
        }
        pass(&response.bytes)?;
        let framing = response.framing_of_response(self.head.method());
        let closes = framing == Framing::ToTheEnd || response.closes() || self.head.closes();
        self.pass_body(server, framing, (cut_at, stall_at), pass, &over)?;
        Ok(match closes {
            _ if dropped || cut_at.is_some() => After::Reset,
            true => After::Close,
            false => After::Next,
        })
    }

    /// Passes a body on, up to where it is cut.
    fn pass_body(
        &self,
        from: &mut Wire,
        mut framing: Framing,
        (cut_at, mut stall_at): (Option<u64>, Option<u64>),
        mut pass: impl FnMut(&[u8]) -> io::Result<()>,
        over: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let mut passed = 0;
        stall_at = stall_at.filter(|at| *at > 0);
        while !framing.is_complete() && cut_at != Some(passed) {
            if stall_at == Some(passed) {
                self.connection.stall();
                stall_at = None;
            }
            let most = cut_at.or(stall_at).map_or(u64::MAX, |at| at - passed);
            let piece = from.read_piece(&mut framing, most, over)?;
            passed += piece.len() as u64;
            pass(&piece)?;
        }
        Ok(())
    }
}

/// The head of a request or a response.
struct Head {
    bytes: Vec<u8>,
    text: String,
}

impl Head {
    fn word(&self, number: usize) -> &str {
        self.text.lines().next().and_then(|line| line.split(' ').nth(number)).unwrap_or_default()
    }

    fn method(&self) -> &str {
        self.word(0)
    }

    fn target(&self) -> &str {
        self.word(1)
    }

    fn status(&self) -> u16 {
        self.word(1).parse().unwrap_or(502)
    }

    /// Names in lower case, with their values.
    fn headers(&self) -> impl Iterator<Item = (String, &str)> {
        self.text.lines().skip(1).filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim()))
        })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers().find(|(found, _)| found == name).map(|(_, value)| value)
    }

    fn closes(&self) -> bool {
        self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    fn is_chunked(&self) -> bool {
        self.header("transfer-encoding").is_some_and(|value| value.to_ascii_lowercase().contains("chunked"))
    }

    fn length(&self) -> Option<u64> {
        self.header("content-length").and_then(|value| value.parse().ok())
    }

    fn framing_of_request(&self) -> Framing {
        if self.is_chunked() { Framing::chunked() } else { Framing::Length(self.length().unwrap_or(0)) }
    }

    fn framing_of_response(&self, method: &str) -> Framing {
        match self.length() {
            _ if method == "HEAD" || matches!(self.status(), 204 | 304) => Framing::Length(0),
            _ if self.is_chunked() => Framing::chunked(),
            Some(length) => Framing::Length(length),
            None => Framing::ToTheEnd,
        }
    }
}

/// Where a body ends, and how much of it is to come.
#[derive(Debug, PartialEq)]
enum Framing {
    Length(u64),
    /// Chunks: the line of a length, so far.
    ChunkLength(String),
    /// Chunks: the data of one with the end of its line.
    ChunkData(u64),
    /// Chunks: a line of the trailer, so far.
    Trailer(String),
    ToTheEnd,
}

impl Framing {
    fn chunked() -> Self {
        Framing::ChunkLength(String::new())
    }

    fn is_complete(&self) -> bool {
        *self == Framing::Length(0)
    }

    /// How many of these bytes belong to the body.
    fn take(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut used = 0;
        while used < bytes.len() && !self.is_complete() {
            let rest = &bytes[used..];
            let next = match self {
                Framing::ToTheEnd => return Ok(bytes.len()),
                Framing::Length(left) | Framing::ChunkData(left) => {
                    let count = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    used += count;
                    *left -= count as u64;
                    (*self == Framing::ChunkData(0)).then(Framing::chunked)
                }
                Framing::ChunkLength(line) | Framing::Trailer(line) => {
                    used += 1;
                    line.push(char::from(rest[0]));
                    if rest[0] != b'\n' {
                        None
                    } else if let Framing::Trailer(line) = self {
                        Some(if line.trim().is_empty() { Framing::Length(0) } else { Framing::Trailer(String::new()) })
                    } else if let Framing::ChunkLength(line) = self {
                        let digits = line.split(';').next().unwrap_or_default().trim();
                        Some(match u64::from_str_radix(digits, 16).map_err(io::Error::other)? {
                            0 => Framing::Trailer(String::new()),
                            length => Framing::ChunkData(length.saturating_add(2)),
                        })
                    } else {
                        None
                    }
                }
            };
            if let Some(next) = next {
                *self = next;
            }
        }
        Ok(used)
    }
}

/// A connection and what was read from it beyond what was asked for.
struct Wire {
    socket: TcpStream,
    ahead: Vec<u8>,
}

impl Wire {
    fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        Ok(Wire { socket, ahead: Vec::new() })
    }

    /// Nothing came since the last response, not even its end.
    fn is_idle(&self) -> bool {
        let came = self.socket.set_nonblocking(true).and_then(|()| self.socket.peek(&mut [0]));
        let waits = came.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        waits && self.ahead.is_empty() && self.socket.set_nonblocking(false).is_ok()
    }

    /// Reads more; false at the end.
    fn read_ahead(&mut self, over: &dyn Fn() -> bool) -> io::Result<bool> {
        let mut buffer = [0; 64 << 10];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(count) => {
                    self.ahead.extend_from_slice(&buffer[..count]);
                    return Ok(count > 0);
                }
                Err(error) if is_tick(&error) && !over() => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next head; none where the other side is done.
    fn read_head(&mut self, over: &dyn Fn() -> bool) -> io::Result<Option<Head>> {
        loop {
            if let Some(at) = self.ahead.windows(4).position(|window| window == b"\r\n\r\n") {
                let bytes: Vec<u8> = self.ahead.drain(..at + 4).collect();
                let text = String::from_utf8_lossy(&bytes).into_owned();
                return Ok(Some(Head { bytes, text }));
            }
            if self.ahead.len() > LONGEST_HEAD {
                return Err(io::Error::other("no end of the head"));
            }
            if !self.read_ahead(over)? {
                return if self.ahead.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Some of the body, at most so much.
    fn read_piece(&mut self, framing: &mut Framing, most: u64, over: &dyn Fn() -> bool) -> io::Result<Vec<u8>> {
        if self.ahead.is_empty() && !self.read_ahead(over)? {
            if *framing != Framing::ToTheEnd {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            *framing = Framing::Length(0);
        }
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(self.ahead.len());
        let used = framing.take(&self.ahead[..most])?;
        Ok(self.ahead.drain(..used).collect())
    }
}

fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

fn write_all(mut socket: &TcpStream, mut bytes: &[u8], over: &dyn Fn() -> bool) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if is_tick(&error) && !over() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eventually;
    use std::io::{BufRead, BufReader};

    /// The lines up to an empty one; none at the end.
    fn read_head(reader: &mut impl BufRead) -> Option<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return None;
            }
        }
        Some(head)
    }

    fn value<'a>(head: &'a str, name: &str) -> Option<&'a str> {
        head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// The body after that head; what there was of it, where it is torn.
    fn read_body(reader: &mut impl BufRead, head: &str) -> (Vec<u8>, io::Result<()>) {
        let mut body = Vec::new();
        let mut read = |reader: &mut dyn BufRead, length: u64| {
            let count = reader.take(length).read_to_end(&mut body)? as u64;
            if count == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
        };
        let result = if let Some(length) = value(head, "Content-Length") {
            read(reader, length.parse().unwrap())
        } else if value(head, "Transfer-Encoding").is_some() {
            loop {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                let length = u64::from_str_radix(line.trim().split(';').next().unwrap(), 16).unwrap();
                if length == 0 {
                    while reader.read_line(&mut line).unwrap() > 2 {}
                    break Ok(());
                }
                if let Err(error) = read(reader, length) {
                    break Err(error);
                }
                reader.read_line(&mut line).unwrap();
            }
        } else if value(head, "Connection") == Some("close") {
            reader.read_to_end(&mut body).map(drop)
        } else {
            Ok(())
        };
        (body, result)
    }

    /// Answers each request with its first line and the length of its body: `/chunked` in chunks, `/end` up to the end of
    /// the connection, `/early` before the body is read. Keeps the bodies, also torn ones.
    struct Server {
        endpoint: String,
        bodies: Arc<Mutex<Vec<Vec<u8>>>>,
    }

    impl Server {
        fn start() -> Self {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let endpoint = format!("http://{}", listener.local_addr().unwrap());
            let bodies = Arc::new(Mutex::default());
            let server = Server { endpoint, bodies: Arc::clone(&bodies) };
            // It ends with the process.
            thread::spawn(move || {
                for client in listener.incoming() {
                    let bodies = Arc::clone(&bodies);
                    thread::spawn(move || serve(&client.unwrap(), &bodies));
                }
            });
            server
        }

        fn bodies(&self) -> Vec<Vec<u8>> {
            self.bodies.lock().unwrap().clone()
        }
    }

    fn serve(mut client: &TcpStream, bodies: &Mutex<Vec<Vec<u8>>>) {
        let mut reader = BufReader::new(client);
        while let Some(head) = read_head(&mut reader) {
            let line = head.lines().next().unwrap();
            if line.contains(" /early ") {
                client.write_all(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n").unwrap();
                return;
            }
            if head.contains("Expect:") {
                client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
            }
            let (body, read) = read_body(&mut reader, &head);
            let text = format!("{line} {}", body.len());
            bodies.lock().unwrap().push(body);
            if read.is_err() {
                return;
            }
            let (first, second) = text.split_at(5);
            let response = match line.split(' ').nth(1).unwrap() {
                "/chunked" => format!(
                    "Transfer-Encoding: chunked\r\n\r\n5\r\n{first}\r\n{:X};x=y\r\n{second}\r\n0\r\nX: y\r\n\r\n",
                    second.len()
                ),
                "/end" => format!("Connection: close\r\n\r\n{text}"),
                _ if line.starts_with("HEAD") => format!("Content-Length: {}\r\n\r\n", text.len()),
                _ => format!("Content-Length: {}\r\n\r\n{text}", text.len()),
            };
            if client.write_all(format!("HTTP/1.1 200 OK\r\n{response}").as_bytes()).is_err() || line.contains(" /end ")
            {
                return;
            }
        }
    }

    /// A connection to the proxy.
    struct Client(BufReader<TcpStream>);

    impl Client {
        fn of(proxy: &FaultProxy) -> Self {
            let stream = TcpStream::connect(proxy.address).unwrap();
            stream.set_read_timeout(Some(crate::PATIENCE)).unwrap();
            Client(BufReader::new(stream))
        }

        fn send(&mut self, text: &str) {
            self.0.get_mut().write_all(text.as_bytes()).unwrap();
        }

        /// The head and the body of the next response.
        fn receive(&mut self) -> (String, String) {
            let head = read_head(&mut self.0).expect("a response");
            let (body, read) = read_body(&mut self.0, &head);
            read.unwrap();
            (head, String::from_utf8(body).unwrap())
        }

        fn put(&mut self, body: &str) {
            self.send(&format!("PUT /key HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        }

        /// What comes until the connection is reset.
        fn receive_until_reset(&mut self) -> String {
            let mut received = Vec::new();
            let error = self.0.read_to_end(&mut received).expect_err("a reset");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            String::from_utf8(received).unwrap()
        }
    }

    fn started() -> (Server, FaultProxy) {
        let server = Server::start();
        let proxy = FaultProxy::before(&server.endpoint);
        (server, proxy)
    }

    #[test]
    fn requests_of_every_framing_pass_on_one_connection() {
        let (server, proxy) = started();
        let mut client = Client::of(&proxy);
        client.put("12345");
        assert_eq!(client.receive().1, "PUT /key HTTP/1.1 5");
        client.send(
            "PUT /chunked HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;s=t\r\n0123456789\r\n0\r\n\r\n",
        );
        assert_eq!(client.receive().1, "PUT /chunked HTTP/1.1 13");
        client.send("PUT /key HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
        assert!(read_head(&mut client.0).unwrap().starts_with("HTTP/1.1 100 "));
        client.send("xy");
        assert_eq!(client.receive().1, "PUT /key HTTP/1.1 2");
        client.send("HEAD /key HTTP/1.1\r\n\r\n");
        assert!(read_head(&mut client.0).unwrap().contains("Content-Length: 20\r\n"));
        // Two at once, in pieces, and a response without a length.
        client.send("GET /chunked HTTP/1.1\r\nHost: a\r\n\r\nGET /e");
        assert_eq!(client.receive().1, "GET /chunked HTTP/1.1 0");
        client.send("nd HTTP/1.1\r\n\r\n");
        assert_eq!(client.receive().1, "GET /end HTTP/1.1 0");
        assert_eq!(server.bodies().concat(), b"12345abc0123456789xy");

        assert_eq!((proxy.connections(), proxy.count("PUT"), proxy.count("GET"), proxy.count_all()), (1, 3, 2, 6));
        assert_eq!(proxy.requests()[3..5], ["HEAD /key HTTP/1.1", "GET /chunked HTTP/1.1"]);
        assert!(proxy.heads()[4].contains("Host: a\r\n"));
        proxy.forget();
        assert_eq!((proxy.connections(), proxy.count_all(), proxy.requests().len()), (0, 0, 0));
    }

    #[test]
    fn lists_are_counted() {
        let (_server, proxy) = started();
        let mut client = Client::of(&proxy);
        for target in
            ["/bucket?list-type=2&prefix=a", "/bucket?delimiter=a&prefix=", "/bucket/key?versionId=1", "/prefix"]
        {
            client.send(&format!("GET {target} HTTP/1.1\r\n\r\n"));
            client.receive();
        }
        assert_eq!(proxy.lists(), 2);
    }

    #[test]
    fn it_answers_itself_as_often_and_to_whom_it_is_told() {
        let (server, proxy) = started();
        proxy.inject(Rule::slow_down().method("PUT").skip(1).times(2));
        proxy.inject(Rule::s3_error(400, "NotImplemented", "no").header("X-Amz-Checksum-"));
        proxy.inject(Rule::s3_error(404, "NoSuchKey", "none").target("/lost"));
        let mut client = Client::of(&proxy);
        let mut status = |request: &str| {
            client.send(&format!("{request}\r\nContent-Length: 1\r\n\r\nx"));
            let (head, body) = client.receive();
            let code = body.split_once("<Code>").map_or("", |(_, rest)| rest.split_once('<').unwrap().0);
            format!("{} {code}", &head[9..12])
        };
        assert_eq!(status("PUT /key HTTP/1.1"), "200 ");
        assert_eq!(status("PUT /key HTTP/1.1"), "503 SlowDown");
        assert_eq!(status("GET /key HTTP/1.1"), "200 ");
        assert_eq!(status("PUT /key HTTP/1.1"), "503 SlowDown");
        assert_eq!(status("PUT /key HTTP/1.1"), "200 ");
        assert_eq!(status("PUT /key HTTP/1.1\r\nx-amz-checksum-crc32c: AAAA"), "400 NotImplemented");
        assert_eq!(status("GET /lost HTTP/1.1"), "404 NoSuchKey");
        proxy.clear();
        assert_eq!(status("GET /lost HTTP/1.1"), "200 ");
        assert_eq!((proxy.connections(), server.bodies().len()), (1, 4));

        // Who waits to be told to go on is answered at once.
        proxy.inject(Rule::slow_down());
        client.send("PUT /key HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
        assert!(client.receive().0.contains("Connection: close\r\n"));
        assert_eq!(client.0.read(&mut [0]).unwrap(), 0);
        let mut client = Client::of(&proxy);
        client.send("HEAD /key HTTP/1.1\r\n\r\n");
        assert!(read_head(&mut client.0).unwrap().starts_with("HTTP/1.1 503 "));
    }

    #[test]
    fn a_request_is_cut_where_it_is_told() {
        let (server, proxy) = started();
        for (number, (at, passed)) in [(0, ""), (4, "1234"), (9, "12345")].into_iter().enumerate() {
            proxy.inject(Rule::from(Fault::CutRequest(at)).times(1));
            let mut client = Client::of(&proxy);
            client.put("12345");
            assert_eq!(client.receive_until_reset(), "");
            eventually("the server has what was passed", || server.bodies().len() > number);
            assert_eq!(server.bodies()[number], passed.as_bytes());
        }
    }

    #[test]
    fn a_response_is_cut_where_it_is_told() {
        let (_server, proxy) = started();
        for (at, passed) in [(0, ""), (3, "PUT"), (99, "PUT /key HTTP/1.1 1")] {
            proxy.inject(Rule::from(Fault::CutResponse(at)).times(1));
            let mut client = Client::of(&proxy);
            client.put("1");
            let received = client.receive_until_reset();
            assert_eq!(received.split_once("\r\n\r\n").unwrap().1, passed);
        }
    }

    #[test]
    fn a_dropped_response_is_one_to_a_request_that_was_done() {
        let (server, proxy) = started();
        proxy.inject(Rule::from(Fault::DropResponse).method("PUT"));
        let mut client = Client::of(&proxy);
        client.put("12345");
        assert_eq!(client.receive_until_reset(), "");
        assert_eq!(server.bodies(), [b"12345"]);
    }

    #[test]
    fn a_stalled_request_goes_on_when_rules_are_cleared() {
        let (server, proxy) = started();
        for at in [0, 2] {
            proxy.inject(Fault::StallRequest(at));
            let mut client = Client::of(&proxy);
            client.put("12345");
            eventually("it stands still", || proxy.stalled() == 1);
            assert_eq!(server.bodies().len(), usize::from(at > 0));
            proxy.clear();
            assert_eq!(client.receive().1, "PUT /key HTTP/1.1 5");
            eventually("it goes on", || proxy.stalled() == 0);
        }
    }

    #[test]
    fn a_stalled_response_goes_on_when_rules_are_cleared() {
        let (server, proxy) = started();
        for at in [0, 4] {
            proxy.inject(Rule::from(Fault::StallResponse(at)).times(1));
            let mut client = Client::of(&proxy);
            client.put("12345");
            eventually("it stands still", || proxy.stalled() == 1);
            assert_eq!(server.bodies().last().unwrap(), b"12345");
            // Others are not held up.
            let mut other = Client::of(&proxy);
            other.put("1");
            assert_eq!(other.receive().1, "PUT /key HTTP/1.1 1");
            proxy.clear();
            assert_eq!(client.receive().1, "PUT /key HTTP/1.1 5");
        }
    }

    #[test]
    fn requests_take_as_long_as_they_are_told() {
        let (_server, proxy) = started();
        let latency = Duration::from_millis(60);
        proxy.set_latency(latency);
        let mut client = Client::of(&proxy);
        let since = Instant::now();
        client.put("1");
        client.receive();
        assert!(since.elapsed() >= latency);
    }

    #[test]
    fn it_refuses_connections_until_told_not_to() {
        let (_server, proxy) = started();
        let mut client = Client::of(&proxy);
        client.put("1");
        client.receive();
        for _ in 0..3 {
            proxy.refuse(true);
            let error = TcpStream::connect(proxy.address).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            client.receive_until_reset();
            proxy.refuse(false);
            client = Client::of(&proxy);
            client.put("1");
            client.receive();
        }
        proxy.cut_connections();
        client.receive_until_reset();
        assert_eq!((proxy.connections(), proxy.count_all()), (4, 4));
    }

    #[test]
    fn an_early_answer_is_passed_back() {
        let (_server, proxy) = started();
        let mut client = Client::of(&proxy);
        client.send("PUT /early HTTP/1.1\r\nContent-Length: 1000\r\n\r\nbegin");
        assert!(client.receive().0.starts_with("HTTP/1.1 403 "));
        // And the server's closing of a connection that waits is no failure of the next request.
        client.send(&"x".repeat(995));
        client.put("1");
        assert_eq!(client.receive().1, "PUT /key HTTP/1.1 1");
    }

    #[test]
    fn it_ends_whatever_stands_still() {
        let (_server, proxy) = started();
        proxy.inject(Fault::StallRequest(0));
        let mut client = Client::of(&proxy);
        client.put("1");
        eventually("it stands still", || proxy.stalled() == 1);
        let address = proxy.address;
        drop(proxy);
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        client.receive_until_reset();
    }
}
