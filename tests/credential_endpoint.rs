//! What hands out temporary keys to machines, on loopback: a token service, a container's endpoint and instance metadata in
//! one. Each key is a fresh one of the gateway's, which honours it; that it expires sooner is said here, and kept by none but
//! whoever heeds it.

use crate::s3_server::{S3Server, Session};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The role that web identities assume.
pub const ROLE_ARN: &str = "arn:aws:iam::123456789012:role/wal";
/// The role of the instance.
pub const ROLE: &str = "wal-role";
/// What a web identity and a container must show.
pub const PROOF: &str = "proof-of-who-asks";
/// What an instance must show, once it has asked for it.
pub const INSTANCE_SESSION: &str = "session-of-the-instance";

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// Keys, and until when they are said to be valid.
#[derive(Clone, Debug)]
pub struct HandedOut {
    /// The keys.
    pub session: Session,
    /// A whole second, as AWS has it.
    pub expires: SystemTime,
}

impl HandedOut {
    /// When they expire, as an answer tells it: `2026-01-31T23:59:59Z`.
    pub fn expiration(&self) -> String {
        OffsetDateTime::from(self.expires).format(&Rfc3339).expect("a time")
    }
}

/// An endpoint on a port of its own; it ends when it is dropped.
pub struct CredentialEndpoint {
    address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

struct Shared {
    owner: S3Server,
    lifetime: Duration,
    handed_out: Mutex<Vec<HandedOut>>,
    is_over: AtomicBool,
}

impl CredentialEndpoint {
    /// Hands out keys of `owner` that live so long.
    pub fn of(owner: &S3Server, lifetime: Duration) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind a port");
        let address = listener.local_addr().expect("the port");
        let shared = Arc::new(Shared {
            owner: owner.clone(),
            lifetime,
            handed_out: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept(&listener)
        });
        CredentialEndpoint { address, shared, acceptor: Some(acceptor) }
    }

    /// `http://127.0.0.1:PORT`; the container's endpoint is `/container` there.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All keys so far.
    pub fn handed_out(&self) -> Vec<HandedOut> {
        self.shared.handed_out().clone()
    }
}

impl Drop for CredentialEndpoint {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Shared {
    fn handed_out(&self) -> MutexGuard<'_, Vec<HandedOut>> {
        self.handed_out.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        for client in listener.incoming() {
            if self.is_over.load(Ordering::SeqCst) {
                return;
            }
            let (Ok(client), shared) = (client, Arc::clone(&self)) else { continue };
            // Ends with its client, at the latest when that has been silent for too long.
            thread::spawn(move || {
                let _ = shared.serve(&client);
            });
        }
    }

    fn serve(&self, mut client: &TcpStream) -> io::Result<()> {
        client.set_read_timeout(Some(crate::PATIENCE))?;
        let (status, body) = self.answer(&Request::read(client)?);
        let length = body.len();
        let head = format!("HTTP/1.1 {status} Answer\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        client.write_all(format!("{head}{body}").as_bytes())
    }

    fn answer(&self, request: &Request) -> (u16, String) {
        let shows = |name: &str, proof: &str| request.header(name) == Some(proof);
        let answer = match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/") if request.is_assumption() => self.hand_out().map(|given| xml(&given)),
            ("GET", "/container") if shows("authorization", PROOF) => self.hand_out().map(|given| json(&given)),
            ("PUT", "/latest/api/token") => Ok(INSTANCE_SESSION.to_string()),
            ("GET", path) if shows("x-aws-ec2-metadata-token", INSTANCE_SESSION) => match path.strip_prefix(ROLES) {
                Some("") => Ok(ROLE.to_string()),
                Some(ROLE) => self.hand_out().map(|given| json(&given)),
                _ => return (404, String::new()),
            },
            _ => return (403, String::new()),
        };
        answer.map_or_else(|error| (500, error), |body| (200, body))
    }

    fn hand_out(&self) -> Result<HandedOut, String> {
        let session = self.owner.new_session()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?;
        let expires = UNIX_EPOCH + Duration::from_secs(now.as_secs()) + self.lifetime;
        let given = HandedOut { session, expires };
        self.handed_out().push(given.clone());
        Ok(given)
    }
}

fn json(given: &HandedOut) -> String {
    let Session { key, secret, token } = &given.session;
    let expiration = given.expiration();
    format!(
        r#"{{"Code":"Success","AccessKeyId":"{key}","SecretAccessKey":"{secret}","Token":"{token}","Expiration":"{expiration}"}}"#
    )
}

fn xml(given: &HandedOut) -> String {
    let Session { key, secret, token } = &given.session;
    let expiration = given.expiration();
    format!(
        "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>\
         <AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{token}</SessionToken>\
         <Expiration>{expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>\
         </AssumeRoleWithWebIdentityResponse>"
    )
}

struct Request {
    method: String,
    path: String,
    headers: Vec<(String, String)>,
    body: String,
}

impl Request {
    fn read(client: &TcpStream) -> io::Result<Self> {
        let mut reader = BufReader::new(client);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut lines = head.lines();
        let mut first = lines.next().unwrap_or_default().split(' ').map(str::to_string);
        let (method, path) = (first.next().unwrap_or_default(), first.next().unwrap_or_default());
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_string()))
        };
        let mut request = Request { method, path, headers: lines.filter_map(header).collect(), body: String::new() };
        let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        reader.take(length).read_to_string(&mut request.body)?;
        Ok(request)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn is_assumption(&self) -> bool {
        let role = ROLE_ARN.replace(':', "%3A").replace('/', "%2F");
        let parts = [
            "Action=AssumeRoleWithWebIdentity".to_string(),
            format!("RoleArn={role}"),
            format!("WebIdentityToken={PROOF}"),
        ];
        parts.iter().all(|part| self.body.split('&').any(|found| found == part))
    }
}
