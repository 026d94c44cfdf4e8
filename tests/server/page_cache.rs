//! What archiving leaves in the kernel's cache.

use crate::cluster::{Cluster, wait_until};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Stdio};

/// How many bytes of that file the kernel keeps in memory.
fn cached_bytes(path: &Path) -> usize {
    const PAGE_BYTES: usize = 4096;
    let file = File::open(path).expect("open");
    let length = file.metadata().expect("stat").len() as usize;
    let mut pages = vec![0_u8; length.div_ceil(PAGE_BYTES)];
    // SAFETY: the mapping is of a whole file that nobody cuts, is never read, and ends here; the vector has a byte for each
    // of its pages, which are no smaller than that.
    unsafe {
        let (none, shared) = (std::ptr::null_mut(), libc::MAP_SHARED);
        let mapped = libc::mmap(none, length, libc::PROT_READ, shared, file.as_raw_fd(), 0);
        assert_ne!(mapped, libc::MAP_FAILED);
        assert_eq!(libc::mincore(mapped, length, pages.as_mut_ptr()), 0);
        libc::munmap(mapped, length);
    }
    pages.iter().filter(|page| *page & 1 == 1).count() * PAGE_BYTES
}

struct Receiver(Child);

impl Receiver {
    fn start(cluster: &Cluster) -> Self {
        let mut command = cluster.client("pg_receivewal");
        command.arg("-D").arg(cluster.create_directory("received")).stderr(Stdio::null());
        let receiver = Receiver(command.spawn().expect("run pg_receivewal"));
        let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'";
        wait_until("WAL is streamed", || cluster.psql(streams) == "1");
        receiver
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_archived_segment_is_kept_in_the_cache_for_a_walsender_only() {
    // Pages that nobody has synced stay, whoever asks.
    let cluster = Cluster::new(1).with("fsync", "on").started();
    let archived = || {
        let name = cluster.psql("SELECT pg_walfile_name(pg_switch_wal())");
        cluster.drain();
        cluster.pg_wal(&name)
    };
    cluster.write_segments(1);
    if statfs(cluster.directory()).expect("statfs").filesystem_type() == TMPFS_MAGIC {
        println!("skipped: what lies on tmpfs lies in the cache");
        return;
    }
    let receiver = Receiver::start(&cluster);
    cluster.psql("SELECT pg_logical_emit_message(false, 'test', repeat('x', 100000))");
    let streamed = archived();
    assert!(cached_bytes(&streamed) > 0);
    drop(receiver);
    wait_until("nobody streams", || cluster.psql("SELECT count(*) FROM pg_stat_replication") == "0");
    cluster.psql("SELECT pg_logical_emit_message(false, 'test', repeat('x', 100000))");
    let path = archived();
    wait_until("the cache is given back", || cached_bytes(&path) == 0);
    assert!(cached_bytes(&streamed) > 0);
    assert!(cluster.assert_done_files_restore_equal() >= 3);
}
