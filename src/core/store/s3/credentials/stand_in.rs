//! An HTTP server on loopback that answers as a test says.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

pub enum Reply {
    Text { status: u16, headers: String, body: String },
    Hang,
}

impl Reply {
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Reply::Text { status, headers: String::new(), body: body.into() }
    }

    pub fn with_header(self, name: &str, value: &str) -> Self {
        match self {
            Reply::Text { status, headers, body } => {
                Reply::Text { status, headers: format!("{headers}{name}: {value}\r\n"), body }
            }
            Reply::Hang => Reply::Hang,
        }
    }
}

struct Shared {
    count: AtomicUsize,
    is_over: AtomicBool,
    held: Mutex<Vec<TcpStream>>,
    requests: Mutex<Vec<Request>>,
}

/// Stops when it is dropped.
pub struct StandIn {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl StandIn {
    /// `answer` is told the request and how many came before it.
    pub fn new(answer: impl Fn(&Request, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            count: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            held: Mutex::default(),
            requests: Mutex::default(),
        });
        let (server, answer) = (Arc::clone(&shared), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if server.is_over.load(Ordering::SeqCst) {
                    break;
                }
                let (server, answer) = (Arc::clone(&server), Arc::clone(&answer));
                std::thread::spawn(move || serve(stream.unwrap(), &server, &*answer));
            }
        });
        StandIn { address, shared }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Requests so far.
    pub fn count(&self) -> usize {
        self.shared.count.load(Ordering::SeqCst)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(stream: TcpStream, shared: &Shared, answer: &dyn Fn(&Request, usize) -> Reply) {
    let Some(request) = read(&stream) else { return };
    shared.requests.lock().unwrap().push(request.clone());
    let number = shared.count.fetch_add(1, Ordering::SeqCst);
    match answer(&request, number) {
        Reply::Hang => shared.held.lock().unwrap().push(stream),
        Reply::Text { status, headers, body } => {
            let length = body.len();
            let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
            let _ = (&stream).write_all(head.as_bytes()).and_then(|()| (&stream).write_all(body.as_bytes()));
        }
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_string()),
        }
    }
    let mut first = lines.first()?.split(' ');
    let (method, path) = (first.next()?.to_string(), first.next()?.to_string());
    let headers: Vec<_> = lines[1..]
        .iter()
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_string()))
        .collect();
    let length =
        headers.iter().find(|(name, _)| name == "content-length").map_or(0, |(_, value)| value.parse().unwrap());
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request { method, path, headers, body: String::from_utf8(body).unwrap() })
}

/// Drives `future` as the store does: on a runtime of one thread.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let output = runtime.block_on(future);
    runtime.shutdown_background();
    output
}

/// A client as the store might give one.
pub fn client() -> reqwest::Client {
    super::request::plain_client().unwrap()
}

/// The answer of a container endpoint or of instance metadata.
pub fn keys(access_key: &str, expires: std::time::SystemTime) -> String {
    let expires = time::OffsetDateTime::from(expires);
    let expires = expires.format(&time::format_description::well_known::Rfc3339).unwrap();
    format!(
        r#"{{"Code":"Success","AccessKeyId":"{access_key}","SecretAccessKey":"s3kr1t-key","Token":"s3kr1t-token","Expiration":"{expires}"}}"#
    )
}
