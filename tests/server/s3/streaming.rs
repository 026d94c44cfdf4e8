//! WAL that is received while it is written, and archived to a bucket.

use super::Site;
use crate::streaming::{Host, Loaded, PUT_S};

#[test]
fn no_more_than_an_interval_is_lost_with_both_machines_where_the_archive_is_a_bucket() {
    let site = Site::over_tls(16);
    let host = Host::receiving_elsewhere().archiving_to(&site.url()).with(&["--streaming-partial-interval", "2s"]);
    let mut lost = Loaded::begin(&host, false).lose_both_machines(&host);
    // Never many: none right after a segment was archived whole; one longer where the shorter was just to be removed, and
    // that of a segment on its way into the storage.
    let parts = site.bucket.list("some/place/main/partial/");
    assert!(parts.len() <= 3, "{parts:?}");
    let (_, seconds) = lost.recover(&format!("--storage '{}'", site.url()));
    assert!(seconds < 2.0 + PUT_S, "{seconds} s");
}
