-- Names, types and privileges that users rely on.
CREATE EXTENSION archiver;
SELECT extname, extversion ~ '^\d+\.\d+\.\d+$' AS has_version, extrelocatable, nspname
FROM pg_extension JOIN pg_namespace AS n ON n.oid = extnamespace WHERE extname = 'archiver';
-- Columns and results
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = 'archiver.status'::regclass AND attnum > 0 ORDER BY attnum;
SELECT proname, pg_get_function_arguments(oid) AS arguments,
       CASE WHEN proname NOT IN ('status', 'receive_wal_status') THEN pg_get_function_result(oid) END AS result,
       provolatile, proisstrict, prosecdef, proconfig
FROM pg_proc WHERE pronamespace = 'archiver'::regnamespace ORDER BY proname COLLATE "C";
SELECT name, format_type(type, NULL) FROM pg_proc, unnest(proargnames, proallargtypes) AS columns(name, type)
WHERE oid = 'archiver.receive_wal_status'::regproc;
-- Privileges
SELECT proname, r.rolname, has_function_privilege(r.rolname, p.oid, 'EXECUTE')
FROM pg_proc AS p, (VALUES ('public'), ('pg_monitor'), ('pg_read_all_stats')) AS r(rolname)
WHERE pronamespace = 'archiver'::regnamespace ORDER BY proname COLLATE "C", r.rolname COLLATE "C";
SELECT r.rolname, has_table_privilege(r.rolname, 'archiver.status', 'SELECT') AS may_select,
       has_schema_privilege(r.rolname, 'archiver', 'USAGE') AS may_use,
       has_schema_privilege(r.rolname, 'archiver', 'CREATE') AS may_create
FROM (VALUES ('public'), ('pg_monitor')) AS r(rolname);
-- Settings
LOAD 'archiver';
SELECT name, vartype, context, boot_val FROM pg_settings WHERE name LIKE 'archiver.%' ORDER BY name COLLATE "C";
-- One row, also where little is known
SELECT count(*), bool_and(configured), bool_and(in_recovery) FROM archiver.status;
SELECT streaming_archiver, running, pid, lag_bytes, sync_state, last_error FROM archiver.receive_wal_status();
SELECT name, state FROM archiver.check() WHERE name IN ('archive_mode', 'archive_library', 'settings') ORDER BY name COLLATE "C";
DROP EXTENSION archiver;
SELECT count(*) FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE nspname = 'archiver';
