#!/bin/bash
# demo.sh BINDIR: in a throw-away cluster of the PostgreSQL in BINDIR, archives pgbench's WAL to a local directory, drops a
# table "by accident", restores to the moment before from a base backup and the archive, and compares every table and every
# segment. Its last line begins with `demo: ok: ` only if all of that held; else it exits 1 with the logs' last lines.
# KEEP=1 leaves both servers up. All it listens on is a socket in its own folder; all it ends is what it started.
# STORAGE=s3 archives to the S3 server that with-s3.sh runs beside it.
set -euo pipefail
shopt -s inherit_errexit
umask 022

bindir=$1
dir=$(mktemp -d "${TMPDIR:-/tmp}/archiver-demo.XXXXXX")

# The server refuses to run as root; the caller's own PG* variables must not lead anywhere else.
as_postgres=()
if ((EUID == 0)); then
    as_postgres=(runuser -u postgres --)
    chown postgres "$dir"
fi
cd "$dir"
unset "${!PG@}"
export PGHOST=$dir PGUSER=postgres PGDATABASE=postgres

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
pg_ctl() { "${as_postgres[@]}" "$bindir/pg_ctl" "$@"; }
start() { pg_ctl -s -w -t 60 -D "$dir/$1" -l "$dir/$1.log" start; }
psql() { "$bindir/psql" -X -v ON_ERROR_STOP=1 "$@"; }
primary() { psql -Atq -p 5432 -c "$1"; }
restored() { psql -Atq -p 5433 -c "$1"; }
pgbench() { "$bindir/pgbench" "$@" >>"$dir/pgbench.log" 2>&1; }

verdict='demo: failed'
finish() {
    local status=$? server
    trap - EXIT
    ((status == 0)) || tail -n 25 "$dir"/*.log 2>/dev/null || true
    if [[ ${KEEP:-} ]]; then
        say 'Kept: the first server and the restored one; how to look into them, and how to end them:'
        printf 'psql -h %s -p %s -U postgres postgres\n' "$dir" 5432 "$dir" 5433
        for server in primary restored; do echo "${as_postgres[*]} $bindir/pg_ctl -D $dir/$server stop"; done
        echo "rm -r $dir"
    else
        for server in primary restored; do
            [[ ! -e $dir/$server/postmaster.pid ]] || pg_ctl -s -D "$dir/$server" -m immediate stop || true
        done
        rm -rf "$dir"
    fi
    echo "$verdict"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# wait_for SECONDS WHAT QUERY...: asks until the answer is "t".
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2 answer
    shift 2
    while answer=$("$@") || return 1 && [[ $answer != t ]]; do
        ((SECONDS < deadline)) || { echo "demo: waited in vain for $what" >&2; return 1; }
        sleep 0.2
    done
}

# checksums SERVER: one line for each table, over its rows in order.
checksums() {
    local table sum
    for table in accounts branches tellers history; do
        sum=$("$1" "COPY (SELECT * FROM pgbench_$table t ORDER BY t) TO STDOUT" | sha256sum)
        echo "pgbench_$table ${sum:0:32}"
    done
}

case ${STORAGE:-file} in
    file)
        "${as_postgres[@]}" mkdir "$dir/archive"
        storage=file://$dir/archive
        ;;
    s3)
        # As a person would who follows the documentation: a bucket, and a file with the key that may write to it.
        curl -sS --fail -X PUT --aws-sigv4 aws:amz:us-east-1:s3 -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' \
            --cacert "$ARCHIVER_TEST_S3_CA" --user "$ARCHIVER_TEST_CEPH_KEY:$ARCHIVER_TEST_CEPH_SECRET" \
            "$ARCHIVER_TEST_CEPH/demo"
        cp "$ARCHIVER_TEST_S3_CA" "$dir/ca.crt"
        printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' \
            "$ARCHIVER_TEST_CEPH_KEY" "$ARCHIVER_TEST_CEPH_SECRET" | "${as_postgres[@]}" tee "$dir/credentials" >/dev/null
        "${as_postgres[@]}" chmod 600 "$dir/credentials"
        storage="s3://demo/wal?endpoint=$ARCHIVER_TEST_CEPH&ca_file=$dir/ca.crt&credentials_file=$dir/credentials"
        ;;
    *) echo "demo: STORAGE is file or s3, not $STORAGE" >&2 && exit 2 ;;
esac

say 'A cluster that archives; added to its postgresql.conf:'
"${as_postgres[@]}" "$bindir/initdb" -D "$dir/primary" -k -A trust -U postgres -E UTF8 --no-locale --no-sync >/dev/null
tee -a "$dir/primary/postgresql.conf" <<END
archive_mode = on
archive_library = 'archiver'
archiver.storage = '$storage'
wal_level = replica
listen_addresses = ''
unix_socket_directories = '$dir'
wal_keep_size = 8GB     # only for this demo: every segment is compared with its copy in the end
END
start primary
primary 'CREATE EXTENSION archiver'

say 'A base backup without WAL: that is left to the archive'
"${as_postgres[@]}" timeout 120 "$bindir/pg_basebackup" -D "$dir/restored" -X none -c fast --no-sync

say 'pgbench until 20 segments are archived'
# pgbench's own rows end in blanks, which would flatter any compression; these hold text as people store it.
pgbench -i -q -I dt -s 10
primary "
CREATE FUNCTION words(n bigint) RETURNS text LANGUAGE sql AS \$\$
  SELECT left(format('%s %s of %s, %s', w[1 + n % 8], md5(n::text), w[1 + n / 8 % 8], md5((n * 7)::text)), 84)
  FROM (SELECT '{customer,pending,invoice,shipped,https://example.test/,order line,Straße,true}'::text[]) AS t(w) \$\$;
INSERT INTO pgbench_branches SELECT n, 0, words(n) FROM generate_series(1, 10) n;
INSERT INTO pgbench_tellers SELECT n, (n - 1) / 10 + 1, 0, words(n) FROM generate_series(1, 100) n;
INSERT INTO pgbench_accounts SELECT n, (n - 1) / 100000 + 1, 0, words(n) FROM generate_series(1, 1000000) n"
pgbench -i -q -I vp -s 10
cat >"$dir/edit.sql" <<'END'
\set aid random(1, 100000 * :scale)
UPDATE pgbench_accounts SET filler = words(:aid + :client_id) WHERE aid = :aid;
END
primary 'CHECKPOINT'
deadline=$((SECONDS + 180))
until (($(primary 'SELECT archived_count FROM pg_stat_archiver') >= 20)); do
    ((SECONDS < deadline)) || { echo 'demo: 20 segments were not archived in 180 s' >&2; exit 1; }
    pgbench -n -c 4 -j 2 -T 4 -b tpcb-like@3 -f "$dir/edit.sql@1"
done
before=$(checksums primary)
echo "$before"

say 'A restore point, then the accident: DROP TABLE pgbench_accounts'
primary "SELECT pg_create_restore_point('before_accident')" >/dev/null
primary 'DROP TABLE pgbench_accounts'
last=$(primary 'SELECT pg_walfile_name(pg_switch_wal())')
wait_for 120 "the archiving of $last" primary "SELECT coalesce(last_archived_wal >= '$last', false) FROM pg_stat_archiver"

say 'SELECT * FROM archiver.status'
psql -x -c 'SELECT * FROM archiver.status'
say 'SELECT * FROM archiver.check()'
psql -c 'SELECT * FROM archiver.check()'

say 'The base backup, restored to that point; added to its postgresql.conf:'
tee -a "$dir/restored/postgresql.conf" <<END
restore_command = '$bindir/archiver restore %f %p'
recovery_target_name = 'before_accident'
recovery_target_action = 'promote'
archive_mode = off      # a second server must not write into the first one's archive
port = 5433
END
"${as_postgres[@]}" touch "$dir/restored/recovery.signal"
began=$SECONDS
start restored
wait_for 180 'the end of recovery' restored 'SELECT NOT pg_is_in_recovery()'
grep 'recovery stopping at restore point "before_accident"' "$dir/restored.log"
echo "restored in $((SECONDS - began)) s"
after=$(checksums restored)
echo "$after"
[[ $after == "$before" ]] || { echo 'demo: the restored tables differ' >&2; exit 1; }

say 'Every segment fetched back and compared with the one in pg_wal'
segments=0
for done in "$dir"/primary/pg_wal/archive_status/*.done; do
    name=$(basename "$done" .done)
    [[ $name =~ ^[0-9A-F]{24}$ ]] || continue
    "${as_postgres[@]}" "$bindir/archiver" -D "$dir/primary" restore "$name" "$dir/fetched"
    cmp "$dir/primary/pg_wal/$name" "$dir/fetched"
    segments=$((segments + 1))
done
read -r stored bytes < <("${as_postgres[@]}" "$bindir/archiver" -D "$dir/primary" list |
    awk '$1 ~ /^[0-9A-F]+$/ && length($1) == 24 { files++; bytes += $5 } END { print files, bytes }')
echo "$segments segments identical; $stored in the archive"
((segments >= 20 && segments == stored)) || { echo 'demo: archive and pg_wal hold different segments' >&2; exit 1; }

mib() { echo "$((($1 + 524288) / 1048576)) MiB"; }
verdict="demo: ok: $segments segments, $(mib $((segments * 16777216))) stored as $(mib "$bytes"); restored to \"before_accident\"; checksums equal"
