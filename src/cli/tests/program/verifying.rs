//! `archiver verify` and `archiver gaps`.

use crate::{Ended, found_cluster, leave_cluster, program, run, site};
use archiver_core::config::Setting;
use archiver_tests::harm::{change, remove};
use archiver_tests::{Site, archive_file, wal_name};
use serde_json::json;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A site with five archived segments and a history file.
fn archived() -> Site {
    let site = site();
    let archive = site.archive();
    (1..6).for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
    let history = site.offer(&wal_name("00000002.history"), b"1\t0/600028\tno recovery target specified\n");
    archive_file(&archive, &history).unwrap();
    site
}

#[test]
fn a_whole_archive_is_said_to_be_whole() {
    let site = archived();
    let verified = run(&site, &["verify"]).with(0);
    assert_eq!(verified.out, "total: 6, ok: 6, unverified: 0, damaged: 0, missing: 0, unreadable: 0\n");
    assert_eq!(verified.err, "", "no bar where nobody looks");
    let gaps = run(&site, &["gaps"]).with(0);
    assert_eq!((gaps.out.as_str(), gaps.err.as_str()), ("no gaps\n", ""));
    assert_eq!(run(&site, &["gaps", "--json"]).with(0).json(), json!([]));
}

#[test]
fn what_is_wrong_is_named_and_the_exit_code_says_so() {
    let site = archived();
    let [two, three, four] = [2, 3, 4].map(|number| site.name(number));
    remove(&site.place(), &two);
    remove(&site.place(), &three);
    change(&site.place(), &four, |bytes| bytes.truncate(bytes.len() / 2));
    fs::write(site.stored(&site.name(7)), site.content(&site.name(7))).unwrap();

    let verified = run(&site, &["verify"]).with(1);
    let lines: Vec<&str> = verified.out.lines().collect();
    let [lost, also_lost, damaged, summary] = lines[..] else { panic!("{}", verified.out) };
    assert!(lost.starts_with(&two.to_string()) && lost.contains(" missing "), "{lost}");
    assert!(also_lost.starts_with(&three.to_string()) && also_lost.ends_with("\" is not there"), "{also_lost}");
    assert!(damaged.starts_with(&four.to_string()) && damaged.contains(" damaged "), "{damaged}");
    assert!(damaged.contains(&site.stored(&four).display().to_string()), "{damaged}");
    assert_eq!(summary, "total: 7, ok: 3, unverified: 1, damaged: 1, missing: 2, unreadable: 0");

    let rows = run(&site, &["verify", "--json"]).with(1).json();
    let states: Vec<&str> = rows.as_array().unwrap().iter().map(|row| row["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["ok", "missing", "missing", "damaged", "ok", "unverified", "ok"]);
    assert_eq!(rows[0], json!({ "name": site.name(1).to_string(), "state": "ok", "detail": null }));

    let gaps = run(&site, &["gaps"]).with(1);
    let rows: Vec<Vec<&str>> = gaps.out.lines().map(|line| line.split_whitespace().collect()).collect();
    let sixth = site.name(6).to_string();
    assert_eq!(rows[0], ["timeline", "first_missing", "last_missing", "segments"]);
    assert_eq!(rows[1], ["1", &two.to_string(), &three.to_string(), "2"]);
    assert_eq!(rows[2], ["1", &sixth, &sixth, "1"]);
    let gaps = run(&site, &["gaps", "--json"]).with(1).json();
    let first = json!({
        "timeline": 1, "first_missing": two.to_string(), "last_missing": three.to_string(), "segments": 2
    });
    assert_eq!((gaps.as_array().unwrap().len(), &gaps[0]), (2, &first));

    let (from, to) = (four.to_string(), site.name(5).to_string());
    let verified = run(&site, &["verify", "--from", &from, "--to", &to]).with(1);
    assert!(verified.out.ends_with("total: 2, ok: 1, unverified: 0, damaged: 1, missing: 0, unreadable: 0\n"));
    run(&site, &["verify", "--from", &to, "--to", &to]).with(0);
}

#[test]
fn a_broken_history_file_keeps_gaps_from_saying_that_there_are_none() {
    let site = archived();
    site.store_as_barman(&wal_name("00000003.history"), b"1\tnowhere\n");
    let gaps = run(&site, &["gaps"]).with(1);
    assert_eq!(gaps.out, "");
    assert!(gaps.err.starts_with("archiver: gaps may be hidden: the archived copy \""), "{}", gaps.err);
    assert!(gaps.err.contains("00000003.history\" is damaged: line 1 "), "{}", gaps.err);
}

#[test]
fn a_terminal_shows_a_bar_and_the_output_none() {
    let site = archived();
    let terminal = nix::pty::openpty(None, None).unwrap();
    let verifying = program(&site, &["verify"]).stdout(Stdio::piped()).stderr(terminal.slave).output().unwrap();
    let summary = "total: 6, ok: 6, unverified: 0, damaged: 0, missing: 0, unreadable: 0\n";
    assert_eq!(String::from_utf8(verifying.stdout).unwrap(), summary);
    let mut shown = Vec::new();
    // Its end is an error, once nobody writes to the other side any more.
    let _ = File::from(terminal.master).read_to_end(&mut shown);
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains("/6 files, "), "{shown:?}");
}

#[test]
fn a_wrong_call_and_no_archive_are_never_a_whole_one() {
    let site = archived();
    let [one, two] = [1, 2].map(|number| site.name(number).to_string());
    for arguments in [
        &["verify", "--from", "junk"][..],
        &["verify", "--from", &two, "--to", &one],
        &["verify", &one],
        &["gaps", &one],
        &["gaps", "--from", &one],
    ] {
        run(&site, arguments).with(2);
    }
    let beyond = site.name(99).to_string();
    let nothing = run(&site, &["verify", "--from", &beyond, "--to", &beyond]).with(1);
    assert_eq!(nothing.err, "archiver: no file of the archive lies in that range\n");
    for arguments in [&["--storage", "/srv/wal", "verify"][..], &["--server-name", "../main", "gaps"]] {
        run(&site, arguments).with(3);
    }
    found_cluster(&site, 42);
    for command in ["verify", "gaps"] {
        assert!(run(&site, &[command]).with(4).err.contains("belongs to another cluster"), "{command}");
    }
    leave_cluster(&site);
    run(&site, &["verify"]).with(0);
    run(&site, &["gaps"]).with(0);
    site.unmount();
    for arguments in [&["verify"][..], &["verify", "--json"], &["gaps"], &["gaps", "--json"]] {
        let ended = run(&site, arguments).with(4);
        assert!(ended.err.contains("there is no archive at"), "{}", ended.err);
        assert!(!ended.out.contains("ok: ") && !ended.out.contains("no gaps"), "{}", ended.out);
    }
}

#[test]
fn the_exit_code_is_right_also_where_nobody_reads_the_output() {
    let site = archived();
    change(&site.place(), &site.name(1), |bytes| bytes.truncate(9));
    let mut verifying =
        program(&site, &["verify"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run archiver");
    drop(verifying.stdout.take());
    let ended = Ended::of(verifying.wait_with_output().unwrap());
    assert_eq!(ended.with(1).err, "");
}

#[test]
fn a_signal_ends_it_within_a_second() {
    let mut site = Site::with_segments_of(64 << 20);
    found_cluster(&site, site.cluster.system_identifier);
    site.set(Setting::Compression, "bzip2");
    for number in 1..4 {
        let name = site.name(number);
        site.store_as_barman(
            &name,
            &archiver_tests::compressed(archiver_core::codec::Compression::Bzip2, &site.content(&name)),
        );
    }
    let mut verifying = program(&site, &["verify"]).stdout(Stdio::null()).spawn().expect("run archiver");
    let io = format!("/proc/{}/io", verifying.id());
    archiver_tests::eventually("it reads", || {
        let text = fs::read_to_string(&io).unwrap_or_default();
        let read = text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok());
        read.is_some_and(|bytes| bytes > 1 << 20)
    });
    let began = Instant::now();
    let pid = nix::unistd::Pid::from_raw(verifying.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = verifying.wait().unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(status.signal(), Some(15));
}
