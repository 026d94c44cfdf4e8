//! Hook scripts around each file: their order, what they are told, what their exit codes mean, and how they end.

use crate::pool::{Process, done, offered};
use archiver_core::archive::{Answer, Archive, WalFile};
use archiver_core::codec::Compression;
use archiver_core::config::{Hook, Setting};
use archiver_core::error::Kind;
use archiver_core::hooks::{About, Hooks, Note, Occasion};
use archiver_core::incoming::{Outcome, Queue};
use archiver_tests::{Site, compressed, eventually, wal_name};
use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const ARCHIVE_HOOKS: [Hook; 4] = [Hook::PreArchive, Hook::PreArchiveRetry, Hook::PostArchiveRetry, Hook::PostArchive];

/// Writes down what it is told, one line a run.
const TELLING: &str = "echo \"$BARMAN_PHASE $BARMAN_HOOK $BARMAN_RETRY $BARMAN_SEGMENT file=$BARMAN_FILE \
    size=$BARMAN_SIZE time=$BARMAN_TIMESTAMP compression=$BARMAN_COMPRESSION error=$BARMAN_ERROR \
    result=$ARCHIVER_HOOK_RESULT\"";

/// A site whose hooks write into one transcript.
fn site_with_transcript(hooks: &[Hook]) -> Site {
    let mut site = Site::new();
    for hook in hooks {
        set_hook(&mut site, *hook, "true");
    }
    site
}

/// Another end for a hook that writes into the transcript.
fn set_hook(site: &mut Site, hook: Hook, end: &str) {
    let transcript = site.path("transcript");
    site.set(hook.setting(), &format!("{TELLING} >>{}; {end}", transcript.display()));
}

fn transcript(site: &Site) -> Vec<String> {
    let text = fs::read_to_string(site.path("transcript")).unwrap_or_default();
    text.lines().map(str::to_string).collect()
}

/// Which hooks ran for which file.
fn runs(site: &Site) -> Vec<String> {
    let first_words = |line: &String| {
        let words: Vec<&str> = line.split(' ').collect();
        format!("{}_{} {}", words[0], words[1], words[3])
    };
    transcript(site).iter().map(first_words).collect()
}

/// All four hooks, for one file after the other.
fn runs_in_turn(files: &[&WalFile]) -> Vec<String> {
    files.iter().flat_map(|file| ARCHIVE_HOOKS.map(|hook| format!("{} {}", hook.name(), file.name))).collect()
}

/// The archive, and what its hooks are heard to say.
fn heard(site: &Site) -> (Archive, Arc<Mutex<Vec<Note>>>) {
    let notes = Arc::<Mutex<Vec<Note>>>::default();
    let ear = Arc::clone(&notes);
    let archive = site.archive();
    (archive.with_hooks_of(Some(Path::new("/etc/x.conf")), Arc::new(move |note| ear.lock().unwrap().push(note))), notes)
}

fn messages(notes: &Mutex<Vec<Note>>) -> Vec<String> {
    notes.lock().unwrap().iter().map(|note| note.message.clone()).collect()
}

/// As Python prints a file's modification time.
fn mtime(path: &Path) -> String {
    let meta = fs::metadata(path).unwrap();
    format!("{:?}", meta.mtime() as f64 + 1e-9 * meta.mtime_nsec() as f64)
}

#[test]
fn hooks_run_in_barmans_order_one_file_after_the_other_and_are_told_what_barmans_are() {
    let site = site_with_transcript(&ARCHIVE_HOOKS).with(Setting::Workers, "8").with(Setting::Compression, "gzip");
    let mut files = offered(&site, 1..6);
    let label = wal_name("00000001000000000000000A.00000028.backup");
    files.push(site.offer(&label, b"START WAL LOCATION: 0/A000028\n"));
    let mut process = Process::new(&site);
    process.archive(&files[0]).unwrap();
    eventually("all are archived ahead, one by one", || transcript(&site).len() == 4 * files.len());
    for file in &files[1..] {
        process.archive(file).unwrap();
        done(&site, file);
    }
    let mut expected = Vec::new();
    for file in &files {
        let (name, stored) = (file.name, site.stored(&file.name));
        let time = mtime(&file.path);
        for hook in ARCHIVE_HOOKS {
            let (phase, barmans) = hook.name().split_once('_').unwrap();
            let (path, compression, result) = match hook.is_before() {
                true => (&file.path, "", ""),
                false => (&stored, "gzip", "archived"),
            };
            let (size, path) = (fs::metadata(path).unwrap().len(), path.display());
            let retry = i32::from(hook.is_retry());
            expected.push(format!(
                "{phase} {barmans} {retry} {name} file={path} size={size} time={time} compression={compression} \
                 error= result={result}"
            ));
        }
    }
    assert_eq!(transcript(&site), expected);
    assert_eq!(site.catalogue().len(), files.len());
}

#[test]
fn hooks_know_server_configuration_storage_and_how_long_it_took() {
    let look = "echo \"$BARMAN_SERVER $BARMAN_CONFIGURATION $ARCHIVER_HOOK_NAME $ARCHIVER_HOOK_STORAGE \
        $ARCHIVER_HOOK_LOCATION $ARCHIVER_HOOK_ENCRYPTION $ARCHIVER_HOOK_DURATION $BARMAN_VERSION\"";
    let site = Site::new().with(Setting::PreArchiveScript, look).with(Setting::PostArchiveScript, look);
    let (archive, notes) = heard(&site);
    let file = site.offer_segment(1);
    Process::with(&site, archive).archive(&file).unwrap();
    let (storage, stored) = (site.storage(), site.stored(&file.name));
    let told = |hook: &str| {
        let title = format!("hook {hook} for WAL file \"{}\": ", file.name);
        format!("{title}main /etc/x.conf {hook} file://{} {} none ", storage.display(), stored.display())
    };
    let notes = messages(&notes);
    assert_eq!(notes[0], format!("{} {}", told("pre_archive_script"), env!("CARGO_PKG_VERSION")));
    let end = notes[1].strip_prefix(&told("post_archive_script")).unwrap_or_else(|| panic!("{notes:?}"));
    let seconds: f64 = end.split(' ').next().unwrap().parse().unwrap();
    assert!((0.0..20.0).contains(&seconds), "{end}");
}

#[test]
fn without_archive_hooks_nothing_is_done_in_turn() {
    let site = Site::new().with(Setting::Workers, "8").with(Setting::PostWalDeleteScript, "true");
    let archive = site.archive();
    assert!(!archive.works_in_turn() && archive.threads() >= 8);
    let site = site.with(Setting::PostArchiveScript, "true");
    assert_eq!(site.archive().threads(), 1);
}

#[test]
fn the_exit_code_of_a_standard_hook_is_only_told() {
    let site = Site::new()
        .with(Setting::PreArchiveScript, "echo before; exit 63")
        .with(Setting::PostArchiveScript, "/no/such/program");
    let (archive, notes) = heard(&site);
    let file = site.offer_segment(1);
    Process::with(&site, archive).archive(&file).unwrap();
    let notes = messages(&notes);
    let [before, after] =
        ["pre", "post"].map(|phase| format!("hook {phase}_archive_script for WAL file \"{}\"", file.name));
    assert_eq!(notes[..2], [format!("{before}: before"), format!("{before} ended with exit code 63")]);
    assert!(notes[2].starts_with(&format!("{after}: ")) && notes[2].contains("/no/such/program"), "{notes:?}");
    assert_eq!(notes[3..], [format!("{after} ended with exit code 127")]);
}

#[test]
fn a_retry_hook_that_answers_62_lets_it_go_on_and_one_that_answers_63_before_fails_the_file() {
    let mut site = site_with_transcript(&ARCHIVE_HOOKS);
    set_hook(&mut site, Hook::PreArchiveRetry, "exit 62");
    let file = site.offer_segment(1);
    let (archive, notes) = heard(&site);
    let mut process = Process::with(&site, archive);
    process.archive(&file).unwrap();
    done(&site, &file);
    assert_eq!(runs(&site), runs_in_turn(&[&file]));
    assert_eq!(messages(&notes).len(), 1);

    set_hook(&mut site, Hook::PreArchiveRetry, "exit 63");
    let second = site.offer_segment(2);
    process.archiver.use_archive(Some(Arc::new(site.archive())));
    let error = process.archive(&second).unwrap_err();
    assert_eq!((error.kind(), error.subject()), (Kind::Hook, "archiver.pre_archive_retry_script"));
    assert_eq!(error.to_string(), "hook pre_archive_retry_script refuses it (exit code 63)");
    assert!(!site.stored(&second.name).exists());
    assert_eq!(runs(&site), runs_in_turn(&[&file, &second]), "those behind it run all the same");
    for line in &transcript(&site)[6..] {
        assert!(line.contains("error=hook pre_archive_retry_script refuses it (exit code 63) result=failed"), "{line}");
        assert!(line.contains(&format!("file={} ", site.stored(&second.name).display())), "{line}");
    }
}

#[test]
fn a_failing_hook_behind_a_file_changes_nothing_in_what_is_archived() {
    for end in ["exit 63", "exit 62", "sleep 60", "exit 1", "kill -9 $$"] {
        let mut site = site_with_transcript(&ARCHIVE_HOOKS).with(Setting::HookTimeout, "1s");
        set_hook(&mut site, Hook::PostArchiveRetry, end);
        let (archive, notes) = heard(&site);
        let file = site.offer_segment(1);
        let stored = Process::with(&site, archive).archive(&file).expect(end);
        assert!(stored.created && site.stored(&file.name).exists());
        assert_eq!(site.catalogue(), [file.name.to_string()]);
        assert!(!messages(&notes).is_empty(), "{end}");
        assert_eq!(runs(&site), runs_in_turn(&[&file]), "{end}");
    }
}

#[test]
fn a_retry_hook_is_run_again_until_it_succeeds() {
    let mut site = site_with_transcript(&[]);
    let flag = site.path("flag");
    set_hook(&mut site, Hook::PreArchiveRetry, &format!("[ -e {0} ] || {{ touch {0}; exit 1; }}", flag.display()));
    let (archive, notes) = heard(&site);
    let file = site.offer_segment(1);
    let began = Instant::now();
    Process::with(&site, archive).archive(&file).unwrap();
    assert!(began.elapsed() >= Duration::from_secs(3), "Barman's pause");
    assert_eq!(runs(&site).len(), 2);
    let title = format!("hook pre_archive_retry_script for WAL file \"{}\"", file.name);
    assert_eq!(messages(&notes), [format!("{title} ended with exit code 1; attempt 1")]);
}

#[test]
fn a_retry_hook_before_a_file_that_does_not_succeed_in_time_fails_it() {
    for (end, detail) in [
        ("exit 1", "It failed 1 times; the log has what it wrote."),
        ("sleep 60", "It was still running and was killed."),
        ("no-such-program", "It failed 1 times; the log has what it wrote."),
    ] {
        let mut site = site_with_transcript(&[]).with(Setting::HookTimeout, "1s");
        set_hook(&mut site, Hook::PreArchiveRetry, end);
        let file = site.offer_segment(1);
        let began = Instant::now();
        let error = Process::new(&site).archive(&file).unwrap_err();
        assert_eq!(error.to_string(), "hook pre_archive_retry_script did not succeed within 1 s", "{end}");
        assert_eq!(error.detail_text(), Some(detail), "{end}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("archiver.hook_timeout")));
        assert!(began.elapsed() < Duration::from_secs(5), "{end}");
        assert!(!site.stored(&file.name).exists());
    }
}

#[test]
fn a_hook_that_is_not_executable_or_floods_is_told_of_in_few_lines() {
    let site = Site::new();
    let script = site.path("script");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o600)).unwrap();
    let site = site
        .with(Setting::PreArchiveScript, &script.display().to_string())
        .with(Setting::PostArchiveScript, "yes flood | head -c 10000000");
    let (archive, notes) = heard(&site);
    Process::with(&site, archive).archive(&site.offer_segment(1)).unwrap();
    let notes = messages(&notes);
    assert!(
        notes[1].ends_with("pre_archive_script for WAL file \"000000010000000000000001\" ended with exit code 126")
    );
    assert!((200..210).contains(&notes.len()), "{}", notes.len());
    assert!(notes.last().unwrap().contains("more lines"));
}

#[test]
fn hooks_run_around_duplicates_too_and_are_told_what_came_of_them() {
    let site = site_with_transcript(&[Hook::PostArchive]);
    let file = site.offer_segment(1);
    let mut process = Process::new(&site);
    process.archive(&file).unwrap();
    process.archive(&file).unwrap();
    let mut other = site.content(&file.name);
    other[9000] ^= 1;
    site.offer(&file.name, &other);
    assert_eq!(process.archive(&file).unwrap_err().kind(), Kind::Conflict);
    let lines = transcript(&site);
    assert!(lines[0].ends_with("error= result=archived"), "{lines:?}");
    assert!(lines[1].ends_with("error= result=already archived"), "{lines:?}");
    let error = format!("error=the archive already holds another file named \"{}\" result=failed", file.name);
    assert!(lines[2].ends_with(&error), "{lines:?}");
    assert_eq!(lines.len(), 3);
}

#[test]
fn no_hook_runs_for_a_later_file_before_the_one_in_front_is_archived() {
    let mut site = site_with_transcript(&ARCHIVE_HOOKS);
    let flag = site.path("flag");
    let files = offered(&site, 1..6);
    let refuse_third = format!("[ $BARMAN_SEGMENT != {} ] || [ -e {} ] || exit 63", files[2].name, flag.display());
    set_hook(&mut site, Hook::PreArchiveRetry, &refuse_third);
    let mut process = Process::new(&site);
    for file in &files[..2] {
        process.archive(file).unwrap();
        done(&site, file);
    }
    // It may have failed before it was asked for; what counts is that nothing behind it was begun.
    for _ in 0..3 {
        assert_eq!(process.archive(&files[2]).unwrap_err().kind(), Kind::Hook);
    }
    let begun = runs(&site);
    assert!(begun.iter().all(|run| files[3..].iter().all(|file| !run.ends_with(&file.name.to_string()))), "{begun:?}");
    fs::write(&flag, "").unwrap();
    for file in &files[2..] {
        process.archive(file).unwrap();
        done(&site, file);
    }
    let runs = runs(&site);
    assert_eq!(runs[..8], runs_in_turn(&[&files[0], &files[1]]));
    assert_eq!(runs[runs.len() - 12..], runs_in_turn(&[&files[2], &files[3], &files[4]]));
}

#[test]
fn a_configuration_that_goes_takes_the_hook_that_runs_with_it() {
    let site = site_with_transcript(&[]);
    let mut site = site;
    set_hook(&mut site, Hook::PreArchiveRetry, "exec sleep 60");
    let file = site.offer_segment(1);
    let mut process = Process::new(&site);
    process.archiver.ask(&file).unwrap();
    eventually("the hook runs", || transcript(&site).len() == 1);
    site.set(Setting::PreArchiveRetryScript, "");
    let began = Instant::now();
    process.archiver.use_archive(Some(Arc::new(site.archive())));
    process.archive(&file).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5));
    assert!(process.archiver.stop(Instant::now() + Duration::from_secs(5)), "no thread hangs in the old hook");
    assert_eq!(transcript(&site).len(), 1, "and it was not run again");
}

#[test]
fn a_stop_of_the_server_does_not_wait_for_a_hook_that_never_succeeds() {
    let mut site = site_with_transcript(&[]);
    set_hook(&mut site, Hook::PreArchiveRetry, "exit 1");
    let file = site.offer_segment(1);
    let mut process = Process::new(&site);
    process.archiver.ask(&file).unwrap();
    eventually("it has failed once", || transcript(&site).len() == 1);
    let beats = site.pulse.beats();
    eventually("its pauses are a sign of life", || site.pulse.beats() > beats);
    site.pulse.hurry(true);
    let began = Instant::now();
    let error = process.answer(false).unwrap_err();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(error.kind(), Kind::Hook);
    assert!(error.to_string().contains("given up for a stop of the server or a reload"), "{error}");
    process.archiver.ask(&file).unwrap();
    assert!(matches!(process.archiver.poll(false), Answer::Waiting(_)));
    assert!(process.archiver.stop(Instant::now() + Duration::from_secs(5)));
}

#[test]
fn a_storage_that_fails_for_a_while_does_not_run_the_hooks_again() {
    let site = site_with_transcript(&ARCHIVE_HOOKS);
    let first = site.offer_segment(1);
    let mut process = Process::new(&site);
    process.archive(&first).unwrap();
    let lock = fs::File::open(site.storage().join(".main-xlogdb.lock")).unwrap();
    lock.lock().unwrap();
    let second = site.offer_segment(2);
    process.archiver.ask(&second).unwrap();
    eventually("it waits for its line", || site.stored(&second.name).exists());
    lock.unlock().unwrap();
    process.answer(true).unwrap();
    assert_eq!(runs(&site), runs_in_turn(&[&first, &second]));
}

#[test]
fn a_directory_is_archived_with_the_same_hooks() {
    let mut site = site_with_transcript(&ARCHIVE_HOOKS);
    let refused = site.name(2);
    set_hook(&mut site, Hook::PreArchiveRetry, &format!("[ $BARMAN_SEGMENT != {refused} ] || exit 63"));
    let incoming = site.path("incoming");
    fs::create_dir(&incoming).unwrap();
    let names = [1, 2, 3].map(|number| site.name(number));
    for name in names {
        fs::write(incoming.join(name.to_string()), compressed(Compression::Xz, &site.content(&name))).unwrap();
    }
    let queue = Queue::of_directory(&incoming).unwrap().keep_sources();
    let mut outcomes = Vec::new();
    queue.archive(&site.archive(), &mut |_, outcome| outcomes.push(outcome)).unwrap();
    assert!(
        matches!(&outcomes[..], [Outcome::Archived, Outcome::Failed(error), Outcome::Archived] if error.kind() == Kind::Hook)
    );
    let files: Vec<WalFile> = names.map(|name| WalFile { name, path: incoming.join(name.to_string()) }).to_vec();
    assert_eq!(runs(&site), runs_in_turn(&[&files[0], &files[1], &files[2]]));
    assert!(transcript(&site)[0].contains(" compression=xz "), "what the source was compressed with already");
    assert_eq!(site.catalogue(), [names[0], names[2]].map(|name| name.to_string()));
}

#[test]
fn hooks_run_around_a_deletion_as_around_archiving() {
    let mut site = site_with_transcript(&[Hook::PreWalDelete, Hook::PostWalDeleteRetry, Hook::PostWalDelete]);
    set_hook(&mut site, Hook::PreWalDeleteRetry, "[ $BARMAN_SIZE = 7 ] || exit 63");
    let hooks = Hooks::new(&site.config().hooks, &site.config().destination, Arc::clone(&site.pulse));
    assert!(hooks.are_set_for(Occasion::WalDelete) && !hooks.are_set_for(Occasion::Archive));
    let about = |size| About {
        name: site.name(1),
        file: site.stored(&site.name(1)),
        size,
        modified: std::time::UNIX_EPOCH + Duration::from_millis(1500),
        format: Compression::Zstd.into(),
        location: "there".into(),
        result: "",
    };
    let deleted = Cell::new(0);
    let delete = || {
        deleted.set(deleted.get() + 1);
        Ok(())
    };
    let after = |_: Option<&()>| About { result: "deleted", ..about(7) };
    hooks.around(Occasion::WalDelete, &about(7), delete, after).unwrap();
    let error = hooks.around(Occasion::WalDelete, &about(8), delete, after).unwrap_err();
    assert_eq!((deleted.get(), error.kind()), (1, Kind::Hook));
    let order = ["pre_wal_delete_script", "pre_wal_delete_retry_script", "post_wal_delete_retry_script"];
    let expected =
        [order[0], order[1], order[2], "post_wal_delete_script"].map(|hook| format!("{hook} {}", site.name(1)));
    assert_eq!(runs(&site), [expected.clone(), expected].concat());
    let lines = transcript(&site);
    assert!(lines[0].contains(" size=7 time=1.5 compression=zstd error= result="), "{lines:?}");
    assert!(
        lines[3].ends_with("error= result=deleted") && lines[7].ends_with("(exit code 63) result=failed"),
        "{lines:?}"
    );
}
