//! Keys that change under load, and those who hand them out: nothing fails as long as there is a valid key, no key is used past
//! its expiry, and whatever was missing is taken up without a restart.

use super::Site;
use crate::cluster::{Cluster, figure, wait_until};
use crate::stopping::assert_no_crash;
use archiver_tests::credential_endpoint::{CredentialEndpoint, INSTANCE_SESSION, PROOF, ROLE, ROLE_ARN};
use archiver_tests::fault_proxy::FaultProxy;
use archiver_tests::s3_server::{CephUser, S3Server};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

/// Completes one small segment after the other, until it is told to end.
struct Load<'a> {
    cluster: &'a Cluster,
    client: Child,
}

impl<'a> Load<'a> {
    fn on(cluster: &'a Cluster) -> Self {
        let sql = "DO $$ BEGIN LOOP \
                     PERFORM pg_logical_emit_message(false, 'test', string_agg(md5(random()::text), '')) \
                     FROM generate_series(1, 1000); \
                     PERFORM pg_switch_wal(); PERFORM pg_sleep(0.4); END LOOP; END $$";
        let mut client = cluster.client("psql");
        client.env("PGAPPNAME", "load").args(["-Xq", "-d", "postgres", "-c", sql]).stderr(Stdio::null());
        Load { cluster, client: client.spawn().expect("run psql") }
    }

    fn end(mut self) {
        self.cluster.psql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'load'");
        self.client.wait().expect("the end of the load");
    }
}

/// A request as it was signed.
struct Signed {
    is_of_segment: bool,
    key: String,
    /// To the second: `20260131T235959Z`.
    at: String,
    token: Option<String>,
}

/// The signed requests that came to the store.
fn signed(proxy: &FaultProxy) -> Vec<Signed> {
    let header = |head: &str, name: &str| {
        let value = |line: &str| {
            line.split_once(':').filter(|(found, _)| found.eq_ignore_ascii_case(name)).map(|it| it.1.trim().to_string())
        };
        head.lines().find_map(value)
    };
    let signed = |head: &String| {
        let authorization = header(head, "authorization").expect("a signature");
        let (_, credential) = authorization.split_once("Credential=").expect("a credential");
        Signed {
            is_of_segment: head.starts_with("PUT ") && head.contains("/wals/"),
            key: credential.split('/').next().expect("a key").to_string(),
            at: header(head, "x-amz-date").expect("a date"),
            token: header(head, "x-amz-security-token"),
        }
    };
    proxy.heads().iter().map(signed).collect()
}

/// How many segments were sent under each key.
fn segments_by_key(proxy: &FaultProxy) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for signed in signed(proxy).into_iter().filter(|signed| signed.is_of_segment) {
        *counts.entry(signed.key).or_default() += 1;
    }
    counts
}

/// One that tells all it can, where no secret may stand.
fn talkative_cluster() -> Cluster {
    Cluster::new(1).with("log_min_messages", "debug1")
}

fn failed_count(cluster: &Cluster) -> u32 {
    cluster.psql("SELECT failed_count FROM pg_stat_archiver").parse().expect("a number")
}

fn archived_count(cluster: &Cluster) -> usize {
    cluster.psql("SELECT archived_count FROM pg_stat_archiver").parse().expect("a number")
}

/// State and detail of the row `credentials`.
fn credentials_row(cluster: &Cluster) -> (String, String) {
    let row = cluster.psql("SELECT state, detail FROM archiver.check() WHERE name = 'credentials'");
    let (state, detail) = row.split_once('|').unwrap_or_else(|| panic!("no row: {row:?}"));
    (state.to_string(), detail.to_string())
}

#[track_caller]
fn assert_log_lacks(cluster: &Cluster, secrets: impl IntoIterator<Item = String>) {
    let log = cluster.log();
    for secret in secrets {
        assert!(!log.contains(&secret), "{secret:?} in the log:\n{log}");
    }
}

/// Two keys of one user, of which a file holds one.
struct Rotation {
    site: Site,
    user: CephUser,
    profile: &'static str,
    keys: [S3Server; 2],
}

impl Rotation {
    /// A cluster that archives under the first.
    fn archiving(profile: &'static str) -> Self {
        let user = CephUser::new();
        let proxy = FaultProxy::before(&user.server.endpoint);
        let site = Site::of(talkative_cluster(), user.server.new_bucket(), Some(proxy));
        if profile != "default" {
            site.cluster.set("archiver.storage", &format!("{}&profile={profile}", site.url()));
        }
        let keys = ["first", "second"].map(|name| user.key(name));
        user.add(&keys[0]);
        let rotation = Rotation { site, user, profile, keys };
        rotation.write(0);
        Rotation { site: rotation.site.archiving(), ..rotation }
    }

    fn write(&self, key: usize) {
        let S3Server { key, secret, .. } = &self.keys[key];
        let section = |name: &str, secret: &str| {
            format!("[{name}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        };
        let others = ["default", "wal", "other"].into_iter().filter(|name| *name != self.profile);
        let others: String = others.map(|name| section(name, "wrong")).collect();
        self.site.write_profiles(&format!("{others}{}", section(self.profile, secret)));
    }

    fn segments_under(&self, key: usize) -> usize {
        segments_by_key(self.site.proxy()).get(&self.keys[key].key).copied().unwrap_or(0)
    }

    fn wait_until_used(&self, key: usize) {
        let before = self.segments_under(key);
        wait_until("the other key is used", || self.segments_under(key) > before + 1);
    }
}

#[track_caller]
fn assert_rotations_cost_nothing(profile: &'static str) {
    const ROTATIONS: usize = 6;
    let rotation = Rotation::archiving(profile);
    let (site, cluster) = (&rotation.site, &rotation.site.cluster);
    let archiver = cluster.running_archiver();
    let load = Load::on(cluster);
    for number in 1..=ROTATIONS {
        let (old, new) = ((number + 1) % 2, number % 2);
        rotation.user.add(&rotation.keys[new]);
        rotation.write(new);
        if number == 1 {
            // Seen by itself; else by the first refusal.
            rotation.wait_until_used(new);
        }
        rotation.user.remove(&rotation.keys[old]);
        rotation.wait_until_used(new);
    }
    assert_eq!(failed_count(cluster), 0);
    let rotated = archived_count(cluster);

    // The key dies before there is another.
    let [first, second] = [&rotation.keys[0], &rotation.keys[1]];
    rotation.user.remove(first);
    wait_until("archiving fails", || failed_count(cluster) > 0);
    let source = format!("credentials from profile \"{profile}\" in \"{}\"", site.credentials().display());
    wait_until("the failure is told", || cluster.log().contains(&source));
    rotation.user.add(second);
    let mended = Instant::now();
    rotation.write(1);
    rotation.wait_until_used(1);
    let recovered = mended.elapsed();
    load.end();
    cluster.drain();
    assert_eq!(cluster.archiver(), Some(archiver));
    println!(
        "{ROTATIONS} rotations, {rotated} files, none failed; the key dead first: {} failed attempts, and {:.1} s after the \
         file was mended it went on",
        failed_count(cluster),
        recovered.as_secs_f64()
    );
    assert!(site.assert_complete() > rotated);
    assert_no_crash(cluster);
    assert_log_lacks(cluster, rotation.keys.iter().map(|key| key.secret.clone()));
}

#[test]
fn keys_rotated_in_the_file_under_load_fail_no_file() {
    assert_rotations_cost_nothing("default");
}

#[test]
fn keys_rotated_in_a_named_profile_under_load_fail_no_file() {
    assert_rotations_cost_nothing("wal");
}

/// Who hands out the keys.
#[derive(Clone, Copy, Debug)]
enum Giver {
    WebIdentity,
    Container,
    InstanceMetadata,
}

impl Giver {
    /// As it is told.
    fn source(self) -> String {
        match self {
            Giver::WebIdentity => format!("web identity role {ROLE_ARN}"),
            Giver::Container => "container".to_string(),
            Giver::InstanceMetadata => format!("instance metadata role {ROLE}"),
        }
    }

    /// What the server's environment says of it.
    fn environment(self, url: &str, proof: &Path) -> Vec<(&'static str, String)> {
        let proof = proof.display().to_string();
        match self {
            Giver::WebIdentity => vec![
                ("AWS_WEB_IDENTITY_TOKEN_FILE", proof),
                ("AWS_ROLE_ARN", ROLE_ARN.to_string()),
                ("AWS_ENDPOINT_URL_STS", url.to_string()),
            ],
            Giver::Container => vec![
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", format!("{url}/container")),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", proof),
            ],
            Giver::InstanceMetadata => vec![("AWS_EC2_METADATA_SERVICE_ENDPOINT", url.to_string())],
        }
    }
}

/// A cluster whose keys are handed out to it.
struct Machine {
    site: Site,
    endpoint: CredentialEndpoint,
    /// Between the two.
    way: FaultProxy,
    archiver: Pid,
    since: Instant,
}

impl Machine {
    fn archiving(giver: Giver, lifetime: Duration) -> Self {
        let since = Instant::now();
        let user = CephUser::new();
        let endpoint = CredentialEndpoint::of(&user.server, lifetime);
        let way = FaultProxy::before(&endpoint.url());
        let proxy = FaultProxy::before(&user.server.endpoint);
        let site =
            Site::of(talkative_cluster(), user.server.new_bucket(), Some(proxy)).with("archiver.retry_timeout", "2s");
        let cluster = &site.cluster;
        cluster.set("archiver.storage", &site.url_without_keys(&site.bucket.name, "some/place"));
        let proof = cluster.path("proof");
        cluster.write_file(&proof, PROOF.as_bytes());
        // Where there is no profile.
        cluster.set_environment("HOME", cluster.directory());
        for (name, value) in giver.environment(&way.endpoint(), &proof) {
            cluster.set_environment(name, Path::new(&value));
        }
        let site = site.archiving();
        let archiver = site.cluster.running_archiver();
        Machine { site, endpoint, way, archiver, since }
    }

    /// Every request was signed with keys that were handed out and had not expired, and told their token.
    #[track_caller]
    fn assert_only_valid_keys_signed(&self) {
        let (proxy, handed_out) = (self.site.proxy(), self.endpoint.handed_out());
        let all = signed(proxy);
        assert_eq!(all.len() as u64, proxy.count_all(), "every request is known");
        for Signed { key, at, token, .. } in all {
            let given = handed_out.iter().find(|given| given.session.key == key);
            let given = given.unwrap_or_else(|| panic!("{key} was never handed out"));
            let expiration = given.expiration().replace(['-', ':'], "");
            assert!(at < expiration, "{key} signed at {at} and had expired at {expiration}");
            assert_eq!(token.as_ref(), Some(&given.session.token), "{key}");
        }
    }

    /// All is archived, by the process that began, and no secret was told.
    #[track_caller]
    fn assert_well(&self) {
        let cluster = &self.site.cluster;
        cluster.drain();
        assert_eq!(cluster.archiver(), Some(self.archiver));
        self.assert_only_valid_keys_signed();
        let secrets =
            self.endpoint.handed_out().into_iter().flat_map(|given| [given.session.secret, given.session.token]);
        assert_log_lacks(cluster, secrets.chain([PROOF.to_string(), INSTANCE_SESSION.to_string()]));
        assert_no_crash(cluster);
        // The program runs where nobody hands out keys.
        cluster.set("archiver.storage", &self.site.url());
        assert!(self.site.assert_complete() > 0);
    }
}

/// `ARCHIVER_TEST_CREDENTIAL_SECONDS=600` for the whole, with keys that live for a minute.
#[track_caller]
fn assert_keys_are_renewed_in_time(giver: Giver) {
    let lasting = figure("ARCHIVER_TEST_CREDENTIAL_SECONDS", 12);
    let lifetime = (lasting / 10).clamp(6, 60);
    let machine = Machine::archiving(giver, Duration::from_secs(lifetime.into()));
    let cluster = &machine.site.cluster;
    let source = giver.source();
    wait_until("the source is told", || cluster.psql("SELECT credential_source FROM archiver.status") == source);
    let (began, mut checks) = (Instant::now(), 0);
    let load = Load::on(cluster);
    while began.elapsed() < Duration::from_secs(lasting.into()) {
        let (state, detail) = credentials_row(cluster);
        assert_eq!(state, "ok", "{detail}");
        let left =
            detail.strip_prefix(&format!("from {source}, for another ")).and_then(|rest| rest.strip_suffix(" s"));
        let left: u32 = left.and_then(|left| left.parse().ok()).unwrap_or_else(|| panic!("{detail:?}"));
        assert!(left <= lifetime, "{detail}");
        assert_eq!(cluster.psql("SELECT credential_source FROM archiver.status"), source);
        checks += 1;
        sleep(Duration::from_secs((lifetime / 4).into()));
    }
    load.end();
    cluster.drain();
    let keys = segments_by_key(machine.site.proxy());
    println!(
        "{giver:?}, {lasting} s with keys of {lifetime} s: {} files archived under {} keys, {} failed; {} keys handed out, \
         {checks} of them to check(); {} requests",
        archived_count(cluster),
        keys.len(),
        failed_count(cluster),
        machine.endpoint.handed_out().len(),
        machine.site.proxy().count_all(),
    );
    assert_eq!(failed_count(cluster), 0);
    assert!(!cluster.log().contains("WARNING"), "{}", cluster.log());
    // As many as it takes, and not many more.
    let needed = (lasting / lifetime) as usize;
    let most = machine.since.elapsed().as_secs() as usize * 2 / lifetime as usize + 2;
    assert!((needed..=most).contains(&keys.len()), "{needed} to {most}: {keys:?}");
    machine.assert_well();
}

#[test]
fn keys_of_a_web_identity_are_renewed_before_they_expire() {
    assert_keys_are_renewed_in_time(Giver::WebIdentity);
}

#[test]
fn keys_of_a_container_are_renewed_before_they_expire() {
    assert_keys_are_renewed_in_time(Giver::Container);
}

#[test]
fn keys_of_an_instance_are_renewed_before_they_expire() {
    assert_keys_are_renewed_in_time(Giver::InstanceMetadata);
}

#[track_caller]
fn assert_goes_on_until_the_keys_expire(giver: Giver) {
    let machine = Machine::archiving(giver, Duration::from_secs(9));
    let (site, cluster, source) = (&machine.site, &machine.site.cluster, giver.source());
    let load = Load::on(cluster);
    // The whole life of a key is before it.
    let first = machine.endpoint.handed_out().len();
    let fresh = || {
        let last = machine.endpoint.handed_out().pop().expect("keys");
        Some(last).filter(|last| segments_by_key(site.proxy()).contains_key(&last.session.key))
    };
    wait_until("a fresh key is used", || machine.endpoint.handed_out().len() > first && fresh().is_some());
    let last = fresh().expect("a key that is used");
    machine.way.refuse(true);
    let (died, before) = (SystemTime::now(), archived_count(cluster));
    let (state, detail) = credentials_row(cluster);
    assert_ne!(state, "ok", "{detail}");
    let short = source.split(" role ").next().expect("a source");
    assert!(detail.contains(&format!("could not get credentials from {short}")), "{detail}");
    assert_eq!(failed_count(cluster), 0, "check() tells it first");
    wait_until("archiving goes on", || archived_count(cluster) > before + 2);

    wait_until("the failure is told", || cluster.log().contains("WARNING:  could not archive WAL file"));
    let failed = SystemTime::now();
    assert!(failed >= last.expires, "it failed though the keys were valid until {}", last.expiration());
    let served = archived_count(cluster) - before;
    let log = cluster.log();
    assert!(log.contains(&format!("could not get credentials from {short}")), "{log}");
    machine.way.refuse(false);
    let back = Instant::now();
    let failing = archived_count(cluster);
    wait_until("archiving goes on", || archived_count(cluster) > failing);
    println!(
        "{giver:?}: check() had told: {state}: {detail}; {served} files after the endpoint had died; the failure was told after {:.1} s; archiving went on {:.1} s \
         after the endpoint was back",
        failed.duration_since(died).expect("a clock").as_secs_f64(),
        back.elapsed().as_secs_f64()
    );
    load.end();
    machine.assert_well();
    wait_until("that is told", || cluster.log().contains("archiving works again"));
    assert_eq!(credentials_row(cluster).0, "ok");
}

#[test]
fn archiving_outlives_the_token_service_until_the_keys_expire_and_goes_on_when_it_is_back() {
    assert_goes_on_until_the_keys_expire(Giver::WebIdentity);
}

#[test]
fn archiving_outlives_a_containers_endpoint_until_the_keys_expire_and_goes_on_when_it_is_back() {
    assert_goes_on_until_the_keys_expire(Giver::Container);
}

#[test]
fn archiving_outlives_instance_metadata_until_the_keys_expire_and_goes_on_when_it_is_back() {
    assert_goes_on_until_the_keys_expire(Giver::InstanceMetadata);
}
