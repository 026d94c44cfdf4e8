//! What the tests rely on: the servers honour what a store asks of them, and the proxy passes it.

use archiver_tests::fault_proxy::{Fault, FaultProxy, Rule};
use archiver_tests::s3_server::S3Server;

const CREATE_ONLY: &[(&str, &str)] = &[("If-None-Match", "*")];

#[test]
fn the_gateway_creates_an_object_once() {
    let bucket = S3Server::ceph().new_bucket();
    assert_eq!(bucket.put("a/object +&", b"first", CREATE_ONLY).status, 200);
    let refused = bucket.put("a/object +&", b"second", CREATE_ONLY);
    assert_eq!((refused.status, refused.code().as_deref()), (412, Some("PreconditionFailed")));
    assert_eq!(bucket.get("a/object +&", &[]).body, b"first");
    assert_eq!(bucket.list("a/"), ["a/object +&"]);
    assert_eq!(bucket.head("a/object +&").header("content-length"), Some("5"));
    assert_eq!(bucket.delete("a/object +&").status, 204);
    assert_eq!(bucket.head("a/object +&").status, 404);
}

#[test]
fn the_gateway_creates_an_object_once_through_the_proxy() {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let through = bucket.at(proxy.endpoint());
    let large = vec![7; 20 << 20];
    assert_eq!(through.put("object", &large, CREATE_ONLY).status, 200);
    assert_eq!(through.put("object", b"second", CREATE_ONLY).status, 412);
    assert!(through.get("object", &[]).body == large);
    assert_eq!((proxy.count("PUT"), proxy.count("GET"), proxy.lists()), (2, 1, 0));

    proxy.inject(Fault::DropResponse);
    assert!(through.server.try_request("PUT", &bucket.path("lost"), CREATE_ONLY, Some(b"done")).is_err());
    proxy.clear();
    assert_eq!(through.get("lost", &[]).body, b"done");

    proxy.inject(Fault::CutRequest(1 << 20));
    assert!(through.server.try_request("PUT", &bucket.path("torn"), CREATE_ONLY, Some(&large)).is_err());
    proxy.clear();
    assert_eq!(bucket.head("torn").status, 404);

    proxy.inject(Rule::slow_down().method("PUT").times(1));
    assert_eq!(through.put("busy", b"", &[]).code().as_deref(), Some("SlowDown"));
    assert_eq!(through.put("busy", b"", &[]).status, 200);
}

#[test]
fn the_gateway_keeps_other_users_out() {
    let bucket = S3Server::ceph().new_bucket();
    assert_eq!(bucket.put("object", b"first", &[]).status, 200);
    let other = bucket.as_user("OTHER");
    assert_eq!(other.get("object", &[]).code().as_deref(), Some("AccessDenied"));
    assert_eq!(other.put("object", b"second", &[]).status, 403);
    assert_eq!(other.list_page("").status, 403);
    assert_eq!(other.server.new_bucket().put("object", b"", &[]).status, 200);
}

#[test]
fn the_gateway_knows_virtual_hosts() {
    let server = S3Server::ceph();
    let bucket = server.new_bucket();
    assert_eq!(bucket.put("object", b"here", &[]).status, 200);
    let (_, port) = server.endpoint.rsplit_once(':').unwrap();
    let virtual_host = server.at(format!("https://{}.buckets.localhost:{port}", bucket.name));
    assert_eq!(virtual_host.request("GET", "/object", &[], None).body, b"here");
    assert_eq!(bucket.at(format!("https://localhost:{port}")).get("object", &[]).body, b"here");
}

#[test]
fn moto_denies_what_a_user_lacks() {
    let bucket = S3Server::moto().new_bucket();
    assert_eq!(bucket.put("object", b"first", &[]).status, 200);
    let denied = ["NO_PUT", "NO_GET", "NO_LIST", "NO_DELETE"].map(|user| {
        let bucket = bucket.as_user(user);
        [
            bucket.put("another", b"", &[]).status,
            bucket.get("object", &[]).status,
            bucket.list_page("").status,
            bucket.delete("absent").status,
        ]
    });
    assert_eq!(denied, [[403, 200, 200, 204], [200, 403, 200, 204], [200, 200, 403, 204], [200, 200, 200, 403]]);
    let mut unknown = bucket.server.clone();
    unknown.secret = "wrong".into();
    assert_eq!(
        unknown.request("GET", &bucket.path("object"), &[], None).code().as_deref(),
        Some("SignatureDoesNotMatch")
    );
}

/// Only where Garage runs, which takes minutes to build.
#[test]
fn garage_overwrites_and_verifies_checksums() {
    let Some(server) = S3Server::garage() else { return };
    let bucket = server.new_bucket();
    assert_eq!(bucket.put("object", b"first", CREATE_ONLY).status, 200);
    assert_eq!(bucket.put("object", b"second", CREATE_ONLY).status, 200);
    assert_eq!(bucket.put("object", b"third", &[("x-amz-checksum-crc32c", "AAAAAA==")]).status, 400);
    assert_eq!(bucket.get("object", &[]).body, b"second");
    assert_eq!(bucket.list("o"), ["object"]);
}
