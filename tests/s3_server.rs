//! The S3 servers that `scripts/with-s3.sh` starts, and a way to look into them that is not our store's: curl, which signs.

use std::env;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

/// The region of every server.
pub const REGION: &str = "us-east-1";

/// A server and one of its users.
#[derive(Clone, Debug)]
pub struct S3Server {
    name: &'static str,
    /// `http://…` or `https://…`, without a path.
    pub endpoint: String,
    /// The user's access key.
    pub key: String,
    /// Its secret.
    pub secret: String,
    /// The certificate of the authority that `https://…` is under.
    pub ca: PathBuf,
}

fn variable(name: &str) -> String {
    env::var(name)
        .unwrap_or_else(|_| panic!("{name} is not set: run these tests with `make test-s3` or `make test-server-15`"))
}

/// One that no bucket and no user has.
fn new_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

impl S3Server {
    /// RADOS Gateway over TLS. Strict, but it knows no checksum headers; a second user is `OTHER`.
    pub fn ceph() -> Self {
        Self::of("CEPH")
    }

    /// The same gateway without TLS, as a [fault proxy](crate::fault_proxy) needs it.
    pub fn ceph_without_tls() -> Self {
        Self::ceph().at(variable("ARCHIVER_TEST_CEPH_HTTP"))
    }

    /// moto over TLS, which checks permissions: `NO_PUT`, `NO_GET`, `NO_LIST` and `NO_DELETE` each lack one. Unlike AWS it
    /// answers 404 and not 403 to who asks for an absent object and may not list.
    pub fn moto() -> Self {
        Self::of("MOTO")
    }

    /// Garage without TLS, where it runs. It verifies checksums, and overwrites whatever `If-None-Match` says.
    pub fn garage() -> Option<Self> {
        env::var_os("ARCHIVER_TEST_GARAGE").map(|_| Self::of("GARAGE"))
    }

    fn of(name: &'static str) -> Self {
        let endpoint = variable(&format!("ARCHIVER_TEST_{name}"));
        let ca = PathBuf::from(variable("ARCHIVER_TEST_S3_CA"));
        S3Server { name, endpoint, key: String::new(), secret: String::new(), ca }.with_keys("")
    }

    fn with_keys(self, user: &str) -> Self {
        let name = self.name;
        let key = variable(&format!("ARCHIVER_TEST_{name}_{user}KEY"));
        let secret = variable(&format!("ARCHIVER_TEST_{name}_{user}SECRET"));
        S3Server { key, secret, ..self }
    }

    /// The same server as another of its users sees it.
    pub fn as_user(&self, user: &str) -> Self {
        self.clone().with_keys(&format!("{user}_"))
    }

    /// The same server and user at another endpoint.
    pub fn at(&self, endpoint: impl Into<String>) -> Self {
        S3Server { endpoint: endpoint.into(), ..self.clone() }
    }

    /// A bucket that nobody had before.
    pub fn new_bucket(&self) -> Bucket {
        let name = new_name();
        let response = self.request("PUT", &format!("/{name}"), &[], None);
        assert_eq!(response.status, 200, "create bucket {name}: {response:?}");
        Bucket { server: self.clone(), name }
    }

    /// Makes a new bucket, whose objects can be locked, and answers it.
    #[track_caller]
    pub fn new_locking_bucket(&self) -> Bucket {
        let name = new_name();
        let lock = [("x-amz-bucket-object-lock-enabled", "true")];
        let response = self.request("PUT", &format!("/{name}"), &lock, None);
        assert_eq!(response.status, 200, "create bucket {name}: {response:?}");
        Bucket { server: self.clone(), name }
    }

    /// Sends one signed request; what curl says where no response came. `path` is encoded, and its query sorted, each
    /// name with a `=`: curl signs it as it stands.
    pub fn try_request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Result<Response, String> {
        let mut curl = self.curl();
        curl.args(["--header", "x-amz-content-sha256: UNSIGNED-PAYLOAD"]);
        for (name, value) in headers {
            curl.args(["--header", &format!("{name}: {value}")]);
        }
        let directory = tempfile::tempdir().expect("temporary directory");
        if let Some(body) = body {
            let path = directory.path().join("body");
            fs::write(&path, body).expect("write body");
            curl.arg("--upload-file").arg(path);
        }
        match method {
            "HEAD" => curl.arg("--head"),
            _ => curl.args(["--request", method]),
        };
        self.ask(&mut curl, path)
    }

    fn curl(&self) -> Command {
        let mut curl = Command::new("curl");
        curl.args(["-q", "--silent", "--show-error", "--include", "--http1.1", "--noproxy", "*", "--max-time", "60"])
            .args(["--globoff", "--path-as-is", "--user", &format!("{}:{}", self.key, self.secret)])
            .args(["--aws-sigv4", &format!("aws:amz:{REGION}:s3"), "--cacert"])
            .arg(&self.ca);
        curl
    }

    fn ask(&self, curl: &mut Command, path: &str) -> Result<Response, String> {
        let output = curl.arg(format!("{}{path}", self.endpoint)).output().expect("run curl");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim_end().to_string());
        }
        Ok(Response::parse(&output.stdout))
    }

    /// Asks for something that is not about objects; `parameters` as they are in a query.
    fn act(&self, action: &str, parameters: &str) -> Result<Response, String> {
        let mut curl = self.curl();
        curl.args(["--data", &format!("Action={action}&{parameters}")]);
        self.ask(&mut curl, "/")
    }

    /// Keys that its token service hands out to this user. It honours them for a quarter of an hour, the least that it
    /// can, and only beside their token.
    pub fn new_session(&self) -> Result<Session, String> {
        let response = self.act("GetSessionToken", "DurationSeconds=900")?;
        let (status, text) = (response.status, response.text());
        let of = |name| elements(&text, name).pop().ok_or_else(|| format!("{status} without {name}"));
        Ok(Session { key: of("AccessKeyId")?, secret: of("SecretAccessKey")?, token: of("SessionToken")? })
    }

    /// The same where a response must come.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Response {
        self.try_request(method, path, headers, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }
}

/// Temporary keys.
#[derive(Clone, Debug)]
pub struct Session {
    /// The access key.
    pub key: String,
    /// Its secret.
    pub secret: String,
    /// What every request that it signs has to tell.
    pub token: String,
}

/// A user of the gateway for one test, whose keys come and go.
pub struct CephUser {
    /// The gateway without TLS, and a key of the user's that stays.
    pub server: S3Server,
    name: String,
}

impl CephUser {
    /// One that nobody was before; may make buckets, and sessions.
    #[track_caller]
    pub fn new() -> Self {
        let name = new_name();
        let server = Self::with_key(&name, "lasting");
        let user = CephUser { server, name };
        let S3Server { key, secret, .. } = &user.server;
        user.administer(
            ["user", "create"],
            &["--display-name", &user.name, "--access-key", key, "--secret-key", secret, "--caps", "user-policy=write"],
        );
        let policy = r#"{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "sts:GetSessionToken",
            "Resource": "*"}]}"#;
        let parameters = format!("PolicyDocument={}&PolicyName=sessions&UserName={}", encode(policy, ""), user.name);
        let response = user.server.act("PutUserPolicy", &parameters).expect("an answer");
        assert_eq!(response.status, 200, "{response:?}");
        user
    }

    fn with_key(user: &str, key: &str) -> S3Server {
        S3Server {
            key: format!("{user}-{key}"),
            secret: format!("secret-of-{key}-of-{user}"),
            ..S3Server::ceph_without_tls()
        }
    }

    /// The same user with a key of that name, which may not be valid yet, or any more.
    pub fn key(&self, name: &str) -> S3Server {
        Self::with_key(&self.name, name)
    }

    /// Makes a key valid.
    #[track_caller]
    pub fn add(&self, S3Server { key, secret, .. }: &S3Server) {
        self.administer(["key", "create"], &["--key-type", "s3", "--access-key", key, "--secret-key", secret]);
    }

    /// Ends a key: its requests are refused from now on.
    #[track_caller]
    pub fn remove(&self, S3Server { key, .. }: &S3Server) {
        self.administer(["key", "rm"], &["--key-type", "s3", "--access-key", key]);
    }

    #[track_caller]
    fn administer(&self, what: [&str; 2], arguments: &[&str]) {
        let mut command = Command::new("radosgw-admin");
        command.args(["-c", &variable("ARCHIVER_TEST_CEPH_CONF")]).args(what).args(["--uid", &self.name]);
        let output = command.args(arguments).output().expect("run radosgw-admin");
        assert!(output.status.success(), "{what:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Default for CephUser {
    fn default() -> Self {
        Self::new()
    }
}

/// What a server answered.
pub struct Response {
    /// The status.
    pub status: u16,
    headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

impl fmt::Debug for Response {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        write!(formatter, "{} {:?} {}", self.status, self.headers, self.text())
    }
}

impl Response {
    fn parse(mut output: &[u8]) -> Self {
        loop {
            let end = output.windows(4).position(|window| window == b"\r\n\r\n").expect("the end of the head");
            let head = String::from_utf8_lossy(&output[..end]);
            let mut lines = head.split("\r\n");
            let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
            let status: u16 = status.unwrap_or_else(|| panic!("no status: {head}"));
            output = &output[end + 4..];
            if status >= 200 {
                let header = |line: &str| {
                    let (name, value) = line.split_once(':').expect("a header");
                    (name.to_ascii_lowercase(), value.trim().to_string())
                };
                return Response { status, headers: lines.map(header).collect(), body: output.to_vec() };
            }
        }
    }

    /// The value of that header, whose name is in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The S3 error code in the body.
    pub fn code(&self) -> Option<String> {
        elements(&self.text(), "Code").into_iter().next()
    }
}

/// A bucket as one user of one server sees it.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// The server and the user.
    pub server: S3Server,
    /// The bucket's name.
    pub name: String,
}

impl Bucket {
    /// The same bucket as another of the server's users sees it.
    pub fn as_user(&self, user: &str) -> Self {
        Bucket { server: self.server.as_user(user), name: self.name.clone() }
    }

    /// The same bucket at another endpoint of the server.
    pub fn at(&self, endpoint: impl Into<String>) -> Self {
        Bucket { server: self.server.at(endpoint), name: self.name.clone() }
    }

    /// Stores an object.
    #[track_caller]
    pub fn put(&self, key: &str, body: &[u8], headers: &[(&str, &str)]) -> Response {
        self.server.request("PUT", &self.path(key), headers, Some(body))
    }

    /// Reads an object.
    #[track_caller]
    pub fn get(&self, key: &str, headers: &[(&str, &str)]) -> Response {
        self.server.request("GET", &self.path(key), headers, None)
    }

    /// Asks for an object's headers.
    #[track_caller]
    pub fn head(&self, key: &str) -> Response {
        self.server.request("HEAD", &self.path(key), &[], None)
    }

    /// Removes an object.
    #[track_caller]
    pub fn delete(&self, key: &str) -> Response {
        self.server.request("DELETE", &self.path(key), &[], None)
    }

    /// The first page of the keys that begin so, as the server answers.
    #[track_caller]
    pub fn list_page(&self, prefix: &str) -> Response {
        self.server.request("GET", &format!("/{}?list-type=2&prefix={}", self.name, encode(prefix, "")), &[], None)
    }

    /// Every key that begins so.
    #[track_caller]
    pub fn list(&self, prefix: &str) -> Vec<String> {
        self.etags(prefix).into_iter().map(|(key, _)| key).collect()
    }

    /// Every key that begins so, with the ETag of its object.
    #[track_caller]
    pub fn etags(&self, prefix: &str) -> Vec<(String, String)> {
        let mut keys = Vec::new();
        let mut page = self.list_page(prefix);
        loop {
            assert_eq!(page.status, 200, "list {}: {}", self.name, page.text());
            keys.extend(elements(&page.text(), "Key").into_iter().zip(elements(&page.text(), "ETag")));
            let Some(token) = elements(&page.text(), "NextContinuationToken").into_iter().next() else { return keys };
            let (token, prefix) = (encode(&token, ""), encode(prefix, ""));
            let path = format!("/{}?continuation-token={token}&list-type=2&prefix={prefix}", self.name);
            page = self.server.request("GET", &path, &[], None);
        }
    }

    /// The path of an object, encoded, for [`S3Server::request`].
    pub fn path(&self, key: &str) -> String {
        format!("/{}/{}", self.name, encode(key, "/"))
    }
}

/// Percent-encoded but for what S3 leaves as it is, and for the characters in `kept`.
fn encode(text: &str, kept: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || kept.as_bytes().contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// The texts of all elements of that name.
fn elements(xml: &str, name: &str) -> Vec<String> {
    let (open, close) = (format!("<{name}>"), format!("</{name}>"));
    let text = |part: &str| {
        let text = part.split_once(&close).expect("the end of the element").0;
        let plain = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#34;", "\""), ("&apos;", "'"), ("&#39;", "'")];
        plain.iter().fold(text.to_string(), |text, (escaped, plain)| text.replace(escaped, plain)).replace("&amp;", "&")
    };
    xml.split(&open).skip(1).map(text).collect()
}
