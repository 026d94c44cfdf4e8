//! Whether an archive in a bucket is whole.

use crate::new_url;
use archiver_core::codec::Compression;
use archiver_core::config::Setting;
use archiver_core::error::Kind;
use archiver_core::gaps;
use archiver_core::listing::Range;
use archiver_core::pulse::Pulse;
use archiver_core::verify::{Request, State, verify};
use archiver_core::wal::WalName;
use archiver_tests::fault_proxy::{Fault, FaultProxy, Rule};
use archiver_tests::gpg::Gpg;
use archiver_tests::harm::{self, Harm, judged, new_seed, segments_in, verdicts};
use archiver_tests::s3_server::S3Server;
use archiver_tests::{Site, archive_file, compressed, eventually};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

#[test]
fn of_two_hundred_segments_the_six_that_came_to_harm_are_named() {
    const SEGMENTS: u32 = 200;
    let bucket = S3Server::ceph().new_bucket();
    let gpg = Gpg::new();
    gpg.add_key("reader", "future-default", "", "never");
    for form in ["none", "zstd", "encrypted"] {
        let seed = new_seed();
        println!("seed {seed}");
        let (_directory, url) = new_url(&bucket, "");
        let site = Site::new().with(Setting::Storage, &url).with(Setting::ServerName, form);
        let site = match form {
            "encrypted" => site.encrypting(&gpg, "reader"),
            compression => site.with(Setting::Compression, compression),
        };
        let archive = site.archive();
        let names: Vec<WalName> = (4000..4000 + SEGMENTS).map(|number| site.name(number)).collect();
        std::thread::scope(|scope| {
            for first in 0..8 {
                let (site, archive) = (&site, &archive);
                scope.spawn(move || {
                    for number in (4000 + first..4000 + SEGMENTS).step_by(8) {
                        archive_file(archive, &site.offer_segment(number)).unwrap();
                    }
                });
            }
        });
        let place = site.place();
        assert!(harm::findings(&place).is_whole());
        let before = verdicts(&place, Range::default());
        assert_eq!(before.iter().map(|verified| verified.name).collect::<Vec<_>>(), names);
        assert_eq!(judged(&before, State::Ok).len(), names.len());

        let harm = Harm::to_six_of(&place, &names, seed);
        assert_eq!(segments_in(&harm::findings(&place), site.cluster.segment_size), harm.removed);
        let after = verdicts(&place, Range::default());
        assert_eq!(judged(&after, State::Damaged), harm.damaged, "{after:?}");
        assert_eq!(judged(&after, State::Ok).len(), names.len() - 6);
        assert_eq!(after.len(), names.len() - 3, "a bucket has no records: what is not listed is told by gaps");
    }
}

#[test]
fn what_others_put_there_is_verified_by_its_pages_in_every_format_at_once() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, url) = new_url(&bucket, "");
    let site = Site::new().with(Setting::Storage, &url);
    let (one, two) = (site.name(1), site.name(2));
    let content = site.content(&one);
    let put = |name: &WalName, format: Compression, body: &[u8]| {
        bucket.put(&format!("some/place/{}", site.place().layout.wal_key(name, format)), body, &[]);
    };
    for format in Compression::ALL {
        put(&one, format, &compressed(format, &content));
    }
    put(&two, Compression::Gzip, &compressed(Compression::Gzip, &content));
    let found = verdicts(&site.place(), Range::default());
    assert_eq!(judged(&found, State::Unverified), BTreeSet::from([one]));
    assert_eq!(found.iter().filter(|verified| verified.name == one).count(), Compression::ALL.len());
    assert_eq!(judged(&found, State::Damaged), BTreeSet::from([two]));
    // One of them is broken, and is found behind the others.
    let broken = compressed(Compression::Xz, &content);
    bucket.delete(&format!("some/place/{}", site.place().layout.wal_key(&one, Compression::Xz)));
    put(&one, Compression::Xz, &broken[..broken.len() / 2]);
    let found = verdicts(&site.place(), Range { from: Some(one), to: Some(one) });
    let bad: Vec<_> = found.iter().filter(|verified| verified.state.is_bad()).collect();
    assert_eq!((bad.len(), bad[0].state), (1, State::Damaged));
    assert!(bad[0].detail.as_ref().unwrap().contains(".xz\" is damaged"), "{bad:?}");
}

#[test]
fn a_bucket_without_an_archive_is_no_good_one() {
    let bucket = S3Server::ceph().new_bucket();
    let (_directory, url) = new_url(&bucket, "");
    let site = Site::new().with(Setting::Storage, &url);
    let place = site.place();
    let verified = verify(&place, &Request::default(), &Pulse::new(), &mut |_| ControlFlow::Continue(()));
    assert_eq!(verified.unwrap_err().kind(), Kind::Identity);
    assert_eq!(gaps::find(&place, None, None, &Pulse::new()).unwrap_err().kind(), Kind::Identity);
}

#[test]
fn what_a_store_does_not_give_is_unread_and_a_stop_ends_the_wait_for_it() {
    let server = S3Server::ceph_without_tls();
    let bucket = server.new_bucket();
    let proxy = FaultProxy::before(&server.endpoint);
    let (_directory, url) = new_url(&bucket.at(proxy.endpoint()), "");
    let site = Site::new().with(Setting::Storage, &url).with(Setting::Compression, "none");
    let site = site.with(Setting::AttemptTimeout, "1s").with(Setting::RetryTimeout, "2s");
    let archive = site.archive();
    (1..5).for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
    let place = site.place();
    let [refused, unavailable, cut] = [2, 3, 4].map(|number| site.name(number));
    let get = |rule: Rule, name: &WalName| proxy.inject(rule.method("GET").target(&format!("/{name}")));
    get(Rule::s3_error(403, "AccessDenied", "Access Denied"), &refused);
    get(Rule::slow_down(), &unavailable);
    get(Fault::CutResponse(0).into(), &cut);
    let found = verdicts(&place, Range::default());
    assert_eq!(judged(&found, State::Ok), BTreeSet::from([site.name(1)]));
    assert_eq!(judged(&found, State::Unreadable), BTreeSet::from([refused, unavailable, cut]), "{found:?}");
    assert!(found[1].detail.as_ref().unwrap().contains("403 AccessDenied"), "{found:?}");
    proxy.clear();
    assert_eq!(judged(&verdicts(&place, Range::default()), State::Ok).len(), 4);

    proxy.inject(Fault::StallResponse(100));
    let pulse = std::sync::Arc::clone(&site.pulse);
    std::thread::scope(|scope| {
        let verifying =
            scope.spawn(|| verify(&place, &Request::default(), &site.pulse, &mut |_| ControlFlow::Continue(())));
        eventually("the store stalls", || proxy.stalled() > 0);
        let began = Instant::now();
        pulse.stop();
        assert!(verifying.join().unwrap().is_err());
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    });
}
