//! `archiver delete` and `archiver errors`.

use crate::{Ended, found_cluster, program, run, site};
use archiver_tests::{Site, archive_file, tree, wal_name};
use serde_json::json;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const HISTORY: &str = "00000002.history";

/// A site whose archive holds that many segments of 1 MB and a history file.
fn filled(count: u32) -> Site {
    let site = site();
    fill(&site, count);
    site
}

fn fill(site: &Site, count: u32) {
    let mut names: Vec<_> = (0..count).map(|number| site.name(number)).collect();
    names.push(wal_name(HISTORY));
    site.fill(&names);
}

fn names(site: &Site, numbers: std::ops::Range<u32>) -> Vec<String> {
    numbers.map(|number| site.name(number).to_string()).collect()
}

#[test]
fn a_dry_run_is_the_default_and_shows_what_would_go() {
    let site = filled(6);
    let before = tree(&site.storage());
    let shown = run(&site, &["delete", "--before", &site.name(4).to_string()]).with(0);
    let lines: Vec<&str> = shown.out.lines().collect();
    let size = fs::metadata(site.stored(&site.name(0))).unwrap().len();
    for (line, name) in lines.iter().zip(names(&site, 0..4)) {
        assert_eq!(*line, format!("{name}: would be deleted, {size} bytes"));
    }
    assert_eq!(lines[4..], [format!("would be deleted: 4, bytes: {}; --yes deletes them", 4 * size)]);
    assert_eq!(shown.err, "");
    assert_eq!(tree(&site.storage()), before);

    let label = format!("{}.00000028.backup", site.name(4));
    let done = run(&site, &["delete", "--before", &label, "--yes"]).with(0);
    let lines: Vec<&str> = done.out.lines().collect();
    assert_eq!(lines[0], format!("{}: deleted, {size} bytes", site.name(0)));
    assert_eq!(lines[4..], [format!("deleted: 4, bytes: {}, failed: 0, catalogue lines: 4", 4 * size)]);
    assert_eq!(site.assert_agreement(), [names(&site, 4..6), vec![HISTORY.to_string()]].concat());
}

#[test]
fn nothing_to_do_is_no_word_and_no_failure() {
    let site = filled(6);
    let before = site.name(4).to_string();
    let quiet = run(&site, &["delete", "--before", &before, "--yes", "--quiet"]).with(0);
    assert_eq!((quiet.out.as_str(), quiet.err.as_str()), ("", ""));
    assert_eq!(site.assert_agreement().len(), 3);
    for arguments in [&["--yes"][..], &["--yes", "--quiet"], &["--quiet"]] {
        let ended = run(&site, &[&["delete", "--before", &before], arguments].concat()).with(0);
        assert_eq!((ended.out.as_str(), ended.err.as_str()), ("", ""), "{arguments:?}");
    }
    let shown = run(&site, &["delete", "--before", &before]).with(0);
    assert_eq!(shown.out, "would be deleted: 0, bytes: 0\n");
    // Nor where the archive holds no segment at all.
    run(&site, &["delete", "--before", "000000010000000500000000", "--yes"]).with(0);
    let empty = run(&site, &["delete", "--before", "000000010000000500000000", "--yes"]).with(0);
    assert_eq!((empty.out.as_str(), site.assert_agreement()), ("", vec![HISTORY.to_string()]));
}

#[test]
fn a_deletion_in_json_tells_each_file_and_the_summary() {
    let site = filled(6);
    let (before, keep) = (site.name(3).to_string(), format!("{0}..{0}", site.name(1)));
    let shown = run(&site, &["delete", "--before", &before, "--keep", &keep, "--json"]).with(0).json();
    let size = fs::metadata(site.stored(&site.name(0))).unwrap().len();
    let file = |number: u32, state: &str| {
        let name = site.name(number);
        let location = site.stored(&name).display().to_string();
        json!({ "name": name.to_string(), "kind": "segment", "timeline": 1, "stored_size": size, "location": location,
                "state": state, "reason": null })
    };
    let summary = |is_dry, lines: u64| json!({ "dry_run": is_dry, "files": 2, "bytes": 2 * size, "failed": 0, "catalogue_lines": lines });
    let state = "would be deleted";
    assert_eq!(shown, json!({ "files": [file(0, state), file(2, state)], "summary": summary(true, 0) }));
    let done = run(&site, &["delete", "--before", &before, "--keep", &keep, "--json", "--yes"]).with(0).json();
    assert_eq!(done, json!({ "files": [file(0, "deleted"), file(2, "deleted")], "summary": summary(false, 2) }));
    let empty = run(&site, &["delete", "--before", &before, "--keep", &keep, "--json", "--yes"]).with(0).json();
    assert_eq!(empty["files"], json!([]));
}

#[test]
fn a_wrong_bound_is_a_wrong_call_and_deletes_nothing() {
    let site = filled(6);
    let good = site.name(4).to_string();
    let backwards = format!("{good}..{}", site.name(1));
    for (arguments, word) in [
        (&["--before", HISTORY][..], "is a history file"),
        (&["--before", "0000000100000000000000"], "is not the name of a WAL file"),
        (&["--before", ""], "is not the name of a WAL file"),
        (&["--before", "%r"], "is not the name of a WAL file"),
        (&[], "--before"),
        (&["--before", &good, "--keep", &good], "FROM..TO"),
        (&["--before", &good, "--keep", &backwards], "lies behind the second"),
    ] {
        let ended = run(&site, &[&["delete", "--yes"], arguments].concat()).with(2);
        assert!(ended.err.contains(word), "{arguments:?}: {}", ended.err);
    }
    assert!(run(&site, &["delete", "--before", "0000000100000000FFFFFFFF", "--yes"]).with(3).err.contains("1 MB"));
    found_cluster(&site, 42);
    assert!(run(&site, &["delete", "--before", &good, "--yes"]).with(4).err.contains("belongs to another cluster"));
    assert_eq!(site.assert_agreement().len(), 7);
}

#[test]
fn older_timelines_stay_without_the_history_and_that_is_said() {
    let site = filled(6);
    fs::remove_file(site.stored(&wal_name(HISTORY))).unwrap();
    let shown = run(&site, &["delete", "--before", "000000020000000000000005"]).with(0);
    assert!(
        shown.err.contains("\"00000002.history\" is not in the archive: files of other timelines stay"),
        "{}",
        shown.err
    );
    assert_eq!(shown.out, "would be deleted: 0, bytes: 0\n");
}

#[test]
fn a_broken_catalogue_is_told_and_keeps_nothing_from_going() {
    let site = filled(6);
    let lines = fs::read_to_string(site.catalogue_path()).unwrap();
    fs::write(site.catalogue_path(), format!("junk\n{lines}")).unwrap();
    let done = run(&site, &["delete", "--before", &site.name(4).to_string(), "--yes", "--quiet"]).with(0);
    assert!(
        done.err.contains("1 line of the catalogue") && done.err.contains("Line 1 is the first: \"junk\"."),
        "{}",
        done.err
    );
    assert_eq!(site.catalogue()[0], "junk");
    assert_eq!(site.catalogue().len(), 4);
}

/// The library that kills the program.
fn deaths(directory: &Path) -> PathBuf {
    let library = directory.join("deaths.so");
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&library)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/program/deaths.c"))
        .arg("-ldl")
        .output()
        .expect("run cc");
    assert!(built.status.success(), "cc: {}", String::from_utf8_lossy(&built.stderr));
    library
}

fn deletion(site: &Site, library: &Path) -> Command {
    let mut command = program(site, &["delete", "--before", &site.name(300).to_string(), "--yes"]);
    command.env("LD_PRELOAD", library).env("DEATHS", site.storage());
    command
}

/// Before which of the calls the program dies: all that are not one of very many, and as many of those as make twenty.
fn moments(calls: &[String]) -> BTreeSet<usize> {
    const KILLS: usize = 20;
    let is_rare = |number: &usize| calls[*number - 1] != "unlink";
    let mut moments: BTreeSet<usize> = (1..=calls.len()).filter(is_rare).collect();
    let removals: Vec<usize> = (1..=calls.len()).filter(|number| !is_rare(number)).collect();
    let left = KILLS.saturating_sub(moments.len());
    moments.extend((0..left).map(|step| removals[step * (removals.len() - 1) / (left - 1)]));
    moments
}

#[test]
fn killed_at_any_of_20_moments_a_deletion_is_whole_after_the_next_run() {
    let reference = filled(4096);
    let library = deaths(&reference.path("data"));
    let told = reference.path("calls");
    let ended = deletion(&reference, &library).env("CALLS", &told).output().expect("run archiver");
    Ended::of(ended).with(0);
    let expected = [names(&reference, 300..4096), vec![HISTORY.to_string()]].concat();
    assert_eq!(reference.assert_agreement(), expected);
    let calls: Vec<String> = fs::read_to_string(&told).unwrap().lines().map(str::to_string).collect();
    for (call, least) in [("unlink", 300), ("fsync", 5), ("rename", 2), ("rmdir", 1)] {
        assert!(calls.iter().filter(|it| *it == call).count() >= least, "{call}: {calls:?}");
    }

    let moments = moments(&calls);
    assert_eq!(moments.len(), 20, "{moments:?}");
    let mut disagreements = 0;
    for moment in moments {
        let site = site();
        fill(&site, 4096);
        let killed = deletion(&site, &library).env("DIES_AT", moment.to_string()).output().expect("run archiver");
        assert_eq!(
            killed.status.signal(),
            Some(9),
            "before call {moment}: {}",
            String::from_utf8_lossy(&killed.stderr)
        );
        for number in 300..4096 {
            let name = site.name(number);
            assert_eq!(fs::read(site.stored(&name)).unwrap(), site.filled(&name), "{name}, before call {moment}");
        }
        let there = (0..300).filter(|&number| site.stored(&site.name(number)).exists()).count();
        disagreements += usize::from(site.catalogue().len() != there + 3796 + 1);
        run(&site, &["delete", "--before", &site.name(300).to_string(), "--yes"]).with(0);
        assert_eq!(site.assert_agreement(), expected, "killed before call {moment}, {}", calls[moment - 1]);
    }
    assert!(disagreements > 5, "kills came in the middle: {disagreements}");
}

/// A site with an archived segment and files that were set aside.
fn with_errors() -> Site {
    let site = site();
    archive_file(&site.archive(), &site.offer_segment(1)).unwrap();
    let folder = site.storage().join("main/errors");
    fs::create_dir(&folder).unwrap();
    for name in [
        "notes.txt.20261121T101752Z.unknown",
        "000000010000000000000001.20261120T000000Z.duplicate",
        "000000010000000000000001.20261121T000000Z.duplicate",
    ] {
        fs::write(folder.join(name), "x").unwrap();
    }
    site
}

#[test]
fn errors_shows_what_was_set_aside_and_ends_with_1() {
    let site = with_errors();
    let shown = run(&site, &["errors"]).with(1);
    let lines: Vec<&str> = shown.out.lines().collect();
    assert_eq!(lines.len(), 4, "{}", shown.out);
    assert!(lines[0].starts_with("000000010000000000000001 ") && lines[0].contains("2026-11-20T00:00:00"));
    assert!(lines[0].contains(" pg_wal "), "the original is there: {}", lines[0]);
    assert!(lines[2].ends_with("main/errors/notes.txt.20261121T101752Z.unknown"));
    assert_eq!(lines[3], "duplicates: 2, unknown: 1");
    let rows = run(&site, &["errors", "--json"]).with(1).json();
    let location = site.storage().join("main/errors/notes.txt.20261121T101752Z.unknown").display().to_string();
    let row = json!({ "name": "notes.txt", "reason": "unknown", "since": "2026-11-21T10:17:52.000000Z",
                      "in_pg_wal": false, "location": location, "detail": null });
    assert_eq!(rows[2], row);

    fs::remove_dir_all(site.storage().join("main/errors")).unwrap();
    let none = run(&site, &["errors"]).with(0);
    assert_eq!((none.out.as_str(), none.err.as_str()), ("", ""));
    assert_eq!(run(&site, &["errors", "--json"]).with(0).json(), json!([]));
    site.unmount();
    run(&site, &["errors"]).with(4);
}

#[test]
fn clearing_removes_the_file_of_exactly_that_name_and_nothing_else() {
    let site = with_errors();
    let before = tree(&site.storage());
    for name in [
        "000000010000000000000001",
        "notes.txt",
        "notes.txt.20261121T101752Z",
        "",
        ".",
        "..",
        "../identity.json",
        "../wals/0000000100000000/000000010000000000000001",
        "/etc/passwd",
        "*",
    ] {
        let refused = run(&site, &["errors", "--clear", name]).with(1);
        assert!(refused.err.contains("was set aside in") && refused.err.contains("HINT:"), "{name:?}: {}", refused.err);
        assert_eq!(refused.out, "");
    }
    assert_eq!(tree(&site.storage()), before);
    let ambiguous = run(&site, &["errors", "--clear", "000000010000000000000001"]).with(1);
    assert!(ambiguous.err.contains("000000010000000000000001.20261120T000000Z.duplicate, 0000"), "{}", ambiguous.err);

    let name = "000000010000000000000001.20261120T000000Z.duplicate";
    let location = site.storage().join("main/errors").join(name).display().to_string();
    assert_eq!(run(&site, &["errors", "--clear", name]).with(0).out, format!("{location}\n"));
    let left: Vec<String> = before.into_iter().filter(|path| !path.ends_with(name)).collect();
    assert_eq!(tree(&site.storage()), left);
    let json = run(&site, &["errors", "--clear", name, "--json"]).with(1).json();
    assert_eq!(json, json!({ "name": name, "cleared": false, "location": null }));
    found_cluster(&site, 42);
    run(&site, &["errors", "--clear", "notes.txt.20261121T101752Z.unknown"]).with(4);
    assert_eq!(tree(&site.storage()), left);
}

#[test]
fn hooks_run_around_each_file_that_goes_and_one_that_refuses_keeps_it_and_all_behind_it() {
    let site = filled(6);
    let transcript = site.path("transcript");
    let note = format!(
        "echo $ARCHIVER_HOOK_NAME $BARMAN_SEGMENT \"$BARMAN_ERROR\" $ARCHIVER_HOOK_RESULT \
         $(test -e $BARMAN_FILE && echo there) >> {}",
        transcript.display()
    );
    let hooks = ["PRE", "POST"].map(|phase| format!("ARCHIVER_{phase}_WAL_DELETE"));
    let delete = |before: u32, refusal: &str| {
        let mut command = program(&site, &["delete", "--before", &site.name(before).to_string(), "--yes", "--quiet"]);
        for hook in &hooks {
            command.env(format!("{hook}_SCRIPT"), &note);
            command.env(format!("{hook}_RETRY_SCRIPT"), format!("{note}{refusal}"));
        }
        Ended::of(command.output().unwrap())
    };
    delete(2, "").with(0);
    let expected = |number: u32| {
        let name = site.name(number);
        [
            format!("pre_wal_delete_script {name} there"),
            format!("pre_wal_delete_retry_script {name} there"),
            format!("post_wal_delete_retry_script {name} deleted"),
            format!("post_wal_delete_script {name} deleted"),
        ]
    };
    let told = fs::read_to_string(&transcript).unwrap();
    let told: Vec<String> = told.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(told, [expected(0), expected(1)].concat());

    let refused = delete(5, &format!("; test $BARMAN_SEGMENT != {} || exit 63", site.name(3))).with(4);
    assert!(refused.err.contains("pre_wal_delete_retry_script refuses it (exit code 63)"), "{}", refused.err);
    assert_eq!(site.assert_agreement(), [names(&site, 3..6), vec![HISTORY.to_string()]].concat());
}
