//! Messages in the server log, in PostgreSQL's three parts.

use archiver_core::report::Report;
use pgrx::pg_sys::panic::ErrorReport;
use pgrx::{PgLogLevel, PgSqlErrorCode};

/// Writes a message to the server log (or to the client, in a backend). Never raises: levels from ERROR up are not for it.
pub fn log(level: PgLogLevel, report: Report) {
    let is_trouble = level as i32 >= PgLogLevel::WARNING as i32;
    let code =
        if is_trouble { PgSqlErrorCode::ERRCODE_IO_ERROR } else { PgSqlErrorCode::ERRCODE_SUCCESSFUL_COMPLETION };
    let mut entry = ErrorReport::new(code, report.message, "archiver");
    if let Some(detail) = report.detail {
        entry = entry.set_detail(detail);
    }
    if let Some(hint) = report.hint {
        entry = entry.set_hint(hint);
    }
    entry.report(level);
}

/// Ends the statement with an error, in a backend. It never returns.
pub fn raise(report: Report) -> ! {
    let mut error =
        ErrorReport::new(PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE, report.message, "archiver");
    if let Some(detail) = report.detail {
        error = error.set_detail(detail);
    }
    if let Some(hint) = report.hint {
        error = error.set_hint(hint);
    }
    error.report(PgLogLevel::ERROR);
    unreachable!("a level of ERROR does not return")
}

/// A message of one line.
pub fn log_line(level: PgLogLevel, message: String) {
    log(level, Report { message, detail: None, hint: None });
}
