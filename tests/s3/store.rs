//! The store behind S3's protocol: the battery, and what only such a server, or the network before it, can do to it.

use crate::contract::battery;
use crate::new_url;
use archiver_core::config::{Destination, Setting, Settings, StorageUrl};
use archiver_core::error::{Error, Kind};
use archiver_core::pulse::Pulse;
use archiver_core::store::s3::Patience;
use archiver_core::store::{Attributes, Body, Put, S3Store, Store};
use archiver_tests::fault_proxy::{Fault, FaultProxy, Rule};
use archiver_tests::s3_server::{Bucket, S3Server};
use archiver_tests::{eventually, wal_like};
use std::io::{self, Read, Write};
use std::net::ToSocketAddrs;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

const PROBE: &str = "main/probe/create-only";

battery!({
    let (directory, store) = fixture(&S3Server::ceph().new_bucket(), "");
    let store: Box<dyn Store> = Box::new(store);
    (directory, store)
});

fn fixture(bucket: &Bucket, parameters: &str) -> (TempDir, S3Store) {
    let (directory, url) = new_url(bucket, parameters);
    (directory, open(&url, Duration::from_secs(10), Arc::default()))
}

fn open(url: &str, retry: Duration, pulse: Arc<Pulse>) -> S3Store {
    let StorageUrl::S3(url) = StorageUrl::parse(url).unwrap() else { panic!("{url}") };
    let patience = Patience { attempt: Duration::from_secs(2), all: retry };
    S3Store::open(&url, PROBE, patience, |_| None, pulse).unwrap()
}

/// A store behind a proxy that has not gone wrong yet, and has seen that the server heeds conditions.
fn behind_proxy() -> (Bucket, FaultProxy, TempDir, S3Store) {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let (directory, store) = fixture(&bucket.at(proxy.endpoint()), "");
    put(&store, "first", b"x").unwrap();
    proxy.forget();
    (bucket, proxy, directory, store)
}

fn put(store: &S3Store, key: &str, content: &[u8]) -> Result<Put, Error> {
    store.put_new(key, Body::Bytes(content), &Attributes { modified: SystemTime::now(), content: None })
}

fn put_stream(store: &S3Store, key: &str, content: &[u8]) -> Result<Put, Error> {
    let mut write = |out: &mut dyn Write| content.chunks(70_001).try_for_each(|piece| out.write_all(piece));
    let attributes = Attributes { modified: SystemTime::now(), content: None };
    store.put_new(key, Body::Stream(&mut write), &attributes)
}

fn read(store: &S3Store, key: &str) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    store.get(key).unwrap().unwrap().body.read_to_end(&mut content).map(|_| content)
}

fn created(content: &[u8]) -> Result<Put, Error> {
    Ok(Put::Created { stored_size: content.len() as u64 })
}

#[test]
fn both_addressings_reach_the_same_objects() {
    let bucket = S3Server::ceph().new_bucket();
    let (_one, by_path) = fixture(&bucket, "");
    put(&by_path, "a/b", b"content").unwrap();
    let (_, port) = bucket.server.endpoint.rsplit_once(':').unwrap();
    let host = bucket.at(format!("https://buckets.localhost:{port}"));
    let (_two, by_host) = fixture(&host, "&addressing=virtual");
    let authority = format!("{}.buckets.localhost:{port}", bucket.name);
    assert_eq!(by_host.location("a/b"), format!("https://{authority}/some/place/a/b"));
    let lasting = by_host.lasting_location("a/b");
    assert_eq!(lasting, format!("s3://{}/some/place/a/b at {}", bucket.name, host.server.endpoint));
    if authority.to_socket_addrs().is_err() {
        println!("skipped: this system does not resolve names below localhost");
        return;
    }
    assert_eq!(read(&by_host, "a/b").unwrap(), b"content");
    assert_eq!(by_host.list("a", None, 10).unwrap().len(), 1);
}

#[test]
fn what_the_url_asks_for_is_what_the_store_keeps() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, store) =
        fixture(&bucket, "&storage_class=STANDARD_IA&sse=aws:kms&sse_kms_key_id=archiver&tags=a=b+c,d=1");
    put(&store, "a/b", b"content").unwrap();
    let head = bucket.head("some/place/a/b");
    assert_eq!(head.status, 200, "{head:?}");
    assert_eq!(head.header("x-amz-storage-class"), Some("STANDARD_IA"), "{head:?}");
    assert_eq!(head.header("x-amz-server-side-encryption"), Some("aws:kms"), "{head:?}");
    assert_eq!(head.header("content-encoding"), None);
    let tags = bucket.server.request("GET", &format!("{}?tagging=", bucket.path("some/place/a/b")), &[], None).text();
    assert!(tags.contains("<Key>a</Key><Value>b c</Value>") && tags.contains("<Key>d</Key><Value>1</Value>"), "{tags}");
    let (_directory, plain) = fixture(&bucket, "&sse=AES256");
    put(&plain, "a/c", b"content").unwrap();
    assert_eq!(read(&plain, "a/c").unwrap(), b"content");
}

#[test]
fn a_key_with_every_kind_of_character_is_one_key() {
    let (_directory, store) = fixture(&S3Server::ceph().new_bucket(), "");
    for key in ["a/b c", "a/b+c", "a/b%20c", "a/b&c=d", "a/ü", "a/~'()*!"] {
        put(&store, key, key.as_bytes()).unwrap();
    }
    for key in ["a/b c", "a/b+c", "a/b%20c", "a/b&c=d", "a/ü", "a/~'()*!"] {
        assert_eq!(read(&store, key).unwrap(), key.as_bytes());
    }
    assert_eq!(store.list("a", Some("a/b&c=d"), 1).unwrap()[0].key, "a/b+c");
}

#[test]
fn a_store_is_asked_once_whether_it_heeds_the_condition() {
    let server = S3Server::ceph_without_tls();
    let proxy = FaultProxy::before(&server.endpoint);
    let bucket = server.new_bucket().at(proxy.endpoint());
    let (_one, store) = fixture(&bucket, "");
    put(&store, "a", b"x").unwrap();
    put(&store, "b", b"x").unwrap();
    assert_eq!(proxy.count("PUT"), 4, "two of the probe, two of ours: {:?}", proxy.requests());
    let (_two, again) = fixture(&bucket, "");
    proxy.forget();
    put(&again, "c", b"x").unwrap();
    assert_eq!(proxy.count("PUT"), 2, "the probe stands already");
    let (_three, trusting) = fixture(&bucket, "&create_only=conditional");
    proxy.forget();
    put(&trusting, "d", b"x").unwrap();
    assert_eq!(proxy.count_all(), 1);
}

#[test]
fn a_store_that_ignores_the_condition_is_never_written_to() {
    let Some(garage) = S3Server::garage() else {
        println!("skipped: Garage is part of `make test-all`");
        return;
    };
    let bucket = garage.new_bucket();
    let (_directory, store) = fixture(&bucket, "");
    for _ in 0..2 {
        let error = put(&store, "main/wals/x", b"x").unwrap_err();
        assert_eq!((error.kind(), error.is_worth_retrying()), (Kind::Configuration, false));
        assert_eq!(error.message(), "the store would overwrite archived files");
        assert!(error.hint_text().unwrap().contains("create_only=head"), "{error:?}");
    }
    assert_eq!(bucket.list(""), [format!("some/place/{PROBE}")]);
    let (_directory, looking) = fixture(&bucket, "&create_only=head");
    assert_eq!(put(&looking, "main/wals/x", b"x"), created(b"x"));
    assert_eq!(put(&looking, "main/wals/x", b"other"), Ok(Put::AlreadyExists));
    assert_eq!(read(&looking, "main/wals/x").unwrap(), b"x");
}

#[test]
fn a_store_that_does_not_know_the_condition_is_never_written_to() {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    proxy.inject(
        Rule::s3_error(501, "NotImplemented", "A header implies functionality that is not there")
            .header("if-none-match"),
    );
    let (_directory, store) = fixture(&bucket.at(proxy.endpoint()), "");
    let error = put(&store, "a", b"x").unwrap_err();
    assert_eq!(error.message(), "the store would overwrite archived files");
    assert!(bucket.list("").is_empty());
}

#[test]
fn a_checksum_that_the_store_turns_down_is_replaced_by_one_that_it_takes() {
    let server = S3Server::ceph_without_tls();
    let proxy = FaultProxy::before(&server.endpoint);
    let bucket = server.new_bucket().at(proxy.endpoint());
    let refusal =
        || Rule::s3_error(400, "InvalidArgument", "x-amz-checksum is not supported").header("x-amz-checksum-");
    proxy.inject(refusal());
    let (_directory, store) = fixture(&bucket, "");
    assert_eq!(put(&store, "a", b"content"), created(b"content"));
    let heads = proxy.heads();
    assert!(heads.last().unwrap().to_lowercase().contains("content-md5: "), "{heads:?}");
    proxy.forget();
    put(&store, "b", b"content").unwrap();
    assert_eq!(proxy.count_all(), 1, "it is remembered");
    let (_directory, strict) = fixture(&bucket, "&checksum=crc32c");
    let error = put(&strict, "c", b"content").unwrap_err();
    assert_eq!(error.message(), "store answered 400 InvalidArgument");
}

#[test]
fn a_refusal_that_is_not_about_the_checksum_comes_back_as_it_was() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    proxy.inject(Rule::s3_error(400, "InvalidRequest", "no").method("PUT"));
    let error = put(&store, "a", b"content").unwrap_err();
    assert_eq!(error.message(), "store answered 400 InvalidRequest");
    assert!(error.detail_text().unwrap().contains("The store said: no."), "{error:?}");
    proxy.clear();
    proxy.forget();
    assert_eq!(put(&store, "a", b"content"), created(b"content"));
    assert_eq!(proxy.count_all(), 1);
}

#[test]
fn garage_verifies_every_checksum_that_is_sent() {
    let Some(garage) = S3Server::garage() else {
        println!("skipped: Garage is part of `make test-all`");
        return;
    };
    let bucket = garage.new_bucket();
    for checksum in ["auto", "crc32c", "sha256", "md5", "none"] {
        let (_directory, store) = fixture(&bucket, &format!("&create_only=head&checksum={checksum}"));
        let content = wal_like(300_000, 1);
        assert_eq!(put(&store, checksum, &content), created(&content), "{checksum}");
        let streamed = format!("{checksum} streamed");
        assert_eq!(put_stream(&store, &streamed, &content), created(&content), "{checksum}");
        assert!(read(&store, &streamed).unwrap() == content);
    }
}

#[test]
fn a_body_torn_by_a_lost_connection_is_sent_again_from_its_first_byte() {
    let (bucket, proxy, _directory, store) = behind_proxy();
    let content = wal_like(4 << 20, 1);
    proxy.inject(Rule::from(Fault::CutRequest(1 << 20)).method("PUT").times(2));
    assert_eq!(put(&store, "a", &content), created(&content));
    proxy.inject(Rule::from(Fault::CutRequest(3 << 20)).method("PUT").times(1));
    assert_eq!(put_stream(&store, "b", &content), created(&content));
    for key in ["a", "b"] {
        assert!(bucket.get(&format!("some/place/{key}"), &[]).body == content);
    }
    assert_eq!(proxy.count("PUT"), 5);
}

#[test]
fn a_put_whose_answer_was_lost_is_known_as_our_own() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    proxy.inject(Rule::from(Fault::DropResponse).method("PUT").times(1));
    assert_eq!(put(&store, "a", b"content"), created(b"content"));
    assert_eq!((proxy.count("PUT"), proxy.count("HEAD")), (2, 1));
    proxy.inject(Rule::from(Fault::DropResponse).method("PUT").times(1));
    assert_eq!(put_stream(&store, "b", b"content"), created(b"content"));
    proxy.inject(Rule::from(Fault::DropResponse).method("PUT").times(1));
    assert_eq!(put(&store, "a", b"another"), Ok(Put::AlreadyExists), "somebody else's is somebody else's");
}

#[test]
fn a_store_that_is_asked_too_much_is_asked_again() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    proxy.inject(Rule::slow_down().times(3));
    assert_eq!(put(&store, "a", b"x"), created(b"x"));
    proxy.inject(Rule::s3_error(409, "ConditionalRequestConflict", "again").times(1));
    assert_eq!(put(&store, "b", b"x"), created(b"x"));
    proxy.inject(Rule::s3_error(500, "InternalError", "oh").times(2));
    assert_eq!(store.list("", None, 10).map(|_| ()), Ok(()));
    assert_eq!(proxy.count_all(), 4 + 2 + 3);
    assert_eq!(store.facts().retries, 3 + 1 + 2);
}

#[test]
fn tries_end_with_the_retry_timeout_and_tell_their_number() {
    let (bucket, proxy, _directory, _store) = behind_proxy();
    let (_keys, url) = new_url(&bucket.at(proxy.endpoint()), "");
    let store = open(&url, Duration::from_secs(2), Arc::default());
    proxy.inject(Rule::slow_down());
    let started = Instant::now();
    let error = store.head("a").unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    assert_eq!(error.message(), "store answered 503");
    assert!(error.is_worth_retrying());
    let detail = error.detail_text().unwrap();
    assert!(detail.starts_with(&format!("HEAD {}/{}/some/place/a, ", proxy.endpoint(), bucket.name)), "{detail}");
    assert!(detail.contains("attempt ") && detail.contains(" s."), "{detail}");
}

#[test]
fn a_stalled_request_is_given_up_and_made_anew_on_another_connection() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    let content = wal_like(4 << 20, 1);
    for (key, fault) in
        [("a", Fault::StallRequest(1 << 20)), ("b", Fault::StallResponse(0)), ("c", Fault::StallRequest(0))]
    {
        let connections = proxy.connections();
        proxy.inject(Rule::from(fault).method("PUT").times(1));
        assert_eq!(put(&store, key, &content), created(&content), "{key}");
        assert!(proxy.connections() > connections);
        proxy.clear();
    }
}

#[test]
fn reading_goes_on_where_the_connection_was_lost() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    let content = wal_like(4 << 20, 1);
    put(&store, "a", &content).unwrap();
    proxy.forget();
    proxy.inject(Rule::from(Fault::CutResponse(1 << 20)).method("GET").times(3));
    assert!(read(&store, "a").unwrap() == content);
    assert_eq!(proxy.count("GET"), 4);
    proxy.inject(Rule::from(Fault::StallResponse(1 << 20)).method("GET").times(1));
    assert!(read(&store, "a").unwrap() == content);
}

#[test]
fn a_body_that_breaks_off_again_and_again_is_an_error_and_no_end() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    put(&store, "a", &wal_like(4 << 20, 1)).unwrap();
    proxy.inject(Rule::from(Fault::CutResponse(0)).method("GET"));
    let object = store.get("a");
    let error = match object {
        Ok(object) => {
            let failed = object.unwrap().body.read_to_end(&mut Vec::new()).unwrap_err();
            failed.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).expect("an error of ours").clone()
        }
        Err(error) => error,
    };
    assert_eq!(error.kind(), Kind::Storage);
    assert!(error.is_worth_retrying(), "{error:?}");
}

#[test]
fn an_object_that_became_another_while_it_was_read_is_an_error() {
    let (bucket, proxy, _directory, store) = behind_proxy();
    put(&store, "a", &wal_like(4 << 20, 1)).unwrap();
    proxy.inject(Rule::from(Fault::CutResponse(1 << 20)).method("GET").times(1));
    let mut object = store.get("a").unwrap().unwrap();
    let mut first = [0; 1000];
    object.body.read_exact(&mut first).unwrap();
    bucket.put("some/place/a", &wal_like(4 << 20, 2), &[]);
    let failed = object.body.read_to_end(&mut Vec::new()).unwrap_err();
    assert!(failed.to_string().contains("412"), "{failed}");
}

#[test]
fn a_stop_ends_every_request_at_once() {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let (_directory, url) = new_url(&bucket.at(proxy.endpoint()), "");
    let pulse = Arc::new(Pulse::new());
    let store = open(&url, Duration::from_secs(60), Arc::clone(&pulse));
    put(&store, "first", b"x").unwrap();
    proxy.inject(Fault::StallResponse(0));
    std::thread::scope(|scope| {
        let putting = scope.spawn(|| put(&store, "a", b"x"));
        let streaming = scope.spawn(|| put_stream(&store, "b", &wal_like(4 << 20, 1)));
        let looking = scope.spawn(|| store.head("c"));
        eventually("three requests stall", || proxy.stalled() == 3);
        let stopped = Instant::now();
        pulse.stop();
        for error in [
            putting.join().unwrap().unwrap_err(),
            streaming.join().unwrap().unwrap_err(),
            looking.join().unwrap().unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Interrupted, "{error:?}");
        }
        assert!(stopped.elapsed() < Duration::from_millis(500), "{:?}", stopped.elapsed());
    });
}

#[test]
fn progress_beats_the_pulse_and_a_stalled_store_does_not() {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let (_directory, url) = new_url(&bucket.at(proxy.endpoint()), "");
    let pulse = Arc::new(Pulse::new());
    let store = open(&url, Duration::from_secs(60), Arc::clone(&pulse));
    put(&store, "first", &wal_like(4 << 20, 1)).unwrap();
    assert!(pulse.beats() >= 32, "{}", pulse.beats());
    proxy.inject(Rule::from(Fault::StallResponse(0)).times(1));
    std::thread::scope(|scope| {
        let putting = scope.spawn(|| put(&store, "a", b"x"));
        eventually("the request stalls", || proxy.stalled() == 1);
        let before = pulse.beats();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(pulse.beats(), before);
        assert_eq!(putting.join().unwrap(), created(b"x"));
    });
}

#[test]
fn connections_are_kept() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    let connections = proxy.connections();
    for number in 0..20 {
        put(&store, &format!("k{number}"), b"x").unwrap();
        store.head("k0").unwrap();
        read(&store, "k0").unwrap();
    }
    // One that has just answered may not be back yet when the next request looks for it.
    assert!(proxy.connections() - connections <= 3, "{} for 60 requests", proxy.connections() - connections);
}

#[test]
fn a_listing_goes_on_past_a_thousand_keys() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    let keys: Vec<String> = (0..1_203).map(|number| format!("w/{number:05}")).collect();
    std::thread::scope(|scope| {
        for part in keys.chunks(151) {
            let store = &store;
            scope.spawn(move || part.iter().for_each(|key| assert_eq!(put(store, key, b"x"), created(b"x"))));
        }
    });
    proxy.forget();
    let listed = |after: Option<&str>, most| -> Vec<String> {
        store.list("w", after, most).unwrap().into_iter().map(|listed| listed.key).collect()
    };
    assert_eq!(listed(None, 5_000), keys);
    assert_eq!(proxy.lists(), 2);
    assert_eq!(listed(None, 1_100), keys[..1_100]);
    assert_eq!(listed(Some("w/00500"), 1_000), keys[501..]);

    proxy.forget();
    let outcomes = store.delete_all(&keys);
    assert_eq!(outcomes, vec![Ok(()); keys.len()]);
    assert_eq!((proxy.count("POST"), proxy.count("DELETE")), (2, 0));
    assert!(listed(None, 10).is_empty());
    assert_eq!(store.delete_all(&keys[..2]), [Ok(()), Ok(())], "what is not there is removed");
}

#[test]
fn keys_are_deleted_one_by_one_where_the_store_takes_no_batch() {
    let (bucket, proxy, _directory, store) = behind_proxy();
    for key in ["a&b", "c<d"] {
        put(&store, key, b"x").unwrap();
    }
    proxy.inject(Rule::s3_error(501, "NotImplemented", "no").method("POST"));
    assert_eq!(store.delete_all(&["a&b".into(), "c<d".into()]), [Ok(()), Ok(())]);
    assert_eq!(proxy.count("DELETE"), 2);
    assert_eq!(bucket.list("some/place/c"), [] as [&str; 0]);
    proxy.clear();
    put(&store, "a&b", b"x").unwrap();
    assert_eq!(store.delete_all(&["a&b".into()]), [Ok(())]);
    assert!(store.head("a&b").unwrap().is_none());
}

#[test]
fn what_could_not_be_deleted_is_told_by_name_and_stays() {
    let bucket = S3Server::moto().new_bucket();
    let (_all, owner) = fixture(&bucket, "");
    put(&owner, "a", b"x").unwrap();
    let (_none, powerless) = fixture(&bucket.as_user("NO_DELETE"), "");
    for outcome in powerless.delete_all(&["a".into(), "b".into()]) {
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains("AccessDenied"), "{error:?}");
    }
    assert_eq!(powerless.delete("a").unwrap_err().message(), "store answered 403 AccessDenied");
    assert!(owner.head("a").unwrap().is_some());
}

/// The message, detail and hint of a failure, for a test that looks for words.
fn whole(error: &Error) -> String {
    format!("{}\n{}\n{}", error, error.detail_text().unwrap_or_default(), error.hint_text().unwrap_or_default())
}

#[test]
fn a_missing_permission_is_told_with_the_request_that_lacked_it() {
    let bucket = S3Server::moto().new_bucket();
    let (_all, owner) = fixture(&bucket, "");
    put(&owner, "a", b"x").unwrap();
    let secret = bucket.server.secret.clone();
    for (user, request) in [("NO_PUT", "PUT"), ("NO_GET", "GET"), ("NO_LIST", "GET"), ("NO_DELETE", "DELETE")] {
        let (_directory, store) = fixture(&bucket.as_user(user), "&create_only=conditional");
        let error = match user {
            "NO_PUT" => put(&store, "b", b"x").unwrap_err(),
            "NO_GET" => store.get("a").map(|_| ()).unwrap_err(),
            "NO_LIST" => store.list("a", None, 10).unwrap_err(),
            _ => store.delete("a").unwrap_err(),
        };
        assert_eq!(error.message(), "store answered 403 AccessDenied", "{user}");
        assert_eq!((error.kind(), error.is_worth_retrying()), (Kind::Storage, false));
        assert!(error.detail_text().unwrap().starts_with(request), "{error:?}");
        assert!(error.hint_text().unwrap().contains("Allow"), "{error:?}");
        assert!(!whole(&error).contains(&secret));
    }
}

#[test]
fn every_wrong_setting_is_told_with_the_cause_as_the_store_said_it() {
    let bucket = S3Server::ceph().new_bucket();
    let with_server = |change: &dyn Fn(&mut S3Server)| {
        let mut changed = bucket.clone();
        change(&mut changed.server);
        changed
    };
    let missing = Bucket { name: "no-such-bucket".into(), ..bucket.clone() };
    let wrong_secret = with_server(&|server| server.secret = "wrong0secret".into());
    let wrong_key = with_server(&|server| server.key = "nobody".into());
    let closed = bucket.at("https://127.0.0.1:1");
    let unknown_host = bucket.at("https://no-such-host.invalid");
    for (bucket, parameters, message, hint) in [
        (&missing, "", "store answered 404 NoSuchBucket", "Create the bucket"),
        (&wrong_secret, "", "store answered 403 SignatureDoesNotMatch", "Mend the key"),
        (&wrong_key, "", "store answered 403 InvalidAccessKeyId", "Mend the key"),
        (&bucket.as_user("OTHER"), "", "store answered 403 AccessDenied", "Allow"),
        (&closed, "", "could not connect to the store: Connection refused", "endpoint"),
        (&unknown_host, "", "could not connect to the store: ", "endpoint"),
    ] {
        let (_directory, url) = new_url(bucket, parameters);
        let store = open(&url, Duration::from_secs(1), Arc::default());
        for error in [put(&store, "a", b"x").unwrap_err(), store.get("a").map(|_| ()).unwrap_err()] {
            assert!(error.message().starts_with(message), "{message}: {error:?}");
            assert!(error.hint_text().unwrap_or_default().contains(hint), "{error:?}");
            assert!(!whole(&error).contains(&bucket.server.secret), "{error:?}");
        }
    }
}

#[test]
fn a_certificate_that_nobody_vouches_for_is_told_at_once() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, url) = new_url(&bucket, "");
    let url = url.replace(&format!("&ca_file={}", bucket.server.ca.display()), "");
    let store = open(&url, Duration::from_secs(30), Arc::default());
    let started = Instant::now();
    let error = store.head("a").unwrap_err();
    assert!(error.message().contains("certificate"), "{error:?}");
    assert!(error.hint_text().unwrap().contains("ca_file"), "{error:?}");
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_file_of_certificates_that_is_none_is_a_wrong_setting() {
    let bucket = S3Server::ceph().new_bucket();
    let (directory, url) = new_url(&bucket, "");
    let junk = directory.path().join("junk");
    std::fs::write(&junk, "no certificate").unwrap();
    for path in [junk, directory.path().join("missing")] {
        let url = url.replace(&bucket.server.ca.display().to_string(), &path.display().to_string());
        let mut settings = Settings::default();
        settings.set(Setting::Storage, url);
        let destination = Destination::parse(&settings).unwrap();
        let opened = archiver_core::place::Place::open(&destination, &Arc::default());
        let error = opened.map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Configuration, "{error:?}");
        assert!(error.message().contains(&path.display().to_string()), "{error:?}");
    }
}

#[test]
fn a_clock_that_is_wrong_is_told_as_such() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    proxy.inject(Rule::s3_error(403, "RequestTimeTooSkewed", "The difference is too large."));
    let error = store.get("a").map(|_| ()).unwrap_err();
    assert_eq!(error.message(), "store answered 403 RequestTimeTooSkewed");
    assert!(error.hint_text().unwrap().contains("clocks"), "{error:?}");
    assert_eq!(proxy.count_all(), 1, "trying again would not help");
}

#[test]
fn a_wrong_region_is_told_as_such() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    for (status, code) in [(301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed")] {
        proxy.inject(Rule::s3_error(status, code, "the region is wrong"));
        let error = store.get("a").map(|_| ()).unwrap_err();
        assert_eq!(error.message(), format!("store answered {status} {code}"));
        assert!(error.hint_text().unwrap().contains("region"), "{error:?}");
        proxy.clear();
    }
}

#[test]
fn answers_without_sense_or_end_are_errors() {
    let (_bucket, proxy, _directory, store) = behind_proxy();
    for body in ["<html>hello</html>".to_string(), String::new(), "x".repeat(9 << 20)] {
        proxy.inject(Rule::from(Fault::Answer { status: 200, body }).method("GET").target("list-type"));
        let error = store.list("a", None, 10).unwrap_err();
        assert!(error.message().starts_with("could not read the store's answer: "), "{error:?}");
        proxy.clear();
    }
}
