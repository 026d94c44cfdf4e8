//! `archiver archive`: files by name, as PostgreSQL's archive_command, and a directory, as Barman's incoming one.

use crate::{Ended, found_cluster, leave_cluster, program, run, site};
use archiver_core::archive::WalFile;
use archiver_core::config::Setting;
use archiver_core::wal::WalName;
use archiver_tests::{Site, compressed, tree, wal_name};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

const HISTORY: &str = "00000002.history";

/// As PostgreSQL says it: relative to the data directory.
fn named(file: &WalFile) -> String {
    format!("pg_wal/{}", file.name)
}

/// Puts a file into the directory that files are brought to.
fn bring(site: &Site, name: &str, content: &[u8]) -> PathBuf {
    let path = incoming(site).join(name);
    fs::write(&path, content).unwrap();
    path
}

fn bring_segment(site: &Site, number: u32) -> PathBuf {
    bring(site, &site.name(number).to_string(), &site.content(&site.name(number)))
}

fn incoming(site: &Site) -> PathBuf {
    let directory = site.path("incoming");
    fs::create_dir_all(&directory).unwrap();
    directory
}

/// One run over the directory.
fn archive_directory(site: &Site, arguments: &[&str]) -> Ended {
    let directory = incoming(site).display().to_string();
    run(site, &[&["archive", directory.as_str()], arguments].concat())
}

/// A directory that nobody may write to while this lives, root neither.
struct ReadOnly {
    path: PathBuf,
    is_mount: bool,
}

impl ReadOnly {
    /// Nothing where root may not mount.
    fn make(path: &Path) -> Option<Self> {
        let path = path.to_path_buf();
        if !nix::unistd::geteuid().is_root() {
            fs::set_permissions(&path, Permissions::from_mode(0o500)).unwrap();
            return Some(ReadOnly { path, is_mount: false });
        }
        let none = None::<&str>;
        if let Err(error) = mount(Some(&path), &path, none, MsFlags::MS_BIND, none) {
            println!("skipped, nothing can be mounted: {error}");
            return None;
        }
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, &path, none, flags, none).expect("remount read-only");
        Some(ReadOnly { path, is_mount: true })
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        if self.is_mount {
            let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        } else {
            let _ = fs::set_permissions(&self.path, Permissions::from_mode(0o700));
        }
    }
}

#[test]
fn as_archive_command_it_archives_what_the_module_would() {
    let site = site();
    let file = site.offer_segment(1);
    let ended = run(&site, &["archive", &named(&file)]).with(0);
    assert_eq!((ended.out.as_str(), ended.err.as_str()), ("", ""), "no word in the server's log");
    assert!(file.path.exists(), "PostgreSQL removes its own files");
    assert_eq!(fs::read(site.stored(&file.name)).unwrap(), compressed_as_set(&site, &file.name));
    assert_eq!(site.catalogue(), [file.name.to_string()]);
    assert!(site.path("data/archiver.established").is_file());
    let identity = fs::read_to_string(site.storage().join("main/identity.json")).unwrap();
    assert!(
        identity.contains(&site.cluster.system_identifier.to_string()) && identity.contains("\"15\""),
        "{identity}"
    );
    assert!(site.storage().join("main/sums/0000000100000000").is_file());
    // The module goes on with it, and the program with what the module began.
    site.archive().store(&site.offer_segment(2)).unwrap();
    run(&site, &["archive", &named(&site.offer_segment(2))]).with(0);
    assert_eq!(site.catalogue(), [1, 2].map(|number| site.name(number).to_string()));
}

fn compressed_as_set(site: &Site, name: &WalName) -> Vec<u8> {
    compressed(site.config().compression, &site.content(name))
}

#[test]
fn the_same_content_again_is_success_and_other_content_is_refused() {
    let site = site();
    let file = site.offer_segment(1);
    run(&site, &["archive", &named(&file)]).with(0);
    let again = run(&site, &["archive", "--verbose", &named(&file)]).with(0);
    assert_eq!(again.out, format!("{}: already archived\n", file.name));
    let before = fs::read(site.stored(&file.name)).unwrap();
    let mut other = site.content(&file.name);
    other[5000] ^= 1;
    site.offer(&file.name, &other);
    let refused = run(&site, &["archive", &named(&file)]).with(4);
    assert!(refused.err.starts_with("archiver: could not archive file \""), "{}", refused.err);
    assert!(refused.err.contains("already holds another file") && refused.err.contains("\nHINT:  "), "{}", refused.err);
    assert_eq!(fs::read(site.stored(&file.name)).unwrap(), before);
    assert_eq!(site.catalogue().len(), 1);
}

#[test]
fn several_files_are_archived_though_one_of_them_is_not() {
    let site = site();
    let [one, two, three] = [1, 2, 3].map(|number| site.offer_segment(number));
    fs::write(&two.path, b"no WAL").unwrap();
    let [one, two, three] = [&one, &two, &three].map(named);
    let ended = run(&site, &["archive", &one, &two, "pg_wal/missing", "PG_VERSION", &three]).with(4);
    assert_eq!(site.catalogue(), [1, 3].map(|number| site.name(number).to_string()));
    assert_eq!(ended.err.matches("archiver: could not archive file").count(), 3, "{}", ended.err);
    assert!(ended.err.contains("could not open file \"pg_wal/missing\": No such file or directory"), "{}", ended.err);
}

#[test]
fn settings_come_from_flags_the_environment_and_the_server() {
    let site = site();
    let stored_as = |number: u32, arguments: &[&str], environment: &[(&str, &str)]| -> String {
        let file = named(&site.offer_segment(number));
        let mut command = program(&site, &[arguments, &["archive", &file]].concat());
        command.envs(environment.iter().copied());
        Ended::of(command.output().unwrap()).with(0);
        site.catalogue_lines().pop().unwrap().split('\t').nth(3).unwrap().to_string()
    };
    assert_eq!(stored_as(1, &[], &[]), "zstd");
    assert_eq!(stored_as(2, &[], &[("ARCHIVER_COMPRESSION", "gzip")]), "gzip");
    fs::write(site.path("data/postgresql.conf"), "archiver.compression = 'lz4'\n").unwrap();
    assert_eq!(stored_as(3, &[], &[]), "lz4");
    let file = named(&site.offer_segment(4));
    let flags = ["archive", "--compression", "none", "--memory-limit=64MB", "--retry-timeout=1s", &file];
    run(&site, &flags).with(0);
    assert!(site.catalogue_lines().pop().unwrap().ends_with("\tNone\tNone"));

    for wrong in [
        &["--compression", "zst"][..],
        &["--compression-level", "99"],
        &["--memory-limit", "1MB"],
        &["--retry-timeout", "soon"],
        &["--server-name", "../main"],
        &["--storage", "/srv/wal"],
        &["--memory-limit", "16MB", "--compression=xz", "--compression-level=9"],
        &["-D", "/missing"],
    ] {
        let file = named(&site.offer_segment(5));
        run(&site, &[&["archive", &file], wrong].concat()).with(3);
    }
    fs::write(site.path("data/postgresql.conf"), "archiver.compresion = 'lz4'\n").unwrap();
    let file = named(&site.offer_segment(5));
    assert!(run(&site, &["archive", &file]).with(3).err.contains("archiver.compresion"));
    assert_eq!(site.catalogue().len(), 4);
}

#[test]
fn a_wrong_call_never_ends_above_125() {
    let site = site();
    let name = site.name(1).to_string();
    let directory = incoming(&site).display().to_string();
    for arguments in [
        &["archive"][..],
        &["archive", "--nonsense", &name],
        &["archive", &name, "--verbose", "--quiet"],
        &["archive", &name, &directory],
        &["--server-name", "main", "archive", "--nonsense", &name],
        &["archive", ""],
    ] {
        run(&site, arguments).with(2);
    }
    for arguments in [["archive", name.as_str()], ["archive", "missing-directory"], ["archive", "PG_VERSION"]] {
        run(&site, &arguments).with(4);
    }
    assert!(tree(&site.storage()).is_empty());
}

#[test]
fn another_clusters_archive_is_never_touched() {
    let (site, other) = (site(), site());
    found_cluster(&other, 42);
    run(&site, &["archive", &named(&site.offer_segment(1))]).with(0);
    let storage = format!("file://{}", site.storage().display());
    let history = named(&other.offer(&wal_name(HISTORY), b"1\t0/300000\tx\n"));
    let before = tree(&site.storage());
    let refused = run(&other, &["--storage", &storage, "archive", &history]).with(4);
    assert!(refused.err.contains("belongs to another cluster"), "{}", refused.err);
    // Nor is another cluster's segment ours because it lies in our pg_wal.
    let segment = named(&other.offer_segment(1));
    let refused = run(&other, &["archive", &segment]).with(4);
    assert!(refused.err.contains("not 42"), "{}", refused.err);
    assert_eq!(tree(&site.storage()), before);
    assert!(!other.storage().join("main/wals").exists());
}

#[test]
fn a_vanished_archive_is_not_begun_anew() {
    let site = site();
    run(&site, &["archive", &named(&site.offer_segment(1))]).with(0);
    site.unmount();
    let file = named(&site.offer_segment(2));
    let refused = run(&site, &["archive", &file]).with(4);
    assert!(refused.err.contains("has vanished") && refused.err.contains("archiver.established"), "{}", refused.err);
    assert!(tree(&site.storage()).is_empty());
    site.mount();
    run(&site, &["archive", &file]).with(0);
}

#[test]
fn an_archive_that_cannot_be_written_to_is_told() {
    let site = site();
    run(&site, &["archive", &named(&site.offer_segment(1))]).with(0);
    let before = tree(&site.storage());
    for folder in ["main/.staging", "main/wals/0000000100000000"] {
        let Some(_read_only) = ReadOnly::make(&site.storage().join(folder)) else { return };
        let source = bring_segment(&site, 2);
        let ended = archive_directory(&site, &["--retry-timeout", "1s"]).with(4);
        assert!(ended.err.contains("HINT:  "), "{folder}: {}", ended.err);
        assert!(source.exists());
    }
    assert_eq!(tree(&site.storage()), before);
    fs::remove_dir_all(site.storage()).unwrap();
    assert!(archive_directory(&site, &[]).with(4).err.contains("could not open storage directory"));
    assert!(!site.storage().exists(), "a missing mount point is not made");
}

#[test]
fn without_a_data_directory_the_wal_says_whose_it_is() {
    let site = site();
    leave_cluster(&site);
    let history = bring(&site, HISTORY, b"1\t0/300000\tx\n");
    let refused = archive_directory(&site, &[]).with(3);
    assert!(refused.err.contains("could not tell which cluster") && refused.err.contains("-D"), "{}", refused.err);
    let content = site.content(&site.name(1));
    let segment =
        bring(&site, &site.name(1).to_string(), &compressed(archiver_core::codec::Compression::Gzip, &content));
    // An unmounted directory looks like this, too: no source is removed for its sake.
    let refused = archive_directory(&site, &[]).with(4);
    assert!(refused.err.contains("there is no archive at") && refused.err.contains("--keep"), "{}", refused.err);
    assert!(tree(&site.storage()).is_empty());
    archive_directory(&site, &["--keep"]).with(0);
    assert!(history.exists() && segment.exists());
    archive_directory(&site, &[]).with(0);
    assert!(!history.exists() && !segment.exists());
    let identity = fs::read_to_string(site.storage().join("main/identity.json")).unwrap();
    assert!(identity.contains(&site.cluster.system_identifier.to_string()), "{identity}");
    assert!(!site.path("data/archiver.established").exists());
}

#[test]
fn another_users_data_directory_is_left_alone() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can give a directory away");
        return;
    }
    let site = site();
    let file = named(&site.offer_segment(1));
    std::os::unix::fs::chown(site.path("data"), Some(65_534), None).unwrap();
    let refused = run(&site, &["archive", &file]).with(3);
    assert!(refused.err.contains("belongs to another operating system user"), "{}", refused.err);
    assert!(tree(&site.storage()).is_empty());
}

#[test]
fn a_directory_is_emptied_of_all_that_could_be_archived() {
    let site = site();
    let label = format!("{}.00000028.backup", site.name(2));
    let partial = format!("{}.partial", site.name(3));
    let mut archived: Vec<PathBuf> = [1, 2].map(|number| bring_segment(&site, number)).to_vec();
    archived.push(bring(&site, &partial, &site.content(&site.name(3))));
    archived.push(bring(&site, &label, b"START WAL LOCATION: 0/200028\n"));
    archived.push(bring(&site, HISTORY, b"1\t0/300000\tx\n"));
    let mut left = vec![bring(&site, "000000010000000000000009.tmp", b"x"), bring(&site, ".hidden", b"x")];
    archived.push(bring(&site, "junk", b"what was in it"));
    left.push(bring(&site, &site.name(4).to_string(), b"no WAL"));
    fs::create_dir(incoming(&site).join(site.name(5).to_string())).unwrap();
    symlink(site.path("elsewhere"), incoming(&site).join(site.name(6).to_string())).unwrap();
    fs::write(site.path("elsewhere"), site.content(&site.name(6))).unwrap();

    let ended = archive_directory(&site, &["--verbose"]).with(4);
    let last = ended.out.lines().last().unwrap();
    assert_eq!(last, "total: 10, run: 5, skipped: 1, errors: 4", "{}", ended.out);
    assert!(ended.out.contains("000000010000000000000009.tmp: skipped (it is in the making)\n"), "{}", ended.out);
    assert!(ended.out.contains("junk: set aside (\"junk\" is not the name of a WAL file)\n"), "{}", ended.out);
    assert!(archived.iter().all(|path| !path.exists()));
    assert!(left.iter().all(|path| path.exists()) && site.path("elsewhere").exists());
    assert_eq!(tree(&incoming(&site)).len(), 5);
    let aside = set_aside(&site);
    assert_eq!(aside.len(), 1);
    assert!(aside[0].0.starts_with("junk.2") && aside[0].0.ends_with("Z.unknown"), "{}", aside[0].0);
    assert_eq!(aside[0].1, b"what was in it");
    assert!(ended.err.contains(&format!("It lies at \"{}", site.storage().join("main/errors/junk.2").display())));
    let [one, two] = [1, 2].map(|number| site.name(number).to_string());
    assert_eq!(site.catalogue(), [HISTORY, &one, &two, &label, &partial]);
    for name in site.catalogue() {
        run(&site, &["exists", &name]).with(0);
    }
}

#[test]
fn what_is_archived_already_is_removed_and_what_differs_is_set_aside() {
    let site = site();
    bring_segment(&site, 1);
    let second = bring_segment(&site, 2);
    archive_directory(&site, &["--keep"]).with(0);
    assert!(second.exists(), "--keep leaves the sources");
    let mut other = site.content(&site.name(2));
    other[5000] ^= 1;
    fs::write(&second, &other).unwrap();
    bring_segment(&site, 3);

    let ended = archive_directory(&site, &["--json"]).with(4).json();
    assert_eq!(ended["summary"], json!({ "total": 3, "run": 2, "skipped": 0, "errors": 1 }));
    let states = |file: &WalName| -> serde_json::Value {
        let files = ended["files"].as_array().unwrap();
        files.iter().find(|line| line["file"] == file.to_string()).unwrap().clone()
    };
    let name = site.name(1);
    assert_eq!(states(&name), json!({ "file": name.to_string(), "state": "already archived", "reason": null }));
    assert_eq!(states(&site.name(3))["state"], "archived");
    let failed = states(&site.name(2));
    assert!(failed["state"] == "set aside" && failed["reason"].as_str().unwrap().contains("already holds"), "{failed}");
    assert!(tree(&incoming(&site)).is_empty());
    let aside = set_aside(&site);
    let (aside_name, content) = &aside[0];
    assert!(aside.len() == 1 && *content == other);
    assert!(
        aside_name.starts_with(&format!("{}.2", site.name(2))) && aside_name.ends_with(".duplicate"),
        "{aside_name}"
    );
    assert!(failed["location"].as_str().unwrap().ends_with(aside_name.as_str()), "{failed}");
    assert_eq!(site.catalogue().len(), 3);
    // Told until somebody has settled it.
    assert!(run(&site, &["errors"]).with(1).out.contains("duplicates: 1"));
    run(&site, &["errors", "--clear", aside_name]).with(0);
    run(&site, &["errors"]).with(0);
}

/// What lies in the archive's folder of errors: names and contents.
fn set_aside(site: &Site) -> Vec<(String, Vec<u8>)> {
    let folder = site.storage().join("main/errors");
    if !folder.exists() {
        return Vec::new();
    }
    tree(&folder).into_iter().map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap())).collect()
}

#[test]
fn a_directory_of_nothing_but_junk_is_emptied_only_for_an_archive_that_was_begun() {
    let site = site();
    let junk = bring(&site, "notes.txt", b"x");
    let ended = archive_directory(&site, &[]).with(4);
    assert!(ended.err.contains("there is no archive at"), "{}", ended.err);
    assert!(junk.exists() && tree(&site.storage()).is_empty());
    bring_segment(&site, 1);
    archive_directory(&site, &["--keep"]).with(4);
    assert!(junk.exists() && set_aside(&site).is_empty(), "--keep leaves all that lies there");
    fs::remove_file(incoming(&site).join(site.name(1).to_string())).unwrap();
    let ended = archive_directory(&site, &[]).with(4);
    assert_eq!(ended.out, "total: 1, run: 0, skipped: 0, errors: 1\n");
    assert!(!junk.exists());
    assert_eq!(set_aside(&site).len(), 1);
}

#[test]
fn no_more_than_a_batch_is_archived_in_one_run_and_what_cannot_be_takes_nobodys_place() {
    let site = site();
    (1..=5).for_each(|number| drop(bring_segment(&site, number)));
    // In front of all others in name and in PostgreSQL's order.
    let waiting = bring(&site, &format!("{}.partial", site.name(0)), &site.content(&site.name(0)));
    let damaged = bring(&site, &site.name(0).to_string(), b"no WAL");
    bring(&site, "#junk", b"x");
    let left = |site: &Site| tree(&incoming(site)).len();
    for (size, after) in [("1", 6), ("2", 4)] {
        let ended = archive_directory(&site, &["--batch-size", size]).with(4);
        assert!(ended.out.contains(&format!("run: {size}, skipped: 1, errors:")), "{}", ended.out);
        assert_eq!(left(&site), after);
    }
    let [first, last] = [1, 3].map(|number| site.name(number).to_string());
    assert_eq!((site.catalogue().first(), site.catalogue().last()), (Some(&first), Some(&last)));
    assert!(waiting.exists() && damaged.exists());
    for (wrong, code) in [("-1", 2), ("x", 3), ("", 3), ("2000000000", 3)] {
        let ended = archive_directory(&site, &["--batch-size", wrong]).with(code);
        assert!(code == 2 || ended.err.contains("archiver.archiver_batch_size"), "{}", ended.err);
    }
    assert!(archive_directory(&site, &[]).with(4).out.contains("total: 4, run: 2,"));
    assert_eq!(left(&site), 2);
}

#[test]
fn what_cannot_be_removed_is_not_set_aside_again_and_again() {
    let site = site();
    bring_segment(&site, 1);
    archive_directory(&site, &[]).with(0);
    bring(&site, "junk", b"x");
    fs::write(incoming(&site).join(site.name(1).to_string()), b"x").unwrap();
    let Some(read_only) = ReadOnly::make(&incoming(&site)) else { return };
    for _ in 0..2 {
        let ended = archive_directory(&site, &[]).with(4);
        assert!(ended.err.contains("It stays where it is: could not remove files from directory"), "{}", ended.err);
    }
    assert!(set_aside(&site).is_empty());
    drop(read_only);
}

#[test]
fn more_files_than_share_a_catalogue_write_are_archived_in_order() {
    let site = site();
    (0..40).rev().for_each(|number| drop(bring_segment(&site, number)));
    let ended = archive_directory(&site, &[]).with(0);
    assert_eq!(ended.out, "total: 40, run: 40, skipped: 0, errors: 0\n");
    let expected: Vec<String> = (0..40).map(|number| site.name(number).to_string()).collect();
    assert_eq!(site.catalogue(), expected);
    assert!(tree(&incoming(&site)).is_empty());
    assert_eq!(archive_directory(&site, &[]).with(0).out, "total: 0, run: 0, skipped: 0, errors: 0\n");
    assert_eq!(archive_directory(&site, &["--quiet"]).with(0).out, "");
    assert_eq!(archive_directory(&site, &["--json"]).with(0).json()["summary"]["total"], 0);
}

#[test]
fn nothing_is_removed_that_has_no_line_in_the_catalogue() {
    let site = site();
    (1..20).for_each(|number| drop(bring_segment(&site, number)));
    let wals = site.storage().join("main/wals");
    fs::create_dir_all(wals.join("main-xlog.db")).unwrap();
    let ended = archive_directory(&site, &["--retry-timeout", "1s"]).with(4);
    assert_eq!(tree(&incoming(&site)).len(), 19, "{}", ended.err);
    fs::remove_dir(wals.join("main-xlog.db")).unwrap();
    let ended = archive_directory(&site, &[]).with(0);
    assert_eq!(ended.out, "total: 19, run: 19, skipped: 0, errors: 0\n");
    assert_eq!((tree(&incoming(&site)).len(), site.catalogue().len()), (0, 19));
}

#[test]
fn a_failing_archive_is_told_once_and_the_rest_is_not_tried() {
    let site = site();
    run(&site, &["archive", &named(&site.offer_segment(1))]).with(0);
    (2..30).for_each(|number| drop(bring_segment(&site, number)));
    site.unmount();
    let ended = archive_directory(&site, &[]).with(4);
    assert_eq!(ended.out, "total: 28, run: 0, skipped: 27, errors: 1\n");
    assert_eq!(ended.err.matches("has vanished").count(), 1, "{}", ended.err);
    assert_eq!(tree(&incoming(&site)).len(), 28);
}

#[test]
fn a_servers_own_wal_and_the_archive_itself_are_no_incoming_directories() {
    let site = site().with(Setting::Compression, "none");
    let file = site.offer_segment(1);
    for path in ["pg_wal", "../data/pg_wal", "pg_wal/"] {
        let refused = run(&site, &["archive", path]).with(4);
        assert!(refused.err.contains("is the WAL directory of a server"), "{}", refused.err);
    }
    assert!(tree(&site.storage()).is_empty() && file.path.exists());
    run(&site, &["archive", &named(&file)]).with(0);
    let stored = site.stored(&file.name);
    // By whatever path, and whatever it is to be archived to.
    symlink(site.storage(), site.path("link")).unwrap();
    fs::create_dir(site.path("other")).unwrap();
    let other = format!("file://{}", site.path("other").display());
    for directory in [stored.parent().unwrap(), &site.storage().join("main/wals"), &site.path("link/main/wals")] {
        for arguments in [&["archive"][..], &["--storage", &other, "archive"]] {
            let refused = run(&site, &[arguments, &[&directory.display().to_string()]].concat()).with(4);
            assert!(refused.err.contains("is part of an archive"), "{}", refused.err);
        }
    }
    assert!(stored.exists());
}

#[test]
fn a_partial_segment_that_may_still_be_written_is_left_alone() {
    let site = site();
    bring_segment(&site, 1);
    let partial = bring(&site, &format!("{}.partial", site.name(2)), &site.content(&site.name(2)));
    let ended = archive_directory(&site, &["--verbose"]).with(0);
    assert!(ended.out.contains(".partial: skipped (its segment may still be being written"), "{}", ended.out);
    assert!(partial.exists());
    // A promotion has ended its timeline; the history is archived already.
    bring(&site, HISTORY, b"1\t0/200000\tx\n");
    fs::rename(&partial, site.path("aside")).unwrap();
    archive_directory(&site, &[]).with(0);
    fs::rename(site.path("aside"), &partial).unwrap();
    archive_directory(&site, &[]).with(0);
    assert!(!partial.exists());
    assert_eq!(site.catalogue().len(), 3);
}

#[test]
fn a_data_directory_that_is_none_is_refused_where_it_was_named() {
    let site = site();
    bring_segment(&site, 1);
    archive_directory(&site, &[]).with(0);
    let (name, storage) = (site.name(1).to_string(), format!("file://{}", site.storage().display()));
    for command in [&["list"][..], &["exists", &name], &["status"]] {
        let typed = [&["-D", "/nowhere", "--storage", &storage], command].concat();
        let refused = run(&site, &typed).with(3);
        assert!(refused.err.contains("\"/nowhere\" is no data directory"), "{}", refused.err);
    }
}

#[test]
fn a_directory_that_cannot_be_read_is_told() {
    let site = site();
    let directory = incoming(&site);
    run(&site, &["archive", &site.path("missing").display().to_string()]).with(4);
    if nix::unistd::geteuid().is_root() {
        println!("in part skipped: root reads every directory");
        return;
    }
    fs::set_permissions(&directory, Permissions::from_mode(0o000)).unwrap();
    assert!(archive_directory(&site, &[]).with(4).err.contains("Permission denied"));
    fs::set_permissions(&directory, Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn a_source_that_cannot_be_removed_is_told_though_it_is_archived() {
    let site = site();
    bring_segment(&site, 1);
    let ended = {
        let Some(_read_only) = ReadOnly::make(&incoming(&site)) else { return };
        archive_directory(&site, &[]).with(4)
    };
    assert!(ended.err.contains("was archived but not removed: could not remove file"), "{}", ended.err);
    assert_eq!(site.catalogue().len(), 1);
    archive_directory(&site, &[]).with(0);
    assert!(tree(&incoming(&site)).is_empty());
}

#[test]
fn a_reader_who_leaves_stops_no_archiving() {
    let site = site();
    (0..20).for_each(|number| drop(bring_segment(&site, number)));
    let directory = incoming(&site).display().to_string();
    let mut command = program(&site, &["archive", "--verbose", &directory]);
    let mut archiving = command.stdout(Stdio::piped()).spawn().expect("run archiver");
    drop(archiving.stdout.take());
    assert_eq!(archiving.wait().unwrap().code(), Some(0));
    assert_eq!(site.catalogue().len(), 20);
}
