//! In-backend tests: what SQL sees, from inside a session. Run by `make test-pg`.
//!
//! No archiver process is at work here; what one does is tested on real clusters (tests/server).

/// Runs inside the server as SQL functions; each test is a transaction that is rolled back.
#[pgrx::pg_schema]
mod tests {
    use pgrx::prelude::*;

    fn text(sql: &str) -> Option<String> {
        Spi::get_one::<String>(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    fn number(sql: &str) -> Option<i64> {
        Spi::get_one::<i64>(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    #[pg_test]
    fn every_setting_is_a_text_that_a_reload_changes() {
        let settings = archiver_core::config::Setting::ALL.len() as i64;
        assert_eq!(number("SELECT count(*) FROM pg_settings WHERE name LIKE 'archiver.%'"), Some(settings));
        let others = "SELECT count(*) FROM pg_settings WHERE name LIKE 'archiver.%' \
                      AND (vartype <> 'string' OR context <> 'sighup')";
        assert_eq!(number(others), Some(0));
        assert_eq!(text("SELECT current_setting('archiver.memory_limit')").as_deref(), Some("256MB"));
    }

    #[pg_test]
    fn status_is_one_row_also_where_nothing_is_configured() {
        assert_eq!(number("SELECT count(*) FROM archiver.status"), Some(1));
        let configured = Spi::get_one::<bool>("SELECT configured FROM archiver.status").unwrap();
        assert_eq!(configured, Some(false));
        let error = text("SELECT config_error FROM archiver.status");
        assert_eq!(error.as_deref(), Some("parameter \"archiver.storage\" is not set"));
        assert_eq!(text("SELECT storage FROM archiver.status"), None);
        assert_eq!(number("SELECT archiver_pid::bigint FROM archiver.status"), None);
    }

    #[pg_test]
    fn status_names_the_cluster_and_counts_the_queue() {
        let is_same = "SELECT (s.system_identifier = c.system_identifier::text)::text \
                       FROM archiver.status AS s, pg_control_system() AS c";
        assert_eq!(text(is_same).as_deref(), Some("true"));
        assert_eq!(number("SELECT queue_files FROM archiver.status"), Some(0));
        assert_eq!(text("SELECT encryption FROM archiver.status").as_deref(), Some("none"));
    }

    #[pg_test]
    fn check_says_what_is_missing_and_what_to_do() {
        let state = |name: &str| text(&format!("SELECT state FROM archiver.check() WHERE name = '{name}'"));
        assert_eq!(state("archive_mode").as_deref(), Some("failed"));
        assert_eq!(state("archive_library").as_deref(), Some("failed"));
        assert_eq!(state("settings").as_deref(), Some("failed"));
        // Nothing is known of a storage that is not named.
        assert_eq!(number("SELECT count(*) FROM archiver.check() WHERE name = 'storage'"), Some(0));
        assert_eq!(number("SELECT count(*) FROM archiver.check() WHERE state <> 'ok' AND hint IS NULL"), Some(0));
        assert_eq!(
            number("SELECT count(*) FROM archiver.check() WHERE state NOT IN ('ok', 'warning', 'failed')"),
            Some(0)
        );
    }

    #[pg_test(error = "parameter \"archiver.storage\" cannot be changed now")]
    fn a_session_cannot_change_where_wal_goes() {
        Spi::run("SET archiver.storage = 'file:///elsewhere'").unwrap();
    }
}

/// Asked for by `cargo pgrx test`: called once before the first test.
#[cfg(test)]
pub fn setup(_options: Vec<&str>) {}

/// Asked for by `cargo pgrx test`: settings of the server that the tests run in.
#[cfg(test)]
pub fn postgresql_conf_options() -> Vec<&'static str> {
    vec![]
}
