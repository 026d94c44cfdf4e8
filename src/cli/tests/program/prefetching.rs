//! `archiver restore` as a server in recovery calls it: segments are fetched ahead, and nothing of that is believed.

use crate::{Ended, found_cluster, program, run, site};
use archiver_core::owner::Owner;
use archiver_core::wal::WalName;
use archiver_tests::{Site, archive_file, eventually, wal_like};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const DESTINATION: &str = "pg_wal/RECOVERYXLOG";

/// A site with so many archived segments, and a server that recovers there: this process stands for it.
fn recovering(segments: u32) -> Site {
    let site = site();
    archive(&site, 1..=segments);
    begin_recovery(&site);
    site
}

fn archive(site: &Site, numbers: impl IntoIterator<Item = u32>) {
    for number in numbers {
        let file = site.offer_segment(number);
        archive_file(&site.archive(), &file).expect("archive");
        fs::remove_file(file.path).expect("remove");
    }
}

fn begin_recovery(site: &Site) {
    fs::write(site.path("data/recovery.signal"), "").expect("write");
    fs::write(site.path("data/postmaster.pid"), format!("{}\n", std::process::id())).expect("write");
}

fn folder(site: &Site) -> PathBuf {
    site.pg_wal().join("archiver_prefetch")
}

/// What lies in the folder of that segment, whole.
fn prefetched(site: &Site, name: &WalName) -> Option<PathBuf> {
    let prefix = format!("{name}.");
    let is_whole = |path: &PathBuf| {
        let name = path.file_name().expect("a name").to_str().expect("UTF-8");
        name.strip_prefix(&prefix).is_some_and(|seal| seal.len() == 64)
    };
    fs::read_dir(folder(site)).into_iter().flatten().flatten().map(|entry| entry.path()).find(is_whole)
}

#[track_caller]
fn wait_for(site: &Site, name: &WalName) -> PathBuf {
    eventually("the segment is fetched ahead", || prefetched(site, name).is_some());
    prefetched(site, name).expect("a prefetched segment")
}

fn restore(site: &Site, name: &WalName) -> Ended {
    run(site, &["restore", &name.to_string(), DESTINATION])
}

/// Restores a segment and sees that it is the one that was archived.
#[track_caller]
fn assert_restored(site: &Site, name: &WalName) {
    restore(site, name).with(0);
    assert!(fs::read(site.path("data").join(DESTINATION)).expect("read") == site.content(name), "{name}");
}

/// The process that works in the site's folder.
fn helper(site: &Site) -> Option<Pid> {
    let data_directory = site.path("data").canonicalize().ok()?;
    let is_helper = |pid: &i32| {
        let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.ends_with("\0prefetch\0")
            && fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|directory| directory == data_directory)
    };
    let pids = fs::read_dir("/proc").expect("read /proc").flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_helper).map(Pid::from_raw)
}

#[track_caller]
fn assert_ends(site: &Site, why: &str) {
    eventually(why, || helper(site).is_none() && !folder(site).exists());
}

#[test]
fn a_prefetched_segment_is_handed_over_by_a_rename_and_the_next_ones_follow() {
    let site = recovering(12);
    assert_restored(&site, &site.name(1));
    for number in 2..=12 {
        let inode = fs::metadata(wait_for(&site, &site.name(number))).expect("stat").ino();
        assert_restored(&site, &site.name(number));
        assert_eq!(fs::metadata(site.path("data").join(DESTINATION)).expect("stat").ino(), inode);
        assert_eq!(prefetched(&site, &site.name(number)), None);
    }
    // The end of the archive is told by the archive.
    restore(&site, &site.name(13)).with(1);
    archive(&site, [13]);
    assert_restored(&site, &site.name(13));
}

#[test]
fn no_more_is_fetched_than_is_taken_and_never_more_than_the_setting_says() {
    let site = recovering(20);
    let whole = || (1..=20).filter(|number| prefetched(&site, &site.name(*number)).is_some()).collect::<Vec<u32>>();
    let ask =
        |number: u32| run(&site, &["restore", "--restore-prefetch=5", &site.name(number).to_string(), DESTINATION]);
    for (number, ahead) in [(1, 2), (2, 4), (3, 5), (4, 5)] {
        ask(number).with(0);
        let expected: Vec<u32> = (number + 1..=number + ahead).collect();
        eventually("so many are kept ahead", || whole() == expected);
    }
    // Elsewhere: what is of no use there goes.
    ask(14).with(0);
    eventually("what follows is fetched, and nothing else stays", || whole() == [15, 16]);
    ask(2).with(0);
    eventually("the same backwards", || whole() == [3, 4]);
}

#[test]
fn what_the_server_got_from_the_archive_does_not_stay() {
    let site = recovering(2);
    assert_restored(&site, &site.name(1));
    let ahead = wait_for(&site, &site.name(2));
    // As if the server had asked just before it was there.
    let aside = site.path("aside");
    fs::rename(&ahead, &aside).expect("rename");
    assert_restored(&site, &site.name(2));
    fs::rename(&aside, &ahead).expect("rename");
    eventually("what is of no use goes", || !ahead.exists());
    assert!(helper(&site).is_some(), "it goes before its helper");
}

#[test]
fn the_helper_has_a_session_of_its_own_and_nothing_of_its_callers() {
    let site = recovering(3);
    // The shell keeps descriptor 9 open for whatever it runs, as PostgreSQL 15 does with its files.
    let kept = site.path("kept");
    let command = program(&site, &["restore", &site.name(1).to_string(), DESTINATION]);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_str().expect("UTF-8").to_string())
        .collect();
    let mut shell = std::process::Command::new("sh");
    shell.arg("-c").arg(format!("exec 9>'{}'; {}", kept.display(), words.join(" "))).current_dir(site.path("data"));
    shell.env("ARCHIVER_STORAGE", format!("file://{}", site.storage().display()));
    // It ends although the helper goes on: that holds none of its pipes.
    Ended::of(shell.output().expect("run sh")).with(0);
    wait_for(&site, &site.name(2));
    let helper = helper(&site).expect("a helper");
    assert_eq!(getsid(Some(helper)), Ok(helper));
    let open: Vec<PathBuf> = fs::read_dir(format!("/proc/{helper}/fd"))
        .expect("read descriptors")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .collect();
    assert!(!open.contains(&kept), "{open:?}");
    assert_eq!(open.iter().filter(|path| *path == Path::new("/dev/null")).count(), 3, "{open:?}");
}

#[test]
fn what_is_not_what_was_verified_is_never_handed_over() {
    type Damage = fn(&Site, &Path);
    let damages: [(&str, Damage); 5] = [
        ("a flipped bit", |_, path| {
            let mut content = fs::read(path).expect("read");
            content[500_000] ^= 1;
            fs::write(path, content).expect("write");
        }),
        ("torn", |_, path| fs::File::options().write(true).open(path).expect("open").set_len(4096).expect("cut")),
        ("zeros", |_, path| fs::write(path, vec![0; 1 << 20]).expect("write")),
        ("another segment", |site, path| fs::write(path, site.content(&site.name(3))).expect("write")),
        ("another's name", |site, path| {
            fs::rename(wait_for(site, &site.name(3)), path).expect("rename");
        }),
    ];
    for (what, damage) in damages {
        let site = recovering(3);
        assert_restored(&site, &site.name(1));
        damage(&site, &wait_for(&site, &site.name(2)));
        println!("{what}");
        assert_restored(&site, &site.name(2));
        assert_restored(&site, &site.name(3));
    }
}

#[test]
fn a_helper_that_is_killed_leaves_nothing_that_does_harm() {
    let site = recovering(8);
    assert_restored(&site, &site.name(1));
    wait_for(&site, &site.name(3));
    let first = helper(&site).expect("a helper");
    kill(first, Signal::SIGKILL).expect("kill");
    eventually("it is gone", || helper(&site).is_none());
    // As if it had been killed in the middle of the next one.
    let half = folder(&site).join(format!("{}.{}", site.name(4), Owner::current().unique_name()));
    fs::write(&half, wal_like(1000, 1)).expect("write");
    assert_restored(&site, &site.name(2));
    eventually("another helper works", || helper(&site).is_some());
    eventually("the half segment is swept", || !half.exists());
    for number in 3..=8 {
        assert_restored(&site, &site.name(number));
    }
}

#[test]
fn a_segment_that_was_fetched_from_elsewhere_is_never_handed_over() {
    let site = recovering(4);
    assert_restored(&site, &site.name(1));
    wait_for(&site, &site.name(3));
    // The same cluster's archive under another URL holds other content of that name.
    let other = site.path("other");
    fs::create_dir(&other).expect("create");
    let copied = std::process::Command::new("cp").arg("-a").arg(site.storage().join("main")).arg(&other).status();
    assert!(copied.expect("run cp").success());
    fs::remove_dir_all(other.join("main/sums")).expect("remove");
    let mut content = site.content(&site.name(2));
    content[700_000] ^= 1;
    fs::write(other.join("main/wals").join(site.name(2).hash_directory()).join(site.name(2).to_string()), &content)
        .expect("write");
    let url = format!("file://{}", other.display());
    let name = site.name(2).to_string();
    run(&site, &["--storage", &url, "restore", &name, DESTINATION]).with(0);
    assert!(fs::read(site.path("data").join(DESTINATION)).expect("read") == content);
    eventually("the helper of the old archive ends", || prefetched(&site, &site.name(3)).is_none());
    run(&site, &["--storage", &url, "restore", &site.name(3).to_string(), DESTINATION]).with(0);
    wait_for(&site, &site.name(4));
    // Another cluster in the data directory.
    found_cluster(&site, 42);
    restore(&site, &site.name(4)).with(255);
}

#[test]
fn two_at_once_get_what_they_ask_for_and_one_helper_serves_them() {
    let site = recovering(9);
    let name = site.name(1);
    for (one, other) in [(1, 1), (2, 2), (3, 4), (5, 6)].map(|(one, other)| (site.name(one), site.name(other))) {
        std::thread::scope(|scope| {
            let calls = [one, other].map(|name| {
                scope.spawn({
                    let site = &site;
                    move || restore(site, &name)
                })
            });
            for call in calls {
                call.join().expect("join").with(0);
            }
        });
        let content = fs::read(site.path("data").join(DESTINATION)).expect("read");
        assert!(content == site.content(&one) || content == site.content(&other), "{one} {other}");
    }
    assert_restored(&site, &name);
    wait_for(&site, &site.name(2));
}

#[test]
fn another_destination_or_none_in_recovery_gets_a_plain_fetch() {
    let site = recovering(3);
    let elsewhere = site.path("elsewhere");
    fs::create_dir(&elsewhere).expect("create");
    let name = site.name(1).to_string();
    for destination in [
        format!("pg_wal/{name}"),
        "RECOVERYXLOG".to_string(),
        elsewhere.join("RECOVERYXLOG").display().to_string(),
        "pg_wal/RECOVERYHISTORY".to_string(),
    ] {
        run(&site, &["restore", &name, &destination]).with(0);
        assert!(!folder(&site).exists(), "{destination}");
    }
    run(&site, &["restore", "--restore-prefetch", "0", &name, DESTINATION]).with(0);
    let ended = run(&site, &["restore", "--restore-prefetch", "many", &name, DESTINATION]).with(255);
    assert!(ended.err.contains("archiver.restore_prefetch"), "{}", ended.err);
    for file in ["recovery.signal", "postmaster.pid"] {
        begin_recovery(&site);
        fs::remove_file(site.path("data").join(file)).expect("remove");
        assert_restored(&site, &site.name(1));
        assert!(!folder(&site).exists(), "without {file}");
    }
}

#[test]
fn a_folder_that_was_left_behind_goes_with_the_next_restore() {
    let site = recovering(3);
    assert_restored(&site, &site.name(1));
    wait_for(&site, &site.name(2));
    kill(helper(&site).expect("a helper"), Signal::SIGKILL).expect("kill");
    eventually("it is gone", || helper(&site).is_none());
    assert!(folder(&site).exists());
    fs::remove_file(site.path("data/recovery.signal")).expect("remove");
    // As pg_rewind calls it, which must find all that it has listed.
    let name = site.name(2).to_string();
    run(&site, &["restore", &name, &format!("pg_wal/{name}")]).with(0);
    assert!(folder(&site).exists());
    run(&site, &["restore", &name, "some"]).with(0);
    assert!(!folder(&site).exists());
}

#[test]
fn another_timeline_is_followed() {
    let site = recovering(6);
    let on_second = |number: u32| match site.name(number) {
        WalName::Segment(segment) => WalName::Segment(segment.on_timeline(archiver_core::wal::Timeline(2))),
        other => other,
    };
    for number in 3..=6 {
        archive_file(&site.archive(), &site.offer(&on_second(number), &site.content(&on_second(number))))
            .expect("archive");
    }
    assert_restored(&site, &site.name(1));
    wait_for(&site, &site.name(3));
    restore(&site, &on_second(2)).with(1);
    assert_restored(&site, &site.name(2));
    assert_restored(&site, &on_second(3));
    wait_for(&site, &on_second(5));
    eventually("the old timeline's are dropped", || (1..=6).all(|it| prefetched(&site, &site.name(it)).is_none()));
    assert_restored(&site, &on_second(4));
}

#[test]
fn the_helper_ends_with_the_recovery_the_server_and_the_data_directory() {
    type End = fn(&Site);
    let ends: [(&str, End); 4] = [
        ("the recovery has ended", |site| fs::remove_file(site.path("data/recovery.signal")).expect("remove")),
        ("the server has stopped", |site| fs::remove_file(site.path("data/postmaster.pid")).expect("remove")),
        ("another server has started", |site| {
            fs::write(site.path("data/postmaster.pid"), format!("{}\n", nix::unistd::getppid())).expect("write");
        }),
        ("the data directory is gone", |site| {
            fs::rename(site.path("data"), site.path("moved")).expect("move");
            // The helper may be clearing its folder.
            eventually("it is removed", || fs::remove_dir_all(site.path("moved")).is_ok());
        }),
    ];
    for (why, end) in ends {
        let site = recovering(4);
        assert_restored(&site, &site.name(1));
        wait_for(&site, &site.name(3));
        let pid = helper(&site).expect("a helper");
        end(&site);
        assert_ends(&site, why);
        eventually(why, || kill(pid, None).is_err());
    }
}

#[test]
fn what_is_missing_is_judged_by_the_archive_alone() {
    let site = recovering(3);
    assert_restored(&site, &site.name(1));
    wait_for(&site, &site.name(3));
    restore(&site, &site.name(4)).with(1);
    site.unmount();
    restore(&site, &site.name(4)).with(255);
    // This one was verified while the archive was there.
    assert_restored(&site, &site.name(2));
    site.mount();
    restore(&site, &site.name(4)).with(1);
}

/// A small file system over pg_wal, where root may mount.
struct SmallPgWal(PathBuf);

impl SmallPgWal {
    fn mount(site: &Site, megabytes: u32) -> Option<Self> {
        let (path, none) = (site.pg_wal(), None::<&str>);
        let size = format!("size={megabytes}m");
        match mount(none, &path, Some("tmpfs"), MsFlags::empty(), Some(size.as_str())) {
            Ok(()) => Some(SmallPgWal(path)),
            Err(error) => {
                println!("skipped, nothing can be mounted: {error}");
                None
            }
        }
    }
}

impl Drop for SmallPgWal {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn where_space_is_short_it_is_left_to_the_server() {
    let site = recovering(10);
    let Some(_mount) = SmallPgWal::mount(&site, 11) else { return };
    for number in 1..=10 {
        assert_restored(&site, &site.name(number));
        let whole = (1..=10).filter(|number| prefetched(&site, &site.name(*number)).is_some()).count();
        assert!(whole <= 3, "{whole} segments lie on a file system that has room for 11 and should keep 8");
    }
    fs::write(site.pg_wal().join("ballast"), vec![1; 8 << 20]).expect("write");
    let empty = || fs::read_dir(folder(&site)).into_iter().flatten().flatten().all(|it| it.file_name().len() < 20);
    eventually("what was fetched ahead makes room", empty);
    assert_restored(&site, &site.name(1));
    assert_restored(&site, &site.name(2));
    assert!(empty());
}
