//! The shape of the SQL interface, by PostgreSQL's own pg_regress.

use crate::cluster::{Cluster, bindir, server_program, text};
use std::fs;
use std::path::Path;

#[test]
fn the_sql_interface_has_its_shape_with_and_without_preload() {
    for preload in ["", "archiver"] {
        let libraries = server_program("pg_config").arg("--pkglibdir").output().expect("run pg_config").stdout;
        let pg_regress = format!("{}/pgxs/src/test/regress/pg_regress", text(&libraries).trim());
        let cluster = Cluster::new(1).with("shared_preload_libraries", preload).started();
        let output = cluster
            .client(&pg_regress)
            .arg(format!("--inputdir={}/pg_regress", env!("CARGO_MANIFEST_DIR")))
            .arg(format!("--outputdir={}", cluster.path("regress").display()))
            .arg(format!("--bindir={}", bindir().display()))
            .arg(format!("--host={}", cluster.directory().display()))
            .args(["--user=postgres", "--dbname=regression", "interface", "errors"])
            .output()
            .expect("run pg_regress");
        let diffs = fs::read_to_string(cluster.path("regress/regression.diffs")).unwrap_or_default();
        assert!(output.status.success(), "{}{}\n{diffs}", text(&output.stdout), text(&output.stderr));
        assert!(
            !Path::new(env!("CARGO_MANIFEST_DIR")).join("pg_regress/results").exists(),
            "nothing is left in the sources"
        );
    }
}
