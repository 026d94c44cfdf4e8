//! archiver: the WAL archiver that lives inside PostgreSQL.
pgrx::pg_module_magic!();
