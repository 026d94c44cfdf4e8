-- The status row: what this library knows, joined with what PostgreSQL tells by itself.
-- One row always, NULL where a thing is not known; it never raises for a thing that cannot be known.
CREATE FUNCTION archiver.status() RETURNS TABLE (
    storage text,
    server_name text,
    system_identifier text,
    configured boolean,
    archive_mode text,
    in_recovery boolean,
    compression text,
    encryption text,
    archiver_pid integer,
    queue_files bigint,
    queue_bytes bigint,
    oldest_ready_seconds double precision,
    in_flight bigint,
    current_wal text,
    lag_bytes bigint,
    last_archived_wal text,
    last_archived_at timestamptz,
    last_failed_wal text,
    last_failed_at timestamptz,
    last_error text,
    failing_since timestamptz,
    next_retry_at timestamptz,
    failed_count bigint,
    archived_count bigint,
    bytes_read bigint,
    bytes_stored bigint,
    compression_ratio double precision,
    read_ahead_hits bigint,
    retries bigint,
    put_ms_p50 double precision,
    put_ms_p99 double precision,
    archived_per_hour double precision,
    create_only text,
    credential_source text,
    config_error text,
    stats_since timestamptz
)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT
        f.storage,
        f.server_name,
        f.system_identifier,
        f.configured,
        current_setting('archive_mode'),
        pg_is_in_recovery(),
        f.compression,
        f.encryption,
        p.pid,
        f.queue_files,
        f.queue_bytes,
        f.oldest_ready_seconds,
        f.in_flight,
        CASE WHEN NOT pg_is_in_recovery() THEN pg_walfile_name(pg_current_wal_lsn()) END,
        f.lag_bytes,
        a.last_archived_wal,
        a.last_archived_time,
        a.last_failed_wal,
        a.last_failed_time,
        f.last_error,
        to_timestamp(f.failing_since_us / 1e6),
        -- PostgreSQL looks again after a minute, or when the next segment is complete.
        CASE WHEN f.failing_since_us IS NOT NULL THEN a.last_failed_time + interval '1 minute' END,
        a.failed_count,
        a.archived_count,
        f.bytes_read,
        f.bytes_stored,
        f.compression_ratio,
        f.read_ahead_hits,
        f.retries,
        f.put_ms_p50,
        f.put_ms_p99,
        a.archived_count / nullif(EXTRACT(epoch FROM clock_timestamp() - a.stats_reset)::float8, 0) * 3600,
        f.create_only,
        f.credential_source,
        f.config_error,
        to_timestamp(f.stats_since_us / 1e6)
    FROM pg_stat_archiver AS a
    LEFT JOIN pg_stat_activity AS p ON p.backend_type = 'archiver'
    CROSS JOIN LATERAL jsonb_to_record(archiver.facts(a.last_archived_wal)) AS f(
            storage text,
            server_name text,
            system_identifier text,
            configured boolean,
            compression text,
            encryption text,
            queue_files bigint,
            queue_bytes bigint,
            oldest_ready_seconds double precision,
            in_flight bigint,
            lag_bytes bigint,
            last_error text,
            failing_since_us double precision,
            bytes_read bigint,
            bytes_stored bigint,
            compression_ratio double precision,
            read_ahead_hits bigint,
            retries bigint,
            put_ms_p50 double precision,
            put_ms_p99 double precision,
            create_only text,
            credential_source text,
            config_error text,
            stats_since_us double precision
        );
$$;

CREATE VIEW archiver.status AS SELECT * FROM archiver.status();

-- How streaming stands: one row always, NULL where a thing is not known.
CREATE FUNCTION archiver.receive_wal_status() RETURNS TABLE (
    streaming_archiver boolean,
    directory text,
    running boolean,
    pid integer,
    receiving_since timestamptz,
    current_file text,
    received_lsn pg_lsn,
    server_lsn pg_lsn,
    server_lsn_at timestamptz,
    lag_bytes bigint,
    lag_seconds double precision,
    archiver_name text,
    slot_name text,
    slot_active boolean,
    slot_wal_status text,
    synchronous boolean,
    sync_state text,
    waiting_files bigint,
    last_archived_wal text,
    last_archived_at timestamptz,
    last_part text,
    last_part_at timestamptz,
    last_error text,
    failing_since timestamptz
)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT
        f.streaming_archiver,
        f.directory,
        f.running,
        f.pid,
        to_timestamp(f.receiving_since_us / 1e6),
        f.current_file,
        f.received_lsn,
        f.server_lsn,
        to_timestamp(f.server_lsn_us / 1e6),
        f.lag_bytes,
        f.lag_seconds,
        f.archiver_name,
        f.slot_name,
        f.slot_active,
        f.slot_wal_status,
        f.synchronous,
        f.sync_state,
        f.waiting_files,
        f.last_archived_wal,
        to_timestamp(f.last_archived_us / 1e6),
        f.last_part,
        to_timestamp(f.last_part_us / 1e6),
        f.last_error,
        to_timestamp(f.failing_since_us / 1e6)
    FROM jsonb_to_record(archiver.receive_wal_facts()) AS f(
            streaming_archiver boolean,
            directory text,
            running boolean,
            pid integer,
            receiving_since_us double precision,
            current_file text,
            received_lsn pg_lsn,
            server_lsn pg_lsn,
            server_lsn_us double precision,
            lag_bytes bigint,
            lag_seconds double precision,
            archiver_name text,
            slot_name text,
            slot_active boolean,
            slot_wal_status text,
            synchronous boolean,
            sync_state text,
            waiting_files bigint,
            last_archived_wal text,
            last_archived_us double precision,
            last_part text,
            last_part_us double precision,
            last_error text,
            failing_since_us double precision
        );
$$;

-- Files that were refused (the archive holds another of that name) or set aside, oldest first.
CREATE FUNCTION archiver.errors() RETURNS TABLE (
    name text,
    reason text,
    since timestamptz,
    in_pg_wal boolean,
    location text,
    detail text
)
LANGUAGE sql VOLATILE
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT e.name, e.reason, t.since, e.in_pg_wal, e.location, e.detail
    FROM archiver.error_rows() AS e
    CROSS JOIN LATERAL (
        SELECT coalesce(e.since, to_timestamp(substr(e.since_text, 1, 15) || '+00', 'YYYYMMDD"T"HH24MISSTZH'))
    ) AS t(since)
    ORDER BY t.since, e.name;
$$;

COMMENT ON FUNCTION archiver.archive_now(interval) IS 'completes a WAL segment and waits until it stands in the archive';
COMMENT ON FUNCTION archiver.queue() IS 'files that wait to be archived, in the order in which PostgreSQL will ask for them';
COMMENT ON FUNCTION archiver.errors() IS 'files that were refused or set aside';
COMMENT ON FUNCTION archiver.clear_error(text) IS 'removes one file that was set aside, by its exact name';
COMMENT ON FUNCTION archiver.delete_wal(text, boolean) IS 'archived files before a WAL file, along its own history; deletes them unless dry_run';
COMMENT ON FUNCTION archiver.list_wal(text, text) IS 'archived files between two names, both included';
COMMENT ON FUNCTION archiver.gaps() IS 'segments that the archive lacks between those that it holds';
COMMENT ON FUNCTION archiver.verify(text, text) IS 'whether each archived file between two names, both included, is what was archived';
COMMENT ON FUNCTION archiver.rebuild_catalogue() IS 'makes catalogue and sums of a local archive anew from what is stored';
COMMENT ON FUNCTION archiver.receive_wal_status() IS 'how receiving WAL while it is written stands, one row';
COMMENT ON FUNCTION archiver.receive_wal_facts() IS 'what archiver.receive_wal_status() is made from';
COMMENT ON FUNCTION archiver.reset_receive_wal() IS 'lets receiving begin where the server or its slot is; the archive keeps a gap';
COMMENT ON FUNCTION archiver.error_rows() IS 'what archiver.errors() is made from';
COMMENT ON FUNCTION archiver.status() IS 'how archiving stands, one row';
COMMENT ON VIEW archiver.status IS 'how archiving stands, one row';
COMMENT ON FUNCTION archiver.check(boolean) IS 'whether archiving works, one row for each thing that could keep it from working';
COMMENT ON FUNCTION archiver.facts(text) IS 'what archiver.status is made from';

-- Whoever monitors may look; what writes is for superusers, and for whom they name.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA archiver FROM PUBLIC;
GRANT USAGE ON SCHEMA archiver TO pg_monitor;
GRANT EXECUTE ON FUNCTION
    archiver.facts(text), archiver.status(), archiver.check(boolean), archiver.queue(),
    archiver.error_rows(), archiver.errors(), archiver.receive_wal_facts(), archiver.receive_wal_status()
TO pg_monitor;
GRANT SELECT ON archiver.status TO pg_monitor;
