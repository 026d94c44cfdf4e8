//! `archiver list` and `archiver exists`.

use crate::{Ended, found_cluster, leave_cluster, program, run, site};
use archiver_tests::{Site, archive_file, wal_name};
use std::fs;
use std::io::Read;
use std::process::Stdio;

const MISSING: &str = "0000000100000000000000FF";
const HISTORY: &str = "00000002.history";

/// A site with two archived segments and a history file.
fn archived() -> Site {
    let site = site();
    let archive = site.archive();
    for number in [1, 2] {
        archive_file(&archive, &site.offer_segment(number)).unwrap();
    }
    archive_file(&archive, &site.offer(&wal_name(HISTORY), b"1\t0/300000\tno recovery target specified\n")).unwrap();
    site
}

#[test]
fn a_list_shows_every_file_in_columns() {
    let site = archived();
    let listed = run(&site, &["list"]).with(0);
    let lines: Vec<&str> = listed.out.lines().collect();
    assert_eq!(lines.len(), 4, "{}", listed.out);
    assert!(lines[0].starts_with("name ") && lines[0].ends_with(" location"), "{}", lines[0]);
    for (line, name) in lines[1..].iter().zip([site.name(1), site.name(2), wal_name(HISTORY)]) {
        assert!(line.starts_with(&name.to_string()), "{line}");
        let location = site.stored(&name).display().to_string();
        assert_eq!(line.find(&location), lines[0].find("location"), "the columns are aligned: {line}");
    }
    assert_eq!(listed.err, "");
}

#[test]
fn a_list_in_json_has_the_columns_of_list_wal() {
    let site = archived();
    let listed = run(&site, &["list", "--json"]).with(0).json();
    let rows = listed.as_array().unwrap();
    let row = rows[0].as_object().unwrap();
    let columns =
        ["compression", "encryption", "kind", "location", "name", "size", "stored_at", "stored_size", "timeline"];
    let mut keys: Vec<&String> = row.keys().collect();
    keys.sort();
    assert_eq!(keys, columns);
    assert_eq!((&row["kind"], &row["timeline"], &row["size"]), (&"segment".into(), &1.into(), &(1 << 20).into()));
    assert_eq!((&row["compression"], &row["encryption"]), (&"zstd".into(), &"none".into()));
    assert_eq!(row["stored_size"], fs::metadata(site.stored(&site.name(1))).unwrap().len());
    let stored_at = row["stored_at"].as_str().unwrap();
    assert!(stored_at.len() == 27 && stored_at.ends_with('Z') && &stored_at[10..11] == "T", "{stored_at}");
    assert_eq!((&rows[2]["kind"], &rows[2]["timeline"]), (&"history".into(), &2.into()));
}

#[test]
fn a_range_includes_both_ends() {
    let site = archived();
    let [one, two] = [1, 2].map(|number| site.name(number).to_string());
    let names = |arguments: &[&str]| -> Vec<String> {
        let listed = run(&site, &[&["list", "--json"], arguments].concat()).with(0).json();
        listed.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(names(&["--from", &two]), [two.as_str()]);
    assert_eq!(names(&["--from", &one, "--to", &one]), [one.as_str()]);
    assert_eq!(names(&["--to", &one]), [one.as_str(), HISTORY]);
    assert!(names(&["--from", MISSING]).is_empty());
    run(&site, &["list", "--from", &two, "--to", &one]).with(2);
    run(&site, &["list", "--from", "junk"]).with(2);
}

#[test]
fn no_archive_is_no_empty_list() {
    let site = archived();
    found_cluster(&site, 42);
    for arguments in [&["list"][..], &["list", "--json"], &["exists", MISSING], &["exists", HISTORY]] {
        assert!(run(&site, arguments).with(4).err.contains("belongs to another cluster"), "{arguments:?}");
    }
    leave_cluster(&site);
    run(&site, &["list"]).with(0);
    site.unmount();
    for arguments in [&["list"][..], &["list", "--json"], &["exists", MISSING]] {
        let ended = run(&site, arguments).with(4);
        assert!(ended.err.contains("there is no archive at") && ended.err.contains("HINT:"), "{}", ended.err);
        assert_eq!(ended.out, "");
    }
    fs::remove_dir(site.storage()).unwrap();
    assert!(run(&site, &["exists", MISSING]).with(4).err.contains("No such file or directory"));
}

#[test]
fn exists_prints_the_place_and_answers_by_its_code() {
    let site = archived();
    let name = site.name(1).to_string();
    let location = site.stored(&site.name(1)).display().to_string();
    assert_eq!(run(&site, &["exists", &name]).with(0).out, format!("{location}\n"));
    let there = run(&site, &["exists", &name, "--json"]).with(0).json();
    assert_eq!(there, serde_json::json!({ "name": name, "exists": true, "location": location }));
    let absent = run(&site, &["exists", MISSING]).with(1);
    assert_eq!((absent.out.as_str(), absent.err.as_str()), ("", ""));
    let absent = run(&site, &["exists", "--json", MISSING]).with(1).json();
    assert_eq!(absent, serde_json::json!({ "name": MISSING, "exists": false, "location": null }));
    run(&site, &["exists", HISTORY]).with(0);
    // Archived once and gone: not the archive's word but a loss.
    fs::remove_file(&location).unwrap();
    run(&site, &["exists", &name]).with(4);
}

#[test]
fn a_wrong_call_and_a_wrong_setting_have_codes_of_their_own() {
    let site = archived();
    for arguments in [
        &["exists"][..],
        &["exists", "junk"],
        &["exists", MISSING, MISSING],
        &["exists", "--nonsense", MISSING],
        &["--server-name", "restored", "exists", "--nonsense", MISSING],
        &["list", MISSING],
        &["--nonsense"],
        &[],
    ] {
        run(&site, arguments).with(2);
    }
    for arguments in [
        &["--storage", "/srv/wal", "list"][..],
        &["--server-name", "../main", "list"],
        &["--storage", "", "exists", MISSING],
    ] {
        assert!(run(&site, arguments).with(3).err.contains("parameter \"archiver."), "{arguments:?}");
    }
    let nothing = program(&site, &["list"]).env_remove("ARCHIVER_STORAGE").output().unwrap();
    assert!(Ended::of(nothing).with(3).err.contains("HINT:  Give --storage"));
    // What PostgreSQL may have meant for a restore never ends a recovery.
    for arguments in [&["--nonsense", MISSING, "pg_wal/RECOVERYXLOG"][..], &["--server-name", "list", MISSING]] {
        run(&site, arguments).with(255);
    }
    for arguments in [&["--help"][..], &["help", "list"], &["exists", "--help"], &["--version"]] {
        run(&site, arguments).with(0);
    }
}

#[test]
fn a_reader_who_leaves_is_no_failure() {
    let site = archived();
    // More than a pipe holds.
    for number in 3..600 {
        site.store_as_barman(&site.name(number), b"x");
    }
    let mut listing =
        program(&site, &["list"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run archiver");
    drop(listing.stdout.take());
    let mut err = String::new();
    listing.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((listing.wait().unwrap().code(), err.as_str()), (Some(0), ""));
    assert_eq!(run(&site, &["list"]).with(0).out.lines().count(), 1 + 2 + 597 + 1);
}
