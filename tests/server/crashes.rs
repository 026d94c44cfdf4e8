//! Ends in the midst of archiving: what was archived stays, and what was not is.

use crate::cluster::started;

#[test]
fn a_restart_goes_on_where_the_server_stopped() {
    let cluster = started();
    for _ in 0..3 {
        cluster.write_segments(5);
        cluster.restart();
    }
    cluster.drain();
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() >= 15);
    assert!(!cluster.log().contains("could not archive WAL file"));
}

#[test]
fn a_torn_last_line_of_the_catalogue_is_mended_after_a_crash() {
    let cluster = started();
    cluster.write_segments(3);
    cluster.drain();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(3);
    cluster.wait_for_stall();
    cluster.kill_postmaster();
    let path = cluster.archive().join("main/wals/main-xlog.db");
    let mut text = std::fs::read(&path).expect("read the catalogue");
    text.extend_from_slice(b"00000001000000000000");
    std::fs::write(&path, text).expect("write the catalogue");
    drop(stall);
    cluster.start();
    cluster.drain();
    cluster.assert_one_line_each();
}
