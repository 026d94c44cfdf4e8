//! `archiver rebuild`.

use crate::{found_cluster, program, run, site};
use archiver_tests::harm::{Random, change, new_seed, remove};
use archiver_tests::{Site, archive_file, tree};
use serde_json::json;
use std::fs;
use std::process::Stdio;
use std::time::Duration;

fn archived(files: u32) -> Site {
    let site = site();
    let archive = site.archive();
    (1..=files).for_each(|number| drop(archive_file(&archive, &site.offer_segment(number)).unwrap()));
    site
}

#[test]
fn records_come_back_and_what_is_wrong_is_told() {
    let site = archived(4);
    let catalogue = site.catalogue_lines();
    let whole = run(&site, &["rebuild"]).with(0);
    let nothing = "files: 4, lines added: 0, changed: 0, dropped: 0, sums made: 0, dropped: 0, unread: 0\n";
    assert_eq!((whole.out.as_str(), whole.err.as_str()), (nothing, ""));

    fs::remove_file(site.catalogue_path()).unwrap();
    fs::remove_dir_all(site.storage().join("main/sums")).unwrap();
    let rebuilt = run(&site, &["rebuild", "--json"]).with(0).json();
    let expected = json!({
        "files": 4, "lines_added": 4, "lines_changed": 0, "lines_dropped": 0,
        "sums_made": 4, "sums_dropped": 0, "unread": 0, "notes": []
    });
    assert_eq!(rebuilt, expected);
    assert_eq!(site.catalogue_lines(), catalogue);
    run(&site, &["verify"]).with(0);

    remove(&site.place(), &site.name(2));
    change(&site.place(), &site.name(3), |bytes| bytes.truncate(100));
    let rebuilt = run(&site, &["rebuild"]).with(1);
    assert!(
        rebuilt
            .out
            .starts_with("files: 3, lines added: 0, changed: 1, dropped: 1, sums made: 0, dropped: 1, unread: 1")
    );
    for said in [format!("the catalogue named \"{}\"", site.name(2)), format!("{}\" is damaged", site.name(3))] {
        assert!(rebuilt.err.contains(&said), "{said}: {}", rebuilt.err);
    }
    // What was lost is no longer known; what is damaged still is.
    assert!(
        run(&site, &["verify"])
            .with(1)
            .out
            .ends_with("total: 3, ok: 2, unverified: 0, damaged: 1, missing: 0, unreadable: 0\n")
    );
    run(&site, &["gaps"]).with(1);
}

#[test]
fn a_bucket_has_no_catalogue_and_no_archive_is_none() {
    let site = archived(1);
    let url = "s3://bucket/wal?region=eu-west-1&endpoint=http://127.0.0.1:9";
    let mut command = program(&site, &["--storage", url, "rebuild"]);
    command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret");
    let refused = crate::Ended::of(command.output().unwrap()).with(3);
    assert!(refused.err.contains("keeps no catalogue\nDETAIL:  A bucket is listed instead"), "{}", refused.err);
    run(&site, &["rebuild", "junk"]).with(2);
    found_cluster(&site, 42);
    assert!(run(&site, &["rebuild"]).with(4).err.contains("belongs to another cluster"));
    site.unmount();
    assert!(run(&site, &["rebuild"]).with(4).err.contains("there is no archive at"));
    assert!(tree(&site.storage()).is_empty());
}

#[test]
fn killed_at_any_moment_it_leaves_the_old_catalogue_or_the_new_one() {
    const FILES: u32 = 60;
    let site = archived(FILES);
    let new = fs::read_to_string(site.catalogue_path()).unwrap();
    let sums_path = site.storage().join("main/sums/0000000100000000");
    let sums = fs::read_to_string(&sums_path).unwrap();
    // Every second line is missing, and one is broken.
    let old: String = new.lines().step_by(2).map(|line| format!("{line}\n")).collect::<String>() + "junk\n";
    let mut random = Random(new_seed());
    println!("seed {}", random.0);
    let (mut killed, mut kept) = (0, 0);
    for round in 0..40 {
        fs::write(site.catalogue_path(), &old).unwrap();
        fs::write(&sums_path, sums.lines().skip(1).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        let mut command = program(&site, &["rebuild"]);
        let mut rebuilding = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(random.next() % 30_000));
        let is_over = rebuilding.try_wait().unwrap().is_some();
        rebuilding.kill().unwrap();
        rebuilding.wait().unwrap();
        killed += u32::from(!is_over);
        let found = fs::read_to_string(site.catalogue_path()).unwrap();
        let sorted = |text: &str| {
            let mut lines: Vec<String> = text.lines().map(str::to_string).collect();
            lines.sort();
            lines
        };
        kept += u32::from(found == old);
        assert!(found == old || sorted(&found) == sorted(&new), "round {round}: {found}");
        let lines = fs::read_to_string(&sums_path).unwrap().lines().count() as u32;
        assert!([FILES - 1, FILES].contains(&lines), "round {round}: {lines} sums");
    }
    println!("killed {killed} times; the old catalogue stood {kept} times");
    assert!(killed > 0);
    run(&site, &["rebuild"]).with(0);
    run(&site, &["verify"]).with(0);
    assert_eq!(site.catalogue().len(), FILES as usize);
    assert_eq!(fs::read_dir(site.storage().join("main/.staging")).unwrap().count(), 0, "leftovers are swept");
}
