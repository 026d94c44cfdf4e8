//! `archiver archive` with hook scripts, which it runs and hears as the module does.

use crate::{Ended, program, run, site};
use archiver_tests::{Site, eventually};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn archive(site: &Site, number: u32, variables: &[(&str, &str)]) -> Ended {
    let file = site.offer_segment(number);
    let mut command = program(site, &["archive", &format!("pg_wal/{}", file.name)]);
    Ended::of(command.envs(variables.iter().copied()).output().expect("run archiver"))
}

#[test]
fn what_hooks_write_and_how_they_fail_goes_to_standard_error_with_their_names() {
    let site = site();
    let variables = [("ARCHIVER_PRE_ARCHIVE_SCRIPT", "echo $BARMAN_FILE"), ("ARCHIVER_POST_ARCHIVE_SCRIPT", "exit 4")];
    let ended = archive(&site, 1, &variables).with(0);
    let name = site.name(1);
    let source = site.pg_wal().canonicalize().unwrap().join(name.to_string());
    let expected = format!(
        "archiver: hook pre_archive_script for WAL file \"{name}\": {}\n\
         archiver: hook post_archive_script for WAL file \"{name}\" ended with exit code 4\n",
        source.display()
    );
    assert_eq!((ended.out.as_str(), ended.err), ("", expected));
    assert_eq!(site.catalogue(), [name.to_string()]);
}

#[test]
fn a_hook_that_refuses_a_file_fails_it_by_name() {
    let site = site();
    let ended = archive(&site, 1, &[("ARCHIVER_PRE_ARCHIVE_RETRY_SCRIPT", "exit 63")]).with(4);
    assert!(ended.err.contains("hook pre_archive_retry_script refuses it (exit code 63)\nHINT:  "), "{}", ended.err);
    assert!(!site.stored(&site.name(1)).exists());
}

#[test]
fn hooks_are_told_of_the_servers_configuration_file() {
    let site = site();
    let conf = site.path("data/postgresql.conf");
    fs::write(&conf, "archiver.pre_archive_script = 'echo \"$BARMAN_CONFIGURATION\"'\n").unwrap();
    let ended = archive(&site, 1, &[]).with(0);
    assert!(ended.err.ends_with(&format!(": {}\n", conf.canonicalize().unwrap().display())), "{}", ended.err);
}

#[test]
fn a_wrong_time_for_hooks_archives_nothing() {
    let site = site();
    let ended = archive(&site, 1, &[("ARCHIVER_HOOK_TIMEOUT", "soon")]).with(3);
    assert!(ended.err.contains("invalid value for parameter \"archiver.hook_timeout\": \"soon\""), "{}", ended.err);
}

#[test]
fn a_signal_ends_the_run_and_the_hook_with_it() {
    let site = site();
    let file = site.offer_segment(1);
    let pid_file = site.path("pid");
    let hook = format!("echo $$ >{0}.new; mv {0}.new {0}; exec sleep 300", pid_file.display());
    let mut command = program(&site, &["archive", &format!("pg_wal/{}", file.name)]);
    command.env("ARCHIVER_PRE_ARCHIVE_RETRY_SCRIPT", hook).stderr(Stdio::piped());
    let running = command.spawn().expect("run archiver");
    eventually("the hook runs", || pid_file.exists());
    let began = Instant::now();
    kill(Pid::from_raw(running.id().cast_signed()), Signal::SIGTERM).unwrap();
    let ended = running.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(4), "no signal's end, which PostgreSQL takes for worse than a failure");
    assert!(began.elapsed() < Duration::from_secs(5));
    let hook: i32 = fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap();
    eventually("the hook is gone", || kill(Pid::from_raw(hook), None).is_err());
    assert!(!site.stored(&file.name).exists());
}

#[test]
fn a_second_signal_ends_a_run_that_hangs_in_the_storage() {
    let site = site();
    archive(&site, 1, &[]).with(0);
    // Whoever opens it waits for somebody at its other end.
    fs::remove_file(site.catalogue_path()).unwrap();
    mkfifo(&site.catalogue_path(), Mode::S_IRWXU).unwrap();
    let file = site.offer_segment(2);
    let mut command = program(&site, &["archive", &format!("pg_wal/{}", file.name)]);
    command.env("ARCHIVER_PRE_ARCHIVE_SCRIPT", "true").stderr(Stdio::piped());
    let mut running = command.spawn().expect("run archiver");
    let pid = Pid::from_raw(running.id().cast_signed());
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    let places = || threads().filter_map(|thread| fs::read_to_string(thread.path().join("wchan")).ok());
    let began = Instant::now();
    while !places().any(|place| place.contains("wait_for_partner")) {
        if began.elapsed() > Duration::from_secs(10) {
            running.kill().unwrap();
            panic!("it does not hang, or this kernel does not tell where: {:?}", places().collect::<Vec<_>>());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(pid, Signal::SIGTERM).unwrap();
    eventually("the first is heard", || !is_pending(pid, Signal::SIGTERM));
    assert!(running.try_wait().unwrap().is_none(), "what hangs in the kernel hears nothing");
    kill(pid, Signal::SIGTERM).unwrap();
    let is_over = (0..500).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        running.try_wait().unwrap().is_some()
    });
    if !is_over {
        running.kill().unwrap();
    }
    assert_eq!(running.wait().unwrap().signal(), Some(Signal::SIGTERM as i32));
}

/// Whether that signal waits to be heard.
fn is_pending(pid: Pid, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let bits = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
    u64::from_str_radix(bits.trim(), 16).unwrap() & 1 << (signal as i32 - 1) != 0
}

#[test]
fn check_judges_hooks_and_programs_that_compress() {
    let site = site();
    let check = |name: &str, value: &str| {
        let mut command = program(&site, &["check", "--json"]);
        let ended = Ended::of(command.env(name, value).env("PATH", "/no/such").output().expect("run archiver"));
        let rows = ended.json();
        let found = rows.as_array().unwrap().iter().find(|row| {
            let name = row["name"].as_str().unwrap();
            ["hooks", "compression"].contains(&name) && row["state"] != "ok"
        });
        found.map(|row| row["detail"].as_str().unwrap().to_string())
    };
    assert_eq!(check("ARCHIVER_PRE_ARCHIVE_SCRIPT", "/bin/sh -c true"), None);
    let missing = check("ARCHIVER_PRE_ARCHIVE_SCRIPT", "/no/such/hook").unwrap();
    assert!(missing.starts_with("archiver.pre_archive_script names \"/no/such/hook\""), "{missing}");
    assert!(check("ARCHIVER_POST_WAL_DELETE_SCRIPT", "call --token=sesame").unwrap().contains("credential"));
    assert!(check("ARCHIVER_COMPRESSION", "pigz").unwrap().contains("no program pigz"));
    let ended = run(&site, &["--storage", "s3://bucket/x?region=r", "check"]);
    assert!(!ended.out.contains("for file: storage only"));
    let mut command = program(&site, &["--storage", "s3://bucket/x?region=r", "check"]);
    let ended = Ended::of(command.env("ARCHIVER_COMPRESSION", "custom").output().expect("run archiver")).with(1);
    assert!(ended.out.contains("archiver.custom_compression_filter"), "{}", ended.out);
    let mut command = program(&site, &["--storage", "s3://bucket/x?region=r", "check"]);
    let ended = Ended::of(command.env("ARCHIVER_COMPRESSION", "pigz").output().expect("run archiver")).with(1);
    assert!(ended.out.contains("It is for file: storage only"), "{}", ended.out);
}
