//! Programs of the user's: hooks see of us what they see of Barman, and what filters compressed is read by both.

use crate::barman::Barman;
use crate::{archive_all, one_of_each_kind, restored};
use archiver_core::codec::Compression;
use archiver_core::config::{Hook, Setting};
use archiver_core::incoming::Queue;
use archiver_core::wal::{Kind, WalName};
use archiver_tests::{Site, wal_name};
use std::fs::{self, File, FileTimes};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

const ARCHIVE_HOOKS: [Hook; 4] = [Hook::PreArchive, Hook::PreArchiveRetry, Hook::PostArchiveRetry, Hook::PostArchive];

/// Two sites of one cluster with the same files to be archived; the hooks of each write all that they are told into its
/// transcript, and then do as they are told here.
struct Pair {
    barmans: Site,
    ours: Site,
    hooks: Vec<(Hook, &'static str)>,
}

impl Pair {
    fn new(compression: &'static str, ends: &[(Hook, &'static str)]) -> Self {
        let end_of = |hook| ends.iter().find(|(one, _)| *one == hook).map_or("exit 0", |(_, end)| *end);
        let hooks = ARCHIVE_HOOKS.map(|hook| (hook, end_of(hook))).to_vec();
        let [barmans, ours] = [0, 1].map(|_| Site::new().with(Setting::Compression, compression));
        Pair { barmans, ours, hooks }
    }

    /// A script of that hook's.
    fn script(site: &Site, hook: Hook, end: &str) -> String {
        let (path, transcript, flag) = (site.path(hook.name()), site.path("transcript"), site.path("flag"));
        let text = format!(
            "#!/bin/sh\nflag={}\n{{ echo run; env | grep '^BARMAN_' | sort; }} >>{}\n{end}\n",
            flag.display(),
            transcript.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.display().to_string()
    }

    fn bring(site: &Site, files: &[(WalName, Vec<u8>)]) {
        let incoming = site.storage().join("main/incoming");
        for (number, (name, content)) in files.iter().enumerate() {
            let path = incoming.join(name.to_string());
            fs::write(&path, content).unwrap();
            let modified = UNIX_EPOCH + Duration::new(1_615_159_937 + number as u64, 463_971_400);
            File::options()
                .write(true)
                .open(&path)
                .unwrap()
                .set_times(FileTimes::new().set_modified(modified))
                .unwrap();
        }
    }

    /// Archives the files by both; answers both transcripts.
    fn transcripts(mut self, files: &[(WalName, Vec<u8>)]) -> [Vec<String>; 2] {
        let hooks = self
            .hooks
            .iter()
            .map(|(hook, end)| format!("{} = {}\n", hook.name(), Pair::script(&self.barmans, *hook, end)));
        let compression = match self.barmans.config().compression {
            Compression::None => String::new(),
            other => format!("compression = {}\n", other.name()),
        };
        let barman = Barman::of(&self.barmans).with_lines(&(hooks.collect::<String>() + &compression));
        Pair::bring(&self.barmans, files);
        barman.archive(&[]);

        for (hook, end) in &self.hooks {
            let script = Pair::script(&self.ours, *hook, end);
            self.ours.set(hook.setting(), &script);
        }
        let incoming = self.ours.storage().join("main/incoming");
        fs::create_dir_all(&incoming).unwrap();
        Pair::bring(&self.ours, files);
        let configuration_file = self.ours.path("barman/barman.conf");
        let archive = self.ours.archive().with_hooks_of(Some(&configuration_file), Arc::new(drop));
        Queue::of_directory(&incoming).unwrap().archive(&archive, &mut |_, _| {}).unwrap();
        [&self.barmans, &self.ours].map(|site| {
            let text = fs::read_to_string(site.path("transcript")).unwrap();
            text.replace(&site.path("").display().to_string(), "SITE/").lines().map(str::to_string).collect()
        })
    }
}

/// The transcript without the values that may differ.
fn without(lines: &[String], variables: &[&str]) -> Vec<String> {
    let hidden = |line: &String| match line.split_once('=') {
        Some((name, _)) if name == "BARMAN_VERSION" || variables.contains(&name) => format!("{name}=…"),
        _ => line.clone(),
    };
    lines.iter().map(hidden).collect()
}

#[test]
fn hooks_are_told_by_us_what_barman_tells_them_in_the_same_order() {
    let pair = Pair::new("none", &[(Hook::PreArchiveRetry, "exit 62"), (Hook::PostArchiveRetry, "exit 63")]);
    let mut files = one_of_each_kind(&pair.ours);
    // A partial of ours waits for its history, and Barman takes histories in the order of their names.
    files.retain(|(name, _)| matches!(name.kind(), Kind::Segment | Kind::Backup));
    let segment = pair.ours.name(6);
    files.push((segment, pair.ours.content(&segment)));
    files.push((wal_name("00000001.history"), b"not of any server\n".to_vec()));
    let [barmans, ours] = pair.transcripts(&files);
    assert_eq!(ours.iter().filter(|line| *line == "run").count(), 16);
    assert_eq!(without(&ours, &[]), without(&barmans, &[]));
}

#[test]
fn the_same_for_files_that_are_compressed_whose_size_is_the_compressors_own() {
    let pair = Pair::new("gzip", &[(Hook::PreArchive, "exit 9")]);
    let files = one_of_each_kind(&pair.ours)[..1].to_vec();
    let [barmans, ours] = pair.transcripts(&files);
    assert_eq!(without(&ours, &["BARMAN_SIZE"]), without(&barmans, &["BARMAN_SIZE"]));
    assert!(ours.contains(&"BARMAN_COMPRESSION=gzip".to_string()));
}

#[test]
fn a_retry_hook_that_fails_once_is_run_again_by_both() {
    let end = "[ -e \"$flag\" ] || { touch \"$flag\"; exit 1; }";
    let pair = Pair::new("none", &[(Hook::PreArchiveRetry, end)]);
    let files = one_of_each_kind(&pair.ours)[..1].to_vec();
    let [barmans, ours] = pair.transcripts(&files);
    assert_eq!(ours.iter().filter(|line| *line == "run").count(), 5);
    assert_eq!(without(&ours, &[]), without(&barmans, &[]));
}

#[test]
fn a_hook_that_stops_archiving_is_followed_by_the_same_hooks_and_the_last_is_told_why_by_us() {
    let pair = Pair::new("none", &[(Hook::PreArchiveRetry, "exit 63")]);
    let files = one_of_each_kind(&pair.ours)[..1].to_vec();
    let [barmans, ours] = pair.transcripts(&files);
    assert_eq!(without(&ours, &["BARMAN_ERROR"]), without(&barmans, &["BARMAN_ERROR"]));
    let errors = |lines: &[String]| -> Vec<bool> {
        lines.iter().filter_map(|line| line.strip_prefix("BARMAN_ERROR=")).map(|error| !error.is_empty()).collect()
    };
    assert_eq!(errors(&ours), [false, false, true, true]);
    assert_eq!(errors(&barmans), [false, false, true, false], "Barman's fault");
}

/// In parentheses, since Barman puts its redirections behind the text.
const FILTER: &str = "(gzip -c1 | tr '\\000-\\377' '\\200-\\377\\000-\\177')";
const BACK: &str = "(tr '\\200-\\377\\000-\\177' '\\000-\\377' | gzip -dc)";
/// What gzip begins with, so turned.
const MAGIC: &str = "0x9f0b88";

fn custom_site(magic: &str) -> Site {
    Site::new()
        .with(Setting::Compression, "custom")
        .with(Setting::CustomCompressionFilter, FILTER)
        .with(Setting::CustomDecompressionFilter, BACK)
        .with(Setting::CustomCompressionMagic, magic)
}

fn barman_lines(magic: &str) -> String {
    let magic = if magic.is_empty() { String::new() } else { format!("custom_compression_magic = {magic}\n") };
    format!("compression = custom\ncustom_compression_filter = {FILTER}\ncustom_decompression_filter = {BACK}\n{magic}")
}

#[test]
fn barman_reads_what_pigz_made_for_us_and_its_catalogue_line() {
    let site = Site::new().with(Setting::Compression, "pigz").with(Setting::CompressionLevel, "high");
    let stored = archive_all(&site);
    let barman = Barman::of(&site);
    for ((name, content), file) in one_of_each_kind(&site).iter().zip(&stored) {
        assert_eq!(file.format.compression, Compression::Gzip);
        assert!(restored(&site, name) == *content, "{name}");
        if name.kind() != Kind::Partial {
            assert!(barman.get_wal(name) == *content, "{name}");
        }
    }
    assert!(barman.read_catalogue().iter().all(|line| line.contains(" gzip ")));
}

#[test]
fn both_read_what_either_made_with_a_filter_of_the_users() {
    for magic in ["", MAGIC] {
        let site = custom_site(magic);
        let stored = archive_all(&site);
        let barman = Barman::of(&site).with_lines(&barman_lines(magic));
        for ((name, content), file) in one_of_each_kind(&site).iter().zip(&stored) {
            assert_eq!(file.format.compression, Compression::Custom);
            assert!(fs::read(&file.location).unwrap().starts_with(&[0x9f, 0x0b, 0x88]), "{name}");
            assert!(restored(&site, name) == *content, "{name}, magic {magic:?}");
            if name.kind() != Kind::Partial {
                assert!(barman.get_wal(name) == *content, "{name}, magic {magic:?}");
            }
        }
        assert!(barman.read_catalogue().iter().all(|line| line.contains(" custom ")));
        let (segment, history) = (site.name(9), wal_name("00000003.history"));
        barman.archive(&[(segment, site.content(&segment)), (history, b"2\t0/900000\tx\n".to_vec())]);
        assert!(restored(&site, &segment) == site.content(&segment), "magic {magic:?}");
        assert!(restored(&site, &history) == b"2\t0/900000\tx\n", "magic {magic:?}");
    }
}
