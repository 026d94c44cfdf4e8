//! The program's exit codes: 1 only where the archive itself was seen, and never a promotion by mistake.

use crate::cluster::{Cluster, Stop, started, text};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

const MISSING: &str = "0000000100000000000000FF";

/// A stopped cluster with a few archived segments.
fn archived() -> Cluster {
    let cluster = started();
    cluster.write_segments(3);
    cluster.drain();
    cluster.stop(Stop::Fast);
    cluster
}

fn some_segment(cluster: &Cluster) -> String {
    cluster.stored().into_keys().next().expect("a stored segment")
}

fn run(cluster: &Cluster, arguments: &[&str]) -> Output {
    cluster.archiver_program().args(arguments).output().expect("run archiver")
}

/// Sees that the program ends with `code`, and leaves what stood at the destination as it was.
#[track_caller]
fn assert_refused(cluster: &Cluster, arguments: &[&str], code: i32) -> String {
    let destination = cluster.pg_wal("RECOVERYXLOG");
    cluster.write_file(&destination, b"as it was");
    let output = run(cluster, arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert_eq!(fs::read(&destination).expect("read"), b"as it was");
    let leftovers = |path: &std::path::PathBuf| path.display().to_string().contains("archiver.restore");
    assert!(!crate::cluster::paths(&cluster.pg_wal("")).iter().any(leftovers));
    said
}

#[test]
fn a_missing_file_is_told_only_where_the_archive_was_seen() {
    let cluster = archived();
    let (archive, away) = (cluster.archive(), cluster.path("away"));
    let name = some_segment(&cluster);
    let restore = ["restore", name.as_str(), "pg_wal/RECOVERYXLOG"];
    let missing = ["restore", MISSING, "pg_wal/RECOVERYXLOG"];
    assert_eq!(run(&cluster, &restore).status.code(), Some(0));
    assert_eq!(fs::read(cluster.pg_wal("RECOVERYXLOG")).unwrap(), fs::read(cluster.pg_wal(&name)).unwrap());
    assert_eq!(assert_refused(&cluster, &missing, 1), "", "no word in the log of a standby that asks again and again");
    assert_refused(&cluster, &["restore", "00000002.history", "pg_wal/RECOVERYXLOG"], 1);

    fs::rename(&archive, &away).expect("move the archive away");
    for arguments in [restore, missing] {
        let said = assert_refused(&cluster, &arguments, 255);
        assert!(said.contains("No such file or directory") && said.contains("HINT:"), "{said}");
    }
    cluster.create_directory("archive");
    for arguments in [restore, missing] {
        let said = assert_refused(&cluster, &arguments, 255);
        assert!(said.contains("there is no archive at"), "{said}");
    }
    // Another prefix of the same storage.
    fs::create_dir(archive.join("main")).expect("create directory");
    assert_refused(&cluster, &missing, 255);
    fs::remove_dir_all(&archive).expect("remove");
    fs::rename(&away, &archive).expect("put the archive back");
    assert_refused(&cluster, &["--server-name", "other", "restore", MISSING, "pg_wal/RECOVERYXLOG"], 255);

    for directory in ["main/wals", "main", ""] {
        let path = archive.join(directory);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).expect("chmod");
        for arguments in [restore, missing] {
            let said = assert_refused(&cluster, &arguments, 255);
            assert!(said.contains("Permission denied"), "{directory}: {said}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("chmod");
    }
    for (file, arguments) in [(archive.join("main/identity.json"), missing), (cluster.stored()[&name].clone(), restore)]
    {
        fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).expect("chmod");
        let said = assert_refused(&cluster, &arguments, 255);
        assert!(said.contains("Permission denied"), "{}: {said}", file.display());
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
    }
}

#[test]
fn another_clusters_archive_never_counts_as_seen() {
    let (cluster, owner) = (archived(), archived());
    let name = some_segment(&owner);
    let storage = owner.setting("archiver.storage").expect("set");
    for wanted in [MISSING, name.as_str(), "00000002.history"] {
        let said = assert_refused(&cluster, &["--storage", &storage, "restore", wanted, "pg_wal/RECOVERYXLOG"], 255);
        assert!(said.contains("belongs to another cluster"), "{wanted}: {said}");
    }
}

#[test]
fn a_wrong_call_is_255() {
    let cluster = archived();
    let name = some_segment(&cluster);
    for arguments in [
        &["restore"][..],
        &["restore", &name],
        &["restore", &name, "pg_wal/RECOVERYXLOG", "more"],
        &["restore", "--nonsense", &name, "pg_wal/RECOVERYXLOG"],
        &["restore", "not-a-name", "pg_wal/RECOVERYXLOG"],
        &["restore", "../../main/identity.json", "pg_wal/RECOVERYXLOG"],
        &["restore", "", "pg_wal/RECOVERYXLOG"],
        &["restore", &name, ""],
        &["restore", &name, "missing-directory/file"],
        &["restore", &name, "pg_wal"],
        &["--storage", "", "restore", &name, "pg_wal/RECOVERYXLOG"],
        &["--storage", "/srv", "restore", MISSING, "pg_wal/RECOVERYXLOG"],
        &["--server-name", "../main", "restore", MISSING, "pg_wal/RECOVERYXLOG"],
        &["-D", "/missing", "restore", MISSING, "pg_wal/RECOVERYXLOG"],
    ] {
        assert_refused(&cluster, arguments, 255);
    }
    // Without a word of restore it is a usage error.
    assert_eq!(run(&cluster, &["--nonsense"]).status.code(), Some(2));
}

#[test]
fn a_standby_is_told_to_ask_again_unless_it_is_to_stop() {
    let cluster = archived();
    cluster.write_file(&cluster.data().join("standby.signal"), b"");
    fs::rename(cluster.archive(), cluster.path("away")).expect("move the archive away");
    assert_refused(&cluster, &["restore", MISSING, "pg_wal/RECOVERYXLOG"], 2);
    assert_refused(&cluster, &["restore", "--on-error=stop", MISSING, "pg_wal/RECOVERYXLOG"], 255);
    assert_refused(&cluster, &["restore", "--on-error", "stop", "00000002.history", "pg_wal/RECOVERYXLOG"], 255);
    fs::rename(cluster.path("away"), cluster.archive()).expect("put the archive back");
    assert_refused(&cluster, &["restore", MISSING, "pg_wal/RECOVERYXLOG"], 1);
}

#[test]
fn a_damaged_copy_is_never_restored() {
    let cluster = archived();
    let name = some_segment(&cluster);
    let path = cluster.stored()[&name].clone();
    let good = fs::read(&path).expect("read");
    let damage = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut copy = good.clone();
        change(&mut copy);
        copy
    };
    let middle = good.len() / 2;
    let other = cluster.stored().into_values().nth(1).expect("another segment");
    for (what, content) in [
        ("flipped", damage(&|copy| copy[middle] ^= 1)),
        ("short", damage(&|copy| copy.truncate(middle))),
        ("longer", damage(&|copy| copy.extend_from_slice(b"more"))),
        ("twice", damage(&|copy| copy.extend_from_slice(&good))),
        ("empty", Vec::new()),
        ("another segment", fs::read(other).expect("read")),
        ("no WAL", vec![0; 1 << 20]),
    ] {
        cluster.write_file(&path, &content);
        let said = assert_refused(&cluster, &["restore", &name, "pg_wal/RECOVERYXLOG"], 255);
        assert!(said.contains("is damaged"), "{what}: {said}");
    }
    cluster.write_file(&path, &good);
    assert_eq!(cluster.restore(&name, &cluster.path("restored")).status.code(), Some(0));
}

#[test]
fn settings_are_found_by_flag_environment_data_directory_and_where_debian_keeps_them() {
    let cluster = archived();
    let name = some_segment(&cluster);
    let storage = cluster.setting("archiver.storage").expect("set");
    let data = cluster.data().display().to_string();
    let copy = cluster.create_directory("out").join("copy").display().to_string();
    let restored = |what: &str, command: &mut std::process::Command| {
        let output = command.output().expect("run archiver");
        assert_eq!(output.status.code(), Some(0), "{what}: {}", text(&output.stderr));
        assert_eq!(fs::read(&copy).expect("read").len(), 1 << 20, "{what}");
        fs::remove_file(&copy).expect("remove");
    };
    let program = || {
        let mut command = crate::cluster::server_program("archiver");
        command.current_dir("/");
        command
    };
    restored("-D", program().args(["-D", &data, "restore", &name, &copy]));
    restored("flag", program().args(["--storage", &storage, "restore", &name, &copy]));
    restored("environment", program().env("ARCHIVER_STORAGE", &storage).args(["restore", &name, &copy]));
    restored("current directory", cluster.archiver_program().args(["restore", &name, &copy]));
    let nothing = program().args(["restore", &name, &copy]).output().expect("run archiver");
    assert_eq!(nothing.status.code(), Some(255));
    assert!(
        text(&nothing.stderr).contains("HINT:  Give --storage, or set ARCHIVER_STORAGE"),
        "{}",
        text(&nothing.stderr)
    );

    // Debian's layout: the configuration lies elsewhere, and postmaster.opts says where.
    let etc = cluster.create_directory("etc");
    for file in ["postgresql.conf", "test.conf", "pg_hba.conf", "pg_ident.conf"] {
        fs::rename(cluster.data().join(file), etc.join(file)).expect("move");
    }
    let options = format!("-c config_file={0}/postgresql.conf -c hba_file={0}/pg_hba.conf", etc.display());
    let started = crate::cluster::server_program("pg_ctl")
        .args(["start", "-w", "-D", &data, "-l"])
        .arg(cluster.path("log"))
        .args(["-o", &format!("{options} -c ident_file={}/pg_ident.conf", etc.display())])
        .output();
    assert!(started.expect("run pg_ctl").status.success());
    restored("Debian's layout, running", program().args(["-D", &data, "restore", &name, &copy]));
    cluster.stop(Stop::Immediate);
    restored("Debian's layout, stopped", program().args(["-D", &data, "restore", &name, &copy]));
}
