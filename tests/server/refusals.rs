//! What is refused, and how it is told: nothing is stored where it does not belong, and a failure is told once.

use crate::cluster::{Cluster, Stop, catalogue, started, tree, wait_until};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// Lines of the server log that hold `word`.
fn lines_with(log: &str, word: &str) -> usize {
    log.lines().filter(|line| line.contains(word)).count()
}

#[track_caller]
fn wait_for_log(cluster: &Cluster, mark: usize, word: &str) {
    wait_until(&format!("the log says {word:?}"), || cluster.log_since(mark).contains(word));
}

/// PostgreSQL tries three times, then at the next segment: by then a message told at each attempt would stand there often.
fn let_attempts_fail(cluster: &Cluster) {
    let failed = || cluster.psql("SELECT failed_count FROM pg_stat_archiver").parse::<u32>().expect("a number");
    let before = failed();
    cluster.write_segments(1);
    wait_until("three more attempts have failed", || failed() >= before + 3);
}

/// Brings the archive into a state where files are refused, sees that this is told once and nothing is archived, mends
/// it, and sees that everything is archived and told once.
fn refused_until_mended(cluster: &Cluster, cause: &str, hint: &str, spoil: impl FnOnce(), mend: impl FnOnce()) {
    let mark = cluster.log_mark();
    spoil();
    cluster.write_segments(2);
    wait_for_log(cluster, mark, cause);
    let_attempts_fail(cluster);
    assert!(!cluster.status_files("ready").is_empty());
    let log = cluster.log_since(mark);
    assert_eq!(lines_with(&log, "WARNING:  could not archive WAL file"), 1, "{log}");
    assert!(log.contains(hint), "{log}");
    mend();
    cluster.write_segments(1);
    cluster.drain();
    let log = cluster.log_since(mark);
    assert_eq!(lines_with(&log, "archiving works again after"), 1, "{log}");
    assert_eq!(lines_with(&log, "WARNING:  could not archive WAL file"), 1, "{log}");
}

/// All that was ever done is in the archive, once.
fn assert_complete(cluster: &Cluster) {
    cluster.assert_one_line_each();
    assert!(cluster.assert_done_files_restore_equal() > 0);
}

fn archiving() -> Cluster {
    let cluster = started();
    cluster.write_segments(2);
    cluster.drain();
    cluster
}

#[test]
fn a_missing_directory_a_file_and_a_directory_without_permission_are_refused() {
    let cluster = Cluster::new(1);
    let (archive, away) = (cluster.archive(), cluster.path("away"));
    fs::rename(&archive, &away).expect("move the archive away");
    cluster.start();
    let hint = "HINT:  The directory must exist: create it, or mount the file system that holds it.";
    let mend = || fs::rename(&away, &archive).expect("put the archive back");
    refused_until_mended(&cluster, "No such file or directory", hint, || {}, mend);
    assert_complete(&cluster);

    let spoil = || {
        fs::rename(&archive, &away).expect("move the archive away");
        fs::write(&archive, "").expect("write a file");
    };
    let mend = || {
        fs::remove_file(&archive).expect("remove the file");
        fs::rename(&away, &archive).expect("put the archive back");
    };
    refused_until_mended(&cluster, "Not a directory", "", spoil, mend);

    let chmod = |mode| {
        for path in tree(&archive).into_iter().chain([archive.clone()]).filter(|path| path.is_dir()) {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
        }
    };
    let hint = "HINT:  The operating system user that runs PostgreSQL needs permission there.";
    refused_until_mended(&cluster, "Permission denied", hint, || chmod(0o500), || chmod(0o700));
    assert_complete(&cluster);
}

#[test]
fn a_full_disk_is_refused_and_leaves_no_part_of_a_file() {
    let cluster = Cluster::new(1).with("archiver.compression", "none");
    let archive = cluster.archive();
    let size = Some("size=10m,mode=0777");
    if let Err(error) = mount(Some("tmpfs"), &archive, Some("tmpfs"), MsFlags::empty(), size) {
        println!("skipped: a file system to fill cannot be mounted here: {error}");
        return;
    }
    struct Mounted<'a>(&'a Path);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = umount2(self.0, MntFlags::MNT_DETACH);
        }
    }
    let mounted = Mounted(&archive);
    cluster.start();
    let mark = cluster.log_mark();
    cluster.write_segments(14);
    wait_for_log(&cluster, mark, "No space left on device");
    let_attempts_fail(&cluster);
    for (name, path) in cluster.stored() {
        assert_eq!(path.metadata().expect("stat").len(), 1 << 20, "{name} is whole");
    }
    let staged: Vec<_> = tree(&archive.join("main/.staging")).into_iter().collect();
    assert_eq!(staged, [] as [&Path; 0], "nothing is left of files that did not fit");
    let log = cluster.log_since(mark);
    assert_eq!(lines_with(&log, "WARNING:  could not archive WAL file"), 1, "told once: {log}");
    assert!(log.contains("HINT:  Free space on that file system; the file is tried again by itself."), "{log}");

    let took = cluster.stop(Stop::Fast);
    println!("stopped in {took:?} with a full storage");
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert!(!cluster.status_files("ready").is_empty(), "nothing is answered for that is not stored");
    cluster.start();

    let more = Some("size=40m");
    mount(None::<&str>, &archive, None::<&str>, MsFlags::MS_REMOUNT, more).expect("enlarge the file system");
    cluster.write_segments(1);
    cluster.drain();
    assert_complete(&cluster);
    cluster.stop(Stop::Fast);
    drop(mounted);
}

#[test]
fn an_unmounted_archive_is_refused_also_after_a_restart() {
    let cluster = archiving();
    let (archive, away) = (cluster.archive(), cluster.path("away"));
    let unmount = || {
        fs::rename(&archive, &away).expect("move the archive away");
        cluster.create_directory("archive");
    };
    let remount = || {
        assert_eq!(tree(&archive).len(), 0, "nothing was made in the mount point: {:?}", tree(&archive));
        fs::remove_dir(&archive).expect("remove the mount point");
        fs::rename(&away, &archive).expect("put the archive back");
    };
    let hint = "HINT:  Is the file system mounted?";
    refused_until_mended(&cluster, "has vanished", hint, unmount, remount);
    assert_complete(&cluster);

    unmount();
    cluster.restart();
    cluster.psql("CREATE EXTENSION IF NOT EXISTS archiver");
    // Told before any file fails for it.
    let identity = "SELECT state, detail LIKE '%has vanished%' FROM archiver.check() WHERE name = 'identity'";
    assert_eq!(cluster.psql(identity), "failed|t");
    refused_until_mended(&cluster, "has vanished", hint, || {}, remount);
    assert_complete(&cluster);
}

#[test]
fn an_archive_unmounted_under_files_that_wait_for_their_lines_is_not_begun_anew() {
    let cluster = archiving();
    let (archive, away) = (cluster.archive(), cluster.path("away"));
    let stall = cluster.stall_catalogue();
    cluster.write_segments(10);
    cluster.wait_for_stall();
    let mark = cluster.log_mark();
    fs::rename(&archive, &away).expect("move the archive away");
    cluster.create_directory("archive");
    drop(stall);
    wait_for_log(&cluster, mark, "could not archive WAL file");
    let_attempts_fail(&cluster);
    assert_eq!(tree(&archive).len(), 0, "nothing was made in the mount point: {:?}", tree(&archive));
    assert!(!cluster.status_files("ready").is_empty());
}

#[test]
fn an_archive_that_was_left_and_vanished_is_not_begun_anew_on_return() {
    let cluster = archiving();
    let (first, second) = (cluster.archive(), cluster.create_directory("second"));
    cluster.set("archiver.storage", &format!("file://{}", second.display()));
    cluster.reload();
    cluster.write_segments(1);
    cluster.drain();
    wait_until("the second archive is in use", || {
        cluster.write_segments(1);
        cluster.drain();
        !catalogue(&second).is_empty()
    });

    fs::rename(&first, cluster.path("away")).expect("move the first archive away");
    cluster.create_directory("archive");
    cluster.set("archiver.storage", &format!("file://{}", first.display()));
    cluster.restart();
    let mark = cluster.log_mark();
    cluster.write_segments(1);
    wait_until("PostgreSQL was answered", || {
        cluster.log_since(mark).contains("has vanished") || cluster.status_files("ready").is_empty()
    });
    assert_eq!(tree(&first).len(), 0, "an archive was begun in the mount point of the first: {:?}", tree(&first));
}

#[test]
fn what_is_no_wal_of_this_cluster_is_refused() {
    let cluster = archiving();
    let last = cluster.status_files("done").into_iter().next_back().expect("an archived file");
    let offer = |name: &str, content: &[u8]| {
        cluster.write_file(&cluster.pg_wal(name), content);
        cluster.write_file(&cluster.pg_wal(&format!("archive_status/{name}.ready")), b"");
    };
    let remove = |name: &str| {
        fs::remove_file(cluster.pg_wal(&format!("archive_status/{name}.ready"))).expect("remove status file");
        fs::remove_file(cluster.pg_wal(name)).expect("remove file");
    };
    let segment = fs::read(cluster.pg_wal(&last)).expect("read a segment");
    let foreign = "000000010000000000000000";
    let mut other_cluster = segment.clone();
    other_cluster[24..32].copy_from_slice(&[1; 8]);
    for (name, content, cause) in [
        (foreign, &b"not a WAL file"[..], "it is 14 bytes long, not 1048576"),
        (foreign, &segment[..512 << 10], "it is 524288 bytes long, not 1048576"),
        (foreign, &vec![0; 1 << 20][..], "the file is not what its name says"),
        (foreign, &segment[..], "the file is not what its name says"),
        (foreign, &other_cluster[..], "the file is not what its name says"),
        ("0000000100000000.backup.history", &b"x"[..], "is not the name of a WAL file"),
    ] {
        let hint = if name == foreign { "HINT:  Nothing was stored." } else { "" };
        refused_until_mended(&cluster, cause, hint, || offer(name, content), || remove(name));
        assert!(!cluster.stored().contains_key(name), "{cause}");
    }
    assert_complete(&cluster);
}

#[test]
fn another_clusters_archive_is_refused_and_left_untouched() {
    let owner = archiving();
    let other = Cluster::new(1).with("archiver.storage", &owner.setting("archiver.storage").expect("set"));
    let before = tree(&owner.archive());
    other.start();
    let mark = other.log_mark();
    other.write_segments(3);
    wait_for_log(&other, mark, "belongs to another cluster");
    let_attempts_fail(&other);
    assert_eq!(tree(&owner.archive()), before);
    assert_eq!(lines_with(&other.log_since(mark), "WARNING:  could not archive WAL file"), 1);
    assert!(other.log_since(mark).contains("HINT:  Set another archiver.server_name"));

    other.set("archiver.server_name", "other");
    other.reload();
    other.drain();
    owner.write_segments(1);
    owner.drain();
    assert_complete(&owner);
}

#[test]
fn another_file_of_the_same_name_is_never_overwritten() {
    let cluster = archiving();
    let stall = cluster.stall_catalogue();
    cluster.write_segments(1);
    cluster.wait_for_stall();
    let name = cluster.status_files("ready").into_iter().next().expect("a waiting file");
    let sums = cluster.archive().join("main/sums").join(&name[..16]);
    wait_until("its sum is noted", || fs::read_to_string(&sums).is_ok_and(|text| text.contains(&name)));
    let stored = cluster.stored()[&name].clone();
    let other = cluster.stored().into_values().next().expect("a stored file");
    let mark = cluster.log_mark();
    // As if another server had archived a file of that name.
    cluster.stop(Stop::Immediate);
    let content = fs::read(other).expect("read");
    cluster.write_file(&stored, &content);
    drop(stall);
    cluster.start();
    // The sum that was noted tells that it is not what this archiver stored; without it the contents are compared.
    wait_for_log(&cluster, mark, "is damaged: it was stored as blake3:");
    fs::remove_dir_all(cluster.archive().join("main/sums")).expect("remove sums");
    cluster.write_segments(1);
    wait_for_log(&cluster, mark, "the archive already holds another file named");
    assert_eq!(fs::read(&stored).expect("read"), content);
    assert!(cluster.status_files("ready").contains(&name));
    let log = cluster.log_since(mark);
    assert!(log.contains("DETAIL:  Archived at ") && log.contains("blake3:"), "{log}");
    fs::remove_file(&stored).expect("remove");
    cluster.write_segments(1);
    cluster.drain();
    assert_complete(&cluster);
}

#[test]
fn a_stored_file_is_told_at_debug1_only() {
    let cluster = archiving();
    assert_eq!(lines_with(&cluster.log(), "WAL file"), 0, "{}", cluster.log());
    cluster.set("log_min_messages", "debug1");
    cluster.reload();
    wait_until("a stored file is told", || {
        cluster.write_segments(1);
        cluster.drain();
        cluster.log().contains("DEBUG:  archived WAL file \"")
    });
}
